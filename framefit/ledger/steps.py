"""One log line every few steps: seconds a step, and the memory held on the card and on the host.

Cheap enough for every run: reading takes well under a millisecond, and nothing waits for the card.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

__all__ = ["MemoryReading", "StepLog", "read_memory"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryReading:
    """Memory held now, in bytes."""

    allocated_bytes: int | None
    """By torch on the card; None on the CPU."""
    reserved_bytes: int | None
    """By torch's allocator on the card, for itself and what is allocated; None on the CPU."""
    host_bytes: int
    """Resident memory of the process."""

    def __str__(self) -> str:
        named = {"allocated": self.allocated_bytes, "reserved": self.reserved_bytes, "host": self.host_bytes}
        return ", ".join(f"{size / 2**30:.2f} GiB {name}" for name, size in named.items() if size is not None)


def read_memory(device: str) -> MemoryReading:
    """Of this process on `device`, "cpu" or "cuda:N"."""
    host: int = _process().memory_info().rss
    if device == "cpu":
        return MemoryReading(allocated_bytes=None, reserved_bytes=None, host_bytes=host)
    import torch

    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    return MemoryReading(allocated_bytes=allocated, reserved_bytes=reserved, host_bytes=host)


@dataclass(slots=True)
class StepLog:
    """Called after every step; logs each `every`-th at INFO."""

    device: str
    every: int
    """0: never."""
    _steps: int = 0
    _seconds: float = 0.0

    def __call__(self, index: int, total: int, seconds: float) -> None:
        """Step `index` of `total` took `seconds`."""
        if not self.every:
            return
        self._steps, self._seconds = self._steps + 1, self._seconds + seconds
        if index % self.every == 0:
            logging.getLogger("framefit").info(
                "step %d of %d: %.3g s a step, %s", index, total, self._seconds / self._steps, read_memory(self.device)
            )
            self._steps, self._seconds = 0, 0.0


@functools.cache
def _process() -> Any:
    import psutil

    return psutil.Process()
