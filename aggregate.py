"""Result files in, tables and figures out, with the numbers of the slides beside ours.

    python aggregate.py results                          # every table, as GitHub shows it
    python aggregate.py results --format latex           # also plain, csv, json
    python aggregate.py results --figures figures        # the figures too (needs matplotlib)

Rows and columns are those of the study in `study.py`. A table holds the results of one data set, one fraction of it and
one number of epochs: others get tables of their own. Cells are mean ± standard deviation (n - 1) over the seeds found.
"""

import argparse
import collections
import csv
import itertools
import json
import math
import os
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tabulate

import fewshot
import moe
import runs
import study
import train

SCRIPTS = {"train": train, "moe": moe, "fewshot": fewshot}
METRICS = ("accuracy", "recall", "precision", "f1", "loss")


# The study


class Line(NamedTuple):
    tables: list  # names of those that it stands in
    script: str  # a key of SCRIPTS
    settings: dict  # every setting of its run
    given: dict  # the settings that its line in study.py gives


# In a configuration, and no part of what was trained
NO_SETTING = set(runs.NEUTRAL) - {"amp"}
# What tables compare: a result that differs from a line of the study in one of these is another run. One that differs in
# another setting (data, epochs, fraction) stands in a table of its own
STUDIED = {"arch", "pretrained", "aug", "dropout", "lr", "optimizer", "weight_decay", "stem", "schedule", "label_smoothing",
           "method", "classes"}  # fmt: skip


def complete(script, config):
    """All settings of a run: those given, else the defaults of its script."""
    settings = vars(SCRIPTS[script].make_parser().parse_args([])) | config
    settings["data"] = os.path.normpath(settings["data"])
    if script == "fewshot" and settings["query"] is None:
        settings["query"] = fewshot.default_query(settings["fraction"])
    return {key: value for key, value in settings.items() if key not in NO_SETTING}


def read_study():
    """The lines of study.py, one for each network of a line. Raises ValueError for a line that is wrong."""
    lines = []
    for tables, script, words in study.lines():
        if script == "augment":
            continue  # a picture
        parser = SCRIPTS[script].make_parser()
        given = vars(parser.parse_args(words))
        given = {key: value for key, value in given.items() if value != parser.get_default(key)}
        given = {key: value for key, value in given.items() if key not in NO_SETTING}
        lines.append(Line(tables, script, complete(script, given), given))
    return lines


ALL = {name: complete(name, {}) for name in SCRIPTS}
OF_ONE_SCRIPT = ALL["train"].keys() ^ ALL["fewshot"].keys()  # settings that only one of the two has
# What a setting is where a script does not have it, or no longer: older results do
DEFAULTS = {"method": "episodes"} | ALL["moe"] | ALL["fewshot"] | ALL["train"]
try:
    STUDY = read_study()
except ValueError as error:
    raise SystemExit(f"the study in study.py: {error}") from None


# The tables


class Table(NamedTuple):
    title: str | None  # None: only a figure
    rows: str  # a setting, `network`, `run` (what it adds to the run above) or `part` (of a mixture's result)
    columns: str | tuple | dict  # a setting, metrics of each row, or METHODS


METHODS = {  # column: script, settings that select its runs, part of a result file
    "few-shot": ("fewshot", {}, "test"),
    "1 prototype": ("fewshot", {}, "one_prototype"),
    "nearest image": ("fewshot", {}, "nearest_image"),
    "regular training": ("train", {"schedule": "none"}, "test"),
    "regular training, one-cycle": ("train", {"schedule": "onecycle"}, "test"),
}
PARTS = {
    "test": "mixture",
    "base": "base alone",
    "pair": "mean of two bases",
    "ensemble": "mean of three bases",
}
COSTS = {
    "parameters": "parameters",
    "training, in base networks": "bases",
}  # column: its name in a result's cost
OTHER_PARTS = {  # column that is no metric of `test`: part of a result file, metric
    "1 prototype": ("one_prototype", "accuracy"),
    "nearest image": ("nearest_image", "accuracy"),
    "accuracy with mirror images": ("test_tta", "accuracy"),
}
MIXTURE = ("loss", "accuracy", "f1", "precision", "recall", *COSTS)
TABLES = {
    "overfitting": Table(None, "network", ("accuracy",)),
    "initial": Table("Initial results", "network", METRICS),
    "augmentation": Table("Augmentation, accuracy", "network", "aug"),
    "hybrid": Table("Hybrid augmentation", "network", ("accuracy",)),
    "learning-rate": Table("Learning rate on hybrid, accuracy", "network", "lr"),
    "optimizer": Table("Optimizer, custom on hybrid", "optimizer", METRICS),
    "weight-decay": Table("Weight decay, accuracy", "network", "weight_decay"),
    "dropout": Table("Dropout, custom on hybrid", "dropout", ("accuracy", "precision")),
    "moe": Table("Mixture of experts", "part", MIXTURE),
    "fewshot": Table("Few-shot learning", "fraction", ("accuracy", "recall", "precision", "f1", "1 prototype", "nearest image")),
    "regular": Table("Regular training on the same fractions", "fraction", ("accuracy",)),
    "beyond": Table("Beyond the slides", "run", ("accuracy", "f1", "loss", "accuracy with mirror images")),
    "beyond-moe": Table("Beyond the slides: mixture of experts", "part", MIXTURE),
    "beyond-fewshot": Table("Few-shot learning and regular training, accuracy", "fraction", METHODS),
}  # fmt: skip
TABLES |= {  # a table that only study.py names
    name: Table(name.replace("-", " ").capitalize(), "run", METRICS)
    for line in STUDY for name in line.tables if name not in TABLES
}  # fmt: skip


