"""Tiles that do with less of a halo than they depend on, and fade into each other.

What a convolution sees far off says little: half of the halo leaves an error under rounding, most of it at the very
border. There two tiles overlap, and a linear ramp leads from the one to the other, so that what is left is no line.
"""

from __future__ import annotations

import math

import torch

__all__ = ["REACH", "SHARE", "fade", "narrowed"]

SHARE = 0.5
"""Of the halo that a tile depends on. Measured in LOG.md, with a quarter and none."""
REACH = 2
"""Pixels by which a tile reaches over its border, of those that the last stage makes."""


def narrowed(halo: int, scale: float) -> int:
    """The halo of a stage whose pixels are `scale` to one of the last stage's."""
    return math.ceil(SHARE * halo) + math.ceil(REACH * scale)


def fade(before: torch.Tensor, part: torch.Tensor, corner: tuple[int, int], over: int) -> None:
    """Begin `part` (f, h, w, 3), in place, as what is there `before` it, and end that after `over` pixels.

    Args:
        corner: its first row and column; where one is 0 there is nothing before it.
    """
    ramp = (torch.arange(over) + 0.5) / over
    for axis, first in zip((1, 2), corner, strict=True):
        if first:
            old, new = (each.narrow(axis, 0, over) for each in (before, part))
            shape = [1, 1, 1, 1]
            shape[axis] = over
            mixed = torch.lerp(old.float(), new.float(), ramp.view(shape))
            new.copy_(mixed if new.is_floating_point() else mixed.round_())
