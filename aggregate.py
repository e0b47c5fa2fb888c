"""Turn result files into tables and figures, with the study's numbers beside ours.

    python aggregate.py results                          # every table, as GitHub shows it
    python aggregate.py results --only initial,optimizer --format latex
    python aggregate.py results --format csv             # a row for each seed of each run
    python aggregate.py results --figures figures        # the figures too (needs matplotlib)

A table is a line of `TABLES`, a view of the files RESULTS/<run>/seed<k>.json. Results of one data set, one
fraction of it, one number of epochs and so on make one table. Cells are mean ± standard deviation (n - 1)
over the seeds found. What no table shows stands in "Other runs".
"""

import argparse
import csv
import itertools
import json
import math
import os
import re
import statistics
import sys
from collections import Counter, defaultdict, namedtuple
from pathlib import Path

import numpy as np
import tabulate

import data
import fewshot
import figures
import moe
import runs
import train

SCRIPTS = {"train": train, "moe": moe, "fewshot": fewshot}
METRICS = ("accuracy", "recall", "precision", "f1", "loss")


# The tables

# title: None for what is only a figure. rows, columns: a setting of the runs, such as `lr`; for columns also
# a tuple of metrics and PARTS, for rows of a mixture's parts; `step` for those of `steps`, with the settings
# that each fixes. script: whose runs. fixed: their settings that are not the recipe's. ignore: settings that
# may have any value
FIELDS = "title rows columns script fixed steps ignore"
Table = namedtuple("Table", FIELDS, defaults=("train", {}, {"": {}}, ()))
# Settings that may differ by row, for what rows show, with the study's values if they are not the recipe's
BY_ROW = {
    "arch": {"pretrained": {"resnet18": True, "efficientnet_b0": True}},
    "optimizer": {"momentum": {}},
    "fraction": {"batch_size": {0.001: 4, 0.002: 4, 0.005: 8, 0.01: 16, 0.02: 32}, "shot": {},
                 "query": fewshot.QUERIES},
}  # fmt: skip
# Settings that the results of a table share, and that stand in its heading
CONTEXT = ("data", "fingerprint", "classes", "fraction", "epochs", "batch_size", "steps_per_epoch",
           "episodes", "way", "experts", "compute dtype")  # fmt: skip
MIXTURE = {label: part for part, label in moe.ROWS.items()}
PARTS = {**MIXTURE, "accuracy with mirror images": "test_tta", "1 prototype": "one_prototype",
         "nearest image": "nearest_image"}  # fmt: skip
HYBRID, LOSS_FIRST = {"aug": "hybrid"}, ("loss", "accuracy", "f1", "precision", "recall")
STEPS = {"one-cycle": {"schedule": "onecycle"}, "small stem": {"stem": "small"},
         "flip+translate": {"aug": "flip+translate"}, "label smoothing": {"label_smoothing": 0.1},
         "30 epochs": {"epochs": 30},
         "SGD": {"optimizer": "sgd", "momentum": 0.9, "lr": 0.05, "weight_decay": 0.0005}}  # fmt: skip


def ladder(network):
    """{label: settings}, each step with the settings of those above it. The custom network has no stem."""
    settings = {"arch": network}
    steps = {network: settings}
    for label, more in STEPS.items():
        if network != "custom" or "stem" not in more:
            steps[f"{network} … + {label}"] = settings = settings | more
    return steps


