"""Memory of a card that a ledger of fake tensors does not show, measured once: `framefit doctor --probe`.

CUDA's context and kernels, cuBLAS's and cuDNN's workspaces. In a process of its own: what a process has once loaded it
does not give back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from framefit import rates
from framefit.apart import apart
from framefit.device import expand_segments
from framefit.families.parts import PRECISIONS
from framefit.profiling.ceilings import measure
from framefit.rates import Rates, Unseen

__all__ = ["decoding", "denoising", "probe"]

CONVOLUTIONS: dict[str, tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]] = {
    "conv2d": (((32, 320, 32, 32), (320, 320, 3, 3)), ((32, 320, 96, 96), (320, 320, 3, 3))),
    "conv3d": (((1, 96, 6, 242, 418), (96, 96, 3, 3, 3)), ((1, 96, 6, 482, 834), (96, 96, 3, 3, 3))),
}
"""Kind -> shapes of input and weight, the smaller first: of I2VGen-XL's UNet, and at the end of Wan's decoder."""


def probe(device: str, file: Path | None = None) -> Rates:
    """Measure the rates of `device`, "cpu" or "cuda:N", afresh, and on a card what no ledger sees; filed in `file`."""
    found = measure(device, fresh=True, file=file)
    if device == "cpu":
        return found
    torch.cuda.synchronize(device)
    told = apart(partial(_measured, device, torch.cuda.mem_get_info(device)[0]))
    found = replace(found, unseen=Unseen.from_json(told))
    rates.save(found, file)
    return found


@torch.no_grad()
def _measured(device: str, free_bytes: int) -> dict[str, Any]:
    """In a fresh process, before which `free_bytes` were free on the card."""
    expand_segments()  # as a run does
    torch.cuda.set_device(device)
    bare = free_bytes - torch.cuda.mem_get_info(device)[0]
    workspace = _cublas_workspace(device)
    convolution = {kind: dict(_workspaces(kind, device)) for kind in CONVOLUTIONS}
    for work in (denoising, decoding):  # a run's kernels are in the context too
        work(device)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    context = free_bytes - torch.cuda.mem_get_info(device)[0] - torch.cuda.memory_reserved(device)
    return asdict(
        Unseen(
            origin="measured", context_bytes=max(0, context), kernels_bytes=max(0, context - bare),
            cublas_workspace_bytes=workspace, convolution=convolution,
        )
    )  # fmt: skip


def _cublas_workspace(device: str) -> int:
    """Bytes allocated for a product, and for one with a bias, which is another library's."""
    side, dtype = 1024, torch.float16
    a, b, out = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(3))
    bias = torch.ones(side, device=device, dtype=dtype)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    torch.mm(a, b, out=out)
    torch.addmm(bias, a, b, out=out)
    return torch.cuda.max_memory_allocated(device) - before


def _workspaces(kind: str, device: str) -> Iterator[tuple[str, tuple[tuple[int, int], ...]]]:
    for precision, dtype in PRECISIONS.items():
        points = []
        for shapes in CONVOLUTIONS[kind]:
            torch.cuda.empty_cache()
            with contextlib.suppress(RuntimeError):  # no room, or no such arithmetic on this card
                points.append(_workspace(kind, shapes, device, dtype))
        if points:
            yield precision, tuple(points)


def _workspace(
    kind: str, shapes: tuple[tuple[int, ...], tuple[int, ...]], device: str, dtype: torch.dtype
) -> tuple[int, int]:
    """(bytes of input, weight and output; bytes allocated beside them at the peak)."""
    image, weight = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
    call = functional.conv2d if kind == "conv2d" else functional.conv3d
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call(image, weight)
    peak = torch.cuda.max_memory_allocated(device)
    return image.nbytes + weight.nbytes + result.nbytes, max(0, peak - before - result.nbytes)


def denoising(device: str, tokens: int = 8192, width: int = 1536, blocks: int = 4) -> None:
    """Blocks as Wan's: attention to itself and a feed-forward part, in half precision."""
    new = partial(torch.randn, device=device, dtype=torch.float16)
    heads, inner = width // 128, width * 8 // 3
    weights = [(new(3 * width, width), new(width, width), new(inner, width), new(width, inner)) for _ in range(blocks)]
    x = new(1, tokens, width)
    for into, out, up, down in weights:
        q, k, v = functional.linear(x, into).view(1, tokens, 3, heads, 128).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, tokens, width)
        x = x + functional.linear(seen, out)
        normed = functional.layer_norm(x.float(), (width,)).to(x.dtype)  # in fp32, as the models do
        x = x + functional.linear(functional.gelu(functional.linear(normed, up), approximate="tanh"), down)


def decoding(device: str, height: int = 60, width: int = 104, channels: int = 384, frames: int = 2) -> None:
    """Frame groups through a decoder as Wan's: at each stage wider and higher by two, with half the channels."""
    new = partial(torch.randn, device=device, dtype=torch.float16)
    stages = [channels // 2**stage for stage in range(3)]
    weights = [(new(c, c, 3, 3, 3), new(max(1, c // 2), c, 3, 3)) for c in stages]
    for _ in range(frames):
        x = new(1, channels, 4, height, width)
        for deep, flat in weights:
            for _ in range(2):
                normed = functional.silu(functional.normalize(x, dim=1))
                x = x + functional.conv3d(functional.pad(normed, (1, 1, 1, 1, 2, 0)), deep)
            tall = functional.interpolate(x.squeeze(0).transpose(0, 1), scale_factor=2.0, mode="nearest-exact")
            x = functional.conv2d(tall, flat, padding=1).transpose(0, 1).unsqueeze(0)