def read_published(text):
    """{table: {row: {column: (mean, std)}}}; std None: a single seed. text: a block a table, its first line the columns."""
    tables = {}
    for block in text.strip().split("\n\n"):
        (name, *columns), *rows = (line.split() for line in block.splitlines())
        for row, *cells in rows:
            numbers = [[float(number) for number in cell.split("±")] for cell in cells]
            tables.setdefault(name, {})[row] = {
                column: (mean, *std) if std else (mean, None)
                for column, (mean, *std) in zip(columns, numbers, strict=True)
            }
    return tables


# N. Safiejko, W. Grabias, "Convolutional Neural Networks", 2025; test split of CINIC-10, three seeds (the mixture: one).
# Hybrid, learning rate and optimizer are from the report behind the slides.
PUBLISHED = read_published("""
initial         accuracy      recall        precision     f1            loss
resnet18        0.6775±0.0015 0.6775±0.0015 0.6763±0.0010 0.6752±0.0017 0.9602±0.0293
densenet121     0.7197±0.0004 0.7194±0.0004 0.7198±0.0002 0.7181±0.0010 0.8725±0.0111
efficientnet_b0 0.7262±0.0011 0.7262±0.0009 0.7258±0.0011 0.7249±0.0010 0.8138±0.0232
custom          0.7329±0.0026 0.7329±0.0026 0.7380±0.0013 0.7335±0.0023 0.8443±0.0425

augmentation    flip          rotation      crop          jitter        autoaugment   cutout
resnet18        0.6970±0.0030 0.6905±0.0015 0.6848±0.0028 0.6690±0.0025 0.6771±0.0013 0.6827±0.0055
densenet121     0.6548±0.0312 0.7222±0.0026 0.7197±0.0043 0.7151±0.0033 0.6858±0.0118 0.7226±0.0022
efficientnet_b0 0.7374±0.0121 0.7284±0.0008 0.7222±0.0039 0.1711±0.0427 0.7160±0.0025 0.7252±0.0001
custom          0.7565±0.0022 0.7405±0.0013 0.7361±0.0015 0.6114±0.0019 0.7261±0.0051 0.7368±0.0021

hybrid          accuracy
resnet18        0.7063±0.0012
densenet121     0.6992±0.0103
efficientnet_b0 0.7321±0.0037
custom          0.7647±0.0051

learning-rate   0.002         0.001         0.0005
resnet18        0.6775±0.0038 0.7101±0.0014 0.7097±0.0016
densenet121     0.6125±0.0081 0.6136±0.0027 0.6018±0.0036
efficientnet_b0 0.7110±0.0064 0.7277±0.0024 0.7367±0.0024
custom          0.7557±0.0035 0.7643±0.0032 0.7609±0.0043

optimizer       accuracy      recall        precision     f1            loss
adam            0.7643±0.0032 0.7643±0.0032 0.7666±0.0019 0.7629±0.0028 0.6810±0.0102
adagrad         0.6534±0.0033 0.6534±0.0033 0.6484±0.0031 0.6469±0.0039 0.9785±0.0080
adamax          0.7593±0.0023 0.7593±0.0023 0.7594±0.0016 0.7567±0.0019 0.6927±0.0036

weight-decay    0.0001        0.0002        0.00005
resnet18        0.6730±0.0020 0.6673±0.0034 0.6753±0.0028
densenet121     0.6667±0.0016 0.6604±0.0026 0.6656±0.0052
efficientnet_b0 0.7210±0.0018 0.7148±0.0020 0.7230±0.0011
custom          0.7290±0.0031 0.7300±0.0081 0.7301±0.0010

dropout         accuracy      precision
0.1             0.7356±0.0022 0.7409±0.0031
0.2             0.7935±0.0114 0.8003±0.0132
0.3             0.7411±0.0314 0.7322±0.0401
0.4             0.7031±0.0218 0.6909±0.0146

moe             loss          accuracy      f1            precision     recall
mixture         0.6208        0.8034        0.8036        0.8040        0.8034

fewshot         accuracy      recall        precision     f1
0.001           0.2095±0.0015 0.2095±0.0015 0.2119±0.0010 0.2080±0.0017
0.002           0.2503±0.0004 0.2503±0.0004 0.2537±0.0002 0.2457±0.0010
0.005           0.2890±0.0011 0.2890±0.0009 0.2766±0.0011 0.2755±0.0010
0.01            0.3283±0.0026 0.3283±0.0026 0.3108±0.0013 0.3093±0.0023
0.02            0.3388±0.0026 0.3387±0.0026 0.3271±0.0013 0.3210±0.0023
0.05            0.3407±0.0026 0.3407±0.0026 0.3204±0.0013 0.3123±0.0023
0.1             0.3505±0.0026 0.3505±0.0026 0.3350±0.0013 0.3274±0.0023

regular         accuracy
0.001           0.1123±0.0083
0.002           0.1610±0.0281
0.005           0.1833±0.0255
0.01            0.2020±0.0162
0.02            0.3191±0.0204
0.05            0.3960±0.0151
0.1             0.4894±0.0116
""")


def text_of(value):
    """A setting's value as it is written in a table: 0.00005, and never 5e-05."""
    return np.format_float_positional(value, trim="-") if isinstance(value, float) else str(value)


def in_words(settings):
    """Settings as readers say them: `30 epochs, schedule onecycle`."""
    words = []
    for key, value in settings:
        if key in ("epochs", "episodes"):
            words.append(f"{value} {key if value > 1 else key[:-1]}")
        elif key == "fraction":
            words.append(f"{100 * value:g} % of train")
        else:
            words.append(key.replace("_", " ") + ("" if value is True else f" {text_of(value)}"))
    return ", ".join(words)


