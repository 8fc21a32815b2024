"""Weights that come and go: the same bits as weights that stay, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from framefit.families import CHECKPOINTS, Checkpoint
from framefit.families.parts import Parts, load_parts
from framefit.ledger.transfer import Slab
from framefit.passes import apply_all
from framefit.pipeline import Pipeline
from framefit.plan import Offload, Plan

MOVING = ["part", "block", "block:1", "leaf"]
FAMILIES = ["wan2.2-i2v-a14b", "easyanimate-v5.1-7b-inp", "i2vgen-xl"]

Make = Callable[..., Plan]
Tiny = Callable[[str], Checkpoint]


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights on the host are NaN to whoever computes with them there, as on a card they would be out of reach."""
    pack = Slab.pack

    def packed(self: Slab, memory: Callable[[int], torch.Tensor]) -> None:
        pack(self, memory)
        self._home = [
            torch.full_like(home, torch.nan) if home.is_floating_point() else torch.zeros_like(home)
            for home in self._home
        ]
        self.point(None)

    monkeypatch.setattr(Slab, "pack", packed)


@pytest.fixture(scope="module")
def loaded() -> Callable[[Checkpoint], Parts]:
    """Parts that no pass has touched, read once."""
    read: dict[str, Parts] = {}

    def load(row: Checkpoint) -> Parts:
        assert row.folder is not None
        if row.id not in read:
            read[row.id] = fresh(row)
            for tensor in tensors(read[row.id]):  # out of the file's pages: kernels round by alignment
                tensor.data = tensor.data.clone()
        return read[row.id]

    return load


def tensors(parts: Parts) -> Iterator[torch.Tensor]:
    for part in parts.components.values():
        if isinstance(part, nn.Module):
            yield from (*part.parameters(), *part.buffers())


def fresh(row: Checkpoint) -> Parts:
    assert row.folder is not None
    return load_parts(row, row.folder, dtype=torch.float32, device=torch.device("cpu"))


def made(plan: Plan, parts: Parts) -> tuple[torch.Tensor, np.ndarray[Any, Any]]:
    pipeline = Pipeline(plan, parts)
    state = pipeline.encode()
    pipeline.denoise(state)
    return state.latents, np.stack(list(pipeline.decode(state)))


def same(a: tuple[Any, Any], b: tuple[Any, Any]) -> bool:
    return torch.equal(a[0], b[0]) and np.array_equal(a[1], b[1])


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("value", MOVING)
@pytest.mark.parametrize("id", CHECKPOINTS)
def test_the_same_video_to_the_last_bit(
    id: str, value: str, tiny: Tiny, make_plan: Make, loaded: Callable[[Checkpoint], Parts]
) -> None:
    row = tiny(id)
    for guidance in ((4.0,), (1.0,)):
        still = make_plan(row, guidance=guidance)
        expected = made(still, apply_all(loaded(row), still))
        plan = make_plan(row, guidance=guidance, settings={"offload": value})
        parts = apply_all(fresh(row), plan)
        assert plan.setting(Offload).value == value
        first = made(plan, parts)
        assert first[0].std() > 0.1
        assert same(first, expected)
        assert same(made(plan, parts), expected), "the same pipeline once more"
