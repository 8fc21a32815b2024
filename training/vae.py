"""The video autoencoder: pictures first, then clips, short ones before those that the model makes, then both in turn.

    python -m training.vae pictures [--seconds 540]
    python -m training.vae clips
    python -m training.vae together

A picture is a clip of one frame: a third of the work of a frame among others, and most of what is to be learnt.

Wan's own class with its stride of 4x8x8 and 16 channels. Pixels are folded 2x2 before the first convolution (as in
Wan2.2's autoencoder), so that no convolution runs at full resolution: that is where a small one spends its time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm
from torch import Tensor, nn
from torch.nn import functional

from framefit import photo
from framefit.families.pixels import to_tensor
from training import scenes
from training.flat import flatten
from training.motion import CATALOGUE
from training.stretch import Pace, Trainee, train

__all__ = ["build", "encode", "hasten", "judge", "load", "main", "psnr"]

RECIPE = Path(__file__).with_name("recipe.toml")
STAGES = ("pictures", "clips", "together")
KL = 1e-4
"""Weight of the mean KL divergence per latent value."""


def main() -> None:
    options = _options()
    recipe = tomllib.loads(RECIPE.read_text())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    filed, before = options.out / f"{options.stage}.json", STAGES[: STAGES.index(options.stage)]
    for name in before[-1:]:
        if not _finished(options.out / f"{name}.json"):
            raise SystemExit(f"{options.stage} goes on from {name}, which is not finished: train that first.")
    if _finished(filed):
        raise SystemExit(f"{options.stage} is finished: delete {filed} and its state to train it again.")
    material = scenes.load(options.data, device, drawn=recipe["data"]["drawn"], seed=recipe["data"]["seed"])
    settings = recipe["vae"][options.stage]
    pace = Pace(**settings["pace"])
    torch.manual_seed(pace.seed)
    vae = build(recipe["vae"]) if options.stage == "pictures" else load(options.out / "vae", torch.device("cpu"))
    vae = vae.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    if device.type == "cuda":
        hasten(vae)
    trainee = Trainee(parameters=dict(vae.named_parameters()), pace=pace)

    def loss(progress: float, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        # on the host: to ask the device would wait for it
        chance = Random(generator.initial_seed())
        place = chance.random() if settings["by_lot"] else progress
        clips = _drawn(material, _phase(settings["phases"], place), chance, generator)
        return _loss(vae, clips.to(vae.dtype), generator)

    finished = train(trainee, loss, options.out / f"{options.stage}.safetensors", seconds=options.seconds)
    with torch.no_grad():
        trainee.finish()
        vae = vae.float()
        _measure_latents(vae, material, recipe["model"])
        vae.half().save_pretrained(options.out / "vae")
        size = tuple(recipe["model"]["sizes"][0])
        figures = judge(load(options.out / "vae", device), options.heldout, size, device)
    report = {
        "stage": options.stage, "finished": finished, "step": trainee.step, "seconds": trainee.seconds,
        "parameters": sum(p.numel() for p in vae.parameters()), "recipe": recipe["vae"], "photos": len(material.sizes),
        "heldout": figures, "curve": trainee.curve,
    }  # fmt: skip
    filed.write_text(json.dumps(report))
    print(json.dumps({k: v for k, v in report.items() if k != "curve"} | {"last": trainee.curve[-1:]}))


def _finished(report: Path) -> bool:
    return report.exists() and bool(json.loads(report.read_text())["finished"])


def build(recipe: Mapping[str, Any]) -> AutoencoderKLWan:
    """A fresh autoencoder that begins as one of pictures: earlier frames count for nothing yet.

    What joins frames begins as a mean, and what parts them as a repetition.
    """
    folded = 3 * recipe["patch_size"] ** 2
    names = ("base_dim", "decoder_base_dim", "dim_mult", "num_res_blocks", "patch_size", "is_residual")
    vae = AutoencoderKLWan(
        **{name: recipe[name] for name in names},
        temperal_downsample=[True] * (len(recipe["dim_mult"]) - 1),
        in_channels=folded,
        out_channels=folded,
    )
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, WanCausalConv3d) and module.kernel_size == (3, 3, 3):
                module.weight[:, :, :-1] = 0
                module.weight[:, :, -1] *= 3**0.5
            mode = getattr(module, "mode", None)
            if mode not in ("downsample3d", "upsample3d"):
                continue
            weight = module.time_conv.weight
            weight.mul_(0.5)
            same = torch.eye(weight.shape[1])
            if mode == "downsample3d":
                weight[:, :, 1:, 0, 0] += 0.5 * same[:, :, None]
            else:
                weight[:, :, 2, 0, 0] += torch.cat([same, same])
    return vae


def load(folder: Path, device: torch.device) -> AutoencoderKLWan:
    """The trained autoencoder in fp32."""
    return AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32).to(device).eval()


def encode(vae: AutoencoderKLWan, clips: Tensor) -> Tensor:
    """(B, 3, F, H, W) in [-1, 1] -> the posterior's mode, normalised, fp32 (B, 16, f, h, w)."""
    config = vae.config
    latents = vae.encode(clips.to(vae.dtype)).latent_dist.mode().float()
    mean, std = (
        torch.tensor(v, device=latents.device).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std)
    )
    normalised: Tensor = (latents - mean) / std
    return normalised