def row_of(table, line, above):
    """The label of a line's row. above: the line above it of the same network, or None."""
    if table.rows == "part":
        return None
    if table.rows not in ("network", "run"):
        return text_of(line.settings[table.rows])
    network = line.settings.get("arch", line.script)
    if table.rows == "network":
        return network
    builds_on = above is not None and above.given.items() <= line.given.items()
    added = dict(line.given.items() - above.given.items() if builds_on else line.given.items())
    words = in_words((key, value) for key, value in line.given.items() if key in added and key != "arch")
    return f"{network}{':' if above and not builds_on else ' +'} {words}" if words else network


def lines_of(name):
    """The lines of a table, each with the label of its row: those of one network together. A line that would fill the
    cells of another gets a row of its own."""
    table, above, lines, taken = TABLES[name], {}, {}, set()
    for line in (line for line in STUDY if name in line.tables):
        network = line.settings.get("arch")
        row = row_of(table, line, above.get(network))
        if taken & {place[:2] for place in places(table, row, line)}:
            row += f" ({in_words(line.given.items())})"
        taken |= {place[:2] for place in places(table, row, line)}
        lines.setdefault(network, []).append((row, line))
        above[network] = line
    return list(itertools.chain.from_iterable(lines.values()))


def places(table, row, line):
    """The cells that a run fills: (row, column, part of a result file, metric) of each."""
    if table.rows == "part":
        given = [(part, label, metric) for part, label in PARTS.items() for metric in table.columns]
        return [(label, metric, part, metric) for part, label, metric in given if line.script == "moe"]
    if isinstance(table.columns, dict):
        return [
            (row, column, part, "accuracy")
            for column, (script, wanted, part) in table.columns.items()
            if script == line.script and all(line.settings.get(k, v) == v for k, v in wanted.items())
        ]
    if isinstance(table.columns, str):
        return [(row, text_of(line.settings[table.columns]), "test", "accuracy")]
    return [(row, column, *OTHER_PARTS.get(column, ("test", column))) for column in table.columns]


def layout(name):
    """Labels of the rows and of the columns of a table: in the study's order, numbers by size."""
    cells = [place for row, line in lines_of(name) for place in places(TABLES[name], row, line)]
    labels = [list(dict.fromkeys(place[axis] for place in cells)) for axis in (0, 1)]
    return [
        sorted(axis, key=float) if all(re.fullmatch(r"[\d.]+", label) for label in axis) else axis
        for axis in labels
    ]


# Results


class Result(NamedTuple):
    path: Path
    script: str
    settings: dict  # all that its run was configured with
    seed: int
    common: dict  # what other seeds of its run have in common with it; None: it does not say
    content: dict  # the file


class Value(NamedTuple):
    result: Result
    part: str  # of its file
    metric: str

    def number(self):
        """None for a part that only some runs have."""
        content, name = self.result.content, self.metric
        if name in COSTS:
            content, name = content.get("cost", {}), COSTS[name]
        return content.get(self.part, {}).get(name)


def read(folder):
    """The finished runs below a folder, a list of Result. A file that cannot be used is named on standard error."""
    results, known = [], {}
    for path in sorted(Path(folder).rglob("seed*.json")):
        try:
            result = understand(path, json.loads(path.read_text()))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            print(f"left out: {path}: {reason}", file=sys.stderr)
            continue
        run = json.dumps([result.script, sorted(result.settings.items())])
        seeds = known.setdefault(run, {})
        if result.seed in seeds:
            print(f"left out: {path}: the same run as {seeds[result.seed].path}", file=sys.stderr)
        else:
            seeds[result.seed] = result
    for seeds in known.values():
        results += comparable(list(seeds.values()))
    return tell_data_apart(results)


TESTED = {  # parts of every result file of a script
    "train": ("test",),
    "fewshot": ("test", "one_prototype", "nearest_image"),
    "moe": ("test", "base", "ensemble"),
}


def understand(path, content):
    """A Result; raises what Python raises for a file that is none of ours, and ValueError for half a run."""
    if content["version"] != 1:
        raise ValueError(f"version {content['version']}, and this program reads version 1")
    config = content["config"]
    script = "fewshot" if "way" in config else "moe" if "train_adapters" in config else "train"
    settings = complete(script, config)
    if not all(value is None or isinstance(value, str | int | float) for value in settings.values()):
        raise ValueError("a setting is no plain value")
    done = len(content["history"])
    if script != "fewshot" and done != settings["epochs"]:
        raise ValueError(f"half a run: {done} of {settings['epochs']} epochs")
    names = [*TESTED[script], *(name for name in ("test_tta", "pair") if name in content)]
    splits = ("train",) if script == "fewshot" else ("train", "valid")
    parts = [content[name] for name in names]
    parts += [entry[split] for entry in content["history"] for split in splits]
    for part in parts:
        if not all(math.isfinite(part[metric]) for metric in METRICS):
            raise ValueError("a metric is not finite")
    classes, experts = len(content["data"]["classes"]), 3
    shapes = {"confusion": (classes, classes), **({"gate": (classes, experts)} if script == "moe" else {})}
    for name, shape in shapes.items():
        if np.array(content[name], dtype=float).shape != shape:
            raise ValueError(f"{name} is not of {classes} classes")
    environment = content.get("environment", {})
    common = {
        "data fingerprint": content["data"].get("fingerprint"),
        "dtype": environment.get("dtype"),
        "number of processes": environment.get("processes"),
        "major version of torch": environment.get("torch", "").split(".")[0] or None,
    }
    common = {what: None if value is None else str(value) for what, value in common.items()}
    return Result(path, script, settings, int(config["seed"]), common, content)


