"""Proof for one request: the plan and the untouched model with one seed, measured against each other.

Each runs in a process of its own, so that neither has the other's memory or warm caches. The reference has no setting
but those of the model's own pipeline, at the precision that the device computes best. Says nothing of other requests.
"""

from __future__ import annotations

import base64
import html
import json
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from string import Template
from typing import Any, Literal

from framefit import quality, video
from framefit.apart import apart, quiet_libraries
from framefit.errors import BadOutput
from framefit.plan import TIERS, Plan, Tier
from framefit.quality import Comparison, sheet
from framefit.request import Request
from framefit.run import Options, check_runs, generate, prepare

__all__ = ["GATES", "TIERS", "Check", "Verdict", "judge", "tier_of", "verify"]

FILES = ("metrics.png", "plan.mp4", "reference.mp4", "verdict.html", "verdict.json")
TEMPLATE = Path(__file__).parent / "assets" / "verdict.html"


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    metric: str
    sign: Literal[">=", "<="]
    bar: float
    optional: bool = False
    """Whether a metric that cannot be measured here is passed over."""


GATES: Mapping[Tier, tuple[Gate, ...]] = {
    "exact": (Gate(metric="psnr", sign=">=", bar=40.0),),
    "near": (
        Gate(metric="vmaf", sign=">=", bar=95.0),
        Gate(metric="ssim", sign=">=", bar=0.97),
        Gate(metric="lpips", sign="<=", bar=0.05, optional=True),
    ),
    "lossy": (
        Gate(metric="vmaf", sign=">=", bar=85.0),
        Gate(metric="ssim", sign=">=", bar=0.92),
        Gate(metric="lpips", sign="<=", bar=0.10, optional=True),
        Gate(metric="motion", sign=">=", bar=0.9),
        Gate(metric="motion", sign="<=", bar=1.1),
    ),
}
"""Tier -> what a video must reach beside the untouched model's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One bar, and how it went."""

    what: str
    value: float | None
    """None: not measured."""
    bar: str
    passed: bool
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    tier: Tier
    """The weakest of the plan's settings: what it must be held to."""
    passed: bool
    checks: tuple[Check, ...]
    comparison: Comparison
    plan: dict[str, Any]
    """The report of the plan's run, as `framefit run --json` prints it."""
    reference: dict[str, Any]
    """That of the untouched model."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"comparison": self.comparison.to_json()}


def verify(
    request: Request,
    folder: Path,
    options: Options,
    *,
    lpips_weights: Path | None = None,
    overwrite: bool = False,
    on_phase: Callable[[str], None] = lambda name: None,
) -> Verdict:
    """Run both, and write `folder`: verdict.html, verdict.json, plan.mp4, reference.mp4 and metrics.png.

    Args:
        options: of the plan; the reference has only its device, without a limit on its memory.

    Raises:
        BadOutput: the folder exists and is not empty, and `overwrite` is false.
        FramefitError: one of the runs failed; the folder is untouched.
    """
    folder = folder.resolve()
    _check_folder(folder, overwrite)
    sheet.check_plot(folder / "metrics.png", overwrite=True)
    if lpips_weights:
        from framefit.quality.lpips import load_network

        load_network(lpips_weights)
    checkpoint, plan = prepare(request, options)
    check_runs(plan, checkpoint)
    request = replace(request, seed=plan.request.seed)
    untouched: dict[str, Any] = {
        "device": options.device,
        "preset": options.preset,
        "checkpoints": None,
        "use_tuned": False,
        "fit": False,
    }
    changed = untouched | {
        "precision": options.precision, "settings": dict(options.settings), "use_tuned": options.use_tuned,
        "budget": options.budget, "fit": True, "quality": options.quality,
    }  # fmt: skip
    reference = prepare(request, Options(**untouched))[1]
    scratch = folder.with_name(f".framefit-{secrets.token_hex(8)}.partial")
    try:
        scratch.mkdir()
        reports = {}
        for name, facts in (("reference", untouched), ("plan", changed)):
            on_phase(name)
            made = apart(partial(_made, request, scratch / name, facts))
            reports[name] = made | {"video": str(folder / f"{name}.mp4")}
        on_phase("metrics")
        found = quality.compare(scratch / "plan", scratch / "reference", lpips_weights=lpips_weights)
        sheet.plot(found, scratch / "metrics.png")
        found = replace(found, ours=folder / "plan.mp4", reference=folder / "reference.mp4")
        tier = tier_of(plan, reference)
        checks = judge(found, tier)
        verdict = Verdict(
            tier=tier, passed=all(check.passed for check in checks), checks=checks, comparison=found, **reports,
        )  # fmt: skip
        _write(verdict, scratch)
        old = scratch.with_suffix(".old")
        if folder.exists():  # a folder that is not empty cannot be replaced in one step
            folder.rename(old)
        scratch.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return verdict


def _check_folder(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise BadOutput(f"{folder} is a file: a verdict is a folder, so choose another name.")
    entries = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if strangers := entries.difference(FILES):
        raise BadOutput(f"{folder} holds {min(strangers)}, which is not of a verdict: choose another folder.")
    if entries and not overwrite:
        raise BadOutput(f"{folder} exists: add --overwrite to replace it, or choose another name.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadOutput(f"{folder} cannot be made ({error.strerror}): choose another name.") from None


def tier_of(plan: Plan, reference: Plan) -> Tier:
    """The weakest tier among the settings that differ from the reference; another precision is a near one."""
    usual = {(setting.type, setting.value) for setting in reference.settings}
    tiers: list[Tier] = [setting.tier for setting in plan.settings if (setting.type, setting.value) not in usual]
    if plan.precision != reference.precision:
        tiers.append("near")
    return max(tiers, key=TIERS.index, default="exact")


def judge(found: Comparison, tier: Tier) -> tuple[Check, ...]:
    """The gates of the tier, and that the plan's video has no fault that the reference's has not."""
    checks = [_checked(gate, found) for gate in GATES[tier]]
    known = {_kind(fault) for fault in found.faults[1]}
    new = [fault for fault in found.faults[0] if _kind(fault) not in known]
    reason = "; ".join(new) or "nothing is black, frozen or empty that is not so in the reference"
    return (*checks, Check(what="sound", value=None, bar="no new fault", passed=not new, reason=reason))


def _kind(fault: str) -> str:
    """Without the frames that it names."""
    return fault.partition(":")[0]


def _checked(gate: Gate, found: Comparison) -> Check:
    bar = f"{gate.sign} {gate.bar:g}"
    if gate.metric in found.missing:
        reason = f"not measured: {found.missing[gate.metric]}"
        return Check(what=gate.metric, value=None, bar=bar, passed=gate.optional, reason=reason)
    value = found.scores[gate.metric].value
    passed = value >= gate.bar if gate.sign == ">=" else value <= gate.bar
    return Check(what=gate.metric, value=value, bar=bar, passed=passed, reason=quality.METRICS[gate.metric].says)


def _made(request: Request, output: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Frames as PNGs, so that no encoder stands between model and metric."""
    quiet_libraries()
    return generate(request, output, Options(**facts)).to_json()


