"""Draw the figures of the tables, with matplotlib: `python aggregate.py results --figures figures`.

Each draw_ function draws cells of a table, in the order of its rows and columns, into a matplotlib Figure.
"""

import contextlib
import functools
import itertools
import math
import re
import sys
from collections import Counter, defaultdict, namedtuple
from pathlib import Path

import numpy as np
import torch

import augment
import data
import moe


def draw_lines(figure, lines, xlabel, ylabel, style):
    """Draw means with error bars of one standard deviation, a panel for each title. Returns the panels' axes.

    lines: {(title, label): (x, mean, std)}, each (points,); std is NaN where there is no bar; () for no line.
    """
    titles, labels = (list(dict.fromkeys(names)) for names in zip(*lines, strict=True))
    grid = figure.subplots(-(-len(titles) // 2), min(2, len(titles)), squeeze=False, sharey=bool(ylabel)).flat
    handles = {}
    for (title, label), points in lines.items():
        if not points:
            continue
        axes, colour = grid[titles.index(title)], f"C{labels.index(label)}"
        axes.set(title=title if ylabel else None, xlabel=xlabel, ylabel=ylabel or title)
        handles[label] = axes.errorbar(*points, fmt=style, color=colour, capsize=3)
    for axes in grid[len(titles) :]:
        axes.set_visible(False)
    longest = max(map(len, labels))
    columns = 5 if longest < 12 else 3 if longest < 30 else 1
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, frameon=False)
    return grid[: len(titles)]


def draw_epochs(figure, cells):
    """Validation accuracy by epoch: a panel per row and a line per column, or one panel with a line per row;
    of a single run also training and loss. Lines end in error bars, side by side."""
    series = {(cell.row, cell.column): (cell.run, "valid", "accuracy") for cell in cells}
    if all(cell.column == "accuracy" for cell in cells):
        series = {("", row): what for (row, _), what in series.items()}
    if len(cells) == 1:
        whats = itertools.product(("accuracy", "loss"), ("train", "valid"))
        series = {(metric, part): (cells[0].run, part, metric) for metric, part in whats}
    lines, labels = {}, list(dict.fromkeys(label for _, label in series))
    for (title, label), (run, part, metric) in series.items():
        lines[title, label] = ()
        if not run:
            continue
        values = np.array([[epoch[part][metric] for epoch in result["history"]] for result in run.results])
        mean, epochs = values.mean(0), values.shape[1]
        last, std = (mean[-1], values[:, -1].std(ddof=1)) if len(values) > 1 else (math.nan, math.nan)
        end, gap = epochs * (1.03 + 0.03 * labels.index(label)), math.nan  # the bar stands beside its line
        x = [*range(1, epochs + 1), end, end]
        lines[title, label] = x, [*mean, gap, last], [*[gap] * (epochs + 1), std]
    for axes in draw_lines(figure, lines, "epoch", "validation accuracy" if len(cells) > 1 else None, ".-"):
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)


def draw_accuracy(figure, cells, by_row=False):
    """Test accuracy by column, a panel per row; or by row, a line per column."""
    ticks = list(dict.fromkeys(cell.row if by_row else cell.column for cell in cells))
    lines = defaultdict(list)
    for cell in cells:
        name, tick = (("", cell.column), cell.row) if by_row else ((cell.row, "accuracy"), cell.column)
        if cell.values:
            lines[name].append((ticks.index(tick), cell.mean, cell.std))
    lines = {name: zip(*points, strict=True) for name, points in lines.items()}
    xlabel = "share of the training images" if by_row else None
    for axes in draw_lines(figure, lines, xlabel, "test accuracy", "o-" if by_row else "o"):
        axes.set_xticks(range(len(ticks)), ticks, rotation=30, ha="right")
        axes.set_xlim(-0.5, len(ticks) - 0.5)


def draw_confusion(figure, cells):
    names, axes = cells[0].run.results[0]["data"]["classes"], figure.subplots()
    counts = sum(np.array(result["confusion"]) for result in cells[0].run.results)
    share, few = counts / counts.sum(1, keepdims=True).clip(1), len(names) <= 20
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(share if few else np.zeros((0, 0))):
        colour = "white" if value > 0.5 else "black"
        axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=9)
    shown = slice(None, None, 1 if few else 5)
    axes.set_xticks(range(len(names))[shown], names[shown], rotation=45, ha="right")
    axes.set_yticks(range(len(names))[shown], names[shown])
    axes.set(xlabel="predicted class", ylabel="true class (each row sums to 100 %)")
    axes.grid(False)


def draw_gate(figure, cells):
    run, axes = cells[0].run, figure.subplots()
    names = run.results[0]["data"]["classes"]
    weights = np.mean([result["gate"] for result in run.results], axis=0)  # (classes, experts)
    left = np.cumsum(weights, axis=1) - weights
    for number, expert in enumerate(("base", *map(moe.group_name, run.settings["experts"]))):
        axes.barh(range(len(names)), weights[:, number], left=left[:, number], label=expert)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="mean weight of the expert", ylabel="true class", xlim=(0, 1))
    figure.legend(loc="outside lower center", frameon=False)


def draw_samples(figure, dataset, names, count):
    """A row for each augmentation: the first training image, and `count` random draws."""
    image, generator, rows = dataset.train.images[:1].cpu(), torch.Generator().manual_seed(8), []
    for name in names:
        drawn = image.expand(count, -1, -1, -1)
        for function in augment.parse(name, dataset.mean)[-1]:
            drawn = function(drawn, generator)
        row = torch.nn.functional.pad(torch.cat([image, drawn]), (2, 2, 2, 2), value=255)
        rows.append(torch.cat(list(row), dim=2))  # (3, 36, 36 * (1 + count))
    axes = figure.subplots()
    axes.imshow(torch.cat(rows, dim=1).permute(1, 2, 0), interpolation="nearest")
    axes.set_yticks([36 * row + 18 for row in range(len(names))], names)
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.grid(False)


