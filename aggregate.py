"""Result files in, tables and figures out, with the numbers of the slides beside ours.

    python aggregate.py results                          # every table, as GitHub shows it
    python aggregate.py results --format latex           # also plain, csv, json
    python aggregate.py results --figures figures        # the figures too (needs matplotlib)

A table holds the results of one data set, one fraction of it and one number of epochs: others get tables of their
own. Cells are mean ± standard deviation (n - 1) over the seeds found.
"""

import argparse
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

# What a setting is when nobody changes it: the recipe of the slides. A result whose other settings differ from it
# stands in a table of its own.
RECIPE = {
    "data": "cinic10", "classes": None, "fraction": 1.0, "epochs": 10, "batch_size": 64, "amp": "auto",
    "arch": None, "pretrained": False, "aug": None, "dropout": 0.0,
    "lr": 0.001, "optimizer": "adam", "momentum": 0.0, "weight_decay": 0.0,
    "steps_per_epoch": None, "stem": "imagenet", "schedule": "none", "label_smoothing": 0.0, "tta": "none",
    "way": 5, "shot": 5, "query": None, "episodes": 3000, "method": "episodes",
    "animals": "cat,dog,deer,horse", "train_adapters": False, "adapter_width": 1280,
}  # fmt: skip
STUDIED = ("arch", "pretrained", "aug", "dropout", "lr", "optimizer", "weight_decay", "stem", "schedule",
           "label_smoothing", "method")  # what tables compare  # fmt: skip
NO_SETTING = (
    "seed",
    "out",
    "root",
    "force",
    "device",
    "graph",
    "checkpoint_every",
)  # in a configuration, and no part of what was run
SCRIPTS = {"way": "fewshot.py", "animals": "moe.py"}  # a setting that only this script has; else train.py
QUERIES = {0.001: 2, 0.002: 5, 0.005: 5, 0.01: 10, 0.02: 10, 0.05: 15, 0.1: 20}
BATCHES = {0.001: 4, 0.002: 4, 0.005: 8, 0.01: 16, 0.02: 32, 0.05: 64, 0.1: 64}
METRICS = ("accuracy", "recall", "precision", "f1", "loss")
PARTS = {  # of a result file that hold METRICS: in each entry of the history, and beside it
    "train.py": (("train", "valid"), ("test",)),
    "fewshot.py": (("train",), ("test", "one_prototype", "nearest_image")),
    "moe.py": (("train", "valid"), ("test", "base", "ensemble")),
}
OPTIONAL = ("test_tta", "pair")  # parts that some runs have
OF_ROW = (
    "part",
    "after",
)  # in a row's settings, and no settings: the part it shows; the row that its gain is over


# The tables of the slides


class Table(NamedTuple):
    name: str  # as in `run_all.sh --only`
    title: str | None  # None: only a figure
    script: str
    rows: dict  # label: settings
    columns: dict  # label: (settings, part of a result file, metric)
    published: dict  # label of a row: (mean, std) of each column; std None: a single seed


def of_metrics(*names):
    return {name: ({}, "test", name) for name in names}


def of_settings(key, *values):
    return {str(value): ({key: value}, "test", "accuracy") for value in values}


ARCHS = {  # those that the slides do not have are shown where there are results
    "resnet18": {"arch": "resnet18", "pretrained": True},
    "resnet18, from scratch": {"arch": "resnet18"},
    "densenet121": {"arch": "densenet121"},
    "densenet121, pretrained": {"arch": "densenet121", "pretrained": True},
    "efficientnet_b0": {"arch": "efficientnet_b0", "pretrained": True},
    "efficientnet_b0, from scratch": {"arch": "efficientnet_b0"},
    "custom": {"arch": "custom"},
}


def architectures(**settings):
    return {label: {**arch, "aug": "none", **settings} for label, arch in ARCHS.items()}


def custom(aug="none", **settings):
    return {"arch": "custom", "aug": aug, **settings}


