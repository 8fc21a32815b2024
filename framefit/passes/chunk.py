"""A denoiser's work in chunks of rows, where it keeps to rows: projections, norms, feed-forwards, frames, pixels.

A row is a token, or of I2VGen-XL's UNet a pixel of a frame. Attention still sees all of them: keys and values are made
of all rows, and queries come in chunks. The maths is the same; what falls is what a forward holds beside its hidden
states. Chunks stay large, so that kernels stay full. What is restated over a block's own children is in `chunk_wan`,
`chunk_easyanimate` and `chunk_unet`, and held by test to diffusers' own forwards.
"""

from __future__ import annotations

from importlib import import_module

from diffusers.hooks import HookRegistry
from torch import nn

from framefit.errors import UsageError
from framefit.families.parts import Parts
from framefit.plan import Chunk

__all__ = ["ELEMENTS", "apply", "chunked", "remove"]

HOOK = "framefit.chunk"

ELEMENTS = 4096 * 5120
"""Rows of a chunk times their width, where nobody says how many rows: 40 MiB in bf16."""

DENOISERS = {
    "WanTransformer3DModel": "chunk_wan",
    "EasyAnimateTransformer3DModel": "chunk_easyanimate",
    "I2VGenXLUNet": "chunk_unet",
}
"""Class -> the module beside this one that says what of it works by rows. Imported for it alone: they take a second."""


def apply(parts: Parts, setting: Chunk) -> None:
    """What computes in chunks already is left as it is.

    Raises:
        UsageError: a denoiser that nothing is known of.
    """
    if setting.value == "none":
        return
    for expert in (name for name in parts.checkpoint.experts if name in parts):
        model = parts[expert]
        if (name := DENOISERS.get(type(model).__name__)) is None:
            raise UsageError(
                f"chunk={setting.value} was asked for, and of {type(model).__name__} it is not known what works by "
                f"rows: use chunk=none."
            )
        known = import_module(f"framefit.passes.{name}")
        elements = setting.rows * known.width(model) if setting.rows else ELEMENTS
        for module, hook in known.hooks(model):
            if chunked(module):
                continue
            HookRegistry.check_if_exists_or_initialize(module).register_hook(hook(elements), HOOK)


def chunked(module: nn.Module) -> bool:
    """Whether it computes in chunks, and so calls what is inside of it again and again."""
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and registry.get_hook(HOOK) is not None


def remove(parts: Parts) -> None:
    """As if this pass had never been applied."""
    for expert in (name for name in parts.checkpoint.experts if name in parts):
        for module in parts[expert].modules():
            if chunked(module):
                module._diffusers_hook.remove_hook(HOOK, recurse=False)
