import json
import types

import numpy as np
import pytest
import torch
from conftest import assert_same_bits
from sklearn.cluster import KMeans

import augment
import data
import fewshot
import models
import train

TINY = ("--data", "synthetic", "--fraction", 0.1, "--episodes", 12, "--way", 3, "--shot", 2, "--query", 3)


def test_embedding_layer_by_layer():
    model = models.FewShotEmbedding().eval()
    assert 47_000 <= sum(p.numel() for p in model.parameters()) <= 49_000
    shapes = {}
    for name, layer in model.named_modules():
        layer.register_forward_hook(
            lambda _, __, output, name=name: shapes.update({name: tuple(output.shape[1:])})
        )
    embedding = model(torch.randn(2, 3, 32, 32))
    assert torch.allclose(embedding.norm(dim=1), torch.ones(2))
    assert [shapes[f"convolution.{i}"] for i in range(6)] == [
        (3, 32, 32), (32, 32, 32), (32, 32, 32), (32, 32, 32), (32, 1, 1), (32,)]  # fmt: skip
    assert shapes["patches"] == (64, 16, 16)
    assert shapes["attention.qkv"] == (256, 192)
    assert [shapes[name] for name in ("attention", "norm1", "mlp.0", "mlp.2", "norm2")] == [(256, 64)] * 5
    assert [shapes[f"fusion.{i}"] for i in range(4)] == [(128,), (128,), (64,), (64,)]
    depthwise, pointwise = model.convolution[:2]
    assert depthwise.groups == 3 and depthwise.kernel_size == (3, 3) and pointwise.kernel_size == (1, 1)
    assert model.attention.heads == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_equals_pytorchs_own(dtype):
    ours, theirs = models.SelfAttention(64, 2), torch.nn.MultiheadAttention(64, 2, batch_first=True)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    tokens = torch.randn(3, 20, 64)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found, wanted = ours(tokens), theirs(tokens, tokens, tokens)[0]
    assert torch.allclose(found.float(), wanted.float(), atol=1e-6 if dtype == torch.float32 else 4e-3)


def test_each_episode_draws_new_classes_and_no_image_twice():
    labels = torch.arange(400) % 8
    rows = fewshot.draw_episodes(labels, 300, 5, 4, 6, torch.Generator().manual_seed(1))
    assert rows.shape == (300, 5, 10)
    classes = labels[rows[:, :, 0]]
    assert torch.equal(labels[rows], classes[:, :, None].expand(-1, -1, 10))
    assert all(len(set(episode)) == 50 for episode in rows.flatten(1).tolist())
    assert all(len(set(chosen)) == 5 for chosen in classes.tolist())
    counts = torch.bincount(rows.flatten(), minlength=400)  # all images about equally often
    assert counts.min() > 15 and counts.max() < 65
    again = fewshot.draw_episodes(labels, 300, 5, 4, 6, torch.Generator().manual_seed(1))
    assert torch.equal(rows, again)


def test_episodes_of_unequal_classes_never_draw_a_missing_image():
    labels = torch.tensor([0] * 50 + [1] * 5 + [2] * 7)
    rows = fewshot.draw_episodes(labels, 200, 2, 2, 3, torch.Generator().manual_seed(1))
    assert rows.min() >= 0


def test_queries_are_augmented_and_support_is_not():
    args = types.SimpleNamespace(way=3, shot=2, query=4)
    run = types.SimpleNamespace(args=args, dataset=data.synthetic((200, 50, 50)), device=torch.device("cpu"))
    seen = {}
    for name in ("none", "flip+autoaugment"):
        generator, (stream,) = torch.Generator().manual_seed(1), augment.parse(name)
        seen[name] = list(fewshot.episodes(run, 5, generator, stream))
    for (plain, labels), (augmented, _) in zip(*seen.values(), strict=True):
        assert plain.shape == (18, 3, 32, 32) and labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert torch.equal(plain[:6], augmented[:6]) and not torch.equal(plain[6:], augmented[6:])


def test_prototypical_step_equals_easyfsls():
    methods = pytest.importorskip("easyfsl.methods", reason="pip install easyfsl")
    embeddings = torch.nn.functional.normalize(torch.randn(5 * (4 + 6), 64), dim=1)
    theirs = methods.PrototypicalNetworks(torch.nn.Identity())
    theirs.process_support_set(embeddings[:20], torch.arange(5).repeat_interleave(4))
    scores = theirs(embeddings[20:])  # minus the distance, not squared
    ours = fewshot.episode_logits(embeddings, 5, 4)
    assert torch.allclose(ours, -scores.square(), atol=1e-5)
    assert torch.equal(ours.argmax(1), scores.argmax(1))


