"""LoRA files: merged as diffusers and PEFT merge them, placed to the last tensor, known to whatever a run leaves."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_equality import ours, reference

from framefit import cli, photo, video
from framefit.errors import BadInput
from framefit.families import CHECKPOINTS, Checkpoint, lora, lora_file
from framefit.families.parts import Parts, load_parts
from framefit.pipeline import load
from framefit.plan import Plan
from framefit.request import Lora

Tiny = Callable[[str], Checkpoint]
Tensors = dict[str, torch.Tensor]
Load = Callable[[Checkpoint], Parts]
Write = Callable[..., Path]
Call = Callable[..., tuple[int, str, str]]

WAN, WAN21, EASY, I2VGEN = "wan2.2-i2v-a14b", "wan2.1-i2v-14b-480p", "easyanimate-v5.1-7b-inp", "i2vgen-xl"
RANK = 3


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """(tensors, name) -> a file of them."""

    def save(tensors: Tensors, name: str = "style.safetensors", **metadata: str) -> Path:
        save_file(
            {key: value.contiguous() for key, value in tensors.items()}, tmp_path / name, metadata=metadata or None
        )
        return tmp_path / name

    return save


def linear_layers(row: Checkpoint, expert: str, pattern: str) -> dict[str, tuple[int, ...]]:
    """Module -> (out, in) of the expert's matrices whose name fits."""
    found = {k.removesuffix(".weight"): s for k, s in lora.shapes(row)[expert].items() if k.endswith(".weight")}
    return {name: shape for name, shape in found.items() if len(shape) == 2 and re.search(pattern, name)}


def pairs(row: Checkpoint, pattern: str = "attn|ff", *, prefix: str = "transformer.", seed: int = 0) -> Tensors:
    """A LoRA in PEFT's names over the first expert's layers; large enough to be seen."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (out, inside) in linear_layers(row, row.experts[0], pattern).items():
        tensors[f"{prefix}{name}.lora_A.weight"] = torch.randn(RANK, inside, generator=generator) / inside**0.5
        tensors[f"{prefix}{name}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) / 2
    return tensors


def denoisers(parts: Parts) -> dict[str, Tensors]:
    return {e: {k: v.detach().clone() for k, v in parts[e].named_parameters()} for e in parts.checkpoint.experts}


def merged(row: Checkpoint, *loras: Lora, dtype: torch.dtype = torch.float32) -> dict[str, Tensors]:
    assert row.folder is not None
    parts = load_parts(row, row.folder, dtype=dtype, device=torch.device("cpu"))
    lora.merge(parts, lora.check(loras, row))
    return denoisers(parts)


def distance(a: Tensors, b: Tensors) -> float:
    assert a.keys() == b.keys()
    return max(float((a[key].float() - b[key].float()).abs().max()) for key in a)


# --- what is merged ------------------------------------------------------------------------------------------------


def pefts(model: Any, tensors: Tensors, scale: float, prefix: str = "transformer") -> Tensors:
    """The model's parameters once PEFT has merged `tensors`, by way of diffusers where its class knows the way."""
    if hasattr(model, "load_lora_adapter"):
        model.load_lora_adapter(dict(tensors), prefix=prefix, adapter_name="a")
        model.fuse_lora(lora_scale=scale)
        model.unload_lora()
        return dict(model.named_parameters())
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    plain = {key.removeprefix(f"{prefix}."): value for key, value in tensors.items()}
    layers = sorted({key.split(".lora_")[0] for key in plain})
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers), model, adapter_name="a")
    set_peft_model_state_dict(model, plain, adapter_name="a")
    for layer in layers:
        module = model.get_submodule(layer)
        module.scale_layer(scale)
        module.merge()
    return {k.replace(".base_layer", ""): v for k, v in model.named_parameters() if "lora_" not in k}


@pytest.mark.parametrize(
    ("id", "prefix"), [(WAN, "transformer"), (WAN21, "transformer"), (EASY, "transformer"), (I2VGEN, "unet")]
)
@pytest.mark.parametrize("scale", [1.0, 0.8, -0.5])
def test_weights_equal_pefts(tiny: Tiny, load_fp32: Load, write: Write, id: str, prefix: str, scale: float) -> None:
    pytest.importorskip("peft")
    row = tiny(id)
    file = write(pairs(row, prefix=f"{prefix}."))
    found, parts = merged(row, Lora(file=file, scale=scale)), load_fp32(row)
    for expert, before in denoisers(parts).items():
        assert distance(found[expert], pefts(parts[expert], load_file(file), scale, prefix)) <= 1e-6
        assert distance(found[expert], before) > 0.01


