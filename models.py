"""The networks of the study, for 3x32x32 images.

    from models import build
    model = build("custom", num_classes=10, dropout=0.2)  # or resnet18, densenet121, efficientnet_b0
    logits = model(images)  # float (N, 3, 32, 32), normalised -> float (N, 10)

Needs torch and torchvision only: copy this file into your own project.
"""

import contextlib
import os
import sys
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F


class CustomCNN(nn.Module):
    """Three blocks of two 3x3 conv-BN-ReLU, 2x2 max-pool, dropout k; then two linear layers.

    images: float (N, 3, 32, 32). Returns logits, float (N, num_classes). dropout: k, in [0, 1); before the
    last layer it is min(2k, 0.9), as in the study. The convolutions have no bias: the study leaves this open,
    and the batch norm after each one removes any constant."""

    def __init__(self, num_classes=10, dropout=0.0):
        super().__init__()
        self.features = nn.Sequential(
            *self._block(3, 32, 64, dropout),  # (N, 64, 16, 16)
            *self._block(64, 128, 128, dropout),  # (N, 128, 8, 8)
            *self._block(128, 256, 256, dropout),  # (N, 256, 4, 4)
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),  # (N, 4096)
            nn.Linear(256 * 4 * 4, 512),
            nn.ReLU(inplace=True),
            nn.Dropout(min(2 * dropout, 0.9)),
            nn.Linear(512, num_classes),
        )

    @staticmethod
    def _block(inputs, middle, outputs, dropout):
        for width_in, width_out in ((inputs, middle), (middle, outputs)):
            yield nn.Conv2d(width_in, width_out, kernel_size=3, padding=1, bias=False)
            yield nn.BatchNorm2d(width_out)
            yield nn.ReLU(inplace=True)
        yield nn.MaxPool2d(2)
        yield nn.Dropout(dropout)

    def forward(self, images):
        return self.classifier(self.features(images))


class Convolution(nn.Conv2d):
    """nn.Conv2d; on a CPU, 1x1 kernels and 1x1 maps become a matrix product, or an element-wise product if
    depthwise; equal up to rounding. PyTorch's own backward pass takes several times as long: over a quarter
    of a training step of resnet18, densenet121 and efficientnet_b0."""

    def forward(self, images):
        size, stride = self.kernel_size[0], self.stride[0]
        single = (size == 1 or images.shape[2:] == (1, 1)) and self.padding[0] == size // 2
        depthwise = self.groups == self.in_channels == self.out_channels and self.bias is None
        if not single or images.device.type != "cpu" or not (self.groups == 1 or depthwise):
            return super().forward(images)
        weight = self.weight.flatten(1) if size == 1 else self.weight[:, :, size // 2, size // 2]
        pixels = images[:, :, ::stride, ::stride].permute(0, 2, 3, 1)
        pixels = F.linear(pixels, weight, self.bias) if self.groups == 1 else pixels * weight[:, 0]
        return pixels.permute(0, 3, 1, 2)


class Architecture(NamedTuple):
    """A torchvision network, and the names of the submodules that build replaces."""

    name: str  # torchvision's
    head: str  # its first linear layer gives the feature count
    stem: str  # the first convolution
    pool: str = ""  # the max-pool after it, if there is one


# An entry is a torchvision network, or a class or function (num_classes, dropout) -> nn.Module
ARCHITECTURES = {
    "custom": CustomCNN,
    "resnet18": Architecture("resnet18", head="fc", stem="conv1", pool="maxpool"),
    "densenet121": Architecture("densenet121", "classifier", stem="features.conv0", pool="features.pool0"),
    # torchvision's head has 20 % dropout, removed here since the recipe has none
    "efficientnet_b0": Architecture("efficientnet_b0", head="classifier", stem="features.0.0"),
}


def check(arch, dropout=0.0, pretrained=False, stem="imagenet"):
    """Raise ValueError for options that the architecture does not support."""
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}: choose from {', '.join(ARCHITECTURES)}")
    if isinstance(ARCHITECTURES[arch], Architecture):
        if dropout:
            raise ValueError(f"--dropout: {arch} has no dropout setting; custom has one")
        if pretrained and stem == "small":
            raise ValueError("--pretrained: the weights are for the ImageNet stem; omit --stem")
    elif pretrained or stem != "imagenet":
        raise ValueError(f"--pretrained and --stem are for torchvision's networks, not for {arch}")