TABLES = {
    "overfitting": Table(None, "arch", ("accuracy",), fixed={"epochs": 30}),
    "initial": Table("Initial results", "arch", METRICS),
    "augmentation": Table("Augmentation, accuracy", "arch", "aug"),
    "hybrid": Table("Hybrid augmentation", "arch", ("accuracy",), fixed=HYBRID),
    "learning-rate": Table("Learning rate on hybrid, accuracy", "arch", "lr", fixed=HYBRID),
    "optimizer": Table("Optimizer, custom on hybrid", "optimizer", METRICS, fixed=HYBRID),
    "weight-decay": Table("Weight decay, accuracy", "arch", "weight_decay"),
    "dropout": Table("Dropout, custom on hybrid", "dropout", ("accuracy", "precision"), fixed=HYBRID),
    "moe": Table("Mixture of experts", tuple(MIXTURE), LOSS_FIRST, script="moe"),
    "fewshot": Table("Few-shot learning", "fraction", (*METRICS[:4], "1 prototype", "nearest image"),
                     script="fewshot"),
    "regular": Table("Regular training on the same fractions", "fraction", ("accuracy",),
                     fixed={"aug": "flip+autoaugment"}),
    "beyond": Table("Beyond the study", "step", ("accuracy", "f1", "loss", "accuracy with mirror images"),
                    steps=ladder("custom") | ladder("resnet18") | ladder("densenet121") | ladder("efficientnet_b0")),
    "beyond-moe": Table("Beyond the study: mixture of experts", tuple(MIXTURE), LOSS_FIRST, script="moe", fixed={
        "train_adapters": True, "adapter_width": 512,
        "experts": ("airplane,automobile,ship,truck", "bird,cat,deer,dog,frog,horse")}),
    "beyond-fewshot": Table("Few-shot learning and regular training, accuracy", "fraction", "step", steps={
        "few-shot, 3 prototypes": {"script": "fewshot"}, "1 prototype": {"script": "fewshot"},
        "nearest image": {"script": "fewshot"}, "regular training": {"aug": "flip+autoaugment"},
        "regular training, one-cycle": {"aug": "flip+translate+autoaugment", "schedule": "onecycle",
                                        "batch_size": 32, "steps_per_epoch": 300}}, ignore=("epochs", "episodes")),
}  # fmt: skip
OTHER = Table("Other runs", "run", METRICS)  # those that none of the tables shows


def read_published(numbers=True):
    """The study's numbers in docs/study.md, {table: {row: {column: (mean, std)}}}; {} where it is missing.
    A single seed has no std, and `-` gives (); so does every cell without `numbers`."""
    path, published = Path(__file__).resolve().parent / "docs" / "study.md", defaultdict(dict)
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        first, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if first in TABLES:
            rows, columns = published[first], cells
        elif line.startswith("| "):
            pairs = (tuple(map(float, re.findall(r"[\d.]+", cell))) if numbers else () for cell in cells)
            rows[first] = dict(zip(columns, pairs, strict=True))
    return published


# Results

# named: whether the folder has the name that its settings give; common: what all seeds of a run must share;
# results: the contents of its files, by seed
Run = namedtuple("Run", "name named settings common results")


def read(folder):
    """The runs in a folder, a list of Run. Unusable files are reported on standard error."""
    found = {}
    paths = [path for path in folder.glob("[!.]*/seed*.json") if re.fullmatch(r"seed\d+", path.stem)]
    for path in sorted(paths, key=lambda path: (path.parent, int(path.stem[4:]))):
        try:
            run, result = read_result(path)
            first = found.setdefault(path.parent, run)
            for what, value in first.common.items():
                if run.common.get(what) != value:
                    raise ValueError(f"{what} {run.common.get(what)}, and {value} in other seeds of its run")
            first.results.append(result)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            print(f"left out: {path}: {reason}", file=sys.stderr)
    data_sets = {(run.settings["data"], run.common["data fingerprint"]) for run in found.values()}
    count = Counter(name for name, _ in data_sets)
    for run in found.values():
        if count[run.settings["data"]] > 1:  # data sets of one name, in separate tables
            run.settings["fingerprint"] = run.common["data fingerprint"]
    return list(found.values())


