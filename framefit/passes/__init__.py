"""Techniques, one a file: each has a setting type in `framefit.plan` and an `apply(parts, setting)` here.

ORDER is the one place that says in which order they are applied, with a reason at each line.
"""

from __future__ import annotations

from typing import Any

from framefit.families.parts import Parts
from framefit.passes import decode, guidance, offload
from framefit.plan import Decode, Guidance, Offload, Plan, Setting

__all__ = ["ORDER", "apply_all"]

ORDER: tuple[tuple[type[Setting], Any], ...] = (
    (Decode, decode),  # touches no module: it only says how much of a video goes through the VAE's at once
    (Guidance, guidance),  # touches no module: it only says how the loop calls them
    (Offload, offload),  # last: it packs the weights as all others leave them
)


def apply_all(parts: Parts, plan: Plan) -> Parts:
    """Apply the plan's settings in ORDER."""
    for kind, technique in ORDER:
        for setting in plan.settings:
            if isinstance(setting, kind):
                technique.apply(parts, setting)
    return parts
