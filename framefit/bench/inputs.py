"""What a denoiser or a VAE is given: tensors of the true shapes, Gaussian, the same for every row of a scenario.

The shapes follow from the row's configurations alone; no encoder is built.
"""

from __future__ import annotations

import torch

from framefit.families import Checkpoint
from framefit.families.parts import Tensors, build, noise

__all__ = ["conditioning", "latents"]

BERT_TOKENS = 77
"""What EasyAnimate V5's first text encoder reads."""

Shape = tuple[int, ...]


def latents(whole: Checkpoint, size: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    """(1, C, F, H, W), fp32, drawn on the CPU.

    Args:
        whole: the model's row with all its components.
        size: (width, height) in pixels and frames.
    """
    return noise(_latent_shape(whole, size), torch.Generator().manual_seed(0), device)


def conditioning(whole: Checkpoint, size: tuple[int, int, int], branches: int, device: torch.device) -> Tensors:
    """What the family's `encode_text` and `encode_image` would give, by name, with Gaussian content in fp32."""
    shapes = {"wan": _wan, "easyanimate": _easyanimate, "i2vgen": _i2vgen}[whole.family](
        whole, _latent_shape(whole, size), branches
    )
    generator = torch.Generator().manual_seed(1)
    tensors = {name: noise(shape, generator, device) for name, shape in shapes.items()}
    if whole.family == "i2vgen":
        tensors["fps"] = torch.full((branches,), whole.fps, device=device)
    return tensors


def _latent_shape(whole: Checkpoint, size: tuple[int, int, int]) -> Shape:
    width, height, frames = size
    with torch.device("meta"):
        vae = build(whole["vae"])
    config = vae.config
    if whole.family == "wan":
        channels, time, space = config.z_dim, config.scale_factor_temporal, config.scale_factor_spatial
    elif whole.family == "easyanimate":
        channels, time, space = (
            config.latent_channels, vae.temporal_compression_ratio, vae.spatial_compression_ratio
        )  # fmt: skip
    else:
        channels, time, space = config.latent_channels, 1, 2 ** (len(config.block_out_channels) - 1)
    return 1, channels, (frames - 1) // time + 1, height // space, width // space


def _wan(whole: Checkpoint, latent: Shape, branches: int) -> dict[str, Shape]:
    config = whole["transformer"].config
    shapes: dict[str, Shape] = {"text": (branches, whole.max_tokens, config["text_dim"])}
    if whole.first_frame_clean:
        return shapes | {"first_frame": (1, latent[1], 1, *latent[3:])}
    shapes["image"] = (1, config["in_channels"] - latent[1], *latent[2:])
    if config.get("image_dim"):
        clip = whole["image_encoder"].config
        shapes["image_tokens"] = (1, (clip["image_size"] // clip["patch_size"]) ** 2 + 1, config["image_dim"])
    return shapes


def _easyanimate(whole: Checkpoint, latent: Shape, branches: int) -> dict[str, Shape]:
    config = whole["transformer"].config
    shapes: dict[str, Shape] = {"inpaint": (1, config["in_channels"] - latent[1], *latent[2:])}
    if config.get("text_embed_dim_t5"):
        return shapes | {
            "text": (branches, BERT_TOKENS, config["text_embed_dim"]),
            "text_t5": (branches, whole.max_tokens, config["text_embed_dim_t5"]),
        }
    return shapes | {"text": (branches, whole.max_tokens, config["text_embed_dim"])}


def _i2vgen(whole: Checkpoint, latent: Shape, branches: int) -> dict[str, Shape]:
    width = whole["unet"].config["cross_attention_dim"]
    return {
        "text": (branches, whole.max_tokens, width),
        "image": latent,
        "image_tokens": (branches, 1, width),
    }
