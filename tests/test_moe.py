import json
import shutil
import types

import numpy as np
import pytest
import torch
from conftest import assert_same_bits

import models
import moe
import train


def test_mixture_layer_by_layer_and_its_weights_sum_to_1():
    model = models.MixtureOfExperts().eval()
    shapes = {}
    for name, layer in model.named_modules():
        layer.register_forward_hook(
            lambda _, __, output, name=name: shapes.update({name: tuple(output.shape[1:])})
        )
    features = torch.randn(5, 3, 4096)
    logits = model(features)
    assert logits.shape == (5, 10)
    assert [shapes[f"adapters.{i}"] for i in range(3)] == [(1280,)] * 3
    assert [shapes[f"gate.{i}"] for i in range(10)] == [(64,)] * 4 + [(32,)] * 4 + [(3,)] * 2
    assert [shapes[f"classifier.{i}"] for i in range(3)] == [(64,), (64,), (10,)]
    adapted = torch.stack([model.adapters[i](features[:, i]) for i in range(3)], 1)
    weights = model.gate(adapted.mean(1))
    assert torch.allclose(weights.sum(1), torch.ones(5))
    mixed = sum(weights[:, i : i + 1] * adapted[:, i] for i in range(3))
    assert torch.allclose(logits, model.classifier(mixed), atol=1e-5)
    assert torch.allclose(logits, model(model.adapt(features)), atol=1e-5)


def test_adapters_are_trained_only_on_request():
    assert not any(p.requires_grad for p in models.MixtureOfExperts().adapters.parameters())
    assert all(p.requires_grad for p in models.MixtureOfExperts(train_adapters=True).parameters())


def test_with_a_width_of_512_the_mixture_is_as_large_as_three_bases():
    model, base = models.MixtureOfExperts(3, 10, True, 512), models.build("custom")
    assert model(torch.randn(2, 3, 4096)).shape == model(torch.randn(2, 3, 512)).shape == (2, 10)
    dataset = train.data.synthetic((40, 10, 10))
    args = moe.parse_arguments(["--train-adapters", "--adapter-width", "512", "--animals", "all"])
    cost = moe.cost(args, [base] * 3, model, dataset)
    assert cost["test"]["bases"] == 2 and cost["test"]["parameters"] == 9_742_509
    assert 1 < cost["test"]["parameters"] / cost["ensemble"]["parameters"] < 1.01


def test_feature_batches_hold_every_row_once():
    split = train.data.Split(torch.arange(33.0).view(33, 1), torch.arange(33))
    plan = train.data.plan(33, 16, seed=1, epoch=2)
    batches = list(moe.feature_batches(split, plan, torch.device("cpu")))
    assert [len(batch) for _, batch in batches] == [16, 17]
    assert sorted(torch.cat([batch for _, batch in batches]).tolist()) == list(range(33))
    assert all(torch.equal(x[:, 0].long(), y) for x, y in batches)


def test_run_trains_experts_leaves_them_unchanged_and_is_repeatable(run, image_folder, tmp_path, monkeypatch):
    folder = image_folder(train.data.CLASSES, (("train", 4), ("valid", 2), ("test", 3)))
    command = ("moe.py", "--data", folder, "--epochs", 1)
    process = run(*command, "--out", tmp_path / "a")
    assert process.returncode == 0, process.stderr
    assert "mean weight of each expert" in process.stdout and "ensemble of three bases" in process.stdout
    monkeypatch.chdir(tmp_path)  # where the run was: folder names are relative to it
    key = train.data.key(str(folder))
    expert = f"custom-hybrid-{key}-{{}}epochs1-dropout0.2"
    names = {expert.format(part) for part in ("", "only-vehicles-", "only-cat+deer+dog+horse-")}
    mixture = f"moe-{key}-epochs1"
    assert {path.name for path in (tmp_path / "a").iterdir()} == {*names, mixture}
    before = {path: models.load(path).state_dict() for path in (tmp_path / "a").rglob("custom-*/seed*.pt")}
    result = json.loads((tmp_path / "a" / mixture / "seed1.json").read_text())
    assert np.allclose(np.array(result["gate"]).sum(1), 1, atol=1e-5) and np.array(result["gate"]).shape == (
        10,
        3,
    )
    for name in ("test", "base", "pair", "ensemble"):
        assert set(result[name]) == set(train.METRICS)
    assert result["cost"]["ensemble"] == {"parameters": 3 * 3_229_738, "bases": 3}
    assert result["cost"]["test"]["bases"] == 1.8  # all ten classes, four vehicles, four animals
    base = json.loads((tmp_path / "a" / expert.format("") / "seed1.json").read_text())
    assert abs(result["base"]["accuracy"] - base["test"]["accuracy"]) < 1e-9

    again = run(*command, "--out", tmp_path / "a", "--force")  # reuses the experts
    assert again.stdout.count("skipped, its result exists") == 5
    for path, state in before.items():  # including BatchNorm's buffers
        assert all(torch.equal(value, models.load(path).state_dict()[key]) for key, value in state.items())
    shutil.copytree(tmp_path / "a", tmp_path / "b", ignore=shutil.ignore_patterns("moe-*"))
    assert run(*command, "--out", tmp_path / "b").returncode == 0
    assert_same_bits(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapters", [False, True])
def test_features_are_in_the_compute_dtype_and_experts_stay_unchanged(adapters, dtype):
    torch.manual_seed(0)
    network = models.build("custom").eval().requires_grad_(False)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    dataset, cpu = train.data.synthetic((300, 10, 10)), torch.device("cpu")
    args = types.SimpleNamespace(train_adapters=adapters, adapter_width=16)
    run = types.SimpleNamespace(args=args, dataset=dataset, device=cpu, dtype=dtype)
    model = models.MixtureOfExperts(3, 10, adapters, 16)
    seen, labels = moe.features(run, [network] * 3, model, dataset.train)
    assert torch.equal(labels, dataset.train.labels)
    assert seen.shape == (300, 3, 4096 if adapters else 16) and seen.dtype == dtype
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    images = train.data.normalise(dataset.train.images[290:], dataset)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        wanted = network.features(images).flatten(1)
    wanted = wanted if adapters else model.adapters[0](wanted.float())
    torch.testing.assert_close(seen[290:, 0].float(), wanted.float(), rtol=0.01, atol=0.01)


def test_invalid_settings_are_one_line_before_anything_is_trained(run, one_line, image_folder, tmp_path):
    one_line(run("moe.py", "--data", "synthetic", "--classes", "cat,dog"), 2, "--classes")
    one_line(run("moe.py", "--data", "synthetic", "--animals", "cat,cow"), 2, "--animals", "'cow'")
    process = run("moe.py", "--data", image_folder())
    one_line(process, 2, "the vehicles expert", "no class 'airplane'", "cat, dog")
    assert not list(tmp_path.rglob("seed1*"))
