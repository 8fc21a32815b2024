"""The denoisers: one for all noise levels first, then a copy of it for high noise and one for low.

    python -m training.experts base [--seconds 540]
    python -m training.experts high low

Flow matching: the model sees a clip's latents mixed with noise, the photo's latents and the caption, and predicts
noise minus latents. Every stage draws clips of its own, encodes them once and keeps them on the device.
"""

from __future__ import annotations

import argparse
import json
import random
import time
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor

from training import captions, scenes, text, vae
from training.motion import CATALOGUE
from training.stretch import Pace, Trainee, train

__all__ = ["BOUNDARY", "Captions", "Clips", "build", "compute_copy", "condition", "load", "main", "noised", "prepare"]

RECIPE = Path(__file__).with_name("recipe.toml")
BOUNDARY = 0.9
"""From this noise level upwards the first expert serves, as in Wan2.2-I2V-A14B."""
STAGES = {"base": (0.0, 1.0), "high": (BOUNDARY, 1.0), "low": (0.0, BOUNDARY)}
"""Stage -> its noise levels."""
ENCODED_AT_ONCE = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Clips:
    """Clips of one size, encoded."""

    latents: Tensor
    """(N, 16, f, h, w), normalised, bf16"""
    photos: Tensor
    """(N, 20, f, h, w): mask and encoded photo, as the run gives them to the model, bf16"""
    motions: Tensor
    """(N,): place in the catalogue"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Captions:
    """Embedded captions."""

    states: Tensor
    """(motions, captions of each, tokens, D), bf16"""
    neutral: Tensor
    """(captions, tokens, D): those that say nothing of motion"""
    empty: Tensor
    """(1, tokens, D): no words at all, which is what guidance compares with"""

    def draw(self, motions: Tensor, dropout: float, generator: torch.Generator) -> Tensor:
        """(B, tokens, D) for the motions (B,), a share of them neutral."""
        device = motions.device
        chosen = torch.randint(self.states.shape[1], motions.shape, generator=generator, device=device)
        without = torch.randint(len(self.neutral), motions.shape, generator=generator, device=device)
        dropped = torch.rand(motions.shape, generator=generator, device=device) < dropout
        return torch.where(dropped.view(-1, 1, 1), self.neutral[without], self.states[motions, chosen])


def main() -> None:
    options = _options()
    recipe = tomllib.loads(RECIPE.read_text())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began = time.monotonic()
    count = options.clips or recipe["clips"][options.stages[0]]
    clips, said = prepare(recipe, options.data, options.vae, options.text, device, options.stages[0], count)
    prepared_s = time.monotonic() - began
    for stage in options.stages:
        filed = options.out / f"{stage}.json"
        if filed.exists() and json.loads(filed.read_text())["finished"]:
            continue
        left_s = options.seconds - (time.monotonic() - began)
        report = _stage(stage, clips, said, recipe, device, options, left_s)
        report |= {"prepared_s": round(prepared_s, 1), "clips": count}
        filed.write_text(json.dumps(report))
        print(json.dumps({k: v for k, v in report.items() if k != "curve"} | {"last": report["curve"][-1:]}))
        if not report["finished"]:  # the next stage starts from what this one becomes
            break


def _stage(
    stage: str,
    clips: list[Clips],
    said: Captions,
    recipe: Mapping[str, Any],
    device: torch.device,
    options: argparse.Namespace,
    seconds: float,
) -> dict[str, Any]:
    pace = Pace(**recipe["pace"][stage])
    torch.manual_seed(pace.seed)
    model = build(recipe) if stage == "base" else load(options.base or options.out / "base")
    model = compute_copy(model, device)
    if options.checkpointing:
        model.enable_gradient_checkpointing()
    elif device.type == "cuda" and not options.eager:
        model.compile_repeated_blocks(fullgraph=True, dynamic=False)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainee = Trainee(parameters=dict(model.named_parameters()), pace=pace)
    finished = train(
        trainee,
        lambda progress, generator: _loss(model, clips, said, recipe, stage, options.batch, generator),
        options.out / f"{stage}.safetensors",
        seconds=seconds,
    )
    with torch.no_grad():
        trainee.finish()
    model.to(torch.float16).save_pretrained(options.out / stage)
    return {
        "stage": stage, "finished": finished, "step": trainee.step, "seconds": trainee.seconds,
        "parameters": sum(p.numel() for p in model.parameters()), "recipe": recipe["denoiser"], "pace": asdict(pace),
        "checkpointing": options.checkpointing, "eager": options.eager,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None, "curve": trainee.curve,
    }  # fmt: skip


def build(recipe: Mapping[str, Any]) -> WanTransformer3DModel:
    """A fresh denoiser of Wan2.2-I2V-A14B's architecture."""
    names = ("num_attention_heads", "attention_head_dim", "ffn_dim", "num_layers", "freq_dim")
    return WanTransformer3DModel(
        **{name: recipe["denoiser"][name] for name in names},
        patch_size=(1, 2, 2),
        in_channels=36,
        out_channels=16,
        text_dim=text.WIDTH,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=256,
    )


