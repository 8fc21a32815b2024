"""Seconds, FLOPs and bytes of one call by kind of work, and which share of the device's ceiling each kind reached.

Beside the work stands what held it up: gaps, compiling again, an allocator without room.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

import torch

from framefit.ledger.counts import Counts, Tally, count
from framefit.ledger.kinds import KINDS, Kind, direction
from framefit.profiling.stalls import Stalls, StallWatch
from framefit.profiling.trace import Work, busy_s, gaps_s, phase, record
from framefit.rates import Rates

__all__ = ["Breakdown", "Cost", "Kernel", "breakdown", "summarise", "timed"]

CALL = "call"
NO_COUNTS = Counts()

GAP_S = 300e-6
"""A shorter gap is the launch of the next kernel, which under the profiler takes ten times as long as usual."""

LONGEST = 40
"""Kernels that are kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What one kind of work took and did in one call."""

    seconds: float = 0.0
    """Device time; kinds that overlap on two streams count in full each."""
    flops: float = 0.0
    bytes: float = 0.0
    """Read and written by elementwise work, moved by transfers; else 0."""
    launches: float = 0.0
    ceiling_s: float | None = None
    """Seconds that the same work takes at the device's measured rates; None where one was not measured."""
    precision: str = ""
    """That most of the FLOPs are in."""

    @property
    def tflops(self) -> float:
        return self.flops / self.seconds / 1e12 if self.seconds else 0.0

    @property
    def gb_per_s(self) -> float:
        return self.bytes / self.seconds / 1e9 if self.seconds else 0.0

    @property
    def of_ceiling(self) -> float | None:
        """Share of the ceiling that was reached, 1 at the ceiling."""
        return self.ceiling_s / self.seconds if self.ceiling_s and self.seconds else None

    def to_json(self) -> dict[str, Any]:
        derived = {"tflops": self.tflops, "gb_per_s": self.gb_per_s, "of_ceiling": self.of_ceiling}
        return {name: _rounded(value) for name, value in (asdict(self) | derived).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; what was derived is derived again."""
        return cls(**{field.name: data[field.name] for field in fields(cls)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """All pieces of work with one name, in one call. On the CPU the name is an operator's."""

    name: str
    kind: Kind
    seconds: float
    launches: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Breakdown:
    """Where the time of one call went. Every figure is for one call, on average over the calls profiled."""

    device: str
    wall_s: float
    """From its beginning to its end under the profiler."""
    plain_s: float
    """The same without the profiler; what is missing to `wall_s` is what watching costs, and mostly idle time."""
    idle_s: float
    """The device did nothing."""
    kinds: Mapping[Kind, Cost]
    transfers: Mapping[str, Cost]
    """"host_to_device", "device_to_host", "device_to_device": parts of the kind "transfer"."""
    kernels: tuple[Kernel, ...]
    """The 40 longest, longest first."""
    gaps_s: float = 0.0
    """The part of `idle_s` between two pieces of work, in gaps too short for anything but a launch."""
    transfer_alone_s: float = 0.0
    """The part of the transfers beside which nothing else ran."""
    allocating_s: float = 0.0
    """The host was in the card's driver to get memory or to give it back."""
    stalls: Stalls = field(default_factory=Stalls)
    """Without the profiler."""

    @property
    def busy_s(self) -> float:
        return self.wall_s - self.idle_s

    @property
    def waiting_s(self) -> float:
        """The device did nothing, without the profiler, under which it never waits less."""
        return min(self.idle_s, max(0.0, self.plain_s - self.busy_s))

    @property
    def launches(self) -> float:
        return sum(cost.launches for cost in self.kinds.values())

    @property
    def mean_launch_s(self) -> float:
        """Mean length of a kernel; on the CPU of an operator."""
        return self.busy_s / self.launches if self.launches else 0.0

    @property
    def flops(self) -> float:
        return sum(cost.flops for cost in self.kinds.values())

    def share(self, kind: Kind) -> float:
        """Of the wall time, 0 to 1."""
        return self.kinds[kind].seconds / self.wall_s if self.wall_s else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "device": self.device,
            **{name: _rounded(getattr(self, name)) for name in SECONDS},
            "launches": self.launches,
            "mean_launch_s": _rounded(self.mean_launch_s),
            "kinds": {
                kind: cost.to_json() | {"share": _rounded(self.share(kind))} for kind, cost in self.kinds.items()
            },
            "transfers": {way: cost.to_json() for way, cost in self.transfers.items()},
            "kernels": [asdict(kernel) | {"seconds": _rounded(kernel.seconds)} for kernel in self.kernels],
            "stalls": asdict(self.stalls),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        costs: dict[str, Any] = {
            name: {key: Cost.from_json(cost) for key, cost in data[name].items()} for name in ("kinds", "transfers")
        }
        return cls(
            device=data["device"], kernels=tuple(Kernel(**kernel) for kernel in data["kernels"]),
            stalls=Stalls(**data["stalls"]), **{name: data[name] for name in SECONDS}, **costs,
        )  # fmt: skip


SECONDS = ("wall_s", "plain_s", "idle_s", "gaps_s", "transfer_alone_s", "allocating_s")


def breakdown(call: Callable[[], object], device: str, *, ceilings: Rates | None = None, repeats: int = 1) -> Breakdown:
    """Where the time of `call` goes; the caller has warmed it up.

    Runs it `repeats` times plainly, as often under the profiler, and once, uncompiled, to count its FLOPs.

    Args:
        device: "cpu" or "cuda:N", where the work is done.
        ceilings: of this device (`measure`); without them no shares of a ceiling are given.
    """

    def calls() -> None:
        for _ in range(repeats):
            call()

    watch = StallWatch(device)
    with watch.phase(CALL):
        plain_s = timed(calls, device)

    def watched() -> None:
        with phase(CALL):
            calls()
            if device != "cpu":
                torch.cuda.synchronize(device)

    trace = record(watched, device)
    tally = Tally(card=device != "cpu")
    with tally.phase(CALL):
        count(call, tally)
    return summarise(
        [work for work in trace.works if work.phase == CALL], tally.phases.get(CALL, NO_COUNTS), device,
        wall_s=trace.phases[CALL], plain_s=plain_s, repeats=repeats, ceilings=ceilings,
        allocating_s=trace.allocating.get(CALL, 0.0), stalls=watch.phases[CALL],
    )  # fmt: skip


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds until the device has done what `call` asked for."""
    _finish(device)
    began = time.perf_counter()
    call()
    _finish(device)
    return time.perf_counter() - began


def summarise(
    works: Iterable[Work],
    counts: Counts,
    device: str,
    *,
    wall_s: float,
    plain_s: float,
    repeats: int = 1,
    ceilings: Rates | None = None,
    allocating_s: float = 0.0,
    stalls: Stalls | None = None,
) -> Breakdown:
    """The breakdown of one of `repeats` equal calls: works, seconds and stalls are of all of them, `counts` of one."""
    works = list(works)
    busy, others = busy_s(works), busy_s(work for work in works if work.kind != "transfer")
    idle_s = max(0.0, wall_s - busy)
    kinds = {
        kind: Cost(
            **_spent((work for work in works if work.kind == kind), repeats),
            flops=sum(flops for (of, _), flops in counts.flops.items() if of == kind),
            bytes=_bytes(kind, counts),
            ceiling_s=ceilings.seconds(kind, counts) if ceilings else None,
            precision=_precision(kind, counts),
        )
        for kind in KINDS
    }
    return Breakdown(
        device=device, wall_s=wall_s / repeats, plain_s=plain_s / repeats,
        idle_s=idle_s / repeats, kinds=kinds, transfers=_transfers(works, counts, repeats, ceilings),
        kernels=_kernels(works, repeats), gaps_s=min(idle_s, gaps_s(works, GAP_S)) / repeats,
        transfer_alone_s=(busy - others) / repeats, allocating_s=allocating_s / repeats,
        stalls=(stalls or Stalls()).per_call(repeats),
    )  # fmt: skip


def _spent(works: Iterable[Work], repeats: int) -> dict[str, float]:
    works = list(works)
    return {
        "seconds": sum(work.seconds for work in works) / repeats,
        "launches": sum(work.launched for work in works) / repeats,
    }


def _bytes(kind: Kind, counts: Counts) -> int:
    ways = {"elementwise": ("elementwise",), "transfer": ("host_to_device", "device_to_host")}
    return sum(counts.bytes[way] for way in ways.get(kind, ()))


def _precision(kind: Kind, counts: Counts) -> str:
    flops = {precision: n for (of, precision), n in counts.flops.items() if of == kind}
    return max(flops, key=lambda precision: flops[precision], default="")


def _transfers(works: list[Work], counts: Counts, repeats: int, ceilings: Rates | None) -> dict[str, Cost]:
    by_way: dict[str, list[Work]] = defaultdict(list)
    for work in works:
        if work.kind == "transfer":
            by_way[direction(work.name)].append(work)
    return {
        way: Cost(
            seconds=_spent(by_way[way], repeats)["seconds"],
            launches=len(by_way[way]) / repeats,
            bytes=counts.bytes[way],
            ceiling_s=ceilings.copy_seconds(way, counts.bytes[way]) if ceilings else None,
        )
        for way in by_way
    }


def _kernels(works: list[Work], repeats: int) -> tuple[Kernel, ...]:
    by_name: dict[tuple[str, Kind], list[Work]] = defaultdict(list)
    for work in works:
        by_name[work.name, work.kind].append(work)
    kernels = [
        Kernel(
            name=name, kind=kind, seconds=sum(work.seconds for work in same) / repeats, launches=len(same) / repeats
        )
        for (name, kind), same in by_name.items()
    ]  # fmt: skip
    return tuple(sorted(kernels, key=lambda kernel: -kernel.seconds)[:LONGEST])


def _finish(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def _rounded(value: Any) -> Any:
    """Six digits of a number: more would be noise."""
    return float(f"{value:.6g}") if isinstance(value, float | int) else value
