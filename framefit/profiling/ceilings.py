"""What this device does at best: matmul, attention and convolution by precision, memory, copies to and from the host.

Measured in a few seconds by the same torch calls that models make, best of several, and filed by device, torch and
threads (`framefit.rates`): a share of the ceiling compares a run with what this machine was seen to do.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from framefit import rates
from framefit.device import Device
from framefit.families.parts import PRECISIONS
from framefit.profiling import sized
from framefit.rates import Rates

__all__ = ["measure"]

BUDGET_S = 0.1
"""For one rate, after the first, untimed call."""


def measure(device: str, *, fresh: bool = False, file: Path | None = None) -> Rates:
    """The best rates of `device` ("cpu" or "cuda:N"): filed ones, or measured now, which takes a few seconds, and
    what the disk takes for 1 GiB.

    Args:
        fresh: measure although there are filed ones.
        file: where they are filed; None: in the user's state folder.
    """
    name = Device.detect(device).name
    name = rates.cpu_name(name) if device == "cpu" else name
    filed = rates.filed(name, file)
    if filed and not fresh:
        return filed
    found = replace(_measure(device, name), unseen=filed.unseen if filed else None)
    if device != "cpu":
        torch.cuda.empty_cache()  # the model comes next
    rates.save(found, file)
    return found


@torch.no_grad()
def _measure(device: str, name: str) -> Rates:
    tflops = {
        kind: dict(_rates(calls, device))
        for kind, calls in (("matmul", _matmuls), ("attention", _attentions), ("convolution", _convolutions))
    }
    if device != "cpu":
        tflops["matmul"] |= dict(_eight_bit(device))
    ways = {"to": None, "from": None, "both": None} if device == "cpu" else dict(_host_copies(device))
    best = Rates(
        device=name, torch=torch.__version__, tflops=tflops, memory_gb_per_s=_best(_memory_copy(device), device) * 1e3,
        host_to_device_gb_per_s=ways["to"], device_to_host_gb_per_s=ways["from"],
        both_ways_gb_per_s=ways["both"], launch_s=sized.launch_s(device),
        random_per_s=sized.random_per_s(), first_s=sized.first_s(device), pinned_gb_per_s=sized.pinned_gb_per_s(device),
        disk_gb_per_s=sized.disk_gb_per_s(device),
    )  # fmt: skip
    return sized.measured(best, device)


def _rates(calls: Callable[[str, torch.dtype], Iterator[Probe]], device: str) -> Iterator[tuple[str, float]]:
    for precision, dtype in PRECISIONS.items():
        with contextlib.suppress(RuntimeError):  # bf16 that an old card lacks, or too little memory: no ceiling for it
            yield precision, _best(calls(device, dtype), device)


Probe = tuple[float, Callable[[], object]]
"""Amount of work in one call, and the call."""


def _matmuls(device: str, dtype: torch.dtype) -> Iterator[Probe]:
    side = _sized(device, dtype, card=8192, cpu=1024)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    yield 2 * side**3, lambda: a @ b


def _eight_bit(device: str) -> Iterator[tuple[str, float]]:
    """Products of numbers of 8 bits, where the card and torch have them."""
    side = 8192
    with contextlib.suppress(RuntimeError):
        a, b = (torch.randn(side, side, device=device).to(torch.float8_e4m3fn) for _ in range(2))
        one = torch.ones((), device=device)
        call = partial(torch._scaled_mm, a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
        yield "fp8", _best(iter([(2 * side**3, call)]), device)
    with contextlib.suppress(RuntimeError):
        a, b = (torch.randint(-128, 128, (side, side), device=device, dtype=torch.int8) for _ in range(2))
        yield "int8", _best(iter([(2 * side**3, partial(torch._int_mm, a, b.t()))]), device)


def _attentions(device: str, dtype: torch.dtype) -> Iterator[Probe]:
    """As long as a video's sequence on a card, at Wan's head width."""
    tokens, heads, width = _sized(device, dtype, card=8192, cpu=1024), 16 if device != "cpu" else 4, 128
    q, k, v = (torch.randn(1, heads, tokens, width, device=device, dtype=dtype) for _ in range(3))
    yield 4 * heads * tokens**2 * width, lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)


def _convolutions(device: str, dtype: torch.dtype) -> Iterator[Probe]:
    """In two dimensions, channels last, and in three: whichever is faster is the ceiling."""
    channels, side = _sized(device, dtype, card=512, cpu=64), 128 if device != "cpu" else 64
    image = torch.randn(4, channels, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    flat = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    yield 2 * 4 * side**2 * channels**2 * 9, lambda: torch.nn.functional.conv2d(image, flat, padding=1)
    video = torch.randn(1, channels, 4, side, side, device=device, dtype=dtype)
    deep = torch.randn(channels, channels, 3, 3, 3, device=device, dtype=dtype)
    yield 2 * 4 * side**2 * channels**2 * 27, lambda: torch.nn.functional.conv3d(video, deep, padding=1)


def _memory_copy(device: str) -> Iterator[Probe]:
    source = torch.ones(2**26 if device != "cpu" else 2**23, device=device)
    target = torch.empty_like(source)
    yield 2 * source.nbytes, lambda: target.copy_(source)


def _host_copies(device: str) -> Iterator[tuple[str, float]]:
    sent, back = (torch.empty(2**26, pin_memory=True) for _ in range(2))
    on_card, other = (torch.empty(2**26, device=device) for _ in range(2))
    streams = [torch.cuda.Stream(device) for _ in range(2)]  # type: ignore[no-untyped-call]

    def copy(*pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
        current = torch.cuda.current_stream(device)
        for stream, (target, source) in zip(streams, pairs, strict=False):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
        for stream in streams[: len(pairs)]:  # only now: the second copy is not to wait for the first
            current.wait_stream(stream)

    to, away = (on_card, sent), (back, other)
    for way, pairs in (("to", (to,)), ("from", (away,)), ("both", (to, away))):
        yield way, _best(iter([(sent.nbytes, partial(copy, *pairs))]), device) * 1e3


def _sized(device: str, dtype: torch.dtype, *, card: int, cpu: int) -> int:
    """Half precision is emulated on many CPUs, a hundred times slower than fp32."""
    return card if device != "cpu" else cpu if dtype == torch.float32 else cpu // 4


def _best(probes: Iterator[Probe], device: str) -> float:
    """The highest rate of all probes, in 1e12 a second."""
    return max(amount / _fastest(call, device) / 1e12 for amount, call in probes)


def _fastest(call: Callable[[], object], device: str) -> float:
    """Seconds of the fastest call within the budget, at least three."""
    seconds: list[float] = []
    _timed(call, device)
    while len(seconds) < 3 or (sum(seconds) < BUDGET_S and len(seconds) < 100):
        seconds.append(_timed(call, device))
    return min(seconds)


def _timed(call: Callable[[], object], device: str) -> float:
    if device == "cpu":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
    with torch.cuda.device(device):
        marks[0].record()
        call()
        marks[1].record()
    marks[1].synchronize()
    milliseconds: float = marks[0].elapsed_time(marks[1])
    return milliseconds / 1e3
