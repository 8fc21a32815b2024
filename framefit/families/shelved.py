"""A video through a causal VAE group by group of frames, with what its layers remember in RAM while others compute.

All frames of a group pass a layer, a few at a time, before the next layer begins: a memory travels once for every
group, out while the next layer computes and back while the one before does, both ways at once. Where pictures are
largest, tiles of them go through the layers one after another, each with its own memories, and with the halo of these
layers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from framefit.families.pieces import Frame, Pieces, Shelf, Stage, Tile, side_by_side

__all__ = ["Stretch", "gathered", "shelved"]

Stretch = Mapping[Tile | None, Sequence[Stage]]
"""Stages in a row: those of every tile, each its own, or with None those for whole pictures."""

Place = tuple[int, Tile | None, int]
"""Stretch, tile, stage."""


def shelved(
    stretches: Sequence[Stretch], groups: Iterable[torch.Tensor], count: int, pieces: Pieces
) -> Iterator[torch.Tensor]:
    """As `through`, with what the stages remember on `pieces.shelf` while others compute.

    Args:
        groups: (1, C, F, H, W) each, `count` of them; the first is one frame.
    """
    assert pieces.shelf
    shelf = pieces.shelf()
    places = [(n, tile, i) for n, each in enumerate(stretches) for tile, row in each.items() for i in range(len(row))]
    following = dict(pairwise(places))
    try:
        coming = iter(groups)
        for index in pieces.over(count):
            frames: list[Frame] = [next(coming)]
            one = _Group(shelf, following, index + 1 == count)
            for number, stretch in enumerate(stretches):
                if None in stretch:
                    frames = one.along(stretch[None], (number, None), frames)
                else:
                    frames = one.in_tiles(stretch, number, frames, pieces.each)
            while frames:
                yield frames.pop(0)
    finally:
        shelf.close()


def gathered(features: Iterable[torch.Tensor], count: int) -> torch.Tensor:
    """(1, C, `count`, h, w) of so many frames."""
    whole: torch.Tensor | None = None
    done = 0
    for feature in features:
        if whole is None:
            whole = feature.new_empty(*feature.shape[:2], count, *feature.shape[3:])
        whole[:, :, done : done + feature.shape[2]] = feature
        done += feature.shape[2]
    assert whole is not None
    return whole


@dataclass(frozen=True, slots=True)
class _Group:
    """Frames that are on their way together."""

    shelf: Shelf
    following: Mapping[Place, Place]
    last: bool

    def in_tiles(
        self, stretch: Stretch, number: int, frames: list[Frame], each: Callable[..., Iterable[Tile]]
    ) -> list[Frame]:
        def of(tile: Tile) -> list[Frame]:
            return self.along(stretch[tile], (number, tile), list(frames))

        scale = next(iter(stretch.values()))[-1].scale
        return side_by_side(each(list(stretch)), of, scale)

    def along(self, stages: Sequence[Stage], at: tuple[int, Tile | None], frames: list[Frame]) -> list[Frame]:
        for index, stage in enumerate(stages):
            here = *at, index
            stage.memory[:] = self.shelf.take(here, stage.memory)
            frames = self._piece_by_piece(stage, frames, here)
            if not self.last:
                self.shelf.put(here, stage.memory)
            stage.memory.clear()
        return frames

    def _piece_by_piece(self, stage: Stage, frames: list[Frame], here: Place) -> list[Frame]:
        """What a stage makes of `frames`, which are dropped as they are read."""
        count = sum(map(_length, frames))
        takes = min(stage.takes, count)
        if here in self.following:
            self.shelf.expect(self.following[here])
        out = [stage.run(_taken(frames, takes)) for _ in range(count // takes)]
        self.shelf.settle()
        return out


def _length(frame: Frame) -> int:
    length: int = (frame[0] if isinstance(frame, tuple) else frame).shape[2]
    return length


def _taken(frames: list[Frame], count: int) -> Frame:
    """The next `count` frames in one, which leave the list."""
    piece = frames.pop(0)
    if _length(piece) > count:
        piece, rest = piece.tensor_split([count], dim=2)
        frames.insert(0, rest)
    elif _length(piece) < count:
        others = (frames.pop(0) for _ in range(count // _length(piece) - 1))
        piece = torch.cat([piece, *others], dim=2)
    return piece
