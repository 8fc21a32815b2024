"""Where a plan's weights are in each phase, in bytes: the offload pass's own units, counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from framefit.families.parts import Parts
from framefit.ledger.disk import staging_bytes
from framefit.ledger.live import block_bytes
from framefit.ledger.transfer import Slab
from framefit.passes import offload
from framefit.passes.split import Split, spread
from framefit.passes.stream import ROOMS

__all__ = ["Placed", "Sizes", "placed", "sizes", "watch"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """Bytes of weights in one phase."""

    device_bytes: dict[str, int]
    """By component, with the rooms that its blocks pass through."""
    host_bytes: int = 0
    pinned_bytes: int = 0
    onload_bytes: int = 0
    """That come to the device as a whole when the phase begins."""
    disk_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Bytes of one component's weights, as `offload=block` or `leaf` divides them."""

    whole_bytes: int
    """That come to the device when it does."""
    units_bytes: tuple[int, ...]
    """Of each block or layer that streams, in the model's order; a block that stands for several comes as often."""
    tables_bytes: int
    """That stay on the host."""

    @property
    def all_bytes(self) -> int:
        return self.whole_bytes + sum(self.units_bytes) + self.tables_bytes

    def on_device(self, kept: int = 0) -> int:
        """While it is at work and `kept` units stay there, beside the two rooms that the others pass through."""
        stay = spread(kept, len(self.units_bytes))
        streamed = [bytes for index, bytes in enumerate(self.units_bytes) if index not in stay]
        rooms = min(ROOMS, len(streamed)) * max(streamed, default=0)
        return self.whole_bytes + sum(self.units_bytes) - sum(streamed) + rooms


def sizes(model: nn.Module, level: str, standing: Mapping[nn.Module, int] | None = None) -> Sizes:
    """What the level part, block or leaf makes of `model`, fake or real; nothing is moved.

    Args:
        standing: block -> how many equal blocks it stands for.
    """
    split = Split.of(model, level, 0)
    times = _times(model, standing or {})
    return Sizes(
        whole_bytes=sum(Slab(tensors).bytes for tensors in split.whole),
        units_bytes=tuple(bytes for module, tensors in split.units for bytes in [Slab(tensors).bytes] * times[module]),
        tables_bytes=sum(block_bytes(table.nbytes) for table in split.table_weights),
    )


def watch(parts: Parts, asked: Callable[[int], None]) -> None:
    """Call `asked` with the bytes of whatever streams to the device, when it is needed there.

    Of two calls that follow each other closely the second may find it there still: these bytes are the most.
    """
    found = offload.placed(parts)
    for component in found.components.values() if found else ():
        component.stream.asked = lambda unit: asked(unit.slab.bytes)


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
    if found.setting.level == "disk":
        staging = staging_bytes(max(found.slab_bytes))
        return Placed(
            device_bytes=device, host_bytes=staging, pinned_bytes=staging, onload_bytes=onload, disk_bytes=host
        )  # fmt: skip
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
