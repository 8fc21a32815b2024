"""Which layer a plan's loss comes from: a prediction of the plan with the untouched model beside it, layer by layer.

Every layer of the untouched model is given what the plan's own layer was given. So what differs is what this layer
adds, and not what it was handed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from framefit.checkpoint import State
from framefit.families import Checkpoint, hub, lora
from framefit.families.parts import PRECISIONS, load_parts
from framefit.pipeline import Pipeline
from framefit.plan import Plan
from framefit.profiling.profile import take_step

__all__ = ["Loss", "beside", "losses", "ranked", "untouched"]

MOST_OF_IT = 0.5
"""A layer inside that adds this much of what the one around it adds is named in its place."""
LISTED = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """What one layer adds to the error of a prediction."""

    layer: str
    """Its name in the pipeline, as in transformer.blocks.3.ffn.net.2."""
    added: float
    """Relative L2 of its output to that of the untouched layer on the same input."""
    whole: float
    """The same of the expert's prediction."""
    share: float
    """Of the squares of what all of the expert's blocks add, 0 to 1."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def losses(pipeline: Pipeline, state: State, untouched: Callable[[str], torch.nn.Module]) -> list[Loss]:
    """The layers that add most to the error of one prediction of every expert, most first.

    Args:
        state: latents and conditioning to predict from.
        untouched: an expert's name -> its untouched model on the pipeline's device; one is held at a time.
    """
    served, found = pipeline.experts(), list[Loss]()
    for expert in dict.fromkeys(served):
        with beside(pipeline.parts[expert], untouched(expert), expert) as added:
            # of the expert's own copy: a step moves its state along
            take_step(pipeline, replace(state, latents=state.latents.clone()), served.index(expert))
        found += ranked(expert, added)
    return sorted(found, key=lambda loss: -loss.added)[:LISTED]


def untouched(plan: Plan, checkpoint: Checkpoint) -> Callable[[str], torch.nn.Module]:
    """The experts with no technique applied, in host memory until asked for, and one on the device at a time."""
    row = replace(checkpoint, components=tuple(c for c in checkpoint.components if c.name in checkpoint.experts))
    device, host = torch.device(plan.device.id), torch.device("cpu")
    parts = load_parts(row, hub.locate(checkpoint), dtype=PRECISIONS[plan.precision], device=host)
    lora.merge(parts, plan.request.loras)

    def take(expert: str) -> torch.nn.Module:
        for other in row.experts:
            parts[other].to(device if other == expert else host)
        model: torch.nn.Module = parts[expert]
        return model

    return take


@contextmanager
def beside(model: torch.nn.Module, untouched: torch.nn.Module, name: str) -> Iterator[dict[str, float]]:
    """While the block runs, each layer's name -> the most that it adds in a call, relative L2."""
    added: dict[str, float] = {}
    theirs = dict(untouched.named_modules())
    handles = []
    for path, module in model.named_modules():
        if path in theirs:
            given: list[Any] = []
            compare = partial(_compare, added, f"{name}.{path}" if path else name, theirs[path], given)
            handles.append(module.register_forward_pre_hook(partial(_keep, given), with_kwargs=True))
            handles.append(module.register_forward_hook(compare))
    try:
        yield added
    finally:
        for handle in handles:
            handle.remove()


def ranked(name: str, added: dict[str, float]) -> Iterator[Loss]:
    """The losses of one expert by block, each named by the innermost layer that adds most of it."""
    blocks = _children(name, added)
    total = sum(added[block] ** 2 for block in blocks)
    for block in blocks:
        if added[block]:
            yield Loss(
                layer=_within(block, added), added=added[block], whole=added[name], share=added[block] ** 2 / total
            )  # fmt: skip


def _keep(given: list[Any], module: torch.nn.Module, args: Any, kwargs: Any) -> None:
    """A layer may overwrite what it is given."""
    given.append(tree_map(lambda value: value.clone() if isinstance(value, torch.Tensor) else value, (args, kwargs)))


def _compare(
    added: dict[str, float], name: str, untouched: torch.nn.Module, given: list[Any], module: torch.nn.Module, _: Any,
    output: Any,
) -> None:  # fmt: skip
    args, kwargs = given.pop()
    if (ours := _tensor(output)) is None:
        return
    cast = partial(_cast, ours=_dtype(module), theirs=_dtype(untouched))
    with torch.no_grad():
        theirs = _tensor(untouched(*tree_map(cast, args), **tree_map(cast, kwargs)))
    assert theirs is not None
    added[name] = max(added.get(name, 0.0), _error(ours.float(), theirs.float()))


def _cast(value: Any, *, ours: torch.dtype | None, theirs: torch.dtype | None) -> Any:
    """In the untouched layer's precision what was in the layer's own."""
    return value.to(theirs) if isinstance(value, torch.Tensor) and value.dtype == ours != theirs and theirs else value


def _dtype(module: torch.nn.Module) -> torch.dtype | None:
    """Of its largest parameter."""
    largest = max(module.parameters(), key=torch.Tensor.numel, default=None)
    return None if largest is None else largest.dtype


def _tensor(value: Any) -> torch.Tensor | None:
    """The first floating-point tensor in it: of a block the hidden states."""
    leaves = tree_leaves(value)
    return next((leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()), None)


def _within(layer: str, added: dict[str, float]) -> str:
    """The innermost layer that adds most of what `layer` adds."""
    inside = max(_children(layer, added), key=lambda child: added[child], default=layer)
    return layer if inside == layer or added[inside] < MOST_OF_IT * added[layer] else _within(inside, added)


def _children(layer: str, added: dict[str, float]) -> list[str]:
    """The layers directly inside; a list of layers is never called, and those in it are inside of what holds it."""
    below = {name for name in added if name.startswith(layer + ".")}
    return sorted(name for name in below if not below.intersection(_around(name)))


def _around(name: str) -> Iterator[str]:
    """The names of all that may hold it."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative L2; 0 where both are nothing."""
    scale = float(theirs.norm())
    return float((ours - theirs).norm()) / scale if scale else float(bool(ours.any()))