def comparable(siblings):
    """Seeds of one run, without those that differ from most of the others (of equally many, from the first) in what they
    should have in common; these are named on standard error. What an older file does not say counts as equal."""
    for what in siblings[0].common:
        counts = collections.Counter(r.common[what] for r in siblings if r.common[what] is not None)
        usual = counts.most_common(1)[0][0] if counts else None
        for odd in [r for r in siblings if r.common[what] not in (None, usual)]:
            reason = f"{what} {odd.common[what]}, and {usual} in other seeds of its run"
            print(f"left out: {odd.path}: {reason}", file=sys.stderr)
            siblings.remove(odd)
    return siblings


def tell_data_apart(results):
    """Give results of several data sets with one name the fingerprint as a setting, so that they share no table."""
    fingerprints = collections.defaultdict(set)
    for result in results:
        fingerprints[result.settings["data"]].add(result.common["data fingerprint"])
    for result in results:
        if len(fingerprints[result.settings["data"]] - {None}) > 1:
            result.settings["fingerprint"] = result.common["data fingerprint"]
    silent = [r for r in results if None in (r.common["data fingerprint"], r.common["number of processes"])]
    if silent:
        missing = "no data fingerprint or number of processes: whether these agree is not checked"
        print(f"{len(silent)} of {len(results)} results are older files with {missing}", file=sys.stderr)
    return results


def arrange(results):
    """{(table, group): {(row, column): {seed: Value}}}, and the results that are in no table.

    group: the settings, as (name, value) pairs, in which all results of a table differ from the lines of the study.
    """
    blocks, unused = {}, []
    lines = {name: lines_of(name) for name in TABLES}
    for result in results:
        used = False
        for name, table in TABLES.items():
            found = [(differences(table, line, result), row, line) for row, line in lines[name]]
            found = [entry for entry in found if entry[0] is not None]
            if not found:
                continue
            used = True
            differs, row, line = min(found, key=lambda entry: len(entry[0]))
            start = line.settings.get("pretrained")
            if result.settings.get("pretrained") != start:
                row += ", from scratch" if start else ", pretrained"
            group = {key: value for key, value in differs.items() if key not in OF_ONE_SCRIPT}
            rest = in_words((key, value) for key, value in differs.items() if key in OF_ONE_SCRIPT)
            if not isinstance(table.columns, dict):  # all runs are of one script
                group, rest = differs, ""
            for label, column, part, metric in places(table, row, line):
                place = label, f"{column} ({rest})" if rest else column
                cells = blocks.setdefault((name, tuple(sorted(group.items()))), {})
                cells.setdefault(place, {})[result.seed] = Value(result, part, metric)
        if not used:
            unused.append(result)
    return without_repeats(blocks), unused


def differences(table, line, result):
    """{setting: value} in which a result differs from a line of the study; None if it is another run."""
    fixed = {*STUDIED, *line.given} - ({"pretrained"} if table.rows == "network" else set())
    wanted = DEFAULTS | line.settings
    differs = {key: value for key, value in result.settings.items() if value != wanted.get(key)}
    if result.script != line.script or fixed & differs.keys():
        return None
    differs.pop("pretrained", None)
    return differs


def without_repeats(blocks):
    """Leave out a table if all its runs stand together in another one: what it shares with that is then all it has."""

    def rank(key):
        name, group = key
        return isinstance(TABLES[name].columns, dict), len(group), list(TABLES).index(name)

    kept = {}
    for key in sorted(blocks, key=rank):
        runs = {value.result.path for seeds in blocks[key].values() for value in seeds.values()}
        if not any(runs <= others for others in kept.values()):
            kept[key] = runs
    return {key: blocks[key] for key in kept}


# Cells


class Cell(NamedTuple):
    values: list  # of each seed
    mean: float
    std: float | None  # n - 1; None for a single seed
    published: tuple | None  # (mean, std) on the slides
    best: bool = False  # of its row or column
    tied: bool = False  # not the best, and not told apart from it by Welch's test


def tabulated(name, group, found, with_published):
    """The rows of a table: {row: {column: Cell or None}}."""
    rows, columns = shown(name, group, found)
    table, cells = TABLES[name], {row: dict.fromkeys(columns) for row in rows}
    for (row, column), seeds in found.items():
        values = [value.number() for _, value in sorted(seeds.items())]
        values = [value for value in values if value is not None]
        if row in (PARTS["pair"], PARTS["ensemble"]):
            values = values[:1]  # of the same networks, whatever the gate's seed
        if values and row in cells:
            std = float(np.std(values, ddof=1)) if len(values) > 1 and column not in COSTS else None
            slides = (
                PUBLISHED.get(name, {}).get(row, {}).get(column) if with_published and not group else None
            )
            cells[row][column] = Cell(values, float(np.mean(values)), std, slides)
    if isinstance(table.columns, str | dict):  # which setting is best for this row?
        for row in rows:
            mark([(row, column) for column in columns], cells)
    elif table.rows != "fraction":  # which row is best?
        for column in columns:
            if column not in COSTS:
                mark([(row, column) for row in rows], cells, lower_is_better=column == "loss")
    return cells


