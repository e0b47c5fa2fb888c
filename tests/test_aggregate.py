"""Result files as the scripts leave them, and what aggregate.py makes of them."""

import csv
import hashlib
import io
import json
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
from test_study import listed, settings

import aggregate
import data

METHODS = ["few-shot", "1 prototype", "nearest image", "regular training", "regular training, one-cycle"]


def fake(folder, command, accuracy=0.5, **changes):
    """The result files that a command would leave, with an accuracy for each seed around the one given.

    changes: parts of the file to replace, such as environment.
    """
    script, args = Path(shlex.split(command)[1]).name, settings(command)
    config = vars(args) | aggregate.complete(script.removesuffix(".py"), vars(args))
    name = hashlib.sha256(json.dumps([script, {**config, "seed": None}]).encode()).hexdigest()[:16]
    for seed in args.seed:
        value = round(accuracy + 0.001 * (seed - 2), 4)
        metrics = dict.fromkeys(aggregate.METRICS, value)
        cost = {"parameters": 9_742_509, "bases": 2.0}
        result = {
            "version": 1,
            "config": {**config, "seed": seed},
            "data": {"name": args.data.split("/")[-1], "classes": data.CLASSES, "fingerprint": "0f"},
            "environment": {"torch": "2.15.0", "dtype": "bfloat16", "processes": 1},
            "history": [
                {"epoch": e + 1, "train": metrics, "valid": metrics}
                for e in range(getattr(args, "epochs", 30))
            ],
            **dict.fromkeys(("test", "base", "pair", "ensemble", "one_prototype", "nearest_image"), metrics),
            **({"test_tta": metrics} if getattr(args, "tta", "none") == "flip" else {}),
            "confusion": (np.eye(10, dtype=int) * 900 + 10).tolist(),
            "gate": [[0.2, 0.3, 0.5]] * 10,
            "cost": dict.fromkeys(("test", "base", "pair", "ensemble"), cost),
        } | changes
        path = folder / name / f"seed{seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result))
    return path


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """As if `bash run_all.sh --only all` had done every run."""
    folder = tmp_path_factory.mktemp("study")
    for command in listed("--only", "all"):
        if "augment.py" not in command:
            fake(folder, command)
    return folder


def arranged(folder):
    return aggregate.arrange(aggregate.read(folder), aggregate.PUBLISHED)


def table(text, title):
    """The cells of a printed table: {row: {column: text}}; of a row's three lines, the first."""
    lines = text[text.index(f"### {title}") :].splitlines()[2:]
    head, _, *lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in lines[: next(i for i, line in enumerate(lines) if not line)]
    ]
    return {row: dict(zip(head[1:], cells, strict=True)) for row, *cells in reversed(lines)}


# The study, defined in study.py alone


def test_every_run_of_the_study_is_in_a_table_and_every_cell_is_filled(study):
    blocks, unused = arranged(study)
    assert {block.name for block in blocks} == set(aggregate.TABLES)
    assert not any(block.group for block in blocks) and unused == []
    for block in blocks:
        for cell in block.cells:
            optional = cell.column == "accuracy with mirror images"
            assert optional or cell.seeds == (1 if cell.row.startswith("ensemble of") else 3), cell


def test_every_published_number_stands_in_its_cell(study, run):
    cells = json.loads(run("aggregate.py", study, "--format", "json").stdout)
    shown = {(c["table"], c["row"], c["column"]): (c["slides_mean"], c["slides_std"]) for c in cells}
    wanted = {
        (aggregate.TABLES[name].title, row, column): numbers
        for (name, row, column), numbers in aggregate.PUBLISHED.items()
    }
    assert len(wanted) == 135
    assert {place: shown[place] for place in wanted} == wanted
    assert shown["Augmentation, accuracy", "efficientnet_b0", "jitter"] == (0.1711, 0.0427)
    assert shown["Weight decay, accuracy", "custom", "0.00005"] == (0.7301, 0.0010)
    assert shown["Mixture of experts", "mixture", "loss"] == (0.6208, None)
    assert shown["Augmentation, accuracy", "custom", "none"] == (None, None)


