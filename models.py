"""The networks of the study, for 3x32x32 images.

    from models import build
    model = build("custom", num_classes=10, dropout=0.2)  # or resnet18, densenet121, efficientnet_b0
    logits = model(images)  # float (N, 3, 32, 32), normalised -> float (N, 10)

Needs torch and torchvision only: copy this file into your own project.
"""

import contextlib
import os
import pickle
import sys

import torch
from torch import nn
from torch.nn import functional as F

ARCHITECTURES = ("custom", "resnet18", "densenet121", "efficientnet_b0")


class CustomCNN(nn.Module):
    """Three blocks of two 3x3 conv-BN-ReLU, 2x2 max-pool, dropout k; then two linear layers.

    images: float (N, 3, 32, 32). Returns logits, float (N, num_classes). dropout: k, in [0, 1); before the
    last layer it is min(2k, 0.9), as on the slides. The convolutions have no bias: the slides leave it
    open, and the batch norm behind each one subtracts any constant.
    """

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


def build(arch, num_classes=10, dropout=0.0, pretrained=False, stem="imagenet"):
    """One of ARCHITECTURES, with `num_classes` outputs.

    The three networks of torchvision get the head Linear(features, 256), ReLU, Linear(256, num_classes); nothing is
    frozen. pretrained: start them from torchvision's ImageNet weights (resnet18 and efficientnet_b0 did so on the
    slides; all three use IMAGENET1K_V1). stem: `imagenet`, as it is, or `small`, for images of 32 pixels: a 3x3
    first convolution of stride 1, and no max-pool behind it (He et al., 2016, section 4.2).
    Raises ValueError for an option that the architecture does not have, RuntimeError if weights cannot be
    fetched.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}: choose from {', '.join(ARCHITECTURES)}")
    if arch == "custom":
        if pretrained:
            raise ValueError("custom has no pretrained weights: only " + ", ".join(ARCHITECTURES[1:]) + " do")
        if stem == "small":
            raise ValueError(
                "custom has no small stem: its own is one; only " + ", ".join(ARCHITECTURES[1:]) + " do"
            )
        return CustomCNN(num_classes, dropout)
    if dropout:
        raise ValueError(f"{arch} has no dropout setting: only custom does, so leave dropout at 0")
    if pretrained and stem == "small":
        raise ValueError("a small stem has no pretrained weights: they are of the ImageNet stem")
    # Here, since importing it takes over a second, and the custom network needs none of it
    from torchvision import models as torchvision_models

    weights = "IMAGENET1K_V1" if pretrained else None
    os.environ.setdefault(
        "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1"
    )  # torch.hub would run code out of a file of weights
    try:
        with contextlib.redirect_stderr(sys.stdout):  # what torch.hub says of a download is no error
            model = torchvision_models.get_model(arch, weights=weights, progress=sys.stdout.isatty())
    except (
        OSError,
        RuntimeError,
        pickle.UnpicklingError,
    ) as error:  # no network; a file of another hash or kind
        print(flush=True)  # torch.hub leaves its line open
        raise RuntimeError(
            f"the ImageNet weights of {arch} cannot be fetched ({error}): connect to the network, put the file "
            "into $TORCH_HOME/hub/checkpoints, or train without pretrained weights"
        ) from error
    if arch == "resnet18":
        model.fc = _head(model.fc.in_features, num_classes)
        if stem == "small":
            model.conv1, model.maxpool = _small_stem(64), nn.Identity()
    elif arch == "densenet121":
        model.classifier = _head(model.classifier.in_features, num_classes)
        if stem == "small":
            model.features.conv0, model.features.pool0 = _small_stem(64), nn.Identity()
    else:  # torchvision's own 20 % dropout before the last layer goes: the recipe has none
        model.classifier = _head(model.classifier[-1].in_features, num_classes)
        if stem == "small":
            model.features[0][0].stride = (1, 1)
    return model


def _small_stem(width):
    convolution = nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution


def _head(features, num_classes):
    return nn.Sequential(nn.Linear(features, 256), nn.ReLU(inplace=True), nn.Linear(256, num_classes))


class FewShotEmbedding(nn.Module):
    """The few-shot network: a convolutional path beside a transformer path, joined to one embedding.

    images: float (N, 3, 32, 32). Returns embeddings of unit length, float (N, 64). About 47,000 parameters. As in
    the authors' code the tokens carry no position, and both norms stand behind their residual sum.
    """

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
        self.fusion = nn.Sequential(
            nn.Linear(32 + 64, 128), nn.ReLU(inplace=True), nn.Linear(128, 64), nn.BatchNorm1d(64)
        )

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)  # (N, 256, 64)
        tokens = self.norm1(tokens + self.attention(tokens))
        tokens = self.norm2(tokens + self.mlp(tokens))
        both = torch.cat([self.convolution(images), tokens.mean(1)], dim=1)  # (N, 96)
        return F.normalize(self.fusion(both).float(), dim=1)


class ConvEmbedding(nn.Module):
    """The custom network's convolutions, averaged over the image, as an embedding.

    images: float (N, 3, 32, 32). Returns embeddings of unit length, float (N, 256). 1,126,944 parameters.
    """

    def __init__(self):
        super().__init__()
        self.features = CustomCNN().features

    def forward(self, images):
        return F.normalize(self.features(images).mean((2, 3)).float(), dim=1)


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
        if query.dtype == torch.bfloat16 and query.device.type == "cpu":
            # Written out, since the fused kernel is no faster in bf16 than in float32 there: 1.5 times the speed
            weights = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)  # (N, heads, T, T)
            mixed = weights.softmax(-1) @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value)  # (N, heads, T, width / heads)
        return self.out(mixed.transpose(1, 2).flatten(2))


class MixtureOfExperts(nn.Module):
    """A gate that mixes what several frozen experts see of an image.

    features: float (N, experts, 4096), each expert's flattened trunk, or (N, experts, width), adapted already.
    Returns logits, float (N, num_classes). The adapters stay at their random start, as in the authors' code, unless
    train_adapters.
    """

    def __init__(self, experts=3, num_classes=10, train_adapters=False, width=1280):
        super().__init__()
        self.adapters = nn.ModuleList(nn.Linear(4096, width) for _ in range(experts))
        self.adapters.requires_grad_(train_adapters)
        self.gate = nn.Sequential(
            *(nn.Linear(width, 64), nn.BatchNorm1d(64), nn.ReLU(inplace=True), nn.Dropout(0.3)),
            *(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(inplace=True), nn.Dropout(0.3)),
            *(nn.Linear(32, experts), nn.Softmax(dim=1)),
        )
        self.classifier = nn.Sequential(
            nn.Linear(width, 64), nn.ReLU(inplace=True), nn.Linear(64, num_classes)
        )

    def adapt(self, features):
        """float (N, experts, 4096) -> (N, experts, width)."""
        if features.shape[2] != 4096:
            return features
        return torch.stack([adapter(features[:, i]) for i, adapter in enumerate(self.adapters)], dim=1)

    def weigh(self, adapted):
        """The gate's weights, float (N, experts), which sum to 1."""
        return self.gate(adapted.mean(1))

    def forward(self, features):
        adapted = self.adapt(features)
        return self.classifier((adapted * self.weigh(adapted)[:, :, None]).sum(1))
