"""The VAE piece by piece: one frame after the other, what its layers remember in RAM, or one tile after the other.

Frames leave the VAE as they are made, whatever the setting: that is how the families decode. With `frame` the layers
behind the first see one frame at a time in place of the two or four that a latent frame grows to; their memories make
that the same. With `ram` these memories are on the card for the few layers at work only, with `ram:PX` for one tile at
a time where pictures are largest (`families/shelved.py`). With `tile` the time goes by inside of every tile. Tiles have
the halo that the convolutions need, so that they equal the whole. Where norms are over a whole picture, as
EasyAnimate's, none can. With `blend` decoded tiles have half of that halo and fade into each other
(`families/fading.py`), and the VAE computes in the plan's precision, unless it has overflowed there.

Wan's convolutions pad their input by a copy of it. In pieces the convolution itself pads. Layers made for single frames
(`passes/frames.py`) are EasyAnimate's with `frame` and `ram`, and Wan's with `ram`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.autoencoders.autoencoder_kl_magvit import AutoencoderKLMagvit
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import nn
from torch.nn import functional

from framefit.errors import UsageError
from framefit.families.parts import Parts, weights
from framefit.families.pieces import Pieces
from framefit.ledger.shelf import Shelf
from framefit.ledger.transfer import transfer_for
from framefit.passes.frames import hooked
from framefit.plan import Decode

__all__ = ["apply", "remove"]

HOOK = "framefit.decode"


def apply(parts: Parts, setting: Decode) -> None:
    """Raises `UsageError` where the VAE cannot be divided so."""
    if setting.value == "whole":
        return
    if reason := _refusal(parts, setting):
        raise UsageError(f"decode={setting.value} cannot be for {parts.checkpoint.id}: {reason}.")
    if setting.blend and parts.dtype("vae") != parts.precision and "vae" not in parts.raised:
        parts.cast("vae", parts.precision)
    vae, in_ram = parts["vae"], setting.in_ram
    shelf = partial(Shelf, transfer_for(parts.device, weights(vae))) if in_ram else None
    parts.pieces = Pieces(
        one_by_one=setting.value == "frame", tile_px=setting.tile_px, blend=setting.blend, shelf=shelf
    )
    by_frames = in_ram or isinstance(vae, AutoencoderKLMagvit)
    for module, hook in list(hooked(vae) if by_frames else _padding(vae)):
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, HOOK)
    _in_place(vae, by_frames)


def remove(parts: Parts) -> None:
    """As if this pass had never been applied, but that a VAE that `blend` rounded stays so."""
    parts.pieces = Pieces()
    for module in parts["vae"].modules():
        if hasattr(module, "_diffusers_hook"):
            module._diffusers_hook.remove_hook(HOOK, recurse=False)
    _in_place(parts["vae"], False)


def _padding(vae: nn.Module) -> Iterator[tuple[nn.Module, ModelHook]]:
    for module in vae.modules():
        if isinstance(module, WanCausalConv3d):
            yield module, _PadsItself()


def _in_place(vae: nn.Module, now: bool) -> None:
    """Whether activations overwrite their input, which a norm just made."""
    for module in vae.modules():
        if isinstance(module, nn.SiLU):
            module.inplace = now


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


def _refusal(parts: Parts, setting: Decode) -> str | None:
    kind = type(parts["vae"]).__name__
    if kind == "AutoencoderKL":
        return "its VAE takes single frames already, use decode=whole"
    if kind == "AutoencoderKLMagvit":
        if not parts["vae"].config.spatial_group_norm:
            return "its VAE's norms are over several frames, use decode=whole"
        if setting.tile_px:
            return "its VAE's norms are over whole pictures, use decode=frame or decode=ram"
    return None
