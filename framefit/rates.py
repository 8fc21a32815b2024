"""What a device does a second, and what it takes beside: measured here and filed, or from a data sheet. No torch.

`framefit doctor --probe` measures (`framefit.profiling`); whoever plans or judges reads. On the CPU an entry is for one
number of threads, which torch alone knows.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, Self

from framefit.cards import CARDS, Card

if TYPE_CHECKING:
    from framefit.device import Device

__all__ = [
    "ATTAINED", "CUBLASLT_BYTES", "Quantity", "Rates", "Sort", "Unseen", "Work", "cpu_name", "default_file", "filed",
    "of", "of_sheet", "save",
]  # fmt: skip

ATTAINED = {"matmul": 0.78, "attention": 0.58, "convolution": 0.78, "memory": 0.85, "pcie": 0.87, "both_ways": 0.8}
"""Share of the data sheet that a card is taken to attain where nobody measured it.

Measured on one NVIDIA H200, torch 2.11: bf16 products 736 to 804 of 989 TFLOP/s, attention at head width 128 through
cuDNN 556 to 587, copies from pinned memory 55 of 63 GB/s, to and from it at once 50 each. Assumed: convolutions as
products, memory. Cards that their power limit holds (T4, L4, A10) attain less; GeForce cards, whose clocks pass the
boost clock of the sheet, more.
"""


CUBLASLT_BYTES = 2**20
"""What cuBLASLt takes, in a block of its own. Seen on an H200, torch 2.11; assumed of other cards."""

KINDS = ("attention", "matmul", "convolution")
"""Whose amount is FLOPs; of all others it is elements."""

BY_SIZE: Mapping[str, Mapping[int, float]] = {
    "attention": {64: 0.75, 128: 1.0, 512: 0.18},
    "matmul": {0: 1.08},
    "convolution": {96: 0.34, 128: 0.93},
    "scattered": {0: 175.0},
    "row_norm": {64: 14.0, 1024: 220.0},
    "group_norm": {32: 10.7, 264: 88.0},
}
"""Sort -> size -> its rate: a share of the best one of its kind, or elements for 1000 bytes that a copy moves.

Implied by profiles of thirteen true-size works on one NVIDIA H200 (benchmarks/stock_h200_20261121.json), once bytes are
put down to memory. For cards that were not probed, and for what a probe does not reach.
"""

LAUNCH_S = 8e-6
"""Of one operator beside its work, where nobody measured. Of the same works: what the card stood idle."""


RANDOM_PER_S = 1.5e8
"""Normal numbers that a host draws, where nobody measured: EasyAnimate's encoding draws 38 and 152 million of them and
was 0.23 and 1.2 s longer than what its card did, of which it is the most (benchmarks/fit_h200_20261121.json)."""

PINNED_GB_PER_S = 5.6
"""Host memory that is fetched, pinned and let go, where nobody measured: as beside an H200, with 16 cores (LOG)."""

DISK_GB_PER_S = 2.0
"""Weights read from files that are not in the system's cache, where nobody measured: an SSD on four lanes of PCIe 3."""

FIRST_S = 0.012
"""Of a convolution whose shapes a process has not met, where nobody measured: cuDNN looks for its kernels. First steps
of I2VGen-XL with 41 to 49 of them took 0.33 to 0.93 s more than the next (benchmarks/fit_h200_20261121.json)."""


class Sort(NamedTuple):
    """Operators that one rate is for."""

    name: str
    """"attention", "matmul", "convolution"; "plain": memory alone; "scattered", "row_norm", "group_norm"; "random": by
    the host."""
    precision: str
    """Empty where bytes tell it."""
    size: int
    """Attention: the width of a head; convolution: the fewer of its channels, in and out; row_norm: the row's length;
    group_norm: how many groups there are at once; 0: none."""


Quantity = Literal["calls", "amount", "bytes"]
"""Of all operators of a sort: how many; FLOPs (of attention those of whole tiles), or elements; read and written."""


