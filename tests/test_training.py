"""training/: clips move as they say, a training in stretches is one, and what is shipped is what was trained."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from framefit.families import CHECKPOINTS, wan
from framefit.families import find as find_model
from framefit.families.parts import Parts
from framefit.families.pixels import to_tensor
from framefit.pipeline import Pipeline, load
from framefit.request import Request
from framefit.run import Options, prepare
from framefit.testing import randomise
from training import captions, experts, flat, package, phrases, scenes, stretch, text, vae
from training.captions import NEUTRAL, caption
from training.motion import CATALOGUE, DIRECTIONS, FIELDS, OBJECTS, Motion, find, to_scene

TRAINING = Path(experts.__file__).parent
CPU = torch.device("cpu")
WIDTH, HEIGHT = 96, 64
LANGUAGES: tuple[captions.Language, captions.Language] = ("en", "zh")
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up", "in": "out", "out": "in"}
CAMERA = [name for name, motion in CATALOGUE.items() if not (motion.object_x or motion.object_y)]
MOVED = [*DIRECTIONS, "pan-down-fast", "pan-left+zoom-in", "zoom-out+roll-left"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scenes_of(canvas: Tensor, size: tuple[int, int] = (scenes.SIDE, scenes.SIDE)) -> scenes.Scenes:
    """One scene, and a small green disc to pass before it."""
    side = scenes.CUTOUT_SIDE
    line = torch.arange(side) - (side - 1) / 2
    disc = (line[:, None] ** 2 + line**2 < 30**2).to(torch.uint8) * 255
    return scenes.Scenes(
        canvases=(canvas.clamp(0, 1) * 255).byte()[None],
        sizes=torch.tensor([size], dtype=torch.float32),
        cutouts=torch.stack([0 * disc, disc, 0 * disc, disc])[None],
    )


@pytest.fixture(scope="module")
def smooth() -> scenes.Scenes:
    """Waves so long that a bilinear sample is as good as exact, and that look alike nowhere near each other."""
    y, x = torch.meshgrid(torch.arange(scenes.SIDE), torch.arange(scenes.SIDE), indexing="ij")
    waves = [torch.sin(x / 37 + k) * torch.cos(y / 41 - k) + torch.sin((x - y) / 53 + k) / 2 for k in range(3)]
    return scenes_of(0.5 + torch.stack(waves) / 4)


@pytest.fixture
def grey() -> scenes.Scenes:
    return scenes_of(torch.full((3, scenes.SIDE, scenes.SIDE), 0.4))


def clip_of(material: scenes.Scenes, name: str, *, frames: int = 9, seed: int = 0, recolour: bool = False) -> Tensor:
    """(3, F, H, W)"""
    return scenes.render(material, [find(name)], WIDTH, HEIGHT, frames, generator(seed), recolour=recolour)[0]


def seen_at(picture: Tensor, motion: Motion, frame: int) -> tuple[Tensor, Tensor]:
    """The first frame's picture where `to_scene` says that each pixel of `frame` lay, and which of them it shows."""
    x, y = (torch.arange(side) + 0.5 - side / 2 for side in (WIDTH, HEIGHT))
    points = torch.tensor([[to_scene(motion, frame, u, v) for u in x.tolist()] for v in y.tolist()])
    half = torch.tensor([WIDTH / 2, HEIGHT / 2])
    sampled = functional.grid_sample(picture[None], (points / half)[None], align_corners=False)[0]
    return sampled, (points.abs() < half - 0.5).all(-1)


# motion and scenes


@pytest.mark.parametrize("name", MOVED)
def test_frames_lie_where_the_motion_says(smooth: scenes.Scenes, name: str) -> None:
    clip, last = clip_of(smooth, name), 8
    expected, shown = seen_at(clip[:, 0], find(name), last)
    assert shown.float().mean() > 0.5
    assert (clip[:, last] - expected)[:, shown].abs().max() < 0.02
    assert (clip[:, last] - clip[:, 0])[:, shown].abs().max() > 0.1, "the scene shows no motion"


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("pan-right", np.s_[..., 16:], np.s_[..., :-16]),
        ("pan-left", np.s_[..., :-16], np.s_[..., 16:]),
        ("pan-down", np.s_[..., 16:, :], np.s_[..., :-16, :]),
        ("pan-up", np.s_[..., :-16, :], np.s_[..., 16:, :]),
    ],
)
def test_content_drifts_against_the_camera(smooth: scenes.Scenes, name: str, before: Any, after: Any) -> None:
    clip = clip_of(smooth, name)
    torch.testing.assert_close(clip[:, 8][after], clip[:, 0][before], rtol=0, atol=1e-4)


