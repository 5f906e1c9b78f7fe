"""A timm classifier as a trained one is, without weights from a hub; and images like photographs.

Random weights as timm draws them make many networks say nothing: branches end in a zero scale, LayerScale hides the
blocks, BatchNorm has statistics of no data. Here every scale is drawn, and the statistics are those of images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

Images = npt.NDArray[np.float32]

STATISTICS_IMAGES = 16
SMALL = 0.1
"""A parameter that is one number everywhere, and smaller, is a scale or a bias that training moves away from there."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, of all networks alike: what a network was trained with makes no difference to random weights."""


def create(name: str, resolution: int, seed: int = 0) -> nn.Module:
    """A network of timm in evaluation mode.

    Args:
        name: As `timm.create_model` knows it.
        resolution: Height and width of the images in pixels.
        seed: Of the weights.

    Raises:
        Exception: Whatever timm raises.
    """
    _declare_operators()
    import timm

    torch.manual_seed(seed)
    try:
        network: nn.Module = timm.create_model(name, img_size=resolution)
    except TypeError:  # most convolutional networks take images of any size
        network = timm.create_model(name)
    _draw_scales(network)
    _take_statistics(network, torch.from_numpy(photographs(STATISTICS_IMAGES, resolution, part="calibration")))
    return network.eval()


def _declare_operators() -> None:
    """Let torchvision be imported where its wheel, made for CUDA, cannot load its operators beside a torch for CPUs."""
    if torch.version.cuda is not None:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, signature in {
        "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    }.items():
        try:
            library.define(name + signature)
        except RuntimeError:  # the operators are there
            return
    globals()["_library"] = library  # its operators go with it


def _draw_scales(network: nn.Module) -> None:
    """Give constant parameters the values of a trained network: none is 0, none is 1 everywhere."""
    norms = tuple(kind for kind in vars(nn).values() if isinstance(kind, type) and "Norm" in kind.__name__)
    with torch.no_grad():
        for module in network.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(module, norms):
                    parameter.uniform_(0.5, 1.5) if name == "weight" else parameter.normal_(0, 0.1)
                elif parameter.numel() > 1 and parameter.abs().max() < SMALL and parameter.std() == 0:
                    is_vector = parameter.numel() == max(parameter.shape)
                    parameter.normal_(0, 0.2 if is_vector and name != "bias" else 0.02)
                elif parameter.numel() == 1 and parameter.abs() < SMALL:
                    parameter.fill_(0.5)


def _take_statistics(network: nn.Module, images: torch.Tensor) -> None:
    """Set the running statistics of BatchNorm to those of some images."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    network.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        network(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def photographs(count: int, resolution: int, *, part: str) -> Images:
    """Crops of the two sample photographs of scikit-learn, as a transform for evaluation gives them.

    Args:
        count: Number of images.
        resolution: Height and width in pixels.
        part: `calibration` for crops of the left two thirds of the photographs, `unseen` for crops of the rest.

    Returns:
        Normalised images, `(count, 3, resolution, resolution)`.
    """
    return np.stack(list(_crops(count, resolution, part)))


def _crops(count: int, resolution: int, part: str) -> Iterator[Images]:
    from PIL import Image
    from sklearn.datasets import load_sample_images

    generator = np.random.default_rng(0 if part == "calibration" else 1)
    pictures = load_sample_images().images
    for index in range(count):
        picture = pictures[index % len(pictures)]
        edge = round(picture.shape[1] * 2 / 3)
        area = picture[:, :edge] if part == "calibration" else picture[:, edge:]
        side = round(math.exp(generator.uniform(math.log(64), math.log(min(area.shape[:2])))))
        top, left = (int(generator.integers(0, length - side + 1)) for length in area.shape[:2])
        crop = area[top : top + side, left : left + side, :]
        if generator.random() < 0.5:
            crop = crop[:, ::-1]
        light = generator.uniform(0.6, 1.2)
        pixels = np.asarray(Image.fromarray(crop).resize((resolution, resolution), Image.Resampling.BICUBIC))
        values: Any = (np.clip(pixels * light, 0, 255) / 255 - MEAN) / STD
        yield values.transpose(2, 0, 1).astype(np.float32)
