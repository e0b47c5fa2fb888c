"""Turn result files into tables and figures, with the slides' numbers beside ours.

    python aggregate.py results                          # every table, as GitHub shows it
    python aggregate.py results --format latex           # also csv, json
    python aggregate.py results --figures figures        # the figures too (needs matplotlib)

Rows and columns are those of the study in `study.py`. A table holds the results of one data set, one fraction of it
(unless its rows are fractions) and one number of epochs: others get tables of their own. Cells are mean ± standard
deviation (n - 1) over the seeds found.
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
import statistics
import sys
from pathlib import Path

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


# A run of the study. script: a key of SCRIPTS; settings: all its settings; given: those that its line in study.py gives
Line = collections.namedtuple("Line", "script settings given")

# Recorded with a run, but irrelevant to what was trained
NO_SETTING = set(runs.NEUTRAL) - {"amp", "data", "classes"}
# Settings that tables compare: a result that differs from a line of the study in one of these is a different run. One
# that differs in another setting (data, epochs, fraction) goes into a separate table
STUDIED = {"arch", "pretrained", "aug", "dropout", "lr", "optimizer", "weight_decay", "stem", "schedule", "label_smoothing",
           "classes"}  # fmt: skip


def complete(script, config):
    """All settings of a run: those given, otherwise its script's defaults. query is None if it is the fraction's."""
    settings = vars(SCRIPTS[script].make_parser().parse_args([])) | config
    settings["data"] = os.path.normpath(settings["data"])
    if script == "fewshot" and settings["query"] == fewshot.default_query(settings["fraction"]):
        settings["query"] = None
    return {key: value for key, value in settings.items() if key not in NO_SETTING}


def differing(settings, others):
    """The settings that have another value in `others`, or none."""
    return {key: value for key, value in settings.items() if value != others.get(key)}


def read_study():
    """{table: {network: its lines of study.py}}. Raises ValueError for an invalid line."""
    tables = collections.defaultdict(lambda: collections.defaultdict(list))
    for names, script, words in study.lines():
        if script in SCRIPTS:  # augment.py draws a picture
            settings = complete(script, vars(SCRIPTS[script].make_parser().parse_args(words)))
            line = Line(script, settings, differing(settings, complete(script, {})))
            for name in names:
                tables[name][settings.get("arch", script)].append(line)
    return tables


try:
    STUDY = read_study()
except ValueError as error:
    raise SystemExit(f"the study in study.py: {error}") from None


# The tables


# title: None for a figure's; rows: a setting, `network`, `run` (what it adds to the run above) or `part` (of a mixture's
# result); columns: a setting, `method`, or a tuple of columns that every row has
Table = collections.namedtuple("Table", "title rows columns")

COLUMNS = {  # part of a result file, metric; other columns show the test accuracy of a setting or method
    **{metric: ("test", metric) for metric in METRICS},
    "accuracy with mirror images": ("test_tta", "accuracy"),
    "1 prototype": ("one_prototype", "accuracy"),
    "nearest image": ("nearest_image", "accuracy"),
    "parameters": ("test", "parameters"),
    "training cost, in bases": ("test", "bases"),
}
COSTS = {"parameters": "{:,.0f}", "training cost, in bases": "{:.1f}"}  # the same for every seed
PARTS = {row: part for part, row in moe.ROWS.items()}  # rows of a mixture's table
START = {True: ", pretrained", False: ", from scratch"}  # a network that starts differently than in the study
METHODS = {  # script and schedule of a run: the methods it has results for
    ("fewshot", "none"): ("few-shot", "1 prototype", "nearest image"),
    ("train", "none"): ("regular training",),
    ("train", "onecycle"): ("regular training, one-cycle",),
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
    "beyond": Table("Beyond the study", "run", ("accuracy", "f1", "loss", "accuracy with mirror images")),
    "beyond-moe": Table("Beyond the study: mixture of experts", "part", MIXTURE),
    "beyond-fewshot": Table("Few-shot learning and regular training, accuracy", "fraction", "method"),
}  # fmt: skip
for name in STUDY:  # tables that only study.py names
    TABLES.setdefault(name, Table(name.replace("-", " ").capitalize(), "run", METRICS))


def read_published(text):
    """{(table, row, column): (mean, std)}, std None for a single seed. text: one block per table, columns first."""
    numbers = {}
    for block in text.strip().split("\n\n"):
        (name, *columns), *rows = (line.split() for line in block.splitlines())
        for row, *cells in rows:
            for column, cell in zip(columns, cells, strict=True):
                mean, _, std = cell.partition("±")
                numbers[name, row, column] = (float(mean), float(std) if std else None)
    return numbers


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
    """A setting's value as tables show it: 0.00005, never 5e-05."""
    return np.format_float_positional(value, trim="-") if isinstance(value, float) else str(value)


