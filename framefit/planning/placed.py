"""Where a plan's weights are in each phase, in bytes: the offload pass's own units, counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from framefit.families.parts import TEXT_ENCODERS, Parts
from framefit.ledger.allocator import block_bytes
from framefit.ledger.transfer import Slab
from framefit.passes import offload
from framefit.passes.split import Split
from framefit.planning.phase import Pieces
from framefit.streaming import staging_bytes

__all__ = ["Cut", "Placed", "cut", "kept", "placed", "watch"]


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
    rooms: tuple[int, ...] = ()
    """As `PhaseTrace.rooms`."""


@dataclass(frozen=True, slots=True)
class Cut:
    """One component's weights, as offloading would cut them."""

    pieces: Pieces
    modules: Mapping[str, Mapping[nn.Module, int]]
    """Level -> what streams, in the order of its pieces -> its bytes."""
    times: Mapping[nn.Module, int]
    """For how many modules each stands."""

    def shared(self, seconds: Mapping[str, Mapping[nn.Module, float]]) -> Pieces:
        """Its pieces, with what was computed from the call of each to that of the next: level -> module -> seconds."""
        shares = {}
        for level, modules in self.modules.items():
            own = {module: seconds[level].get(module, 0.0) for module in modules}
            whole = sum(own.values())
            each = [own[m] / self.times[m] for m in own for _ in range(self.times[m])]
            shares[level] = tuple(round(share / whole, 6) for share in each) if whole else ()
        return replace(self.pieces, block_shares=shares["block"], layer_shares=shares["leaf"])


def cut(parts: Parts, weights: Mapping[str, int], standing: Mapping[nn.Module, int]) -> dict[str, Cut]:
    """By component, where the weights stay; nothing is moved."""
    if parts.placement:
        return {}
    streams = (*parts.checkpoint.experts, *TEXT_ENCODERS)
    return {name: _cut(parts[name], size, name in streams, standing) for name, size in weights.items()}


def _cut(model: nn.Module, bytes: int, streams: bool, standing: Mapping[nn.Module, int]) -> Cut:
    times = _times(model, standing)
    modules: dict[str, dict[nn.Module, int]] = {}
    units: dict[str, tuple[int, ...]] = {}
    tables = 0
    for level in ("block", "leaf"):
        split = Split.of(model, level if streams else "part", 0)
        modules[level] = {module: Slab(tensors).bytes for module, tensors in split.units}
        units[level] = tuple(size for module, size in modules[level].items() for _ in range(times[module]))
        tables = sum(block_bytes(table.nbytes) for table in split.table_weights)
    return Cut(Pieces(bytes=bytes, tables_bytes=tables, blocks=units["block"], layers=units["leaf"]), modules, times)


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
    device, onload, rooms = {}, 0, tuple[int, ...]()
    for name in used:
        if component := found.components.get(name):
            times = _times(component.model, standing)
            moving = sum(unit.slab.bytes * times[unit.module] for unit in component.stream.units)
            whole = weights[name] - component.embeddings_bytes - moving
            device[name], onload = whole + component.stream.rooms_bytes, onload + whole
            stay = [slab.bytes for slab in component.whole[1:]]
            rooms += (whole - sum(stay), *stay, *component.stream.rooms)
    host = sum(weights.values())
    if found.setting.level == "disk":
        staging = staging_bytes(max(found.slab_bytes))
        return Placed(
            device_bytes=device, host_bytes=staging, pinned_bytes=staging, onload_bytes=onload, disk_bytes=host,
            rooms=rooms,
        )  # fmt: skip
    unpinned = sum(component.embeddings_bytes for component in found.components.values())
    return Placed(device_bytes=device, host_bytes=host, pinned_bytes=host - unpinned, onload_bytes=onload, rooms=rooms)


def kept(parts: Parts, standing: Mapping[nn.Module, int]) -> dict[str, int]:
    """Component -> bytes of its weights as the passes leave them; `standing` as above."""
    found = {}
    for name, part in parts.components.items():
        if isinstance(part, nn.Module):
            times = _times(part, standing)
            # a tensor that several modules share counts once
            held = {id(tensor): (tensor, times[module]) for module in times for tensor in _own(module)}
            found[name] = sum(n * block_bytes(tensor.nbytes) for tensor, n in held.values())
    return found


def _own(module: nn.Module) -> list[torch.Tensor]:
    """Its parameters and buffers without those of its children."""
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _times(model: nn.Module, standing: Mapping[nn.Module, int]) -> dict[nn.Module, int]:
    """How many modules each one stands for, with all that it lies in."""
    times: dict[nn.Module, int] = {}

    def visit(module: nn.Module, around: int) -> None:
        times[module] = around * standing.get(module, 1)
        for child in module.children():
            visit(child, times[module])

    visit(model, 1)
    return times
