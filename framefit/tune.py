"""Search: which settings are fastest on this device, within a memory budget, without losing quality.

Every candidate makes the same short video in a process of its own. What it draws is held against the untouched
settings' by the gate of its tier, what it takes against theirs in seconds a step. Each outcome is filed at once: an
interrupted search goes on where it stood. The winner is filed as what `run` uses.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from framefit import quality, tuned
from framefit.apart import apart, quiet_libraries
from framefit.checkpoint import hold
from framefit.errors import DoesNotFit, NotFinite, UsageError
from framefit.families import Checkpoint, hub
from framefit.families.files import fingerprint
from framefit.plan import SETTINGS, Plan, Tier
from framefit.request import Request
from framefit.run import Options, check_runs, generate, prepare
from framefit.tuned import Tuned
from framefit.verify import GATES, TIERS, judge, tier_of

__all__ = ["DEFAULT_STEPS", "Trial", "Tuning", "candidates", "named", "tune", "winner"]

DEFAULT_STEPS = 8
LEAST_GAIN = 1.02
"""Under this the reference's own settings stay: it is noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One candidate, tried."""

    settings: dict[str, str]
    tier: Tier
    step_s: float | None
    """Median seconds a step, the first of each expert left out; None where there was none."""
    peak_bytes: int
    """The largest of all phases."""
    failed: str
    """Why it cannot win; empty where it can."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    trials: tuple[Trial, ...]
    """The untouched settings first."""
    best: Trial
    filed: Path

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"filed": str(self.filed)}


def tune(
    request: Request,
    options: Options,
    *,
    tier: Tier = "exact",
    budget_bytes: int | None = None,
    restart: bool = False,
    on_trial: Callable[[int, int, Mapping[str, str]], None] = lambda number, total, settings: None,
) -> Tuning:
    """Try every candidate, and file the winner for `run`.

    Args:
        options: of these the device and the precision count.
        tier: the weakest that a candidate may have.
        budget_bytes: most that a candidate may hold; None: no bound.
        restart: forget the trials of an interrupted search.
        on_trial: hears the number of a candidate from 1, how many there are, and its settings.

    Raises:
        FramefitError: a run fails. A candidate that does not fit, or gives no numbers, has lost.
        UsageError: another process makes this search.
    """
    request = replace(request, steps=request.steps or DEFAULT_STEPS, seed=0 if request.seed is None else request.seed)
    facts = {"device": options.device, "precision": options.precision, "checkpoints": None, "use_tuned": False}
    checkpoint, untouched = prepare(request, Options(**facts))  # type: ignore[arg-type]
    check_runs(untouched, checkpoint)
    if untouched.request.steps < (least := 2 * len(checkpoint.experts)):
        raise UsageError(
            f"a trial of {untouched.request.steps} steps measures cold starts: ask for --steps {least} or more."
        )
    scratch = tuned.folder() / f"{_identity(checkpoint, untouched, tier)}.partial"
    scratch.mkdir(parents=True, exist_ok=True)
    release = hold(scratch / "lock", UsageError("this search is run by another process: wait for it, or stop it."))
    try:
        if restart:
            _forget(scratch)
        return _searched(request, facts, untouched, tier, budget_bytes, scratch, on_trial)
    finally:
        release()


def _searched(
    request: Request,
    facts: dict[str, Any],
    untouched: Plan,
    tier: Tier,
    budget_bytes: int | None,
    scratch: Path,
    on_trial: Callable[[int, int, Mapping[str, str]], None],
) -> Tuning:
    every = list(candidates(untouched, tier))
    trials = []
    for number, settings in enumerate(every, 1):
        on_trial(number, len(every), settings)
        filed = scratch / f"{named(settings).replace(' ', '_')}.json"
        if filed.exists() and (number > 1 or (scratch / "reference").exists()):
            trials.append(Trial(**json.loads(filed.read_text())))
            continue
        trial = _tried(request, facts | {"settings": settings}, untouched, scratch, first=number == 1)
        partly = filed.with_suffix(".partial")
        partly.write_text(json.dumps(asdict(trial)))
        partly.replace(filed)
        trials.append(trial)
    if (best := winner(trials, budget_bytes)) is not trials[0]:
        # both once more, and the better of two counts: the machine may have been busy during one of them
        places = (0, trials.index(best))
        for place in places:
            on_trial(len(every), len(every), trials[place].settings)
            again = _tried(request, facts | {"settings": trials[place].settings}, untouched, scratch, first=place == 0)
            step_s = min(filter(None, (trials[place].step_s, again.step_s)))
            trials[place] = replace(trials[place], step_s=step_s, failed=again.failed)
        best = winner([trials[place] for place in places], budget_bytes)
    date, ratio = time.strftime("%Y-%m-%d"), (trials[0].step_s or 0) / (best.step_s or 1)
    file = tuned.save(untouched, Tuned(settings=best.settings, date=date, ratio=round(ratio, 3)))
    _forget(scratch)
    return Tuning(trials=tuple(trials), best=best, filed=file)


def _identity(checkpoint: Checkpoint, untouched: Plan, tier: Tier) -> str:
    """Whatever a trial depends on: weights, request, photos, device, versions."""
    facts: list[Any] = [tuned.key(untouched), fingerprint(hub.locate(checkpoint)), tier]
    facts += [untouched.request.to_json(), dict(untouched.photos)]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]


def _forget(scratch: Path) -> None:
    """All trials; the lock goes with the folder once it is empty."""
    for path in scratch.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def candidates(untouched: Plan, tier: Tier) -> Iterator[dict[str, str]]:
    """Every combination of settings up to `tier`, the untouched one first."""
    usual = {setting.type: setting.value for setting in untouched.settings}
    yield usual
    allowed = {
        name: [v for v in kind.values if TIERS.index(kind(value=v).tier) <= TIERS.index(tier)]
        for name, kind in SETTINGS.items()
    }
    if untouched.device.id == "cpu":  # there is no card whose memory they save
        allowed |= {name: [usual[name]] for name in ("offload", "chunk")}
    for values in product(*allowed.values()):
        if (found := dict(zip(allowed, values, strict=True))) != usual:
            yield found


def winner(trials: list[Trial], budget_bytes: int | None = None) -> Trial:
    """The fastest that passed and fits; the first, untouched, unless another gains more than noise.

    Raises:
        DoesNotFit: none is within the budget.
    """
    passed = [trial for trial in trials if not trial.failed]
    fitting = [trial for trial in passed if budget_bytes is None or trial.peak_bytes <= budget_bytes]
    if not fitting:
        least = min(passed, key=lambda trial: trial.peak_bytes)
        raise DoesNotFit(
            f"no settings stay within {(budget_bytes or 0) / 2**30:.2f} GiB: the least is "
            f"{least.peak_bytes / 2**30:.2f} GiB with {named(least.settings)}."
        )
    fastest, untouched = min(fitting, key=_step_s), trials[0]
    return untouched if untouched in fitting and _step_s(untouched) < LEAST_GAIN * _step_s(fastest) else fastest


def _step_s(trial: Trial) -> float:
    return float("inf") if trial.step_s is None else trial.step_s


def named(settings: Mapping[str, str]) -> str:
    """As `--set` takes them."""
    return " ".join(f"{name}={value}" for name, value in settings.items())


def _tried(request: Request, facts: Mapping[str, Any], untouched: Plan, scratch: Path, *, first: bool) -> Trial:
    output = scratch / ("reference" if first else "candidate")
    shutil.rmtree(output, ignore_errors=True)
    plan = prepare(request, Options(**facts))[1]
    tier = tier_of(plan, untouched)
    try:
        made = apart(partial(_made, request, output, facts))
    except (DoesNotFit, NotFinite) as error:
        if first:
            raise
        lost = f"{type(error).__name__}: {error}"
        return Trial(settings=facts["settings"], tier=tier, step_s=None, peak_bytes=0, failed=lost)
    failed = ""
    if not first:
        found = quality.compare(output, scratch / "reference", metrics={gate.metric for gate in GATES[tier]})
        failed = "; ".join(f"{c.what}: {c.reason}" for c in judge(found, tier) if not c.passed)
    return Trial(settings=facts["settings"], tier=tier, failed=failed, **made)


def _made(request: Request, output: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds a step and peak bytes of one run, in the process that it has to itself."""
    quiet_libraries()
    seconds: dict[str, list[float]] = {}
    options = Options(on_step=lambda step: seconds.setdefault(step.expert, []).append(step.seconds), **facts)
    report = generate(request, output, options)
    # the first step of an expert meets cold caches
    steady = [s for of_expert in seconds.values() for s in (of_expert[1:] or of_expert)]
    return {"step_s": median(steady), "peak_bytes": max(phase.peak_bytes for phase in report.phases)}