def test_a_camera_that_zooms_in_sees_less_and_one_that_rolls_right_turns_clockwise() -> None:
    assert to_scene(find("zoom-in"), 8, 10, 0)[0] < 10 < to_scene(find("zoom-out"), 8, 10, 0)[0]
    assert to_scene(find("roll-right"), 8, 10, 0)[1] > 0 > to_scene(find("roll-left"), 8, 10, 0)[1]


@pytest.mark.parametrize("recolour", [True, False])
def test_a_still_does_not_change(smooth: scenes.Scenes, recolour: bool) -> None:
    clip = clip_of(smooth, "still", recolour=recolour)
    assert torch.equal(clip, clip[:, :1].expand_as(clip))


def test_what_is_too_bright_is_white() -> None:
    bright = scenes_of(torch.full((3, scenes.SIDE, scenes.SIDE), 0.95))
    assert clip_of(bright, "brighten")[:, -1].unique().tolist() == [1.0]


def test_every_scene_is_drawn() -> None:
    greys = torch.cat(
        [torch.full((1, 3, scenes.SIDE, scenes.SIDE), value, dtype=torch.uint8) for value in (0, 128, 255)]
    )
    several = scenes.Scenes(
        canvases=greys, sizes=torch.full((3, 2), float(scenes.SIDE)), cutouts=torch.zeros(0, 4, 8, 8, dtype=torch.uint8)
    )
    one, other = (
        scenes.render(several, [Motion()] * 16, 8, 8, 1, generator(seed), recolour=False)[:, 0, 0, 0, 0]
        for seed in (1, 2)
    )
    assert len((one * 100).round().unique()) == 3
    assert not torch.equal(one, other)


def test_light_goes_one_way(smooth: scenes.Scenes) -> None:
    for name, sign in (("darken", -1), ("brighten", 1)):
        clip = clip_of(smooth, name)
        change = sign * clip.diff(dim=1)
        assert change.min() >= 0
        assert (change.mean((0, 2, 3)) > 0).all()
    red, _, blue = (clip_of(smooth, "darken")[:, -1] + 1).mean((1, 2)) / (clip_of(smooth, "still")[:, -1] + 1).mean(
        (1, 2)
    )
    assert blue > red


@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_moves_and_its_background_does_not(smooth: scenes.Scenes, name: str) -> None:
    motion, frames = find(name), 5
    sides = (128, 96)
    clips = [scenes.render(smooth, [m], *sides, frames, generator(3), recolour=False)[0] for m in (motion, Motion())]
    changed = (clips[0] != clips[1]).any(0)
    boxes = []
    for mask in changed:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        assert 3 <= len(rows) <= 25
        assert 3 <= len(columns) <= 25
        boxes.append([(columns[0] + columns[-1]) / 2, (rows[0] + rows[-1]) / 2])
    way = torch.tensor(boxes[-1]) - torch.tensor(boxes[0])
    expected = torch.tensor([motion.object_x, motion.object_y]) * (frames - 1)
    torch.testing.assert_close(way, expected, rtol=0, atol=1.0)


def test_no_object_without_cutouts(smooth: scenes.Scenes) -> None:
    bare = scenes.Scenes(canvases=smooth.canvases, sizes=smooth.sizes, cutouts=smooth.cutouts[:0])
    with pytest.raises(ValueError, match="cut-outs"):
        clip_of(bare, "object-left")


def test_clips_are_pixels_and_follow_from_the_seed(smooth: scenes.Scenes) -> None:
    motions = [CATALOGUE[name] for name in list(CATALOGUE)[::3]]
    several = scenes.Scenes(
        canvases=torch.cat([smooth.canvases.roll(k, -1) for k in (0, 40, 80)]),
        sizes=torch.tensor([[150.0, 110.0]] * 3),  # so that the view's size is drawn
        cutouts=smooth.cutouts,
    )
    one, same, other = (scenes.render(several, motions, 48, 32, 5, generator(seed)) for seed in (1, 1, 2))
    assert one.shape == (len(motions), 3, 5, 32, 48)
    assert one.abs().max() <= 1
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_colours_are_kept_where_they_shall_be(grey: scenes.Scenes) -> None:
    value = 2 * int(0.4 * 255) / 255 - 1
    torch.testing.assert_close(clip_of(grey, "still"), torch.full((3, 9, HEIGHT, WIDTH), value))
    assert (clip_of(grey, "still", recolour=True) - value).abs().max() > 0.01


