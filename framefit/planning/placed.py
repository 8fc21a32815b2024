"""Where a plan's weights are in each phase, in bytes: the offload pass's own units, counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from framefit.families.parts import Parts
from framefit.passes import offload

__all__ = ["Placed", "placed", "streamed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """Bytes of weights in one phase."""

    device_bytes: dict[str, int]
    """By component, with the rooms that its blocks pass through."""
    host_bytes: int = 0
    pinned_bytes: int = 0
    onload_bytes: int = field(default=0)
    """That come to the device as a whole when the phase begins."""


def streamed(parts: Parts) -> dict[nn.Module, int]:
    """Module -> bytes that come to the device whenever it is called."""
    found = offload.placed(parts)
    components = found.components.values() if found else ()
    return {unit.module: unit.slab.bytes for component in components for unit in component.stream.units}


def placed(parts: Parts, weights: Mapping[str, int], standing: Mapping[nn.Module, int], used: Sequence[str]) -> Placed:
    """In a phase that uses some components.

    Args:
        weights: component -> bytes of its weights.
        standing: block -> how many equal blocks it stands for.
    """
    if (found := offload.placed(parts)) is None:
        return Placed(device_bytes=dict(weights))
    device, onload = {}, 0
    for name in used:
        if component := found.components.get(name):
            times = _times(component.model, standing)
            moving = sum(unit.slab.bytes * times[unit.module] for unit in component.stream.units)
            whole = weights[name] - component.embeddings_bytes - moving
            device[name], onload = whole + component.stream.rooms_bytes, onload + whole
    host = sum(weights.values())
    unpinned = sum(component.embeddings_bytes for component in found.components.values())
    return Placed(device_bytes=device, host_bytes=host, pinned_bytes=host - unpinned, onload_bytes=onload)


def _times(model: nn.Module, standing: Mapping[nn.Module, int]) -> dict[nn.Module, int]:
    """How many modules each one stands for, with all that it lies in."""
    times: dict[nn.Module, int] = {}

    def visit(module: nn.Module, around: int) -> None:
        times[module] = around * standing.get(module, 1)
        for child in module.children():
            visit(child, times[module])

    visit(model, 1)
    return times
