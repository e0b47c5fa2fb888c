"""What only a CUDA GPU can show: `pytest -m cuda -n 0`, in one process, since CUDA takes seconds to start."""

import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import HOUSE, assert_same_bits, results

import fewshot
import moe
import runs
import train

pytestmark = pytest.mark.cuda
SMALL = "--data synthetic-small --fraction 0.1 --epochs 2 --checkpoint-every 0"
EPISODES = "--data synthetic --fraction 0.1 --episodes 150 --query 3 --checkpoint-every 0"
ADAPTERS = f"{SMALL} --train-adapters --adapter-width 64"


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """call(script, "words", ...) runs a script in this process and returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def call(script, *words):
        monkeypatch.setattr(sys, "argv", [script.__name__, *" ".join(words).split()])
        script.main()
        return capsys.readouterr().out

    return call


@pytest.mark.parametrize(
    "words",
    ["--arch custom --dropout 0.2", "--arch resnet18", "--arch densenet121", "--arch efficientnet_b0",
     "--aug hybrid", "--amp off", "--amp fp16", "--schedule onecycle", "--amp fp16 --schedule onecycle",
     "--amp fp16 --optimizer sgd", "--optimizer sgd --momentum 0.9 --weight-decay 0.01 --schedule onecycle",
     "--optimizer adamw", "--label-smoothing 0.1", "--optimizer adamax", "--optimizer adagrad"],
)  # fmt: skip
def test_captured_plain_and_resumed_steps_give_the_same_bits(words, call, tmp_path, monkeypatch):
    """40 images in batches of 6: six full ones, so that the graph is replayed, and a short one."""
    command = (train, SMALL, "--batch-size 6", words)
    for out in ("captured", "plain --no-graph"):
        shown = call(*command, "--out", out)
        cannot = any(word in f"{words} {out}" for word in ("adagrad", "adamax", "--no-graph"))
        assert cannot == ("CUDA graphs are disabled" in shown)
    assert_same_bits(tmp_path / "captured", tmp_path / "plain")

    class Killed(Exception):
        pass

    def killed(run, *given):
        save(run, *given)
        raise Killed

    save = runs.Run.save
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(runs.Run, "save", killed)
        call(*command, "--out resumed")
    assert "resuming after epoch 1" in call(*command, "--out resumed")
    assert_same_bits(tmp_path / "captured", tmp_path / "resumed")


@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
@pytest.mark.parametrize(("script", "words"), [(fewshot, EPISODES), (moe, SMALL), (moe, ADAPTERS)], ids=str)
def test_few_shot_and_mixture_repeat_with_the_same_bits_captured_or_not(script, words, amp, call, tmp_path):
    for out in ("a", "b", "plain --no-graph"):
        call(script, words, "--amp", amp, "--out", out)
    assert_same_bits(tmp_path / "a", tmp_path / "b")
    assert_same_bits(tmp_path / "a", tmp_path / "plain")


def test_a_real_kill_costs_nothing_but_time(tmp_path, call):
    words = "--data synthetic-small --epochs 40 --checkpoint-every 0 --dropout 0.1 --out"
    command = [sys.executable, str(HOUSE / "train.py"), *words.split(), "killed"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if "epoch  3/40" in line:
                break
        time.sleep(0.1)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert "resuming after epoch" in call(train, words, "killed")
    call(train, words, "whole")
    assert_same_bits(tmp_path / "whole", tmp_path / "killed")


def test_cuda_0_is_cuda_and_the_cpu_agrees(call, tmp_path):
    for device in ("cuda", "cuda:0", "cpu"):
        call(train, SMALL, "--epochs 1 --amp off --batch-size 20 --out", device, "--device", device)
    assert_same_bits(tmp_path / "cuda", tmp_path / "cuda:0")
    (gpu,), (cpu,) = (results(tmp_path / name).values() for name in ("cuda", "cpu"))
    ours, theirs = (result["history"][0]["train"]["loss"] for result in (gpu, cpu))
    assert ours == pytest.approx(theirs, rel=1e-2)


def test_too_little_memory_on_a_gpu_is_one_line(tmp_path):
    limit = "import torch; torch.cuda.set_per_process_memory_fraction(0.005); import runs, sys, train; "
    code = f"import sys; sys.path.insert(0, {str(HOUSE)!r}); {limit}sys.argv = ['train.py', *sys.argv[1:]]; "
    words = ["--data", "synthetic", "--batch-size", "2000", "--epochs", "1", "--out", str(tmp_path)]
    command = [sys.executable, "-c", code + "runs.command_line(train.main)", *words]
    process = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert process.returncode == 1 and re.fullmatch(r"train.py: error: .*out of memory.*\n", process.stderr)


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


def test_no_step_of_an_epoch_waits_for_the_device(call, monkeypatch):
    """In PyTorch's debug mode a synchronization inside an epoch's steps is an error."""
    seen = []

    class Watched(train.CapturedStep):
        def __call__(self, *batch):
            # Capture itself synchronizes
            torch.cuda.set_sync_debug_mode("error" if self.graph else "default")
            super().__call__(*batch)
            torch.cuda.set_sync_debug_mode("default")
            seen.append(self.graph is not None)

    monkeypatch.setattr(train, "CapturedStep", Watched)
    call(train, SMALL, "--batch-size 6 --aug flip+autoaugment --schedule onecycle")
    assert seen.count(True) >= 6
