"""One row in a process of its own: a `Job` on stdin, a reply on stdout, both one JSON object.

    python -m framefit.bench.worker < job.json

The reply is {"plan", "facts", "row"}; whatever goes wrong is a row that failed, with its sentence.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from framefit import __version__
from framefit.bench import inputs, peers, stock
from framefit.bench.job import Job
from framefit.bench.quality import compare
from framefit.bench.result import Row
from framefit.checkpoint import State
from framefit.device import Device
from framefit.errors import FramefitError, UsageError
from framefit.families import Checkpoint, hub
from framefit.families.parts import PRECISIONS, Parts, Tensors, load_parts, weights
from framefit.families.pixels import to_frames
from framefit.ledger import Ledger
from framefit.ledger.counts import Tally, count
from framefit.ledger.shortage import Shortage
from framefit.passes import apply_all
from framefit.pipeline import Pipeline
from framefit.plan import Plan, Tier
from framefit.planning import choose
from framefit.profiling import breakdown, ceilings
from framefit.profiling.findings import Case, diagnose
from framefit.profiling.profile import DENOISE, PhaseProfile
from framefit.profiling.rules import RULES
from framefit.profiling.surroundings import Watch
from framefit.request import Request
from framefit.schedule import Schedule
from framefit.testing import random_parts, randomise

__all__ = ["main", "perform"]

SEED = 0
PHOTO = Path(__file__).parents[1] / "assets" / "rocket.jpg"
LEAST, USUAL, MOST = 3, 5, 100
"""Measured calls: of long ones, of most, of short ones."""
PATIENCE_S = 10.0
"""No more calls than LEAST are begun after this long."""
SHORT_S = 1.0
"""More calls than USUAL are made until this long, so that the median of a short one holds."""
WARM_S = 3.0
"""A second or third warm-up call is begun before this long."""

Call = Callable[[], Any]
"""One run of the work: a prediction, or frames."""


def main() -> None:
    """Read a job, print its reply. What libraries print goes to stderr."""
    reply = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = Job.from_json(json.load(sys.stdin))
    json.dump(perform(job), reply)
    reply.close()


def perform(job: Job) -> dict[str, Any]:
    """Measure `job` here, in this process."""
    reply: dict[str, Any] = {}
    try:
        checkpoint = job.scenario.checkpoint(job.weights)
        plan = _plan(job, job.scenario.needed(checkpoint), Device.detect(job.device, vram_bytes=job.vram_bytes))
        reply = {"plan": {s.type: s.value for s in plan.settings}, "facts": _facts(plan)}
        with plan.device.capped(growing=job.variant.engine == "framefit"):
            row = _measure(job, checkpoint, plan)
    except UsageError as error:  # a setting that the plan refuses here
        row = Row(name=job.variant.name, status="left out" if job.variant.settings else "failed", because=str(error))
    except Exception as error:
        row = Row(name=job.variant.name, status="failed", because=_sentence(error, job))
    return reply | {"row": asdict(row)}


def _plan(job: Job, row: Checkpoint, device: Device) -> Plan:
    """The plan of a run that would do this work."""
    scenario = job.scenario
    request = Request(
        image=PHOTO, prompt="the rocket lifts off", model=row.id, seed=SEED,
        width=scenario.width, height=scenario.height, num_frames=scenario.num_frames,
        guidance=(max(row.guidance[0], 2.0) if scenario.branches == 2 else 1.0,),
    )  # fmt: skip
    return choose(
        request, row, device,
        photo_size=(scenario.width, scenario.height), settings=job.variant.settings, precision=scenario.precision,
    )  # fmt: skip


def _measure(job: Job, row: Checkpoint, plan: Plan) -> Row:
    variant, device, ledger = job.variant, plan.device.id, Ledger(plan.device.id)
    if variant.engine == "cache-dit" and (reason := peers.refuse(job.scenario, device)):
        return Row(name=variant.name, status="left out", because=reason)
    with ledger.phase("build"):
        call, weights_bytes = _built(job, row, plan)
    with ledger.phase("warm-up"), torch.no_grad():
        flops, first_s = _first(call, device)
        warmups, _ = _timed(call, device, lambda done: len(done) < 2 and sum(done) + first_s < WARM_S)
    with ledger.phase("repeats"), torch.no_grad():
        seconds, output = _timed(call, device, partial(_more, job.repeats))
        reserved = None if device == "cpu" else torch.cuda.max_memory_reserved(device)
    phases = {phase.name: phase for phase in ledger.close()}
    if job.output:
        torch.save(_tensor(output), job.output)
    ours, measured = variant.engine == "framefit", {"weights_bytes": weights_bytes}
    return Row(
        name=variant.name,
        status="measured",
        settings={s.type: s.value for s in plan.settings} if ours else {},
        tier=max((s.tier for s in plan.settings), key=get_args(Tier).index) if ours else "",
        build_s=phases["build"].seconds,
        warmup_s=(first_s, *warmups),
        seconds=seconds,
        peak_allocated_bytes=phases["repeats"].peak_bytes,
        peak_reserved_bytes=reserved,
        flops=flops or None,
        predicted={name: value for name, value in asdict(plan.estimate).items() if name in measured},
        measured=measured,
        quality=compare(_tensor(output), torch.load(job.reference)) if job.reference else {},
        **_profile(job, call, plan, phases["repeats"].peak_bytes) if job.profile else {},
    )


def _built(job: Job, row: Checkpoint, plan: Plan) -> tuple[Call, int]:
    """The work as a call on weights in place, and the bytes that these occupy before any pass."""
    scenario, device = job.scenario, torch.device(plan.device.id)
    parts = _parts(job, row, PRECISIONS[plan.precision], device)
    latents, conditioning = _inputs(job, row, plan, parts)
    needed = scenario.needed(row)
    parts = Parts(needed, {c.name: parts[c.name] for c in needed.components}, device, parts.precision)
    model = parts["vae" if scenario.kind == "decode" else needed.experts[0]]
    weights_bytes = sum(tensor.nbytes for tensor in weights(model))
    if job.variant.engine == "framefit":
        apply_all(parts, plan)
    if job.variant.engine == "cache-dit":
        peers.apply(model, plan.device.id)
    work = _decode if scenario.kind == "decode" else _denoise
    call = work(job, plan, parts, latents, conditioning)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what building left behind is not the work's
    return call, weights_bytes


def _parts(job: Job, row: Checkpoint, dtype: torch.dtype, device: torch.device) -> Parts:
    """What the work needs; with real weights for a denoiser the encoders too, which make its inputs."""
    needed = job.scenario.needed(row)
    if job.weights != "random":
        if job.scenario.kind == "denoise":
            needed = replace(row, components=tuple(c for c in row.components if c.name not in row.experts[1:]))
        return load_parts(needed, hub.locate(needed), dtype=dtype, device=device)
    torch.manual_seed(SEED)
    parts = random_parts(needed, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(SEED)
    for component in needed.components:
        if component.params:
            randomise(parts[component.name], generator)
    return parts


def _inputs(job: Job, row: Checkpoint, plan: Plan, parts: Parts) -> tuple[torch.Tensor, Tensors]:
    """Latents and conditioning: Gaussian for random weights and for a decode, else of the photo and the prompt."""
    scenario, decode = job.scenario, job.scenario.kind == "decode"
    if job.weights != "random" and not decode:
        state = Pipeline(plan, parts, ladder=False).encode()
        return state.latents.to(parts.device), {k: v.to(parts.device) for k, v in state.conditioning.items()}
    size = (scenario.width, scenario.height, scenario.num_frames)
    conditioning = {} if decode else inputs.conditioning(row, size, scenario.branches, parts.device)
    return inputs.latents(row, size, parts.device), conditioning


def _denoise(job: Job, plan: Plan, parts: Parts, latents: torch.Tensor, conditioning: Tensors) -> Call:
    """The first step of a run."""
    schedule = Schedule(parts["scheduler"], plan.request.steps, parts.device)
    t, scale = schedule.timesteps[0], plan.request.guidance[0]
    noisy = schedule.scaled(latents, t)
    if job.variant.engine == "framefit":
        pipeline, expert = Pipeline(plan, parts, ladder=False), parts.checkpoint.experts[0]
        return lambda: pipeline.predict(expert, noisy, t, conditioning, scale)
    return stock.denoiser(parts, noisy, t, conditioning, scale)


def _decode(job: Job, plan: Plan, parts: Parts, latents: torch.Tensor, conditioning: Tensors) -> Call:
    """Latents to uint8 frames on the host, in both roads."""
    if job.variant.engine == "framefit":
        pipeline = Pipeline(plan, parts, ladder=False)
        state = State(step=0, latents=latents, conditioning=conditioning, scheduler={})
        return lambda: list(pipeline.decode(state))
    decode = stock.decoder(parts, latents)
    return lambda: to_frames(decode())


def _first(call: Call, device: str) -> tuple[int, float]:
    """The operations of one call, counted while it warms up, and its seconds."""
    tally = Tally(card=device != "cpu")
    seconds, _ = _timed(lambda: count(call, tally), device, lambda done: not done)
    return sum(sum(counts.flops.values()) for counts in tally.phases.values()), seconds[0]


def _more(repeats: int | None, done: Sequence[float]) -> bool:
    """Whether one more call is to be measured."""
    if repeats is not None:
        return len(done) < repeats
    usual = USUAL if sum(done) >= SHORT_S else MOST
    return len(done) < LEAST or (len(done) < usual and sum(done) < PATIENCE_S)


def _timed(call: Call, device: str, more: Callable[[list[float]], bool]) -> tuple[tuple[float, ...], Any]:
    """Seconds of each call, the device waited for, and what the last one gave."""
    seconds: list[float] = []
    output = None
    while more(seconds):
        output = None  # before the next one is made
        began = time.perf_counter()
        output = call()
        if device != "cpu":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return tuple(seconds), output


@torch.no_grad()
def _profile(job: Job, call: Call, plan: Plan, peak_bytes: int) -> dict[str, Any]:
    """Where the time of one more call goes, by kind of work and share of the ceiling, and what would help."""
    device, best = plan.device.id, ceilings.measure(plan.device.id)
    with Watch(device) as watch:
        found = breakdown(call, device, ceilings=best)
    name = "decode" if job.scenario.kind == "decode" else f"{DENOISE}transformer"
    ours = job.variant.engine == "framefit"
    case = Case(
        device=plan.device, precision=plan.precision,
        settings={s.type: s.value for s in plan.settings} if ours else {},
        phases=(PhaseProfile(name=name, times=1, peak_bytes=peak_bytes, breakdown=found),),
        ceilings=best, surroundings=watch.seen,
    )  # fmt: skip
    return {"profile": found.to_json(), "advice": tuple(each.to_json() for each in diagnose(case, RULES))}


def _tensor(output: Any) -> torch.Tensor:
    """On the host: a prediction, or frames (F, H, W, 3)."""
    return torch.from_numpy(np.stack(output)) if isinstance(output, list) else output.cpu()


def _facts(plan: Plan) -> dict[str, Any]:
    """What the whole result says of machine and programs; the machine's ceilings are measured where none are filed."""
    matmul = ceilings.measure(plan.device.id).tflops["matmul"].get(plan.precision)
    limit = plan.device.vram_limit_bytes
    return {
        "ceiling_flops": None if matmul is None else matmul * 1e12,
        "hardware": plan.device.name if limit is None else f"{plan.device.name}, {limit / 2**30:.2f} GiB of it",
        "threads": torch.get_num_threads() if plan.device.id == "cpu" else None,
        "precision": plan.precision,
        "versions": {"framefit": __version__, "torch": torch.__version__, "diffusers": version("diffusers")},
    }


def _sentence(error: Exception, job: Job) -> str:
    if isinstance(error, FramefitError):
        return str(error)
    if Shortage.told(error, "cpu"):
        work = job.scenario
        return f"out of memory at {work.width}x{work.height}, {work.num_frames} frames."
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


if __name__ == "__main__":
    main()