def mark(line, cells, lower_is_better=False):
    """Mark the best of a row or column, and what is not told apart from it. line: the places of its cells."""
    line = [(row, column) for row, column in line if cells[row][column]]
    if len(line) < 2:
        return
    ranked = sorted(line, key=lambda place: cells[place[0]][place[1]].mean, reverse=not lower_is_better)
    best = cells[ranked[0][0]][ranked[0][1]]
    for row, column in ranked:
        cell = cells[row][column]
        p = p_value(cell.values, best.values)
        enough = min(len(cell.values), len(best.values)) >= 3
        cells[row][column] = cell._replace(best=cell is best, tied=cell is not best and enough and p > 0.05)


def variants(row, there):
    """Of the labels there are, those of the same network with the other start."""
    return [other for other in (f"{row}, from scratch", f"{row}, pretrained") if other in there]


def shown(name, group, found):
    """Labels of rows and columns. Of the slides' tables, all of the study, except fractions of which another data set may
    have too few images, and a network that is there with the other start; else those that there are results of."""
    table, slides = TABLES[name], not name.startswith("beyond")
    rows, columns = layout(name)
    there = {row for row, _ in found}
    if isinstance(table.columns, str):  # the other start has to have more than the baseline
        once = [row for row, count in collections.Counter(row for row, _ in found).items() if count == 1]
        there -= {other for row in there for other in variants(row, once)}
    listed = []
    for row in rows:
        if row in there or (slides and not variants(row, there) and not (group and table.rows == "fraction")):
            listed.append(row)
        listed += variants(row, there)
    filled = {
        column for (_, column), seeds in found.items() if any(v.number() is not None for v in seeds.values())
    }
    needed = set(columns) - {*COSTS} if slides else set()
    columns = sorted(
        {*columns, *filled} & {*needed, *filled}, key=lambda c: (columns.index(c.split(" (")[0]), c)
    )
    return listed, columns


def command(name, group, found, rows, folder):
    """The command line that fills the empty cells of a table. found, rows: its cells; folder: of the results."""
    words = ["bash", "run_all.sh", "--only", name]
    words += ["--data", dict(group)["data"]] if "data" in dict(group) else []
    words += ["--out", str(folder)] if str(folder) != "results" else []
    seeds = sorted({seed for seeds in found.values() for seed in seeds})
    words += ["--seeds", " ".join(map(str, seeds))] if seeds != [1, 2, 3] else []
    started = {"resnet18", "efficientnet_b0"} & {row for row, _ in found}  # from ImageNet weights
    words += (
        ["--from-scratch"] if "data" in dict(group) and not started and TABLES[name].rows == "network" else []
    )
    settings = [(key, value) for key, value in group if key not in ("data", "fingerprint")]
    words += ["--"] if settings else []
    for key, value in settings:
        words += [f"--{key.replace('_', '-')}"] + ([] if value is True else [text_of(value)])
    return shlex.join(words)


def p_value(first, second):
    """Two-sided p of Welch's t-test for two samples; None if one has a single value. Welch, 1947."""
    if min(len(first), len(second)) < 2:
        return None
    a, b = (np.var(values, ddof=1) / len(values) for values in (first, second))
    distance = abs(np.mean(first) - np.mean(second))
    if a + b == 0:
        return float(distance == 0)
    freedom = (a + b) ** 2 / (a**2 / (len(first) - 1) + b**2 / (len(second) - 1))
    # With t = sqrt(freedom) tan(angle), Student's density is a power of a cosine: Gauss-Legendre integrates it
    angle = math.atan(distance / math.sqrt((a + b) * freedom))
    points, weights = np.polynomial.legendre.leggauss(100)
    inside = (np.cos(angle * (points + 1) / 2) ** (freedom - 1) * weights).sum() * angle / 2
    scale = 2 / math.sqrt(math.pi) * math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    return float(max(0.0, 1 - scale * inside))


# Printing


def results_of(blocks):
    return [value.result for found in blocks for seeds in found.values() for value in seeds.values()]


def describe(group, results):
    """A group in words: its data set, then what differs from the study."""
    names = sorted({r.content["data"]["name"] for r in results})
    words = ["CINIC-10" if name == "cinic10" else name for name in names]
    return ", ".join([*words, *filter(None, [in_words((k, v) for k, v in group if k != "data")])])


def lengths(results):
    """How long runs were trained: `10 epochs`."""
    found = {(key, r.settings[key]) for r in results for key in ("epochs", "episodes") if key in r.settings}
    return " or ".join(in_words([length]) for length in sorted(found))


def escaped(text):
    """Text for LaTeX, with a real minus in front of a number."""
    special = {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
    }
    special |= {character: f"\\{character}" for character in "&%$#_{}"}
    special |= {character: f"${character}$" for character in "<>"} | {"≈": r"$\approx$"}
    text, minus = re.subn(r"^-(?=\d)", "", text)
    return "$-$" * minus + "".join(special.get(character, character) for character in text)


# How cells, titles and notes look; how tabulate calls it; how a text is escaped
STYLES = {
    "github": {"best": "**{}**", "tied": "{} ≈", "mark": "bold", "group": "## {}", "title": "### {}", "note": "{}",
               "format": "github", "escape": str},
    "plain": {"best": "{} *", "tied": "{} ≈", "mark": "*", "group": "=== {} ===", "title": "{}", "note": "{}",
              "format": "simple", "escape": str},
    "latex": {"best": r"\textbf{{{}}}", "tied": r"{} $\approx$", "mark": "bold", "group": "% {}", "title": None,
              "note": "% {}", "escape": escaped},
}  # fmt: skip


