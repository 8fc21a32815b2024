"""What a run did, for people and programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from framefit.plan import Plan

__all__ = ["Memory", "PhaseReport", "Report", "Retry", "Rung", "named"]

Memory = Literal["card", "RAM", "host"]
"""card and RAM: where the model computes; host: RAM beside a card, or what of it can be pinned."""


def named(memory: Memory) -> str:
    """As a sentence says it."""
    return "host memory" if memory == "host" else "memory"


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseReport:
    name: str
    seconds: float
    peak_bytes: int
    """On a card torch's allocated bytes, on the CPU the process's resident memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """A setting that took another value when memory ran out, and kept it to the end of the run."""

    phase: str
    step: int | None
    """Steps taken by then; None before the photo was encoded."""
    setting: str
    before: str
    after: str
    of: Memory = "card"
    """What ran out; files of earlier versions do not say it."""
    asked_bytes: int | None
    """Of the allocation that failed; None where it did not say."""
    held_bytes: int
    """Allocated on the card just then, or resident in RAM where that ran out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Retry:
    """A second try, because the first video was not sound."""

    findings: tuple[str, ...]
    """About the first video."""
    withdrawn: str
    """Settings of the first one that the second went without."""
    failed: str | None = None
    """Why there is no second video, and the first one is kept."""


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
    rungs: tuple[Rung, ...] = field(default=())
    """What memory that ran out changed of the plan, before a crash too that the run was resumed from."""
    findings: tuple[str, ...] = field(default=())
    """What may be wrong with the video: black, frozen, seamed."""
    retry: Retry | None = None

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
            "report": {
                "phases": [asdict(phase) for phase in self.phases],
                "notices": list(self.notices),
                "rungs": [asdict(rung) for rung in self.rungs],
                "findings": list(self.findings),
                "retry": asdict(self.retry) if self.retry else None,
            },
        }
