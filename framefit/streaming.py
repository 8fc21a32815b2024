"""What planning and moving of weights must agree on, down to the byte. No torch."""

from __future__ import annotations

__all__ = ["PIECES", "ROOMS", "spread", "staging_bytes"]

ROOMS = 2
"""On the device, that all units of a stream pass through."""
PIECES = 4
"""Of host memory, that what is read from files passes through."""
PIECE_BYTES = 2**25
"""Large enough that a disk and a bus give what they have."""


def spread(kept: int, among: int) -> set[int]:
    """Which blocks stay: evenly among the others, so that the copies have time between them."""
    return {i for i in range(among) if (i + 1) * kept // among > i * kept // among}


def staging_bytes(largest: int) -> int:
    """Of host memory, where at most `largest` bytes lie together."""
    return PIECES * min(PIECE_BYTES, largest)