def print_tables(blocks, style, with_published, folder):
    """Every table of every group, the group of the slides first."""
    if style["title"] is None:
        print("% in the preamble: \\usepackage{booktabs,graphicx}\n")
    for group, members in by_group(blocks).items():
        print(style["group"].format(describe(group, results_of(members.values()))) + "\n")
        if group and with_published:
            print(
                style["note"].format(
                    "Not CINIC-10 with the study's settings: the published numbers are not comparable."
                )
                + "\n"
            )
        for name, found in members.items():
            cells = tabulated(name, group, found, with_published)
            filled = [cell for row in cells.values() for cell in row.values() if cell]
            usual = collections.Counter(len(cell.values) for cell in filled).most_common(1)[0][0]
            lines = written(name, cells, usual, style)
            note = explanation(name, filled, usual, style)
            if style["title"]:
                print(style["title"].format(TABLES[name].title) + "\n")
                aligned = ["left"] + ["right"] * (len(lines[0]) - 1)
                print(
                    tabulate.tabulate(
                        lines, "firstrow", style["format"], disable_numparse=True, colalign=aligned
                    )
                )
                print("\n" + style["note"].format(note) + "\n")
            else:
                results = results_of([found])
                settings = [(key, value) for key, value in group if key not in ("epochs", "episodes")]
                about = f"{TABLES[name].title}: {describe(settings, results)}, {lengths(results)}, test split. {note}"
                print(latex_table(lines, escaped(about), slug(f"tab:{name}", group)))
            if any((row, column) not in found for row in cells for column in cells[row]):
                print(style["note"].format(f"Missing: `{command(name, group, found, cells, folder)}`") + "\n")


def written(name, cells, usual, style):
    """The printed lines of a table, its head first: ours and, where there are any, the slides' and the difference.

    usual: how many seeds a cell has unless it says another number.
    """
    escape, rows = style["escape"], TABLES[name].rows
    corner = "" if rows in ("network", "run", "part") else rows.replace("_", " ")
    lines = [[corner, *map(escape, next(iter(cells.values())))]]
    for row, columns in cells.items():
        ours, slides, difference = [escape(row)], [escape("slides")], [escape("difference")]
        for column, cell in columns.items():
            text = escape(number(column, cell, usual))
            ours.append(
                style["best" if cell.best else "tied"].format(text)
                if cell and (cell.best or cell.tied)
                else text
            )
            there = cell and cell.published
            slides.append(escape(mean_and_std(*there)) if there else "")
            difference.append(escape(f"{cell.mean - there[0]:+.4f}") if there else "")
        lines += [ours, slides, difference] if any(slides[1:]) else [ours]
    if TABLES[name].rows == "run":
        gains = {escape(row): escape(gain) for row, gain in gains_of(name, cells).items()}
        lines = [[*lines[0], "gain"], *([*line, gains.get(line[0], "")] for line in lines[1:])]
    return lines


def number(column, cell, usual):
    if cell is None:
        return "-"
    if column in COSTS:
        return f"{cell.mean:,.0f}" if column == "parameters" else f"{cell.mean:.1f}"
    return mean_and_std(cell.mean, cell.std) + (
        f" (n = {len(cell.values)})" if len(cell.values) != usual else ""
    )


def mean_and_std(mean, std):
    return f"{mean:.4f}" if std is None else f"{mean:.4f} ± {std:.4f}"


def gains_of(name, cells):
    """{row: what it adds to the accuracy of the run above it in the study, of the same network, as text}."""
    gains = {}
    for (above, first), (row, line) in itertools.pairwise(lines_of(name)):
        pair = [cells.get(label, {}).get("accuracy") for label in (above, row)]
        if first.settings.get("arch") == line.settings.get("arch") and all(pair) and ": " not in row:
            gains[row] = f"{pair[1].mean - pair[0].mean:+.4f}"
    return gains


def explanation(name, filled, usual, style):
    """What the numbers and marks of a table mean."""
    text = (
        f"Mean ± standard deviation over n = {usual} seeds"
        if usual > 1
        else "One seed (n = 1) unless a cell says otherwise"
    )
    if any(cell.best for cell in filled):
        text += f"; {style['mark']}: best of its {'row' if isinstance(TABLES[name].columns, str | dict) else 'column'}"
    if any(cell.tied for cell in filled):
        sizes = sorted({len(cell.values) for cell in filled if cell.tied or cell.best})
        sizes = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else sizes[0]
        text += f"; ≈: not told apart from the best (Welch, p > 0.05, n = {sizes})"
    return text + "."


def latex_table(lines, caption, label):
    """A table environment, no wider than the text."""
    head, *body = [" & ".join(line) + r" \\" for line in lines]
    return "\n".join([
        r"\begin{table}", r"\centering", r"\setlength{\belowcaptionskip}{6pt}", rf"\caption{{{caption}}}", rf"\label{{{label}}}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * (len(lines[0]) - 1)}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule",
        r"\end{tabular}}", r"\end{table}", "",
    ])  # fmt: skip


def slug(name, group):
    """A name for a file or label that says in what a group differs."""
    return name + re.sub(r"[^\w.]+", "-", "".join(f"-{key}-{text_of(value)}" for key, value in group))


def by_group(blocks):
    """{group: {name of a table: its cells}}, the group of the slides first; without what is only a figure."""
    groups, order = {}, list(TABLES)
    for name, group in sorted(blocks, key=lambda key: (len(key[1]), str(key[1]), order.index(key[0]))):
        if TABLES[name].title:
            groups.setdefault(group, {})[name] = blocks[name, group]
    return groups


