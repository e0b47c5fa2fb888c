import contextlib
import json
import os
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import HOUSE, FarDevice, Reads, assert_same_bits, results
from sklearn import metrics as oracle
from torch.nn import functional as F

import data
import models
import runs
import train

TINY = ("--data", "synthetic", "--classes", "dog, cat", "--fraction", 0.1, "--epochs", 2)


# Metrics


# How many classes are among the labels, and among the predictions
@pytest.mark.parametrize(("true", "predicted"), [(10, 10), (9, 10), (10, 9), (7, 7), (1, 1)])
def test_metrics_equal_scikit_learns(true, predicted):
    generator = np.random.default_rng(0)
    labels, predictions = generator.integers(0, true, 500), generator.integers(0, predicted, 500)
    confusion = train.confusion_matrix(torch.from_numpy(predictions), torch.from_numpy(labels), 10)
    assert np.array_equal(confusion.numpy(), oracle.confusion_matrix(labels, predictions, labels=range(10)))
    ours = train.metrics(confusion, 0.5)
    assert ours["accuracy"] == pytest.approx(oracle.accuracy_score(labels, predictions), abs=1e-12)
    for name in ("precision", "recall", "f1"):
        score = getattr(oracle, f"{name}_score")(labels, predictions, average="macro", zero_division=0)
        assert ours[name] == pytest.approx(score, abs=1e-12)


# The loop


def make_run(tmp_path, *words):
    """A run with train.py's arguments, as run_seeds creates it."""
    args = train.parse_arguments([*map(str, ("--data", "synthetic", "--checkpoint-every", 0, *words))])
    dataset = data.synthetic((40, 20, 20))
    return runs.Run(args, 1, dataset, torch.device("cpu"), tmp_path / "results" / "run" / "seed1.json")


def test_three_steps_of_fit_equal_the_textbook_loop(tmp_path):
    """Against PyTorch's own modules in contiguous layout: same losses and weights after three steps."""
    run = make_run(tmp_path, "--amp", "off", "--label-smoothing", 0.1)
    torch.manual_seed(0)
    images, labels = torch.randn(3, 8, 3, 32, 32), torch.randint(0, 10, (3, 8))
    torch.manual_seed(0)
    plain = models.build("custom")
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.001, fused=False, foreach=False)
    losses = []
    for batch, target in zip(images, labels, strict=True):
        optimizer.zero_grad()
        losses.append(torch.nn.CrossEntropyLoss(label_smoothing=0.1)(plain(batch), target))
        losses[-1].backward()
        optimizer.step()
    torch.manual_seed(0)
    ours = models.build("custom").to(memory_format=torch.channels_last)
    inputs = [batch.contiguous(memory_format=torch.channels_last) for batch in images]
    states = []
    run.restore = lambda stateful: states.extend(stateful) or []
    (entry,) = train.fit(run, ours, 10, [3], lambda epoch: zip(inputs, labels, strict=True))
    assert entry["train"]["loss"] == pytest.approx(sum(losses).item() / 3, rel=1e-3)
    assert states == ["model", "optimizer", "scaler"]
    assert torch.allclose(plain.eval()(images[0]), ours.eval()(images[0]), atol=2e-3)


