"""Techniques, one a file: each has a setting type in `framefit.plan` and an `apply(parts, setting)` here.

ORDER is the one place that says in which order they are applied, with a reason at each line.
"""

from __future__ import annotations

from typing import Any

from framefit.families.parts import Parts
from framefit.passes import guidance, offload, window
from framefit.plan import Guidance, Offload, Plan, Setting, Window

__all__ = ["ORDER", "apply_all"]

ORDER: tuple[tuple[type[Setting], Any], ...] = (
    (Guidance, guidance),  # touches no module: it only says how the loop calls them
    (Window, window),  # the same: which frames a call is about
    (Offload, offload),  # last: it packs the weights as all others leave them
)


def apply_all(parts: Parts, plan: Plan) -> Parts:
    """Apply the plan's settings in ORDER."""
    for kind, technique in ORDER:
        for setting in plan.settings:
            if isinstance(setting, kind):
                technique.apply(parts, setting)
    return parts
