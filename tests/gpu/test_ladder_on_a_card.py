"""On a card: memory that really runs out, under a cap that comes down in mid-run, and the video that comes of it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from framefit.bench import inputs
from framefit.checkpoint import State
from framefit.device import Device
from framefit.errors import DoesNotFit
from framefit.families import Checkpoint
from framefit.families.parts import Parts, weights
from framefit.passes import apply_all
from framefit.pipeline import Pipeline, Step
from framefit.plan import Plan
from framefit.planning import choose
from framefit.request import Request
from framefit.testing import random_parts, randomise, tiny_row

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card"),
]

CARD = torch.device("cuda:0")
SIZE = (832, 480, 81)
STEPS = 4
MEDIUM = {"num_attention_heads": 16, "attention_head_dim": 128, "ffn_dim": 8192, "num_layers": 12, "freq_dim": 256}
"""Wan's transformer with blocks of 134 MB: an expert of 1.6 GB beside activations of about as much."""


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """The whole card, before and after."""
    torch.cuda.init()
    fraction = torch.cuda.get_per_process_memory_fraction(CARD)
    yield
    torch.cuda.set_per_process_memory_fraction(fraction, CARD)
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def row() -> Checkpoint:
    """Wan2.2-A14B with experts of a medium size and everything else tiny."""
    row = tiny_row("wan2.2-i2v-a14b")
    components = tuple(
        replace(component, config=dict(component.config) | MEDIUM) if component.name in row.experts else component
        for component in row.components
    )
    return replace(row, components=components)


def made(row: Checkpoint) -> Parts:
    torch.manual_seed(0)
    parts = random_parts(row, dtype=torch.bfloat16, device=CARD)
    generator = torch.Generator(CARD).manual_seed(0)
    for part in parts.components.values():
        if isinstance(part, nn.Module):
            randomise(part, generator)
    return parts


def planned(row: Checkpoint, photo: Path, settings: dict[str, str] | None = None) -> Plan:
    width, height, num_frames = SIZE
    request = Request(
        image=photo, prompt="waves", model=row.id, width=width, height=height, num_frames=num_frames, seed=1,
        guidance=(1.0,), steps=STEPS,
    )  # fmt: skip
    return choose(
        request, row, Device.detect("cuda"), photo_size=(width, height), settings=settings, precision="bf16"
    )  # fmt: skip


def begun(row: Checkpoint) -> State:
    return State(
        step=0, latents=inputs.latents(row, SIZE, CARD), conditioning=inputs.conditioning(row, SIZE, 1, CARD),
        scheduler={},
    )  # fmt: skip


def expert_bytes(parts: Parts) -> int:
    return sum(tensor.nbytes for tensor in weights(parts["transformer"]))


def peak_of(work: Callable[[], object]) -> int:
    """Most bytes allocated by torch meanwhile."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(CARD)
    work()
    return torch.cuda.max_memory_allocated(CARD)


def cap(bytes: int) -> None:
    """From here on torch reserves no more."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CARD).total_memory
    torch.cuda.set_per_process_memory_fraction(bytes / total, CARD)


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative L2."""
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("values", [["part"], ["part", "block"]], ids=["one rung", "two rungs"])
def test_denoising_goes_on_from_the_same_step(values: list[str], row: Checkpoint, photo: Path) -> None:
    """The cap comes down after the second step: by half an expert, or by one and a half. Chunks, a rung above, are
    asked for."""
    plan, parts = planned(row, photo, {"chunk": "rows"}), made(row)
    apply_all(parts, plan)
    expected = begun(row)
    most = peak_of(lambda: Pipeline(plan, parts).denoise(expected))
    limit = most - expert_bytes(parts) * (2 * len(values) - 1) // 2
    steps: list[int] = []

    def lower(step: Step) -> None:
        steps.append(step.index)
        if step.index == 2:
            cap(limit)
        if step.index == 3:
            torch.cuda.reset_peak_memory_stats(CARD)

    state, pipeline = begun(row), Pipeline(plan, parts)
    pipeline.denoise(state, on_step=lower)
    assert [rung.after for rung in pipeline.rungs] == values
    assert {(rung.setting, rung.step, rung.phase.partition(":")[0]) for rung in pipeline.rungs} == {
        ("offload", 2, "denoise")
    }
    assert all(rung.asked_bytes and rung.held_bytes for rung in pipeline.rungs)
    assert pipeline.rungs[0].held_bytes > 2 * expert_bytes(parts)
    assert steps == [1, 2, 3, 4]
    assert torch.cuda.max_memory_allocated(CARD) <= limit
    # bf16: another algorithm of cuDNN's for the patches may round otherwise; blocks do the same on the same bits
    assert far(state.latents, expected.latents) <= 1e-2


def test_decoding_begins_again_with_the_vae_alone(row: Checkpoint, photo: Path) -> None:
    """What decodes in less, a rung above, is asked for."""
    plan, parts = planned(row, photo, {"decode": "tile:128"}), made(row)
    apply_all(parts, plan)
    frames: list[np.ndarray] = []
    state = begun(row)
    state.step = STEPS
    most = peak_of(lambda: frames.extend(Pipeline(plan, parts).decode(state)))
    pipeline = Pipeline(plan, parts)
    cap(most - expert_bytes(parts))  # of the two that are in the way
    found = list(pipeline.decode(state))
    assert [(rung.phase, rung.setting, rung.before, rung.after) for rung in pipeline.rungs] == [
        ("decode", "offload", "none", "part")
    ]
    assert state.rungs == pipeline.rungs
    assert len(found) == len(frames) == SIZE[2]
    assert max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(found, frames, strict=True)) <= 1
    assert "memory ran out in decode" in pipeline.ledger.notices[0]


def test_what_the_user_asked_for_ends_the_run(row: Checkpoint, photo: Path) -> None:
    plan, parts = planned(row, photo, {"offload": "none"}), made(row)
    apply_all(parts, plan)
    state, pipeline = begun(row), Pipeline(plan, parts)
    most = peak_of(lambda: Pipeline(plan, parts).denoise(begun(row)))
    cap(most - expert_bytes(parts) // 2)
    with pytest.raises(DoesNotFit, match=r"ran out of memory in the phase denoise.*leave out --set offload=none"):
        pipeline.denoise(state)
    assert state.step == 0
    torch.cuda.set_per_process_memory_fraction(1.0, CARD)
    pipeline.denoise(state)  # nothing of what broke off is in the way
    assert state.step == STEPS
