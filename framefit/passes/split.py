"""How the weights of a component are divided for moving: what comes as a whole, what streams, what stays on the host.

Units are found by what a model repeats, not by name: the outermost lists of modules of one class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from framefit.families.parts import weights
from framefit.passes import chunk
from framefit.streaming import spread

__all__ = ["Split", "blocks", "finished", "rows"]


@dataclass(frozen=True, eq=False, slots=True)
class Split:
    """How the tensors of a component are divided; nothing is touched."""

    whole: tuple[Sequence[torch.Tensor], ...]
    """That come when it does: what is outside of the units, and the units that stay."""
    units: tuple[tuple[nn.Module, Sequence[torch.Tensor]], ...]
    """That stream, in the model's order."""
    tables: tuple[nn.Embedding, ...]
    """Token tables: a prompt needs a few rows of them, which are looked up where the table is."""

    @classmethod
    def of(cls, model: nn.Module, level: str, kept: int) -> Split:
        """With the level part, block or leaf, and of so many units that stay."""
        modules = {"part": [], "block": blocks(model), "leaf": _leaves(model)}[level]
        tables = () if level == "part" else _token_tables(model)
        at_home = {id(table.weight) for table in tables}
        shared = _shared(modules)
        owned = {
            module: [t for t in weights(module) if id(t) not in at_home and id(t) not in shared] for module in modules
        }
        modules = [module for module in modules if owned[module]]
        moving = {id(tensor) for tensors in owned.values() for tensor in tensors}
        outside = [t for t in weights(model) if id(t) not in moving and id(t) not in at_home]
        stay = spread(kept, len(modules))
        whole = [outside, *(owned[modules[index]] for index in sorted(stay))]
        units = tuple((module, owned[module]) for index, module in enumerate(modules) if index not in stay)
        return cls(tuple(tensors for tensors in whole if tensors), units, tables)

    def pieces(self) -> Iterator[Sequence[torch.Tensor]]:
        """Tensors that lie together."""
        yield from self.whole
        yield from (tensors for _, tensors in self.units)
        yield from ([table] for table in self.table_weights)

    @property
    def table_weights(self) -> list[torch.Tensor]:
        """Once, where several modules share a table."""
        return list({id(table.weight): table.weight for table in self.tables}.values())


def finished(
    model: nn.Module, level: str, kept: int, finish: Callable[[Collection[str]], None]
) -> Iterator[Sequence[torch.Tensor]]:
    """Every piece of a model as `finish`, called with the names of its parameters in its turn, leaves it."""

    def pieces() -> list[Sequence[torch.Tensor]]:
        return list(Split.of(model, level, kept).pieces())

    now = pieces()
    for index in range(len(now)):
        there = {id(tensor) for tensor in now[index]}
        del now  # what is finished may take the place of what was there
        finish({name for name, parameter in model.named_parameters() if id(parameter) in there})
        now = pieces()
        yield now[index]


def rows(model: nn.Module) -> list[nn.ModuleList]:
    """The outermost lists whose modules are all of one class: what a model repeats, and not in every chunk."""

    def search(module: nn.Module) -> Iterator[nn.ModuleList]:
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len({type(each) for each in child}) == 1 and weights(child):
                yield child
            elif not chunk.chunked(child):
                yield from search(child)

    return list(search(model))


def blocks(model: nn.Module) -> list[nn.Module]:
    """What those lists hold."""
    return [block for row in rows(model) for block in row]


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
