"""Every exact pass for memory at once: a whole run is the run without any, for every family."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from framefit.families import Checkpoint
from framefit.families.parts import Parts
from framefit.families.pieces import Pieces
from framefit.passes import apply_all, chunk, offload, strips
from framefit.pipeline import Pipeline
from framefit.plan import Plan

TOGETHER: dict[str, list[dict[str, str]]] = {
    "wan2.2-i2v-a14b": [
        {"chunk": "rows:7", "decode": "ram:40", "offload": "leaf"},
        {"chunk": "rows:16384", "decode": "tile:40", "offload": "disk:1"},
        {"chunk": "rows:5", "decode": "frame", "offload": "block:1"},
    ],
    "wan2.2-ti2v-5b": [
        {"chunk": "rows:5", "decode": "ram:64", "offload": "block"},
        {"chunk": "rows:7", "decode": "ram", "offload": "disk"},
    ],
    "wan2.1-i2v-14b-480p": [{"chunk": "rows:7", "decode": "ram:40", "offload": "disk"}],
    "easyanimate-v5.1-7b-inp": [
        {"guidance": "apart", "chunk": "rows:7", "decode": "ram", "offload": "block:1"},
        {"guidance": "together", "chunk": "rows:5", "decode": "frame", "offload": "leaf"},
    ],
    "easyanimate-v5-7b-zh-inp": [{"guidance": "apart", "chunk": "rows:7", "offload": "disk"}],
    "i2vgen-xl": [
        {"guidance": "apart", "chunk": "rows:200", "offload": "leaf"},
        {"guidance": "together", "chunk": "rows:200", "offload": "block:2"},
    ],
}
WIDTH, HEIGHT = 128, 96
WITHIN = 1e-5


@pytest.mark.parametrize("id", TOGETHER)
def test_all_passes_at_once_give_the_same_video(
    id: str,
    tiny: Callable[[str], Checkpoint],
    make_plan: Callable[..., Plan],
    load_fp32: Callable[[Checkpoint], Parts],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(strips, "STRIP_BYTES", 200_000)
    row = tiny(id)

    def made(settings: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
        plan = make_plan(row, settings=settings, guidance=(4.0,), width=WIDTH, height=HEIGHT, steps=3)
        parts = apply_all(load_fp32(row), plan)
        pipeline = Pipeline(plan, parts, ladder=False)
        state = pipeline.encode()
        pipeline.denoise(state)
        frames = np.stack(list(pipeline.decode(state))).astype(int)
        placement, modules = offload.placed(parts), parts[row.experts[0]].modules()
        assert (placement is not None and placement.transfer.moved_bytes > 0) == ("offload" in settings)
        assert any(chunk.chunked(module) for module in modules) == ("chunk" in settings)
        assert (parts.pieces != Pieces()) == ("decode" in settings)
        return state.latents.numpy().copy(), frames

    latents, frames = made({})
    assert latents.std() > 0.1
    assert frames.std() > 1
    for settings in TOGETHER[id]:
        found, seen = made(settings)
        assert np.linalg.norm(found - latents) <= WITHIN * np.linalg.norm(latents), settings
        assert np.abs(seen - frames).max() <= 1, settings
