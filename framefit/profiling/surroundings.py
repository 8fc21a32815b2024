"""What else goes on while a model runs: other programs, clocks that are held down, a processor quota that ran out.

On a card nvidia-smi tells (`framefit.smi`), where there is one; what it does not tell is unknown, and no rule speaks of
it.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import psutil
import torch

from framefit.smi import IDLE, REASONS, Sample, Smi, others

__all__ = ["Surroundings", "Watch", "held_down", "throttled_s"]

CONTROL_GROUP = Path("/sys/fs/cgroup")
QUIET_S = 1.2
"""The card counts its utilisation over up to a second: for so long it must be left alone before others are seen."""
EVERY_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Surroundings:
    """Of one stretch of work; None: not known."""

    others_cpu: float | None = None
    """Share of all cores' time that other processes and the hypervisor took, 0 to 1."""
    throttled: float = 0.0
    """Share of the time in which the control group's quota kept the threads from running, 0 to 1."""
    others_bytes: int | None = None
    """Of the card's memory held by other processes, at the least."""
    others_busy: float | None = None
    """Share of the time in which others kept the card busy while we left it alone, 0 to 1."""
    clock: float | None = None
    """Of the card's multiprocessors under load, over their highest."""
    held_down: tuple[str, ...] = ()
    """What the card says it holds its clocks down for, in most of the time."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(**{**data, "held_down": tuple(data["held_down"])})


@dataclass(slots=True)
class Watch:
    """A block of work on `device`, "cpu" or "cuda:N", and what went on around it: `seen`, once the block is over."""

    device: str
    seen: Surroundings = field(default_factory=Surroundings)
    _began: dict[str, float] = field(default_factory=dict)
    _samples: list[Sample] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self.device != "cpu" and (card := Smi.find(self.device)):
            torch.cuda.synchronize(self.device)
            time.sleep(QUIET_S)
            self.seen = replace(self.seen, others_busy=card.utilisation())
            self._thread = threading.Thread(target=self._look, args=(card,), daemon=True)
            self._thread.start()
        self._began = _clocks()
        return self

    def __exit__(self, *error: object) -> None:
        self.seen = replace(self.seen, **_processor(self._began, _clocks()))
        if self._thread:
            self._over.set()
            self._thread.join()
            self.seen = replace(self.seen, **held_down(self._samples))
        if self.device != "cpu":
            self.seen = replace(self.seen, others_bytes=others(self.device).bytes)

    def _look(self, card: Smi) -> None:
        while True:
            if sample := card.sample():
                self._samples.append(sample)
            if self._over.wait(EVERY_S):
                return


def held_down(samples: Iterable[Sample]) -> dict[str, Any]:
    """`clock` and `held_down` of a card from looks at it; those at which it had nothing to do tell nothing."""
    busy = [sample for sample in samples if not sample.reasons & IDLE]
    if not busy:
        return {}
    told = tuple(name for bit, name in REASONS.items() if 2 * sum(bool(s.reasons & bit) for s in busy) > len(busy))
    return {"clock": statistics.median(sample.clock for sample in busy), "held_down": told}


def _clocks() -> dict[str, float]:
    """Seconds: of the wall, of all cores at work, of this process at work, and throttled."""
    machine, own = psutil.cpu_times()._asdict(), psutil.Process().cpu_times()
    busy = sum(machine.get(name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
    return {"wall": time.perf_counter(), "machine": busy, "own": sum(own[:4]), "throttled": throttled_s()}


def _processor(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, Any]:
    took = {name: after[name] - before[name] for name in after}
    wall = max(took["wall"], 1e-9)
    return {
        "others_cpu": min(1.0, max(0.0, took["machine"] - took["own"]) / wall / (os.cpu_count() or 1)),
        "throttled": min(1.0, took["throttled"] / wall / torch.get_num_threads()),
    }


def throttled_s(group: Path = CONTROL_GROUP, own: Path = Path("/proc/self/cgroup")) -> float:
    """Seconds, added up over cores, for which this process's control group ran out of its quota; 0 without one."""
    for file in _statistics(group, own):
        try:
            facts = dict(line.split() for line in file.read_text().splitlines())
        except OSError:
            continue
        if "throttled_usec" in facts:  # version 2
            return int(facts["throttled_usec"]) / 1e6
        if "throttled_time" in facts:
            return int(facts["throttled_time"]) / 1e9
    return 0.0


def _statistics(group: Path, own: Path) -> Iterable[Path]:
    """Where cpu.stat may be: in our own group, or where a container shows its own group as the root."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            for folder in (group / controllers / path.strip("/"), group / controllers):
                yield folder / "cpu.stat"
