"""The weights of large linear layers in 8 bits each, restored layer by layer to what the plan computes in.

    weight = codes * rows * columns

Codes are int8, or float8_e4m3fn; each output row has a scale, and each input column, so that a channel of large weights
coarsens no other. Large is what the blocks of denoisers and text encoders compute with; norms, embeddings, what
modulates, the layers before and after the blocks, and whatever a class keeps in fp32 stay as they are.

torchao's weight-only types do this too. Their tensor subclass cannot lie in a slab of `ledger.transfer` (no
`empty_like`), tells its size before packing and not after, and in fp8 does not follow a component to another precision
(0.18). Codes and scales here are plain tensors of the layer, which move, count and cast like any other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn
from torch.nn import functional

from framefit.errors import UsageError
from framefit.families.parts import TEXT_ENCODERS, Parts
from framefit.plan import Quantize

__all__ = ["apply", "remove", "restored", "stored"]

HOOK = "framefit.quantize"
LARGEST = {"int8": 127.0, "fp8": torch.finfo(torch.float8_e4m3fn).max}
CODES = torch.int8
"""What both kinds lie in: casts of the component leave it alone, and transformers' T5 knows it for a stored weight."""


@torch.no_grad()
def apply(parts: Parts, setting: Quantize, among: Collection[str] | None = None) -> None:
    """Layer by layer, each one's weight freed before the next; what is in 8 bits already is left as it is.

    Args:
        among: names of parameters: layers whose weights are others wait for another call.

    Raises:
        UsageError: a denoiser or text encoder has no such layer.
    """
    if setting.value == "none":
        return
    for name in (*parts.checkpoint.experts, *TEXT_ENCODERS):
        if name not in parts:
            continue
        layers = _large(parts[name], parts.dtype(name))
        if not layers:
            raise UsageError(
                f"quantize={setting.value} keeps the large linear layers of every denoiser and text encoder in 8 bits, "
                f"and the {name} of {parts.checkpoint.id} has none: use quantize=none."
            )
        names = {module: f"{path}.weight" for path, module in parts[name].named_modules()}
        for layer in layers:
            if layer.weight.dtype != CODES and (among is None or names[layer] in among):
                _store(layer, setting.value, parts.device)
    if parts.device.type == "cuda":
        torch.cuda.empty_cache()  # what this took, which the next phase would seem to hold


def remove(parts: Parts) -> None:
    """Never called: what was rounded off is gone, so that a plan without it loads the weights anew."""
    raise AssertionError("weights in 8 bits cannot be had back")


def stored(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (out, in), row scales (out, 1) and column scales (in,) of a weight (out, in); scales in its precision."""
    exact = weight.to(torch.float32, copy=True)
    columns = _scale(torch.linalg.vector_norm(exact, dim=0) / len(exact) ** 0.5, weight.dtype)
    exact.div_(columns)
    rows = _scale(torch.linalg.vector_norm(exact, torch.inf, dim=1, keepdim=True) / LARGEST[kind], weight.dtype)
    exact.div_(rows).clamp_(-LARGEST[kind], LARGEST[kind])  # a rounded scale can be a little small
    codes = exact.round_().to(CODES) if kind == "int8" else exact.to(torch.float8_e4m3fn).view(CODES)
    return codes, rows, columns


def restored(codes: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, kind: str) -> torch.Tensor:
    """The weight (out, in), in the precision of its scales."""
    plain = codes if kind == "int8" else codes.view(torch.float8_e4m3fn)
    return plain.to(rows.dtype).mul_(rows).mul_(columns)


def _scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded first, so that the codes are right for what they will be multiplied with; of nothing but zeros, 1."""
    scale = scale.to(dtype)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _large(model: nn.Module, dtype: torch.dtype) -> list[nn.Linear]:
    """The linear layers of its blocks, in 8 bits already or not."""
    held = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    found = {
        layer: None
        for block in _blocks(model)
        for parent in block.modules()
        if not _modulates(parent)
        for layer in parent.children()
        # not of a subclass: who derives from it may read its weight in a way of his own
        if type(layer) is nn.Linear and layer.weight.dtype in (dtype, CODES) and held[id(layer.weight)] <= 1
    }
    return list(found)


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """What a model repeats: the modules of every list that are all of one class."""
    for row in model.modules():
        if isinstance(row, nn.ModuleList) and len({type(each) for each in row}) == 1:
            yield from row


def _modulates(parent: nn.Module) -> bool:
    """Whether its linear layer turns the timestep into shifts and scales: in a norm, or between convolutions."""
    convolves = any(isinstance(child, nn.modules.conv._ConvNd) for child in parent.children())
    return "Norm" in type(parent).__name__ or convolves


def _store(layer: nn.Linear, kind: str, device: torch.device) -> None:
    """Computed on `device`, and kept where the weight was."""
    home = layer.weight.device
    made = stored(layer.weight.to(device), kind)
    del layer.weight
    for name, tensor in zip(("weight", "weight_rows", "weight_columns"), made, strict=True):
        layer.register_buffer(name, tensor.to(home))
    HookRegistry.check_if_exists_or_initialize(layer).register_hook(_Restoring(kind), HOOK)


class _Restoring(ModelHook):  # type: ignore[misc]
    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def new_forward(self, module: nn.Linear, states: torch.Tensor) -> torch.Tensor:
        rows, columns = module.get_buffer("weight_rows"), module.get_buffer("weight_columns")
        return functional.linear(states, restored(module.weight, rows, columns, self._kind), module.bias)