def ladder(arch):
    """What is beyond the slides' recipe, added one at a time: {row: settings}."""
    rungs = {
        "one-cycle": {"schedule": "onecycle"},
        "small stem": {"stem": "small"},
        "flip and translation": {"aug": "flip+translate"},
        "smoothed labels": {"label_smoothing": 0.1, "tta": "flip"},
    }
    settings = {"arch": arch, "aug": "none"}
    rows, last = {arch: settings}, arch
    for rung, added in rungs.items():
        if arch != "custom" or "stem" not in added:
            settings = settings | added
            rows[f"{arch} + {rung}"] = settings | {"after": last}
            last = f"{arch} + {rung}"
    sgd = {"optimizer": "sgd", "momentum": 0.9, "lr": 0.05, "weight_decay": 0.0005}
    return {
        **rows,
        f"{arch} + mirror images": settings | {"after": last, "part": "test_tta"},
        f"{arch}, by SGD": settings | sgd | {"after": last},
        f"{arch}, by SGD + mirror images": settings | sgd | {"after": f"{arch}, by SGD", "part": "test_tta"},
    }


# Published: N. Safiejko, W. Grabias, "Convolutional Neural Networks", 2025; test split of CINIC-10, three seeds (the
# mixture: one). Hybrid, learning rate and optimizer are from the report behind the slides.
# fmt: off
TABLES = (
    Table("overfitting", None, "train.py", {"custom": custom(epochs=30)}, of_metrics("accuracy"), {}),
    Table("initial", "Initial results", "train.py", architectures(), of_metrics(*METRICS), {
        "resnet18": [(0.6775, 0.0015), (0.6775, 0.0015), (0.6763, 0.0010), (0.6752, 0.0017), (0.9602, 0.0293)],
        "densenet121": [(0.7197, 0.0004), (0.7194, 0.0004), (0.7198, 0.0002), (0.7181, 0.0010), (0.8725, 0.0111)],
        "efficientnet_b0": [(0.7262, 0.0011), (0.7262, 0.0009), (0.7258, 0.0011), (0.7249, 0.0010), (0.8138, 0.0232)],
        "custom": [(0.7329, 0.0026), (0.7329, 0.0026), (0.7380, 0.0013), (0.7335, 0.0023), (0.8443, 0.0425)],
    }),
    Table("augmentation", "Basic augmentation, accuracy", "train.py", architectures(),
          of_settings("aug", "flip", "rotation", "crop", "jitter"), {
        "resnet18": [(0.6970, 0.0030), (0.6905, 0.0015), (0.6848, 0.0028), (0.6690, 0.0025)],
        "densenet121": [(0.6548, 0.0312), (0.7222, 0.0026), (0.7197, 0.0043), (0.7151, 0.0033)],
        "efficientnet_b0": [(0.7374, 0.0121), (0.7284, 0.0008), (0.7222, 0.0039), (0.1711, 0.0427)],
        "custom": [(0.7565, 0.0022), (0.7405, 0.0013), (0.7361, 0.0015), (0.6114, 0.0019)],
    }),
    Table("augmentation", "Advanced augmentation, accuracy", "train.py", architectures(),
          of_settings("aug", "autoaugment", "cutout"), {
        "resnet18": [(0.6771, 0.0013), (0.6827, 0.0055)],
        "densenet121": [(0.6858, 0.0118), (0.7226, 0.0022)],
        "efficientnet_b0": [(0.7160, 0.0025), (0.7252, 0.0001)],
        "custom": [(0.7261, 0.0051), (0.7368, 0.0021)],
    }),
    Table("hybrid", "Hybrid augmentation", "train.py", architectures(aug="hybrid"), of_metrics("accuracy"), {
        "resnet18": [(0.7063, 0.0012)],
        "densenet121": [(0.6992, 0.0103)],
        "efficientnet_b0": [(0.7321, 0.0037)],
        "custom": [(0.7647, 0.0051)],
    }),
    Table("learning-rate", "Learning rate on hybrid, accuracy", "train.py", architectures(aug="hybrid"),
          of_settings("lr", 0.002, 0.001, 0.0005), {
        "resnet18": [(0.6775, 0.0038), (0.7101, 0.0014), (0.7097, 0.0016)],
        "densenet121": [(0.6125, 0.0081), (0.6136, 0.0027), (0.6018, 0.0036)],
        "efficientnet_b0": [(0.7110, 0.0064), (0.7277, 0.0024), (0.7367, 0.0024)],
        "custom": [(0.7557, 0.0035), (0.7643, 0.0032), (0.7609, 0.0043)],
    }),
    Table("optimizer", "Optimizer, custom on hybrid", "train.py",
          {name: custom("hybrid", optimizer=name) for name in ("adam", "adagrad", "adamax")}, of_metrics(*METRICS), {
        "adam": [(0.7643, 0.0032), (0.7643, 0.0032), (0.7666, 0.0019), (0.7629, 0.0028), (0.6810, 0.0102)],
        "adagrad": [(0.6534, 0.0033), (0.6534, 0.0033), (0.6484, 0.0031), (0.6469, 0.0039), (0.9785, 0.0080)],
        "adamax": [(0.7593, 0.0023), (0.7593, 0.0023), (0.7594, 0.0016), (0.7567, 0.0019), (0.6927, 0.0036)],
    }),
    Table("weight-decay", "Weight decay, accuracy", "train.py", architectures(),
          of_settings("weight_decay", 0.0001, 0.0002, 0.00005), {
        "resnet18": [(0.6730, 0.0020), (0.6673, 0.0034), (0.6753, 0.0028)],
        "densenet121": [(0.6667, 0.0016), (0.6604, 0.0026), (0.6656, 0.0052)],
        "efficientnet_b0": [(0.7210, 0.0018), (0.7148, 0.0020), (0.7230, 0.0011)],
        "custom": [(0.7290, 0.0031), (0.7300, 0.0081), (0.7301, 0.0010)],
    }),
    Table("dropout", "Dropout, custom on hybrid", "train.py",
          {str(k): custom("hybrid", dropout=k) for k in (0.1, 0.2, 0.3, 0.4)}, of_metrics("accuracy", "precision"), {
        "0.1": [(0.7356, 0.0022), (0.7409, 0.0031)],
        "0.2": [(0.7935, 0.0114), (0.8003, 0.0132)],
        "0.3": [(0.7411, 0.0314), (0.7322, 0.0401)],
        "0.4": [(0.7031, 0.0218), (0.6909, 0.0146)],
    }),
    Table("moe", "Mixture of experts", "moe.py",
          {"mixture": {}, "base alone": {"part": "base"}, "mean of two bases": {"part": "pair"},
           "mean of three bases": {"part": "ensemble"}},
          of_metrics("loss", "accuracy", "f1", "precision", "recall"), {
        "mixture": [(0.6208, None), (0.8034, None), (0.8036, None), (0.8040, None), (0.8034, None)],
    }),
    Table("fewshot", "Few-shot learning", "fewshot.py",
          {str(p): {"fraction": p} for p in QUERIES},
          {**of_metrics("accuracy", "recall", "precision", "f1"),
           "1 prototype": ({}, "one_prototype", "accuracy"), "nearest image": ({}, "nearest_image", "accuracy")}, {
        "0.001": [(0.2095, 0.0015), (0.2095, 0.0015), (0.2119, 0.0010), (0.2080, 0.0017)],
        "0.002": [(0.2503, 0.0004), (0.2503, 0.0004), (0.2537, 0.0002), (0.2457, 0.0010)],
        "0.005": [(0.2890, 0.0011), (0.2890, 0.0009), (0.2766, 0.0011), (0.2755, 0.0010)],
        "0.01": [(0.3283, 0.0026), (0.3283, 0.0026), (0.3108, 0.0013), (0.3093, 0.0023)],
        "0.02": [(0.3388, 0.0026), (0.3387, 0.0026), (0.3271, 0.0013), (0.3210, 0.0023)],
        "0.05": [(0.3407, 0.0026), (0.3407, 0.0026), (0.3204, 0.0013), (0.3123, 0.0023)],
        "0.1": [(0.3505, 0.0026), (0.3505, 0.0026), (0.3350, 0.0013), (0.3274, 0.0023)],
    }),
    Table("regular", "Regular training on the same fractions", "train.py",
          {str(p): custom("flip+autoaugment", fraction=p, batch_size=b) for p, b in BATCHES.items()},
          of_metrics("accuracy"), {
        "0.001": [(0.1123, 0.0083)], "0.002": [(0.1610, 0.0281)], "0.005": [(0.1833, 0.0255)],
        "0.01": [(0.2020, 0.0162)], "0.02": [(0.3191, 0.0204)], "0.05": [(0.3960, 0.0151)], "0.1": [(0.4894, 0.0116)],
    }),
    Table("beyond", "Beyond the slides", "train.py",
          {row: settings for arch in ("custom", "resnet18", "densenet121", "efficientnet_b0")
           for row, settings in ladder(arch).items()}, of_metrics("accuracy", "f1", "loss"), {}),
    Table("beyond-fewshot", "Beyond the slides: few-shot learning from labels", "fewshot.py",
          {str(p): {"fraction": p, "method": "labels"} for p in QUERIES},
          {**of_metrics("accuracy", "recall", "precision", "f1"), "nearest image": ({}, "nearest_image", "accuracy")}, {}),
)
# fmt: on


