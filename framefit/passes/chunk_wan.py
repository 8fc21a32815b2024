"""Wan's transformer in chunks of tokens: one pass for keys and values, one that attends to them, one for the rest.

Restates `WanTransformerBlock` and `WanTransformer3DModel` of diffusers 0.42.1 over their own children, with their
casts. A block overwrites the hidden states that it is given: at 720p a second copy would be 0.7 GiB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn
from torch.nn import functional

from framefit.passes.rows import Chunked, each, pieces

__all__ = ["hooks", "width"]

TEXT_TOKENS = 512
"""As many of the context's tokens, the last, are text in diffusers' attention; those before them are the photo's."""

Modulation = Callable[[slice], tuple[torch.Tensor, ...]]
"""Rows -> what their norm is shifted and scaled by, or what is added to them gated by: fp32, (B, 1 or rows, C) each."""

FEW = 8192 * 5120
"""Numbers that are taken at once where the maths is in fp32 and no matrix product, so that a chunk can be larger."""

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, (1, S, 1, head width)."""


class Block(Chunked):
    """(B, S, C) -> the same tensor with what comes after the block in it."""

    def new_forward(
        self,
        block: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        rotary_emb: Rotation,
    ) -> torch.Tensor:
        x, clock = hidden_states, temb if temb.ndim == 4 else temb.unsqueeze(1)
        chunks = self.tokens(x)
        before, gate, between, gate_after = (
            _modulation(block.scale_shift_table, clock, slice(*which)) for which in ((0, 2), (2, 3), (3, 5), (5, 6))
        )
        around = [_keys(block, x, before, rotary_emb, chunks)]

        def attend(rows: slice) -> None:
            turn = _at(rotary_emb, rows)
            _add(x, rows, _attended(block.attn1, _modulated(block.norm1, x, rows, before), around, turn), gate)

        each(chunks, attend)
        around.clear()  # what follows is larger, and needs none of it
        context = _context(block.attn2, encoder_hidden_states)

        def finish(rows: slice) -> None:
            x[:, rows] += _attended(block.attn2, _by_few(x, rows, lambda few: block.norm2(x[:, few].float())), context)
            _add(x, rows, block.ffn(_modulated(block.norm3, x, rows, between)), gate_after)

        each(chunks, finish)
        return x


class Model(Chunked):
    """What is around the blocks, with the final norm and projection in chunks."""

    def new_forward(
        self,
        model: Any,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_image: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        grid = [side // of for side, of in zip(hidden_states.shape[2:], model.config.patch_size, strict=True)]
        rotation = model.rope(hidden_states)
        x = model.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()
        clock, modulation, text, image = model.condition_embedder(
            timestep.flatten(), encoder_hidden_states, encoder_hidden_states_image,
            timestep_seq_len=timestep.shape[1] if timestep.ndim == 2 else None,
        )  # fmt: skip
        context = text if image is None else torch.cat([image, text], dim=1)
        for block in model.blocks:
            x = block(x, context, modulation.unflatten(-1, (6, -1)), rotation)
        video = _patches_to_video(self._head(model, x, clock), grid, model.config.patch_size)
        return Transformer2DModelOutput(sample=video) if return_dict else (video,)

    def _head(self, model: Any, x: torch.Tensor, clock: torch.Tensor) -> torch.Tensor:
        """(B, S, out channels x patch)"""
        clock = (clock if clock.ndim == 3 else clock.unsqueeze(1)).unsqueeze(2).expand(-1, -1, 2, -1)
        modulation = _modulation(model.scale_shift_table, clock, slice(None))
        out = x.new_empty(*x.shape[:2], model.config.out_channels * math.prod(model.config.patch_size))

        def compute(rows: slice) -> None:
            out[:, rows] = model.proj_out(_modulated(model.norm_out, x, rows, modulation))

        each(self.tokens(x), compute)
        return out


def width(model: Any) -> int:
    """Of a row."""
    return int(model.patch_embedding.out_channels)


def hooks(model: Any) -> Iterator[tuple[nn.Module, type[Chunked]]]:
    """What works by rows, and how."""
    yield model, Model
    yield from ((block, Block) for block in model.blocks)


def _keys(
    block: Any, x: torch.Tensor, modulation: Modulation, rotation: Rotation, chunks: Sequence[slice]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of all tokens, each (B, S, heads, width)."""
    attn = block.attn1
    keys, values = (x.new_empty(*x.shape[:2], attn.heads, attn.kv_inner_dim // attn.heads) for _ in range(2))

    def compute(rows: slice) -> None:
        normed = _modulated(block.norm1, x, rows, modulation)
        keys[:, rows] = _heads(attn, "k", normed)
        values[:, rows] = _heads(attn, "v", normed)
        _normalise(keys[:, rows], attn.norm_k, _at(rotation, rows))

    each(chunks, compute)
    return keys, values


def _at(rotation: Rotation, rows: slice) -> Rotation:
    cos, sin = rotation
    return cos[:, rows], sin[:, rows]


def _context(attn: Any, context: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of the text, and where there are any of the photo's tokens."""
    if attn.add_k_proj is None:
        return [(_normalise(_heads(attn, "k", context), attn.norm_k), _heads(attn, "v", context))]
    photo, text = context[:, :-TEXT_TOKENS], context[:, -TEXT_TOKENS:]
    of_photo = attn.norm_added_k(attn.add_k_proj(photo)), attn.add_v_proj(photo)
    return [
        (_normalise(_heads(attn, "k", text), attn.norm_k), _heads(attn, "v", text)),
        tuple(tensor.unflatten(2, (attn.heads, -1)) for tensor in of_photo),
    ]


def _attended(
    attn: Any, x: torch.Tensor, to: Sequence[tuple[torch.Tensor, torch.Tensor]], rotation: Rotation | None = None
) -> torch.Tensor:
    """What the tokens in `x` find in each of `to`, added and projected, (B, rows, C)."""
    queries = _heads(attn, "q", x)
    del x  # each is let go before the next is made
    _normalise(queries, attn.norm_q, rotation)
    backend = attn.processor._attention_backend
    found = (dispatch_attention_fn(queries, keys, values, backend=backend) for keys, values in to)
    out: torch.Tensor = reduce(torch.add, (heads.flatten(2, 3).type_as(queries) for heads in found))
    del queries
    for module in attn.to_out:
        out = module(out)
    return out


def _heads(attn: Any, which: str, x: torch.Tensor) -> torch.Tensor:
    """Queries ("q"), keys ("k") or values ("v") of the tokens in `x`, (B, rows, heads, width)."""
    made: torch.Tensor = getattr(attn, f"to_{which}")(x).unflatten(2, (attn.heads, -1))
    return made


def _normalise(heads: torch.Tensor, norm: Any, rotation: Rotation | None = None) -> torch.Tensor:
    """Queries or keys in place; by the rows' own `rotation` turned by their place in the video, too."""

    def compute(few: slice) -> None:
        part = heads[:, few]
        normed = norm(part.flatten(2)).view_as(part)
        if rotation is None:
            part.copy_(normed)
            return
        cos, sin = (table[:, few, :, first::2] for first, table in enumerate(rotation))
        even, odd = normed[..., 0::2], normed[..., 1::2]
        part[..., 0::2] = even * cos - odd * sin
        part[..., 1::2] = even * sin + odd * cos

    each(_few(slice(0, heads.shape[1]), heads), compute)
    return heads


def _modulation(table: torch.Tensor, clock: torch.Tensor, which: slice) -> Modulation:
    """Of (1, N, C) and the timestep's (B, 1 or S, N, C), `which` of the N."""
    table, clock = table[:, which].float(), clock[:, :, which]
    if clock.shape[1] > 1:
        return lambda rows: (table + clock[:, rows]).unbind(2)
    alike = (table + clock).unbind(2)
    return lambda rows: alike


def _modulated(norm: Any, x: torch.Tensor, rows: slice, modulation: Modulation) -> torch.Tensor:
    """In fp32 inside, as diffusers does; a shift and scale of all rows alike are the norm's own weights."""

    def compute(few: slice) -> torch.Tensor:
        shift, scale = modulation(few)
        part = x[:, few].float()
        if scale.shape[:2] == (1, 1):
            return functional.layer_norm(part, norm.normalized_shape, 1 + scale[0, 0], shift[0, 0], norm.eps)
        normed: torch.Tensor = norm(part)
        return normed.mul_(1 + scale).add_(shift)

    return _by_few(x, rows, compute)


def _add(x: torch.Tensor, rows: slice, out: torch.Tensor, modulation: Modulation) -> None:
    """Add `out`, gated, to the rows in fp32."""

    def compute(few: slice) -> None:
        (gate,), part = modulation(few), x[:, few]
        part.copy_((out[:, few.start - rows.start : few.stop - rows.start] * gate).add_(part))

    each(_few(rows, x), compute)


def _by_few(x: torch.Tensor, rows: slice, compute: Callable[[slice], torch.Tensor]) -> torch.Tensor:
    """What `compute` gives for the rows of `x`, a few at a time, because that is in fp32; in the precision of `x`."""
    out = x.new_empty(x.shape[0], rows.stop - rows.start, x.shape[2])

    def keep(few: slice) -> None:
        out[:, few.start - rows.start : few.stop - rows.start] = compute(few)

    each(_few(rows, x), keep)
    return out


def _few(rows: slice, x: torch.Tensor) -> list[slice]:
    """The rows in pieces, each of at most `FEW` numbers of (B, rows, ...) as `x`."""
    count = rows.stop - rows.start
    most = FEW // (x.shape[0] * math.prod(x.shape[2:]))
    return [slice(rows.start + few.start, rows.start + few.stop) for few in pieces(count, most)]


def _patches_to_video(x: torch.Tensor, grid: Sequence[int], patch: Sequence[int]) -> torch.Tensor:
    """(B, S, patch x C) -> (B, C, F, H, W)"""
    x = x.reshape(len(x), *grid, *patch, -1)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
