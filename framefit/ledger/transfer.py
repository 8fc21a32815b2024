"""Bytes between host and device: slabs on the host, rooms on the device, copies in order, and waiting for them.

Whatever moves weights moves them through here, on a card, on the CPU and in a dry run; so does what a VAE remembers,
which goes out as well (`ledger/shelf.py`). A slab packs the tensors
of one unit into one piece of memory, because one large copy is twice as fast as many small ones, and because torch's
own allocator rounds each pinned tensor up to a power of two. A slab is pinned by itself, byte for byte.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from framefit.errors import Unpinnable

__all__ = ["CardTransfer", "NoTransfer", "Piece", "Room", "Slab", "Transfer", "mapped", "transfer_for", "without_holes"]

ALIGNMENT = 512
"""Bytes: where a tensor begins, as torch's allocator on a card places them; kernels choose by alignment."""

MAPPING: dict[str, int] = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
"""The process's own memory; Windows maps no other."""

PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every context of the process."""


class Slab:
    """The bytes of some tensors, one tensor after another, in one piece of host memory.

    Packing empties the tensors' own memory: from then on they are views, of the slab or of a room.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.tensors = tuple(tensors)
        self._strides = [_dense(tensor) for tensor in self.tensors]
        self.offsets: list[int] = []
        end = 0
        for tensor in self.tensors:
            self.offsets.append(end)
            end += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        self.bytes = end
        self.host = torch.empty(0, dtype=torch.uint8)
        self._home: list[torch.Tensor] = []

    @torch.no_grad()
    def pack(self, memory: Callable[[int], torch.Tensor]) -> None:
        """Into the piece (bytes,) of uint8 that `memory` gives for a number of bytes."""
        host = memory(self.bytes)
        for tensor, home in zip(self.tensors, self._views(host), strict=True):
            home.copy_(tensor)
        self.lie(host)

    def lie(self, host: torch.Tensor) -> None:
        """Its bytes are at `host`, (bytes,) of uint8, from here on."""
        self.host, self._home = host, self._views(host)
        self.point(None)

    @property
    def at_home(self) -> bool:
        """Whether the tensors are what was packed, and nothing newer."""
        return all(
            tensor.dtype == home.dtype and tensor.data_ptr() == home.data_ptr()
            for tensor, home in zip(self.tensors, self._home, strict=True)
        )

    def point(self, room: Room | None) -> None:
        """Let the tensors be what lies in `room`, or on the host."""
        if room is not None and self not in room.views:
            room.views[self] = self._views(room.memory)
        views = self._home if room is None else room.views[self]
        for tensor, view in zip(self.tensors, views, strict=True):
            tensor.data = view

    def _views(self, memory: torch.Tensor) -> list[torch.Tensor]:
        return [
            memory[begin : begin + tensor.numel() * tensor.element_size()]
            .view(tensor.dtype)
            .as_strided(tensor.shape, strides)
            for tensor, begin, strides in zip(self.tensors, self.offsets, self._strides, strict=True)
        ]


@dataclass(slots=True)
class Room:
    """Device memory that slabs are copied to, one after another."""

    memory: torch.Tensor
    """(bytes,) of uint8."""
    filled: Any = None
    """CUDA event: the copy into it is complete."""
    free: Any = None
    """CUDA event: all that was to read it has."""
    filling: Future[None] | None = None
    """Of a file's contents: a thread is reading them."""
    views: dict[Slab, list[torch.Tensor]] = field(default_factory=dict)
    """Of slabs that have been in it, made once: to make those of a denoiser's takes longer than to compute some."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class Piece:
    """Host memory that a file's contents, or a tensor of the device, lie in for a while."""

    memory: torch.Tensor
    """(bytes,) of uint8."""
    read: Any = None
    """CUDA event: what lay in it has been copied on."""
    written: Any = None
    """CUDA event: what comes from the device is in it."""