def test_the_video_equals_diffusers(tiny: Tiny, make_plan: Callable[..., Plan], load_fp32: Load, write: Write) -> None:
    """Both experts, each with a file, a scale and alphas of its own."""
    pytest.importorskip("peft")
    row = tiny(WAN)
    high, low = upstream(pairs(row, seed=1), alpha=1.5), upstream(pairs(row, "attn1", seed=2), alpha=6.0)
    loras = (
        Lora(file=write(high, "high.safetensors"), scale=0.7, expert="high"),
        Lora(file=write(low, "low.safetensors"), scale=1.3, expert="low"),
    )
    plan = make_plan(row, guidance=(4.0,), loras=loras, num_frames=9, steps=6)
    plain, _ = ours(plan, load_fp32(row))
    latents, _ = ours(plan, load(plan, row).parts)
    parts = load_fp32(row)
    pefts(parts["transformer"], converted(high), 0.7)
    pefts(parts["transformer_2"], converted(low), 1.3)
    expected, _ = reference(plan, parts)
    assert (latents - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (latents - plain).abs().max() > 0.01 * expected.abs().max()


@pytest.mark.filterwarnings("ignore:Adapter 'a'. 8 LoRA tensor")  # PEFT 0.21 takes biases for shards of matrices
def test_what_diffusers_saves_after_training_has_its_alpha(tiny: Tiny, load_fp32: Load, tmp_path: Path) -> None:
    """Since 0.34 it notes alpha beside the tensors and not among them."""
    peft = pytest.importorskip("peft")
    from diffusers import WanImageToVideoPipeline

    row = tiny(WAN21)
    model = load_fp32(row)["transformer"]
    facts = {"target_modules": ["to_q", "to_v"], "init_lora_weights": False, "lora_bias": True}
    model.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=4 * RANK, **facts), adapter_name="a")
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            parameter.data.normal_()
    WanImageToVideoPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=peft.get_peft_model_state_dict(model, adapter_name="a"),
        transformer_lora_adapter_metadata=model.peft_config["a"].to_dict(),
    )
    model.fuse_lora()
    model.unload_lora()
    found = merged(row, Lora(file=tmp_path / "pytorch_lora_weights.safetensors"))
    assert distance(found["transformer"], dict(model.named_parameters())) <= 1e-6


# --- names ---------------------------------------------------------------------------------------------------------


UPSTREAM = {
    "attn1.": "self_attn.", "attn2.": "cross_attn.", "to_out.0": "o", ".to_": ".", "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2", "add_k_proj": "k_img", "add_v_proj": "v_img",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1", "proj_out": "head.head",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
}  # fmt: skip
"""Wan's modules, typed again: what the product's table says is held to it and to diffusers' converter."""


def upstream(tensors: Tensors, *, alpha: float | None = None, style: str = "diffusion_model.") -> Tensors:
    """A Wan LoRA in PEFT's names as others write it."""
    written: Tensors = {}
    for key, value in tensors.items():
        module, half = key.removeprefix("transformer.").removesuffix(".weight").split(".lora_")
        for old, new in UPSTREAM.items():
            module = module.replace(old, new)
        module = style + (module if style.endswith(".") else module.replace(".", "_"))
        written[f"{module}.{'lora_down' if half == 'A' else 'lora_up'}.weight"] = value
        if alpha is not None:
            written[f"{module}.alpha"] = torch.tensor(alpha)
    return written


def converted(tensors: Tensors) -> Tensors:
    """By diffusers' own converters, as its pipeline calls them."""
    from diffusers.loaders import lora_conversion_utils as theirs

    musubi = any(key.startswith("lora_unet_") for key in tensors)
    name = "_convert_musubi_wan_lora_to_diffusers" if musubi else "_convert_non_diffusers_wan_lora_to_diffusers"
    return dict(getattr(theirs, name)(dict(tensors)))


