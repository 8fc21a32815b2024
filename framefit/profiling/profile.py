"""A pipeline watched on a short way through all of its phases: encode, some steps of every expert, decode.

The way is gone four times: to warm up, for times and peaks, under the profiler, and under a counter of FLOPs. It is
the pipeline's own loop each time; the ledger tells who watches where a phase begins and ends.
"""

from __future__ import annotations

import contextlib
import json
import platform
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

from framefit.checkpoint import State
from framefit.errors import BadOutput, Cancelled, UsageError
from framefit.ledger import Ledger
from framefit.ledger.counts import Counts, Tally, count
from framefit.pipeline import Pipeline
from framefit.plan import Plan
from framefit.profiling import flame, modules, timeline
from framefit.profiling.breakdown import Breakdown, summarise
from framefit.profiling.stalls import StallWatch
from framefit.profiling.surroundings import Surroundings, Watch
from framefit.profiling.trace import Trace, phase, record
from framefit.rates import Rates

__all__ = ["Memory", "PhaseProfile", "Profile", "check_folder", "profile", "take_step"]

DENOISE = "denoise:"


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseProfile:
    """One phase, gone through once; of denoising that is one step."""

    name: str
    times: int
    """How often a run of the request goes through it."""
    peak_bytes: int
    """On a card torch's allocated bytes, on the CPU the process's resident memory; without the profiler."""
    breakdown: Breakdown

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name, "times": self.times, "peak_bytes": self.peak_bytes,
            "breakdown": self.breakdown.to_json(),
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(**{**data, "breakdown": Breakdown.from_json(data["breakdown"])})


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """At the end of the way gone without the profiler, in bytes."""

    peak_bytes: int
    """The largest of the phases' peaks."""
    allocated_bytes: int | None
    """By torch on the card; None on the CPU, as all below."""
    reserved_bytes: int | None
    """Held by torch's allocator, which gives nothing back on its own: also the most that it held."""
    total_bytes: int | None
    """Of the card."""
    retries: int | None
    """How often the allocator had to give back its cache to find room; each one waits for the card."""
    out_of_memory: int | None
    """Allocations that failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """Where the time and the memory of a plan go on its device."""

    plan: Plan
    torch: str
    steps: int
    """Denoising steps that were profiled of each expert."""
    ceilings: Rates
    load_s: float
    phases: tuple[PhaseProfile, ...]
    memory: Memory
    graphs: int
    """Graphs that torch.compile made in this process."""
    graph_breaks: int
    surroundings: Surroundings
    """On the way gone without the profiler."""
    files: tuple[Path, ...]

    @property
    def run_s(self) -> float:
        """Seconds that a run of the request takes after loading, from the phases' times without the profiler."""
        return sum(phase.times * phase.breakdown.plain_s for phase in self.phases)

    def to_json(self) -> dict[str, Any]:
        return {
            "plan": self.plan.to_json(),
            "torch": self.torch,
            "python": platform.python_version(),
            "steps": self.steps,
            "load_s": self.load_s,
            "run_s": self.run_s,
            "phases": [phase.to_json() for phase in self.phases],
            "memory": asdict(self.memory),
            "compile": {"graphs": self.graphs, "graph_breaks": self.graph_breaks},
            "surroundings": self.surroundings.to_json(),
            "ceilings": self.ceilings.to_json(),
            "files": [str(file) for file in self.files],
        }


def profile(pipeline: Pipeline, folder: Path, ceilings: Rates, *, steps: int = 2) -> Profile:
    """Watch `pipeline` and write `profile.json`, `trace.json.gz`, `flame.svg` and `memory.png` into `folder`.

    Without matplotlib there is no `memory.png`, and a note says so.

    Args:
        steps: denoising steps to profile of each expert, each taken anew from the same latents. No way has the steps
            of the one before it where the expert has enough, so that what compiles again for every step is seen.

    Raises:
        NotFinite: the model produced NaN or infinity, in fp32 too.
    """
    plan, told = pipeline.plan, pipeline.ledger
    load_s = sum(phase.seconds for phase in told.phases.values())
    way = _Way(_serving_all(pipeline), steps)
    # the ledger that the caller holds hears of every phase, so that an error can name it
    ledger = partial(_Mute, plan.device.id, on_enter=partial(setattr, told, "last"))
    way.go(Ledger(plan.device.id, on_enter=partial(setattr, told, "last")))
    stalls = StallWatch(plan.device.id)
    plain = ledger(around=stalls.phase)
    with Watch(plan.device.id) as watch:
        way.go(plain)
    peaks = {phase.name: phase.peak_bytes for phase in plain.close()}
    memory = _memory(plan, max(peaks.values()))
    with modules.named(pipeline.parts.components):
        trace = record(lambda: way.go(ledger(around=phase)), plan.device.id, memory=True)
    tally = Tally(card=plan.device.id != "cpu")
    count(lambda: way.go(ledger(around=tally.phase)), tally)
    result = Profile(
        plan=plan, torch=torch.__version__, steps=steps, ceilings=ceilings, load_s=load_s, memory=memory,
        phases=_phases(way, plain, peaks, stalls, trace, tally, ceilings, pipeline), surroundings=watch.seen, files=(),
        **_compiled(),
    )  # fmt: skip
    return _save(result, trace, folder, told)


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Raises `BadOutput` now for what would make `profile` fail after the work is done."""
    if folder.exists() and not folder.is_dir():
        raise BadOutput(f"{folder} is a file: a profile is written to a folder, give another name.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise BadOutput(f"{folder} exists and is not empty: give another name, or add --overwrite.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadOutput(f"{folder} cannot be made ({error.strerror}): give another name.") from None


class _Mute(Ledger):
    """What there was to tell is told when the way is gone for the first time."""

    def note(self, sentence: str) -> None:
        self.notices.append(sentence)


@dataclass(slots=True)
class _Way:
    """The short way through a pipeline's phases."""

    pipeline: Pipeline
    steps: int
    gone: int = 0
    """Times."""

    def go(self, ledger: Ledger) -> None:
        """Once, with the phases told to `ledger`."""
        pipeline = self.pipeline
        pipeline.ledger = ledger
        state = pipeline.encode()
        served = pipeline.experts()
        for expert in dict.fromkeys(served):
            own = [index for index, name in enumerate(served) if name == expert]
            for step in range(self.steps):
                take_step(pipeline, state, own[(self.gone * self.steps + step) % len(own)])
        for _ in pipeline.decode(state):
            pass
        self.gone += 1

    def repeats(self, name: str) -> int:
        """How often `go` goes through the phase `name`."""
        return self.steps if name.startswith(DENOISE) else 1


