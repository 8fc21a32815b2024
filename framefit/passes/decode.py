"""The VAE piece by piece: one frame after the other, and for Wan one tile of the pictures after the other.

Frames leave the VAE as they are made, whatever the setting: that is how the families decode. With `frame` the layers
behind the first see one frame at a time in place of the two or four that a latent frame grows to; their memories make
that the same. With `tile` the time goes by inside of every tile. Tiles have the halo that the convolutions need, so
that they equal the whole (`families/pieces.py`). Where norms are over a whole picture, as EasyAnimate's, none can.

Wan's convolutions pad their input by a copy of it. In pieces the convolution itself pads.
"""

from __future__ import annotations

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch.nn import functional

from framefit.errors import UsageError
from framefit.families.parts import Parts
from framefit.families.pieces import Pieces
from framefit.plan import Decode

__all__ = ["apply", "remove"]

PADDING = "framefit.decode.padding"


def apply(parts: Parts, setting: Decode) -> None:
    """Raises `UsageError` where the VAE cannot be divided so."""
    if setting.value == "whole":
        return
    if reason := _refusal(parts, tiled=bool(setting.tile_px)):
        raise UsageError(f"decode={setting.value} cannot be for {parts.checkpoint.id}: {reason}.")
    parts.pieces = Pieces(one_by_one=not setting.tile_px, tile_px=setting.tile_px)
    for module in parts["vae"].modules():
        if isinstance(module, WanCausalConv3d):
            HookRegistry.check_if_exists_or_initialize(module).register_hook(_PadsItself(), PADDING)


def remove(parts: Parts) -> None:
    """As if this pass had never been applied."""
    parts.pieces = Pieces()
    for module in parts["vae"].modules():
        if isinstance(module, WanCausalConv3d) and hasattr(module, "_diffusers_hook"):
            module._diffusers_hook.remove_hook(PADDING, recurse=False)


class _PadsItself(ModelHook):  # type: ignore[misc]
    """`WanCausalConv3d.forward` of diffusers 0.42 without its padded copy."""

    def new_forward(
        self, module: WanCausalConv3d, x: torch.Tensor, cache_x: torch.Tensor | None = None
    ) -> torch.Tensor:
        columns, _, rows, _, frames, _ = module._padding
        if cache_x is not None and frames:
            x = torch.cat([cache_x, x], dim=2)
            frames -= cache_x.shape[2]
        if frames:
            x = functional.pad(x, (0, 0, 0, 0, frames, 0))
        return functional.conv3d(x, module.weight, module.bias, module.stride, (0, rows, columns))


def _refusal(parts: Parts, *, tiled: bool) -> str | None:
    kind = type(parts["vae"]).__name__
    if kind == "AutoencoderKL":
        return "its VAE takes single frames already, use decode=whole"
    if kind == "AutoencoderKLMagvit":
        if not parts["vae"].config.spatial_group_norm:
            return "its VAE's norms are over several frames, use decode=whole"
        if tiled:
            return "its VAE's norms are over whole pictures, use decode=frame"
    return None
