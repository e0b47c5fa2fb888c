"""Result files as the scripts leave them, and what aggregate.py makes of them."""

import csv
import io
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import HOUSE
from scipy import stats

import aggregate
import data
import fewshot
import moe

PUBLISHED = aggregate.read_published()
METHODS = ["few-shot, 3 prototypes", "1 prototype", "nearest image", "regular training",
           "regular training, one-cycle"]  # fmt: skip
TTA = "accuracy with mirror images"
FRACTIONS = ["0.001", "0.002", "0.005", "0.01", "0.02", "0.05", "0.1"]
# What `fake` adds to an accuracy, in the order of real files: for each metric, and 0.01 from part to part
METRICS = {"loss": 1, "accuracy": 0, "precision": 0.1, "recall": 0.2, "f1": 0.3}
PARTS = ("test", "test_tta", "base", "pair", "ensemble", "one_prototype", "nearest_image")


def fake(folder, command, accuracy=0.5, seeds=None, run=None, **changes):
    """The result files that a command would leave, with an accuracy for each seed around the one given.

    run: the folder's name, if not the one that the settings give; changes: parts of the file to replace.
    """
    script, *words = shlex.split(command)
    module = aggregate.SCRIPTS[Path(script).stem]
    args = module.parse_arguments([*("--seed", "1", "2", "3"), *words])
    classes = data.GROUPS.get(args.classes) or (args.classes.split(",") if args.classes else data.CLASSES)
    args.classes = data.spec(classes) if args.classes else None
    if module is fewshot:
        taken = fewshot.recipe(args.fraction)
        vars(args).update({key: value for key, value in taken.items() if not vars(args)[key]})
    if module is moe:
        args.experts = [data.spec(data.GROUPS.get(group) or group.split(",")) for group in args.experts]
    content = {"name": args.data, "classes": list(classes), "fingerprint": "0f"} | changes.pop("data", {})
    for seed in seeds or args.seed:
        first = accuracy + 0.001 * (seed - 2)
        parts = {part: {metric: round(first + plus + 0.01 * number, 4) for metric, plus in METRICS.items()}
                 for number, part in enumerate(PARTS)}  # fmt: skip
        epoch = {"train": parts["test"], **({} if module is fewshot else {"valid": parts["base"]})}
        result = {
            "version": 1, "config": {**vars(args), "seed": seed}, "data": content, **parts,
            "environment": {"torch": "2.15.0", "dtype": "bfloat16"}, "gate": [[0.2, 0.3, 0.5]] * len(classes),
            "history": [epoch] * vars(args).get("epochs", 3),
            "confusion": (np.eye(len(content["classes"]), dtype=int) * 900 + 10).tolist(),
        } | changes  # fmt: skip
        path = folder / (run or module.run_name(args, content["name"], args.classes)) / f"seed{seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """As if `bash run_all.sh --only all` had done every run."""
    folder = tmp_path_factory.mktemp("study")
    command = ["bash", HOUSE / "run_all.sh", "--list", "--only", "all"]
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        fake(folder, line.split(maxsplit=1)[1])
    return folder


def views(folder):
    return aggregate.make_views(aggregate.read(folder), PUBLISHED, [*aggregate.TABLES, "other"])


def tables(text, title):
    """The cells of each table of a title: {row: {column: text}}; of a row's three lines, the first."""
    found = []
    for part in text.split(f"### {title}\n")[1:]:
        lines = [line.split("|")[1:-1] for line in part.split("\n#")[0].splitlines() if line[:1] == "|"]
        head, _, *rows = ([cell.strip() for cell in line] for line in lines)
        found.append({row: dict(zip(head[1:], cells, strict=True)) for row, *cells in reversed(rows)})
    return found


def table(text, title):
    (found,) = tables(text, title)
    return found


# Which results a table shows


