"""LoRA files merged into the denoisers' weights.

    W += scale * (alpha / rank) * up @ down

in fp32, rounded once to the weight's own precision. It belongs to loading and is no pass: a pass says how given weights
are computed with, a LoRA says which weights they are. Held by test to PEFT's sums and diffusers' pipeline. How a file
names its tensors is in `lora_file`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from framefit import photo
from framefit.errors import BadInput, ModelMissing
from framefit.families import easyanimate_v5
from framefit.families.checkpoint import Checkpoint
from framefit.families.files import Shapes
from framefit.families.lora_file import Change, opened, place, reading
from framefit.families.parts import Parts
from framefit.request import Lora

__all__ = ["check", "merge", "merging", "shapes"]


def shapes(checkpoint: Checkpoint) -> dict[str, Shapes]:
    """Every denoiser's parameters, by its class and configuration alone."""
    import diffusers

    found = {}
    for expert in checkpoint.experts:
        row = checkpoint[expert]
        config = {**row.config, **(easyanimate_v5.YAML if checkpoint.layout == "easyanimate-v5" else {})}
        try:
            with torch.device("meta"):
                found[expert] = _shapes(getattr(diffusers, row.class_name).from_config(config))
        except Exception as error:  # a damaged configuration can make a constructor raise anything
            raise ModelMissing(f"{checkpoint.id} has no sound configuration of its {expert} ({error}).") from None
    return found


def check(loras: tuple[Lora, ...], checkpoint: Checkpoint) -> tuple[Lora, ...]:
    """The same with absolute paths and hashes, before a weight of the model is read.

    Raises:
        BadInput: a file that is absent, damaged, another than was asked for, or of another model.
    """
    needed = shapes(checkpoint) if loras else {}
    checked = []
    for lora in loras:
        place(lora, checkpoint, needed)
        with opened(lora) as stream, reading(lora):
            for key in stream.keys():  # noqa: SIM118
                if not stream.get_tensor(key).float().isfinite().all():
                    raise BadInput(f"{lora.file} holds NaN or infinity in {key}: use another file.")
        checked.append(replace(lora, file=lora.file.absolute(), sha256=_digest(lora)))
    return tuple(checked)


def merge(parts: Parts, loras: Sequence[Lora]) -> None:
    """Add what the files hold to the denoisers that are in `parts`; to the same bits in whichever order they are given.

    Raises:
        BadInput: a file that does not fit, or a sum beyond the range of the weights' precision.
    """
    needed = shapes(parts.checkpoint) if loras else {}
    for expert in parts.checkpoint.experts:
        if expert in parts:
            with merging(parts, expert, loras, needed) as add:
                add(None)


@contextmanager
def merging(
    parts: Parts, expert: str, loras: Sequence[Lora], needed: Mapping[str, Shapes]
) -> Iterator[Callable[[Collection[str] | None], None]]:
    """What does `merge` for some of the parameters of one denoiser, by name, each of them once; None: for all.

    Args:
        needed: `shapes` of the checkpoint.
    """
    if not loras:
        yield lambda names: None
        return
    needed = {**needed, expert: _shapes(parts[expert])}
    terms: dict[str, list[tuple[Any, Change, Lora]]] = {}
    with ExitStack() as files:
        for lora in sorted(loras, key=lambda lora: (lora.sha256 or "", lora.scale, lora.expert or "")):
            stream = files.enter_context(opened(lora))
            _digest(lora)
            for change in place(lora, parts.checkpoint, needed):
                if change.expert == expert:
                    terms.setdefault(change.parameter, []).append((stream, change, lora))
        yield partial(_add, parts[expert], expert, terms)


@torch.no_grad()
def _add(
    model: torch.nn.Module,
    expert: str,
    terms: Mapping[str, Sequence[tuple[Any, Change, Lora]]],
    names: Collection[str] | None,
) -> None:
    weights = dict(model.named_parameters())
    for name in terms if names is None else terms.keys() & names:
        weight = weights[name]
        total = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for stream, change, lora in terms[name]:
            with reading(lora):
                total += _delta(stream, change, lora.scale, weight.device).reshape(weight.shape)
        merged = (weight.float() + total).to(weight.dtype)
        if not merged.isfinite().all():
            raise BadInput(f"with its LoRAs {expert}.{name} exceeds {weight.dtype}: ask for a smaller scale.")
        weight.data = merged  # not in place: a loader may hand out views of the model's file


def _digest(lora: Lora) -> str:
    digest = photo.sha256(lora.file)
    if lora.sha256 not in (None, digest):
        raise BadInput(f"{lora.file} is not the LoRA that was asked for: its SHA-256 should begin {lora.sha256:.16}.")
    return digest


def _delta(stream: Any, change: Change, scale: float, device: torch.device) -> torch.Tensor:
    first, *second = (stream.get_tensor(key).to(device, torch.float32) for key in change.keys)
    product: torch.Tensor = first.flatten(1) @ second[0].flatten(1) if second else first
    alpha = float(stream.get_tensor(change.alpha)) if isinstance(change.alpha, str) else change.alpha
    return scale * alpha / change.rank * product


def _shapes(model: torch.nn.Module) -> Shapes:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
