"""EasyAnimate V5.1 and V5 (InP): MMDiT, Magvit video VAE; Qwen2-VL and flow matching, or BERT, mT5 and DDIM.

V5.1 is held by test to diffusers' `EasyAnimateInpaintPipeline` (diffusers 0.42.1). V5 has no pipeline in diffusers and
follows upstream's (aigc-apps/EasyAnimate, pipeline_easyanimate_multi_text_encoder_inpaint.py, December 2024): both
encoders read the raw prompt, padding included, without an attention mask.

The photo is conditioned on as an
inpainting problem: a video that is black (-1) but for the known frames, slightly noised, through the VAE, beside a
mask shrunk to the latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image

from framefit.families import magvit_vae
from framefit.families.parts import Notice, Parts, Tensors, noise
from framefit.families.pixels import blank, placed, to_tensor
from framefit.families.text import tokenize
from framefit.families.windows import known
from framefit.request import ResolvedRequest

__all__ = ["decode", "encode_image", "encode_text", "inpaint_video", "predict", "settle", "window"]

IMAGE_NOISE = 0.0563
"""Strength of the noise on the known frames (`noise_aug_strength` upstream)."""

BERT_TOKENS = 77
"""V5's BERT reads the beginning of the prompt, its mT5 up to `max_tokens`."""


def encode_text(parts: Parts, request: ResolvedRequest, notice: Notice) -> Tensors:
    """{"text": (B, 256, D)}, or for V5 {"text": (B, 77, D), "text_t5": (B, 256, D)}."""
    if "text_encoder_2" in parts:
        return {
            "text": torch.cat([_bert(parts, prompt) for prompt in request.prompts]),
            "text_t5": torch.cat([_t5(parts, prompt, notice) for prompt in request.prompts]),
        }
    return {"text": torch.cat([_qwen(parts, prompt, notice) for prompt in request.prompts])}


def encode_image(
    parts: Parts,
    request: ResolvedRequest,
    first: Image.Image,
    last: Image.Image | None,
    generator: torch.Generator,
) -> tuple[torch.Tensor, Tensors]:
    """Noise, and {"inpaint": (1, 17, F, H, W)}: mask and VAE latents of the known frames."""
    vae = parts["vae"]
    shape = (
        1,
        vae.config.latent_channels,
        (request.num_frames - 1) // vae.temporal_compression_ratio + 1,
        request.height // vae.spatial_compression_ratio,
        request.width // vae.spatial_compression_ratio,
    )
    latents = noise(shape, generator, parts.device)
    video = inpaint_video(request.num_frames, first, last)
    if parts.checkpoint["transformer"].config.get("add_noise_in_inpaint_model", True):  # as in diffusers' class
        video = _noised(video, generator)
    video = placed(video, parts.device, vae.dtype)
    known = magvit_vae.encoded(vae, video, parts.pieces).float() * vae.config.scaling_factor
    mask = _known_frames(shape[2]) * vae.config.scaling_factor
    mask = mask.to(parts.device).expand(-1, -1, -1, *shape[3:])
    scale = getattr(parts["scheduler"], "init_noise_sigma", 1.0)
    return latents * scale, {"inpaint": torch.cat([mask, known], dim=1)}


def inpaint_video(num_frames: int, first: Image.Image, last: Image.Image | None) -> list[torch.Tensor]:
    """Frames (1, 3, 1, H, W): the known ones in [-1, 1], -1 everywhere else."""
    photo = to_tensor(first).unsqueeze(2)
    ends = [] if last is None else [to_tensor(last).unsqueeze(2)]
    black = torch.full((1, 1, 1, 1, 1), -1.0).expand_as(photo)
    return [photo, *[black] * (num_frames - 1 - len(ends)), *ends]


