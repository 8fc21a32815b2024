"""Pieces of a video of which a dry run sees a few for all: tiles, and groups of frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from framefit.families.pieces import Tile
from framefit.ledger.counts import Tally
from framefit.ledger.transfer import Transfer

__all__ = ["groups", "tiles"]


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


@contextmanager
def _standing(times: int, tally: Tally, transfer: Transfer) -> Iterator[None]:
    """What runs in it stands for as much `times`."""
    before = transfer.returned_bytes, transfer.pieces_bytes
    tally.times *= times
    yield
    tally.times //= times
    transfer.returned_bytes += (times - 1) * (transfer.returned_bytes - before[0])
    transfer.pieces_bytes += (times - 1) * (transfer.pieces_bytes - before[1])
