import functools
import json
import os
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import HOUSE, assert_same_bits, results
from sklearn import metrics as oracle

import data
import train

TINY = ("--data", "synthetic", "--classes", "cat,dog", "--fraction", 0.1, "--epochs", 2)


# Metrics


@pytest.mark.parametrize(
    "case", ["random", "perfect", "empty class", "never predicted", "one class", "absent class"]
)
@pytest.mark.parametrize("seed", range(3))
def test_metrics_equal_scikit_learns(case, seed):
    generator = np.random.default_rng(seed)
    labels, predictions = generator.integers(0, 10, 500), generator.integers(0, 10, 500)
    if case == "perfect":
        predictions = labels
    if case == "empty class":
        labels = np.where(labels == 3, 4, labels)
    if case == "never predicted":
        predictions = np.where(predictions == 3, 4, predictions)
    if case == "one class":
        labels, predictions = labels * 0 + 2, predictions * 0 + 2
    if case == "absent class":
        labels, predictions = labels % 7, predictions % 7
    confusion = train.confusion_matrix(torch.from_numpy(predictions), torch.from_numpy(labels), 10)
    assert np.array_equal(confusion.numpy(), oracle.confusion_matrix(labels, predictions, labels=range(10)))
    ours = train.metrics(confusion, 0.5)
    assert ours["accuracy"] == pytest.approx(oracle.accuracy_score(labels, predictions), abs=1e-12)
    for name in ("precision", "recall", "f1"):
        score = getattr(oracle, f"{name}_score")(labels, predictions, average="macro", zero_division=0)
        assert ours[name] == pytest.approx(score, abs=1e-12)


def test_totals_of_unequal_batches_are_means_over_images():
    logits, labels = torch.randn(50, 10), torch.randint(0, 10, (50,))
    totals = train.Totals(10, torch.device("cpu"))
    for rows in (slice(0, 32), slice(32, 50)):
        totals.count(
            logits[rows], labels[rows], torch.nn.functional.cross_entropy(logits[rows], labels[rows])
        )
    found = totals.metrics()
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-6)
    assert found["accuracy"] == (logits.argmax(1) == labels).double().mean().item()


# The loop


def test_train_step_equals_the_textbook_step():
    """Against PyTorch's own modules in plain layout: same losses and same weights after three steps."""
    parts = []
    for plain in (True, False):
        torch.manual_seed(0)
        model = train.models.build("custom")
        images, labels = torch.randn(3, 8, 3, 32, 32), torch.randint(0, 10, (3, 8))
        if plain:
            optimizer = torch.optim.Adam(model.parameters(), lr=0.001, fused=False, foreach=False)
            for batch, target in zip(images, labels, strict=True):
                optimizer.zero_grad()
                torch.nn.CrossEntropyLoss()(model(batch), target).backward()
                optimizer.step()
        else:
            model = model.to(memory_format=torch.channels_last)
            optimizer = torch.optim.Adam(model.parameters(), lr=0.001, fused=True)
            autocast = torch.autocast("cpu", enabled=False)
            scaler = torch.amp.GradScaler("cpu", enabled=False)
            totals = train.Totals(10, torch.device("cpu"))
            batches = [
                (b.contiguous(memory_format=torch.channels_last), t)
                for b, t in zip(images, labels, strict=True)
            ]
            step = functools.partial(train.train_step, model, optimizer, scaler, autocast, totals, 0.0)
            train.train_epoch(model, step, batches, data.Progress("", 24))
            assert totals.confusion.sum() == 24
        parts.append(model.eval()(torch.ones(1, 3, 32, 32)))
    assert torch.allclose(*parts, atol=2e-3)


@pytest.mark.slow
def test_five_epochs_learn_the_synthetic_set(run, tmp_path):
    process = run("train.py", "--data", "synthetic", "--epochs", 5, "--amp", "bf16", "--out", tmp_path)
    assert process.returncode == 0, process.stderr
    (result,) = results(tmp_path).values()
    assert result["test"]["accuracy"] > 0.9
    assert result["history"][0]["valid"]["accuracy"] > 0.2
    assert [entry["epoch"] for entry in result["history"]] == [1, 2, 3, 4, 5]