class Transfer:
    """Without a card: copies at once, between two pieces of host memory, so that a test on the CPU sees every copy."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.moved_bytes = 0
        """To the device, in all."""
        self.returned_bytes = 0
        """From the device, in all."""
        self.pieces_bytes = 0
        """Of pieces, in all."""

    @property
    def pinned_bytes(self) -> int:
        """Of host memory, at present."""
        return 0

    def slab(self, tensors: Sequence[torch.Tensor]) -> Slab:
        slab = Slab(tensors)
        slab.pack(partial(torch.empty, dtype=torch.uint8))
        return slab

    def room(self, bytes: int) -> Room:
        return Room(torch.empty(bytes, dtype=torch.uint8, device=self.device))

    def over(self, tensor: torch.Tensor) -> Room:
        """A room that is the memory of a tensor of the device, without holes."""
        return Room(_flat(tensor).view(torch.uint8))

    def within(self, room: Room, at: int, bytes: int) -> Room:
        """A part of a room, from the byte `at` on, that is filled by itself and free when the room is."""
        return Room(room.memory[at : at + bytes], free=room.free)

    def stay(self, table: torch.Tensor) -> object:
        """`table` is looked up on the host, as long as what is returned is held."""
        table.data = table.data.cpu()
        if table.untyped_storage().nbytes() > table.nbytes:  # it would keep the slab that it lay in before
            table.data = table.data.clone()
        return table

    def copy(self, slab: Slab, room: Room) -> None:
        """Begin to fill the room, once it is free."""
        self.moved_bytes += slab.bytes
        self.begin(room)
        self.put(slab.host, room, 0)
        self.end(room)

    def begin(self, room: Room) -> None:
        """What is put from here on comes once the room is free."""

    def put(self, source: torch.Tensor, room: Room, at: int) -> None:
        """Copy host bytes into the room, from the byte `at` on."""
        room.memory[at : at + source.numel()].copy_(source)

    def end(self, room: Room) -> None:
        """All is put."""

    def piece(self, bytes: int) -> Piece:
        """Raises `Unpinnable` where the host has no memory to pin."""
        self.pieces_bytes += bytes
        return self._piece(bytes)

    def _piece(self, bytes: int) -> Piece:
        return Piece(torch.empty(bytes, dtype=torch.uint8))

    def put_piece(self, piece: Piece, bytes: int, room: Room, at: int) -> None:
        """The first bytes of a piece, as `put` does."""
        self.put(piece.memory[:bytes], room, at)

    def send(self, tensor: torch.Tensor, piece: Piece) -> None:
        """Begin to copy a tensor of the device, without holes, to a piece of its size, once it is computed."""
        self.returned_bytes += tensor.nbytes
        piece.memory.copy_(_flat(tensor).view(torch.uint8))

    def sent(self, piece: Piece) -> None:
        """What is computed from here on comes after what was sent: its memory on the device may be another's."""

    def recall(self, piece: Piece, room: Room) -> None:
        """Begin to copy what was sent into a room of its size."""
        self.moved_bytes += room.memory.nbytes
        self.begin(room)
        self.put_piece(piece, room.memory.nbytes, room, 0)
        self.end(room)

    def wait(self, room: Room) -> None:
        """What is computed from here on may read the room."""

    def release(self, room: Room) -> None:
        """What is computed from here on does not read the room any more."""

    def point(self, slab: Slab, room: Room | None) -> None:
        slab.point(room)

    def settle(self) -> None:
        """No copy is under way for what is computed from here on: rooms may be dropped."""

    def trim(self) -> None:
        """Dropped rooms are given back."""

    def close(self) -> None:
        """Nothing is moved any more, and nothing of it is left."""


