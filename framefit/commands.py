"""What each command does: flags in, a result on stdout, an exit code out.

Imports are inside the functions: `framefit --help` must not wait for torch.
"""

from __future__ import annotations

import json
import os
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from framefit import plans
from framefit.device import Budget
from framefit.errors import DoesNotFit, FramefitError, UsageError
from framefit.plan import QUALITIES
from framefit.request import Lora, Request

if TYPE_CHECKING:
    from framefit.families import Checkpoint
    from framefit.ledger import Ledger
    from framefit.pipeline import Pipeline
    from framefit.plan import Plan
    from framefit.profiling import Profile
    from framefit.profiling.layers import Loss
    from framefit.report import Report

PHOTO = Path(__file__).parent / "assets" / "rocket.jpg"
"""The photo for a first try."""

__all__ = [
    "bench",
    "compare",
    "diagnose",
    "doctor",
    "inspect",
    "models_ls",
    "models_pull",
    "models_verify",
    "plan",
    "profile",
    "rerun",
    "run",
    "tune",
    "verify",
]


def run(flags: Namespace) -> None:
    from framefit.plan import Plan
    from framefit.progress import Progress
    from framefit.run import generate, replay, resume

    with Progress(flags) as progress:
        options = progress.options(
            preset=flags.preset, precision=flags.precision, settings=dict(flags.settings), use_tuned=not flags.untuned,
            quality=flags.quality or "exact", budget=_budget(flags),
        )  # fmt: skip
        if flags.resume:
            if flags.plan:
                raise UsageError("--resume goes on with a run and --plan begins one: leave one of them out.")
            _refuse_with_resume(flags)
            report = resume(flags.resume, flags.output, options, restart=flags.restart)
        elif flags.restart:
            raise UsageError("--restart begins an interrupted run again: add --resume ID.")
        elif flags.plan:
            if given := _asked(flags):
                raise UsageError(f"--plan says what to make, and how, and {given[0]} would change it: leave one out.")
            report = replay(Plan.read(flags.plan), flags.output or _default_output(), options)
        elif flags.prompt is None:
            raise UsageError("a prompt is needed: say what should happen with -p TEXT.")
        else:
            report = generate(_request(flags), flags.output or _default_output(), options)
    _finish(report.to_json(), flags, _summary(report))


def rerun(flags: Namespace) -> None:
    from framefit.progress import Progress
    from framefit.recipe import recipe
    from framefit.run import generate

    with Progress(flags) as progress:
        options = progress.options(budget=_budget(flags))
        made = recipe(flags.file, flags.image, flags.last_image, flags.model, flags.loras)
        crf = made.crf if options.crf is None else options.crf
        options = replace(options, precision=made.precision, settings=made.settings, crf=crf, weights=made.weights)
        report = generate(made.request, flags.output or _default_output(), options)
    _finish(report.to_json(), flags, _summary(report))