@pytest.mark.parametrize("name", ["still", "pan-left+zoom-out", "roll-right-fast"])
def test_no_black_comes_in_at_the_edge_of_a_scene(name: str) -> None:
    canvas = torch.full((3, scenes.SIDE, scenes.SIDE), 0.4)
    for size in ((WIDTH // 2, HEIGHT // 2), (scenes.SIDE, 40)):
        clip = clip_of(scenes_of(canvas, size), name)
        torch.testing.assert_close(clip, clip[:, :1, :1, :1].expand_as(clip))


def test_scenes_are_enlarged_only_where_there_is_no_room() -> None:
    count = 24
    rate = dict(zip(FIELDS, torch.tensor([find("pan-left+zoom-out").values()] * count).T, strict=True))
    where = scenes._camera(rate, WIDTH, HEIGHT, 9)
    for size, least, most in (
        ((896.0, 600.0), 1.0, scenes.MOST_SHRUNK),
        ((200.0, 130.0), 1.0, 1.8),
        ((60.0, 60.0), 0.0, 1.0),
    ):
        sizes = torch.tensor([size] * count)
        points = scenes._place(where, sizes, generator())
        scale = (points.diff(dim=3) / where.diff(dim=3))[:, 0, 0, 0, 0].abs()
        assert scale.min() >= least - 1e-3
        assert scale.max() <= most + 1e-3
        assert points.min() >= -1e-2
        assert (points.amax((1, 2, 3)) <= sizes + 1e-2).all()


def test_photos_and_drawn_scenes_are_loaded(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"training\.photos"):
        scenes.load(tmp_path, CPU, drawn=0, seed=0)
    Image.new("RGB", (120, 80), (200, 100, 50)).save(tmp_path / "one.jpg")
    found, again = (scenes.load(tmp_path, CPU, drawn=1, seed=4) for _ in range(2))
    assert found.sizes.tolist() == [[120, 80], [scenes.SIDE, scenes.SIDE]]
    assert found.cutouts.shape == (1, 4, scenes.CUTOUT_SIDE, scenes.CUTOUT_SIDE)
    assert torch.equal(found.canvases, again.canvases)
    assert torch.equal(found.cutouts, again.cutouts)
    # the border repeats past the photo's own pixels
    assert torch.equal(found.canvases[0, :, 79, 119], found.canvases[0, :, -1, -1])


# captions


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", CATALOGUE)
def test_every_motion_has_captions(name: str, language: captions.Language) -> None:
    random = Random(name)
    drawn = {caption(name, random, language) for _ in range(40)}
    assert len(drawn) > 15
    assert all(one.strip() for one in drawn)
    assert not any("[" in one or "]" in one for one in drawn)
    if language == "zh":
        assert all(re.search("[\u4e00-\u9fff]", one) for one in drawn)


def test_every_slot_of_a_phrasing_is_filled() -> None:
    found = [one for table in phrases.PHRASES.values() for phrasings in table.values() for one in phrasings]
    assert not [one for one in found if re.search("[A-Z]", one) or not one or one.count("[") != one.count("]")]


def opposite(name: str) -> str:
    if name in ("darken", "brighten"):
        return {"darken": "brighten", "brighten": "darken"}[name]
    return re.sub("|".join(rf"\b{word}\b" for word in OPPOSITE), lambda found: OPPOSITE[found[0]], name)


@pytest.mark.parametrize("language", LANGUAGES)
def test_opposite_motions_share_no_phrasing(language: captions.Language) -> None:
    for name, phrasings in phrases.PHRASES.items():
        if name != "still":
            assert not set(phrasings[language]) & set(phrases.PHRASES[opposite(name)][language]), name
    for name in set(CATALOGUE) - {"still"}:
        one, other = (
            {caption(n, Random(k), language, plain=1.0).lower().strip(".!") for k in range(60)}
            for n in (name, opposite(name))
        )
        assert not one & other, name


def spoken(phrase: str) -> set[str]:
    """A phrase as an order, a clause and a gerund."""
    before, _, rest = phrase.partition("[")
    verb, _, after = rest.partition("]")
    if not rest:
        return {phrase}
    subject = before.strip() or "the camera"
    return {
        before + form + after for form in (verb, *(captions._inflected(verb, subject, f) for f in ("clause", "gerund")))
    }


def test_a_neutral_caption_asks_for_nothing() -> None:
    random = Random(0)
    drawn = {captions.neutral(random).lower() for _ in range(4000)}
    # where things are, and where they lead, is no motion: that is what distractors are there to teach
    for place in (place for table in phrases.DISTRACTORS.values() for place in phrases.split(table)):
        drawn = {one.replace(place.lower(), "") for one in drawn}
    everything = "\n".join(drawn)
    asked = {
        re.escape(form.lower()) if language == "zh" else rf"\b{re.escape(form.lower())}\b"
        for name, table in phrases.PHRASES.items()
        if not name.startswith("object")  # a thing that falls is a scene as well
        for language, phrasings in table.items()
        for phrase in phrasings
        for form in (spoken(phrase) if language == "en" else {phrase.replace("[", "").replace("]", "")})
    }
    assert len(asked) > 500
    found = re.search("|".join(sorted(asked)), everything)
    assert not found, found
    assert caption(NEUTRAL, Random(3)) == captions.neutral(Random(3))


def test_captions_follow_from_the_seed() -> None:
    names = [*CATALOGUE, NEUTRAL]
    one, same, other = ([caption(n, r) for n in names] for r in (Random(5), Random(5), Random(6)))
    assert one == same
    assert one != other


# stretches


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Stands still, apart from what a step adds."""
    found = Clock()
    monkeypatch.setattr(stretch.time, "monotonic", found)
    return found


def small_trainee(*, channels_last: bool = False, muon: bool = True) -> tuple[nn.Module, stretch.Trainee]:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 2, 1))
    randomise(model.requires_grad_(False), generator())
    model.requires_grad_(True)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    pace = stretch.Pace(seconds=10.0, lr=1e-2, warmup=8, seed=3, muon=muon)
    return model, stretch.Trainee(parameters=dict(model.named_parameters()), pace=pace)


def loss_of(model: nn.Module, clock: Clock, broken_at: float = 2.0) -> stretch.Loss:
    """A step of a quarter of a second; not a number from a share of the training on."""

    def loss(progress: float, randomness: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        clock.now += 0.25
        value = model(torch.randn(2, 3, 8, 8, generator=randomness)).square().mean()
        return value * (math.nan if progress >= broken_at else 1.0), {"twice": 2 * value}

    return loss


def everything(trainee: stretch.Trainee) -> list[Tensor]:
    found = [*trainee.parameters.values(), *trainee.masters, *trainee.averages]
    remembered = [o.state[master] for master in trainee.masters for o in trainee.optimizers if master in o.state]
    assert len(remembered) == len(trainee.masters)
    found += [tensor for kept in remembered for _, tensor in sorted(kept.items())]
    return [tensor.detach() for tensor in found]


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("seconds", [0.25, 1.75, 4.0])
def test_a_training_in_stretches_is_one(
    tmp_path: Path, clock: Clock, seconds: float, channels_last: bool, muon: bool
) -> None:
    model, whole = small_trainee(channels_last=channels_last, muon=muon)
    assert stretch.train(whole, loss_of(model, clock), tmp_path / "whole", seconds=60, every=4)
    for number in range(60):
        model, cut = small_trainee(channels_last=channels_last, muon=muon)
        clock.now = 7.0 * number
        finished = stretch.train(cut, loss_of(model, clock), tmp_path / "cut.safetensors", seconds=seconds, every=4)
        assert cut.step == min(40, (number + 1) * seconds / 0.25)
        if finished:
            break
    assert (cut.step, cut.seconds, cut.curve) == (whole.step, whole.seconds, whole.curve)
    assert len(whole.curve) == 10
    for one, other in zip(everything(cut), everything(whole), strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
    for trainee in (whole, cut):
        with torch.no_grad():
            trainee.finish()
        for parameter, average in zip(trainee.parameters.values(), trainee.averages, strict=True):
            assert torch.equal(parameter, average.view(parameter.shape))


@pytest.mark.parametrize(("broken_at", "noticed"), [(0.5, 21), (0.975, 40)])
def test_a_loss_that_is_no_number_leaves_the_state_alone(
    tmp_path: Path, clock: Clock, broken_at: float, noticed: int
) -> None:
    """It is noticed at the curve's next entry, and at the end where there is none before it."""
    state = tmp_path / "state"
    model, trainee = small_trainee()
    assert not stretch.train(trainee, loss_of(model, clock, broken_at), state, seconds=4.5, every=7)
    before = state.read_bytes()
    model, trainee = small_trainee()
    with pytest.raises(FloatingPointError, match="learning rate"):
        stretch.train(trainee, loss_of(model, clock, broken_at), state, seconds=60, every=7)
    assert state.read_bytes() == before
    assert trainee.step == noticed


def test_a_gradient_that_is_no_number_leaves_the_state_alone(tmp_path: Path, clock: Clock) -> None:
    model, trainee = small_trainee()
    finite = loss_of(model, clock)

    def loss(progress: float, randomness: torch.Generator) -> tuple[Tensor, Mapping[str, Tensor]]:
        value, figures = finite(progress, randomness)
        return value + (value - value.detach()).abs().sqrt(), figures

    with pytest.raises(FloatingPointError, match="norm"):
        stretch.train(trainee, loss, tmp_path / "state", seconds=0.25)
    assert not (tmp_path / "state").exists()


def test_every_step_has_its_own_randomness(tmp_path: Path, clock: Clock) -> None:
    seeds = []
    for seed in (3, 4):
        model, trainee = small_trainee()
        pace = stretch.Pace(seconds=2.0, lr=1e-2, seed=seed)
        plain, trainee = loss_of(model, clock), stretch.Trainee(parameters=trainee.parameters, pace=pace)

        def loss(
            progress: float, randomness: torch.Generator, plain: stretch.Loss = plain
        ) -> tuple[Tensor, Mapping[str, Tensor]]:
            seeds.append(randomness.initial_seed())
            return plain(progress, randomness)

        assert stretch.train(trainee, loss, tmp_path / str(seed), seconds=60)
    assert len(set(seeds)) == len(seeds) == 16


def test_what_is_frozen_cannot_be_trained(tmp_path: Path, clock: Clock) -> None:
    model, trainee = small_trainee()
    next(model.parameters()).requires_grad_(False)
    with pytest.raises(ValueError, match="gradient"):
        stretch.train(trainee, loss_of(model, clock), tmp_path / "state", seconds=1)


def test_the_rate_rises_over_the_warmup_and_falls_over_the_time() -> None:
    pace = stretch.Pace(seconds=100, lr=0.5, warmup=10, final=0.1)
    assert [pace.rate(step, 0.0) for step in (0, 4, 9, 10, 99)] == pytest.approx([0.05, 0.25, 0.5, 0.5, 0.5])
    assert [pace.rate(99, p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.5, 0.5 * 0.55, 0.05])
    trainee = small_trainee()[1]
    for seconds, progress in ((0.0, 0.0), (2.5, 0.25), (10.0, 1.0), (11.0, 1.0)):
        trainee.seconds = seconds
        assert trainee.progress == progress


@pytest.mark.parametrize("muon", [True, False])
def test_only_matrices_decay_and_learn_by_muon(muon: bool) -> None:
    model, _ = small_trainee()
    pace = stretch.Pace(seconds=10.0, lr=1e-2, muon=muon)
    trainee = stretch.Trainee(parameters=dict(model.named_parameters()), pace=pace)
    groups = [
        (type(optimizer).__name__, group["weight_decay"], {p.ndim for p in group["params"]})
        for optimizer in trainee.optimizers
        for group in optimizer.param_groups
        if group["params"]
    ]
    vectors = ("AdamW", 0.0, {1})
    assert groups == ([vectors, ("Muon", 0.01, {2})] if muon else [("AdamW", 0.01, {4}), vectors])


def test_gains_of_the_autoencoder_do_not_decay() -> None:
    """Its norms hold them as (dim, 1, 1, 1)."""
    small = {"base_dim": 8, "decoder_base_dim": 8, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "patch_size": 2}
    parameters = dict(vae.build(small | {"is_residual": True}).named_parameters())
    pace = stretch.Pace(seconds=1.0, lr=1e-2)
    trainee = stretch.Trainee(parameters=parameters, pace=pace)
    masters = dict(zip(parameters, trainee.masters, strict=True))
    decaying = {
        id(p) for o in trainee.optimizers for group in o.param_groups if group["weight_decay"] for p in group["params"]
    }
    found = {name for name, master in masters.items() if id(master) in decaying}
    assert found == {name for name in parameters if name.endswith("weight")}


def test_a_table_is_no_matrix() -> None:
    """Wan's shifts and scales, (1, 6, D): nothing in them is mapped to anything."""
    table = nn.Parameter(torch.zeros(1, 6, 8))
    trainee = stretch.Trainee(parameters={"table": table}, pace=stretch.Pace(seconds=1.0, lr=1e-2))
    assert [type(optimizer).__name__ for optimizer in trainee.optimizers] == ["AdamW"]


# the autoencoder


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_flat_convolutions_are_the_same_mathematics(residual: bool, layout: torch.memory_format) -> None:
    """Outputs and gradients of a whole clip: a first frame alone, full and half-full caches, strides in time."""
    small = {"base_dim": 8, "decoder_base_dim": 8, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "patch_size": 2}
    torch.manual_seed(0)
    model = vae.build(small | {"is_residual": residual})
    clips = torch.randn(2, 3, 13, 16, 24, generator=generator())

    def both() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        decoded = model.decode(model.encode(clips.to(memory_format=layout)).latent_dist.mode()).sample
        decoded.square().mean().backward()
        return decoded.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])

    before = both()
    names = set(model.state_dict())
    flat.flatten(model)
    after = both()
    assert set(model.state_dict()) == names
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-5 * before[1].abs().max().item())


