"""What a training step costs, and what each way to make it cheaper gives: milliseconds and peak memory, in one run.

    python -m training.throughput [--out training/results/throughput.json]

The autoencoder with its convolutions as the class has them and flat, its norms compiled or not, and others of its size;
the denoiser compiled, eager, and with gradient checkpointing. Weights and data are random: neither changes the time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from training import experts, text, vae
from training.flat import flatten
from training.stretch import Pace, Trainee

__all__ = ["main"]

RECIPE = Path(__file__).with_name("recipe.toml")
STEPS = 12
WARMUP = 4
SHAPES: tuple[dict[str, Any], ...] = (
    {},
    {"base_dim": 40, "decoder_base_dim": 56, "dim_mult": [1, 2, 2]},
    {"base_dim": 40, "decoder_base_dim": 48, "dim_mult": [1, 2, 2], "num_res_blocks": 2},
)
"""Autoencoders of about as many bytes, as changes to the recipe's."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure training steps.")
    parser.add_argument("--out", type=Path, default=Path("training/results/throughput.json"))
    parser.add_argument("--only", choices=["vae", "denoiser"])
    options = parser.parse_args()
    recipe = tomllib.loads(RECIPE.read_text())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, Any]] = []
    if options.only != "denoiser":
        rows += _autoencoders(recipe, device)
    if options.only != "vae":
        rows += _denoisers(recipe, device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"device": name, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    for row in rows:
        print("  ".join(f"{value:>12}" if isinstance(value, float) else f"{value:<28}" for value in row.values()))


def _autoencoders(recipe: Mapping[str, Any], device: torch.device) -> list[dict[str, Any]]:
    def as_it_is(model: AutoencoderKLWan) -> None:
        """The class's own 3D convolutions."""

    forms: dict[str, Callable[[AutoencoderKLWan], None]] = {"3D": as_it_is, "flat": flatten, "all": vae.hasten}
    torch.backends.cudnn.benchmark = True
    rows = []
    for _, width, height, num_frames, batch in [
        *recipe["vae"]["pictures"]["phases"],
        *recipe["vae"]["clips"]["phases"],
    ]:
        for shape, (form, apply) in itertools.product(SHAPES, forms.items()):
            if shape and form != "all":
                continue
            torch._dynamo.reset()
            settings = recipe["vae"] | shape
            model = vae.build(settings).to(device, torch.bfloat16)
            apply(model)
            clips = torch.rand(batch, 3, num_frames, height, width, device=device, dtype=torch.bfloat16)
            clips = clips.to(memory_format=torch.channels_last_3d)

            def step(model: AutoencoderKLWan = model, clips: torch.Tensor = clips) -> torch.Tensor:
                decoded = model.decode(model.encode(clips).latent_dist.mode()).sample
                error: torch.Tensor = (decoded - clips).square().mean()
                return error

            name = "vae {base_dim}/{decoder_base_dim} {dim_mult} {num_res_blocks}".format(**settings)
            work = f"{batch} of {width}x{height}x{num_frames}"
            rows.append({"model": name, "work": work, "form": form} | _measured(step, model))
    return rows


def _denoisers(recipe: Mapping[str, Any], device: torch.device) -> list[dict[str, Any]]:
    batch = recipe["denoiser"]["batch"]
    width, height = recipe["model"]["sizes"][0]
    inputs = torch.randn(batch, 36, 5, height // 8, width // 8, device=device)
    level = torch.rand(batch, device=device) * 1000
    states = torch.randn(batch, text.MAX_TOKENS, text.WIDTH, device=device)
    rows = []
    for form in ("eager", "checkpointing", "compiled"):
        torch._dynamo.reset()
        model = experts.compute_copy(experts.build(recipe), device)
        if form == "checkpointing":
            model.enable_gradient_checkpointing()
        if form == "compiled":
            model.compile_repeated_blocks(fullgraph=True, dynamic=False)

        def step(model: Any = model) -> torch.Tensor:
            predicted: torch.Tensor = model(
                hidden_states=inputs.to(model.dtype), timestep=level,
                encoder_hidden_states=states.to(model.dtype), return_dict=False,
            )[0]  # fmt: skip
            return predicted.float().square().mean()

        rows.append({"model": "denoiser", "work": f"batch {batch}", "form": form} | _measured(step, model))
    return rows


def _measured(step: Callable[[], torch.Tensor], model: torch.nn.Module) -> dict[str, Any]:
    """Milliseconds of forward and backward, and of the optimisers after them (medians); the most memory held."""
    on_card = next(model.parameters()).is_cuda
    trainee = Trainee(parameters=dict(model.named_parameters()), pace=Pace(seconds=1e9, lr=1e-6))
    spans: dict[str, list[float]] = {"ms": [], "update_ms": []}
    for number in range(WARMUP + STEPS):
        if on_card and number == WARMUP:
            torch.cuda.reset_peak_memory_stats()
        began = _now(on_card)
        step().backward()  # type: ignore[no-untyped-call]
        middle = _now(on_card)
        with torch.no_grad():
            trainee.update()
        spans["ms"].append(middle - began)
        spans["update_ms"].append(_now(on_card) - middle)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_card else 0.0
    medians = {name: round(sorted(times[WARMUP:])[STEPS // 2] * 1000, 1) for name, times in spans.items()}
    return {**medians, "peak_gib": round(peak, 2)}


def _now(on_card: bool) -> float:
    if on_card:
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