# Results


class Result(NamedTuple):
    path: Path
    script: str
    settings: dict  # all of RECIPE, and what else the run was configured with
    seed: int
    content: dict  # the file


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
        run = json.dumps([result.script, sorted(result.settings.items()), result.seed])
        if run in known:
            print(f"left out: {path}: the same run as {known[run]}", file=sys.stderr)
            continue
        known[run] = path
        results.append(result)
    return results


def understand(path, content):
    """A Result; raises what Python raises for a file that is none of ours, and ValueError for half a run."""
    if content["version"] != 1:
        raise ValueError(f"version {content['version']}, and this program reads version 1")
    config = content["config"]
    script = next((script for setting, script in SCRIPTS.items() if setting in config), "train.py")
    settings = RECIPE | {key: value for key, value in config.items() if key not in NO_SETTING}
    settings["data"] = os.path.normpath(settings["data"])
    if script == "fewshot.py" and settings["query"] == queries(settings["fraction"]):
        settings["query"] = None  # the slides' own
    if settings["method"] == "labels" and settings["schedule"] == "onecycle":
        settings["schedule"] = "none"  # the method's own
    if not all(value is None or isinstance(value, str | int | float) for value in settings.values()):
        raise ValueError("a setting is no plain value")
    done = len(content["history"])
    if script != "fewshot.py" and done != settings["epochs"]:
        raise ValueError(f"half a run: {done} of {settings['epochs']} epochs")
    history = [entry[part] for entry in content["history"] for part in PARTS[script][0]]
    parts = [content[name] for name in (*PARTS[script][1], *(name for name in OPTIONAL if name in content))]
    for part in (*history, *parts):
        if not all(math.isfinite(part[metric]) for metric in METRICS):
            raise ValueError("a metric is not finite")
    classes, experts = len(content["data"]["classes"]), 3
    shapes = {"confusion": (classes, classes), **({"gate": (classes, experts)} if script == "moe.py" else {})}
    for name, shape in shapes.items():
        if np.array(content[name], dtype=float).shape != shape:
            raise ValueError(f"{name} is not of {classes} classes")
    return Result(path, script, settings, int(config["seed"]), content)