# the denoisers


def test_a_level_is_the_share_of_noise() -> None:
    latents, noise = torch.randn(2, 2, 3, 4, 5, 6, generator=generator()).unbind()
    at = experts.noised(latents, torch.tensor([0.0, 1.0]), noise)
    assert torch.equal(at[0], latents[0])
    assert torch.equal(at[1], noise[1])
    half = experts.noised(latents, torch.tensor([0.5, 0.25]), noise)
    torch.testing.assert_close(half[1], 0.75 * latents[1] + 0.25 * noise[1])


def test_levels_are_shifted_and_stay_within_their_stage() -> None:
    even = torch.linspace(0, 1, 11)
    assert torch.equal(experts.shifted(even, 1.0), even)
    torch.testing.assert_close(experts.shifted(even, 3.0), 3 * even / (1 + 2 * even))
    (start, top), (low, boundary), (high, end) = (experts.STAGES[name] for name in ("base", "low", "high"))
    assert (start, top, low, end) == (0, 1, 0, 1)
    assert boundary == high == package.BOUNDARY
    for lowest, highest in experts.STAGES.values():
        levels = torch.stack([experts._levels(96, lowest, highest, 3.0, generator(seed)) for seed in range(20)])
        assert levels.min() >= lowest - 1e-6
        assert levels.max() <= highest + 1e-6
        assert (levels.diff(dim=1) > 0).all(), "the last of a batch are the noisiest"
        # uniform before the shift, which is how often a run meets them
        unshifted = levels / (3 - 2 * levels)
        ends = torch.tensor([lowest, highest]) / (3 - 2 * torch.tensor([lowest, highest]))
        torch.testing.assert_close(unshifted.mean(), ends.mean(), rtol=0, atol=1e-3)


