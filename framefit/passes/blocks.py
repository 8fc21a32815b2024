"""What a model repeats: its blocks, found by structure and not by name."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from framefit.families.parts import weights

__all__ = ["blocks", "rows"]


def rows(model: nn.Module) -> list[nn.ModuleList]:
    """The outermost lists whose modules are all of one class."""

    def search(module: nn.Module) -> Iterator[nn.ModuleList]:
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len({type(each) for each in child}) == 1 and weights(child):
                yield child
            else:
                yield from search(child)

    return list(search(model))


def blocks(model: nn.Module) -> list[nn.Module]:
    """The modules of all its rows."""
    return [block for row in rows(model) for block in row]