def queries(fraction):
    return next((q for p, q in reversed(QUERIES.items()) if p <= fraction), QUERIES[0.001])


def arrange(results):
    """{(number of a table, group): {(row, column): {seed: Result}}}, and the results that are in no table.

    group: the settings, as (name, value) pairs, in which all results of a table differ from the recipe.
    """
    blocks, unused = {}, []
    for result in results:
        used = False
        tables = () if result.settings["classes"] else TABLES  # an expert is in none
        for number, table in enumerate(tables):
            places = list(itertools.product(table.rows, table.columns))
            cells = [table.rows[row] | table.columns[column][0] for row, column in places]
            compared = {*STUDIED, *itertools.chain(*cells)} - {*OF_ROW}
            differs = {k: v for k, v in result.settings.items() if k not in compared and v != RECIPE.get(k)}
            group = tuple(sorted(differs.items()))
            for place, settings in zip(places, cells, strict=True):
                fits = all(result.settings[key] == settings.get(key, RECIPE[key]) for key in compared)
                if table.script == result.script and fits:
                    blocks.setdefault((number, group), {}).setdefault(place, {})[result.seed] = result
                    used = True
        if not used:
            unused.append(result)
    for number, group in list(blocks):
        table, rows = TABLES[number], {row for row, _ in blocks[number, group]}
        # The long run of the overfitting figure makes no table of initial results; nor do those make one of what is beyond
        long_alone = table.name == "initial" and rows == {"custom"} and dict(group).get("epochs") == 30
        if long_alone or (table.name == "beyond" and not any("after" in table.rows[row] for row in rows)):
            del blocks[number, group]
    return blocks, unused


