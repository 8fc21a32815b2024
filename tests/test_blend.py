"""Tiles that do with half of their halo and fade into each other: how near they are, and how a seam is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_decode import HEIGHT, WAN, WAN_5B, WIDTH, given, ours, reference
from test_dryrun import legal, plan_of
from torch import nn

from framefit import recipe, video
from framefit.families import CHECKPOINTS, Checkpoint, fading, pieces, wan_vae
from framefit.families.parts import Parts, load_parts
from framefit.families.pieces import Pieces
from framefit.passes import apply_all, change, decode, offload
from framefit.pipeline import Pipeline
from framefit.plan import Decode, Offload, Plan
from framefit.planning import dryrun
from framefit.planning.candidates import CANDIDATES, ladder
from framefit.planning.ladder import lower
from framefit.quality import compare, tiles
from framefit.quality.sanity import Watch
from framefit.request import Request
from framefit.run import Options, generate
from framefit.testing import random_parts, randomise, tiny_row

Make = Callable[..., Plan]
Tiny = Callable[[str], Checkpoint]

RANDOM = torch.Generator().manual_seed(3)


@pytest.fixture(scope="module")
def vaes() -> dict[str, Parts]:
    made = {}
    for id in (WAN, WAN_5B):
        made[id] = random_parts(tiny_row(id), dtype=torch.float32, device=torch.device("cpu"))
        randomise(made[id]["vae"], torch.Generator().manual_seed(0))
    return made


@pytest.fixture
def in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the VAE makes, before it is rounded to 255 levels."""
    monkeypatch.setattr(wan_vae, "to_frames", lambda video: video[0].permute(1, 2, 3, 0).clone())
    monkeypatch.setattr(pieces.np, "uint8", np.float32)


def error(parts: Parts, px: int) -> float:
    """Largest, over the largest value."""
    with torch.no_grad():
        latents, _ = given(parts, frames=2)
        frames = reference(parts, latents)
        blended = ours(replace(parts, pieces=Pieces(tile_px=px, blend=True)), latents)
    assert blended.shape == frames.shape
    return float((blended - frames).abs().max() / frames.abs().max())


# the tiles


