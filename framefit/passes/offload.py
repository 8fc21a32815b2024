"""Weights in host memory, on the device only while they compute.

- part: a component comes as a whole when a phase begins that needs it, and goes when another one begins.
- block: of a denoiser or a text encoder the blocks come one after another, each while the one before it computes;
  what lies outside of the blocks comes as a whole. With block:K, K blocks of a denoiser stay while it is at work.
- leaf: the same layer by layer.

What is computed, and on which bits, is the same. Streaming follows diffusers' group offloading
(hooks/group_offloading.py); the slabs, the two rooms that all blocks share, and the learned order are ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from framefit.errors import UsageError
from framefit.families.parts import TEXT_ENCODERS, Parts, weights
from framefit.ledger.live import block_bytes
from framefit.ledger.transfer import Room, Slab, Transfer, transfer_for
from framefit.passes import chunk
from framefit.passes.stream import Stream, Unit
from framefit.plan import Offload

__all__ = ["Component", "Offloaded", "apply", "placed", "remove"]

EMBEDDING = "framefit.offload.embedding"


def apply(parts: Parts, setting: Offload) -> None:
    """Raises `UsageError` where more blocks are to stay than there are to stream."""
    models = {name: part for name, part in parts.components.items() if isinstance(part, nn.Module)}
    if setting.level == "none":
        for model in models.values():
            if any(tensor.device != parts.device for tensor in weights(model)):
                model.to(parts.device)
        return
    blocks = min((len(_blocks(models[expert])) for expert in parts.checkpoint.experts), default=0)
    if 0 < blocks <= setting.kept:
        raise UsageError(
            f"offload={setting.value} keeps {setting.kept} blocks on the device and the denoiser of "
            f"{parts.checkpoint.id} has {blocks}: use offload=block:K with K from 1 to {blocks - 1}, or offload=part "
            f"for all of them."
        )
    transfer = transfer_for(parts.device, (tensor for model in models.values() for tensor in weights(model)))
    parts.placement = Offloaded(models, parts.checkpoint.experts, setting, transfer)


def remove(parts: Parts) -> None:
    """The weights stay on the host, in the memory that they were packed into, until something moves them."""
    if (found := placed(parts)) is None:
        return
    found.use(())
    for component in found.components.values():
        component.remove()
    parts.placement = None


def placed(parts: Parts) -> Offloaded | None:
    """What this pass did to `parts`."""
    return parts.placement if isinstance(parts.placement, Offloaded) else None


class Offloaded:
    """Moves the components of a checkpoint; a `Placement`."""

    def __init__(
        self, models: dict[str, nn.Module], experts: Sequence[str], setting: Offload, transfer: Transfer
    ) -> None:
        self.transfer = transfer
        self.in_use: tuple[str, ...] = ()
        self._experts, self._setting = experts, setting
        self.components = {name: self._component(name, model) for name, model in models.items()}

    def use(self, names: Sequence[str]) -> None:
        wanted = tuple(name for name in names if name in self.components)
        gone = [name for name in self.in_use if name not in wanted]
        come = [name for name in wanted if name not in self.in_use]
        for name in gone:
            self.components[name].away()
        if gone:
            self.transfer.trim()
        self.in_use = tuple(name for name in self.in_use if name in wanted)
        for name in come:
            self.components[name].bring()
            self.in_use = (*self.in_use, name)

    def cast(self, name: str, dtype: torch.dtype) -> None:
        before = self.in_use
        self.use([other for other in before if other != name])
        component = self.components[name]
        component.remove()
        component.model.to(dtype)
        self.components[name] = self._component(name, component.model)
        self.use(before)

    def _component(self, name: str, model: nn.Module) -> Component:
        kept = self._setting.kept if name in self._experts else 0
        streams = name in self._experts or name in TEXT_ENCODERS
        return Component.of(model, self._setting.level if streams else "part", kept, self.transfer)


@dataclass(eq=False, slots=True)
class Component:
    """One component: what comes as a whole, what streams, and what stays on the host for good."""

    model: nn.Module
    whole: tuple[Slab, ...]
    stream: Stream
    transfer: Transfer
    embeddings: tuple[nn.Embedding, ...]
    """Token tables: a prompt needs a few rows of them, which are looked up where the table is."""
    _rooms: list[Room] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, level: str, kept: int, transfer: Transfer) -> Component:
        """Pack it."""
        modules = {"part": [], "block": _blocks(model), "leaf": _leaves(model)}[level]
        tables = () if level == "part" else _token_tables(model)
        at_home = {id(table.weight) for table in tables}
        shared = _shared(modules)
        owned = {
            module: [t for t in weights(module) if id(t) not in at_home and id(t) not in shared] for module in modules
        }
        modules = [module for module in modules if owned[module]]
        moving = {id(tensor) for tensors in owned.values() for tensor in tensors}
        outside = [t for t in weights(model) if id(t) not in moving and id(t) not in at_home]
        stay = _spread(kept, len(modules))
        whole = [outside, *(owned[modules[index]] for index in sorted(stay))]
        units = [
            Unit(module, transfer.slab(owned[module])) for index, module in enumerate(modules) if index not in stay
        ]
        for table in tables:
            if table.weight.is_cuda:
                table.weight.data = table.weight.data.cpu()
            elif table.weight.untyped_storage().nbytes() > table.weight.nbytes:  # else it would keep an earlier slab
                table.weight.data = table.weight.data.clone()
            HookRegistry.check_if_exists_or_initialize(table).register_hook(_OnHost(), EMBEDDING)
        slabs = tuple(transfer.slab(tensors) for tensors in whole if tensors)
        stream = Stream(units, transfer)
        if level == "block" and len(_rows(model)) == 1:
            stream.expect(units)
        return cls(model, slabs, stream, transfer, tables)

    def bring(self) -> None:
        """To the device."""
        try:
            for slab in self.whole:
                room = self.transfer.room(slab.bytes)
                self._rooms.append(room)
                self.transfer.copy(slab, room)
            self.stream.open()
        except torch.OutOfMemoryError:
            self.away()
            raise
        for slab, room in zip(self.whole, self._rooms, strict=True):
            self.transfer.wait(room)
            self.transfer.point(slab, room)

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


def _rows(model: nn.Module) -> list[nn.ModuleList]:
    """The outermost lists whose modules are all of one class: what a model repeats, and not in every chunk."""

    def search(module: nn.Module) -> Iterator[nn.ModuleList]:
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len({type(each) for each in child}) == 1 and weights(child):
                yield child
            elif not chunk.chunked(child):
                yield from search(child)

    return list(search(model))


def _blocks(model: nn.Module) -> list[nn.Module]:
    return [block for row in _rows(model) for block in row]


def _leaves(model: nn.Module) -> list[nn.Module]:
    """The smallest modules with weights; what computes in chunks, and asks for its layers in each, comes as a whole."""
    chunked = [module for module in model.modules() if module is not model and chunk.chunked(module)]
    inside = {below for module in chunked for below in module.modules()}.difference(chunked)
    leaves = (module for module in model.modules() if module in chunked or not any(module.children()))
    return [module for module in leaves if module not in inside and weights(module)]


def _token_tables(model: nn.Module) -> tuple[nn.Embedding, ...]:
    """Every module that looks tokens up; several can share a table."""
    ask: Callable[[], Any] = getattr(model, "get_input_embeddings", lambda: None)
    found = ask()
    same = (module for module in model.modules() if isinstance(module, nn.Embedding))
    return tuple(module for module in same if isinstance(found, nn.Embedding) and module.weight is found.weight)


def _shared(modules: Sequence[nn.Module]) -> set[int]:
    """Tensors that several modules hold."""
    held = Counter(id(tensor) for module in modules for tensor in weights(module))
    return {tensor for tensor, times in held.items() if times > 1}


def _spread(kept: int, blocks: int) -> set[int]:
    """Which blocks stay: evenly among the others, so that the copies have time between them."""
    return {i for i in range(blocks) if (i + 1) * kept // blocks > i * kept // blocks}
