"""What `framefit doctor` says of this machine: versions, device, who else is on it, rates, models, runs to resume."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from framefit import __version__, rates
from framefit.device import Device
from framefit.rates import Rates, Unseen
from framefit.smi import Others, others

__all__ = ["examine"]

Row = tuple[str, str]
LIBRARIES = ("torch", "diffusers", "transformers", "av", "pillow")


def examine(which: str = "auto", *, probe: bool = False, runs: Path | None = None) -> tuple[dict[str, Any], list[Row]]:
    """Facts for a program, and rows for a person.

    Args:
        which: as in `Device.detect`.
        probe: measure the rates and what no ledger sees, and file them, which takes up to a minute.
        runs: where step checkpoints are; None: in the user's state folder.

    Raises:
        UsageError: there is no such device.
    """
    from framefit.checkpoint import default_root, list_runs
    from framefit.families import CHECKPOINTS, TINY, find, hub

    device = Device.detect(which)
    if probe:
        from framefit.profiling import unseen

        found: Rates | None = unseen.probe(device.id)
        device = Device.detect(which)
    else:
        found = rates.of(device)
    neighbours = None if device.id == "cpu" else others(device.id)
    versions = {name: _version(name) for name in LIBRARIES}
    present = [row.id for row in (find(TINY), *CHECKPOINTS.values()) if hub.is_present(row)]
    left = [path.name for path in list_runs(runs or default_root())]
    facts = {
        "framefit": __version__, "device": device.to_json(), "others": neighbours and asdict(neighbours),
        "rates": found and found.to_json(), "versions": versions, "models": present, "runs": left,
    }  # fmt: skip
    rows = [
        ("framefit", __version__), *versions.items(), *_device(device, neighbours),
        *(_rates(found) if found else [("rates", "not measured: framefit doctor --probe")]),
        ("models here", ", ".join(present)), ("runs to resume", ", ".join(left) or "none"),
    ]  # fmt: skip
    return facts, rows


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _device(device: Device, neighbours: Others | None) -> Iterator[Row]:
    yield "device", f"{device.name} ({device.id})"
    if device.vram_total_bytes:
        yield "VRAM", _free(device.vram_free_bytes, device.vram_total_bytes)
    if neighbours:
        count = {None: "processes not told", 0: "none", 1: "1 process"}.get(neighbours.count)
        held = f", {_gib(neighbours.bytes)} at the least" if neighbours.bytes else ""
        yield "others on it", f"{count or f'{neighbours.count} processes'}{held}"
    yield "RAM", _free(device.ram_free_bytes, device.ram_total_bytes)
    yield "disk", f"{_gib(device.disk_free_bytes or 0)} free"


def _rates(found: Rates) -> Iterator[Row]:
    yield "rates", found.origin if found.origin == "measured" else f"{found.origin}; framefit doctor --probe measures"
    for kind, by_precision in found.tflops.items():
        yield kind, ", ".join(f"{precision} {rate:.3g}" for precision, rate in by_precision.items()) + " TFLOP/s"
    yield "memory", f"{found.memory_gb_per_s:.4g} GB/s"
    if found.host_to_device_gb_per_s and found.device_to_host_gb_per_s:
        both = f", both at once {found.both_ways_gb_per_s:.3g}" if found.both_ways_gb_per_s else ""
        ways = f"to {found.host_to_device_gb_per_s:.3g}, from {found.device_to_host_gb_per_s:.3g}{both}"
        yield "host copies", f"{ways} GB/s"
        yield "pinned", f"{found.pinned_gb_per_s:.3g} GB/s"
        yield "weights in files", f"{found.disk_gb_per_s:.3g} GB/s" if found.disk_gb_per_s else "not measured"
    yield "noise", f"{found.random_per_s / 1e6:.3g} million numbers a second"
    if found.unseen:
        yield from _unseen(found.unseen)
    else:
        yield "unseen memory", "does not apply: torch's allocator for cards, CUDA and cuDNN are not on a CPU"


def _unseen(unseen: Unseen) -> Iterator[Row]:
    yield "unseen memory", unseen.origin
    yield "CUDA context", f"{_mib(unseen.context_bytes)}, of it kernels {_mib(unseen.kernels_bytes)}"
    yield "cuBLAS workspace", _mib(unseen.cublas_workspace_bytes)
    for kind, by_precision in unseen.convolution.items():
        yield f"{kind} workspace", ", ".join(f"{name} {_points(points)}" for name, points in by_precision.items())


def _points(points: tuple[tuple[int, int], ...]) -> str:
    return " and ".join(f"{_mib(workspace)} for {_mib(size)}" for size, workspace in points)


def _free(free: int, total: int) -> str:
    return f"{_gib(free)} free of {_gib(total)}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
