import io
import shutil
import subprocess
import sys

import pytest
import torch
import torchvision
from conftest import HOUSE
from torch import nn
from torch.nn import functional as F

import models

# The study's own networks against the same layers written out, from the weights alone, dropout masks included


def custom(s, x, training):
    for first in (0, 8, 16):  # each block has eight layers
        for c in (first, first + 3):
            x = F.conv2d(x, s[f"features.{c}.weight"], padding=1)
            x = norm(s, f"features.{c + 1}", x, training).relu()
        x = F.dropout(F.max_pool2d(x, 2), 0.3, training)
    x = F.dropout(linear(s, "classifier.1", x.flatten(1)).relu(), 0.6, training)
    return linear(s, "classifier.4", x)


def embedding(s, x, training):
    conv = F.conv2d(x, s["convolution.0.weight"], s["convolution.0.bias"], padding=1, groups=3)
    conv = F.conv2d(conv, s["convolution.1.weight"], s["convolution.1.bias"])
    conv = norm(s, "convolution.2", conv, training).relu().mean((2, 3))
    t = F.conv2d(x, s["patches.weight"], s["patches.bias"], stride=2).flatten(2).transpose(1, 2)
    query, key, value = linear(s, "attention.qkv", t).split(64, dim=2)
    heads = []
    for part in (slice(0, 32), slice(32, 64)):
        scores = query[..., part] @ key[..., part].transpose(1, 2) / 32**0.5
        heads.append(scores.softmax(2) @ value[..., part])
    t = t + linear(s, "attention.out", torch.cat(heads, 2))
    t = F.layer_norm(t, (64,), s["norm1.weight"], s["norm1.bias"])
    t = t + linear(s, "mlp.2", linear(s, "mlp.0", t).relu())
    t = F.layer_norm(t, (64,), s["norm2.weight"], s["norm2.bias"])
    x = linear(s, "fusion.2", linear(s, "fusion.0", torch.cat([conv, t.mean(1)], 1)).relu())
    return F.normalize(norm(s, "fusion.3", x, training), dim=1)


def mixture(s, x, training):
    adapted = [linear(s, f"adapters.{i}", x[:, i]) for i in range(3)]
    gate = sum(adapted) / 3
    for number in (0, 4):
        gate = norm(s, f"gate.{number + 1}", linear(s, f"gate.{number}", gate), training).relu()
        gate = F.dropout(gate, 0.3, training)
    weights = linear(s, "gate.8", gate).softmax(1)
    mixed = sum(weights[:, i, None] * adapted[i] for i in range(3))
    return linear(s, "classifier.2", linear(s, "classifier.0", mixed).relu())


def linear(s, name, x):
    return F.linear(x, s[f"{name}.weight"], s[f"{name}.bias"])


def norm(s, name, x, training):
    mean, var, *affine = (s[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, mean, var, *affine, training)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["custom", "embedding", "mixture"])
def test_a_network_is_its_layers_in_the_studys_order(name, training):
    torch.manual_seed(1)
    model, written, shape, count = {
        "custom": (lambda: models.build("custom", dropout=0.3), custom, (3, 32, 32), 3_229_738),
        "embedding": (models.FewShotEmbedding, embedding, (3, 32, 32), 47_070),
        "mixture": (models.MixtureOfExperts, mixture, (3, 4096), 15_899_469),
    }[name]
    model, inputs = model().double().train(training), torch.randn(6, *shape, dtype=torch.float64)
    assert sum(p.numel() for p in model.parameters()) == count
    for key, value in model.state_dict().items():  # norms that do something, and attention that is confident
        value.mul_(4 if "qkv" in key else 1).add_(0.5 * torch.rand_like(value) if value.dim() == 1 else 0)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(2)
    wanted = written(state, inputs, training)
    torch.manual_seed(2)
    torch.testing.assert_close(model(inputs).double(), wanted, rtol=1e-4, atol=1e-5)
    assert models.build("custom", dropout=0.48).classifier[3].p == 0.9
    assert {layer.momentum for layer in model.modules() if hasattr(layer, "momentum")} == {0.1}  # PyTorch's
    torch.manual_seed(3)
    first = nn.Conv2d(3, 32, 3).weight  # PyTorch's initialization
    torch.manual_seed(3)
    assert torch.equal(models.build("custom").features[0].weight, first)


# torchvision's networks

REPLACED = {  # head, its features, stem, pool
    "resnet18": ("fc", 512, "conv1", "maxpool"),
    "densenet121": ("classifier", 1024, "features.conv0", "features.pool0"),
    "efficientnet_b0": ("classifier", 1280, "features.0.0", None),
}


@pytest.mark.parametrize("stem", ["imagenet", "small"])
@pytest.mark.parametrize("arch", REPLACED)
def test_logits_and_gradients_are_those_of_torchvisions_network_with_a_new_head_and_stem(arch, stem):
    torch.manual_seed(1)
    head, features, first, pool = REPLACED[arch]
    ours, theirs = models.build(arch, 3, stem=stem), torchvision.models.get_model(arch)
    assert sum(isinstance(layer, models.Convolution) for layer in ours.modules()) > 15
    theirs.set_submodule(head, nn.Sequential(nn.Linear(features, 256), nn.ReLU(), nn.Linear(256, 3)))
    if stem == "small":
        width = theirs.get_submodule(first).out_channels
        theirs.set_submodule(first, nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False))
        if pool:
            theirs.set_submodule(pool, nn.Identity())
            std = ours.get_submodule(first).weight.std().item()  # as torchvision initializes convolutions
            assert std == pytest.approx((2 / (9 * width)) ** 0.5, rel=0.1)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    found, rates = [], [[x.p for x in model.modules() if hasattr(x, "p")] for model in (ours, theirs)]
    assert rates[0] == rates[1]
    for model in (ours, theirs):
        model.double().to(memory_format=torch.channels_last)
        for layer in model.modules():
            if hasattr(layer, "p"):
                layer.p = 0.0  # stochastic depth is random
        logits = model(images)
        logits.square().sum().backward()
        found.append([logits, *(p.grad for p in model.parameters())])
    for our, their in zip(*found, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-7)


