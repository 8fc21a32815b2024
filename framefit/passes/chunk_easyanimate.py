"""EasyAnimate's transformer in chunks of tokens: keys and values of text and video first, then each token's own work.

Restates `EasyAnimateTransformerBlock` of diffusers 0.42.1 over its own children. A block overwrites the video's hidden
states that it is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn
from torch.nn import functional

from framefit.passes.rows import Chunked, Tokens, each

__all__ = ["hooks", "width"]

Rotation = tuple[torch.Tensor, ...]
"""Cosines and sines, (S, head width)."""


class Block(Chunked):
    """Video (B, S, C) and text (B, T, C) -> the video's tensor with what comes after the block in it, and new text."""

    def new_forward(
        self,
        block: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Rotation | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = hidden_states.contiguous()  # the first block's is a transposed picture
        text = encoder_hidden_states.clone()
        before = text.shape[1]
        words = _Part(_text_side(block), text, None, slice(before))

        def part(rows: slice) -> _Part:
            rotation = None if image_rotary_emb is None else tuple(table[rows] for table in image_rotary_emb)
            return _Part(_video_side(block), x[:, rows], rotation, slice(before + rows.start, before + rows.stop))

        room = x.new_empty(2, len(x), before + x.shape[1], block.attn1.heads, x.shape[2] // block.attn1.heads)
        words.keys(block, temb, room)
        each(self.tokens(x), lambda rows: part(rows).keys(block, temb, room))
        words.go(block, temb, room)
        each(self.tokens(x), lambda rows: part(rows).go(block, temb, room))
        return x, text


def width(model: Any) -> int:
    """Of a row."""
    return int(model.proj.out_channels)


def hooks(model: Any) -> Iterator[tuple[nn.Module, type[Chunked]]]:
    """What works by rows, and how."""
    yield from ((block, Block) for block in model.transformer_blocks)
    yield from ((norm, Tokens) for norm in (model.norm_final, model.norm_out))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Side:
    """The layers of a block that the video's tokens go through, or the text's."""

    index: int
    """Where they are among what the norms take and give: 0 the video's, 1 the text's."""
    heads: int
    q: tuple[nn.Module, nn.Module | None]
    """Projection, and norm of each head."""
    k: tuple[nn.Module, nn.Module | None]
    v: nn.Module
    out: tuple[nn.Module, ...]
    ff: nn.Module


@dataclass(eq=False, slots=True)
class _Part:
    """Some tokens of one side."""

    side: _Side
    rows: torch.Tensor
    """(B, rows, C)"""
    rotation: Rotation | None
    at: slice
    """Where they are among all keys."""

    def keys(self, block: Any, temb: torch.Tensor, room: torch.Tensor) -> None:
        """Put their keys and values among all, (2, B, T + S, heads, width)."""
        normed, _ = self._normed(block.norm1, temb)
        room[0, :, self.at] = self._heads(self.side.k, normed)
        room[1, :, self.at] = self.side.v(normed).unflatten(2, (self.side.heads, -1))

    def go(self, block: Any, temb: torch.Tensor, room: torch.Tensor) -> None:
        """Through the block, in their own memory."""
        normed, gate = self._normed(block.norm1, temb)
        self.rows += gate * self._attended(self._heads(self.side.q, normed), *room)
        normed, gate = self._normed(block.norm2, temb)
        out = self.side.ff(normed)
        self.rows += gate * (out if block.norm3 is None else block.norm3(out))

    def _normed(self, norm: nn.Module, temb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised and modulated; and their gate (B, 1, C)."""
        none = self.rows[:, :0]
        told = norm(*((self.rows, none) if self.side.index == 0 else (none, self.rows)), temb)
        return told[self.side.index], told[self.side.index + 2].unsqueeze(1)

    def _heads(self, layers: Sequence[Any], normed: torch.Tensor) -> torch.Tensor:
        """Queries or keys, (B, rows, heads, width)."""
        project, norm = layers
        heads: torch.Tensor = project(normed).unflatten(2, (self.side.heads, -1))
        heads = heads if norm is None else norm(heads)
        return heads if self.rotation is None else apply_rotary_emb(heads, self.rotation, sequence_dim=1)

    def _attended(self, *heads: torch.Tensor) -> torch.Tensor:
        """What queries find in keys and values, (B, rows, C)."""
        queries, keys, values = (tensor.transpose(1, 2) for tensor in heads)
        found = functional.scaled_dot_product_attention(queries, keys, values)
        found = found.transpose(1, 2).flatten(2, 3).to(heads[0].dtype)
        for module in self.side.out:
            found = module(found)
        return found


def _video_side(block: Any) -> _Side:
    attn = block.attn1
    return _Side(
        index=0, heads=attn.heads, q=(attn.to_q, attn.norm_q), k=(attn.to_k, attn.norm_k), v=attn.to_v,
        out=tuple(attn.to_out), ff=block.ff,
    )  # fmt: skip


def _text_side(block: Any) -> _Side:
    """Layers of its own in a dual-stream block; the video's in another, where diffusers projects no text output."""
    attn, ff = block.attn1, block.ff if block.txt_ff is None else block.txt_ff
    out = () if attn.to_add_out is None else (attn.to_add_out,)
    if attn.add_q_proj is None:
        return replace(_video_side(block), index=1, out=out, ff=ff)
    return _Side(
        index=1, heads=attn.heads, q=(attn.add_q_proj, attn.norm_added_q), k=(attn.add_k_proj, attn.norm_added_k),
        v=attn.add_v_proj, out=out, ff=ff,
    )  # fmt: skip
