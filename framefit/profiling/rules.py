"""The rules: what is asked, and what helps. One table, in the order of asking; `symptoms` says how each is told.

A gain is the most that a remedy may save, from what was measured in the run itself: seconds above the device's
ceiling, seconds in which it waited. Where the ceiling is not the limit, as with fewer bits, the factor is one that was
measured on an NVIDIA H200 (torch 2.11, Wan2.2-A14B at 832x480 and 1280x720), and stands below.
"""

from __future__ import annotations

from collections.abc import Callable

from framefit.profiling import symptoms
from framefit.profiling.findings import Case, Evidence, Remedy, Rule

__all__ = ["RULES"]

LESS = 0.1
"""A tenth of the frames, the pixels or the steps: what it saves at the least, as work grows at least in proportion."""
FLASH_ATTENTION = 0.16
"""FlashAttention-4 649 to 712 TFLOP/s, cuDNN's attention 556 to 587, head width 128, bf16."""
EIGHT_BIT_ATTENTION = 0.25
"""SageAttention 2 saves 15 % (1280x720) or 8 % (832x480) of FlashAttention-4's time: this much of cuDNN's."""
EIGHT_BIT_MATMUL = 0.44
"""A compiled forward of 2.85 s, 1.04 s of it in products, took 2.39 s in fp8."""
FUSED = 0.5
"""Compiling took 0.35 s from the 0.6 s of a forward that were neither attention nor products."""


def _lost(case: Case, seen: Evidence) -> float:
    return float(seen["lost_s"])


def _where(name: str, *values: object) -> Callable[[Case, Evidence], float | None]:
    """All that was lost, where the evidence says so."""
    return lambda case, seen: _lost(case, seen) if seen[name] in values else None


def _spent(share: float) -> Callable[[Case, Evidence], float | None]:
    return lambda case, seen: share * float(seen["seconds"])


def _above_ceiling(case: Case, seen: Evidence) -> float | None:
    above = seen["seconds"] - seen["ceiling_s"] if seen["ceiling_s"] is not None else 0.0
    return above if above > 0 else None


def _on_card(share: float, least: tuple[int, int]) -> Callable[[Case, Evidence], float | None]:
    """A share of half-precision work, from a compute capability on."""

    def gain(case: Case, seen: Evidence) -> float | None:
        able = case.device.compute_capability is not None and case.device.compute_capability >= least
        return share * float(seen["seconds"]) if able and seen["precision"] in symptoms.HALF else None

    return gain


def _hidden(case: Case, seen: Evidence) -> float | None:
    """What is left of copies beside the compute is what is longer than it, at the best rate."""
    best_s = seen["all_s"] if seen["ceiling_s"] is None else min(seen["all_s"], seen["ceiling_s"])
    saved = float(seen["seconds"] + seen["others_s"] - max(best_s, seen["others_s"]))
    return min(float(seen["seconds"]), saved)


def _together(case: Case, seen: Evidence) -> float | None:
    """Half the launches."""
    return 0.5 * float(seen["seconds"]) if seen["guidance"] == "apart" else None


HALF = "--precision bf16, or fp16 on a card before 8.0"
KEPT = "this part is kept in fp32 as its authors advise: half precision, proved on the video"
LESS_WORK = Remedy(
    do="a tenth less work, by fewer --frames, a smaller --size or fewer --steps",
    tier=None, gain=_spent(LESS),
)  # fmt: skip