@pytest.mark.parametrize(
    ("line", "place"),
    [("weight-decay all --aug none --weight-decay 0.00001", ("weight-decay", "custom", "0.00001")),
     ("augmentation custom --aug translate", ("augmentation", "custom", "translate")),
     ("initial densenet121 --pretrained --aug none", ("initial", "densenet121, pretrained", "accuracy")),
     ("optimizer custom --aug hybrid --optimizer rmsprop", ("optimizer", "rmsprop", "accuracy")),
     ("optimizer resnet18 --aug hybrid", ("optimizer", "adam (arch resnet18, aug hybrid)", "accuracy")),
     ("beyond custom --aug flip", ("beyond", "custom + aug flip", "accuracy")),
     ("warmth resnet18 --aug none --lr 0.3", ("warmth", "resnet18 + lr 0.3", "accuracy"))],
)  # fmt: skip
def test_one_line_in_study_adds_a_value_a_row_or_a_table(line, place, tmp_path):
    for name in ("run_all.sh", *(path.name for path in HOUSE.glob("*.py"))):
        shutil.copy(HOUSE / name, tmp_path)
    text = (tmp_path / "study.py").read_text()
    (tmp_path / "study.py").write_text(text.replace("\nsamples ", f"\n{line}\nsamples ", 1))
    listing = ["bash", tmp_path / "run_all.sh", "--list", "--only", place[0]]
    commands = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.splitlines()
    for command in commands:
        fake(tmp_path / "results", "python " + command.split("/")[-1])
    process = subprocess.run(
        [sys.executable, tmp_path / "aggregate.py", tmp_path / "results", "--format", "json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    cells = json.loads(process.stdout)
    title = aggregate.TABLES[place[0]].title if place[0] in aggregate.TABLES else "Warmth"
    assert [c["seeds"] for c in cells if (c["table"], c["row"], c["column"]) == (title, *place[1:])] == [3]
    assert "in no table" not in process.stderr
    for cell in cells:  # and no published number has moved
        slides = aggregate.PUBLISHED.get((place[0], cell["row"], cell["column"]), (None, None))
        assert cell["table"] != title or (cell["slides_mean"], cell["slides_std"]) == slides


def test_beyond_the_study_each_option_has_its_own_gain(tmp_path, run):
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
    rows = table(text, "Beyond the study")
    assert {row: cells["gain"] for row, cells in rows.items()} == {
        "resnet18": "",
        "resnet18 + schedule onecycle": "+0.0100",
        "resnet18 + stem small": "+0.0300",
        "resnet18 + aug flip+translate": "+0.0500",
        "resnet18 + label smoothing 0.1": "+0.0700",
    }
    mirrored = [cells["accuracy with mirror images"] for cells in rows.values()]
    assert sorted(mirrored) == ["**0.6600 ± 0.0010**"] + ["-"] * 4 or sorted(mirrored) == ["-"] * 4 + [
        "0.6600 ± 0.0010"
    ]
    assert "Missing" not in text[text.index("### Beyond the study") :]


def test_the_few_shot_comparison_has_all_methods_by_fraction(study, tmp_path, run):
    rows = table(run("aggregate.py", study).stdout, "Few-shot learning and regular training")
    assert list(reversed(rows)) == ["0.001", "0.002", "0.005", "0.01", "0.02", "0.05", "0.1"]
    assert list(rows["0.01"]) == METHODS and all("±" in cell for cell in rows["0.01"].values())
    for extra in ("fewshot.py --episodes 5", "train.py --aug flip+autoaugment --batch-size 16 --epochs 1"):
        fake(tmp_path, f"python {extra} --fraction 0.01 --seed 1 2 3")
    shown = run("aggregate.py", tmp_path).stdout
    rows = table(shown, "Few-shot learning and regular training")
    assert list(rows["0.01"]) == METHODS[:4] and "slides" not in shown
    assert "fewshot.py at 0.01: 5 episodes; train.py at 0.01: 1 epoch." in shown
    fake(tmp_path, "python fewshot.py --fraction 0.01 --seed 1")  # different settings never share a cell
    rows = table(run("aggregate.py", tmp_path).stdout, "Few-shot learning and regular training")
    assert rows["0.01"]["few-shot"].endswith("(n = 1)") and "(" not in rows["0.01"]["few-shot (5 episodes)"]


def test_a_fraction_that_the_study_lacks_is_in_no_table(tmp_path, run):
    for script in ("fewshot.py", "train.py --aug flip+autoaugment"):
        fake(tmp_path, f"python {script} --fraction 0.3 --seed 1 2 3")
    process = run("aggregate.py", tmp_path)
    assert process.stdout == "" and process.stderr.count("in no table") == 2


def test_the_mixture_table_says_what_each_row_costs(study, run):
    text = run("aggregate.py", study).stdout
    rows = table(text, "Mixture of experts")
    assert "Welch, p > 0.05, n = 3)" in text and "n = 1–3" not in text  # a single seed is never compared
    assert rows["mixture"]["parameters"] == "9,742,509"
    assert rows["ensemble of three bases"]["training cost, in bases"] == "2.0"


# Marks


def test_the_best_setting_is_marked_along_the_row_with_the_baseline_beside_it(tmp_path, run):
    for value, accuracy in ((0, 0.7), (0.0001, 0.71), (0.0002, 0.7099), (0.00005, 0.69)):
        for arch, plus in (("custom", 0), ("densenet121", 0.1)):
            decay = f"--weight-decay {value}" if value else ""
            fake(tmp_path, f"python train.py --arch {arch} --seed 1 2 3 {decay}", accuracy + plus)
    rows = table(run("aggregate.py", tmp_path, "--no-published").stdout, "Weight decay, accuracy")
    assert rows["custom"] == {"0": "0.7000 ± 0.0010", "0.00005": "0.6900 ± 0.0010", "0.0001": "**0.7100 ± 0.0010**",
                              "0.0002": "0.7099 ± 0.0010 ≈"}  # fmt: skip
    assert rows["densenet121"]["0.0001"] == "**0.8100 ± 0.0010**"


@pytest.mark.parametrize("seeds", [2, 3])
def test_no_significant_difference_is_said_from_three_seeds_on(seeds, tmp_path, run):
    for aug, accuracy in (("none", 0.7), ("flip", 0.7001)):
        fake(tmp_path, f"python train.py --aug {aug} --seed {' '.join('123'[:seeds])}", accuracy)
    text = run("aggregate.py", tmp_path, "--no-published").stdout
    text = text[text.index("### Augmentation") :]
    assert ("0.7000 ± 0.0010 ≈" in text) == (
        f"not significantly different from the best (Welch, p > 0.05, n = {seeds})" in text
    )
    assert ("≈" in text) == (seeds == 3) and "**" in text
    fake(tmp_path, "python train.py --aug crop --seed 1 2", 0.8)
    note = "; not tested where a cell or the best has n < 3."
    assert (note in run("aggregate.py", tmp_path).stdout) == (seeds == 3)


# Results that cannot mix


@pytest.mark.parametrize(
    ("change", "word"),
    [({"data": {"name": "cinic10", "classes": data.CLASSES, "fingerprint": "ff"}}, "data fingerprint ff"),
     ({"environment": {"torch": "2.15.0", "dtype": "float32", "processes": 1}}, "dtype float32"),
     ({"environment": {"torch": "2.15.0", "dtype": "bfloat16", "processes": 2}}, "number of processes 2"),
     ({"environment": {"torch": "3.0.0", "dtype": "bfloat16", "processes": 1}}, "major version of torch 3")],
)  # fmt: skip
def test_a_seed_unlike_its_siblings_is_named_and_left_out(change, word, tmp_path, run):
    fake(tmp_path, "python train.py --seed 1 3")
    odd = fake(tmp_path, "python train.py --seed 2", accuracy=0.9, **change)
    process = run("aggregate.py", tmp_path, "--no-published")
    assert "0.5000 ± 0.0014" in process.stdout
    (line,) = process.stderr.splitlines()
    assert line.startswith(f"left out: {odd}: {word}, and ")


def test_two_data_sets_of_one_name_share_no_table(tmp_path, run):
    fake(tmp_path, "python train.py --data mine --arch custom --seed 1 2 3")
    other = {"name": "mine", "classes": data.CLASSES, "fingerprint": "ff"}
    fake(tmp_path, "python train.py --data mine --arch densenet121 --seed 1 2 3", data=other)
    process = run("aggregate.py", tmp_path)
    assert "## mine, fingerprint 0f" in process.stdout and "## mine, fingerprint ff" in process.stdout
    assert "--fingerprint" not in process.stdout and process.stderr == ""


def test_a_result_edited_by_hand_stays_a_result(tmp_path, run):
    path = fake(tmp_path, "python train.py --seed 1 2 3")
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "checksum": "of other content", "note": "on my laptop"})
    )
    process = run("aggregate.py", tmp_path)
    assert "0.5000 ± 0.0010" in process.stdout and process.stderr == ""