@pytest.mark.parametrize("id", [WAN, WAN21])
@pytest.mark.parametrize("style", ["diffusion_model.", "lora_unet_", "lora_unet__"])
def test_upstreams_names_are_read_as_diffusers_reads_them(
    tiny: Tiny, load_fp32: Load, write: Write, id: str, style: str
) -> None:
    pytest.importorskip("peft")
    row = tiny(id)
    tensors = upstream(pairs(row, "^blocks"), alpha=2.0, style=style)
    if style == "diffusion_model.":  # of the layers around the blocks the converter takes no alpha
        tensors |= upstream(pairs(row, "^(?!blocks)", seed=1), style=style)
        for key in [key for key in tensors if key.endswith("lora_up.weight")]:
            tensors[key.replace("lora_up.weight", "diff_b")] = torch.randn(len(tensors[key]))
    found, parts = merged(row, Lora(file=write(tensors), scale=0.6)), load_fp32(row)
    theirs = converted({key.replace("lora_unet__", "lora_unet_"): value for key, value in tensors.items()})
    assert distance(found["transformer"], pefts(parts["transformer"], theirs, 0.6)) <= 1e-6


@pytest.mark.parametrize("names", ["{}.lora_{}.weight", "transformer.{}.lora_{}.weight", "{}.lora_{}.default.weight"])
def test_prefixes_and_adapter_names_say_nothing(tiny: Tiny, write: Write, names: str) -> None:
    row = tiny(WAN21)
    plain = pairs(row, prefix="")
    named = {names.format(*re.split(r"\.lora_|\.weight", key)[:2]): value for key, value in plain.items()}
    expected = merged(row, Lora(file=write(plain, "a.safetensors")))
    assert distance(merged(row, Lora(file=write(named)))["transformer"], expected["transformer"]) == 0


def test_easyanimates_own_names(tiny: Tiny, write: Write) -> None:
    """VideoX-Fun trains upstream's model: the text side's attention is one of its own there."""
    row = tiny(EASY)
    side = {"add_q_proj": "attn2_to_q", "to_add_out": "attn2_to_out_0"}
    tensors = pairs(row, "attn1.(add_q_proj|to_add_out|to_q)$", prefix="")
    named = {}
    for key, value in tensors.items():
        module, half = key.removesuffix(".weight").split(".lora_")
        flat = module.replace(".", "_")
        for new, old in side.items():
            flat = flat.replace(f"attn1_{new}", old)
        named[f"lora_unet__{flat}.{'lora_down' if half == 'A' else 'lora_up'}.weight"] = value
    assert any("attn2_to_out_0" in key for key in named)
    expected = merged(row, Lora(file=write(tensors, "a.safetensors")))["transformer"]
    assert distance(merged(row, Lora(file=write(named)))["transformer"], expected) == 0


@pytest.mark.parametrize("id", CHECKPOINTS)
def test_every_parameter_is_known_without_its_weights(tiny: Tiny, load_fp32: Load, id: str) -> None:
    row = tiny(id)
    found = {e: {k: tuple(v.shape) for k, v in tensors.items()} for e, tensors in denoisers(load_fp32(row)).items()}
    assert lora.shapes(row) == found
    for shapes in found.values():
        spelled = lora_file.spellings(shapes, row.family)
        modules = {re.sub(r"\.(weight|bias)$", "", name) for name in shapes}
        assert all(spelled[name] == name for name in modules), "no other module's name takes it"


# --- which expert, and what else a file can hold ---------------------------------------------------------------------


def changed(row: Checkpoint, *loras: Lora) -> set[str]:
    before = merged(row)
    return {expert for expert, after in merged(row, *loras).items() if distance(before[expert], after)}


def test_experts(tiny: Tiny, write: Write) -> None:
    row = tiny(WAN)
    file, both = write(pairs(row, "attn1.to_q")), {"transformer", "transformer_2"}
    assert changed(row, Lora(file=file)) == both
    assert changed(row, Lora(file=file, expert="high")) == {"transformer"}
    assert changed(row, Lora(file=file, expert="low")) == {"transformer_2"}
    low = pairs(row, "attn1.to_q", prefix="transformer_2.", seed=1)
    assert changed(row, Lora(file=write(low))) == {"transformer_2"}
    split = merged(row, Lora(file=write(low | pairs(row, "attn1.to_q"), "split.safetensors")))
    apart = merged(
        row,
        Lora(file=write(pairs(row, "attn1.to_q")), expert="high"),
        Lora(file=write({k.replace("transformer_2.", ""): v for k, v in low.items()}, "b.safetensors"), expert="low"),
    )
    assert all(distance(split[expert], apart[expert]) == 0 for expert in both)


