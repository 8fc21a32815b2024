"""Fill in what the request left open, for one model on one machine, and say why.

Precedence: what the user said, then the preset, then the authors' defaults.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from framefit.device import Device
from framefit.errors import BadInput, UsageError
from framefit.families import Checkpoint
from framefit.plan import Chunk, Decode, Estimate, Guidance, Offload, Plan, Quantize, Setting, Window
from framefit.planning import length
from framefit.planning.asked import asked
from framefit.request import Request, ResolvedRequest

__all__ = ["choose", "component_bytes", "untouched"]

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


def choose(
    request: Request,
    checkpoint: Checkpoint,
    device: Device,
    *,
    photo_size: tuple[int, int],
    photos: Mapping[str, str] | None = None,
    preset: str | None = None,
    settings: Mapping[str, str] | None = None,
    precision: str | None = None,
) -> Plan:
    """The plan for `request` on `device`; `feasible` says whether its weights fit there.

    Args:
        photo_size: (width, height) of the upright photo, in pixels.
        photos: SHA-256 of the photo files, kept in the plan.
        preset: one of the checkpoint's presets; explicit fields of the request win over it.
        settings: explicit settings by type, e.g. {"guidance": "apart"}, or aliases of `planning.asked`.
        precision: explicit precision of the weights.

    Raises:
        BadInput: a size, frame count or end image that the model cannot take.
        UsageError: an unknown preset or setting, or flags that contradict each other.
    """
    reasons: dict[str, str] = {}
    wanted = _wanted(request, checkpoint, preset, reasons)
    resolved = ResolvedRequest(
        image=request.image,
        last_image=request.last_image,
        prompt=request.prompt,
        model=request.model,
        seed=_seed(request, reasons),
        shift=None,
        guidance=_per_expert(wanted["guidance"], checkpoint),
        loras=request.loras,
        **_frame_size(request, wanted, checkpoint, photo_size, reasons),
        **{name: wanted[name] for name in ("negative_prompt", "num_frames", "fps", "steps")},
    )
    _check_model(request, resolved, checkpoint)
    resolved = _with_shift(resolved, checkpoint, reasons)
    if request.loras:
        of_preset = "loras" in checkpoint.presets.get(preset or "", {})
        origin = f"the preset '{preset}'" if of_preset else "asked for"
        reasons["loras"] = f"{origin}; merged into the weights when they are loaded"
    precision = _precision(precision, device, reasons)
    chosen = _settings(checkpoint, asked(settings or {}))
    length.check(next(s for s in chosen if isinstance(s, Window)), checkpoint)
    plan = Plan(
        request=resolved,
        device=device,
        precision=precision,
        settings=chosen,
        estimate=Estimate(
            weights_bytes=sum(component_bytes(checkpoint, precision).values()), free_bytes=device.budget_bytes
        ),
        photos=dict(photos or {}),
        reasons=reasons,
    )
    if warning := length.beyond_trained(plan, checkpoint):
        reasons["num_frames"] += f"; {warning}"
    return plan


def _wanted(request: Request, checkpoint: Checkpoint, preset: str | None, reasons: dict[str, str]) -> dict[str, Any]:
    """The user's words over the preset over the authors' defaults, with the origin of each."""
    if preset is not None and preset not in checkpoint.presets:
        names = ", ".join(checkpoint.presets) or "no presets"
        raise UsageError(f"preset '{preset}' is unknown: {checkpoint.id} has {names}.")
    defaults = {
        "negative_prompt": checkpoint.negative_prompt,
        "num_frames": checkpoint.frames.default,
        "fps": checkpoint.fps,
        "steps": checkpoint.steps,
        "guidance": checkpoint.guidance,
        "width": None,
        "height": None,
    }
    preset_fields = checkpoint.presets[preset] if preset else {}
    wanted = {}
    for name, default in defaults.items():
        said = getattr(request, name)
        wanted[name] = said if said is not None else preset_fields.get(name, default)
        if wanted[name] is not None and name not in ("width", "height"):
            origin = f"the preset '{preset}'" if name in preset_fields else "the authors' default"
            reasons[name] = "asked for" if said is not None else origin
    return wanted


def _seed(request: Request, reasons: dict[str, str]) -> int:
    reasons["seed"] = "asked for" if request.seed is not None else "drawn; give it again for the same video"
    return request.seed if request.seed is not None else secrets.randbits(32)


def _per_expert(guidance: tuple[float, ...], checkpoint: Checkpoint) -> tuple[float, ...]:
    experts = len(checkpoint.experts)
    if len(guidance) not in (1, experts):
        raise BadInput(
            f"{len(guidance)} guidance scales were given; {checkpoint.id} has {experts} "
            f"expert{'s' if experts > 1 else ''}: give {'1' if experts == 1 else f'1 or {experts}'}."
        )
    return guidance if len(guidance) == experts else guidance * experts


def _frame_size(
    request: Request,
    wanted: Mapping[str, Any],
    checkpoint: Checkpoint,
    photo_size: tuple[int, int],
    reasons: dict[str, str],
) -> dict[str, Any]:
    """Width, height and fit. The photo is never stretched: either the size follows it, or it is cropped or padded."""
    sizes = checkpoint.sizes
    if request.width is not None and request.height is not None:
        if request.fit == "nearest":
            raise UsageError("--fit nearest lets the photo choose the size and --size fixes it: leave one of them out.")
        if problem := sizes.refuse(request.width, request.height):
            raise BadInput(f"{problem}.")
        reasons["size"] = "asked for"
        return {"width": request.width, "height": request.height, "fit": request.fit or "crop"}
    base = (wanted["width"], wanted["height"]) if wanted["width"] else sizes.default
    if request.fit in ("crop", "pad"):
        reasons["size"] = f"the default, with --fit {request.fit}"
        return {"width": base[0], "height": base[1], "fit": request.fit}
    aspect = photo_size[0] / photo_size[1]
    width, height = sizes.for_aspect(aspect, base[0] * base[1])
    reasons["size"] = (
        f"nearest to the photo's aspect ({photo_size[0]}x{photo_size[1]}) with the area of {base[0]}x{base[1]}"
    )
    return {"width": width, "height": height, "fit": "crop"}


def _check_model(request: Request, resolved: ResolvedRequest, checkpoint: Checkpoint) -> None:
    checkpoint.frames.check(resolved.num_frames)
    if request.last_image is not None:
        if not checkpoint.last_image:
            raise BadInput(
                f"an end image was given and {checkpoint.id} takes only a start image: leave it out, or use a model "
                f"that takes both (framefit models ls)."
            )
        if resolved.num_frames < 2:
            raise BadInput("an end image was given and the video has 1 frame: ask for more frames.")


def _with_shift(resolved: ResolvedRequest, checkpoint: Checkpoint, reasons: dict[str, str]) -> ResolvedRequest:
    shift = checkpoint.shift(resolved.width, resolved.height)
    reasons["shift"] = "the checkpoint's own" if shift is None else "the authors' value for this size"
    return replace(resolved, shift=shift)


def _precision(wanted: str | None, device: Device, reasons: dict[str, str]) -> str:
    if wanted is not None:
        if wanted not in BYTES:
            raise UsageError(f"precision '{wanted}' is unknown: use {', '.join(BYTES)}.")
        reasons["precision"] = "asked for"
        return wanted
    if device.compute_capability is None:
        reasons["precision"] = "CPUs compute in fp32"
        return "fp32"
    if device.compute_capability >= (8, 0):
        reasons["precision"] = "the card computes bf16 (compute capability 8.0 and up)"
        return "bf16"
    reasons["precision"] = "the card has no fast bf16 (compute capability below 8.0)"
    return "fp16"


def _settings(checkpoint: Checkpoint, explicit: Mapping[str, Setting]) -> tuple[Setting, ...]:
    return tuple(explicit.get(setting.type, setting) for setting in untouched(checkpoint))


def untouched(checkpoint: Checkpoint) -> tuple[Setting, ...]:
    """As the model's own pipeline runs."""
    together = "together" if checkpoint.batched_guidance else "apart"
    return (
        Guidance(value=together, because="as the reference pipeline runs them"),
        Quantize(value="none", because="8 bits would round the weights"),
        Chunk(value="none", because="a whole forward at once, as the reference"),
        Decode(value="whole", because="as many frames at once as the reference takes"),
        Window(value="none", because="all frames in one piece"),
        Offload(value="none", because="weights on the device are the fastest"),
    )


def component_bytes(checkpoint: Checkpoint, precision: str) -> dict[str, int]:
    """Component -> bytes of its weights."""
    width = BYTES[precision]
    return {c.name: c.params * (4 if c.keep_fp32 else width) for c in checkpoint.components if c.params}
