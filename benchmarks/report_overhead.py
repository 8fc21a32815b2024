"""What the run report costs a step: phase timers, memory peaks and the log line, against the same loop without them.

    python benchmarks/report_overhead.py [--out FILE.json]

One tiny model at a size where a step takes about 20 ms on one thread. Rounds alternate between the arms, in turning
order, because other work on the machine comes and goes. An arm's figure is the median of its rounds; the overhead is
the median of the differences within a round. Beside it stands what the report's own calls take inside the loop, by the
clock around each: far below what a difference between two 20 ms steps can resolve on a shared machine.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from framefit.checkpoint import State
from framefit.device import Device
from framefit.families.parts import load_parts
from framefit.ledger import Ledger, StepLog
from framefit.passes import apply_all
from framefit.pipeline import Pipeline, Step
from framefit.planning import choose
from framefit.request import Request
from framefit.testing import save_tiny

PHOTO = Path(__file__).parents[1] / "framefit" / "assets" / "rocket.jpg"
STEPS, ROUNDS = 40, 30
WIDTH, HEIGHT, FRAMES = 320, 224, 17


class Silent(Ledger):
    """Books nothing."""

    def phase(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()


class Clocked(Ledger):
    """Knows what it takes itself."""

    own_s = 0.0

    @contextmanager
    def clock(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.own_s += time.perf_counter() - began

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with self.clock():
            context = super().phase(name)
            context.__enter__()
        yield
        with self.clock():
            context.__exit__(None, None, None)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", type=Path)
    out = arguments.parse_args().out
    torch.set_num_threads(1)
    log = logging.getLogger("framefit")
    log.setLevel(logging.INFO)
    log.addHandler(logging.StreamHandler(io.StringIO()))
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(Path(scratch))
    print(json.dumps(result, indent=2))
    if out:
        out.write_text(json.dumps(result, indent=2) + "\n")


def measure(scratch: Path) -> dict[str, object]:
    pipeline = prepared(scratch)
    begin = pipeline.encode()
    arms: dict[str, Callable[[], float]] = {
        "without": lambda: seconds_a_step(pipeline, begin, Silent(), 0),
        "report_line_every_10_steps": lambda: seconds_a_step(pipeline, begin, Ledger(), 10),
        "report_line_every_step": lambda: seconds_a_step(pipeline, begin, Ledger(), 1),
    }
    for arm in arms.values():
        arm()
    samples: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for number in range(ROUNDS):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            samples[name].append(arms[name]() * 1e3)
    base = statistics.median(samples["without"])
    every = {"report_line_every_10_steps": 10, "report_line_every_step": 1}
    calls = {
        name: statistics.median(in_place_s(pipeline, begin, steps) for _ in range(ROUNDS // 3))
        for name, steps in every.items()
    }
    return {
        "work": f"wan2.2-i2v-a14b made tiny, {WIDTH}x{HEIGHT}, {FRAMES} frames, {STEPS} steps, fp32, 1 thread",
        "machine": f"{Device.detect('cpu').name}, torch {torch.__version__}, Python {platform.python_version()}",
        "rounds": ROUNDS,
        "ms_per_step": {name: round(statistics.median(values), 3) for name, values in samples.items()},
        "spread_ms": {name: round(statistics.stdev(values), 3) for name, values in samples.items()},
        "overhead_percent": {name: difference(samples, name, base) for name in calls},
        "own_calls_us_per_step": {name: round(value * 1e6, 1) for name, value in calls.items()},
        "own_calls_percent_of_20_ms": {name: round(value / 20e-3 * 100, 3) for name, value in calls.items()},
    }


def prepared(scratch: Path) -> Pipeline:
    row = save_tiny("wan2.2-i2v-a14b", scratch / "tiny")
    request = Request(
        image=PHOTO, prompt="the rocket lifts off", model=str(row.folder), width=WIDTH, height=HEIGHT,
        num_frames=FRAMES, steps=STEPS, guidance=(1.0, 1.0), seed=1,
    )  # fmt: skip
    plan = choose(request, row, Device.detect("cpu"), photo_size=(640, 427))
    parts = apply_all(load_parts(row, scratch / "tiny", dtype=torch.float32, device=torch.device("cpu")), plan)
    return Pipeline(plan, parts)


def seconds_a_step(pipeline: Pipeline, begin: State, ledger: Ledger, every: int) -> float:
    pipeline.ledger = ledger
    state = replace(begin)
    log = StepLog("cpu", every)

    def on_step(step: Step) -> None:
        log(step.index, step.total, step.seconds)

    began = time.perf_counter()
    pipeline.denoise(state, on_step=on_step)
    ledger.close()
    return (time.perf_counter() - began) / STEPS


def difference(samples: dict[str, list[float]], name: str, base: float) -> dict[str, float]:
    """Median of the paired differences, and its standard error, in percent of a step."""
    found = [(one - other) / base * 100 for one, other in zip(samples[name], samples["without"], strict=True)]
    error = 1.25 * statistics.stdev(found) / len(found) ** 0.5
    return {"median": round(statistics.median(found), 2), "standard_error": round(error, 2)}


def in_place_s(pipeline: Pipeline, begin: State, every: int) -> float:
    """Seconds of the report's own calls a step, by the clock around each of them inside a real loop."""
    ledger, log = Clocked(), StepLog("cpu", every)

    def on_step(step: Step) -> None:
        with ledger.clock():
            log(step.index, step.total, step.seconds)

    pipeline.ledger = ledger
    pipeline.denoise(replace(begin), on_step=on_step)
    with ledger.clock():
        ledger.close()
    return ledger.own_s / STEPS


if __name__ == "__main__":
    sys.exit(main())