def in_words(settings):
    """Settings in words: `30 epochs, schedule onecycle`."""
    words = []
    for key, value in settings.items():
        if key in ("epochs", "episodes"):
            words.append(f"{value} {key if value > 1 else key[:-1]}")
        elif key == "fraction":
            words.append(f"{100 * value:g} % of train")
        else:
            words.append(key.replace("_", " ") + ("" if value is True else f" {text_of(value)}"))
    return ", ".join(words)


def lay_out(name):
    """The lines of a table: (line, (row, column) of each cell it fills, row it builds on). A run builds on the one
    above of its network if it only adds settings. A line that would fill another's cells gets its own row."""
    table, layout, taken = TABLES[name], [], set()
    for network, lines in STUDY[name].items():
        row, above = None, {}
        for line in lines:
            adds = above.items() <= line.given.items()
            added = in_words(differing(line.given, {"arch": network} | (above if adds else {})))
            start = line.settings.get("pretrained")
            base, row, above = row if adds else None, network, line.given
            if table.rows == "run" and added:
                row += (" + " if adds else ": ") + added
            elif table.rows == "network" and start != lines[0].settings["pretrained"]:
                row += START[start]
            elif table.rows not in ("run", "network", "part"):
                row = text_of(line.settings[table.rows])
            if taken & set(places(table, line, row)):
                row += f" ({in_words(line.given)})"
            layout.append((line, places(table, line, row), base))
            taken |= set(layout[-1][1])
    return layout


def places(table, line, row):
    """The (row, column) of each cell that a line fills."""
    columns = table.columns
    if columns == "method":
        columns = METHODS.get((line.script, line.settings["schedule"]), ())
    elif isinstance(columns, str):
        columns = [text_of(line.settings[columns])]
    rows = [row] if table.rows != "part" else PARTS if line.script == "moe" else []
    return list(itertools.product(rows, columns))


LAYOUT = {name: lay_out(name) for name in TABLES}


# Results


# A result file. settings: all settings of its run; common: what all seeds of a run must share
Result = collections.namedtuple("Result", "path script settings seed common content")


def read(folder):
    """The finished runs below a folder, a list of Result. Unusable files are reported on standard error."""
    results, runs_read, fingerprints = [], collections.defaultdict(list), collections.defaultdict(set)
    for path in sorted(Path(folder).rglob("seed*.json")):
        try:
            result = understand(path)
            siblings = runs_read[result.script, frozenset(result.settings.items())]
            for other in siblings:
                if other.seed == result.seed:
                    raise ValueError(f"the same run as {other.path}")
                for what, value in other.common.items():
                    if (ours := result.common[what]) != value:
                        raise ValueError(f"{what} {ours}, and {value} in seed {other.seed} of its run")
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            print(f"left out: {path}: {reason}", file=sys.stderr)
            continue
        siblings.append(result)
        results.append(result)
        fingerprints[result.settings["data"]].add(result.common["data fingerprint"])
    for result in results:
        if len(fingerprints[result.settings["data"]]) > 1:  # data sets with the same name, in separate tables
            result.settings["fingerprint"] = result.common["data fingerprint"]
    return sorted(results, key=lambda result: result.seed)