def build(arch, num_classes=10, dropout=0.0, pretrained=False, stem="imagenet"):
    """One of ARCHITECTURES, with `num_classes` outputs.

    torchvision's networks get the head Linear(features, 256), ReLU, Linear(256, num_classes); nothing is
    frozen. pretrained: start from torchvision's ImageNet weights IMAGENET1K_V1 (resnet18 and efficientnet_b0
    did in the study). stem: `imagenet`, unchanged, or `small`, for 32x32 images: a first 3x3 convolution with
    stride 1, and no max-pool (He et al., 2016, section 4.2). Raises ValueError for an option that the
    architecture does not support, RuntimeError if weights cannot be downloaded or read."""
    check(arch, dropout, pretrained, stem)
    entry = ARCHITECTURES[arch]
    if not isinstance(entry, Architecture):
        return entry(num_classes, dropout)
    model = _from_torchvision(entry.name, pretrained)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.__class__ = Convolution
    linear = next(part for part in model.get_submodule(entry.head).modules() if isinstance(part, nn.Linear))
    layers = nn.Linear(linear.in_features, 256), nn.ReLU(inplace=True), nn.Linear(256, num_classes)
    model.set_submodule(entry.head, nn.Sequential(*layers))
    if stem == "small":
        convolution = model.get_submodule(entry.stem)
        if convolution.kernel_size == (3, 3):
            convolution.stride = (1, 1)
        else:
            convolution = nn.Conv2d(3, convolution.out_channels, kernel_size=3, padding=1, bias=False)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            model.set_submodule(entry.stem, convolution)
        if entry.pool:
            model.set_submodule(entry.pool, nn.Identity())
    return model


def _from_torchvision(name, pretrained):
    # Imported here: it takes over a second, and the custom network does not need it
    from torchvision import models

    if not pretrained:
        return models.get_model(name)
    os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")  # else torch.hub could run code
    try:
        with contextlib.redirect_stderr(sys.stdout):  # torch.hub announces downloads there
            return models.get_model(name, weights="IMAGENET1K_V1", progress=sys.stdout.isatty())
    except Exception as error:  # a damaged file can raise nearly anything
        url = models.get_model_weights(name)["IMAGENET1K_V1"].url
        path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
        if os.path.exists(path):  # torch.hub does not keep a failed download
            raise RuntimeError(f"{path} is damaged, or not the weights of {name}: remove it") from error
        print(flush=True)  # torch.hub does not end its line
        raise RuntimeError(
            f"the ImageNet weights of {name} cannot be downloaded ({error}): connect to the network, put "
            f"{url} into $TORCH_HOME/hub/checkpoints (~/.cache/torch by default), or omit --pretrained"
        ) from error


def load(path):
    """Load the network of a `seed<k>.pt` saved by train.py, in eval mode on the CPU. Attributes: `classes` in
    label order, `mean` and `std` (of pixels in [0, 1]). Raises ValueError for other files and networks."""
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")
        arch, stem, classes, mean, std = (saved[key] for key in ("arch", "stem", "classes", "mean", "std"))
        state = dict(saved["state_dict"])
    except OSError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(f"{path} is damaged, or not a weights file saved by train.py") from error
    if arch not in ARCHITECTURES:
        raise ValueError(f"{path}: models.py has no architecture {arch!r}")
    model = build(arch, len(classes), stem=stem)
    try:
        model.load_state_dict(state)
    except (RuntimeError, AttributeError) as error:
        raise ValueError(f"{path}: its layers differ from those of models.py: train it again") from error
    model.classes, model.mean, model.std = classes, mean, std
    return model.eval()


