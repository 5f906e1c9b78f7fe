"""The two networks of this example, as factories: `examples/shapes/networks.py:patchconvnet` and `:aa_resnet`."""

from __future__ import annotations

from pcn_deploy.models.augmentation import Augmentation
from pcn_deploy.models.patchconvnet import PatchConvNet
from pcn_deploy.models.resnet import ResNet

NUM_CLASSES = 16


def patchconvnet() -> PatchConvNet:
    """A PatchConvNet of 8x8 patches of 8x8 pixels."""
    return PatchConvNet(width=64, depth=4, patch=8, num_classes=NUM_CLASSES, layer_scale=1.0)


def aa_resnet() -> ResNet:
    """A narrow attention-augmented ResNet of six basic blocks."""
    augmentation = Augmentation(heads=4, kappa=0.25, upsilon=0.25, min_head_channels=4)
    return ResNet(
        block="basic",
        depths=(1, 2, 2, 1),
        width=16,
        augmentation=augmentation,
        image_size=64,
        num_classes=NUM_CLASSES,
    )


NETWORKS = {"patchconvnet": patchconvnet, "aa_resnet": aa_resnet}
