"""Phase timers. One phase runs at a time: entering another pauses the one outside.

On a card the peak is torch's allocated bytes; on the CPU it is the process's resident memory (Linux: its high-water
mark, reset where the phase changes; elsewhere: the larger of the readings at the phase's ends).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Ledger", "Phase", "resident_peak"]


@dataclass(slots=True)
class Phase:
    name: str
    seconds: float = 0.0
    peak_bytes: int = 0


@dataclass(slots=True)
class Ledger:
    """Seconds and peak bytes by phase, in the order of first entry."""

    device: str = "cpu"
    phases: dict[str, Phase] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    on_enter: Callable[[str], None] = lambda name: None
    """Hears the name of a phase when it is entered for the first time."""
    around: Callable[[str], AbstractContextManager[object]] = nullcontext
    """Makes a context that every phase runs in, from its name; a profiler marks phases so."""
    last: str = ""
    """The phase that is running, or ran last."""
    _open: list[str] = field(default_factory=list)
    _since: float = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Book the time and memory of the block on `name`; re-entering adds up."""
        with self.around(name), self._booked(name):
            yield

    @contextmanager
    def _booked(self, name: str) -> Iterator[None]:
        if name not in self.phases:
            self.on_enter(name)
            self.phases[name] = Phase(name)
        self._book_time()
        if name != self.last:
            self._book_memory()
            self.last = name
        self._open.append(name)
        try:
            yield
        finally:
            self._book_time()
            self._open.pop()

    def close(self) -> list[Phase]:
        """The finished account of every phase."""
        self._book_memory()
        return list(self.phases.values())

    def note(self, sentence: str) -> None:
        """Tell the user something once: kept for the report, and logged at once."""
        if sentence in self.notices:  # a phase that runs again finds the same
            return
        self.notices.append(sentence)
        logging.getLogger("framefit").warning(sentence)

    def _book_time(self) -> None:
        if self.device != "cpu":
            import torch

            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._open:
            self.phases[self._open[-1]].seconds += now - self._since
        self._since = now

    def _book_memory(self) -> None:
        """The peak since the last booking goes to the phase that was entered last."""
        peak = resident_peak() if self.device == "cpu" else _allocated_peak(self.device)
        if self.last:
            phase = self.phases[self.last]
            phase.peak_bytes = max(phase.peak_bytes, peak)


def _allocated_peak(device: str) -> int:
    import torch

    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def resident_peak() -> int:
    """High-water mark of resident memory since the last call; /proc/self/clear_refs 5 resets it (man 5 proc)."""
    try:
        status = Path("/proc/self/status").read_text()
        Path("/proc/self/clear_refs").write_text("5")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except OSError:
        import psutil

        resident: int = psutil.Process().memory_info().rss
        return resident
