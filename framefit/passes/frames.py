"""Layers of causal VAEs over one frame at a time, whose memories are the frames themselves: nothing is copied.

Each hook restates the forward of a module of diffusers 0.42 over the module's own children.
"""

from __future__ import annotations

import torch
from diffusers.hooks import ModelHook
from diffusers.models.autoencoders.autoencoder_kl_magvit import EasyAnimateCausalConv3d, EasyAnimateUpsampler3D
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import nn
from torch.nn import functional

from framefit.families.magvit_vae import SEEN
from framefit.passes.strips import convolved

__all__ = ["HOOKS"]


class _MagvitConvolution(ModelHook):  # type: ignore[misc]
    """Before the first frame was that frame. Of a convolution that halves time, fewer are remembered."""

    def new_forward(self, module: EasyAnimateCausalConv3d, x: torch.Tensor) -> torch.Tensor:
        own = list(torch.split(x, 1, dim=2))
        over, stride = module.kernel_size[0], module.stride[0]
        seen = [*(module.prev_features or own[:1] * (over - 1)), *own]
        module.prev_features = [frame.contiguous() for frame in seen[stride - over :]]
        made = [
            convolved(module, seen[i : i + over], module.padding[1:]) for i in range(0, len(seen) - over + 1, stride)
        ]
        return made[0] if len(made) == 1 else torch.cat(made, dim=2)


class _MagvitUpsampler(ModelHook):  # type: ignore[misc]
    """The two frames that one becomes are one in memory."""

    def new_forward(self, module: EasyAnimateUpsampler3D, x: torch.Tensor) -> torch.Tensor:
        x = module.conv(functional.interpolate(x, scale_factor=(1, 2, 2), mode="nearest"))
        if not module.temporal_upsample:
            return x
        seen, module.prev_features = module.prev_features, SEEN
        return x if seen is None else x.expand(-1, -1, 2 * x.shape[2], -1, -1)


class _WanConvolution(ModelHook):  # type: ignore[misc]
    """Before the first frame is nothing."""

    def new_forward(
        self, module: WanCausalConv3d, x: torch.Tensor, cache_x: torch.Tensor | None = None
    ) -> torch.Tensor:
        columns, _, rows, _, before, _ = module._padding
        past = () if cache_x is None or not before else torch.split(cache_x, 1, dim=2)
        seen = [*[None] * (before - len(past)), *past, *torch.split(x, 1, dim=2)]
        over, stride = module.kernel_size[0], module.stride[0]
        made = [convolved(module, seen[i : i + over], (rows, columns)) for i in range(0, len(seen) - over + 1, stride)]
        return made[0] if len(made) == 1 else torch.cat(made, dim=2)


HOOKS: dict[type[nn.Module], type[ModelHook]] = {
    EasyAnimateCausalConv3d: _MagvitConvolution,
    EasyAnimateUpsampler3D: _MagvitUpsampler,
    WanCausalConv3d: _WanConvolution,
}