def test_captions_are_drawn_for_their_motion_or_are_neutral() -> None:
    motions, each = 5, 7
    states = torch.arange(motions).view(-1, 1, 1, 1).expand(-1, each, 2, 3).clone()
    said = experts.Captions(states=states, neutral=torch.full((4, 2, 3), -1), empty=torch.full((1, 2, 3), -2))
    asked = torch.arange(200) % motions
    assert torch.equal(said.draw(asked, 0.0, generator()), asked.view(-1, 1, 1).expand(-1, 2, 3))
    assert (said.draw(asked, 1.0, generator()) == -1).all()
    share = (said.draw(asked, 0.25, generator())[:, 0, 0] == -1).float().mean()
    assert 0.15 < share < 0.35


@pytest.fixture(scope="module")
def tiny_vae() -> AutoencoderKLWan:
    recipe = {"base_dim": 8, "decoder_base_dim": 8, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "patch_size": 2}
    built = vae.build({**recipe, "is_residual": True}).eval().requires_grad_(False)
    randomise(built, generator())
    mean, std = torch.randn(16, generator=generator()), 0.5 + torch.rand(16, generator=generator())
    built.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    return built


@torch.no_grad()
def test_the_condition_is_what_a_run_gives_the_model(tiny_vae: AutoencoderKLWan) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)
    photos, frames = [Image.fromarray(one) for one in pixels], 9
    parts = Parts(checkpoint=CHECKPOINTS["wan2.2-i2v-a14b"], components={"vae": tiny_vae}, device=CPU)
    request = cast(Any, SimpleNamespace(num_frames=frames, width=48, height=32))
    expected = torch.cat([wan.encode_image(parts, request, p, None, generator())[1]["image"] for p in photos])
    tensors = torch.cat([to_tensor(photo) for photo in photos]).unsqueeze(2)
    assert expected.shape == (2, 20, 3, 4, 6)
    torch.testing.assert_close(experts.condition(tiny_vae, tensors, frames), expected, rtol=1e-5, atol=1e-5)
    assert (expected[0, 4:, 1:] - expected[1, 4:, 1:]).abs().max() > 1e-3, "the photo does not reach later frames"