# Cells


class Cell(NamedTuple):
    values: list  # of each seed
    mean: float
    std: float | None  # n - 1; None for a single seed
    published: tuple | None  # (mean, std) on the slides
    best: bool = False  # of its column
    tied: bool = False  # not the best, and no different from it by Welch's test


def tabulated(number, group, found, with_published):
    """The rows of a table: {row: {column: Cell or None}}."""
    table, rows = TABLES[number], {}
    for row, settings in table.rows.items():
        if not shown(table, row, group, {row for row, _ in found}):
            continue
        rows[row] = dict.fromkeys(table.columns)
        slides = table.published.get(row) if with_published and not group else None
        for place, (column, (_, part, metric)) in enumerate(table.columns.items()):
            results = found.get((row, column), {})
            part = settings.get("part", part)
            values = [r.content[part][metric] for _, r in sorted(results.items()) if part in r.content]
            if part in ("pair", "ensemble"):
                values = values[:1]  # of the same networks, whatever the gate's seed
            if values:
                std = float(np.std(values, ddof=1)) if len(values) > 1 else None
                there = slides and place < len(slides)
                rows[row][column] = Cell(
                    values, float(np.mean(values)), std, slides[place] if there else None
                )
    for column, (_, _, metric) in table.columns.items():
        cells = {row: cells[column] for row, cells in rows.items() if cells[column]}
        if len(cells) > 1:
            ranked = sorted(cells, key=lambda row: cells[row].mean, reverse=metric != "loss")
            rows[ranked[0]][column] = cells[ranked[0]]._replace(best=True)
            for row in ranked[1:]:
                p = p_value(cells[row].values, cells[ranked[0]].values)
                rows[row][column] = cells[row]._replace(tied=p is not None and p > 0.05)
    return rows


def shown(table, row, group, found):
    """Rows with results; those of the slides too, unless their data set may be too small for that fraction, or the
    same network is there with the other start."""
    if row in found or (row in table.published and not group):
        return True
    other = {label for label in table.rows if label.split(",")[0] == row.split(",")[0]}
    return row in table.published and "fraction" not in table.rows[row] and not other & found


def command(name, group, found, rows, folder):
    """The command line that fills the empty cells of a table. found, rows: its cells; folder: of the results."""
    words = ["bash", "run_all.sh", "--only", name]
    words += ["--data", dict(group)["data"]] if "data" in dict(group) else []
    words += ["--out", str(folder)] if str(folder) != "results" else []
    seeds = sorted({seed for seeds in found.values() for seed in seeds})
    words += ["--seeds", " ".join(map(str, seeds))] if seeds != [1, 2, 3] else []
    scratch = any("from scratch" in row for row in rows) and not {"resnet18", "efficientnet_b0"} & set(rows)
    words += ["--from-scratch"] if scratch else []
    words += ["--"] if any(key != "data" for key, _ in group) else []
    for key, value in group:
        if key != "data":
            words += [f"--{key.replace('_', '-')}"] + ([] if value is True else [str(value)])
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


# Tables


def describe(group, members):
    """A group in words: its data set, then what differs from the recipe. members: {any key: cells}."""
    results = [r for found in members.values() for seeds in found.values() for r in seeds.values()]
    names = sorted({r.content["data"]["name"] for r in results})
    words = ["CINIC-10" if name == "cinic10" else name for name in names]
    for key, value in group:
        if key == "fraction":
            words.append(f"{100 * value:g} % of train")
        elif key in ("epochs", "episodes"):
            words.append(f"{value} {key if value > 1 else key[:-1]}")
        elif key != "data":
            words.append(key.replace("_", " ") + ("" if value is True else f" {value}"))
    return ", ".join(words)


