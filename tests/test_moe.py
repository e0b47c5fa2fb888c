import json
import shutil
import types

import numpy as np
import pytest
import torch
from conftest import assert_same_bits

import data
import models
import moe
import runs
import train

CPU = torch.device("cpu")


def a_run(dataset, dtype=torch.float32, **settings):
    """What the functions of moe.py need of a run."""
    args = types.SimpleNamespace(**settings)
    return types.SimpleNamespace(args=args, dataset=dataset, device=CPU, dtype=dtype)


def test_adapters_are_trained_on_request_and_with_512_units_the_mixture_is_as_large_as_three_bases():
    assert not any(p.requires_grad for p in models.MixtureOfExperts().adapters.parameters())
    base, parts = models.build("custom"), [models.MixtureOfExperts(3, 10, True, 512)]
    parts += [base.features] * 3
    assert all(p.requires_grad for p in parts[0].parameters())
    size = sum(p.numel() for part in parts for p in part.parameters())
    assert 1 < size / sum(3 * p.numel() for p in base.parameters()) < 1.01


def test_features_for_trained_adapters_are_in_the_compute_dtype():
    torch.manual_seed(0)
    network, dataset = models.build("custom").eval(), data.synthetic((260, 10, 10))
    run = a_run(dataset, torch.bfloat16, train_adapters=True)
    seen, labels = moe.features(run, [network] * 2, None, dataset.train)
    assert seen.shape == (260, 2, 4096) and seen.dtype == torch.bfloat16
    assert torch.equal(labels, dataset.train.labels)
    with torch.no_grad():
        wanted = network.features(data.normalise(dataset.train.images[250:], dataset)).flatten(1)
    torch.testing.assert_close(seen[250:, 1].float(), wanted, rtol=0.03, atol=0.03)


def test_experts_share_every_setting_that_both_scripts_have(monkeypatch):
    asked = []
    monkeypatch.setattr(runs, "run_seeds", lambda args, *_: asked.append(args) or 1 / 0)
    shared = "--data synthetic --root r --fraction 0.5 --epochs 3 --batch-size 8 --lr 0.002 --optimizer sgd "
    shared += "--momentum 0.9 --weight-decay 0.1 --schedule onecycle --label-smoothing 0.1 --out o --amp off"
    with pytest.raises(ZeroDivisionError):
        moe.expert(moe.parse_arguments(f"{shared} --seed 4 --force".split()), 3, "cat,dog")
    own = f"{shared} --aug hybrid --dropout 0.2 --seed 3 --classes cat,dog"
    assert asked == [train.parse_arguments(own.split())]


def test_each_seed_has_its_own_experts_weights_and_order(monkeypatch):
    asked, trained = [], []

    def expert(args, seed, group=None):
        asked.append((seed, group))
        torch.manual_seed(seed)
        return models.build("custom").eval()

    def fit(run, model, classes, steps, train_batches, valid_batches):
        parts = [labels for _, labels in train_batches(1)]
        assert list(map(len, parts)) == [16, 16, 8] and steps == [3] * 10  # --batch-size
        trained.append((model.adapters[0].weight, torch.cat(parts)))
        return []

    monkeypatch.setattr(moe, "expert", expert)
    monkeypatch.setattr(train, "fit", fit)
    run = a_run(data.synthetic((40, 10, 20)))
    run.args = moe.parse_arguments(["--seed", "1", "2", "--batch-size", "16", "--adapter-width", "8"])
    for run.seed in (1, 2):
        _, outcome = moe.train_gate(run)
    first, second = ([(seed, group) for group in (None, *moe.EXPERTS)] for seed in (1, 2))
    assert asked == [*first, (2, None), (3, None), *second, (1, None), (3, None)]
    assert outcome["base"] == moe.average(run, [expert(run.args, 2)]).metrics()
    assert not any(torch.equal(a, b) for a, b in zip(*trained, strict=True))


def test_a_mixture_of_ones_own_classes(run, image_folder, tmp_path):
    folder = image_folder("abcd", (("train", 4), ("valid", 2), ("test", 3)))
    command = ("moe.py", "--data", folder, "--epochs", 1, "--adapter-width", 16, "--experts", " b,d", "c,a")
    process = run(*command, "--out", tmp_path / "a")
    assert process.returncode == 0, process.stderr
    assert ["true", "class", "base", "b+d", "a+c"] in map(str.split, process.stdout.splitlines())
    (path,) = (tmp_path / "a").glob("moe-*/seed1.json")
    result = json.loads(path.read_text())
    shown = {" ".join(line.split()) for line in process.stdout.splitlines()}
    for part, label in moe.ROWS.items():
        assert " ".join([label, *(f"{result[part][metric]:.4f}" for metric in train.METRICS)]) in shown
    name, expert = result["data"]["name"], "custom-hybrid-{}-{}epochs1-dropout0.2"
    names = {expert.format(name, part) for part in ("", "only-a+c-", "only-b+d-")}
    assert path.parent.name == f"moe-{name}-epochs1-experts-b+d_a+c-width16"
    assert {path.name for path in (tmp_path / "a").glob("[!.]*")} == {*names, path.parent.name}
    assert result["config"]["experts"] == ["b,d", "a,c"]
    assert np.sum(result["gate"], 1) == pytest.approx(np.ones(4), abs=1e-5)
    assert np.shape(result["gate"]) == (4, 3) and np.sum(result["confusion"], 1).tolist() == [3] * 4
    base = json.loads((tmp_path / "a" / expert.format(name, "") / "seed1.json").read_text())
    assert result["base"] == pytest.approx(base["test"], rel=1e-5)
    before = {path: models.load(path).state_dict() for path in (tmp_path / "a").rglob("custom-*/seed*.pt")}
    again = run(*command, "--out", tmp_path / "a", "--force")  # reuses the experts
    assert again.stdout.count("skipped, its result exists") == 5
    for path, state in before.items():  # including BatchNorm's buffers
        assert all(torch.equal(value, models.load(path).state_dict()[key]) for key, value in state.items())
    shutil.copytree(tmp_path / "a", tmp_path / "b", ignore=shutil.ignore_patterns("moe-*"))
    assert run(*command, "--out", tmp_path / "b").returncode == 0
    assert_same_bits(tmp_path / "a", tmp_path / "b")


def test_invalid_settings_are_one_line_before_anything_is_trained(run, one_line, image_folder, tmp_path):
    image_folder("abcd")
    rule = "give each group once, with two classes or more, but not all"
    for experts, *words in (
        (["a,b", "a,e"], "--experts a,e", "has no class 'e'"), (["a,b", "c"], "a,b c", rule),
        (["a,b,c,d"], rule), (["a,b", "b,a"], rule),
    ):  # fmt: skip
        one_line(run("moe.py", "--data", "images", "--experts", *experts), 2, *words)
    needed = "give --experts instead of the default"
    one_line(run("moe.py", "--data", "images"), 2, needed, "has no class 'airplane'", "a, b, c, d")
    one_line(run("moe.py", "--data", "synthetic", "--classes", "cat,dog"), 2, "--classes")
    one_line(run("moe.py", "--batch-size", 1), 2, "--batch-size 1", "2 or more images")
    assert not (tmp_path / "results").exists()
