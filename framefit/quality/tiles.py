"""A video that was put together of tiles which differ a little: how far the lines stand out along which these meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from framefit.quality.fidelity import Frames
from framefit.quality.stability import outliers

__all__ = ["Borders", "Tiles", "borders", "measure"]

WITHIN_PX = 4
"""Of a border, to each side, tiles fade into each other at most; the last of three or more does so before it alone, as
far in all: like those between, it reaches over two borders, and it ends with the picture."""

Borders = Mapping[str, tuple[int, ...]]
"""x for vertical lines, y for horizontal ones -> the first pixel behind each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiles:
    borders: Borders
    seam: float
    """The mean step along a border over that of the lines beside it, where it is most; from about 3 a seam is seen."""
    axis: str
    at_px: int
    """Which border that is."""
    usual: float
    """The median of all borders: an edge of the scene lies along one or two, tiles that differ show at most."""
    reference: float | None
    """The same of the reference there, where there is one: an edge of the scene is in both."""

    def __str__(self) -> str:
        beside = "" if self.reference is None else f", and in the reference {self.reference:.2f} times"
        return (
            f"made in tiles that fade into each other: along their borders it steps up to {self.seam:.2f} times as "
            f"much as beside (at {self.axis}={self.at_px}){beside}."
        )


def borders(parameters: Mapping[str, Any] | None, width: int, height: int) -> Borders:
    """Where tiles meet, where the file says that there were some of this video; else nothing."""
    try:
        told = (parameters or {})["tiles"]
        found = {axis: tuple(int(px) for px in told[axis]) for axis in ("x", "y")}
    except (KeyError, TypeError, ValueError):
        return {}
    inside = all(0 < px < side for axis, side in (("x", width), ("y", height)) for px in found[axis])
    return found if inside and any(found.values()) else {}


def measure(frames: Frames, borders: Borders, reference: Frames | None = None) -> Tiles:
    """Of uint8 (F, H, W, 3).

    Args:
        borders: one at least.
    """
    found = {(axis, at): ratio for axis, ratios in outliers(frames).items() for at, ratio in _at(ratios, borders[axis])}
    axis, at = max(found, key=lambda place: found[place])
    there = None if reference is None else dict(_at(outliers(reference)[axis], borders[axis]))[at]
    return Tiles(
        borders=borders, seam=found[axis, at], axis=axis, at_px=at, usual=median(found.values()), reference=there
    )


def _at(ratios: Any, places: tuple[int, ...]) -> list[tuple[int, float]]:
    ends = {at: at + WITHIN_PX * (at != max(places) or len(places) == 1) for at in places}
    return [(at, float(ratios[max(0, end - 1 - 2 * WITHIN_PX) : end].max())) for at, end in ends.items()]