def test_every_run_of_the_study_is_in_a_table_and_every_cell_is_filled(whole):
    shown = [view for view in views(whole) if view.shown]
    assert {view.name for view in shown if not view.context} == {*aggregate.TABLES, "other"} - {"overfitting"}
    others = {cell.row for view in shown if view.name == "other" for cell in view.cells}
    assert all(name == "custom-none-epochs30" or "-only-" in name for name in others)  # a figure's, experts
    for cell in (cell for view in shown for cell in view.cells):
        extra = cell.row.endswith(", from scratch") or cell.column == "hybrid"
        assert len(cell.values) == (1 if cell.row.startswith("ensemble of") else 3) or extra, cell


def published():
    """Every (mean, std) of the study; (mean,) if it had one seed."""
    rows = (cells for table in PUBLISHED.values() for cells in table.values())
    return [pair for cells in rows for pair in cells.values() if pair]


def test_each_cell_shows_its_metric_of_its_part(whole):
    (view,) = (view for view in views(whole) if view.name == "moe")
    rows = {"mixture": 0.5, "base network": 0.52, "ensemble of two bases": 0.53,
            "ensemble of three bases": 0.54}  # fmt: skip
    wanted = {(row, metric): first + plus for row, first in rows.items() for metric, plus in METRICS.items()}
    found = {(cell.row, cell.column): cell.values[-1] for cell in view.cells}
    assert found == pytest.approx(wanted, abs=0.0011)


def test_every_published_number_stands_in_its_cell(whole, run):
    shown = [cell.published for view in views(whole) for cell in view.cells if view.shown and cell.published]
    assert sorted(shown) == sorted(published()) and len(shown) == 135
    lines = run("aggregate.py", whole).stdout.split("### Initial")[1].splitlines()[4:7]
    ours, theirs, difference = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    assert ours[:3] == ["resnet18", "**0.5000 ± 0.0010**", "**0.7000 ± 0.0010**"]
    assert difference[:2] == ["difference", "-0.1775"]
    assert theirs[:3] == ["study", "0.6775 ± 0.0015", "0.6775 ± 0.0015"]
    assert "| study" not in run("aggregate.py", whole, "--no-published").stdout


def test_published_numbers_are_those_of_the_slides_and_the_report():
    """One row of each table, one value or more of each column, as they stand there."""
    text = """
        initial densenet121 accuracy 0.7197±0.0004 recall 0.7194±0.0004 precision 0.7198±0.0002
            f1 0.7181±0.0010 loss 0.8725±0.0111
        augmentation efficientnet_b0 flip 0.7374±0.0121 rotation 0.7284±0.0008 crop 0.7222±0.0039
            jitter 0.1711±0.0427 autoaugment 0.7160±0.0025 cutout 0.7252±0.0001
        hybrid custom accuracy 0.7647±0.0051
        learning-rate densenet121 0.002 0.6125±0.0081 0.001 0.6136±0.0027 0.0005 0.6018±0.0036
        optimizer adam accuracy 0.7643±0.0032 recall 0.7643±0.0032 precision 0.7666±0.0019
            f1 0.7629±0.0028 loss 0.6810±0.0102
        weight-decay custom 0.0001 0.7290±0.0031 0.0002 0.7300±0.0081 0.00005 0.7301±0.0010
        dropout 0.2 accuracy 0.7935±0.0114 precision 0.8003±0.0132
        moe mixture loss 0.6208 accuracy 0.8034 f1 0.8036 precision 0.8040 recall 0.8034
        fewshot 0.005 accuracy 0.2890±0.0011 recall 0.2890±0.0009 precision 0.2766±0.0011 f1 0.2755±0.0010
        regular 0.1 accuracy 0.4894±0.0116"""
    for name, row, *words in map(str.split, text.replace("\n            ", " ").strip().splitlines()):
        numbers = (tuple(map(float, word.split("±"))) for word in words[1::2])
        found = {column: pair for column, pair in PUBLISHED[name][row].items() if pair}
        assert found == dict(zip(words[::2], numbers, strict=True))
    values = enumerate(itertools.chain(*published()), 1)  # all of them, as compared once
    assert sum(number * value for number, value in values) == pytest.approx(9641.2268, abs=1e-5)


