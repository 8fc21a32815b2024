"""A forward in chunks is the forward: every denoiser, every chunked operation, and less memory beforehand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D, TemporalConvLayer
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_easyanimate import EasyAnimateTransformerBlock
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.utils._pytree import tree_map_only

from framefit.checkpoint import State
from framefit.errors import NotFinite, UsageError
from framefit.families import Checkpoint
from framefit.families.parts import Parts
from framefit.ledger.live import Live
from framefit.passes import apply_all, chunk, chunk_easyanimate, chunk_unet, chunk_wan, offload, rows
from framefit.passes.rows import LOOP, pieces
from framefit.pipeline import Pipeline
from framefit.plan import Chunk, Plan
from framefit.planning import dryrun
from framefit.profiling.layers import beside
from framefit.testing import randomise

ROWS = {
    "wan2.2-i2v-a14b": 7,
    "wan2.2-ti2v-5b": 5,
    "wan2.1-i2v-14b-480p": 7,
    "easyanimate-v5.1-7b-inp": 7,
    "easyanimate-v5-7b-zh-inp": 7,
    "i2vgen-xl": 200,
}
"""Of a chunk: no divisor of the rows, frames or lines that there are."""

WITHIN = 1e-5
T = torch.tensor(600.0)

Make = Callable[..., Plan]
Tiny = Callable[[str], Checkpoint]
Load = Callable[[Checkpoint], Parts]


@pytest.fixture(scope="module")
def known() -> dict[Any, Any]:
    """What was computed without chunks, by row and settings."""
    return {}


def predictions(plan: Plan, parts: Parts, state: State) -> torch.Tensor:
    pipeline = Pipeline(plan, parts)
    with torch.no_grad():
        found = [pipeline.predict(e, state.latents, T, state.conditioning, 4.0) for e in parts.checkpoint.experts]
    return torch.stack(found)


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert expected.std() > 0.05
    return float((found - expected).abs().max() / expected.abs().max())


def stock(id: str, tiny: Tiny, make_plan: Make, load: Load, known: dict[Any, Any]) -> tuple[State, torch.Tensor]:
    if id not in known:
        parts = load(tiny(id))
        state = Pipeline(make_plan(tiny(id)), parts).encode()
        known[id] = state, predictions(make_plan(tiny(id)), parts, state)
    return known[id]


def chunked_prediction(
    id: str, more: dict[str, str], tiny: Tiny, make_plan: Make, load: Load, state: State
) -> torch.Tensor:
    plan = make_plan(tiny(id), settings={"chunk": f"rows:{ROWS[id]}", **more})
    return predictions(plan, apply_all(load(tiny(id)), plan), state)


MORE: list[dict[str, str]] = [
    {}, {"guidance": "apart"}, {"guidance": "together", "offload": "block"}, {"guidance": "apart", "offload": "leaf"},
]  # fmt: skip


@pytest.mark.parametrize("more", MORE, ids=lambda more: "+".join(more.values()) or "alone")
@pytest.mark.parametrize("id", ROWS)
def test_the_same_prediction(
    id: str, more: dict[str, str], tiny: Tiny, make_plan: Make, load_fp32: Load, known: dict[Any, Any]
) -> None:
    state, expected = stock(id, tiny, make_plan, load_fp32, known)
    assert apart(chunked_prediction(id, more, tiny, make_plan, load_fp32, state), expected) <= WITHIN


@pytest.mark.parametrize("id", ["wan2.2-i2v-a14b", "easyanimate-v5.1-7b-inp"])
def test_the_same_prediction_with_an_end_image(
    id: str, tiny: Tiny, make_plan: Make, load_fp32: Load, end_photo: Any
) -> None:
    row, settings = tiny(id), {"chunk": "rows:7"}
    plan = make_plan(row, settings=settings, last_image=end_photo)
    parts = load_fp32(row)
    state = Pipeline(plan, parts).encode()
    expected = predictions(plan, parts, state)
    assert apart(predictions(plan, apply_all(parts, plan), state), expected) <= WITHIN


def _from_zero(right: Any) -> Any:
    """As many rows, and the first."""

    def wrong(*args: Any) -> Any:
        return right(*(slice(0, a.stop - a.start) if isinstance(a, slice) else a for a in args))

    return wrong


def _timed_from_zero(right: Any) -> Any:
    return lambda *args: _from_zero(right(*args))


def _first_frame(right: Any) -> Any:
    return lambda norm, x: right(norm, x[:, :1])


def _no_photo(right: Any) -> Any:
    return lambda attn, context: right(attn, context)[:1]


def _other_frames(right: Any) -> Any:
    return lambda self, arguments, rows: right(self, arguments, slice(0, rows.stop - rows.start))


def _ungated(right: Any) -> Any:
    return lambda x, rows, out, gates: right(x, rows, out, lambda few: map(torch.ones_like, gates(few)))


def _one_row(right: Any) -> Any:
    return lambda rows, x: [slice(rows.start, rows.start + 1)]


def _no_rotation(right: Any) -> Any:
    return lambda x, *args, **kwargs: x


def _no_gate(right: Any) -> Any:
    return lambda *args: (right(*args)[0], torch.ones(()))


def _first_keys(right: Any) -> Any:
    """Every part puts its keys where the first ones are."""

    def wrong(part: Any, *args: Any) -> None:
        at, part.at = part.at, slice(0, part.at.stop - (part.at.start or 0))
        right(part, *args)
        part.at = at

    return wrong


def _one_chunk(right: Any) -> Any:
    """The rows of the others stay what they were."""

    def wrong(chunks: Sequence[slice], compute: Callable[[slice], None]) -> None:
        right(chunks[:1], compute)

    return wrong


def _unshifted(right: Any) -> Any:
    return lambda table, clock, which: right(table, clock, slice(0, 2) if which == slice(3, 5) else which)


def _not_added(right: Any) -> Any:
    """What a layer along time gives, without what it was given."""

    def wrong(hook: Any, layer: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        given = hidden_states.clone()
        out = right(hook, layer, hidden_states, *args, **kwargs)
        return out - given if isinstance(out, torch.Tensor) else (out[0] - given,)

    return wrong


def _a_line_less(right: Any) -> Any:
    return lambda x, width, elements: [
        slice(s.start + (s.stop - s.start > 1), s.stop) for s in right(x, width, elements)
    ]


FAULTS: dict[str, tuple[str, Any, str, Callable[[Any], Any]]] = {
    "wan: keys turned as the first rows": ("wan2.2-i2v-a14b", chunk_wan, "_at", _from_zero),
    "wan: another row's timestep": ("wan2.2-ti2v-5b", chunk_wan, "_modulation", _timed_from_zero),
    "wan: rows left out": ("wan2.2-i2v-a14b", chunk_wan, "_few", _one_row),
    "wan: no gate": ("wan2.2-i2v-a14b", chunk_wan, "_add", _ungated),
    "wan: the feed-forward modulated as attention": ("wan2.2-i2v-a14b", chunk_wan, "_modulation", _unshifted),
    "wan: only the first chunk": ("wan2.2-i2v-a14b", chunk_wan, "each", _one_chunk),
    "wan: no image tokens": ("wan2.1-i2v-14b-480p", chunk_wan, "_context", _no_photo),
    "easyanimate: not turned": ("easyanimate-v5.1-7b-inp", chunk_easyanimate, "apply_rotary_emb", _no_rotation),
    "easyanimate: no keys of the text": (
        "easyanimate-v5-7b-zh-inp", chunk_easyanimate, "_text_side",
        lambda right: lambda block: chunk_easyanimate.replace(right(block), k=chunk_easyanimate._video_side(block).q),
    ),
    "easyanimate: no gate": ("easyanimate-v5.1-7b-inp", chunk_easyanimate._Part, "_normed", _no_gate),
    "easyanimate: keys over each other": ("easyanimate-v5.1-7b-inp", chunk_easyanimate._Part, "keys", _first_keys),
    "easyanimate: only the first chunk": ("easyanimate-v5.1-7b-inp", chunk_easyanimate, "each", _one_chunk),
    "tokens: only the first chunk": ("easyanimate-v5.1-7b-inp", rows, "each", _one_chunk),
    "unet: frames left out": ("i2vgen-xl", rows, "each", _one_chunk),
    "unet: convolutions along time not added": (
        "i2vgen-xl", chunk_unet.TemporalConvolution, "new_forward", _not_added,
    ),
    "unet: attention along time not added": ("i2vgen-xl", chunk_unet.TemporalTransformer, "new_forward", _not_added),
    "unet: statistics of one frame": ("i2vgen-xl", chunk_unet, "_changes", _first_frame),
    "unet: another frame's context": ("i2vgen-xl", rows.Frames, "_others", _other_frames),
    "unet: lines left out": ("i2vgen-xl", chunk_unet, "_lines", _a_line_less),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_chunk_is_seen(
    fault: str,
    tiny: Tiny,
    make_plan: Make,
    load_fp32: Load,
    known: dict[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    id, owner, name, broken = FAULTS[fault]
    state, expected = stock(id, tiny, make_plan, load_fp32, known)
    monkeypatch.setattr(owner, name, broken(getattr(owner, name)))
    try:
        found = chunked_prediction(id, {"guidance": "together"}, tiny, make_plan, load_fp32, state)
    except NotFinite:
        return
    assert not apart(found, expected) <= 100 * WITHIN


@torch.no_grad()
def random(module: nn.Module) -> nn.Module:
    return randomise(module.eval(), torch.Generator().manual_seed(3))


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def wan(*, photo: bool = False, per_token: bool = False) -> tuple[nn.Module, Any, Any]:
    block = WanTransformerBlock(24, 32, 2, cross_attn_norm=True, added_kv_proj_dim=24 if photo else None)
    temb = normal(2, 19, 6, 24) if per_token else normal(2, 6, 24)
    rotation = normal(1, 19, 1, 12), normal(1, 19, 1, 12)
    return block, chunk_wan.Block, (normal(2, 19, 24), normal(2, 512 + 5 * photo, 24), temb, rotation)


def easyanimate(**kind: Any) -> tuple[nn.Module, Any, Any]:
    block = EasyAnimateTransformerBlock(24, 2, 12, 8, norm_elementwise_affine=True, **kind)
    rotation = normal(19, 12), normal(19, 12)
    return block, chunk_easyanimate.Block, (normal(2, 19, 24), normal(2, 5, 24), normal(2, 8), rotation)


def of_frames(module: nn.Module, *more: torch.Tensor) -> tuple[nn.Module, Any, Any]:
    return module, chunk_unet.OF_CLASS[type(module).__name__], (normal(10, 8, 6, 4), *more)


BLOCKS: dict[str, Callable[[], tuple[nn.Module, Any, Any]]] = {
    "wan": wan,
    "wan, a timestep per token": lambda: wan(per_token=True),
    "wan, with image tokens": lambda: wan(photo=True),
    "easyanimate, two streams": easyanimate,
    "easyanimate, one stream": lambda: easyanimate(is_mmdit_block=False),
    "easyanimate, a norm after": lambda: easyanimate(after_norm=True, qk_norm=False),
    "resnet": lambda: of_frames(
        ResnetBlock2D(in_channels=8, out_channels=12, temb_channels=6, groups=2), normal(10, 6)
    ),
    "spatial attention": lambda: of_frames(
        Transformer2DModel(2, 4, in_channels=8, cross_attention_dim=8, norm_num_groups=2), normal(10, 3, 8)
    ),
    "up": lambda: of_frames(Upsample2D(8, use_conv=True)),
    "down": lambda: of_frames(Downsample2D(8, use_conv=True)),
    "temporal convolution": lambda: of_frames(TemporalConvLayer(8, 8, norm_num_groups=2)),
    "temporal attention": lambda: of_frames(TransformerTemporalModel(2, 4, in_channels=8, norm_num_groups=2)),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("elements", [2 * 24 * 7, 2 * 24 * 19 * 1000])
def test_diffusers_own_block_computes_the_same(name: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two branches at once; so that a change in a later diffusers is noticed."""
    if elements < 1000:
        monkeypatch.setattr(chunk_wan, "FEW", 2 * 24 * 3)  # of a chunk's seven rows
    block, hook, args = BLOCKS[name]()
    random(block)
    more: dict[str, Any] = {"num_frames": 5} if name.startswith("temporal") else {}
    more |= {"return_dict": False} if name.endswith("l attention") else {}
    with torch.no_grad():
        expected = first(block(*args, **more))
        chunk.HookRegistry.check_if_exists_or_initialize(block).register_hook(hook(elements), chunk.HOOK)
        seen: list[int] = []

        def loop(chunks: Sequence[slice], compute: Callable[[slice], None]) -> None:
            seen.append(len(chunks))
            for each in chunks:
                compute(each)

        token = LOOP.set(loop)
        try:
            found = first(block(*args, **more))
        finally:
            LOOP.reset(token)
    assert all(apart(f, e) <= WITHIN and f.shape == e.shape for f, e in zip(found, expected, strict=True))
    assert next(iter(seen), 1) > 1 if elements < 1000 else max(seen, default=1) == 1


