"""The weights of many modules through two rooms: from one they compute, the next ones' weights come into the other.

A module asks for its weights when it is called, so that whatever order the model calls in is right. The order of the
first forward is remembered, and from then on each module's weights are on their way before it asks: as many as follow
each other and fit into the room, so that small ones, which compute for less time than a copy takes, are there early.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from framefit.ledger.transfer import Room, Slab, Transfer
from framefit.streaming import ROOMS

__all__ = ["Stream", "Unit"]

HOOK = "framefit.offload"


@dataclass(frozen=True, eq=False, slots=True)
class Unit:
    """What moves as one."""

    module: nn.Module
    slab: Slab


@dataclass(slots=True)
class _Place:
    room: Room
    holds: dict[Unit, Room] = field(default_factory=dict)
    """In which part of it their weights are, or will be once they have come."""
    parts: dict[tuple[Unit, int], Room] = field(default_factory=dict)
    """By unit and first byte, kept for their views (`Room.views`)."""


@dataclass(eq=False, slots=True)
class Stream:
    """The streamed units of one component."""

    units: Sequence[Unit]
    """None lies inside another."""
    transfer: Transfer
    after: dict[Unit, Unit] = field(default_factory=dict)
    """Who was called after whom."""
    first: Unit | None = None
    """Who is called first, where it is known."""
    asked: Callable[[Unit], None] = lambda unit: None
    """Hears of every unit that computes."""
    room_bytes: int = field(init=False)
    """Of the largest, whose size a room has."""
    _places: list[_Place] = field(default_factory=list)
    _at_work: _Place | None = None
    _called: Unit | None = None
    _inside: Unit | None = None
    """That has been entered and not been left: where something is raised, it never is."""

    def __post_init__(self) -> None:
        self.room_bytes = max((unit.slab.bytes for unit in self.units), default=0)
        for unit in self.units:
            HookRegistry.check_if_exists_or_initialize(unit.module).register_hook(_Asking(self, unit), HOOK)

    def expect(self, order: Sequence[Unit]) -> None:
        """Before the first forward: in which order it will go."""
        self.first = order[0]
        self.after = dict(zip(order, [*order[1:], order[0]], strict=True))

    @property
    def rooms(self) -> list[int]:
        """Bytes of each that is on the device while the component is at work."""
        return [self.room_bytes] * min(ROOMS, len(self.units))

    @property
    def rooms_bytes(self) -> int:
        """Of all of them."""
        return sum(self.rooms)

    def open(self) -> None:
        """The component is at work from here on."""
        self._places = [_Place(self.transfer.room(bytes)) for bytes in self.rooms]
        if self.first:
            self._begin(self.first)

    def close(self) -> None:
        """It is not any more: nothing of it is on the device."""
        self.transfer.settle()
        for unit in self.units:
            self.transfer.point(unit.slab, None)
        self._places, self._at_work, self._called, self._inside = [], None, None, None

    def remove(self) -> None:
        """Take the hooks away. Nothing is streamed any more: the slabs' memory goes with the weights that leave it."""
        for unit in self.units:
            HookRegistry.check_if_exists_or_initialize(unit.module).remove_hook(HOOK, recurse=False)
        self.units, self.first, self._called, self._inside = (), None, None, None
        self.after.clear()

    def enter(self, unit: Unit) -> None:
        """`unit` computes next."""
        if self._inside:  # the last forward broke off there, and the order begins anew
            self.leave(self._inside)
            self._called = None
        place = self._begin(unit)
        part = place.holds[unit]
        try:
            self.transfer.wait(part)
        except BaseException:
            del place.holds[unit]
            raise
        self.transfer.point(unit.slab, part)
        self.asked(unit)
        self._at_work, self._inside = place, unit
        if self._called:
            self.after[self._called] = unit
        else:
            self.first = unit
        self._called = unit
        if len(self._places) > 1 and (following := self._following(place, unit)):
            self._begin(following)

    def leave(self, unit: Unit) -> None:
        """`unit` has computed, or on a card will have before anything that is asked of it from here on."""
        assert self._at_work
        self.transfer.release(self._at_work.room)
        self.transfer.point(unit.slab, None)
        self._inside = None

    def _begin(self, unit: Unit) -> _Place:
        """Where the weights of `unit` are or will be: where they are in no room yet, in the one that is not at work."""
        assert self._places, "a module computes while its component is not in use"
        for place in self._places:
            if unit in place.holds:
                return place
        place = next((place for place in self._places if place is not self._at_work), self._places[0])
        place.holds.clear()
        self._fill(place, unit)
        return place

    def _fill(self, place: _Place, unit: Unit) -> None:
        """With the weights of `unit` and of those that follow it."""
        at, end, each = 0, self.room_bytes, cast(Unit | None, unit)
        while each and at + each.slab.bytes <= end and each not in place.holds:
            part = place.parts.get((each, at)) or self.transfer.within(place.room, at, each.slab.bytes)
            self.transfer.copy(each.slab, part)
            place.holds[each] = place.parts[each, at] = part
            at, each = at + each.slab.bytes, self.after.get(each)

    def _following(self, place: _Place, unit: Unit) -> Unit | None:
        """The first after `unit` that has not come with it; units that are called more than once may go in a circle."""
        following = self.after.get(unit)
        for _ in place.holds:
            if following not in place.holds:
                return following
            following = self.after.get(following)
        return None


class _Asking(ModelHook):  # type: ignore[misc]
    def __init__(self, stream: Stream, unit: Unit) -> None:
        super().__init__()
        self._stream, self._unit = stream, unit

    def deinitalize_hook(self, module: nn.Module) -> nn.Module:
        del self._stream, self._unit  # a hook that was removed is a cycle, which lives until it is looked for
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._stream.enter(self._unit)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self._stream.leave(self._unit)
        return output
