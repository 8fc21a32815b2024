"""Runs the rows of a scenario one after the other, each in a fresh process, stock first and again last."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from framefit.bench.job import Job
from framefit.bench.result import Result, Row
from framefit.bench.scenarios import Scenario
from framefit.bench.variants import AGAIN, CACHE_DIT, FRAMEFIT, STOCK, Variant, further
from framefit.errors import FramefitError

__all__ = ["measure"]

Reply = dict[str, Any]


def measure(
    scenario: Scenario,
    *,
    variants: Sequence[Variant] | None = None,
    device: str = "auto",
    vram_bytes: int | None = None,
    weights: str | None = None,
    repeats: int | None = None,
    profile: bool = False,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Result:
    """The waterfall of one scenario. A row that fails is a row with its reason; the others go on.

    Args:
        variants: which rows; None: stock, framefit, every further setting, cache-dit.
        device: auto, cpu, cuda or cuda:N.
        vram_bytes: most that each row may reserve of a card; None: what is free.
        weights: "random", or a model id or folder; None: the scenario's own.
        repeats: measured calls a row; None: five, more where they are short, fewer where they are long.
        profile: whether one more call of each row is broken down by kind of work.
        on_row: called with each row when it is done.

    Raises:
        FramefitError: not even the first process could say what the machine is.
    """
    weights = weights or scenario.weights
    rows: list[Row] = []
    told: Reply = {}
    with tempfile.TemporaryDirectory() as scratch:
        reference = Path(scratch) / "stock.pt"
        for variant in _order(scenario, variants, lambda: told.get("plan", {})):
            job = Job(
                scenario=scenario, variant=variant, device=device, vram_bytes=vram_bytes, weights=weights,
                repeats=repeats, profile=profile,
            )  # fmt: skip
            if reference.exists():
                job = replace(job, reference=str(reference))
            elif variant == STOCK and (variants is None or len(variants) > 1):
                job = replace(job, output=str(reference))
            reply = _perform(job)
            told.update({name: reply[name] for name in ("plan", "facts") if name in reply and name not in told})
            rows.append(reply["row"])
            on_row(rows[-1])
    if not told:
        raise FramefitError(rows[0].because)
    return Result(
        scenario=scenario, weights=weights, rows=tuple(rows),
        date=datetime.now(UTC).isoformat(timespec="seconds"), **told["facts"],
    )  # fmt: skip


def _order(
    scenario: Scenario, variants: Sequence[Variant] | None, chosen: Callable[[], dict[str, str]]
) -> Iterator[Variant]:
    """Which rows, the settings beyond the plan's own once the first process has told these."""
    if variants is None:
        yield STOCK
        yield FRAMEFIT
        yield from further(scenario, chosen())
        yield CACHE_DIT
        yield AGAIN
        return
    yield from sorted(variants, key=lambda variant: variant != STOCK)
    if STOCK in variants and len(variants) > 1:
        yield AGAIN


def _perform(job: Job) -> Reply:
    """The worker's reply, its row as a `Row`."""
    done = subprocess.run(
        [sys.executable, "-m", "framefit.bench.worker"],
        input=json.dumps(job.to_json()), capture_output=True, check=False, encoding="utf-8", errors="replace",
    )  # fmt: skip
    if done.returncode == 0:
        reply: Reply = json.loads(done.stdout)
        return reply | {"row": Row.from_json(reply["row"])}
    return {"row": Row(name=job.variant.name, status="failed", because=_death(done.returncode, done.stderr))}


def _death(code: int, stderr: str) -> str:
    """Why a process gave no reply."""
    if code < 0:
        name = signal.Signals(-code).name
        killed = " (out of host memory, most likely)" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{killed}."
    last = next((line for line in reversed(stderr.splitlines()) if line.strip()), "it said nothing")
    return f"its process ended with code {code}: {last.strip()[:300]}"