def plan(flags: Namespace) -> int:
    if flags.diff:
        return _plan_diff(flags)
    if flags.table:
        return _plan_table(flags)
    from framefit.planning import changes, check_fits, fitted

    tier = QUALITIES[flags.quality or "exact"]
    checkpoint, plan = _prepared(flags)
    plan = fitted(plan, checkpoint, tier=tier)
    ways = () if plan.feasible or not plan.estimate.phases else changes(plan, checkpoint, tier=tier)
    facts = plan.to_json() | ({} if plan.feasible else {"changes": [way.to_json() for way in ways]})
    _finish(facts, flags, f"{_table(plans.rows(plan, checkpoint))}\n\n{_table(plans.phases(plan))}")
    try:
        check_fits(plan, ways)
    except DoesNotFit as error:  # the plan itself is the answer: it is on stdout already
        print(f"framefit: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _plan_diff(flags: Namespace) -> int:
    from framefit.plan import Plan
    from framefit.planning import differences

    if given := [*_asked(flags), *_limited(flags), *["--table"] * flags.table]:
        raise UsageError(f"--diff compares two saved plans, and {given[0]} asks for another: leave one out.")
    found = differences(*(Plan.read(file) for file in flags.diff))
    rows = plans.differing(found, *map(str, flags.diff))
    text = _table(rows) if found else "the plans are the same"
    _finish({"differences": [each.to_json() for each in found]}, flags, text)
    return 0


def _plan_table(flags: Namespace) -> int:
    from framefit.families import CHECKPOINTS
    from framefit.planning import fits

    if given := [flag for flag in (*_asked(flags), *_limited(flags)) if flag not in ("--model", "--quality", "--ram")]:
        raise UsageError(f"--table is of cards and presets of its own, and {given[0]} would not count: leave it out.")
    if flags.model is not None and flags.model not in CHECKPOINTS:
        raise UsageError(f"--table is for the published models and '{flags.model}' is none: framefit models ls.")
    rows = list(
        fits.rows(
            tier=QUALITIES[flags.quality or "exact"], ram_bytes=flags.ram, models=(flags.model,) if flags.model else (),
            told=lambda what: print(f"{what} ...", file=sys.stderr),
        )
    )  # fmt: skip
    facts = [dict(zip(fits.COLUMNS, row.cells(), strict=True)) for row in rows]
    _finish({"rows": facts}, flags, fits.markdown(rows))
    return 0


def profile(flags: Namespace) -> None:
    from framefit.profiling.table import rows, summary

    result, _ = _profiled(flags)
    text = [_table(rows(result)), "", *summary(result)]
    _finish(result.to_json(), flags, "\n".join(text))


def _profiled(flags: Namespace) -> tuple[Profile, Pipeline]:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's tracer tells stderr when it starts and stops
    from framefit.apart import quiet_libraries
    from framefit.families import hub
    from framefit.ledger import Ledger
    from framefit.pipeline import load
    from framefit.planning import fitted
    from framefit.profiling import measure, profile
    from framefit.profiling.profile import check_folder
    from framefit.run import check_runs

    folder = flags.output or Path("outputs") / f"profile_{time.strftime('%Y%m%d-%H%M%S')}"
    checkpoint, plan = _prepared(flags)
    hub.locate(checkpoint)
    plan.device.check_here()
    if plan.device.id != "cpu":
        plan = fitted(plan, checkpoint, tier=QUALITIES[flags.quality or "exact"])
    plan = check_runs(plan, checkpoint)
    check_folder(folder, overwrite=flags.overwrite)
    quiet_libraries()
    print("what this device does at best ...", file=sys.stderr)
    ceilings = measure(plan.device.id, fresh=flags.fresh_ceilings)
    print("load, then every phase four times ...", file=sys.stderr)
    ledger = Ledger(plan.device.id)
    with plan.device.capped(), _told(plan, ledger):
        pipeline = load(plan, checkpoint, ledger, ladder=False)
        return profile(pipeline, folder, ceilings, steps=flags.profile_steps), pipeline


@contextmanager
def _told(plan: Plan, ledger: Ledger) -> Iterator[None]:
    """What a library raises in the block becomes one of our errors."""
    from framefit.run import translated

    try:
        yield
    except FramefitError:
        raise
    except Exception as error:
        raise translated(error, plan, ledger) from error


def diagnose(flags: Namespace) -> None:
    from framefit.profiling import findings
    from framefit.profiling.rules import RULES

    if flags.profile:
        beside = {"--layers": flags.layers, "--output": flags.output}
        if given := [*_asked(flags), *_limited(flags), *(flag for flag, value in beside.items() if value)]:
            raise UsageError(f"--from reads what was measured before, and {given[0]} asks to measure: leave one out.")
        case = findings.read(flags.profile)
    else:
        result, pipeline = _profiled(flags)
        case = findings.Case.of(result, _losses(flags, pipeline) if flags.layers else ())
    found = findings.diagnose(case, RULES)
    facts = {"run_s": case.run_s, "findings": [finding.to_json() for finding in found]}
    _finish(facts | {"layers": [loss.to_json() for loss in case.losses]}, flags, findings.text(case, found))


def _losses(flags: Namespace, pipeline: Pipeline) -> list[Loss]:
    """Of the plan's layers, beside those of the model with nothing changed."""
    from framefit.profiling.layers import losses, untouched

    # the limit is for the plan's model, which is loaded
    vars(flags).update({"precision": None, "settings": [], "untuned": True} | dict.fromkeys(Budget.flags()))
    checkpoint, reference = _prepared(flags)
    chosen = [(plan.precision, [(s.type, s.value) for s in plan.settings]) for plan in (pipeline.plan, reference)]
    if chosen[0] == chosen[1]:
        print("the plan is that of the untouched model: no layer differs.", file=sys.stderr)
        return []
    print("every layer beside the untouched model's ...", file=sys.stderr)
    with _told(pipeline.plan, pipeline.ledger):
        return losses(pipeline, pipeline.encode(), untouched(reference, checkpoint))


def models_ls(flags: Namespace) -> None:
    from framefit.families import CHECKPOINTS, TINY, find, hub

    table: list[tuple[str, ...]] = [("id", "parameters", "download", "licence", "here", "end image", "sizes")]
    facts = []
    for row in (find(TINY), *CHECKPOINTS.values()):
        here, sizes = hub.is_present(row), [f"{width}x{height}" for width, height in row.sizes.named]
        size = "bundled" if row.bundled else f"{row.download_bytes / 1e9:.0f} GB"
        end = "yes" if row.last_image else "no"
        table.append((row.id, _params(row.params), size, row.licence, "yes" if here else "no", end, " ".join(sizes)))
        facts.append(
            {
                "id": row.id,
                "title": row.title,
                "repo": row.repo,
                "licence": row.licence,
                "params": row.params,
                "download_bytes": row.download_bytes,
                "present": here,
                "last_image": row.last_image,
                "sizes": sizes,
                "num_frames": row.frames.default,
                "fps": row.fps,
                "steps": row.steps,
                "presets": {name: dict(fields) for name, fields in row.presets.items()},
            }
        )
    _finish({"models": facts}, flags, _table(table))


def _params(count: int) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.0f} M"