def read_result(path):
    """A Run without results, and the file's content. Raises ValueError for an unusable result, and whatever
    Python raises for other files."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["version"] != 1:
        raise ValueError(f"version {content['version']}, and this program reads version 1")
    config, name, classes = content["config"], content["data"]["name"], content["data"]["classes"]
    if path.stem != f"seed{config['seed']}":
        raise ValueError(f"the result of seed {config['seed']}")
    script = "fewshot" if "way" in config else "moe" if "train_adapters" in config else "train"
    settings = {key: config.get(key, default) for key, default in DEFAULTS[script].items()}
    measured = [content["test"], *(content[part] for part in content.keys() & PARTS.values())]
    history, splits = content["history"], ("train",) if script == "fewshot" else ("train", "valid")
    measured += [epoch[split] for epoch in history for split in splits]
    if not all(math.isfinite(part[metric]) for part in measured for metric in METRICS):
        raise ValueError("a metric is not finite")
    if not history or len(history) != settings.get("epochs", len(history)):
        raise ValueError(f"{len(history)} epochs in its history")
    if np.shape(content["confusion"]) != (len(classes), len(classes)):
        raise ValueError(f"confusion is not of {len(classes)} classes")
    if script == "moe" and np.shape(content["gate"]) != (len(classes), 1 + len(settings["experts"])):
        raise ValueError(f"gate is not of {len(classes)} classes and {1 + len(settings['experts'])} experts")
    only, environment = config["classes"] and data.spec(classes), content["environment"]
    args = argparse.Namespace(**settings)
    named = SCRIPTS[script].run_name(args, name, only) == path.parent.name
    settings = identity(script, settings) | {"data": name, "classes": only}
    if args.amp != "auto":
        settings["compute dtype"] = environment["dtype"]
    common = {**settings, "classes": tuple(classes), "data fingerprint": content["data"]["fingerprint"]}
    common |= {"dtype": environment["dtype"], "major version of torch": environment["torch"].split(".")[0]}
    hash(tuple(common.values()))  # TypeError for a list where none belongs
    return Run(path.parent.name, named, settings, common, []), content


def identity(script, settings):
    """The settings that have a part in what a run is, with its script."""
    kept = {key: value for key, value in settings.items() if key not in runs.NEUTRAL}
    return {"script": script, **{k: tuple(v) if isinstance(v, list) else v for k, v in kept.items()}}


DEFAULTS = {name: vars(script.make_parser().parse_args([])) for name, script in SCRIPTS.items()}
RECIPES = {name: {**identity(name, settings), "data": "cinic10"} for name, settings in DEFAULTS.items()}
RECIPES["fewshot"] |= {"way": 5, "shot": 5}  # fewer on small data, by default


# From results to tables

# A table of one context, {setting: value}; shown: whether it is printed
View = namedtuple("View", "name table context heading cells shown")
# unlike: settings unlike the study's, which the table ignores; values: one per seed; std: n - 1, NaN for one;
# mark: ** for the best, ≈ if not significantly different; published: (mean, std), () or None
Cell = namedtuple("Cell", "row column run unlike values mean std mark published")
# What is added to a network's name if --pretrained is unlike the study's
STARTS = {None: "", True: ", pretrained", False: ", from scratch"}


def belongs(run, table, step):
    """None if a run does not belong to a table, at one of its steps: its settings have to be the recipe's,
    apart from those that rows and columns show, those that the table fixes or ignores, and its context.
    Otherwise two dictionaries of settings: its context, and what is unlike the study's run of its row."""
    if table is OTHER:
        tested_on = ("data", "fingerprint", "classes")
        return {k: run.settings[k] for k in tested_on if run.settings.get(k) != RECIPES["train"].get(k)}, {}
    fixed = {"script": table.script, **table.fixed, **table.steps[step]}
    by_row, recipe, context, unlike = BY_ROW.get(table.rows, {}), RECIPES[fixed["script"]], {}, {}
    for key, value in run.settings.items():
        usual = by_row.get(key, {}).get(run.settings.get(table.rows), recipe.get(key))
        if value == fixed.get(key, usual) or key in (table.rows, table.columns):
            continue
        if key in by_row or key in table.ignore:
            unlike[key] = value
        elif key in CONTEXT and key not in fixed:
            context[key] = value
        else:
            return None
    return context, unlike


def place_runs(found, table):
    """{context: {(row, column): (what is unlike the study's run, run)}}. Of two runs for one place, the one
    nearer to the study's."""
    groups = defaultdict(dict)
    for run, step in itertools.product(found, table.steps):
        if fits := belongs(run, table, step):
            context, unlike = fits
            start = STARTS[unlike.pop("pretrained", None)]
            settings = {**run.settings, "step": step, "run": run.name}
            rows, columns = ([text_of(settings[a])] if isinstance(a, str) else a for a in table[1:3])
            group, fit = groups[tuple(sorted(context.items()))], (unlike, run)
            for row, column in itertools.product(rows, columns):
                place = row + start, column
                group[place] = min(group.get(place, fit), fit, key=lambda fit: len(fit[0]))
    return groups