def flat(blocks, with_published):
    """A dictionary for every cell of every table, for csv and json."""
    cells = []
    for group, members in by_group(blocks).items():
        words = describe(group, results_of(members.values()))
        for name, found in members.items():
            for row, columns in tabulated(name, group, found, with_published).items():
                for column, cell in columns.items():
                    mean, std = (cell.published if cell else None) or (None, None)
                    cells.append({
                        "group": words, "table": TABLES[name].title, "row": row, "column": column,
                        "mean": cell and cell.mean, "std": cell and cell.std, "seeds": len(cell.values) if cell else 0,
                        "slides_mean": mean, "slides_std": std, "difference": None if mean is None else cell.mean - mean,
                        "best": bool(cell and cell.best), "tied": bool(cell and cell.tied),
                    })  # fmt: skip
    return cells


# Figures

# Okabe and Ito's colours, which colour-blind readers tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def spread(values):
    """Mean and standard deviation over seeds, the first axis; 0 for a single one."""
    values = np.array(values, dtype=float)
    return values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])


def curve(axes, seeds, part, metric, label):
    """Mean over seeds of a metric at each epoch, in a band of one standard deviation."""
    mean, std = spread(
        [[entry[part][metric] for entry in v.result.content["history"]] for v in seeds.values()]
    )
    epochs = np.arange(1, len(mean) + 1)
    (line,) = axes.plot(epochs, mean, label=label, marker="o" if len(epochs) < 6 else None)
    axes.fill_between(epochs, mean - std, mean + std, color=line.get_color(), alpha=0.2, linewidth=0)
    longest = max(len(epochs), *(len(drawn.get_xdata()) for drawn in axes.lines))
    step = -(-longest // 10)
    axes.set(xlabel="epoch", xlim=(0.5, longest + 0.5), xticks=range(max(1, step), longest + 1, step))
    axes.set_ylabel(f"{'validation' if part == 'valid' else part} {metric}")


def legend(figure, axes, title=None):
    """One legend for all panels, below them."""
    handles, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels))
    columns = 5 if longest < 12 else 3 if longest < 30 else 1
    figure.legend(handles, labels, title=title, loc="outside lower center", ncols=columns, frameon=False)


def draw_overfitting(figure, name, found):
    seeds = found["custom", "accuracy"]
    for axes, metric in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
        for part, label in (("train", "train"), ("valid", "validation")):
            curve(axes, seeds, part, metric, label)
        axes.set_ylabel(metric)
    legend(figure, axes)


def draw_confusion(figure, name, found):
    results = [value.result.content for value in found["custom", "accuracy"].values()]
    names = results[0]["data"]["classes"]
    counts = sum(np.array(content["confusion"]) for content in results)
    share = counts / counts.sum(1, keepdims=True).clip(1)
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(share):
        colour = "white" if value > 0.5 else "black"
        axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted class", ylabel="true class (each row sums to 100 %)")
    axes.spines[:].set_visible(False)
    axes.grid(False)