def models_pull(flags: Namespace) -> None:
    from framefit.families import find, hub

    folder = hub.pull(find(flags.model), on_notice=lambda text: print(text, file=sys.stderr))
    _finish({"model": flags.model, "folder": str(folder)}, flags, str(folder))


def models_verify(flags: Namespace) -> int:
    from framefit.families import find, soundness

    row = find(flags.model)
    problems = soundness.verify(row, deep=not flags.quick, on_file=lambda name: print(name, file=sys.stderr))
    _finish({"model": row.id, "problems": problems}, flags, "\n".join(problems) or f"{row.id}: every file is in order.")
    return 5 if problems else 0


def doctor(flags: Namespace) -> None:
    from framefit.doctor import examine

    if flags.probe:
        print("measuring this device ...", file=sys.stderr)
    facts, rows = examine(flags.device or "auto", probe=flags.probe, runs=flags.checkpoint_dir)
    _finish(facts, flags, _table(rows))


def inspect(flags: Namespace) -> None:
    from framefit import video

    seen = asdict(video.inspect(flags.file))
    rows = [(name, seen[name]) for name in ("format", "width", "height", "num_frames", "fps")]
    rows += list(seen["marks"].items())
    text = _table(rows)
    if seen["parameters"] is not None:
        text += "\n" + json.dumps(seen["parameters"], ensure_ascii=False, indent=2)
    _finish(seen, flags, text)


def bench(flags: Namespace) -> int:
    from framefit.bench.command import answer

    facts, text, code = answer(flags, say=lambda line: print(line, file=sys.stderr, flush=True))
    _finish(facts, flags, text)
    return code