# Tables


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
    for block in blocks:
        (cell,) = [c for c in block.cells if (c.row, c.column) == ("custom", "accuracy")]
        assert cell.seeds == 3 and cell.std == pytest.approx(0.001)
        assert (cell.slides_mean is None) == bool(block.group)


def test_a_missing_cell_is_a_dash_with_the_command_that_fills_it(tmp_path, run):
    fake(tmp_path, "python train.py --arch custom --aug flip --data sets/mine --epochs 2 --seed 1 2")
    text = run("aggregate.py", tmp_path).stdout
    row = next(line for line in text.splitlines() if line.startswith("| custom"))
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["-", "0.4995 ± 0.0007"] + ["-"] * 5
    assert "over n = 2 seeds" in text and "published numbers are not comparable" in text
    command = next(line for line in text.splitlines() if line.startswith("Missing"))[len("Missing: `") : -1]
    assert (
        command
        == f"bash run_all.sh --only augmentation --data sets/mine --out {tmp_path} --seeds '1 2' --from-scratch -- --epochs 2"
    )
    words = shlex.split(command)
    for line in listed(*words[2:]):
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


@pytest.mark.parametrize("gate", [[[0.5, 0.5]] * 10, [[0.2, 0.3, 0.5]] * 9])
def test_a_mixture_with_a_damaged_gate_is_left_out(gate, tmp_path, run):
    fake(tmp_path, "python moe.py --seed 1", gate=gate)
    process = run("aggregate.py", tmp_path)
    assert "left out" in process.stderr and "gate is not of 10 classes and 3 experts" in process.stderr


