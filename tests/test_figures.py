"""The figures of result files, read back from their axes."""

import json

import numpy as np
import pytest
import test_aggregate
from matplotlib.figure import Figure
from test_aggregate import FRACTIONS, METHODS, fake, views

import data
import figures

whole = test_aggregate.whole  # a fixture


def drawn(draw, folder, name):
    """A figure of a table, as figures.draw draws it."""
    (view,) = (view for view in views(folder) if view.name == name)
    figure = Figure()
    draw(figure, figures.drawn_cells(view))
    return figure


def test_every_figure_is_drawn_whatever_matplotlibrc_says(whole, run, tmp_path):
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\naxes.prop_cycle: cycler(color=['r'])\n")
    process = run("aggregate.py", whole, "--figures", tmp_path / "figures")
    assert process.returncode == 0, process.stderr
    names = {x.file for x in figures.FIGURES.values()} - {"other-runs"} | {"augmentation", "augmentation-all"}
    wanted = {f"{name}.{suffix}" for name in names for suffix in ("png", "pdf")}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == wanted and len(wanted) == 24
    assert len({entry.title for entry in figures.FIGURES.values()}) == len(figures.FIGURES)


def test_rows_of_the_confusion_figure_are_true_classes(tmp_path):
    counts = 10 * np.eye(10) + 30 * np.roll(np.eye(10), 1, axis=1)  # a quarter right, the others one class on
    counts[0] *= 2
    fake(tmp_path, "train.py", seeds=[1], confusion=(counts * np.eye(10)).tolist())
    fake(tmp_path, "train.py", seeds=[2], confusion=(counts * (1 - np.eye(10))).tolist())
    (axes,) = drawn(figures.draw_confusion, tmp_path, "initial").axes
    assert axes.images[0].get_array()[:2, :3].tolist() == [[0.25, 0.75, 0], [0, 0.25, 0.75]]
    texts = {text.get_position(): text.get_text() for text in axes.texts}  # x, y
    assert texts[1, 0] == "75" and texts[0, 0] == "25" and texts[0, 1] == "0"
    assert "predicted" in axes.get_xlabel() and "true" in axes.get_ylabel()
    assert [label.get_text() for label in axes.get_yticklabels()] == list(data.CLASSES)
    names = [f"class {number}" for number in range(21)]
    fake(tmp_path / "b", "train.py", data={"classes": names}, confusion=np.eye(21).tolist())
    (axes,) = drawn(figures.draw_confusion, tmp_path / "b", "initial").axes
    assert not axes.texts and [label.get_text() for label in axes.get_xticklabels()] == names[::5]


def test_curves_show_validation_and_end_in_an_error_bar(tmp_path):
    """In files of `fake`, validation accuracy is 0.02 above training accuracy."""
    for rate, accuracy, seeds in ((0.1, 0.5, (1, 2, 3)), (0.2, 0.6, (1, 2, 3)), (0.3, 0.7, [1])):
        fake(tmp_path, f"train.py --aug hybrid --dropout {rate}", accuracy, seeds)
    path = tmp_path / "custom-hybrid-dropout0.1" / "seed1.json"
    content = json.loads(path.read_text())
    content["history"][0]["valid"]["accuracy"] += 0.3  # in the first epoch only
    path.write_text(json.dumps(content))
    (axes,) = drawn(figures.draw_epochs, tmp_path, "dropout").axes
    first, second, single = axes.containers
    assert first.lines[0].get_xydata()[0].tolist() == pytest.approx([1, 0.62])
    assert second.lines[0].get_xydata()[9].tolist() == pytest.approx([10, 0.62])
    for container, mean in ((first, 0.52), (second, 0.62)):
        *_, bar = container.lines[2][0].get_segments()
        assert bar[:, 1].tolist() == pytest.approx([mean - 0.001, mean + 0.001]) and bar[0, 0] > 10
    bars = map(len, single.lines[2][0].get_segments())  # n = 1; a single epoch is a dot
    assert not any(bars) and single.lines[0].get_marker() == "."
    fake(tmp_path, "train.py --epochs 30")
    accuracy, loss = drawn(figures.draw_epochs, tmp_path, "overfitting").axes
    assert [container.lines[0].get_ydata()[0] for container in accuracy.containers] == [0.5, 0.52]
    assert [container.lines[0].get_ydata()[0] for container in loss.containers] == pytest.approx([1.5, 1.52])
    assert (accuracy.get_ylabel(), loss.get_ylabel()) == ("accuracy", "loss")


