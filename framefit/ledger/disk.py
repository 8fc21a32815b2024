"""Weights in files: packed once, and read whenever they are needed, through a few pieces of host memory.

A slab is one safetensors file of one tensor, its bytes. A thread reads it piece by piece, each copied to the device
while the next is read; so the host holds no more than the pieces, and what the system's file cache has room for.
Between uses the tensors are views of the mapped file, which nobody reads but who looks up a few rows of a table.

Files are read and not mapped on the way to the device: a file that cannot be read is an error there and no signal.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import count, cycle
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from framefit.errors import DoesNotFit, FramefitError
from framefit.ledger.transfer import Piece, Room, Slab, Transfer, mapped
from framefit.streaming import PIECES, staging_bytes

__all__ = ["DiskTransfer", "FiledSlab"]

NAME = "slab"
"""Of the one tensor in a file."""


class FiledSlab(Slab):
    """Its bytes are in a file, which goes with it."""

    file: Path
    _begin: int
    """Of its bytes in the file."""

    def write(self, file: Path) -> None:
        """Raises `OSError` or `SafetensorError`, as on a full disk."""
        self.pack(mapped)
        save_file({NAME: self.host}, file)
        self.file, self._begin = file, file.stat().st_size - self.bytes
        weakref.finalize(self, file.unlink, missing_ok=True).atexit = False  # the folder goes as a whole
        with safe_open(file, framework="pt") as stream:
            self.lie(stream.get_tensor(NAME))

    def open(self) -> BinaryIO:
        """At its first byte."""
        stream = self.file.open("rb", buffering=0)
        stream.seek(self._begin)
        return stream


class DiskTransfer(Transfer):
    """As `way`, from files in `folder`."""

    def __init__(self, way: Transfer, folder: Path) -> None:
        super().__init__(way.device)
        self.kept: dict[tuple[int, ...], FiledSlab] = {}
        """Packed beforehand, by the ids of their tensors: `slab` takes them as they are."""
        self._way, self._folder = way, folder
        self._names = count()
        self._largest = 0
        self._pieces: list[Piece] = []
        self._ring: Iterator[Piece] = iter(())
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="framefit-read")
        self._ahead = ThreadPoolExecutor(max_workers=1, thread_name_prefix="framefit-ahead")
        self._filling: list[Future[None]] = []
        self._stop = threading.Event()

    @property
    def pinned_bytes(self) -> int:
        return self._way.pinned_bytes

    def keep(self, tensors: Sequence[torch.Tensor]) -> None:
        """Pack them now, for a `slab` later on, so that they are not in memory until then."""
        slab = self.slab(tensors)
        self.kept[_key(tensors)] = slab

    def slab(self, tensors: Sequence[torch.Tensor]) -> FiledSlab:
        """Raises `DoesNotFit` where the disk is full."""
        known = self.kept.pop(_key(tensors), None)
        if known and known.at_home:
            return known
        slab = FiledSlab(tensors)
        file = self._folder / f"{next(self._names)}.safetensors"
        try:
            slab.write(file)
        except (OSError, SafetensorError) as error:
            free = shutil.disk_usage(self._folder).free
            raise DoesNotFit(
                f"offload=disk cannot write {slab.bytes / 2**30:.2f} GiB of weights to {self._folder} ({error}; "
                f"{free / 2**30:.1f} GiB are free there): make room, set XDG_STATE_HOME to another disk, or use "
                f"offload=block."
            ) from None
        self._largest = max(self._largest, slab.bytes)
        return slab

    def stay(self, table: torch.Tensor) -> object:
        return self.slab([table])

    def room(self, bytes: int) -> Room:
        return self._way.room(bytes)

    def within(self, room: Room, at: int, bytes: int) -> Room:
        return self._way.within(room, at, bytes)

    def copy(self, slab: Slab, room: Room) -> None:
        assert isinstance(slab, FiledSlab)
        self.moved_bytes += slab.bytes
        if not self._pieces:
            size = staging_bytes(self._largest) // PIECES
            self._pieces = [self._way.piece(size) for _ in range(PIECES)]
            self._ring = cycle(self._pieces)
        if room.filling:
            room.filling.cancel()  # nobody waits for that any more
        self._filling = [future for future in self._filling if not future.done()]
        self._way.begin(room)  # now: it may be at work again, with a part that came sooner, when the file is read
        room.filling = self._reader.submit(self._fill, [(slab, room)])
        self._filling.append(room.filling)

    def wait(self, room: Room) -> None:
        """Raises `FramefitError` where the file could not be read."""
        assert room.filling
        room.filling.result()
        self._way.wait(room)

    def release(self, room: Room) -> None:
        self._way.release(room)

    def settle(self) -> None:
        wait(self._filling)
        self._way.settle()

    def trim(self) -> None:
        self._way.trim()

    def expect(self, slabs: Sequence[Slab]) -> None:
        """Have the system read their files into its cache, beside all else."""
        self._ahead.submit(self._read_ahead, [slab for slab in slabs if isinstance(slab, FiledSlab)])

    def close(self) -> None:
        self._stop.set()
        for pool in (self._reader, self._ahead):
            pool.shutdown(cancel_futures=True)
        self._way.settle()
        self._pieces, self._ring = [], iter(())

    def _fill(self, job: list[tuple[FiledSlab, Room]]) -> None:
        """In the reader's thread."""
        slab, room = job.pop()  # which must not hold the room for longer than this: its memory is the next one's
        try:
            with slab.open() as stream:
                for begin in range(0, slab.bytes, self._pieces[0].memory.numel()):
                    piece = next(self._ring)
                    if piece.read:
                        piece.read.synchronize()
                    there = piece.memory[: slab.bytes - begin]
                    _read(stream, there)
                    self._way.put_piece(piece, there.numel(), room, begin)
        except OSError as error:
            raise FramefitError(
                f"weights that offload=disk wrote to {slab.file} cannot be read back ({error}): look after that disk, "
                f"or set XDG_STATE_HOME to another."
            ) from None
        else:
            self._way.end(room)
        finally:
            del slab, room  # from an error's traceback too

    def _read_ahead(self, slabs: Sequence[FiledSlab]) -> None:
        unheeded = bytearray(2**20)
        with contextlib.suppress(OSError):  # who needs the file will tell
            for slab in slabs:
                with slab.open() as stream:
                    while not self._stop.is_set() and stream.readinto(unheeded):  # type: ignore[attr-defined]
                        pass


def _key(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    return tuple(id(tensor) for tensor in tensors)


def _read(stream: BinaryIO, memory: torch.Tensor) -> None:
    """Fill it, (bytes,) of uint8."""
    left = memoryview(cast(Any, memory.numpy()))
    while left:
        got = stream.readinto(left)  # type: ignore[attr-defined]
        if not got:
            raise OSError("it ends too early")
        left = left[got:]
