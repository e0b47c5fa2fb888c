"""Guarantees of docs/guarantees.md under real faults: kills, a full disk, damaged and malicious files."""

import contextlib
import io
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import hypothesis
import hypothesis.strategies
import numpy as np
import pytest
import torch
from conftest import HOUSE, assert_same_bits
from PIL import Image

import aggregate
import data
import fewshot
import moe
import runs
import train


def start(script, *arguments, cwd):
    command, pipe = [sys.executable, "-u", HOUSE / script, *map(str, arguments)], subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=cwd)


def read_until(process, word):
    for line in process.stdout:
        if word in line:
            return line
    raise AssertionError(f"the process ended without {word!r}: {process.stderr.read()}")


# Killed


KILLED_AT_RANDOM = """
import importlib, os, pathlib, random, signal, sys, time
import torch._dynamo, torchvision
import data, runs
main = importlib.import_module(sys.argv.pop(1)).main
most, slowest, rng, kills = int(sys.argv.pop(1)), float(sys.argv.pop(1)), random.Random(1), 0
sys.stdout = open(os.devnull, "w")
while kills < most:
    child = os.fork()
    if child == 0:
        runs.command_line(main)
        os._exit(0)
    while kills == 0 and not list(pathlib.Path("killed").rglob("*.ckpt")):
        time.sleep(0.01)  # the first kill comes after a checkpoint
    time.sleep(rng.uniform(0, slowest))
    os.kill(child, signal.SIGKILL)
    if os.waitpid(child, 0)[1] != signal.SIGKILL:
        break  # the run had ended
    kills += 1
print(kills, file=sys.stderr)
"""
TRAIN = "--epochs 12 --batch-size 16 --aug autoaugment --dropout 0.2 --schedule onecycle --weight-decay 0.01"
FEWSHOT = "--fraction 1 --way 2 --shot 1 --query 1 --episodes 300"
SLOW = [(4, 1.5, f"fewshot {FEWSHOT}"), (5, 2, "moe --epochs 2")]  # kills, most seconds before each, command


@pytest.mark.parametrize(
    "case", [(20, 1, f"train {TRAIN}"), *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_killed_20_times_at_random_a_run_ends_with_the_same_bits(case, run, image_folder, tmp_path):
    """Each process is a fork of one that has imported torch, so that kills hit the run itself."""
    image_folder(data.CLASSES, (("train", 4), ("valid", 2), ("test", 3)))
    most, slowest, words = case
    script, *command = [*words.split(), "--data", "images", "--checkpoint-every", "0"]
    file = tmp_path / "killed.py"
    file.write_text(f"import sys; sys.path.insert(0, {str(HOUSE)!r}){KILLED_AT_RANDOM}")
    words = map(str, [sys.executable, file, script, most, slowest, *command, "--out", "killed"])
    killed = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert int(killed.stderr.split()[-1]) >= (10 if script == "train" else 1), killed.stderr
    shown = run(f"{script}.py", *command, "--out", "killed").stdout
    assert "resuming after epoch" in shown or "skipped" in shown
    assert run(f"{script}.py", *command, "--out", "whole").returncode == 0
    assert_same_bits(tmp_path / "whole", tmp_path / "killed")
    assert not list(tmp_path.rglob("*.ckpt")), "a finished run has none"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_with_one_line_and_a_checkpoint(number, status, tmp_path, tiny, run):
    command = ("train.py", *tiny, "--epochs", 6, "--checkpoint-every", 0, "--out", "out")
    process = start(*command, cwd=tmp_path)
    read_until(process, "epoch 3/6")
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode == status and error.count("\n") == 1, error
    assert number.name in error and "the same command resumes" in error
    left = sorted(path.name for path in (tmp_path / "out").glob("c*/*"))
    assert left == ["seed1.ckpt"]
    assert "resuming after epoch" in run(*command).stdout


def test_two_processes_given_the_same_run_do_it_once(tiny, tmp_path):
    command = ("train.py", *tiny, "--epochs", 4, "--seed", 1, 2, "--out", "out")
    both = [start(*command, cwd=tmp_path) for _ in range(2)]
    shown = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], shown
    assert sorted(text.count("epoch 4/4") for text, _ in shown) in ([0, 2], [1, 1])
    assert sum("waiting for" in text for text, _ in shown) >= 1
    names = sorted(path.name for path in (tmp_path / "out").glob("c*/*"))
    assert names == ["seed1.json", "seed1.pt", "seed2.json", "seed2.pt"]


# Faults


def test_a_run_survives_the_loss_of_its_results_folder(tiny, tmp_path):
    process = start("train.py", *tiny, "--epochs", 4, "--out", "out", cwd=tmp_path)
    read_until(process, "epoch 2/4")
    shutil.rmtree(tmp_path / "out")
    _, error = process.communicate()
    assert process.returncode == 0, error
    assert len(aggregate.read(tmp_path / "out")) == 1


@pytest.mark.parametrize("out", ["/proc/results", "file/results"])
def test_results_that_cannot_be_written_end_a_run_before_it_begins(out, tiny, run, one_line, tmp_path):
    (tmp_path / "file").write_text("")
    process = run("train.py", *tiny, "--out", out)
    one_line(process, 1, out.split("/")[-1])
    assert "epoch" not in process.stdout


def test_a_full_disk_is_one_line_that_names_the_file_and_finished_work_is_kept(tiny, run, one_line, tmp_path):
    """As with ulimit -f, no file may exceed 1 MiB; the weights have 13."""
    assert run("train.py", *tiny, "--epochs", 1, "--out", "out").returncode == 0
    before = sorted((tmp_path / "out").glob("c*/*"))
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))"
    process = run("train.py", *tiny, "--epochs", 1, "--seed", 1, 2, "--out", "out", code=limit)
    one_line(process, 1, "seed2.pt cannot be written (File too large)")
    assert "skipped" in process.stdout and sorted((tmp_path / "out").glob("c*/*")) == before


