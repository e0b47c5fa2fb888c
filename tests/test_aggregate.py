import csv
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import HOUSE
from scipy import stats

import aggregate
import data
import fewshot
import moe
import train

SCRIPTS = {"train.py": train, "fewshot.py": fewshot, "moe.py": moe}
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


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


def fake(folder, command, accuracy=0.5):
    """The result files that a command would leave, with an accuracy for each seed around the one given."""
    _, script, *arguments = shlex.split(command)
    args, name = SCRIPTS[Path(script).name].parse_arguments(arguments)
    for seed in args.seed:
        value = round(accuracy + 0.001 * (seed - 2), 4)
        metrics = dict.fromkeys(aggregate.METRICS, value)
        config = {**vars(args), "seed": seed}
        entries = getattr(args, "epochs", 30)
        result = {
            "version": 1,
            "config": config,
            "data": {"name": args.data.split("/")[-1], "classes": data.CLASSES},
            "history": [{"epoch": e + 1, "train": metrics, "valid": metrics} for e in range(entries)],
            **dict.fromkeys(("test", "base", "pair", "ensemble", "one_prototype", "nearest_image"), metrics),
            **({"test_tta": metrics} if "tta" in config and config["tta"] == "flip" else {}),
            "confusion": (np.eye(10, dtype=int) * 900 + 10).tolist(),
            "gate": [[0.2, 0.3, 0.5]] * 10,
        }
        path = folder / name / f"seed{seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(train.result_bytes(result))
    return path


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """As if `bash run_all.sh` had done every run."""
    folder = tmp_path_factory.mktemp("study")
    for command in run_all("--list").stdout.splitlines():
        if "augment.py" not in command:
            fake(folder, command)
    return folder


def arranged(folder):
    return aggregate.arrange(aggregate.read(folder))


# Tables


def test_run_all_fills_every_cell_and_runs_nothing_twice(study):
    commands = run_all("--list").stdout.splitlines()
    assert len(set(commands)) == len(commands) == 101
    blocks, unused = arranged(study)
    longer, learned = (
        (("epochs", 30),),
        (("adapter_width", 512), ("animals", "all"), ("train_adapters", True)),
    )
    assert {group for _, group in blocks} == {(), longer, learned}
    assert {aggregate.TABLES[number].name for number, group in blocks if group == longer} == {"beyond"}
    assert {aggregate.TABLES[number].name for number, group in blocks if group == learned} == {"moe"}
    assert {str(r.settings["classes"]) for r in unused} == {"vehicles", "animals", "cat,deer,dog,horse"}
    for number, table in enumerate(aggregate.TABLES):
        rows = aggregate.tabulated(number, (), blocks.get((number, ()), {}), True)
        assert set(table.published) <= set(rows)
        for row, cells in rows.items():
            seeds = 1 if row.startswith("mean of") else 3
            assert all(cell and len(cell.values) == seeds for cell in cells.values()), table.title


def test_beyond_the_slides_each_option_has_its_own_gain(tmp_path, run):
    recipe = "python train.py --arch resnet18 --seed 1 2 3"
    added = [
        "",
        "--schedule onecycle",
        "--stem small",
        "--aug flip+translate",
        "--label-smoothing 0.1 --tta flip",
    ]
    for number in range(len(added)):
        fake(tmp_path, " ".join([recipe, *added[: number + 1]]), accuracy=0.5 + number**2 / 100)
    text = run("aggregate.py", tmp_path).stdout
    lines = text[text.index("### Beyond the slides") :].splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert cells[0] == ["", "accuracy", "f1", "loss", "gain"]
    assert [(row[0], row[-1]) for row in cells[2:]] == [
        ("resnet18", ""),
        ("resnet18 + one-cycle", "+0.0100"),
        ("resnet18 + small stem", "+0.0300"),
        ("resnet18 + flip and translation", "+0.0500"),
        ("resnet18 + smoothed labels", "+0.0700"),
        ("resnet18 + mirror images", "+0.0000"),
    ]
    assert "Missing" not in text[text.index("### Beyond the slides") :]


