"""One call under torch.profiler, as pieces of device work.

On a card a piece is a kernel or a copy, led back to the operator that launched it: a kernel and the runtime call behind
it share CUPTI's correlation id, and the runtime call lies inside the operator's range. On the CPU a piece is what an
operator does itself, without the operators inside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.profiler import DeviceType, ProfilerActivity, record_function

from framefit.profiling.kinds import Kind, kind_of

__all__ = ["MODULE", "Trace", "Work", "busy_s", "gaps_s", "phase", "record", "works"]

PHASE, MODULE = "phase:", "module:"
"""How our own ranges are told from others in a trace."""

SYNCS = {"Context Sync", "Stream Sync", "Event Sync", "Stream Wait Event"}
"""CUPTI's records of waiting: on the device's side of a trace, and no work."""

ALLOCATIONS = re.compile(r"(cuda|hip)(Malloc|Free|HostAlloc)|cuMem(Create|Release|Map|Unmap|SetAccess)")
"""Calls that ask the driver for memory or give it back; torch's allocator makes none of them once it is warm."""

LAUNCH = re.compile(r"(cuda|cu|hip)[A-Z]")
"""Calls of the runtime and the driver, as cudaLaunchKernelExC; their ids are CUPTI's, all others are torch's."""

US = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One piece of device work."""

    name: str
    """The kernel's name on a card, the operator's on the CPU."""
    kind: Kind
    phase: str
    """"" outside of every phase."""
    path: tuple[str, ...]
    """The modules around it, outermost first."""
    start_s: float
    end_s: float
    seconds: float
    """On the CPU without the operators inside it, which are pieces of their own."""
    launched: bool
    """Whether it was started on its own: every kernel; on the CPU an operator that no other called."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    works: tuple[Work, ...]
    phases: dict[str, float]
    """Phase -> seconds from its beginnings to its ends."""
    allocating: dict[str, float]
    """Phase -> seconds that the host spent in the card's driver to get memory or to give it back."""
    profiler: torch.profiler.profile
    """For the Chrome trace."""


def phase(name: str) -> record_function:
    """A context: what runs in it belongs to the phase `name`."""
    return record_function(PHASE + name)


def record(call: Callable[[], object], device: str, *, memory: bool = False) -> Trace:
    """Run `call` once under torch.profiler; `memory` also records every allocation."""
    card = device != "cpu"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if card else [])]
    with torch.profiler.profile(activities=activities, profile_memory=memory, acc_events=True) as profiler:
        call()
        if card:
            torch.cuda.synchronize(device)
    events = profiler.events()
    assert events is not None
    return Trace(
        works=tuple(works(events, card=card)), phases=_phases(events), allocating=_allocating(events),
        profiler=profiler,
    )  # fmt: skip


def works(events: Iterable[Any], *, card: bool) -> Iterator[Work]:
    """The pieces of work in torch's `FunctionEvent`s, whose tree is built."""
    events = list(events)
    places = _Places()
    yield from _kernels(events, places) if card else _operators(events, places)


def busy_s(pieces: Iterable[Work]) -> float:
    """Seconds in which at least one of `pieces` ran: streams may overlap."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted((work.start_s, work.end_s) for work in pieces):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def gaps_s(pieces: Iterable[Work], shorter_than_s: float) -> float:
    """Seconds in which none of `pieces` ran, between two of them, in gaps shorter than `shorter_than_s`."""
    total, reached = 0.0, float("inf")
    for start, end in sorted((work.start_s, work.end_s) for work in pieces):
        gap = start - reached
        total += gap if 0 < gap < shorter_than_s else 0.0
        reached = end if reached == float("inf") else max(reached, end)
    return total


def _operators(events: list[Any], places: _Places) -> Iterator[Work]:
    for event in events:
        if event.device_type != DeviceType.CPU or event.is_user_annotation or "::" not in event.name or event.is_async:
            continue
        place = places.of(event)
        if (seconds := event.self_cpu_time_total * US) > 0:
            yield _work(event, place, seconds, kind_of(place.ops), launched=len(place.ops) == 1)


def _kernels(events: list[Any], places: _Places) -> Iterator[Work]:
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    labels = {event.name for event in on_host if event.is_user_annotation}  # a card repeats them as ranges of its own
    phases = [event for event in on_host if event.name.startswith(PHASE)]
    launches = {event.id: event for event in on_host if LAUNCH.match(event.name)}
    for event in events:
        if event.device_type == DeviceType.CPU or event.is_user_annotation or event.name in labels | SYNCS:
            continue
        place = places.of(launches.get(event.id))
        if not place.phase:  # its launch was not recorded, or came from another thread
            place = replace(place, phase=_phase_at(event.time_range.start, phases))
        kind = kind_of(place.ops, event.name)
        seconds = event.time_range.elapsed_us() * US
        yield _work(event, place, seconds, kind, launched=not event.name.startswith("Mem"))


def _phase_at(us: float, phases: list[Any]) -> str:
    """The innermost phase that is open at that time."""
    around = [event for event in phases if event.time_range.start <= us < event.time_range.end]
    innermost = max(around, key=lambda event: event.time_range.start, default=None)
    return "" if innermost is None else str(innermost.name).removeprefix(PHASE)


def _work(event: Any, place: _Place, seconds: float, kind: Kind, *, launched: bool) -> Work:
    span = event.time_range
    return Work(
        name=event.name, kind=kind, phase=place.phase, path=place.modules, start_s=span.start * US, end_s=span.end * US,
        seconds=seconds, launched=launched,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Place:
    """What is around an event, outermost first, and the event itself."""

    phase: str = ""
    modules: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()


@dataclass(slots=True)
class _Places:
    """The place of every host event; parents are looked up once."""

    known: dict[int, _Place] = field(default_factory=dict)

    def of(self, event: Any | None) -> _Place:
        if event is None:
            return _Place()
        if (place := self.known.get(id(event))) is None:
            place = self.known[id(event)] = self._inside(self.of(event.cpu_parent), event)
        return place

    def _inside(self, around: _Place, event: Any) -> _Place:
        if event.name.startswith(PHASE):
            return _Place(event.name.removeprefix(PHASE))
        if event.name.startswith(MODULE):
            return _Place(around.phase, (*around.modules, event.name.removeprefix(MODULE)), around.ops)
        if "::" in event.name and not event.is_user_annotation:
            return _Place(around.phase, around.modules, (*around.ops, event.name))
        return around


def _phases(events: Iterable[Any]) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for event in events:
        if event.name.startswith(PHASE) and event.device_type == DeviceType.CPU:
            name = event.name.removeprefix(PHASE)
            seconds[name] = seconds.get(name, 0.0) + event.cpu_time_total * US
    return seconds


def _allocating(events: Iterable[Any]) -> dict[str, float]:
    places, seconds = _Places(), dict[str, float]()
    for event in events:
        if event.device_type == DeviceType.CPU and ALLOCATIONS.match(event.name):
            name = places.of(event).phase
            seconds[name] = seconds.get(name, 0.0) + event.time_range.elapsed_us() * US
    return seconds
