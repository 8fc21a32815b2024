"""A model at true size in a part of the card's memory: what was said, what was measured, and what it costs in time.

    python benchmarks/fit.py --out FOLDER [--only ROW ...] [--offload VALUE ...] [--cap GIB]

With `--offload disk` the weights go to the user's state folder: XDG_STATE_HOME says on which disk.

Each row in a process of its own: random weights on the card, a run with weights that stay, then the same weights in
host memory, and the same run with denoising under a cap on what torch's allocator reserves. Two steps on each side of
the swap of experts. One JSON a row. Weights are random, so that the video means nothing; seconds and bytes do not
depend on them.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from framefit.checkpoint import State
from framefit.device import Device, expand_segments
from framefit.errors import DoesNotFit
from framefit.families import CHECKPOINTS, Checkpoint
from framefit.families.parts import PRECISIONS, Parts
from framefit.ledger import Ledger
from framefit.passes import apply_all, offload
from framefit.pipeline import Pipeline
from framefit.plan import Plan
from framefit.planning import choose, estimated
from framefit.planning.traces import traced
from framefit.request import Request
from framefit.testing import random_parts, randomise

PHOTO = Path(__file__).parents[1] / "framefit" / "assets" / "rocket.jpg"
ROWS = {
    "wan2.2-a14b-480p": ("wan2.2-i2v-a14b", 832, 480, 81),
    "wan2.2-a14b-720p": ("wan2.2-i2v-a14b", 1280, 720, 81),
    "wan2.2-ti2v-5b": ("wan2.2-ti2v-5b", 1280, 704, 121),
    "easyanimate-7b-384": ("easyanimate-v5.1-7b-inp", 672, 384, 49),
    "i2vgen-xl-512": ("i2vgen-xl", 512, 512, 16),
}
"""Row -> model, width, height, frames."""
STEPS = 5
"""Two before and three after Wan2.2-A14B's swap, at both sizes."""
MARGIN = 1.02
"""The cap where none is given: what was said, and this much more."""
FIGURES = ("host_bytes", "pinned_bytes", "disk_bytes", "onload_bytes", "peak_bytes")
GIB = 2**30


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--only", nargs="*", default=list(ROWS)[:2], choices=list(ROWS))
    arguments.add_argument("--offload", nargs="*", default=["block"])
    arguments.add_argument("--cap", type=float, help="GiB that may be reserved while denoising")
    arguments.add_argument("--here", action="store_true", help="one row, in this process")
    flags = arguments.parse_args()
    flags.out.mkdir(parents=True, exist_ok=True)
    for name in flags.only:
        if flags.here:
            perform(name, flags.offload, flags.cap, flags.out)
        else:
            cap = ["--cap", str(flags.cap)] if flags.cap else []
            command = [sys.executable, __file__, "--here", "--out", str(flags.out), "--only", name, *cap]
            subprocess.run([*command, "--offload", *flags.offload], check=False)