class Work(Protocol):
    """What there is to do."""

    @property
    def flops(self) -> Mapping[Any, int]:
        """(kind, precision) -> FLOPs, as in ("matmul", "bf16")."""

    @property
    def bytes(self) -> Mapping[str, int]:
        """ "elementwise": read and written; "host_to_device", "device_to_host": moved."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unseen:
    """Memory of a card that a ledger of tensors does not show."""

    origin: Literal["measured", "assumed"]
    context_bytes: int
    """Beside what torch reserves, once every library is in use: CUDA's context, kernels, handles."""
    kernels_bytes: int
    """Of these, what comes after the bare context."""
    cublas_workspace_bytes: int
    """Allocated at the first matrix product, inside of what torch reserves; CUBLASLT_BYTES of them in a block apart."""
    convolution: Mapping[str, Mapping[str, tuple[tuple[int, int], ...]]]
    """"conv2d", "conv3d" -> precision -> (bytes of input, weight and output; workspace bytes), the smaller first."""

    @classmethod
    def assumed(cls, compute_capability: tuple[int, int]) -> Self:
        """For a card that was not probed."""
        return cls(
            origin="assumed", context_bytes=2**29, kernels_bytes=2**28,
            # aten/src/ATen/cuda/CublasHandlePool.cpp, parseChosenWorkspaceSize; torch 2.11 and 2.13 differ for 12.0
            cublas_workspace_bytes=(2**25 if compute_capability >= (9, 0) else 8 * 2**20 + 2**17) + CUBLASLT_BYTES,
            convolution={},
        )  # fmt: skip

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        convolution = {
            kind: {precision: tuple((int(x), int(y)) for x, y in points) for precision, points in by.items()}
            for kind, by in data["convolution"].items()
        }
        return cls(**(data | {"convolution": convolution}))


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """The best rates of one device: what is left of them in a run is for the run to show."""

    device: str
    """Its name, and where the CPU computes the number of threads."""
    torch: str
    """Version that measured; empty for a data sheet."""
    tflops: Mapping[str, Mapping[str, float]]
    """Kind -> precision -> TFLOP/s, for "matmul", "attention" and "convolution"."""
    memory_gb_per_s: float
    """Read and written by a copy on the device."""
    host_to_device_gb_per_s: float | None
    """From and to pinned memory; None on the CPU."""
    device_to_host_gb_per_s: float | None
    both_ways_gb_per_s: float | None = None
    """Each way, where copies go both ways at once: a link can be full with one. None: as fast as alone."""
    by_size: Mapping[str, Mapping[str, Mapping[int, float]]] = field(default_factory=dict)
    """Sort -> precision ("" where there is none) -> size -> 1e12 FLOPs or elements a second, beside its bytes."""
    launch_s: float = LAUNCH_S
    """Of one operator, however little it does."""
    random_per_s: float = RANDOM_PER_S
    """Normal numbers that the host draws."""
    pinned_gb_per_s: float = PINNED_GB_PER_S
    """Host memory that is fetched and pinned."""
    disk_gb_per_s: float | None = None
    """Weights that come to the device from files, which the system's cache does not have; None: nobody measured."""
    first_s: float = FIRST_S
    """Of a convolution of new shapes, beside what it takes the next time; of a card."""
    origin: Literal["measured", "data sheet x share"] = "measured"
    unseen: Unseen | None = None
    """None on the CPU, and where only rates were measured; `of` fills that in."""

    def seconds(self, kind: str, work: Work) -> float | None:
        """How long this kind's share of `work` takes at these rates; None where there is no rate for it."""
        if kind == "elementwise":
            return work.bytes["elementwise"] / self.memory_gb_per_s / 1e9
        if kind == "transfer":
            ways = [self.copy_seconds(way, work.bytes[way]) for way in ("host_to_device", "device_to_host")]
            return sum(way for way in ways if way is not None) if any(ways) else None
        rates = self.tflops[kind]
        flops = {precision: n for (of, precision), n in work.flops.items() if of == kind}
        if not flops or not flops.keys() <= rates.keys():
            return None
        return sum(n / rates[precision] / 1e12 for precision, n in flops.items())

    def seconds_by_kind(self, work: Mapping[tuple[Sort, Quantity], int]) -> dict[str, float] | None:
        """How long `work` takes; None where there is no rate for a part of it.

        What is computed, what is moved and what is launched add up; launches are the kind "elementwise". "host" is what
        a card waits for.
        """
        seconds = dict.fromkeys((*KINDS, "elementwise", "host"), 0.0)
        for (sort, quantity), count in work.items():
            kind = sort.name if sort.name in KINDS else "elementwise"
            if sort.name == "random":
                seconds["host"] += count / self.random_per_s if quantity == "amount" else 0.0
            elif quantity == "calls":
                seconds["elementwise"] += count * self.launch_s
            elif quantity == "bytes":
                seconds[kind] += count / self.memory_gb_per_s / 1e9
            elif count:
                rate = self.rate(sort)
                if rate is None:
                    return None
                seconds[kind] += count / rate / 1e12
        return seconds

    def rate(self, sort: Sort) -> float | None:
        """1e12 FLOPs or elements a second, beside bytes: on the line through the measured sizes, and from 0 to them."""
        points = self.by_size.get(sort.name, {}).get(sort.precision) or self._assumed(sort)
        if not points:
            return None
        sizes = sorted(points)
        above = next((size for size in sizes if size >= sort.size), None)
        if above is None:
            return points[sizes[-1]]
        below = max((size for size in sizes if size < sort.size), default=0)
        share = (sort.size - below) / (above - below) if above != below else 1.0
        return points.get(below, 0.0) * (1 - share) + points[above] * share

    def _assumed(self, sort: Sort) -> dict[int, float]:
        if sort.name in KINDS:
            best = self.tflops.get(sort.name, {}).get(sort.precision, 0.0)
        else:
            best = self.memory_gb_per_s / 1e6
        return {size: best * share for size, share in BY_SIZE[sort.name].items()} if best else {}

    def copy_seconds(self, way: str, bytes: int) -> float | None:
        """For `bytes` "host_to_device" or "device_to_host", or as many "both_ways" at once."""
        to, back = self.host_to_device_gb_per_s, self.device_to_host_gb_per_s
        both = self.both_ways_gb_per_s or min(filter(None, (to, back)), default=None)
        rate = {"host_to_device": to, "device_to_host": back, "both_ways": both}.get(way)
        return bytes / rate / 1e9 if rate else None

    def disk_seconds(self, bytes: int) -> float:
        """For weights that come from files."""
        return bytes / (self.disk_gb_per_s or DISK_GB_PER_S) / 1e9

    def to_json(self) -> dict[str, Any]:
        by_size = {
            sort: {precision: {str(size): rate for size, rate in points.items()} for precision, points in by.items()}
            for sort, by in self.by_size.items()
        }
        return asdict(self) | {"by_size": by_size}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        unseen = data.get("unseen")
        by_size = {
            sort: {precision: {int(size): rate for size, rate in points.items()} for precision, points in by.items()}
            for sort, by in data["by_size"].items()
        }
        return cls(**(data | {"by_size": by_size, "unseen": None if unseen is None else Unseen.from_json(unseen)}))


