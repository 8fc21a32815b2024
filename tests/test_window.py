"""Windows of a long video: nothing where one covers it, fused without bias, each going on where those before it are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from framefit import recipe, video
from framefit import run as running
from framefit.checkpoint import State
from framefit.errors import UsageError
from framefit.families import CHECKPOINTS, Checkpoint, family_of
from framefit.families.parts import Parts
from framefit.families.windows import Windows
from framefit.passes import apply_all
from framefit.passes.window import correlated, fused
from framefit.pipeline import Pipeline
from framefit.plan import Plan, Window
from framefit.planning import alike, dryrun
from framefit.planning.length import beyond_trained
from framefit.quality import compare, windows
from framefit.testing import tiny_row

Make = Callable[..., Plan]
Tiny = Callable[[str], Checkpoint]
Load = Callable[[Checkpoint], Parts]

LONG = {
    "wan2.2-i2v-a14b": (21, "9:4"),
    "wan2.2-ti2v-5b": (21, "9:4"),
    "easyanimate-v5.1-7b-inp": (21, "9:4"),
    "i2vgen-xl": (7, "4:2"),
}
"""Row -> frames of a video, and its windows: three, of 3 or 4 latent frames."""


def denoised(plan: Plan, parts: Parts, steps: int | None = None) -> torch.Tensor:
    pipeline = Pipeline(plan, apply_all(parts, plan))
    state = pipeline.encode()
    pipeline.denoise(state)
    return state.latents


@pytest.mark.parametrize("id", LONG)
def test_a_window_that_covers_the_video_changes_nothing(id: str, tiny: Tiny, make_plan: Make, load_fp32: Load) -> None:
    row = tiny(id)
    for value in ("5:4", "9:4")[: 1 + (id == "wan2.2-i2v-a14b")]:
        found = [
            denoised(make_plan(row, steps=2, settings=settings), load_fp32(row)) for settings in ({}, {"window": value})
        ]
        assert torch.equal(*found)


@pytest.mark.parametrize("id", LONG)
def test_windows_go_on_where_those_before_them_are(
    id: str, tiny: Tiny, make_plan: Make, load_fp32: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call sees a window of frames only, and its first frame is what the ones before say that it will be."""
    row = tiny(id)
    frames, value = LONG[id]
    plan = make_plan(row, num_frames=frames, steps=2, guidance=(1.0,), settings={"window": value})
    pipeline = Pipeline(plan, apply_all(load_fp32(row), plan))
    family, seen = family_of(row), []
    predict = family.predict

    def spied(parts: Parts, expert: str, latents: torch.Tensor, t: Any, conditioning: Any, branches: slice) -> Any:
        prediction = predict(parts, expert, latents, t, conditioning, branches)
        seen.append((latents, conditioning, prediction.float()))
        return prediction

    monkeypatch.setattr(family, "predict", spied)
    state = pipeline.encode()
    noisy, photo = state.latents.clone(), {k: v.clone() for k, v in state.conditioning.items()}
    pipeline.denoise(state, cancelled=lambda: False)
    assert pipeline.parts.windows is not None
    spans = pipeline.parts.windows.spans(noisy.shape[2])
    assert len(seen) == 2 * len(spans) == 6
    assert {latents.shape[2] for latents, _, _ in seen} == {pipeline.parts.windows.length}
    for (latents, _, _), span in zip(seen, spans, strict=False):
        assert torch.equal(latents, noisy[:, :, span])
    name = {"wan2.2-ti2v-5b": "first_frame", "easyanimate-v5.1-7b-inp": "inpaint"}.get(id, "image")
    first, second = (seen[i][1][name] for i in (0, 1))
    channels = noisy.shape[1]
    assert torch.equal(first[:, :, 0], photo[name][:, :, 0])
    schedule = pipeline._schedule()
    start = slice(spans[1].start, spans[1].start + 1)
    said = schedule.denoised(seen[0][2][:, :, start], 0, noisy[:, :, start])
    assert torch.allclose(second[:, -channels:, :1], said, atol=1e-5)
    assert torch.equal(second[:, :-channels, :1], photo[name][:, :-channels, :1]), "given, as the photo is"
    if id == "i2vgen-xl":
        assert torch.allclose(first[0, 0, 1:, 0, 0], torch.tensor([1 / 3, 2 / 3, 1.0])), "places in the window"
    pieces = family.settle(state.latents, state.conditioning)
    assert pieces.isfinite().all()