def test_whole_differences_are_added_as_they_stand(tiny: Tiny, write: Write) -> None:
    row = tiny(WAN)
    shapes = lora.shapes(row)["transformer"]
    where = {
        "blocks.0.norm3.diff": "blocks.0.norm2.weight", "blocks.0.norm3.diff_b": "blocks.0.norm2.bias",
        "blocks.1.self_attn.norm_q.diff": "blocks.1.attn1.norm_q.weight", "head.head.diff": "proj_out.weight",
        "blocks.0.modulation.diff": "blocks.0.scale_shift_table", "head.modulation.diff": "scale_shift_table",
        "patch_embedding.diff": "patch_embedding.weight", "patch_embedding.diff_b": "patch_embedding.bias",
    }  # fmt: skip
    tensors = {f"diffusion_model.{key}": torch.randn(shapes[name]) for key, name in where.items()}
    before, after = merged(row), merged(row, Lora(file=write(tensors), scale=0.5))
    for key, name in where.items():
        expected = before["transformer"][name] + 0.5 * tensors[f"diffusion_model.{key}"]
        assert torch.equal(after["transformer"][name], expected)
    untouched = before["transformer"].keys() - where.values()
    assert all(torch.equal(before["transformer"][name], after["transformer"][name]) for name in untouched)


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("blocks.1.cross_attn.norm_k_img.diff", "blocks.1.attn2.norm_added_k.weight"),
        ("blocks.1.cross_attn.norm_k.diff", "blocks.1.attn2.norm_k.weight"),
        ("img_emb.proj.0.diff_b", "condition_embedder.image_embedder.norm1.bias"),
        ("img_emb.proj.4.diff", "condition_embedder.image_embedder.norm2.weight"),
    ],
)
def test_norms_that_no_converter_reads(tiny: Tiny, write: Write, name: str, parameter: str) -> None:
    row = tiny(WAN21)
    shapes = lora.shapes(row)
    file = write({f"diffusion_model.{name}": torch.ones(shapes["transformer"][parameter])})
    (change,) = lora_file.place(Lora(file=file), row, shapes)
    assert change.parameter == parameter


def test_convolutions(tiny: Tiny, write: Write) -> None:
    row = tiny(WAN)
    shape = lora.shapes(row)["transformer"]["patch_embedding.weight"]
    down, up = torch.randn(2, *shape[1:]), torch.randn(shape[0], 2, 1, 1, 1)
    file = write({"patch_embedding.lora_down.weight": down, "patch_embedding.lora_up.weight": up})
    before, after = merged(row)["transformer"], merged(row, Lora(file=file))["transformer"]
    expected = torch.einsum("or,rifhw->oifhw", up[:, :, 0, 0, 0], down)
    change = after["patch_embedding.weight"] - before["patch_embedding.weight"]
    torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_does_not_matter_to_a_bit(tiny: Tiny, write: Write, dtype: torch.dtype) -> None:
    row = tiny(WAN)
    loras = [
        Lora(file=write(pairs(row, seed=seed), f"{seed}.safetensors"), scale=scale)
        for seed, scale in enumerate([0.3, -1.1, 0.77])
    ]
    loras.append(Lora(file=loras[0].file, scale=0.1))
    one, other = merged(row, *loras, dtype=dtype), merged(row, *reversed(loras), dtype=dtype)
    assert all(distance(one[expert], other[expert]) == 0 for expert in one)


def test_a_sum_is_rounded_once(tiny: Tiny, write: Write) -> None:
    """Ten changes of which each alone is lost in bf16."""
    row, name = tiny(WAN), "blocks.0.attn1.to_q.weight"
    before = merged(row, dtype=torch.bfloat16)["transformer"][name].float()
    file = write({"blocks.0.attn1.to_q.diff": before})
    after = merged(row, *[Lora(file=file, scale=0.001)] * 10, dtype=torch.bfloat16)["transformer"][name]
    assert torch.equal(after, (before * 1.01).bfloat16())
    assert not torch.equal(after.float(), before)


@pytest.mark.parametrize("id", [WAN, "easyanimate-v5-7b-zh-inp"])
def test_the_models_files_stay_as_they_are(tiny: Tiny, write: Write, id: str) -> None:
    """What a loader gives may be a view of the file."""
    row = tiny(id)
    assert row.folder is not None
    files = sorted(row.folder.rglob("*.safetensors"))
    before = [photo.sha256(file) for file in files]
    assert changed(row, Lora(file=write(pairs(row))))
    assert [photo.sha256(file) for file in files] == before


