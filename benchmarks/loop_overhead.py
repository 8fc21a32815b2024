"""Our loop against diffusers' own pipeline on the same tiny model: what progress, checks and checkpoints cost a step.

    python benchmarks/loop_overhead.py [--out FILE.json]

Both run the same checkpoint at a size where a step takes tens of milliseconds, alternating, the pipeline's and ours;
the figure is the median over repeats of seconds a step, and its difference. Peak memory is not the point here.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch

from framefit.checkpoint import RunFolder, Writer
from framefit.device import Device
from framefit.families.parts import load_parts
from framefit.passes import apply_all
from framefit.pipeline import Pipeline
from framefit.planning import choose
from framefit.request import Request
from framefit.testing import save_tiny

PHOTO = Path(__file__).parents[1] / "framefit" / "assets" / "rocket.jpg"
STEPS, REPEATS = 12, 15


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", type=Path)
    out = arguments.parse_args().out
    diffusers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(Path(scratch))
    print(json.dumps(result, indent=2))
    if out:
        out.write_text(json.dumps(result, indent=2) + "\n")


def measure(scratch: Path) -> dict[str, object]:
    row = save_tiny("wan2.2-i2v-a14b", scratch / "tiny")
    request = Request(
        image=PHOTO, prompt="the rocket lifts off", model=str(row.folder), width=192, height=128, num_frames=17,
        steps=STEPS, guidance=(3.5, 3.5), seed=1,
    )  # fmt: skip
    plan = choose(request, row, Device.detect("cpu"), photo_size=(640, 427))
    parts = apply_all(load_parts(row, scratch / "tiny", dtype=torch.float32, device=torch.device("cpu")), plan)
    run = RunFolder.create(scratch, plan, "tiny", scratch / "out.mp4")
    ours = Pipeline(plan, parts)
    samples: dict[str, list[float]] = {"diffusers": [], "framefit": [], "framefit_with_checkpoints": []}
    reference = reference_loop(ours)
    for _ in range(REPEATS):
        samples["diffusers"].append(reference())
        samples["framefit"].append(our_loop(ours, None))
        samples["framefit_with_checkpoints"].append(our_loop(ours, run))
    medians = {name: statistics.median(values) * 1e3 for name, values in samples.items()}
    return {
        "work": "wan2.2-i2v-a14b made tiny, 192x128, 17 frames, 12 steps, guidance on, fp32",
        "machine": f"{Device.detect('cpu').name}, torch {torch.__version__}, Python {platform.python_version()}",
        "ms_per_step": {name: round(value, 3) for name, value in medians.items()},
        "overhead_ms": {
            name: round(value - medians["diffusers"], 3) for name, value in medians.items() if name != "diffusers"
        },
        "overhead_percent": {
            name: round(100 * (value / medians["diffusers"] - 1), 2)
            for name, value in medians.items()
            if name != "diffusers"
        },
        "spread_ms": {name: round(statistics.stdev(v) * 1e3, 3) for name, v in samples.items()},
    }


def reference_loop(ours: Pipeline) -> Callable[[], float]:
    """A function that runs diffusers' loop alone: everything before its first step is prepared or not counted."""
    parts, request = ours.parts, ours.plan.request
    components = {c.name: parts[c.name] for c in parts.checkpoint.components}
    pipeline = diffusers.WanImageToVideoPipeline(boundary_ratio=0.9, **components)
    pipeline.set_progress_bar_config(disable=True)
    image = ours._photo(request.image)

    def run() -> float:
        marks: list[float] = []

        def mark(pipe: object, index: int, t: object, tensors: dict[str, object]) -> dict[str, object]:
            marks.append(time.perf_counter())
            return {}

        pipeline(
            image=image, prompt=request.prompt, negative_prompt=request.negative_prompt, width=request.width,
            height=request.height, num_frames=request.num_frames, num_inference_steps=STEPS, guidance_scale=3.5,
            guidance_scale_2=3.5, output_type="latent", callback_on_step_end=mark,
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        return (marks[-1] - marks[0]) / (STEPS - 1)

    return run


def our_loop(ours: Pipeline, run: RunFolder | None) -> float:
    state = ours.encode()
    marks: list[float] = []
    writer = Writer(run, every_s=0, always=lambda _: True) if run else None
    ours.denoise(state, on_step=lambda _: marks.append(time.perf_counter()), save=writer)
    if writer:
        writer.wait()
    return (marks[-1] - marks[0]) / (STEPS - 1)


if __name__ == "__main__":
    sys.exit(main())