def understand(path):
    """Read a Result. Raises ValueError for an unfinished run, and whatever Python raises for other files."""
    content = json.loads(path.read_text())
    if content["version"] != 1:
        raise ValueError(f"version {content['version']}, and this program reads version 1")
    config, environment, history = content["config"], content["environment"], content["history"]
    script = "fewshot" if "way" in config else "moe" if "train_adapters" in config else "train"
    settings = complete(script, config)
    if script != "fewshot" and len(history) != settings["epochs"]:
        raise ValueError(f"half a run: {len(history)} of {settings['epochs']} epochs")
    splits = ("train",) if script == "fewshot" else ("train", "valid")
    tested = {"test", *(content.keys() & {*PARTS.values(), *(part for part, _ in COLUMNS.values())})}
    parts = [content[name] for name in tested]
    parts += [entry[split] for entry in history for split in splits]
    if not all(math.isfinite(part[metric]) for part in parts for metric in METRICS):
        raise ValueError("a metric is not finite")
    classes = len(content["data"]["classes"])
    if np.shape(content["confusion"]) != (classes, classes):
        raise ValueError(f"confusion is not of {classes} classes")
    if script == "moe" and np.shape(content["gate"]) != (classes, 3):
        raise ValueError(f"gate is not of {classes} classes and 3 experts")
    for part, cost in content.get("cost", {}).items():
        content[part] |= cost
    common = {
        "data set": content["data"]["name"],
        "data fingerprint": content["data"]["fingerprint"],
        "dtype": environment["dtype"],
        "major version of torch": environment["torch"].split(".")[0],
    }
    common = {what: str(value) for what, value in common.items()}
    return Result(path, script, settings, int(config["seed"]), common, content)


# One table. group: {setting: value} in which all its results differ from the study; found: {(row, column): results};
# notes: settings of single cells; cells: a Cell for each row and column, row by row
Block = collections.namedtuple("Block", "name group found notes cells")


def arrange(results, published):
    """A Block for each table that has results, those with the study's own settings first; and the results in no table.

    A table whose results all appear together in another table is omitted.
    """
    tables, paths, used = collections.defaultdict(dict), collections.defaultdict(set), set()
    own = complete("train", {}).keys() ^ complete("fewshot", {}).keys()
    for name, result in itertools.product(TABLES, results):
        differs, cells = nearest(name, result)
        if differs is None:
            continue
        used.add(result.path)
        start = START[differs.pop("pretrained")] if "pretrained" in differs else ""
        words = ""
        if name == "fewshot" or TABLES[name].columns == "method":  # episodes or epochs: no table of their own
            words = in_words({key: differs.pop(key) for key in list(differs) if key in own})
        key = name, tuple(sorted(differs.items()))
        for row, column in cells:
            tables[key].setdefault((row + start, column), {}).setdefault(words, []).append(result)
            paths[key].add(result.path)
    keys = sorted(tables, key=lambda key: (TABLES[key[0]].columns == "method", len(key[1])))
    for number, key in enumerate(keys):
        if any(paths[key] <= paths[other] for other in keys[:number]):
            del tables[key]
    blocks = [Block(name, dict(group), *unite(variants), []) for (name, group), variants in tables.items()]
    blocks = [block._replace(cells=cells_of(block, published)) for block in blocks]
    blocks.sort(key=lambda block: (len(block.group), str(block.group)))
    return blocks, [result for result in results if result.path not in used]


def unite(variants):
    """{(row, column): results} and notes, from {(row, column): {settings in words: results}}. Settings that differ from
    the study's are in a note if the cell has no others, else in the name of a column of their own."""
    found, rows = {}, collections.defaultdict(list)
    for (row, column), by_words in sorted(variants.items()):
        for words, results in by_words.items():
            if words and len(by_words) > 1:
                found[row, f"{column} ({words})"] = results
                continue
            found[row, column] = results
            if words:
                rows[f"{results[0].script}.py", words].append(row)
    notes = [f"{script} at {', '.join(dict.fromkeys(at))}: {words}" for (script, words), at in rows.items()]
    return found, notes


