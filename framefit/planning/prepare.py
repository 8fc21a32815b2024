"""From a request to a plan on this machine: the row, the device, the photo, the settings that were found fastest.

No weight is read, and no torch is needed for a card that is only named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from framefit import photo, tuned
from framefit.device import ALL, Budget, Device
from framefit.families import Checkpoint, find
from framefit.plan import Plan, Setting
from framefit.planning.asked import asked
from framefit.planning.choose import choose
from framefit.request import Lora, Request

__all__ = ["prepare"]


def prepare(
    request: Request,
    *,
    device: str = "auto",
    budget: Budget = ALL,
    preset: str | None = None,
    settings: Mapping[str, str] | None = None,
    precision: str | None = None,
    use_tuned: bool = True,
) -> tuple[Checkpoint, Plan]:
    """The model's row and the plan. Paths become absolute: a run may be resumed from elsewhere.

    Args:
        device: auto, cpu, cuda, cuda:N or a card of `framefit.cards`.
        budget: most that the run may take of it.
        use_tuned: take settings that are not explicit from `framefit tune`, where it has been run.
    """
    checkpoint, settings = find(request.model), settings or {}
    last_image = None if request.last_image is None else request.last_image.absolute()
    request = replace(request, image=request.image.absolute(), last_image=last_image)
    if checkpoint.folder is not None and not checkpoint.bundled:
        request = replace(request, model=str(checkpoint.folder))
    named = {"image": request.image, "last_image": request.last_image}
    paths = {name: path for name, path in named.items() if path is not None}
    sizes = {name: photo.load(path).size for name, path in paths.items()}
    request = replace(request, loras=(*_of_preset(checkpoint, preset), *request.loras))
    if request.loras:
        from framefit.families import lora

        request = replace(request, loras=lora.check(request.loras, checkpoint))
    plan = choose(
        request,
        checkpoint,
        Device.find(device, budget),
        photo_size=sizes["image"],
        photos={name: photo.sha256(path) for name, path in paths.items()},
        preset=preset,
        settings=settings,
        precision=precision,
    )
    return checkpoint, _tuned(plan, asked(settings)) if use_tuned else plan


def _of_preset(checkpoint: Checkpoint, preset: str | None) -> tuple[Lora, ...]:
    """The LoRAs that come with the model for this preset."""
    names = checkpoint.presets.get(preset or "", {}).get("loras", ())
    return tuple(Lora(file=checkpoint.folder / name) for name in names if checkpoint.folder)


def _tuned(plan: Plan, explicit: Mapping[str, Setting]) -> Plan:
    """With the settings that a search has filed for this device in place of those that nobody asked for."""
    if (found := tuned.find(plan)) is None:
        return plan
    settings = tuple(
        type(s)(value=found.settings[s.type], because=found.because)
        if s.type in found.settings and s.type not in explicit
        else s
        for s in plan.settings
    )
    return replace(plan, settings=settings)