def test_a_damaged_result_is_reported_by_every_script(tiny, run, tmp_path, capsys):
    assert run("train.py", *tiny, "--epochs", 1, "--out", "out").returncode == 0
    (path,) = tmp_path.rglob("seed1.json")
    assert runs.finished(path, {}) and len(aggregate.read(tmp_path / "out")) == 1
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", bytes(range(256))):
        path.write_bytes(damaged)
        assert runs.finished(path, {}) is None and aggregate.read(tmp_path / "out") == []
        shown = capsys.readouterr()
        assert f"{path} is damaged or not a result file" in shown.out and f"left out: {path}" in shown.err


def test_an_experts_damaged_weights_are_reported(image_folder, tmp_path, monkeypatch):
    image_folder(data.CLASSES, (("train", 2), ("valid", 1), ("test", 1)))
    monkeypatch.chdir(tmp_path)
    args = moe.parse_arguments(["--data", "images", "--epochs", "1"])
    moe.expert(args, 1)
    (path,) = tmp_path.rglob("seed1.pt")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="seed1.pt is damaged"):
        moe.expert(args, 1)


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_a_pickle_that_would_run_code_is_rejected(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    dataset, args = data.synthetic((10, 10, 10)), train.parse_arguments([])
    interrupted = runs.Run(args, 1, dataset, torch.device("cpu"), tmp_path / "x.json")
    runs.write_atomically(interrupted.checkpoint, {"settings": {}, "states": Harmful()})
    assert interrupted.restore({}) == []
    interrupted.checkpoint.write_bytes(pickle.dumps(Harmful()))
    assert interrupted.restore({}) == []
    assert capsys.readouterr().out.count("x.ckpt is damaged") == 2
    weights = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    weights.parent.mkdir(parents=True)
    torch.save(Harmful(), weights)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match="weights of resnet18"):
        train.models.build("resnet18", pretrained=True)
    torch.save(Harmful(), tmp_path / "seed1.pt")
    with pytest.raises(ValueError, match="seed1.pt is damaged"):
        train.models.load(tmp_path / "seed1.pt")
    assert not (tmp_path / "harmed").exists()
    assert "weights_only=False" not in "".join(path.read_text() for path in HOUSE.glob("*.py"))


def test_too_little_memory_is_one_line(run, one_line, tmp_path):
    limit = "import resource, torch, torch._dynamo; pages = int(open('/proc/self/statm').read().split()[0]); "
    limit += "resource.setrlimit(resource.RLIMIT_AS, (4096 * pages + 600 * 2**20,) * 2)"
    options = ("--data", "synthetic", "--batch-size", 2000, "--epochs", 1, "--device", "cpu")
    one_line(run("train.py", *options, code=limit, OMP_NUM_THREADS="1"), 1, "train.py: error: ", "memory")
    assert not list(tmp_path.glob("results/c*")), "a failed run leaves no empty folder"


# Invalid input


NAMES = ("two words", 'it\'s "quoted"', "new\nline", "żółć", "-", "a" * 200, os.fsdecode(b"\xff\xfe"))


