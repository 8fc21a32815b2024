"""What a plan will need, phase by phase: the dry run's bytes and operations, put to a device's memory and rates.

    needed  = weights + activations and workspaces at their peak x what the allocator keeps beside + cuBLAS's
              in whole pages, and the one that is taken off a limit (`Device.capped`)
    seconds = operations over measured rates, bytes over bandwidth, kind by kind; copies that no computation hides;
              what the host draws and pins; kernels that are looked for at their first use

What the allocator will hold is replayed (`reserved.py`).

No torch is needed where the plan was traced before.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, repeat

from framefit import rates
from framefit.device import EXPANDING_BYTES, state_folder
from framefit.errors import DoesNotFit, UsageError
from framefit.families import Checkpoint
from framefit.plan import Decode, Estimate, PhaseEstimate, Plan
from framefit.planning.choose import component_bytes
from framefit.planning.moved import together
from framefit.planning.phase import PhaseTrace, Pieces
from framefit.planning.reserved import reserved
from framefit.planning.traces import traced
from framefit.rates import Rates
from framefit.request import ResolvedRequest

__all__ = ["check_fits", "estimated", "replayed", "steps_of", "with_phases"]

KEPT = {"denoiser": 1.05, "vae": 1.12}
"""Bytes that torch's allocator has to reserve for one allocated, each at its peak, where its segments may grow and a
limit makes it give back what it can: what a run needs. Where nothing makes it, it reserves more: at true size on an
H200 (torch 2.11) denoisers 1.03 to 1.6 of what is not weights, VAEs 1.02 to 1.34."""
NAMED = 8
"""What is largest at a peak."""


def estimated(plan: Plan, checkpoint: Checkpoint) -> Plan:
    """`plan` with the estimate of every phase; a few seconds the first time.

    Where the dry run fails, which is told, the plan comes back with the bytes of its weights alone.

    Raises:
        UsageError: a pass refuses its setting for this model.
    """
    try:
        traces = traced(plan, checkpoint)
    except UsageError:
        raise
    except Exception as error:  # libraries that it has not met; a run does not depend on it
        told = " ".join(str(error).split())[:200]
        logging.getLogger("framefit").warning(
            "the dry run of %s failed (%s: %s): no phase is estimated, only its weights.",
            checkpoint.id, type(error).__name__, told,
        )  # fmt: skip
        return plan
    return replayed(with_phases(plan, checkpoint, traces), checkpoint, traces)


def replayed(plan: Plan, checkpoint: Checkpoint, traces: Sequence[PhaseTrace]) -> Plan:
    """`plan`, which has an estimate, with what torch's allocator reserves in each phase."""
    if plan.device.id == "cpu":
        return plan
    known = rates.of(plan.device)
    steps = {f"denoise:{expert}": times for expert, times in steps_of(plan.request, checkpoint).items()}
    limit = plan.estimate.free_bytes - (0 if plan.device.vram_limit_bytes is None else EXPANDING_BYTES)
    found = reserved(traces, steps, limit, _cublas_bytes(known))
    phases = tuple(replace(p, reserved_bytes=found.get(p.name)) for p in plan.estimate.phases)
    return replace(plan, estimate=replace(plan.estimate, phases=phases))


def with_phases(
    plan: Plan, checkpoint: Checkpoint, traces: Sequence[PhaseTrace], met: Collection[int] = frozenset()
) -> Plan:
    """`plan` with the estimate that follows from `traces`, in a process that has `met` some shapes of convolutions."""
    known = rates.of(plan.device)
    sizes = component_bytes(checkpoint, plan.precision)
    kept = dict(sizes)
    pieces = {name: each for trace in traces for name, each in trace.pieces.items()}
    if plan.quantize != "none":
        kept |= {name: each.bytes for name, each in pieces.items()}
    new = _first_met(traces, met)
    phases = tuple(_phase(trace, plan, checkpoint, known, new[trace.name]) for trace in traces)
    return replace(
        plan, estimate=Estimate(
            weights_bytes=sum(kept.values()), free_bytes=plan.estimate.free_bytes,
            phases=(_load(plan, checkpoint, sizes, kept, pieces), *phases), origin=_origin(known),
        ),
    )  # fmt: skip


