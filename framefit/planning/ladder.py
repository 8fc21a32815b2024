"""What to do when memory runs out in spite of the plan: for each phase the settings that need less, one rung at a time.

LADDER is in the order of what a rung costs in time; what spares the host of a card comes last. Every rung is exact, or
as near as what stood before: the same maths, so that a run goes on from the step where it stands. A rung is never taken
on a setting that the user asked for, nor back to a value that was too much before.
Knows nothing of how a loaded model is changed: that is the passes' work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING

from framefit.errors import DoesNotFit
from framefit.families import find
from framefit.plan import SETTINGS, Chunk, Decode, Guidance, Offload, Plan, Setting
from framefit.planning.candidates import CANDIDATES
from framefit.planning.estimate import estimated
from framefit.report import Memory, Rung, named

if TYPE_CHECKING:  # it knows torch
    from framefit.ledger.shortage import Shortage

__all__ = ["LADDER", "Relief", "exhausted", "lower", "lowered"]

COMPUTING = ("encode_text", "encode_image", "denoise", "decode")
STREAMING = ("encode_text", "denoise")
"""Phases in which blocks stream: VAEs and image encoders come as a whole at every level."""
CODING = ("encode_image", "decode")
"""Phases in which a VAE computes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Relief:
    """One way to need less memory."""

    kind: type[Setting]
    before: str
    """The value that it is taken from; * stands for anything."""
    after: str
    phases: tuple[str, ...]
    """Where it relieves; "denoise" is every expert's."""
    of: tuple[Memory, ...] = ("card",)
    """Which memory it spares."""
    helps: Callable[[Plan], bool] = lambda plan: True
    """Whether a plan has what it spares, and can have what it comes to."""


def _coding(before: str, after: str, *of: Memory) -> Relief:
    return Relief(kind=Decode, before=before, after=after, phases=CODING, of=of, helps=partial(_may_be, after))


def _may_be(value: str, plan: Plan) -> bool:
    """Whether its decode can come down to this one."""
    checkpoint, before, after = find(plan.request.model), plan.setting(Decode), Decode(value=value)
    each = next(each for each in CANDIDATES if each.kind is Decode)
    known = value in each.values(checkpoint) and each.open(plan, value, after.tier)
    finer = after.tile_px <= before.tile_px or not before.tile_px
    return known and finer and after.blend == before.blend and (not after.in_ram or _ram_holds(plan, after))


def _ram_holds(plan: Plan, decode: Decode) -> bool:
    """Whether what a VAE remembers finds room there; a dry run says it, in seconds."""
    settings = tuple(decode if isinstance(s, Decode) else s for s in plan.settings)
    found = estimated(replace(plan, settings=settings), find(plan.request.model))
    return any(phase.shelf_bytes for phase in found.estimate.phases) and not found.lacks("shelf")


LADDER: tuple[Relief, ...] = (
    _coding("whole", "frame", "card", "RAM"),
    _coding("whole", "ram:640", "card"),
    _coding("whole", "ram:352", "card"),  # pictures that 640 pixels do not divide
    _coding("ram*", "ram:352", "card"),
    _coding("whole", "tile:256", "card", "RAM"),  # ram:352 takes less than these
    _coding("tile:*", "tile:256", "card", "RAM"),
    _coding("*", "tile:128", "card", "RAM"),
    _coding("blend:*", "blend:112", "card", "RAM"),
    Relief(kind=Guidance, before="together", after="apart", phases=("denoise",), of=("card", "RAM"),
           helps=lambda plan: plan.request.guided),
    Relief(kind=Chunk, before="none", after="rows", phases=("denoise",), of=("card", "RAM"),
           helps=lambda plan: plan.offload != "disk"),  # all its files would be written anew
    Relief(kind=Offload, before="none", after="part", phases=("load", *COMPUTING)),
    _coding("frame", "ram", "card"),
    Relief(kind=Offload, before="part", after="block", phases=STREAMING),
    Relief(kind=Offload, before="block:*", after="block", phases=STREAMING),
    Relief(kind=Offload, before="block", after="leaf", phases=STREAMING),
    _coding("ram*", "tile:512", "host"),
    _coding("ram*", "tile:256", "host"),
    _coding("ram*", "tile:128", "host"),
    _coding("ram", "frame", "host"),
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
    for relief, setting in _reliefs(plan, rungs, phase, shortage):
        if not setting.asked and setting.type not in fixed and relief.helps(plan):
            return Rung(
                phase=phase, step=step, setting=setting.type, before=setting.value, after=relief.after,
                of=shortage.of, asked_bytes=shortage.asked_bytes, held_bytes=shortage.held_bytes,
            )  # fmt: skip
    raise exhausted(plan, rungs, phase, shortage)


def lowered(plan: Plan, rungs: Sequence[Rung]) -> Plan:
    """`plan` down these rungs."""
    after = {rung.setting: rung for rung in rungs}
    settings = (_after(after[s.type]) if s.type in after else s for s in plan.settings)
    return replace(plan, settings=tuple(settings))


def _after(rung: Rung) -> Setting:
    return SETTINGS[rung.setting](value=rung.after, because=f"{named(rung.of)} ran out in {rung.phase}")


def exhausted(plan: Plan, rungs: Sequence[Rung], phase: str, shortage: Shortage) -> DoesNotFit:
    """What ran out where, what was tried, and what the user can do."""
    request = plan.request
    now = {rung.setting: f"{rung.setting}={rung.after}" for rung in rungs}
    tried = f", with {' and '.join(now.values())} tried" if now else ""
    reliefs = _reliefs(plan, rungs, phase, shortage)
    asked = {s.type: f"{s.type}={s.value}" for relief, s in reliefs if s.asked and relief.helps(plan)}
    leave = f", or leave out --set {' '.join(asked.values())}" if asked else ""
    return DoesNotFit(
        f"{_memory(plan, shortage)} in the phase {phase} at {request.width}x{request.height}, "
        f"{request.num_frames} frames{tried}: {_way_out(plan, shortage)}{leave}."
    )


def _reliefs(plan: Plan, rungs: Sequence[Rung], phase: str, shortage: Shortage) -> Iterator[tuple[Relief, Setting]]:
    """Those that spare of what ran out, with the settings that they are taken from; not yet whether they help."""
    left = {(rung.setting, rung.before) for rung in rungs}
    for relief in LADDER:
        if shortage.of in relief.of and phase.partition(":")[0] in relief.phases:
            for setting in plan.settings:
                fits = isinstance(setting, relief.kind) and fnmatchcase(setting.value, relief.before)
                if fits and setting.value != relief.after and (setting.type, relief.after) not in left:
                    yield relief, setting


def _memory(plan: Plan, shortage: Shortage) -> str:
    limit = plan.device.vram_limit_bytes
    if shortage.of == "card" and limit is not None:
        return f"the {limit / 2**30:.2f} GiB of --vram ran out"
    if shortage.of == "host":
        return "the host of the card ran out of memory, or of what may be pinned of it,"
    return f"{plan.device.name} ran out of memory"


def _way_out(plan: Plan, shortage: Shortage) -> str:
    if shortage.of != "host":
        return "ask for a smaller --size or fewer --frames"
    other = {"none": "", "disk": " or use offload=none"}.get(plan.offload, ", use offload=disk or offload=none")
    return f"free some{other}"
