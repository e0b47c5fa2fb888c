"""Devices, checkpoints, errors: what keeps a run alive."""

import contextlib
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import HOUSE

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
    assert make_run(tmp_path, "--no-graph", "--out", "x").restore(fresh) == [{"epoch": 1}]
    assert "resuming after epoch 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "device", "named"),
    [
        (("--lr", 0.1), CPU, "lr 0.1, not 0.001"),
        (("--amp", "bf16"), CPU, "dtype torch.bfloat16, not torch.float32"),
        ((), torch.device("mps"), "device mps, not cpu"),
    ],
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
        raise KeyboardInterrupt(signal.SIGINT)

    run = make_run(tmp_path, "--force")
    assert run.checkpoint.exists()
    with pytest.raises(KeyboardInterrupt):
        runs.run_seed(run, train_briefly)
    assert not run.checkpoint.exists()


def test_a_test_loss_that_is_not_finite_is_no_result(tmp_path):
    run = make_run(tmp_path)
    with pytest.raises(RuntimeError, match="the test loss is nan: lower --lr"):
        runs.run_seed(run, lambda run: ({}, {"test": {"loss": float("nan")}, "history": []}))
    assert not run.path.exists()


def test_a_checkpoint_of_other_code_is_resumed_with_a_word_unless_it_does_not_fit(tmp_path, capsys):
    run = make_run(tmp_path)
    run.code = "1"
    run.save(states(), [{"epoch": 1}])
    run.code = "2"
    assert run.restore(states()) == [{"epoch": 1}]
    assert "resuming after epoch 1" in (shown := capsys.readouterr().out) and "other code" in shown
    with pytest.raises(RuntimeError, match="does not fit this code's model: --force"):
        run.restore({"model": torch.nn.Linear(3, 3)})


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


def test_a_default_that_was_edited_is_refused_and_only_force_replaces_the_result(
    tiny, run, one_line, tmp_path
):
    command = ("train.py", *tiny, "--epochs", 1)
    assert run(*command).returncode == 0
    (path,) = tmp_path.rglob("seed1.json")
    before = path.read_bytes()
    for change, words in (
        ({"lr": 0.01}, "now lr 0.001, not 0.01"),
        (
            {"label_smoothing": 0.1, "optimizer": "sgd"},
            "now label_smoothing 0.0, not 0.1; optimizer adam, not sgd",
        ),
    ):
        result = json.loads(before)
        result["config"] |= change
        path.write_text(json.dumps(result))
        one_line(run(*command), 1, str(path.relative_to(tmp_path)), words, "--force")
        assert json.loads(path.read_text()) == result
    assert run(*command, "--force").returncode == 0 and json.loads(path.read_text())["config"]["lr"] == 0.001


def test_settings_that_left_or_came_later_are_ignored_and_other_code_is_said(tiny, run, tmp_path):
    command = ("train.py", *tiny, "--epochs", 1)
    assert run(*command).returncode == 0
    (path,) = tmp_path.rglob("seed1.json")
    result = json.loads(path.read_text())
    assert "made by other code" not in run(*command).stdout
    del result["config"]["stem"]  # a file from before that option
    result["config"]["animals"], result["environment"]["code"] = "all", "00000000"
    path.write_text(json.dumps(result))
    shown = run(*command).stdout
    assert "skipped, its result exists" in shown and "made by other code" in shown


def test_the_code_of_a_result_is_a_hash_of_the_scripts_that_train(tmp_path, monkeypatch):
    for name in (*runs.CODE, "moe.py", "aggregate.py"):
        (tmp_path / name).write_bytes((HOUSE / name).read_bytes())
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "runs.py"))
    before = [runs.code_hash(tmp_path / name) for name in ("train.py", "moe.py")]
    assert len({*before}) == 2
    (tmp_path / "aggregate.py").write_text("")
    assert [runs.code_hash(tmp_path / name) for name in ("train.py", "moe.py")] == before
    (tmp_path / "moe.py").write_text("")
    assert [
        runs.code_hash(tmp_path / name) == old
        for name, old in zip(("train.py", "moe.py"), before, strict=True)
    ] == [True, False]
    for name in runs.CODE:
        (tmp_path / name).write_text("")
        assert runs.code_hash(tmp_path / "train.py") != before[0]
        before[0] = runs.code_hash(tmp_path / "train.py")


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
        step(torch.zeros(2), torch.zeros(2))


