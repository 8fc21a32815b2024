"""Rows in pieces, and hooks that compute a module's forward piece by piece. Knows no model."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers.hooks import ModelHook
from torch import nn
from torch.utils._pytree import tree_map_only

__all__ = ["Chunked", "Frames", "Tokens", "pieces"]


def pieces(total: int, most: int) -> list[slice]:
    """`total` rows as the fewest slices of at most `most` rows each; they differ by one row at most."""
    count = max(1, -(-total // max(1, most)))
    return [slice(total * i // count, total * (i + 1) // count) for i in range(count)]


class Chunked(ModelHook):  # type: ignore[misc]
    """Computes a module's forward in chunks."""

    def __init__(self, elements: int) -> None:
        """`elements`: the most rows of a chunk, times their width."""
        super().__init__()
        self.elements = elements


class _Sliced(Chunked):
    """Calls a module on slices of its first argument, where it computes each row by itself anyway."""

    axis: ClassVar[int]
    grows: ClassVar[int] = 1
    """How many times as large as its input what it computes is."""

    def new_forward(self, module: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        forward, total, out = self.fn_ref.original_forward, x.shape[self.axis], None
        chunks = pieces(total, self.elements * total // (x.numel() * self.grows))
        if len(chunks) == 1:
            return forward(x, *args, **kwargs)
        for rows in chunks:
            others, named = self._others((args, kwargs), rows)
            result = forward(x.narrow(self.axis, rows.start, rows.stop - rows.start), *others, **named)
            piece = result[0] if isinstance(result, tuple) else result
            if out is None:
                out = piece.new_empty(*piece.shape[: self.axis], total, *piece.shape[self.axis + 1 :])
            out.narrow(self.axis, rows.start, rows.stop - rows.start).copy_(piece)
        return (out,) if isinstance(result, tuple) else out

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
