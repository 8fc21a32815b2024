"""What was measured, as data: one `Row` a variant, one `Result` a scenario, each JSON in and JSON out."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from framefit.bench.scenarios import Scenario
from framefit.errors import BadInput

__all__ = ["Result", "Row", "read"]

FORMAT = 1
"""Of the JSON file; counted up when a field changes its meaning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One variant, measured or not, from a process of its own."""

    name: str
    status: Literal["measured", "failed", "left out"]
    because: str = ""
    """Why there are no figures; empty where there are."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Every setting of the plan, type -> value; empty for other engines than framefit."""
    tier: str = ""
    """The least exact tier among the settings."""
    build_s: float | None = None
    """Making or reading the weights, on the device."""
    warmup_s: tuple[float, ...] = ()
    """Calls before the measured ones."""
    seconds: tuple[float, ...] = ()
    """Measured calls, in order."""
    peak_allocated_bytes: int | None = None
    """During the measured calls. On a card torch's allocated bytes, on the CPU the process's resident memory."""
    peak_reserved_bytes: int | None = None
    """What torch's allocator held of the card; None on the CPU."""
    flops: int | None = None
    """Floating-point operations of one call, as counted; kernels that nobody registered count 0."""
    predicted: Mapping[str, float] = field(default_factory=dict)
    """Of the plan's estimate, by field."""
    measured: Mapping[str, float] = field(default_factory=dict)
    """The same fields as they turned out."""
    quality: Mapping[str, float | None] = field(default_factory=dict)
    """Against stock's output: relative_l2, max_abs, psnr_db (decodes; None: equal)."""
    profile: Mapping[str, Any] = field(default_factory=dict)
    """Where the time of one call went, as `framefit.profiling.Breakdown` tells it; empty: it was not asked for."""
    advice: tuple[Mapping[str, Any], ...] = ()
    """What would help, as `framefit.profiling.Finding` tells it, the largest gain first; gains are of one call."""

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread_s(self) -> tuple[float, float, float, float]:
        """Least, lower quartile, upper quartile, most."""
        if len(self.seconds) == 1:
            return (self.seconds[0],) * 4
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return min(self.seconds), low, high, max(self.seconds)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`."""
        return cls(**(data | {name: tuple(data.get(name, ())) for name in ("seconds", "warmup_s", "advice")}))


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The waterfall of one scenario on one machine."""

    scenario: Scenario
    weights: str
    """"random", or the model or folder that was read."""
    hardware: str
    """Name of the card or processor."""
    precision: str
    date: str
    """ISO 8601, UTC, to the second."""
    versions: Mapping[str, str]
    ceiling_flops: float | None
    """Operations a second of a large matmul in this precision, as measured on this device; None: not measured."""
    rows: tuple[Row, ...]
    threads: int | None = None
    """Of a CPU; None on a card."""

    @property
    def stock_s(self) -> float | None:
        """Mean of stock's medians at the beginning and the end: what ratios are to."""
        return statistics.mean(self._stock_medians) if self._stock_medians else None

    @property
    def _stock_medians(self) -> list[float]:
        return [row.median_s for row in self.rows if row.name.startswith("stock") and row.seconds]

    @property
    def drift(self) -> float | None:
        """How much slower stock was at the end than at the beginning: 0.02 is 2 %."""
        medians = self._stock_medians
        return medians[-1] / medians[0] - 1 if len(medians) > 1 else None

    @property
    def work_flops(self) -> int | None:
        """Operations of the work: as counted in stock, or in the first row without it, the same for every row."""
        return next((row.flops for row in self.rows if row.flops), None)

    def ratio(self, row: Row) -> float | None:
        """How many times faster than stock."""
        return self.stock_s / row.median_s if self.stock_s and row.seconds else None

    def rate(self, row: Row) -> float | None:
        """Operations of the work a second."""
        return self.work_flops / row.median_s if self.work_flops and row.seconds else None

    def share(self, row: Row) -> float | None:
        """Of the ceiling: 0.8 is 80 %."""
        rate = self.rate(row)
        return rate / self.ceiling_flops if rate and self.ceiling_flops else None

    def to_json(self) -> dict[str, Any]:
        """Everything measured, and beside each row what follows from it."""
        return {
            "format": FORMAT,
            **{f: getattr(self, f) for f in ("weights", "hardware", "threads", "precision", "date", "ceiling_flops")},
            "versions": dict(self.versions),
            "scenario": self.scenario.to_json(),
            "rows": [asdict(row) | {"derived": self._derived(row)} for row in self.rows],
        }

    def _derived(self, row: Row) -> dict[str, Any]:
        if not row.seconds:
            return {}
        return {
            "median_s": row.median_s,
            "min_q1_q3_max_s": row.spread_s,
            "ratio_to_stock": self.ratio(row),
            "flops_per_s": self.rate(row),
            "share_of_ceiling": self.share(row),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The inverse of `to_json`; what was derived is derived again."""
        facts = {name: value for name, value in data.items() if name not in ("format", "rows", "scenario")}
        rows = tuple(Row.from_json({k: v for k, v in row.items() if k != "derived"}) for row in data["rows"])
        return cls(scenario=Scenario.from_json(data["scenario"]), rows=rows, **facts)


def read(file: Path) -> Result:
    """A result that `framefit bench` wrote.

    Raises:
        BadInput: it cannot be read, or is something else.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise BadInput(f"{file} has format {data['format']}, and this framefit reads format {FORMAT}.")
        return Result.from_json(data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"{file} is no result of framefit bench ({type(error).__name__}: {error}): give the .json that it wrote."
        ) from None
