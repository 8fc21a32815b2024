"""training.estimate: the camera's motion is measured as it was, whatever happened to the pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageFilter

from training.motion import CATALOGUE, Motion, find, to_scene

cv2 = pytest.importorskip("cv2")
from training import estimate  # noqa: E402 (it needs cv2)

SIZES = [(256, 160), (160, 256)]
NUM_FRAMES = 17
CAMERA = [name for name, motion in CATALOGUE.items() if not (motion.object_x or motion.object_y)]
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up", "in": "out", "out": "in"}
MOVING = [name for name in CAMERA if find(name) != Motion() and "ken" not in name and "bright" not in name]


def scene() -> npt.NDArray[np.float64]:
    """Blots of many sizes, larger than any motion needs."""
    random, side = np.random.default_rng(5), 560
    picture = np.zeros((side, side, 3))
    for cells in (6, 14, 35, 90):
        blots = random.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        picture += np.asarray(Image.fromarray(blots).resize((side, side), Image.Resampling.BICUBIC)) / 4
    return picture


SCENE = scene()


def frame(motion: Motion, index: int, size: tuple[int, int] = SIZES[0]) -> npt.NDArray[np.uint8]:
    """Frame `index` of a camera over the scene's middle, bilinear."""
    width, height = size
    x, y = np.meshgrid(np.arange(width) - (width - 1) / 2, np.arange(height) - (height - 1) / 2)
    points = [to_scene(motion, index, *point) for point in zip(x.ravel(), y.ravel(), strict=True)]
    u, v = (np.array(axis).reshape(height, width) + (len(SCENE) - 1) / 2 for axis in zip(*points, strict=True))
    i, j = np.floor(u).astype(int), np.floor(v).astype(int)
    right, down = (u - i)[..., None], (v - j)[..., None]
    upper = SCENE[j, i] * (1 - right) + SCENE[j, i + 1] * right
    lower = SCENE[j + 1, i] * (1 - right) + SCENE[j + 1, i + 1] * right
    light = np.exp(motion.light * index)
    return np.clip((upper * (1 - down) + lower * down) * light, 0, 255).round().astype(np.uint8)


def opposite(name: str) -> str:
    words = name.replace("+", "-+-").split("-")
    return "-".join(OPPOSITE.get(word, word) for word in words).replace("-+-", "+")


def check(found: estimate.Estimate, motion: Motion) -> None:
    interval = NUM_FRAMES - 1
    assert found.pan_x == pytest.approx(motion.pan_x * interval, abs=1)
    assert found.pan_y == pytest.approx(motion.pan_y * interval, abs=1)
    assert found.zoom == pytest.approx(motion.zoom * interval, abs=0.02)
    assert found.roll == pytest.approx(motion.roll * interval, abs=0.5)


@pytest.mark.parametrize("name", CAMERA)
def test_every_motion_of_the_camera_is_recovered(name: str) -> None:
    motion = find(name)
    found = estimate.estimate(frame(motion, 0), frame(motion, NUM_FRAMES - 1))
    check(found, motion)
    assert found.confidence > 0.9
    assert estimate.agrees(found, name, NUM_FRAMES)


@pytest.mark.parametrize("name", MOVING)
def test_a_motion_does_not_agree_with_its_opposite(name: str) -> None:
    motion = find(name)
    found = estimate.Estimate(width=256, height=160, **totals(motion))
    assert estimate.agrees(found, name, NUM_FRAMES)
    assert not estimate.agrees(found, opposite(name), NUM_FRAMES)
    assert not estimate.agrees(found, "still", NUM_FRAMES)
    assert estimate.classify(found, NUM_FRAMES) == name.removesuffix("-slow").removesuffix("-fast")


@pytest.mark.parametrize("name", ["pan-left-fast", "zoom-in-fast", "zoom-out-fast", "roll-right-fast", "still"])
def test_soft_noisy_dark_frames_are_measured_too(name: str) -> None:
    motion = replace(find(name), light=np.log(0.4) / (NUM_FRAMES - 1))
    image = Image.fromarray(frame(motion, NUM_FRAMES - 1, SIZES[1])).filter(ImageFilter.GaussianBlur(1.2))
    noise = np.random.default_rng(3).normal(0, 5, np.asarray(image).shape)
    last = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
    found = estimate.estimate(frame(motion, 0, SIZES[1]), last)
    check(found, motion)
    assert found.light == pytest.approx(np.log(0.4), abs=0.05)
    assert estimate.agrees(found, name, NUM_FRAMES)


def test_frames_of_two_scenes_agree_with_nothing() -> None:
    other = np.random.default_rng(1).integers(0, 256, (160, 256, 3), dtype=np.uint8)
    found = estimate.estimate(frame(Motion(), 0), other)
    assert found.confidence < estimate.MIN_CONFIDENCE
    assert estimate.classify(found, NUM_FRAMES) == "unclear"
    assert not any(estimate.agrees(found, name, NUM_FRAMES) for name in CAMERA)


def test_a_motion_beside_the_asked_one_must_be_small() -> None:
    found = estimate.Estimate(width=256, height=160, pan_x=-32.0, pan_y=10.0)
    assert estimate.agrees(found, "pan-left", NUM_FRAMES)
    assert not estimate.agrees(replace(found, pan_y=20.0), "pan-left", NUM_FRAMES)
    assert not estimate.agrees(replace(found, pan_x=-2.0, pan_y=0.0), "pan-left", NUM_FRAMES)


def test_the_displacement_is_in_pixels() -> None:
    assert estimate.Estimate(width=256, height=160).largest_px == 0
    pan = estimate.Estimate(width=256, height=160, pan_x=3.0, pan_y=4.0)
    assert pan.displacement_px == pytest.approx(5)
    zoom = estimate.Estimate(width=201, height=101, zoom=np.log(2))
    assert zoom.largest_px == pytest.approx(np.hypot(100, 50) / 2)


def test_the_warped_photo_is_the_moved_frame() -> None:
    motion = find("pan-right+zoom-in")
    last = frame(motion, NUM_FRAMES - 1)
    found = estimate.Estimate(width=256, height=160, **totals(motion))
    warped, visible = estimate.warp(frame(motion, 0), found)
    assert 0.3 < visible.mean() < 1
    assert np.abs(warped.astype(int) - last)[visible].mean() < 2


def test_an_object_cannot_be_judged() -> None:
    with pytest.raises(ValueError, match="moves an object"):
        estimate.agrees(estimate.Estimate(width=256, height=160), "object-left", NUM_FRAMES)


def totals(motion: Motion) -> dict[str, float]:
    names = ("pan_x", "pan_y", "zoom", "roll", "light")
    return {name: getattr(motion, name) * (NUM_FRAMES - 1) for name in names}