@pytest.mark.parametrize("name", BLOCKS)
def test_no_further_from_the_truth_in_bf16(name: str) -> None:
    """Than diffusers' own forward: the truth is fp32."""
    block, hook, args = BLOCKS[name]()
    random(block)
    more: dict[str, Any] = {"num_frames": 5} if name.startswith("temporal") else {}
    more |= {"return_dict": False} if name.endswith("l attention") else {}
    half = tree_map_only(torch.Tensor, lambda tensor: tensor.bfloat16(), args)
    with torch.no_grad():
        block.bfloat16()
        truth = first(copy.deepcopy(block).float()(*tree_map_only(torch.Tensor, torch.Tensor.float, half), **more))
        stock = first(block(*tree_map_only(torch.Tensor, torch.clone, half), **more))
        chunk.HookRegistry.check_if_exists_or_initialize(block).register_hook(hook(2 * 24 * 7), chunk.HOOK)
        found = first(block(*half, **more))
    for f, s, t in zip(found, stock, truth, strict=True):
        assert f.dtype == s.dtype == torch.bfloat16
        assert (f - t).norm() <= 1.1 * (s - t).norm()


def first(output: Any) -> list[torch.Tensor]:
    return [output] if isinstance(output, torch.Tensor) else [output[i].clone() for i in range(len(output))]


