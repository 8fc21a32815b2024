"""What the machine has: the card, the memory, the disk. It knows nothing of models."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from framefit.errors import UsageError

__all__ = ["Device"]

CONTROL_GROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One place to run on. All sizes in bytes."""

    id: str
    """What torch calls it: "cpu" or "cuda:0"."""
    name: str
    compute_capability: tuple[int, int] | None
    vram_total_bytes: int
    """0 without a card."""
    vram_free_bytes: int
    ram_total_bytes: int
    """What this process may use: the control group's limit where there is one."""
    ram_free_bytes: int
    disk_free_bytes: int
    """In the folder that temporary files go to."""

    @classmethod
    def detect(cls, which: str = "auto") -> Self:
        """Look at the machine. `which`: "auto" (a CUDA card if there is one), "cpu", "cuda" or "cuda:N"."""
        import tempfile

        import torch

        total, free = _memory()
        facts: dict[str, Any] = {
            "ram_total_bytes": total,
            "ram_free_bytes": free,
            "disk_free_bytes": shutil.disk_usage(tempfile.gettempdir()).free,
        }
        if which == "cpu" or (which == "auto" and not torch.cuda.is_available()):
            return cls(
                id="cpu", name=_cpu_name(), compute_capability=None, vram_total_bytes=0, vram_free_bytes=0, **facts
            )
        index = _cuda_index(which)
        vram_free, vram_total = torch.cuda.mem_get_info(index)
        return cls(
            id=f"cuda:{index}",
            name=torch.cuda.get_device_name(index),
            compute_capability=torch.cuda.get_device_capability(index),
            vram_total_bytes=vram_total,
            vram_free_bytes=vram_free,
            **facts,
        )

    @property
    def memory_free_bytes(self) -> int:
        """Where weights and activations go: the card's memory, or RAM without a card."""
        return self.vram_free_bytes if self.id != "cpu" else self.ram_free_bytes

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        capability = data["compute_capability"]
        return cls(**(data | {"compute_capability": None if capability is None else tuple(capability)}))


def _cuda_index(which: str) -> int:
    import torch

    kind, _, index = ("cuda" if which == "auto" else which).partition(":")
    if kind != "cuda" or (index and not index.isdecimal()):
        raise UsageError(f"device '{which}' is unknown: use auto, cpu, cuda or cuda:N.")
    count = torch.cuda.device_count()
    if int(index or 0) >= count:
        raise UsageError(f"device '{which}' was asked for and torch sees {count} CUDA devices: use --device cpu.")
    return int(index or 0)


def _memory() -> tuple[int, int]:
    """(total, free) RAM in bytes, within the control group's limit (cgroup v2, then v1)."""
    import psutil

    memory = psutil.virtual_memory()
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            ceiling, current = (int((CONTROL_GROUP / name).read_text()) for name in (limit, used))
        except (OSError, ValueError):
            continue
        if ceiling < memory.total:
            return ceiling, min(memory.available, ceiling - current)
    return memory.total, memory.available


def _cpu_name() -> str:
    import os
    import platform

    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux tells more
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"{model} ({os.cpu_count()} cores)"
