"""What a result stands on: images, split, seed, mode, settings and defaults. Results are computed again from
saved weights and image files, and a spy records what reaches networks, loss and optimizer."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace as Seen
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics as oracle
from torch.nn import functional as F
from torch.nn.modules import module as hooks
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import to_tensor

import augment
import data
import fewshot
import models
import moe
import runs
import train

cross_entropy, dropout = F.cross_entropy, F.dropout
COUNTS = {"train": [14, 12, 16, 18, 11, 13, 17, 15, 12, 16], "valid": [5, 9, 6, 8, 5, 7, 9, 6, 8, 5],
          "test": [9, 6, 11, 7, 12, 8, 6, 10, 7, 13]}  # fmt: skip
FEW = {"train": [6, 6], "valid": [1, 1], "test": [1, 1]}


def start(script, *words):
    """Run a script's main in this process and folder, with results in `results`."""
    argv = [f"{script.__name__}.py", "--device", "cpu", *" ".join(words).split()]
    with torch.enable_grad(), mock.patch.object(sys, "argv", argv):
        script.main()


def write_images(counts):
    """Each class has a pattern, mixed with another's; splits differ in size, balance, colour, difficulty."""
    patterns = np.random.default_rng(7).integers(40, 200, (10, 4, 4, 3)).repeat(8, 1).repeat(8, 2)
    kinds = {"train": (0.6, (0, 0, 0)), "valid": (0.5, (12, 0, -10)), "test": (0.8, (-8, 4, 12))}
    generator = np.random.default_rng(0)
    for split, (most, tint) in kinds.items():
        for label, i in ((label, i) for label, size in enumerate(counts[split]) for i in range(size)):
            path = Path("images", split, data.CLASSES[label], f"{i:03}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            share, other = generator.uniform(0, most), generator.integers(len(counts[split]))
            image = patterns[label] + share * (patterns[other] - patterns[label])
            image += generator.normal(tint, 25, (32, 32, 3))
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path)
    return "--data images --amp off"


def read_images(split):
    """A split's images, float (N, 3, 32, 32), normalised by the train split's mean and std, and labels."""
    folders = [ImageFolder(f"images/{name}", to_tensor) for name in ("train", split)]
    known, images = (torch.stack([image for image, _ in folder]) for folder in folders)
    std, mean = torch.std_mean(known, (0, 2, 3), correction=0, keepdim=True)
    return (images - mean) / std, torch.tensor(folders[1].targets)


def identify(inputs, images):
    """Which of the images each network input was, int64 (N,), and its changed pixels, bool (N, 1024)."""
    differs = [((images - image).abs() > 0.01).any(1).flatten(1) for image in inputs]  # each (M, 1024)
    rows = [int(changed.sum(1).argmin()) for changed in differs]
    return torch.tensor(rows), torch.stack([changed[row] for changed, row in zip(differs, rows, strict=True)])


def check_metrics(found, logits, labels):
    assert found["loss"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-4)
    predicted = logits.argmax(1)
    assert found["accuracy"] == pytest.approx(oracle.accuracy_score(labels, predicted), abs=1e-9)
    for name in ("precision", "recall", "f1"):
        score = getattr(oracle, f"{name}_score")(labels, predicted, average="macro", zero_division=0)
        assert found[name] == pytest.approx(score, abs=1e-9)
    assert len(predicted.unique()) > 1


def read_run(pattern):
    """The result, weights and path of the first run and seed that match."""
    path = min(Path().glob(f"{pattern}/seed*.json"))
    return json.loads(path.read_text()), torch.load(path.with_suffix(".pt"), weights_only=True), path


