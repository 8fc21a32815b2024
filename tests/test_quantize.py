"""Weights in 8 bits: half the bytes, wherever they are counted or moved, and nearly the same numbers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from framefit import testing
from framefit.errors import UsageError
from framefit.families import CHECKPOINTS, Checkpoint, lora
from framefit.families.parts import TEXT_ENCODERS, Parts, load_parts, weights
from framefit.passes import apply_all, offload, quantize
from framefit.pipeline import Pipeline, load
from framefit.plan import Plan, Quantize
from framefit.planning import dryrun, estimate, estimated
from framefit.planning.phase import Pieces
from framefit.request import Lora
from framefit.testing import random_parts, save_tiny
from framefit.verify import tier_of

Make = Callable[..., Plan]
Wide = Callable[[str], Checkpoint]

BOUNDS = {"int8": (0.02, 0.999), "fp8": (0.08, 0.996)}
"""Most relative L2, and least cosine, of a forward to the weights as they were; int8's are those of the tier near."""
IDS = ["wan2.2-i2v-a14b", "easyanimate-v5.1-7b-inp", "easyanimate-v5-7b-zh-inp", "i2vgen-xl"]
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 4}
WIDE: dict[str, dict[str, Any]] = {
    "WanTransformer3DModel": {"attention_head_dim": 48, "ffn_dim": 256, "num_layers": 4},
    "EasyAnimateTransformer3DModel": {"attention_head_dim": 48, "num_layers": 4},
    "I2VGenXLUNet": {"block_out_channels": [32, 64, 64, 64], "attention_head_dim": 16},
    "UMT5EncoderModel": T5,
    "T5EncoderModel": T5,
}
"""As wide as a row of weights must be for its largest to say something of the others."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wide]:
    """Row id -> a small checkpoint, built once."""
    root, rows = tmp_path_factory.mktemp("wide"), dict[str, Checkpoint]()
    small = {name: {**facts, **WIDE.get(name, {})} for name, facts in testing.TINY.items()}
    small["UMT5EncoderModel"] |= {"d_model": 16}  # what the tiny Wan takes
    small["T5EncoderModel"] |= {"d_model": 16}

    def build(id: str) -> Checkpoint:
        if id not in rows:
            rows[id] = save_tiny(id, root / id)
        return rows[id]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(testing, "TINY", small)
        yield build


def fresh(row: Checkpoint, dtype: torch.dtype = torch.float32) -> Parts:
    assert row.folder
    return load_parts(row, row.folder, dtype=dtype, device=torch.device("cpu"))


def with_outliers(parts: Parts) -> Parts:
    """Every linear layer reads some channels with weights twenty times as large as the others."""
    generator = torch.Generator().manual_seed(1)
    for name in shrunk(parts):
        for layer in parts[name].modules():
            if type(layer) is nn.Linear:
                width = layer.in_features
                among = torch.randperm(width, generator=generator)[: max(1, width // 32)]
                weight = layer.weight.detach().clone()
                weight[:, among] *= 20
                layer.weight.data = weight * (layer.weight.norm() / weight.norm())
    return parts


def shrunk(parts: Parts) -> list[str]:
    return [name for name in (*parts.checkpoint.experts, *TEXT_ENCODERS) if name in parts]


def applied(parts: Parts, value: str) -> Parts:
    quantize.apply(parts, Quantize(value=value))
    return parts


def forward(parts: Parts, plan: Plan) -> torch.Tensor:
    """One guided prediction of the first expert, with the text encoder's conditioning before it."""
    pipeline = Pipeline(plan, parts)
    state = pipeline.encode()
    expert = parts.checkpoint.experts[0]
    with torch.no_grad():
        return pipeline.predict(expert, state.latents, torch.tensor(900.0), state.conditioning, 4.0)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm().detach() / expected.norm().detach())


def bytes_of(parts: Parts, name: str) -> int:
    return sum(tensor.nbytes for tensor in weights(parts[name]))


@pytest.mark.parametrize("value", ["int8", "fp8"])
@pytest.mark.parametrize("id", IDS)
def test_a_forward_is_nearly_the_same(id: str, value: str, wide: Wide, make_plan: Make) -> None:
    row = wide(id)
    plan = make_plan(row)
    expected = forward(with_outliers(fresh(row)), plan)
    found = forward(applied(with_outliers(fresh(row)), value), plan)
    most, least = BOUNDS[value]
    assert 1e-4 < error(found, expected) < most
    assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > least


