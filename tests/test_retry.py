"""A video that is not sound: named, and made once more without what may be the cause, where there is such a thing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from framefit import passes, pipeline, plan, run, video
from framefit.errors import ModelMissing
from framefit.families import Checkpoint, i2vgen
from framefit.families.parts import Parts
from framefit.plan import Setting, Tier
from framefit.planning import suspects
from framefit.quality.sanity import Watch
from framefit.request import Request
from framefit.run import Options, generate

choose = import_module("framefit.planning.choose")  # the room has a function of that name

Tiny = Callable[[str], Checkpoint]


@dataclass(frozen=True, kw_only=True, slots=True)
class Dark(Setting):
    """Spoils the weights for good, as a bad quantisation would."""

    type = "dark"
    title = "darkness"
    values = ("no", "yes")
    tier: ClassVar[Tier] = "near"


def spoil(parts: Parts, setting: Dark) -> None:
    if setting.value == "yes":
        with torch.no_grad():
            parts["vae"].decoder.conv_out.weight.zero_()
            parts["vae"].decoder.conv_out.bias.fill_(-10)


@dataclass(frozen=True, kw_only=True, slots=True)
class Halves(Setting):
    """Decodes with an edge down the middle."""

    type = "halves"
    title = "halves"
    values = ("no", "yes")
    phases = ("decode",)
    tier: ClassVar[Tier] = "near"


def part(parts: Parts, setting: Halves) -> None:
    def step(module: object, call: object, output: torch.Tensor) -> torch.Tensor:
        half = torch.arange(output.shape[-1]) >= output.shape[-1] // 2
        return output.clamp(-0.4, 0.4) * 0.1 + half

    if setting.value == "yes":
        parts["vae"].halves = parts["vae"].decoder.register_forward_hook(step)


def whole(parts: Parts) -> None:
    if handle := getattr(parts["vae"], "halves", None):
        handle.remove()
        del parts["vae"].halves


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[Setting]], None]:
    """Give the program another setting, which a plan has for some reason of its own."""

    def add(kind: type[Setting]) -> None:
        usual, sound = choose.untouched, suspects.untouched
        technique = {
            Dark: SimpleNamespace(apply=spoil, remove=lambda parts: None),
            Halves: SimpleNamespace(apply=part, remove=whole),
        }[kind]
        monkeypatch.setitem(plan.SETTINGS, kind.type, kind)
        monkeypatch.setattr(passes, "ORDER", (*passes.ORDER, (kind, technique)))
        monkeypatch.setattr(choose, "untouched", lambda row: (*usual(row), kind(value="yes", because="it is faster")))
        monkeypatch.setattr(suspects, "untouched", lambda row: (*sound(row), kind(value="no")))

    return add


@dataclass
class Made:
    report: run.Report
    frames: np.ndarray[Any, Any]
    steps: list[int]


@pytest.fixture
def make(tiny: Tiny, photo: Path, tmp_path: Path) -> Callable[..., Made]:
    row = tiny("i2vgen-xl")
    request = Request(
        image=photo, prompt="waves", model=str(row.folder), width=96, height=64, num_frames=5, steps=2, seed=7,
        guidance=(1.0,),
    )  # fmt: skip

    def make(name: str, **facts: Any) -> Made:
        steps: list[int] = []
        options = Options(device="cpu", on_step=lambda step: steps.append(step.index), **facts)
        report = generate(request, tmp_path / name, options)
        return Made(report, np.stack(list(video.read(report.video))), steps)

    return make


@pytest.fixture
def sound(make: Callable[..., Made]) -> Made:
    """With none of the settings above."""
    found = make("sound")
    assert found.report.findings == ()
    assert found.report.retry is None
    return found


def test_a_dark_video_is_made_again_without_what_darkened_it(
    sound: Made, make: Callable[..., Made], near: Callable[[type[Setting]], None], tmp_path: Path
) -> None:
    near(Dark)
    found = make("out")
    assert found.report.retry is not None
    assert found.report.retry.findings[0] == "black: frames 0-4"
    assert (found.report.retry.withdrawn, found.report.retry.failed) == ("dark=yes", None)
    assert found.report.findings == ()
    assert found.steps == [1, 2, 1, 2]
    assert np.array_equal(found.frames, sound.frames)
    (told,) = found.report.notices
    assert told.startswith("the video may not be sound (black: frames 0-4; frozen: all 5 frames are the same)")
    assert told.endswith("it is made once more without dark=yes.")
    assert video.parameters(found.report.video)["settings"]["dark"] == "no"
    assert found.report.to_json()["report"]["retry"]["withdrawn"] == "dark=yes"


def test_a_seam_has_the_decode_again_alone(
    sound: Made, make: Callable[..., Made], near: Callable[[type[Setting]], None]
) -> None:
    near(Halves)
    found = make("out")
    retry = found.report.retry
    assert retry is not None
    assert retry.findings[0].startswith("a seam: a line at x=48 stands out ")
    assert len(retry.findings) == 1
    assert (retry.withdrawn, retry.failed) == ("halves=yes", None)
    assert found.steps == [1, 2], "the latents are kept"
    assert np.array_equal(found.frames, sound.frames)


def test_what_the_user_asked_for_is_named_and_kept(
    make: Callable[..., Made], near: Callable[[type[Setting]], None]
) -> None:
    near(Dark)
    found = make("out.webp", settings={"dark": "yes"})
    assert found.frames.max() <= 8
    assert found.report.retry is None
    assert found.report.findings[0] == "black: frames 0-4"
    assert found.report.notices[-1].endswith("dark=yes may be the cause, leave it out to see.")
    assert found.steps == [1, 2]


def test_a_second_try_that_fails_leaves_the_first_video(
    make: Callable[..., Made], near: Callable[[type[Setting]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    near(Dark)
    read, calls = pipeline.load_parts, []

    def once(*arguments: Any, **facts: Any) -> Parts:
        calls.append(1)
        if len(calls) > 1:
            raise ModelMissing("the disk is gone.")
        return read(*arguments, **facts)

    monkeypatch.setattr(pipeline, "load_parts", once)
    found = make("out.webp")
    assert found.frames.max() <= 8
    assert found.report.retry is not None
    assert found.report.retry.failed == "the disk is gone."
    assert found.report.findings == found.report.retry.findings
    assert "the first video is kept: the disk is gone." in found.report.notices[-1]


def test_a_still_video_of_exact_settings_is_told_and_kept(
    make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = i2vgen.decode

    def still(*arguments: Any) -> Iterator[torch.Tensor]:
        chunks = list(decode(*arguments))
        yield from [chunks[0]] * len(chunks)

    monkeypatch.setattr(i2vgen, "decode", still)
    found = make("out.webp")
    assert found.report.retry is None
    assert found.report.findings == ("frozen: all 5 frames are the same",)
    assert found.report.notices == ("the video may not be sound (frozen: all 5 frames are the same).",)
    assert found.steps == [1, 2]


def test_what_both_tries_have_in_common_is_told(
    make: Callable[..., Made], near: Callable[[type[Setting]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    near(Dark)
    decode = i2vgen.decode
    monkeypatch.setattr(i2vgen, "decode", lambda *a: (torch.zeros_like(chunk) for chunk in decode(*a)))
    found = make("out.webp")
    assert found.report.retry is not None
    assert found.report.findings == found.report.retry.findings
    assert found.report.notices[-1].startswith("without dark=yes the video may not be sound either (black: frames")
    assert found.steps == [1, 2, 1, 2]


def test_thin_looking_sees_the_same() -> None:
    y, x = np.mgrid[0:720, 0:960]
    frames = np.stack([np.stack([(x + 9 * i) % 256, y % 256, (x + y) % 256], axis=-1) for i in range(6)])
    frames = frames.astype(np.uint8)
    frames[1] = 3
    frames[3] = 77
    frames[5] = frames[4]
    seen = []
    for thin in (False, True):
        watch = Watch(thin=thin)
        for frame in frames:
            watch.see(frame)
        seen.append(watch.findings())
    assert seen[0] == seen[1] == ["black: frame 1", "of one colour: frame 3", "the same as the one before: frame 5"]


def test_only_what_computes_otherwise_is_suspected(
    tiny: Tiny, make_plan: Callable[..., plan.Plan], near: Callable[[type[Setting]], None]
) -> None:
    row = tiny("i2vgen-xl")
    exact = make_plan(row, {"guidance": "apart", "offload": "block"})
    assert suspects.suspects(exact, row, seam_alone=False) == ()
    near(Dark)
    near(Halves)
    both = make_plan(row)
    names = {alone: [s.type for s in suspects.suspects(both, row, seam_alone=alone)] for alone in (False, True)}
    assert names == {False: ["dark"], True: ["halves"]}
    lit = replace(both, settings=tuple(s for s in both.settings if s.type != "dark"))
    assert [s.type for s in suspects.suspects(lit, row, seam_alone=False)] == ["halves"]
    gone = suspects.withdrawn(both, row, suspects.suspects(both, row, seam_alone=True), "it had a seam")
    assert [(s.type, s.value) for s in gone.settings[-2:]] == [("dark", "yes"), ("halves", "no")]
