"""The card's transfer without a card: its streams and events played on the CPU, by the rules that CUDA gives.

Copies run as late as waiting for them allows, or as early as their own waiting allows. In both ways the weights must be
there when a block computes, and still be there until it has.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from framefit.errors import DoesNotFit
from framefit.ledger import transfer
from framefit.ledger.transfer import CardTransfer
from framefit.passes.offload import Component

CPU = torch.device("cpu")


class Event:
    """Of the last time that it was recorded."""

    def __init__(self) -> None:
        self.reached = True
        """CUDA: waiting for an event that was never recorded waits for nothing."""

    def record(self, stream: Stream) -> None:
        self.reached = False
        stream.put(self._reach)

    def _reach(self) -> None:
        self.reached = True


class Stream:
    """Work in order. The computing stream does it at once, as the CPU does."""

    played: ClassVar[Stream]
    when: ClassVar[Literal["late", "early"]]

    def __init__(self, device: Any = None) -> None:
        self.queue: list[Callable[[], bool | None]] = []
        if device is not None:
            Stream.played = self

    def put(self, work: Callable[[], bool | None]) -> None:
        self.queue.append(work)
        if self is COMPUTING:
            self.run()
            if Stream.when == "early":
                Stream.played.run()
        elif Stream.when == "early":
            self.run()

    def run(self) -> None:
        """What is not waiting for another stream."""
        while self.queue and self.queue[0]() is not False:
            self.queue.pop(0)

    def wait_event(self, event: Event) -> None:
        if self is COMPUTING:
            while not event.reached:
                assert Stream.played.queue, "the computing stream waits for ever"
                before = len(Stream.played.queue)
                if Stream.played.queue[0]() is not False:
                    Stream.played.queue.pop(0)
                assert len(Stream.played.queue) < before, "both streams wait for each other"
        else:
            self.put(lambda: event.reached)

    def wait_stream(self, other: Stream) -> None:
        other.run()
        assert not other.queue

    def synchronize(self) -> None:
        self.run()


COMPUTING = Stream()


class Queued(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Copies belong to the stream."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            Stream.played.put(lambda: func(*args) is not None)
            return args[0]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def on_stream(stream: Stream) -> Iterator[None]:
    with Queued():  # type: ignore[no-untyped-call]
        yield


class Runtime:
    """The part of the CUDA runtime that pins."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.pinned = code, dict[int, int]()

    def cudaHostRegister(self, address: int, bytes: int, flags: int) -> int:  # noqa: N802
        assert flags == 1
        self.pinned[address] = bytes
        return self.code

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.pinned[address]
        return 0

    def cudaGetErrorString(self, error: int) -> str:  # noqa: N802
        return f"error {error}"

    cudaError = int  # noqa: N815


@pytest.fixture(params=["late", "early"])
def runtime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runtime]:
    Stream.when = request.param
    COMPUTING.queue.clear()
    found = Runtime()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: COMPUTING)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: found)
    yield found
    gc.collect()


class Model(nn.Module):
    """Six blocks and something around them."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        for block in self.blocks:
            x = block(x).relu() + x
        return x


def model() -> Model:
    torch.manual_seed(0)
    return Model()


@torch.no_grad()
def run(level: str, kept: int = 0) -> bool:
    """Whether two forwards, a pause and two more give what weights that stay give."""
    x = torch.randn(4, 8)
    expected = model()(x)
    component = Component.of(model(), level, kept, CardTransfer(CPU))
    same = []
    for _ in range(2):
        component.bring()
        same += [torch.equal(component.model(x), expected) for _ in range(2)]
        component.away()
    return all(same)


@pytest.mark.parametrize(("level", "kept"), [("part", 0), ("block", 0), ("block", 2), ("leaf", 0)])
def test_weights_are_there_when_they_are_needed(level: str, kept: int, runtime: Runtime) -> None:
    assert run(level, kept)


@pytest.mark.parametrize(
    ("forgotten", "seen"),
    [("wait", "late"), ("release", "never: the room is not free again"), ("free", "early")],
)
def test_a_forgotten_wait_is_seen(forgotten: str, seen: str, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    def begin_too_soon(self: Any, unit: Any) -> Any:
        """Into the room that is at work."""
        for place in self._places:
            if place.unit is unit:
                return place
        place = self._at_work or self._places[0]
        place.unit = unit
        self.transfer.copy(unit.slab, place.room)
        return place

    if forgotten == "wait":
        monkeypatch.setattr(CardTransfer, "wait", lambda self, room: None)
        assert run("block") == (Stream.when == "early")
    elif forgotten == "release":
        monkeypatch.setattr(CardTransfer, "release", lambda self, room: setattr(room.free, "reached", False))
        with pytest.raises(AssertionError):
            run("block")
    else:
        from framefit.passes.stream import Stream as Streaming

        monkeypatch.setattr(Streaming, "_begin", begin_too_soon)
        assert run("block") == (Stream.when == "late")


def test_slabs_are_pinned_byte_for_byte_and_given_back(runtime: Runtime) -> None:
    moving = CardTransfer(CPU)
    weights = [torch.randn(1000, 1000), torch.randn(1000)]
    slab = moving.slab(weights)
    assert runtime.pinned == {slab.host.data_ptr(): moving.pinned_bytes}
    assert slab.host.data_ptr() % 4096 == 0
    assert sum(w.nbytes for w in weights) <= moving.pinned_bytes < 1.02 * sum(w.nbytes for w in weights)
    kept = weights[0].sum()
    del slab
    assert not runtime.pinned
    assert moving.pinned_bytes == 0
    assert weights[0].sum() == kept, "whoever still looks at the weights finds them"


def test_memory_that_cannot_be_pinned_is_told(runtime: Runtime) -> None:
    runtime.code = 2
    with pytest.raises(DoesNotFit, match=r"cannot be pinned \(error 2\)"):
        CardTransfer(CPU).slab([torch.randn(10)])
    assert transfer.ALIGNMENT == 512