@pytest.mark.parametrize(("total", "most"), [(10, 3), (10, 10), (10, 100), (1, 1), (75600, 4096), (7, 0), (33, 4)])
def test_pieces_are_all_rows_once(total: int, most: int) -> None:
    found = pieces(total, most)
    assert [i for piece in found for i in range(total)[piece]] == list(range(total))
    lengths = [piece.stop - piece.start for piece in found]
    assert max(lengths) <= max(most, 1)
    assert len({*lengths[:-1]}) <= 1


@pytest.mark.parametrize("id", ["wan2.2-ti2v-5b", "easyanimate-v5.1-7b-inp", "i2vgen-xl"])
def test_it_can_be_taken_away(id: str, tiny: Tiny, make_plan: Make, load_fp32: Load, known: dict[Any, Any]) -> None:
    state, _ = stock(id, tiny, make_plan, load_fp32, known)
    plan = make_plan(tiny(id), settings={"chunk": f"rows:{ROWS[id]}"})
    parts = apply_all(load_fp32(tiny(id)), make_plan(tiny(id)))
    expected = predictions(plan, parts, state)
    apply_all(parts, plan)
    models = [parts[expert] for expert in parts.checkpoint.experts]
    assert all(any(map(chunk.chunked, model.modules())) for model in models)
    chunk.remove(parts)
    assert not any(chunk.chunked(module) for model in models for module in model.modules())
    assert torch.equal(predictions(plan, parts, state), expected)


