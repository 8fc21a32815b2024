"""The card's transfer without a card: its streams and events played on the CPU, by the rules that CUDA gives.

Copies run as late as waiting for them allows, or as early as their own waiting allows. In both ways the weights must be
there when a block computes, and still be there until it has.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from framefit import streaming
from framefit.errors import DoesNotFit
from framefit.families import Checkpoint
from framefit.families.parts import Parts
from framefit.ledger import transfer
from framefit.ledger.disk import DiskTransfer
from framefit.ledger.transfer import CardTransfer, Room, Slab, Transfer
from framefit.passes import apply_all, offload
from framefit.passes.offload import Component
from framefit.plan import Plan
from framefit.planning import dryrun

CPU = torch.device("cpu")


class Event:
    """Whoever waits waits for the last time that it was recorded until then."""

    def __init__(self, blocking: bool = False) -> None:
        self.mark = threading.Event()
        self.mark.set()
        """CUDA: waiting for an event that was never recorded waits for nothing."""

    def record(self, stream: Stream) -> None:
        self.mark = threading.Event()
        stream.put(self.mark.set)

    def synchronize(self) -> None:
        with LOCK:
            while not self.mark.is_set():
                Stream.step()


class Stream:
    """Work in order. The computing stream does it at once, as the CPU does."""

    played: ClassVar[list[Stream]] = []
    """For copies, each way."""
    when: ClassVar[Literal["late", "early"]]

    def __init__(self, device: Any = None) -> None:
        self.queue: list[Callable[[], bool | None]] = []
        if device is not None:
            Stream.played.append(self)

    def put(self, work: Callable[[], bool | None]) -> None:
        with LOCK:
            self.queue.append(work)
            if self is COMPUTING:
                self.run()
            if Stream.when == "early":
                Stream.go()

    def run(self) -> None:
        """What is not waiting for another stream."""
        with LOCK:
            while self.queue and self.queue[0]() is not False:
                self.queue.pop(0)

    @staticmethod
    def go() -> None:
        """All that can run, as one stream waits for what another does."""
        for _ in Stream.played:
            for each in Stream.played:
                each.run()

    @staticmethod
    def step() -> None:
        """What is next on one of them."""
        busy = [each for each in Stream.played if each.queue]
        assert busy, "it is waited for what never comes"
        free = next((each for each in busy if each.queue[0]() is not False), None)
        assert free, "the streams wait for each other"
        free.queue.pop(0)

    def wait_event(self, event: Event) -> None:
        if self is COMPUTING:
            event.synchronize()
        else:
            self.put(event.mark.is_set)

    def wait_stream(self, other: Stream) -> None:
        mark = Event()
        mark.record(other)
        self.wait_event(mark)

    def synchronize(self) -> None:
        Stream.go()


COMPUTING = Stream()
LOCK = threading.RLock()
"""Files are read in a thread, which puts copies on the stream."""


class Queued(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Copies belong to the stream."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.stream.put(lambda: func(*args) is not None)
            return args[0]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def on_stream(stream: Stream) -> Iterator[None]:
    with Queued(stream):
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
    Stream.played.clear()
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
    """Six blocks, of which two or three small ones have room together, and something around them."""

    def __init__(self, widths: Sequence[int] = (80, 8, 8, 48, 80, 8), calls: Sequence[int] = range(6)) -> None:
        super().__init__()
        self.before = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, width) for width in widths)
        self.calls = calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        for index in self.calls:
            x = self.blocks[index](x)[:, :8].relu() + x
        return x


def model(*of: Sequence[int]) -> Model:
    torch.manual_seed(0)
    return Model(*of)


@torch.no_grad()
def run(level: str, kept: int = 0, moving: Transfer | None = None, of: Sequence[Sequence[int]] = ()) -> bool:
    """Whether two forwards, a pause and two more give what weights that stay give."""
    x = torch.randn(4, 8)
    expected = model(*of)(x)
    component = Component.of(model(*of), level, kept, moving or CardTransfer(CPU))
    same = []
    for _ in range(2):
        component.bring()
        same += [torch.equal(component.model(x), expected) for _ in range(2)]
        component.away()
    return all(same)


@pytest.mark.parametrize(("level", "kept"), [("part", 0), ("block", 0), ("block", 2), ("leaf", 0)])
def test_weights_are_there_when_they_are_needed(level: str, kept: int, runtime: Runtime) -> None:
    assert run(level, kept)


@pytest.mark.parametrize("calls", [(0, 1, 2, 3, 3), (0, 1, 2, 1), (3, 0, 1, 0, 1, 2), (0, 0, 0)])
def test_layers_that_are_called_more_than_once(calls: Sequence[int], runtime: Runtime) -> None:
    """Whoever follows whom, and some of them in one room: the last one's successor is itself until the next forward."""
    assert run("leaf", of=((80, 80, 8, 8), calls))