@pytest.mark.parametrize(
    ("command", "title", "row", "column"),
    [("train.py --weight-decay 0.00001", "Weight decay, accuracy", "custom", "0.00001"),
     ("train.py --arch densenet121 --pretrained", "Initial results", "densenet121, pretrained", "accuracy"),
     ("train.py --aug hybrid --optimizer sgd --momentum 0.9", "Optimizer, custom on hybrid", "sgd",
      "accuracy"),
     ("fewshot.py --fraction 0.3", "Few-shot learning", "0.3", "accuracy"),
     ("train.py --arch densenet121 --lr 0.003", "Other runs", "densenet121-none-lr0.003", "accuracy")],
)  # fmt: skip
def test_a_run_with_a_new_value_appears_by_itself(command, title, row, column, tmp_path, run):
    for base in ("train.py", "train.py --aug hybrid", "fewshot.py", command):
        fake(tmp_path, base)
    text = run("aggregate.py", tmp_path).stdout
    assert table(text, title)[row][column].strip("*").startswith("0.5000 ± 0.0010")


def test_each_step_beyond_the_study_has_its_own_gain(tmp_path, run):
    command = "train.py --arch resnet18"
    steps = ("", "--schedule onecycle", "--stem small", "--aug flip+translate", "--label-smoothing 0.1")
    for number, more in enumerate(steps):
        command += f" {more}"
        fake(tmp_path, command, accuracy=0.5 + number**2 / 100)
    rows = table(run("aggregate.py", tmp_path).stdout, "Beyond the study")
    gains = [cells["gain"] for cells in rows.values()]
    assert gains == ["", "+0.0100", "+0.0300", "+0.0500", "+0.0700"][::-1]
    assert rows["resnet18 … + label smoothing"][TTA] == "**0.6700 ± 0.0010**"


def test_the_few_shot_comparison_has_all_methods_by_fraction(whole, tmp_path, run):
    title = "Few-shot learning and regular training, accuracy"
    rows = table(run("aggregate.py", whole).stdout, title)
    assert list(rows) == FRACTIONS[::-1] and list(rows["0.01"]) == METHODS
    fake(tmp_path, "fewshot.py --episodes 5 --fraction 0.001 --shot 2")
    fake(tmp_path, "train.py --fraction 0.001 --aug flip+autoaugment")
    shown = run("aggregate.py", tmp_path, "--only", "beyond-fewshot").stdout
    (row,) = tables(shown, title)[0].values()
    found = {name: text.strip("*")[:6] for name, text in row.items()}
    assert found == dict(zip(METHODS, ["0.5000", "0.5500", "0.5600", "0.5000"], strict=False))
    assert "shot 2, episodes 5 at 0.001; batch size 64 at 0.001." in shown and "study" not in shown.split("|")


@pytest.mark.parametrize("own", ["", "--data cifar10"])
def test_of_two_runs_for_a_cell_the_one_nearer_to_the_study_stands_there(own, tmp_path, run):
    for fraction, batch, accuracy in ((0.01, 16, 0.3), (0.02, 32, 0.5), (0.05, 16, 0.35), (0.01, 64, 0.4)):
        words = f"--fraction {fraction} --aug flip+autoaugment --batch-size {batch} {own}"
        other = fake(tmp_path, f"train.py {words}", accuracy).parent.name
    text = run("aggregate.py", tmp_path).stdout
    assert table(text, "Regular training on the same fractions")["0.01"]["accuracy"] == "0.3000 ± 0.0010"
    assert list(table(text, "Other runs")) == [other]
    assert text.count("| study") == (0 if own else 2)  # not beside another batch size