def test_a_layer_comes_once_a_forward(tiny: Tiny, make_plan: Make, load_fp32: Load) -> None:
    """And not once a chunk."""
    for id in ("wan2.2-i2v-a14b", "i2vgen-xl"):
        for value in ("block", "leaf")[id != "i2vgen-xl" :]:
            settings = {"chunk": f"rows:{ROWS[id]}", "offload": value, "guidance": "apart"}
            plan = make_plan(tiny(id), settings=settings)
            pipeline = Pipeline(plan, apply_all(load_fp32(tiny(id)), plan))
            state, expert = pipeline.encode(), tiny(id).experts[0]
            placed = offload.placed(pipeline.parts)
            assert placed
            with torch.no_grad():
                for _ in range(2):
                    pipeline.predict(expert, state.latents, T, state.conditioning, 1.0)
                before = placed.transfer.moved_bytes
                pipeline.predict(expert, state.latents, T, state.conditioning, 1.0)
            streamed = sum(unit.slab.bytes for unit in placed.components[expert].stream.units)
            assert placed.transfer.moved_bytes - before <= streamed


def test_its_layers_stand_beside_the_untouched_ones(
    tiny: Tiny, make_plan: Make, load_fp32: Load, known: dict[Any, Any]
) -> None:
    """Although a block overwrites what it is given."""
    id = "wan2.2-i2v-a14b"
    state, _ = stock(id, tiny, make_plan, load_fp32, known)
    plan = make_plan(tiny(id), settings={"chunk": f"rows:{ROWS[id]}", "guidance": "apart"})
    parts, name = apply_all(load_fp32(tiny(id)), plan), tiny(id).experts[0]
    with torch.no_grad(), beside(parts[name], load_fp32(tiny(id))[name], name) as added:
        Pipeline(plan, parts).predict(name, state.latents, T, state.conditioning, 4.0)
    assert any("blocks.1" in layer for layer in added)
    assert max(added.values()) <= WITHIN


