"""A profile as a table for people: a row for each phase, and below it one for each kind of work in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from framefit.profiling.breakdown import Cost
from framefit.profiling.profile import PhaseProfile, Profile

__all__ = ["rows", "summary"]

Row = tuple[str, ...]

LEAST_SHARE = 0.0005
"""Kinds below it are left out of the table, not out of the JSON."""


def rows(profile: Profile) -> Iterator[Row]:
    """Cells as text, the heading first."""
    yield ("phase", "kind", "seconds", "share", "TFLOP/s", "GB/s", "of ceiling", "launches", "in a run")
    for phase in profile.phases:
        yield from _phase(phase)


def summary(profile: Profile) -> Iterator[str]:
    """What the table leaves out, a sentence a line."""
    plan, ceilings = profile.plan, profile.ceilings
    watching = sum(p.times * (p.breakdown.wall_s - p.breakdown.plain_s) for p in profile.phases)
    yield f"device    {plan.device.name}, {plan.precision}, torch {profile.torch}"
    yield f"a run     {profile.run_s:.1f} s, loading {profile.load_s:.1f} s; watching it adds {watching:.1f} s"
    rates = {kind: rates[plan.precision] for kind, rates in ceilings.tflops.items() if plan.precision in rates}
    told = ", ".join(f"{kind} {rate:.3g} TFLOP/s" for kind, rate in rates.items())
    yield f"ceilings  {told}, memory {ceilings.memory_gb_per_s:.3g} GB/s: measured, {plan.precision}"
    yield f"memory    {_memory(profile)}"
    for file, what in zip(profile.files, map(_what, profile.files), strict=True):
        yield f"{file}  {what}"
    yield f"advice    framefit diagnose --from {profile.files[-1].parent}"


def _memory(profile: Profile) -> str:
    memory = profile.memory
    peak = f"{memory.peak_bytes / 2**30:.2f} GiB at the peak"
    if memory.reserved_bytes is None:
        return peak
    return f"{peak}, {memory.reserved_bytes / 2**30:.2f} GiB reserved, {memory.retries} times out of room in the cache"


def _what(file: Path) -> str:
    told = {
        "trace.json.gz": "every operator and kernel: open it in ui.perfetto.dev",
        "flame.svg": "device time by module and kind: open it in a browser",
        "memory.png": "memory over time",
        "profile.json": "all figures",
    }
    return told[file.name]


def _phase(phase: PhaseProfile) -> Iterator[Row]:
    found = phase.breakdown
    rate = f"{found.flops / found.wall_s / 1e12:.3g}" if found.flops and found.wall_s else ""
    yield (
        phase.name, "all", _seconds(found.wall_s), "100 %", rate, "", "", f"{found.launches:.0f}", str(phase.times),
    )  # fmt: skip
    costs = [(kind, cost) for kind, cost in found.kinds.items() if found.share(kind) >= LEAST_SHARE]
    for kind, cost in sorted(costs, key=lambda item: -item[1].seconds):
        yield _cost(kind, cost, found.share(kind))
        if kind == "transfer":
            for way, part in found.transfers.items():
                yield _cost(f"  {way.replace('_', ' ')}", part, part.seconds / found.wall_s)
    yield "", "idle", _seconds(found.idle_s), f"{found.idle_s / found.wall_s:.1%}", "", "", "", "", ""


def _cost(name: str, cost: Cost, share: float) -> Row:
    reached = cost.of_ceiling
    return (
        "", name, _seconds(cost.seconds), f"{share:.1%}",
        f"{cost.tflops:.3g}" if cost.flops else "", f"{cost.gb_per_s:.3g}" if cost.bytes else "",
        "" if reached is None else f"{reached:.0%}", f"{cost.launches:.0f}", "",
    )  # fmt: skip


def _seconds(value: float) -> str:
    return f"{value:.4f}" if value < 10 else f"{value:.2f}"