def panels(figure, rows):
    """{row: axes}, two beside each other, each with its row as title."""
    grid = figure.subplots(-(-len(rows) // 2), min(2, len(rows)), squeeze=False, sharey=True)
    for axes, row in itertools.zip_longest(grid.flat, rows):
        axes.set_title(row, fontsize=11)
        axes.set_visible(row is not None)
    return dict(zip(rows, grid.flat, strict=False))


def draw_curves(figure, name, found):
    """Validation accuracy by epoch. Where columns are settings: a panel for each row and a line for each column;
    else one panel with a line for each row."""
    rows, columns = shown(name, (), found)
    rows = [row for row in rows if any(row == other for other, _ in found)]
    if isinstance(TABLES[name].columns, str):
        for row, axes in panels(figure, rows).items():
            for column in [column for column in columns if (row, column) in found]:
                curve(axes, found[row, column], "valid", "accuracy", column)
    else:
        axes = figure.subplots()
        for row in rows:
            curve(axes, found[row, "accuracy"], "valid", "accuracy", row)
    fullest = max(figure.axes, key=lambda axes: len(axes.lines))
    legend(figure, fullest, name.replace("-", " "))


def draw_augmentation(figure, name, found):
    """Test accuracy by augmentation, a panel for each network, with the baseline as a line."""
    rows, columns = shown(name, (), found)
    rows = [row for row in rows if any(row == other for other, _ in found)]
    columns = [column for column in columns if column != "none"]
    for row, axes in panels(figure, rows).items():
        if (row, "none") in found:
            mean, std = spread([value.number() for value in found[row, "none"].values()])
            axes.axhline(mean, color="0.4", linestyle="--", label="no augmentation")
            axes.axhspan(mean - std, mean + std, color="0.4", alpha=0.15, linewidth=0)
        for place, column in enumerate(columns):
            if (row, column) in found:
                mean, std = spread([value.number() for value in found[row, column].values()])
                axes.errorbar(
                    place, mean, std, marker="o", capsize=4, color=COLOURS[0], label="with augmentation"
                )
        axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
        axes.set(xlim=(-0.5, len(columns) - 0.5))
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("test accuracy")
    handles, labels = next(iter(panel for panel in figure.axes)).get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(once.values(), once.keys(), loc="outside lower center", ncols=2, frameon=False)


def draw_methods(figure, name, found):
    """Test accuracy over the share of the training images, a line for each method."""
    axes = figure.subplots()
    rows, columns = shown(name, (), found)
    for column, colour in zip(columns, itertools.cycle(COLOURS)):
        points = [
            (float(row), [v.number() for v in found[row, column].values()])
            for row in rows
            if (row, column) in found
        ]
        means, stds = zip(*(spread(values) for _, values in points), strict=True)
        axes.errorbar([p for p, _ in points], means, stds, marker="o", capsize=3, color=colour, label=column)
    axes.set(xscale="log", xlabel="share of the training images", ylabel="test accuracy")
    axes.set_xticks([float(row) for row in rows], [f"{100 * float(row):g} %" for row in rows])
    axes.minorticks_off()
    legend(figure, axes)


def draw_gate(figure, name, found):
    results = [value.result.content for value in found["mixture", "accuracy"].values()]
    weights = np.mean([content["gate"] for content in results], axis=0)  # (classes, experts)
    names, axes = results[0]["data"]["classes"], figure.subplots()
    left = np.zeros(len(names))
    for expert, colour, share in zip(("base", "vehicles", "animals"), COLOURS, weights.T, strict=False):
        axes.barh(names, share, left=left, color=colour, label=f"{expert} expert")
        left += share
    axes.invert_yaxis()
    axes.set(xlabel="mean weight of the expert", ylabel="true class", xlim=(0, 1))
    legend(figure, axes)


FIGURES = {  # of a table: name of the files, function, size in inches, title, what is drawn
    "overfitting": ("overfitting", draw_overfitting, (9, 4.4), "Overfitting, custom network", "bands: mean ± std"),
    "initial": ("confusion", draw_confusion, (6.4, 6), "Confusion matrix, custom network", "test split, mean over seeds"),
    "augmentation": ("augmentation-accuracy", draw_augmentation, (9, 7.4), "Augmentation", "bars, band: mean ± std"),
    "learning-rate": ("learning-rate", draw_curves, (9, 7), "Learning rate, on hybrid augmentation", "bands: mean ± std"),
    "optimizer": ("optimizer", draw_curves, (6.4, 5), "Optimizer, custom network on hybrid", "bands: mean ± std"),
    "weight-decay": ("weight-decay", draw_curves, (9, 7), "Weight decay", "bands: mean ± std"),
    "dropout": ("dropout", draw_curves, (6.4, 5), "Dropout, custom network on hybrid", "bands: mean ± std"),
    "moe": ("moe-gate", draw_gate, (6.4, 5), "Gate of the mixture of custom networks", "test split, mean over seeds"),
    "beyond-moe": ("beyond-moe-gate", draw_gate, (6.4, 5), "Gate of the mixture of custom networks, trained adapters",
                   "test split, mean over seeds"),
    "beyond-fewshot": ("fewshot", draw_methods, (7.4, 5.6), "Few-shot embedding and custom network",
                       "bars: mean ± std"),
}  # fmt: skip


def draw_figures(blocks, folder):
    """Save every figure that there are results for, as PNG and SVG. With several data sets, a figure's name says which
    (without one: CINIC-10); so does it say what else tells two figures of a table apart."""
    try:
        from matplotlib import cycler, rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("figures need matplotlib: pip install matplotlib") from None
    style = {"axes.prop_cycle": cycler(color=COLOURS), "axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3, "font.size": 11,
             "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "figure"}  # fmt: skip
    data_sets = {(r.settings["data"], r.settings.get("fingerprint")) for r in results_of(blocks.values())}
    folder.mkdir(parents=True, exist_ok=True)
    for (name, group), found in blocks.items():
        file, draw, size, title, what = FIGURES.get(name, (None,) * 5)
        if draw is None or (
            draw in (draw_confusion, draw_overfitting) and ("custom", "accuracy") not in found
        ):
            continue
        groups = [set(other) for table, other in blocks if table == name]
        data = {"data", "fingerprint"} if len(data_sets) > 1 else set()
        told = [entry for entry in group if entry[0] in data or not all(entry in other for other in groups)]
        results = results_of([found])
        seeds = sorted({len(values) for values in found.values()})
        settings = [(key, value) for key, value in group if key not in ("epochs", "episodes")]
        about = f"{describe(settings, results)}, {lengths(results)}; {what}, n = {'–'.join(map(str, {seeds[0], seeds[-1]}))}"
        with rc_context(style):
            figure = Figure(figsize=size, layout="constrained")
            draw(figure, name, found)
            figure.suptitle(f"{title}\n{about}", fontsize=11)
            path = folder / f"{slug(file, told)}.png"
            figure.savefig(path, dpi=130)
            figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        print(path, file=sys.stderr)


def print_results(blocks, args):
    if args.format in STYLES:
        print_tables(blocks, STYLES[args.format], not args.no_published, args.results)
        return
    cells = flat(blocks, not args.no_published)
    if args.format == "json":
        print(json.dumps(cells, indent=1))
    elif cells:
        writer = csv.DictWriter(sys.stdout, cells[0])
        writer.writeheader()
        writer.writerows(cells)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results", nargs="?", type=Path, default=Path("results"), help="(default: %(default)s)"
    )
    parser.add_argument(
        "--format", default="github", choices=(*STYLES, "csv", "json"), help="(default: %(default)s)"
    )
    parser.add_argument(
        "--figures", type=Path, metavar="FOLDER", help="draw the figures there, as PNG and SVG"
    )
    parser.add_argument("--no-published", action="store_true", help="leave the slides' numbers out")
    args = parser.parse_args()
    results = read(args.results)
    if not results:
        what = "no results in" if args.results.is_dir() else "there is no folder"
        raise SystemExit(f"{what} {args.results}: run train.py or run_all.sh first")
    blocks, unused = arrange(results)
    try:
        print_results(blocks, args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    for folder in sorted({r.path.parent for r in unused}):
        print(f"in no table: {folder}", file=sys.stderr)
    if args.figures:
        try:
            draw_figures(blocks, args.figures)
        except OSError as error:
            raise SystemExit(f"--figures {args.figures}: {error}") from None


if __name__ == "__main__":
    main()
