"""The VAE piece by piece: one frame after the other, and for Wan one tile of the pictures after the other.

Frames leave the VAE as they are made, whatever the setting: that is how the families decode. With `frame` the layers
behind the first see one frame at a time in place of the two or four that a latent frame grows to; their memories make
that the same. With `tile:PX` the time goes by inside of every tile. Tiles have the halo that the convolutions need, so
that they equal the whole (`families/pieces.py`). Where norms are over a whole picture, as EasyAnimate's, none can.
"""

from __future__ import annotations

from framefit.errors import UsageError
from framefit.families.parts import Parts
from framefit.families.pieces import Pieces
from framefit.plan import Decode

__all__ = ["apply"]


def apply(parts: Parts, setting: Decode) -> None:
    """Raises `UsageError` where the VAE cannot be divided so."""
    if setting.value == "whole":
        return
    if reason := _refusal(parts, tiled=bool(setting.tile_px)):
        raise UsageError(f"decode={setting.value} cannot be for {parts.checkpoint.id}: {reason}.")
    parts.pieces = Pieces(one_by_one=True, tile_px=setting.tile_px)


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