def test_results_of_other_contexts_never_share_a_table(tmp_path):
    contexts = {
        "CINIC-10": "", "CINIC-10, classes cat,dog": "--classes cat,dog", "CIFAR-10": "--data cifar10",
        "CINIC-10, compute dtype bfloat16": "--amp bf16", "CINIC-10, epochs 3": "--epochs 3"}  # fmt: skip
    for number, words in enumerate(contexts.values()):
        for arch in ("custom", "densenet121"):
            fake(tmp_path, f"train.py --arch {arch} {words}", accuracy=number / 10)
    found = [view for view in views(tmp_path) if view.name == "initial"]
    assert {aggregate.heading(view.context) for view in found} == {*contexts}
    for view in found:
        accuracy = list(contexts).index(aggregate.heading(view.context)) / 10
        cells = [cell for cell in view.cells if cell.column == "accuracy"]
        assert len(cells) == 2 and all(cell.values[1] == accuracy for cell in cells)
        assert bool(view.context) == (cells[1].published is None)


def test_a_table_outside_the_studys_context_compares_two_runs_that_no_earlier_table_shows(tmp_path, run):
    for command in ("train.py", "train.py --arch densenet121", "train.py --weight-decay 0.0001"):
        fake(tmp_path, f"{command} --data cifar10")
    text, runs = run("aggregate.py", tmp_path).stdout, ["custom-none-cifar10-wd0.0001"]
    assert "### Weight decay" not in text and list(table(text, "Other runs")) == runs
    fake(tmp_path, "train.py --weight-decay 0.0002 --data cifar10")
    text = run("aggregate.py", tmp_path).stdout
    assert list(table(text, "Weight decay, accuracy")["custom"]) == ["0", "0.0001", "0.0002"]
    assert "Other runs" not in text


def test_folders_that_do_not_have_the_name_of_their_settings_are_other_runs(tmp_path, run):
    fake(tmp_path, "train.py")
    fake(tmp_path, "train.py", accuracy=0.7, run="custom-none (copy)")
    text = run("aggregate.py", tmp_path).stdout
    assert list(table(text, "Initial results")) == ["difference", "study", "custom"]
    other = table(text, "Other runs")["custom-none (copy)"]
    assert (other["n"], other["accuracy"]) == ("3", "0.7000 ± 0.0010")


def test_two_data_sets_of_one_name_share_no_table_and_no_folder_is_cinic10(tmp_path, run):
    for digits, arch in itertools.product(("00000000", "11111111"), ("custom", "densenet121")):
        fake(tmp_path, f"train.py --arch {arch}", data={"name": f"cinic10-{digits}", "fingerprint": digits})
    for arch, fingerprint in (("custom", "0f"), ("densenet121", "ff"), ("resnet18", "ff")):
        fake(tmp_path, f"train.py --data synthetic --arch {arch}", data={"fingerprint": fingerprint})
    text = run("aggregate.py", tmp_path).stdout
    names = ["cinic10-00000000", "cinic10-11111111", "synthetic, fingerprint 0f", "synthetic, fingerprint ff"]
    assert re.findall("^## (.*)", text, re.MULTILINE) == names
    assert list(table(text, "Other runs")) == ["custom-none-synthetic"]


# Which files are results


def test_only_a_runs_own_files_are_results_also_behind_a_link(tmp_path, run):
    folder = fake(tmp_path / "elsewhere", "train.py").parent
    (tmp_path / "results").mkdir()
    os.symlink(folder, tmp_path / "results" / folder.name)
    copy = (folder / "seed1.json").read_text().replace("0.499", "0.9")
    (folder / "seed1 (conflicted copy).json").write_text(copy)
    for name in (".ipynb_checkpoints/seed1.json", "a/seed1-checkpoint.json", "a/b/seed1.json"):
        (tmp_path / "results" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "results" / name).write_text(copy)
    process = run("aggregate.py", tmp_path / "results")
    assert "0.5000 ± 0.0010" in process.stdout and "Other runs" not in process.stdout and process.stderr == ""


