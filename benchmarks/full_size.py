"""Every row at true size with random weights on one card: does it run, how long does each phase take, what is the peak?

    python benchmarks/full_size.py --out FILE.json [--only ID ...] [--steps 3]

Nothing is downloaded. Weights are random, so that the video means nothing; seconds and bytes do not depend on them.
Weights are resident, the guidance branches run as the reference pipelines run them, no technique is applied.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch

from framefit.checkpoint import RunFolder, State, Writer
from framefit.device import Device
from framefit.families import CHECKPOINTS
from framefit.families.parts import PRECISIONS
from framefit.ledger import Ledger
from framefit.passes import apply_all
from framefit.pipeline import Pipeline
from framefit.plan import Plan
from framefit.planning import choose
from framefit.request import Request
from framefit.testing import random_parts

PHOTO = Path(__file__).parents[1] / "framefit" / "assets" / "rocket.jpg"
WORK = {
    "i2vgen-xl": (512, 512, 16),
    "wan2.2-ti2v-5b": (1280, 704, 121),
    "easyanimate-v5.1-7b-inp": (672, 384, 49),
    "easyanimate-v5-7b-zh-inp": (672, 384, 49),
    "easyanimate-v5.1-12b-inp": (672, 384, 49),
    "wan2.1-i2v-14b-480p": (832, 480, 81),
    "wan2.2-i2v-a14b": (832, 480, 81),
}
"""Row -> width, height, frames. The 720P row of Wan 2.1 is the 480P one in another size."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--only", nargs="*", default=list(WORK))
    arguments.add_argument("--steps", type=int, default=3)
    flags = arguments.parse_args()
    results = []
    for id in flags.only:
        try:
            results.append(measure(id, flags.steps))
        except Exception as error:  # one row that fails must not hide the others
            results.append({"id": id, "error": f"{type(error).__name__}: {error}"})
        gc.collect()
        torch.cuda.empty_cache()
        flags.out.write_text(json.dumps(results, indent=2) + "\n")
        print(summary(results[-1]), flush=True)


def measure(id: str, steps: int) -> dict[str, object]:
    width, height, num_frames = WORK[id]
    row, device = CHECKPOINTS[id], Device.detect("cuda")
    request = Request(
        image=PHOTO, prompt="the rocket lifts off", model=id, width=width, height=height, num_frames=num_frames,
        steps=steps, seed=1,
    )  # fmt: skip
    plan = choose(request, row, device, photo_size=(640, 427))
    ledger = Ledger(device.id)
    began = time.perf_counter()
    with ledger.phase("load"):
        parts = apply_all(
            random_parts(row, dtype=PRECISIONS[plan.precision], device=torch.device(device.id)), plan
        )  # fmt: skip
    resident = torch.cuda.memory_allocated()
    pipeline = Pipeline(plan, parts, ledger)
    state = pipeline.encode()
    checkpointed, written = with_checkpoints(pipeline, state, plan)
    plain = steps_of(pipeline, state)
    frames = sum(1 for _ in pipeline.decode(state))
    return {
        "id": id,
        "size": [width, height],
        "num_frames": frames,
        "device": f"{device.name}, torch {torch.__version__}",
        "precision": plan.precision,
        "weights_bytes": {"predicted": plan.estimate.weights_bytes, "allocated": resident},
        "seconds": round(time.perf_counter() - began, 2),
        "seconds_a_step": plain,
        "seconds_a_step_with_checkpoints": checkpointed,
        "bytes_a_checkpoint": written,
        "phases": [
            {"name": p.name, "seconds": round(p.seconds, 3), "peak_bytes": p.peak_bytes} for p in ledger.close()
        ],
        "notices": ledger.notices,
    }


def steps_of(pipeline: Pipeline, state: State, save: Writer | None = None) -> list[float]:
    """Wall seconds from the end of one step to the end of the next, the first step left out."""
    marks: list[float] = []
    pipeline.denoise(state, on_step=lambda _: marks.append(time.perf_counter()), save=save)
    return [round(after - before, 4) for before, after in pairwise(marks)]


def with_checkpoints(pipeline: Pipeline, state: State, plan: Plan) -> tuple[list[float], int]:
    """The same steps with every state written to disk beside them, and the bytes of one."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        with RunFolder.create(root, plan, "random", root / "out.mp4") as run:
            writer = Writer(run, every_s=0, always=lambda _: True)
            seconds = steps_of(pipeline, state.snapshot(), writer)
            writer.wait()
            return seconds, (run.path / "step.safetensors").stat().st_size


def summary(result: dict[str, object]) -> str:
    if "error" in result:
        return f"{result['id']}: {result['error']}"
    phases = "  ".join(f"{p['name']} {p['seconds']:.2f} s {p['peak_bytes'] / 2**30:.1f} GiB" for p in result["phases"])
    plain, checkpointed = result["seconds_a_step"][-1], result["seconds_a_step_with_checkpoints"][-1]
    return (
        f"{result['id']} {result['size']} x {result['num_frames']}: step {plain} s, with a checkpoint "
        f"of {result['bytes_a_checkpoint'] / 2**20:.0f} MiB {checkpointed} s | {phases}"
    )


if __name__ == "__main__":
    main()
