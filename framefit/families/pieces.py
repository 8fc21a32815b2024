"""A video through a causal VAE piece by piece: its frames in order and, where memory is short, tiles of them.

A stage is some layers in a row. Each remembers of the frames it has seen what the next ones need, so that frames may
come one by one. Where all of its layers look no further than a few pixels, a tile with that halo gives the very values
of the whole picture; what the halo lacks is cut off stage by stage.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from framefit.errors import UsageError
from framefit.families.checkpoint import Checkpoint
from framefit.families.fading import fade
from framefit.request import ResolvedRequest

__all__ = [
    "Frame", "Pieces", "Shelf", "Span", "Stage", "Tile", "borders", "painted", "side_by_side", "stages_of", "through",
]  # fmt: skip

Frame = Any
"""(1, C, 1, H, W); or such a one and, as a tuple, another of its size that is to be added to what becomes of it."""


class Shelf(Protocol):
    """Where tensors lie between two uses, in RAM: see `ledger/shelf.py`."""

    def put(self, name: Hashable, tree: Any) -> None: ...

    def settle(self) -> None: ...

    def expect(self, name: Hashable) -> None: ...

    def take(self, name: Hashable, usual: Any) -> Any: ...

    def close(self) -> None: ...


def _as_it_comes(pieces: Iterator[torch.Tensor], latent_frames: int, each: int) -> Iterator[torch.Tensor]:
    return pieces


@dataclass(frozen=True, kw_only=True, slots=True)
class Pieces:
    """How much of a video a VAE takes at once; set by the decode pass."""

    one_by_one: bool = False
    """Whether a frame goes through all layers before the next one; else as many at once as the reference takes."""
    tile_px: int = 0
    """Most that a tile measures each way, in pixels, without its halo; 0: whole pictures."""
    blend: bool = False
    """Whether a decoder's tiles have less of a halo than they depend on, and fade into each other (`fading.py`)."""
    shelf: Callable[[], Shelf] | None = None
    """Makes one for a way through a video; None: what stages remember stays on the device."""
    each: Callable[[Sequence[Tile]], Iterable[Tile]] = iter
    """Goes over the tiles; a dry run takes one for all, because all are of one size."""
    made: Callable[[Iterator[torch.Tensor], int, int], Iterator[torch.Tensor]] = _as_it_comes
    """Goes over what is made of the latent frames: (pieces, how many latent frames, pieces of each after the first).
    A dry run makes that of three: layers look at two frames before, so that all that follow are as the third."""
    over: Callable[[int], Iterable[int]] = range
    """Goes over as many groups of frames, by their numbers; a dry run takes few for all, because most are alike."""

    def tiles(self, height: int, width: int, stride: int) -> list[Tile]:
        """Of a picture of `height` x `width` latent pixels of `stride` pixels each; none: it is taken whole.

        Raises:
            UsageError: the picture is no larger than a tile is to be, or a tile smaller than a latent pixel.
        """
        if not self.tile_px:
            return []
        if not stride <= self.tile_px < stride * max(height, width):
            way = "blend" if self.blend else "ram" if self.shelf else "tile"
            raise UsageError(
                f"decode={way}:{self.tile_px} cannot divide frames of {width * stride}x{height * stride}: use a tile "
                f"of {stride} to {stride * max(height, width) - 1} pixels, or decode=frame for whole frames."
            )
        most = self.tile_px // stride
        return [Tile(rows, columns) for rows in _spans(height, most) for columns in _spans(width, most)]


@dataclass(frozen=True, slots=True)
class Span:
    """A tile along one side, in latent pixels."""

    start: int
    size: int
    whole: int
    """Of the picture."""
    count: int
    """Of tiles along this side."""

    def window(self, scale: int, halo: int = 0) -> tuple[int, int]:
        """Begin and end with `halo` more pixels, where a latent pixel has `scale`; as many for every tile."""
        sides = min(self.count - 1, 2)
        size = min(self.size * scale + sides * halo, self.whole * scale)
        begin = min(max(self.start * scale - halo, 0), self.whole * scale - size)
        return begin, begin + size