def psnr(one: Tensor, other: Tensor) -> Tensor:
    """(B,) dB of pictures or clips in [-1, 1]."""
    error = (one.float() - other.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=1e-10))


@torch.no_grad()
def judge(vae: AutoencoderKLWan, heldout: Path, size: tuple[int, int], device: torch.device) -> dict[str, Any]:
    """PSNR on photos that training never saw: as a run sees them, moving, and shrunk 4x and back (how easy)."""
    material = scenes.load(heldout, device, drawn=0, seed=0)
    generator = torch.Generator(device)
    figures: dict[str, list[float]] = {"still_db": [], "moving_db": [], "shrunk_db": []}
    for number, file in enumerate(sorted(heldout.glob("*.jpg"))):
        picture = photo.load(file)
        width, height = size if picture.width >= picture.height else size[::-1]
        still = to_tensor(photo.fit(picture, width, height, "crop")).unsqueeze(2).to(device)
        one = material.subset(torch.tensor([number], device=device))
        pan, seed = [CATALOGUE["pan-left"]], generator.manual_seed(number)
        clip = scenes.render(one, pan, width, height, 17, seed, recolour=False)
        shrunk = functional.interpolate(functional.avg_pool2d(still[:, :, 0], 4), scale_factor=4, mode="bicubic")
        for name, made, original in (
            ("still_db", _there_and_back(vae, still), still),
            ("moving_db", _there_and_back(vae, clip), clip),
            ("shrunk_db", shrunk.clamp(-1, 1).unsqueeze(2), still),
        ):
            figures[name].append(round(psnr(made, original).item(), 2))
    return {name: {"mean": round(sum(v) / len(v), 2), "min": min(v), "all": v} for name, v in figures.items()}


def _loss(vae: AutoencoderKLWan, clips: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    posterior = vae.encode(clips).latent_dist
    mean, deviation = posterior.mean.float(), (0.5 * posterior.logvar.float()).exp()
    latents = mean + deviation * torch.randn(mean.shape, generator=generator, device=mean.device)
    divergence = 0.5 * (mean.square() + deviation.square() - 1 - posterior.logvar.float()).mean()
    decoded = vae.decode(latents.to(vae.dtype)).sample
    error = (decoded.float() - clips.float()).square().flatten(1).mean(1)
    # the root, per clip: PSNR is a mean of logarithms, and the square alone would see only the hardest clips
    value = (error + 1e-6).sqrt().mean() + KL * divergence
    return value, {"db": psnr(decoded, clips).mean(), "kl": divergence}


@torch.no_grad()
def _drawn(
    material: scenes.Scenes, phase: tuple[int, int, int, int], chance: Random, generator: torch.Generator
) -> Tensor:
    """The clips of a step, upright every third time."""
    width, height, num_frames, batch = phase
    if chance.random() < 1 / 3:
        width, height = height, width
    motions = [CATALOGUE[name] for name in chance.choices(list(CATALOGUE), k=batch)]
    clips = scenes.render(material, motions, width, height, num_frames, generator)
    return clips.to(memory_format=torch.channels_last_3d)


def _phase(phases: list[list[float]], place: float) -> tuple[int, int, int, int]:
    """Width, height, frames and batch of the phase that holds `place` in [0, 1]."""
    ends = itertools.accumulate(share for share, *_ in phases)
    now = next((phase for phase, end in zip(phases, ends, strict=True) if place < end), phases[-1])
    width, height, num_frames, batch = (int(n) for n in now[1:])
    return width, height, num_frames, batch


def _there_and_back(vae: AutoencoderKLWan, clips: Tensor) -> Tensor:
    decoded: Tensor = vae.decode(vae.encode(clips).latent_dist.mode()).sample
    return decoded


def _measure_latents(vae: AutoencoderKLWan, material: scenes.Scenes, model: Mapping[str, Any]) -> None:
    """Mean and deviation of each channel over clips of the model's size, written into the configuration."""
    generator = torch.Generator(material.canvases.device).manual_seed(0)
    names = [n for n in CATALOGUE if "object" not in n]
    width, height = model["sizes"][0]
    latents = [
        vae.encode(
            scenes.render(material, [CATALOGUE[n] for n in names], width, height, model["num_frames"], generator)
        )
        .latent_dist.mode()
        .transpose(0, 1)
        .flatten(1)
        for _ in range(4)
    ]
    values = torch.cat(latents, dim=1)
    vae.register_to_config(latents_mean=values.mean(1).tolist(), latents_std=values.std(1).tolist())


def hasten(vae: AutoencoderKLWan) -> None:
    """On a card: convolutions in the form that cuDNN is good at, and one kernel for each norm instead of seven."""
    flatten(vae)
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.recompile_limit = 64
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last)
        elif isinstance(module, WanRMS_norm):
            module.compile(dynamic=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the video autoencoder.")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--data", type=Path, default=Path(".data/photos"))
    parser.add_argument("--heldout", type=Path, default=Path("training/heldout"))
    parser.add_argument("--out", type=Path, default=Path(".data/vae"))
    parser.add_argument("--seconds", type=float, default=540.0, help="length of this stretch")
    return parser.parse_args()


if __name__ == "__main__":
    main()
