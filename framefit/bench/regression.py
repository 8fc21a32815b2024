"""Whether one result is worse than an older one of the same work on the same machine.

A figure is a regression when it is worse by more than a share *and* by more than an amount: a share alone makes noise
of short calls, an amount alone hides a slow-down of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from framefit.bench.result import Result, Row
from framefit.errors import BadInput

__all__ = ["Change", "Thresholds", "compare"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """What is still noise."""

    share: float = 0.05
    """0.05 is 5 %."""
    seconds: float = 0.005
    bytes: int = 64 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One figure of one row in both results."""

    row: str
    figure: str
    """median_s, peak_allocated_bytes, peak_reserved_bytes, or status."""
    old: float | str
    new: float | str
    regression: bool

    @property
    def share(self) -> float | None:
        """(new - old) / old; None for a status."""
        if isinstance(self.old, str) or isinstance(self.new, str):
            return None
        return self.new / self.old - 1 if self.old else None


def compare(old: Result, new: Result, thresholds: Thresholds | None = None) -> list[Change]:
    """Every figure of every row of `old`, beside that of `new`. A row that is gone or fails now is a regression.

    Raises:
        BadInput: the two are of different work, machines, precisions or weights.
    """
    _check_comparable(old, new)
    limits = thresholds or Thresholds()
    rows = {row.name: row for row in new.rows}
    return [change for row in old.rows if row.seconds for change in _changes(row, rows.get(row.name), limits)]


def _changes(old: Row, new: Row | None, limits: Thresholds) -> Iterator[Change]:
    if new is None or not new.seconds:
        said = "gone" if new is None else f"{new.status}: {new.because}"
        yield Change(row=old.name, figure="status", old=old.status, new=said, regression=True)
        return
    yield _change(old.name, "median_s", old.median_s, new.median_s, limits.share, limits.seconds)
    for figure in ("peak_allocated_bytes", "peak_reserved_bytes"):
        before, after = getattr(old, figure), getattr(new, figure)
        if before is not None and after is not None:
            yield _change(old.name, figure, before, after, limits.share, limits.bytes)


def _change(row: str, figure: str, old: float, new: float, share: float, amount: float) -> Change:
    worse = new - old
    return Change(row=row, figure=figure, old=old, new=new, regression=worse > amount and worse > share * old)


def _check_comparable(old: Result, new: Result) -> None:
    facts = {
        "scenario": (old.scenario, new.scenario),
        "hardware": (old.hardware, new.hardware),
        "threads": (old.threads, new.threads),
        "precision": (old.precision, new.precision),
        "weights": (old.weights, new.weights),
    }
    for name, (before, after) in facts.items():
        if before != after:
            said = (old.scenario.title, new.scenario.title) if name == "scenario" else (before, after)
            raise BadInput(
                f"the two results differ in {name} ({said[0]}; {said[1]}), and only the same work on the same machine "
                f"can be compared: measure again."
            )