def test_a_network_is_built_with_every_option(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(models, "build", lambda *given: asked.append(given) or 1 / 0)
    for words in ("--dropout 0.2", "--arch resnet18 --pretrained", "--arch resnet18 --stem small"):
        with pytest.raises(ZeroDivisionError):
            train.train(make_run(tmp_path, *words.split()))
    wanted = [("custom", 10, 0.2, False, "imagenet"), ("resnet18", 10, 0.0, True, "imagenet")]
    assert asked == [*wanted, ("resnet18", 10, 0.0, False, "small")]
    args = train.parse_arguments(["--arch", "resnet18", "--pretrained", "--data", "synthetic-small"])
    assert train.load(args, torch.device("cpu")).mean == data.load("synthetic-small").mean


@pytest.mark.slow
def test_five_epochs_learn_the_synthetic_set(run, tmp_path):
    process = run("train.py", "--data", "synthetic", "--epochs", 5, "--amp", "bf16", "--out", tmp_path)
    assert process.returncode == 0, process.stderr
    (result,) = results(tmp_path).values()
    assert result["test"]["accuracy"] > 0.9
    assert result["history"][0]["valid"]["accuracy"] > 0.2
    assert [entry["epoch"] for entry in result["history"]] == [1, 2, 3, 4, 5]


EVERYTHING = "flip+rotation+crop+jitter+autoaugment+cutout+translate"


SLOW = [pytest.param(arch, EVERYTHING, marks=pytest.mark.slow) for arch in ("densenet121", "efficientnet_b0")]


@pytest.mark.parametrize(
    ("arch", "aug"), [("custom", "hybrid"), ("custom", EVERYTHING), ("resnet18", EVERYTHING), *SLOW]
)
def test_same_command_twice_gives_the_same_bits(arch, aug, tiny, run, tmp_path):
    """Once in a fork, once in a fresh process, whose hash seed differs."""
    command = ("train.py", *tiny, "--epochs", 2, "--arch", arch, "--aug", aug, "--batch-size", 8, "--out")
    assert run(*command, "a").returncode == 0
    words = map(str, [sys.executable, HOUSE / command[0], *command[1:], "b"])
    subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)
    assert_same_bits(tmp_path / "a", tmp_path / "b")


# What GPU speed depends on, and what a Mac needs: checked on a CPU


CAPTURED = [f"--arch {arch}" for arch in models.ARCHITECTURES]
CAPTURED += [f"--optimizer {name}" for name in train.FUSED]
CAPTURED += ["--optimizer sgd --momentum 0.9 --weight-decay 0.1", "--weight-decay 0.1 --schedule onecycle"]
CAPTURED += ["--label-smoothing 0.1 --dropout 0.2"]


@pytest.mark.parametrize("scaled", [False, True], ids=["bf16", "fp16's scaler"])
@pytest.mark.parametrize("settings", CAPTURED)
def test_a_captured_step_never_reads_the_device(settings, scaled, tmp_path, monkeypatch):
    """A dispatch mode records what a GPU would capture: a value read by the host would end the capture."""
    calls, cross_entropy = [], F.cross_entropy

    def loss(logits, *rest, **options):
        assert logits.dtype == torch.float32
        return cross_entropy(logits, *rest, **options)

    class Recorded(train.CapturedStep):
        def __call__(self, *batch):
            with Reads() as recorder:
                self.step(*batch)
            assert recorder.reads == []
            calls.append(batch)

    monkeypatch.setattr(train, "is_capturable", lambda *_: True)
    monkeypatch.setattr(train, "CapturedStep", Recorded)
    monkeypatch.setattr(F, "cross_entropy", loss)
    run = make_run(tmp_path, "--amp", "bf16", *settings.split())
    if scaled:
        scaler = torch.amp.GradScaler("cpu", enabled=True)
        autocast = torch.autocast("cpu", torch.bfloat16)
        monkeypatch.setattr(train, "mixed_precision", lambda run: (autocast, scaler))
    model = models.build(run.args.arch, 10, run.args.dropout).to(memory_format=torch.channels_last)
    batches = list(data.batches(run.dataset.train, run.dataset, run.device, data.make_plan(8, 4)))
    train.fit(run, model, 10, [2], lambda epoch: batches)
    assert len(calls) == 2 and (not scaled or scaler.get_scale() > 1)


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
def test_nothing_on_a_device_is_float64_and_metrics_are_read_once_per_epoch(arch, tmp_path, monkeypatch):
    """Training and evaluation with the network on a device without float64, like Apple's GPUs."""
    run = make_run(tmp_path, "--arch", arch, "--amp", "off", "--schedule", "onecycle")
    far = torch.device("meta")
    run.device = far
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    monkeypatch.setattr(train, "mixed_precision", lambda run: (contextlib.nullcontext(), disabled))
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)
    model = models.build(arch, 10).to(far, memory_format=torch.channels_last)

    def batches(epoch=None):
        return data.batches(run.dataset.train, run.dataset, far, data.make_plan(40, 20))

    with FarDevice() as device:
        train.fit(run, model, 10, [2], batches, batches)
    # Loss, sum of the confusion matrix and the matrix itself, of training and of validation
    assert sorted(device.reads) == ["_local_scalar_dense"] * 4 + ["_to_copy"] * 2