def take_step(pipeline: Pipeline, state: State, index: int) -> None:
    """The step `index` alone, from whatever the latents are: what they hold changes no time."""
    state.step, state.scheduler = index, {}
    with contextlib.suppress(Cancelled):
        pipeline.denoise(state, cancelled=lambda: True)


def _serving_all(pipeline: Pipeline) -> Pipeline:
    """With so few steps that an expert has none, it is watched at the model's own number of steps."""
    plan, checkpoint = pipeline.plan, pipeline.parts.checkpoint
    if set(pipeline.experts()) == set(checkpoint.experts):
        return pipeline
    steps = max(plan.request.steps, checkpoint.steps)
    return Pipeline(replace(plan, request=replace(plan.request, steps=steps)), pipeline.parts, ladder=False)


def _phases(
    way: _Way,
    plain: Ledger,
    peaks: dict[str, int],
    stalls: StallWatch,
    trace: Trace,
    tally: Tally,
    ceilings: Rates,
    pipeline: Pipeline,
) -> tuple[PhaseProfile, ...]:
    times = Counter(DENOISE + expert for expert in pipeline.experts())
    return tuple(
        PhaseProfile(
            name=name,
            times=times[name] if name.startswith(DENOISE) else 1,
            peak_bytes=peaks[name],
            breakdown=summarise(
                [work for work in trace.works if work.phase == name],
                _per_call(tally.phases.get(name, Counts()), way.repeats(name)), plain.device,
                wall_s=seconds, plain_s=plain.phases[name].seconds, repeats=way.repeats(name), ceilings=ceilings,
                allocating_s=trace.allocating.get(name, 0.0), stalls=stalls.phases[name],
            ),
        )
        for name, seconds in trace.phases.items()
    )  # fmt: skip


def _per_call(counts: Counts, repeats: int) -> Counts:
    """Equal calls counted together, as one of them."""
    return Counts(
        Counter({key: n // repeats for key, n in counts.flops.items()}),
        Counter({key: n // repeats for key, n in counts.bytes.items()}),
        Counter({key: n // repeats for key, n in counts.work.items()}),
    )


def _memory(plan: Plan, peak: int) -> Memory:
    if plan.device.id == "cpu":
        return Memory(
            peak_bytes=peak, allocated_bytes=None, reserved_bytes=None, total_bytes=None, retries=None,
            out_of_memory=None,
        )  # fmt: skip
    facts = torch.cuda.memory_stats(plan.device.id)
    return Memory(
        peak_bytes=peak,
        allocated_bytes=torch.cuda.memory_allocated(plan.device.id),
        reserved_bytes=torch.cuda.memory_reserved(plan.device.id),
        total_bytes=plan.device.vram_total_bytes,
        retries=facts["num_alloc_retries"],
        out_of_memory=facts["num_ooms"],
    )


def _compiled() -> dict[str, int]:
    """What torch.compile did so far; nothing where it was never imported."""
    if "torch._dynamo" not in sys.modules:
        return {"graphs": 0, "graph_breaks": 0}
    counters = sys.modules["torch._dynamo"].utils.counters
    return {"graphs": counters["stats"]["unique_graphs"], "graph_breaks": sum(counters["graph_break"].values())}


def _save(result: Profile, trace: Trace, folder: Path, ledger: Ledger) -> Profile:
    folder.mkdir(parents=True, exist_ok=True)
    request = result.plan.request
    title = f"{request.model}, {request.width}x{request.height}, {request.num_frames} frames, {result.plan.device.name}"
    chrome, flames, memory, facts = (
        folder / name for name in ("trace.json.gz", "flame.svg", "memory.png", "profile.json")
    )
    trace.profiler.export_chrome_trace(str(chrome))
    graph = flame.tree(trace.works, f"all phases, {result.steps} steps of each expert")
    flames.write_text(flame.svg(graph, f"Device time: {title}"), encoding="utf-8")
    files = [chrome, flames]
    try:
        timeline.draw(timeline.read(chrome, result.plan.device.id), memory, f"Memory: {title}")
        files.append(memory)
    except UsageError as error:  # no matplotlib; the figures are worth having without the picture
        ledger.note(str(error))
    result = replace(result, files=(*files, facts))
    facts.write_text(json.dumps(result.to_json(), indent=2, default=str), encoding="utf-8")
    return result