def test_no_results_is_one_line(tmp_path, run, one_line):
    one_line(run("aggregate.py", tmp_path / "nothing"), 1, "no folder", "run_all.sh")
    (tmp_path / "empty").mkdir()
    one_line(run("aggregate.py", tmp_path / "empty"), 1, "no results in", "run_all.sh")


def test_csv_json_and_latex_hold_the_same_numbers(study, run):
    cells = json.loads(run("aggregate.py", study, "--format", "json").stdout)
    rows = list(csv.DictReader(io.StringIO(run("aggregate.py", study, "--format", "csv").stdout)))
    assert len(cells) == len(rows) > 100
    for cell, row in zip(cells, rows, strict=True):
        assert cell["table"] == row["table"] and cell["mean"] == (float(row["mean"]) if row["mean"] else None)
        if cell["column"] == "accuracy with mirror images" and cell["mean"] is None:
            continue  # of runs that test with them only
        assert cell["seeds"] == (1 if cell["row"].startswith("ensemble of") else 3)
    wanted = next(c for c in cells if (c["table"], c["row"]) == ("Dropout, custom on hybrid", "0.2"))
    assert wanted["slides_mean"] == 0.7935 and wanted["difference"] == pytest.approx(0.5 - 0.7935)
    assert list(cells[0]) == ["group", "table", "row", "column", "mean", "std", "seeds", "slides_mean", "slides_std",
                              "difference", "best", "tied"]  # fmt: skip
    latex = run("aggregate.py", study, "--format", "latex").stdout
    assert r"efficientnet\_b0 " in latex and r"\textbf{0.5000 $\pm$ 0.0010}" in latex and "|" not in latex