def nearest(name, result):
    """The line of a table that is closest to a result and differs in no studied setting: {setting: the result's value}
    where they differ, and the line's cells. (None, None) if there is none."""
    fits = []
    for line, cells, _ in LAYOUT[name]:
        fixed = {*STUDIED, *line.given, TABLES[name].rows}
        fixed -= {"pretrained"} if TABLES[name].rows == "network" else set()
        differs = differing(result.settings, line.settings)
        if result.script == line.script and not fixed & differs.keys():
            fits.append((differs, cells))
    return min(fits, key=lambda fit: len(fit[0]), default=(None, None))


# Cells

# What csv and json print. std: n - 1, None for a single seed. tied: not significantly different from the best by Welch's test
FIELDS = "group table row column mean std seeds slides_mean slides_std difference best tied"
Cell = collections.namedtuple("Cell", FIELDS)


def cells_of(block, published):
    """The cells of a table, row by row. published: as PUBLISHED."""
    table, group, cells = TABLES[block.name], describe(block), []
    places = itertools.product(*labels(block))
    values = {place: numbers(block.found.get(place, []), *place) for place in places}
    comparable = not block.group and not block.notes
    axis = 0 if isinstance(table.columns, str) else 1  # mark the best of a row, or of a column?
    for place, seeds in values.items():
        mean = float(np.mean(seeds)) if seeds else None
        std = float(np.std(seeds, ddof=1)) if len(seeds) > 1 and place[1] not in COSTS else None
        theirs = published.get((block.name, *place)) if seeds and comparable else None
        difference = mean - theirs[0] if theirs else None
        rivals = [others for other, others in values.items() if others and other[axis] == place[axis]]
        best = tied = False
        if seeds and len(rivals) > 1 and place[1] not in COSTS and (axis == 0 or table.rows != "fraction"):
            first = (min if place[1] == "loss" else max)(rivals, key=np.mean)
            best = seeds is first
            tied = not best and min(len(seeds), len(first)) >= 3 and p_value(seeds, first) > 0.05
        ours = (group, table.title, *place, mean, std, len(seeds))
        cells.append(Cell(*ours, *(theirs or (None, None)), difference, best, tied))
    return cells


def labels(block):
    """Labels of rows and columns, numbers sorted. The slides' tables show the whole study, except fractions for which
    another data set may have too few images, and networks present with the other start; other tables show what has
    results."""
    table, slides = TABLES[block.name], not block.name.startswith("beyond")
    cells = [cell for _, cells, _ in LAYOUT[block.name] for cell in cells]
    all_rows, all_columns = (sorted(dict.fromkeys(axis), key=size) for axis in zip(*cells, strict=True))
    filled = {place[1] for place, results in block.found.items() if numbers(results, *place)}
    filled |= set(all_columns) if slides else set()
    columns = sorted(filled, key=lambda label: (all_columns.index(label.split(" (")[0]), label))
    counts, rows = collections.Counter(row for row, _ in block.found), []
    for row in all_rows:
        others = [row + start for start in START.values() if row + start in counts]
        if row in counts and isinstance(table.columns, str):
            others = [other for other in others if counts[other] > 1]  # more than the baseline
        if row in counts or (slides and not others and not (block.group and table.rows == "fraction")):
            rows.append(row)
        rows += [other for other in others if other not in all_rows]
    return rows, columns


def size(label):
    """A sort key: numbers by size, other labels in the study's order."""
    return float(label) if re.fullmatch(r"[\d.]+", label) else math.inf


def numbers(results, row, column):
    """The numbers in a cell, one per seed that has it."""
    part, metric = COLUMNS.get(column.split(" (")[0], ("test", "accuracy"))
    part = PARTS.get(row, part)
    if part in ("pair", "ensemble"):
        results = results[:1]  # the same networks whatever the seed
    return [r.content[part][metric] for r in results if metric in r.content.get(part, {})]


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


def describe(block, but=()):
    """The data set, then the settings in which a table differs from the study, except those in `but`."""
    (first, *_), *_ = block.found.values()
    data_set = first.common["data set"].replace("cinic10", "CINIC-10")
    settings = in_words({key: value for key, value in block.group.items() if key not in ("data", *but)})
    return f"{data_set}, {settings}" if settings else data_set