def test_the_recorders_see_what_reads_the_device_and_what_is_float64():
    with Reads() as recorder:
        numbers = torch.arange(4.0)
        numbers.sum().item(), numbers.nonzero(), numbers[numbers > 1], bool(numbers[0])
    assert len(recorder.reads) >= 4
    far = torch.zeros(3, device="meta")
    for make in (far.double, lambda: torch.zeros((), dtype=torch.float64, device="meta")):
        with FarDevice(), pytest.raises(AssertionError, match="float64"):
            make()


@pytest.mark.parametrize("optimizer", train.OPTIMIZERS)
def test_every_optimizer_learns(optimizer):
    args = train.parse_arguments(["--optimizer", optimizer, "--lr", "0.01", "--weight-decay", "0.0001"])
    weight = torch.nn.Parameter(torch.ones(3))
    made = train.make_optimizer([weight], args, torch.device("cpu"))
    assert type(made).__name__.lower() == optimizer
    plain = type(made)([weight], lr=0.01, weight_decay=1e-4)  # all else is PyTorch's default
    assert made.defaults | {"fused": None} == plain.defaults | {"fused": None}
    (weight**2).sum().backward()
    made.step()
    assert (weight < 1).all()


def test_a_learning_rate_tensor_is_filled_in_place():
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:]}], lr=9.0)
    captured = optimizer.param_groups[1]["lr"] = torch.tensor(9.0)  # as a captured step has it
    train.set_learning_rate(optimizer, 0.1)
    assert optimizer.param_groups[0]["lr"] == 0.1 and captured.item() == pytest.approx(0.1)
    assert optimizer.param_groups[1]["lr"] is captured


def test_fit_sets_the_learning_rate_of_each_step_even_after_resuming(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "set_learning_rate", lambda optimizer, rate: seen.append(rate))
    batches = [(torch.randn(4, 3), torch.arange(4) % 2)] * 5
    for epochs in ([5], [5, 5, 5]):  # the second resumes from the first epoch's checkpoint
        run = make_run(tmp_path, "--schedule", "onecycle", "--lr", 0.1, "--amp", "off")
        model = torch.nn.Linear(3, 2)
        history = train.fit(run, model, 2, epochs, lambda epoch: batches)
        if len(epochs) == 1:
            optimizer = train.make_optimizer(list(model.parameters()), run.args, run.device)
            scaler = torch.amp.GradScaler("cpu", enabled=False)
            run.save({"model": model, "optimizer": optimizer, "scaler": scaler}, history)
            del seen[:]
    assert seen == pytest.approx([0.1 * train.one_cycle(step, 15) for step in range(5, 15)])


def test_an_overflow_in_the_first_step_leaves_sgds_momentum_at_zero():
    """As GradScaler reports it to a fused optimizer: that step changes nothing, nor the next one."""
    args = train.parse_arguments(["--optimizer", "sgd", "--momentum", "0.9", "--lr", "0.1"])
    for _ in range(10):
        weight = torch.nn.Parameter(torch.ones(1000))
        optimizer = train.make_optimizer([weight], args, torch.device("cpu"))
        optimizer.grad_scale = torch.tensor(1.0)
        for overflow, wanted in ((1.0, 1.0), (0.0, 0.81), (0.0, 0.539)):
            weight.grad = torch.ones(1000)
            optimizer.found_inf = torch.tensor(overflow)
            optimizer.step()
            torch.testing.assert_close(weight.detach(), torch.full((1000,), wanted))