def test_the_plan_says_beforehand_that_less_is_held(
    tiny: Tiny, make_plan: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it counts of two equal chunks is what it counts of all."""

    row = tiny("wan2.2-i2v-a14b")

    def denoising(**settings: str) -> Any:
        plan = make_plan(row, settings={"guidance": "apart", **settings}, width=256, height=256, num_frames=1)
        return next(phase for phase in dryrun.trace(plan, row) if phase.name.startswith("denoise"))

    few, whole = denoising(chunk="rows:50"), denoising()
    assert few.peak_bytes < 0.95 * whole.peak_bytes  # latents between two steps are in both
    assert sum(few.flops.values()) == pytest.approx(sum(whole.flops.values()), rel=0.01)
    monkeypatch.setattr(dryrun.chunks, "once", lambda tally: nullcontext())
    every = denoising(chunk="rows:50")
    assert (few.peak_bytes, few.flops, few.bytes) == (every.peak_bytes, every.flops, every.bytes)


@pytest.mark.parametrize("name", ["resnet", "spatial attention", "up", "temporal convolution", "temporal attention"])
def test_less_is_held_of_the_unet(name: str) -> None:
    """Beside the result and what is given, which are whole."""
    block, hook, args = BLOCKS[name]()
    args = tuple(torch.cat([each] * 4) for each in args)
    more: dict[str, Any] = {"num_frames": 40} if name.startswith("temporal") else {}
    more |= {"return_dict": False} if name.endswith("l attention") else {}

    def held() -> int:
        live = Live([*block.parameters(), *args])
        with torch.no_grad(), live, live.phase("it"):
            block(*args, **more)
        return live.phases["it"].bytes

    whole = held()
    chunk.HookRegistry.check_if_exists_or_initialize(block).register_hook(hook(8 * 6 * 4 * 4), chunk.HOOK)
    assert held() < 0.7 * whole


@pytest.mark.parametrize(("wide", "rows", "few", "most"), [(512, 512, 128, 2.4), (32, 1024, 64, 2.53)])
def test_less_is_held_of_wans_block(
    wide: int, rows: int, few: int, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values of all tokens, and of a chunk what computes; in tensors of all tokens. More is over it: keys that
    stay beside a wide feed-forward, larger chunks or parts of them, queries that stay when they have been answered."""
    tokens, width = 4096, 64
    block = WanTransformerBlock(width, wide, 2, cross_attn_norm=True).bfloat16()
    rotation = normal(1, tokens, 1, width // 2), normal(1, tokens, 1, width // 2)
    given = normal(1, tokens, width).bfloat16(), normal(1, 512, width).bfloat16(), normal(1, 6, width)
    monkeypatch.setattr(chunk_wan, "FEW", few * width)
    chunk.HookRegistry.check_if_exists_or_initialize(block).register_hook(chunk_wan.Block(rows * width), chunk.HOOK)
    with torch.no_grad(), Live([*block.parameters(), *given, *rotation]) as live, live.phase("it"):
        block(*given, rotation)
    assert live.phases["it"].bytes <= most * given[0].nbytes


@pytest.mark.parametrize("value", ["rows:0", "rows:", "rows:many", "frames:4", "none:3"])
def test_what_is_no_number_of_rows_is_refused(value: str) -> None:
    with pytest.raises(UsageError, match="use chunk=none or chunk=rows or chunk=rows:N"):
        Chunk(value=value)


def test_a_number_of_rows() -> None:
    assert [Chunk(value=value).rows for value in ("none", "rows", "rows:4096")] == [None, None, 4096]
