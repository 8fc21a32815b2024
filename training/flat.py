"""A causal 3D convolution as a 2D one over the frames that it sees, side by side in channels: the same mathematics.

cuDNN's 3D convolutions of few channels reach a tenth of the card; its 2D ones do better. A single frame, which has
nothing but zeros before it, needs the last third of the kernel only.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["flatten"]


def flatten(model: nn.Module) -> None:
    """Every causal convolution of `model`, from now on; weights and results are as before (diffusers 0.42.1)."""
    for module in model.modules():
        if isinstance(module, WanCausalConv3d):
            HookRegistry.check_if_exists_or_initialize(module).register_hook(_Flat(), "flat")


class _Flat(ModelHook):  # type: ignore[misc]
    def new_forward(self, module: Any, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        left, _, top, _, before, _ = module._padding
        frames = x if cache_x is None or not before else torch.cat([cache_x, x], dim=2)
        missing = before - (frames.shape[2] - x.shape[2])
        taps, stride = module.kernel_size[0], module.stride[0]
        weight: Tensor = module.weight
        if missing == taps - 1 and frames.shape[2] == 1:  # the rest of the kernel would meet zeros
            seen, kernel = frames, weight[:, :, -1]
        else:
            frames = functional.pad(frames, (0, 0, 0, 0, missing, 0)) if missing else frames
            count = (frames.shape[2] - taps) // stride + 1
            seen = torch.cat([frames[:, :, k : k + stride * (count - 1) + 1 : stride] for k in range(taps)], dim=1)
            kernel = weight.transpose(1, 2).flatten(1, 2)
        pictures = seen.transpose(1, 2).flatten(0, 1)
        result: Tensor = functional.conv2d(pictures, kernel, module.bias, stride=module.stride[1:], padding=(top, left))
        clip: Tensor = result.view(x.shape[0], -1, *result.shape[1:]).transpose(1, 2)
        return clip
