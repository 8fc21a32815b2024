"""diffusers' model called as diffusers' own pipeline calls it: what every other row is held against.

Source: diffusers 0.42.1, the denoising loops of `WanImageToVideoPipeline`, `EasyAnimateInpaintPipeline` and
`I2VGenXLPipeline`. What they prepare before the loop is prepared before the clock starts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from framefit.families.parts import Parts, Tensors

__all__ = ["decoder", "denoiser"]

Call = Callable[[], torch.Tensor]


def denoiser(parts: Parts, latents: torch.Tensor, t: torch.Tensor, conditioning: Tensors, scale: float) -> Call:
    """One step's guided prediction, (1, C, F, H, W); at a scale of 1 or less the positive branch alone.

    Args:
        latents: as the denoiser takes them, (1, C, F, H, W).
        conditioning: fp32; the first axis is the guidance branch, negative before positive.
    """
    prepare = {"wan": _wan, "easyanimate": _easyanimate, "i2vgen": _i2vgen}[parts.checkpoint.family]
    return prepare(parts, latents, t, conditioning, scale)


def decoder(parts: Parts, latents: torch.Tensor) -> Call:
    """The VAE's video, (1, 3, F, H, W) in [-1, 1]."""
    return {"wan": _wan_decoder, "easyanimate": _magvit_decoder, "i2vgen": _kl_decoder}[parts.checkpoint.family](
        parts["vae"], latents
    )


def _wan(parts: Parts, latents: torch.Tensor, t: torch.Tensor, conditioning: Tensors, scale: float) -> Call:
    model = parts["transformer"]
    given = {name: tensor.to(model.dtype) for name, tensor in conditioning.items() if name in ("text", "image_tokens")}

    def inputs() -> tuple[torch.Tensor, torch.Tensor]:
        if not parts.checkpoint.first_frame_clean:
            return torch.cat([latents, conditioning["image"]], dim=1).to(model.dtype), t.expand(1)
        moving = torch.ones_like(latents[:, :1])
        moving[:, :, 0] = 0
        joined = (1 - moving) * conditioning["first_frame"] + moving * latents
        return joined.to(model.dtype), (moving[0][0][:, ::2, ::2] * t).flatten().unsqueeze(0)

    def forward(hidden: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        prediction: torch.Tensor = model(
            hidden_states=hidden, timestep=timestep, encoder_hidden_states=text,
            encoder_hidden_states_image=given.get("image_tokens"), return_dict=False,
        )[0]  # fmt: skip
        return prediction

    def call() -> torch.Tensor:
        hidden, timestep = inputs()
        positive = forward(hidden, timestep, given["text"][-1:])
        if scale <= 1:
            return positive
        negative = forward(hidden, timestep, given["text"][:1])
        return negative + scale * (positive - negative)

    return call


def _easyanimate(parts: Parts, latents: torch.Tensor, t: torch.Tensor, conditioning: Tensors, scale: float) -> Call:
    model = parts["transformer"]
    given = {name: tensor.to(model.dtype) for name, tensor in conditioning.items()}
    branches = 2 if scale > 1 else 1
    inpaint, noisy = torch.cat([given["inpaint"]] * branches), latents.to(model.dtype)
    text, t5 = (given[name][-branches:] if name in given else None for name in ("text", "text_t5"))

    def call() -> torch.Tensor:
        hidden = torch.cat([noisy] * branches)
        prediction = model(
            hidden, t.expand(branches).to(hidden.dtype), encoder_hidden_states=text, encoder_hidden_states_t5=t5,
            inpaint_latents=inpaint, return_dict=False,
        )[0]  # fmt: skip
        return _guided(prediction, scale)

    return call


def _i2vgen(parts: Parts, latents: torch.Tensor, t: torch.Tensor, conditioning: Tensors, scale: float) -> Call:
    model = parts["unet"]
    given = {name: tensor.to(model.dtype) for name, tensor in conditioning.items() if name != "fps"}
    branches = 2 if scale > 1 else 1
    image, noisy = torch.cat([given["image"]] * branches), latents.to(model.dtype)

    def call() -> torch.Tensor:
        prediction = model(
            torch.cat([noisy] * branches), t, encoder_hidden_states=given["text"][-branches:],
            fps=conditioning["fps"][-branches:], image_latents=image,
            image_embeddings=given["image_tokens"][-branches:], return_dict=False,
        )[0]  # fmt: skip
        return _guided(prediction, scale)

    return call


def _guided(prediction: torch.Tensor, scale: float) -> torch.Tensor:
    if scale <= 1:
        return prediction
    negative, positive = prediction.chunk(2)
    return negative + scale * (positive - negative)


def _wan_decoder(vae: Any, latents: torch.Tensor) -> Call:
    noisy, config = latents.to(vae.dtype), vae.config
    mean, deviation = (
        torch.tensor(values).view(1, config.z_dim, 1, 1, 1).to(noisy.device, noisy.dtype)
        for values in (config.latents_mean, config.latents_std)
    )
    return lambda: vae.decode(noisy / (1.0 / deviation) + mean, return_dict=False)[0]


def _magvit_decoder(vae: Any, latents: torch.Tensor) -> Call:
    noisy = latents.to(vae.dtype)
    return lambda: vae.decode(1 / vae.config.scaling_factor * noisy, return_dict=False)[0]


def _kl_decoder(vae: Any, latents: torch.Tensor) -> Call:
    frames = (1 / vae.config.scaling_factor * latents.to(vae.dtype))[0].unbind(dim=1)
    return lambda: torch.stack([vae.decode(frame.unsqueeze(0)).sample for frame in frames], dim=2)