def perform(name: str, values: list[str], cap_gib: float | None, folder: Path) -> None:
    """Measure one row with every way of offloading, and write each as it comes."""
    row, (width, height) = CHECKPOINTS[ROWS[name][0]], ROWS[name][1:3]
    plan = _plan(name, "none")
    began = time.perf_counter()
    expand_segments()
    parts = apply_all(_random(row, plan), plan)
    facts: dict[str, Any] = {
        "row": name, "model": row.id, "size": [width, height], "num_frames": ROWS[name][3], "steps": STEPS,
        "device": f"{plan.device.name}, torch {torch.__version__}", "precision": plan.precision,
        "build_s": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    resident, still = _run(plan, parts, None)
    print(f"{name} none: {_summary(resident)}", flush=True)
    for value in values:
        plan = _plan(name, value)
        said = _said(plan, row)
        cap = int((cap_gib or MARGIN * _denoising_gib(said)) * GIB)
        began = time.perf_counter()
        apply_all(parts, plan)
        gc.collect()
        torch.cuda.empty_cache()
        found = facts | {
            "offload": value, "cap_bytes": cap, "predicted": said, "resident": resident,
            "pack_s": round(time.perf_counter() - began, 1),
        }  # fmt: skip
        try:
            offloaded, latents = _run(plan, parts, cap)
            found |= {"offloaded": offloaded, "same_bits": torch.equal(latents, still)}
            found |= {"slower": _ratios(resident, offloaded), "errors": _errors(said, offloaded)}
        except (torch.OutOfMemoryError, DoesNotFit) as error:
            found |= {"failed": " ".join(str(error).split())}
        file = folder / f"fit_{name}_{value.replace(':', '-')}.json"
        file.write_text(json.dumps(found, indent=2) + "\n")
        print(f"{name} {value}: {found.get('failed') or _summary(found['offloaded'])}", flush=True)
        _forget(parts)


def _plan(name: str, value: str) -> Plan:
    id, width, height, num_frames = ROWS[name]
    request = Request(
        image=PHOTO, prompt="the rocket lifts off", model=id, width=width, height=height, num_frames=num_frames,
        steps=STEPS, seed=1,
    )  # fmt: skip
    return choose(request, CHECKPOINTS[id], Device.detect("cuda"), photo_size=(640, 427), settings={"offload": value})


def _random(row: Checkpoint, plan: Plan) -> Parts:
    """On the card: that is where weights that stay are compared, and where random numbers are soon made."""
    parts = random_parts(row, dtype=PRECISIONS[plan.precision], device=torch.device(plan.device.id))
    generator = torch.Generator(plan.device.id).manual_seed(0)
    for part in parts.components.values():
        if isinstance(part, nn.Module):
            randomise(part, generator)
    return parts


def _forget(parts: Parts) -> None:
    """The last way of offloading; its slabs go with the next one's packing, its files at once."""
    offload.remove(parts)
    gc.collect()


def _run(plan: Plan, parts: Parts, cap_bytes: int | None) -> tuple[dict[str, Any], torch.Tensor]:
    """Bytes and seconds of one run, and its latents."""
    reserved: dict[str, int] = {}

    @contextmanager
    def around(name: str) -> Iterator[None]:
        yield
        reserved[name] = max(reserved.get(name, 0), torch.cuda.max_memory_reserved())

    ledger = Ledger(plan.device.id, around=around)
    pipeline = Pipeline(plan, parts, ledger, ladder=False)
    placement = offload.placed(parts)
    steps: list[dict[str, Any]] = []
    moved = [0]

    def on_step(step: Any) -> None:
        now = placement.transfer.moved_bytes if placement else 0
        steps.append({"expert": step.expert, "seconds": round(step.seconds, 4), "moved_bytes": now - moved[0]})
        moved[0] = now

    state: State = pipeline.encode()
    moved[0] = placement.transfer.moved_bytes if placement else 0
    gc.collect()
    torch.cuda.empty_cache()
    device = replace(plan.device, vram_limit_bytes=cap_bytes)
    with device.capped() if cap_bytes else nullcontext():
        pipeline.denoise(state, on_step=on_step)
    frames = sum(1 for _ in pipeline.decode(state))
    memory = psutil.Process().memory_info()
    return {
        "frames": frames, "steps": steps, "host_rss_bytes": memory.rss,
        "pinned_bytes": placement.transfer.pinned_bytes if placement else 0,
        "phases": {
            phase.name: {
                "seconds": round(phase.seconds, 3), "allocated_bytes": phase.peak_bytes,
                "reserved_bytes": reserved[phase.name],
            }
            for phase in ledger.close()
        },
    }, state.latents.cpu()  # fmt: skip


def _said(plan: Plan, row: Checkpoint) -> dict[str, Any]:
    """The dry run's figures and the plan's, by phase."""
    estimate = {phase.name: phase for phase in estimated(plan, row).estimate.phases}
    return {
        trace.name: {
            "allocated_bytes": sum(trace.weights_bytes.values()) + trace.peak_bytes,
            "reserved_bytes": estimate[trace.name].peak_vram_bytes,
            "moved_bytes": trace.bytes["host_to_device"], "estimate": asdict(estimate[trace.name]),
            **{name: getattr(trace, name) for name in FIGURES},
        }
        for trace in traced(plan, row)
    }  # fmt: skip


def _denoising_gib(said: dict[str, Any]) -> float:
    most: int = max(phase["reserved_bytes"] for name, phase in said.items() if name.startswith("denoise"))
    return most / GIB


def _ratios(resident: dict[str, Any], offloaded: dict[str, Any]) -> list[float]:
    """Step by step, offloaded over resident seconds."""
    pairs = zip(offloaded["steps"], resident["steps"], strict=True)
    return [round(ours["seconds"] / theirs["seconds"], 4) for ours, theirs in pairs]


def _errors(said: dict[str, Any], measured: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Predicted over measured, less 1."""
    return {
        name: {
            what: round(phase[what] / measured["phases"][name][what] - 1, 4)
            for what in ("allocated_bytes", "reserved_bytes")
        }
        for name, phase in said.items()
    }


def _summary(result: dict[str, Any]) -> str:
    phases = "  ".join(
        f"{name} {phase['seconds']:.1f} s {phase['allocated_bytes'] / GIB:.2f}/{phase['reserved_bytes'] / GIB:.2f} GiB"
        for name, phase in result["phases"].items()
    )
    return f"steps {[step['seconds'] for step in result['steps']]} s | {phases} (allocated/reserved)"


if __name__ == "__main__":
    main()
