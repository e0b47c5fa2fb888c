"""Devices, checkpoints, errors: what keeps a run alive."""

import io
import itertools
import json
import os
import signal

import numpy as np
import pytest
import torch

import data
import runs
import train

CPU = torch.device("cpu")


def make_run(tmp_path, *words, device=CPU):
    args = train.parse_arguments(list(map(str, ("--checkpoint-every", 0, "--amp", "off", *words))))
    return runs.Run(args, 1, data.synthetic((20, 10, 10)), device, tmp_path / "seed1.json")


def states():
    model = torch.nn.Linear(2, 2)
    return {"model": model}


# Devices


@pytest.fixture
def two_gpus(monkeypatch):
    """Pretend that there are two GPUs; returns the indices made current."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.mark.parametrize(("name", "index"), [("cuda:1", 1), ("cuda:0", 0), ("cuda", 0), ("auto", 0)])
def test_the_requested_gpu_becomes_the_current_one(name, index, two_gpus):
    assert runs.use_device(name).type == "cuda"
    assert two_gpus == [index]


def test_an_unavailable_gpu_is_rejected(two_gpus):
    for name in ("cuda:2", "cuda:x", "gpu"):
        with pytest.raises(ValueError, match=f"--device {name}: not available on this machine"):
            runs.use_device(name)


def test_torchrun_gives_each_process_its_own_gpu(two_gpus, monkeypatch):
    monkeypatch.setattr(runs, "world_size", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert runs.use_device("cuda") == torch.device("cuda:1") and two_gpus == [1]
    with pytest.raises(ValueError, match="use --device cuda"):
        runs.use_device("cuda:0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="more processes than the 2 GPUs"):
        runs.use_device("cuda")


def test_torchrun_on_a_mac_needs_the_cpu(monkeypatch):
    monkeypatch.setattr(runs, "world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ValueError, match="--device mps: torchrun does not support it; use --device cpu"):
        runs.use_device("auto")
    assert runs.use_device("cpu") == CPU


def test_float32_is_not_tf32():
    torch.backends.cudnn.allow_tf32 = True
    runs.make_repeatable()
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


# Checkpoints


def test_a_checkpoint_restores_what_it_saved(tmp_path, capsys):
    run, saved = make_run(tmp_path), states()
    run.save(saved, [{"epoch": 1}])
    fresh = states()
    assert make_run(tmp_path).restore(fresh) == [{"epoch": 1}]
    assert torch.equal(fresh["model"].weight, saved["model"].weight)
    assert make_run(tmp_path, "--no-graph", "--seed", 5, "--out", "x").restore(fresh) == [{"epoch": 1}]
    assert "resuming after epoch 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "device", "named"),
    [(("--lr", 0.1), CPU, "lr"), (("--amp", "bf16"), CPU, "dtype"), ((), torch.device("mps"), "device")],
)
def test_a_checkpoint_with_different_settings_or_device_is_reported_and_ignored(
    words, device, named, tmp_path, capsys
):
    make_run(tmp_path).save(states(), [{"epoch": 1}])
    assert make_run(tmp_path, *words, device=device).restore(states()) == []
    assert f"different settings ({named}); restarting from scratch" in capsys.readouterr().out


def test_a_forced_run_discards_its_checkpoint(tmp_path):
    make_run(tmp_path).save(states(), [{"epoch": 1}])

    def train_briefly(run):
        assert run.restore(states()) == []
        raise runs.Stopped(signal.SIGINT)

    run = make_run(tmp_path, "--force")
    assert run.checkpoint.exists()
    with pytest.raises(runs.Stopped):
        runs.run_seed(run, train_briefly)
    assert not run.checkpoint.exists()


def test_a_checkpoint_of_another_number_of_processes_is_ignored(tmp_path, capsys, monkeypatch):
    make_run(tmp_path).save(states(), [{"epoch": 1}])
    with monkeypatch.context() as patch:
        patch.setattr(runs, "world_size", lambda: 2)
        run = make_run(tmp_path)
    assert run.restore(states()) == []
    assert "different settings (processes); restarting from scratch" in capsys.readouterr().out


@pytest.mark.parametrize("keep", [0, 10, 0.5])
def test_a_damaged_checkpoint_is_reported_and_ignored(keep, tmp_path, capsys):
    run = make_run(tmp_path)
    run.save(states(), [{"epoch": 1}])
    content = run.checkpoint.read_bytes()
    run.checkpoint.write_bytes(content[: int(keep * len(content)) if keep < 1 else keep])
    assert run.restore(states()) == []
    if keep:
        assert "seed1.ckpt is damaged: restarting from scratch" in capsys.readouterr().out


def test_checkpoints_are_saved_no_more_often_than_requested(tmp_path, monkeypatch):
    run, now = make_run(tmp_path, "--checkpoint-every", 20), [0.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: now[0])
    run.saved, written = 0.0, []
    monkeypatch.setattr(runs, "write_atomically", lambda path, content: written.append(now[0]))
    for now[0] in np.arange(0.0, 61.0, 3.0):
        run.save(states(), [])
    assert written == [21, 42]


# Results


def test_a_result_from_different_images_is_run_again(image_folder, run, tmp_path):
    folder = image_folder(splits=(("train", 20), ("valid", 4), ("test", 6)))
    command = ("train.py", "--data", "images", "--epochs", 1)
    assert run(*command, "--seed", 1).returncode == 0
    (path,) = tmp_path.rglob("seed1.json")
    before = json.loads(path.read_text())["data"]["fingerprint"]
    for file in list((folder / "train").rglob("1*.png")):
        file.unlink()
    process = run(*command, "--seed", 1, 2)
    assert "seed1.json comes from different images" in process.stdout and "skipped" not in process.stdout
    found = {json.loads(p.read_text())["data"]["fingerprint"] for p in tmp_path.rglob("seed*.json")}
    assert len(found) == 1 and before not in found


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "illegal memory access"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            "out of memory on cpu with --batch-size 64",
        ),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
            "out of memory on cpu with --batch-size 64",
        ),
        (MemoryError(), "out of memory on cpu with --batch-size 64"),
    ],
)
def test_only_out_of_memory_errors_are_reported_as_such(error, named, tmp_path):
    def fail(run):
        raise error

    with pytest.raises(RuntimeError, match=named):
        runs.run_seed(make_run(tmp_path), fail)
    assert not list(tmp_path.iterdir())


# Captured steps


def test_a_failed_capture_names_the_cause_and_the_remedy(monkeypatch):
    class Graph:
        def __init__(self, graph, stream, capture_error_mode):
            assert capture_error_mode == "thread_local"

        def __enter__(self):
            pass

        def __exit__(self, *_):
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    monkeypatch.setattr(train, "side_stream", lambda device: None)
    step = train.CapturedStep(lambda *batch: None)
    step.calls, step.inputs, step.labels = step.WARM_UP, torch.zeros(2), torch.zeros(2)
    with pytest.raises(RuntimeError, match="a step cannot be captured .operation not permitted.*--no-graph"):
        step(torch.zeros(2), torch.zeros(2), 1.0)


# Signals and errors


def test_a_signal_during_a_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "seed1.json"
    runs.write_atomically(path, {"test": "old"})

    def interrupt(handle):
        raise runs.Stopped(signal.SIGTERM)

    monkeypatch.setattr(runs.os, "fsync", interrupt)
    with pytest.raises(runs.Stopped):
        runs.write_atomically(path, {"test": "new"})
    assert json.loads(path.read_text()) == {"test": "old"} and os.listdir(tmp_path) == ["seed1.json"]


def test_run_names_show_settings_in_a_fixed_order():
    defaults = {"lr": 0.001, "classes": None, "pretrained": False, "epochs": 10, "query": None}
    settings = {"epochs": 3, "lr": 0.1, "classes": "cat,dog", "pretrained": True, "seed": 4, "query": None}
    assert runs.run_name(("a", "b"), settings, defaults) == "a-b-only-cat+dog-epochs3-lr0.1-pretrained"


def test_progress_is_silent_without_a_terminal(monkeypatch):
    monkeypatch.setattr(runs.sys, "stderr", io.StringIO())
    monkeypatch.setattr(runs.time, "monotonic", itertools.count().__next__)  # a second for each item
    assert list(runs.progress("abc", "epoch 1/2", 3)) == ["a", "b", "c"]
    assert runs.sys.stderr.getvalue() == ""


def test_progress_on_a_terminal_is_redrawn_and_cleared(monkeypatch):
    monkeypatch.setattr(runs.sys, "stderr", io.StringIO())
    monkeypatch.setattr(runs.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(runs.time, "monotonic", itertools.count().__next__)
    list(runs.progress([[1, 2], [3]], "decoding", 3, len))
    lines = runs.sys.stderr.getvalue().split("\r")
    assert lines == ["", "decoding: 2/3, 2/s, 0 s left\033[K", "decoding: 3/3, 2/s, 0 s left\033[K", "\033[K"]