def make_views(found, published, only):
    """A View for each table in `only` and context that has results, those with the study's context first."""
    views, seen = [], set()
    for name, table in [*TABLES.items(), ("other", OTHER)]:
        if name not in only:
            continue
        runs = [run for run in found if (run.name not in seen if table is OTHER else run.named)]
        for context, group in sorted(place_runs(runs, table).items(), key=lambda item: len(item[0])):
            new = {place for place, (_, run) in group.items() if run.name not in seen}
            if isinstance(table.columns, str) and new:  # a row that earlier tables show compares nothing here
                rows = {row for row, _ in new}
                group = {place: fit for place, fit in group.items() if place[0] in rows}
            compared = new if isinstance(table.columns, str) else {row for row, _ in new}
            shown = bool(table.title) and (not context or table is OTHER or len(compared) > 1)
            cells = make_cells(table, context, group, published.get(name, {}))
            views.append(View(name, table, dict(context), heading(context), cells, shown))
            seen |= {run.name for _, run in group.values()} if shown else set()
    return sorted(views, key=lambda view: (len(view.context), str(view.context)))


def make_cells(table, context, group, published):
    """The cells of a table, row by row. group: {(row, column): (what is unlike the study's run, run)}."""
    rows, columns = zip(*group, strict=True)
    rows = in_order(rows, table.rows, table.steps, published)
    columns = in_order(columns, table.columns, table.steps, next(iter(published.values()), ()))
    values, cells = {place: values_of(run, *place) for place, (_, run) in group.items()}, []
    columns = [column for column in columns if any(values.get((row, column)) for row in rows)]
    for row, column in itertools.product(rows, columns):
        unlike, run = group.get((row, column), ({}, None))
        theirs = published.get(row, {}).get(column) if run and not context and not unlike else None
        ours, marked = values.get((row, column), []), mark(table, (row, column), values)
        mean = np.mean(ours) if ours else math.nan
        std = np.std(ours, ddof=1) if len(ours) > 1 else math.nan
        cells.append(Cell(row, column, run, unlike, ours, mean, std, marked, theirs))
    return cells


def in_order(labels, axis, steps, published):
    """Rows or columns, each once: known ones in their order, then numbers by size, then names."""
    known = steps if axis == "step" else published if isinstance(axis, str) else axis
    known = [label + start for label in known for start in STARTS.values()]

    def rank(label):
        size = float(label) if re.fullmatch(r"\d+(\.\d+)?", label) else math.inf
        return known.index(label) if label in known else len(known), size, label

    return sorted(set(labels), key=rank)


def values_of(run, row, column):
    """The numbers in a cell, one per seed that has it."""
    part = PARTS.get(row if run.settings["script"] == "moe" else column, "test")
    # The base networks of these are the same whatever the seed
    results = run.results[:1] if part in ("pair", "ensemble") else run.results
    return [result[part][column if column in METRICS else "accuracy"] for result in results if part in result]


def mark(table, place, values):
    """`**` for the best of a row or column, as printed, `≈` for what is not clearly different."""
    axis, ours = 0 if isinstance(table.columns, str) else 1, values.get(place)
    rivals = [theirs for other, theirs in values.items() if theirs and other[axis] == place[axis]]
    if not ours or len(rivals) < 2 or (axis == 1 and table.rows == "fraction"):
        return ""
    best = (min if place[1] == "loss" else max)(round(np.mean(theirs), 4) for theirs in rivals)
    if round(np.mean(ours), 4) == best:
        return "**"
    firsts = [theirs for theirs in rivals if round(np.mean(theirs), 4) == best and len(theirs) > 2]
    return "≈" if len(ours) > 2 and any(p_value(ours, first) > 0.05 for first in firsts) else ""