def test_a_table_is_what_the_slides_show_beside_ours(study, run):
    process = run("aggregate.py", study)
    assert process.returncode == 0, process.stderr
    text = process.stdout
    assert (
        text.index("## CINIC-10") < text.index("### Initial results") < text.index("### Mixture of experts")
    )
    lines = text[text.index("### Initial") :].splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[2:-1]] == [
        "accuracy",
        "recall",
        "precision",
        "f1",
        "loss",
    ]
    first = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[4:7]]
    assert first[0][:2] == ["resnet18", "**0.5000 ± 0.0010**"]
    assert first[1] == ["slides", "0.6775 ± 0.0015", "0.6775 ± 0.0015", "0.6763 ± 0.0010", "0.6752 ± 0.0017",
                        "0.9602 ± 0.0293"]  # fmt: skip
    assert first[2][:2] == ["difference", "-0.1775"]
    assert "| slides" not in run("aggregate.py", study, "--no-published").stdout


def test_results_of_other_data_fractions_and_epochs_never_share_a_table(tmp_path):
    for number, extra in enumerate(("", "--data cifar10", "--fraction 0.5", "--epochs 3", "--batch-size 8")):
        fake(tmp_path, f"python train.py {extra} --seed 1 2 3", accuracy=number / 10)
    blocks, _ = arranged(tmp_path)
    assert len(blocks) == 5
    for (number, group), found in blocks.items():
        cell = aggregate.tabulated(number, group, found, True)["custom"]["accuracy"]
        assert len(cell.values) == 3 and cell.std == pytest.approx(0.001)
        assert (cell.published is None) == bool(group)


def test_a_missing_cell_is_a_dash_with_the_command_that_fills_it(tmp_path, run):
    fake(tmp_path, "python train.py --arch custom --aug flip --data sets/mine --epochs 2 --seed 1 2")
    text = run("aggregate.py", tmp_path).stdout
    row = next(line for line in text.splitlines() if line.startswith("| custom"))
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["0.4995 ± 0.0007", "-", "-", "-"]
    assert "Seeds: 2" in text and "slides' numbers do not compare" in text
    command = next(line for line in text.splitlines() if line.startswith("Missing"))[len("Missing: `") : -1]
    assert (
        command
        == f"bash run_all.sh --only augmentation --data sets/mine --out {tmp_path} --seeds '1 2' -- --epochs 2"
    )
    words = shlex.split(command)
    listed = run_all("--list", *words[2:]).stdout
    for line in listed.splitlines():
        fake(tmp_path, line)
    assert "Missing" not in run("aggregate.py", tmp_path).stdout


def test_a_single_seed_shows_no_deviation_and_unequal_numbers_of_seeds_show(tmp_path, run):
    fake(tmp_path, "python train.py --arch custom --seed 1")
    assert "± " not in run("aggregate.py", tmp_path, "--no-published").stdout
    fake(tmp_path, "python train.py --arch densenet121 --seed 1 2 3")
    text = run("aggregate.py", tmp_path, "--no-published").stdout
    assert "0.4990 (n = 1)" in text and "0.5000 ± 0.0010" in text


def test_the_best_and_what_does_not_differ_from_it_are_marked(tmp_path, run):
    for arch, accuracy in (("custom", 0.7), ("densenet121", 0.6998), ("resnet18 --pretrained", 0.69)):
        fake(tmp_path, f"python train.py --arch {arch} --seed 1 2 3", accuracy)
    text = run("aggregate.py", tmp_path, "--no-published").stdout
    cells = {
        line.split("|")[1].strip(): line.split("|")[2].strip() for line in text.splitlines() if "|" in line
    }
    assert cells["custom"] == "**0.7000 ± 0.0010**"
    assert cells["densenet121"] == "0.6998 ± 0.0010 ≈" and cells["resnet18"] == "0.6900 ± 0.0010"
    losses = {
        line.split("|")[1].strip(): line.split("|")[-2].strip() for line in text.splitlines() if "|" in line
    }
    assert losses["resnet18"].startswith("**") and not losses["custom"].startswith("**")