@pytest.mark.parametrize("id", ["wan2.2-i2v-a14b", "easyanimate-v5.1-7b-inp", "i2vgen-xl"])
def test_guidance_offload_and_resume_are_as_without(id: str, tiny: Tiny, make_plan: Make, load_fp32: Load) -> None:
    row = tiny(id)
    frames, value = LONG[id]
    states: list[State] = []

    def plan(**settings: str) -> Plan:
        return make_plan(row, num_frames=frames, steps=3, settings={"window": value} | settings)

    pipeline = Pipeline(plan(guidance="apart"), apply_all(load_fp32(row), plan(guidance="apart")))
    state = pipeline.encode()
    pipeline.denoise(state, save=lambda state: states.append(state.snapshot()))
    again = states[0]
    Pipeline(pipeline.plan, pipeline.parts).denoise(again)
    assert torch.equal(again.latents, state.latents)
    parts = load_fp32(row)
    for tensor in (
        t for part in parts.components.values() if isinstance(part, torch.nn.Module) for t in part.parameters()
    ):
        tensor.data = tensor.data.clone()
    moved = denoised(plan(guidance="apart", offload="block"), load_fp32(row))
    assert (moved - denoised(plan(guidance="apart"), parts)).abs().max() <= 1e-5 * moved.abs().max()
    together = denoised(plan(guidance="together"), load_fp32(row))
    assert (together - state.latents).abs().max() <= 1e-5 * state.latents.abs().max()


DIVISIONS = [Windows(length=length, overlap=overlap) for length, overlap in ((5, 2), (5, 4), (4, 1), (2, 1), (16, 12))]


@pytest.mark.parametrize("division", DIVISIONS)
def test_windows_cover_all_and_their_weights_add_up(division: Windows) -> None:
    for frames in range(division.length + 1, 40):
        spans, total = division.spans(frames), torch.zeros(frames)
        assert {span.stop - span.start for span in spans} == {division.length}
        assert (spans[0].start, spans[-1].stop) == (0, frames)
        assert all(b.start <= a.stop - division.overlap for a, b in pairwise(spans))
        for span, weight in zip(spans, division.weights(frames), strict=True):
            total[span] += weight
            assert weight[0] == (span.start == 0)
        assert torch.allclose(total, torch.ones(frames))
    assert division.spans(division.length - 1) == [slice(0, division.length - 1)]


def wan(division: Windows) -> tuple[Parts, torch.Tensor, dict[str, torch.Tensor]]:
    parts = Parts(tiny_row("wan2.2-i2v-a14b"), {}, torch.device("cpu"), windows=division)
    generator = torch.Generator().manual_seed(0)
    return parts, torch.randn(1, 16, 13, 2, 2, generator=generator), {"image": torch.zeros(1, 20, 13, 2, 2)}


def unbiased(division: Windows) -> float:
    """How far the fused prediction is from that of the whole, where frames are nothing to each other."""
    parts, latents, conditioning = wan(division)
    found = fused(parts, lambda x, _: 3 * x + 1, latents, conditioning, lambda prediction, frames: prediction)
    return float((found - (3 * latents + 1)).abs().max())


@pytest.mark.parametrize("division", DIVISIONS)
def test_fusing_adds_nothing_of_its_own(division: Windows) -> None:
    if division.length < 13:
        assert unbiased(division) <= 1e-5