@pytest.mark.parametrize("entry", [torch.optim.Rprop, torch.optim.LBFGS])
def test_an_optimizer_that_does_not_fit_is_named(entry, monkeypatch, tmp_path):
    monkeypatch.setitem(train.OPTIMIZERS, "adam", entry)
    with pytest.raises(RuntimeError, match="OPTIMIZERS in train.py, adam: "):
        train.fit(make_run(tmp_path), torch.nn.Linear(3, 2), 2, [1], lambda epoch: [])


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
    args.schedule = "none"  # the study's
    (group,) = train.make_optimizer(list(model.parameters()), args, torch.device("cpu")).param_groups
    assert len(group["params"]) == len(list(model.parameters())) and group["weight_decay"] == 0.5


# Results


def test_result_file_skip_and_force(run, tmp_path):
    command = ("train.py", *TINY, "--seed", 1, 2, "--out", tmp_path)
    first = run(*command)
    assert first.returncode == 0 and first.stderr == "" and "\r" not in first.stdout
    assert first.stdout.count("2 classes: cat, dog") == 1  # loaded once
    folder = tmp_path / "custom-none-synthetic-only-cat+dog-p0.1-epochs2"
    losses = [json.loads(path.read_text())["test"]["loss"] for path in folder.glob("*.json")]
    (row,) = [line for line in first.stdout.splitlines() if line.startswith("mean ± std")]
    assert f"{np.mean(losses):.4f} ± {np.std(losses, ddof=1):.4f}" in row
    assert sorted(os.listdir(folder)) == ["seed1.json", "seed1.pt", "seed2.json", "seed2.pt"]
    result = json.loads((folder / "seed2.json").read_text())
    head, _, _, row, *_ = (line.split("  ") for line in first.stdout.split("test split\n")[1].splitlines())
    head, row = ([cell.strip() for cell in line if cell.strip()] for line in (head, row))
    wanted = {**result["test"], "accuracy with mirror images": result["test_tta"]["accuracy"]}
    shown = dict(zip(head[1:], row[1:], strict=True))
    assert shown == {name: f"{value:.4f}" for name, value in wanted.items()}
    last = result["history"][1]  # its images are those of training, its seconds those of validation, too
    assert last["images_per_second"] * last["seconds"] > 1.001 * 40
    assert "valid loss {loss:.4f} accuracy {accuracy:.4f}".format(**last["valid"]) in first.stdout
    names = "version config data environment history test confusion test_tta seconds peak_memory_bytes"
    assert " ".join(result) == names
    assert " ".join(result["environment"]) == "python torch torchvision device commit code dtype"
    assert [result["config"][name] for name in ("seed", "lr", "classes")] == [2, 0.001, "cat,dog"]
    assert [result["data"][split] for split in data.SPLITS] == [40, 100, 200]
    assert result["data"]["fingerprint"] == data.synthetic().fingerprint
    assert set(result["history"][0]) == {"epoch", "train", "valid", "seconds", "images_per_second"}
    assert set(result["history"][1]["train"]) == set(train.METRICS)
    model, dataset = models.load(folder / "seed2.pt"), data.load("synthetic", fraction=0.1, classes="cat,dog")
    for name in ("classes", "mean", "std"):
        assert getattr(model, name) == result["data"][name] == list(getattr(dataset, name))

    before = (folder / "seed1.json").stat().st_mtime_ns
    again = run(*command)
    assert again.stdout.count("skipped, its result exists") == 2
    assert (folder / "seed1.json").stat().st_mtime_ns == before
    run(*command[:-4], 1, "--out", tmp_path, "--force")
    assert (folder / "seed1.json").stat().st_mtime_ns > before


def test_printed_results_show_the_accuracy_with_mirror_images(capsys):
    result = {"test": dict.fromkeys(train.METRICS, 0.1), "test_tta": {"accuracy": 0.9}}
    train.print_results("run", {3: result, 1: {**result, "test_tta": {"accuracy": 0.2}}})
    assert capsys.readouterr().out.splitlines()[-3].split() == ["3", *["0.1000"] * 5, "0.9000"]