@pytest.mark.parametrize(
    ("change", "word"),
    [({"data": {"fingerprint": "ff"}}, "data fingerprint ff"),
     ({"data": {"classes": data.CLASSES[::-1]}}, "classes ('truck"),
     ({"environment": {"torch": "2.15.0", "dtype": "float32"}}, "dtype float32"),
     ({"environment": {"torch": "3.0.0", "dtype": "bfloat16"}}, "major version of torch 3")],
)  # fmt: skip
def test_a_seed_unlike_its_siblings_is_named_and_left_out(change, word, tmp_path, run):
    fake(tmp_path, "train.py", seeds=(1, 3))
    odd = fake(tmp_path, "train.py", accuracy=0.9, seeds=[2], **change)
    process = run("aggregate.py", tmp_path, "--no-published")
    assert "0.5000 ± 0.0014" in process.stdout
    (line,) = process.stderr.splitlines()
    assert line.startswith(f"left out: {odd}: {word}") and "and " in line


def test_a_file_that_is_no_result_is_named_and_left_out(tmp_path, run):
    content = json.loads(fake(tmp_path, "train.py").read_text())
    config, nan = content["config"], {**content["test"], "loss": float("nan")}
    changes = {
        "version": {"version": 2}, "nan": {"test": nan}, "odd": {"config": {**config, "lr": {}}},
        "valid": {"history": [{"train": content["test"]}] * 10}, "seed": {"config": {**config, "seed": 4}},
        "bare": {"config": {}},
    }  # fmt: skip
    broken = {name: json.dumps(content | change) for name, change in changes.items()}
    broken |= {"cut": broken["seed"][:100], "list": "[1, 2]", "deep": "[" * 100_000, "bytes": "\xff"}
    for name, text in broken.items():
        path = tmp_path / f"other-{name}" / "seed3.json"
        path.parent.mkdir()
        path.write_text(text, encoding="latin-1")
    process = run("aggregate.py", tmp_path, "--no-published")
    assert process.returncode == 0 and "0.5000 ± 0.0010" in process.stdout, process.stderr
    left_out = sorted(re.findall("left out: .*other-(.*)/seed3.json: .", process.stderr))
    assert left_out == sorted(broken)
    for words in ("version 2", "of seed 4", "'valid' is missing"):
        assert words in process.stderr


def test_a_result_edited_by_hand_or_of_an_older_version_stays_a_result(tmp_path, run):
    path = fake(tmp_path, "train.py")
    content = json.loads(path.read_text())
    content["config"]["tta"], content["environment"]["processes"], content["note"] = "none", 1, "on my laptop"
    del content["test_tta"], content["config"]["stem"]
    path.write_text(json.dumps(content))
    process = run("aggregate.py", tmp_path)
    assert "0.5000 ± 0.0010" in process.stdout and process.stderr == ""


def test_wrong_use_is_one_line(tmp_path, run, one_line):
    one_line(run("aggregate.py", tmp_path / "nothing"), 1, "no folder", "run_all.sh")
    one_line(run("aggregate.py", tmp_path), 1, "no results in", "run_all.sh")
    one_line(run("aggregate.py", "--only", "initial,inital"), 2, "--only inital", "learning-rate")


# Marks


def test_the_best_and_what_does_not_differ_from_it_are_marked(tmp_path, run):
    for arch, accuracy in (("custom", 0.7), ("densenet121", 0.6998), ("resnet18 --pretrained", 0.69)):
        fake(tmp_path, f"train.py --arch {arch}", accuracy)
    rows = table(run("aggregate.py", tmp_path, "--no-published").stdout, "Initial results")
    assert {row: cells["accuracy"] for row, cells in rows.items()} == {
        "resnet18": "0.6900 ± 0.0010", "densenet121": "0.6998 ± 0.0010 ≈",
        "custom": "**0.7000 ± 0.0010**"}  # fmt: skip
    assert rows["resnet18"]["loss"].startswith("**") and not rows["custom"]["loss"].startswith("**")
    fake(tmp_path, "train.py --arch efficientnet_b0 --pretrained", 0.7)  # as good as the best
    rows = table(run("aggregate.py", tmp_path, "--no-published").stdout, "Initial results")
    assert rows["efficientnet_b0"]["accuracy"] == rows["custom"]["accuracy"] == "**0.7000 ± 0.0010**"