# Signals and errors


@pytest.mark.parametrize(
    ("words", "streams", "encoding"),
    [("--help", "", "ascii"), ("--help", ">&- 2>&-", "cp1252"), ("--fraction no", "<&- >&-", "cp1252")],
)
def test_closed_streams_and_any_encoding_never_end_in_a_traceback(words, streams, encoding, tmp_path):
    command = ["bash", "-c", f"{sys.executable} {HOUSE / 'data.py'} {words} {streams}"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "WORLD_SIZE": ""}
    process = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert process.returncode == (2 if "no" in words else 0), process.stderr
    assert process.stderr.count("\n") == ("no" in words) and "Traceback" not in process.stderr


def test_a_notebooks_streams_cannot_be_configured_and_its_signals_are_restored(monkeypatch):
    class Stream:
        encoding = "ascii"
        text = ""

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    before = [signal.getsignal(number) for number in runs.SIGNALS]
    for error, status, shown in (
        (None, 0, ""),
        (ValueError("one\n two"), 2, "error: one two\n"),
        (KeyboardInterrupt(2), 130, "SIGINT"),
    ):
        stream = Stream()
        monkeypatch.setattr(runs.sys, "stdout", Stream())
        monkeypatch.setattr(runs.sys, "stderr", stream)

        def main(error=error):
            if error:
                raise error

        with pytest.raises(SystemExit) if status else contextlib.nullcontext() as stop:
            runs.command_line(main)
        assert status in (0, getattr(getattr(stop, "value", None), "code", 0)) and shown in stream.text
        assert [signal.getsignal(number) for number in runs.SIGNALS] == before


def test_a_thread_that_cannot_handle_signals_runs_a_script():
    done = []
    thread = threading.Thread(target=runs.command_line, args=[lambda: done.append("main")])
    thread.start()
    thread.join()
    assert done == ["main"]


def test_an_option_with_one_dash_gets_the_nearest_one():
    parser = runs.new_parser("")
    parser.add_argument("--lr")
    with pytest.raises(ValueError, match="unrecognized arguments: -lr 0.1: did you mean --lr?"):
        parser.parse_args(["-lr", "0.1"])


def test_a_signal_during_a_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "seed1.json"
    runs.write_atomically(path, {"test": "old"})

    def interrupt(handle):
        raise KeyboardInterrupt(signal.SIGTERM)

    monkeypatch.setattr(runs.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        runs.write_atomically(path, {"test": "new"})
    assert json.loads(path.read_text()) == {"test": "old"} and os.listdir(tmp_path) == ["seed1.json"]


def test_run_names_show_settings_in_a_fixed_order():
    defaults = {"lr": 0.001, "classes": None, "pretrained": False, "epochs": 10, "query": None}
    settings = {"epochs": 3, "lr": 0.1, "classes": "cat,dog", "pretrained": True, "seed": 4, "query": None}
    assert runs.run_name(("a", "b"), settings, defaults) == "a-b-only-cat+dog-epochs3-lr0.1-pretrained"


def test_values_of_any_text_make_file_names_that_differ():
    many = ",".join(f"class{number}" for number in range(20))
    values = [
        "a,b",
        "a+b",
        "a b",
        "a_b",
        "a/b",
        "A;b",
        ["a", "b"],
        ["a,b"],
        ["a;b"],
        "ä",
        "Ä",
        "\udcff",
        many,
        many + "0",
        "",
    ]
    names = [runs.run_name((), {"classes": value}, {}) for value in values]
    names[7:8] = []  # one group of two classes, as a list or as text
    assert len(set(names)) == len(names) and all(
        re.fullmatch(r"[\w.+-]{1,80}", name, re.ASCII) for name in names
    )


def test_an_option_without_a_tag_is_an_error():
    with pytest.raises(LookupError, match="--new-option: add it to TAGS"):
        runs.run_name((), {"new_option": 1}, {"new_option": 1})


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
