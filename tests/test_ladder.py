"""Memory that runs out in any phase: a rung lower, the same video, no step twice, and what was changed is told."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import nn

from framefit import cli, passes, video
from framefit.checkpoint import RunFolder, State, Writer
from framefit.device import Device
from framefit.errors import DoesNotFit
from framefit.families import Checkpoint, easyanimate, find
from framefit.families import parts as family_parts
from framefit.families.files import fingerprint
from framefit.families.parts import Parts, load_parts, weights
from framefit.ledger import Ledger, shortage
from framefit.ledger.shortage import Shortage
from framefit.ledger.steps import MemoryReading
from framefit.ledger.transfer import Transfer, _unpinnable
from framefit.passes import apply_all, offload
from framefit.pipeline import Pipeline, Step, load
from framefit.plan import ASKED, SETTINGS, TIERS, Chunk, Decode, Guidance, Offload, Plan
from framefit.planning import ladder
from framefit.planning.ladder import LADDER, lower, lowered
from framefit.report import Rung
from framefit.schedule import Schedule

FAMILIES = ["wan2.2-i2v-a14b", "easyanimate-v5.1-7b-inp", "i2vgen-xl"]
STEPS = 4
FULL = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 24.00 GiB"

T = TypeVar("T")
Tiny = Callable[[str], Checkpoint]
MakePlan = Callable[..., Plan]
Undisturbed = tuple["Made", dict[str, int]]
Whole = Callable[[Checkpoint, float], Undisturbed]


@dataclass(eq=False)
class Full:
    """Raises `error` at some of the calls of a model's layers, counted from 1; those that follow it work again."""

    model: nn.Module
    at: Sequence[int] = ()
    error: Callable[[], Exception] = lambda: torch.OutOfMemoryError(FULL)
    calls: int = 0
    handles: list[Any] = field(default_factory=list)

    def __enter__(self) -> Full:
        layers = (module for module in self.model.modules() if not any(module.children()) and weights(module))
        self.handles = [layer.register_forward_pre_hook(self._called) for layer in layers]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _called(self, *call: object) -> None:
        self.calls += 1
        if self.calls in self.at:
            raise self.error()


@dataclass
class Made:
    latents: torch.Tensor
    frames: np.ndarray[Any, Any]
    steps: list[int]
    """As they were told."""
    saved: list[tuple[int, int]]
    """Step and rungs of every state that was to be saved."""
    rungs: tuple[Rung, ...]
    notices: list[str]


def fresh(row: Checkpoint) -> Parts:
    """In memory of its own: kernels round by alignment, and a file's pages have another one."""
    assert row.folder is not None
    parts = load_parts(row, row.folder, dtype=torch.float32, device=torch.device("cpu"))
    for part in models(parts).values():
        for tensor in weights(part):
            tensor.data = tensor.data.clone()
    return parts


def models(parts: Parts) -> dict[str, nn.Module]:
    return {name: part for name, part in parts.components.items() if isinstance(part, nn.Module)}


def made(plan: Plan, parts: Parts) -> Made:
    pipeline = Pipeline(plan, parts)
    steps: list[int] = []
    saved: list[tuple[int, int]] = []
    state = pipeline.encode()

    def save(state: State) -> None:
        saved.append((state.step, len(state.rungs)))

    pipeline.denoise(state, on_step=lambda step: steps.append(step.index), save=save)
    frames = np.stack(list(pipeline.decode(state, save=save)))
    return Made(state.latents, frames, steps, saved, pipeline.rungs, pipeline.ledger.notices)


def pieces(parts: Parts) -> dict[str, nn.Module]:
    """Components, and the halves of the VAE."""
    return models(parts) | {"encoder": parts["vae"].encoder, "decoder": parts["vae"].decoder}