class FewShotEmbedding(nn.Module):
    """The few-shot network: a convolutional and a transformer branch, fused into one embedding.

    images: float (N, 3, 32, 32). Returns embeddings of unit length, float (N, 64). About 47,000 parameters.
    As in the authors' code, tokens have no position encoding, and both norms follow their residual sums."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Sequential(
            nn.Conv2d(3, 3, kernel_size=3, padding=1, groups=3),  # depthwise
            nn.Conv2d(3, 32, kernel_size=1),  # pointwise
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),  # (N, 32)
        )
        self.patches = nn.Conv2d(3, 64, kernel_size=2, stride=2)
        self.attention = SelfAttention(64, heads=2)
        self.norm1 = nn.LayerNorm(64)
        self.mlp = nn.Sequential(nn.Linear(64, 64), nn.ReLU(inplace=True), nn.Linear(64, 64))
        self.norm2 = nn.LayerNorm(64)
        layers = nn.Linear(32 + 64, 128), nn.ReLU(inplace=True), nn.Linear(128, 64), nn.BatchNorm1d(64)
        self.fusion = nn.Sequential(*layers)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)  # (N, 256, 64)
        tokens = self.norm1(tokens + self.attention(tokens))
        tokens = self.norm2(tokens + self.mlp(tokens))
        both = torch.cat([self.convolution(images), tokens.mean(1)], dim=1)  # (N, 96)
        return F.normalize(self.fusion(both).float(), dim=1)


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al., 2017, arXiv:1706.03762). tokens: float (N, T, width)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens):
        qkv = self.qkv(tokens).unflatten(2, (3, self.heads, -1))  # (N, T, 3, heads, width / heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        if query.device.type != "cpu" or query.dtype == torch.bfloat16:
            # Written out: CUDA's fused backward is nondeterministic, MPS has returned wrong values for views
            # (github.com/pytorch/pytorch/issues/163597), and on a CPU in bf16 it is 1.5 times as fast
            weights = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)  # (N, heads, T, T)
            mixed = weights.softmax(-1) @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value)  # (N, heads, T, width / heads)
        return self.out(mixed.transpose(1, 2).flatten(2))


class MixtureOfExperts(nn.Module):
    """A gating network that mixes the features of several frozen experts.

    features: float (N, experts, 4096), each expert's flattened trunk output, or (N, experts, width), already
    adapted. Returns logits, float (N, num_classes). Without train_adapters, the adapters keep their random
    initialization, as in the authors' code."""

    def __init__(self, experts=3, num_classes=10, train_adapters=False, width=1280):
        super().__init__()
        self.adapters = nn.ModuleList(nn.Linear(4096, width) for _ in range(experts))
        self.adapters.requires_grad_(train_adapters)
        self.gate = nn.Sequential(
            *(nn.Linear(width, 64), nn.BatchNorm1d(64), nn.ReLU(inplace=True), nn.Dropout(0.3)),
            *(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(inplace=True), nn.Dropout(0.3)),
            *(nn.Linear(32, experts), nn.Softmax(dim=1)),
        )
        layers = nn.Linear(width, 64), nn.ReLU(inplace=True), nn.Linear(64, num_classes)
        self.classifier = nn.Sequential(*layers)

    def adapt(self, features):
        """float (N, experts, 4096) -> (N, experts, width)."""
        if features.shape[2] != 4096:
            return features
        return torch.stack([adapter(features[:, i]) for i, adapter in enumerate(self.adapters)], dim=1)

    def weigh(self, adapted):
        """The gating network's weights, float (N, experts), which sum to 1."""
        return self.gate(adapted.mean(1))

    def forward(self, features):
        adapted = self.adapt(features)
        return self.classifier((adapted * self.weigh(adapted)[:, :, None]).sum(1))
