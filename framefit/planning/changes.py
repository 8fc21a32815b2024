"""What would fit, where nothing does: the smallest changes, each with an estimate that was made for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from math import ceil
from typing import Any

from framefit.durations import duration
from framefit.families import Checkpoint
from framefit.plan import QUALITIES, TIERS, Plan, Tier
from framefit.planning.candidates import usual
from framefit.planning.fit import fitted, leanest
from framefit.request import ResolvedRequest

__all__ = ["Change", "changes"]

GIB = 2**30
MOST = 3
PROBES = 3
"""Dry runs that one kind of change may cost, seconds each."""
SHRINKS = (0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Of a frame's area."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One change to what was asked, with which it fits."""

    flag: str
    """As the command line takes it."""
    peak_bytes: int
    """Of the card, or of RAM without one."""
    seconds: float | None

    def __str__(self) -> str:
        seconds = "" if self.seconds is None else f", {duration(self.seconds)}"
        return f"{self.flag} ({self.peak_bytes / GIB:.1f} GiB{seconds})"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def changes(plan: Plan, checkpoint: Checkpoint, *, tier: Tier = "exact") -> tuple[Change, ...]:
    """At most three for a plan that does not fit, those first that leave most as it was; some ten seconds.

    Settings that were asked for stay, but for the change that is to leave them out.
    """
    return tuple(islice(_all(plan, checkpoint, tier), MOST))


def _all(plan: Plan, checkpoint: Checkpoint, tier: Tier) -> Iterator[Change]:
    asked = [s for s in plan.settings if s.asked]
    if asked:
        free = usual(plan, checkpoint, keep_asked=False)
        named = " ".join(f"--set {s.type}={s.value}" for s in asked)
        yield from _if_fits(f"without {named}", fitted(free, checkpoint, tier=tier))
    plan = usual(plan, checkpoint)
    for quality, weaker in QUALITIES.items():
        if TIERS.index(weaker) > TIERS.index(tier) and plan.device.id != "cpu":  # where nothing is derived
            found = leanest(plan, checkpoint, tier=weaker)
            if any(TIERS.index(s.tier) > TIERS.index(tier) and not s.asked for s in found.settings):
                yield from _if_fits(f"--quality {quality}", found)

    def with_request(request: ResolvedRequest) -> Plan:
        return leanest(replace(plan, request=request), checkpoint, tier=tier)

    need = leanest(plan, checkpoint, tier=tier)
    if need.lacks("host") or need.lacks("disk"):  # weights: no frame is too many
        return
    yield from _fewer_frames(plan, checkpoint, with_request)
    yield from _smaller(plan, checkpoint, with_request)
    if need.device.id != "cpu" and not any(map(need.lacks, ("shelf", "pinned"))):
        yield Change(
            flag=f"a card with {ceil(10 * need.estimate.peak_bytes / GIB) / 10:.1f} GiB for the run",
            peak_bytes=need.estimate.peak_bytes, seconds=need.estimate.seconds,
        )  # fmt: skip


def _if_fits(flag: str, plan: Plan) -> Iterator[Change]:
    if plan.feasible:
        yield Change(flag=flag, peak_bytes=plan.estimate.peak_bytes, seconds=plan.estimate.seconds)


def _fewer_frames(plan: Plan, checkpoint: Checkpoint, planned: Callable[[ResolvedRequest], Plan]) -> Iterator[Change]:
    request, stride = plan.request, checkpoint.frames.stride
    counts = list(range(1 + (stride if stride > 1 else 1), request.num_frames, stride))
    found = _most([replace(request, num_frames=count) for count in counts], planned)
    if found:
        yield from _if_fits(f"--frames {found.request.num_frames}", found)


def _smaller(plan: Plan, checkpoint: Checkpoint, planned: Callable[[ResolvedRequest], Plan]) -> Iterator[Change]:
    request, sizes = plan.request, checkpoint.sizes
    area, aspect = request.width * request.height, request.width / request.height
    smaller = {sizes.for_aspect(aspect, int(area * share)) for share in SHRINKS}
    legal = sorted((s for s in smaller if s[0] * s[1] < area), key=lambda size: size[0] * size[1])
    found = _most([replace(request, width=w, height=h, shift=checkpoint.shift(w, h)) for w, h in legal], planned)
    if found:
        yield from _if_fits(f"--size {found.request.width}x{found.request.height}", found)


def _most(requests: Sequence[ResolvedRequest], planned: Callable[[ResolvedRequest], Plan]) -> Plan | None:
    """The largest of `requests`, in order, whose plan fits, by halving; None where none was found to."""
    low, high, best = 0, len(requests), None
    for _ in range(PROBES):
        if low >= high:
            break
        middle = (low + high) // 2
        plan = planned(requests[middle])
        if plan.feasible:
            low, best = middle + 1, plan
        else:
            high = middle
    return best
