"""How fast a device does each sort of operator, by its size: from what a call takes, less what is known of it.

A call is counted as a plan counts it (`framefit.ledger`). Of its seconds, what bytes and sorts measured before it take
is left out; the rest is the sort's own. Calls follow one another for a while: a card that its power holds back is as
fast as in a run, not as in the first tenth of a second.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.nn import functional

from framefit.errors import FramefitError
from framefit.families.parts import PRECISIONS
from framefit.ledger.counts import Tally, count
from framefit.ledger.disk import DiskTransfer, FiledSlab
from framefit.ledger.transfer import transfer_for
from framefit.rates import KINDS, Rates
from framefit.scratch import Scratch

__all__ = ["disk_gb_per_s", "first_s", "launch_s", "measured", "pinned_gb_per_s", "random_per_s"]

HOLD_S = 0.2
"""How long a call is repeated, twice: once so that the device settles. On a CPU a tenth of it."""
NEW = (50, 54, 58, 62, 66)
"""Sides of pictures that nothing else here is as large as."""
DRAWN = 2**25
"""Numbers: more than a processor's caches hold, as a video's are."""
PINNED_BYTES = 2**28
FILES = 4
FILE_BYTES = 2**28
"""About a block of weights. On a CPU a sixteenth."""
LEAST = 0.1
"""Share of a call's seconds that is its sort's at the least."""

Call = Callable[[], object]
Probe = tuple[str, int, Callable[[], Sequence[Call]]]
"""A sort, its size as `Rates.by_size` has it, and what makes the calls."""


def measured(best: Rates, device: str) -> Rates:
    """`best` with the rates of every sort by size; a sort that finds no room or no kernel is left out.

    Args:
        best: with the rate of memory, which is taken off.
        device: "cpu" or "cuda:N".
    """
    known = replace(best, launch_s=0.0)
    for precision, dtype in (("", _half(device)), *PRECISIONS.items()):
        for name, size, made in _kinds(device, dtype) if precision else _elementwise(device, dtype):
            with contextlib.suppress(RuntimeError):  # as in `ceilings`
                rate = _rate(name, made(), known, device)
                by = {**known.by_size.get(name, {})}
                by[precision] = {**by.get(precision, {}), size: rate}
                known = replace(known, by_size={**known.by_size, name: by})
    return replace(known, launch_s=best.launch_s)


@torch.no_grad()
def launch_s(device: str) -> float:
    """Seconds of an operator so small that only its way to the device counts, a module's call among them."""
    width, layers = 8, 16
    parts = (part for _ in range(layers) for part in (nn.LayerNorm(width), nn.Linear(width, width), nn.GELU()))
    model, x = nn.Sequential(*parts).to(device), torch.ones(1, width, device=device)
    return _held(lambda: model(x), device) / (3 * layers)


@torch.no_grad()
def first_s(device: str) -> float:
    """Seconds that a convolution of new shapes takes more than once it was met: the middle of several."""
    more = []
    weight = torch.randn(64, 64, 3, 3, 3, device=device, dtype=_half(device))
    for side in NEW:
        video = torch.randn(1, 64, 3, side, side, device=device, dtype=weight.dtype)
        call = partial(functional.conv3d, video, weight)
        first, again = _once(call, device), _once(call, device)
        more.append(max(0.0, first - again))
    return median(more)


def random_per_s() -> float:
    """Normal numbers that the host draws, as noise is drawn."""
    generator = torch.Generator().manual_seed(0)
    return DRAWN / min(_once(lambda: torch.randn(DRAWN, generator=generator), "cpu") for _ in range(2))


def pinned_gb_per_s(device: str) -> float:
    """Host memory that is fetched, pinned and let go, as what a VAE remembers is."""
    transfer = transfer_for(torch.device(device))
    return PINNED_BYTES / _once(lambda: transfer.piece(PINNED_BYTES), device) / 1e9


def disk_gb_per_s(device: str) -> float | None:
    """Weights that come from files, as `offload=disk` writes and reads them, where the system's cache does not have
    them; None where no files can be there. Takes as long as the disk does for 1 GiB."""
    with contextlib.suppress(FramefitError, OSError), contextlib.ExitStack() as after:
        scratch = Scratch.create()
        after.callback(scratch.remove)
        return _from_files(scratch.path, device)
    return None


def _from_files(folder: Path, device: str) -> float:
    """GB/s."""
    bytes = FILE_BYTES // (16 if device == "cpu" else 1)
    weights = torch.randint(256, (bytes,), dtype=torch.uint8)
    transfer = DiskTransfer(transfer_for(torch.device(device)), folder)

    def fetch(*slabs: FiledSlab) -> None:
        for slab in slabs:
            transfer.copy(slab, room)
            transfer.wait(room)

    try:
        first, *others = (transfer.slab([weights.clone()]) for _ in range(FILES))
        room = transfer.room(bytes)
        fetch(first)  # for which memory is pinned
        for slab in others:
            _forget(slab)
        return len(others) * bytes / _once(partial(fetch, *others), device) / 1e9
    finally:
        transfer.close()


