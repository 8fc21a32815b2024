"""Bytes of tensors that are alive, phase by phase, and who holds them when they are most.

A dispatch mode over real or fake tensors. A storage counts from the operator that made it until nothing refers to it,
in blocks as torch's allocator on a card gives them; what was there before (the weights) is not counted.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from framefit.ledger.allocator import Block, block_bytes

__all__ = ["Held", "Live", "Peak", "Rise"]

Workspace = Callable[[Any, Any, Any], tuple[int, int]]
"""(operator, its arguments, its result) -> bytes that it needs beside these while it runs: of copies that it makes
before its result is there, and of what it takes after that."""


@dataclass(frozen=True, slots=True)
class Held:
    """One storage."""

    bytes: int
    operator: str
    """That made it."""
    shape: tuple[int, ...]
    dtype: str
    module: str
    """Path of the module that was at work, as in transformer.blocks.3.attn1; empty outside of modules."""


@dataclass(slots=True)
class Peak:
    """Of one phase."""

    bytes: int = 0
    held: list[Held] = field(default_factory=list)
    """All that was alive at the peak."""
    begins: list[Block] = field(default_factory=list)
    """That were alive when the phase began first."""
    blocks: list[Block] = field(default_factory=list)
    """That came and went in it, in order; those of an operator's workspace too."""