@dataclass(frozen=True, slots=True)
class Tile:
    rows: Span
    columns: Span

    def cut(self, picture: torch.Tensor, scale: int, halo: int = 0, around: tuple[int, int] = (0, 0)) -> torch.Tensor:
        """Of (..., H, W), which begins at the pixel `around` of the whole picture."""
        (top, bottom), (left, right) = self.window(scale, halo)
        return picture[..., top - around[0] : bottom - around[0], left - around[1] : right - around[1]]

    def window(self, scale: int, halo: int = 0) -> tuple[tuple[int, int], tuple[int, int]]:
        return self.rows.window(scale, halo), self.columns.window(scale, halo)

    def corner(self, scale: int, halo: int = 0) -> tuple[int, int]:
        """Its first row and column."""
        (top, _), (left, _) = self.window(scale, halo)
        return top, left


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Some layers of a VAE, for one way through one video."""

    run: Callable[[Frame], Frame]
    """The next frames (1, C, F, H, W) -> what the layers make of them."""
    scale: int = 1
    """Pixels of its input to one of the latents."""
    halo: int = 0
    """Pixels of its input around a tile that the tile depends on, here and in the stages that follow."""
    takes: int = 1
    """Frames that it needs at once, or most that it takes at once; the first comes alone."""
    memory: list[Any] = field(default_factory=list)
    """What its layers remember, while they do not compute: it may be put away in between."""


def through(
    stages: Sequence[Stage], pieces: Iterable[torch.Tensor], tile: Tile | None = None, *, one_by_one: bool
) -> Iterator[torch.Tensor]:
    """Whole pictures (1, C, F, H, W) through the stages, piece after piece: what comes out for the tile, or of all.

    Each piece is dropped once the next stage has read it.
    """
    for stage in stages_of(tile, stages) if tile else stages:
        pieces = _over(stage.run, _grouped(iter(pieces), stage.takes) if one_by_one else pieces, one_by_one)
    yield from pieces


def stages_of(tile: Tile, stages: Sequence[Stage]) -> list[Stage]:
    """Each cuts of whole pictures, or of what the stage before it gives, what the tile depends on."""
    around, scale, made = (0, 0), stages[0].scale, list[Stage]()
    for stage in stages:
        around = around[0] * stage.scale // scale, around[1] * stage.scale // scale
        made.append(replace(stage, run=partial(_cut, stage, tile, around)))
        around, scale = tile.corner(stage.scale, stage.halo), stage.scale
    return made


def _cut(stage: Stage, tile: Tile, around: tuple[int, int], piece: Frame) -> Frame:
    return stage.run(tree_map_only(torch.Tensor, lambda x: tile.cut(x, stage.scale, stage.halo, around), piece))


def _over(
    run: Callable[[torch.Tensor], torch.Tensor], pieces: Iterable[torch.Tensor], one_by_one: bool
) -> Iterator[torch.Tensor]:
    for piece in pieces:
        out = run(piece)
        del piece
        rest = list(torch.split(out, 1, dim=2)) if one_by_one else [out]
        del out
        while rest:
            yield rest.pop(0)


def _grouped(frames: Iterator[torch.Tensor], count: int) -> Iterator[torch.Tensor]:
    """The first alone, then `count` at a time."""
    if count == 1:
        yield from frames
        return
    yield next(frames)
    held: list[torch.Tensor] = []
    for frame in frames:
        held.append(frame)
        del frame
        if len(held) == count:
            group = [torch.cat(held, dim=2)]
            held.clear()
            yield group.pop()


def side_by_side(tiles: Iterable[Tile], of: Callable[[Tile], Iterable[torch.Tensor]], scale: int) -> list[torch.Tensor]:
    """Whole pictures (1, C, F, H, W), of which `of` gives the tiles; with `scale` pixels to one of the latents."""
    whole: list[torch.Tensor] = []
    for tile in tiles:
        for index, part in enumerate(of(tile)):
            if index == len(whole):
                whole.append(part.new_empty(*part.shape[:3], tile.rows.whole * scale, tile.columns.whole * scale))
            tile.cut(whole[index], scale).copy_(part)
    return whole


@dataclass(slots=True)
class _Canvas:
    """uint8 (F, H, W, 3) in RAM."""

    frames: np.ndarray
    done: int = field(default=0)

    def paint(self, part: torch.Tensor, corner: tuple[int, int], reach: int) -> torch.Tensor:
        """The next frames of a tile, (f, h, w, 3), and the whole frames as far as they are painted."""
        begin, end = self.done, self.done + part.shape[0]
        window = self.frames[begin:end, corner[0] : corner[0] + part.shape[1], corner[1] : corner[1] + part.shape[2]]
        there = torch.from_numpy(window)
        if reach:
            fade(there, part, corner, 2 * reach)
        there.copy_(part)
        self.done = end
        return torch.from_numpy(self.frames[begin:end])


def painted(
    tiles: Sequence[Tile], pieces: Pieces, decode: Callable[[Tile], Iterator[torch.Tensor]], scale: int,
    num_frames: int, reach: int,
) -> Iterator[torch.Tensor]:  # fmt: skip
    """The frames of all tiles side by side, uint8 (f, H, W, 3): as the last tile gives them, and before it none.

    After every piece of an earlier tile comes a chunk of no frames, so that whoever reads them may stop there.

    Args:
        decode: the frames of one tile, uint8 (f, h, w, 3), piece by piece.
        scale: pixels of a frame to one of the latents.
        reach: pixels by which tiles reach over their borders; over twice as many they fade into those before.
    """
    height, width = tiles[0].rows.whole * scale, tiles[0].columns.whole * scale
    canvas = _Canvas(np.empty((num_frames, height, width, 3), np.uint8))
    for tile in pieces.each(tiles):
        canvas.done = 0
        for part in decode(tile):
            frames = canvas.paint(part, tile.corner(scale, reach), reach)
            yield frames if tile is tiles[-1] else frames[:0]


def borders(checkpoint: Checkpoint, request: ResolvedRequest, tile_px: int) -> dict[str, tuple[int, ...]]:
    """Where the tiles of a picture begin but for the first, in pixels of each axis."""
    stride = checkpoint["vae"].config.get("scale_factor_spatial", 8)  # diffusers' own default
    tiles = Pieces(tile_px=tile_px).tiles(request.height // stride, request.width // stride, stride)
    spans = {"x": {tile.columns.start for tile in tiles}, "y": {tile.rows.start for tile in tiles}}
    return {axis: tuple(start * stride for start in sorted(starts) if start) for axis, starts in spans.items()}


def _spans(whole: int, most: int) -> list[Span]:
    """As few as do, of equal size; the last ones may overlap."""
    count = -(-whole // most)
    size = -(-whole // count)
    return [Span(i * (whole - size) // max(count - 1, 1), size, whole, count) for i in range(count)]
