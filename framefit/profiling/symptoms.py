"""What a profile is searched for: each function looks for one condition and gives its figures, or None.

They know nothing of what helps; that is in `rules`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from framefit.ledger.kinds import Kind, kernel_kind, op_kind
from framefit.profiling.breakdown import Kernel
from framefit.profiling.findings import Case, Evidence
from framefit.profiling.profile import PhaseProfile

__all__ = [
    "HALF", "allocator", "decoding", "fallback_attention", "full_precision", "other_process", "quality_loss",
    "recompiles", "throttled",
]  # fmt: skip

OTHERS_CPU = 0.25
"""Share of all cores."""
OTHERS_BUSY = 0.1
"""Share of the time in which the card was left alone by us."""
OTHERS_BYTES = 2**30
SLOW_CLOCK = 0.93
"""Of the highest; a sustained load within the card's power runs a few percent below it."""
THROTTLED = 0.05
"""Share of the time."""
LOSS = 0.02
"""Relative L2 of a prediction, above which a setting is not near."""
DECODING = 0.25
"""Share of a run."""
STALLED = 0.03
"""Share of a phase."""
FALLBACK = 0.03
"""Share of a phase."""

HALF = ("bf16", "fp16")
FASTER_HALF = 1.5
"""Times as fast by this device's own ceilings."""


def other_process(case: Case) -> Evidence | None:
    around = case.surroundings
    if case.device.id == "cpu":
        share = around.others_cpu or 0.0
        if share < OTHERS_CPU:
            return None
        return {"told": f"other programs took {share:.0%} of the processor's cores", "lost_s": case.run_s * share}
    held, busy = around.others_bytes or 0, around.others_busy or 0.0
    if held < OTHERS_BYTES and busy < OTHERS_BUSY:
        return None
    told = f"other programs hold {held / 2**30:.1f} GiB of the card"
    if around.others_busy is not None:
        told += f" and kept it busy for {busy:.0%} of the time while it was left alone"
    # two that both have work to do get about half of it each
    return {"told": told, "lost_s": case.run_s * busy / (1 + busy), "others_bytes": held, "others_busy": busy}


def throttled(case: Case) -> Evidence | None:
    around = case.surroundings
    if around.throttled >= THROTTLED:
        told = f"the control group's quota kept the threads from running for {around.throttled:.0%} of the time"
        return {"told": told, "lost_s": case.run_s * around.throttled, "by": "quota"}
    if around.clock is None or around.clock >= SLOW_CLOCK or not around.held_down:
        return None
    told = f"the card's clock was at {around.clock:.0%} of its highest ({', '.join(around.held_down)})"
    return {"told": told, "lost_s": case.run_s * (1 - around.clock), "by": "clock"}


def quality_loss(case: Case) -> Evidence | None:
    worst = next((loss for loss in case.losses if loss.whole > LOSS), None)
    if worst is None:
        return None
    others = ", ".join(f"{loss.layer} {loss.added:.2g}" for loss in case.losses if loss != worst)
    return {
        "layer": worst.layer, "added": worst.added, "whole": worst.whole, "share": worst.share,
        "others": f"; then {others}" if others else "", "losses": [loss.to_json() for loss in case.losses],
    }  # fmt: skip


def decoding(case: Case) -> Evidence | None:
    decodes = [phase for phase in case.phases if phase.name == "decode"]
    seconds = sum(phase.times * phase.breakdown.plain_s for phase in decodes)
    if len(case.phases) < 2 or seconds < DECODING * case.run_s:
        return None
    costs = [(phase.times, cost) for phase in decodes for cost in phase.breakdown.kinds.values()]
    best_s = sum(times * (cost.ceiling_s or cost.seconds) for times, cost in costs)
    return {"seconds": seconds, "share": seconds / case.run_s, "ceiling_s": min(seconds, best_s)}