# How cells, titles and notes look; tabulate's name; what a text needs for it
STYLES = {
    "github": {"cell": "{}", "best": "**{}**", "tied": "{} ≈", "group": "## {}", "table": "### {}", "note": "{}",
               "format": "github", "escape": str},
    "plain": {"cell": "{}", "best": "{} *", "tied": "{} ≈", "group": "=== {} ===", "table": "{}", "note": "{}",
              "format": "simple", "escape": str},
    "latex": {"cell": "{}", "best": r"\textbf{{{}}}", "tied": r"{} $\approx$", "group": "% {}", "table": "% {}",
              "note": "% {}", "format": "latex_raw", "escape": lambda text: text.replace("_", r"\_")},
}  # fmt: skip


def print_tables(blocks, style, with_published, folder):
    """Every table of every group, the group of the slides first."""

    def say(kind, line):
        print(style[kind].format(line) + "\n")

    for group, members in by_group(blocks).items():
        say("group", describe(group, members))
        if group and with_published:
            say("note", "Not CINIC-10 at the recipe: the slides' numbers do not compare.")
        for number, found in members.items():
            table, rows = TABLES[number], tabulated(number, group, found, with_published)
            cells = [cell for row in rows.values() for cell in row.values()]
            counts = {len(cell.values) for cell in cells if cell}
            say("table", table.title)
            lines = [
                line for row in rows for line in lines_of(row, rows[row].values(), style, len(counts) > 1)
            ]
            lines.insert(0, ["", *table.columns])
            if any("after" in settings for settings in table.rows.values()):
                lines = [line + [gain(table, rows, line[0])] for line in lines]
            lines = [[style["escape"](text) for text in line] for line in lines]
            print(tabulate.tabulate(lines, "firstrow", style["format"], disable_numparse=True,
                                    colalign=["left"] + ["right"] * (len(lines[0]) - 1)) + "\n")  # fmt: skip
            if len(counts) == 1 and counts != {3}:
                say("note", f"Seeds: {counts.pop()}")
            if any(cell and cell.tied for cell in cells):
                mark = style["tied"].format("").strip()
                say("note", f"{mark}: no different from the best of its column (Welch's t-test, p > 0.05)")
            if None in cells:
                say("note", f"Missing: `{command(table.name, group, found, rows, folder)}`")


def lines_of(row, cells, style, counted):
    """The printed lines of a row: our numbers and, where there are any, the slides' and the difference."""
    lines = [[row], ["slides"], ["difference"]]
    for cell in cells:
        text = "-" if cell is None else number(cell.mean, cell.std)
        if counted and cell and len(cell.values) != 3:
            text += f" (n = {len(cell.values)})"
        lines[0].append(
            style["best" if cell and cell.best else "tied" if cell and cell.tied else "cell"].format(text)
        )
        there = cell and cell.published
        lines[1].append(number(*there) if there else "")
        lines[2].append(f"{cell.mean - there[0]:+.4f}" if there else "")
    return lines if any(lines[1][1:]) else lines[:1]


def gain(table, rows, row):
    """What a row adds to the accuracy of the row that it builds on, as text; of the head of the table, the head."""
    if row not in rows:
        return "gain"
    before = rows.get(table.rows[row].get("after"), {}).get("accuracy")
    cell = rows[row]["accuracy"]
    return f"{cell.mean - before.mean:+.4f}" if cell and before else ""


def number(mean, std):
    return f"{mean:.4f}" if std is None else f"{mean:.4f} ± {std:.4f}"


def by_group(blocks):
    """{group: {number of a table: its cells}}, the group of the slides first; without what is only a figure."""
    groups = {}
    for number, group in sorted(blocks, key=lambda key: (len(key[1]), str(key[1]), key[0])):
        if TABLES[number].title:
            groups.setdefault(group, {})[number] = blocks[number, group]
    return groups


