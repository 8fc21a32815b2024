"""On a card: every family end to end in bf16 and fp16, and a run that is cut and resumed to the same bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from framefit import video
from framefit.errors import Cancelled
from framefit.families import CHECKPOINTS, Checkpoint
from framefit.families.parts import load_parts
from framefit.passes import apply_all
from framefit.pipeline import Pipeline
from framefit.plan import Plan
from framefit.request import Request
from framefit.run import Options, generate, resume

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card"),
]


def request_for(row: Checkpoint, photo: Path) -> Request:
    return Request(
        image=photo, prompt="a boat drifts", model=str(row.folder), width=96, height=64, num_frames=5, steps=4, seed=7
    )


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("id", CHECKPOINTS)
def test_every_family_runs(
    id: str, precision: str, tiny: Callable[[str], Checkpoint], photo: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.mp4"
    report = generate(request_for(tiny(id), photo), out, Options(precision=precision, checkpoints=tmp_path / "runs"))
    assert len(list(video.read(out))) == 5
    assert report.plan.device.id == "cuda:0"
    assert all(phase.peak_bytes > 0 for phase in report.phases)
    assert not any("fp32" in notice for notice in report.notices)


@pytest.mark.parametrize("id", ["wan2.2-i2v-a14b", "easyanimate-v5.1-7b-inp", "i2vgen-xl"])
def test_a_cut_run_goes_on_to_the_same_frames(
    id: str, tiny: Callable[[str], Checkpoint], photo: Path, tmp_path: Path
) -> None:
    request, root = request_for(tiny(id), photo), tmp_path / "runs"
    generate(request, tmp_path / "whole.mp4", Options(checkpoints=root))
    seen: list[int] = []
    options = Options(checkpoints=root, on_step=lambda s: seen.append(s.index), cancelled=lambda: len(seen) == 2)
    with pytest.raises(Cancelled):
        generate(request, tmp_path / "cut.mp4", options)
    (run,) = root.iterdir()
    report = resume(run.name, None, Options(checkpoints=root))
    assert report.resumed_from_step == 2
    whole, cut = (list(video.read(tmp_path / f"{name}.mp4")) for name in ("whole", "cut"))
    assert all((a == b).all() for a, b in zip(whole, cut, strict=True))


@pytest.mark.parametrize("id", ["wan2.2-i2v-a14b", "easyanimate-v5.1-7b-inp", "i2vgen-xl"])
def test_the_card_agrees_with_the_cpu(
    id: str, tiny: Callable[[str], Checkpoint], make_plan: Callable[..., Plan]
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    row = tiny(id)
    assert row.folder is not None
    plan = make_plan(row)
    latents = []
    for name in ("cpu", "cuda:0"):
        parts = load_parts(row, row.folder, dtype=torch.float32, device=torch.device(name))
        there = replace(plan, device=replace(plan.device, id=name))
        pipeline = Pipeline(there, apply_all(parts, there))
        state = pipeline.encode()
        pipeline.denoise(state)
        latents.append(state.latents.cpu())
    assert (latents[0] - latents[1]).norm() < 1e-3 * latents[0].norm()