def load(folder: Path) -> WanTransformer3DModel:
    """In fp32."""
    return WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.float32)


def compute_copy(model: WanTransformer3DModel, device: torch.device) -> WanTransformer3DModel:
    """On a card in bf16, with the modules that the class keeps in fp32; on the CPU in fp32."""
    model = model.to(device).train()
    for buffer in model.buffers():
        buffer.data = buffer.data.float()
    if device.type == "cuda":
        kept = set(model._keep_in_fp32_modules)
        for name, parameter in model.named_parameters():
            if not kept & set(name.split(".")):
                parameter.data = parameter.data.bfloat16()
    return model


def prepare(
    recipe: Mapping[str, Any],
    data: Path,
    vae_folder: Path,
    text_folder: Path,
    device: torch.device,
    stage: str,
    count: int,
) -> tuple[list[Clips], Captions]:
    """The clips of every size, and the captions, of one stage."""
    seed = recipe["pace"][stage]["seed"]
    material = scenes.load(data, device, drawn=recipe["data"]["drawn"], seed=recipe["data"]["seed"])
    autoencoder = vae.load(vae_folder, device)
    if device.type == "cuda":
        vae.hasten(autoencoder.bfloat16())
    generator = torch.Generator(device).manual_seed(seed)
    clips = [
        _encoded(material, autoencoder, int(count * share), size, recipe["model"]["num_frames"], generator)
        for size, share in zip(recipe["model"]["sizes"], recipe["model"]["shares"], strict=True)
    ]
    return clips, _embedded(recipe["data"]["captions"], text_folder, device, seed)


def condition(autoencoder: AutoencoderKLWan, photos: Tensor, num_frames: int) -> Tensor:
    """(B, 3, 1, H, W) -> (B, 20, f, h, w): the mask of known frames, and the photo encoded before blank frames."""
    blank = photos.new_zeros(*photos.shape[:2], num_frames - 1, *photos.shape[3:])
    latents = vae.encode(autoencoder, torch.cat([photos, blank], dim=2))
    mask = torch.zeros_like(latents[:, :4])
    mask[:, :, 0] = 1
    return torch.cat([mask, latents], dim=1)


def noised(latents: Tensor, level: Tensor, noise: Tensor) -> Tensor:
    """The latents (B, ...) at the noise levels (B,) in [0, 1]."""
    level = level.view(-1, 1, 1, 1, 1)
    return (1 - level) * latents + level * noise


def shifted(level: Tensor, shift: float) -> Tensor:
    """The flow's shift of noise levels in [0, 1]."""
    return shift * level / (1 + (shift - 1) * level)