def p_value(first, second):
    """Two-sided p of Welch's t-test for two samples of at least two values. Welch, 1947."""
    a, b = (np.var(values, ddof=1) / len(values) for values in (first, second))
    distance = abs(np.mean(first) - np.mean(second))
    if a + b == 0:
        return float(distance == 0)
    freedom = (a + b) ** 2 / (a**2 / (len(first) - 1) + b**2 / (len(second) - 1))
    # With t = sqrt(freedom) tan(angle), Student's density is a power of a cosine. Gauss-Legendre quadrature
    angle = math.atan(distance / math.sqrt((a + b) * freedom))
    points, weights = np.polynomial.legendre.leggauss(100)
    inside = (np.cos(angle * (points + 1) / 2) ** (freedom - 1) * weights).sum() * angle / 2
    scale = 2 / math.sqrt(math.pi) * math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    return float(max(0.0, 1 - scale * inside))


# Printing

LATEX = r"""\begin{table}
\centering
\setlength{\belowcaptionskip}{6pt}
\caption{%s}
\label{tab:%s}
\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%%
%s}
\end{table}
"""


def text_of(value):
    """A setting's value as tables show it: 0.00005, never 5e-05."""
    if isinstance(value, float):
        return np.format_float_positional(value, trim="-")
    return "; ".join(value) if isinstance(value, tuple) else str(value)


def describe(settings):
    return ", ".join(f"{key.replace('_', ' ')} {text_of(settings[key])}" for key in settings)


def heading(context):
    """The data set, then other settings: `CINIC-10, epochs 30`."""
    others, name = dict(context), {"cinic10": "CINIC-10", "cifar10": "CIFAR-10"}
    data_set = others.pop("data", "cinic10")
    return ", ".join(filter(None, [name.get(data_set, data_set), describe(others)]))


def in_digits(mean, std=math.nan):
    return f"{mean:.4f}" if math.isnan(std) else f"{mean:.4f} ± {std:.4f}"


def plain(text, latex):
    """User's text and marks for LaTeX, with a minus before numbers, or without GitHub's markup."""
    text = " ".join(text.split())
    if not latex:
        return re.sub(r"([\\|<`$])", r"\\\1", text)
    rules = {**tabulate.LATEX_ESCAPE_RULES, "±": r"$\pm$", "≈": r"$\approx$", "…": r"\dots{}"}
    text = re.sub(r"\*\*(.+)\*\*", r"\\textbf{\1}", "".join(rules.get(letter, letter) for letter in text))
    return re.sub(r"^-(?=\d)", "$-$", text)


def print_views(views, latex):
    """Print tables, as GitHub shows them or for LaTeX."""
    context, start = None, "% " if latex else ""
    if latex:
        print("% in the preamble: \\usepackage{graphicx}\n")
    for view in views:
        if view.context != context:
            context = view.context
            print(f"{start or '## '}{view.heading}\n")
            if context:
                print(f"{start}Not the study's data and settings: its numbers are not comparable.\n")
        usual = statistics.mode(len(cell.values) for cell in view.cells if cell.values)
        lines = [[plain(text, latex) for text in line] for line in written(view, usual)]
        style = {"disable_numparse": True, "colalign": ["left", *["right"] * (len(lines[0]) - 1)]}
        table = tabulate.tabulate(lines, "firstrow", "latex_raw" if latex else "github", **style)
        title, text = view.table.title, explanation(view, usual)
        if latex:
            caption = plain(f"{title}: {view.heading}, test split. {text}", latex)
            print(LATEX % (caption, figures.slug(view.name, view.heading), table))
        else:
            print(f"### {title}\n\n{table}\n\n{text}\n")


