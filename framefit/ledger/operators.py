"""What an operator's seconds depend on, beside the device: its sort, how much of it there is, the bytes that it moves.

Seconds add up: what is computed at the rate of its sort, and bytes at that of memory, because tiles are computed
before they are written. Every sort is there for a reason that a profile of true-size models showed (LOG, seconds).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from math import prod
from typing import Any
from zlib import crc32

import torch

from framefit.ledger.kinds import op_kind
from framefit.rates import Sort

__all__ = ["Share", "channels_last", "occupied", "precision_of", "row_norm", "shape_of", "shares", "traffic"]

Share = tuple[Sort, int, int]
"""A sort; its amount in FLOPs or elements; bytes read and written."""

TILE = 128
"""Queries and keys that attention computes together, filled up where there are fewer."""
CHANNELS = 32
"""Likewise of a convolution."""
WIDEST, MOST_GROUPS = 1024, 1024
"""Beyond them a norm's rate rises no further."""

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
FILLS = {"aten::copy_", "aten::fill_", "aten::zero_"}
"""They write their first argument and do not read it."""
RANDOM = {"aten::randn", "aten::normal_"}
"""Noise is drawn by the host, so that a seed gives one video on every device."""
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


def shares(func: Any, args: Any, kwargs: Any, result: Any, flops: int, bytes: int) -> Iterator[Share]:
    """What one call is made of; nothing for views and allocations.

    Args:
        flops: by the formula of its operator; 0: it has none.
        bytes: that it moves, as `traffic` tells.
    """
    if not bytes:
        return
    if func._schema.name in RANDOM:
        yield Sort("random", "", 0), result.numel(), 0
        return
    if not flops:
        yield from _elementwise(func, args, kwargs, result, bytes)
        return
    kind, precision = op_kind(func._schema.name), precision_of(args)
    if kind == "attention":
        yield _attention(args, precision, bytes)
    elif kind == "convolution":
        yield from _convolution(args, result, precision, flops, bytes)
    else:
        yield Sort("matmul", precision, 0), flops, bytes


def shape_of(args: Any) -> int:
    """Of a convolution: equal for those that run the same kernels."""
    image, weight, _, *how = args
    lies = image.shape, image.dtype, channels_last(image), weight.shape, [str(each) for each in how]
    return crc32(repr(lies).encode())


def row_norm(x: torch.Tensor, bytes: int) -> Iterator[Share]:
    """A norm of every row by itself is as slow for a short row as for one that fills its threads."""
    yield Sort("row_norm", "", min(x.shape[-1], WIDEST)), x.numel(), bytes
    if not x.is_contiguous():
        yield Sort("scattered", "", 0), x.numel(), 2 * occupied(x)


def traffic(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Bytes read and written once each; views and allocations move none."""
    name = func._schema.name
    written = _tensors(result)
    if "empty" in name or not written:
        return 0
    read = _tensors((args, kwargs))
    if not func._schema.is_mutable and any(_shares(written[0], tensor) for tensor in read):
        return 0
    if name.startswith("aten::new_"):  # of whose first argument nothing is read
        read = []
    return sum(map(occupied, written)) + sum(map(occupied, read[name in FILLS :]))


def precision_of(args: Any) -> str:
    first = _tensors(args)[0]
    return DTYPES.get(first.dtype, str(first.dtype).removeprefix("torch."))


def _attention(args: Any, precision: str, bytes: int) -> Share:
    """Its rate depends on the width of a head, and whole tiles are computed."""
    query, key = args[0], args[1]
    *_, queries, width = query.shape
    filled = 4 * prod(query.shape[:-2]) * _up(queries, TILE) * _up(key.shape[-2], TILE) * width
    return Sort("attention", precision, max(64, 1 << (width - 1).bit_length())), filled, bytes


def _convolution(args: Any, result: Any, precision: str, flops: int, bytes: int) -> Iterator[Share]:
    """Few channels leave tiles empty. What is channels-first, as weights are, is copied to channels-last and back; what
    is made is biased after."""
    image, weight = args[0], args[1]
    sort = Sort("convolution", precision, min(TILE, _up(min(weight.shape[:2]), CHANNELS)))
    if channels_last(image):
        biased = len(args) > 2 and isinstance(args[2], torch.Tensor)
        turned = not channels_last(weight)
        yield sort, flops, bytes + 2 * turned * occupied(weight) + 2 * biased * occupied(result)
        if turned:
            yield Sort("scattered", "", 0), weight.numel(), 0
        return
    ends = (image, weight, result)
    yield sort, flops, 2 * sum(map(occupied, ends)) + 2 * occupied(result)
    copied = image.numel() * (1 if image.is_contiguous() else 2)
    yield (
        Sort("scattered", "", 0), copied + weight.numel() + result.numel(),
        0 if image.is_contiguous() else 2 * occupied(image),
    )  # fmt: skip


def channels_last(image: torch.Tensor) -> bool:
    """As cuDNN's fast kernels read images, videos and weights."""
    layout = LAYOUTS.get(image.ndim)
    return layout is not None and image.is_contiguous(memory_format=layout)


def _elementwise(func: Any, args: Any, kwargs: Any, result: Any, bytes: int) -> Iterator[Share]:
    """Of equal tensors memory alone decides. Where precisions, shapes or strides differ, or values are gathered, every
    element is looked up by its index."""
    name = func._schema.name
    if name == "aten::native_layer_norm":
        yield from row_norm(args[0], bytes)
    elif name == "aten::native_group_norm":
        x, batch, groups = args[0], args[3], args[6]
        yield Sort("group_norm", "", min(batch * groups, MOST_GROUPS)), x.numel(), bytes + occupied(x)
    else:
        tensors = [tensor for tensor in _tensors((args, kwargs, result)) if tensor.ndim]
        if len({_form(tensor) for tensor in tensors}) <= 1:
            yield Sort("plain", "", 0), 0, bytes
        else:
            yield Sort("scattered", "", 0), max(tensor.numel() for tensor in tensors), bytes


def _tensors(tree: Any) -> list[torch.Tensor]:
    """Of an operator's arguments or results, in order."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return []
    return [tensor for each in tree for tensor in _tensors(each)]


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    strides = tuple(stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1)
    return tensor.dtype, tensor.shape, strides


def _up(count: int, whole: int) -> int:
    return -(-count // whole) * whole


def _shares(one: torch.Tensor, other: torch.Tensor) -> bool:
    with contextlib.suppress(NotImplementedError, RuntimeError):  # sparse tensors and the like have no storage
        return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)
    return False


def occupied(tensor: torch.Tensor) -> int:
    """What it occupies: an expanded tensor is read from fewer bytes than it has elements for."""
    size = tensor.numel() * tensor.element_size()
    with contextlib.suppress(NotImplementedError, RuntimeError):
        return min(size, tensor.untyped_storage().nbytes())
    return size
