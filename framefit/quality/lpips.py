"""LPIPS: the distance of two pictures in the features of a network that was trained to classify photos.

The network's weights are not framefit's to ship: the user names a safetensors file that holds the convolutions of
AlexNet or VGG-16 under torchvision's names (`features.0.weight` ...) and the learned weights of each layer under those
of the authors (`lin0.model.1.weight` ...). Source: Zhang et al. 2018, arXiv 1801.03924, version 0.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from framefit.errors import BadInput
from framefit.quality.fidelity import Frames

__all__ = ["lpips"]

SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
"""Of the colours in [-1, 1], as the authors have them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """What a file of weights does not say: where it pools, and after which convolutions it is read."""

    convolutions: tuple[int, ...]
    """Places in `features`."""
    read: tuple[int, ...]
    """Convolutions after whose ReLU features are taken."""
    pooled: tuple[int, ...]
    """Convolutions before which the picture is halved."""
    window: int
    """Of the pooling, px; its stride is 2."""
    first_stride: int
    first_padding: int


ALEX = Network(
    convolutions=(0, 3, 6, 8, 10), read=(0, 3, 6, 8, 10), pooled=(3, 6), window=3, first_stride=4, first_padding=2
)
VGG = Network(
    convolutions=(0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), read=(2, 7, 14, 21, 28), pooled=(5, 10, 17, 24),
    window=2, first_stride=1, first_padding=1,
)  # fmt: skip


@torch.no_grad()
def lpips(ours: Frames, reference: Frames, weights: Path) -> list[float]:
    """Of each frame, 0 for equal ones.

    Raises:
        BadInput: the file is none of the two networks.
    """
    tensors, network = _load(weights)
    return [
        _distance(_features(a, tensors, network), _features(b, tensors, network), tensors)
        for a, b in zip(ours, reference, strict=True)
    ]


def _load(weights: Path) -> tuple[Mapping[str, Tensor], Network]:
    try:
        tensors = {name: tensor.float() for name, tensor in load_file(weights).items()}
    except (OSError, SafetensorError) as error:
        raise BadInput(
            f"{weights} cannot be read as safetensors ({error}): name LPIPS's weights in that form."
        ) from None
    for network in (VGG, ALEX):
        names = {f"features.{place}.{part}" for place in network.convolutions for part in ("weight", "bias")}
        names |= {f"lin{n}.model.1.weight" for n in range(len(network.read))}
        if names <= tensors.keys():
            return tensors, network
    raise BadInput(
        f"{weights} holds neither AlexNet nor VGG-16 with LPIPS's layers: it needs features.N.weight and .bias "
        "under torchvision's names, and lin0 to lin4.model.1.weight."
    )


def _features(frame: Frames, tensors: Mapping[str, Tensor], network: Network) -> list[Tensor]:
    """What is read of a frame (H, W, 3): (1, C, h, w) a layer, each place of length 1."""
    x = torch.from_numpy(frame).permute(2, 0, 1).unsqueeze(0).float() / 127.5 - 1
    x = (x - torch.tensor(SHIFT).view(1, 3, 1, 1)) / torch.tensor(SCALE).view(1, 3, 1, 1)
    found = []
    for place in network.convolutions:
        if place in network.pooled:
            x = functional.max_pool2d(x, network.window, stride=2)
        weight, bias = (tensors[f"features.{place}.{part}"] for part in ("weight", "bias"))
        first = place == network.convolutions[0]
        stride, padding = (network.first_stride, network.first_padding) if first else (1, weight.shape[-1] // 2)
        x = functional.conv2d(x, weight, bias, stride=stride, padding=padding).relu()
        if place in network.read:
            found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
    return found


def _distance(one: list[Tensor], other: list[Tensor], tensors: Mapping[str, Tensor]) -> float:
    layers = (
        functional.conv2d((a - b).square(), tensors[f"lin{n}.model.1.weight"]).mean()
        for n, (a, b) in enumerate(zip(one, other, strict=True))
    )
    return float(sum(layers))
