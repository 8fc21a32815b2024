"""What an out-of-memory error says: which memory ran out, what was asked for, and what was held."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

import torch

from framefit.errors import Unpinnable
from framefit.ledger.steps import read_memory
from framefit.report import Memory

__all__ = ["Shortage"]

CARD = ("CUDA error: out of memory", "CUDA driver error: out of memory", "STATUS_ALLOC_FAILED")
"""In what torch raises where not its own allocator failed but CUDA, cuBLAS or cuDNN."""
RAM = "can't allocate memory"
"""In the plain RuntimeError that torch raises where the CPU's allocator fails."""
ASKED = re.compile(r"(?:ried to allocate |^)([\d.]+) (bytes|KiB|MiB|GiB)")
"""As torch tells it; what is to be pinned comes first in its sentence."""
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shortage:
    """Memory that ran out. Holds nothing of the error, whose frames hold tensors."""

    of: Memory
    asked_bytes: int | None
    """None where the error does not say."""
    held_bytes: int
    """Allocated on the card just then, or resident in RAM where that ran out."""

    @classmethod
    def told(cls, error: BaseException, device: str) -> Self | None:
        """None where `error` is about something else.

        Args:
            device: "cpu" or "cuda:N".
        """
        text = str(error)
        if isinstance(error, Unpinnable):
            of: Memory = "host"
        elif isinstance(error, torch.OutOfMemoryError) or any(words in text for words in CARD):
            of = "card"
        elif isinstance(error, MemoryError) or RAM in text:
            of = "RAM" if device == "cpu" else "host"
        else:
            return None
        asked, held = ASKED.search(text), read_memory(device)
        allocated_bytes = held.allocated_bytes if of == "card" else None
        return cls(
            of=of, held_bytes=held.host_bytes if allocated_bytes is None else allocated_bytes,
            asked_bytes=int(float(asked[1]) * UNITS[asked[2]]) if asked else None,
        )  # fmt: skip