def test_folders_and_classes_of_any_name_train(image_folder, tmp_path, run):
    for name in NAMES:
        place = image_folder(NAMES, (("train", 4), ("valid", 1), ("test", 2)), name=name)
        assert data.load(str(place), tmp_path / "root").classes == tuple(sorted(NAMES))
    process = run("train.py", "--data", place, "--epochs", 1)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("classes", [1, 300])
def test_any_number_of_classes_trains(classes, image_folder, tmp_path, run):
    image_folder([f"class{number}" for number in range(classes)], [(split, 1) for split in data.SPLITS])
    process = run("train.py", "--data", "images", "--epochs", 1, "--batch-size", 250)
    assert process.returncode == 0, process.stderr


def test_batch_size_1_is_rejected_where_batch_norm_needs_more(image_folder, run, one_line):
    image_folder()
    process = run("train.py", "--data", "images", "--arch", "resnet18", "--batch-size", 1)
    one_line(process, 2, "resnet18", "--batch-size")


def picture(size=(32, 32)):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((*size, 3), np.uint8)).save(buffer, "png")
    return buffer.getvalue()


CONTENTS = [picture(), picture((1, 7)), picture()[:60], b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(40)]
SCRIPTS = {"train": train, "fewshot": fewshot, "moe": moe, "data": data}


def snapshot(folder):
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*") if not path.is_dir()}


def status_of(script, words, folder):
    """The exit status of a script's main in this process. An error has to be one line, and nothing
    may be written to the folder of images nor beside `out` and `root`."""
    output, errors = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    before, status = snapshot(folder), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            with mock.patch.object(sys, "argv", [f"{script}.py", *words]):
                runs.command_line(SCRIPTS[script].main)
        except SystemExit as stop:
            status = stop.code
    error = errors.buffer.getvalue().decode()
    assert status in (0, 1, 2) and error.count("\n") == (status != 0) and "Traceback" not in error, error
    assert snapshot(folder) == before and {*os.listdir()} <= {folder.name, "out", "root"}
    return status


VALUES = "0 1 2 -1 0.5 1e9 nan inf ż ٣ 1.5.2 cat,dog flip none adam sgd vehicles all ../x synthetic images"
VALUES = [*VALUES.split(), "cpu", "cuda:9", "bf16", "off", "custom", "x" * 300, "", " ", "\n"]
COMMON = "data fraction classes lr optimizer momentum weight-decay schedule seed device amp force"
OPTIONS = {
    "train": f"{COMMON} arch aug epochs batch-size dropout pretrained stem label-smoothing checkpoint-every "
    "no-graph colour",
    "fewshot": f"{COMMON} way shot query episodes",
    "moe": f"{COMMON} experts train-adapters adapter-width epochs batch-size dropout colour",
    "data": "data fraction classes help",
}


def fuzzed(test):
    """The test, run by hypothesis with 500 random number generators; it shrinks what fails."""
    everything = hypothesis.settings(max_examples=500, deadline=None, derandomize=True, database=None)
    return everything(hypothesis.given(hypothesis.strategies.randoms(use_true_random=False))(test))


def random_command(rng):
    """A mostly invalid command; a valid one is small: the last of repeated options wins."""
    script = rng.choice(list(OPTIONS))
    names = rng.sample(OPTIONS[script].split(), rng.randint(0, 3))
    words = []
    for name in names:
        words += [f"--{name}", *rng.sample(VALUES, rng.choice((0, 1, 1, 1, 2)))]
    if rng.random() < 0.8:
        words += {"fewshot": ["--episodes", "1"], "data": []}.get(script, ["--epochs", "1"])
    if not {"synthetic", "--data"} & {*words}:
        words += ["--data", "images"]
    return script, [*words, "--root", "root", *(["--out", "out"] if script != "data" else [])]