def _forget(slab: FiledSlab) -> None:
    """Have the system's cache let go of its file, where the system can be asked to."""
    if hasattr(os, "posix_fadvise"):
        with slab.open() as stream:
            os.fsync(stream.fileno())  # what is not on the disk yet stays in the cache
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _once(call: Call, device: str) -> float:
    _wait(device)
    began = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - began


@torch.no_grad()
def _rate(name: str, calls: Sequence[Call], known: Rates, device: str) -> float:
    """1e12 FLOPs or elements a second."""
    amount = net = 0.0
    for call in calls:
        tally = Tally(card=device != "cpu")
        count(call, tally)
        work = tally.counts.work
        own = {key: n for key, n in work.items() if key[0].name == name and key[1] == "amount"}
        rest = known.seconds_by_kind({key: n for key, n in work.items() if key not in own}) or {}
        seconds = _held(call, device)
        amount += sum(own.values())
        net += max(LEAST * seconds, seconds - sum(rest.values()))
    if not amount:
        raise RuntimeError("torch computes it by parts")
    return amount / net / 1e12


def _kinds(device: str, dtype: torch.dtype) -> Iterator[Probe]:
    attention, matmul, convolution = KINDS
    small = device == "cpu"
    yield matmul, 0, partial(_product, device, dtype, 256 if small else 8192)
    for width, heads in ((64, 32), (128, 16), (512, 2)):
        shape = (1, 1, 256, width) if small else (1, heads, 8192, width)
        yield attention, width, partial(_attention, device, dtype, shape)
    for size, channels, picture in ((96, 96, (240, 416)), (128, 256, (120, 208))):
        video = (1, channels, 4, *((8, 12) if small else picture))
        yield convolution, size, partial(_convolution, device, dtype, video)


def _elementwise(device: str, dtype: torch.dtype) -> Iterator[Probe]:
    rows = 64 if device == "cpu" else 16384
    yield "scattered", 0, partial(_scattered, device, dtype, rows)
    for width in (64, 1024):
        yield "row_norm", width, partial(_row_norm, device, dtype, rows * 2048 // width, width)
    for groups in (32, 256):
        yield "group_norm", groups, partial(_group_norm, device, dtype, rows, groups)


def _product(device: str, dtype: torch.dtype, side: int) -> Sequence[Call]:
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return (lambda: a @ b,)


def _attention(device: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> Sequence[Call]:
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    return (lambda: functional.scaled_dot_product_attention(q, k, v),)


def _convolution(device: str, dtype: torch.dtype, shape: tuple[int, int, int, int, int]) -> Sequence[Call]:
    """In three dimensions, channels first and biased, as video decoders do."""
    video, channels = torch.randn(shape, device=device, dtype=dtype), shape[1]
    weight = torch.randn(channels, channels, 3, 3, 3, device=device, dtype=dtype)
    bias = torch.randn(channels, device=device, dtype=dtype)
    return (lambda: functional.conv3d(video, weight, bias, padding=1),)


def _scattered(device: str, dtype: torch.dtype, rows: int) -> Sequence[Call]:
    """What models do most: to another precision, with one row for all, on a half of every row."""
    width = 2048
    full, row = torch.randn(rows, width, device=device), torch.randn(1, width, device=device)
    halves = torch.randn(rows, 2 * width, device=device, dtype=dtype)
    left, right = halves[:, :width], halves[:, width:]
    return (lambda: full.to(dtype), lambda: full * row, lambda: functional.gelu(left), lambda: left * right)


def _row_norm(device: str, dtype: torch.dtype, rows: int, width: int) -> Sequence[Call]:
    x, weight = torch.randn(rows, width, device=device, dtype=dtype), torch.ones(width, device=device, dtype=dtype)
    return (lambda: functional.layer_norm(x, (width,), weight, weight),)


def _group_norm(device: str, dtype: torch.dtype, rows: int, groups: int) -> Sequence[Call]:
    batch, channels = groups // 32, 64
    x = torch.randn(batch, channels, 32 * rows // batch, device=device, dtype=dtype)
    weight = torch.ones(channels, device=device, dtype=dtype)
    return (lambda: functional.group_norm(x, 32, weight, weight),)


def _half(device: str) -> torch.dtype:
    """Of which models mostly are on this device."""
    if device == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _held(call: Call, device: str) -> float:
    """Seconds of one of many calls on end."""
    mean, hold_s = 0.0, HOLD_S if device != "cpu" else HOLD_S / 10
    for _ in range(2):
        calls, batch = 0, 1
        _wait(device)
        began = time.perf_counter()
        while calls < 3 or time.perf_counter() - began < hold_s:
            for _ in range(batch):
                call()
            _wait(device)
            calls, batch = calls + batch, 2 * batch
        mean = (time.perf_counter() - began) / calls
    return mean


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)
