"""What a plan may choose from: of every type of setting the values, from the fastest to the leanest. One line a type.

The first value of a type stands where everything fits and none leaves fewer bytes of weights; a value is for plans
whose tier allows it. Where weights lie is no line of the table: with what was traced, every place is computed and
compared (`places`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from framefit.families import Checkpoint
from framefit.plan import TIERS, Chunk, Decode, Guidance, Offload, Plan, Quantize, Setting, Tier, Window
from framefit.planning import moved
from framefit.planning.phase import PhaseTrace

__all__ = ["CANDIDATES", "RUNG", "Candidates", "ladder", "places", "usual"]

RUNG = 1.01
"""Least seconds of a phase over those with the value before: what a plan is told, and what lets the search stop. The
dry run tells 0.85 (A14B's decode with `ram:640` on an L4) to 2 (the 5B, tiles of 128 px), and of the denoiser 0.96
(chunks of EasyAnimate on an L4) to 1.1; an H200, the only card that has run them, took 0.68 (EasyAnimate's `frame`) to
1.8 and 0.98 to 1.10. What is told is not that exact: no plan divides work to gain time where memory does not ask."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """Of one type."""

    kind: type[Setting]
    values: Callable[[Checkpoint], tuple[str, ...]]
    lightens: Callable[[str], bool] = lambda value: False
    """Whether there are fewer bytes of weights with a value than with the first."""
    in_ram: Callable[[str], bool] = lambda value: False
    """Whether a value keeps in RAM what is no weight."""
    open: Callable[[Plan, str, Tier], bool] = lambda plan, value, tier: True
    """Whether a plan can have a value, and would where this tier is allowed."""


def _guidance(checkpoint: Checkpoint) -> tuple[str, ...]:
    return ("together", "apart") if checkpoint.batched_guidance else ("apart",)


def _decode(checkpoint: Checkpoint) -> tuple[str, ...]:
    if checkpoint.family == "wan":
        near = tuple(f"blend:{px}" for px in (512, 384, 320, 256, 192, 112))  # in half of the bytes
        return ("whole", "ram:640", "ram:352", "tile:512", "tile:256", "tile:128", *near)
    # by frames EasyAnimate's is smaller than whole, and by the dry run sooner; an H200 took 0.64 to 1.12 times as long
    return ("frame", "ram") if checkpoint["vae"].config.get("spatial_group_norm") else ("whole",)


def _chunk(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Smaller chunks take more time on a card; of I2VGen-XL's UNet a row is a pixel, and no chunk is of few."""
    few = () if checkpoint.family == "i2vgen" else ("rows:32768", "rows:16384", "rows:8192")
    return "none", *few, "rows"


def _blends(value: str) -> bool:
    return Decode(value=value).blend


def _in_ram(value: str) -> bool:
    return Decode(value=value).in_ram


def _divides(plan: Plan, value: str, tier: Tier) -> bool:
    decode = Decode(value=value)
    if decode.in_ram and plan.device.id == "cpu":  # where all is in RAM, nothing is spared
        return False
    if value.startswith("tile") and tier != "exact":
        return False  # tiles that blend are sooner and smaller
    return decode.tile_px < max(plan.request.width, plan.request.height)


CANDIDATES: tuple[Candidates, ...] = (
    Candidates(Guidance, _guidance),
    Candidates(Chunk, _chunk),
    Candidates(Decode, _decode, lightens=_blends, in_ram=_in_ram, open=_divides),
    Candidates(Quantize, lambda checkpoint: ("none", "int8"), lightens=lambda value: value == "int8"),
    Candidates(Window, lambda checkpoint: ("none",)),  # another video: only where it is asked for
)


def usual(plan: Plan, checkpoint: Checkpoint, *, keep_asked: bool = True) -> Plan:
    """`plan` with the first value of every setting that nobody asked for, or of all of them."""
    first = {each.kind: each.values(checkpoint)[0] for each in CANDIDATES} | {Offload: "none"}

    def stays(setting: Setting) -> bool:
        if setting.asked:
            return keep_asked or type(setting) not in first
        return first.get(type(setting), setting.value) == setting.value

    return replace(plan, settings=tuple(s if stays(s) else type(s)(value=first[type(s)]) for s in plan.settings))


def ladder(each: Candidates, plan: Plan, checkpoint: Checkpoint, tier: Tier) -> tuple[str, ...]:
    """The values that are open: those that the tier allows, from the one that stands on; only that one where it was
    asked for, or is none of them."""
    stands, values = plan.setting(each.kind).value, each.values(checkpoint)
    if plan.setting(each.kind).asked or stands not in values:
        return (stands,)
    allowed = TIERS[: TIERS.index(tier) + 1]
    return tuple(
        value
        for value in values[values.index(stands) :]
        if value == stands or (each.kind(value=value).tier in allowed and each.open(plan, value, tier))
    )


def places(plan: Plan, traces: Sequence[PhaseTrace]) -> tuple[str, ...]:
    """The values of offload that are open, likewise: from all on the card to one layer at a time."""
    offload = plan.setting(Offload)
    if offload.asked or plan.device.id == "cpu":
        return (offload.value,)
    stay = range(moved.blocks(traces) - 1, 0, -1)
    host = ("none", "part", *(f"block:{kept}" for kept in stay), "block", "leaf")
    return (*host, *(f"disk:{kept}" for kept in stay), "disk")
