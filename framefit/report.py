"""What a run did, for people and programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from framefit.plan import Plan

__all__ = ["PhaseReport", "Report"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseReport:
    name: str
    seconds: float
    peak_bytes: int
    """On a card torch's allocated bytes, on the CPU the process's resident memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The outcome of one run."""

    video: Path
    plan: Plan
    seconds: float
    resumed_from_step: int | None
    """Steps that an earlier run had taken; None where this run began at the beginning."""
    phases: tuple[PhaseReport, ...]
    notices: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        request = self.plan.request
        return {
            "video": str(self.video),
            "seed": request.seed,
            "size": [request.width, request.height],
            "num_frames": request.num_frames,
            "seconds": round(self.seconds, 3),
            "resumed_from_step": self.resumed_from_step,
            "plan": self.plan.to_json(),
            "report": {"phases": [asdict(phase) for phase in self.phases], "notices": list(self.notices)},
        }