@torch.no_grad()
def test_what_fits_two_rooms_comes_once(runtime: Runtime) -> None:
    moving = CardTransfer(CPU)
    small, x = ((80, 24, 24), range(3)), torch.randn(4, 8)
    component, expected = Component.of(model(*small), "block", 0, moving), model(*small)(x)
    component.bring()
    copied = []
    for _ in range(3):
        assert torch.equal(component.model(x), expected)
        copied.append(moving.moved_bytes)
    assert copied[1] == copied[2] == component.whole_bytes + sum(unit.slab.bytes for unit in component.stream.units)
    component.away()


def test_a_part_of_a_room_is_filled_by_itself_and_free_when_all_of_it_is(runtime: Runtime) -> None:
    moving = CardTransfer(CPU)
    room = moving.room(4096)
    one, other = (moving.within(room, at, 1024) for at in (0, 1024))
    assert one.free is other.free is room.free
    assert len({one.filled, other.filled, room.filled}) == 3
    one.memory.fill_(1)
    other.memory.fill_(2)
    assert room.memory[:2048].tolist() == [1] * 1024 + [2] * 1024


@pytest.mark.parametrize(
    ("forgotten", "seen"),
    [("wait", "late"), ("release", "never: the room is not free again"), ("free", "early")],
)
def test_a_forgotten_wait_is_seen(forgotten: str, seen: str, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    def begin_too_soon(self: Any, unit: Any) -> Any:
        """Into the room that is at work."""
        for place in self._places:
            if unit in place.holds:
                return place
        place = self._at_work or self._places[0]
        place.holds.clear()
        self._fill(place, unit)
        return place

    if forgotten == "wait":
        monkeypatch.setattr(CardTransfer, "wait", lambda self, room: None)
        assert run("block") == (Stream.when == "early")
    elif forgotten == "release":
        monkeypatch.setattr(CardTransfer, "release", lambda self, room: room.free.mark.clear())
        with pytest.raises(AssertionError):
            run("block")
    else:
        from framefit.passes.stream import Stream as Streaming

        monkeypatch.setattr(Streaming, "_begin", begin_too_soon)
        assert run("block") == (Stream.when == "late")


@pytest.mark.parametrize("kept", [0, 2])
def test_weights_from_files_are_there_when_they_are_needed(
    kept: int, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every slab passes through all pieces, some of them twice."""
    monkeypatch.setattr(streaming, "PIECE_BYTES", 128)
    moving = DiskTransfer(CardTransfer(CPU), tmp_path)
    assert run("block", kept, moving)
    assert len(runtime.pinned) == streaming.PIECES, "these, and nothing else"
    assert moving.pinned_bytes == sum(runtime.pinned.values())
    moving.close()
    assert moving.pinned_bytes == 0
    assert not runtime.pinned


@pytest.mark.parametrize(
    ("forgotten", "seen"), [("the reader", {"late", "early"}), ("the piece", {"late"}), ("the card", {"late"})]
)
def test_a_forgotten_wait_for_a_file_is_seen(
    forgotten: str, seen: set[str], runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "PIECE_BYTES", 128)
    moving = DiskTransfer(CardTransfer(CPU), tmp_path)
    if forgotten == "the reader":
        fill = DiskTransfer._fill
        monkeypatch.setattr(DiskTransfer, "_fill", lambda *given: (time.sleep(0.05), fill(*given)))
        monkeypatch.setattr(DiskTransfer, "wait", lambda self, room: self._way.wait(room))
    elif forgotten == "the piece":
        monkeypatch.setattr(Event, "synchronize", lambda self: None)
        monkeypatch.setattr(Stream, "wait_event", waits)
    else:
        monkeypatch.setattr(DiskTransfer, "wait", lambda self, room: room.filling.result())
    assert run("block", 0, moving) == (Stream.when not in seen)
    moving.close()


def waits(self: Stream, event: Event) -> None:
    """The host forgets to, the streams do not."""
    if self is not COMPUTING:
        self.put(event.mark.is_set)
        return
    with LOCK:
        while not event.mark.is_set():
            Stream.step()


@pytest.mark.parametrize("value", ["part", "block", "leaf", "disk"])
def test_pinned_bytes_are_those_of_the_weights_and_no_more_than_was_said(
    value: str, runtime: Runtime, tiny: Callable[[str], Checkpoint], make_plan: Callable[..., Plan],
    load_fp32: Callable[[Checkpoint], Parts],
) -> None:  # fmt: skip
    """Whole pages: of tiny models they are a part that they are not of large ones."""
    row = tiny("wan2.2-i2v-a14b")
    plan = make_plan(row, settings={"offload": value})
    parts = load_fp32(row)
    parts.device = torch.device("cuda:0")
    plan = replace(plan, device=replace(plan.device, id="cuda:0"))
    apply_all(parts, plan)
    placement = offload.placed(parts)
    assert placement is not None
    said = max(phase.pinned_bytes for phase in dryrun.trace(plan, row))
    if value == "disk":
        assert said == streaming.staging_bytes(max(placement.slab_bytes))
        assert not runtime.pinned, "none before it is used"
    else:
        assert 0 <= sum(runtime.pinned.values()) - said <= 4096 * len(placement.slab_bytes)
        assert said == sum(placement.slab_bytes)
    parts.close()


@torch.no_grad()
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("again", [False, True], ids=["goes on", "comes again"])
def test_a_forward_that_breaks_off_leaves_nothing_wrong(
    error: type[BaseException], again: bool, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(4, 8)
    expected = model()(x)
    component = Component.of(model(), "block", 0, CardTransfer(CPU))
    component.bring()
    component.model(x)
    stream, module = component.stream, component.model.blocks[3]
    order = dict(stream.after)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", breaks_at(module, error))
        with pytest.raises(error):
            component.model(x)
    if again:
        component.away()
        component.bring()
    copies: list[Slab] = []
    copy = CardTransfer.copy
    monkeypatch.setattr(CardTransfer, "copy", lambda self, slab, room: (copies.append(slab), copy(self, slab, room)))
    for _ in range(2):
        assert torch.equal(component.model(x), expected)
    assert stream.after == order
    homes = {unit.module: unit.slab.host.untyped_storage().data_ptr() for unit in stream.units}
    assert all(unit.weight.untyped_storage().data_ptr() == home for unit, home in homes.items())
    if not again:
        assert len(copies) == 2 * len(stream.units) + 1, "each block once a forward, and the next one's first roomful"
    component.away()


def breaks_at(module: nn.Module, error: type[BaseException]) -> Callable[..., torch.Tensor]:
    linear = nn.functional.linear

    def broken(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        if weight is module.weight:
            raise error
        return linear(x, weight, *rest)

    return broken


@torch.no_grad()
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_a_copy_that_fails_is_made_again(
    error: type[BaseException], runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a forward, and when a component comes."""
    x = torch.randn(4, 8)
    expected = model()(x)
    component = Component.of(model(), "block", 2, CardTransfer(CPU))
    copy, left = CardTransfer.copy, [0]

    def fails(self: CardTransfer, slab: Slab, room: Room) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise error
        copy(self, slab, room)

    monkeypatch.setattr(CardTransfer, "copy", fails)
    for nth in (1, 2, 3, 4, 5):
        left[0] = nth
        with pytest.raises(error):
            (component.bring(), component.model(x))
        if nth <= 4:  # three as a whole, and the first that streams
            component.bring()
        assert torch.equal(component.model(x), expected)
        component.away()


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


def test_memory_that_cannot_be_pinned_is_told(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the user, and not once more to the next kernel: CUDA keeps an error for whoever asks next."""
    runtime.code, kernels = 2, []

    def kernel(*shape: int, device: Any) -> None:
        kernels.append(device)
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "zeros", kernel)
    moving = CardTransfer(CPU)
    with pytest.raises(DoesNotFit, match=r"cannot be pinned \(error 2\).* use offload=disk"):
        moving.slab([torch.randn(10)])
    assert kernels == [CPU]
    assert moving.pinned_bytes == 0
    assert transfer.ALIGNMENT == 512
