"""Every model of the memory goals at true size, in the goal's memory and as other plans: what was said, what it takes.

    python benchmarks/fit.py predict --rates benchmarks/rates_h200_DATE.json --out benchmarks/fit_predicted_DATE
                                                                no card; filed before anything is run
    python benchmarks/fit.py run benchmarks/fit_predicted_DATE.json --out FOLDER [--only ROW ...]
    python benchmarks/fit.py table FOLDER --out benchmarks/fit_h200_DATE

Each row runs in a process of its own: random weights on the card, once to warm up, then whole runs, encoding and
decoding too, one plan after the other; what is said of each knows which convolutions those before it have met.

- "resident" is the reference, and has the whole card: a limit would slow it.
- "goal" is what `predict` derived for the goal's memory, with two steps or more on each side of the swap of experts: it
  runs under a cap on what torch's allocator reserves, the goal.
- "host" is what was derived for the goal's memory beside HOST_BYTES of RAM, which nothing enforces; XDG_STATE_HOME
  needs room for the weights.
- "near" encodes and decodes as the plan before it, but with the VAE near, under a cap of NEAR_BYTES. It denoises
  nothing.
- Every other plan, and one that does not fit, runs under what was said and MARGIN more.

Weights are random, so that the video means nothing; seconds and bytes do not depend on them. Predict with the versions
of the libraries that will run: another transformers computes attention otherwise.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt
import psutil
import torch
from torch import nn

from framefit import rates
from framefit.checkpoint import State
from framefit.device import Device, expand_segments, state_folder
from framefit.errors import DoesNotFit
from framefit.families import CHECKPOINTS, Checkpoint
from framefit.families.parts import PRECISIONS, Parts
from framefit.ledger import Ledger
from framefit.ledger.phases import resident_peak
from framefit.ledger.transfer import Transfer
from framefit.passes import apply_all, change, offload
from framefit.pipeline import Pipeline
from framefit.plan import Plan
from framefit.planning import choose, fitted
from framefit.planning.estimate import replayed, steps_of, with_phases
from framefit.planning.traces import traced
from framefit.rates import Rates
from framefit.request import Request
from framefit.testing import random_parts, randomise

PHOTO = Path(__file__).parents[1] / "framefit" / "assets" / "rocket.jpg"
CARD = "h200"
GIB = 2**30
RAM_BYTES = 110 * GIB
"""Free for a run beside an H200."""
HOST_BYTES = 28 * GIB
"""Free on a host with 32 GiB."""
NEAR_BYTES = 2 * GIB
STEPS = 5
"""Two before and three after Wan2.2-A14B's swap, at both sizes."""
FEW = 2
"""Of the plans that are only there to be compared, and of the warm-up: one on each side of the swap."""
MARGIN = 1.02
OTHERS = {"block": {"offload": "block"}, "rows": {"chunk": "rows", "offload": "leaf"}}
"""Plans beside "resident", which is the reference's own, and "goal"."""
BYTES, SECONDS = ("allocated_bytes", "reserved_bytes"), "seconds"
HOST = ("host_bytes", "pinned_bytes", "moved_bytes", "disk_bytes")
LOOK_S = 0.05
"""Between two looks at what is pinned."""


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
    others: bool = True
    """Whether the other plans are measured, too."""
    near: str = ""
    """The decode that is near enough for NEAR_BYTES, where there is one."""
    host: bool = False
    """Whether it is measured with HOST_BYTES of RAM, too."""


