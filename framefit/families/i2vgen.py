"""I2VGen-XL: a UNet over frames, conditioned on the photo three ways, with fps as an input of the model.

Held by test to diffusers' `I2VGenXLPipeline` (diffusers 0.42.1), which is deprecated there and needs transformers 4.
The VAE works frame by frame, so decoding streams.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from PIL import Image

from framefit.families.parts import Notice, Parts, Tensors, noise
from framefit.families.pixels import to_frames, to_tensor
from framefit.families.text import tokenize
from framefit.request import ResolvedRequest

__all__ = ["decode", "encode_image", "encode_text", "predict", "settle", "window"]


def encode_text(parts: Parts, request: ResolvedRequest, notice: Notice) -> Tensors:
    """{"text": (B, 77, D)}: CLIP's last hidden states but one, through its final norm."""
    return {"text": torch.cat([_clip_text(parts, prompt, notice) for prompt in request.prompts])}


def encode_image(
    parts: Parts,
    request: ResolvedRequest,
    first: Image.Image,
    last: Image.Image | None,
    generator: torch.Generator,
) -> tuple[torch.Tensor, Tensors]:
    """Noise, and {"image": (1, 4, F, H, W), "image_tokens": (B, 1, D), "fps": (B,)}.

    The reference samples the VAE's posterior (from torch's global generator, before the noise): so does this,
    from the run's own.
    """
    tokens = _clip_image(parts, first, side=request.width)
    vae = parts["vae"]
    photo = to_tensor(first).to(parts.device, vae.dtype, memory_format=torch.channels_last)
    sample = vae.encode(photo).latent_dist.sample(generator)
    image = (sample * vae.config.scaling_factor).float().unsqueeze(2)
    later = torch.arange(1, request.num_frames, device=parts.device) / max(request.num_frames - 1, 1)
    position = later.view(1, 1, -1, 1, 1).expand(1, image.shape[1], -1, *image.shape[3:])
    latents = noise((1, image.shape[1], request.num_frames, *image.shape[3:]), generator, parts.device)
    if request.guided:
        tokens = torch.cat([torch.zeros_like(tokens), tokens])
    fps = torch.full((tokens.shape[0],), request.fps, device=parts.device)
    return latents * parts["scheduler"].init_noise_sigma, {
        "image": torch.cat([image, position], dim=2),
        "image_tokens": tokens,
        "fps": fps,
    }


def predict(
    parts: Parts, expert: str, latents: torch.Tensor, t: torch.Tensor, conditioning: Tensors, branches: slice
) -> torch.Tensor:
    model = parts[expert]
    text = conditioning["text"][branches].to(model.dtype)
    prediction: torch.Tensor = model(
        latents.to(model.dtype).expand(len(text), -1, -1, -1, -1),
        t,
        encoder_hidden_states=text,
        fps=conditioning["fps"][branches],
        image_latents=conditioning["image"].to(model.dtype).expand(len(text), -1, -1, -1, -1),
        image_embeddings=conditioning["image_tokens"][branches].to(model.dtype),
        return_dict=False,
    )[0]
    return prediction


def window(conditioning: Tensors, span: slice, frames: int, anchor: torch.Tensor | None) -> Tensors:
    """Each window's frames tell their places in it, from 0 to 1."""
    length = span.stop - span.start
    given = conditioning["image"]
    places = given[:, :, 1:length] * ((frames - 1) / (length - 1))
    return conditioning | {"image": torch.cat([given[:, :, :1] if anchor is None else anchor, places], dim=2)}


def settle(latents: torch.Tensor, conditioning: Tensors) -> torch.Tensor:
    return latents


def decode(parts: Parts, latents: torch.Tensor) -> Iterator[torch.Tensor]:
    vae = parts["vae"]
    latents = (1 / vae.config.scaling_factor * latents).to(vae.dtype)
    for frame in latents[0].unbind(dim=1):
        yield to_frames(vae.decode(frame.unsqueeze(0)).sample.unsqueeze(2))


def _clip_text(parts: Parts, prompt: str, notice: Notice) -> torch.Tensor:
    encoder = parts["text_encoder"]
    text = getattr(encoder, "text_model", encoder)  # transformers 5 dropped the inner module
    tokens = tokenize(parts["tokenizer"], prompt, parts.checkpoint.max_tokens, notice)
    states = encoder(tokens["input_ids"].to(parts.device), output_hidden_states=True).hidden_states[-2]
    normed: torch.Tensor = text.final_layer_norm(states)
    return normed


def _clip_image(parts: Parts, photo: Image.Image, *, side: int) -> torch.Tensor:
    """(1, 1, D): the photo's centre square of `side` px, shrunk as the reference does, in CLIP's joint space."""
    processor, encoder = parts["feature_extractor"], parts["image_encoder"]
    crop = (processor.crop_size["width"], processor.crop_size["height"])
    square = _centre_square(photo, side).resize(crop, Image.Resampling.BILINEAR)
    pixels = processor(images=square, do_resize=False, do_center_crop=False, return_tensors="pt").pixel_values
    tokens: torch.Tensor = encoder(pixels.to(parts.device, encoder.dtype)).image_embeds
    return tokens.unsqueeze(1)


def _centre_square(photo: Image.Image, side: int) -> Image.Image:
    """Scale the shorter side to `side` px with a box filter (upwards too, as the reference), crop the centre."""
    scale = min(photo.width, photo.height) / side
    photo = photo.resize((round(photo.width // scale), round(photo.height // scale)), Image.Resampling.BOX)
    left, top = (photo.width - side) // 2, (photo.height - side) // 2
    return photo.crop((left, top, left + side, top + side))
