"""The few-step form: low-rank additions that make each expert jump to where the whole guided run would end.

    python -m training.few [--seconds 300]

From a clip mixed with noise at one of the few levels that a short run visits, the teacher (both experts, guided) goes
all the way down in many small steps; the student, one expert without guidance, learns to name that end at once.
"""

from __future__ import annotations

import argparse
import json
import time
import tomllib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from training import experts
from training.experts import BOUNDARY, Captions, Clips
from training.stretch import Pace, Trainee, train

__all__ = ["main", "run_levels"]

RECIPE = Path(__file__).with_name("recipe.toml")
LOWEST = 1 / 1000
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]


def main() -> None:
    options = _options()
    recipe = tomllib.loads(RECIPE.read_text())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began = time.monotonic()
    clips, said = experts.prepare(
        recipe, options.data, options.vae, options.text, device, "few", options.clips or recipe["clips"]["few"]
    )
    teachers = [experts.compute_copy(experts.load(options.experts / name), device) for name in ("high", "low")]
    if device.type == "cuda":
        for teacher in teachers:
            teacher.compile_repeated_blocks(fullgraph=True, dynamic=False)
    torch.manual_seed(recipe["pace"]["few"]["seed"])
    students = [_student(options.experts / name, recipe["few"]["rank"], device) for name in ("high", "low")]
    trainee = Trainee(
        parameters={
            f"{prefix}.{name}": parameter
            for prefix, student in zip(("transformer", "transformer_2"), students, strict=True)
            for name, parameter in student.named_parameters()
            if parameter.requires_grad
        },
        pace=Pace(**recipe["pace"]["few"]),
    )
    finished = train(
        trainee,
        lambda progress, generator: _loss(teachers, students, clips, said, recipe, generator),
        options.out / "few.state.safetensors",
        seconds=options.seconds - (time.monotonic() - began),
        every=10,
    )
    with torch.no_grad():
        trainee.finish()
    weights = {
        f"{prefix}.{name}": value.half().cpu().contiguous()
        for prefix, student in zip(("transformer", "transformer_2"), students, strict=True)
        for name, value in get_peft_model_state_dict(student).items()
    }
    save_file(weights, options.out / "few_step.safetensors")
    report = {
        "finished": finished, "step": trainee.step, "seconds": trainee.seconds, "recipe": recipe["few"],
        "pace": asdict(trainee.pace), "parameters": sum(w.numel() for w in weights.values()), "curve": trainee.curve,
    }  # fmt: skip
    (options.out / "few.json").write_text(json.dumps(report))
    print(
        json.dumps({k: v for k, v in report.items() if k != "curve"} | {"ends": trainee.curve[:1] + trainee.curve[-1:]})
    )


def run_levels(steps: int, shift: float) -> list[float]:
    """The noise levels that a run of `steps` visits, the highest first; zero, its end, is left out.

    They are those of diffusers' scheduler, which goes down to a thousandth before the shift: the second of four lies
    just above the boundary, and a level on the other side of it would train the expert that does not serve there.
    """
    even = torch.linspace(1, LOWEST, steps + 1, dtype=torch.float64)[:-1]
    levels: list[float] = experts.shifted(even, shift).tolist()
    return levels


def _student(folder: Path, rank: int, device: torch.device) -> WanTransformer3DModel:
    model = experts.load(folder)
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights=True))
    return experts.compute_copy(model, device)


def _loss(
    teachers: list[WanTransformer3DModel],
    students: list[WanTransformer3DModel],
    clips: list[Clips],
    said: Captions,
    recipe: Mapping[str, Any],
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, Tensor]]:
    settings, device = recipe["few"], said.neutral.device
    chance = Random(generator.initial_seed())  # on the host: to ask the device would wait for it
    group = chance.choice(clips)
    chosen = torch.randint(len(group.motions), (settings["batch"],), generator=generator, device=device)
    latents, photos = group.latents[chosen].float(), group.photos[chosen].float()
    states = said.draw(group.motions[chosen], 0.0, generator)
    levels = run_levels(settings["levels"], recipe["denoiser"]["shift"])
    level = chance.choice(levels)
    noise = torch.randn(latents.shape, generator=generator, device=device)
    start = experts.noised(latents, torch.full((len(latents),), level, device=device), noise)
    below = [at for at in run_levels(settings["teacher_steps"], recipe["denoiser"]["shift"]) if at < level - 1e-3]
    end = _descended(teachers, start, [level, *below], photos, states, said.empty, settings["teacher_guidance"])
    predicted = _velocity(students, start, level, photos, states)
    error = (predicted - (start - end) / level).square().mean()
    return error, {f"level_{levels.index(level)}": error * len(levels)}


@torch.no_grad()
def _descended(
    teachers: list[WanTransformer3DModel],
    latents: Tensor,
    levels: list[float],
    photos: Tensor,
    states: Tensor,
    empty: Tensor,
    guidance: float,
) -> Tensor:
    """Where the guided teacher's run ends that starts from `latents` at levels[0]."""
    both = torch.cat([states, empty.expand_as(states)])
    twice = torch.cat([photos, photos])
    for level, lower in zip(levels, [*levels[1:], 0.0], strict=True):
        asked, unasked = _velocity(teachers, torch.cat([latents, latents]), level, twice, both).chunk(2)
        latents = latents + (lower - level) * (unasked + guidance * (asked - unasked))
    return latents


def _velocity(
    models: list[WanTransformer3DModel], latents: Tensor, level: float, photos: Tensor, states: Tensor
) -> Tensor:
    model = models[0] if level >= BOUNDARY else models[1]
    predicted: Tensor = model(
        hidden_states=torch.cat([latents, photos], dim=1).to(model.dtype),
        timestep=torch.full((len(latents),), level * 1000, device=latents.device),
        encoder_hidden_states=states.to(model.dtype),
        return_dict=False,
    )[0]
    return predicted.float()


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