@pytest.mark.parametrize("seeds", [2, 3])
def test_a_rows_best_is_marked_and_from_three_seeds_on_what_does_not_differ(seeds, tmp_path, run):
    for value, accuracy in ((0, 0.7), (0.0001, 0.71), (0.0002, 0.7099), (0.00005, 0.69)):
        for arch, plus in (("custom", 0), ("densenet121", 0.1)):
            command = f"train.py --arch {arch} --weight-decay {value}"
            fake(tmp_path, command, accuracy + plus, seeds=range(1, seeds + 1))
    text = run("aggregate.py", tmp_path, "--no-published").stdout
    for cells in table(text, "Weight decay, accuracy").values():
        marks = {column: re.sub(r"[\d. ±]", "", cell) for column, cell in cells.items()}
        assert marks == {"0": "", "0.0001": "****", "0.0002": "≈" * (seeds == 3), "0.00005": ""}
    assert ("≈: not significantly different from the best" in text) == (seeds == 3)
    assert "bold: best of its row" in text and "unless" not in text


@pytest.mark.parametrize("sizes", [(2, 2), (3, 3), (2, 7), (3, 40)])
def test_welchs_test_equals_scipys(sizes):
    generator = np.random.default_rng(sum(sizes))
    for shift in (0, 0.1, 1, 3, 30):
        first, second = generator.normal(size=sizes[0]), shift + 3 * generator.normal(size=sizes[1])
        wanted = stats.ttest_ind(first, second, equal_var=False).pvalue
        assert aggregate.p_value(list(first), list(second)) == pytest.approx(wanted, abs=1e-6)
    assert aggregate.p_value([1.0, 1.0], [1.0, 1.0]) == 1 and aggregate.p_value([1.0, 1.0], [2.0, 2.0]) == 0


# Formats


def test_a_single_seed_shows_no_deviation_and_unequal_numbers_of_seeds_show(tmp_path, run):
    fake(tmp_path, "train.py", seeds=[1])
    assert " ± 0" not in run("aggregate.py", tmp_path, "--no-published").stdout
    fake(tmp_path, "train.py --arch densenet121")
    text = run("aggregate.py", tmp_path, "--no-published").stdout
    assert "0.4990" in text and "0.5000 ± 0.0010" in text


def test_csv_is_tidy(tmp_path, run):
    for lr, decay in ((0.001, 0), (0.002, 0.00005)):
        fake(tmp_path, f"train.py --data cifar10 --lr {lr} --weight-decay {decay}", lr, (1, 2, 4))
    rows = list(csv.DictReader(io.StringIO(run("aggregate.py", tmp_path, "--format", "csv").stdout)))
    names = ["run", "seed", "data", "fingerprint", "lr", "weight_decay", *aggregate.METRICS, TTA]
    assert list(rows[0]) == names and float(rows[0][TTA]) == pytest.approx(0.01)
    assert all(row["fingerprint"] == "0f" for row in rows)
    shown = [" ".join(row[name] for name in ("lr", "weight_decay", "seed", "accuracy", "f1")) for row in rows]
    assert shown == [
        "0.001 0 1 0.0 0.3", "0.001 0 2 0.001 0.301", "0.001 0 4 0.003 0.303", "0.002 0.00005 1 0.001 0.301",
        "0.002 0.00005 2 0.002 0.302", "0.002 0.00005 4 0.004 0.304"]  # fmt: skip


