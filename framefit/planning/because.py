"""Why a setting was derived, in one clause with numbers: what the value before it would need, or take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from framefit.durations import duration
from framefit.plan import Offload, Plan, Setting

__all__ = ["reasoned"]

GIB = 2**30


def reasoned(plan: Plan, before: Mapping[str, Plan], blocks: int) -> Plan:
    """`plan` with the reason for each setting that was derived.

    Args:
        before: type -> the plan with the value that comes before its own, all others alike.
        blocks: of the denoiser.
    """
    settings = tuple(
        replace(s, because=_because(s, plan, before[s.type]) + _places(s, blocks)) if s.type in before else s
        for s in plan.settings
    )
    return replace(plan, settings=settings)


WHERE = {"device": "", "host": " in RAM", "pinned": " of pinned RAM", "shelf": " in RAM", "disk": " of disk"}
"""Key of `Plan.needs` -> where that is."""


def _because(setting: Setting, plan: Plan, other: Plan) -> str:
    value = next(s.value for s in other.settings if s.type == setting.type)
    if other.feasible or not plan.feasible:
        if plan.feasible and plan.estimate.seconds is not None and other.estimate.seconds is not None:
            seconds = duration(plan.estimate.seconds), duration(other.estimate.seconds)
            return f"{seconds[0]}, and {seconds[1]} with {setting.type}={value}"
        return "the leanest that there is" if not plan.feasible else f"before {setting.type}={value} in the order"
    phase = max(other.estimate.phases, key=other.excess_bytes)
    place, (need, there) = max(other.needs(phase).items(), key=lambda each: each[1][0] - each[1][1])
    return (
        f"{phase.name} needs {need / GIB:.1f} GiB{WHERE[place]} with {setting.type}={value} and {there / GIB:.1f} GiB "
        f"are there"
    )


def _places(setting: Setting, blocks: int) -> str:
    if not isinstance(setting, Offload):
        return ""
    stay = f", {setting.kept} of {blocks} stay" if setting.kept else ""
    told = {
        "part": ": a component comes for the phases that need it",
        "block": f": blocks stream{stay}",
        "leaf": ": layers stream",
        "disk": f": blocks are read from files{stay}",
    }
    return told.get(setting.level, "")
