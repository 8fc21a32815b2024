"""Wan 2.1 and 2.2: causal video VAE, UMT5 text, a transformer (or two, split by timestep).

Held by test to diffusers' `WanImageToVideoPipeline` (diffusers 0.42.1). Three ways to condition on the photo,
told apart by the configuration:

- 4 mask + 16 VAE channels beside the latents (all 14B models);
- the same plus CLIP tokens of the photo in cross-attention (2.1);
- the first latent frame itself kept clean, with a timestep per token (TI2V-5B).
"""

from __future__ import annotations

import html
from collections.abc import Iterator

import ftfy
import torch
from PIL import Image

from framefit.families import wan_vae
from framefit.families.parts import Notice, Parts, Tensors, noise
from framefit.families.pixels import placed, to_tensor
from framefit.families.text import tokenize
from framefit.families.windows import known
from framefit.request import ResolvedRequest

__all__ = ["UPSTREAM", "clean", "decode", "encode_image", "encode_text", "predict", "settle", "window"]

UPSTREAM = {
    r"^condition_embedder\.(time|text)_embedder\.linear_1": r"\1_embedding.0",
    r"^condition_embedder\.(time|text)_embedder\.linear_2": r"\1_embedding.2",
    r"^condition_embedder\.time_proj": "time_projection.1",
    r"^condition_embedder\.image_embedder\.norm1": "img_emb.proj.0",
    r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj": "img_emb.proj.1",
    r"^condition_embedder\.image_embedder\.ff\.net\.2": "img_emb.proj.3",
    r"^condition_embedder\.image_embedder\.norm2": "img_emb.proj.4",
    r"^proj_out": "head.head", r"^scale_shift_table": "head.modulation", r"\.scale_shift_table": ".modulation",
    r"\.ffn\.net\.0\.proj": ".ffn.0", r"\.ffn\.net\.2": ".ffn.2", r"^(blocks\.\d+)\.norm2": r"\1.norm3",
    r"\.attn1\.": ".self_attn.", r"\.attn2\.": ".cross_attn.", r"\.to_out\.0": ".o", r"\.to_([qkv])": r".\1",
    r"\.add_([kv])_proj": r".\1_img", r"\.norm_added_k": ".norm_k_img",
}  # fmt: skip
"""A module in diffusers' words -> in upstream's (Wan-Video/Wan2.2, wan/modules/model.py), for LoRA files."""


def clean(prompt: str) -> str:
    """As in Wan's training: mojibake mended, entities resolved, spaces folded."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


def encode_text(parts: Parts, request: ResolvedRequest, notice: Notice) -> Tensors:
    """{"text": (B, 512, D)}: UMT5 states, zero past the prompt's end."""
    return {"text": torch.cat([_umt5(parts, prompt, notice) for prompt in request.prompts])}