def check_fits(plan: Plan, ways: Sequence[object] = ()) -> None:
    """Raises `DoesNotFit` where the plan is not feasible.

    Args:
        ways: what would fit, as `planning.changes` found it.
    """
    if plan.feasible:
        return
    fits_with = f"it fits with {'; or '.join(map(str, ways))}, or " if ways else "use "
    limit = "" if plan.device.ram_limit_bytes is None else " by --ram"
    weights_fit = plan.estimate.weights_bytes <= plan.estimate.free_bytes
    elsewhere = ("" if plan.offload == "disk" else "offload=disk, ") + ("offload=none, " if weights_fit else "")

    def most(place: str) -> tuple[str, int, int]:
        """The phase that lacks most of a place, what it needs there, and what there is."""
        phase = max(plan.estimate.phases, key=lambda phase: plan.excess(phase).get(place, 0))
        return phase.name, *plan.needs(phase)[place]

    if plan.lacks("host"):
        phase, need, there = most("host")
        raise DoesNotFit(
            f"{plan.request.model} with offload={plan.offload} takes {need / 2**30:.1f} GiB of RAM in its phase "
            f"{phase} and {there / 2**30:.1f} GiB are free{limit}: {fits_with}{elsewhere}a smaller model "
            f"(framefit models ls); or free some."
        )
    if plan.lacks("pinned"):
        _, need, there = most("pinned")
        raise DoesNotFit(
            f"{plan.request.model} with offload={plan.offload} pins {need / 2**30:.2f} GiB of RAM and "
            f"{there / 2**30:.2f} GiB may be: {fits_with}{elsewhere}or more of --pinned."
        )
    if plan.lacks("shelf"):
        phase, need, there = most("shelf")
        raise DoesNotFit(
            f"{plan.request.model} with decode={plan.setting(Decode).value} keeps {need / 2**30:.1f} GiB in RAM "
            f"in its phase {phase} and {there / 2**30:.1f} GiB may be: {fits_with}another decode, or free some."
        )
    if plan.lacks("disk"):
        _, need, there = most("disk")
        raise DoesNotFit(
            f"{plan.request.model} with offload=disk writes {need / 2**30:.2f} GiB of weights below {state_folder()} "
            f"and {there / 2**30:.2f} GiB may be: {fits_with}make room, set XDG_STATE_HOME to another disk, ask "
            f"more of --disk, or use offload=block."
        )
    need, binding = plan.estimate.peak_bytes, plan.estimate.binding
    what = "for its weights alone" if binding is None else f"in its phase {binding.name}"
    given = "free" if plan.device.vram_limit_bytes is None else "by --vram"
    on_card = plan.device.id != "cpu"
    streamed = "--set offload=block (weights in RAM), " if on_card and plan.offload == "none" else ""
    if not on_card and plan.offload != "disk":
        streamed = "--set offload=disk (weights in files), "
    fewer = "a smaller --size, fewer --frames, " if weights_fit or (on_card and plan.offload != "none") else ""
    raise DoesNotFit(
        f"{plan.request.model} needs {need / 2**30:.1f} GiB {what} in {plan.precision} and {plan.device.name} has "
        f"{plan.estimate.free_bytes / 2**30:.1f} GiB {given}: {fits_with}{'' if ways else streamed + fewer}a smaller "
        f"model (framefit models ls) or a larger device."
    )


def steps_of(request: ResolvedRequest, checkpoint: Checkpoint) -> dict[str, int]:
    """Expert -> steps that it serves: all of them, or those on its side of the boundary.

    The noise levels are those of diffusers' flow schedulers: even from 1 down to a thousandth, then shifted.
    """
    if len(checkpoint.experts) == 1 or checkpoint.boundary_ratio is None:
        return {checkpoint.experts[0]: request.steps}
    config = checkpoint["scheduler"].config
    shift = request.shift if request.shift is not None else float(config.get("flow_shift", 1.0))
    even = (1 - 0.999 * step / request.steps for step in range(request.steps))
    timesteps = [int(1000 * shift * level / (1 + (shift - 1) * level)) for level in even]
    high = sum(t >= 1000 * checkpoint.boundary_ratio for t in timesteps)
    return dict(zip(checkpoint.experts, (high, request.steps - high), strict=True))


def _first_met(traces: Sequence[PhaseTrace], met: Collection[int]) -> dict[str, int]:
    """Phase -> how many shapes of convolutions it has that none before it had."""
    seen, new = set(met), {}
    for trace in traces:
        new[trace.name] = len(seen.union(trace.shapes)) - len(seen)
        seen.update(trace.shapes)
    return new


