"""The dry run holds what a run holds and does what a run does, at tiny size exactly and at true size as an H200 did."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from framefit.device import Device
from framefit.families import CHECKPOINTS, Checkpoint, wan
from framefit.families.parts import Parts, load_parts
from framefit.ledger import counts
from framefit.ledger.allocator import PRODUCT, block_bytes
from framefit.ledger.counts import Tally, count
from framefit.ledger.live import Live
from framefit.passes import apply_all
from framefit.pipeline import Pipeline
from framefit.plan import Decode, Plan
from framefit.planning import alike, choose, dryrun, traces
from framefit.planning.phase import Pieces
from framefit.rates import Unseen
from framefit.request import Request
from framefit.testing import random_parts, randomise, save_tiny, tiny_row

CPU = torch.device("cpu")
MEASURED = Path(__file__).parents[1] / "benchmarks" / "full_size_h200_20261121.json"
CARD = Device(
    id="cuda:0", name="a card", compute_capability=(9, 0), vram_total_bytes=2**37, vram_free_bytes=2**37,
    ram_total_bytes=2**37, ram_free_bytes=2**37, disk_free_bytes=2**40,
)  # fmt: skip


def plan_of(row: Checkpoint, photo: Path, size: tuple[int, int, int], **more: Any) -> Plan:
    width, height, num_frames = size
    request = Request(image=photo, prompt="x", model=row.id, width=width, height=height, num_frames=num_frames, seed=1)
    return choose(request, row, CARD, photo_size=(120, 80), **more)


def real(row: Checkpoint) -> Parts:
    """On the CPU in fp32, with finite weights."""
    parts = random_parts(row, dtype=torch.float32, device=CPU)
    for part in parts.components.values():
        if isinstance(part, nn.Module):
            randomise(part, torch.Generator().manual_seed(0))
    return parts


SMALL = {
    "wan2.2-i2v-a14b": (64, 48, 9),
    "wan2.2-ti2v-5b": (64, 64, 9),
    "wan2.1-i2v-14b-480p": (64, 48, 5),
    "easyanimate-v5.1-7b-inp": (64, 64, 9),
    "easyanimate-v5-7b-zh-inp": (64, 64, 5),
    "i2vgen-xl": (64, 64, 4),
}


@pytest.mark.parametrize(
    ("id", "guidance"), [*((id, "together") for id in SMALL), ("wan2.2-i2v-a14b", "apart"), ("i2vgen-xl", "apart")]
)
def test_a_dry_run_holds_and_does_what_a_run_does(
    id: str, guidance: str, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counts, "_fused", lambda *_, **__: False)  # here both compute norms by their parts
    row = legal(tiny_row(id))
    plan = plan_of(row, photo, SMALL[id], precision="fp32", settings={"guidance": guidance})
    dry = dryrun.trace(plan, row)
    wet = dryrun.followed(apply_all(real(row), plan), plan, dry[0].weights_bytes, {})
    assert [phase.name for phase in dry] == [phase.name for phase in wet]
    for one, other in zip(dry, wet, strict=True):
        # torch gives a fake view of one picture other strides, by which the next layer chooses its layout
        within = 0.05 if id == "i2vgen-xl" else 0
        assert one.peak_bytes == pytest.approx(other.peak_bytes, rel=within), one.name
        assert one.flops == other.flops, one.name
        for way in ("elementwise", "host_to_device", "device_to_host"):
            assert one.bytes[way] == pytest.approx(other.bytes[way], rel=0.1), (one.name, way)
        assert sum(one.held.values()) <= one.peak_bytes


def legal(row: Checkpoint) -> Checkpoint:
    """Tiny models take tiny frames."""
    return replace(row, sizes=replace(row.sizes, min_side=32, multiple=16))


def test_experts_that_are_alike_are_traced_once(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = legal(tiny_row("wan2.2-i2v-a14b"))
    called: list[str] = []
    predict = wan.predict

    def spied(parts: Parts, expert: str, *rest: Any) -> Any:
        called.append(expert)
        return predict(parts, expert, *rest)

    monkeypatch.setattr(wan, "predict", spied)
    plan = plan_of(row, photo, (64, 64, 5), settings={"guidance": "together"})
    first, second = (phase for phase in dryrun.trace(plan, row) if phase.name.startswith("denoise"))
    assert called == ["transformer"]
    assert (second.name, set(second.pieces)) == ("denoise:transformer_2", {"transformer_2"})
    assert any("in transformer_2." in what for what in second.held)
    assert (first.flops, first.peak_bytes) == (second.flops, second.peak_bytes)
    called.clear()
    *_, two, one, _ = dryrun.trace(replace(plan, request=replace(plan.request, guidance=(3.5, 1.0))), row)
    assert sum(two.flops.values()) > 1.5 * sum(one.flops.values()), "two branches, and one"
    other = {**row["transformer_2"].config, "num_layers": 1}
    mixed = replace(
        row, components=tuple(replace(c, config=other) if c.name == "transformer_2" else c for c in row.components)
    )
    called.clear()
    dryrun.trace(plan, mixed)
    assert called == ["transformer", "transformer_2"]


def test_guidance_apart_halves_what_it_holds(photo: Path) -> None:
    row = legal(tiny_row("easyanimate-v5.1-7b-inp"))
    peaks = {}
    for value in ("together", "apart"):
        plan = plan_of(row, photo, (128, 128, 9), precision="fp32", settings={"guidance": value})
        peaks[value] = next(p.peak_bytes for p in dryrun.trace(plan, row) if p.name == "denoise:transformer")
    assert 1.6 < peaks["together"] / peaks["apart"] < 2.1


@pytest.mark.parametrize("id", ["wan2.2-i2v-a14b", "easyanimate-v5.1-7b-inp"])
def test_one_block_stands_for_those_that_are_equal(id: str, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = legal(tiny_row(id))
    many = {"num_layers": 9} | ({"mmdit_layers": 5} if "easyanimate" in id else {})
    longer = (replace(c, config={**c.config, **many}) if "transformer" in c.name else c for c in row.components)
    row = replace(row, components=tuple(longer))
    plan = plan_of(row, photo, (64, 64, 5))
    short = dryrun.trace(plan, row)
    monkeypatch.setattr(dryrun, "FEW", 99)
    assert strip(short) == strip(dryrun.trace(plan, row))
    assert short[2].weights_bytes["transformer"] > 3 * short[2].weights_bytes["vae"] / 10


def strip(found: tuple[traces.PhaseTrace, ...]) -> list[Any]:
    """Without the places of the blocks."""
    return [(p.name, p.weights_bytes, p.peak_bytes, p.flops, p.bytes) for p in found]


def test_at_true_size_it_agrees_with_an_h200(photo: Path) -> None:
    """In all, and without the weights."""
    filed = next(r for r in json.loads(MEASURED.read_text()) if r["id"] == "i2vgen-xl")
    row = CHECKPOINTS["i2vgen-xl"]
    plan = plan_of(row, photo, (*filed["size"], filed["num_frames"]))
    measured = {phase["name"]: phase["peak_bytes"] for phase in filed["phases"]}
    for phase in dryrun.trace(plan, row):
        predicted = sum(phase.weights_bytes.values()) + phase.peak_bytes
        assert 0.98 < predicted / measured[phase.name] < 1.01, (phase.name, predicted, measured[phase.name])
        own = phase.peak_bytes + Unseen.assumed((9, 0)).cublas_workspace_bytes
        assert 0.85 < own / (measured[phase.name] - filed["weights_bytes"]["allocated"]) < 1.05, phase.name


def test_its_weights_are_those_of_a_model_that_was_loaded_in_half_precision(tmp_path: Path, photo: Path) -> None:
    """transformers keeps some of T5's in fp32 where the others are fp16."""
    row = replace(save_tiny("wan2.2-i2v-a14b", tmp_path), sizes=legal(CHECKPOINTS["wan2.2-i2v-a14b"]).sizes)
    loaded = load_parts(row, tmp_path, dtype=torch.float16, device=CPU)
    found = dryrun.trace(plan_of(row, photo, (64, 48, 5), precision="fp16"), row)[0].weights_bytes
    for name, bytes in found.items():
        own = [*loaded[name].parameters(), *loaded[name].buffers()]
        assert bytes == sum(block_bytes(tensor.nbytes) for tensor in own), name


