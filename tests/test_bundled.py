"""The model in the package: its size, its row, and that it really moves a photo as the prompt says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from framefit.families import find
from framefit.families.files import header
from framefit.photo import fit
from framefit.photo import load as load_photo
from framefit.pipeline import Pipeline, load
from framefit.request import Request
from framefit.run import Options, prepare

ROCKET = Path(__file__).parents[1] / "framefit" / "assets" / "rocket.jpg"


def test_the_files_stay_small() -> None:
    """A clone carries them for good."""
    folder = find("tiny").folder
    assert folder is not None
    sizes = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
    assert max(sizes) <= 14 * 2**20
    assert sum(sizes) <= 32 * 2**20


def test_the_row_is_the_architecture_of_a14b() -> None:
    tiny, large = find("tiny"), find("wan2.2-i2v-a14b")
    assert [c.name for c in tiny.components] == [c.name for c in large.components]
    assert [c.class_name for c in tiny.components] == [c.class_name for c in large.components]
    assert (tiny.family, tiny.experts, tiny.boundary_ratio) == (large.family, large.experts, 0.9)
    for key in ("patch_size", "in_channels", "out_channels", "cross_attn_norm", "qk_norm"):
        assert list(np.atleast_1d(tiny["transformer"].config[key])) == list(
            np.atleast_1d(large["transformer"].config[key])
        )
    vae = tiny["vae"].config
    assert (vae["z_dim"], vae["scale_factor_temporal"], vae["scale_factor_spatial"]) == (16, 4, 8)


def test_the_weights_are_fp16_and_say_nothing_of_the_machine_they_come_from() -> None:
    folder = find("tiny").folder
    assert folder is not None
    for file in folder.rglob("*.safetensors"):
        with file.open("rb") as stream:
            head = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        assert {entry["dtype"] for name, entry in head.items() if name != "__metadata__"} == {"F16"}, file
        assert header(file)[1] is None
    for file in folder.rglob("*.json"):
        assert "_name_or_path" not in file.read_text(encoding="utf-8"), file


class Camera:
    """Videos of the bundled photo in a few steps, each made once: grey frames (17, H, W) from -1 to 1."""

    def __init__(self) -> None:
        self.parts: Any = None
        self.made: dict[str, np.ndarray[Any, Any]] = {}

    def __call__(self, prompt: str) -> np.ndarray[Any, Any]:
        if prompt not in self.made:
            request = Request(image=ROCKET, prompt=prompt, seed=3, steps=4, width=240, height=160)
            row, plan = prepare(request, Options(device="cpu", checkpoints=None))
            self.parts = self.parts or load(plan, row).parts
            frames = np.stack(list(Pipeline(plan, self.parts).run().frames))
            self.made[prompt] = frames.mean(axis=3) / 127.5 - 1
        return self.made[prompt]


@pytest.fixture(scope="module")
def camera() -> Camera:
    return Camera()


@pytest.mark.parametrize(
    ("prompt", "right", "down"),
    [
        ("the camera pans left", 1, 0),
        ("镜头向右平移", -1, 0),
        ("the camera tilts up past the rocket", 0, 1),
    ],
)
def test_the_picture_drifts_against_the_camera(camera: Camera, prompt: str, right: int, down: int) -> None:
    frames = camera(prompt)
    dx, dy = _shift(frames[0], frames[-1])
    assert (np.sign(dx) * (abs(dx) > 8), np.sign(dy) * (abs(dy) > 8)) == (right, down), (dx, dy)


def test_a_still_camera_stays_and_a_zoom_enlarges(camera: Camera) -> None:
    still, closer = camera("static shot, the camera does not move"), camera("镜头推近")
    assert np.abs(_shift(still[0], still[-1])).max() <= 1
    photo = still[0]
    kept, enlarged = _likeness(closer[-1], photo), _likeness(closer[-1], _magnified(photo, 1.22))
    assert enlarged > kept + 0.05, (kept, enlarged)
    assert _likeness(still[-1], photo) > 0.95


def test_the_first_frame_is_the_photo(camera: Camera) -> None:
    frames = camera("the camera pans left")
    photo = fit(load_photo(ROCKET), frames.shape[2], frames.shape[1], "crop").convert("L")
    assert _likeness(frames[0], np.asarray(photo) / 127.5 - 1) > 0.95


def test_the_model_is_loaded_as_it_lies_there() -> None:
    """Nothing of a part is missing or left over, which would leave it random."""
    row = find("tiny")
    assert row.folder is not None
    parts = load(prepare(Request(image=ROCKET, prompt="x"), Options(device="cpu"))[1], row).parts
    for name in ("transformer", "transformer_2", "vae"):
        saved = load_file(row.folder / name / "diffusion_pytorch_model.safetensors")
        state = parts[name].state_dict()
        assert saved.keys() == dict(parts[name].named_parameters()).keys()
        assert all(torch.equal(state[key].half(), saved[key]) for key in saved)


def _shift(first: np.ndarray[Any, Any], last: np.ndarray[Any, Any]) -> tuple[int, int]:
    """(right, down) in px by which the content moved: the peak of the windowed phase correlation."""
    window = np.outer(np.hanning(first.shape[0]), np.hanning(first.shape[1]))
    one, other = (np.fft.fft2((frame - frame.mean()) * window) for frame in (first, last))
    cross = other * one.conj()
    peak = np.fft.ifft2(cross / (np.abs(cross) + 1e-9)).real
    down, right = np.unravel_index(peak.argmax(), peak.shape)
    height, width = first.shape
    return int((right + width // 2) % width - width // 2), int((down + height // 2) % height - height // 2)


def _magnified(frame: np.ndarray[Any, Any], factor: float) -> np.ndarray[Any, Any]:
    height, width = frame.shape
    box = tuple(side * (1 - 1 / factor) / 2 for side in (width, height))
    picture = Image.fromarray(frame.astype(np.float32))
    whole = (box[0], box[1], width - box[0], height - box[1])
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC, box=whole))


def _likeness(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """Correlation of two pictures without their borders."""
    a, b = (frame[20:-20, 20:-20].ravel() for frame in (one, other))
    return float(np.corrcoef(a, b)[0, 1])