def _phase(trace: PhaseTrace, plan: Plan, checkpoint: Checkpoint, known: Rates | None, new: int) -> PhaseEstimate:
    weights = sum(trace.weights_bytes.values())
    request, on_card = plan.request, plan.device.id != "cpu"
    video = request.width * request.height * request.num_frames * 3 if trace.name == "decode" else 0
    held = {f"weights of the {name}": size for name, size in trace.weights_bytes.items()} | dict(trace.held)
    pages = -(-(weights + _needed(trace, known)) // EXPANDING_BYTES) + 1
    return PhaseEstimate(
        name=trace.name,
        seconds=_seconds(trace, plan, checkpoint, known, new),
        peak_vram_bytes=pages * EXPANDING_BYTES if on_card else 0,
        host_bytes=trace.host_bytes + trace.shelf_bytes + video + (0 if on_card else weights + trace.peak_bytes),
        pinned_bytes=trace.pinned_bytes + trace.shelf_bytes if on_card else 0,
        shelf_bytes=trace.shelf_bytes if on_card else 0,
        disk_bytes=trace.disk_bytes,
        held=dict(sorted(held.items(), key=lambda each: -each[1])[:NAMED]),
    )


def _needed(trace: PhaseTrace, known: Rates | None) -> int:
    """For everything but weights."""
    kept = KEPT["vae" if trace.name in ("encode_image", "decode") else "denoiser"]
    return math.ceil(kept * trace.peak_bytes) + _cublas_bytes(known)


def _cublas_bytes(known: Rates | None) -> int:
    return known.unseen.cublas_workspace_bytes if known and known.unseen else 0


def _seconds(trace: PhaseTrace, plan: Plan, checkpoint: Checkpoint, known: Rates | None, new: int) -> float | None:
    """In the whole run: what comes when the phase begins, then all its steps. Of its convolutions' shapes, `new` have
    not been met."""
    if known is None:
        return None
    work = known.seconds_by_kind(trace.work)
    if work is None:
        return None
    times = steps_of(plan.request, checkpoint).get(trace.name.removeprefix("denoise:"), 1)
    # what lies in RAM goes there and comes from there, both ways at once, wherever weights are
    moved = max(trace.bytes["host_to_device"], trace.bytes["device_to_host"] if trace.shelf_bytes else 0)
    way = "both_ways" if trace.shelf_bytes else plan.offload
    step = _beside(sum(work.values()), moved, trace.streams or ((1.0, moved),), way, known)
    begin = _copied(trace.onload_bytes, plan.offload, known)
    if plan.device.id != "cpu":
        begin += new * known.first_s + trace.shelf_bytes / known.pinned_gb_per_s / 1e9
    return begin + times * step


def _beside(work_s: float, bytes: int, streams: Sequence[tuple[float, int]], way: str, known: Rates) -> float:
    """Seconds of a step of `work_s` while `bytes` come, as often as it takes through all of `streams`.

    A piece comes while the one before it computes: it is waited for where that takes less long. What is copied takes
    its share of the card's memory, too.
    """
    often = bytes / (sum(size for _, size in streams) or 1)
    waits = (often * _copied(size, way, known) - share * work_s for share, size in streams)
    return work_s + sum(max(0.0, wait) for wait in waits) + bytes / known.memory_gb_per_s / 1e9


def _copied(bytes: int, way: str, known: Rates) -> float:
    """Seconds in which weights come to the device, from where `offload` has them, or memories move "both_ways"."""
    if way == "disk":
        return known.disk_seconds(bytes)
    return known.copy_seconds(way if way == "both_ways" else "host_to_device", bytes) or 0.0


def _load(
    plan: Plan, checkpoint: Checkpoint, sizes: Mapping[str, int], kept: Mapping[str, int], pieces: Mapping[str, Pieces]
) -> PhaseEstimate:
    """Components are read one by one, shrunk to what is kept of them, and stay, or go to the device or to disk.

    A denoiser is read, shrunk and put away block by block; of all others the libraries read the whole.
    """
    held = {f"weights of the {name}": size for name, size in sorted(kept.items(), key=lambda each: -each[1])}
    on_disk = plan.offload == "disk"
    stays = (plan.device.id == "cpu" or plan.offload != "none") and not on_disk
    on_card = 0 if stays or on_disk else sum(kept.values())
    read = dict(sizes)
    for name in checkpoint.experts:
        block = together(pieces[name]) if name in pieces else kept[name]
        unshrunk = block * sizes[name] // kept[name]
        read[name] = kept[name] - block + unshrunk if stays else unshrunk + block * on_disk
    before = accumulate((kept[name] for name in sizes), initial=0) if stays else repeat(0)
    host = max(read[name] + there for name, there in zip(sizes, before, strict=False))
    return PhaseEstimate(
        name="load", seconds=None, peak_vram_bytes=on_card, host_bytes=host,
        disk_bytes=sum(kept.values()) if on_disk else 0, held=held,
    )  # fmt: skip


def _origin(known: Rates | None) -> str:
    if known is None:
        return "no rates of this device are known: framefit doctor --probe measures them"
    return f"rates of {known.device}, {known.origin}"
