"""What holds a call up that is no work of the model: compiling again, and an allocator that ran out of room."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch

__all__ = ["StallWatch", "Stalls", "compiled"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stalls:
    """Of one call, after everything was warm."""

    graphs: float = 0.0
    """Compiled again by torch.compile."""
    compile_s: float = 0.0
    """The seconds of that."""
    retries: float = 0.0
    """Times that torch's allocator on the card had to give back its cache to find room; each waits for the card."""

    def per_call(self, calls: int) -> Stalls:
        return Stalls(**{fact.name: getattr(self, fact.name) / calls for fact in fields(self)})


@dataclass(slots=True)
class StallWatch:
    """Counts what happens inside its phases."""

    device: str
    phases: dict[str, Stalls] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens in the block is added to the phase `name`."""
        before, known = self._now(), self.phases.get(name, Stalls())
        try:
            yield
        finally:
            now = self._now()
            self.phases[name] = Stalls(**{key: getattr(known, key) + now[key] - before[key] for key in now})

    def _now(self) -> dict[str, float]:
        graphs, compile_s = compiled()
        retries = 0 if self.device == "cpu" else torch.cuda.memory_stats(self.device).get("num_alloc_retries", 0)
        return {"graphs": graphs, "compile_s": compile_s, "retries": retries}


def compiled() -> tuple[int, float]:
    """Times that torch.compile has compiled a frame in this process, and seconds; none where it was never imported."""
    dynamo: Any = sys.modules.get("torch._dynamo")
    took = dynamo.utils.compilation_time_metrics.get("_compile.compile_inner", ()) if dynamo else ()
    return len(took), sum(took)