def compare(flags: Namespace) -> int:
    from framefit import quality
    from framefit.quality import sheet
    from framefit.quality.compare import beyond

    at_least, at_most = dict(flags.min), dict(flags.max)
    for flag, given in (("--min", flags.min), ("--max", flags.max)):
        if twice := [name for name, count in Counter(name for name, _ in given).items() if count > 1]:
            raise UsageError(f"{flag} {twice[0]} was given twice: leave one of them out.")
    asked = tuple(name.strip() for name in flags.metric.split(",")) if flags.metric else ("all",)
    asked = () if "all" in asked else asked
    for name in (*asked, *at_least, *at_most):
        if name not in quality.METRICS:
            raise UsageError(f"'{name}' is no metric: use {', '.join(quality.METRICS)} or all.")
    for name in at_least:
        if quality.METRICS[name].better == "lower":
            raise UsageError(f"--min {name} was given and less of it is better: use --max {name}.")
    inputs = {path.resolve() for path in (flags.ours, flags.reference)}
    if flags.side_by_side and flags.side_by_side.resolve() in inputs:
        raise UsageError(f"--side-by-side would replace {flags.side_by_side}, which is compared: give another name.")
    if flags.plot:
        sheet.check_plot(flags.plot, overwrite=flags.overwrite)
    if flags.side_by_side:
        sheet.check_side_by_side(flags.ours, flags.side_by_side, overwrite=flags.overwrite)
    bars = {*at_least, *at_most}
    found = quality.compare(
        flags.ours, flags.reference, metrics=dict.fromkeys((*(asked or quality.METRICS), *bars)),
        required={*asked, *bars},  # a bar that cannot be measured is not met
        lpips_weights=flags.lpips_weights,
    )  # fmt: skip
    failures = beyond(found.scores, at_least, at_most)
    if flags.plot:
        sheet.plot(found, flags.plot, overwrite=flags.overwrite)
    if flags.side_by_side:
        sheet.side_by_side(found, flags.side_by_side, overwrite=flags.overwrite)
    rows = [("metric", "value", "", "beside it")]
    for name, score in found.scores.items():
        beside = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in score.detail.items())
        rows.append((name, f"{score.value:.4g} {quality.METRICS[name].unit}", quality.METRICS[name].says, beside))
    lines = [_table(rows), f"{found.num_frames} frames of {found.width}x{found.height}"]
    lines += [f"{name} was not measured: {why}" for name, why in found.missing.items()]
    lines += [*found.notes, *failures]
    _finish(found.to_json() | {"failures": failures}, flags, "\n".join(lines))
    return 1 if failures else 0


def verify(flags: Namespace) -> int:
    from framefit.run import Options
    from framefit.verify import verify

    if flags.prompt is None:
        raise UsageError("a prompt is needed: say what should happen with -p TEXT.")
    options = Options(
        device=flags.device or "auto", preset=flags.preset, precision=flags.precision, settings=dict(flags.settings),
        use_tuned=not flags.untuned, budget=_budget(flags), quality=flags.quality or "exact",
    )  # fmt: skip
    folder = flags.output or Path("outputs") / f"verify_{time.strftime('%Y%m%d-%H%M%S')}"
    verdict = verify(
        _request(flags), folder, options, lpips_weights=flags.lpips_weights, overwrite=flags.overwrite,
        on_phase=lambda name: print(f"{name} ...", file=sys.stderr),
    )  # fmt: skip
    rows = [("", "what", "value", "bar", "reason")]
    rows += [
        ("ok" if c.passed else "FAILED", c.what, "" if c.value is None else f"{c.value:.4g}", c.bar, c.reason)
        for c in verdict.checks
    ]
    outcome = f"{'passed' if verdict.passed else 'failed'} as {verdict.tier}"
    text = f"{_table(rows)}\n{outcome}: {folder}/verdict.html"
    if not verdict.passed:
        text += "\nframefit diagnose --layers with the same flags says which layers differ"
    _finish(verdict.to_json() | {"folder": str(folder)}, flags, text)
    return 0 if verdict.passed else 1


