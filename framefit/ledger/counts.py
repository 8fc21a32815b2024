"""FLOPs and bytes of one call by kind of work, counted operator by operator with torch's own formulas.

A multiplication and an addition are two FLOPs. Compiled code is counted as the eager operators that it was made of, so
that a fused kernel can seem to move more bytes a second than the memory gives: what is above 100 % was saved by fusing.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from framefit.ledger.kinds import Kind, op_kind

__all__ = ["Counts", "Tally", "count"]

aten = torch.ops.aten

COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}

FORMULAS: dict[Any, Callable[..., int]] = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
}
"""Operator -> its FLOPs; torch 2.13 leaves the CPU's flash attention out."""

FILLS = {"aten::copy_", "aten::fill_", "aten::zero_"}
"""They write their first argument and do not read it."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What one phase has to do."""

    flops: Counter[tuple[Kind, str]] = field(default_factory=Counter)
    """(kind, precision) -> FLOPs, as in ("matmul", "bf16")."""
    bytes: Counter[str] = field(default_factory=Counter)
    """"elementwise": read and written; "host_to_device", "device_to_host": moved."""


class Tally(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what runs inside it, for the phase that is open."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phases: dict[str, Counts] = {}
        self._open = [""]
        self.in_attention = 0
        self.times = 1
        """How often what runs now counts: of equal blocks one can stand for several."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What runs in the block belongs to the phase `name`."""
        self._open.append(name)
        try:
            yield
        finally:
            self._open.pop()

    @property
    def counts(self) -> Counts:
        """Of the phase that is open."""
        return self.phases.setdefault(self._open[-1], Counts())

    def move(self, way: str, bytes: int) -> None:
        """Book what no operator of the program moves: weights that come from outside."""
        self.counts.bytes[way] += self.times * bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # half of all questions about fake tensors
            return args[0].fake_device
        if func._overloadpacket not in FORMULAS and _composite(func):  # in inference mode they arrive whole
            with self:
                return func._op_dk(COMPOSITE, *args, **kwargs)
        result = func(*args, **kwargs)
        counts = self.counts
        kind = "attention" if self.in_attention else op_kind(func._schema.name) or "elementwise"
        if formula := FORMULAS.get(func._overloadpacket):
            counts.flops[kind, _precision(args)] += self.times * formula(*args, **kwargs, out_val=result)
        elif (way := _direction(func, args, result)) is not None:
            counts.bytes[way] += self.times * _bytes(args[1] if func._schema.name == "aten::copy_" else result)
        elif kind == "elementwise":
            counts.bytes[kind] += self.times * _traffic(func, args, kwargs, result)
        return result


def count(call: Callable[[], object], tally: Tally) -> None:
    """Run `call` once, eagerly, and book what it does on `tally`."""
    with _eager(), _AttentionMarks(tally), tally:
        call()


def _eager() -> AbstractContextManager[object]:
    """Where anything may have been compiled, run what it was compiled from."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


class _AttentionMarks(TorchFunctionMode):
    """Attention that torch computes by its parts stays attention, as its operators do in a trace."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self._tally = tally

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside = func is torch.nn.functional.scaled_dot_product_attention
        self._tally.in_attention += inside
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._tally.in_attention -= inside


def _composite(func: Any) -> bool:
    """Whether it is made of other operators, in C++; torch's decompositions in Python are not what runs."""
    if func.namespace == "prim":  # a question about a fake tensor
        return False
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE))


def _precision(args: Any) -> str:
    first = next(leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))
    return DTYPES.get(first.dtype, str(first.dtype).removeprefix("torch."))


def _direction(func: Any, args: Any, result: Any) -> str | None:
    """Which way a copy between host and device goes."""
    name = func._schema.name
    if name not in ("aten::_to_copy", "aten::copy_"):
        return None
    source, target = (args[1], args[0]) if name == "aten::copy_" else (args[0], result)
    ends = source.device.type == "cpu", target.device.type == "cpu"
    return {(True, False): "host_to_device", (False, True): "device_to_host"}.get(ends)


def _traffic(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Bytes read and written once each; views and allocations move none."""
    name = func._schema.name
    written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    if "empty" in name or not written:
        return 0
    read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if not func._schema.is_mutable and any(_shares(written[0], tensor) for tensor in read):
        return 0
    return sum(map(_bytes, written)) + sum(map(_bytes, read[name in FILLS :]))


def _shares(one: torch.Tensor, other: torch.Tensor) -> bool:
    with contextlib.suppress(NotImplementedError, RuntimeError):  # sparse tensors and the like have no storage
        return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)
    return False


def _bytes(tensor: torch.Tensor) -> int:
    """What it occupies: an expanded tensor is read from fewer bytes than it has elements for."""
    size = tensor.numel() * tensor.element_size()
    with contextlib.suppress(NotImplementedError, RuntimeError):
        return min(size, tensor.untyped_storage().nbytes())
    return size