def _loss(
    model: WanTransformer3DModel,
    clips: list[Clips],
    said: Captions,
    recipe: Mapping[str, Any],
    stage: str,
    batch: int | None,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, Tensor]]:
    settings, device = recipe["denoiser"], said.neutral.device
    batch = batch or settings["batch"]
    # drawn on the host: to ask the device would wait for it
    (group,) = random.Random(generator.initial_seed()).choices(clips, weights=recipe["model"]["shares"])
    chosen = torch.randint(len(group.motions), (batch,), generator=generator, device=device)
    latents = group.latents[chosen].float()
    level = _levels(batch, *STAGES[stage], recipe["denoiser"]["shift"], generator)
    noise = torch.randn(latents.shape, generator=generator, device=device)
    inputs = torch.cat([noised(latents, level, noise), group.photos[chosen].float()], dim=1)
    prediction = model(
        hidden_states=inputs.to(model.dtype),
        timestep=level * 1000,
        encoder_hidden_states=said.draw(group.motions[chosen], settings["dropout"], generator).to(model.dtype),
        return_dict=False,
    )[0]
    error = (prediction.float() - (noise - latents)).square().flatten(1).mean(1)
    return error.mean(), {"noisiest": error[-batch // 8 :].mean()}


def _levels(batch: int, low: float, high: float, shift: float, generator: torch.Generator) -> Tensor:
    """(B,) noise levels between `low` and `high`, as often as a run meets them, evenly spread over the batch."""
    device = generator.device
    even = (torch.arange(batch, device=device) + torch.rand(batch, generator=generator, device=device)) / batch
    low, high = (level / (shift - (shift - 1) * level) for level in (low, high))
    return shifted(low + (high - low) * even, shift)


@torch.no_grad()
def _encoded(
    material: scenes.Scenes,
    autoencoder: AutoencoderKLWan,
    count: int,
    size: tuple[int, int],
    num_frames: int,
    generator: torch.Generator,
) -> Clips:
    motions = list(CATALOGUE.values())
    # every motion as often as the others, whatever the count
    order = torch.arange(count, device=material.canvases.device) % len(motions)
    latents, photos = [], []
    for part in torch.split(order, ENCODED_AT_ONCE):
        clips = scenes.render(material, [motions[i] for i in part.tolist()], *size, num_frames, generator)
        latents.append(vae.encode(autoencoder, clips).bfloat16())
        photos.append(condition(autoencoder, clips[:, :, :1], num_frames).bfloat16())
    return Clips(latents=torch.cat(latents), photos=torch.cat(photos), motions=order)


def _embedded(count: int, folder: Path, device: torch.device, seed: int) -> Captions:
    drawn = random.Random(seed)
    texts = [captions.caption(name, drawn, None) for name in CATALOGUE for _ in range(count)]
    texts += [captions.neutral(drawn) for _ in range(count)]
    states = text.embed([*texts, ""], folder, device).bfloat16()
    said, empty = states[:-1].view(-1, count, *states.shape[1:]), states[-1:]
    return Captions(states=said[:-1], neutral=said[-1], empty=empty)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a denoiser.")
    parser.add_argument("stages", choices=list(STAGES), nargs="+", metavar="stage", help=", ".join(STAGES))
    parser.add_argument("--data", type=Path, default=Path(".data/photos"))
    parser.add_argument("--vae", type=Path, default=Path(".data/vae/vae"))
    parser.add_argument("--text", type=Path, default=Path(".data/text"))
    parser.add_argument("--out", type=Path, default=Path(".data/experts"))
    parser.add_argument("--base", type=Path, help="folder of the denoiser that experts start from (default: OUT/base)")
    parser.add_argument("--seconds", type=float, default=540.0, help="length of this stretch, preparation included")
    parser.add_argument("--batch", type=int, help="in place of the recipe's")
    parser.add_argument("--clips", type=int, help="in place of the recipe's")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing: less memory, more time")
    parser.add_argument("--eager", action="store_true", help="blocks are not compiled")
    return parser.parse_args()


if __name__ == "__main__":
    main()