@pytest.fixture
def spy(tmp_path, monkeypatch):
    """In an empty folder: lists of what reaches the outermost network, dropout, loss and optimizer."""
    monkeypatch.chdir(tmp_path)
    spy, depth = Seen(passes=[], masks=[], losses=[], steps=[], at_step=lambda: None), [0]

    def enter(module, inputs):
        depth[0] += 1

    def leave(module, inputs, output):
        depth[0] -= 1
        if not depth[0] and inputs[0].ndim > 2:  # images, or features of several experts
            copies = {"inputs": inputs[0].clone(), "weight": next(module.parameters()).detach().clone()}
            spy.passes.append(Seen(training=module.training, **copies))

    def loss(logits, labels, **options):
        if logits.requires_grad:
            spy.losses.append((logits.detach().clone(), labels.clone()))
        return cross_entropy(logits, labels, **options)

    def drop(inputs, p=0.5, training=True, inplace=False):
        mask = dropout(torch.ones_like(inputs), p, training)
        if training:
            spy.masks.append((p, mask))
        return inputs * mask

    def step(optimizer, *_):
        spy.steps.append({**optimizer.param_groups[0], "type": type(optimizer).__name__})
        spy.at_step()

    monkeypatch.setattr(F, "cross_entropy", loss)
    monkeypatch.setattr(F, "dropout", drop)
    before = hooks.register_module_forward_pre_hook(enter)
    with before, hooks.register_module_forward_hook(leave), register_optimizer_step_pre_hook(step):
        yield spy


# Computed again from what a run leaves behind


@torch.no_grad()
def test_a_supervised_result_follows_from_its_weights_and_the_files(spy):
    settings = "--aug flip+cutout --label-smoothing 0.3 --dropout 0.1 --epochs 4 --batch-size 16"
    start(train, write_images(COUNTS), settings)
    result, saved, path = read_run("results/custom-flip+cutout-*")
    assert result["data"]["classes"] == saved["classes"] == sorted(data.CLASSES)
    assert [result["data"][split] for split in COUNTS] == [sum(sizes) for sizes in COUNTS.values()]
    model = models.load(path.with_suffix(".pt"))
    for split, found in (("valid", result["history"][-1]["valid"]), ("test", result["test"])):
        images, labels = read_images(split)
        logits = model(images)
        check_metrics(found, logits, labels)
    assert result["confusion"] == oracle.confusion_matrix(labels, logits.argmax(1)).tolist()
    check_metrics(result["test_tta"], (logits + model(images.flip(3))) / 2, labels)


@torch.no_grad()
def test_a_mixture_and_its_ensembles_follow_from_their_weights_and_the_files(spy):
    files = write_images({**COUNTS, "train": [3, 4, 5, 4, 3, 4, 5, 3, 4, 5]})
    start(moe, files, "--epochs 2 --batch-size 8 --adapter-width 24")
    result, saved, _ = read_run("results/moe-*")
    experts = {}
    for path in Path("results").glob("custom-*/seed*.pt"):
        config = json.loads(path.with_suffix(".json").read_text())["config"]
        assert (config["aug"], config["dropout"], config["epochs"]) == ("hybrid", 0.2, 2)
        model = models.load(path)
        experts[f"{','.join(model.classes)} {config['seed']}"] = model
    bases = [f"{','.join(data.CLASSES)} {seed}" for seed in (1, 2, 3)]
    parts = [bases[0], "airplane,automobile,ship,truck 1", "cat,deer,dog,horse 1"]
    assert experts.keys() == {*bases, *parts}

    images, labels = read_images("test")
    logits = torch.stack([experts[base](images) for base in bases])
    for count, name in enumerate(("base", "pair", "ensemble"), start=1):
        check_metrics(result[name], logits[:count].softmax(2).mean(0).log(), labels)

    def features(split):
        return torch.stack([experts[part].features(read_images(split)[0]) for part in parts], 1).flatten(2)

    model = models.MixtureOfExperts(3, 10, False, 24).eval()
    model.load_state_dict(saved["state_dict"])
    check_metrics(result["history"][-1]["valid"], model(features("valid")), read_images("valid")[1])
    logits, weights = model(features("test")), model.weigh(model.adapt(features("test")))
    check_metrics(result["test"], logits, labels)
    assert result["confusion"] == oracle.confusion_matrix(labels, logits.argmax(1)).tolist()
    gate = [weights[labels == label].mean(0).tolist() for label in range(10)]
    assert np.allclose(result["gate"], gate, atol=1e-5) and np.std(gate, 0).max() > 1e-4

    # The gating network learned from the features of the train split, each epoch in another order
    inputs = torch.cat([one.inputs for one in spy.passes if one.training and one.inputs.ndim == 3])
    rows = torch.cdist(inputs.flatten(1), model.adapt(features("train")).flatten(1)).argmin(1)
    labels = read_images("train")[1]
    assert torch.equal(labels[rows], torch.cat([labels for _, labels in spy.losses])[-len(rows) :])
    first, second = rows.view(2, -1).tolist()
    assert first != second and sorted(first) == sorted(second) == list(range(len(labels)))