EVERYTHING = "flip+rotation+crop+jitter+autoaugment+cutout+translate"


@pytest.mark.parametrize(
    ("arch", "aug"),
    [
        ("custom", "hybrid"),
        ("custom", EVERYTHING),
        ("resnet18", EVERYTHING),
        pytest.param("densenet121", EVERYTHING, marks=pytest.mark.slow),
        pytest.param("efficientnet_b0", EVERYTHING, marks=pytest.mark.slow),
    ],
)
def test_same_command_twice_gives_the_same_bits(arch, aug, tiny, run, tmp_path):
    """Once in a fork, once in a fresh process, which hashes in another order."""
    command = ("train.py", *tiny, "--epochs", 2, "--arch", arch, "--aug", aug, "--batch-size", 8, "--out")
    assert run(*command, "a").returncode == 0
    words = map(str, [sys.executable, HOUSE / command[0], *command[1:], "b"])
    subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)
    assert_same_bits(tmp_path / "a", tmp_path / "b")


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@needs_cuda
@pytest.mark.parametrize(
    "settings",
    [("--arch", "custom", "--dropout", 0.2), ("--arch", "resnet18"), ("--arch", "densenet121"),
     ("--arch", "efficientnet_b0"), ("--optimizer", "sgd", "--momentum", 0.9), ("--optimizer", "adamax"),
     ("--optimizer", "adagrad"), ("--amp", "off"), ("--amp", "fp16"), ("--schedule", "onecycle"),
     ("--optimizer", "sgd", "--momentum", 0.9, "--weight-decay", 0.01, "--schedule", "onecycle"),
     ("--optimizer", "adamax", "--schedule", "onecycle"), ("--label-smoothing", 0.1)],
)  # fmt: skip
def test_captured_and_plain_steps_give_the_same_bits(settings, run, tmp_path):
    command = (
        "train.py",
        *TINY,
        "--aug",
        "flip",
        "--batch-size",
        8,
        *settings,
    )  # 40 images and a short last batch
    for extra in ((), ("--no-graph",)):
        process = run(*command, *extra, "--out", tmp_path / ("plain" if extra else "captured"))
        assert process.returncode == 0, process.stderr
        waits = extra or settings[1] in ("adagrad", "fp16") or {"adamax", "onecycle"} <= set(settings)
        assert bool(waits) == ("one kernel at a time" in process.stdout)
    assert_same_bits(tmp_path / "captured", tmp_path / "plain")


@needs_cuda
def test_replays_draw_fresh_dropout_and_seeds_count():
    device, seen = torch.device("cuda"), torch.zeros(1000, device="cuda")
    step = train.CapturedStep(lambda inputs, labels: seen.copy_(torch.nn.functional.dropout(inputs)))
    inputs, drawn = torch.ones(1000, device=device), []
    for epoch in (1, 2, 1):
        torch.manual_seed(epoch)
        for _ in range(6):
            step(inputs, inputs)
            drawn.append(seen.tolist())
    assert step.graph is not None
    assert drawn[4] != drawn[5] and drawn[6:12] != drawn[12:18]
    assert drawn[12:18] == drawn[:6]  # warm-up included


