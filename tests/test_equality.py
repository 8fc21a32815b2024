"""Our loop against diffusers' own pipelines on the same tiny checkpoint: equal to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.easyanimate.pipeline_easyanimate_inpaint import get_image_to_video_latent
from PIL import Image

from framefit import photo as photos
from framefit.families import Checkpoint
from framefit.families.parts import Parts
from framefit.passes import apply_all
from framefit.pipeline import Pipeline
from framefit.plan import Plan

WAN = ["wan2.2-i2v-a14b", "wan2.2-ti2v-5b", "wan2.1-i2v-14b-480p", "wan2.1-i2v-14b-720p"]
EASYANIMATE = ["easyanimate-v5.1-7b-inp", "easyanimate-v5.1-12b-inp"]
ALL = [*WAN, *EASYANIMATE, "i2vgen-xl"]
CASES = [(id, guided, False) for id in ALL for guided in (True, False)] + [
    ("wan2.2-i2v-a14b", True, True),
    ("easyanimate-v5.1-7b-inp", True, True),
]


def name(case: tuple[str, bool, bool]) -> str:
    id, guided, with_end = case
    return f"{id}-{'guided' if guided else 'unguided'}{'-end' if with_end else ''}"


@pytest.mark.parametrize("case", CASES, ids=name)
def test_latents_and_frames_equal_diffusers(
    case: tuple[str, bool, bool],
    tiny: Callable[[str], Checkpoint],
    make_plan: Callable[..., Plan],
    load_fp32: Callable[[Checkpoint], Parts],
    end_photo: Path,
) -> None:
    id, guided, with_end = case
    row = tiny(id)
    plan = make_plan(
        row,
        guidance=(4.0,) if guided else (1.0,),
        negative_prompt="blur, 模糊",
        last_image=end_photo if with_end else None,
        num_frames=9,
        steps=6,
    )
    parts = apply_all(load_fp32(row), plan)
    latents, frames = ours(plan, parts)
    reference_latents, reference_frames = reference(plan, parts)
    assert latents.shape == reference_latents.shape
    assert latents.std() > 0.1
    assert (latents - reference_latents).abs().max() == 0
    assert np.array_equal(frames, reference_frames)


@pytest.mark.parametrize("id", ALL)
def test_guidance_the_other_way_differs_by_rounding(
    id: str,
    tiny: Callable[[str], Checkpoint],
    make_plan: Callable[..., Plan],
    load_fp32: Callable[[Checkpoint], Parts],
) -> None:
    row = tiny(id)
    other = "apart" if row.batched_guidance else "together"
    plan = make_plan(row, guidance=(4.0,), settings={"guidance": other})
    parts = apply_all(load_fp32(row), plan)
    assert parts.branches == other
    latents, _ = ours(plan, parts)
    expected, _ = reference(plan, parts)
    assert (latents - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_experts_take_their_own_guidance_and_timesteps(
    tiny: Callable[[str], Checkpoint], make_plan: Callable[..., Plan], load_fp32: Callable[[Checkpoint], Parts]
) -> None:
    row = tiny("wan2.2-i2v-a14b")
    plan = make_plan(row, guidance=(2.0, 5.0), steps=8)
    parts = apply_all(load_fp32(row), plan)
    seen: list[str] = []
    pipeline = Pipeline(plan, parts)
    state = pipeline.encode()
    pipeline.denoise(state, on_step=lambda step: seen.append(step.expert))
    expected, _ = reference(plan, parts)
    assert set(seen) == {"transformer", "transformer_2"}
    assert (state.latents - expected).abs().max() == 0


def ours(plan: Plan, parts: Parts) -> tuple[torch.Tensor, np.ndarray[Any, Any]]:
    pipeline = Pipeline(plan, parts)
    state = pipeline.encode()
    pipeline.denoise(state)
    frames = np.stack(list(pipeline.decode(state)))
    return pipeline._family.settle(state.latents, state.conditioning), frames


def reference(plan: Plan, parts: Parts) -> tuple[torch.Tensor, np.ndarray[Any, Any]]:
    """Latents and uint8 frames of diffusers' own pipeline, fed the same fitted photo and seed."""
    outputs = [_reference(plan, parts, output_type) for output_type in ("latent", "np")]
    latents, frames = outputs
    return latents, (frames[0] * 255).round().astype(np.uint8)


def _reference(plan: Plan, parts: Parts, output_type: str) -> Any:
    request = plan.request
    first = photos.fit(photos.load(request.image), request.width, request.height, request.fit)
    last = request.last_image and photos.fit(
        photos.load(request.last_image), request.width, request.height, request.fit
    )
    components = {c.name: parts[c.name] for c in parts.checkpoint.components}
    call: dict[str, Any] = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "height": request.height,
        "width": request.width,
        "num_frames": request.num_frames,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance[0],
        "output_type": output_type,
        "generator": torch.Generator().manual_seed(request.seed),
    }
    oracle = {"wan": _wan, "easyanimate": _easyanimate, "i2vgen": _i2vgen}[parts.checkpoint.family]
    return oracle(plan, parts.checkpoint, components, call, first, last).frames


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _wan(plan: Plan, row: Checkpoint, components: dict[str, Any], call: dict[str, Any], first: Any, last: Any) -> Any:
    scheduler = components.pop("scheduler")
    changed = {} if plan.request.shift is None else {"flow_shift": plan.request.shift}
    pipeline = diffusers.WanImageToVideoPipeline(
        scheduler=type(scheduler).from_config(scheduler.config, **changed),
        boundary_ratio=row.boundary_ratio,
        expand_timesteps=row.first_frame_clean,
        **components,
    )
    if row.boundary_ratio:
        call["guidance_scale_2"] = plan.request.guidance[1]
    return _quiet(pipeline)(image=first, last_image=last, **call)


def _easyanimate(
    plan: Plan, row: Checkpoint, components: dict[str, Any], call: dict[str, Any], first: Any, last: Any
) -> Any:
    components["vae"].register_to_config(cache_mag_vae=True)  # the hub's file has it, the class does not declare it
    size = (plan.request.height, plan.request.width)
    video, mask = get_image_to_video_latent([first], last, plan.request.num_frames, size)
    return _quiet(diffusers.EasyAnimateInpaintPipeline(**components))(video=video, mask_video=mask, **call)


def _i2vgen(
    plan: Plan, row: Checkpoint, components: dict[str, Any], call: dict[str, Any], first: Image.Image, last: None
) -> Any:
    # the reference reads a module that transformers 5 dropped (diffusers issue 14124)
    object.__setattr__(components["text_encoder"], "text_model", components["text_encoder"])
    torch.manual_seed(plan.request.seed)  # it samples the VAE from the global generator; ours uses the run's own
    call["generator"] = None
    return _quiet(diffusers.I2VGenXLPipeline(**components))(image=first, target_fps=int(plan.request.fps), **call)
