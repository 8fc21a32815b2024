"""What to do when memory runs out in spite of the plan: for each phase the settings that need less, one rung at a time.

LADDER is in the order of what a rung costs in time. Every rung is exact, or as near as what stood before: the same
maths, so that a run goes on from the step where it stands. A rung is never taken on a setting that the user asked for.
Knows nothing of how a loaded model is changed: that is the passes' work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from framefit.errors import DoesNotFit
from framefit.families import find
from framefit.plan import SETTINGS, Chunk, Decode, Guidance, Offload, Plan, Setting
from framefit.planning.candidates import CANDIDATES
from framefit.report import Rung

if TYPE_CHECKING:  # it knows torch
    from framefit.ledger.shortage import Shortage

__all__ = ["LADDER", "Relief", "exhausted", "lower", "lowered"]

COMPUTING = ("encode_text", "encode_image", "denoise", "decode")
STREAMING = ("encode_text", "denoise")
"""Phases in which blocks stream: VAEs and image encoders come as a whole at every level."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Relief:
    """One way to need less memory."""

    kind: type[Setting]
    before: str
    """The value that it is taken from; * stands for anything."""
    after: str
    phases: tuple[str, ...]
    """Where it relieves; "denoise" is every expert's."""
    ram: bool = False
    """Whether it spares RAM too, where the model computes in RAM."""
    helps: Callable[[Plan], bool] = lambda plan: True
    """Whether a plan has what it spares."""


def _decodes(plan: Plan) -> tuple[str, ...]:
    """What decode can be for its model."""
    checkpoint = find(plan.request.model)
    return next(each.values(checkpoint) for each in CANDIDATES if each.kind is Decode)


def _divides(plan: Plan, value: str) -> bool:
    return value in _decodes(plan) and max(plan.request.width, plan.request.height) > Decode(value=value).tile_px


LADDER: tuple[Relief, ...] = (
    Relief(kind=Decode, before="whole", after="frame", phases=("encode_image", "decode"), ram=True,
           helps=lambda plan: "frame" in _decodes(plan)),
    Relief(kind=Decode, before="*", after="tile:128", phases=("encode_image", "decode"), ram=True,
           helps=lambda plan: not plan.setting(Decode).blend and _divides(plan, "tile:128")),
    Relief(kind=Decode, before="blend:*", after="blend:112", phases=("encode_image", "decode"), ram=True,
           helps=lambda plan: _divides(plan, "blend:112")),
    Relief(kind=Guidance, before="together", after="apart", phases=("denoise",), ram=True,
           helps=lambda plan: plan.request.guided),
    Relief(kind=Chunk, before="none", after="rows", phases=("denoise",), ram=True,
           helps=lambda plan: plan.offload != "disk"),  # all its files would be written anew
    Relief(kind=Offload, before="none", after="part", phases=("load", *COMPUTING)),
    Relief(kind=Decode, before="frame", after="ram", phases=("encode_image", "decode"),
           helps=lambda plan: "ram" in _decodes(plan)),
    Relief(kind=Offload, before="part", after="block", phases=STREAMING),
    Relief(kind=Offload, before="block:*", after="block", phases=STREAMING),
    Relief(kind=Offload, before="block", after="leaf", phases=STREAMING),
)  # fmt: skip


def lower(
    plan: Plan,
    rungs: Sequence[Rung],
    phase: str,
    step: int | None,
    shortage: Shortage,
    fixed: frozenset[str] = frozenset(),
) -> Rung:
    """The next rung.

    Args:
        plan: as it is now.
        rungs: that it has come down.
        phase: where memory ran out.
        step: steps taken by then.
        fixed: types of settings that are not moved either.

    Raises:
        DoesNotFit: there is none left for this phase.
    """
    for relief, setting in _reliefs(plan, phase, shortage):
        if not setting.asked and setting.type not in fixed:
            return Rung(
                phase=phase, step=step, setting=setting.type, before=setting.value, after=relief.after,
                asked_bytes=shortage.asked_bytes, held_bytes=shortage.held_bytes,
            )  # fmt: skip
    raise exhausted(plan, rungs, phase, shortage)


def lowered(plan: Plan, rungs: Sequence[Rung]) -> Plan:
    """`plan` down these rungs."""
    after = {rung.setting: rung for rung in rungs}
    settings = (
        SETTINGS[s.type](value=after[s.type].after, because=f"memory ran out in {after[s.type].phase}")
        if s.type in after
        else s
        for s in plan.settings
    )
    return replace(plan, settings=tuple(settings))


def exhausted(plan: Plan, rungs: Sequence[Rung], phase: str, shortage: Shortage) -> DoesNotFit:
    """What ran out where, what was tried, and what the user can do."""
    request = plan.request
    now = {rung.setting: f"{rung.setting}={rung.after}" for rung in rungs}
    tried = f", with {' and '.join(now.values())} tried" if now else ""
    asked = {s.type: f"{s.type}={s.value}" for _, s in _reliefs(plan, phase, shortage) if s.asked}
    leave = f", or leave out --set {' '.join(asked.values())}" if asked else ""
    return DoesNotFit(
        f"{_memory(plan, shortage)} in the phase {phase} at {request.width}x{request.height}, "
        f"{request.num_frames} frames{tried}: ask for a smaller --size or fewer --frames{leave}."
    )


def _reliefs(plan: Plan, phase: str, shortage: Shortage) -> list[tuple[Relief, Setting]]:
    """Those that would spare of what ran out, with the settings that they are taken from."""
    if shortage.of == "RAM" and plan.device.id != "cpu":
        return []
    return [
        (relief, setting)
        for relief in LADDER
        for setting in plan.settings
        if isinstance(setting, relief.kind)
        and fnmatchcase(setting.value, relief.before)
        and setting.value != relief.after
        and phase.partition(":")[0] in relief.phases
        and (relief.ram or shortage.of == "card")
        and relief.helps(plan)
    ]


def _memory(plan: Plan, shortage: Shortage) -> str:
    limit = plan.device.vram_limit_bytes
    if shortage.of == "card" and limit is not None:
        return f"the {limit / 2**30:.2f} GiB of --vram ran out"
    ran_out = plan.device.name if shortage.of == "card" or plan.device.id == "cpu" else "the host of the card"
    return f"{ran_out} ran out of memory"