@dataclass(slots=True)
class Rise:
    """Of one call."""

    bytes: int = 0
    """On top of what was alive before, when most was."""
    held: list[Held] = field(default_factory=list)
    """All that was alive then."""
    before: list[Held] = field(default_factory=list)
    """All that was alive when it began."""
    blocks: list[Block] = field(default_factory=list)
    """As `Peak.blocks`."""


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows what runs inside it."""

    def __init__(
        self, known: Iterable[torch.Tensor], module: Callable[[], str] = str, workspace: Workspace = lambda *_: (0, 0)
    ) -> None:
        """`known` are there from outside and not counted; `module` says who is at work."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.phases: dict[str, Peak] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._module, self._workspace = module, workspace
        self._alive: dict[int, tuple[Held, Any]] = {}
        self._bytes = 0
        self._peak = Peak()
        self._blocks: list[Block] = []
        self._next = count(1)
        self._numbers: dict[int, int] = {}
        """Storage -> its block's."""
        self._sizes: dict[int, int] = {}
        """Of all blocks that were."""
        self._over: set[int] = set()
        """Of these, whose end was told."""
        self._left: list[int] = []
        """Blocks of what ran again, for what it makes."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is alive while the block runs counts for the phase `name`, what came before and is still alive too."""
        begins = [(self._numbers[key], held.bytes) for key, (held, _) in self._alive.items()]
        outer, self._peak = self._peak, self.phases.setdefault(name, Peak(begins=begins))
        before, self._blocks = self._blocks, self._peak.blocks
        self._look()
        try:
            yield
        finally:
            self._peak, self._blocks = outer, before

    @contextmanager
    def rise(self) -> Iterator[Rise]:
        """It holds, once the block is over, how much more was alive in it than before."""
        entered, found = self._bytes, Rise(before=self._now())
        outer, self._peak = self._peak, Peak(entered, found.before)
        first = len(self._blocks)
        try:
            yield found
        finally:
            found.blocks = self._blocks[first:]
            inner, self._peak = self._peak, outer
            found.bytes, found.held = inner.bytes - entered, inner.held
            if inner.bytes > outer.bytes:
                outer.bytes, outer.held = inner.bytes, inner.held

    @contextmanager
    def rose(self, rise: Rise) -> Iterator[None]:
        """What `rise` is of ran again, beside what is alive now; what it leaves is made in the block."""
        if self._bytes + rise.bytes > self._peak.bytes:
            now = self._now()
            held = [*_without(rise.held, _without(rise.before, now)), *_without(now, rise.before)]
            self._peak.bytes, self._peak.held = self._bytes + rise.bytes, held
        before, self._left = self._left, []
        gone = self._again(rise.blocks)
        try:
            yield
        finally:
            left, self._left = self._left, before
            for number in left:  # what it keeps itself, in place of what it kept before
                key = next((key for key in gone if self._sizes[self._numbers[key]] == self._sizes[number]), None)
                if key is None:
                    self._ends(number)
                else:
                    gone.remove(key)
                    self._numbers[key] = number

    def mark(self, mark: Block) -> None:
        """A place among the blocks: one whose number is not positive."""
        self._blocks.append(mark)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        copied, beside = map(block_bytes, self._workspace(func, args, result))
        first = self._taken(copied)
        for leaf in (result,) if isinstance(result, torch.Tensor) else tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided and not _nowhere(leaf):
                self._meet(leaf, func)
        if extra := copied + beside:
            self._look(extra, [self._held(extra, f"workspace of {_name(func)}", tree_leaves(result)[0])])
            for number in (self._taken(beside), first):
                self._ends(number)
        return result

    def _meet(self, tensor: torch.Tensor, func: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._alive:
            return
        held = self._held(storage.nbytes(), _name(func), tensor)
        self._alive[key] = held, weakref.ref(storage, lambda _: self._lose(key))
        self._bytes += held.bytes
        number = next((number for number in self._left if self._sizes[number] == held.bytes), None)
        if number is None:
            number = self._taken(held.bytes)
        else:
            self._left.remove(number)
        self._numbers[key] = number
        self._look()

    def _lose(self, key: int) -> None:
        held, _ = self._alive.pop(key)
        self._bytes -= held.bytes
        self._ends(self._numbers.pop(key))

    def _taken(self, bytes: int) -> int:
        number = next(self._next)
        self._sizes[number] = bytes
        if bytes:
            self._blocks.append((number, bytes))
        return number

    def _ends(self, number: int) -> None:
        """Once: a call that ran again may have let go what its caller still refers to."""
        if self._sizes[number] and number not in self._over:
            self._over.add(number)
            self._blocks.append((number, 0))

    def _again(self, blocks: Iterable[Block]) -> list[int]:
        """They come and go once more. What was there before them and went is one of its size now: storages."""
        numbers: dict[int, int] = {}
        gone: list[int] = []
        for number, bytes in blocks:
            if bytes:
                numbers[number] = self._taken(bytes)
            elif number in numbers:
                self._ends(numbers.pop(number))
            elif number > 0:
                size = self._sizes[number]
                like = (k for k in reversed(self._numbers) if self._sizes[self._numbers[k]] == size and k not in gone)
                if (key := next(like, None)) is not None:
                    gone.append(key)
                    self._ends(self._numbers[key])
        self._left = list(numbers.values())
        return gone

    def _held(self, bytes: int, operator: str, tensor: torch.Tensor) -> Held:
        dtype = str(tensor.dtype).removeprefix("torch.")
        return Held(block_bytes(bytes), operator, tuple(tensor.shape), dtype, self._module())

    def _look(self, bytes: int = 0, passing: Iterable[Held] = ()) -> None:
        """Whether this is the most so far, with the `bytes` of what is gone again when it is done."""
        if self._bytes + bytes > self._peak.bytes:
            self._peak.bytes = self._bytes + bytes
            self._peak.held = [*self._now(), *passing]

    def _now(self) -> list[Held]:
        return [held for held, _ in self._alive.values()]


def _without(these: Iterable[Held], others: Iterable[Held]) -> list[Held]:
    """What is left of `these` when for each of `others` one of its size is gone."""
    gone, left = Counter(held.bytes for held in others), []
    for held in these:
        if gone[held.bytes]:
            gone[held.bytes] -= 1
        else:
            left.append(held)
    return left


def _nowhere(tensor: torch.Tensor) -> bool:
    """Whether it is on the meta device. Every other question about the device of a fake tensor is dispatched."""
    device: torch.device = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
    return device.type == "meta"


def _name(func: Any) -> str:
    name: str = func._schema.name
    return name.removeprefix("aten::")