def test_latex_tables_are_whole_and_a_folders_name_breaks_no_table(whole, run, tmp_path):
    fake(tmp_path, "train.py", run=r"50%_of&more {cost} #~^\ $1 | <!-- `a`")
    assert r"| 50%_of&more {cost} #~^\\ \$1 \| \<!-- \`a\` |" in run("aggregate.py", tmp_path).stdout
    text = run("aggregate.py", tmp_path, "--format", "latex").stdout
    assert r"50\%\_of\&more \{cost\} \#\textasciitilde{}\^{}\textbackslash{} \$1" in text
    study = run("aggregate.py", whole, "--format", "latex").stdout
    labels = re.findall(r"\\label{(.*)}", study)
    assert len(labels) == len(set(labels)) == study.count(r"\begin{table}") == 17
    caption = r"\caption{Initial results: CINIC-10, test split."
    assert all(words in study for words in (r"efficientnet\_b0 ", r"\textbf{0.5000 $\pm$ 0.0010}", caption))
    assert "*" not in study
    if shutil.which("pdflatex"):
        start = r"\documentclass{article}\usepackage[utf8]{inputenc}\usepackage{graphicx}\begin{document}"
        (tmp_path / "tables.tex").write_text(start + text + study + r"\end{document}", encoding="utf-8")
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "tables"]
        process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert process.returncode == 0 and "Overfull" not in process.stdout, process.stdout


def test_a_reader_that_stops_early_ends_it_quietly_in_any_encoding(whole):
    command = f"PYTHONIOENCODING=ascii {shlex.quote(sys.executable)} {HOUSE}/aggregate.py {whole} | head -n 1"
    shell = ["bash", "-o", "pipefail", "-c", command]
    process = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout, process.stderr) == (0, "## CINIC-10\n", "")


# What README and docs show

NUMBERS = re.compile(r"\b[01]\.\d{4}(?: ± 0\.\d{4})?")
DATA = "cifar10-jpeg-8ba23167"


@pytest.fixture(scope="module")
def measured():
    """The tables of docs/results, as aggregate.py prints them."""
    command = [sys.executable, "aggregate.py", "docs/results"]
    return subprocess.run(command, cwd=HOUSE, capture_output=True, text=True, check=True).stdout


def test_the_tables_of_readme_and_docs_are_those_of_the_result_files(measured):
    found = {*NUMBERS.findall(measured), *itertools.starmap(aggregate.in_digits, published())}
    for name in ("README.md", "docs/results.md"):
        shown = NUMBERS.findall((HOUSE / name).read_text(encoding="utf-8"))
        wrong = [n for n in shown if not any(f"{other} ".startswith(f"{n} ") for other in found)]
        assert shown and not wrong, f"{name}: in no result file: {wrong}"


def test_every_row_of_readmes_first_table_is_what_its_command_gave():
    text = (HOUSE / "README.md").read_text(encoding="utf-8").split("\n\n| test accuracy")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    study = {*itertools.starmap(aggregate.in_digits, published())}
    for _, theirs, ours, seeds, command in rows:
        script, *words = command.strip("`").split()
        module = aggregate.SCRIPTS[script.removesuffix(".py")]
        folder = HOUSE / "docs" / "results" / module.run_name(module.parse_arguments(words), DATA)
        found = [json.loads(file.read_text())["test"]["accuracy"] for file in folder.glob("seed*.json")]
        shown = [aggregate.in_digits(np.mean(found), np.std(found, ddof=1)), str(len(found))]
        assert [ours, seeds] == shown, command
        assert theirs == "–" or theirs.removesuffix(" (pretrained)") in study
    assert len(rows) > 5


def test_every_table_of_docs_results_is_printed_as_it_stands_there(measured):
    text = (HOUSE / "docs" / "results.md").read_text(encoding="utf-8")
    shown, printed = (re.findall(r"^\|.*", tables, re.MULTILINE) for tables in (text, measured))
    assert len(shown) > 50 and shown == printed


def test_result_files_of_docs_are_counted_and_hold_no_path_of_a_machine():
    paths = list((HOUSE / "docs" / "results").rglob("seed*.json"))
    assert f"the {len(paths)} result files" in (HOUSE / "docs" / "results.md").read_text(encoding="utf-8")
    for path in paths:
        result = json.loads(path.read_text(encoding="utf-8"))
        assert not any(str(value).startswith("/") for value in result["config"].values())
