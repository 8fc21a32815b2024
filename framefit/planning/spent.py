"""What is computed from when a module is called whose weights may stream until the next one is, level by level.

That is how long the copy of the next one's weights may take and cost nothing.
"""

from __future__ import annotations

from torch import nn

from framefit.cards import CARDS
from framefit.ledger.counts import Counts, Tally
from framefit.rates import of_sheet

__all__ = ["Spent"]


class Spent:
    """Told of every call, it looks at what is booked meanwhile."""

    def __init__(self, tally: Tally) -> None:
        self.seconds: dict[str, dict[nn.Module, float]] = {"block": {}, "leaf": {}}
        """At one card's rates: the shares that follow from them are much alike on all."""
        self._tally, self._rates = tally, of_sheet(CARDS["h200"])
        self._open: dict[str, tuple[nn.Module, Counts, Counts]] = {}

    def begin(self, level: str, module: nn.Module) -> None:
        """It is called, and the one before it has had its time."""
        self.end(level)
        counts = self._tally.counts
        self._open[level] = module, counts, counts.copy()

    def end(self, *levels: str) -> None:
        """No other is called before long."""
        for level in levels:
            if level in self._open:
                module, counts, before = self._open.pop(level)
                own = self._rates.seconds_by_kind(counts.since(before).work) or {}
                self.seconds[level][module] = self.seconds[level].get(module, 0.0) + sum(own.values())
