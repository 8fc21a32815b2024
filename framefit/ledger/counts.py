"""FLOPs and bytes of one call by kind of work, counted operator by operator with torch's own formulas.

A multiplication and an addition are two FLOPs. Compiled code is counted as the eager operators that it was made of, so
that a fused kernel can seem to move more bytes a second than the memory gives: what is above 100 % was saved by fusing.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from framefit.ledger.kinds import Kind, op_kind
from framefit.ledger.operators import Share, occupied, precision_of, row_norm, shape_of, shares, traffic
from framefit.rates import Quantity, Sort

__all__ = ["Counts", "Tally", "count"]

aten = torch.ops.aten

COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd

FORMULAS: dict[Any, Callable[..., int]] = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
}
"""Operator -> its FLOPs; torch 2.13 leaves the CPU's flash attention out."""

NORMS = {torch.rms_norm, torch.nn.functional.rms_norm}
"""One kernel on a card, made of others on the CPU."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What one phase has to do."""

    flops: Counter[tuple[Kind, str]] = field(default_factory=Counter)
    """(kind, precision) -> FLOPs, as in ("matmul", "bf16")."""
    bytes: Counter[str] = field(default_factory=Counter)
    """"elementwise": read and written; "host_to_device", "device_to_host": moved."""
    work: Counter[tuple[Sort, Quantity]] = field(default_factory=Counter)
    """What seconds depend on: of every sort of operator its calls, amount and bytes."""
    shapes: set[int] = field(default_factory=set)
    """Of convolutions, each of which a process has to meet once; of all that came before, too."""

    def copy(self) -> Counts:
        return Counts(self.flops.copy(), self.bytes.copy(), self.work.copy(), self.shapes)

    def add(self, other: Counts, times: int = 1, of: int = 1) -> None:
        """What was counted `of` times, now `times`."""
        pairs: tuple[tuple[Counter[Any], Counter[Any]], ...] = (
            (self.flops, other.flops), (self.bytes, other.bytes), (self.work, other.work),
        )  # fmt: skip
        for own, more in pairs:
            own.update({key: n * times // of for key, n in more.items()})

    def since(self, before: Counts) -> Counts:
        """What came after it was `before`."""
        return Counts(self.flops - before.flops, self.bytes - before.bytes, self.work - before.work)


class Tally(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what runs inside it, for the phase that is open."""

    def __init__(self, *, card: bool = False) -> None:
        """
        Args:
            card: whether what runs stands for what a card runs, which has norms in one piece.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.card = card
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

    def book(self, made_of: Iterable[Share]) -> None:
        """An operator's work."""
        work = self.counts.work
        for i, (sort, amount, bytes) in enumerate(made_of):
            work[sort, "calls"] += self.times * (i == 0)
            work[sort, "amount"] += self.times * amount
            work[sort, "bytes"] += self.times * bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # half of all questions about fake tensors
            return args[0].fake_device
        if func._overloadpacket not in FORMULAS and _composite(func):  # in inference mode they arrive whole
            with self:
                return func._op_dk(COMPOSITE, *args, **kwargs)
        result = func(*args, **kwargs)
        if not self.times:  # a part of what was booked as one
            return result
        counts, flops = self.counts, 0
        bytes = traffic(func, args, kwargs, result)
        kind = "attention" if self.in_attention else op_kind(func._schema.name) or "elementwise"
        if formula := FORMULAS.get(func._overloadpacket):
            flops = formula(*args, **kwargs, out_val=result)
            counts.flops[kind, precision_of(args)] += self.times * flops
            if kind == "convolution":
                counts.shapes.add(shape_of(args))
        elif (way := _direction(func, args, result)) is not None:
            counts.bytes[way] += self.times * occupied(args[1] if func._schema.name == "aten::copy_" else result)
            return result
        elif kind == "elementwise":
            counts.bytes[kind] += self.times * bytes
        self.book(shares(func, args, kwargs, result, flops, bytes))
        return result


def count(call: Callable[[], object], tally: Tally) -> None:
    """Run `call` once, eagerly, and book what it does on `tally`."""
    with _eager(), _Marks(tally), tally:
        call()


def _eager() -> AbstractContextManager[object]:
    """Where anything may have been compiled, run what it was compiled from."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


class _Marks(TorchFunctionMode):
    """Attention that torch computes by its parts stays attention, as its operators do in a trace; norms stay whole."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self._tally = tally

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tally = self._tally
        if tally.card and func in NORMS and _fused(*args, **(kwargs or {})):
            return self._whole(func, args, kwargs or {})
        inside = func is torch.nn.functional.scaled_dot_product_attention
        by_parts = inside and tally.card and _by_parts(*args, **(kwargs or {}))
        tally.in_attention += inside
        try:
            with sdpa_kernel(SDPBackend.MATH) if by_parts else nullcontext():
                return func(*args, **(kwargs or {}))
        finally:
            tally.in_attention -= inside

    def _whole(self, norm: Any, args: Any, kwargs: Any) -> torch.Tensor:
        tally, times = self._tally, self._tally.times
        x = args[0] if args else kwargs["input"]
        tally.times = 0
        try:
            result: torch.Tensor = _one_kernel(x) if isinstance(x, FakeTensor) else norm(*args, **kwargs)
        finally:
            tally.times = times
        tally.counts.bytes["elementwise"] += times * (x.nbytes + result.nbytes)
        tally.book(row_norm(x, x.nbytes + result.nbytes))
        return result


def _fused(input: Any, normalized_shape: Any, weight: torch.Tensor | None = None, eps: Any = None) -> bool:
    """Whether a card's kernel takes the norm whole, and not by parts in fp32 as a CPU does: its weight is in the
    input's precision (aten/src/ATen/native/layer_norm.cpp, rms_norm_symint)."""
    return weight is None or weight.dtype == input.dtype


def _one_kernel(x: torch.Tensor) -> torch.Tensor:
    """What it makes of the fake `x`: a result, a number for each row, and of an input with gaps a copy."""
    x = x.contiguous()
    made = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    return made[0]


def _by_parts(query: Any, key: Any, value: Any, attn_mask: torch.Tensor | None = None, *_: Any, **__: Any) -> bool:
    """Whether no fused kernel of a card takes it: all want rows of the mask whole in memory, as a position bias is not
    whose heads were its last axis (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, stride(-1) == 1). By parts it
    is computed in fp32, scores and all."""
    return attn_mask is not None and attn_mask.shape[-1] > 1 and attn_mask.stride(-1) != 1


@cache
def _composite(func: Any) -> bool:
    """Whether it is made of other operators, in C++; torch's decompositions in Python are not what runs."""
    if func.namespace == "prim":  # a question about a fake tensor
        return False
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), COMPOSITE))


def _direction(func: Any, args: Any, result: Any) -> str | None:
    """Which way a copy between host and device goes."""
    name = func._schema.name
    if name not in ("aten::_to_copy", "aten::copy_"):
        return None
    source, target = (args[1], args[0]) if name == "aten::copy_" else (args[0], result)
    ends = source.device.type == "cpu", target.device.type == "cpu"
    return {(True, False): "host_to_device", (False, True): "device_to_host"}.get(ends)