def caption(block):
    """Data set, settings and length of training."""
    settings = [result.settings for results in block.found.values() for result in results]
    lengths = {(key, run[key]) for run in settings for key in ("epochs", "episodes") if key in run}
    lengths = " or ".join(in_words(dict([length])) for length in sorted(lengths))
    return f"{describe(block, but=('epochs', 'episodes'))}, {lengths}"


def slug(name, group):
    """A file name or label that includes a group's settings."""
    return name + re.sub(r"[^\w.]+", "-", "".join(f"-{key}-{text_of(value)}" for key, value in group.items()))


def command(block, folder):
    """The command that fills a table's empty cells. folder: the results folder."""
    settings = dict(block.group)
    data, _ = settings.pop("data", None), settings.pop("fingerprint", None)
    seeds = sorted({result.seed for results in block.found.values() for result in results})
    pretrained = {"resnet18", "efficientnet_b0"} & {row for row, _ in block.found}
    words = ["bash", "run_all.sh", "--only", block.name]
    words += ["--data", data] if data else []
    words += ["--out", str(folder)] if str(folder) != "results" else []
    words += ["--seeds", " ".join(map(str, seeds))] if seeds != [1, 2, 3] else []
    words += ["--from-scratch"] if data and TABLES[block.name].rows == "network" and not pretrained else []
    words += ["--"] if settings else []
    for key, value in settings.items():
        words += [f"--{key.replace('_', '-')}"] + ([] if value is True else [text_of(value)])
    return shlex.join(words)


def escaped(text):
    """Text escaped for LaTeX, with a minus sign in front of numbers, and bold between `**`."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {"±": r"$\pm$", "≈": r"$\approx$", "<": "$<$", ">": "$>$", "−": "$-$"}
    special |= {character: f"\\{character}" for character in "&%$#_{}"}
    text = "".join(special.get(character, character) for character in re.sub(r"^-(?=\d)", "−", text))
    return re.sub(r"\*\*(.+)\*\*", r"\\textbf{\1}", text)


def print_tables(blocks, args):
    """Print every table, as GitHub shows it or for LaTeX."""
    heading, note, show = ("%", "% ", latex_table) if args.format == "latex" else ("##", "", github_table)
    if args.format == "latex":
        print("% in the preamble: \\usepackage{booktabs,graphicx}\n")
    group = None
    for block in blocks:
        if block.group != group:
            group = block.group
            print(f"{heading} {describe(block)}\n")
            if group and not args.no_published:
                text = "Not CINIC-10 with the study's settings: the published numbers are not comparable."
                print(f"{note}{text}\n")
        usual = statistics.mode(cell.seeds for cell in block.cells if cell.seeds)  # cells need not say it
        print(show(block, written(block, usual), explanation(block, usual)) + "\n")
        if any((cell.row, cell.column) not in block.found for cell in block.cells):
            print(f"{note}Missing: `{command(block, args.results)}`\n")


def written(block, usual):
    """The rows of a printed table, header first: ours and, if available, the slides' and the difference."""
    rows = TABLES[block.name].rows
    corner = "" if rows in ("network", "run", "part") else rows.replace("_", " ")
    lines = [[corner, *dict.fromkeys(cell.column for cell in block.cells)]]
    accuracy = {cell.row: cell.mean for cell in block.cells if cell.column == "accuracy" and cell.seeds}
    bases = {cells[0][0]: base for _, cells, base in LAYOUT[block.name] if base in accuracy}
    for row, cells in itertools.groupby(block.cells, key=lambda cell: cell.row):
        cells = list(cells)
        lines.append([row, *(our_number(cell, usual) for cell in cells)])
        if rows == "run":
            gains = row in accuracy and row in bases
            lines[-1].append(signed(accuracy[row] - accuracy[bases[row]] if gains else None))
        if any(cell.slides_mean is not None for cell in cells):
            lines.append(["slides", *(mean_and_std(cell.slides_mean, cell.slides_std) for cell in cells)])
            lines.append(["difference", *(signed(cell.difference) for cell in cells)])
    lines[0] += ["gain"] if rows == "run" else []
    return lines


