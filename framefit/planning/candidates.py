"""What a plan may choose from: of every type of setting the values, from the fastest to the leanest. One line a type.

The first value of a type is what stands where everything fits. A value is for those whose tier allows it. Where weights
lie is no line of the table: it is solved for, see `placements`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from framefit.families import Checkpoint
from framefit.plan import Guidance, Offload, Plan, Setting, Tier
from framefit.planning.moved import blocks
from framefit.planning.phase import PhaseTrace

__all__ = ["CANDIDATES", "RUNG", "Candidates", "climbed", "placements", "with_values"]

RUNG = 1.01
"""Seconds of a phase over those with the value before, beyond what rates tell: launches, smaller kernels. Assumed."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """One type."""

    kind: type[Setting]
    values: Callable[[Checkpoint], tuple[str, ...]]
    moves_weights: bool = False
    """Whether it changes how many bytes of weights there are."""