@torch.no_grad()
def test_a_fresh_autoencoder_repeats_a_still(tiny_vae: AutoencoderKLWan) -> None:
    clip = torch.randn(1, 3, 1, 32, 48, generator=generator()).clamp(-1, 1).expand(-1, -1, 9, -1, -1)
    latents = vae.encode(tiny_vae, clip)
    assert latents.shape == (1, 16, 3, 4, 6)
    assert tiny_vae.decode(latents).sample.shape == clip.shape
    assert vae.psnr(clip, clip).item() == pytest.approx(10 * math.log10(4 / 1e-10))
    assert vae.psnr(clip, clip + 0.02).item() == pytest.approx(40.0, abs=1e-3)
    phases = [[0.1, 64, 64, 1, 8], [0.5, 64, 64, 9, 4], [0.4, 96, 64, 17, 2]]
    assert [vae._phase(phases, p)[2] for p in (0.0, 0.09, 0.11, 0.59, 0.61, 1.0)] == [1, 1, 9, 9, 17, 17]


def small_denoiser() -> WanTransformer3DModel:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 16, "num_layers": 1, "freq_dim": 8}
    return experts.build({"denoiser": sizes})


def test_on_the_cpu_it_computes_in_fp32() -> None:
    model = small_denoiser()
    for buffer in model.buffers():
        buffer.data = buffer.data.double()
    model = experts.compute_copy(model, CPU)
    assert {tensor.dtype for tensor in (*model.parameters(), *model.buffers())} == {torch.float32}
    assert model.training
    assert model.config.text_dim == text.WIDTH
    assert (model.config.in_channels, model.config.out_channels) == (36, 16)


