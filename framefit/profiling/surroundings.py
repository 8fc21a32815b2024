"""What else goes on while a model runs: other programs, clocks that are held down, a processor quota that ran out.

On a card nvidia-smi tells, where there is one; what it does not tell is unknown, and no rule speaks of it.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import psutil
import torch

__all__ = ["Card", "Sample", "Surroundings", "Watch"]

CONTROL_GROUP = Path("/sys/fs/cgroup")
CONTEXT_BYTES = 2**30
"""More than CUDA's context and the libraries' kernels take in a process beside what torch reserves."""
QUIET_S = 1.2
"""The card counts its utilisation over up to a second: for so long it must be left alone before others are seen."""
EVERY_S = 0.5
IDLE = 1
REASONS = {
    2: "clocks set by an administrator", 4: "power cap", 8: "hardware slowdown", 16: "clocks in step with other cards",
    32: "heat, by the driver", 64: "heat, by the card", 128: "power brake",
}  # fmt: skip
"""nvmlClocksEventReasons, nvml.h."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One look at a card's clocks."""

    clock: float
    """Over its highest."""
    reasons: int
    """Bits of REASONS, and IDLE."""


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
        if self.device != "cpu" and (card := Card.find(self.device)):
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
            self.seen = replace(self.seen, others_bytes=_others_bytes(self.device))

    def _look(self, card: Card) -> None:
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


@dataclass(frozen=True, slots=True)
class Card:
    """A card, as nvidia-smi tells of it."""

    program: str
    id: str
    """A UUID: torch and nvidia-smi may count cards differently."""

    @classmethod
    def find(cls, device: str) -> Self | None:
        """None without nvidia-smi."""
        program = shutil.which("nvidia-smi")
        uuid = torch.cuda.get_device_properties(device).uuid
        return None if program is None else cls(program, f"GPU-{uuid}")

    def sample(self) -> Sample | None:
        for reasons in ("clocks_event_reasons.active", "clocks_throttle_reasons.active"):  # the latter up to driver 530
            if cells := self._ask(f"clocks.sm,clocks.max.sm,{reasons}"):
                now, most, bits = cells
                return Sample(clock=int(now) / int(most), reasons=int(bits, 16))
        return None

    def utilisation(self) -> float | None:
        """Share of the last second, at the most, in which a kernel ran, 0 to 1."""
        cells = self._ask("utilization.gpu")
        return float(cells[0]) / 100 if cells else None

    def _ask(self, what: str) -> list[str] | None:
        """None where the driver does not tell, as it does not on a part of a card."""
        command = [self.program, f"--id={self.id}", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
        try:
            told = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        cells = [cell.strip() for cell in told.stdout.split(",")]
        known = told.returncode == 0 and len(cells) == what.count(",") + 1 and all(cell[:1].isdigit() for cell in cells)
        return cells if known else None


def _others_bytes(device: str) -> int:
    free, total = torch.cuda.mem_get_info(device)
    return max(0, total - free - torch.cuda.memory_reserved(device) - CONTEXT_BYTES)


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
