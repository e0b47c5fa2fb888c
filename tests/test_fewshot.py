import contextlib
import json
import types

import pytest
import torch
from conftest import assert_same_bits
from sklearn.cluster import KMeans

import data
import fewshot
import models
import train

CPU = torch.device("cpu")


def a_run(dataset, **settings):
    """What the functions of fewshot.py need of a run."""
    args = types.SimpleNamespace(**{"way": 3, "shot": 2, "query": 4, **settings})
    return types.SimpleNamespace(args=args, dataset=dataset, device=CPU, dtype=torch.float32)


def test_attention_in_bf16_equals_pytorchs_own():
    ours, theirs = models.SelfAttention(64, 2), torch.nn.MultiheadAttention(64, 2, batch_first=True)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    tokens = torch.randn(3, 20, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = ours(tokens), theirs(tokens, tokens, tokens)[0]
    assert torch.allclose(found.float(), wanted.float(), atol=4e-3)


def test_each_episode_draws_new_classes_and_no_image_twice():
    """The last class has no more images than an episode needs."""
    labels = torch.cat([torch.arange(360) % 9, torch.full((10,), 9)])
    parts = fewshot.episode_rows(labels, 300, 5, 4, 6, torch.Generator().manual_seed(1))
    rows = torch.cat([part.view(300, 5, -1) for part in parts], 2)
    assert rows.shape == (300, 5, 4 + 6) and rows.min() >= 0
    classes = labels[rows]
    assert (classes == classes[:, :, :1]).all()
    assert all(len(set(chosen)) == 5 for chosen in classes[:, :, 0].tolist())
    assert all(len(set(episode)) == 50 for episode in rows.flatten(1).tolist())
    counts = torch.bincount(rows.flatten())[:360]  # about equally often
    assert counts.min() > 15 and counts.max() < 65


def test_queries_alone_are_augmented_with_the_episodes_generator():
    generator, dataset, seen = torch.Generator(), data.synthetic((60, 10, 10)), []
    for stream in ([], [lambda images, given: 255 - images if given is generator else 1 / 0]):
        seen.append(list(fewshot.episodes(a_run(dataset), 3, generator.manual_seed(1), stream)))
    for (plain, _), (augmented, _) in zip(*seen, strict=True):
        assert (plain != augmented).any(3).any(2).any(1).tolist() == [False] * 6 + [True] * 12


def test_logits_are_minus_squared_distances_to_the_means():
    embeddings = torch.randn(3 * (2 + 5), 8)
    logits = fewshot.Prototypes(torch.nn.Identity(), 3, 2)(embeddings)
    means = (embeddings[0:6:2] + embeddings[1:6:2]) / 2
    assert torch.allclose(logits, -(torch.cdist(embeddings[6:], means) ** 2), atol=1e-4)


@pytest.mark.parametrize(("count", "clusters"), [(300, 3), (90, 5), (40, 1), (2, 3), (4, 4)])
def test_kmeans_is_as_good_as_scikit_learns(count, clusters):
    generator = torch.Generator().manual_seed(count)
    points = torch.randn(count, 16, generator=generator)
    points += 3 * torch.randint(0, 3, (count, 1), generator=generator)
    centres, inertia = fewshot.kmeans(points, clusters, generator)
    theirs = KMeans(min(clusters, count), n_init=10, random_state=0).fit(points.numpy()).inertia_
    assert len(centres) == min(clusters, count) and inertia <= theirs * 1.01 + 1e-3


def test_the_nearest_point_decides():
    points, owners = torch.randn(9, 4), torch.arange(9) // 3
    tests, labels = torch.randn(600, 4), torch.randint(0, 3, (600,))
    totals = fewshot.classify(tests, labels, points, owners, 3)
    found = owners[torch.cdist(tests, points).argmin(1)]
    assert torch.equal(totals.confusion, train.confusion_matrix(found, labels, 3))


@pytest.mark.parametrize(
    ("classes", "images", "valid", "options", "taken"),
    [
        (10, 50, 50, "", (5, 5, 10)), (10, 8, 50, "", (5, 5, 3)), (10, 6, 50, "", (5, 4, 2)),
        (10, 4, 50, "", (5, 2, 2)), (10, 3, 50, "", (5, 1, 2)), (10, 2, 50, "", (5, 1, 1)),
        (4, 50, 6, "", (4, 4, 2)), (10, 4, 50, "--shot 3", (5, 3, 1)), (10, 8, 50, "--query 6", (5, 2, 6)),
        (2, 50, 9, "--way 2", (2, 5, 4)), *((10, 50, 50, f"--fraction {p}", (5, 5, query)) for p, query in (
        (0.0001, 2), (0.001, 2), (0.002, 5), (0.005, 5), (0.02, 10), (0.05, 15), (0.1, 20))),
        (1, 9, 9, "", "--way 2"), (10, 1, 9, "", "10 classes, the smallest with 1 images in train .airplane"),
        (10, 8, 50, "--shot 5 --query 4", "too few for --way 5 --shot 5 --query 4"),
    ],
)  # fmt: skip
def test_sizes_are_what_there_is_or_as_asked(classes, images, valid, options, taken, monkeypatch, capsys):
    def split(count):
        labels = torch.arange(classes).repeat(count)
        return data.Split(torch.zeros(len(labels), 3, 32, 32, dtype=torch.uint8), labels)

    dataset = data.synthetic((10, 10, 10))
    dataset = dataset._replace(classes=dataset.classes[:classes], train=split(images), valid=split(valid))
    monkeypatch.setattr(train, "load", lambda args, device: dataset)
    args = fewshot.parse_arguments(options.split())
    wanted = [getattr(args, name) or size for name, size in fewshot.recipe(args.fraction).items()]
    refused = pytest.raises(ValueError, match=taken) if isinstance(taken, str) else contextlib.nullcontext()
    with refused:
        fewshot.load(args, CPU)
        assert (args.way, args.shot, args.query) == taken
        assert ("episodes use" in capsys.readouterr().out) == (list(taken) != wanted)


def test_a_small_data_set_runs_by_itself_with_the_same_bits_twice(run, one_line, image_folder, tmp_path):
    image_folder("abcd", (("train", 8), ("valid", 6), ("test", 3)))
    command = ("fewshot.py", "--data", "images", "--fraction", 0.25, "--episodes", 6)
    for out in ("a", "b"):
        process = run(*command, "--out", out)
        assert process.returncode == 0, process.stderr
    assert_same_bits(tmp_path / "a", tmp_path / "b")
    (path,) = (tmp_path / "a").rglob("*.json")
    result = json.loads(path.read_text())
    assert path.parent.name == f"fewshot-p0.25-{result['data']['name']}-way4-shot1-query1-episodes6"
    assert [result["config"][size] for size in ("way", "shot", "query")] == [4, 1, 1]
    assert "2 images in train" in process.stdout and "--way 4 --shot 1 --query 1" in process.stdout
    assert 0 < result["episodes"]["confidence95"] < 0.05
    numbers = [f"{result['one_prototype'][metric]:.4f}" for metric in train.METRICS]
    assert " ".join(["1 prototype per class", *numbers]) in " ".join(process.stdout.split())
    assert "skipped" in run(*command, "--out", "a").stdout
    process = run(*command, "--way", 5, "--query", 20, "--out", "c")  # what is asked for is done or refused
    one_line(process, 2, "4 classes", "6 images in valid (a)", "too few for --way 5 --shot 1 --query 20")
    assert not (tmp_path / "c").exists()