@pytest.mark.parametrize(("steps", "guidance"), [(4, 1.0), (5, 2.0)])
@torch.no_grad()
def test_a_few_step_run_in_training_is_a_run(photo: Path, steps: int, guidance: float) -> None:
    """The same scheduler, experts and guidance as the pipeline's, whose noise and conditioning it is given."""
    pytest.importorskip("peft")
    from training import few

    request = Request(
        image=photo, prompt="pan left", width=96, height=64, num_frames=9, steps=steps, guidance=(guidance,), seed=1
    )
    _, plan = prepare(request, Options(device="cpu", checkpoints=None, use_tuned=False))
    pipeline = Pipeline(plan, load(plan, find_model("tiny")).parts)
    assert len(set(pipeline.experts())) == 2
    state = pipeline.encode()
    noise, image, text_states = state.latents, state.conditioning["image"], state.conditioning["text"]
    pipeline.denoise(state)
    models = [pipeline.parts["transformer"], pipeline.parts["transformer_2"]]
    empty = text_states[:1] if guidance > 1 else None
    end = few.ended(models, noise, image, text_states[-1:], steps, 3.0, empty, guidance)
    torch.testing.assert_close(end, state.latents, rtol=1e-4, atol=1e-4)


def test_the_few_step_form_learns_to_end_where_the_guided_run_ends(tmp_path: Path) -> None:
    """Through all its steps: both experts learn, and nothing but their additions does."""
    pytest.importorskip("peft")
    from training import few

    for name in ("high", "low"):
        model = small_denoiser()
        randomise(model, generator())
        model.save_pretrained(tmp_path / name)
    folders = [tmp_path / "high", tmp_path / "low"]
    teachers = [experts.compute_copy(experts.load(folder), CPU) for folder in folders]
    clips = experts.Clips(
        latents=torch.randn(2, 16, 2, 4, 4, generator=generator()), photos=torch.randn(2, 20, 2, 4, 4),
        motions=torch.tensor([0, 1]),
    )  # fmt: skip
    words = torch.randn(4, 1, 6, text.WIDTH, generator=generator())
    said = experts.Captions(states=words[:2], neutral=words[2], empty=words[3])
    runs = few._taught(teachers, clips, said, (6, 3.0, 4.0), generator())
    students = [few._student(folder, 2, CPU) for folder in folders]
    learnt = {f"{i}.{name}": p for i, s in enumerate(students) for name, p in s.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in learnt)
    optimizer, errors = torch.optim.Adam(learnt.values(), lr=0.02), []
    for _ in range(12):
        end = few.ended(students, runs.noise, runs.photos, runs.states, 4, 3.0)
        error = (end - runs.ends).square().mean()
        errors.append(error.item())
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    plain = few.ended(teachers, runs.noise, runs.photos, runs.states, 4, 3.0)
    assert errors[0] == pytest.approx((plain - runs.ends).square().mean().item(), rel=1e-4)
    assert errors[-1] < 0.7 * errors[0]
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in learnt.values())


# the photographs


@pytest.fixture(scope="module")
def manifest() -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = json.loads((TRAINING / "photos.json").read_text(encoding="utf-8"))
    return found


def test_photos_have_a_source_and_no_group_is_in_both_splits(manifest: dict[str, list[dict[str, Any]]]) -> None:
    packages = {one["name"] for one in manifest["packages"]}
    groups: dict[str, set[str]] = {"train": set(), "heldout": set()}
    for photo in manifest["photos"]:
        assert photo["package"] in packages
        assert photo["path"]
        assert photo["licence"] in {"public domain", "CC0-1.0"} or photo["licence"].startswith("CC-BY-")
        groups[photo["split"]].add(photo["group"])
    assert not groups["train"] & groups["heldout"]
    assert len({photo["name"] for photo in manifest["photos"]}) == len(manifest["photos"])
    for one in manifest["packages"]:
        assert re.fullmatch("[0-9a-f]{64}", one["sha256"])
        assert one["stated"]


def test_what_is_shipped_of_them_is_free_small_and_listed(manifest: dict[str, list[dict[str, Any]]]) -> None:
    heldout = {f"{photo['name']}.jpg": photo for photo in manifest["photos"] if photo["split"] == "heldout"}
    files = {file.name: file for file in (TRAINING / "heldout").glob("*.jpg")}
    sources = (TRAINING / "heldout" / "SOURCES.md").read_text(encoding="utf-8")
    assert files.keys() == heldout.keys()
    for name, photo in heldout.items():
        assert photo["licence"] in {"public domain", "CC0-1.0"}, name
        (row,) = (line for line in sources.splitlines() if line.startswith(f"| {name} |"))
        assert all(photo[fact] in row for fact in ("author", "licence", "package", "path"))
        assert files[name].stat().st_size <= 46 * 1024, name