def name_of(words="", data="cinic10", only=None):
    """The run name that a command line gives."""
    return train.run_name(train.parse_arguments(words.split()), data, only)


def test_run_names_show_what_differs_from_the_recipe_in_a_fixed_order():
    assert name_of() == name_of("--batch-size 64 --lr 0.001 --amp auto --seed 3") == "custom-none"
    assert name_of("--arch densenet121 --aug flip") == "densenet121-flip"
    words = "--arch efficientnet --lr 0.1 --epochs 3 --pretrained"
    assert name_of(words, only="a,b") == "efficientnet_b0-none-only-a+b-epochs3-lr0.1-pretrained"
    assert name_of("--data x --epochs 30", "my_set-01234567") == "custom-none-my_set-01234567-epochs30"
    assert name_of("--lr 0.00100000001") != name_of("--lr 0.00100000002")


# Invalid input


NAMED = "--schedule cosine, --seed one, --device gpu, --lr 0, --lr nan, --epochs 0, --fraction 0, "
NAMED += "--batch-size -4, --weight-decay -1, --momentum 1, --label-smoothing 1"
EXPLAINED = {
    "--arch vgg": ["resnet18"],
    "--aug flip+zoom": ["zoom", "flip, rotation"],
    "--aug flip crop": ["crop", "flip+crop"],
    "--data no/such": ["cinic10, cifar10, synthetic"],
    "--data synthetic --classes cow": ["--classes cow", "airplane"],
    "--optimizer lion": ["adamax"],
    "--fraction 1.5": ["in (0, 1]"],
    "--epochs 1.5": ["not an integer in [1, inf)"],
    "--dropout 1": ["in [0, 1)"],
    "--arch resnet18 --dropout 0.1": ["resnet18", "dropout"],
    "--pretrained": ["custom"],
    "--stem small": ["custom", "stem"],
    "--arch resnet18 --stem small --pretrained": ["--pretrained", "stem"],
    "--momentum 0.9": ["--momentum", "sgd"],
    "--device cpu --amp fp16": ["fp16", "bf16"],
    "--seeds 1": ["did you mean --seed?"],
    "--epoch=3": ["did you mean --epochs?"],
    "-lr 0.1": ["did you mean --lr?"],
    "--label_smoothing 0": ["did you mean --label-smoothing?"],
    "--seed 1,2,3": ["--seed: 1,2,3", "1 2 3"],
    "--seed 1-3": ["1 2 3"],
    "--seed 1..3": ["1 2 3"],
    "--colour": ["--colour"],
}


@pytest.mark.parametrize("arguments", [*NAMED.split(", "), *EXPLAINED])
def test_an_invalid_argument_is_one_line_and_status_2(arguments, run, one_line, tmp_path):
    words = EXPLAINED.get(arguments, arguments.split())
    one_line(run("train.py", *arguments.split()), 2, "train.py: error:", *words)
    assert os.listdir(tmp_path) == []


def test_no_gpu_and_no_weights_are_one_line(run, one_line, tmp_path):
    one_line(run("train.py", *TINY, "--device", "cuda", CUDA_VISIBLE_DEVICES=""), 2, "--device cuda")
    nowhere = {"https_proxy": "http://127.0.0.1:9", "TORCH_HOME": str(tmp_path)}
    process = run("train.py", *TINY, "--arch", "resnet18", "--pretrained", **nowhere)
    one_line(process, 1, "the ImageNet weights of resnet18 cannot be downloaded", "TORCH_HOME")


def test_a_nan_or_infinite_loss_ends_the_run_and_leaves_no_result(run, one_line, tmp_path):
    process = run("train.py", *TINY, "--optimizer", "sgd", "--lr", 1e30, "--out", tmp_path)
    one_line(process, 1, "the loss is nan", "--lr")
    assert not list(tmp_path.rglob("*.json"))
