"""Bytes of tensors that are alive, phase by phase, and who holds them when they are most.

A dispatch mode over real or fake tensors. A storage counts from the operator that made it until nothing refers to it,
in blocks as torch's allocator on a card gives them; what was there before (the weights) is not counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Held", "Live", "Peak", "block_bytes"]

Workspace = Callable[[Any, Any, Any], int]
"""(operator, its arguments, its result) -> bytes that it needs beside these while it runs."""

BLOCK = 512
"""Bytes: kMinBlockSize in c10/cuda/CUDACachingAllocator.h."""


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


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows what runs inside it."""

    def __init__(
        self, known: Iterable[torch.Tensor], module: Callable[[], str] = str, workspace: Workspace = lambda *_: 0
    ) -> None:
        """`known` are there from outside and not counted; `module` says who is at work."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.phases: dict[str, Peak] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._module, self._workspace = module, workspace
        self._alive: dict[int, tuple[Held, Any]] = {}
        self._bytes = 0
        self._peak = Peak()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is alive while the block runs counts for the phase `name`, what came before and is still alive too."""
        outer, self._peak = self._peak, self.phases.setdefault(name, Peak())
        self._look()
        try:
            yield
        finally:
            self._peak = outer

    @contextmanager
    def rise(self) -> Iterator[list[int]]:
        """A list that holds, once the block is over, by how much the bytes rose in it at the most."""
        outer, self._peak = self._peak, Peak(bytes=self._bytes)
        entered, found = self._bytes, [0]
        try:
            yield found
        finally:
            inner, self._peak = self._peak, outer
            found[0] = inner.bytes - entered
            if inner.bytes > outer.bytes:
                outer.bytes, outer.held = inner.bytes, inner.held

    def rose(self, bytes: int, what: str) -> None:
        """Something ran that took `bytes` more at the most, and left nothing."""
        self._look(Held(bytes, what, (), "", self._module()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
                self._meet(leaf, func)
        if extra := self._workspace(func, args, result):
            self._look(self._held(extra, f"workspace of {_name(func)}", result))
        return result

    def _meet(self, tensor: torch.Tensor, func: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._alive:
            return
        held = self._held(storage.nbytes(), _name(func), tensor)
        self._alive[key] = held, weakref.ref(storage, lambda _: self._lose(key))
        self._bytes += held.bytes
        self._look()

    def _lose(self, key: int) -> None:
        held, _ = self._alive.pop(key)
        self._bytes -= held.bytes

    def _held(self, bytes: int, operator: str, tensor: torch.Tensor) -> Held:
        dtype = str(tensor.dtype).removeprefix("torch.")
        return Held(block_bytes(bytes), operator, tuple(tensor.shape), dtype, self._module())

    def _look(self, *passing: Held) -> None:
        """Whether this is the most so far; `passing` are gone when the operator is done."""
        bytes = self._bytes + sum(held.bytes for held in passing)
        if bytes > self._peak.bytes:
            self._peak.bytes, self._peak.held = bytes, [*(held for held, _ in self._alive.values()), *passing]


def _name(func: Any) -> str:
    name: str = func._schema.name
    return name.removeprefix("aten::")


def block_bytes(bytes: int) -> int:
    """What the allocator gives for `bytes`."""
    return -(-bytes // BLOCK) * BLOCK