def test_latex_tables_are_whole_and_say_what_their_numbers_are(study, run, tmp_path):
    fake(tmp_path, "python train.py --data 50%_of&more --aug flip --epochs 3 --seed 1 2 3")
    text = run("aggregate.py", tmp_path, "--format", "latex").stdout
    assert (
        r"\caption{Augmentation, accuracy: 50\%\_of\&more, 3 epochs, test split. Mean $\pm$ standard deviation over n = 3 seeds"
        in text
    )
    assert r"\label{tab:augmentation-data-50-_of-more-epochs-3}" in text
    text = run("aggregate.py", study, "--format", "latex").stdout
    labels = re.findall(r"\\label{(.*)}", text)
    assert len(labels) == len(set(labels)) == text.count(r"\begin{table}") == text.count(r"\end{table}") == 13
    assert (
        r"bold: best of its row; $\approx$: not significantly different from the best (Welch, p $>$ 0.05, n = 3)"
        in text
    )
    if shutil.which("pdflatex"):
        text = (
            r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}"
            + text
            + r"\end{document}"
        )
        (tmp_path / "tables.tex").write_text(text)
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "tables"]
        process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert process.returncode == 0 and "Overfull" not in process.stdout, process.stdout


@pytest.mark.parametrize("form", ["github", "csv", "json"])
def test_a_reader_that_stops_early_ends_it_quietly(form, study, tmp_path):
    command = f"{shlex.quote(sys.executable)} {HOUSE}/aggregate.py {study} --format {form} | head -n 1"
    process = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0 and process.stderr == "" and process.stdout.count("\n") == 1


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
        "beyond-moe-gate",
        "augmentation-accuracy",
    )
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        f"{n}.{s}" for n in names for s in ("png", "svg")
    }
    assert all(path.stat().st_size > 5000 for path in (tmp_path / "figures").iterdir())


def test_a_figure_says_its_network_its_data_and_what_bands_are(study, run, tmp_path):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    run(
        "aggregate.py",
        study,
        "--figures",
        tmp_path,
        code="import matplotlib; matplotlib.rcParams['svg.fonttype'] = 'none'",
    )
    texts = {path.stem: path.read_text() for path in tmp_path.glob("*.svg")}
    assert len(texts) == 10
    for name, text in texts.items():
        assert "CINIC-10" in text and "n = 3" in text and re.search("custom", text), name
        assert ("mean ± std" in text) == (name not in ("confusion", "moe-gate", "beyond-moe-gate"))
    ticks = re.findall(r">(\d+(?:\.\d+)?)</text>", texts["dropout"])
    assert {"1", "2", "10"} <= set(ticks) and "2.5" not in ticks
    assert "no augmentation" in texts["augmentation-accuracy"]
    assert all(method in texts["fewshot"] for method in METHODS)


def test_figures_of_two_data_sets_have_them_in_their_names(run, tmp_path):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    for extra in ("--data cifar10", "--data synthetic --epochs 2", "--data synthetic"):
        fake(tmp_path / "results", f"python train.py {extra} --seed 1 2 3")
    assert run("aggregate.py", tmp_path / "results", "--figures", tmp_path / "figures").returncode == 0
    assert {path.name for path in (tmp_path / "figures").glob("*.png")} == {
        "confusion-data-cifar10.png", "confusion-data-synthetic.png", "confusion-data-synthetic-epochs-2.png"
    }  # fmt: skip