RULES: tuple[Rule, ...] = (
    Rule(
        name="other-process", asks="do other programs use the device?", of_run=symptoms.other_process, says="{told}",
        remedies=(
            Remedy(
                do="end them, wait for them, or take another card with --device cuda:N; then diagnose again, as all "
                "figures here were taken beside them", tier="exact", gain=_lost,
            ),
        ),
    ),
    Rule(
        name="throttled", asks="are clocks or cores held down?", of_run=symptoms.throttled, says="{told}",
        remedies=(
            Remedy(
                do="cool the card or raise its power limit; nvidia-smi -q -d PERFORMANCE,POWER tells more",
                tier="exact", gain=_where("by", "clock"),
            ),
            Remedy(do="give the container more of the processor", tier="exact", gain=_where("by", "quota")),
        ),
    ),
    Rule(
        name="quality-loss", asks="is the prediction more than 2 % from the untouched model's?",
        of_run=symptoms.quality_loss,
        says="a prediction is {whole:.2g} (relative L2) from the untouched model's; "
        "{layer} adds {added:.2g}, {share:.0%} of the squares of all blocks'{others}",
        remedies=(
            Remedy(
                do="leave this layer out of what changed it, a setting or a lower precision; "
                "then framefit verify", tier="exact", gain=lambda case, seen: 0.0,
            ),
        ),
    ),
    Rule(
        name="decode-bound", asks="does decoding take a quarter of the run?", of_run=symptoms.decoding,
        says="decoding takes {seconds:.3g} s, {share:.0%} of the run",
        remedies=(
            Remedy(do="compile the decoder and run its convolutions channels-last", tier="exact", gain=_above_ceiling),
            LESS_WORK,
        ),
    ),
    Rule(
        name="recompiles", asks="does it compile again after it was warm?", of_phase=symptoms.recompiles,
        says="torch.compile made {graphs:.3g} graphs again in {lost_s:.3g} s{each}, after everything was warm",
        remedies=(
            Remedy(
                do="keep shapes equal or compile with dynamic=True, and pass numbers that change as tensors "
                "(TORCH_LOGS=recompiles says what changed)", tier="exact", gain=_lost,
            ),
        ),
    ),
    Rule(
        name="allocator-thrash", asks="does the allocator go to the driver in a warm run?", of_phase=symptoms.allocator,
        says="the host spent {seconds:.3g} s{each} to get memory from the driver or to give it back; "
        "{retries:.3g} times the allocator had to empty its cache",
        remedies=(
            Remedy(
                do="leave memory free: end what else holds it, and leave PYTORCH_ALLOC_CONF unset or with "
                "expandable_segments:True", tier="exact", gain=_lost,
            ),
            Remedy(
                do="--set guidance=apart halves the activations", tier="exact", gain=_where("guidance", "together"),
            ),
        ),
    ),
    Rule(
        name="fallback-attention", asks="is attention computed by a slow kernel?", of_phase=symptoms.fallback_attention,
        says="{share:.0%} of the phase is attention {what}: {seconds:.3g} s{each}, most in {kernel}",
        remedies=(
            Remedy(
                do="scaled_dot_product_attention with its fused kernels allowed, in place of products and a softmax",
                tier="exact", gain=_where("why", "parts"),
            ),
            Remedy(do=HALF, tier="near", gain=_where("why", "fp32")),
            Remedy(do=KEPT, tier="near", gain=_where("why", "kept")),
            Remedy(
                do="no mask, heads up to 256 wide, q, k and v contiguous: then FlashAttention or cuDNN takes it",
                tier="exact", gain=_where("why", "mask"),
            ),
        ),
    ),
    Rule(
        name="full-precision", asks="is work in fp32 that half precision does faster here?",
        of_phase=symptoms.full_precision,
        says="{share:.0%} of the phase is work in fp32: {seconds:.3g} s{each}",
        remedies=(
            Remedy(do=HALF, tier="near", gain=_where("precision", "fp32")),
            Remedy(do=KEPT, tier="near", gain=_where("precision", *symptoms.HALF)),
        ),
    ),
    Rule(
        name="transfer-bound", asks="copies between host and card", part="transfer",
        says="{share:.0%} of the phase is copies with nothing beside them: {seconds:.3g} s{each}{beside}",
        remedies=(
            Remedy(do="copy from pinned memory on a stream of its own, beside the compute", tier="exact", gain=_hidden),
            Remedy(do="keep on the card what is copied", tier="exact", gain=_spent(1.0)),
        ),
    ),
    Rule(
        name="launch-gaps", asks="gaps between short kernels", part="gaps",
        says="{share:.0%} of the phase the device waits from one kernel to the next: {seconds:.3g} s{each} "
        "in {launches:.0f} launches",
        remedies=(
            Remedy(do="CUDA graphs or torch.compile: fewer, longer launches", tier="exact", gain=_spent(1.0)),
            Remedy(do="--set guidance=together: both branches in one launch", tier="exact", gain=_together),
        ),
    ),
    Rule(
        name="host-bound", asks="long waits for the host", part="host",
        says="{share:.0%} of the phase the device waits for more than launches: {seconds:.3g} s{each}",
        remedies=(
            Remedy(
                do="see in the trace of framefit profile what the host does there: Python, reading files, .item() "
                "and other waits", tier="exact", gain=_spent(1.0),
            ),
        ),
    ),
    Rule(
        name="attention-bound", asks="attention", part="attention",
        says="{share:.0%} of the phase is attention: {seconds:.3g} s{each}{beside}",
        remedies=(
            Remedy(do="an attention kernel made for this card: FlashAttention 3 or 4", tier="exact",
                   gain=_on_card(FLASH_ATTENTION, (9, 0))),
            Remedy(do="attention in 8 bits: SageAttention 2", tier="near", gain=_on_card(EIGHT_BIT_ATTENTION, (8, 0))),
            Remedy(do="q, k and v contiguous, guidance branches in one call: up to the ceiling", tier="exact",
                   gain=_above_ceiling),
            LESS_WORK,
        ),
    ),
    Rule(
        name="matmul-bound", asks="matrix products", part="matmul",
        says="{share:.0%} of the phase is matrix products: {seconds:.3g} s{each}{beside}",
        remedies=(
            Remedy(do="products in fp8 or int8", tier="near", gain=_on_card(EIGHT_BIT_MATMUL, (8, 9))),
            Remedy(do="larger products, as with both guidance branches in one, and torch.compile: up to the ceiling",
                   tier="exact", gain=_above_ceiling),
            LESS_WORK,
        ),
    ),
    Rule(
        name="convolution-bound", asks="convolutions", part="convolution",
        says="{share:.0%} of the phase is convolutions: {seconds:.3g} s{each}{beside}",
        remedies=(
            Remedy(do="channels-last memory and torch.compile: up to the ceiling", tier="exact", gain=_above_ceiling),
            LESS_WORK,
        ),
    ),
    Rule(
        name="memory-bound", asks="elementwise work", part="elementwise",
        says="{share:.0%} of the phase is arithmetic, norms and copies on the device: {seconds:.3g} s{each}{beside}",
        remedies=(
            Remedy(do="torch.compile fuses it", tier="exact", gain=_spent(FUSED)),
            LESS_WORK,
        ),
    ),
)  # fmt: skip
