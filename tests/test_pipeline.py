"""The loop's own promises: precision that falls back, cancel, preview, and conditioning that fits its words."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from framefit.errors import Cancelled, NotFinite
from framefit.families import CHECKPOINTS, Checkpoint, easyanimate, easyanimate_v5, wan
from framefit.families.filed import Filed
from framefit.families.parts import Parts, load_parts
from framefit.ledger import Ledger
from framefit.passes import apply_all
from framefit.pipeline import Pipeline, Step
from framefit.plan import Plan
from framefit.schedule import Schedule
from framefit.testing import save_tiny

Tiny = Callable[[str], Checkpoint]
MakePlan = Callable[..., Plan]
LoadFp32 = Callable[[Checkpoint], Parts]


def load_half(row: Checkpoint) -> Parts:
    assert row.folder is not None
    return load_parts(row, row.folder, dtype=torch.float16, device=torch.device("cpu"))


def scale(parts: Parts, component: str, parameter: str, factor: float) -> None:
    with torch.no_grad():
        dict(parts[component].named_parameters())[parameter].mul_(factor)


@pytest.mark.parametrize("id", ["wan2.2-ti2v-5b", "easyanimate-v5.1-7b-inp", "i2vgen-xl"])
def test_half_precision_is_close_to_full_and_stays_half(
    id: str, tiny: Tiny, make_plan: MakePlan, load_fp32: LoadFp32
) -> None:
    row = tiny(id)
    plan = make_plan(row, steps=2)
    latents = []
    for parts in (load_fp32(row), load_half(row)):
        pipeline = Pipeline(plan, apply_all(parts, plan))
        state = pipeline.encode()
        pipeline.denoise(state)
        assert not pipeline.ledger.notices or "tokens" in pipeline.ledger.notices[0]
        latents.append(state.latents)
    assert parts.dtype(row.experts[0]) == torch.float16
    assert latents[1].dtype == torch.float32
    assert (latents[0] - latents[1]).norm() < 0.05 * latents[0].norm()


@pytest.mark.parametrize(
    ("component", "parameter", "phase"),
    [
        ("text_encoder", "encoder.block.0.layer.1.DenseReluDense.wi_1.weight", "the text encoder"),
        ("transformer", "proj_out.weight", "the transformer"),
    ],
)
def test_a_part_that_overflows_in_fp16_runs_again_in_fp32_and_says_so(
    component: str, parameter: str, phase: str, tiny: Tiny, make_plan: MakePlan
) -> None:
    row = tiny("wan2.2-ti2v-5b")
    plan = make_plan(row, steps=2)
    parts = load_half(row)
    scale(parts, component, parameter, 6e4)
    pipeline = Pipeline(plan, apply_all(parts, plan))
    state = pipeline.encode()
    pipeline.denoise(state)
    assert bool(state.latents.isfinite().all())
    assert parts.dtype(component) == torch.float32
    assert len(pipeline.ledger.notices) == 1
    assert phase in pipeline.ledger.notices[0]
    assert "in float16" in pipeline.ledger.notices[0]
    assert "fp32 from here on" in pipeline.ledger.notices[0]


def test_a_decoder_that_overflows_in_fp16_gives_every_frame_once(tiny: Tiny, make_plan: MakePlan) -> None:
    row = tiny("i2vgen-xl")
    plan = make_plan(row, steps=1)
    parts = load_half(row)
    pipeline = Pipeline(plan, apply_all(parts, plan))
    state = pipeline.encode()
    pipeline.denoise(state)
    decode = parts["vae"].decode
    calls = []

    def overflow_at_the_third(latents: torch.Tensor) -> object:
        calls.append(latents.dtype)
        decoded = decode(latents)
        if len(calls) == 3:
            decoded.sample[...] = torch.inf
        return decoded

    parts["vae"].decode = overflow_at_the_third
    frames = list(pipeline.decode(state))
    assert len(frames) == plan.request.num_frames
    assert calls[2] == torch.float16
    assert calls[-1] == torch.float32
    assert "the VAE" in pipeline.ledger.notices[-1]


def test_nan_in_fp32_is_an_error_and_not_a_black_video(tiny: Tiny, make_plan: MakePlan, load_fp32: LoadFp32) -> None:
    row = tiny("wan2.2-i2v-a14b")
    plan = make_plan(row)
    parts = load_fp32(row)
    scale(parts, "transformer_2", "proj_out.bias", float("nan"))
    pipeline = Pipeline(plan, apply_all(parts, plan))
    with pytest.raises(NotFinite, match="the transformer_2 at timestep"):
        pipeline.run()
    scale(parts, "vae", "decoder.conv_out.bias", float("nan"))
    state = pipeline.encode()
    with pytest.raises(NotFinite, match="the VAE produced NaN or infinity in float32"):
        list(pipeline.decode(state))


def test_cancel_ends_the_run_after_the_step_that_it_was_asked_in(
    tiny: Tiny, make_plan: MakePlan, load_fp32: LoadFp32
) -> None:
    row = tiny("i2vgen-xl")
    plan = make_plan(row, steps=6)
    steps: list[int] = []
    pipeline = Pipeline(plan, apply_all(load_fp32(row), plan))
    with pytest.raises(Cancelled, match="after step 2 of 6"):
        pipeline.run(on_step=lambda step: steps.append(step.index), cancelled=lambda: len(steps) == 2)
    assert steps == [1, 2]
    video = pipeline.run(cancelled=lambda: len(steps) == 4, on_step=lambda _: None)
    steps += [3, 4]
    with pytest.raises(Cancelled, match="while the frames were decoded"):
        next(video.frames)


@pytest.mark.parametrize("id", ["wan2.2-i2v-a14b", "wan2.2-ti2v-5b", "easyanimate-v5.1-7b-inp", "i2vgen-xl"])
def test_the_last_preview_is_the_middle_of_the_finished_latents(
    id: str, tiny: Tiny, make_plan: MakePlan, load_fp32: LoadFp32
) -> None:
    row = tiny(id)
    plan = make_plan(row, steps=5)
    pipeline = Pipeline(plan, apply_all(load_fp32(row), plan))
    previews: list[np.ndarray] = []
    steps: list[Step] = []
    state = pipeline.encode()
    pipeline.denoise(state, on_step=lambda step: (steps.append(step), previews.append(step.preview())))
    assert [step.index for step in steps] == [1, 2, 3, 4, 5]
    assert all(step.total == 5 and step.seconds > 0 for step in steps)
    assert {preview.shape for preview in previews} == {(64, 96, 3)}
    finished = pipeline._preview(lambda: state.latents, state.conditioning).astype(int)
    errors = [np.abs(preview - finished).mean() for preview in previews]
    assert errors[-1] <= 2  # the step's own estimate of the end, and the last step goes (nearly) there
    assert errors[0] > errors[-1]


def test_a_prompt_past_the_limit_is_cut_and_the_cut_is_told(
    tiny: Tiny, make_plan: MakePlan, load_fp32: LoadFp32
) -> None:
    row = tiny("i2vgen-xl")
    parts = load_fp32(row)
    for prompt, told in (("x" * 75, False), ("y" * 75 + " then the rest", True)):
        pipeline = Pipeline(make_plan(row, prompt=prompt, guidance=(1.0,)), parts)
        pipeline.encode()
        assert [n for n in pipeline.ledger.notices if "from 'then the rest' on" in n] == pipeline.ledger.notices
        assert bool(pipeline.ledger.notices) == told


def test_a_chat_template_is_not_mistaken_for_the_prompt(tiny: Tiny, make_plan: MakePlan, load_fp32: LoadFp32) -> None:
    row = tiny("easyanimate-v5.1-7b-inp")
    pipeline = Pipeline(make_plan(row, prompt="a" * 236 + " over the hills", guidance=(1.0,)), load_fp32(row))
    pipeline.encode()
    (notice,) = pipeline.ledger.notices
    assert "assistant" not in notice
    assert "hills' on" in notice


@pytest.mark.parametrize(
    ("num_frames", "with_last", "channel_sums"), [(9, False, [4, 0, 0]), (9, True, [4, 0, 1]), (5, True, [4, 1])]
)
def test_wan_marks_the_known_frames(num_frames: int, with_last: bool, channel_sums: list[int]) -> None:
    mask = wan._known_frames(num_frames, 4, with_last=with_last)
    assert mask.shape == (1, 4, len(channel_sums), 1, 1)
    assert mask.sum(dim=1).flatten().tolist() == channel_sums


@pytest.mark.parametrize("frames", [1, 5, 25, 49])
def test_easyanimate_marks_the_known_frames_as_upstream_does(frames: int) -> None:
    """Upstream: the first frame alone, the rest by trilinear sampling, here with an end image given."""
    known = torch.zeros(1, 1, frames, 1, 1)
    known[:, :, [0, -1]] = 1
    expected = known[:, :, :1]
    if frames > 1:
        size = ((frames - 1) // 4, 1, 1)
        later = torch.nn.functional.interpolate(known[:, :, 1:], size=size, mode="trilinear", align_corners=False)
        expected = torch.cat([expected, later], dim=2)
    assert torch.equal(easyanimate._known_frames((frames - 1) // 4 + 1), expected)


def test_easyanimate_v5_follows_upstreams_source(tiny: Tiny, make_plan: MakePlan, load_fp32: LoadFp32) -> None:
    """Two encoders without masks, 77 and 256 tokens; DDIM on v-prediction with zero terminal SNR, trailing."""
    row = tiny("easyanimate-v5-7b-zh-inp")
    parts = load_fp32(row)
    plan = make_plan(row, steps=50, prompt="帆船 sails", guidance=(6.0,))
    state = Pipeline(plan, parts).encode()
    text, t5 = state.conditioning["text"], state.conditioning["text_t5"]
    assert (text.shape, t5.shape) == ((2, 77, 16), (2, 256, 16))
    ids = parts["tokenizer"](plan.request.prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        everything = parts["text_encoder"](ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    assert torch.allclose(text[1], everything[0], atol=1e-6)
    ids = parts["tokenizer_2"](plan.request.prompt, padding="max_length", max_length=256, return_tensors="pt").input_ids
    with torch.no_grad():
        everything = parts["text_encoder_2"](ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        masked = parts["text_encoder_2"](ids, attention_mask=(ids != 0).long()).last_hidden_state
    assert torch.allclose(t5[1], everything[0], atol=1e-6)
    assert not torch.allclose(t5[1], masked[0], atol=1e-3)
    mask, known = state.conditioning["inpaint"].split([1, 16], dim=1)
    scaling = CHECKPOINTS[row.id]["vae"].config["scaling_factor"]
    assert scaling == 0.7125
    assert mask[:, :, 0].unique().tolist() == pytest.approx([scaling])
    assert mask[:, :, 1:].abs().max() == 0
    assert known.shape[1] == 16
    schedule = Schedule(parts["scheduler"], 50, torch.device("cpu"))
    assert schedule.timesteps.tolist() == list(range(999, 0, -20))
    scheduler = parts["scheduler"]
    assert scheduler.alphas_cumprod[-1] == 0
    x, v = torch.randn(2, 1, 16, 2, 4, 4)
    a, b = scheduler.alphas_cumprod[999], scheduler.alphas_cumprod[979]
    clean, eps = a.sqrt() * x - (1 - a).sqrt() * v, a.sqrt() * v + (1 - a).sqrt() * x
    assert torch.allclose(schedule.step(v, torch.tensor(999), x), b.sqrt() * clean + (1 - b).sqrt() * eps, atol=1e-5)


def test_easyanimate_v5_gives_both_texts_to_the_transformer(
    tiny: Tiny, make_plan: MakePlan, load_fp32: LoadFp32
) -> None:
    row = tiny("easyanimate-v5-7b-zh-inp")
    parts = load_fp32(row)
    plan = make_plan(row, guidance=(6.0,))
    state = Pipeline(plan, parts).encode()

    def predict(conditioning: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return easyanimate.predict(
                parts, "transformer", state.latents, torch.tensor(999), conditioning, slice(None)
            )

    base = predict(state.conditioning)
    for name in ("text", "text_t5"):
        changed = state.conditioning | {name: torch.randn_like(state.conditioning[name])}
        assert (predict(changed) - base).abs().max() > 1e-3, name
    with torch.no_grad():
        whole = parts["transformer"](
            state.latents.expand(2, -1, -1, -1, -1),
            torch.tensor([999.0, 999.0]),
            encoder_hidden_states=state.conditioning["text"],
            encoder_hidden_states_t5=state.conditioning["text_t5"],
            inpaint_latents=state.conditioning["inpaint"].expand(2, -1, -1, -1, -1),
        ).sample
    assert torch.equal(base, whole)


def test_phases_add_up_and_nest(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    entered: list[str] = []
    ledger = Ledger(on_enter=entered.append)
    with ledger.phase("write"):
        with ledger.phase("decode"):
            pass
        with ledger.phase("decode"):
            pass
    assert entered == ["write", "decode"]
    assert {p.name: p.seconds for p in ledger.phases.values()} == {"write": 3.0, "decode": 2.0}
    assert all(p.peak_bytes > 2**20 for p in ledger.close())


def test_the_peak_of_a_phase_is_its_own() -> None:
    ledger = Ledger()
    with ledger.phase("large"):
        block = np.ones(300 * 2**20 // 8)
        del block
    with ledger.phase("small"):
        pass
    ledger.close()
    assert ledger.phases["large"].peak_bytes - ledger.phases["small"].peak_bytes > 250 * 2**20


def test_a_row_without_its_own_shift_keeps_the_checkpoints(
    tmp_path_factory: pytest.TempPathFactory, make_plan: MakePlan, load_fp32: LoadFp32
) -> None:
    row = save_tiny("wan2.2-i2v-a14b", tmp_path_factory.mktemp("shift"))
    own = replace(row, shifts=())
    plan = make_plan(own)
    assert plan.request.shift is None
    assert Pipeline(plan, load_fp32(own))._schedule()._scheduler.config.flow_shift == 3.0
    large = make_plan(row, width=1280, height=720)
    assert large.request.shift == 5.0
    assert Pipeline(large, load_fp32(row))._schedule()._scheduler.config.flow_shift == 5.0


def test_what_must_stay_in_full_precision_does(tiny: Tiny) -> None:
    parts = load_half(tiny("wan2.2-ti2v-5b"))
    assert parts.dtype("vae") == torch.float32
    kept = {name for name, p in parts["transformer"].named_parameters() if p.dtype == torch.float32}
    assert any("time_embedder" in name for name in kept)
    assert any("scale_shift_table" in name for name in kept)
    assert not any("ffn" in name for name in kept)


def test_the_yaml_of_easyanimate_v5_wins_over_its_config(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("easyanimate-v5-7b-zh-inp").folder
    assert source is not None
    folder = tmp_path / "transformer"
    shutil.copytree(source / "transformer", folder)
    stored = json.loads((folder / "config.json").read_text())
    wrong = {"after_norm": True, "enable_text_attention_mask": True, "clip_channels": None}
    (folder / "config.json").write_text(json.dumps(stored | wrong))
    files = list(folder.glob("*.safetensors"))
    kind, config = diffusers.EasyAnimateTransformer3DModel, easyanimate_v5.config(folder)
    model = Filed.of(kind, config, files, torch.float32, easyanimate_v5.rename).model
    assert model.config.after_norm is False
    assert model.config.enable_text_attention_mask is False
