"""Weights in host memory, on the device only while they compute.

- part: a component comes as a whole when a phase begins that needs it, and goes when another one begins.
- block: of a denoiser or a text encoder the blocks come one after another, the next (of small ones as many as fit where
  the largest would) while one computes; what lies outside of the blocks comes as a whole. With block:K, K blocks of a
  denoiser stay while it is at work.
- leaf: the same layer by layer.
- disk: as block, from files on disk; the host holds what is being read and no more.

What is computed, and on which bits, is the same. Streaming follows diffusers' group offloading
(hooks/group_offloading.py); the slabs, the two rooms that all blocks share, and the learned order are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from framefit.device import Device
from framefit.errors import UsageError
from framefit.families.parts import TEXT_ENCODERS, Parts, round_to, weights
from framefit.ledger.allocator import block_bytes
from framefit.ledger.disk import DiskTransfer
from framefit.ledger.transfer import NoTransfer, Room, Slab, Transfer, transfer_for
from framefit.passes.split import Split, blocks, finished, rows
from framefit.passes.stream import Stream, Unit
from framefit.plan import Offload
from framefit.scratch import Scratch

__all__ = ["Component", "Offloaded", "apply", "keep", "placed", "remove"]

EMBEDDING = "framefit.offload.embedding"


def keep(
    parts: Parts, name: str, setting: Offload, finish: Callable[[Collection[str]], None] = lambda names: None
) -> None:
    """Go through a component that is being loaded piece by piece; where weights are to be on disk, each is written, and
    leaves the memory, before the next one is finished, and where all are to be on the device, each goes there.

    Args:
        finish: called with the names of a piece's parameters, before anything is done to it.

    Raises:
        DoesNotFit: the disk is full.
    """
    model = parts[name]
    if not isinstance(model, nn.Module):
        return
    if setting.level == "disk":
        placement = placed(parts) or _placement(parts, setting, transfer_for(parts.device))
        parts.placement = placement
        placement.keep(name, model, finish)
        return
    for tensors in finished(model, "block", 0, finish):
        if setting.level == "none":
            for tensor in tensors:
                tensor.data = tensor.data.to(parts.device)


def apply(parts: Parts, setting: Offload) -> None:
    """Raises `UsageError` where more blocks are to stay than there are to stream."""
    models = {name: part for name, part in parts.components.items() if isinstance(part, nn.Module)}
    if setting.level == "none":
        for model in models.values():
            if any(tensor.device != parts.device for tensor in weights(model)):
                model.to(parts.device)
        return
    fewest = min((len(blocks(models[expert])) for expert in parts.checkpoint.experts), default=0)
    if 0 < fewest <= setting.kept:
        raise UsageError(
            f"offload={setting.value} keeps {setting.kept} blocks on the device and the denoiser of "
            f"{parts.checkpoint.id} has {fewest}: use offload={setting.level}:K with K from 1 to {fewest - 1}, or "
            f"offload=part for all of them."
        )
    placement = placed(parts)
    if placement is None or placement.components:  # none, or that of another plan
        transfer = transfer_for(parts.device, (tensor for model in models.values() for tensor in weights(model)))
        placement = _placement(parts, setting, transfer)
    parts.placement = placement
    placement.take(models)


def _placement(parts: Parts, setting: Offload, transfer: Transfer) -> Offloaded:
    if setting.level != "disk" or isinstance(transfer, NoTransfer):
        return Offloaded(parts.checkpoint.experts, setting, transfer)
    scratch = Scratch.create()
    return Offloaded(parts.checkpoint.experts, setting, DiskTransfer(transfer, scratch.path), scratch)


def remove(parts: Parts) -> None:
    """The weights stay on the host, in the memory or the files that they were packed into."""
    if (found := placed(parts)) is None:
        return
    found.close()
    for component in found.components.values():
        component.remove()
    found.components.clear()
    parts.placement = None


def placed(parts: Parts) -> Offloaded | None:
    """What this pass did to `parts`."""
    return parts.placement if isinstance(parts.placement, Offloaded) else None


class Offloaded:
    """Moves the components of a checkpoint; a `Placement`."""

    def __init__(
        self, experts: Sequence[str], setting: Offload, transfer: Transfer, scratch: Scratch | None = None
    ) -> None:
        self.setting, self.transfer = setting, transfer
        self.components: dict[str, Component] = {}
        self.in_use: tuple[str, ...] = ()
        self._experts, self._scratch = experts, scratch

    def keep(self, name: str, model: nn.Module, finish: Callable[[Collection[str]], None]) -> None:
        """Write them to disk, before passes that may change them are applied."""
        assert isinstance(self.transfer, DiskTransfer)
        for tensors in finished(model, *self._how(name), finish):
            self.transfer.keep(tensors)

    def take(self, models: Mapping[str, nn.Module]) -> None:
        """From here on their weights come and go."""
        for name, model in models.items():
            self.components[name] = Component.of(model, *self._how(name), self.transfer)
        if isinstance(self.transfer, DiskTransfer):
            self.transfer.kept.clear()  # what has changed since

    def use(self, names: Sequence[str]) -> None:
        wanted = tuple(name for name in names if name in self.components)
        gone = [name for name in self.in_use if name not in wanted]
        come = [name for name in wanted if name not in self.in_use]
        self.in_use = tuple(name for name in self.in_use if name in wanted)
        for name in gone:
            self.components[name].away()
        if gone:
            self.transfer.trim()
        for name in come:
            self.components[name].bring()
            self.in_use = (*self.in_use, name)

    def cast(self, name: str, dtype: torch.dtype) -> None:
        before = self.in_use
        self.use([other for other in before if other != name])
        component = self.components[name]
        component.remove()
        round_to(component.model, dtype)
        self.take({name: component.model})
        self.use(before)

    def expect(self, name: str) -> None:
        """What comes as a whole and the first unit, for which nothing computes meanwhile; more as memory is free."""
        if not isinstance(self.transfer, DiskTransfer):
            return
        component = self.components[name]
        slabs = [*component.whole, *(unit.slab for unit in component.stream.units)]
        free = Device.detect("cpu").ram_free_bytes // 2
        fit = sum(bytes <= free for bytes in accumulate(slab.bytes for slab in slabs))
        self.transfer.expect(slabs[: max(fit, len(component.whole) + 1)])

    @property
    def slab_bytes(self) -> list[int]:
        """Of all that moves."""
        components = self.components.values()
        return [
            *(s.bytes for c in components for s in c.whole),
            *(u.slab.bytes for c in components for u in c.stream.units),
        ]

    def close(self) -> None:
        try:
            self.use(())
        finally:
            self.transfer.close()
            if self._scratch:
                self._scratch.remove()

    def _how(self, name: str) -> tuple[str, int]:
        """(part, block or leaf; how many blocks stay) for a component."""
        level = "block" if self.setting.level == "disk" else self.setting.level
        streams = name in self._experts or name in TEXT_ENCODERS
        return level if streams else "part", self.setting.kept if name in self._experts else 0


@dataclass(eq=False, slots=True)
class Component:
    """One component: what comes as a whole, what streams, and what stays on the host for good."""

    model: nn.Module
    whole: tuple[Slab, ...]
    stream: Stream
    transfer: Transfer
    embeddings: tuple[nn.Embedding, ...]
    """Token tables, which are looked up on the host."""
    held: tuple[object, ...] = ()
    """What keeps them there."""
    _rooms: list[Room] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, level: str, kept: int, transfer: Transfer) -> Component:
        """Pack it."""
        split = Split.of(model, level, kept)
        slabs = tuple(transfer.slab(tensors) for tensors in split.whole)
        units = [Unit(module, transfer.slab(tensors)) for module, tensors in split.units]
        held = tuple(transfer.stay(table) for table in split.table_weights)
        for table in split.tables:
            HookRegistry.check_if_exists_or_initialize(table).register_hook(_OnHost(), EMBEDDING)
        stream = Stream(units, transfer)
        if level == "block" and len(rows(model)) == 1 and units:
            stream.expect(units)
        return cls(model, slabs, stream, transfer, split.tables, held)

    def bring(self) -> None:
        """To the device."""
        try:
            for slab in self.whole:
                room = self.transfer.room(slab.bytes)
                self._rooms.append(room)
                self.transfer.copy(slab, room)
            self.stream.open()
            for slab, room in zip(self.whole, self._rooms, strict=True):
                self.transfer.wait(room)
                self.transfer.point(slab, room)
        except BaseException:  # an interrupt too: it must be able to come again
            self.away()
            raise

    def away(self) -> None:
        """Nothing of it is on the device."""
        self.stream.close()
        for slab in self.whole:
            self.transfer.point(slab, None)
        self._rooms.clear()

    @property
    def whole_bytes(self) -> int:
        """That come as a whole."""
        return sum(slab.bytes for slab in self.whole)

    @property
    def device_bytes(self) -> int:
        """On the device while it is at work."""
        return self.whole_bytes + self.stream.rooms_bytes

    @property
    def embeddings_bytes(self) -> int:
        """That never go there."""
        return sum({id(table.weight): block_bytes(table.weight.nbytes) for table in self.embeddings}.values())

    def remove(self) -> None:
        """As if it had never been touched, but for the memory that it lies in."""
        self.stream.remove()
        for table in self.embeddings:
            HookRegistry.check_if_exists_or_initialize(table).remove_hook(EMBEDDING, recurse=False)


class _OnHost(ModelHook):  # type: ignore[misc]
    """A table looked up where it is."""

    def new_forward(self, module: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self.fn_ref.original_forward(ids.to(module.weight.device))
        return rows.to(ids.device)