def _noised(video: list[torch.Tensor], generator: torch.Generator) -> list[torch.Tensor]:
    """Noise on what is not black, drawn for all frames as upstream draws it."""
    drawn = noise((*video[0].shape[:2], len(video), *video[0].shape[3:]), generator, video[0].device)
    return [
        frame if blank(frame) else torch.where(frame == -1, frame, frame + IMAGE_NOISE * own)
        for frame, own in zip(video, torch.split(drawn, 1, dim=2), strict=True)
    ]


def predict(
    parts: Parts, expert: str, latents: torch.Tensor, t: torch.Tensor, conditioning: Tensors, branches: slice
) -> torch.Tensor:
    model = parts[expert]
    text = conditioning["text"][branches].to(model.dtype)
    t5 = conditioning.get("text_t5")
    here = model.rope_embedding.register_forward_hook(_on_device)
    try:
        prediction: torch.Tensor = model(
            latents.to(model.dtype).expand(len(text), -1, -1, -1, -1),
            t.float().expand(len(text)),
            encoder_hidden_states=text,
            encoder_hidden_states_t5=None if t5 is None else t5[branches].to(model.dtype),
            inpaint_latents=conditioning["inpaint"].to(model.dtype).expand(len(text), -1, -1, -1, -1),
            return_dict=False,
        )[0]
    finally:
        here.remove()
    return prediction


def _on_device(rotation: Any, given: tuple[torch.Tensor], tables: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Cosines and sines, made on the host: each attention would fetch them anew, four times, and wait for weights that
    are on their way."""
    return tuple(table.to(given[0].device) for table in tables)


def window(conditioning: Tensors, span: slice, frames: int, anchor: torch.Tensor | None) -> Tensors:
    return conditioning | {"inpaint": known(conditioning["inpaint"], span, frames, anchor)}


def settle(latents: torch.Tensor, conditioning: Tensors) -> torch.Tensor:
    return latents


def decode(parts: Parts, latents: torch.Tensor) -> Iterator[torch.Tensor]:
    vae = parts["vae"]
    yield from magvit_vae.decoded(vae, (1 / vae.config.scaling_factor * latents).to(vae.dtype), parts.pieces)


def _qwen(parts: Parts, prompt: str, notice: Notice) -> torch.Tensor:
    """(1, 256, D): the last hidden states but one for the prompt as a chat message; the model's head is left out."""
    tokenizer = parts["tokenizer"]
    message = {"role": "user", "content": [{"type": "text", "text": prompt}]}
    text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    tokens = tokenize(tokenizer, prompt, parts.checkpoint.max_tokens, notice, text=text, padding_side="right")
    states: torch.Tensor = (
        parts["text_encoder"]
        .model(**{name: ids.to(parts.device) for name, ids in tokens.items()}, output_hidden_states=True)
        .hidden_states[-2]
    )
    return states


def _bert(parts: Parts, prompt: str) -> torch.Tensor:
    """(1, 77, D). What it does not read the mT5 does, so that a cut is nothing to tell."""
    ids = tokenize(parts["tokenizer"], prompt, BERT_TOKENS, notice=lambda _: None)["input_ids"]
    states: torch.Tensor = parts["text_encoder"](ids.to(parts.device), attention_mask=None).last_hidden_state
    return states


def _t5(parts: Parts, prompt: str, notice: Notice) -> torch.Tensor:
    """(1, 256, D)."""
    ids = tokenize(parts["tokenizer_2"], prompt, parts.checkpoint.max_tokens, notice)["input_ids"]
    states: torch.Tensor = parts["text_encoder_2"](ids.to(parts.device), attention_mask=None).last_hidden_state
    return states


def _known_frames(latent_frames: int) -> torch.Tensor:
    """(1, 1, f, 1, 1): 1 on the first latent frame, 0 after it, with an end image too.

    Upstream shrinks the mask of the later frames fourfold by trilinear sampling, which reads the middle two of each
    four: the last frame never shows in the mask, and an end image acts through the video alone.
    """
    known = torch.zeros(1, 1, latent_frames, 1, 1)
    known[:, :, 0] = 1
    return known
