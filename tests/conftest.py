"""What the tests share: a photo, tiny checkpoints built once, and plans for them."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from framefit.device import Device
from framefit.families import Checkpoint
from framefit.families.parts import Parts, load_parts
from framefit.plan import Plan
from framefit.planning import choose
from framefit.request import Request
from framefit.testing import save_tiny

torch.set_num_threads(1)  # tiny models: a second thread waits more than it works


LONGEST = {f"test_{name}.py" for name in ("resume", "bundled", "tune", "choose", "bench", "cli", "disk", "decode")}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: with several workers one of them would be alone at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish() -> None:
    """What is imported is there for good: the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


SIZE = (96, 64)


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smooth, coloured picture with an edge in it."""
    y, x = np.mgrid[0:80, 0:120] / 80
    pixels = np.stack([x / 1.5, y, (x > 0.7) * 0.8], axis=-1)
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray((pixels * 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="session")
def end_photo(photo: Path) -> Path:
    path = photo.with_name("end.png")
    Image.open(photo).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """Row id -> its tiny checkpoint, built once."""
    root, rows = tmp_path_factory.mktemp("tiny"), {}

    def build(id: str) -> Checkpoint:
        if id not in rows:
            rows[id] = save_tiny(id, root / id)
        return rows[id]

    return build


@pytest.fixture(scope="session")
def fork() -> ForkServerContext:
    """Processes that start with everything imported and no thread running."""
    context = multiprocessing.get_context("forkserver")
    models = ("transformers.transformer_wan", "transformers.transformer_easyanimate", "unets.unet_i2vgen_xl")
    context.set_forkserver_preload(["framefit.run", *(f"diffusers.models.{name}" for name in models)])
    return context


@pytest.fixture(scope="session")
def cpu() -> Device:
    return Device.detect("cpu")


@pytest.fixture
def make_plan(photo: Path, cpu: Device) -> Callable[..., Plan]:
    """(checkpoint, settings, **request fields) -> a plan for a small, short video."""

    def make(checkpoint: Checkpoint, settings: dict[str, str] | None = None, **fields: Any) -> Plan:
        defaults: dict[str, Any] = {"prompt": "a boat drifts to the left", "num_frames": 5, "steps": 4, "seed": 7}
        defaults |= {"width": SIZE[0], "height": SIZE[1], "image": photo}
        request = Request(model=str(checkpoint.folder), **(defaults | fields))
        return choose(request, checkpoint, cpu, photo_size=(120, 80), settings=settings)

    return make


@pytest.fixture
def load_fp32() -> Callable[[Checkpoint], Parts]:
    def load(checkpoint: Checkpoint) -> Parts:
        assert checkpoint.folder is not None
        return load_parts(checkpoint, checkpoint.folder, dtype=torch.float32, device=torch.device("cpu"))

    return load


@pytest.fixture(autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No run, note or tuned setting of whoever runs the tests comes into them, or goes out."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user of one's own: state, caches and the working folder lie below a temporary folder."""
    root = tmp_path / "home"
    for name in ("STATE", "CACHE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(root / name.lower()))
    monkeypatch.setenv("HF_HOME", str(root / "hf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root / "hf" / "hub"))  # read at import
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return root
