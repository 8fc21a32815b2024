"""The phases of a run whose weights come and go, from those of one whose weights stay: arithmetic in place of a trace.

Activations and operations do not depend on where weights lie, so that one trace answers for every level of offload and
every number of blocks that stay. Tests hold it to a trace of the offload pass itself, figure for figure.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from framefit.plan import Offload
from framefit.planning.phase import PhaseTrace, Pieces
from framefit.streaming import ROOMS, spread, staging_bytes

__all__ = ["blocks", "can_move", "moved", "together"]


def blocks(traces: Sequence[PhaseTrace]) -> int:
    """Of the denoiser that has fewest; 0 where nothing is known of it."""
    return min((len(p.blocks) for t in traces if _denoises(t) for p in t.pieces.values()), default=0)


def can_move(traces: Sequence[PhaseTrace], offload: Offload) -> bool:
    """Whether the model has as many blocks as are to stay, and one more."""
    return offload.kept == 0 or offload.kept < blocks(traces)


def moved(traces: Sequence[PhaseTrace], offload: Offload) -> tuple[PhaseTrace, ...]:
    """What `traces`, of weights that stay on the device, are with `offload`."""
    every = {name: pieces for trace in traces for name, pieces in trace.pieces.items()}
    if offload.level == "none":
        here = {name: each.bytes for name, each in every.items()}
        return tuple(replace(trace, weights_bytes=here, rooms=()) for trace in traces)
    streams = "block" if offload.level == "disk" else offload.level
    level = {name: streams if pieces.layers else "part" for name, pieces in every.items()}
    kept = sum(pieces.bytes for pieces in every.values())
    pinned = kept - sum(pieces.tables_bytes for name, pieces in every.items() if level[name] != "part")
    host, disk = kept, 0
    if offload.level == "disk":
        staging = staging_bytes(max(together(p) if level[name] != "part" else p.bytes for name, p in every.items()))
        host, pinned, disk = staging, staging, kept
    there = (_moved(trace, level, offload.kept if _denoises(trace) else 0) for trace in traces)
    return tuple(replace(trace, host_bytes=host, pinned_bytes=pinned, disk_bytes=disk) for trace in there)


@dataclass(frozen=True, slots=True)
class _Split:
    """One component at work."""

    whole: tuple[int, ...]
    """Bytes of each piece that comes when the phase begins."""
    rooms: tuple[int, ...]
    """Of those that others pass through."""
    streams: float
    """Share of what a level moves that moves where some blocks stay."""
    order: tuple[tuple[float, int], ...] = ()
    """As `PhaseTrace.streams`."""


def _moved(trace: PhaseTrace, levels: Mapping[str, str], kept: int) -> PhaseTrace:
    splits = {name: _split(pieces, levels[name], kept) for name, pieces in trace.pieces.items()}
    streaming = {levels[name]: split.streams for name, split in splits.items() if split.streams}
    copied = sum(int(trace.bytes[level] * share) for level, share in streaming.items())
    return replace(
        trace, weights_bytes={name: sum(split.whole + split.rooms) for name, split in splits.items()},
        onload_bytes=sum(sum(split.whole) for split in splits.values()),
        rooms=tuple(size for split in splits.values() for size in split.whole + split.rooms),
        bytes={**trace.bytes, "host_to_device": trace.bytes["host_to_device"] + copied},
        streams=max((split.order for split in splits.values()), key=len, default=()) or trace.streams,
    )  # fmt: skip


def _split(pieces: Pieces, level: str, kept: int) -> _Split:
    if level == "part":
        return _Split((pieces.bytes,), (), 0.0)
    units = pieces.blocks if level == "block" else pieces.layers
    stay = spread(kept, len(units))
    stream = [size for i, size in enumerate(units) if i not in stay]
    outside = pieces.bytes - pieces.tables_bytes - sum(units)
    order = _order(units, pieces.block_shares if level == "block" else pieces.layer_shares, stay)
    rooms = (max(stream, default=0),) * min(ROOMS, len(stream))
    return _Split((outside, *(units[i] for i in sorted(stay))), rooms, sum(stream) / max(1, sum(units)), order)


def _order(units: Sequence[int], shares: Sequence[float], stay: Collection[int]) -> tuple[tuple[float, int], ...]:
    """What streams, one roomful after another and round again: the next one comes while this one computes, and blocks
    that stay do."""
    moving = [i for i in range(len(units)) if i not in stay]
    if not shares or not moving:
        return ()
    fulls = _roomfuls(units, moving)
    begins = [full[0] for full in fulls]
    ends = [
        end if end > begin else end + len(units) for begin, end in zip(begins, [*begins[1:], begins[0]], strict=True)
    ]
    return tuple(
        (sum(shares[j % len(units)] for j in range(begin, end)), sum(units[i] for i in following))
        for begin, end, following in zip(begins, ends, [*fulls[1:], fulls[0]], strict=True)
    )


def _roomfuls(units: Sequence[int], moving: Sequence[int]) -> list[list[int]]:
    """As many of what streams as follow each other and fit together, from a largest one on, which has a room alone."""
    room = max(units[i] for i in moving)
    first = next(at for at, i in enumerate(moving) if units[i] == room)
    fulls: list[list[int]] = []
    for i in (*moving[first:], *moving[:first]):
        if fulls and sum(units[j] for j in fulls[-1]) + units[i] <= room:
            fulls[-1].append(i)
        else:
            fulls.append([i])
    return fulls


def together(pieces: Pieces) -> int:
    """Most bytes that lie together where blocks stream."""
    return max(pieces.bytes - pieces.tables_bytes - sum(pieces.blocks), pieces.tables_bytes, *pieces.blocks)


def _denoises(trace: PhaseTrace) -> bool:
    return trace.name.startswith("denoise")
