"""A plan as a person reads it: rows of what will be done and why, what each phase needs, how two of them differ."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from framefit.durations import duration

if TYPE_CHECKING:
    from framefit.families import Checkpoint
    from framefit.plan import Plan
    from framefit.planning.diff import Difference

__all__ = ["differing", "phases", "rows"]


def rows(plan: Plan, checkpoint: Checkpoint) -> list[tuple[object, ...]]:
    """What, which, because."""
    request, reasons = plan.request, plan.reasons
    return [
        ("model", f"{checkpoint.id} ({checkpoint.title})", ""),
        ("device", plan.device.name, _budget(plan)),
        ("size", f"{request.width}x{request.height}, photo {request.fit}", reasons["size"]),
        ("frames", f"{request.num_frames} at {request.fps:g} fps", reasons["num_frames"]),
        ("steps", request.steps, reasons["steps"]),
        ("guidance", ", ".join(f"{g:g}" for g in request.guidance), reasons["guidance"]),
        ("shift", "-" if request.shift is None else f"{request.shift:g}", reasons["shift"]),
        ("seed", request.seed, reasons["seed"]),
        ("precision", plan.precision, reasons["precision"]),
        *(("lora", lora, reasons["loras"]) for lora in request.loras),
        *((s.title, f"{s.value} [{s.tier}]", s.because) for s in plan.settings),
        (
            "weights",
            f"{plan.estimate.weights_bytes / 2**30:.2f} GiB",
            f"of all components; {plan.estimate.free_bytes / 2**30:.1f} GiB are free",
        ),
    ]


def phases(plan: Plan) -> list[tuple[object, ...]]:
    estimate, on_card = plan.estimate, plan.device.id != "cpu"
    rows: list[tuple[object, ...]] = [("phase", "time", "card GiB" if on_card else "", "host GiB", "most of it")]
    for phase in estimate.phases:
        mark = " *" if phase == estimate.binding else ""
        seconds = "-" if phase.seconds is None else duration(phase.seconds)
        card = f"{phase.peak_vram_bytes / 2**30:.2f}" if on_card else ""
        most = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in list(phase.held.items())[:2])
        rows.append((phase.name + mark, seconds, card, f"{phase.host_bytes / 2**30:.2f}", most))
    total = "-" if estimate.seconds is None else duration(estimate.seconds)
    return [
        *rows,
        ("after loading", total, f"{estimate.peak_bytes / 2**30:.2f}" if on_card else "", "", estimate.origin),
    ]


def _budget(plan: Plan) -> str:
    device = plan.device
    if device.id == "cpu":
        return ""
    free = "what is free beside CUDA's context" if device.vram_limit_bytes is None else "by --vram"
    here = "; not a card of this machine" if device.origin == "named" else ""
    return f"{device.budget_bytes / 2**30:.2f} GiB for the run: {free}{here}"


def differing(found: Iterable[Difference], a: str, b: str) -> list[tuple[object, ...]]:
    """What, in plan `a`, in plan `b`."""
    rows: list[tuple[object, ...]] = [("what", a, b)]
    for each in found:
        cells = (_cell(each.what, value) for value in (each.a, each.b))
        told = (f"{cell} ({why})" if why else cell for cell, why in zip(cells, each.because, strict=True))
        rows.append((each.what.replace("_bytes", " GiB"), *told))
    return rows


def _cell(what: str, value: object) -> str:
    if value is None:
        return "-"
    if what.endswith("_bytes") and isinstance(value, int):
        return f"{value / 2**30:.2f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