def flat(blocks, with_published):
    """A dictionary for every cell of every table, for csv and json."""
    cells = []
    for group, members in by_group(blocks).items():
        for number, found in members.items():
            for row, columns in tabulated(number, group, found, with_published).items():
                for column, cell in columns.items():
                    mean, std = (cell.published if cell else None) or (None, None)
                    cells.append({
                        "group": describe(group, members), "table": TABLES[number].title, "row": row, "column": column,
                        "mean": cell and cell.mean, "std": cell and cell.std, "seeds": len(cell.values) if cell else 0,
                        "slides_mean": mean, "slides_std": std, "difference": None if mean is None else cell.mean - mean,
                        "best": bool(cell and cell.best), "tied": bool(cell and cell.tied),
                    })  # fmt: skip
    return cells


# Figures

# Okabe and Ito's colours, which colour-blind readers tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def curve(axes, results, part, metric, label):
    """Mean over seeds of a metric at each epoch, in a band of one standard deviation."""
    values = np.array([[entry[part][metric] for entry in r.content["history"]] for r in results.values()])
    epochs, mean = np.arange(1, values.shape[1] + 1), values.mean(0)
    (line,) = axes.plot(epochs, mean, label=label, marker="o" if len(epochs) < 6 else None)
    if len(values) > 1:
        spread = values.std(0, ddof=1)
        axes.fill_between(
            epochs, mean - spread, mean + spread, color=line.get_color(), alpha=0.2, linewidth=0
        )
    axes.set(xlabel="epoch", ylabel=f"{'validation' if part == 'valid' else part} {metric}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlim(0.5, max(axes.get_xlim()[1], len(epochs) + 0.5))


def draw_overfitting(figure, table, found):
    results = found["custom", "accuracy"]
    for axes, metric in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
        for part, name in (("train", "train"), ("valid", "validation")):
            curve(axes, results, part, metric, name)
        axes.set(ylabel=metric)
    axes.legend()


def draw_confusion(figure, table, found):
    results = list(found["custom", "accuracy"].values())
    names = results[0].content["data"]["classes"]
    counts = sum(np.array(r.content["confusion"]) for r in results)
    share = counts / counts.sum(1, keepdims=True).clip(1)
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(share):
        colour = "white" if value > 0.5 else "black"
        axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted by the custom network", ylabel="true class (each row sums to 100 %)")
    axes.spines[:].set_visible(False)
    axes.grid(False)


def draw_curves(figure, table, found):
    """Validation accuracy by epoch. Where columns are settings: a panel for each row and a line for each column;
    else one panel with a line for each row."""
    by_setting = any(settings for settings, *_ in table.columns.values())
    panels = [row for row in table.rows if any(row == r for r, _ in found)] if by_setting else [None]
    grid = figure.subplots(-(-len(panels) // 2), min(2, len(panels)), squeeze=False, sharey=True)
    for axes, panel in itertools.zip_longest(grid.flat, panels):
        for row, column in itertools.product(table.rows, table.columns):
            if (row, column) in found and (row == panel if by_setting else column == "accuracy"):
                curve(axes, found[row, column], "valid", "accuracy", column if by_setting else row)
        axes.set_title(panel, fontsize=11)
        axes.set_visible(bool(axes.lines))
    grid.flat[0].legend(title=table.name.replace("-", " "))


def draw_fractions(figure, table, found):
    """Test accuracy over the share of the data, of several tables; found: {name of a table: cells}."""
    axes = figure.subplots()
    for (name, cells), colour in zip(found.items(), COLOURS, strict=False):
        rows = {float(row): [r.content["test"]["accuracy"] for r in seeds.values()]
                for (row, column), seeds in cells.items() if column == "accuracy"}  # fmt: skip
        means, spread = zip(
            *((np.mean(v), np.std(v, ddof=1) if len(v) > 1 else 0) for v in rows.values()), strict=True
        )
        axes.errorbar(list(rows), means, spread, marker="o", capsize=3, color=colour, label=LABELS[name])
    axes.set(xscale="log", xlabel="share of the train split", ylabel="test accuracy")
    axes.set_xticks(list(QUERIES), [f"{100 * p:g} %" for p in QUERIES])
    axes.minorticks_off()
    axes.legend()


def draw_gate(figure, table, found):
    results = list(found["mixture", "accuracy"].values())
    weights = np.mean([r.content["gate"] for r in results], axis=0)  # (classes, experts)
    names, axes = results[0].content["data"]["classes"], figure.subplots()
    left = np.zeros(len(names))
    for expert, colour, share in zip(("base", "vehicles", "animals"), COLOURS, weights.T, strict=False):
        axes.barh(names, share, left=left, color=colour, label=expert)
        left += share
    axes.invert_yaxis()
    axes.set(xlabel="mean weight of the expert, test split", xlim=(0, 1))
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)


FIGURES = {
    "overfitting": ("overfitting", draw_overfitting, (9, 3.8)),
    "initial": ("confusion", draw_confusion, (6.4, 5.6)),
    "learning-rate": ("learning-rate", draw_curves, (9, 6.4)),
    "optimizer": ("optimizer", draw_curves, (6.4, 4.4)),
    "weight-decay": ("weight-decay", draw_curves, (9, 6.4)),
    "dropout": ("dropout", draw_curves, (6.4, 4.4)),
    "moe": ("moe-gate", draw_gate, (6.4, 4.4)),
    "fewshot": ("fewshot", draw_fractions, (6.4, 4.4)),
}  # of a table: name of the files, function, size in inches
LABELS = {"fewshot": "few-shot", "regular": "regular training", "beyond-fewshot": "few-shot from labels"}


def draw_figures(blocks, folder):
    """Save every figure that there are results for, as PNG and SVG; a second group's carry its name."""
    try:
        from matplotlib import cycler, rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("figures need matplotlib: pip install matplotlib") from None
    style = {"axes.prop_cycle": cycler(color=COLOURS), "axes.grid": True, "axes.axisbelow": True, "grid.alpha": 0.3, "font.size": 11,
             "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "figure"}  # fmt: skip
    drawn = set()
    for number, group in sorted(blocks, key=lambda key: (len(key[1]), str(key[1]))):
        table, found = TABLES[number], blocks[number, group]
        name, draw, size = FIGURES.get(table.name, (None, None, None))
        if draw is None or (draw is draw_confusion and ("custom", "accuracy") not in found):
            continue
        if draw is draw_fractions:
            found = {"fewshot": found, **curves_beside(blocks, group)}
        if name in drawn:
            name += re.sub(r"[^\w.]+", "-", "".join(f"-{key}-{value}" for key, value in group))
        drawn.add(name)
        with rc_context(style):
            figure = Figure(figsize=size, layout="constrained")
            draw(figure, table, found)
            words = describe(group, {0: blocks[number, group]}) + (
                ", 30 epochs" if name == "overfitting" else ""
            )
            figure.suptitle(words, fontsize=10, color="0.4")
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / f"{name}.png", dpi=130)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        print(folder / f"{name}.png", file=sys.stderr)


def curves_beside(blocks, group):
    """{name of a table: its cells} of other ways to learn, on the data set of a few-shot group."""
    curves = {}
    for (number, theirs), found in sorted(blocks.items(), key=lambda item: len(item[0][1])):
        name, same = TABLES[number].name, dict(theirs).get("data") == dict(group).get("data")
        if name in LABELS and name != "fewshot" and same:
            curves.setdefault(name, found)
    return curves


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
        raise SystemExit(f"no results in {args.results}: python train.py, or bash run_all.sh, makes some")
    blocks, unused = arrange(results)
    if args.format in STYLES:
        print_tables(blocks, STYLES[args.format], not args.no_published, args.results)
    else:
        cells = flat(blocks, not args.no_published)
        if args.format == "json":
            print(json.dumps(cells, indent=1))
        elif cells:
            writer = csv.DictWriter(sys.stdout, cells[0])
            writer.writeheader()
            writer.writerows(cells)
    for folder in sorted({r.path.parent for r in unused if not r.settings["classes"]}):
        print(f"in no table: {folder}", file=sys.stderr)
    if args.figures:
        try:
            draw_figures(blocks, args.figures)
        except OSError as error:
            raise SystemExit(f"--figures {args.figures}: {error}") from None


if __name__ == "__main__":
    main()