def test_logits_are_minus_squared_distances_to_the_means():
    embeddings = torch.randn(3 * (2 + 5), 8)
    logits = fewshot.episode_logits(embeddings, 3, 2)
    for query in range(15):
        for label in range(3):
            mean = (embeddings[2 * label] + embeddings[2 * label + 1]) / 2
            wanted = -((embeddings[6 + query] - mean) ** 2).sum()
            assert logits[query, label] == pytest.approx(wanted.item(), abs=1e-5)


@pytest.mark.parametrize(("count", "clusters"), [(300, 3), (90, 5), (40, 1), (2, 3), (4, 4)])
def test_kmeans_is_as_good_as_scikit_learns(count, clusters):
    generator = torch.Generator().manual_seed(count)
    points = torch.randn(count, 16, generator=generator) + 3 * torch.randint(
        0, 3, (count, 1), generator=generator
    )
    centres, inertia = fewshot.kmeans(points, clusters, generator)
    theirs = KMeans(min(clusters, count), n_init=10, random_state=0).fit(points.numpy()).inertia_
    assert len(centres) == min(clusters, count)
    assert inertia <= theirs * 1.01 + 1e-3
    assert torch.cdist(points, centres).square().amin(1).sum().item() == pytest.approx(
        inertia, rel=1e-5, abs=1e-5
    )


def test_kmeans_of_equal_points():
    centres, inertia = fewshot.kmeans(torch.ones(6, 4), 3, torch.Generator().manual_seed(1))
    assert inertia == pytest.approx(0, abs=1e-6) and torch.isfinite(centres).all()


def test_kmeans_ends_even_without_convergence(monkeypatch):
    monkeypatch.setattr(torch, "equal", lambda *_: False)
    centres, _ = fewshot.kmeans(torch.randn(20, 4), 3, torch.Generator().manual_seed(1), starts=1)
    assert torch.isfinite(centres).all()


def test_the_nearest_point_decides():
    points, owners = torch.randn(9, 4), torch.arange(9) // 3
    tests, labels = torch.randn(600, 4), torch.randint(0, 3, (600,))
    totals = fewshot.classify(tests, labels, points, owners, 3)
    found = owners[torch.cdist(tests, points).argmin(1)]
    assert torch.equal(totals.confusion, train.confusion_matrix(found, labels, 3))


def test_run_result_and_same_bits(run, tmp_path):
    for out in ("a", "b"):
        process = run("fewshot.py", *TINY, "--out", tmp_path / out)
        assert process.returncode == 0, process.stderr
    assert_same_bits(tmp_path / "a", tmp_path / "b")
    (path,) = (tmp_path / "a").rglob("*.json")
    assert path.parent.name == "fewshot-p0.1-synthetic-way3-shot2-query3-episodes12"
    result = json.loads(path.read_text())
    assert result["episodes"]["count"] == 600 and 0 < result["episodes"]["confidence95"] < 0.05
    for name in ("test", "one_prototype", "nearest_image"):
        assert set(result[name]) == set(train.METRICS)
    assert np.array(result["confusion"]).sum() == 1000
    assert len(result["history"]) == 1 and set(result["history"][0]["train"]) == set(train.METRICS)
    assert "skipped" in run("fewshot.py", *TINY, "--out", tmp_path / "a").stdout


@pytest.mark.parametrize(
    ("splits", "fraction", "words"),
    [((30, 30, 30), 0.1, ("3 images in train", "raise --fraction")), ((9, 30, 30), 1, ("9 images in train", "--query 20")),
     ((30, 6, 30), 1, ("6 images in valid", "--shot 5"))],
)  # fmt: skip
def test_a_class_too_small_for_an_episode_names_its_split(
    splits, fraction, words, image_folder, run, one_line
):
    image_folder(("cat", "dog", "cow", "pig", "hen"), tuple(zip(data.SPLITS, splits, strict=True)))
    process = run("fewshot.py", "--data", "images", "--fraction", fraction, "--query", 20)
    one_line(process, 2, "class cat has", *words)
    assert ("raise --fraction" in process.stderr) == (fraction < 1)


def test_torchrun_is_rejected(run, one_line):
    for script in ("fewshot.py", "moe.py"):
        process = run(script, "--data", "synthetic", WORLD_SIZE="2", RANK="0")
        one_line(process, 2, "only train.py supports torchrun")