def test_a_panel_needs_two_settings_and_the_legend_shows_what_is_drawn(tmp_path):
    for words in ("densenet121", "resnet18 --pretrained --aug flip", "custom", "custom --aug flip"):
        fake(tmp_path, f"train.py --arch {words}")
    figure = drawn(figures.draw_accuracy, tmp_path, "augmentation")
    assert [axes.get_title() for axes in figure.axes if axes.get_visible()] == ["custom"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["none", "flip"]
    fake(tmp_path, "train.py --arch densenet121 --aug crop", 0.6)  # which has no flip
    first = drawn(figures.draw_accuracy, tmp_path, "augmentation").axes[0].containers[0]
    assert np.allclose(first.lines[0].get_xydata(), [[0, 0.5], [2, 0.6]])
    assert np.allclose(first.lines[2][0].get_segments()[1][:, 1], [0.599, 0.601])  # a standard deviation
    for words in ("--lr 0.0005", "", "--arch densenet121 --lr 0.002", "--arch densenet121"):
        fake(tmp_path, f"train.py --aug hybrid {words}")
    figure = drawn(figures.draw_epochs, tmp_path, "learning-rate")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["0.002", "0.001", "0.0005"]
    colours = [[bar.lines[0].get_color() for bar in axes.containers] for axes in figure.axes]
    assert colours == [["C0", "C1"], ["C1", "C2"]]


def test_two_to_ten_other_runs_are_drawn(tmp_path):
    for rate in (0.003, 0.004):
        fake(tmp_path, f"train.py --lr {rate}")
    fake(tmp_path, "fewshot.py --lr 0.003")  # which has no such curves
    figure = drawn(figures.draw_epochs, tmp_path, "other")
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["custom-none-lr0.003", "custom-none-lr0.004"] and len(figure.axes) == 1
    for rate in range(1, 10):
        fake(tmp_path, f"train.py --lr {rate}")
    (view,) = (view for view in views(tmp_path) if view.name == "other")
    assert len({cell.row for cell in view.cells}) == 12 and figures.drawn_cells(view) == []


def test_the_few_shot_figure_names_its_methods(whole):
    figure = drawn(figures.draw_fractions, whole, "beyond-fewshot")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == METHODS
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == FRACTIONS


def test_the_gate_is_drawn_by_the_groups_names(tmp_path):
    for seed, weights in ((1, [0.2, 0.3, 0.5]), (2, [0.4, 0.3, 0.3])):
        gate = [weights, *[[0.1, 0.8, 0.1]] * 9]
        fake(tmp_path, "moe.py --experts airplane,automobile,ship,truck bird,cat", seeds=[seed], gate=gate)
    figure = drawn(figures.draw_gate, tmp_path, "moe")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["base", "vehicles", "bird+cat"]
    bars = [container[0] for container in figure.axes[0].containers]
    assert [bar.get_width() for bar in bars] == pytest.approx([0.3, 0.3, 0.4])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(data.CLASSES)
    assert [bar.get_x() for bar in bars] == pytest.approx([0, 0.3, 0.6])


def test_figures_of_two_data_sets_have_them_in_their_names(run, tmp_path):
    for extra in ("--data cifar10", "--data synthetic --epochs 2", "--data synthetic --fraction 0.5"):
        fake(tmp_path / "results", f"train.py {extra}")
    names = ["cost $1 to $2", "a_b%", *data.CLASSES[2:]]
    fake(tmp_path / "results", "train.py", data={"name": "-my.birds-01234567", "classes": names})
    words = ("--figures", tmp_path / "figures", "--only", "initial")
    process = run("aggregate.py", tmp_path / "results", *words)
    assert process.returncode == 0, process.stderr
    assert {path.name for path in (tmp_path / "figures").glob("*.png")} == {
        "confusion-CIFAR-10.png", "confusion-synthetic-fraction-0-5.png", "confusion-synthetic-epochs-2.png",
        "confusion-my-birds-01234567.png"}  # fmt: skip


def test_figures_without_matplotlib_say_how_to_get_it(whole, run, one_line, tmp_path):
    process = run("aggregate.py", whole, "--figures", tmp_path, code="sys.modules['matplotlib'] = None")
    one_line(process, 1, "pip install matplotlib")
    assert "### Initial results" in process.stdout
