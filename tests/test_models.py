import shutil
import subprocess
import sys

import pytest
import torch
import torchvision
from conftest import HOUSE

import models


@pytest.mark.parametrize(
    ("arch", "count"),
    [
        ("custom", 3_229_738),
        ("resnet18", 11_310_410),
        ("densenet121", 7_218_826),
        ("efficientnet_b0", 4_338_054),
    ],
)
def test_parameter_counts(arch, count):
    model = models.build(arch)
    assert sum(p.numel() for p in model.parameters()) == count
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("arch", "count", "before_head"),
    [("resnet18", 11_302_730, 4), ("densenet121", 7_211_146, 4), ("efficientnet_b0", 4_338_054, 2)],
)
def test_small_stem_keeps_the_resolution_and_the_rest_of_the_network(arch, count, before_head):
    model, plain = models.build(arch, stem="small").eval(), models.build(arch)
    assert sum(p.numel() for p in model.parameters()) == count
    trunk = {"resnet18": "layer1", "densenet121": "features.denseblock1", "efficientnet_b0": "features.1"}[
        arch
    ]
    seen = []
    model.get_submodule(trunk).register_forward_hook(lambda _, given, __: seen.append(given[0].shape[2:]))
    last = {"resnet18": "layer4", "densenet121": "features.denseblock4", "efficientnet_b0": "features.8"}[
        arch
    ]
    model.get_submodule(last).register_forward_hook(lambda _, __, output: seen.append(output.shape[2:]))
    model(torch.randn(2, 3, 32, 32))
    assert seen == [(32, 32), (before_head, before_head)]
    first = "conv1.weight" if arch == "resnet18" else "features.conv0.weight"
    other = {
        name for name, value in model.state_dict().items() if value.shape != plain.state_dict()[name].shape
    }
    assert other == (set() if arch == "efficientnet_b0" else {first})