def _denoising_s(report: Mapping[str, Any]) -> float:
    phases: list[dict[str, Any]] = report["report"]["phases"]
    return sum(float(phase["seconds"]) for phase in phases if phase["name"].startswith("denoise"))


def _write(verdict: Verdict, folder: Path) -> None:
    """The files of the report, in place of the PNGs."""
    for name in ("plan", "reference"):
        seen = video.inspect(folder / name)
        request = getattr(verdict, name)["plan"]["request"]
        frames = video.Video(
            frames=video.read(folder / name), num_frames=seen.num_frames, width=seen.width, height=seen.height,
            fps=request["fps"],
        )  # fmt: skip
        video.write(frames, folder / f"{name}.mp4", parameters=seen.parameters or {})
    (folder / "verdict.json").write_text(json.dumps(verdict.to_json(), indent=1) + "\n", encoding="utf-8")
    (folder / "verdict.html").write_text(_page(verdict, folder), encoding="utf-8")
    for name in ("plan", "reference"):
        shutil.rmtree(folder / name)


def _page(verdict: Verdict, folder: Path) -> str:
    plan, reference = verdict.plan, verdict.reference
    request, device = plan["plan"]["request"], plan["plan"]["device"]
    settings = [f"{s['type']}={s['value']} ({s['tier']})" for s in plan["plan"]["settings"]]
    figures = [
        ("seconds, all", *(f"{r['seconds']:.2f}" for r in (plan, reference))),
        ("seconds, denoising", *(f"{_denoising_s(r):.2f}" for r in (plan, reference))),
        ("precision", *(r["plan"]["precision"] for r in (plan, reference))),
        *_phases(plan, reference),
        (
            "weights, predicted GiB",
            *(f"{r['plan']['estimate']['weights_bytes'] / 2**30:.3f}" for r in (plan, reference)),
        ),
    ]
    scores = [
        (name, f"{score.value:.4g} {quality.METRICS[name].unit}", quality.METRICS[name].says)
        for name, score in verdict.comparison.scores.items()
    ]
    scores += [(name, "not measured", why) for name, why in verdict.comparison.missing.items()]
    checks = [
        ("passed" if c.passed else "FAILED", c.what, "" if c.value is None else f"{c.value:.4g}", c.bar, c.reason)
        for c in verdict.checks
    ]
    videos = {name: _encoded(folder / f"{name}.mp4") for name in ("plan", "reference")}
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        verdict="passed" if verdict.passed else "failed",
        tier=verdict.tier,
        title=html.escape("{model}, {width}x{height}, {num_frames} frames, {steps} steps".format(**request)),
        prompt=html.escape(request["prompt"]),
        facts=html.escape(f"{device['name']}; seed {request['seed']}; {', '.join(settings)}"),
        checks=_rows(checks),
        figures=_rows(figures),
        scores=_rows(scores),
        notes="".join(f"<li>{html.escape(note)}</li>" for note in verdict.comparison.notes),
        plot=_encoded(folder / "metrics.png"),
        **videos,
    )


def _encoded(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()


def _phases(*reports: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Peak memory by phase, a row a phase."""
    peaks = [{phase["name"]: phase["peak_bytes"] for phase in r["report"]["phases"]} for r in reports]
    return [(f"peak GiB, {name}", *(f"{p.get(name, 0) / 2**30:.3f}" for p in peaks)) for name in peaks[0]]


def _rows(rows: Sequence[tuple[str, ...]]) -> str:
    return "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