# --- what is refused ------------------------------------------------------------------------------------------------


Q = "transformer.blocks.0.attn1.to_q"


def sound() -> Tensors:
    return {f"{Q}.lora_A.weight": torch.ones(2, 24), f"{Q}.lora_B.weight": torch.ones(24, 2)}


@pytest.mark.parametrize(
    ("id", "change", "words"),
    [
        (WAN, {"transformer.blocks.9.attn1.to_q.lora_A.weight": torch.ones(2, 24)}, ("1 of its 3", "blocks.9")),
        (WAN, {f"{Q}.dora_scale": torch.ones(24)}, ("dora_scale", "no place")),
        (WAN, {f"{Q}.hada_w1_a": torch.ones(24)}, ("hada_w1_a", "no place")),
        (WAN, {"text_encoder.layer.lora_A.weight": torch.ones(2, 24)}, ("text_encoder.layer",)),
        (WAN, {"blocks.0.attn2.add_k_proj.diff": torch.ones(24, 24)}, ("add_k_proj",)),
        (WAN, {f"{Q}.lora_A.weight": torch.ones(2, 25)}, ("[2, 25]", "blocks.0.attn1.to_q.weight", "[24, 24]")),
        (WAN, {f"{Q}.lora_A.weight": torch.ones(3, 24)}, ("[3, 24]", "[24, 2]")),
        (WAN, {f"{Q}.lora_A.weight": torch.ones(24)}, ("[24]",)),
        (WAN, {f"{Q}.lora_A.weight": torch.ones(())}, ("[]",)),
        (WAN, {f"{Q}.lora_A.weight": torch.ones(0, 24), f"{Q}.lora_B.weight": torch.ones(24, 0)}, ("[0, 24]",)),
        (WAN, {f"{Q}.lora_B.weight": None}, ("to_q.lora_A.weight", "other half")),
        (WAN, {f"{Q}.lora_A.weight": None}, ("to_q.lora_B.weight", "other half")),
        (WAN, {"blocks.0.attn1.to_k.alpha": torch.tensor(1.0)}, ("to_k.alpha", "other half")),
        (WAN, {f"{Q}.alpha": torch.ones(2)}, ("alpha", "one number")),
        (WAN, {f"{Q}.alpha": torch.tensor(float("nan"))}, ("NaN", "alpha")),
        (WAN, {f"{Q}.lora_down.weight": torch.ones(2, 24)}, ("lora_A", "lora_down", "two names")),
        (WAN, {"blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 24)}, ("two names",)),
        (WAN, {f"{Q}.diff": torch.ones(24, 25)}, ("[24, 25]", "[24, 24]")),
        (WAN, {"blocks.0.attn1.norm_q.diff_b": torch.ones(24)}, ("diff_b", "norm_q.bias", "does not exist")),
        (WAN, {f"{Q}.lora_B.weight": torch.full((24, 2), float("inf"))}, ("NaN or infinity", "lora_B")),
        (WAN, {f"{Q}.lora_B.weight": torch.ones(24, 2, dtype=torch.int8)}, ("I8", "floating-point")),
        (WAN21, {"transformer_2.blocks.0.attn1.to_q.diff": torch.ones(24, 24)}, ("transformer_2",)),
        (WAN, dict.fromkeys(sound()), ("holds no tensors",)),
        (EASY, {}, ("none of its 2 tensors", Q)),
        (I2VGEN, {}, ("none of its 2 tensors", Q)),
    ],
)  # fmt: skip
def test_a_tensor_without_a_place_is_refused(
    tiny: Tiny, write: Write, id: str, change: dict[str, torch.Tensor | None], words: tuple[str, ...]
) -> None:
    tensors = {key: value for key, value in (sound() | change).items() if value is not None}
    file = write(tensors)
    with pytest.raises(BadInput) as refused:
        lora.check((Lora(file=file),), tiny(id))
    for word in (str(file), *words):
        assert word in str(refused.value)
    assert re.search(r"[^.]\.$", str(refused.value))


@pytest.mark.parametrize(
    "notes", ["no JSON", "[]", '{"transformer.lora_alpha": "x"}', '{"lora_alpha": NaN}', '{"a.use_rslora": true}']
)
def test_notes_that_change_the_sum_are_read_or_refused(tiny: Tiny, write: Write, notes: str) -> None:
    with pytest.raises(BadInput, match=r"lora_adapter_metadata|use_rslora"):
        lora.check((Lora(file=write(sound(), lora_adapter_metadata=notes)),), tiny(WAN))


def test_an_expert_that_cannot_be_chosen(tiny: Tiny, write: Write) -> None:
    file = write(sound())
    with pytest.raises(BadInput, match=r"@high chooses.*has one"):
        lora.check((Lora(file=file, expert="high"),), tiny(WAN21))
    split = write({key.replace("transformer.", "transformer_2."): value for key, value in sound().items()})
    with pytest.raises(BadInput, match=r"@low chooses.*names its experts itself"):
        lora.check((Lora(file=split, expert="low"),), tiny(WAN))


def test_a_file_that_changed_since_the_plan_was_made(tiny: Tiny, load_fp32: Load, write: Write) -> None:
    row, file = tiny(WAN), write(sound())
    (checked,) = lora.check((Lora(file=file),), row)
    write({key: value * 2 for key, value in sound().items()})
    parts = load_fp32(row)
    before = denoisers(parts)
    for refuse in (lambda: lora.check((checked,), row), lambda: lora.merge(parts, [checked])):
        with pytest.raises(BadInput, match="is not the LoRA that was asked for"):
            refuse()
    assert all(distance(before[expert], after) == 0 for expert, after in denoisers(parts).items())


def test_what_exceeds_the_precision_is_refused(tiny: Tiny, write: Write) -> None:
    file = write({key: value * 1000 for key, value in sound().items()})
    with pytest.raises(BadInput, match=r"exceeds torch\.float16: ask for a smaller scale"):
        merged(tiny(WAN), Lora(file=file), dtype=torch.float16)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0, None)),
        ("dir/a b.safetensors:0.8", ("dir/a b.safetensors", 0.8, None)),
        ("a.safetensors@high", ("a.safetensors", 1.0, "high")),
        ("a:1@low.safetensors@low:-2", ("a:1@low.safetensors", -2.0, "low")),
        ("C:\\a.SAFETENSORS:1e-3", ("C:\\a.SAFETENSORS", 0.001, None)),
    ],
)
def test_the_flag_is_read(text: str, expected: tuple[str, float, str | None]) -> None:
    found = Lora.parse(text)
    assert (str(found.file), found.scale, found.expert) == expected
    assert Lora.parse(str(found)) == found
    assert Lora.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a.ckpt", "does not name a .safetensors file"), ("a", "safetensors"), ("", "safetensors"),
        ("a.safetensors:x", "scale of a.safetensors is 'x'"), ("a.safetensors:", "scale"),
        ("a.safetensors:nan", "from -100 to 100"), ("a.safetensors:1e9", "from -100 to 100"),
        ("a.safetensors@middle", "'middle', and must be high or low"), ("a.safetensors@:1", "high or low"),
    ],
)  # fmt: skip
def test_a_flag_that_says_nothing_is_refused(text: str, says: str) -> None:
    with pytest.raises(BadInput, match=re.escape(says)):
        Lora.parse(text)