def test_weights_that_do_not_add_up_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(self: Windows, frames: int) -> list[torch.Tensor]:
        place = torch.arange(self.length)
        return [torch.minimum(place + (s.start == 0), self.length - place).float() for s in self.spans(frames)]

    monkeypatch.setattr(Windows, "weights", plain)
    assert unbiased(DIVISIONS[0]) > 0.1


def test_noise_of_later_frames_is_that_of_earlier_ones() -> None:
    parts, noise, _ = wan(Windows(length=5, overlap=2))
    found = correlated(parts, noise, torch.Generator().manual_seed(1))
    assert torch.equal(found[:, :, :5], noise[:, :, :5])
    for start in (5, 8):
        earlier = {float(frame.sum()) for frame in found[:, :, start - 5 : start - 2].unbind(2)}
        assert {float(frame.sum()) for frame in found[:, :, start : start + 3].unbind(2)} == earlier
    assert torch.equal(found, correlated(parts, noise, torch.Generator().manual_seed(1)))
    parts.windows = None
    assert correlated(parts, noise, torch.Generator()) is noise


# before it runs


def wide() -> Checkpoint:
    """Tiny, with activations that outweigh the video's latents, as at true size."""
    row = tiny_row("wan2.2-i2v-a14b")
    heads = {"num_attention_heads": 24}
    components = (replace(c, config=c.config | heads) if "transformer" in c.name else c for c in row.components)
    return replace(row, components=tuple(components), folder=Path("/none"))