@pytest.mark.parametrize(
    ("id", "decode"),
    [
        *(("wan2.2-i2v-a14b", decode) for decode in ("whole", "frame", "tile:32", "ram")),
        ("wan2.2-ti2v-5b", "tile:32"),
        *(("easyanimate-v5.1-7b-inp", decode) for decode in ("whole", "frame")),
    ],
)
def test_what_is_as_before_is_as_if_it_were_traced(
    id: str, decode: str, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latent frames after the third, and equal calls of a layer: bytes, work, and how much is largest at the peak."""
    row = legal(tiny_row(id))
    plan = plan_of(row, photo, (64, 64 if "5b" in id else 48, 21), settings={"decode": decode})
    same_without_alike(plan, row, monkeypatch)


def test_at_true_size_too(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where blocks of three convolutions remember frames, one more with the second call."""
    row = CHECKPOINTS["easyanimate-v5.1-7b-inp"]
    same_without_alike(plan_of(row, photo, (384, 256, 17), settings={"decode": "frame"}), row, monkeypatch)


def same_without_alike(plan: Plan, row: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, Any] = {"encode_text": {}, "denoise": {}}
    short = dryrun.trace(plan, row, known)
    called: list[int] = []
    monkeypatch.setattr(alike, "calls", lambda *_: nullcontext())
    monkeypatch.setattr(alike, "latent_frames", lambda live, tally, made, *_: called.append(1) or made)
    whole = dryrun.trace(plan, row, known)
    assert bool(called) == (plan.setting(Decode).value != "ram")
    for one, other in zip(short, whole, strict=True):
        facts = [(p.name, p.peak_bytes, p.flops, p.bytes, p.work, p.shelf_bytes) for p in (one, other)]
        assert facts[0] == facts[1]
        # what stands in for a tensor has another name for its maker
        assert sum(one.held.values()) == sum(other.held.values())


@pytest.mark.parametrize("id", ["wan2.2-i2v-a14b", "easyanimate-v5.1-7b-inp", "easyanimate-v5-7b-zh-inp", "i2vgen-xl"])
def test_a_text_is_encoded_alike_whatever_the_video(id: str, photo: Path) -> None:
    row = legal(tiny_row(id))
    known: dict[str, Any] = {"encode_image": {dryrun.LATENTS: ("float32", (1,))}, "denoise": {}, "decode": {}}
    small, large = (dryrun.trace(plan_of(row, photo, size), row, known) for size in ((32, 32, 5), (64, 64, 9)))
    assert [phase.name for phase in small] == ["encode_text"]
    assert small == large


def held_by_a_norm(weight: torch.dtype, *, card: bool, gaps: bool = False) -> int:
    """Bytes of an RMS norm of bf16 beside its input and weight."""
    with FakeTensorMode():
        x = torch.empty(256, 1024 if gaps else 512, dtype=torch.bfloat16)[:, :512]
        norm = nn.RMSNorm(512, dtype=weight)
        with Live([x, norm.weight]) as live, live.phase("all"), torch.no_grad():
            count(lambda: norm(x), Tally(card=card))
    return live.phases["all"].bytes


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_a_card_holds_no_parts_of_an_rms_norm() -> None:
    one = block_bytes(256 * 512 * 2)
    assert held_by_a_norm(torch.bfloat16, card=True) == one + block_bytes(256 * 4)
    assert held_by_a_norm(torch.bfloat16, card=True, gaps=True) == 2 * one + block_bytes(256 * 4)
    assert held_by_a_norm(torch.bfloat16, card=False) >= 4 * one  # in fp32 by parts, as a CPU does
    assert held_by_a_norm(torch.float32, card=True) >= 4 * one  # which no kernel takes


def test_what_ran_again_is_told_by_what_was_there_the_first_time() -> None:
    """Beside what is alive now: its own memory, which it made anew, is not there twice."""

    def call() -> torch.Tensor:
        nonlocal memory
        memory = memory + 1  # both are alive for a moment
        return torch.ones(512)

    with Live([]) as live, live.phase("all"):
        memory = torch.zeros(1024)
        with live.rise() as rise:
            out = [call()]
        assert rise.bytes == 4096
        out.append(torch.ones(2048))
        with live.rose(rise):
            pass
    peak = live.phases["all"]
    assert peak.bytes == sum(held.bytes for held in peak.held) == 2 * 4096 + 2048 + 8192
    assert sorted(held.bytes for held in peak.held) == [2048, 4096, 4096, 8192]


def test_a_storage_lives_until_nothing_refers_to_it() -> None:
    given = torch.ones(1000)
    with Live([given]) as live:
        with live.phase("one"):
            kept = given + 1
            view = kept[:10]
            _ = (kept * 2) * 2  # the first product dies in the second
            del kept
            _ = None
        with live.phase("two"):
            other = torch.zeros(300)
            del view
        with live.phase("three"):
            pass
    block = block_bytes(4000)
    assert block == 4096
    assert live.phases["one"].bytes == 3 * block
    assert [held.operator for held in live.phases["one"].held] == ["add", "mul", "mul"]
    assert live.phases["two"].bytes == block + block_bytes(1200)
    assert live.phases["three"].bytes == block_bytes(other.nbytes)


def test_what_a_convolution_copies() -> None:
    """The weight; channels-first pictures and frames; what has an odd number of channels in 16 bits; and a slice of
    frames, before that. Nothing for a kernel of one pixel."""
    video, weight = torch.randn(1, 4, 6, 8, 8), torch.randn(8, 4, 3, 3, 3)
    frames = video[:, :, 1:4]
    func, made = torch.ops.aten.convolution.default, torch.randn(1, 8, 1, 6, 6)
    copies = frames.numel() * 4 + made.nbytes + weight.nbytes
    assert dryrun._workspace(func, (frames.contiguous(), weight), made) == (0, copies)
    last = frames.contiguous(memory_format=torch.channels_last_3d)
    assert dryrun._workspace(func, (last, weight), made) == (0, weight.nbytes)
    assert dryrun._workspace(func, (frames, weight), made) == (frames.numel() * 4, copies)
    half = [t.bfloat16() for t in (last, weight, made)]
    filled = [2 * t.nbytes for t in half[:2]]
    assert dryrun._workspace(func, half[:2], half[2]) == (0, sum(filled))
    assert dryrun._workspace(func, (frames.contiguous(), torch.randn(8, 4, 1, 1, 1)), made) == (0, 0)
    assert dryrun._workspace(torch.ops.aten.add.Tensor, (frames, frames), made) == (0, 0)


@pytest.mark.parametrize("norm", [nn.LayerNorm(1024), nn.GroupNorm(4, 16)])
def test_a_norm_copies_what_has_gaps_before_its_result_is_there(norm: nn.Module) -> None:
    shape = (2, 16, 1024)
    for x, copied in ((torch.zeros(shape), []), (torch.zeros(shape[:1] + shape[:0:-1]).mT, [2**17])):
        with torch.no_grad(), Live([x, *norm.parameters()], workspace=dryrun._workspace) as live, live.phase("all"):
            made = norm(x)
        told = live.phases["all"]
        sizes = [size for _, size in told.blocks if size]
        assert sizes[: len(copied) + 1] == [*copied, made.nbytes]
        assert told.bytes == sum(sizes)
        assert sum(1 for _, size in told.blocks if not size) == len(copied) + 2  # mean and deviation go, too


def test_a_layer_adds_its_bias_in_place_and_the_first_product_is_told() -> None:
    """Torch adds it in place but under a dispatch mode: one copy of what has gaps, one product, and no sum. Any other
    sum is one."""
    layer, x, scale = nn.Linear(64, 4096), torch.zeros(2, 64, 128).mT, nn.Parameter(torch.ones(1))
    flat, bias = x.contiguous(), layer.bias
    known = [x, flat, scale, *layer.parameters()]
    with torch.no_grad(), Live(known) as live, dryrun._AsOnCard(live), live.phase("all"):
        layer(x)
        made = layer(x)
        made + bias
        del made
        layer(flat) + bias
        torch.add(flat @ layer.weight.mT, bias, alpha=2)
        flat @ layer.weight.mT + scale
    told = live.phases["all"].blocks
    assert [size for _, size in told if size] == [2**16, 2**22, 2**16, *[2**22] * 8]
    assert told.count(PRODUCT) == 1


@pytest.mark.parametrize("id", ["wan2.2-i2v-a14b", "easyanimate-v5.1-7b-inp", "i2vgen-xl"])
def test_what_lies_between_two_steps_is_what_a_run_holds(id: str, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in a real run: storages as large as the latents, in fp32, while its fourth step is predicted."""
    row = legal(tiny_row(id))
    plan = plan_of(row, photo, (64, 48, 5) if "i2vgen" not in id else (64, 64, 5), precision="fp32")
    request = replace(plan.request, steps=5, guidance=tuple(1.0 for _ in row.experts))
    plan = replace(plan, request=request, device=Device.detect("cpu"))
    pipeline = Pipeline(plan, random_parts(row, dtype=torch.float32, device=CPU))
    state = pipeline.encode()
    found: list[int] = []
    held = [tensor.untyped_storage() for tensor in like(state.latents)]  # so that none made later has its address
    before = {storage._cdata for storage in held}
    predict = pipeline.predict

    def watched(expert: str, latents: torch.Tensor, *args: Any) -> torch.Tensor:
        gc.collect()
        there = {tensor.untyped_storage()._cdata for tensor in like(latents)} - before
        found.append(len(there - {latents.untyped_storage()._cdata, state.latents.untyped_storage()._cdata}))
        return predict(expert, latents, *args)

    monkeypatch.setattr(pipeline, "predict", watched)
    pipeline.denoise(state)
    assert found[3] == found[4] == dryrun._between_steps(pipeline.parts["scheduler"])[0]


def like(latents: torch.Tensor) -> list[torch.Tensor]:
    return [
        each for each in gc.get_objects()
        if type(each) is torch.Tensor and each.shape == latents.shape and each.dtype == latents.dtype
    ]  # fmt: skip


# on disk


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Plans that were traced, in place of tracing them."""
    asked: list[Plan] = []

    def trace(plan: Plan, checkpoint: Checkpoint, known: Any) -> tuple[traces.PhaseTrace, ...]:
        asked.append(plan)
        pieces = {"vae": Pieces(bytes=2, tables_bytes=0, blocks=(), layers=())}
        return tuple(
            traces.PhaseTrace(
                name=stage, weights_bytes={"vae": 2}, peak_bytes=3, held={"x": 1}, flops={("matmul", "bf16"): 5},
                bytes={}, pieces=pieces, gives={"x": ("float32", (1, 2))},
            )
            for stage in traces.STAGES if stage not in known
        )  # fmt: skip

    monkeypatch.setattr(dryrun, "trace", trace)
    return asked


def test_a_plan_is_traced_once(tmp_path: Path, photo: Path, counted: list[Plan]) -> None:
    row = CHECKPOINTS["i2vgen-xl"]
    plan = plan_of(row, photo, (512, 512, 16))
    first = traces.traced(plan, row, tmp_path)
    reseeded = replace(plan, request=replace(plan.request, seed=7, prompt="another", steps=3))
    assert traces.traced(reseeded, row, tmp_path) == first
    assert len(counted) == 1


CHANGES: dict[str, Callable[[Plan], Plan]] = {
    "frames": lambda plan: replace(plan, request=replace(plan.request, num_frames=8)),
    "size": lambda plan: replace(plan, request=replace(plan.request, width=256)),
    "device": lambda plan: replace(plan, device=Device.detect("cpu")),
    "end image": lambda plan: replace(plan, request=replace(plan.request, last_image=plan.request.image)),
    "unguided": lambda plan: replace(plan, request=replace(plan.request, guidance=(1.0,))),
    "precision": lambda plan: replace(plan, precision="fp32"),
    "settings": lambda plan: replace(plan, settings=(type(plan.settings[0])(value="apart"),)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_matters_is_traced_anew(change: str, tmp_path: Path, photo: Path, counted: list[Plan]) -> None:
    row = CHECKPOINTS["i2vgen-xl"]
    plan = plan_of(row, photo, (512, 512, 16))
    traces.traced(plan, row, tmp_path)
    traces.traced(CHANGES[change](plan), row, tmp_path)
    assert len(counted) == 2


def test_a_file_that_cannot_be_read_is_traced_anew(tmp_path: Path, photo: Path, counted: list[Plan]) -> None:
    row = CHECKPOINTS["i2vgen-xl"]
    plan = plan_of(row, photo, (512, 512, 16))
    found = traces.traced(plan, row, tmp_path)
    file, *_ = tmp_path.iterdir()
    for damage in ("[", '{"a": 1}', "[1]"):
        file.write_text(damage)
        assert traces.traced(plan, row, tmp_path) == found
    assert len(counted) == 4