# --- from the command line to the file and back --------------------------------------------------------------------


@pytest.fixture
def call(home: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(a) for a in arguments])
        assert isinstance(stop.value.code, int)
        return (stop.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def make(call: Call, tiny: Tiny, photo: Path) -> Call:
    """(output, flags) -> a short video of the two-expert model."""

    def run(output: str, *flags: object, command: str = "run") -> tuple[int, str, str]:
        small = ("-p", "a boat drifts", "--size", "96x64", "--frames", 5, "--steps", 4, "--seed", 7, "--device", "cpu")
        target = ("-o", output) if command == "run" else ()
        return call(command, photo, *small, "-m", tiny(WAN).folder, *target, *flags)

    return run


def frames(name: str) -> Any:
    return np.stack(list(video.read(Path(name))))


@pytest.fixture
def style(tiny: Tiny) -> Path:
    """A LoRA in the working folder, which `home` makes."""
    path = Path("style.safetensors")
    save_file(pairs(tiny(WAN)), path)
    return path


pytestmark = pytest.mark.usefixtures("home")


def test_a_video_knows_its_loras(call: Call, make: Call, style: Path, tmp_path: Path) -> None:
    digest = photo.sha256(style)
    assert make("plain")[0] == 0
    code, out, err = make("a.mp4", "--lora", "style.safetensors@high:0.8", "--lora", style, "--json")
    assert code == 0, err
    absolute = str(style.absolute())
    asked = [
        {"file": absolute, "scale": 0.8, "expert": "high", "sha256": digest},
        {"file": absolute, "scale": 1.0, "expert": None, "sha256": digest},
    ]
    assert json.loads(out)["plan"]["request"]["loras"] == asked
    inside = video.parameters(Path("a.mp4"))
    assert inside["request"]["loras"] == [lora | {"file": "style.safetensors"} for lora in asked]
    assert str(tmp_path) not in json.dumps(inside)
    assert make("a", "--lora", "style.safetensors@high:0.8", "--lora", style)[0] == 0
    assert not np.array_equal(frames("a"), frames("plain"))
    assert call("rerun", "a", "-o", "again", "--device", "cpu")[0] == 0
    assert np.array_equal(frames("a"), frames("again"))


def test_rerun_finds_a_lora_as_it_finds_a_photo(call: Call, make: Call, style: Path, tmp_path: Path) -> None:
    assert make("a", "--lora", f"{style}:0.5")[0] == 0
    elsewhere = tmp_path / "elsewhere.safetensors"
    shutil.move(style, elsewhere)
    code, _, err = call("rerun", "a", "-o", "b", "--device", "cpu")
    assert code == 3
    assert "style.safetensors" in err
    assert "--lora" in err
    assert call("rerun", "a", "-o", "b", "--device", "cpu", "--lora", elsewhere)[0] == 0
    assert np.array_equal(frames("a"), frames("b"))
    assert call("rerun", "a", "-o", "c", "--device", "cpu")[0] == 0, "it was seen there"
    other = tmp_path / "other.safetensors"
    save_file(sound(), other)
    for wrong in (other, tmp_path / "none.safetensors"):
        code, _, err = call("rerun", "a", "-o", "d", "--lora", wrong)
        assert code == 3
        assert f"{wrong} is no " in err
    shutil.copy(other, style)
    elsewhere.unlink()
    assert call("rerun", "a", "-o", "d")[0] == 3, "a namesake is not the one"
    assert not Path("d").exists()


def test_a_resumed_run_has_the_same_loras(
    call: Call, make: Call, style: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make("whole", "--lora", style)[0] == 0
    from framefit.families import wan

    calls, predict = 0, wan.predict

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            signal.raise_signal(signal.SIGINT)
        return predict(*arguments)

    monkeypatch.setattr(wan, "predict", interrupted)
    code, _, err = make("a", "--lora", style)
    assert code == 130
    id = re.search(r"run --resume (\S+)", err)
    assert id
    content = style.read_bytes()
    for changed in (None, content[:-1] + bytes([content[-1] ^ 1])):
        style.unlink() if changed is None else style.write_bytes(changed)
        for more in ((), ("--restart",)):
            code, _, err = call("run", "--resume", id[1], *more)
            assert code == 3
            assert "is gone or is another LoRA" in err
            assert not Path("a").exists()
    style.write_bytes(content)
    code, out, err = call("run", "--resume", id[1], "--json")
    assert code == 0, err
    assert json.loads(out)["resumed_from_step"] > 0
    assert np.array_equal(frames("a"), frames("whole"))


def test_a_lora_is_refused_before_the_model_is_read(
    make: Call, style: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("framefit.run.load", lambda *_: pytest.fail("the model is loaded"))
    Path("cut.safetensors").write_bytes(style.read_bytes()[:-4])
    Path("text.safetensors").write_text("no tensors at all")
    Path("folder.safetensors").mkdir()
    for name in ("cut", "text", "folder", "none", "x" * 300):
        for command in ("run", "plan"):
            code, out, err = make("a", "--lora", f"{name}.safetensors", command=command)
            assert (code, out) == (3, "")
            assert f"{name}.safetensors" in err
            assert "Traceback" not in err
    assert not Path("a").exists()
    assert not list(home.rglob("plan.json"))


def test_a_plan_shows_its_loras(make: Call, style: Path) -> None:
    code, out, _ = make("", "--lora", f"{style}@low:0.25", command="plan")
    assert code == 0
    assert re.search(r"^lora +\S+style.safetensors@low:0.25 +asked for; merged", out, re.MULTILINE)