draw_fractions = functools.partial(draw_accuracy, by_row=True)
# A table's figure. row: of the only cell shown, None for all that can be compared; size: in inches
Drawing = namedtuple("Drawing", "file draw row size title")
FIGURES = {
    "overfitting": Drawing("overfitting", draw_epochs, "custom", (9, 4.4), "Overfitting, custom network"),
    "initial": Drawing("confusion", draw_confusion, "custom", (6.4, 6), "Confusion matrix, custom network"),
    "augmentation": Drawing("augmentation-accuracy", draw_accuracy, None, (9, 7.4), "Augmentation"),
    "learning-rate": Drawing("learning-rate", draw_epochs, None, (9, 7), "Learning rate, on hybrid augmentation"),
    "optimizer": Drawing("optimizer", draw_epochs, None, (6.4, 5), "Optimizer, custom network on hybrid"),
    "weight-decay": Drawing("weight-decay", draw_epochs, None, (9, 7), "Weight decay"),
    "dropout": Drawing("dropout", draw_epochs, None, (6.4, 5), "Dropout, custom network on hybrid"),
    "moe": Drawing("moe-gate", draw_gate, "mixture", (6.4, 5), "Gate of the mixture of custom networks"),
    "beyond-moe": Drawing("beyond-moe-gate", draw_gate, "mixture", (6.4, 5), "Gate of the mixture, trained adapters"),
    "other": Drawing("other-runs", draw_epochs, None, (9, 6), "Other runs"),
    "beyond-fewshot": Drawing("fewshot", draw_fractions, None, (7.4, 5.6), "Few-shot embedding and custom network"),
}  # fmt: skip


def drawn_cells(view):
    """The cells that a figure shows: a row's accuracy, or those of rows and columns with something to compare."""
    row, by_setting = FIGURES[view.name].row, isinstance(view.table.columns, str)
    cells, most = view.cells, math.inf
    if not by_setting:
        cells = [cell for cell in cells if cell.column == "accuracy" and row in (None, cell.row)]
    if view.name == "other":  # few-shot learning has no such curves, and there are ten colours
        cells, most = [cell for cell in cells if "valid" in cell.run.results[0]["history"][0]], 10
    counts = Counter(by_setting and cell.row for cell in cells if cell.values)
    cells = [cell for cell in cells if row or 1 < counts[by_setting and cell.row] <= most]
    used = {cell.column for cell in cells if cell.values}
    return [cell for cell in cells if cell.column in used]


def slug(*words):
    """A file name or label: letters, digits and single dashes."""
    return re.sub(r"[^A-Za-z0-9]+", "-", " ".join(words)).strip("-")


def draw(views, folder, samples_of=None):
    """Save the figures of the views as PNG and, without a title, as PDF. If a table has several, their names
    include the data set and settings. samples_of: the run whose images show the augmentations."""
    try:
        import matplotlib.style
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeError("figures need matplotlib: pip install matplotlib") from None

    def save(name, size, title, function, *what):
        figure, path = Figure(figsize=size, layout="constrained"), folder / f"{name}.png"
        function(figure, *what)
        figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
        figure.suptitle(title, fontsize=11)
        figure.savefig(path, dpi=130)
        print(path, file=sys.stderr)

    folder.mkdir(parents=True, exist_ok=True)
    # Nothing depends on matplotlibrc, and no text is mathematics. Colours for colour-blind readers
    style = {"text.parse_math": False, "axes.titlesize": 11, "axes.grid": True, "grid.alpha": 0.3,
             "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False}  # fmt: skip
    matplotlib.style.use(["default", "tableau-colorblind10", style])
    drawn, seen = [], set()
    for view in views:
        cells = drawn_cells(view) if view.name in FIGURES else []
        used = {cell.run.name for cell in cells if cell.run}
        if view.shown and used or not used <= seen:  # a table that is not printed adds something to see
            drawn.append((view, cells))
            seen |= used
    count = Counter(view.name for view, _ in drawn)
    for view, cells in drawn:
        drawing = FIGURES[view.name]
        seeds = sorted({len(cell.values) for cell in cells if cell.values})
        n = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else seeds[0]
        what = "mean" if drawing.draw in (draw_confusion, draw_gate) else "mean ± std"
        title = f"{drawing.title}\n{view.heading}; {what} over seeds, n = {n}"
        name = slug(drawing.file, view.heading if count[view.name] > 1 else "")
        save(name, drawing.size, title, drawing.draw, cells)
    if samples_of:
        dataset = images_of(samples_of)
        title = f"{dataset.name}\na training image, and random draws of augmentations"
        save("augmentation", (5.4, 4), title, draw_samples, dataset, ("cutout", "autoaugment", "jitter"), 3)
        save("augmentation-all", (11.7, 10.3), title, draw_samples, dataset, augment.NAMES[1:], 8)


def images_of(run):
    """The data set of a run if it is here and decoded, else `synthetic`."""
    config = run.results[0]["config"]
    decoded = [file.name for file in Path(config["root"], "cache").expanduser().glob("*.pt")]
    if any(name.startswith(Path(config["data"]).name) for name in decoded):
        # What it prints is no part of the tables
        with contextlib.suppress(ValueError, OSError, RuntimeError), contextlib.redirect_stdout(sys.stderr):
            return data.load(config["data"], config["root"])
    return data.load("synthetic")
