"""What is computed while bytes move beside it: from one module whose weights may stream to the next, and while memories
of a VAE go to RAM and come back, from one stage to the next.

That is how long these copies may take and cost nothing.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from framefit.cards import CARDS
from framefit.ledger.counts import Counts, Tally
from framefit.ledger.shelf import Shelf
from framefit.ledger.transfer import Transfer
from framefit.rates import of_sheet

__all__ = ["Spent"]


class Spent:
    """Told of every call, it looks at what is booked meanwhile."""

    def __init__(self, tally: Tally) -> None:
        self.seconds: dict[str, dict[nn.Module, float]] = {"block": {}, "leaf": {}}
        """At one card's rates: the shares that follow from them are much alike on all."""
        self.tally, self._rates = tally, of_sheet(CARDS["h200"])
        self._open: dict[str, tuple[nn.Module, Counts, Counts]] = {}
        self._stages: list[tuple[float, int]] = []

    def begin(self, level: str, module: nn.Module) -> None:
        """It is called, and the one before it has had its time."""
        self.end(level)
        counts = self.tally.counts
        self._open[level] = module, counts, counts.copy()

    def end(self, *levels: str) -> None:
        """No other is called before long."""
        for level in levels:
            if level in self._open:
                module, counts, before = self._open.pop(level)
                self.seconds[level][module] = self.seconds[level].get(module, 0.0) + self._s(counts.since(before))

    def shelf(self, transfer: Transfer) -> Shelf:
        """One whose stages are noted."""
        return _Noted(transfer, self)

    def stage(self, counts: Counts, bytes: int) -> None:
        """It computed so much, and remembers so much; it is counted as often as the tally says."""
        self._stages.append((self._s(counts), self.tally.times * bytes))

    def stages(self) -> tuple[tuple[float, int], ...]:
        """Of the phase that ends: share of its seconds, and bytes that move each way meanwhile, about as many as the
        stage's own."""
        whole, stages = self._s(self.tally.counts), self._stages
        self._stages = []
        return tuple((seconds / whole, bytes) for seconds, bytes in stages)

    def _s(self, counts: Counts) -> float:
        return sum((self._rates.seconds_by_kind(counts.work) or {}).values())


class _Noted(Shelf):
    """From when a stage takes what it remembers until it puts it back is its time."""

    def __init__(self, transfer: Transfer, spent: Spent) -> None:
        super().__init__(transfer)
        self._spent, self._before = spent, Counts()

    def take(self, name: Hashable, usual: Any) -> Any:
        self._before = self._spent.tally.counts.copy()
        return super().take(name, usual)

    def put(self, name: Hashable, tree: Any) -> None:
        bytes = sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
        self._spent.stage(self._spent.tally.counts.since(self._before), bytes)
        super().put(name, tree)