@pytest.mark.parametrize("optimizer", train.OPTIMIZERS)
def test_every_optimizer_learns(optimizer):
    momentum = 0.9 if optimizer in ("sgd", "rmsprop") else 0.0
    args = Namespace(optimizer=optimizer, lr=0.01, weight_decay=1e-4, momentum=momentum, schedule="none")
    weight = torch.nn.Parameter(torch.ones(3))
    made = train.make_optimizer([weight], args, torch.device("cpu"))
    assert isinstance(made, train.OPTIMIZERS[optimizer])
    assert made.defaults["lr"] == 0.01 and made.defaults["weight_decay"] == 1e-4
    for _ in range(5):
        made.zero_grad()
        (weight**2).sum().backward()
        made.step()
    assert (weight < 1).all()


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100])
def test_the_learning_rate_goes_up_once_and_down_towards_zero(steps):
    shares = [train.one_cycle(step, steps) for step in range(steps)]
    top = shares.index(max(shares))
    assert max(shares) == 1 and min(shares) > 0 and top == max(0, steps // 5 - 1)
    assert shares[: top + 1] == sorted(shares[: top + 1]) and shares[top:] == sorted(
        shares[top:], reverse=True
    )
    assert shares[-1] <= max(2 / steps, 0.5) or steps == 1


def test_scheduled_batches_set_the_rate_of_their_step():
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:]}], lr=9.0)
    optimizer.param_groups[1]["lr"] = torch.tensor(9.0)  # as a captured step has it
    seen = []
    for batch in train.scheduled("abc", optimizer, 0.1, first=4, steps=20):
        seen.append((batch, *(float(group["lr"]) for group in optimizer.param_groups)))
    wanted = [0.1 * train.one_cycle(step, 20) for step in (4, 5, 6)]
    assert [name for name, _, _ in seen] == list("abc")
    assert [rate for _, rate, _ in seen] == pytest.approx(wanted) == [rate for _, _, rate in seen]


def test_with_a_schedule_norms_and_biases_have_no_weight_decay():
    args = Namespace(optimizer="sgd", lr=0.1, weight_decay=0.5, momentum=0.9, schedule="onecycle")
    model = train.models.build("custom")
    optimizer = train.make_optimizer(list(model.parameters()), args, torch.device("cpu"))
    assert optimizer.defaults["nesterov"]
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for layer in model.modules():
        plain = isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)
        for name, parameter in layer.named_parameters(recurse=False):
            assert decay.pop(id(parameter)) == (0.5 if plain and name == "weight" else 0.0)
    assert not decay


def test_smoothed_labels_and_mirror_images(tiny, run, tmp_path):
    options = (
        "--epochs",
        2,
        "--schedule",
        "onecycle",
        "--label-smoothing",
        0.3,
        "--tta",
        "flip",
        "--amp",
        "off",
    )
    assert run("train.py", *tiny, *options).returncode == 0
    (path,) = tmp_path.rglob("seed1.json")
    result = json.loads(path.read_text())
    assert path.parent.name.endswith("-epochs2-onecycle-smooth0.3-tta-flip-amp-off")
    dataset = data.load(str(tmp_path / "images"), tmp_path / "root")
    model = train.models.build("custom", 2)
    model.load_state_dict(torch.load(path.with_suffix(".pt"), weights_only=True))
    ((images, labels),) = data.batches(dataset.test, 100, dataset.mean, dataset.std, torch.device("cpu"))
    with torch.no_grad():
        logits = [model.eval()(images), model(images.flip(3))]
    for name, found in (("test", logits[0]), ("test_tta", (logits[0] + logits[1]) / 2)):
        wanted = torch.nn.functional.cross_entropy(found, labels).item()
        assert result[name]["loss"] == pytest.approx(
            wanted, abs=1e-4
        )  # the plain loss, whatever was learned from
        assert result[name]["accuracy"] == (found.argmax(1) == labels).double().mean()
    smoothed = torch.nn.functional.cross_entropy(logits[0], labels, label_smoothing=0.3)
    totals = train.Totals(2, torch.device("cpu"))
    autocast, scaler = train.mixed_precision(Namespace(amp="off"), torch.device("cpu"))
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    train.train_step(model, frozen, scaler, autocast, totals, 0.3, images, labels)
    assert totals.metrics()["loss"] == pytest.approx(smoothed.item(), abs=1e-4)


