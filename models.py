"""The networks of the study, for 3x32x32 images. Needs torch and torchvision; copy it alone if you like.

from models import build
model = build("custom", num_classes=10, dropout=0.2)  # or resnet18, densenet121, efficientnet_b0
logits = model(images)  # float (N, 3, 32, 32), normalised -> float (N, 10)
"""

from torch import nn
from torchvision import models as torchvision_models

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


def build(arch, num_classes=10, dropout=0.0, pretrained=False):
    """One of ARCHITECTURES, with `num_classes` outputs.

    The three networks of torchvision keep their ImageNet stem, and get the head Linear(features, 256), ReLU,
    Linear(256, num_classes); nothing is frozen. pretrained: start them from torchvision's ImageNet weights
    (resnet18 and efficientnet_b0 did so on the slides; all three use IMAGENET1K_V1).
    Raises ValueError for an option that the architecture does not have, RuntimeError if weights cannot be
    fetched.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}: choose from {', '.join(ARCHITECTURES)}")
    if arch == "custom":
        if pretrained:
            raise ValueError("custom has no pretrained weights: only " + ", ".join(ARCHITECTURES[1:]) + " do")
        return CustomCNN(num_classes, dropout)
    if dropout:
        raise ValueError(f"{arch} has no dropout setting: only custom does, so leave dropout at 0")
    try:
        model = torchvision_models.get_model(arch, weights="IMAGENET1K_V1" if pretrained else None)
    except (OSError, RuntimeError) as error:  # no network; a file whose hash is not the one in its name
        raise RuntimeError(
            f"the ImageNet weights of {arch} cannot be fetched ({error}): connect to the network, put the file "
            "into $TORCH_HOME/hub/checkpoints, or train without pretrained weights"
        ) from error
    if arch == "resnet18":
        model.fc = _head(model.fc.in_features, num_classes)
    elif arch == "densenet121":
        model.classifier = _head(model.classifier.in_features, num_classes)
    else:  # torchvision's own 20 % dropout before the last layer goes: the recipe has none
        model.classifier = _head(model.classifier[-1].in_features, num_classes)
    return model


def _head(features, num_classes):
    return nn.Sequential(nn.Linear(features, 256), nn.ReLU(inplace=True), nn.Linear(256, num_classes))
