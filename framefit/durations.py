"""Seconds as a person reads them. No torch."""

from __future__ import annotations

__all__ = ["duration"]


def duration(seconds: float) -> str:
    """ "0.19 s", "54 s", "12 min 5 s", "3 h 31 min"."""
    if seconds < 59.5:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"
