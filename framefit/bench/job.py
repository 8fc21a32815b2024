"""What one process is asked to measure, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

from framefit.bench.scenarios import Scenario
from framefit.bench.variants import Variant

__all__ = ["Job"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What one process is to measure."""

    scenario: Scenario
    variant: Variant
    device: str = "auto"
    vram_bytes: int | None = None
    """Most that may be reserved of a card; None: what is free."""
    weights: str
    """"random", or a model id or folder; see `Scenario.checkpoint`."""
    repeats: int | None = None
    """Measured calls; None: five, more where they are short, fewer where they are long."""
    output: str = ""
    """File that the output tensor is kept in; empty: it is not kept."""
    reference: str = ""
    """File of the output that this one's quality is measured against; empty: it is not."""
    profile: bool = False
    """Whether one more call is profiled."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        parts = {"scenario": Scenario(**data["scenario"]), "variant": Variant(**data["variant"])}
        return cls(**(data | parts))