# the package


def write_parts(data: Path, size: int = 10) -> None:
    """Folders such as the trainings leave behind; the weights are a hole of `size` bytes."""
    noise = {"_name_or_path": "/home/me/base", "_diffusers_version": "0", "transformers_version": "5"}
    for folder in ("experts/high", "experts/low", "vae/vae", "text/text_encoder", "text/tokenizer"):
        (data / folder).mkdir(parents=True)
        (data / folder / "config.json").write_text(json.dumps({"kept": folder, **noise}))
        with (data / folder / "model.safetensors").open("wb") as file:
            file.truncate(size)
    (data / "text/tokenizer/tokenizer.json").write_text('{"as":"it is"}')
    (data / "experts/few_step.safetensors").write_bytes(b"few")


def packed(monkeypatch: pytest.MonkeyPatch, data: Path, out: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["package", "--data", str(data), "--out", str(out)])
    package.main()


def test_the_package_holds_every_part_and_nothing_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    write_parts(data)
    packed(monkeypatch, data, out)
    assert json.loads((out / "transformer" / "config.json").read_text()) == {"kept": "experts/high"}
    assert (out / "tokenizer" / "tokenizer.json").read_text() == '{"as":"it is"}'
    assert (out / "few_step.safetensors").read_bytes() == b"few"
    index = json.loads((out / "model_index.json").read_text())
    assert {name for name, value in index.items() if isinstance(value, list)} == {
        folder.name for folder in out.iterdir() if folder.is_dir()
    }
    scheduler = UniPCMultistepScheduler.from_pretrained(out / "scheduler")
    assert (scheduler.config.flow_shift, scheduler.config.use_flow_sigmas) == (3.0, True)
    everything = "".join(file.read_text() for file in out.rglob("*.json"))
    assert not [name for name in package.NOISE if name in everything]
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    # what is no longer trained is no longer shipped
    (data / "experts/few_step.safetensors").unlink()
    (data / "vae/vae/config.json").unlink()
    packed(monkeypatch, data, out)
    assert not (out / "few_step.safetensors").exists()
    assert not (out / "vae/config.json").exists()


@pytest.mark.parametrize(("size", "refusal"), [(14 * 2**20 + 1, "a file may have 14"), (7 * 2**20, "may have 32")])
def test_a_package_that_is_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, refusal: str
) -> None:
    write_parts(tmp_path / "data", size)
    with pytest.raises(SystemExit, match=refusal):
        packed(monkeypatch, tmp_path / "data", tmp_path / "out")


# the curves


def test_the_reports_become_one_that_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from training import curves

    curve = [{"step": 50 * n, "seconds": 2.0 * n, "loss": 1 / n, "db": n / 10} for n in range(1, 302)]
    common = {"seconds": 12.345, "parameters": 10**6}
    for part, report in {
        "pictures": {**common, "step": 15050, "recipe": {"pace": {"seed": 1}}, "curve": curve},
        "text": {**common, "seed": 1, "wrong_drawn_en": [{"text": "x"}], "curve": [[100, 0.5], [200, 0.25]]},
        "base": {**common, "step": 50, "curve": [{"step": 50, "seconds": 1.0, "loss": 2.0, "noisiest": 1.0}]},
    }.items():
        file = tmp_path / curves.PARTS[part][0]
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(report))
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["curves", "--data", str(tmp_path), "--out", str(out), "--name", "it"])
    curves.main()
    written = (out / "it.json").read_text()
    found = json.loads(written)
    assert list(found) == ["text", "pictures", "base"]
    assert found["text"]["curve"] == {"step": [100, 200], "loss": [0.5, 0.25]}
    assert (found["text"]["step"], found["text"]["seconds"]) == (200, 12.3)
    assert "wrong_drawn_en" not in found["text"]
    thin = found["pictures"]["curve"]
    assert {len(values) for values in thin.values()} == {101}
    assert thin["loss"][0] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3, abs=1e-6)
    assert (thin["step"][-1], thin["seconds"][-1], thin["db"][-1]) == (15050, 602.0, 30.1)
    assert len(written.splitlines()) < 60, "a list of numbers is one line"
    with Image.open(out / "it.png") as picture:
        assert picture.size[0] == 1500


def test_the_filed_report_is_small_and_says_nothing_of_the_machine() -> None:
    for file in (TRAINING / "results").glob("training_*.json"):
        written = file.read_text(encoding="utf-8")
        assert not re.search(r'"[^"\n]*(/home|/work|/tmp|/root|\.data)', written)
        for part in json.loads(written).values():
            assert all(len(values) <= 120 for values in part["curve"].values())
        assert file.with_suffix(".png").stat().st_size <= 200 * 1024