@pytest.fixture
def moving(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rungs that move weights and part branches alone: the others have tests of their own below."""
    monkeypatch.setattr(ladder, "LADDER", tuple(relief for relief in LADDER if relief.kind in (Guidance, Offload)))


@pytest.fixture(scope="module")
def kept() -> dict[tuple[str, float], Undisturbed]:
    return {}


@pytest.fixture
def whole(make_plan: MakePlan, kept: dict[tuple[str, float], Undisturbed]) -> Whole:
    """(row, guidance) -> what comes of a run with memory enough, and how many calls each piece's layers had."""

    def make(row: Checkpoint, guidance: float) -> Undisturbed:
        if (key := (row.id, guidance)) not in kept:
            plan, parts = make_plan(row, steps=STEPS, guidance=(guidance,)), fresh(row)
            with ExitStack() as stack:
                counted = {name: stack.enter_context(Full(model)) for name, model in pieces(parts).items()}
                found = made(plan, apply_all(parts, plan))
            kept[key] = found, {name: count.calls for name, count in counted.items()}
        return kept[key]

    return make


def steps_of(rungs: Sequence[Rung]) -> list[str]:
    return [f"{rung.phase} {rung.setting}={rung.before}>{rung.after}" for rung in rungs]


@pytest.mark.usefixtures("moving")
@pytest.mark.parametrize("id", FAMILIES)
@pytest.mark.parametrize(
    ("phase", "piece", "times", "to"),
    [
        ("encode_text", "text_encoder", 2, "block"),
        ("encode_image", "encoder", 1, "part"),
        ("denoise", "transformer", 3, "leaf"),
        ("decode", "decoder", 1, "part"),
    ],
)
def test_offload_comes_down_and_every_bit_is_the_same(
    phase: str, piece: str, times: int, to: str, id: str, tiny: Tiny, make_plan: MakePlan, whole: Whole
) -> None:
    row = tiny(id)
    piece = row.experts[-1] if piece == "transformer" else piece
    expected, calls = whole(row, 1.0)
    plan, parts = make_plan(row, steps=STEPS, guidance=(1.0,)), fresh(row)
    half = calls[piece] // 2 + 1
    with Full(pieces(parts)[piece], at=range(half, half + times)) as full:
        found = made(plan, apply_all(parts, plan))
    assert full.calls > calls[piece]
    assert torch.equal(found.latents, expected.latents)
    assert np.array_equal(found.frames, expected.frames)
    assert found.steps == expected.steps == list(range(1, STEPS + 1))
    assert found.saved[-1] == (STEPS, times)
    assert len(found.rungs) == times
    assert {rung.phase.partition(":")[0] for rung in found.rungs} == {phase}
    assert [rung.setting for rung in found.rungs] == ["offload"] * times
    assert found.rungs[-1].after == to
    assert all(a.after == b.before for a, b in pairwise(found.rungs))
    assert all(rung.asked_bytes == 2.5 * 2**30 and rung.held_bytes > 0 for rung in found.rungs)
    told = [notice for notice in found.notices if notice.startswith("memory ran out in ")]
    assert len(told) == times
    assert "2.50 GiB more asked for): offload=none becomes part, and the run goes on" in told[0]
    placed = offload.placed(parts)
    assert placed is not None
    assert placed.transfer.moved_bytes > 0


@pytest.mark.usefixtures("moving")
@pytest.mark.parametrize("id", ["easyanimate-v5.1-7b-inp", "i2vgen-xl"])
def test_guidance_comes_first_and_differs_by_rounding(id: str, tiny: Tiny, make_plan: MakePlan, whole: Whole) -> None:
    row = tiny(id)
    expected, calls = whole(row, 4.0)
    plan, parts = make_plan(row, steps=STEPS, guidance=(4.0,)), fresh(row)
    half = calls[row.experts[0]] // 2 + 1
    with Full(parts[row.experts[0]], at=(half, half + 1)):
        found = made(plan, apply_all(parts, plan))
    denoise = f"denoise:{row.experts[0]}"
    assert steps_of(found.rungs) == [f"{denoise} guidance=together>apart", f"{denoise} offload=none>part"]
    assert found.rungs[0].step == STEPS // 2
    assert (found.latents - expected.latents).abs().max() <= 1e-5 * expected.latents.abs().max()
    assert np.abs(found.frames.astype(int) - expected.frames).max() <= 1
    assert found.steps == expected.steps
    # each rung is on disk as soon as it is taken, with the step that the run stands at
    half_way = STEPS // 2
    assert found.saved == [(1, 0), (2, 0), (half_way, 1), (half_way, 2), (3, 2), (4, 2)]


@pytest.mark.parametrize("id", FAMILIES)
def test_pieces_come_before_weights_that_move(id: str, tiny: Tiny, make_plan: MakePlan, whole: Whole) -> None:
    """The same video but for rounding. Of these VAEs EasyAnimate's alone divides pictures as small as these."""
    row = tiny(id)
    expected, calls = whole(row, 1.0)
    plan, parts = make_plan(row, steps=STEPS, guidance=(1.0,)), fresh(row)
    expert = row.experts[-1]
    half, late = calls[expert] // 2 + 1, calls["decoder"] // 2 if id.startswith("easyanimate") else 0
    with Full(parts[expert], at=(half, half + 1)), Full(parts["vae"].decoder, at=[late]):
        found = made(plan, apply_all(parts, plan))
    moved = [f"denoise:{expert} chunk=none>rows", f"denoise:{expert} offload=none>part"]
    assert steps_of(found.rungs) == moved + ["decode decode=whole>frame"] * bool(late)
    assert (found.latents - expected.latents).abs().max() <= 1e-5 * expected.latents.abs().max()
    assert np.abs(found.frames.astype(int) - expected.frames).max() <= 1
    assert found.steps == expected.steps


def test_large_pictures_come_in_tiles_where_these_equal_the_whole(tiny: Tiny, make_plan: MakePlan) -> None:
    plan = make_plan(tiny("wan2.2-i2v-a14b"))
    large = replace(plan, request=replace(plan.request, width=832, height=480))
    for phase in ("encode_image", "decode"):
        assert way_down(large, phase) == ["whole>tile:256", "tile:256>tile:128", "none>part"]
    assert lower(plan, (), "decode", None, SHORT).setting == "offload", "one tile would be the picture"


@pytest.mark.parametrize(
    ("id", "held", "not_held"),
    [
        (
            "wan2.2-i2v-a14b",
            ["whole>ram:640", "ram:640>ram:352", "ram:352>tile:128", "none>part"],
            ["whole>tile:256", "tile:256>tile:128", "none>part"],
        ),
        ("easyanimate-v5.1-7b-inp", ["whole>frame", "none>part", "frame>ram"], ["whole>frame", "none>part"]),
    ],
)
def test_on_a_card_memories_go_to_ram_where_it_holds_them(
    id: str, held: list[str], not_held: list[str], tiny: Tiny, make_plan: MakePlan
) -> None:
    plan = make_plan(tiny(id), width=832, height=64)
    for ram_bytes, way in ((2**36, held), (2**20, not_held)):
        device = replace(Device.named("rtx-4090", ram_bytes=ram_bytes), id="cuda:0")
        there = replace(plan, device=device, estimate=replace(plan.estimate, free_bytes=device.budget_bytes))
        assert way_down(there, "decode") == way


def test_pictures_that_the_larger_tiles_do_not_divide_go_to_smaller_ones(tiny: Tiny, make_plan: MakePlan) -> None:
    device = replace(Device.named("rtx-4090", ram_bytes=2**36), id="cuda:0")
    plan = replace(make_plan(tiny("wan2.2-i2v-a14b"), width=640, height=64), device=device)
    plan = replace(plan, estimate=replace(plan.estimate, free_bytes=device.budget_bytes))
    assert way_down(plan, "decode")[:2] == ["whole>ram:352", "ram:352>tile:128"]


def way_down(plan: Plan, phase: str) -> list[str]:
    rungs = lowest(plan, phase)[2]
    assert {rung.of for rung in rungs} == {"card"}
    return [f"{rung.before}>{rung.after}" for rung in rungs]


@pytest.mark.usefixtures("moving")
@pytest.mark.parametrize("id", FAMILIES)
def test_a_step_that_broke_off_after_the_scheduler_leaves_no_trace(
    id: str, tiny: Tiny, make_plan: MakePlan, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = tiny(id)
    expected, _ = whole(row, 1.0)
    step, calls = Schedule.step, []

    def full_after_it(self: Schedule, *arguments: Any) -> torch.Tensor:
        after = step(self, *arguments)
        calls.append(1)
        if len(calls) in (1, 4, 6):
            raise torch.OutOfMemoryError(FULL)
        return after

    monkeypatch.setattr(Schedule, "step", full_after_it)
    plan, parts = make_plan(row, steps=STEPS, guidance=(1.0,)), fresh(row)
    found = made(plan, apply_all(parts, plan))
    assert len(calls) == STEPS + 3
    assert [rung.step for rung in found.rungs] == [0, 2, 3]
    assert torch.equal(found.latents, expected.latents)


def test_a_scheduler_that_is_not_put_back_would_be_seen(
    tiny: Tiny, make_plan: MakePlan, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail."""
    monkeypatch.setattr(Schedule, "restore", lambda self, state: None)
    with pytest.raises((AssertionError, IndexError)):
        test_a_step_that_broke_off_after_the_scheduler_leaves_no_trace(
            "wan2.2-i2v-a14b", tiny, make_plan, whole, monkeypatch
        )


def test_a_cache_that_is_not_emptied_would_be_seen(
    tiny: Tiny, make_plan: MakePlan, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EasyAnimate's VAE keeps frames between the calls of its layers."""
    monkeypatch.setattr(Parts, "forget", lambda self: None)
    with pytest.raises((AssertionError, RuntimeError)):
        test_offload_comes_down_and_every_bit_is_the_same(
            "decode", "decoder", 1, "part", "easyanimate-v5.1-7b-inp", tiny, make_plan, whole
        )


def test_frames_that_were_given_are_not_given_again(tiny: Tiny, make_plan: MakePlan, whole: Whole) -> None:
    row = tiny("i2vgen-xl")
    expected, calls = whole(row, 1.0)
    plan, parts = make_plan(row, steps=STEPS, guidance=(1.0,)), fresh(row)
    pipeline = Pipeline(plan, apply_all(parts, plan))
    state = pipeline.encode()
    pipeline.denoise(state)
    with Full(parts["vae"].decoder, at=[calls["decoder"] - 1]):
        frames = list(pipeline.decode(state))
    assert np.array_equal(np.stack(frames), expected.frames)
    assert state.rungs == pipeline.rungs
    assert steps_of(pipeline.rungs) == ["decode offload=none>part"]


@pytest.mark.parametrize("id", FAMILIES)
def test_loaded_parts_are_arranged_anew_there_and_back(id: str, tiny: Tiny, make_plan: MakePlan, whole: Whole) -> None:
    row = tiny(id)
    expected, _ = whole(row, 1.0)
    parts = fresh(row)
    before = {name: {k: v.clone() for k, v in model.state_dict().items()} for name, model in models(parts).items()}
    way = ["none", "leaf", "block:1", "none"]
    plans = [make_plan(row, {"offload": value}, steps=STEPS, guidance=(1.0,)) for value in way]
    apply_all(parts, plans[0])
    for old, new in pairwise(plans):
        passes.change(parts, old, new)
        found = made(new, parts)
        assert torch.equal(found.latents, expected.latents), new.offload
        parts.use()
    assert offload.placed(parts) is None
    for name, model in models(parts).items():
        assert all(torch.equal(value, before[name][key]) for key, value in model.state_dict().items())
        registries = [getattr(module, "_diffusers_hook", None) for module in model.modules()]
        assert not any(registry.hooks for registry in registries if registry)


@pytest.mark.parametrize("id", FAMILIES)
def test_what_lies_elsewhere_now_is_given_back(id: str, tiny: Tiny, make_plan: MakePlan) -> None:
    """A slab goes once its weights are in others, the token tables too, which are in none."""
    row = tiny(id)
    plans = {value: make_plan(row, {"offload": value}) for value in ("part", "leaf")}
    straight, round_about = fresh(row), fresh(row)
    apply_all(straight, plans["leaf"])
    apply_all(round_about, plans["part"])
    passes.change(round_about, plans["part"], plans["leaf"])
    assert held_bytes(round_about) == held_bytes(straight)


def held_bytes(parts: Parts) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for m in models(parts).values() for t in weights(m)}
    return sum(storage.nbytes() for storage in storages.values())


def test_a_preview_that_breaks_off_leaves_no_trace(tiny: Tiny, make_plan: MakePlan, whole: Whole) -> None:
    row = tiny("easyanimate-v5.1-7b-inp")
    expected, calls = whole(row, 1.0)
    plan, parts = make_plan(row, steps=STEPS, guidance=(1.0,)), fresh(row)
    pipeline = Pipeline(plan, apply_all(parts, plan))
    state = pipeline.encode()

    def preview(step: Step) -> None:
        with Full(parts["vae"].decoder, at=[calls["decoder"] // 3]), pytest.raises(torch.OutOfMemoryError):
            step.preview()

    pipeline.denoise(state, on_step=preview)
    assert np.array_equal(np.stack(list(pipeline.decode(state))), expected.frames)


def test_a_cast_that_breaks_off_leaves_no_half(tiny: Tiny) -> None:
    class Large(nn.Parameter):
        def is_floating_point(self) -> bool:
            raise torch.OutOfMemoryError(FULL)

    model = nn.Sequential(nn.Linear(4, 4).half(), nn.LayerNorm(4), nn.ParameterList([Large(torch.ones(1))]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parts = Parts(tiny("i2vgen-xl"), {"unet": model}, torch.device("cpu"))
    with pytest.raises(torch.OutOfMemoryError):
        parts.cast("unet", torch.float64)
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


def test_what_does_not_change_is_left_alone(tiny: Tiny, make_plan: MakePlan) -> None:
    row = tiny("wan2.2-i2v-a14b")
    plan, parts = make_plan(row, {"offload": "block", "guidance": "together"}), fresh(row)
    apply_all(parts, plan)
    placement = parts.placement
    passes.change(parts, plan, make_plan(row, {"offload": "block", "guidance": "apart"}))
    assert parts.branches == "apart"
    assert parts.placement is placement


@pytest.mark.parametrize(("reading", "at"), [("_begun", 3), ("_read", 2)], ids=["a component", "a piece of one"])
def test_loading_that_does_not_fit_goes_to_the_host(
    reading: str, at: int, tiny: Tiny, make_plan: MakePlan, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = tiny("easyanimate-v5.1-7b-inp")
    expected, _ = whole(row, 1.0)
    read, calls = getattr(family_parts, reading), []

    def full_once(*arguments: Any) -> object:
        calls.append(1)
        if len(calls) == at:
            raise torch.OutOfMemoryError(FULL)
        return read(*arguments)

    monkeypatch.setattr(family_parts, reading, full_once)
    pipeline = load(make_plan(row, steps=STEPS, guidance=(1.0,)), row)
    state = pipeline.encode()
    assert state.rungs == pipeline.rungs
    assert steps_of(state.rungs) == ["load offload=none>part"]
    assert state.rungs[0].step is None
    pipeline.denoise(state)
    assert offload.placed(pipeline.parts) is not None
    assert torch.equal(state.latents, expected.latents)


def test_ram_that_runs_out_spares_ram(tiny: Tiny, make_plan: MakePlan) -> None:
    """Weights in host memory spare nothing there; the second guidance branch does."""
    row = tiny("i2vgen-xl")
    plan, parts = make_plan(row, steps=STEPS, guidance=(4.0,)), fresh(row)
    pipeline = Pipeline(plan, apply_all(parts, plan))
    state = pipeline.encode()
    errors = [
        MemoryError(),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes."),
    ]
    with (
        Full(parts["unet"], at=(5, 9, 13), error=errors.pop),
        pytest.raises(DoesNotFit, match=r"in the phase denoise:unet .*guidance=apart and chunk=rows tried: ask for"),
    ):
        pipeline.denoise(state)
    parted = ["denoise:unet guidance=together>apart", "denoise:unet chunk=none>rows"]
    assert steps_of(pipeline.rungs) == parted
    assert pipeline.rungs[0].asked_bytes == 64
    card = replace(plan, device=replace(plan.device, id="cuda:0"))
    with pytest.raises(DoesNotFit, match=r"the host of the card ran out of memory, .*: free some\.$"):
        lower(card, (), "denoise:unet", 1, NO_PINS)


def test_what_the_user_asked_for_is_not_moved(tiny: Tiny, make_plan: MakePlan) -> None:
    row = tiny("i2vgen-xl")
    asked = {"guidance": "together", "chunk": "none", "offload": "none"}
    plan, parts = make_plan(row, asked, guidance=(4.0,)), fresh(row)
    pipeline = Pipeline(plan, apply_all(parts, plan))
    state = pipeline.encode()
    with (
        Full(parts["unet"], at=[5]),
        pytest.raises(DoesNotFit, match=r"or leave out --set guidance=together chunk=none offload=none\.$"),
    ):
        pipeline.denoise(state)
    assert pipeline.rungs == ()
    half = make_plan(row, {"guidance": "together", "chunk": "none"}, guidance=(4.0,))
    assert lower(half, (), "denoise:unet", 1, SHORT).setting == "offload"


def test_a_plan_that_is_measured_is_held(tiny: Tiny, make_plan: MakePlan) -> None:
    row = tiny("i2vgen-xl")
    plan, parts = make_plan(row), fresh(row)
    pipeline = Pipeline(plan, apply_all(parts, plan), ladder=False)
    with Full(parts["text_encoder"], at=[2]), pytest.raises(torch.OutOfMemoryError):
        pipeline.encode()


SHORT = Shortage(of="card", asked_bytes=None, held_bytes=1)
NO_PINS = Shortage(of="host", asked_bytes=None, held_bytes=1)


def lowest(plan: Plan, phase: str) -> tuple[Plan, str, tuple[Rung, ...]]:
    """Where the ladder ends, what is said then, and the way there."""
    rungs: tuple[Rung, ...] = ()
    for _ in range(len(LADDER) + 1):
        try:
            rung = lower(plan, rungs, phase, 1, SHORT)
        except DoesNotFit as error:
            return plan, str(error), rungs
        plan, rungs = lowered(plan, [rung]), (*rungs, rung)
    raise AssertionError("the ladder goes round")


@pytest.mark.parametrize("id", FAMILIES)
@pytest.mark.parametrize("phase", ["load", "encode_text", "encode_image", "denoise", "decode"])
def test_every_way_down_ends(id: str, phase: str, tiny: Tiny, make_plan: MakePlan) -> None:
    row = tiny(id)
    name = f"denoise:{row.experts[0]}" if phase == "denoise" else phase
    plan, error, _ = lowest(make_plan(row, guidance=(4.0,)), name)
    for setting in plan.settings:
        assert (f"{setting.type}={setting.value}" in error) == ("memory ran out" in setting.because)
    kept = "together" if phase != "denoise" and row.batched_guidance else "apart"
    level = {"load": "part", "encode_image": "part", "decode": "part"}.get(phase, "leaf")
    assert (plan.setting(Guidance).value, plan.setting(Offload).value) == (kept, level)
    assert "memory ran out in" in plan.setting(Offload).because


def test_the_ladder_knows_its_settings() -> None:
    for relief in LADDER:
        before = {"*": "whole", "ram*": "ram"}.get(relief.before, relief.before.replace("*", "2"))
        assert before != relief.after
        tiers = [TIERS.index(relief.kind(value=value).tier) for value in (before, relief.after)]
        assert tiers[0] >= tiers[1]
        assert tiers[1] == 0 or before.startswith("blend:"), "near only where it was"
        assert SETTINGS[relief.kind.type] is relief.kind
    for _, technique in passes.ORDER:
        assert callable(technique.remove)
    assert Guidance(value="apart", because=ASKED).asked
    assert not Guidance(value="apart").asked


@pytest.mark.parametrize(
    ("error", "of", "asked"),
    [
        (torch.OutOfMemoryError(FULL), "card", 2.5 * 2**30),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has"), "card", 20 * 2**20),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "card", None),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "card", None),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "card", None),
        (MemoryError(), "RAM", None),
        (_unpinnable(2**28, "out of memory"), "host", 2**28),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None, None),
        (ValueError("memory"), None, None),
    ],
)
def test_errors_that_say_that_memory_ran_out(error: Exception, of: str | None, asked: float | None) -> None:
    found = Shortage.told(error, "cpu")
    assert (found and found.of) == of
    assert (found and found.asked_bytes) == asked


def test_the_host_of_a_card_is_not_where_the_model_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    held = MemoryReading(allocated_bytes=1, reserved_bytes=2, host_bytes=3)
    monkeypatch.setattr(shortage, "read_memory", lambda device: held)
    for error, told in (
        (MemoryError(), ("host", 3)), (_unpinnable(1, ""), ("host", 3)), (torch.OutOfMemoryError(), ("card", 1)),
    ):  # fmt: skip
        found = Shortage.told(error, "cuda:0")
        assert found is not None
        assert (found.of, found.held_bytes) == told


def test_the_allocator_s_own_error_is_understood() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    found = Shortage.told(caught.value, "cpu")
    assert found is not None
    assert (found.of, found.asked_bytes) == ("RAM", 2**62)
    assert found.held_bytes > 2**20


# --- memory that cannot be pinned -----------------------------------------------------------------------------------


@dataclass(eq=False)
class NotPinned:
    """Raises at one of the calls of a transfer's method, counted from 1; 0: at none."""

    at: int = 0
    calls: int = 0

    def __call__(self, usual: Callable[..., T], *arguments: Any) -> T:
        self.calls += 1
        if self.calls == self.at:
            raise _unpinnable(2**30, "out of memory")
        return usual(*arguments)

    def set(self, monkeypatch: pytest.MonkeyPatch, method: str) -> NotPinned:
        usual = getattr(Transfer, method)
        monkeypatch.setattr(Transfer, method, lambda *arguments: self(usual, *arguments))
        return self


IN_RAM = [
    ("wan2.2-i2v-a14b", "ram", "tile:128"), ("wan2.2-i2v-a14b", "ram:144", "tile:128"),
    ("easyanimate-v5.1-7b-inp", "ram", "frame"),
]  # fmt: skip


@pytest.mark.parametrize("phase", ["encode_image", "decode"])
@pytest.mark.parametrize(("id", "value", "after"), IN_RAM)
def test_what_cannot_be_pinned_goes_another_way(
    id: str, value: str, after: str, phase: str, tiny: Tiny, make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = tiny(id)
    plan = with_decode(make_plan(row, steps=1, guidance=(1.0,), num_frames=9, width=160), value)
    with monkeypatch.context() as patch:
        counted = NotPinned().set(patch, "piece")
        expected = made(plan, apply_all(fresh(row), plan))
    with monkeypatch.context() as patch:
        NotPinned(at=2 if phase == "encode_image" else counted.calls).set(patch, "piece")
        found = made(plan, apply_all(parts := fresh(row), plan))
    assert steps_of(found.rungs) == [f"{phase} decode={value}>{after}"]
    assert (found.rungs[0].of, found.rungs[0].asked_bytes) == ("host", 2**30)
    assert any(notice.startswith(f"host memory ran out in {phase}") for notice in found.notices)
    assert found.saved[-1][1] == 1, "a run that is resumed does not meet it again"
    assert parts.pieces.shelf is None
    assert (found.latents - expected.latents).abs().max() <= 1e-5 * expected.latents.abs().max()
    assert np.abs(found.frames.astype(int) - expected.frames).max() <= 1


def with_decode(plan: Plan, value: str) -> Plan:
    """As if it had been derived."""
    settings = tuple(Decode(value=value, because="it is leaner") if isinstance(s, Decode) else s for s in plan.settings)
    return replace(plan, settings=settings)


@pytest.mark.parametrize(
    ("value", "size", "after"),
    [
        ("ram", 832, "tile:512"), ("ram", 512, "tile:256"), ("ram", 256, "tile:128"), ("ram:640", 832, "tile:512"),
        ("ram:512", 832, "tile:512"), ("ram:352", 832, "tile:256"), ("ram:200", 832, "tile:128"),
    ],
)  # fmt: skip
def test_its_tiles_are_as_large_as_they_may_be(
    value: str, size: int, after: str, tiny: Tiny, make_plan: MakePlan
) -> None:
    plan = with_decode(make_plan(tiny("wan2.2-i2v-a14b"), width=size, height=64), value)
    assert lower(plan, (), "decode", None, NO_PINS).after == after


def test_what_was_too_much_is_not_taken_again(tiny: Tiny, make_plan: MakePlan) -> None:
    plan = make_plan(tiny("easyanimate-v5.1-7b-inp"))
    plan = with_decode(replace(plan, device=replace(plan.device, id="cuda:0")), "ram")
    first = lower(plan, (), "decode", None, NO_PINS)
    assert first.after == "frame"
    plan = lowered(plan, [first])
    second = lower(plan, (first,), "decode", None, SHORT)
    assert (second.setting, second.after) == ("offload", "part")
    with pytest.raises(DoesNotFit, match="with decode=frame and offload=part tried"):
        lower(lowered(plan, [second]), (first, second), "decode", None, SHORT)


def test_ram_that_was_asked_for_is_named(tiny: Tiny, make_plan: MakePlan) -> None:
    plan = make_plan(tiny("easyanimate-v5.1-7b-inp"), {"decode": "ram", "offload": "part"})
    with pytest.raises(
        DoesNotFit, match=r"free some, use offload=disk or offload=none, or leave out --set decode=ram\.$"
    ):
        lower(plan, (), "decode", None, NO_PINS)


def test_a_rung_that_cannot_be_pinned_is_not_taken(
    tiny: Tiny, make_plan: MakePlan, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one is; what the first began with is undone."""
    row = tiny("easyanimate-v5.1-7b-inp")
    expected, calls = whole(row, 1.0)
    monkeypatch.setattr(ladder, "LADDER", [relief for relief in LADDER if relief.after == "part"] + [*LADDER])
    NotPinned(at=3).set(monkeypatch, "slab")
    plan, parts = make_plan(row, steps=STEPS, guidance=(1.0,)), fresh(row)
    with Full(parts["vae"].decoder, at=[calls["decoder"] // 2]):
        found = made(plan, apply_all(parts, plan))
    assert steps_of(found.rungs) == ["decode decode=whole>frame"]
    assert "offload=part cannot be, as host memory ran out for it: offload stays none." in found.notices
    assert parts.placement is None
    assert (found.latents - expected.latents).abs().max() <= 1e-5 * expected.latents.abs().max()
    assert np.abs(found.frames.astype(int) - expected.frames).max() <= 1


# --- on the command line, and after a crash ------------------------------------------------------------------------


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", *(str(a) for a in arguments)])
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.mark.usefixtures("home")
def test_exhausted_and_resumed(
    tiny: Tiny, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 4 with a sentence and a way to go on; with more memory the run goes on, rungs lower."""
    row = tiny("easyanimate-v5.1-7b-inp")
    request = [photo, "-p", "waves", "--model", row.folder, "--size", "96x64", "--frames", 5, "--steps", 3, "--seed", 7,
               "--guidance", "4", "--device", "cpu"]  # fmt: skip
    assert run(*request, "-o", tmp_path / "whole.mp4", "--set", "guidance=apart") == 0
    predict, calls = easyanimate.predict, []

    def full_from_the_third(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 2:
            raise torch.OutOfMemoryError(FULL)
        return predict(*arguments)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(easyanimate, "predict", full_from_the_third)
        assert run(*request, "-o", tmp_path / "out.mp4", "--json") == 4
    err = capsys.readouterr().err
    assert err.count("note: memory ran out in denoise:transformer after step 2") == 5
    assert "with guidance=apart and chunk=rows and offload=leaf tried: ask for a smaller --size or fewer" in err
    id = err.split("framefit run --resume ")[1].split()[0]
    assert run("--resume", id, "--json") == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["resumed_from_step"] == 2
    assert [rung["after"] for rung in report["report"]["rungs"]] == ["apart", "rows", "part", "block", "leaf"]
    assert "memory ran out" not in err
    frames = [np.stack(list(video.read(tmp_path / name))).astype(int) for name in ("whole.mp4", "out.mp4")]
    assert np.abs(frames[0] - frames[1]).max() <= 2  # grey levels: two steps were together, and it is encoded


def run_until_killed(root: Path, id: str) -> None:
    """In a process of its own: memory runs out in the third step, and once the rung is on disk the process dies."""
    run = RunFolder.open(root, id)
    torch.set_num_threads(1)
    row = find(run.plan.request.model)
    pipeline = load(run.plan, row, Ledger())
    writer = Writer(run, every_s=0, always=lambda _: True)

    def save(state: State) -> None:
        writer(state)
        if state.rungs:
            writer.wait()
            os.kill(os.getpid(), signal.SIGKILL)

    state = pipeline.encode()
    with Full(pipeline.parts[row.experts[-1]], at=[LATE]):
        pipeline.denoise(state, save=save)


LATE = 60
"""A call of the second expert's layers."""


def test_killed_after_a_rung_the_run_goes_on_a_rung_lower(tmp_path: Path, tiny: Tiny, make_plan: MakePlan) -> None:
    context: ForkServerContext = multiprocessing.get_context("forkserver")
    row = tiny("wan2.2-i2v-a14b")
    assert row.folder is not None
    plan = make_plan(row, steps=STEPS, guidance=(1.0,))
    run = RunFolder.create(tmp_path, plan, fingerprint(row.folder), tmp_path / "out.mp4")
    run.release()
    whole = load(plan, row)
    expected = whole.encode()
    with Full(whole.parts[row.experts[-1]], at=[LATE]):
        whole.denoise(expected)
    process = context.Process(target=run_until_killed, args=(tmp_path, run.id))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    with RunFolder.open(tmp_path, run.id) as again:
        state = again.load()
        assert state is not None
        assert 0 < state.step < STEPS
        assert steps_of(state.rungs) == [f"denoise:{row.experts[-1]} chunk=none>rows"]
        pipeline = load(again.plan, row, rungs=state.rungs)
        assert again.plan.setting(Chunk).value == "none", "the plan that the files know the run by"
        assert pipeline.plan.setting(Chunk).value == "rows"
        pipeline.denoise(state, save=again.save)
    assert torch.equal(state.latents, expected.latents)
    assert pipeline.rungs == state.rungs
    assert steps_of(state.rungs) == steps_of(expected.rungs)
    with RunFolder.open(tmp_path, run.id) as last:
        kept = last.load()
        assert kept is not None
        assert (kept.step, kept.rungs) == (STEPS, state.rungs)