def test_a_damaged_checkpoint_is_named_and_begun_again(tmp_path, capsys):
    model = torch.nn.Linear(2, 2)
    checkpoint = train.Checkpoint(tmp_path / "x.ckpt", {"lr": 1})
    checkpoint.save({"model": model}, [{"epoch": 1}])
    assert checkpoint.restore({"model": model}) == [{"epoch": 1}]
    assert train.Checkpoint(tmp_path / "x.ckpt", {"lr": 2}).restore({"model": model}) == []
    content = bytearray((tmp_path / "x.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "x.ckpt").write_bytes(content)
    assert checkpoint.restore({"model": model}) == []
    assert "x.ckpt is damaged" in capsys.readouterr().out


# Results


def test_result_file_skip_and_force(run, tmp_path):
    command = ("train.py", *TINY, "--seed", 1, 2, "--out", tmp_path)
    first = run(*command)
    assert first.returncode == 0 and first.stderr == "" and "\r" not in first.stdout
    assert first.stdout.count("2 classes: cat, dog") == 1  # loaded once
    assert "mean ± std" in first.stdout
    folder = tmp_path / "custom-none-synthetic-only-cat+dog-p0.1-epochs2"
    assert sorted(os.listdir(folder)) == ["seed1.json", "seed1.pt", "seed2.json", "seed2.pt"]
    result = json.loads((folder / "seed2.json").read_text())
    assert list(result) == ["version", "config", "data", "environment", "history", "test", "confusion", "seconds",
                            "peak_memory_bytes", "weights", "checksum"]  # fmt: skip
    assert result["config"]["seed"] == 2 and result["config"]["lr"] == 0.001
    assert result["data"]["classes"] == ["cat", "dog"]
    assert [result["data"][split] for split in data.SPLITS] == [40, 100, 200]
    environment = {"python", "torch", "torchvision", "device", "commit", "dtype", "processes"}
    assert set(result["environment"]) == environment
    assert result["data"]["fingerprint"] == data.synthetic().fingerprint
    assert set(result["history"][0]) == {"epoch", "train", "valid", "seconds", "images_per_second"}
    for metrics in (result["test"], result["history"][1]["train"], result["history"][1]["valid"]):
        assert set(metrics) == set(train.METRICS)
    confusion = np.array(result["confusion"])
    assert confusion.sum() == 200 and np.trace(confusion) / 200 == result["test"]["accuracy"]
    model = train.models.build("custom", 2)
    model.load_state_dict(torch.load(folder / "seed2.pt", weights_only=True))

    before = (folder / "seed1.json").stat().st_mtime_ns
    again = run(*command)
    assert again.stdout.count("skipped, its result is there") == 2
    assert (folder / "seed1.json").stat().st_mtime_ns == before
    run(*command[:-4], 1, "--out", tmp_path, "--force")
    assert (folder / "seed1.json").stat().st_mtime_ns > before


def parse(monkeypatch, *arguments):
    """The name that the command line gives to its run."""
    names = []
    monkeypatch.setattr(train, "run_seeds", lambda args, name, train_one: names.append(name))
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    train.main()
    return names[0]


def test_runs_are_named_after_what_differs_from_the_recipe(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "my set").mkdir(parents=True)
    assert parse(monkeypatch) == "custom-none"
    assert parse(monkeypatch, "--arch", "densenet121", "--aug", "flip", "--seed", 3) == "densenet121-flip"
    assert parse(monkeypatch, "--arch", "efficientnet", "--lr", 0.002) == "efficientnet_b0-none-lr0.002"
    assert parse(monkeypatch, "--data", "cifar10", "--epochs", 30) == "custom-none-cifar10-epochs30"
    assert parse(monkeypatch, "--batch-size", 64, "--lr", 0.001, "--amp", "auto") == "custom-none"
    different = [("--data", "data/my set"), ("--data", tmp_path / "data"), ("--classes", "cat,dog"), ("--lr", 0.0010001),
                 ("--classes", "vehicles"), ("--fraction", 0.01), ("--batch-size", 4), ("--optimizer", "adamax"),
                 ("--optimizer", "sgd"), ("--optimizer", "sgd", "--momentum", 0.9), ("--weight-decay", 0.0001),
                 ("--dropout", 0.2), ("--amp", "bf16"), ("--arch", "resnet18", "--pretrained"), ("--arch", "resnet18"),
                 ("--arch", "resnet18", "--stem", "small"), ("--schedule", "onecycle"), ("--label-smoothing", 0.1),
                 ("--tta", "flip")]  # fmt: skip
    names = [parse(monkeypatch, *arguments) for arguments in different]
    assert len(set(names)) == len(names)
    assert parse(monkeypatch, "--classes", "dog,cat") == parse(monkeypatch, "--classes", "cat, dog")
    assert all(len(name) < 200 and "/" not in name and " " not in name for name in names)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--arch", "vgg"], ["--arch", "vgg", "resnet18"]),
        (["--aug", "flip+zoom"], ["zoom", "none, flip"]),
        (["--data", "no/such"], ["--data no/such", "cinic10, cifar10, synthetic"]),
        (["--optimizer", "lion"], ["--optimizer", "lion", "adamax"]),
        (["--data", "synthetic", "--classes", "cow"], ["--classes cow", "airplane"]),
        (["--fraction", "0"], ["--fraction", "above 0"]),
        (["--fraction", "1.5"], ["--fraction", "up to 1"]),
        (["--epochs", "0"], ["--epochs", "above 0"]),
        (["--epochs", "1.5"], ["--epochs", "integer"]),
        (["--batch-size", "-4"], ["--batch-size", "above 0"]),
        (["--lr", "0"], ["--lr", "above 0"]),
        (["--lr", "nan"], ["--lr", "nan"]),
        (["--weight-decay", "-1"], ["--weight-decay", "at least 0"]),
        (["--dropout", "1"], ["--dropout", "below 1"]),
        (["--arch", "resnet18", "--dropout", "0.1"], ["resnet18", "dropout"]),
        (["--pretrained"], ["custom", "pretrained"]),
        (["--stem", "small"], ["custom", "stem"]),
        (["--arch", "resnet18", "--stem", "small", "--pretrained"], ["--pretrained", "stem"]),
        (["--label-smoothing", "1"], ["--label-smoothing", "below 1"]),
        (["--schedule", "cosine"], ["--schedule", "onecycle"]),
        (["--momentum", "0.9"], ["--momentum", "sgd"]),
        (["--seed", "one"], ["--seed", "one"]),
        (["--device", "gpu"], ["--device gpu"]),
        (["--device", "cpu", "--amp", "fp16"], ["fp16", "bf16"]),
        (["--colour"], ["--colour"]),
    ],
)
def test_a_wrong_argument_is_one_line_and_status_2(arguments, words, run, one_line, tmp_path):
    one_line(run("train.py", *arguments), 2, "train.py: error:", *words)
    assert os.listdir(tmp_path) == []