def tune(flags: Namespace) -> None:
    from framefit.run import Options
    from framefit.tune import named, tune

    if flags.prompt is None:
        raise UsageError("a prompt is needed: the candidates' videos are compared. Give it with -p TEXT.")
    options = Options(device=flags.device or "auto", precision=flags.precision)

    def told(number: int, total: int, settings: Mapping[str, str]) -> None:
        print(f"{number} of {total}: {named(settings)} ...", file=sys.stderr)

    found = tune(
        _request(flags), options, tier=QUALITIES[flags.quality],
        budget_bytes=flags.memory, restart=flags.restart, on_trial=told,
    )  # fmt: skip
    usual = found.trials[0].step_s or 0
    rows = [("settings", "tier", "s a step", "times as fast", "peak GiB", "")]
    for trial in found.trials:
        speed = ("-", "-") if trial.step_s is None else (f"{trial.step_s:.3f}", f"{usual / trial.step_s:.2f}")
        said = trial.failed or ("filed for run" if trial == found.best else "")
        rows.append((named(trial.settings), trial.tier, *speed, f"{trial.peak_bytes / 2**30:.2f}", said))
    _finish(found.to_json(), flags, _table(rows))


def _finish(facts: dict[str, Any], flags: Namespace, text: str) -> None:
    """The result on stdout, for a program or for a person."""
    text = json.dumps(facts, default=str) if flags.json else text
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, errors="backslashreplace").decode(encoding))  # a terminal may know less than a prompt


def _request(flags: Namespace) -> Request:
    width, height = flags.size or (None, None)
    names = (
        "last_image",
        "prompt",
        "negative_prompt",
        "fit",
        "num_frames",
        "fps",
        "steps",
        "guidance",
        "seed",
    )
    fields = {name: getattr(flags, name) for name in names}
    model = {} if flags.model is None else {"model": flags.model}
    loras = tuple(Lora.parse(text) for text in flags.loras or ())
    return Request(image=flags.image or PHOTO, width=width, height=height, loras=loras, **fields, **model)


def _prepared(flags: Namespace) -> tuple[Checkpoint, Plan]:
    """The row and the plan of the flags; without a prompt, one that says so."""
    from framefit.planning import prepare

    if flags.prompt is None:
        flags.prompt = "(no prompt)"
    return prepare(
        _request(flags), device=flags.device or "auto", preset=flags.preset, precision=flags.precision,
        settings=dict(flags.settings), use_tuned=not flags.untuned, budget=_budget(flags),
    )  # fmt: skip


def _budget(flags: Namespace) -> Budget:
    return Budget(**{f"{name}_bytes": getattr(flags, name) for name in Budget.flags()})


def _refuse_with_resume(flags: Namespace) -> None:
    """A resumed run keeps its request; a flag that would change it is a contradiction."""
    if given := _asked(flags):
        raise UsageError(
            f"--resume goes on with the run as it was asked for, and {given[0]} would change it: leave it out, "
            f"or start a new run."
        )


def _asked(flags: Namespace) -> list[str]:
    """What was given of the flags that say which video to make, and how."""
    values = {
        "IMAGE": flags.image, "--prompt": flags.prompt, "--model": flags.model, "--last-image": flags.last_image,
        "--negative": flags.negative_prompt, "--size": flags.size, "--fit": flags.fit, "--frames": flags.num_frames,
        "--fps": flags.fps, "--steps": flags.steps, "--guidance": flags.guidance, "--seed": flags.seed,
        "--lora": flags.loras, "--preset": flags.preset, "--precision": flags.precision,
        "--set": flags.settings or None, "--quality": flags.quality, "--untuned": flags.untuned or None,
    }  # fmt: skip
    return [flag for flag, value in values.items() if value is not None]


def _limited(flags: Namespace) -> list[str]:
    """What was given of the flags that say where it is to be made, and within what."""
    return [f"--{name}" for name in ("device", *Budget.flags()) if getattr(flags, name) is not None]


def _default_output() -> Path:
    return Path("outputs") / f"video_{time.strftime('%Y%m%d-%H%M%S')}.mp4"


def _summary(report: Report) -> str:
    return f"{report.video}  (seed {report.plan.request.seed}, {report.seconds:.1f} s)"


def _table(rows: Iterable[tuple[Any, ...]]) -> str:
    """Columns as wide as their widest cell."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)