def test_the_dry_run_holds_a_window_and_counts_all(make_plan: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    row = wide()

    def trace(frames: int, value: str) -> Any:
        plan = make_plan(row, num_frames=frames, width=256, height=160, settings={"window": value})
        return next(p for p in dryrun.trace(plan, row) if p.name == "denoise:transformer")

    whole, divided, trained = trace(29, "none"), trace(29, "9:4"), trace(9, "none")
    assert divided.peak_bytes < 0.6 * whole.peak_bytes
    assert divided.peak_bytes < 1.4 * trained.peak_bytes
    count = len(Windows(length=3, overlap=1).spans(8))
    assert count == 4
    assert divided.flops == {kind: count * flops for kind, flops in trained.flops.items()}
    monkeypatch.setattr(alike, "_as_before", lambda forward, last, live, tally, *args, **facts: forward(*args, **facts))
    assert divided == trace(29, "9:4"), "the second window stands for the rest"


@pytest.mark.parametrize(
    ("id", "value", "says"),
    [
        ("wan2.2-i2v-a14b", "17", "use window=none or window=FRAMES:OVERLAP"),
        ("wan2.2-i2v-a14b", "17:17", "is unknown"),
        ("wan2.2-i2v-a14b", "17:0", "is unknown"),
        ("wan2.2-i2v-a14b", "16:5", "takes windows of 4n.1 frames .* use window=13:4"),
        ("wan2.2-i2v-a14b", "17:6", "use window=17:4"),
    ],
)
def test_windows_that_cannot_be_are_refused(id: str, value: str, says: str, make_plan: Make) -> None:
    with pytest.raises(UsageError, match=says):
        make_plan(replace(tiny_row(id), folder=Path("/x")), settings={"window": value})


def test_a_video_beyond_the_trained_length_is_told(make_plan: Make, tiny: Tiny, tmp_path: Path) -> None:
    row = replace(tiny("i2vgen-xl"), frames=replace(CHECKPOINTS["i2vgen-xl"].frames, trained=4))
    plan = make_plan(row, num_frames=7)
    assert "trained on 4 frames and sees 7 at once" in plan.reasons["num_frames"]
    assert "--set window=4:2" in beyond_trained(plan, row)
    assert beyond_trained(make_plan(row, num_frames=4), row) == ""
    divided = make_plan(row, num_frames=7, settings={"window": "4:2"})
    assert beyond_trained(divided, row) == ""
    assert divided.setting(Window).tier == "lossy"
    assert plan.setting(Window).tier == "exact"
    options = running.Options(device="cpu", checkpoints=None)
    report = running._execute(row, plan, "weights", tmp_path / "out", options, None)
    assert any("--set window=4:2" in notice for notice in report.notices)


# what came out


def clip(frames: int = 33, *, jump_at: int | None = None, later: Callable[[Any, int], Any] = lambda f, i: f) -> Any:
    """A texture that moves two px a frame; at `jump_at` it jumps, and `later` changes frames."""
    y, x = np.mgrid[0:48, 0:64]
    made = []
    for index in range(frames):
        at = 2 * index + (9 if jump_at is not None and index >= jump_at else 0)
        light = 110 + 50 * np.sin((x - at) / 3.0) + 40 * np.cos(y / 4.0 + (x - at) / 11.0)
        frame = np.stack([light, light * 0.9, light * 0.8], axis=-1)
        made.append(later(frame, index).clip(0, 255).astype(np.uint8))
    return np.stack(made)


SPANS = ((0, 17), (13, 29), (17, 33))


def test_windows_are_read_from_the_file_that_names_them(make_plan: Make, tiny: Tiny) -> None:
    row = tiny("wan2.2-i2v-a14b")
    for value, expected in (("17:8", SPANS), ("33:8", ()), ("none", ())):
        plan = make_plan(row, num_frames=33, settings={"window": value})
        assert windows.spans(recipe.parameters(row, plan, "weights", 18), 33) == expected
    assert Windows(length=4, overlap=2).frames(7, 1) == [(0, 4), (3, 6), (4, 7)]
    for nothing in (None, {}, {"windows": 3}, {"windows": [[0, 17]]}, {"windows": [[0, 17], [13, 40]]}):
        assert windows.spans(nothing, 33) == ()


def test_a_jump_at_a_join_is_seen_and_one_elsewhere_is_not() -> None:
    pytest.importorskip("cv2")
    pytest.importorskip("skimage")
    even, at_join = windows.measure(clip(), SPANS), windows.measure(clip(jump_at=17), SPANS)
    assert 0.8 < even.join < 1.2
    assert at_join.join > 1.8
    assert at_join.at == 17
    assert windows.measure(clip(jump_at=23), SPANS).join < 1.2


@pytest.mark.parametrize("what", ["colour", "sharpness", "motion"])
def test_what_later_windows_lose_is_seen(what: str) -> None:
    pytest.importorskip("cv2")
    pytest.importorskip("skimage")

    def changed(frame: Any, index: int) -> Any:
        if what == "colour":
            return frame + np.array([1.5, 0, -1.0]) * max(0, index - 8)
        return frame.mean() + (frame - frame.mean()) * (0.5 if index >= 17 else 1) if what == "sharpness" else frame

    video_ = clip(later=changed)
    if what == "motion":
        video_ = np.concatenate([video_[:17], np.repeat(video_[17:25], 2, axis=0)])
    found, even = windows.measure(video_, SPANS), windows.measure(clip(), SPANS)
    assert even.colour[-1] < 0.5
    assert even.sharpness[-1] == pytest.approx(1, abs=0.05)
    assert even.motion[-1] == pytest.approx(1, abs=0.1)
    if what == "colour":
        assert found.colour[0] == 0 < found.colour[1] < found.colour[2]
        assert found.colour[2] > 5
    else:
        assert getattr(found, what)[-1] == pytest.approx(0.5, abs=0.12)


def test_compare_tells_of_windows(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    pytest.importorskip("skimage")
    for name, parameters in (("ours", {"windows": SPANS}), ("reference", {})):
        frames = clip(jump_at=17 if parameters else None)
        made = video.Video(frames=iter(frames), num_frames=33, width=64, height=48, fps=8)
        video.write(made, tmp_path / name, parameters=parameters)
    found = compare(tmp_path / "ours", tmp_path / "reference", metrics=["psnr"])
    assert found.windows is not None
    assert found.windows.at == 17
    assert any("made in 3 windows" in note for note in found.notes)
    assert found.to_json()["windows"]["join"] > 1.8
    assert compare(tmp_path / "reference", tmp_path / "ours", metrics=["psnr"]).windows is None