def recompiles(case: Case, phase: PhaseProfile) -> Evidence | None:
    stalls = phase.breakdown.stalls
    return {"graphs": stalls.graphs, "lost_s": stalls.compile_s} if stalls.graphs else None


def allocator(case: Case, phase: PhaseProfile) -> Evidence | None:
    call = phase.breakdown
    if not call.stalls.retries and call.allocating_s < STALLED * call.wall_s:
        return None
    return {
        "retries": call.stalls.retries, "seconds": call.allocating_s, "lost_s": min(call.allocating_s, call.idle_s),
        "guidance": case.guidance(phase),
    }  # fmt: skip


def fallback_attention(case: Case, phase: PhaseProfile) -> Evidence | None:
    """Attention by its parts, or by the kernel that torch takes where FlashAttention and cuDNN refuse."""
    call, attention = phase.breakdown, phase.breakdown.kinds["attention"]
    parts = [kernel for kernel in call.kernels if _is_part_of_attention(kernel, phase)]
    efficient = [kernel for kernel in call.kernels if "fmha_cutlass" in kernel.name.lower()]
    slow = parts if _seconds(parts) >= _seconds(efficient) else efficient
    if _seconds(slow) < FALLBACK * call.plain_s:
        return None
    why = "mask" if attention.precision in HALF else "fp32" if case.precision == "fp32" else "kept"
    half = _half_rate(case, "attention") if case.precision in HALF or slow is efficient else None
    best_s = min(attention.ceiling_s or math.inf, attention.flops / half if half else math.inf)
    own_s = max(0.0, _seconds(slow) - best_s) if attention.flops else _seconds(slow)
    return {
        "what": "by its parts" if slow is parts else "by the memory-efficient kernel", "seconds": _seconds(slow),
        "kernel": max(slow, key=lambda kernel: kernel.seconds).name[:60], "lost_s": own_s,
        "why": "parts" if slow is parts else why, "share": _seconds(slow) / call.plain_s,
        "precision": case.precision,
    }  # fmt: skip


def _is_part_of_attention(kernel: Kernel, phase: PhaseProfile) -> bool:
    """A product or a softmax on its own: no fused kernel of attention is called so."""
    if kernel.kind == "attention":
        own = op_kind(kernel.name) if phase.breakdown.device == "cpu" else kernel_kind(kernel.name)
        return own != "attention" and ("softmax" in kernel.name.lower() or own == "matmul" or _has_softmax(phase))
    return kernel.kind == "elementwise" and "softmax" in kernel.name.lower()


def _has_softmax(phase: PhaseProfile) -> bool:
    kernels = phase.breakdown.kernels
    return any(kernel.kind == "attention" and "softmax" in kernel.name.lower() for kernel in kernels)


def _seconds(kernels: Sequence[Kernel]) -> float:
    return sum(kernel.seconds for kernel in kernels)


def full_precision(case: Case, phase: PhaseProfile) -> Evidence | None:
    """Work in fp32 that this device was measured to do faster in half precision; of attention the rule above tells."""
    saved, spent = 0.0, 0.0
    kinds: tuple[Kind, ...] = ("matmul", "convolution")
    for kind in kinds:
        cost, rate = phase.breakdown.kinds[kind], _half_rate(case, kind)
        full = case.ceilings.tflops.get(kind, {}).get("fp32")
        if cost.precision == "fp32" and rate and full and rate >= FASTER_HALF * full * 1e12:
            spent += cost.seconds
            saved += max(0.0, cost.seconds - cost.flops / rate)
    if saved < STALLED * phase.breakdown.plain_s:
        return None
    return {"seconds": spent, "lost_s": saved, "share": spent / phase.breakdown.plain_s, "precision": case.precision}


def _half_rate(case: Case, kind: Kind) -> float | None:
    """FLOP/s at best in half precision."""
    rates = [rate for precision, rate in case.ceilings.tflops.get(kind, {}).items() if precision in HALF]
    return max(rates) * 1e12 if rates else None
