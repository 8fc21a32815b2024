"""A card as nvidia-smi tells of it: clocks, how busy it is, and who else is on it.

What it does not tell, as on a part of a card or in a container, is unknown, or estimated from what the driver says is
free.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import Self

__all__ = ["IDLE", "REASONS", "Others", "Sample", "Smi", "least_of_others", "others"]

OWN_BYTES = 2**30
"""More than CUDA's context and the libraries' kernels take in a process beside what torch reserves."""
IDLE = 1
REASONS = {
    2: "clocks set by an administrator", 4: "power cap", 8: "hardware slowdown", 16: "clocks in step with other cards",
    32: "heat, by the driver", 64: "heat, by the card", 128: "power brake",
}  # fmt: skip
"""nvmlClocksEventReasons, nvml.h."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One look at a card's clocks."""

    clock: float
    """Over its highest."""
    reasons: int
    """Bits of REASONS, and IDLE."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Others:
    """Other processes on a card."""

    count: int | None
    """None: not told."""
    bytes: int
    """That they hold of its memory, at the least."""


@dataclass(frozen=True, slots=True)
class Smi:
    """nvidia-smi, asked of one card."""

    program: str
    id: str
    """A UUID: torch and nvidia-smi may count cards differently."""

    @classmethod
    def find(cls, device: str) -> Self | None:
        """None without nvidia-smi."""
        import torch

        program = shutil.which("nvidia-smi")
        uuid = torch.cuda.get_device_properties(device).uuid
        return None if program is None else cls(program, f"GPU-{uuid}")

    def sample(self) -> Sample | None:
        for reasons in ("clocks_event_reasons.active", "clocks_throttle_reasons.active"):  # the latter up to driver 530
            if cells := self._card(f"clocks.sm,clocks.max.sm,{reasons}"):
                now, most, bits = cells
                return Sample(clock=int(now) / int(most), reasons=int(bits, 16))
        return None

    def utilisation(self) -> float | None:
        """Share of the last second, at the most, in which a kernel ran, 0 to 1."""
        cells = self._card("utilization.gpu")
        return float(cells[0]) / 100 if cells else None

    def used_bytes(self) -> int | None:
        """Of the card's memory, by all processes."""
        cells = self._card("memory.used")
        return int(cells[0]) * 2**20 if cells else None

    def processes(self) -> dict[int, int] | None:
        """Process -> bytes of the card's memory, of all that compute on it."""
        rows = self._ask("compute-apps", "pid,used_memory")
        if rows is None or not all(len(cells) == 2 and all(cell.isdigit() for cell in cells) for cells in rows):
            return None
        return {int(pid): int(mebibytes) * 2**20 for pid, mebibytes in rows}

    def _card(self, what: str) -> list[str] | None:
        """None where the driver does not tell, as it does not on a part of a card."""
        rows = self._ask("gpu", what)
        cells = rows[0] if rows else []
        known = len(cells) == what.count(",") + 1 and all(cell[:1].isdigit() for cell in cells)
        return cells if known else None

    def _ask(self, about: str, what: str) -> list[list[str]] | None:
        """The cells of the answer, row by row; None where there was none."""
        command = [self.program, f"--id={self.id}", f"--query-{about}={what}", "--format=csv,noheader,nounits"]
        try:
            told = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if told.returncode:
            return None
        return [[cell.strip() for cell in line.split(",")] for line in told.stdout.splitlines() if line.strip()]


def others(device: str) -> Others:
    """On `device`, "cuda:N", which this process has used: as nvidia-smi lists them if it knows us, else estimated."""
    smi = Smi.find(device)
    told = smi.processes() if smi else None
    if told and os.getpid() in told:  # else the numbers are those of another namespace
        rest = [held for pid, held in told.items() if pid != os.getpid()]
        return Others(count=len(rest), bytes=sum(rest))
    return Others(count=None, bytes=least_of_others(device))


def least_of_others(device: str | int) -> int:
    """Bytes in use on the card that cannot be this process's."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return max(0, total - free - torch.cuda.memory_reserved(device) - OWN_BYTES)