def written(view, usual):
    """The rows of a printed table, header first: ours and, if available, the study's and the difference.
    usual: the number of seeds that cells need not say."""
    table, other = view.table, view.table is OTHER
    columns = dict.fromkeys(cell.column for cell in view.cells)
    corner = table.rows if table.rows in ("optimizer", "dropout", "fraction") else ""
    lines = [[corner, *["n"] * other, *columns, *["gain"] * (table.rows == "step")]]
    steps, means = list(table.steps), {}
    for row, cells in itertools.groupby(view.cells, key=lambda cell: cell.row):
        cells = list(cells)
        lines.append([row, *[str(len(cells[0].values))] * other])
        for cell in cells:
            text = in_digits(cell.mean, cell.std) if cell.values else "-"
            text += f" (n = {len(cell.values)})" if len(cell.values) not in (0, usual) and not other else ""
            lines[-1].append(f"**{text}**" if cell.mark == "**" else f"{text} {cell.mark}".strip())
        if table.rows == "step":
            means[row], above = cells[0].mean, steps[steps.index(row) - 1]
            lines[-1].append(f"{means[row] - means[above]:+.4f}" if "+" in row and above in means else "")
        if any(cell.published for cell in cells):
            lines.append(["study", *(in_digits(*cell.published) if cell.published else "" for cell in cells)])
            gains = (f"{cell.mean - cell.published[0]:+.4f}" if cell.published else "" for cell in cells)
            lines.append(["difference", *gains])
    return lines


def explanation(view, usual):
    """What a table's numbers and marks mean."""
    text = [f"Mean ± standard deviation over n = {usual} seeds" if usual > 1 else "One seed (n = 1)"]
    text[0] += " unless a cell says otherwise" * bool({len(cell.values) for cell in view.cells} - {0, usual})
    if view.table is OTHER:
        text = ["Runs that no table shows: mean ± standard deviation over n seeds"]
    marks = {cell.mark for cell in view.cells}
    if "**" in marks:
        text.append(f"bold: best of its {'row' if isinstance(view.table.columns, str) else 'column'}")
    if "≈" in marks or ("**" in marks and usual > 2):
        text.append("≈: not significantly different from the best (Welch, p > 0.05, tested from n = 3 on)")
    text += dict.fromkeys(f"{describe(cell.unlike)} at {cell.row}" for cell in view.cells if cell.unlike)
    return "; ".join(text) + "."


def print_rows(found):
    """Print CSV, a row for each seed of each run: the settings in which runs differ, and the test metrics."""
    keys = dict.fromkeys(key for run in found for key in run.settings if key not in ("data", "fingerprint"))
    keys = [key for key in keys if len({run.settings.get(key) for run in found}) > 1]
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["run", "seed", "data", "fingerprint", *keys, *METRICS, "accuracy with mirror images"])
    for run in found:
        settings = ["" if run.settings.get(key) is None else text_of(run.settings[key]) for key in keys]
        for result in run.results:
            first = [run.name, result["config"]["seed"], run.settings["data"], run.common["data fingerprint"]]
            mirrored = result.get("test_tta", {}).get("accuracy")
            writer.writerow([*first, *settings, *(result["test"][metric] for metric in METRICS), mirrored])


def main():
    parser, default, names = runs.new_parser(__doc__), "(default: %(default)s)", [*TABLES, "other"]
    add = parser.add_argument
    add("results", nargs="?", type=Path, default=Path("results"), help=default)
    add("--only", default=",".join(names), metavar="A,B", help=default)
    add("--format", default="github", choices=("github", "latex", "csv"), help=default)
    add("--figures", type=Path, metavar="FOLDER", help="draw the figures there, as PNG and PDF")
    add("--no-published", action="store_true", help="leave the study's numbers out")
    args = parser.parse_args()
    only, folder = args.only.split(","), args.results.expanduser()
    for name in set(only) - set(names):
        raise ValueError(f"--only {name}: choose from {', '.join(names)}")
    found = read(folder)
    if not found:
        what = "no results in" if folder.is_dir() else "there is no folder"
        raise RuntimeError(f"{what} {folder}: run train.py or run_all.sh first")
    views = make_views(found, read_published(not args.no_published), only)
    printed = [view for view in views if view.shown]
    if not printed and not views:
        raise RuntimeError(f"--only {args.only}: no run in {folder} belongs there")
    try:
        if args.format == "csv":
            names = {cell.run.name for view in printed for cell in view.cells if cell.run}
            print_rows([run for run in found if run.name in names])
        else:
            print_views(printed, args.format == "latex")
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if args.figures:
        figures.draw(views, args.figures.expanduser(), found[0] if "augmentation" in only else None)


if __name__ == "__main__":
    runs.command_line(main)
