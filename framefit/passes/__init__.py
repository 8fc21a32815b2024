"""Techniques, one a file: each has a setting type in `framefit.plan`, and `apply(parts, setting)` and `remove(parts)`.

ORDER is the one place that says in which order they are applied, with a reason at each line.
"""

from __future__ import annotations

from typing import Any

from framefit.families.parts import Parts
from framefit.passes import chunk, decode, guidance, offload, quantize, window
from framefit.plan import Chunk, Decode, Guidance, Offload, Plan, Quantize, Setting, Window

__all__ = ["ORDER", "apply_all", "change"]

ORDER: tuple[tuple[type[Setting], Any], ...] = (
    (Quantize, quantize),  # first: what others rearrange or pack is what is kept
    (Chunk, chunk),  # before what wraps modules: it restates how they call what is in them
    (Offload, offload),  # after all that say what weights there are, and what asks for them: it packs these
    (Decode, decode),  # after it: VAEs come as a whole, and a change of how they divide a video packs nothing anew
    (Guidance, guidance),  # after it: it touches none, so that a change of it packs nothing anew
    (Window, window),  # the same: which frames a call is about
)


def apply_all(parts: Parts, plan: Plan) -> Parts:
    """Apply the plan's settings in ORDER."""
    for kind, technique in ORDER:
        for setting in plan.settings:
            if isinstance(setting, kind):
                technique.apply(parts, setting)
    return parts


def change(parts: Parts, before: Plan, after: Plan) -> None:
    """Arrange `parts`, on which `before` was applied, as `after` says; no weight is read anew.

    From the first pass in ORDER on whose setting differs, all are removed, the last one first, and applied again.
    """
    old, new = ({type(s): s for s in plan.settings} for plan in (before, after))
    values = [[of[kind].value if kind in of else None for of in (old, new)] for kind, _ in ORDER]
    first = next((place for place, (was, will) in enumerate(values) if was != will), len(ORDER))
    for _, technique in reversed(ORDER[first:]):
        technique.remove(parts)
    for kind, technique in ORDER[first:]:
        if kind in new:
            technique.apply(parts, new[kind])
