"""Every model of the memory goals at true size in the goal's memory: what was said, what was measured, what it costs.

    python benchmarks/fit.py predict --out benchmarks/fit_predicted_DATE         no card; filed before anything is run
    python benchmarks/fit.py run benchmarks/fit_predicted_DATE.json --out FOLDER [--only ROW ...]
    python benchmarks/fit.py table FOLDER --out benchmarks/fit_h200_DATE

Each row runs in a process of its own: random weights on the card, a run with the reference's settings, then the
settings that `predict` derived for the goal, and the whole run again, encoding and decoding too, under a cap on what
torch's allocator reserves: the goal, or where nothing fits it what was said and MARGIN more. Two steps on each side of
the swap of experts. Weights are random, so that the video means nothing; seconds and bytes do not depend on them.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import psutil
import torch
from torch import nn

from framefit.checkpoint import State
from framefit.device import Device, expand_segments
from framefit.errors import DoesNotFit
from framefit.families import CHECKPOINTS, Checkpoint
from framefit.families.parts import PRECISIONS, Parts
from framefit.ledger import Ledger
from framefit.passes import apply_all, change, offload
from framefit.pipeline import Pipeline
from framefit.plan import Plan
from framefit.planning import choose, estimated, fitted
from framefit.planning.traces import traced
from framefit.request import Request
from framefit.testing import random_parts, randomise

PHOTO = Path(__file__).parents[1] / "framefit" / "assets" / "rocket.jpg"
CARD = "h200"
GIB = 2**30
RAM_BYTES = 110 * GIB
"""Free for a run beside an H200."""
STEPS = 5
"""Two before and three after Wan2.2-A14B's swap, at both sizes."""
MARGIN = 1.02


@dataclass(frozen=True, slots=True)
class Row:
    model: str
    width: int
    height: int
    num_frames: int
    goal_gib: float
    """That may be reserved."""
    guidance: float | None = None
    """None: the model's own. 1: one branch, where the reference runs both apart anyway."""


