"""Ranges in a trace that say which module is at work, for as long as they are asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.profiler import record_function
from torch.utils.hooks import RemovableHandle

from framefit.profiling.trace import MODULE

__all__ = ["named"]

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
"""A block's place in its list, as in blocks.12; not the 1 of attn1."""


@contextmanager
def named(components: Mapping[str, Any]) -> Iterator[None]:
    """While the block runs, each module below `components` opens a range around its forward.

    Its label is its name in the module around it, and its class; a place in a list becomes `*`: equal blocks are one.
    """
    handles: list[RemovableHandle] = []
    try:
        for name, component in components.items():
            if isinstance(component, torch.nn.Module):
                _mark(component, name, handles)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mark(module: torch.nn.Module, name: str, handles: list[RemovableHandle]) -> None:
    children = name + "."
    if not isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict):  # these are never called
        children = ""
        label = f"{MODULE}{NUMBER.sub('*', name)} {type(module).__name__}"
        opened: list[Any] = []
        handles.append(module.register_forward_pre_hook(partial(_open, label, opened), prepend=True))
        handles.append(module.register_forward_hook(partial(_close, opened), always_call=True))
    for child, inside in module.named_children():
        _mark(inside, children + child, handles)


def _open(label: str, opened: list[Any], module: object, args: object) -> None:
    opened.append(record_function(label))
    opened[-1].__enter__()


def _close(opened: list[Any], module: object, args: object, output: object) -> None:
    opened.pop().__exit__(None, None, None)