def test_500_random_command_lines_never_end_in_a_traceback(image_folder, tmp_path, monkeypatch):
    image_folder(data.CLASSES[:3], (("train", 2), ("valid", 2), ("test", 2)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(data, "synthetic", lambda drawn=data.synthetic: drawn((40, 20, 20)))
    seen = set()

    @fuzzed
    def fuzz(rng):
        script, words = random_command(rng)
        seen.add(status_of(script, words, tmp_path / "images"))

    fuzz()
    assert {0, 2} <= seen


def random_tree(rng, folder):
    """A folder that resembles a data set: some are valid, the others have one or several faults."""
    classes = rng.sample([*NAMES[:5], "cat", "dog"], rng.randint(1, 2))
    odd = rng.choice((0.0, 0.1, 0.3))

    def oddly(usual, *others):
        return rng.choice(others) if rng.random() < odd else usual

    for split in data.SPLITS:
        for name in classes:
            place = folder / oddly(split, "Train", "valid") / oddly(name, "fish", "a/b")
            place.mkdir(parents=True, exist_ok=True)
            for number in range(oddly(2, 0, 1)):
                file = place / f"{number}{oddly('.png', '.PNG', '.txt', '.jpg', '')}"
                file.unlink(missing_ok=True)
                if rng.random() >= odd / 3:
                    file.write_bytes(oddly(rng.choice(CONTENTS[:2]), *CONTENTS))
                elif rng.random() < 0.5:
                    file.symlink_to(rng.choice([os.devnull, ".", "nowhere", "/dev/zero", file.name]))
                else:
                    os.mkfifo(file)


def test_500_random_folders_never_end_in_a_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []

    @fuzzed
    def fuzz(rng):
        tree = tmp_path / "tree"
        shutil.rmtree(tree, ignore_errors=True)
        random_tree(rng, tree)
        seen.append(status_of("data", ["--data", str(tree), "--root", "root"], tree))

    fuzz()
    assert set(seen) >= {0, 1} and seen.count(0) > 10, seen


# README and docs


def test_guarantees_name_existing_tests():
    guarantees = (HOUSE / "docs" / "guarantees.md").read_text()
    tests = "".join(path.read_text() for path in HOUSE.glob("tests/test_*.py"))
    names = re.findall(r"`(test_\w+)(…?)`", guarantees)
    assert len(names) > 20
    for name, more in names:
        assert f"def {name}{'' if more else '('}" in tests, name


README = (HOUSE / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHORT = {"0.01": "0.5", "synthetic --epochs 3": "synthetic-small", "--seed 1 2 3": ""}
LAST = {"train.py": "--epochs 1", "moe.py": "--epochs 1", "fewshot.py": "--episodes 2"}


def test_every_command_of_readme_runs(image_folder, run, tmp_path):
    """In their order, on a small folder, for one epoch; not the smoke run, GNU parallel and Slurm."""
    image_folder(("bird", "cat", "dog", "frog"), (("train", 24), ("test", 2)), name="path/to/folder")
    commands = re.findall(r"^    (python|bash) (\S+)(.*?)(?: > .*)?(?:  +#.*)?$", README, re.MULTILINE)
    assert len(commands) > 12
    for program, script, words in commands:
        for long, short in SHORT.items():
            words = words.replace(long, short)
        words = [*words.split(), *LAST.get(script, "").split()]
        if program == "python":
            process = run(script, *words)
        else:
            command = ["bash", HOUSE / script, "--list", *words]
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            options = {"cwd": tmp_path, "env": {**os.environ, "PATH": path}}
            process = subprocess.run(command, capture_output=True, text=True, check=False, **options)
        assert process.returncode == 0, f"{script} {words}: {process.stderr}"
    assert (tmp_path / "figures").is_dir() and "--seed 1 2 3" in process.stdout


def test_readmes_extensions_work_and_their_table_appears(tmp_path):
    (snippet,) = (text for text in SNIPPETS if "ARCHITECTURES" in text)
    for path in HOUSE.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        for line in snippet.splitlines():
            dictionary = rf"(?ms)^{line.split('[')[0]} = {{.*?^}}.*?\n"  # the line goes below it
            text = re.sub(dictionary, lambda found, line=line: f"{found[0]}{line}\n", text)
        (tmp_path / path.name).write_text(text, encoding="utf-8")
    common = "--data synthetic-small --arch mine --optimizer asgd --fraction 0.1 --epochs 1"
    for command in (f"train.py {common} --aug dark", f"train.py {common}", "aggregate.py results"):
        words = [sys.executable, *command.split()]
        shown = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    table = shown.split("### Dark images, accuracy\n\n")[1].splitlines()
    assert {"none", "dark"} <= {cell.strip() for cell in table[0].split("|")} and "mine" in table[2]


def test_readmes_snippets_classify_an_image_and_train_from_a_notebook(tmp_path):
    (classify,) = (text for text in SNIPPETS if "models.load" in text)
    (notebook,) = (text for text in SNIPPETS if "run_seeds" in text)
    notebook = notebook.replace('"synthetic"', '"synthetic-small", "--fraction", "0.1", "--root", "root"')
    Image.new("RGB", (50, 40)).save(tmp_path / "cat.png")
    code = f"import sys; sys.path.insert(0, {str(HOUSE)!r})\n{notebook}\nprint(results[1]['test'])\n"
    run = "custom-none-synthetic-small-p0.1-epochs1"
    command = [sys.executable, "-c", code + classify.replace("<run>", run)]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.split()[-2] in data.CLASSES and 0 < float(shown.stdout.split()[-1]) <= 1