def test_no_gpu_and_no_weights_are_one_line(run, one_line, tmp_path):
    one_line(
        run("train.py", "--data", "synthetic", "--device", "cuda", CUDA_VISIBLE_DEVICES=""),
        2,
        "--device cuda",
    )
    nowhere = {"https_proxy": "http://127.0.0.1:9", "TORCH_HOME": str(tmp_path)}
    process = run("train.py", *TINY, "--arch", "resnet18", "--pretrained", **nowhere)
    one_line(process, 1, "train.py: error: the ImageNet weights of resnet18 cannot be fetched", "TORCH_HOME")


def test_a_loss_that_is_no_number_ends_the_run_and_leaves_no_result(run, one_line, tmp_path):
    process = run("train.py", *TINY, "--optimizer", "sgd", "--lr", 1e30, "--out", tmp_path)
    one_line(process, 1, "loss became", "epoch", "--lr")
    assert not list(tmp_path.rglob("*.json"))


def test_help_names_every_argument(run):
    shown = run("train.py", "--help").stdout
    for name in ("arch", "aug", "data", "root", "fraction", "classes", "epochs", "batch-size", "lr", "optimizer",
                 "momentum", "weight-decay", "dropout", "pretrained", "seed", "device", "amp", "out", "force"):  # fmt: skip
        assert f"--{name}" in shown
