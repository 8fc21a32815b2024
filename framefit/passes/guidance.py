"""Guidance branches together or apart.

Together is how diffusers' EasyAnimate and I2VGen-XL pipelines run them, apart is how its Wan pipelines do: each is
the default where the reference does it, so that results are equal to the last bit. The other way differs by rounding
(1e-6 in fp32).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from framefit.families.parts import Parts
from framefit.plan import Guidance

__all__ = ["apply", "guided", "remove"]

NEGATIVE, POSITIVE, BOTH = slice(0, 1), slice(-1, None), slice(None)
"""Guidance branches on the first axis of the conditioning; without guidance the positive one stands alone."""


def apply(parts: Parts, setting: Guidance) -> None:
    parts.branches = "together" if setting.value == "together" else "apart"


def remove(parts: Parts) -> None:
    parts.branches = "together"


def guided(parts: Parts, forward: Callable[[slice], torch.Tensor], scale: float) -> torch.Tensor:
    """The guided prediction (1, C, F, H, W) from `forward`, which predicts for some branches.

    Source: Ho and Salimans, arXiv 2207.12598.
    """
    if scale <= 1:
        return forward(POSITIVE)
    if parts.branches == "together":
        negative, positive = forward(BOTH).chunk(2)
    else:
        positive, negative = forward(POSITIVE), forward(NEGATIVE)
    return negative + scale * (positive - negative)