@pytest.mark.parametrize(("id", "px"), [(WAN, 88), (WAN, 40), (WAN_5B, 128)])
def test_with_all_of_the_halo_they_equal_the_whole(
    id: str, px: int, vaes: dict[str, Parts], in_float: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And fading changes nothing then; with less they differ, the more the less there is."""
    found = []
    for share in (1.0, 0.5, 0.0):
        monkeypatch.setattr(fading, "SHARE", share)
        found.append(error(vaes[id], px))
    assert found[0] <= 1e-5 < found[1] < found[2]


@pytest.mark.parametrize("broken", ["ramp", "corner", "halo"])
def test_what_breaks_them_is_seen(
    broken: str, vaes: dict[str, Parts], in_float: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fading, "SHARE", 1.0)
    fade = fading.fade
    if broken == "ramp":  # what was there counts, and the tile too
        monkeypatch.setattr(torch, "lerp", lambda old, new, ramp: old * (1 - ramp) + new)
    elif broken == "corner":  # fades from what nobody has painted
        monkeypatch.setattr(pieces, "fade", lambda before, part, corner, over: fade(before * 0, part, corner, over))
    else:
        monkeypatch.setattr(wan_vae, "narrowed", lambda halo, scale: max(0, fading.narrowed(halo, scale) - 3))
    assert error(vaes[WAN], 40) > 1e-4


@pytest.mark.parametrize("corner", [(0, 8), (8, 0), (8, 8), (0, 0)])
def test_what_fades_in_and_what_fades_out_add_up_to_one(corner: tuple[int, int]) -> None:
    ones, zeros = torch.ones(2, 12, 10, 3), torch.zeros(2, 12, 10, 3)
    coming, going = ones.clone(), zeros.clone()
    fading.fade(zeros, coming, corner, 4)
    fading.fade(ones, going, corner, 4)
    assert torch.allclose(coming + going, ones)
    assert (coming.diff(dim=1) >= 0).all()
    assert (coming.diff(dim=2) >= 0).all()
    assert (coming[:, 0, 9, 0] < 0.2).all() == (corner[0] > 0)
    assert (coming[:, 11, 0, 0] < 0.2).all() == (corner[1] > 0)
    assert (coming[:, 4:, 4:] == 1).all()


def test_frames_are_whole_and_in_255_levels(vaes: dict[str, Parts]) -> None:
    latents, _ = given(vaes[WAN], frames=2)
    with torch.no_grad():
        whole = ours(vaes[WAN], latents).int()
        blended = ours(replace(vaes[WAN], pieces=Pieces(tile_px=40, blend=True)), latents)
    assert (blended.dtype, blended.shape) == (torch.uint8, (5, 8 * HEIGHT, 8 * WIDTH, 3))
    # random weights are rough; what was trained is 2 levels off at most (LOG.md)
    assert (blended.int() - whole).abs().float().mean() < 3


# the VAE in the denoiser's precision


def sixteen_bits() -> Parts:
    parts = random_parts(tiny_row(WAN), dtype=torch.bfloat16, device=torch.device("cpu"))
    randomise(parts["vae"], torch.Generator().manual_seed(0))
    return parts


@pytest.mark.parametrize("place", ["none", "part"])
def test_the_vae_computes_as_the_denoiser_does(place: str) -> None:
    parts = sixteen_bits()
    known = {name: tensor.clone() for name, tensor in parts["vae"].state_dict().items()}
    offload.apply(parts, Offload(value=place))
    decode.apply(parts, Decode(value="tile:40"))
    decode.remove(parts)
    assert parts.dtype("vae") == torch.float32
    decode.apply(parts, Decode(value="blend:40"))
    parts.use("vae")
    assert parts.dtype("vae") == torch.bfloat16
    assert all(torch.equal(tensor, known[n].bfloat16()) for n, tensor in parts["vae"].state_dict().items())
    with torch.no_grad():
        assert ours(parts, given(parts, frames=2)[0].bfloat16()).dtype == torch.uint8
    decode.remove(parts)
    assert parts.pieces == Pieces()
    assert not any(isinstance(m, nn.SiLU) and m.inplace for m in parts["vae"].modules())
    parts.close()


def test_a_vae_that_is_alone_is_rounded_too() -> None:
    """As in a dry run of the stages of the VAE, where the others are known."""
    parts = sixteen_bits()
    parts.components = {"vae": parts["vae"]}
    decode.apply(parts, Decode(value="blend:40"))
    assert parts.dtype("vae") == torch.bfloat16


@pytest.mark.parametrize("place", ["none", "part"])
def test_a_vae_that_overflowed_stays_in_fp32(place: str, make_plan: Make, tiny: Tiny) -> None:
    """Though a rung has the pass applied anew, which puts it into the plan's precision."""
    row = tiny(WAN)
    plan = replace(make_plan(row, {"offload": place}, width=160, guidance=(1.0,), steps=1), precision="fp16")
    blend = Decode(value="blend:128", because="it is leaner")
    plan = replace(plan, settings=tuple(blend if isinstance(s, Decode) else s for s in plan.settings))
    parts = load_parts(row, row.folder, dtype=torch.float16, device=torch.device("cpu"))  # type: ignore[arg-type]
    pipeline = Pipeline(plan, apply_all(parts, plan))
    state = pipeline.encode()
    pipeline.denoise(state)
    last, calls = parts["vae"].decoder.conv_out, list[torch.dtype]()

    def forward(module: nn.Module, given: Any, out: torch.Tensor) -> torch.Tensor:
        calls.append(out.dtype)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return out * torch.inf if out.dtype == torch.float16 else out

    last.register_forward_hook(forward)
    frames = np.stack(list(pipeline.decode(state)))
    assert calls[0] == torch.float16
    assert set(calls[1:]) == {torch.float32}
    assert [rung.after for rung in pipeline.rungs] == ["blend:112"]
    assert parts.dtype("vae") == torch.float32
    assert sum("It runs in fp32 from here on (vae)" in notice for notice in pipeline.ledger.notices) == 1
    assert frames.shape == (5, 64, 160, 3)
    parts.close()


# planning


def test_only_a_plan_that_may_be_near_is_offered_them(make_plan: Make, tiny: Tiny) -> None:
    each = next(each for each in CANDIDATES if each.kind is Decode)
    row = CHECKPOINTS[WAN]
    plan = make_plan(tiny(WAN), width=832, height=480)
    assert Decode(value="blend:256").tier == "near"
    assert Decode(value="tile:256").tier == "exact"
    exact = ladder(each, plan, row, "exact")
    assert not any(value.startswith("blend") for value in exact)
    assert exact[-1] == "tile:128"
    for tier in ("near", "lossy"):
        assert ladder(each, plan, row, tier)[:2] == ("whole", "blend:512")  # type: ignore[arg-type]
        assert not any(value.startswith("tile") for value in ladder(each, plan, row, tier))  # type: ignore[arg-type]


def test_a_plan_says_what_they_save(photo: Path) -> None:
    row = legal(tiny_row(WAN))
    vae = row["vae"]
    wide = replace(vae, config={**vae.config, "base_dim": 8})  # copies of fewer channels are filled up to eight
    row = replace(row, components=tuple(wide if each is vae else each for each in row.components))
    said: dict[str, Any] = {}
    known: dict[str, Any] = {}
    for value in ("tile:64", "blend:64"):
        plan = plan_of(row, photo, (160, 128, 9), precision="bf16", settings={"decode": value})
        *before, said[value] = dryrun.trace(plan, row, known)
        known = {phase.name.partition(":")[0]: phase.gives for phase in before}
    exact, blend = said.values()
    assert blend.peak_bytes < 0.6 * exact.peak_bytes
    assert blend.weights_bytes["vae"] < 0.75 * exact.weights_bytes["vae"], "small tensors fill a block"


@pytest.mark.parametrize(("value", "after"), [("blend:256", "blend:112"), ("tile:256", "tile:128")])
def test_memory_that_runs_out_keeps_them_as_near_as_they_are(
    value: str, after: str, make_plan: Make, tiny: Tiny
) -> None:
    plan = make_plan(tiny(WAN), width=832, height=480)
    row = replace(plan.request, model=WAN)
    settings = tuple(Decode(value=value) if isinstance(s, Decode) else s for s in plan.settings)
    plan = replace(plan, request=row, settings=settings)
    shortage: Any = SimpleNamespace(of="card", asked_bytes=1, held_bytes=1)
    assert lower(plan, (), "decode", None, shortage).after == after


def test_a_change_of_their_size_keeps_the_weights(make_plan: Make, tiny: Tiny) -> None:
    parts = sixteen_bits()
    plans = [make_plan(tiny(WAN), settings={"decode": value}) for value in ("blend:64", "blend:40")]
    decode.apply(parts, Decode(value="blend:64"))
    before = [tensor.data_ptr() for tensor in parts["vae"].parameters()]
    change(parts, *plans)
    assert [tensor.data_ptr() for tensor in parts["vae"].parameters()] == before
    assert parts.pieces.tile_px == 40


# seams


def pan(step_x: int | None = None, step_y: int | None = None) -> Any:
    """12 frames of a moving pattern, uint8, brighter behind a line."""
    y, x = np.mgrid[0:64, 0:96]
    frames = []
    for index in range(12):
        light = 110 + 45 * np.sin((x + 3 * index) / 4.0) + 35 * np.cos((y - index) / 5.0)
        light += 20.0 * (x >= step_x) if step_x else 0
        light += 20.0 * (y >= step_y) if step_y else 0
        frames.append(np.stack([light, light * 0.9, light * 0.8], axis=-1).clip(0, 255).astype(np.uint8))
    return np.stack(frames)


BORDERS = {"x": (48,), "y": (24, 40)}


def test_a_step_at_a_border_is_seen_and_one_elsewhere_is_not() -> None:
    even = tiles.measure(pan(), BORDERS)
    assert even.seam < 1.3
    for axis, at, found in (
        ("x", 48, tiles.measure(pan(step_x=48), BORDERS)), ("y", 40, tiles.measure(pan(step_y=40), BORDERS, pan())),
    ):  # fmt: skip
        assert (found.axis, found.at_px) == (axis, at)
        assert found.seam > 1.5 * even.seam
        assert (found.reference is None) == (axis == "x")
    assert found.reference is not None
    assert found.reference < 1.3
    assert tiles.measure(pan(step_x=72), BORDERS).seam < 1.3
    for at, seen in ((33, True), (41, False), (17, False)):  # of the last of three the eight pixels before it
        found = tiles.measure(pan(step_y=at), BORDERS, pan(step_y=at))
        assert (found.seam > 1.5 * even.seam, found.at_px == 40) == (seen, seen)
        if seen:
            assert found.seam == found.reference
    both = tiles.measure(pan(step_x=48), BORDERS, pan(step_x=48))
    assert both.seam == both.reference, "an edge of the scene"


def test_where_tiles_meet_is_in_the_file(make_plan: Make, tiny: Tiny) -> None:
    row = tiny(WAN)
    for value, met in (("blend:48", {"x": (48,), "y": (32,)}), ("tile:48", {}), ("whole", {})):
        plan = make_plan(row, settings={"decode": value})
        assert tiles.borders(recipe.parameters(row, plan, "weights", 18), 96, 64) == met
    for nothing in (None, {}, {"tiles": 3}, {"tiles": {"x": [1]}}, {"tiles": {"x": [], "y": []}}):
        assert tiles.borders(nothing, 96, 64) == {}
    assert tiles.borders({"tiles": {"x": [96], "y": []}}, 96, 64) == {}


def test_compare_tells_of_tiles(tmp_path: Path) -> None:
    for name, parameters in (("ours", {"tiles": BORDERS}), ("reference", {})):
        made = video.Video(
            frames=iter(pan(step_x=48 if parameters else None)), num_frames=12, width=96, height=64, fps=8
        )
        video.write(made, tmp_path / name, parameters=parameters)
    found = compare(tmp_path / "ours", tmp_path / "reference", metrics=["psnr"])
    assert found.tiles is not None
    assert any("made in tiles" in note and "at x=48" in note for note in found.notes)
    assert found.to_json()["tiles"]["seam"] > 1.5 > found.to_json()["tiles"]["reference"]
    assert compare(tmp_path / "reference", tmp_path / "ours", metrics=["psnr"]).tiles is None


def test_a_run_is_watched_at_its_borders() -> None:
    """Elsewhere a line is an edge of the scene, and so is one of many."""
    frames = np.broadcast_to(np.float32(0.3), (12, 64, 96, 3)).copy()
    frames += np.random.default_rng(0).random(frames.shape, np.float32) * 0.1
    frames[:, :, 48:] += 0.3
    for borders, found in (
        ({"x": (48,), "y": ()}, 1),
        ({"x": (48,), "y": (20, 40)}, 0),
        ({"x": (32,), "y": (32,)}, 0),
        ({}, 1),
    ):
        watch = Watch(seams=True, borders=borders)
        for frame in (frames * 255).astype(np.uint8):
            watch.see(frame)
        assert sum(finding.startswith("a seam") for finding in watch.findings()) == found


def test_a_seam_has_the_decode_again_with_weights_read_anew(
    tiny: Tiny, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = tiny(WAN)
    request = Request(
        image=photo, prompt="waves", model=str(row.folder), width=96, height=64, num_frames=5, steps=2, seed=7,
        guidance=(1.0,),
    )  # fmt: skip
    steps: list[int] = []
    options = Options(device="cpu", on_step=lambda step: steps.append(step.index))
    sound = generate(request, tmp_path / "sound", options)
    assert sound.findings == ()
    choose: Any = import_module("framefit.planning.choose")
    usual = choose.untouched
    blend = Decode(value="blend:48", because="it is leaner")
    monkeypatch.setattr(
        choose, "untouched", lambda row: tuple(blend if isinstance(s, Decode) else s for s in usual(row))
    )
    monkeypatch.setattr(pieces, "fade", lambda before, part, corner, over: part.copy_(part // 3 + 80 * any(corner)))
    steps.clear()
    found = generate(request, tmp_path / "found", options)
    assert found.retry is not None
    assert found.retry.findings[0].startswith("a seam: a line at ")
    assert (found.retry.withdrawn, found.retry.failed, found.findings) == ("decode=blend:48", None, ())
    assert steps == [1, 2], "the latents are kept"
    frames = [np.stack(list(video.read(report.video))) for report in (sound, found)]
    assert np.array_equal(*frames)
