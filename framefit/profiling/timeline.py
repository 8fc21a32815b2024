"""Memory over the time of a run, from the allocations in its Chrome trace, as a picture with the phases behind it."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framefit.errors import UsageError
from framefit.profiling.trace import PHASE

__all__ = ["Timeline", "draw", "read"]

BANDS = ("#eef2f7", "#f7f1e8", "#eef6ef", "#f6eef4")
CPU, CUDA = 0, 1
"""c10::DeviceType, as a trace writes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """What was allocated after every allocation and release."""

    seconds: tuple[float, ...]
    """Since the trace began."""
    allocated_bytes: tuple[int, ...]
    """By torch on the card; on the CPU by torch since the trace began, so without the weights."""
    reserved_bytes: tuple[int, ...]
    """Held by torch's allocator on the card; empty on the CPU, where it holds nothing back."""
    phases: tuple[tuple[str, float, float], ...]
    """(name, begin, end) in seconds since the trace began."""


def read(trace: Path, device: str) -> Timeline:
    """From a Chrome trace (.json.gz) that torch.profiler wrote with `profile_memory`, for "cpu" or "cuda:N"."""
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        events = [event for event in json.load(file)["traceEvents"] if "ts" in event and event["ph"] in "iX"]
    wanted = (CPU, None) if device == "cpu" else (CUDA, int(device.partition(":")[2] or 0))
    began = min((event["ts"] for event in events), default=0.0)
    memory = sorted((e["ts"], e["args"]) for e in events if e["name"] == "[memory]" and _device(e["args"]) == wanted)
    bands = [e for e in events if e["name"].startswith(PHASE) and e["cat"] == "user_annotation"]
    return Timeline(
        seconds=tuple((ts - began) / 1e6 for ts, _ in memory),
        allocated_bytes=tuple(facts["Total Allocated"] for _, facts in memory),
        reserved_bytes=() if device == "cpu" else tuple(facts["Total Reserved"] for _, facts in memory),
        phases=tuple(
            (e["name"].removeprefix(PHASE), (e["ts"] - began) / 1e6, (e["ts"] + e["dur"] - began) / 1e6) for e in bands
        ),
    )  # fmt: skip


def draw(timeline: Timeline, file: Path, title: str) -> None:
    """The picture, .png or .svg by the name of `file`.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("the memory timeline needs matplotlib: pip install 'framefit[quality]'.") from None
    figure = Figure(figsize=(12, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    _bands(axes, timeline)
    unit, size = ("GiB", 2**30) if max(timeline.allocated_bytes, default=0) >= 2**30 else ("MiB", 2**20)
    allocated = [value / size for value in timeline.allocated_bytes]
    if timeline.reserved_bytes:
        reserved = [value / size for value in timeline.reserved_bytes]
        axes.step(timeline.seconds, reserved, where="post", color="#9a9a9a", linewidth=1.0, label="reserved")
    axes.step(timeline.seconds, allocated, where="post", color="#2f6db3", linewidth=1.1, label="allocated")
    axes.fill_between(timeline.seconds, allocated, step="post", color="#2f6db3", alpha=0.15, linewidth=0)
    axes.set(xlabel="seconds under the profiler", ylabel=unit, ylim=(0, None))
    axes.margins(x=0)
    axes.set_title(title, fontsize=10, loc="left", pad=30)
    axes.legend(loc="upper right", fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)


def _bands(axes: Any, timeline: Timeline) -> None:
    """The phases behind the curve, their names above it, in two rows so that short ones do not collide."""
    named = list(dict.fromkeys(name for name, _, _ in timeline.phases))
    for name, begin, end in timeline.phases:
        axes.axvspan(begin, end, color=BANDS[named.index(name) % len(BANDS)], zorder=0, linewidth=0)
    for place, name in enumerate(named):
        spans = [(begin, end) for other, begin, end in timeline.phases if other == name]
        axes.annotate(
            name, ((spans[0][0] + spans[-1][1]) / 2, 1.0), xycoords=("data", "axes fraction"),
            xytext=(0, 3 + 11 * (place % 2)), textcoords="offset points", ha="center", va="bottom", fontsize=8,
            color="#555555",
        )  # fmt: skip


def _device(facts: dict[str, int]) -> tuple[int, int | None]:
    kind = facts["Device Type"]
    return (kind, None) if kind == CPU else (kind, facts["Device Id"])
