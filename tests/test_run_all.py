"""run_all.sh: the commands that it lists, how it runs them, and what is left when it is stopped."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import HOUSE, assert_same_bits

import fewshot
import moe
import train

SCRIPTS = {"train.py": train, "fewshot.py": fewshot, "moe.py": moe}
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
# In place of each script: notes how it was started, does what $RUN says, and ends as a run does, with a table
STUB = """
parse_arguments = id  # any settings will do
if __name__ == "__main__":
    import json, os, signal, sys, time
    script = os.path.basename(sys.argv[0])
    def handle(function):
        return [signal.signal(number, function) for number in (signal.SIGINT, signal.SIGTERM)]
    handle(lambda *_: handle(lambda *_: None) and sys.exit(f"{script}: stopped"))
    environment = [os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")]
    with open("started.txt", "a") as file:
        print(json.dumps([environment, script, *sys.argv[1:]]), file=file)
    exec(os.environ.get("RUN", ""))
    print("| a table |" if script in ("data.py", "aggregate.py") else "seed  accuracy\\n1     0.25")
"""


def start(words, house=HOUSE, cwd=HOUSE, **environment):
    settings = {"cwd": cwd, "env": {**ENVIRONMENT, **environment}, "start_new_session": True, "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(["bash", f"{house}/run_all.sh", *shlex.split(words)], **settings, **pipes)


def run_all(*arguments, **environment):
    process = start(*arguments, **environment)
    output, errors = process.communicate(timeout=280)
    return subprocess.CompletedProcess(arguments, process.returncode, output, errors)


def listed(words=""):
    process = run_all(f"--list {words}")
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def settings(command):
    _, script, *arguments = shlex.split(command)
    return SCRIPTS[Path(script).name].make_parser().parse_args(arguments)


@pytest.fixture
def house(tmp_path):
    (tmp_path / "house").mkdir()
    shutil.copy(HOUSE / "run_all.sh", tmp_path / "house")
    shutil.copy(HOUSE / "runs.py", tmp_path / "house")
    for script in (*SCRIPTS, "data.py", "aggregate.py"):
        (tmp_path / "house" / script).write_text(STUB)
    return tmp_path / "house"


def started(folder):
    """[GPUs, threads], script, arguments of each script that was started, in order."""
    return [json.loads(line) for path in folder.glob("started.txt") for line in path.read_text().splitlines()]


def test_without_options_the_study_runs_and_nothing_beyond_it():
    commands, everything = listed(), listed("--only all")
    assert len(set(commands)) == len(commands) == 76
    assert set(commands) < set(everything) and len(set(everything)) == len(everything) == 100
    assert all(settings(command).seed == [1, 2, 3] for command in everything)
    from_scratch = listed("--only all --from-scratch")  # where resnet18 of `beyond` is that of `initial`
    assert sorted({command.replace(" --pretrained", "") for command in everything}) == sorted(from_scratch)


def test_tables_and_networks_are_chosen_by_their_exact_names():
    beyond, fewshots = listed("--only beyond"), listed("--only beyond-fewshot --arch custom")
    assert beyond and all("train.py" in command and "--fraction" not in command for command in beyond)
    assert len(listed("--only beyond,beyond-fewshot")) == len(beyond) + 3 * len(fewshot.QUERIES)
    networks = [settings(command).arch for command in listed("--only initial --arch custom,resnet18")]
    assert networks == ["resnet18", "custom"]
    assert "moe.py" in listed("--only moe")[-1]  # after the networks that it needs
    experts = [settings(command) for command in listed("--only moe,beyond-moe") if "train.py" in command]
    assert len(experts) == 4 and all(vars(args).items() >= moe.EXPERT.items() for args in experts)
    compared = [settings(command) for command in fewshots if "onecycle" in command]
    assert {args.epochs * args.steps_per_epoch for args in compared} == {settings(fewshots[0]).episodes}


@pytest.mark.parametrize("seeds", ["--seeds '4 5'", "--seed 4 5"])
def test_settings_reach_every_run_of_train_and_moe_but_a_run_s_own_win(seeds):
    commands = listed(f"--only overfitting,fewshot,moe {seeds} -- --epochs 2 --lr 0.1")
    assert [settings(command).seed for command in commands] == [[4, 5]] * 12
    for script, lr, *epochs in ("fewshot.py", 0.001, None), ("moe.py", 0.1, 2), ("train.py", 0.1, 2, 30):
        runs = [vars(settings(command)) for command in commands if script in command]
        assert {run["lr"] for run in runs} == {lr} and {run.get("epochs") for run in runs} == set(epochs)


@pytest.mark.parametrize(("words", "told"), [
    ("--job 2", "mean --jobs"), ("initial", "unknown option initial"), ("--epochs 3", "after --"),
    ("--only initial,moo", "mean moe"), ("--arch resnet", "mean resnet18"), ("--seeds 1,2", "1 2 3"),
    ("--only --list", "--only: a value"), ("--only optimizer --arch resnet18", "nothing to run"),
    ("--seed", "value is missing"), ("--jobs 0", "at least 1"), ("-- --out=x", "before --"),
    ("-- --help", "before --"), ("-- --lrr 1", "mean --lr"), ("-- --momentum 0.9", "adam has none"),
    ("-- --dropout 0.2", "resnet18 has no"), ("-- epochs", "before --"),
])  # fmt: skip
def test_wrong_arguments_are_one_line_before_anything_runs(words, told, tmp_path, one_line):
    one_line(run_all(words, HOUSE, tmp_path), 2, told)
    assert not list(tmp_path.iterdir())


def test_runs_are_shared_out_over_the_gpus_and_each_is_done_once(house, tmp_path):
    words = "--only initial,moe --data cifar10 --root d"
    environment = {"CUDA_VISIBLE_DEVICES": "5,7", "OMP_NUM_THREADS": "", "RUN": "time.sleep(0.3)"}
    process = run_all(f"{words} --jobs 3", house, tmp_path, **environment)
    assert process.returncode == 0, process.stderr
    (_, *first), *runs, (_, *last) = started(tmp_path)
    assert first == ["data.py", "--data", "cifar10", "--root", "d"]
    assert last[:2] == ["aggregate.py", "results"]
    commands = [shlex.split(command)[1:] for command in listed(words)]
    assert sorted(run[1:] for run in runs) == sorted([Path(script).name, *more] for script, *more in commands)
    threads = str(max(1, len(os.sched_getaffinity(0)) // 3))
    assert {tuple(run[0]) for run in runs} == {("5", threads), ("7", threads)}
    _, *lines, table = process.stdout.splitlines()
    assert sorted(line.split("/8 ")[0] for line in lines) == list("12345678")
    assert all(line.endswith(": accuracy 0.25") for line in lines)
    assert (tmp_path / "results" / "tables.md").read_text() == f"{table}\n" == "| a table |\n"
    assert len(list((tmp_path / "results" / "logs").glob("*.log"))) == 8


def test_listed_commands_run_as_they_are_and_other_data_or_settings_have_another_log(house, tmp_path):
    words = """--only optimizer --data "my $birds, it's; x" --out 'a "b"'"""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    run_all(words, house, tmp_path / "one")
    commands = run_all(f"--list {words}", house, tmp_path / "two").stdout
    subprocess.run(["bash", "-c", commands], cwd=tmp_path / "two", env=ENVIRONMENT, check=True)
    ours, theirs = ([run[1:] for run in started(tmp_path / folder)] for folder in ("one", "two"))
    assert ours[1:-1] == theirs and len(theirs) == commands.count("\n") == 3
    assert theirs[0][1:5] == ["--data", "my $birds, it's; x", "--out", 'a "b"']
    for again in (words, words.replace("my", "your"), f"{words} -- --epochs 2"):
        assert run_all(again, house, tmp_path / "one").returncode == 0
    logs = [path.read_text().count("0.25") for path in (tmp_path / "one").glob("*/logs/*.log")]
    assert sorted(logs) == [1] * 6 + [2] * 3


def test_failed_runs_do_not_stop_the_others_and_are_named_at_the_end(house, tmp_path):
    code = 'if "resnet18" in sys.argv: 1 / 0\nif "densenet121" in sys.argv: os.kill(os.getpid(), 9)'
    process = run_all("--only initial --data x --jobs 2", house, tmp_path, RUN=code)
    assert process.returncode == 1 and process.stderr.count("\n") == 1
    assert "| a table |" in process.stdout and process.stdout.count("accuracy 0.25") == 2
    _, *failed = process.stdout[process.stdout.index("Failed:") :].split("\n\n")
    densenet121, resnet18 = sorted(text.rstrip() for text in failed)
    assert "--arch resnet18 " in resnet18 and ".log: failed (exit status 1): ZeroDivisionError: " in resnet18
    assert "--arch densenet121 " in densenet121 and "exit status 137" in densenet121


@pytest.mark.parametrize("script", ["train.py", "data.py", "aggregate.py"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("send", [os.kill, os.killpg])  # to the script alone, to all
def test_stopped_it_leaves_no_process_and_each_run_says_its_word(script, number, send, house, tmp_path):
    sleep = f"time.sleep(100 * (script == {script!r}))"
    process = start("--only dropout --jobs 2", house, tmp_path, RUN=sleep)
    while sum(run[1] == script for run in started(tmp_path)) < 1 + (script == "train.py"):
        time.sleep(0.05)
    before = started(tmp_path)
    send(process.pid, number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number and "the same command continues" in errors
    assert subprocess.run(["pgrep", "--session", str(process.pid)], check=False).returncode == 1
    if script == "train.py":
        logs = [path.read_text() for path in (tmp_path / "results" / "logs").iterdir()]
        assert logs == ["train.py: stopped\n"] * 2 and started(tmp_path) == before


def test_it_works_from_any_folder_and_through_links(house, tmp_path):
    links = tmp_path / "links"
    links.mkdir()
    (links / "first").symlink_to("../house/run_all.sh")
    (links / "run_all.sh").symlink_to("first")
    for folder, cwd in ("links", tmp_path), (links, house), ("../links", house), ("../house", links):
        process = run_all("--only overfitting --data synthetic", folder, cwd)
        assert process.returncode == 0, process.stderr
    assert run_all("--list", "../house", links).stdout.startswith("python ../house/train.py ")
    assert run_all("--help", "links", tmp_path).stdout.endswith(" moe beyond-moe\n")


@pytest.mark.parametrize(("python", "status"), [("python3", 0), ("python -S", 1), ("", 1)])
def test_python3_serves_and_without_torch_one_line_says_so(python, status, house, tmp_path, one_line):
    tools, (name, *options) = tmp_path / "bin", python.split(" ")
    tools.mkdir()
    for tool in Path(shutil.which("bash")).parent.iterdir():
        if not tool.name.startswith("python"):
            (tools / tool.name).symlink_to(tool)
    if name:  # -S: without installed packages
        (tools / name).write_text(f'#!/bin/sh\nexec {sys.executable} {" ".join(options)} "$@"\n')
        (tools / name).chmod(0o755)
    process = run_all("--only overfitting --data x", house, tmp_path, PATH=str(tools))
    if status:
        one_line(process, 1, "cannot import torch")
    assert process.returncode == status and bool(started(tmp_path)) == (status == 0), process.stderr


def test_a_clone_with_windows_line_endings_starts(tmp_path):
    clone = ["git", "clone", "--quiet", "-c", "core.autocrlf=true", str(HOUSE), str(tmp_path / "clone")]
    subprocess.run(clone, check=True)
    process = run_all("--list", tmp_path / "clone", tmp_path)
    assert process.returncode == 0 and process.stdout.count("\n") == 76, process.stderr
    assert b"\r" not in (tmp_path / "clone" / "train.py").read_bytes()  # the hash of the code stays the same


def test_stopped_half_way_and_started_again_it_ends_with_the_same_files(tmp_path):
    words = "--only optimizer --data synthetic-small --seeds 1 --jobs 2 --out {} -- --epochs 2 --fraction 0.1"
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    (tmp_path / "matplotlib.py").write_text("raise ImportError")  # figures take longer than these runs
    bare = {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    assert run_all(words.format(whole), HOUSE, tmp_path, **bare).returncode == 0
    process = start(words.format(stopped), HOUSE, tmp_path, **bare)
    while not list(stopped.glob("*/seed1.json")):
        time.sleep(0.1)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143 and len(list(stopped.glob("*/seed1.json"))) < 3
    assert run_all(words.format(stopped), HOUSE, tmp_path, **bare).returncode == 0
    assert_same_bits(whole, stopped)
    assert (whole / "tables.md").read_text() == (stopped / "tables.md").read_text()
