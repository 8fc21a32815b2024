"""The few-step form: low-rank additions with which a run of few steps, unguided, ends where the whole guided run ends.

    python -m training.few [--seconds 300]

The teacher (both experts, guided) runs from noise to the end once for every clip's photo and caption. The student runs
from the same noise in its few steps, with the scheduler of a run, and learns through all of them (after Luhman and
Luhman, arXiv 2101.02388, whose student takes one step).
"""

from __future__ import annotations

import argparse
import json
import time
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from framefit.schedule import Schedule
from training import experts, package
from training.experts import BOUNDARY, Captions, Clips
from training.stretch import Pace, Trainee, train

__all__ = ["ended", "main"]

RECIPE = Path(__file__).with_name("recipe.toml")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
TOGETHER = 48
"""Runs of the teacher at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Runs:
    """Runs of one size: where they start, what they are given, and where the teacher ends."""

    noise: Tensor
    """(N, 16, f, h, w), fp32"""
    photos: Tensor
    """(N, 20, f, h, w)"""
    states: Tensor
    """(N, tokens, D)"""
    ends: Tensor
    """(N, 16, f, h, w), fp32"""


def main() -> None:
    options = _options()
    recipe = tomllib.loads(RECIPE.read_text())
    settings, pace, shift = recipe["few"], Pace(**recipe["pace"]["few"]), recipe["denoiser"]["shift"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began = time.monotonic()
    clips, said = experts.prepare(
        recipe, options.data, options.vae, options.text, device, "few", options.clips or recipe["clips"]["few"]
    )
    folders = [options.experts / name for name in ("high", "low")]
    teachers = [experts.compute_copy(experts.load(folder), device) for folder in folders]
    generator = torch.Generator(device).manual_seed(pace.seed)
    guided = (settings["teacher_steps"], shift, settings["teacher_guidance"])
    runs = [_taught(teachers, group, said, guided, generator) for group in clips]
    prepared_s = time.monotonic() - began
    torch.manual_seed(pace.seed)
    students = [_student(folder, settings["rank"], device) for folder in folders]
    trainee = Trainee(
        parameters={
            f"{prefix}.{name}": parameter
            for prefix, student in zip(("transformer", "transformer_2"), students, strict=True)
            for name, parameter in student.named_parameters()
            if parameter.requires_grad
        },
        pace=pace,
    )

    def loss(progress: float, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        # on the host: to ask the device would wait for it
        (group,) = Random(generator.initial_seed()).choices(runs, weights=recipe["model"]["shares"])
        chosen = torch.randint(len(group.noise), (settings["batch"],), generator=generator, device=device)
        noise, photos, states = (part[chosen] for part in (group.noise, group.photos, group.states))
        end = ended(students, noise, photos, states, settings["steps"], shift)
        return (end - group.ends[chosen]).square().mean(), {}

    finished = train(
        trainee, loss, options.out / "few.state.safetensors", seconds=options.seconds - prepared_s, every=10
    )
    with torch.no_grad():
        trainee.finish()
    weights = {
        f"{prefix}.{name}": value.half().cpu().contiguous()
        for prefix, student in zip(("transformer", "transformer_2"), students, strict=True)
        for name, value in get_peft_model_state_dict(student).items()
    }
    if finished:
        save_file(weights, options.out / "few_step.safetensors")
    report = {
        "finished": finished, "step": trainee.step, "seconds": trainee.seconds, "prepared_s": round(prepared_s, 1),
        "recipe": settings, "pace": asdict(pace), "parameters": sum(w.numel() for w in weights.values()),
        "curve": trainee.curve,
    }  # fmt: skip
    (options.out / "few.json").write_text(json.dumps(report))
    print(
        json.dumps({k: v for k, v in report.items() if k != "curve"} | {"ends": trainee.curve[:1] + trainee.curve[-1:]})
    )


def ended(
    models: Sequence[WanTransformer3DModel],
    noise: Tensor,
    photos: Tensor,
    states: Tensor,
    steps: int,
    shift: float,
    empty: Tensor | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """Where a run of `steps` from `noise` ends, fp32 (B, 16, f, h, w), by the shipped scheduler and with both experts.

    Args:
        photos: mask and encoded photo, (B, 20, f, h, w).
        states: of the caption, (B, tokens, D).
        empty: of no words, (1, tokens, D): what `guidance` leads away from. None: no guidance.
    """
    if empty is not None:
        photos, states = torch.cat([photos, photos]), torch.cat([states, empty.expand_as(states)])
    schedule = Schedule(package.scheduler(shift), steps, noise.device)
    latents = noise
    levels = schedule.timesteps.tolist()  # once: to ask the device waits for it
    for level, t in zip(levels, schedule.timesteps, strict=True):
        model = models[0] if level >= BOUNDARY * schedule.train_timesteps else models[1]
        given = latents if empty is None else torch.cat([latents, latents])
        predicted = model(
            hidden_states=torch.cat([given, photos], dim=1).to(model.dtype),
            timestep=t.expand(len(given)),
            encoder_hidden_states=states.to(model.dtype),
            return_dict=False,
        )[0].float()
        if empty is not None:
            asked, unasked = predicted.chunk(2)
            predicted = unasked + guidance * (asked - unasked)
        latents = schedule.step(predicted, t, latents)
    return latents


@torch.no_grad()
def _taught(
    teachers: Sequence[WanTransformer3DModel],
    clips: Clips,
    said: Captions,
    guided: tuple[int, float, float],
    generator: torch.Generator,
) -> Runs:
    steps, shift, guidance = guided
    noise = torch.randn(clips.latents.shape, generator=generator, device=clips.latents.device)
    states = said.draw(clips.motions, 0.0, generator)
    given = zip(*(torch.split(part, TOGETHER) for part in (noise, clips.photos, states)), strict=True)
    ends = [ended(teachers, start, photos, asked, steps, shift, said.empty, guidance) for start, photos, asked in given]
    return Runs(noise=noise, photos=clips.photos, states=states, ends=torch.cat(ends))


def _student(folder: Path, rank: int, device: torch.device) -> WanTransformer3DModel:
    model = experts.load(folder)
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights=True))
    return experts.compute_copy(model, device)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Distil the experts to a few steps.")
    parser.add_argument("--data", type=Path, default=Path(".data/photos"))
    parser.add_argument("--vae", type=Path, default=Path(".data/vae/vae"))
    parser.add_argument("--text", type=Path, default=Path(".data/text"))
    parser.add_argument("--experts", type=Path, default=Path(".data/experts"))
    parser.add_argument("--out", type=Path, default=Path(".data/experts"))
    parser.add_argument("--seconds", type=float, default=540.0, help="length of this stretch, preparation included")
    parser.add_argument("--clips", type=int, help="in place of the recipe's")
    return parser.parse_args()


if __name__ == "__main__":
    main()
