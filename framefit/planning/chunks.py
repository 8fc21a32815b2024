"""Of a forward's equal chunks the dry run sees two: the first, and the second for all that follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

from framefit.ledger.counts import Tally
from framefit.passes.rows import LOOP

__all__ = ["once"]


@contextmanager
def once(tally: Tally) -> Iterator[None]:
    """In it equal chunks are computed once and counted as often as there are."""

    def loop(chunks: Sequence[slice], compute: Callable[[slice], None]) -> None:
        for _, run in groupby(chunks, key=lambda rows: rows.stop - rows.start):
            first, *others = run
            compute(first)
            if others:
                tally.times *= len(others)
                try:
                    compute(others[0])
                finally:
                    tally.times //= len(others)

    token = LOOP.set(loop)
    try:
        yield
    finally:
        LOOP.reset(token)