def test_one_scale_for_a_row_alone_would_not_do(wide: Wide, make_plan: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above sees what the columns' scales are for, and a scale that is wrong."""
    row, plan, scale = wide("wan2.2-i2v-a14b"), make_plan(wide("wan2.2-i2v-a14b")), quantize._scale
    expected = forward(with_outliers(fresh(row)), plan)
    good = error(forward(applied(with_outliers(fresh(row)), "int8"), plan), expected)

    def rows_alone(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return torch.ones_like(scales) if scales.ndim == 1 else scale(scales, dtype)

    monkeypatch.setattr(quantize, "_scale", rows_alone)
    assert error(forward(applied(with_outliers(fresh(row)), "int8"), plan), expected) > 2 * good
    restored = quantize.restored

    def larger(codes: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, kind: str) -> torch.Tensor:
        return restored(codes, 1.1 * rows, columns, kind)

    monkeypatch.setattr(quantize, "restored", larger)
    assert error(forward(applied(with_outliers(fresh(row)), "int8"), plan), expected) > BOUNDS["int8"][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("value", "worst"), [("int8", 0.011), ("fp8", 0.028)])
def test_a_weight_comes_back(value: str, worst: float, dtype: torch.dtype) -> None:
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[:, 3] *= 100
    weight[7] *= 50
    weight[:, 5] = 0
    weight[9] = 0
    weight = weight.to(dtype)
    before = weight.clone()
    codes, rows, columns = quantize.stored(weight, value)
    assert torch.equal(weight, before)
    assert (codes.dtype, rows.dtype, columns.dtype) == (torch.int8, dtype, dtype)
    found = quantize.restored(codes, rows, columns, value)
    assert found.dtype == dtype
    assert not found[:, 5].any()
    assert not found[9].any()
    # column by column: none is lost beside a larger one
    kept = weight.float().norm(dim=0) > 0
    errors = (found.float() - weight.float()).norm(dim=0)[kept] / weight.float().norm(dim=0)[kept]
    assert errors.square().mean().sqrt() < worst


def test_only_the_large_layers_of_the_blocks_shrink(wide: Wide) -> None:
    left = {}
    for id in IDS:
        parts = applied(fresh(wide(id)), "int8")
        for name in shrunk(parts):
            linears = {path: each for path, each in parts[name].named_modules() if isinstance(each, nn.Linear)}
            left[id, name] = {path for path, each in linears.items() if each.weight.dtype != torch.int8}
            assert len(left[id, name]) < len(linears) / 2, (id, name)
            others = {path for path, tensor in parts[name].named_buffers() if tensor.dtype == torch.int8}
            assert others == {f"{path}.weight" for path in set(linears) - left[id, name]}
        assert all(t.dtype == torch.float32 for name in ("vae",) for t in parts[name].parameters())
    wan = left["wan2.2-i2v-a14b", "transformer"]
    assert {path.split(".")[0] for path in wan} == {"condition_embedder", "proj_out"}
    easy = left["easyanimate-v5.1-7b-inp", "transformer"]
    assert {path for path in easy if "blocks" in path} == {
        f"transformer_blocks.{i}.{norm}.linear" for i in range(4) for norm in ("norm1", "norm2")
    }
    unet = left["i2vgen-xl", "unet"]
    assert {path.split(".")[-1] for path in unet if "resnets" in path} == {"time_emb_proj"}
    assert not left["wan2.2-i2v-a14b", "text_encoder"]
    assert left["easyanimate-v5.1-7b-inp", "text_encoder"] >= {"lm_head"}


def test_what_a_class_keeps_in_fp32_stays(wide: Wide) -> None:
    parts = applied(fresh(wide("wan2.2-i2v-a14b"), torch.float16), "int8")
    kept = {path: each.weight.dtype for path, each in parts["text_encoder"].named_modules() if path.endswith(".wo")}
    assert set(kept.values()) == {torch.float32}
    assert parts.dtype("text_encoder") == parts.dtype("transformer") == torch.float16


def test_bytes_halve_wherever_they_are(wide: Wide, make_plan: Make) -> None:
    """In bf16: kept, packed, moved in a step, and as the dry run says."""
    row = wide("wan2.2-i2v-a14b")
    plans = [make_plan(row, settings={"offload": "block", "quantize": each}) for each in ("none", "int8")]
    plain, small = (apply_all(fresh(row, torch.bfloat16), plan) for plan in plans)
    for name in shrunk(plain):
        linears = [each for each in plain[name].modules() if isinstance(each, nn.Linear)]
        share = sum(each.weight.nbytes for each in linears) / bytes_of(plain, name)
        assert bytes_of(small, name) / bytes_of(plain, name) < 1 - 0.4 * share
    moved = []
    for parts, plan in zip((plain, small), plans, strict=True):
        pipeline, there = Pipeline(plan, parts), offload.placed(parts)
        assert there
        state = pipeline.encode()
        for _ in range(3):
            before = there.transfer.moved_bytes
            pipeline.predict("transformer", state.latents, torch.tensor(900.0), state.conditioning, 1.0)
        moved.append(there.transfer.moved_bytes - before)
    assert moved[1] < 0.75 * moved[0]
    plans = [replace(plan, precision="bf16") for plan in plans]
    said = [{phase.name: phase for phase in dryrun.trace(plan, row)}["denoise:transformer"] for plan in plans]
    assert [phase.bytes["host_to_device"] for phase in said] == [2 * each for each in moved]  # both branches
    for phase, parts in zip(said, (plain, small), strict=True):
        there = offload.placed(parts)
        assert there
        assert phase.weights_bytes == {"transformer": there.components["transformer"].device_bytes}
        assert phase.pinned_bytes == sum(
            slab.bytes
            for component in there.components.values()
            for slab in (*component.whole, *(unit.slab for unit in component.stream.units))
        )


@pytest.mark.parametrize("value", ["part", "block:2", "leaf"])
def test_moving_them_changes_no_bit(value: str, wide: Wide, make_plan: Make) -> None:
    row = wide("wan2.2-i2v-a14b")
    latents = []
    for setting in ("none", value):
        plan = make_plan(row, settings={"offload": setting, "quantize": "int8"})
        parts = fresh(row)
        for name in shrunk(parts):
            for tensor in weights(parts[name]):  # out of the file's pages: kernels round by alignment
                tensor.data = tensor.data.clone()
        pipeline = Pipeline(plan, apply_all(parts, plan))
        state = pipeline.encode()
        pipeline.denoise(state)
        latents.append(state.latents)
    assert torch.equal(*latents)


def test_a_component_goes_on_in_another_precision(wide: Wide, make_plan: Make) -> None:
    for value in ("int8", "fp8"):
        row = wide("wan2.2-i2v-a14b")
        plan = make_plan(row)
        parts = applied(fresh(row, torch.bfloat16), value)
        codes = {path: t.clone() for path, t in parts["transformer"].named_buffers() if t.dtype == torch.int8}
        before = forward(parts, plan)
        for name in shrunk(parts):
            parts.cast(name, torch.float32)
        assert parts.dtype("transformer") == torch.float32
        assert all(torch.equal(parts["transformer"].get_buffer(path), each) for path, each in codes.items())
        assert error(forward(parts, plan), before) < 0.05  # bf16's own


def test_it_is_read_one_component_at_a_time(wide: Wide, make_plan: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """No component is read while another one's weights are whole, and none is shrunk twice."""
    row = wide("wan2.2-i2v-a14b")
    plan = make_plan(row, settings={"quantize": "int8"})
    whole: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    stored = quantize.stored

    def watched(weight: torch.Tensor, kind: str) -> Any:
        alive.append(sum(ref() is not None for ref in whole))
        whole.append(weakref.ref(weight))
        return stored(weight, kind)

    monkeypatch.setattr(quantize, "stored", watched)
    parts = load(plan, row).parts
    assert len(whole) == sum(t.dtype == torch.int8 for name in shrunk(parts) for t in parts[name].buffers())
    assert max(alive) <= 1
    assert not any(ref() is not None for ref in whole[:-1])
    expected = applied(fresh(row), "int8")
    for name in shrunk(parts):
        for ours, theirs in zip(weights(parts[name]), weights(expected[name]), strict=True):
            assert torch.equal(ours, theirs)


def test_a_lora_is_merged_before(wide: Wide, make_plan: Make, tmp_path: Path) -> None:
    row = wide("wan2.2-i2v-a14b")
    name, width = "blocks.1.attn1.to_q", 96
    file = tmp_path / "lora.safetensors"
    up, down = torch.randn(width, 2), torch.randn(2, width)
    save_file({f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}, file)
    for expert in (None, "high"):
        loras = lora.check((Lora(file=file, expert=expert),), row)
        parts = load(make_plan(row, loras=loras, settings={"quantize": "int8"}), row).parts
        merged = fresh(row)
        lora.merge(merged, loras)
        for there in row.experts:
            layer = parts[there].get_submodule(name)
            ours = quantize.restored(layer.weight, layer.weight_rows, layer.weight_columns, "int8")
            assert error(ours, merged[there].get_submodule(name).weight) < 0.012


def test_what_reading_takes_is_said(wide: Wide, make_plan: Make) -> None:
    row = wide("wan2.2-i2v-a14b")
    plan = estimated(make_plan(row, settings={"quantize": "int8"}), row)
    parts = applied(fresh(row), "int8")
    kept = {part.name: bytes_of(parts, part.name) for part in row.components if part.params}
    assert plan.estimate.weights_bytes == pytest.approx(sum(kept.values()), rel=0.2)  # in blocks of 512 bytes
    assert plan.estimate.weights_bytes < make_plan(row).estimate.weights_bytes
    sizes = {"text_encoder": 10, "transformer": 100, "transformer_2": 20}
    blocks = {"transformer": Pieces(bytes=50, tables_bytes=0, blocks=(10,) * 5, layers=(10,) * 5)}
    for level, pieces, expected in (
        ("none", {}, (80, 100)), ("part", {}, (0, 110)), ("disk", {}, (0, 150)),
        ("none", blocks, (80, 20)), ("part", blocks, (0, 80)), ("disk", blocks, (0, 40)),
    ):  # fmt: skip
        there = replace(make_plan(row, settings={"offload": level}), device=replace(plan.device, id="cuda:0"))
        loading = estimate._load(there, row, sizes, {**sizes, "transformer": 50}, pieces)
        assert (loading.peak_vram_bytes, loading.host_bytes) == expected, (level, pieces)


def test_it_is_near_where_it_is_on(wide: Wide, make_plan: Make) -> None:
    row = wide("wan2.2-i2v-a14b")
    assert [Quantize(value=value).tier for value in Quantize.values] == ["exact", "near", "near"]
    reference = make_plan(row)
    assert reference.quantize == "none"
    assert tier_of(make_plan(row, settings={"quantize": "fp8"}), reference) == "near"
    assert tier_of(make_plan(row, settings={"quantize": "none"}), reference) == "exact"
    plan = make_plan(row, settings={"quantize": "int8"})
    assert Plan.from_json(plan.to_json()) == plan
    old = plan.to_json()
    old["settings"] = [setting for setting in old["settings"] if setting["type"] != "quantize"]
    assert Plan.from_json(old).quantize == "none"


def test_a_model_without_such_layers_is_refused(wide: Wide) -> None:
    parts = fresh(wide("wan2.2-i2v-a14b"))
    parts.components["transformer_2"] = nn.Conv2d(1, 1, 1)
    parts.components["transformer_2"].dtype = torch.float32
    with pytest.raises(UsageError, match=r"the transformer_2 of .* has none: use quantize=none"):
        applied(parts, "int8")


@pytest.mark.parametrize(
    ("id", "expert", "most"),
    [
        ("wan2.2-i2v-a14b", "transformer", 0.52),
        ("easyanimate-v5.1-7b-inp", "transformer", 0.56),
        ("i2vgen-xl", "unet", 0.82),
    ],
)
def test_at_true_size(id: str, expert: str, most: float) -> None:
    """What is kept of a denoiser, in bf16: its shapes, and no weights."""
    row = CHECKPOINTS[id]
    one = replace(row, components=tuple(part for part in row.components if part.name == expert))
    parts = random_parts(one, dtype=torch.bfloat16, device=torch.device("meta"))
    before = bytes_of(parts, expert)
    parts.device = torch.device("meta")
    share = bytes_of(applied(parts, "int8"), expert) / before
    assert most - 0.03 < share < most
