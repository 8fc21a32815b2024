"""Of what is alike a dry run sees a few for all: tiles, groups of frames, latent frames, calls of a layer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any, Self

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from framefit.families.pieces import Tile
from framefit.ledger.counts import Counts, Tally
from framefit.ledger.live import Live, Rise
from framefit.ledger.transfer import Transfer

__all__ = ["calls", "groups", "latent_frames", "repeated", "tiles", "zeroed"]


def tiles(tally: Tally, transfer: Transfer, shelved: bool, every: Sequence[Tile]) -> Iterator[Tile]:
    """Tiles are of one size: the first stands for all; where memories come and go, the second does, which has those of
    another before it."""
    if shelved:
        yield every[0]
    with _standing(len(every) - shelved, tally, transfer):
        yield every[shelved]


def groups(tally: Tally, transfer: Transfer, count: int) -> Iterator[int]:
    """Groups of frames are alike from the third on, where memories are full, but for the last, which leaves none."""
    for index in (*range(min(3, count - 1)), count - 1):
        with _standing(count - 3 if index == 2 < count - 1 else 1, tally, transfer):
            yield index


def latent_frames(
    live: Live, tally: Tally, made: Iterator[torch.Tensor], count: int, each: int
) -> Iterator[torch.Tensor]:
    """Every piece of the fourth latent frame and of those that follow is as that piece of the third was."""
    known: deque[_Last] = deque(maxlen=each)
    for index in range(1 + (count - 1) * each):
        if index < 1 + 2 * each:
            known.append(_Last())
            piece = _noted(partial(next, made), known[-1], live, tally)
        else:
            known.rotate(-1)
            piece = known[-1].again(live, tally)
        yield piece
        del piece


@contextmanager
def calls(part: nn.Module, live: Live, tally: Tally) -> Iterator[None]:
    """Modules of a VAE that are called with equal shapes again and again, as over a video's chunks, run twice.

    The first of equal calls may fill what later ones find; from the third on, each is as the second was. What a module
    remembers is full after the second of all its calls: of those like the first of all, it is the third.
    """
    children = {child: child.__dict__.get("forward") for child in _units(part)}
    for child in children:
        child.forward = repeated(child.forward, live, tally)
    try:
        yield
    finally:
        for child, before in children.items():
            del child.forward  # the class's is there again
            if before:
                child.forward = before


def repeated(forward: Callable[..., Any], live: Live, tally: Tally) -> Callable[..., Any]:
    """`forward`, whose third call with equal shapes (of those like the very first, the fourth), and all that follow,
    are as the one before was."""
    return partial(_as_before, forward, {}, live, tally)


def zeroed(made: torch.Tensor) -> torch.Tensor:
    """Of zeros, with all that lies in its memory, where it has contents."""
    if not isinstance(made, FakeTensor):
        with _disable_current_modes():  # the program does no such thing
            made.untyped_storage().fill_(0)  # type: ignore[attr-defined]
    return made


def _units(vae: nn.Module) -> Iterator[nn.Module]:
    """What a way through a video calls: whatever is made of others, and the children of the encoder and decoder."""
    for child in vae.children():
        yield from child.children()
        yield from (module for module in child.modules() if next(module.children(), None))


@contextmanager
def _standing(times: int, tally: Tally, transfer: Transfer) -> Iterator[None]:
    """What runs in it stands for as much `times`."""
    before = transfer.returned_bytes, transfer.pieces_bytes
    tally.times *= times
    try:
        yield
    finally:
        tally.times //= times
    transfer.returned_bytes += (times - 1) * (transfer.returned_bytes - before[0])
    transfer.pieces_bytes += (times - 1) * (transfer.pieces_bytes - before[1])


@dataclass(frozen=True, slots=True)
class _Form:
    """How a tensor lies in memory: a view as one of as much memory, an expanded frame as one."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    storage_bytes: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Self:
        offset, storage_bytes = int(tensor.storage_offset()), tensor.untyped_storage().nbytes()
        return cls(tensor.dtype, tuple(tensor.shape), tensor.stride(), offset, storage_bytes)

    def made(self) -> torch.Tensor:
        """Another one, of zeros where it has contents."""
        items = self.storage_bytes // self.dtype.itemsize
        if items == prod(self.shape):
            made = torch.empty_strided(self.shape, self.strides, dtype=self.dtype)
        else:
            made = torch.empty(items, dtype=self.dtype).as_strided(self.shape, self.strides, self.offset)
        return zeroed(made)


@dataclass(slots=True)
class _Last:
    """The last of equal calls."""

    times: int = 0
    rise: Rise = field(default_factory=Rise)
    counts: Counts = field(default_factory=Counts)
    stood_for: int = 1
    """How often it was counted."""
    result: Any = None
    """The forms of its tensors."""

    def again(self, live: Live, tally: Tally) -> Any:
        """As if it were called once more."""
        tally.counts.add(self.counts, tally.times, self.stood_for)
        with live.rose(self.rise):
            return tree_map_only(_Form, _Form.made, self.result)


def _as_before(
    forward: Callable[..., Any], known: dict[Any, _Last], live: Live, tally: Tally, *args: Any, **kwargs: Any
) -> Any:
    last = known.setdefault(_shapes(args, kwargs, tally.times > 0), _Last(times=0 if known else -1))
    last.times += 1
    if last.times > 2:
        return last.again(live, tally)
    return _noted(partial(forward, *args, **kwargs), last, live, tally)


def _shapes(*tree: Any) -> tuple[Any, ...]:
    """Equal for calls that are. No name holds the leaves: what a call drops is to be gone in it."""
    return tuple((x.shape, x.dtype) if isinstance(x, torch.Tensor) else x for x in tree_leaves(tree))


def _noted(call: Callable[[], Any], last: _Last, live: Live, tally: Tally) -> Any:
    before = tally.counts.copy()
    with live.rise() as rise:
        result = call()
    last.rise, last.counts, last.stood_for = rise, tally.counts.since(before), max(1, tally.times)
    last.result = tree_map_only(torch.Tensor, _Form.of, result)
    return result
