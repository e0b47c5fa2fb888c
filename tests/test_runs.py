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
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import HOUSE

import data
import runs
import train


def make_run(tmp_path, *words, device="cpu"):
    args = train.parse_arguments(list(map(str, ("--checkpoint-every", 0, "--amp", "off", *words))))
    return runs.Run(args, 1, data.synthetic((20, 10, 10)), torch.device(device), tmp_path / "seed1.json")


def states():
    return {"model": torch.nn.Linear(2, 2)}


# Devices


def test_the_requested_gpu_becomes_the_current_one_and_an_unavailable_one_is_rejected(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert [runs.use_device(name).type for name in ("cuda:1", "cuda", "auto")] == ["cuda"] * 3
    assert current == [1, 0, 0]
    for name in ("cuda:2", "cuda:x", "gpu"):
        with pytest.raises(ValueError, match=f"--device {name}: not available on this machine"):
            runs.use_device(name)


def test_float32_is_not_tf32():
    torch.backends.cudnn.allow_tf32 = True
    runs.make_repeatable()
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


# Checkpoints


def test_a_checkpoint_restores_what_it_saved_and_says_that_the_code_changed_or_does_not_fit(tmp_path, capsys):
    run, saved, fresh = make_run(tmp_path, "--no-graph", "--out", "x"), states(), states()
    make_run(tmp_path).save(saved, [{"epoch": 1}])
    for run.code, other in ((None, False), ("0123abcd", True)):
        assert run.restore(fresh) == [{"epoch": 1}]
        assert torch.equal(fresh["model"].weight, saved["model"].weight)
        shown = capsys.readouterr().out
        assert "resuming after epoch 1" in shown and ("other code" in shown) == other
    with pytest.raises(RuntimeError, match="does not fit this code's model: --force"):
        run.restore({"model": torch.nn.Linear(3, 3)})


def test_a_checkpoint_with_different_settings_or_device_is_reported_and_ignored(tmp_path, capsys):
    make_run(tmp_path).save(states(), [{"epoch": 1}])
    for words, device, named in (
        (["--lr", 0.1], "cpu", "lr 0.1, not 0.001"),
        (["--amp", "bf16"], "cpu", "dtype torch.bfloat16, not torch.float32"),
        ([], "mps", "device mps, not cpu"),
    ):
        assert make_run(tmp_path, *words, device=device).restore(states()) == []
        assert f"different settings ({named}); restarting from scratch" in capsys.readouterr().out
    assert runs.environment(make_run(tmp_path, "--amp", "bf16"))["dtype"] == "bfloat16"


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


@pytest.mark.parametrize("share", [0, 0.01, 0.5])
def test_a_damaged_checkpoint_is_reported_and_ignored(share, tmp_path, capsys):
    run = make_run(tmp_path)
    run.save(states(), [{"epoch": 1}])
    content = run.checkpoint.read_bytes()
    run.checkpoint.write_bytes(content[: int(share * len(content))])
    assert run.restore(states()) == []
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


def test_a_default_that_was_edited_is_refused_but_not_options_that_came_later(tiny, run, one_line, tmp_path):
    command = ("train.py", *tiny, "--epochs", 1)
    assert run(*command).returncode == 0
    (path,) = tmp_path.rglob("seed1.json")
    result = json.loads(path.read_text())
    assert "made by other code" not in run(*command).stdout
    del result["config"]["stem"]  # a file from before that option, with one that left
    result["config"]["animals"], result["environment"]["code"], result["note"] = "all", "00000000", "by hand"
    path.write_text(json.dumps(result))
    shown = run(*command).stdout
    assert "skipped, its result exists" in shown and "made by other code" in shown
    result["config"] |= {"label_smoothing": 0.1, "optimizer": "sgd", "seed": 2}
    path.write_text(json.dumps(result))
    words = "now label_smoothing 0.0, not 0.1; optimizer adam, not sgd; seed 1, not 2"
    one_line(run(*command), 1, str(path.relative_to(tmp_path)), words, "--force")
    assert json.loads(path.read_text()) == result
    assert run(*command, "--force").returncode == 0
    assert json.loads(path.read_text())["config"]["optimizer"] == "adam"


def test_the_code_of_a_result_is_a_hash_of_the_scripts_that_train(tmp_path, monkeypatch):
    for name in (*runs.CODE, "moe.py", "aggregate.py"):
        (tmp_path / name).write_bytes((HOUSE / name).read_bytes())
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "runs.py"))

    def hashes():
        return [runs.code_hash(tmp_path / name) for name in ("train.py", "moe.py")]

    assert {*runs.CODE} == {"augment.py", "data.py", "models.py", "runs.py", "train.py"}
    assert runs.environment(make_run(tmp_path))["commit"] is None  # this folder is no repository
    before = hashes()
    assert len({*before}) == 2
    for name in ("aggregate.py", "moe.py", *runs.CODE):
        (tmp_path / name).write_text("")
        changed = [now != old for now, old in zip(hashes(), before, strict=True)]
        assert changed == [name in runs.CODE, name != "aggregate.py"]
        before = hashes()


