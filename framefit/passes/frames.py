"""Layers of causal VAEs over one or two frames at a time, whose memories are the frames themselves: nothing is copied.

Each hook restates the forward of a module of diffusers 0.42 over the module's own children.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers.hooks import ModelHook
from diffusers.models.autoencoders.autoencoder_kl_magvit import (
    EasyAnimateCausalConv3d,
    EasyAnimateResidualBlock3D,
    EasyAnimateUpsampler3D,
)
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanCausalConv3d,
    WanResample,
    WanResidualBlock,
    WanRMS_norm,
)
from torch import nn
from torch.nn import functional

from framefit.families.magvit_vae import SEEN
from framefit.passes.norms import changes, moments, normed
from framefit.passes.strips import enlarged, halved, over_frames

__all__ = ["hooked"]

SUMMED = 255
"""Elements that a sum on a card never shares out (aten/src/ATen/native/cuda/Reduce.cuh, max_values_per_thread)."""


def hooked(vae: nn.Module) -> Iterator[tuple[nn.Module, ModelHook]]:
    """The modules of a VAE that compute by these hooks."""
    for module in vae.modules():
        if kind := HOOKS.get(type(module)):
            yield module, kind()
        if isinstance(module, WanResample) and isinstance(module.resample, nn.Sequential):
            yield module.resample, _WanResampling()


class _MagvitConvolution(ModelHook):  # type: ignore[misc]
    """Before the first frame was that frame. Of a convolution that halves time, fewer are remembered.

    Frames become channels-last here and stay so in all layers that follow: kernels find them as they read them.
    """

    def new_forward(self, module: EasyAnimateCausalConv3d, x: torch.Tensor, scale: int = 1) -> torch.Tensor:
        own = _frames(x.contiguous(memory_format=torch.channels_last_3d))
        kept = [pixels.movedim(-1, 1) for pixels in module.prev_features or ()]
        seen = [*(kept or own[:1] * (module.kernel_size[0] - 1)), *own]
        module.prev_features = _kept(module, [frame.movedim(1, -1) for frame in seen])
        return over_frames(module, seen, module.padding[1:], scale)


class _MagvitResidual(ModelHook):  # type: ignore[misc]
    """What it takes is added in place to what it makes of it."""

    def new_forward(self, module: EasyAnimateResidualBlock3D, x: torch.Tensor) -> torch.Tensor:
        shortcut = module.shortcut(x)
        for norm, convolution in ((module.norm1, module.conv1), (module.norm2, module.conv2)):
            x = module.nonlinearity(norm(x.transpose(1, 2)[0]))
            x = convolution(x.transpose(0, 1)[None])
        x = x.add_(shortcut)
        return x if module.output_scale_factor == 1 else x.div_(module.output_scale_factor)


class _MagvitNorm(ModelHook):  # type: ignore[misc]
    """(F, C, H, W), every frame by itself. The parts of a group are pieces of its channels' rows, so short and so many
    that a card sums up each by itself: sums of longer ones take half a GiB to meet in."""

    def new_forward(self, norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
        width = x.shape[3]
        short = next(size for size in range(min(width, SUMMED), 0, -1) if width % size == 0)
        count, groups = len(x), norm.num_groups
        parts = moments(x.movedim(1, -1).reshape(count, -1, short, x.shape[1]), 2)  # (F, parts, C)
        variances, means = (p.view(*p.shape[:2], groups, -1).transpose(1, 2).flatten(2) for p in parts)
        scale, shift = changes(norm, (variances, means))
        return normed(x, scale[..., None, None], shift[..., None, None])


class _MagvitUpsampler(ModelHook):  # type: ignore[misc]
    """Its convolution enlarges what it sees, and remembers it small. Where one frame becomes two, they share memory."""

    def new_forward(self, module: EasyAnimateUpsampler3D, x: torch.Tensor) -> torch.Tensor:
        x = module.conv(x, scale=2)
        if not module.temporal_upsample:
            return x
        seen, module.prev_features = module.prev_features, SEEN
        return x if seen is None else x.expand(-1, -1, 2 * x.shape[2], -1, -1)


class _WanConvolution(ModelHook):  # type: ignore[misc]
    """Before the first frame is nothing. What is given to remember are frames, or one tensor of them.

    Frames are channels-last from the first convolution on, as EasyAnimate's are.
    """

    def new_forward(self, module: WanCausalConv3d, x: torch.Tensor, cache_x: Any = None) -> torch.Tensor:
        columns, _, rows, _, before, _ = module._padding
        past = _frames(cache_x) if isinstance(cache_x, torch.Tensor) else cache_x or []
        past = past if before else []
        return over_frames(module, [*[None] * (before - len(past)), *past, *_frames(x)], (rows, columns))


class _WanResidual(ModelHook):  # type: ignore[misc]
    """Of as many frames at once as it remembers: then these are one tensor, and no other frame is in its memory."""

    def new_forward(
        self, module: WanResidualBlock, x: torch.Tensor, feat_cache: list[Any], feat_idx: list[int]
    ) -> torch.Tensor:
        shortcut = module.conv_shortcut(x)
        for norm, convolution in ((module.norm1, module.conv1), (module.norm2, module.conv2)):
            x = module.nonlinearity(norm(x))
            before = feat_cache[feat_idx[0]] or [None] * (convolution.kernel_size[0] - 1)
            feat_cache[feat_idx[0]] = [*before, *_frames(x)][-len(before) :]
            feat_idx[0] += 1
            x = convolution(x, before)
            del before
        return x.add_(shortcut)


class _WanNorm(ModelHook):  # type: ignore[misc]
    """In one piece of memory, and its two factors as one."""

    def new_forward(self, module: WanRMS_norm, x: torch.Tensor) -> torch.Tensor:
        half = x.dtype in (torch.float16, torch.bfloat16)
        out = functional.normalize(x.float() if half else x, dim=1).mul_(module.gamma * module.scale)
        if isinstance(module.bias, torch.Tensor):
            out.add_(module.bias)
        return out.to(x.dtype)


class _WanResampling(ModelHook):  # type: ignore[misc]
    """Twice as large or half as large, and a convolution."""

    def new_forward(self, module: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        first, convolution = module
        assert isinstance(convolution, nn.Conv2d)
        x = x.contiguous(memory_format=torch.channels_last)
        if isinstance(first, nn.ZeroPad2d):
            return halved(convolution, x)
        return enlarged(first, convolution, x)


HOOKS: dict[type[nn.Module], type[ModelHook]] = {
    EasyAnimateCausalConv3d: _MagvitConvolution,
    EasyAnimateResidualBlock3D: _MagvitResidual,
    EasyAnimateUpsampler3D: _MagvitUpsampler,
    nn.GroupNorm: _MagvitNorm,
    WanCausalConv3d: _WanConvolution,
    WanRMS_norm: _WanNorm,
    WanResidualBlock: _WanResidual,
}


def _frames(x: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.split(x.contiguous(memory_format=torch.channels_last_3d), 1, dim=2))


def _kept(convolution: nn.Conv3d, seen: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Of the frames that it has seen, those that it needs again."""
    kept = convolution.stride[0] - convolution.kernel_size[0]
    return [frame if frame is None else frame.contiguous() for frame in seen[kept:]]
