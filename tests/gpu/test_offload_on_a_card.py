"""On a card: weights that come and go give the same bits, in the memory that was said, and their copies hide."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from framefit.bench import inputs
from framefit.device import Device
from framefit.families import Checkpoint
from framefit.families.parts import Parts, load_parts
from framefit.passes import apply_all, offload
from framefit.pipeline import Pipeline
from framefit.plan import Plan
from framefit.planning import choose, dryrun
from framefit.request import Request
from framefit.testing import random_parts, randomise, tiny_row

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card"),
]

CARD = torch.device("cuda:0")
MOVING = ["part", "block", "block:1", "leaf", "disk", "disk:1"]
SIZE = (832, 480, 81)
MEDIUM = {"num_attention_heads": 16, "attention_head_dim": 128, "ffn_dim": 8192, "num_layers": 12, "freq_dim": 256}
"""Wan's transformer with blocks of 134 MB, which compute for several ms on an H200."""


def made(plan: Plan, parts: Parts) -> tuple[torch.Tensor, np.ndarray[Any, Any]]:
    pipeline = Pipeline(plan, parts)
    state = pipeline.encode()
    pipeline.denoise(state)
    return state.latents, np.stack(list(pipeline.decode(state)))


@pytest.mark.parametrize("id", ["wan2.2-i2v-a14b", "wan2.1-i2v-14b-480p", "easyanimate-v5.1-7b-inp", "i2vgen-xl"])
def test_the_same_video_to_the_last_bit(
    id: str, tiny: Callable[[str], Checkpoint], make_plan: Callable[..., Plan]
) -> None:
    row = tiny(id)
    assert row.folder is not None
    found = {}
    for value in ("none", *MOVING):
        plan = make_plan(row, guidance=(4.0,), settings={"offload": value})
        plan = replace(plan, precision="bf16", device=replace(plan.device, id="cuda:0"))
        parts = load_parts(row, row.folder, dtype=torch.bfloat16, device=CARD, on_host=value != "none")
        found[value] = made(plan, apply_all(parts, plan))
    for value in MOVING:
        assert torch.equal(found[value][0], found["none"][0]), value
        assert np.array_equal(found[value][1], found["none"][1]), value


@pytest.fixture(scope="module")
def medium() -> Checkpoint:
    """Wan2.2-A14B with experts of a medium size and everything else tiny."""
    row = tiny_row("wan2.2-i2v-a14b")
    components = tuple(
        replace(component, config=dict(component.config) | MEDIUM) if component.name in row.experts else component
        for component in row.components
    )
    return replace(row, components=components)


def planned(row: Checkpoint, value: str, photo: Path) -> Plan:
    width, height, num_frames = SIZE
    request = Request(
        image=photo, prompt="waves", model=row.id, width=width, height=height, num_frames=num_frames, seed=1,
        guidance=(1.0,),
    )  # fmt: skip
    return choose(
        request, row, Device.detect("cuda"), photo_size=(width, height), settings={"offload": value}, precision="bf16"
    )  # fmt: skip


class Work:
    """One prediction of each expert of the medium model, at 832x480x81."""

    def __init__(self, row: Checkpoint, photo: Path) -> None:
        self.row, self.photo = row, photo
        torch.manual_seed(0)
        self.parts = random_parts(row, dtype=torch.bfloat16, device=CARD)
        generator = torch.Generator(CARD).manual_seed(0)
        for part in self.parts.components.values():
            if isinstance(part, nn.Module):
                randomise(part, generator)
        self.latents = inputs.latents(row, SIZE, CARD)
        self.conditioning = inputs.conditioning(row, SIZE, 1, CARD)

    def arrange(self, value: str) -> None:
        """From here on the weights are where `value` says."""
        self.plan = planned(self.row, value, self.photo)
        self.pipeline = Pipeline(self.plan, apply_all(self.parts, self.plan))
        gc.collect()
        torch.cuda.empty_cache()

    def predict(self, expert: str) -> torch.Tensor:
        with torch.no_grad():
            t = torch.tensor(900.0, device=CARD)
            return self.pipeline.predict(expert, self.latents, t, self.conditioning, 1.0)

    def seconds(self, expert: str) -> float:
        """Of one prediction, the median of five."""
        self.predict(expert)
        found = []
        for _ in range(5):
            torch.cuda.synchronize()
            began = time.perf_counter()
            self.predict(expert)
            torch.cuda.synchronize()
            found.append(time.perf_counter() - began)
        return median(found)

    def peak_bytes(self, expert: str) -> int:
        torch.cuda.reset_peak_memory_stats()
        self.predict(expert)
        return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("value", ["block", "block:4", "leaf", "disk"])
def test_memory_time_and_bits_of_a_medium_model(value: str, medium: Checkpoint, photo: Path) -> None:
    gc.collect()
    some = torch.ones(256, 256, dtype=torch.bfloat16, device=CARD)
    nn.functional.linear(some, some, some[0])  # cuBLAS's workspaces, which no prediction of tensors holds
    before = torch.cuda.memory_allocated()
    work = Work(medium, photo)
    first, second = medium.experts
    work.arrange("none")
    resident = {expert: work.predict(expert) for expert in medium.experts}
    resident_s = work.seconds(first)
    weights = sum(t.nbytes for part in work.parts.components.values() if isinstance(part, nn.Module)
                  for t in {id(t): t for t in (*part.parameters(), *part.buffers())}.values())  # fmt: skip

    work.arrange(value)
    placement = offload.placed(work.parts)
    assert placement is not None
    pinned = placement.transfer.pinned_bytes
    if value != "disk":
        assert 0.98 * weights < pinned < 1.02 * weights
    for expert in (first, second, first):
        assert torch.equal(work.predict(expert), resident[expert]), expert

    said = {phase.name: phase for phase in dryrun.trace(work.plan, medium)}
    still = sum(tensor.nbytes for tensor in resident.values())  # kept by this test
    for expert in medium.experts:
        phase = said[f"denoise:{expert}"]
        predicted = sum(phase.weights_bytes.values()) + phase.peak_bytes
        work.parts.use()
        measured = work.peak_bytes(expert) - still - before
        assert measured == pytest.approx(predicted, rel=0.05), expert

    if value == "disk":
        assert placement.transfer.pinned_bytes == said[f"denoise:{first}"].pinned_bytes
    offloaded_s = work.seconds(first)
    moved = placement.transfer.moved_bytes
    work.predict(first)
    assert placement.transfer.moved_bytes - moved == said[f"denoise:{first}"].bytes["host_to_device"]
    if value != "disk":  # its time is the disk's
        assert offloaded_s < (1.3 if value == "leaf" else 1.15) * resident_s

    work.parts.use()
    work.pipeline.close()
    transfer = placement.transfer
    del work, placement, phase, said
    resident.clear()
    gc.collect()
    assert transfer.pinned_bytes == 0
    assert torch.cuda.memory_allocated() <= before + 2**26