def our_number(cell, usual):
    if cell.seeds and cell.column in COSTS:
        return COSTS[cell.column].format(cell.mean)
    text = mean_and_std(cell.mean, cell.std) or "-"
    text += f" (n = {cell.seeds})" if cell.seeds not in (0, usual) else ""
    text = f"**{text}**" if cell.best else text
    return f"{text} ≈" if cell.tied else text


def explanation(block, usual):
    """What a table's numbers and marks mean."""
    text = f"Mean ± standard deviation over n = {usual} seeds"
    if usual == 1:
        text = "One seed (n = 1) unless a cell says otherwise"
    marked = [cell for cell in block.cells if cell.best or cell.tied]
    if marked:
        text += f"; bold: best of its {'row' if isinstance(TABLES[block.name].columns, str) else 'column'}"
    if any(cell.tied for cell in marked):
        seeds = span(cell.seeds for cell in marked if cell.seeds > 2)
        text += f"; ≈: not significantly different from the best (Welch, p > 0.05, n = {seeds})"
    counts = {cell.seeds for cell in block.cells if cell.seeds}
    if marked and min(counts) < 3 <= max(counts):
        text += "; not tested where a cell or the best has n < 3"
    return "; ".join([text, *block.notes]) + "."


def span(counts):
    """`3`, or `1–3` if the counts differ."""
    first, *others = sorted(set(counts))
    return f"{first}–{others[-1]}" if others else str(first)


def mean_and_std(mean, std):
    text = "" if mean is None else f"{mean:.4f}"
    return text if std is None else f"{text} ± {std:.4f}"


def signed(number):
    return "" if number is None else f"{number:+.4f}"


def github_table(block, lines, text):
    aligned = ["left"] + ["right"] * (len(lines[0]) - 1)
    table = tabulate.tabulate(lines, "firstrow", "github", disable_numparse=True, colalign=aligned)
    return f"### {TABLES[block.name].title}\n\n{table}\n\n{text}"


def latex_table(block, lines, text):
    """A table environment, no wider than the text."""
    caption_text = escaped(f"{TABLES[block.name].title}: {caption(block)}, test split. {text}")
    head, *body = [" & ".join(map(escaped, line)) + r" \\" for line in lines]
    return "\n".join([
        r"\begin{table}", r"\centering", r"\setlength{\belowcaptionskip}{6pt}", rf"\caption{{{caption_text}}}",
        rf"\label{{{slug(f'tab:{block.name}', block.group)}}}",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * (len(lines[0]) - 1)}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule",
        r"\end{tabular}}", r"\end{table}",
    ])  # fmt: skip


# Figures