def test_a_network_with_nothing_but_the_baseline_gets_no_panel(run, tmp_path):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    for words in (
        "densenet121 --aug none",
        "resnet18 --pretrained --aug flip",
        "custom --aug none",
        "custom --aug flip",
    ):
        fake(tmp_path / "results", f"python train.py --arch {words} --seed 1 2 3")
    fake(tmp_path / "results", "python train.py --arch densenet121 --aug none --seed 4")
    code = "import matplotlib; matplotlib.rcParams['svg.fonttype'] = 'none'"
    run("aggregate.py", tmp_path / "results", "--figures", tmp_path, code=code)
    text = (tmp_path / "augmentation-accuracy.svg").read_text()
    assert "custom" in text and "resnet18" in text and "densenet121" not in text and "n = 3<" in text


def test_figures_without_matplotlib_say_how_to_get_it(study, run, one_line, tmp_path):
    process = run("aggregate.py", study, "--figures", tmp_path, code="sys.modules['matplotlib'] = None")
    one_line(process, 1, "pip install matplotlib")
    assert "### Initial results" in process.stdout


# What README and docs show


NUMBERS = re.compile(r"\b0\.\d{4}(?: ± 0\.\d{4})?|\b1\.\d{4}(?: ± 0\.\d{4})?")


@pytest.fixture(scope="module")
def measured():
    """The tables of docs/results, as aggregate.py prints them."""
    command = [sys.executable, "aggregate.py", "docs/results"]
    return subprocess.run(command, cwd=HOUSE, capture_output=True, text=True, check=True).stdout


def test_the_tables_of_readme_and_docs_are_those_of_the_result_files(measured):
    published = {aggregate.mean_and_std(mean, std) for mean, std in aggregate.PUBLISHED.values()}
    found = set(NUMBERS.findall(measured)) | published
    for name in ("README.md", "docs/results.md"):
        shown = NUMBERS.findall((HOUSE / name).read_text())
        assert shown, name
        wrong = [
            number for number in shown if number not in found and not any(f"{number} ±" in n for n in found)
        ]
        assert not wrong, f"{name}: in no result file: {wrong}"


def test_every_row_of_readmes_first_table_is_what_its_command_gave(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a run's name contains the data's path relative to here
    slides = {aggregate.mean_and_std(mean, std) for mean, std in aggregate.PUBLISHED.values()}
    text = (HOUSE / "README.md").read_text().split("\n\n| test accuracy")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    for _, theirs, ours, seeds, command in rows:
        script, *words = command.strip("`").split()
        module = aggregate.SCRIPTS[script.removesuffix(".py")]
        name = module.run_name(module.parse_arguments([*words, "--data", "data/cifar10-jpeg"]))
        files = (HOUSE / "docs" / "results" / name).glob("seed*.json")
        found = [json.loads(file.read_text())["test"]["accuracy"] for file in files]
        std = np.std(found, ddof=1) if len(found) > 1 else None
        assert (ours, seeds) == (aggregate.mean_and_std(np.mean(found), std), str(len(found))), command
        assert theirs == "–" or theirs.removesuffix(" (pretrained)") in slides
    assert len(rows) > 5


def test_every_table_of_docs_results_is_printed_as_it_stands_there(measured):
    text = (HOUSE / "docs" / "results.md").read_text()
    shown, printed = (re.findall(r"^\|.*", tables, re.MULTILINE) for tables in (text, measured))
    assert len(shown) > 50 and shown == printed


def test_result_files_of_docs_are_counted_and_hold_no_path_of_a_machine():
    paths = list((HOUSE / "docs" / "results").rglob("seed*.json"))
    assert f"the {len(paths)} result files" in (HOUSE / "docs" / "results.md").read_text()
    for path in paths:
        result = json.loads(path.read_text())
        assert result["data"]["fingerprint"] and not any(
            str(v).startswith("/") for v in result["config"].values()
        )