@pytest.mark.parametrize("sizes", [(2, 2), (3, 3), (2, 7), (3, 40)])
def test_welchs_test_equals_scipys(sizes):
    generator = np.random.default_rng(sum(sizes))
    for shift in (0, 0.1, 1, 3, 30):
        first, second = generator.normal(size=sizes[0]), shift + 3 * generator.normal(size=sizes[1])
        wanted = stats.ttest_ind(first, second, equal_var=False).pvalue
        assert aggregate.p_value(list(first), list(second)) == pytest.approx(wanted, abs=1e-6)
    assert aggregate.p_value([1.0], [2.0, 3.0]) is None
    assert aggregate.p_value([1.0, 1.0], [1.0, 1.0]) == 1 and aggregate.p_value([1.0, 1.0], [2.0, 2.0]) == 0


def test_a_file_that_is_no_result_is_named_and_left_out(tmp_path, run):
    good = fake(tmp_path, "python train.py --seed 1 2 3")
    content = json.loads(good.read_text())
    broken = {
        "cut": good.read_text()[:100],
        "empty": "",
        "list": "[1, 2]",
        "version": json.dumps({**content, "version": 2}),
        "half": json.dumps({**content, "history": content["history"][:4]}),
        "nan": json.dumps({**content, "test": {**content["test"], "loss": float("nan")}}),
        "bare": json.dumps({"version": 1}),
        "odd": json.dumps({**content, "config": {**content["config"], "arch": ["custom"], "data": 3}}),
        "new": json.dumps({**content, "config": {**content["config"], "stems": [1, 2]}}),
        "valid": json.dumps({**content, "history": [{"train": content["test"]}] * 10}),
        "matrix": json.dumps({**content, "confusion": "no"}),
        "deep": "[" * 100_000,
        "copy": good.read_text(),
    }
    for name, text in broken.items():
        path = tmp_path / f"other-{name}" / "seed3.json"
        path.parent.mkdir()
        path.write_text(text)
    process = run("aggregate.py", tmp_path, "--no-published")
    assert process.returncode == 0, process.stderr
    assert "0.5000 ± 0.0010" in process.stdout
    left_out = [line for line in process.stderr.splitlines() if line.startswith("left out")]
    assert len(left_out) == len(broken) and all(
        any(f"other-{name}" in line for line in left_out) for name in broken
    )
    assert "half a run: 4 of 10 epochs" in process.stderr and "version 2" in process.stderr


def test_no_results_is_one_line(tmp_path, run, one_line):
    one_line(run("aggregate.py", tmp_path / "nothing"), 1, "no results", "run_all.sh")


def test_csv_json_and_latex_hold_the_same_numbers(study, run):
    cells = json.loads(run("aggregate.py", study, "--format", "json").stdout)
    rows = list(csv.DictReader(io.StringIO(run("aggregate.py", study, "--format", "csv").stdout)))
    assert len(cells) == len(rows) > 100
    for cell, row in zip(cells, rows, strict=True):
        assert cell["table"] == row["table"] and cell["mean"] == float(row["mean"])
        assert cell["seeds"] == (1 if cell["row"].startswith("mean of") else 3)
    wanted = next(c for c in cells if (c["table"], c["row"]) == ("Dropout, custom on hybrid", "0.2"))
    assert wanted["slides_mean"] == 0.7935 and wanted["difference"] == pytest.approx(0.5 - 0.7935)
    latex = run("aggregate.py", study, "--format", "latex").stdout
    assert r"efficientnet\_b0 " in latex and r"\textbf{0.5000 ± 0.0010}" in latex and "|" not in latex
    assert "=== CINIC-10" in run("aggregate.py", study, "--format", "plain").stdout


# Figures


def test_every_figure_is_drawn(study, run, tmp_path):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    assert run("aggregate.py", study, "--figures", tmp_path / "figures").returncode == 0
    names = (
        "overfitting",
        "confusion",
        "learning-rate",
        "optimizer",
        "dropout",
        "weight-decay",
        "fewshot",
        "moe-gate",
        "moe-gate-adapter_width-512-animals-all-train_adapters-True",
    )
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        f"{n}.{s}" for n in names for s in ("png", "svg")
    }
    assert all(path.stat().st_size > 5000 for path in (tmp_path / "figures").iterdir())