# Okabe and Ito's colours, distinguishable by colour-blind readers
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def curve(axes, results, part, metric, label, colour):
    """Plot a metric's mean over seeds by epoch, with a band of one standard deviation."""
    values = np.array([[entry[part][metric] for entry in r.content["history"]] for r in results])
    mean, std = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else 0
    epochs = np.arange(1, len(mean) + 1)
    axes.plot(epochs, mean, label=label, color=colour, marker="o" if len(epochs) < 6 else None)
    axes.fill_between(epochs, mean - std, mean + std, color=colour, alpha=0.2, linewidth=0)
    longest = max(len(drawn.get_xdata()) for drawn in axes.lines)
    step = -(-longest // 10)
    axes.set(xlabel="epoch", xlim=(0.5, longest + 0.5), xticks=range(step, longest + 1, step))


def legend(figure, title=None):
    """One legend for all panels, below them."""
    handles = {}
    for axes in figure.axes:
        handles |= {handle.get_label(): handle for handle in axes.get_legend_handles_labels()[0]}
    longest = max(map(len, handles))
    columns = 5 if longest < 12 else 3 if longest < 30 else 1
    place = {"loc": "outside lower center", "ncols": columns, "frameon": False}
    figure.legend(handles.values(), handles.keys(), title=title, **place)


def panels(figure, titles):
    """{title: axes}, two per row."""
    grid = figure.subplots(-(-len(titles) // 2), min(2, len(titles)), squeeze=False, sharey=True)
    for axes, title in itertools.zip_longest(grid.flat, titles):
        axes.set_title(title, fontsize=11)
        axes.set_visible(title is not None)
    return dict(zip(titles, grid.flat, strict=False))


def drawn_cells(block):
    """The cells with results, without rows that have only the recipe's own setting, if others have more."""
    recipe = text_of(complete("train", {}).get(TABLES[block.name].columns))
    cells = [cell for cell in block.cells if cell.seeds]
    compared = {cell.row for cell in cells if cell.column != recipe}
    return [cell for cell in cells if cell.row in compared or not compared]


# Each of these draws a table's figure, from the results of one cell or from the whole table


def draw_overfitting(figure, results):
    for axes, metric in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
        curve(axes, results, "train", metric, "train", COLOURS[0])
        curve(axes, results, "valid", metric, "validation", COLOURS[1])
        axes.set_ylabel(metric)
    legend(figure)


def draw_confusion(figure, results):
    names = results[0].content["data"]["classes"]
    counts = sum(np.array(result.content["confusion"]) for result in results)
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


def draw_gate(figure, results):
    names, axes = results[0].content["data"]["classes"], figure.subplots()
    weights = np.mean([result.content["gate"] for result in results], axis=0)  # (classes, experts)
    left = np.zeros(len(names))
    for expert, share in zip(("base", "vehicles", "animals"), weights.T, strict=True):
        axes.barh(names, share, left=left, label=f"{expert} expert")
        left += share
    axes.invert_yaxis()
    axes.set(xlabel="mean weight of the expert", ylabel="true class", xlim=(0, 1))
    legend(figure)


def draw_curves(figure, block):
    """Validation accuracy by epoch. If columns are settings: a panel per row and a line per column; otherwise one
    panel with a line per row."""
    by_setting, cells = isinstance(TABLES[block.name].columns, str), drawn_cells(block)
    lines = {(c.row, c.column) if by_setting else ("", c.row): block.found[c.row, c.column] for c in cells}
    axes_of = panels(figure, dict.fromkeys(title for title, _ in lines))
    colours = dict(zip(dict.fromkeys(label for _, label in lines), itertools.cycle(COLOURS), strict=False))
    for (title, label), results in lines.items():
        curve(axes_of[title], results, "valid", "accuracy", label, colours[label])
        axes_of[title].set_ylabel("validation accuracy")
    legend(figure, block.name.replace("-", " "))


def draw_augmentation(figure, block):
    """Test accuracy by augmentation, a panel for each network, with the baseline as a line."""
    cells = drawn_cells(block)
    columns = [column for column in dict.fromkeys(cell.column for cell in block.cells) if column != "none"]
    axes_of = panels(figure, dict.fromkeys(cell.row for cell in cells))
    for cell in cells:
        axes, mean, std = axes_of[cell.row], cell.mean, cell.std or 0
        if cell.column == "none":
            axes.axhline(mean, color="0.4", linestyle="--", label="no augmentation")
            axes.axhspan(mean - std, mean + std, color="0.4", alpha=0.15, linewidth=0)
        else:
            style = {"marker": "o", "capsize": 4, "color": COLOURS[0], "label": "with augmentation"}
            axes.errorbar(columns.index(cell.column), mean, std, **style)
    for axes in axes_of.values():
        axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
        axes.set(xlim=(-0.5, len(columns) - 0.5))
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("test accuracy")
    legend(figure)


def draw_methods(figure, block):
    """Test accuracy by fraction of the training images, a line per method."""
    axes = figure.subplots()
    for method in dict.fromkeys(cell.column for cell in block.cells):
        cells = [cell for cell in block.cells if cell.column == method and cell.seeds]
        shares, means = [float(cell.row) for cell in cells], [cell.mean for cell in cells]
        axes.errorbar(shares, means, [cell.std or 0 for cell in cells], marker="o", capsize=3, label=method)
    axes.set(xscale="log", xlabel="share of the training images", ylabel="test accuracy")
    shares = sorted({float(cell.row) for cell in block.cells})
    axes.set_xticks(shares, [f"{100 * share:g} %" for share in shares])
    axes.minorticks_off()
    legend(figure)


BANDS, MEAN = "bands: mean ± std", "test split, mean over seeds"
FIGURES = {  # for a table: file name, function, row of the cell it draws (None: all), size in inches, what is drawn, title
    "overfitting": ("overfitting", draw_overfitting, "custom", (9, 4.4), BANDS, "Overfitting, custom network"),
    "initial": ("confusion", draw_confusion, "custom", (6.4, 6), MEAN, "Confusion matrix, custom network"),
    "augmentation": ("augmentation-accuracy", draw_augmentation, None, (9, 7.4), "bars, band: mean ± std", "Augmentation"),
    "learning-rate": ("learning-rate", draw_curves, None, (9, 7), BANDS, "Learning rate, on hybrid augmentation"),
    "optimizer": ("optimizer", draw_curves, None, (6.4, 5), BANDS, "Optimizer, custom network on hybrid"),
    "weight-decay": ("weight-decay", draw_curves, None, (9, 7), BANDS, "Weight decay"),
    "dropout": ("dropout", draw_curves, None, (6.4, 5), BANDS, "Dropout, custom network on hybrid"),
    "moe": ("moe-gate", draw_gate, "mixture", (6.4, 5), MEAN, "Gate of the mixture of custom networks"),
    "beyond-moe": ("beyond-moe-gate", draw_gate, "mixture", (6.4, 5), MEAN,
                   "Gate of the mixture of custom networks, trained adapters"),
    "beyond-fewshot": ("fewshot", draw_methods, None, (7.4, 5.6), "bars: mean ± std", "Few-shot embedding and custom network"),
}  # fmt: skip


def draw_figures(blocks, folder):
    """Save every figure that has results, as PNG and SVG. If a table has several, their names include the settings in
    which they differ from the study."""
    try:
        from matplotlib import cycler, rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("figures need matplotlib: pip install matplotlib") from None
    style = {"axes.prop_cycle": cycler(color=COLOURS), "axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3, "font.size": 11,
             "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "figure"}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for block in blocks:
        file, draw, row, size, what, title = FIGURES.get(block.name, [None] * 6)
        places = [(cell.row, cell.column) for cell in drawn_cells(block)]
        results = [block.found[place] for place in places if row is None or place == (row, "accuracy")]
        if not file or not results:
            continue
        alone = sum(other.name == block.name for other in blocks) == 1
        path = folder / f"{slug(file, {} if alone else block.group)}.png"
        with rc_context(style):
            figure = Figure(figsize=size, layout="constrained")
            draw(figure, results[0] if row else block)
            figure.suptitle(f"{title}\n{caption(block)}; {what}, n = {span(map(len, results))}", fontsize=11)
            figure.savefig(path, dpi=130)
            figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        print(path, file=sys.stderr)


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add, default = parser.add_argument, "(default: %(default)s)"
    add("results", nargs="?", type=Path, default=Path("results"), help=default)
    add("--format", default="github", choices=("github", "latex", "csv", "json"), help=default)
    add("--figures", type=Path, metavar="FOLDER", help="draw the figures there, as PNG and SVG")
    add("--no-published", action="store_true", help="leave the slides' numbers out")
    args = parser.parse_args()
    results = read(args.results)
    if not results:
        what = "no results in" if args.results.is_dir() else "there is no folder"
        raise SystemExit(f"{what} {args.results}: run train.py or run_all.sh first")
    blocks, unused = arrange(results, {} if args.no_published else PUBLISHED)
    printed = [block for block in blocks if TABLES[block.name].title]
    cells = [cell for block in printed for cell in block.cells]
    try:
        if args.format == "json":
            print(json.dumps([cell._asdict() for cell in cells], indent=1))
        elif args.format == "csv":
            csv.writer(sys.stdout).writerows([Cell._fields, *cells])
        else:
            print_tables(printed, args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    for folder in sorted({result.path.parent for result in unused}):
        print(f"in no table: {folder}", file=sys.stderr)
    if args.figures:
        try:
            draw_figures(blocks, args.figures)
        except OSError as error:
            raise SystemExit(f"--figures {args.figures}: {error}") from None


if __name__ == "__main__":
    main()