ROWS = {
    "i2vgen-xl-512": Row("i2vgen-xl", 512, 512, 16, 4),
    "i2vgen-xl-768-16": Row("i2vgen-xl", 768, 768, 16, 5),
    "i2vgen-xl-768-24": Row("i2vgen-xl", 768, 768, 24, 6),
    "i2vgen-xl-1024": Row("i2vgen-xl", 1024, 1024, 32, 8),
    "easyanimate-7b-384": Row("easyanimate-v5.1-7b-inp", 672, 384, 49, 4),
    "easyanimate-7b-768": Row("easyanimate-v5.1-7b-inp", 1344, 768, 49, 8),
    "wan2.2-a14b-480p": Row("wan2.2-i2v-a14b", 832, 480, 81, 3.3, guidance=1.0),
    "wan2.2-a14b-720p": Row("wan2.2-i2v-a14b", 1280, 720, 81, 5.5, guidance=1.0),
    "wan2.2-ti2v-5b": Row("wan2.2-ti2v-5b", 1280, 704, 121, 5, guidance=1.0),
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = arguments.add_subparsers(dest="way", required=True)
    for name, source in (("predict", None), ("run", "predicted"), ("table", "folder")):
        way = ways.add_parser(name)
        if source:
            way.add_argument(source, type=Path)
        way.add_argument("--out", type=Path, required=True)
        way.add_argument("--only", nargs="*", default=list(ROWS), choices=list(ROWS))
        way.add_argument("--here", action="store_true", help="one row, in this process")
    flags = arguments.parse_args()
    {"predict": _predict, "run": _run_all, "table": _table}[flags.way](flags)


def _predict(flags: argparse.Namespace) -> None:
    found = []
    for name in flags.only:
        goal = int(ROWS[name].goal_gib * GIB)
        plan = _plan(name, Device.named(CARD, vram_bytes=goal, ram_bytes=RAM_BYTES), {})
        plan = fitted(plan, CHECKPOINTS[ROWS[name].model])
        found.append({"row": name, "goal_bytes": goal, "feasible": plan.feasible, **_said(plan)})
        print(f"{name}: {_told(found[-1])}", flush=True)
    flags.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    lines = ["| work | goal GiB | settings | phase | allocated | reserved | pinned |", "|---" * 7 + "|"]
    for each in found:
        settings = " ".join(f"{kind}={value}" for kind, value in each["settings"].items())
        for phase, said in each["phases"].items():
            over = "" if said["reserved_bytes"] <= each["goal_bytes"] else " **over**"
            lines.append(
                f"| {each['row']} | {each['goal_bytes'] / GIB:g} | {settings} | {phase} "
                f"| {said['allocated_bytes'] / GIB:.2f} | {said['reserved_bytes'] / GIB:.2f}{over} "
                f"| {said['pinned_bytes'] / GIB:.1f} |"
            )
    flags.out.with_suffix(".md").write_text("# Said before it is run\n\n" + "\n".join(lines) + "\n")


def _run_all(flags: argparse.Namespace) -> None:
    flags.out.mkdir(parents=True, exist_ok=True)
    said = {each["row"]: each for each in json.loads(flags.predicted.read_text())}
    for name in flags.only:
        if flags.here:
            _measure(name, said[name], flags.out / f"{name}.json")
        else:
            command = [sys.executable, __file__, "run", str(flags.predicted), "--out", str(flags.out), "--here"]
            subprocess.run([*command, "--only", name], check=False)


def _measure(name: str, said: dict[str, Any], file: Path) -> None:
    """One row, and its file."""
    checkpoint, card = CHECKPOINTS[ROWS[name].model], Device.detect("cuda")
    usual = _plan(name, card, {})
    began = time.perf_counter()
    expand_segments()
    parts = apply_all(_random(checkpoint, usual), usual)
    build_s = time.perf_counter() - began
    resident, still = _run(usual, parts, None)
    print(f"{name} resident: {_summary(resident)}", flush=True)
    plan = _plan(name, card, said["settings"])
    need = max(phase["reserved_bytes"] for phase in said["phases"].values())
    cap = said["goal_bytes"] if said["feasible"] else int(MARGIN * need)
    began = time.perf_counter()
    change(parts, usual, plan)
    gc.collect()
    torch.cuda.empty_cache()
    found: dict[str, Any] = {
        "row": name, "device": f"{card.name}, torch {torch.__version__}", "precision": plan.precision, "said": said,
        "cap_bytes": cap, "build_s": round(build_s, 1), "pack_s": round(time.perf_counter() - began, 1),
        "resident": resident,
    }  # fmt: skip
    try:
        fitting, latents = _run(plan, parts, cap)
        found["fitting"] = fitting
        found["relative_l2"] = float((latents - still).norm() / still.norm())
        found["slower"] = sum(s["seconds"] for s in fitting["steps"][1:]) / sum(
            s["seconds"] for s in resident["steps"][1:]
        )
    except (torch.OutOfMemoryError, DoesNotFit) as error:
        found["failed"] = " ".join(str(error).split())
    file.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{name} in {cap / GIB:.2f} GiB: {found.get('failed') or _summary(found['fitting'])}", flush=True)


def _plan(name: str, device: Device, settings: dict[str, str]) -> Plan:
    row = ROWS[name]
    request = Request(
        image=PHOTO, prompt="the rocket lifts off", model=row.model, width=row.width, height=row.height,
        num_frames=row.num_frames, steps=STEPS, seed=1, guidance=None if row.guidance is None else (row.guidance,),
    )  # fmt: skip
    return choose(request, CHECKPOINTS[row.model], device, photo_size=(640, 427), settings=settings)


def _random(checkpoint: Checkpoint, plan: Plan) -> Parts:
    """On the card: that is where weights that stay are compared, and where random numbers are soon made."""
    parts = random_parts(checkpoint, dtype=PRECISIONS[plan.precision], device=torch.device(plan.device.id))
    generator = torch.Generator(plan.device.id).manual_seed(0)
    for part in parts.components.values():
        if isinstance(part, nn.Module):
            randomise(part, generator)
    return parts


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
    before = placement.transfer.moved_bytes if placement else 0
    with replace(plan.device, vram_limit_bytes=cap_bytes).capped() if cap_bytes else nullcontext():
        state: State = pipeline.encode()
        pipeline.denoise(
            state, on_step=lambda step: steps.append({"expert": step.expert, "seconds": round(step.seconds, 4)})
        )
        frames = sum(1 for _ in pipeline.decode(state))
    return {
        "frames": frames, "steps": steps, "host_rss_bytes": psutil.Process().memory_info().rss,
        "pinned_bytes": placement.transfer.pinned_bytes if placement else 0,
        "moved_bytes": placement.transfer.moved_bytes - before if placement else 0,
        "phases": {
            phase.name: {
                "seconds": round(phase.seconds, 3), "allocated_bytes": phase.peak_bytes,
                "reserved_bytes": reserved[phase.name],
            }
            for phase in ledger.close()
        },
    }, state.latents.cpu()  # fmt: skip


def _said(plan: Plan) -> dict[str, Any]:
    """The settings that differ from the reference's, and the figures by phase."""
    checkpoint = CHECKPOINTS[plan.request.model]
    usual = {s.type: s.value for s in choose(
        Request(image=PHOTO, prompt="-", model=checkpoint.id, seed=1), checkpoint, plan.device, photo_size=(640, 427)
    ).settings}  # fmt: skip
    estimate = {phase.name: phase for phase in estimated(plan, checkpoint).estimate.phases}
    phases = {
        trace.name: {
            "allocated_bytes": sum(trace.weights_bytes.values()) + trace.peak_bytes,
            "reserved_bytes": estimate[trace.name].peak_vram_bytes, "host_bytes": estimate[trace.name].host_bytes,
            "pinned_bytes": trace.pinned_bytes, "seconds": estimate[trace.name].seconds,
            "held": dict(estimate[trace.name].held),
        }
        for trace in traced(plan, checkpoint)
    }  # fmt: skip
    return {"settings": {s.type: s.value for s in plan.settings if s.value != usual[s.type]}, "phases": phases}


def _table(flags: argparse.Namespace) -> None:
    found = [json.loads((flags.folder / f"{name}.json").read_text()) for name in flags.only]
    flags.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    head = [
        "work",
        "settings",
        "cap GiB",
        "phase",
        "allocated",
        "said",
        "reserved",
        "said",
        "s resident",
        "s",
        "pinned",
    ]
    lines, points = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"], []
    for each in found:
        settings = " ".join(f"{kind}={value}" for kind, value in each["said"]["settings"].items())
        if "failed" in each:
            lines.append(
                f"| {each['row']} | {settings} | {each['cap_bytes'] / GIB:.2f} | {each['failed']} |" + " |" * 7
            )
            continue
        for name, phase in each["fitting"]["phases"].items():
            said = each["said"]["phases"][name]
            cells = [f"{phase[what] / GIB:.2f} | {said[what] / phase[what] - 1:+.1%}" for what in BYTES]
            points += [(phase[what] / GIB, said[what] / GIB, what) for what in BYTES]
            lines.append(
                f"| {each['row']} | {settings} | {each['cap_bytes'] / GIB:.2f} | {name} | {' | '.join(cells)} "
                f"| {each['resident']['phases'][name]['seconds']:.2f} | {phase['seconds']:.2f} "
                f"| {each['fitting']['pinned_bytes'] / GIB:.1f} |"
            )
        lines.append(
            f"| {each['row']} | steps: {each['slower'] - 1:+.1%}, relative L2 {each['relative_l2']:.2g} |" + " |" * 9
        )
    flags.out.with_suffix(".md").write_text(
        f"# In the goals' memory\n\n{found[0]['device']}\n\n" + "\n".join(lines) + "\n"
    )
    _draw(points, flags.out.with_suffix(".png"))


BYTES = ("allocated_bytes", "reserved_bytes")


def _draw(points: list[tuple[float, float, str]], file: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 6), layout="constrained")
    for what, mark in zip(BYTES, "ox", strict=True):
        seen = [(measured, said) for measured, said, of in points if of == what]
        axes.scatter(*zip(*seen, strict=True), marker=mark, label=what.removesuffix("_bytes"))
    most = max(max(point[:2]) for point in points) * 1.05
    axes.plot([0, most], [0, most], color="grey", linewidth=0.8)
    axes.set(xlabel="measured, GiB", ylabel="said before, GiB", xlim=(0, most), ylim=(0, most))
    axes.legend()
    figure.savefig(file, dpi=110)


def _told(said: dict[str, Any]) -> str:
    peaks = "  ".join(f"{name} {phase['reserved_bytes'] / GIB:.2f}" for name, phase in said["phases"].items())
    settings = " ".join(f"{kind}={value}" for kind, value in said["settings"].items())
    return f"{'fits' if said['feasible'] else 'does not fit'} {said['goal_bytes'] / GIB:g} GiB with {settings}: {peaks}"


def _summary(result: dict[str, Any]) -> str:
    phases = "  ".join(
        f"{name} {phase['seconds']:.1f} s {phase['allocated_bytes'] / GIB:.2f}/{phase['reserved_bytes'] / GIB:.2f} GiB"
        for name, phase in result["phases"].items()
    )
    return f"steps {[step['seconds'] for step in result['steps']]} s | {phases} (allocated/reserved)"


if __name__ == "__main__":
    main()