# Captured steps


def test_a_failed_capture_names_the_cause_and_the_remedy(monkeypatch):
    @contextlib.contextmanager
    def graph(graph, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", graph)
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
    command = f"PYTHONIOENCODING={encoding} {sys.executable} {HOUSE / 'data.py'} {words} {streams}"
    shell = ["bash", "-c", command]
    process = subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert process.returncode == (2 if "no" in words else 0), process.stderr
    assert process.stderr.count("\n") == ("no" in words) and "Traceback" not in process.stderr


def test_a_notebooks_streams_cannot_be_configured_and_its_signals_are_restored(monkeypatch):
    """As a notebook's, an io.StringIO lacks reconfigure()."""
    before = [signal.getsignal(number) for number in runs.SIGNALS]
    for error, status, shown in (
        (None, 0, ""),
        (ValueError("one\n two"), 2, "error: one two\n"),
        (KeyboardInterrupt(2), 130, "SIGINT"),
    ):
        monkeypatch.setattr(runs.sys, "stdout", io.StringIO())
        monkeypatch.setattr(runs.sys, "stderr", io.StringIO())
        with pytest.raises(SystemExit) if status else contextlib.nullcontext() as stop:
            runs.command_line(mock.Mock(side_effect=error))
        assert status == (stop.value.code if stop else 0) and shown in runs.sys.stderr.getvalue()
        assert [signal.getsignal(number) for number in runs.SIGNALS] == before


def test_a_thread_that_cannot_handle_signals_runs_a_script():
    done = []
    thread = threading.Thread(target=runs.command_line, args=[lambda: done.append("main")])
    thread.start()
    thread.join()
    assert done == ["main"]


def test_a_signal_during_a_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "seed1.json"
    runs.write_atomically(path, {"test": "old"})
    monkeypatch.setattr(runs.os, "fsync", mock.Mock(side_effect=KeyboardInterrupt(signal.SIGTERM)))
    with pytest.raises(KeyboardInterrupt):
        runs.write_atomically(path, {"test": "new"})
    assert json.loads(path.read_text()) == {"test": "old"} and os.listdir(tmp_path) == ["seed1.json"]


def test_values_of_any_text_make_file_names_that_differ():
    many = ",".join(f"class{number}" for number in range(20))
    values = ["a,b", "a+b", "a b", "a_b", "a/b", "A;b", "ä", "Ä", "\udcff", ""]
    values += [many, many + "0", ["a", "b"], ["a;b"]]
    names = [runs.run_name((), {"classes": value}, {}) for value in values]
    assert len({*names}) == len(names)
    assert runs.run_name((), {"classes": ["a,b"]}, {}) == names[0]  # one group of two, as a list or as text
    assert all(re.fullmatch(r"[\w.+-]{1,80}", name, re.ASCII) for name in names)


def test_an_option_without_a_tag_is_an_error():
    with pytest.raises(LookupError, match="--new-option: add it to TAGS"):
        runs.run_name((), {"new_option": 1}, {"new_option": 1})


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_redrawn_and_cleared_on_a_terminal_only(terminal, monkeypatch):
    monkeypatch.setattr(runs.sys, "stderr", io.StringIO())
    monkeypatch.setattr(runs.sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(runs.time, "monotonic", itertools.count().__next__)  # a second for each item
    assert list(runs.progress([[1, 2], [3]], "decoding", 3, len)) == [[1, 2], [3]]
    lines = ["", "decoding: 2/3, 2/s, 0 s left\033[K", "decoding: 3/3, 2/s, 0 s left\033[K", "\033[K"]
    assert runs.sys.stderr.getvalue().split("\r") == (lines if terminal else [""])