def saved(content):
    """The bytes of a file that holds content."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("arch", REPLACED)
def test_pretrained_weights_come_from_torchvisions_cache_or_the_file_is_named(arch, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = torchvision.models.get_model_weights(arch)["IMAGENET1K_V1"].url
    path = tmp_path / "hub" / "checkpoints" / url.rsplit("/", 1)[1]
    path.parent.mkdir(parents=True)
    theirs = torchvision.models.get_model(arch).state_dict()
    path.write_bytes(saved(theirs))
    ours = (model := models.build(arch, 4, pretrained=True)).state_dict()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(ours[k], theirs[k]) for k in ours if not k.startswith(REPLACED[arch][0]))
    half, others = path.read_bytes()[:2_000_000], (torch.ones(3), models.build(arch).state_dict(), {"a": 1})
    for content in (b"", half, b"<html>404</html>", *map(saved, others)):
        path.write_bytes(content)
        with pytest.raises(RuntimeError, match=f"{path} is damaged, or not the weights of {arch}: remove it"):
            models.build(arch, pretrained=True)


# Options, entries and saved weights


@pytest.mark.parametrize("function", [models.check, lambda arch, *options: models.build(arch, 10, *options)])
def test_options_that_an_architecture_lacks_are_rejected(function):
    for message, *options in (
        ("unknown architecture 'vgg': choose from custom", "vgg"),
        ("--dropout: resnet18 has no dropout", "resnet18", 0.1),
        ("not for custom", "custom", 0.1, True),
        ("not for custom", "custom", 0.1, False, "small"),
        ("--pretrained: .* ImageNet stem", "resnet18", 0, True, "small"),
    ):
        with pytest.raises(ValueError, match=message):
            function(*options)


class Plain(nn.Linear):
    def __init__(self, num_classes, dropout):
        super().__init__(1 + round(10 * dropout), num_classes)


def contents(arch, model, stem="imagenet"):
    """What train.py saves."""
    known = {"classes": ["a", "b", "c"], "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    return {**known, "arch": arch, "stem": stem, "state_dict": model.state_dict()}


@pytest.mark.parametrize("entry", [Plain, lambda num_classes, dropout: Plain(num_classes, dropout)])
def test_an_architecture_may_be_a_class_or_a_function(entry, tmp_path, monkeypatch):
    monkeypatch.setitem(models.ARCHITECTURES, "plain", entry)
    models.check("plain")
    model = models.build("plain", 3)
    assert models.build("plain", 4, 0.2).weight.shape == (4, 3)
    torch.save(contents("plain", model), tmp_path / "seed1.pt")
    assert torch.equal(models.load(tmp_path / "seed1.pt").bias, model.bias)
    monkeypatch.delitem(models.ARCHITECTURES, "plain")
    with pytest.raises(ValueError, match="seed1.pt: models.py has no architecture 'plain'"):
        models.load(tmp_path / "seed1.pt")


def test_another_network_of_torchvision_is_one_entry(monkeypatch):
    entry = models.Architecture("mobilenet_v3_small", head="classifier", stem="features.0.0")
    monkeypatch.setitem(models.ARCHITECTURES, "mobile", entry)
    for stem, size in (("imagenet", 1), ("small", 2)):
        model = models.build("mobile", 7, stem=stem).eval()
        assert model.features(torch.zeros(1, 3, 32, 32)).shape[2] == size
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7) and len(model.classifier) == 3


@pytest.mark.parametrize(("arch", "stem"), [("custom", "imagenet"), ("resnet18", "small")])
def test_saved_weights_restore_the_network_with_its_classes_mean_and_std(arch, stem, tmp_path):
    model, images = models.build(arch, 3, stem=stem), torch.randn(2, 3, 32, 32)
    whole = contents(arch, model, stem)
    torch.save(whole, tmp_path / "seed1.pt")
    again = models.load(tmp_path / "seed1.pt")
    assert torch.equal(again(images), model.eval()(images)) and not again.training
    assert all(getattr(again, name) == whole[name] for name in ("classes", "mean", "std"))


def test_other_files_and_edited_networks_are_named(tmp_path):
    path, whole = tmp_path / "seed1.pt", saved(contents("custom", models.build("custom", 3)))
    others = b"", b"text", whole[:999], whole[:-99], saved({"arch": "fewshot", "state_dict": {}}), saved([1])
    cases = [(content, "is damaged, or not") for content in others]
    layers = {1: nn.Linear(4096, 512, bias=False), 4: nn.Linear(512, 4), 3: nn.BatchNorm1d(9)}
    for number, layer in layers.items():
        model = models.build("custom", 3)
        model.classifier[number] = layer
        cases.append((saved(contents("custom", model)), ": its layers differ from those of models.py: train"))
    for content, message in cases:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"seed1.pt ?{message}"):
            models.load(path)
    with pytest.raises(FileNotFoundError):
        models.load(tmp_path / "missing.pt")


def test_models_work_alone_in_another_project(tmp_path):
    shutil.copy(HOUSE / "models.py", tmp_path)
    code = "import models, torch; models.build('custom')(torch.zeros(2, 3, 32, 32))"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