@torch.no_grad()
def test_a_few_shot_result_follows_from_its_weights_and_the_files(spy, monkeypatch):
    kmeans, clusters = fewshot.kmeans, []
    monkeypatch.setattr(fewshot, "kmeans", lambda *given: clusters.append(kmeans(*given)) or clusters[-1])
    start(fewshot, write_images(COUNTS), "--fraction 1 --way 5 --shot 2 --query 3 --episodes 50 --lr 0.01")
    result, saved, _ = read_run("results/fewshot-*")
    model = models.FewShotEmbedding().eval()
    model.load_state_dict(saved["state_dict"])
    points, labels = {}, {}
    for split in COUNTS:
        images, labels[split] = read_images(split)
        points[split] = model(images)

    def nearest(centres, owners):
        distances = (points["test"][:, None] - centres).square().sum(2)
        return torch.stack([-distances[:, owners == label].amin(1) for label in range(10)], 1)

    classes = [points["train"][labels["train"] == label] for label in range(10)]
    means = torch.stack([members.mean(0) for members in classes])
    check_metrics(result["one_prototype"], nearest(means, torch.arange(10)), labels["test"])
    check_metrics(result["nearest_image"], nearest(points["train"], labels["train"]), labels["test"])
    for members, (centres, inertia) in zip(classes, clusters[:10], strict=True):
        assert inertia == pytest.approx(torch.cdist(members, centres).square().amin(1).sum().item(), rel=1e-3)
    logits = nearest(torch.cat([centres for centres, _ in clusters[:10]]), torch.arange(30) // 3)
    check_metrics(result["test"], logits, labels["test"])
    assert result["confusion"] == oracle.confusion_matrix(labels["test"], logits.argmax(1)).tolist()

    def episodes(split):
        generator, hits = np.random.default_rng(3), []
        for _ in range(600):
            rows = [np.flatnonzero(labels[split] == k) for k in generator.choice(10, 5, replace=False)]
            rows = np.stack([generator.permutation(part)[:5] for part in rows])  # (5, 2 + 3)
            support, query = points[split][rows[:, :2]], points[split][rows[:, 2:]]
            found = torch.cdist(query.flatten(0, 1), support.mean(1)).argmin(1)
            hits.append((found == torch.arange(15) // 3).double().mean())
        return np.mean(hits), 1.96 * np.std(hits, ddof=1) / 600**0.5

    (accuracy, interval), valid = episodes("valid"), result["episodes"]
    assert valid["count"] == 600 and valid["confidence95"] == pytest.approx(interval, rel=0.15)
    assert valid["accuracy"] == pytest.approx(accuracy, abs=1.5 * interval)
    assert all(abs(episodes(split)[0] - accuracy) > 3 * interval for split in ("train", "test"))


def test_empty_clusters_stay_among_the_points():
    centres, _ = fewshot.kmeans(torch.full((6, 4), 5.0), 3, torch.Generator().manual_seed(1))
    assert torch.equal(centres, torch.full((3, 4), 5.0))


# What reaches the step


def test_epochs_chunks_and_seeds_differ_and_a_seed_repeats(spy, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 30)
    files = write_images({"train": [28, 33, 29], "valid": [3, 4, 5], "test": [6, 4, 5]})
    settings = "--aug cutout --dropout 0.2 --epochs 2 --batch-size 32 --seed"
    start(train, files, settings, "1 2")
    start(train, files, settings, "2 --out again")
    logits, told = map(torch.cat, zip(*spy.losses, strict=True))
    check_metrics(read_run("again/*")[0]["history"][1]["train"], logits[450:], told[450:])
    assert [p for p, _ in spy.masks[:4]] == [0.2, 0.2, 0.2, 0.4]
    images, labels = read_images("train")
    passes, epochs = [one for one in spy.passes if one.training], []
    for number in range(6):  # 2 epochs of seed 1, of seed 2, and of seed 2 again
        inputs = torch.cat([one.inputs for one in passes[3 * number :][:3]])
        order, changed = identify(inputs, images)
        assert torch.equal(labels[order], told[90 * number :][:90])
        assert inputs.movedim(1, 3).flatten(1, 2)[changed].abs().max() < 0.02  # filled with the mean
        masks = [mask for _, mask in spy.masks[12 * number :][:12]]
        epochs.append(Seen(order=order, changed=changed, masks=masks, weight=passes[3 * number].weight))
    for a, b in ((0, 1), (2, 3), (0, 2), (1, 2)):
        a, b = epochs[a], epochs[b]
        first, second = a.order.argsort(), b.order.argsort()
        assert not torch.equal(a.order, b.order) and torch.equal(a.order[first], b.order[second])
        for x, y in ((a.changed, b.changed), (a.changed[first], b.changed[second])):
            assert (x == y).all(1).double().mean() < 0.5  # cutout leaves a quarter unchanged both times
        assert not any(torch.equal(x, y) for x, y in zip(a.masks, b.masks, strict=True))
        assert not torch.equal(a.masks[0], a.masks[4]) and not torch.equal(a.weight, b.weight)
    for a, b in ((2, 4), (3, 5)):
        a, b = ([one.order, one.changed, one.weight, *one.masks] for one in (epochs[a], epochs[b]))
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    first, second, third = epochs[0].changed.split(30)
    assert max((first == chunk).all(1).double().mean() for chunk in (second, third)) < 0.6


@pytest.mark.parametrize(("images", "words", "sizes", "wanted"), [
    (65, "--schedule onecycle --aug hybrid", [64, 64, 2], {}), (129, "--schedule onecycle", [64, 65], {}),
    (40, "--schedule onecycle --batch-size 8 --steps-per-epoch 6 --optimizer sgd", [8] * 6, {"momentum": 0}),
    (12, "", [12], {"type": "Adam", "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "amsgrad": False}),
    (12, "--optimizer sgd --momentum 0.9", [12], {"type": "SGD", "momentum": 0.9, "nesterov": True}),
    (12, "--optimizer rmsprop --momentum 0.8", [12], {"type": "RMSprop", "momentum": 0.8, "weight_decay": 0}),
    (12, "--optimizer adamax --weight-decay 0.01", [12], {"type": "Adamax", "weight_decay": 0.01}),
])  # fmt: skip
def test_each_step_has_its_learning_rate_and_settings(images, words, sizes, wanted, spy):
    """One-cycle peaks after a fifth of the steps and would be zero in the step after the last."""
    files = write_images({**FEW, "train": [images - 6, 6]})
    start(train, files, words, "--epochs 2 --lr 0.004")
    assert [len(one.inputs) for one in spy.passes if one.training] == sizes * 2
    count = 2 * len(sizes)
    rates = np.interp(range(count), [-1, max(1, count // 5) - 1, count], [0, 0.004, 0])
    rates = rates.tolist() if "onecycle" in words else [0.004] * count
    assert [float(group["lr"]) for group in spy.steps] == pytest.approx(rates, rel=1e-5)
    assert all({name: group[name] for name in wanted} == wanted for group in spy.steps)


def test_no_query_is_a_support_image_and_blocks_and_seeds_of_episodes_differ(spy, monkeypatch):
    asked = set()
    monkeypatch.setattr(augment, "parse", lambda name, *rest: asked.add(name) or [[]])
    draw, seen = fewshot.episode_rows, []
    monkeypatch.setattr(fewshot, "episode_rows", lambda *given: seen.append(draw(*given)) or seen[-1])
    monkeypatch.setattr(fewshot, "kmeans", kmeans := mock.Mock(wraps=fewshot.kmeans))
    monkeypatch.setattr(fewshot, "EPOCH", 4)
    monkeypatch.setattr(runs.Run, "save", save := mock.Mock())
    files = write_images({split: [6, 7, 8, 9, 6, 7] for split in COUNTS})
    settings = "--fraction 1 --way 4 --shot 2 --query 3 --episodes 10 --seed"
    start(fewshot, files, settings, "1 2")
    start(fewshot, files, settings, "2 --out again")
    valid = [rows for rows, _ in seen if len(rows) == fewshot.VALIDATION_EPISODES]
    starts = {call.args[2].initial_seed() for call in kmeans.call_args_list}
    assert torch.equal(valid[0], valid[1]) and len(starts) == 2
    assert save.call_count == 3 * 2  # after each of a run's three blocks of episodes but the last
    (images, labels), drawn = read_images("train"), []
    for one, (_, told) in zip([one for one in spy.passes if one.training], spy.losses, strict=True):
        rows, changed = identify(one.inputs, images)
        drawn.append(rows.tolist())
        assert not changed.any() and len(rows) == 4 * (2 + 3) == len(set(drawn[-1]))
        support, query = labels[rows[:8]].view(4, 2), labels[rows[8:]].view(4, 3)
        assert (support == support[:, :1]).all() and (query == support[:, :1]).all()
        assert len(support.unique()) == 4
        assert told.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert asked == {"flip+autoaugment"} and {group["lr"] for group in spy.steps} == {0.001}
    assert drawn[10:20] == drawn[20:] and len({tuple(rows) for rows in drawn}) == 20
    first, second, again = [one.weight for one in spy.passes if one.training][::10]
    assert torch.equal(second, again) and not torch.equal(first, second)


def test_a_checkpoint_stays_until_the_result_is_written(spy):
    files, command = write_images(FEW), "--epochs 3 --batch-size 4 --checkpoint-every 0"

    def take_the_results_name():  # in the last epoch, so that the result cannot be written
        if len(spy.steps) == 7:
            next(Path("results").rglob("*.ckpt")).with_suffix(".json").mkdir()

    spy.at_step = take_the_results_name
    with pytest.raises(OSError, match=r"seed1\.json"):
        start(train, files, command)
    (checkpoint,) = Path("results").rglob("*.ckpt")
    checkpoint.with_suffix(".json").rmdir()
    start(train, files, command)
    assert len(spy.steps) == 9 + 3 and not checkpoint.exists()


# Names and settings

NEUTRAL = {"root", "seed", "device", "graph", "out", "checkpoint_every", "force"}
SHARED = {"--data cifar10": "cinic10", "--fraction 0.5": 1.0, "--lr 0.002": 0.001, "--optimizer sgd": "adam",
          "--optimizer sgd --momentum 0.9": 0.0, "--weight-decay 0.1": 0.0, "--schedule onecycle": "none",
          "--label-smoothing 0.1": 0.0, "--lr 1 --amp off": "auto"}  # fmt: skip
EPOCHS = {"--epochs 3": 10, "--batch-size 32": 64}
OPTIONS = {  # words that change the last option in them: its default
    train: SHARED | EPOCHS | {
        "--arch resnet18": "custom", "--arch resnet18 --pretrained": False, "--aug flip": "none",
        "--arch resnet18 --stem small": "imagenet", "--dropout 0.2": 0.0, "--steps-per-epoch 7": None,
        "--classes cat,dog": None},
    moe: SHARED | EPOCHS | {"--experts vehicles animals": moe.EXPERTS, "--adapter-width 512": 1280,
                            "--train-adapters": False},
    fewshot: SHARED | {"--fraction 0.5": 0.01, "--way 4": None, "--shot 1": None, "--query 7": None,
                       "--episodes 300": 3000, "--classes cat,dog": None},
}  # fmt: skip


@pytest.mark.parametrize("script", OPTIONS, ids=lambda script: script.__name__)
def test_every_option_that_changes_training_changes_name_and_checkpoint(script):
    defaults = {
        words.split("--")[-1].split()[0].replace("-", "_"): value for words, value in OPTIONS[script].items()
    }
    parsed = vars(script.make_parser().parse_args([]))
    assert {**defaults, "classes": None} == {name: parsed[name] for name in parsed.keys() - NEUTRAL}
    commands = ["", "--lr 1 --amp bf16", *OPTIONS[script]]  # the default may be either
    assert parsed["checkpoint_every"] == 20
    names, checkpoints = set(), set()
    for args in (script.parse_arguments(words.split()) for words in commands):
        names.add(script.run_name(args, args.data, args.classes))
        dataset = Seen(fingerprint=args.data, classes=[args.classes])  # as if each name were another data set
        run = runs.Run(args, 1, dataset, torch.device("cpu"), Path("results/run/seed1.json"))
        checkpoints.add(repr(sorted(run.settings.items())))
    assert len(names) == len(checkpoints) == len(commands)