ROWS = {
    "i2vgen-xl-512": Row("i2vgen-xl", 512, 512, 16, 4),
    "i2vgen-xl-768-16": Row("i2vgen-xl", 768, 768, 16, 5),
    "i2vgen-xl-768-24": Row("i2vgen-xl", 768, 768, 24, 6),
    "i2vgen-xl-1024": Row("i2vgen-xl", 1024, 1024, 32, 8),
    "easyanimate-7b-384": Row("easyanimate-v5.1-7b-inp", 672, 384, 49, 4),
    "easyanimate-7b-768": Row("easyanimate-v5.1-7b-inp", 1344, 768, 49, 8, others=False),
    "wan2.2-a14b-480p": Row("wan2.2-i2v-a14b", 832, 480, 81, 3.3, guidance=1.0, near="blend:384", host=True),
    "wan2.2-a14b-720p": Row("wan2.2-i2v-a14b", 1280, 720, 81, 5.5, guidance=1.0, others=False, near="blend:320"),
    "wan2.2-ti2v-5b": Row("wan2.2-ti2v-5b", 1280, 704, 121, 5, guidance=1.0, near="blend:80"),
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = arguments.add_subparsers(dest="way", required=True)
    for name, source in (("predict", None), ("run", "predicted"), ("table", "folder")):
        way = ways.add_parser(name)
        if source:
            way.add_argument(source, type=Path)
        else:
            way.add_argument("--rates", type=Path, help="that doctor --probe filed on the card; default: data sheet")
        way.add_argument("--out", type=Path, required=True)
        way.add_argument("--only", nargs="*", default=list(ROWS), choices=list(ROWS))
        way.add_argument("--here", action="store_true", help="one row, in this process")
    flags = arguments.parse_args()
    {"predict": _predict, "run": _run_all, "table": _table}[flags.way](flags)


def _predict(flags: argparse.Namespace) -> None:
    found = []
    if flags.rates:
        probed = Rates.from_json(next(iter(json.loads(flags.rates.read_text()).values())))
        rates.filed = lambda name, file=None: probed
    for name in flags.only:
        row, goal = ROWS[name], int(ROWS[name].goal_gib * GIB)
        whole = Device.named(CARD, ram_bytes=RAM_BYTES)
        plan = _fitted(name, replace(whole, vram_limit_bytes=goal))
        plans, most = {"resident": _plan(name, whole, {}, STEPS), "goal": plan}, {"goal": goal}
        if row.others:
            plans |= {key: _plan(name, whole, settings, FEW) for key, settings in OTHERS.items()}
        if row.host:
            host = Device.named(CARD, ram_bytes=HOST_BYTES)
            plans["host"], most["host"] = _fitted(name, replace(host, vram_limit_bytes=goal)), goal
        if row.near:  # the last one: its VAE stays in 16 bits
            settings = {s.type: s.value for s in list(plans.values())[-1].settings} | {"decode": row.near}
            plans["near"], most["near"] = _plan(name, whole, settings, STEPS), NEAR_BYTES
        met = _shapes(plans["resident"])  # to warm up, too
        said = {}
        for key, each in plans.items():
            said[key] = _said(each, met, key, most.get(key))
            met |= _shapes(each)
        found.append({"row": name, "plans": said})
        for key, each in said.items():
            print(f"{name} {key}: {_told(each)}", flush=True)
    flags.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    head = ["work", "plan", "settings", "phase", "allocated GiB", "needed", "reserved", "seconds", "pinned"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for of in found:
        for key, each in of["plans"].items():
            most = each.get("goal_bytes", sys.maxsize)
            for phase, said in each["phases"].items():
                over = "" if said["need_bytes"] <= most else " **over**"
                lines.append(
                    f"| {of['row']} | {key} | {_settings(each)} | {phase} | {said['allocated_bytes'] / GIB:.2f} "
                    f"| {said['need_bytes'] / GIB:.2f}{over} | {said['reserved_bytes'] / GIB:.2f} "
                    f"| {said['seconds']:.2f} | {said['pinned_bytes'] / GIB:.1f} |"
                )
    flags.out.with_suffix(".md").write_text("# Said before it is run\n\n" + "\n".join(lines) + "\n")


def _run_all(flags: argparse.Namespace) -> None:
    flags.out.mkdir(parents=True, exist_ok=True)
    said = {each["row"]: each["plans"] for each in json.loads(flags.predicted.read_text())}
    for name in flags.only:
        if flags.here:
            _measure(name, said[name], flags.out / f"{name}.json")
        else:
            command = [sys.executable, __file__, "run", str(flags.predicted), "--out", str(flags.out), "--here"]
            subprocess.run([*command, "--only", name], check=False)


def _measure(name: str, plans: dict[str, Any], file: Path) -> None:
    """One row, plan after plan, and its file."""
    checkpoint, card = CHECKPOINTS[ROWS[name].model], Device.detect("cuda")
    began = time.perf_counter()
    expand_segments()
    few = FEW if ROWS[name].others else 1
    plan = _plan(name, card, {}, few)
    parts = apply_all(_random(checkpoint, plan), plan)
    found: dict[str, Any] = {
        "row": name, "device": f"{card.name}, torch {torch.__version__}", "precision": plan.precision, "plans": {},
        "build_s": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    still = {few: _run(plan, parts, None)[1]}  # to warm up, too: kernels are loaded and chosen
    found["rss_bytes"] = psutil.Process().memory_info().rss  # its own: all weights are on the card
    for key, said in plans.items():
        before, plan = plan, _plan(name, card, said["settings"], _steps(key))
        result: dict[str, Any] = {"said": said, "cap_bytes": said["cap_bytes"]}
        began = time.perf_counter()
        try:
            change(parts, before, plan)
            gc.collect()
            torch._C._cuda_clearCublasWorkspaces()  # it comes with the first product, as in a process of its own
            torch.cuda.empty_cache()
            result["pack_s"] = round(time.perf_counter() - began, 1)
            given = still.get(STEPS) if key == "near" else None
            measured, latents = _run(plan, parts, result["cap_bytes"], given)
            reference = still.setdefault(plan.request.steps, latents)
            result |= measured | {"relative_l2": float((latents - reference).norm() / reference.norm())}
        except (torch.OutOfMemoryError, DoesNotFit) as error:
            result["failed"] = " ".join(str(error).split())
        found["plans"][key] = result
        file.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name} {key}, {_settings(said)}: {result.get('failed') or _summary(result)}", flush=True)
        if "pack_s" not in result:  # the weights are not where the next plan expects them
            break


def _steps(key: str) -> int:
    return FEW if key in OTHERS else STEPS


def _plan(name: str, device: Device, settings: dict[str, str], steps: int) -> Plan:
    row = ROWS[name]
    request = Request(
        image=PHOTO, prompt="the rocket lifts off", model=row.model, width=row.width, height=row.height,
        num_frames=row.num_frames, steps=steps, seed=1, guidance=None if row.guidance is None else (row.guidance,),
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


def _run(
    plan: Plan, parts: Parts, cap_bytes: int | None, latents: torch.Tensor | None = None
) -> tuple[dict[str, Any], torch.Tensor]:
    """Bytes and seconds of one run, and its latents; nothing is denoised where they are given."""
    transfers = _transfers(parts)
    ledger = Ledger(plan.device.id)
    watch = _Watch(transfers)
    ledger.around = watch.around
    pipeline = Pipeline(plan, parts, ledger, ladder=False)
    steps: list[dict[str, Any]] = []
    with watch, replace(plan.device, vram_limit_bytes=cap_bytes).capped() if cap_bytes else nullcontext():
        state: State = pipeline.encode()
        if latents is None:
            pipeline.denoise(
                state, on_step=lambda step: steps.append({"expert": step.expert, "seconds": round(step.seconds, 4)})
            )
        else:
            state = replace(state, latents=latents.to(plan.device.id))
        frames = sum(1 for _ in pipeline.decode(state))
    phases = {
        phase.name: {
            "seconds": round(phase.seconds, 3), "allocated_bytes": phase.peak_bytes, **watch.phases[phase.name]
        }
        for phase in ledger.close()
    }  # fmt: skip
    return {"frames": frames, "steps": steps, "phases": phases}, state.latents.cpu()


def _transfers(parts: Parts) -> list[Transfer]:
    """What moves weights, and what a VAE remembers."""
    placement, shelf = offload.placed(parts), parts.pieces.shelf
    return [*([placement.transfer] if placement else []), *([shelf.args[0]] if isinstance(shelf, partial) else [])]


class _Watch(threading.Thread):
    """What every phase takes that the ledger does not tell: reserved bytes, and those of the host."""

    def __init__(self, transfers: Sequence[Transfer]) -> None:
        super().__init__(daemon=True)
        self.phases: dict[str, dict[str, int]] = {}
        self._transfers, self._now, self._over = transfers, "", threading.Event()

    @contextmanager
    def around(self, name: str) -> Iterator[None]:
        phase = self.phases.setdefault(name, dict.fromkeys(("reserved_bytes", *HOST), 0))
        moved, self._now = sum(each.moved_bytes for each in self._transfers), name
        resident_peak()
        yield
        phase["reserved_bytes"] = max(phase["reserved_bytes"], torch.cuda.max_memory_reserved())
        phase["host_bytes"] = max(phase["host_bytes"], resident_peak())
        phase["moved_bytes"] += sum(each.moved_bytes for each in self._transfers) - moved
        files = [file for file in state_folder().joinpath("weights").rglob("*") if file.is_file()]
        phase["disk_bytes"] = max(phase["disk_bytes"], sum(512 * file.stat().st_blocks for file in files))

    def run(self) -> None:
        """Now and then: pinned memory is let go before a phase ends."""
        while not self._over.wait(LOOK_S):
            if phase := self.phases.get(self._now):
                phase["pinned_bytes"] = max(phase["pinned_bytes"], sum(each.pinned_bytes for each in self._transfers))

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()


def _shapes(plan: Plan) -> set[int]:
    """Of its convolutions."""
    return {shape for trace in traced(plan, CHECKPOINTS[plan.request.model]) for shape in trace.shapes}


def _said(plan: Plan, met: set[int], key: str, goal_bytes: int | None) -> dict[str, Any]:
    """The settings that differ from the reference's, the cap, and the figures by phase, where shapes in `met` are not
    new."""
    checkpoint = CHECKPOINTS[plan.request.model]
    usual = {s.type: s.value for s in choose(
        Request(image=PHOTO, prompt="-", model=checkpoint.id, seed=1), checkpoint, plan.device, photo_size=(640, 427)
    ).settings}  # fmt: skip
    traces = [t for t in traced(plan, checkpoint) if key != "near" or not t.name.startswith("denoise")]
    plan = with_phases(plan, checkpoint, traces, met)
    need = max(phase.peak_vram_bytes for phase in plan.estimate.phases)
    fits = goal_bytes is not None and need <= goal_bytes and (key == "near" or plan.feasible)
    cap = None if key == "resident" else goal_bytes if fits else int(MARGIN * need)
    said = {"cap_bytes": cap} | ({} if goal_bytes is None else {"goal_bytes": goal_bytes, "feasible": fits})
    if cap:
        device, estimate = replace(plan.device, vram_limit_bytes=cap), replace(plan.estimate, free_bytes=cap)
        plan = replace(plan, device=device, estimate=estimate)
    told = {phase.name: phase for phase in replayed(plan, checkpoint, traces).estimate.phases}
    known = rates.of(plan.device)
    assert known
    assert known.unseen
    cublas_bytes = known.unseen.cublas_workspace_bytes  # torch counts it as allocated
    phases = {
        trace.name: {
            "allocated_bytes": sum(trace.weights_bytes.values()) + trace.peak_bytes + cublas_bytes,
            "need_bytes": told[trace.name].peak_vram_bytes, "host_bytes": told[trace.name].host_bytes,
            "reserved_bytes": told[trace.name].reserved_bytes,
            "pinned_bytes": told[trace.name].pinned_bytes, "disk_bytes": told[trace.name].disk_bytes,
            "seconds": told[trace.name].seconds,
            "moved_bytes": trace.onload_bytes + _times(plan, trace.name) * trace.bytes["host_to_device"],
            "held": dict(told[trace.name].held),
        }
        for trace in traces
    }  # fmt: skip
    settings = {s.type: s.value for s in plan.settings if s.value != usual[s.type]}
    return {"settings": settings, **said, "phases": phases}


def _times(plan: Plan, phase: str) -> int:
    """How often a phase's trace is gone through."""
    return steps_of(plan.request, CHECKPOINTS[plan.request.model]).get(phase.removeprefix("denoise:"), 1)


def _fitted(name: str, device: Device) -> Plan:
    return fitted(_plan(name, device, {}, STEPS), CHECKPOINTS[ROWS[name].model])


def _table(flags: argparse.Namespace) -> None:
    files = [flags.folder / f"{name}.json" for name in flags.only]
    found = [json.loads(file.read_text()) for file in files if file.exists()]
    flags.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    lines = [f"# In the goals' memory\n\n{found[0]['device']}\n", *_goals(found)]
    lines += ["\n## With the VAE near\n", *_near(found)]
    lines += ["\n## What was said, and what it took\n", *_errors(found), "", *_phases(found)]
    flags.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    _draw(found, flags.out.with_suffix(".png"))


def _goals(found: list[dict[str, Any]]) -> Iterator[str]:
    """A line for every row in its goal's memory. A step is one of those after the first, which is in "all steps" and
    in "run", five steps with encoding and decoding; host memory is what is held beside the process's own."""
    head = ["work", "goal GiB", "reserved", "allocated", "binding", "step resident s", "step s", "", "all steps"]
    head += ["encode", "decode", "run", "relative L2", "host GiB", "pinned", "moved", "disk"]
    yield f"| {' | '.join([*head, 'settings'])} |"
    yield "|---" * (len(head) + 1) + "|"
    for each in found:
        for key, name in (("goal", each["row"]), ("host", f"{each['row']}, {HOST_BYTES / GIB:.0f} GiB of RAM")):
            if plan := each["plans"].get(key):
                cells = [name, f"{plan['said']['goal_bytes'] / GIB:g}", *_kept(each, plan)]
                yield f"| {' | '.join(cells + [''] * (len(head) - len(cells)))} | {_settings(plan['said'])} |"


def _kept(each: dict[str, Any], plan: dict[str, Any]) -> list[str]:
    if "failed" in plan:
        return [f"**{plan['failed'][:160]}**"]
    resident = each["plans"]["resident"]
    allocated, reserved = (max(of[what] for of in plan["phases"].values()) for what in BYTES)
    binding = next(name for name, of in plan["phases"].items() if of["reserved_bytes"] == reserved)
    was, now = (fmean(step["seconds"] for step in of["steps"][1:]) for of in (resident, plan))
    steps, *others = (_seconds(plan, of) / _seconds(resident, of) for of in ("denoise", "encode", "decode", ""))
    host, pinned, moved, disk = ([_measured(each, of, what) for of in plan["phases"].values()] for what in HOST)
    return [
        f"{reserved / GIB:.2f}", f"{allocated / GIB:.2f}", binding,
        f"{was:.3f}", f"{now:.3f}", f"{now / was - 1:+.1%}", f"{steps - 1:+.1%}", *(f"{of:.2f}x" for of in others),
        f"{plan['relative_l2']:.2g}", *(f"{of / GIB:.1f}" for of in (max(host), max(pinned), sum(moved), max(disk))),
    ]  # fmt: skip


def _near(found: list[dict[str, Any]]) -> Iterator[str]:
    """A line for every decode that is near."""
    yield "| work | cap GiB | encode_image reserved | decode reserved | decode s | resident | settings |"
    yield "|---" * 7 + "|"
    for each in found:
        if plan := each["plans"].get("near"):
            cells = [f"**{plan['failed'][:160]}**" if "failed" in plan else "", "", "", ""]
            if "phases" in plan:
                encode, decode = plan["phases"]["encode_image"], plan["phases"]["decode"]
                cells = [f"{of['reserved_bytes'] / GIB:.2f}" for of in (encode, decode)]
                cells += [f"{_seconds(of, 'decode'):.1f}" for of in (plan, each["plans"]["resident"])]
            yield f"| {each['row']} | {plan['cap_bytes'] / GIB:.2f} | {' | '.join(cells)} | {_settings(plan['said'])} |"


def _errors(found: list[dict[str, Any]]) -> Iterator[str]:
    """Of all phases of all runs: how far what was said was off. What a run needs is seen where a cap is near."""
    runs = [plan for each in found for plan in each["plans"].values()]
    yield f"{len(runs)} runs, {sum('failed' in run for run in runs)} of them out of memory.\n"
    head = ["phases", "within 5 %", "within 10 %", "within 15 %", "over 2 % too little", "mean of the error's size"]
    yield f"| | {' | '.join([*head, 'worst'])} |"
    yield "|---" * (len(head) + 2) + "|"
    points = {what: _points(found, what) for what in BYTES}
    done = [run for run in runs if "phases" in run]
    points["reserved_bytes, at most in a run"] = [(_most(run, BYTES[1]), _most(run["said"], BYTES[1])) for run in done]
    points[f"need_bytes, at most in a run whose cap was {MARGIN - 1:.0%} above it or less"] = [
        (_most(run, BYTES[1]), _most(run["said"], "need_bytes"))
        for run in done
        if run["cap_bytes"] and run["cap_bytes"] <= MARGIN * _most(run["said"], "need_bytes")
    ]
    points |= {SECONDS: _points(found, SECONDS), f"{SECONDS}, of one and more": _points(found, SECONDS, 1)}
    points |= {f"{what}, of 1 GiB and more": _points(found, what, GIB) for what in HOST}  # without the process's own
    for what, pairs in points.items():
        if not pairs:
            continue
        off = [said / measured - 1 for measured, said in pairs]
        near = [sum(abs(each) <= bound for each in off) for bound in (0.05, 0.1, 0.15)]
        yield (
            f"| {what} | {len(off)} | {' | '.join(map(str, near))} | {sum(each < -0.02 for each in off)} "
            f"| {fmean(map(abs, off)):.1%} | {max(off, key=abs):+.1%} |"
        )


def _phases(found: list[dict[str, Any]]) -> Iterator[str]:
    head = ["work", "plan", "phase", "allocated GiB", "said", "reserved GiB", "said", "s", "said"]
    head += [cell for what in HOST for cell in (f"{what.removesuffix('_bytes')} GiB", "said")]
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    for each in found:
        for key, plan in each["plans"].items():
            for name, phase in plan.get("phases", {}).items():
                said = plan["said"]["phases"][name]
                cells = [f"{phase[what] / GIB:.2f} | {said[what] / phase[what] - 1:+.1%}" for what in BYTES]
                cells += [f"{phase[SECONDS]:.2f} | {said[SECONDS] / phase[SECONDS] - 1:+.0%}"]
                cells += [f"{_measured(each, phase, what) / GIB:.1f} | {said[what] / GIB:.1f}" for what in HOST]
                yield f"| {each['row']} | {key} | {name} | {' | '.join(cells)} |"


def _seconds(plan: dict[str, Any], of: str) -> float:
    """Of the phases whose names begin so."""
    return sum(phase["seconds"] for name, phase in plan["phases"].items() if name.startswith(of))


def _measured(each: dict[str, Any], phase: dict[str, Any], what: str) -> float:
    """Of the host without what the process takes itself."""
    value: float = phase[what]
    return max(0.0, value - each["rss_bytes"]) if what == "host_bytes" else value


def _most(plan: dict[str, Any], what: str) -> int:
    """Bytes in the phase that takes most."""
    return max(phase[what] for phase in plan["phases"].values())


def _points(found: list[dict[str, Any]], what: str, least: float = 0) -> list[tuple[float, float]]:
    """(measured, said) of every phase of which so much was measured."""
    pairs = (
        (_measured(each, phase, what), plan["said"]["phases"][name][what])
        for each in found for plan in each["plans"].values() for name, phase in plan.get("phases", {}).items()
    )  # fmt: skip
    return [(measured, said) for measured, said in pairs if measured >= least]


def _draw(found: list[dict[str, Any]], file: Path) -> None:
    figure, (left, right) = plt.subplots(ncols=2, figsize=(11, 5.5), layout="constrained")
    for axes, kinds, of, unit in ((left, BYTES, GIB, "GiB"), (right, (SECONDS,), 1, "s")):
        for what, mark in zip(kinds, "ox", strict=False):
            measured, said = zip(*_points(found, what), strict=True)
            axes.scatter(
                [x / of for x in measured], [y / of for y in said], marker=mark, label=what.removesuffix("_bytes")
            )
        ends = [min(*axes.get_xlim(), *axes.get_ylim()), max(*axes.get_xlim(), *axes.get_ylim())]
        ends[0] = max(ends[0], 0.03)
        axes.plot(ends, ends, color="grey", linewidth=0.8)
        axes.set(xlabel=f"measured, {unit}", ylabel=f"said before, {unit}", xscale="log", yscale="log")
        axes.legend()
    figure.savefig(file, dpi=110)


def _told(said: dict[str, Any]) -> str:
    peaks = "  ".join(
        f"{name} {phase['need_bytes'] / GIB:.2f} GiB {phase['seconds']:.1f} s" for name, phase in said["phases"].items()
    )
    fits = "" if "feasible" not in said else "fits, " if said["feasible"] else "does not fit, "
    return f"{fits}{_settings(said)}: {peaks}"


def _settings(said: dict[str, Any]) -> str:
    return " ".join(f"{kind}={value}" for kind, value in said["settings"].items())


def _summary(result: dict[str, Any]) -> str:
    phases = "  ".join(
        f"{name} {phase['seconds']:.1f} s {phase['allocated_bytes'] / GIB:.2f}/{phase['reserved_bytes'] / GIB:.2f} GiB"
        for name, phase in result["phases"].items()
    )
    return f"steps {[step['seconds'] for step in result['steps']]} s | {phases} (allocated/reserved)"


if __name__ == "__main__":
    main()