def of(device: Device) -> Rates | None:
    """Of a device that is here or of a named card: measured ones, else from the data sheet; None: neither is there."""
    name = cpu_name(device.name) if device.id == "cpu" else device.name
    card = next((card for card in CARDS.values() if card.name == device.name), None)
    found = filed(name) or (None if card is None else of_sheet(card))
    if found and not found.unseen and device.compute_capability:
        return replace(found, unseen=Unseen.assumed(device.compute_capability))
    return found


def of_sheet(card: Card) -> Rates:
    """What the data sheet says, times ATTAINED."""
    peaks = {precision: rate for precision, rate in card.tflops.items() if precision not in ("fp8", "int8")}
    # cuDNN's convolutions in fp32 use TF32 from Ampere on, at half the rate of fp16
    tf32 = peaks | {"fp32": max(peaks["fp32"], peaks["fp16"] / 2)} if card.compute_capability >= (8, 0) else peaks
    return Rates(
        device=card.name, torch="", origin="data sheet x share",
        tflops={
            kind: {precision: rate * ATTAINED[kind] for precision, rate in rates.items()}
            for kind, rates in (("matmul", card.tflops), ("attention", peaks), ("convolution", tf32))
        },
        memory_gb_per_s=card.memory_gb_per_s * ATTAINED["memory"],
        host_to_device_gb_per_s=card.pcie_gb_per_s * ATTAINED["pcie"],
        device_to_host_gb_per_s=card.pcie_gb_per_s * ATTAINED["pcie"],
        both_ways_gb_per_s=card.pcie_gb_per_s * ATTAINED["both_ways"],
        unseen=Unseen.assumed(card.compute_capability),
    )  # fmt: skip


def cpu_name(name: str) -> str:
    """A processor as it is filed."""
    import torch

    return f"{name}, {torch.get_num_threads()} threads"


def filed(name: str, file: Path | None = None) -> Rates | None:
    """What was measured on `name` with the torch that is installed."""
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):  # not ours: measured anew
        return Rates.from_json(_read(file or default_file())[_key(name)])
    return None


def save(rates: Rates, file: Path | None = None) -> Path:
    """File what was measured; what others filed stays."""
    file = file or default_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.part")
    temporary.write_text(json.dumps(_read(file) | {_key(rates.device): rates.to_json()}, indent=2), encoding="utf-8")
    temporary.replace(file)
    return file


def default_file() -> Path:
    """In the user's state folder, beside the runs."""
    import platformdirs

    return Path(platformdirs.user_state_dir("framefit")) / "rates.json"


def _key(name: str) -> str:
    return f"{name}, torch {_torch()}"


@cache
def _torch() -> str:
    """Looked up once: a search asks a thousand times."""
    return version("torch")


def _read(file: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}
