"""A causal 3D convolution of a single frame as a 2D one: the same mathematics, a third of the work.

Before the frame there is nothing but zeros, so that only the last third of the kernel counts.
"""

from __future__ import annotations

from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["flatten"]


def flatten(model: nn.Module) -> None:
    """Of every causal convolution of `model`, from now on; weights and results are as before (diffusers 0.42.1)."""
    for module in model.modules():
        if isinstance(module, WanCausalConv3d):
            HookRegistry.check_if_exists_or_initialize(module).register_hook(_Flat(), "flat")


class _Flat(ModelHook):  # type: ignore[misc]
    def new_forward(self, module: Any, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        left, _, top, _, before, _ = module._padding
        if cache_x is not None or x.shape[2] != 1 or before != module.kernel_size[0] - 1:
            several: Tensor = self.fn_ref.original_forward(x, cache_x)
            return several
        picture: Tensor = functional.conv2d(
            x[:, :, 0], module.weight[:, :, -1], module.bias, stride=module.stride[1:], padding=(top, left)
        )
        return picture.unsqueeze(2)
