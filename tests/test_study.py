import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import HOUSE

import data
import fewshot
import moe
import train

SCRIPTS = {"train.py": train, "fewshot.py": fewshot, "moe.py": moe}
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
# A python whose training, few-shot and mixture runs do what $RUN says, and do not import torch
PYTHON = f"""#!/usr/bin/env bash
case $1 in
  *train.py | *fewshot.py | *moe.py | *augment.py) eval "$RUN" ;;
  *aggregate.py | *data.py) ;;
  *) exec {sys.executable} "$@" ;;
esac
"""


def run_all(*arguments, cwd=HOUSE, **environment):
    return subprocess.run(
        ["bash", str(HOUSE / "run_all.sh"), *map(str, arguments)],
        check=False,
        cwd=cwd,
        env={**ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )


def listed(*arguments):
    """The commands of `run_all.sh --list`."""
    process = run_all("--list", *arguments)
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


def settings(command):
    """The settings of a command, by its script's parser."""
    _, script, *arguments = shlex.split(command)
    return SCRIPTS[Path(script).name].make_parser().parse_args(arguments)


@pytest.fixture
def no_training(tmp_path):
    """no_training("sleep 1") -> the environment of a run_all.sh whose runs do just that."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(PYTHON)
    (tmp_path / "bin" / "python").chmod(0o755)
    return lambda what: {"PATH": f"{tmp_path / 'bin'}:{ENVIRONMENT['PATH']}", "RUN": what}


# What is run


def test_without_options_the_slides_study_runs_and_nothing_else():
    commands = listed()
    assert len(set(commands)) == len(commands) == 77
    assert not any("onecycle" in c or "--train-adapters" in c for c in commands)
    everything = listed("--only", "all")
    assert set(commands) < set(everything) and len(set(everything)) == len(everything) == 101


def test_tables_are_chosen_by_their_exact_names():
    beyond = listed("--only", "beyond")
    assert beyond and all("train.py" in command and "--fraction" not in command for command in beyond)
    assert len(listed("--only", "beyond-fewshot")) == 21
    assert len(listed("--only", "beyond,beyond-moe")) == len(beyond) + 4
    assert len(listed("--only", "weight-decay")) == 16  # with the baseline


def test_few_shot_learning_is_compared_with_training_for_as_many_steps():
    baselines = [settings(c) for c in listed("--only", "beyond-fewshot") if "onecycle" in c]
    assert [args.fraction for args in baselines] == list(fewshot.QUERIES)
    for args in baselines:
        assert (args.epochs, args.steps_per_epoch, args.batch_size) == (10, 300, 32)
        assert (args.arch, args.aug) == ("custom", "flip+translate+autoaugment")


def test_the_mixture_runs_last_and_without_pretrained_weights_each_run_is_listed_once():
    commands = listed("--only", "all", "--from-scratch")
    assert not any("--pretrained" in command for command in commands)
    assert len(set(commands)) == len(commands) == 100  # resnet18 from scratch is in beyond too
    assert sum("--pretrained" in command for command in listed("--only", "initial")) == 2


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["--only", "nothing"], "weight-decay"), (["--jobs", "0"], "--jobs"), (["--arch", "vgg"], "--arch"),
     (["--only", "initial,"], "a name is missing"), (["--only", "optimizer", "--arch", "resnet18"], "nothing to run"),
     (["--seeds", "one"], "--seeds"), (["--epochs", "3"], "after --"), (["--only"], "expected one argument"),
     (["--only", ""], "--only"), (["--seed", "1"], "--seeds"), (["--", "--epoch", "1"], "--epoch 1"),
     (["--", "--epochs", "many"], "--epochs"), (["--", "--seed", "1"], "before --"), (["--", "2"], "2: "),
     (["--", "--help"], "--help")],
)  # fmt: skip
def test_wrong_arguments_are_one_line_before_anything_runs(arguments, word, tmp_path):
    process = run_all(*arguments, cwd=tmp_path)
    assert process.returncode == 2 and process.stderr.count("\n") == 1 and word in process.stderr
    assert process.stdout == "" and not list(tmp_path.iterdir())


def test_list_takes_part_of_the_study_and_settings_for_every_run():
    commands = listed("--only", "fewshot,optimizer", "--data", "my set", "--seeds", "4 5", "--arch", "custom",
                      "--", "--epochs", "2", "--shot", "3", "--lr", "0.01")  # fmt: skip
    assert len(commands) == 7 + 3
    for command in commands:
        args = settings(command)
        assert args.data == "my set" and args.seed == [4, 5] and args.lr == 0.01
        assert args.shot == 3 if "fewshot" in command else args.epochs == 2
    (command,) = listed("--only", "overfitting", "--", "--epochs", "2")
    assert settings(command).epochs == 30  # a line's own settings win


def test_a_setting_goes_to_the_scripts_that_have_it():
    commands = listed("--only", "moe,fewshot", "--", "--train-adapters", "--epochs=2", "--way", "3")
    for command in commands:
        assert ("--train-adapters" in command) == ("moe.py" in command)
        assert ("--epochs=2" in command) == ("--way" not in command) == ("fewshot.py" not in command)


def test_smoke_has_every_table_of_the_study_on_drawn_images():
    commands = listed("--smoke")
    assert all("--data synthetic" in command for command in commands)
    for word in ("overfitting", "--aug cutout", "--lr 0.002", "adamax", "--weight-decay 0.00005", "--dropout 0.4", "moe.py",
                 "--fraction 0.01", "augment.py", "--train-adapters", "onecycle"):  # fmt: skip
        assert word == "overfitting" or any(word in command for command in commands), word
    for command in commands:
        if "augment.py" not in command:
            assert settings(command).fraction in (0.1, 0.01, 0.02, 0.05)


# How it is run


def test_runs_are_shared_out_over_the_gpus_and_each_is_done_once(no_training, tmp_path):
    environment = no_training('echo "$CUDA_VISIBLE_DEVICES $*" >>done.txt; sleep 0.2')
    process = run_all(
        "--only",
        "initial,moe",
        "--data",
        "synthetic",
        cwd=tmp_path,
        CUDA_VISIBLE_DEVICES="5,7",
        **environment,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    done = [line.split(" ", 1) for line in (tmp_path / "done.txt").read_text().splitlines()]
    commands = [
        command.removeprefix("python ") for command in listed("--only", "initial,moe", "--data", "synthetic")
    ]
    assert sorted(command.rsplit("/")[-1] for _, command in done) == sorted(
        c.rsplit("/")[-1] for c in commands
    )
    gpus = [gpu for gpu, _ in done]
    assert set(gpus) == {"5", "7"} and abs(gpus.count("5") - gpus.count("7")) <= 2
    assert "moe.py" in done[-1][1]
    assert re.search(r"^8/8 done$", process.stdout, re.MULTILINE)


def test_failed_runs_are_named_at_the_end_with_log_and_last_line(no_training, tmp_path):
    environment = no_training(
        'case "$*" in *resnet18*) echo trouble; exit 3 ;; *densenet*) kill -9 $$ ;; esac'
    )
    process = run_all("--only", "initial", "--data", "synthetic", "--jobs", "3", cwd=tmp_path, **environment)
    assert process.returncode == 1
    end = process.stdout[process.stdout.index("2 of 4 runs failed") :]
    assert "train-arch-resnet18-pretrained-aug-none.log: trouble" in end
    assert "train-arch-densenet121-aug-none.log: killed by signal 9" in end and "custom" not in end


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_interrupted_it_leaves_no_child_process_and_says_how_to_resume(number, status, no_training, tmp_path):
    environment = no_training("echo $$ >>pids.txt; exec sleep 100")
    process = subprocess.Popen(
        ["bash", str(HOUSE / "run_all.sh"), "--only", "initial", "--data", "synthetic", "--jobs", "2"],
        cwd=tmp_path, env={**ENVIRONMENT, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    pids = []
    while len(pids) < 2:
        time.sleep(0.05)
        with contextlib.suppress(OSError):
            pids = (tmp_path / "pids.txt").read_text().split()
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status and "0 of 4 runs have ended; start again to resume" in errors
    time.sleep(0.2)
    assert (tmp_path / "pids.txt").read_text().split() == pids  # and no run began meanwhile
    assert not [pid for pid in pids + children if Path(f"/proc/{pid}").exists()]


def test_interrupted_in_smoke_it_leaves_no_child_process_and_resumes(tmp_path):
    command = ["--smoke", "--only", "optimizer"]
    process = subprocess.Popen(
        ["bash", str(HOUSE / "run_all.sh"), *command], cwd=tmp_path, env=ENVIRONMENT,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while len(list((tmp_path / "smoke").glob("results/logs/*.log"))) < 2:
        time.sleep(0.05)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "of 3 runs have ended; start again to resume" in errors
    assert children and not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    again = run_all(*command, cwd=tmp_path)
    assert again.returncode == 0 and "3/3 done" in again.stdout


def test_a_real_failed_run_does_not_stop_the_rest(image_folder, tmp_path):
    folder = image_folder(data.CLASSES, (("train", 3), ("valid", 1), ("test", 1)))
    command = ("--only", "optimizer", "--arch", "custom", "--data", folder, "--seeds", "1", "--jobs", "2",
               "--", "--epochs", "1", "--optimizer", "sgd", "--momentum", "0.9")  # fmt: skip
    process = run_all(*command, cwd=tmp_path)
    assert process.returncode == 1
    assert len(list(tmp_path.rglob("seed1.json"))) == 1 and "2 of 3 runs failed" in process.stdout
    assert "python" in process.stdout.split("runs failed")[1] and "adamax" in process.stdout
    log = tmp_path / "results" / "logs" / "train-arch-custom-aug-hybrid-optimizer-adagrad.log"
    assert "error: --momentum" in log.read_text()


def test_smoke_names_failed_runs_and_does_the_rest(tmp_path):
    process = run_all(
        "--smoke", "--only", "optimizer", "--", "--optimizer", "sgd", "--momentum", "0.9", cwd=tmp_path
    )
    assert process.returncode == 1
    assert len(list(tmp_path.rglob("seed1.json"))) == 1 and "2 of 3 runs failed" in process.stdout
    assert "adagrad.log: " in process.stdout and "--momentum: adagrad" in process.stdout


@pytest.mark.slow
def test_smoke_killed_half_way_and_started_again_ends_with_the_same_tables(tmp_path):
    command = ("--smoke", "--only", "regular,hybrid", "--arch", "custom")
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = run_all(*command, cwd=tmp_path / "whole")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    started = ["bash", str(HOUSE / "run_all.sh"), *command]
    process = subprocess.Popen(
        started, cwd=tmp_path / "killed", env=ENVIRONMENT, stdout=subprocess.DEVNULL, start_new_session=True
    )
    while not list((tmp_path / "killed").rglob("seed1.json")):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)  # the script and its runs
    process.wait()
    done = len(list((tmp_path / "killed").rglob("seed1.json")))
    again = run_all(*command, cwd=tmp_path / "killed")
    assert again.returncode == 0 and done < len(list((tmp_path / "killed").rglob("seed1.json"))) == 5
    tables = [text[text.index("## synthetic") :] for text in (whole.stdout, again.stdout)]
    assert tables[0] == tables[1]
