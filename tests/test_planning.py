"""What a request becomes: defaults, presets, sizes, precision, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from framefit.device import Device
from framefit.errors import BadInput, DoesNotFit, UsageError
from framefit.families import CHECKPOINTS
from framefit.plan import Guidance, Plan
from framefit.planning import check_fits, choose
from framefit.request import Request

CARD = Device(
    id="cuda:0",
    name="a large card",
    compute_capability=(9, 0),
    vram_total_bytes=200 * 2**30,
    vram_free_bytes=200 * 2**30,
    ram_total_bytes=2**38,
    ram_free_bytes=2**38,
    disk_free_bytes=2**40,
)


def plan_for(id: str, *, photo: tuple[int, int] = (1600, 900), device: Device = CARD, **fields: Any) -> Plan:
    how = {k: fields.pop(k) for k in ("preset", "settings", "precision") if k in fields}
    request = Request(**({"image": Path("photo.jpg"), "prompt": "waves"} | fields), model=id)
    return choose(request, CHECKPOINTS[id], device, photo_size=photo, **how)


@pytest.mark.parametrize(
    ("id", "size", "frames", "fps", "steps", "guidance", "shift"),
    [
        ("wan2.2-i2v-a14b", (1280, 720), 81, 16, 40, (3.5, 3.5), 5.0),
        ("wan2.2-ti2v-5b", (1280, 704), 121, 24, 50, (5.0,), None),
        ("wan2.1-i2v-14b-480p", (832, 480), 81, 16, 40, (5.0,), 3.0),
        ("easyanimate-v5.1-7b-inp", (672, 384), 49, 8, 50, (6.0,), None),
        ("i2vgen-xl", (1264, 712), 16, 16, 50, (9.0,), None),
    ],
)
def test_the_authors_defaults_at_the_photos_aspect(
    id: str, size: Any, frames: int, fps: float, steps: int, guidance: Any, shift: float | None
) -> None:
    plan = plan_for(id)
    request = plan.request
    assert (request.width, request.height) == size
    assert (request.num_frames, request.fps, request.steps) == (frames, fps, steps)
    assert (request.guidance, request.shift) == (guidance, shift)
    assert request.negative_prompt == CHECKPOINTS[id].negative_prompt
    assert set(plan.reasons) >= {"size", "num_frames", "fps", "steps", "guidance", "seed", "shift", "precision"}


def test_what_the_user_says_wins_over_the_preset_and_the_preset_over_the_default() -> None:
    plan = plan_for("i2vgen-xl", preset="quality", steps=7, photo=(500, 500))
    assert (plan.request.width, plan.request.height) == (768, 768)
    assert (plan.request.num_frames, plan.request.steps) == (24, 7)
    origin, _, warning = plan.reasons["num_frames"].partition("; ")
    assert origin == "the preset 'quality'"
    assert "was trained on 16 frames and sees 24 at once" in warning
    assert plan.reasons["steps"] == "asked for"


@pytest.mark.parametrize("row", CHECKPOINTS.values(), ids=lambda row: row.id)
def test_every_preset_gives_a_plan(row: Any) -> None:
    assert set(row.presets) == {"draft", "standard", "quality"}
    plans = [plan_for(row.id, preset=name) for name in ("draft", "standard", "quality")]
    work = [p.request.width * p.request.height * p.request.num_frames * p.request.steps for p in plans]
    assert work == sorted(work)


@pytest.mark.parametrize(
    ("photo", "fields", "size", "fit"),
    [
        ((900, 1600), {}, (720, 1280), "crop"),
        ((1000, 1000), {}, (960, 960), "crop"),
        ((1000, 1000), {"fit": "crop"}, (1280, 720), "crop"),
        ((1000, 1000), {"fit": "pad"}, (1280, 720), "pad"),
        ((1000, 1000), {"width": 832, "height": 480}, (832, 480), "crop"),
        ((1000, 1000), {"width": 832, "height": 480, "fit": "pad"}, (832, 480), "pad"),
        ((1000, 1000), {"fit": "nearest"}, (960, 960), "crop"),
    ],
)
def test_the_photo_is_never_stretched(photo: Any, fields: Any, size: Any, fit: str) -> None:
    request = plan_for("wan2.2-i2v-a14b", photo=photo, **fields).request
    assert ((request.width, request.height), request.fit) == (size, fit)


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"width": 830, "height": 480}, BadInput, "the nearest are 832x480 or 816x480"),
        ({"width": 832, "height": 480, "fit": "nearest"}, UsageError, "leave one of them out"),
        ({"num_frames": 80}, BadInput, "use 77 or 81"),
        ({"guidance": (1.0, 2.0, 3.0)}, BadInput, "has 2 experts: give 1 or 2"),
        ({"preset": "best"}, UsageError, "has draft, standard, quality"),
        ({"settings": {"speed": "11"}}, UsageError, "'speed' is unknown: the settings are quantize, chunk, decode"),
        ({"settings": {"guidance": "maybe"}}, UsageError, "use guidance=together or guidance=apart"),
        ({"precision": "fp4"}, UsageError, "use bf16, fp16, fp32"),
        ({"last_image": Path("end.jpg"), "num_frames": 1}, BadInput, "ask for more frames"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(fields: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        plan_for("wan2.2-i2v-a14b", **fields)


def test_an_end_image_is_refused_where_the_model_takes_none() -> None:
    assert plan_for("wan2.2-i2v-a14b", last_image=Path("end.jpg")).request.last_image == Path("end.jpg")
    with pytest.raises(BadInput, match="i2vgen-xl takes only a start image"):
        plan_for("i2vgen-xl", last_image=Path("end.jpg"))


@pytest.mark.parametrize(
    ("capability", "precision"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16"), (None, "fp32")]
)
def test_precision_follows_the_card(capability: Any, precision: str) -> None:
    device = replace(CARD, compute_capability=capability)
    assert plan_for("i2vgen-xl", device=device).precision == precision
    assert plan_for("i2vgen-xl", device=device, precision="fp32").precision == "fp32"


def test_weights_that_exceed_the_card_are_refused_with_both_numbers() -> None:
    small = replace(CARD, name="RTX 3060", vram_free_bytes=12 * 2**30)
    plan = plan_for("wan2.2-i2v-a14b", device=small)
    assert not plan.feasible
    with pytest.raises(DoesNotFit, match=r"needs 64\.\d GiB .* RTX 3060 has 12\.0 GiB free"):
        check_fits(plan)
    fits = plan_for("i2vgen-xl", device=small)
    assert fits.feasible
    assert fits.estimate.weights_bytes == 2 * CHECKPOINTS["i2vgen-xl"].params
    check_fits(fits)


def test_guidance_runs_as_the_reference_does_unless_told() -> None:
    assert plan_for("i2vgen-xl").setting(Guidance).value == "together"
    assert plan_for("wan2.2-ti2v-5b").setting(Guidance).value == "apart"
    told = plan_for("wan2.2-ti2v-5b", settings={"guidance": "together"}).setting(Guidance)
    assert (told.value, told.because, told.tier) == ("together", "asked for", "exact")


def test_a_plan_survives_json() -> None:
    plan = plan_for("wan2.2-i2v-a14b", seed=3, last_image=Path("end.jpg"))
    assert Plan.from_json(json.loads(plan.dumps())) == plan


def test_a_seed_is_drawn_where_none_is_given() -> None:
    assert plan_for("i2vgen-xl", seed=5).request.seed == 5
    assert plan_for("i2vgen-xl").request.seed != plan_for("i2vgen-xl").request.seed


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"width": 832}, "come together"),
        ({"num_frames": 0}, "num_frames is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"fps": 0.0}, "fps is 0"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"guidance": (float("nan"),)}, "guidance is nan"),
        ({"guidance": (-1.0,)}, "guidance is -1"),
        ({"guidance": ()}, "guidance is empty"),
        ({"seed": -1}, "seed is -1"),
        ({"fit": "stretch"}, "fit is 'stretch'"),
        ({"loras": ("a.safetensors",)}, "must be a list of Lora"),
    ],
)
def test_a_request_refuses_what_no_model_could_take(fields: Any, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        Request(**({"image": Path("photo.jpg"), "prompt": "waves"} | fields))


def test_a_request_survives_json_and_refuses_unknown_fields() -> None:
    request = Request(image=Path("a.jpg"), prompt="波浪", guidance=(1.0, 2.0), last_image=Path("b.jpg"))
    assert Request.from_json(json.loads(json.dumps(request.to_json()))) == request
    with pytest.raises(BadInput, match="unknown fields: sampler"):
        Request.from_json(request.to_json() | {"sampler": "euler"})


def test_the_cpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device.detect("cpu")
    assert (device.id, device.vram_total_bytes, device.compute_capability) == ("cpu", 0, None)
    assert 0 < device.ram_free_bytes <= device.ram_total_bytes
    assert device.budget_bytes == device.ram_free_bytes
    assert Device.from_json(json.loads(json.dumps(device.to_json()))) == device
    assert Device.from_json(json.loads(json.dumps(CARD.to_json()))) == CARD


@pytest.mark.parametrize("which", ["tpu", "cuda:x", "cuda:99"])
def test_a_device_that_is_not_here_is_refused(which: str) -> None:
    with pytest.raises(UsageError, match=f"device '{which}'"):
        Device.detect(which)


def test_memory_is_the_control_groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from framefit import device

    (tmp_path / "memory.max").write_text(str(2**30))
    (tmp_path / "memory.current").write_text(str(2**28))
    monkeypatch.setattr(device, "CONTROL_GROUP", tmp_path)
    assert Device.detect("cpu").ram_total_bytes == 2**30
    assert Device.detect("cpu").ram_free_bytes == 2**30 - 2**28
    (tmp_path / "memory.stat").write_text(f"anon 5\nactive_file 7\ninactive_file {2**27}\nslab 3\n")
    assert Device.detect("cpu").ram_free_bytes == 2**30 - 2**28 + 2**27, "cached files make room"
    (tmp_path / "memory.max").write_text("max")
    assert Device.detect("cpu").ram_total_bytes > 2**30