class CardTransfer(Transfer):
    """Pinned slabs, and streams of their own for the copies each way, so that they run beside the computation.

    Source: CUDA C++ Programming Guide, asynchronous concurrent execution.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._back = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        """From the device."""
        self._runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        self._pinned_bytes = 0

    @property
    def pinned_bytes(self) -> int:
        return self._pinned_bytes

    def slab(self, tensors: Sequence[torch.Tensor]) -> Slab:
        """Raises `Unpinnable` where the host has no memory to pin."""
        slab = Slab(tensors)
        slab.pack(lambda bytes: self._pinned(slab, bytes))
        return slab

    def _piece(self, bytes: int) -> Piece:
        read, written = torch.cuda.Event(blocking=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
        piece = Piece(torch.empty(0, dtype=torch.uint8), read, written)
        piece.memory = self._pinned(piece, bytes)
        return piece

    def room(self, bytes: int) -> Room:
        return self.over(super().room(bytes).memory)

    def over(self, tensor: torch.Tensor) -> Room:
        filled, free = torch.cuda.Event(), torch.cuda.Event()  # type: ignore[no-untyped-call]
        room = Room(super().over(tensor).memory, filled, free)
        self.release(room)  # the memory may have been another tensor's, which kernels under way still read
        return room

    def within(self, room: Room, at: int, bytes: int) -> Room:
        part = super().within(room, at, bytes)
        part.filled = torch.cuda.Event()  # type: ignore[no-untyped-call]
        return part

    def begin(self, room: Room) -> None:
        self._stream.wait_event(room.free)

    def put(self, source: torch.Tensor, room: Room, at: int) -> None:
        with torch.cuda.stream(self._stream):
            room.memory[at : at + source.numel()].copy_(source, non_blocking=True)

    def end(self, room: Room) -> None:
        room.filled.record(self._stream)

    def put_piece(self, piece: Piece, bytes: int, room: Room, at: int) -> None:
        self._stream.wait_event(piece.written)
        super().put_piece(piece, bytes, room, at)
        piece.read.record(self._stream)

    def send(self, tensor: torch.Tensor, piece: Piece) -> None:
        self.returned_bytes += tensor.nbytes
        self._back.wait_stream(torch.cuda.current_stream(self.device))
        self._back.wait_event(piece.read)
        with torch.cuda.stream(self._back):
            piece.memory.copy_(_flat(tensor).view(torch.uint8), non_blocking=True)
        piece.written.record(self._back)

    def sent(self, piece: Piece) -> None:
        torch.cuda.current_stream(self.device).wait_event(piece.written)

    def wait(self, room: Room) -> None:
        torch.cuda.current_stream(self.device).wait_event(room.filled)

    def release(self, room: Room) -> None:
        room.free.record(torch.cuda.current_stream(self.device))

    def settle(self) -> None:
        # the rooms are the computing stream's own memory: with this, whoever gets it next comes after the copies
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        torch.cuda.current_stream(self.device).wait_stream(self._back)

    def trim(self) -> None:
        torch.cuda.empty_cache()

    def _pinned(self, owner: object, bytes: int) -> torch.Tensor:
        """Memory (bytes,) of uint8, pinned as long as `owner` lives, which dies before it does."""
        pinned = -(-bytes // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages, as they are mapped
        try:
            memory = mapped(bytes).zero_()  # all cores fetch its pages, which pinning does with one
        except OSError as error:
            raise _unpinnable(pinned, error) from None
        address = memory.data_ptr()
        if code := int(self._runtime.cudaHostRegister(address, pinned, PORTABLE)):
            reason = self._runtime.cudaGetErrorString(self._runtime.cudaError(code))
            with contextlib.suppress(RuntimeError):  # CUDA tells it once more to whatever kernel comes next: this one
                torch.zeros(1, device=self.device)
            raise _unpinnable(pinned, reason)
        self._pinned_bytes += pinned
        weakref.finalize(owner, self._unpin, address, pinned).atexit = False  # a process that ends has nothing to unpin
        return memory

    def _unpin(self, address: int, bytes: int) -> None:
        self._stream.synchronize()
        self._back.synchronize()
        self._runtime.cudaHostUnregister(address)
        self._pinned_bytes -= bytes


class NoTransfer(Transfer):
    """For tensors without contents: nothing is moved or held; what would be is known from the slabs' sizes."""

    def slab(self, tensors: Sequence[torch.Tensor]) -> Slab:
        return Slab(tensors)

    def stay(self, table: torch.Tensor) -> object:
        return table

    def room(self, bytes: int) -> Room:
        return Room(torch.empty(0, dtype=torch.uint8))

    def copy(self, slab: Slab, room: Room) -> None:
        self.moved_bytes += slab.bytes

    def _piece(self, bytes: int) -> Piece:
        return Piece(torch.empty(0, dtype=torch.uint8))

    def send(self, tensor: torch.Tensor, piece: Piece) -> None:
        self.returned_bytes += tensor.nbytes

    def put_piece(self, piece: Piece, bytes: int, room: Room, at: int) -> None:
        pass

    def point(self, slab: Slab, room: Room | None) -> None:
        pass


def transfer_for(device: torch.device, tensors: Iterable[torch.Tensor] = ()) -> Transfer:
    """What can bring `tensors` to `device`."""
    if any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in tensors):
        return NoTransfer(device)
    return CardTransfer(device) if device.type == "cuda" else Transfer(device)


def _unpinnable(bytes: int, reason: object) -> Unpinnable:
    return Unpinnable(
        f"{bytes / 2**30:.2f} GiB of host memory cannot be pinned ({reason}): free host memory, use offload=disk or "
        f"offload=none, or where decode=ram was chosen another decode."
    )


def mapped(bytes: int) -> torch.Tensor:
    """Memory of its own pages, which go back to the system with the tensor."""
    return torch.frombuffer(mmap.mmap(-1, bytes, **MAPPING), dtype=torch.uint8)


def _dense(tensor: torch.Tensor) -> tuple[int, ...]:
    """Its strides, or those of a copy without holes."""
    return torch.empty_like(tensor, device="meta").stride()


def without_holes(tensor: torch.Tensor) -> bool:
    """Whether its elements lie side by side, in whatever order of its axes."""
    strides = zip(tensor.shape, tensor.stride(), _dense(tensor), strict=True)
    return all(own == usual for size, own, usual in strides if size > 1)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """Its elements as they lie, of a tensor without holes."""
    return tensor.as_strided((tensor.numel(),), (1,))