def test_custom_network_layer_by_layer():
    model = models.build("custom", num_classes=7, dropout=0.3).eval()
    seen = []
    for layer in [*model.features, *model.classifier]:
        layer.register_forward_hook(
            lambda layer, _, output: seen.append((type(layer).__name__, tuple(output.shape[1:])))
        )
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    expected = []
    for (first, second), side in zip(((32, 64), (128, 128), (256, 256)), (32, 16, 8), strict=True):
        for width in (first, second):
            expected += [(kind, (width, side, side)) for kind in ("Conv2d", "BatchNorm2d", "ReLU")]
        expected += [(kind, (second, side // 2, side // 2)) for kind in ("MaxPool2d", "Dropout")]
    expected += [
        ("Flatten", (4096,)),
        ("Linear", (512,)),
        ("ReLU", (512,)),
        ("Dropout", (512,)),
        ("Linear", (7,)),
    ]
    assert seen == expected
    convolutions = [layer for layer in model.features if isinstance(layer, torch.nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in convolutions] == [
        (3, 32), (32, 64), (64, 128), (128, 128), (128, 256), (256, 256)]  # fmt: skip
    assert all(c.kernel_size == (3, 3) and c.padding == (1, 1) for c in convolutions)
    drops = [layer.p for layer in model.modules() if isinstance(layer, torch.nn.Dropout)]
    assert drops == [0.3, 0.3, 0.3, 0.6]
    assert models.build("custom", dropout=0.48).classifier[3].p == 0.9


@pytest.mark.parametrize("arch", list(models.ARCHITECTURES)[1:])
def test_new_heads_keep_torchvisions_trunk(arch):
    model = models.build(arch, num_classes=3)
    head = model.fc if arch == "resnet18" else model.classifier
    assert [type(layer).__name__ for layer in head] == ["Linear", "ReLU", "Linear"]
    assert (head[0].out_features, head[2].in_features, head[2].out_features) == (256, 256, 3)
    reference = torchvision.models.get_model(arch).state_dict()
    trunk = {k: v.shape for k, v in model.state_dict().items() if not k.startswith(("fc", "classifier"))}
    assert trunk == {k: v.shape for k, v in reference.items() if not k.startswith(("fc", "classifier"))}
    assert model.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize("stem", ["imagenet", "small"])
@pytest.mark.parametrize("arch", list(models.ARCHITECTURES)[1:])
def test_matrix_products_equal_convolutions(arch, stem):
    torch.manual_seed(1)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    model = models.build(arch, stem=stem).double().to(memory_format=torch.channels_last)
    for layer in model.modules():
        if hasattr(layer, "p"):
            layer.p = 0.0  # stochastic depth is random
    found = []
    for kind in (models.Convolution, torch.nn.Conv2d):
        changed = [layer for layer in model.modules() if isinstance(layer, torch.nn.Conv2d)]
        for layer in changed:
            layer.__class__ = kind
        model.zero_grad()
        logits = model(images)
        logits.square().sum().backward()
        found.append([logits, *(p.grad for p in model.parameters())])
    assert len(changed) > 15
    for ours, torchs in zip(*found, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("arch", list(models.ARCHITECTURES)[1:])
def test_pretrained_weights_come_from_torchvisions_cache(arch, tmp_path, monkeypatch):
    """A weights file in torchvision's cache, under the name it downloads, ends up in the trunk."""
    reference = torchvision.models.get_model(arch)
    torch.nn.init.constant_(next(reference.parameters()), 0.25)
    url = torchvision.models.get_model_weights(arch)["IMAGENET1K_V1"].url
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(reference.state_dict(), tmp_path / "hub" / "checkpoints" / url.rsplit("/", 1)[1])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model = models.build(arch, num_classes=4, pretrained=True)
    assert next(model.parameters()).unique().tolist() == [0.25]


def test_invalid_options_are_rejected():
    with pytest.raises(ValueError, match="unknown architecture 'vgg'"):
        models.build("vgg")
    with pytest.raises(ValueError, match="resnet18 has no dropout"):
        models.build("resnet18", dropout=0.1)
    with pytest.raises(ValueError, match="--pretrained: custom"):
        models.build("custom", pretrained=True)
    with pytest.raises(ValueError, match="--stem: custom"):
        models.build("custom", stem="small")
    with pytest.raises(ValueError, match="--pretrained: .* ImageNet stem"):
        models.build("resnet18", pretrained=True, stem="small")


def test_a_fifth_architecture_is_one_entry(monkeypatch):
    """A torchvision network, with a new head and both stems, or a custom constructor."""
    entry = models.Architecture("mobilenet_v3_small", head="classifier", stem="features.0.0")
    monkeypatch.setitem(models.ARCHITECTURES, "mobilenet_v3_small", entry)
    monkeypatch.setitem(
        models.ARCHITECTURES,
        "linear",
        models.Architecture(lambda classes, dropout: torch.nn.Linear(3, classes)),
    )
    for stem, size in (("imagenet", 1), ("small", 2)):
        model = models.build("mobilenet_v3_small", 7, stem=stem).eval()
        assert model.features(torch.zeros(1, 3, 32, 32)).shape[2] == size
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
        assert [type(layer) for layer in model.classifier] == [
            torch.nn.Linear,
            torch.nn.ReLU,
            torch.nn.Linear,
        ]
    assert models.build("linear", 7).out_features == 7


@pytest.mark.parametrize("arch", ["custom", "resnet18"])
def test_saved_weights_restore_the_network_with_its_classes_mean_and_std(arch, tmp_path):
    stem = "imagenet" if arch == "custom" else "small"
    network = models.build(arch, 3, stem=stem)
    saved = {
        "arch": arch,
        "stem": stem,
        "classes": ["a", "b", "c"],
        "mean": [0.1, 0.2, 0.3],
        "std": [0.5, 0.6, 0.7],
    }
    torch.save({**saved, "state_dict": network.state_dict()}, tmp_path / "seed1.pt")
    again = models.load(tmp_path / "seed1.pt")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(images), network.eval()(images)) and not again.training
    assert (again.classes, again.mean, again.std) == (saved["classes"], saved["mean"], saved["std"])
    for content in (
        {"arch": "fewshot", "state_dict": {}},
        {"arch": "moe", "classes": [], "stem": "x", "state_dict": {}},
    ):
        torch.save(content, tmp_path / "other.pt")
        with pytest.raises(ValueError, match="other.pt is damaged, or not"):
            models.load(tmp_path / "other.pt")


def test_models_work_alone_in_another_project(tmp_path):
    shutil.copy(HOUSE / "models.py", tmp_path)
    code = "import models, torch; models.build('custom')(torch.zeros(2, 3, 32, 32))"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