def encode_image(
    parts: Parts,
    request: ResolvedRequest,
    first: Image.Image,
    last: Image.Image | None,
    generator: torch.Generator,
) -> tuple[torch.Tensor, Tensors]:
    """Noise, and {"image": (1, 20, F, H, W)} or {"first_frame": (1, 48, 1, H, W)}, with "image_tokens" for 2.1."""
    config = parts["vae"].config
    frames = (request.num_frames - 1) // config.scale_factor_temporal + 1
    height, width = (side // config.scale_factor_spatial for side in (request.height, request.width))
    latents = noise((1, config.z_dim, frames, height, width), generator, parts.device)
    photo = to_tensor(first).unsqueeze(2)
    if parts.checkpoint.first_frame_clean:
        return latents, {"first_frame": _encode_video(parts, [photo])}
    ends = [] if last is None else [to_tensor(last).unsqueeze(2)]
    blank = torch.zeros(1, 1, 1, 1, 1).expand_as(photo)
    video = _encode_video(parts, [photo, *[blank] * (request.num_frames - 1 - len(ends)), *ends])
    mask = _known_frames(request.num_frames, config.scale_factor_temporal, with_last=last is not None)
    mask = mask.to(video).expand(-1, -1, -1, height, width)
    conditioning = {"image": torch.cat([mask, video], dim=1)}
    if "image_encoder" in parts:
        conditioning["image_tokens"] = _clip(parts, first)
    return latents, conditioning


def predict(
    parts: Parts, expert: str, latents: torch.Tensor, t: torch.Tensor, conditioning: Tensors, branches: slice
) -> torch.Tensor:
    model = parts[expert]
    text = conditioning["text"][branches]
    batch = text.shape[0]
    if parts.checkpoint.first_frame_clean:
        inputs = settle(latents, conditioning)
        _, height, width = model.config.patch_size
        clock = _moving(latents)[0, 0, :, ::height, ::width] * t
        timestep = clock.flatten().unsqueeze(0).expand(batch, -1)
    else:
        inputs = torch.cat([latents, conditioning["image"]], dim=1)
        timestep = t.expand(batch)
    tokens = conditioning.get("image_tokens")
    prediction: torch.Tensor = model(
        hidden_states=inputs.to(model.dtype).expand(batch, -1, -1, -1, -1),
        timestep=timestep,
        encoder_hidden_states=text.to(model.dtype),
        encoder_hidden_states_image=None if tokens is None else tokens.to(model.dtype).expand(batch, -1, -1),
        return_dict=False,
    )[0]
    return prediction


def window(conditioning: Tensors, span: slice, frames: int, anchor: torch.Tensor | None) -> Tensors:
    if "first_frame" in conditioning:
        return conditioning if anchor is None else conditioning | {"first_frame": anchor}
    return conditioning | {"image": known(conditioning["image"], span, frames, anchor)}


def settle(latents: torch.Tensor, conditioning: Tensors) -> torch.Tensor:
    """Where the first latent frame is the condition itself, put it back; elsewhere nothing."""
    if "first_frame" not in conditioning:
        return latents
    moving = _moving(latents)
    return (1 - moving) * conditioning["first_frame"] + moving * latents


def decode(parts: Parts, latents: torch.Tensor) -> Iterator[torch.Tensor]:
    vae = parts["vae"]
    mean, scale = _statistics(parts, vae.dtype)
    yield from wan_vae.decoded(vae, latents.to(vae.dtype) / scale + mean, parts.pieces)


def _umt5(parts: Parts, prompt: str, notice: Notice) -> torch.Tensor:
    """(1, 512, D)"""
    tokens = tokenize(parts["tokenizer"], clean(prompt), parts.checkpoint.max_tokens, notice)
    ids, mask = tokens["input_ids"].to(parts.device), tokens["attention_mask"].to(parts.device)
    states: torch.Tensor = parts["text_encoder"](ids, mask).last_hidden_state
    length = int(mask.sum())
    return torch.cat([states[:, :length], states.new_zeros(1, ids.shape[1] - length, states.shape[2])], dim=1)


def _clip(parts: Parts, photo: Image.Image) -> torch.Tensor:
    """(1, 257, 1280): CLIP's last hidden states but one."""
    encoder = parts["image_encoder"]
    pixels = parts["image_processor"](images=photo, return_tensors="pt").pixel_values
    states: torch.Tensor = encoder(pixels.to(parts.device, encoder.dtype), output_hidden_states=True).hidden_states[-2]
    return states


def _encode_video(parts: Parts, video: list[torch.Tensor]) -> torch.Tensor:
    """Frames (1, 3, 1, H, W) in [-1, 1] -> normalised fp32 latents (1, C, f, h, w): the posterior's mode."""
    vae = parts["vae"]
    latents = wan_vae.encoded(vae, placed(video, parts.device, vae.dtype), parts.pieces).float()
    mean, scale = _statistics(parts, torch.float32)
    normalised: torch.Tensor = (latents - mean) * scale
    return normalised


def _statistics(parts: Parts, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and inverse deviation of the latents, per channel, (1, C, 1, 1, 1)."""
    config = parts["vae"].config
    mean, deviation = (
        torch.tensor(values).view(1, config.z_dim, 1, 1, 1) for values in (config.latents_mean, config.latents_std)
    )
    return mean.to(parts.device, dtype), (1.0 / deviation).to(parts.device, dtype)


def _known_frames(num_frames: int, stride: int, *, with_last: bool) -> torch.Tensor:
    """(1, stride, F, 1, 1): 1 where a pixel frame is given, folded into channels as the VAE folds time."""
    known = torch.zeros(1, num_frames)
    known[:, 0] = 1
    if with_last:
        known[:, -1] = 1
    folded = torch.cat([known[:, :1].expand(-1, stride), known[:, 1:]], dim=1).view(1, -1, stride)
    return folded.transpose(1, 2)[..., None, None]


def _moving(latents: torch.Tensor) -> torch.Tensor:
    """(1, 1, F, H, W): 0 on the first latent frame, 1 after it."""
    moving = torch.ones_like(latents[:, :1])
    moving[:, :, 0] = 0
    return moving