def test_figures_without_matplotlib_say_how_to_get_it(study, run, one_line, tmp_path):
    process = run("aggregate.py", study, "--figures", tmp_path, code="sys.modules['matplotlib'] = None")
    one_line(process, 1, "pip install matplotlib")
    assert "### Initial results" in process.stdout


# run_all.sh


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["--only", "nothing"], "weight-decay"), (["--jobs", "0"], "--jobs"), (["--arch", "vgg"], "--arch"),
     (["--only", "initial,"], "a name is missing"), (["--only", "optimizer", "--arch", "resnet18"], "nothing to run"),
     (["--seeds", "one"], "--seeds"), (["--epochs", "3"], "after --"), (["--only"], "needs a value")],
)  # fmt: skip
def test_wrong_arguments_of_run_all_are_one_line(arguments, word):
    process = run_all(*arguments)
    assert process.returncode == 2 and process.stderr.count("\n") == 1 and word in process.stderr


def test_list_takes_part_of_the_study_and_settings_for_all():
    lines = run_all("--list", "--only", "fewshot,optimizer", "--data", "my set", "--seeds", "4 5", "--arch", "custom",
                    "--", "--epochs", "2", "--shot", "3", "--lr", "0.01").stdout.splitlines()  # fmt: skip
    assert len(lines) == 7 + 3
    for line in lines:
        args, _ = SCRIPTS[Path(shlex.split(line)[1]).name].parse_arguments(shlex.split(line)[2:])
        assert args.data == "my set" and args.seed == [4, 5] and args.lr == 0.01
        assert args.shot == 3 if "fewshot" in line else args.epochs == 2
    # a run's own settings win
    (line,) = run_all("--list", "--only", "overfitting", "--", "--epochs", "2").stdout.splitlines()
    assert train.parse_arguments(shlex.split(line)[2:])[0].epochs == 30


def test_a_setting_goes_to_the_scripts_that_have_it():
    lines = run_all(
        "--list", "--only", "moe,fewshot", "--", "--train-adapters", "--epochs=2", "--way", "3"
    ).stdout
    for line in lines.splitlines():
        assert ("--train-adapters" in line) == ("moe.py" in line)
        assert ("--epochs=2" in line) == ("--way" not in line) == ("fewshot.py" not in line)


def test_failed_runs_are_named_even_if_none_succeeded(tmp_path):
    command = ("--only", "overfitting", "--data", "synthetic", "--", "--momentum", "0.5")
    process = run_all(*command, cwd=tmp_path)
    assert process.returncode == 1
    assert "1 of 1 runs failed" in process.stdout and "adam has none" in process.stdout


def test_a_failed_run_does_not_stop_the_rest(image_folder, tmp_path):
    folder = image_folder(data.CLASSES, (("train", 3), ("valid", 1), ("test", 1)))
    command = ("--only", "optimizer", "--arch", "custom", "--data", folder, "--seeds", "1", "--jobs", "2",
               "--", "--epochs", "1", "--optimizer", "sgd", "--momentum", "0.9")  # fmt: skip
    process = run_all(*command, cwd=tmp_path)
    assert process.returncode == 1
    assert len(list(tmp_path.rglob("seed1.json"))) == 1 and "2 of 3 runs failed" in process.stdout
    assert "python" in process.stdout.split("runs failed")[1] and "adamax has none" in process.stdout
    log = tmp_path / "results" / "logs" / "train-arch-custom-aug-hybrid-optimizer-adagrad.log"
    assert "error: --momentum: adagrad has none" in log.read_text()


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


def test_interrupted_run_all_stops_its_runs_and_says_how_to_go_on(tmp_path):
    started = ["bash", str(HOUSE / "run_all.sh"), "--only", "overfitting", "--data", "synthetic"]
    process = subprocess.Popen(started, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.rglob("*.log")):
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "start again to go on" in errors
    running = subprocess.run(
        ["pgrep", "-f", "train.py.*--epochs 30"], capture_output=True, text=True, check=False
    )
    assert not [pid for pid in running.stdout.split() if str(tmp_path) in os.readlink(f"/proc/{pid}/cwd")]


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
def test_shellcheck_finds_nothing():
    subprocess.run(["shellcheck", HOUSE / "run_all.sh"], check=True)
