"""Rows in pieces, and hooks that compute a module's forward piece by piece. Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, ClassVar

import torch
from diffusers.hooks import ModelHook
from torch import nn
from torch.utils._pytree import tree_map_only

__all__ = ["LOOP", "Chunked", "Frames", "Tokens", "each", "pieces"]

Loop = Callable[[Sequence[slice], Callable[[slice], None]], None]


def pieces(total: int, most: int) -> list[slice]:
    """`total` rows as the fewest slices of at most `most` rows each, as long as each other but for the last."""
    count = max(1, -(-total // max(1, most)))
    length = -(-total // count)
    return [slice(start, min(start + length, total)) for start in range(0, total, length)]


def each(chunks: Sequence[slice], compute: Callable[[slice], None]) -> None:
    """`compute` every chunk, in order, into memory that is there before."""
    LOOP.get()(chunks, compute)


def _all(chunks: Sequence[slice], compute: Callable[[slice], None]) -> None:
    for rows in chunks:
        compute(rows)


LOOP: ContextVar[Loop] = ContextVar("LOOP", default=_all)
"""How the chunks are gone through: a dry run need not see each of many equal ones."""


class Chunked(ModelHook):  # type: ignore[misc]
    """Computes a module's forward in chunks."""

    def __init__(self, elements: int) -> None:
        """`elements`: the most rows of a chunk, times their width."""
        super().__init__()
        self.elements = elements

    def tokens(self, x: torch.Tensor) -> list[slice]:
        """Of (B, tokens, width), on axis 1."""
        return pieces(x.shape[1], self.elements // (x.shape[0] * x.shape[2]))


class _Sliced(Chunked):
    """Calls a module on slices of its first argument, where it computes each row by itself anyway."""

    axis: ClassVar[int]
    grows: ClassVar[int] = 1
    """How many times as large as its input what it computes is."""

    def new_forward(self, module: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        forward, total = self.fn_ref.original_forward, x.shape[self.axis]
        chunks = pieces(total, self.elements * total // (x.numel() * self.grows))
        if len(chunks) == 1:
            return forward(x, *args, **kwargs)
        out: list[torch.Tensor] = []
        alone = True

        def compute(rows: slice) -> None:
            nonlocal alone
            others, named = self._others((args, kwargs), rows)
            result = forward(_narrow(x, self.axis, rows), *others, **named)
            alone = isinstance(result, torch.Tensor)
            piece = result if alone else result[0]
            if not out:
                out.append(piece.new_empty(*piece.shape[: self.axis], total, *piece.shape[self.axis + 1 :]))
            _narrow(out[0], self.axis, rows).copy_(piece)

        each(chunks, compute)
        return out[0] if alone else (out[0],)

    def _others(self, arguments: Any, rows: slice) -> Any:
        return arguments


class Frames(_Sliced):
    """(frames, ...): every other tensor is of frames too."""

    axis = 0

    def _others(self, arguments: Any, rows: slice) -> Any:
        return tree_map_only(torch.Tensor, lambda tensor: tensor[rows], arguments)


class Tokens(_Sliced):
    """(B, tokens, width): every other tensor is of all of them."""

    axis = 1


def _narrow(x: torch.Tensor, axis: int, rows: slice) -> torch.Tensor:
    return x.narrow(axis, rows.start, rows.stop - rows.start)
