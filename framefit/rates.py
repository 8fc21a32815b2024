"""What a device does a second, and what it takes beside: measured here and filed, or from a data sheet. No torch.

`framefit doctor --probe` measures (`framefit.profiling`); whoever plans or judges reads. On the CPU an entry is for one
number of threads, which torch alone knows.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from framefit.cards import CARDS, Card

if TYPE_CHECKING:
    from framefit.device import Device

__all__ = ["ATTAINED", "Rates", "Unseen", "Work", "cpu_name", "default_file", "filed", "of", "of_sheet", "save"]

ATTAINED = {"matmul": 0.78, "attention": 0.58, "convolution": 0.78, "memory": 0.85, "pcie": 0.87}
"""Share of the data sheet that a card is taken to attain where nobody measured it.

Measured on one NVIDIA H200, torch 2.11: bf16 products 736 to 804 of 989 TFLOP/s, attention at head width 128 through
cuDNN 556 to 587, copies from pinned memory 55 of 63 GB/s. Assumed: convolutions as products, memory. Cards that their
power limit holds (T4, L4, A10) attain less; GeForce cards, whose clocks pass the boost clock of the sheet, more.
"""


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
    """Allocated at the first matrix product, inside of what torch reserves."""
    convolution: Mapping[str, Mapping[str, tuple[tuple[int, int], ...]]]
    """"conv2d", "conv3d" -> precision -> (bytes of input, weight and output; workspace bytes), the smaller first."""
    rounding: float
    """Bytes allocated for one byte asked for, at the peak."""
    reserved: Mapping[str, float]
    """Bytes reserved for one byte allocated, each at its peak: of "denoise", "decode"."""

    def convolution_bytes(self, kind: str, precision: str, bytes: int) -> int:
        """cuDNN's workspace for a "conv2d" or "conv3d" of `bytes` in all: on the line through what was measured."""
        points = self.convolution.get(kind, {}).get(precision)
        if not points:
            return int(bytes * WORKSPACE_SHARE)
        (x0, y0), (x1, y1) = points[0], points[-1]
        slope = (y1 - y0) / (x1 - x0) if x1 != x0 else 0.0
        return max(0, int(y0 + slope * (bytes - x0)))

    @classmethod
    def assumed(cls, compute_capability: tuple[int, int]) -> Self:
        """For a card that was not probed."""
        return cls(
            origin="assumed", context_bytes=2**29, kernels_bytes=2**28,
            # aten/src/ATen/cuda/CublasHandlePool.cpp, parseChosenWorkspaceSize; torch 2.11 and 2.13 differ for 12.0
            cublas_workspace_bytes=2**25 if compute_capability >= (9, 0) else 8 * 2**20 + 2**17,
            convolution={}, rounding=1.0, reserved={"denoise": 1.05, "decode": 1.12},
        )  # fmt: skip

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        convolution = {
            kind: {precision: tuple((int(x), int(y)) for x, y in points) for precision, points in by.items()}
            for kind, by in data["convolution"].items()
        }
        return cls(**(data | {"convolution": convolution}))


WORKSPACE_SHARE = 1 / 3
"""Of input, weight and output, where nobody measured: EasyAnimate's decode on an H200 peaks 22 % above its tensors."""


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

    def copy_seconds(self, way: str, bytes: int) -> float | None:
        """For `bytes` "host_to_device" or "device_to_host"."""
        rates = {"host_to_device": self.host_to_device_gb_per_s, "device_to_host": self.device_to_host_gb_per_s}
        rate = rates.get(way)
        return bytes / rate / 1e9 if rate else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        unseen = data.get("unseen")
        return cls(**(data | {"unseen": None if unseen is None else Unseen.from_json(unseen)}))


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
    return f"{name}, torch {version('torch')}"


def _read(file: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}
