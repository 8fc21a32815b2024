"""I2VGen-XL's UNet in chunks: what works within a frame over frames, what works along time over lines of pixels.

Where a group norm is over all frames its statistics come first, frame by frame, and are then joined. Restates
`TemporalConvLayer` and `TransformerTemporalModel` of diffusers 0.42.1 over their own children; of the others the own
forward is called with fewer frames. What stays whole are the skip connections.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModelOutput
from torch import nn

from framefit.passes.norms import changes, moments, normed
from framefit.passes.rows import Chunked, Frames, each, pieces

__all__ = ["hooks", "width"]


class Upsampled(Frames):
    """Four pixels from one."""

    grows = 4


class TemporalConvolution(Chunked):
    """Four convolutions along time, each after a norm over all frames: (B x F, C, H, W) -> the same shape."""

    def new_forward(self, layer: Any, hidden_states: torch.Tensor, num_frames: int = 1) -> torch.Tensor:
        x = hidden_states.reshape(-1, num_frames, *hidden_states.shape[1:])
        before, after = x, torch.empty_like(x, memory_format=torch.contiguous_format)
        for stage in (layer.conv1, layer.conv2, layer.conv3, layer.conv4):
            norm, *rest = stage
            statistics = _changes(norm, before)

            def compute(lines: slice, before: Any = before, statistics: Any = statistics, rest: Any = rest) -> None:
                part = normed(before[..., lines, :], *statistics).transpose(1, 2)
                for module in rest:
                    part = module(part)
                after[..., lines, :] = part.transpose(1, 2)  # over what it came from: no other pixel is read

            each(_lines(x, x.shape[2], self.elements), compute)
            before = after
        return after.add_(x).flatten(0, 1)


class TemporalTransformer(Chunked):
    """Attention along time, of each pixel by itself after a norm over all frames: (B x F, C, H, W), the same shape."""

    def new_forward(
        self,
        model: Any,
        hidden_states: torch.Tensor,
        num_frames: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        x = hidden_states.reshape(-1, num_frames, *hidden_states.shape[1:])
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        statistics = _changes(model.norm, x)

        def compute(lines: slice) -> None:
            part = x[..., lines, :]
            pixels = normed(part, *statistics).permute(0, 3, 4, 1, 2)
            rows = model.proj_in(pixels.flatten(0, 2))
            for block in model.transformer_blocks:
                rows = block(rows, cross_attention_kwargs=cross_attention_kwargs)
            rows = model.proj_out(rows).unflatten(0, pixels.shape[:3])
            out[..., lines, :] = rows.permute(0, 3, 4, 1, 2) + part

        each(_lines(x, max(x.shape[2], model.num_attention_heads * model.attention_head_dim), self.elements), compute)
        out = out.flatten(0, 1)
        return TransformerTemporalModelOutput(sample=out) if return_dict else (out,)


OF_CLASS: dict[str, type[Chunked]] = {
    "ResnetBlock2D": Frames, "Transformer2DModel": Frames, "Downsample2D": Frames, "Upsample2D": Upsampled,
    "TemporalConvLayer": TemporalConvolution, "TransformerTemporalModel": TemporalTransformer,
}  # fmt: skip


def width(model: Any) -> int:
    """Of a row: a pixel of a frame on the first level."""
    return int(model.conv_in.out_channels)


def hooks(model: Any) -> Iterator[tuple[nn.Module, type[Chunked]]]:
    """What works by rows, and how."""
    for module in model.modules():
        if hook := OF_CLASS.get(type(module).__name__):
            yield module, hook


def _lines(x: torch.Tensor, width: int, elements: int) -> list[slice]:
    """Lines of pixels through all frames of (B, F, C, H, W)."""
    batch, frames, _, height, across = x.shape
    return pieces(height, elements // (batch * frames * width * across))


def _changes(norm: nn.GroupNorm, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of (B, F, C, H, W), over all frames: what each channel is multiplied by and moved by, (B, 1, C, 1, 1) each."""
    batch, frames = x.shape[:2]
    variances, means = moments(x.reshape(batch, frames, norm.num_groups, -1), 3)
    scale, shift = changes(norm, (variances.transpose(1, 2), means.transpose(1, 2)))
    return scale[:, None, :, None, None], shift[:, None, :, None, None]
