"""Wan's transformer in chunks of tokens: one pass for keys and values, one for all that a token does by itself.

Restates `WanTransformerBlock` and `WanTransformer3DModel` of diffusers 0.42.1 over their own children, with their
casts. A block overwrites the hidden states that it is given: at 720p a second copy would be 0.7 GiB.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn
from torch.nn import functional

from framefit.passes.rows import Chunked, each

__all__ = ["hooks", "width"]

TEXT_TOKENS = 512
"""As many of the context's tokens, the last, are text in diffusers' attention; those before them are the photo's."""

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
        around = _keys(block, x, clock, rotary_emb, self.tokens(x))
        context = _context(block.attn2, encoder_hidden_states)

        def compute(rows: slice) -> None:
            part = x[:, rows]  # a view: what is added to it is in x
            shift, scale, gate = _modulation(block, clock, rows, slice(0, 3))
            normed = _modulated(block.norm1, part, shift, scale)
            _add(part, _attended(block.attn1, _rotated(block.attn1, "q", normed, rotary_emb, rows), [around]), gate)
            normed = block.norm2(part.float()).type_as(part)
            part += _attended(block.attn2, _heads(block.attn2, "q", normed), context)
            shift, scale, gate = _modulation(block, clock, rows, slice(3, 6))
            _add(part, block.ffn(_modulated(block.norm3, part, shift, scale)), gate)

        each(self.tokens(x), compute)
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
        clock = (clock if clock.ndim == 3 else clock.unsqueeze(1)).unsqueeze(2)
        out = x.new_empty(*x.shape[:2], model.config.out_channels * math.prod(model.config.patch_size))

        def compute(rows: slice) -> None:
            shift, scale = (model.scale_shift_table + _at(clock, rows)).unbind(2)
            out[:, rows] = model.proj_out(_modulated(model.norm_out, x[:, rows], shift, scale))

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
    block: Any, x: torch.Tensor, clock: torch.Tensor, rotation: Rotation, chunks: Sequence[slice]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of all tokens, each (B, S, heads, width)."""
    attn = block.attn1
    keys, values = (x.new_empty(*x.shape[:2], attn.heads, attn.kv_inner_dim // attn.heads) for _ in range(2))

    def compute(rows: slice) -> None:
        shift, scale, _ = _modulation(block, clock, rows, slice(0, 3))
        normed = _modulated(block.norm1, x[:, rows], shift, scale)
        keys[:, rows] = _rotated(attn, "k", normed, rotation, rows)
        values[:, rows] = attn.to_v(normed).unflatten(2, (attn.heads, -1))

    each(chunks, compute)
    return keys, values


def _context(attn: Any, context: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of the text, and where there are any of the photo's tokens."""
    if attn.add_k_proj is None:
        return [(_heads(attn, "k", context), attn.to_v(context).unflatten(2, (attn.heads, -1)))]
    photo, text = context[:, :-TEXT_TOKENS], context[:, -TEXT_TOKENS:]
    of_photo = attn.norm_added_k(attn.add_k_proj(photo)), attn.add_v_proj(photo)
    return [
        (_heads(attn, "k", text), attn.to_v(text).unflatten(2, (attn.heads, -1))),
        tuple(tensor.unflatten(2, (attn.heads, -1)) for tensor in of_photo),
    ]


def _attended(attn: Any, queries: torch.Tensor, to: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """What the queries find in each of `to`, added and projected, (B, rows, C)."""
    backend = attn.processor._attention_backend
    found = (dispatch_attention_fn(queries, keys, values, backend=backend) for keys, values in to)
    out: torch.Tensor = reduce(torch.add, (heads.flatten(2, 3).type_as(queries) for heads in found))
    for module in attn.to_out:
        out = module(out)
    return out


def _heads(attn: Any, which: str, rows: torch.Tensor) -> torch.Tensor:
    """Queries ("q") or keys ("k"), normalised, (B, rows, heads, width)."""
    project, norm = (attn.to_q, attn.norm_q) if which == "q" else (attn.to_k, attn.norm_k)
    heads: torch.Tensor = norm(project(rows)).unflatten(2, (attn.heads, -1))
    return heads


def _rotated(attn: Any, which: str, x: torch.Tensor, rotation: Rotation, rows: slice) -> torch.Tensor:
    """The same turned by their place in the video."""
    heads = _heads(attn, which, x)
    cos, sin = (table[:, rows, :, first::2] for first, table in enumerate(rotation))
    even, odd = heads[..., 0::2], heads[..., 1::2]
    rotated = torch.empty_like(heads)
    rotated[..., 0::2] = even * cos - odd * sin
    rotated[..., 1::2] = even * sin + odd * cos
    return rotated


def _modulation(block: Any, clock: torch.Tensor, rows: slice, which: slice) -> tuple[torch.Tensor, ...]:
    """Shift, scale and gate in fp32, each (B, 1 or rows, C); of `clock` (B, 1 or S, 6, C)."""
    table: torch.Tensor = block.scale_shift_table[:, which]
    return (table + _at(clock, rows)[:, :, which].float()).unbind(2)


def _at(clock: torch.Tensor, rows: slice) -> torch.Tensor:
    """The rows' timesteps, where each has its own."""
    return clock if clock.shape[1] == 1 else clock[:, rows]


def _modulated(norm: Any, part: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """In fp32 inside, as diffusers does; a shift and scale of all rows alike are the norm's own weights."""
    if scale.shape[:2] == (1, 1):
        normed = functional.layer_norm(part.float(), norm.normalized_shape, 1 + scale[0, 0], shift[0, 0], norm.eps)
    else:
        normed = norm(part.float()).mul_(1 + scale).add_(shift)
    return normed.type_as(part)


def _add(part: torch.Tensor, out: torch.Tensor, gate: torch.Tensor) -> None:
    """Add `out`, gated, in fp32."""
    part.copy_((out * gate).add_(part))


def _patches_to_video(x: torch.Tensor, grid: Sequence[int], patch: Sequence[int]) -> torch.Tensor:
    """(B, S, patch x C) -> (B, C, F, H, W)"""
    x = x.reshape(len(x), *grid, *patch, -1)
    return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
