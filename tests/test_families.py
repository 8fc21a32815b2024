"""The rows against the classes they describe, and folders against the rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from framefit.errors import BadInput, ModelMissing
from framefit.families import CHECKPOINTS, Checkpoint, Sizes, easyanimate, easyanimate_v5, find, recognise, soundness
from framefit.families.files import fingerprint, header
from framefit.families.parts import Parts, build, load_parts
from framefit.passes import chunk
from framefit.plan import Chunk
from framefit.testing import random_parts, save_tiny, tiny_row

PUBLISHED = {
    ("wan2.2-i2v-a14b", "transformer"): 14_288_901_184,
    ("wan2.2-i2v-a14b", "transformer_2"): 14_288_901_184,
    ("wan2.2-ti2v-5b", "transformer"): 4_999_787_712,
    ("easyanimate-v5.1-7b-inp", "transformer"): 6_814_670_912,
    ("easyanimate-v5.1-12b-inp", "transformer"): 11_799_265_856,
    ("i2vgen-xl", "unet"): 1_420_469_224,
}
MODELS = [(row.id, part.name) for row in CHECKPOINTS.values() for part in row.components if part.params]
REST = [(row.id, part.name) for row in CHECKPOINTS.values() for part in row.components if not part.params]
WAN_T2V = {"_class_name": "WanTransformer3DModel", "in_channels": 16, "out_channels": 16}
EASYANIMATE_T2V = {"_class_name": "EasyAnimateTransformer3DModel", "in_channels": 16}


@pytest.mark.parametrize(("id", "name"), MODELS)
def test_full_size_components_have_the_published_parameter_count(id: str, name: str) -> None:
    component = CHECKPOINTS[id][name]
    with torch.device("meta"):
        model = build(component)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == component.params == PUBLISHED.get((id, name), count)
    assert component.source


@pytest.mark.parametrize(("id", "name"), [(i, n) for i, n in REST if "tokenizer" not in n])
def test_schedulers_and_processors_build_from_their_rows(id: str, name: str) -> None:
    assert build(CHECKPOINTS[id][name]) is not None


@pytest.mark.parametrize("id", CHECKPOINTS)
def test_tiny_folders_are_recognised_and_every_parameter_is_random(
    id: str, tiny: Callable[[str], Checkpoint], load_fp32: Callable[[Checkpoint], Parts]
) -> None:
    row = tiny(id)
    assert (row.family, row.layout, row.sizes) == (
        CHECKPOINTS[id].family,
        CHECKPOINTS[id].layout,
        CHECKPOINTS[id].sizes,
    )
    if id != "wan2.1-i2v-14b-720p":
        assert row.experts == CHECKPOINTS[id].experts
    parts = load_fp32(row)
    for component in row.components:
        if component.params:
            model = parts[component.name]
            assert sum(p.numel() for p in model.parameters()) == component.params
            constant = [name for name, p in model.named_parameters() if p.numel() > 1 and p.std() < 1e-3]
            assert not constant, constant


@pytest.mark.alone
def test_a_tiny_checkpoint_is_built_in_under_a_second(tmp_path: Path, tiny: Callable[[str], Checkpoint]) -> None:
    import time

    tiny("i2vgen-xl")  # the classes are imported by now
    began = time.perf_counter()
    save_tiny("i2vgen-xl", tmp_path)
    assert time.perf_counter() - began < 1


def test_models_are_found_by_id_repository_and_folder(tiny: Callable[[str], Checkpoint]) -> None:
    assert find("wan2.2-i2v-a14b").repo == "Wan-AI/Wan2.2-I2V-A14B-Diffusers"
    assert find("wan-ai/wan2.2-i2v-a14b-diffusers").id == "wan2.2-i2v-a14b"
    folder = tiny("i2vgen-xl").folder
    assert find(str(folder)).folder == folder


def test_an_unknown_model_is_answered_with_the_nearest() -> None:
    with pytest.raises(ModelMissing, match=r"wan2\.2-i2v-a14b"):
        find("wan2.2-i2v-14b")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "has no model configurations"),
        ({"high_noise_model/x": ""}, "Wan2.2 in upstream's own layout"),
        ({"models_t5_umt5-xxl-enc-bf16.pth": ""}, "Wan in upstream's own layout"),
        ({"i2vgen_xl_00854500.pth": ""}, "I2VGen-XL in upstream's own layout"),
        ({"transformer/config.json": "{"}, "cannot be read as JSON"),
        ({"transformer/config.json": "[]"}, "holds no JSON object"),
        ({"transformer/config.json": '{"_class_name": "FluxTransformer2DModel"}'}, "holds a FluxTransformer2DModel"),
        ({"transformer/config.json": json.dumps(WAN_T2V)}, "text-to-video"),
        ({"transformer/config.json": json.dumps(EASYANIMATE_T2V)}, "16 input channels"),
        ({"unet/config.json": '{"_class_name": "I2VGenXLUNet"}'}, "lacks the folder vae"),
    ],
)
def test_folders_that_cannot_run_are_named_for_what_they_are(tmp_path: Path, files: dict[str, str], says: str) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelMissing, match=says):
        recognise(tmp_path)


def test_the_other_easyanimate_generation_is_named(tmp_path: Path, tiny: Callable[[str], Checkpoint]) -> None:
    v51, v5_row = tiny("easyanimate-v5.1-7b-inp").folder, tiny("easyanimate-v5-7b-zh-inp")
    v5 = v5_row.folder
    assert v51 is not None
    assert v5 is not None
    native = tmp_path / "native"
    shutil.copytree(v51, native)
    easyanimate_v5.to_native(native / "transformer")
    with pytest.raises(ModelMissing, match=r"V5\.1 in upstream's native layout"):
        recognise(native)
    renamed = tmp_path / "renamed"
    shutil.copytree(v5, renamed)
    config = json.loads((renamed / "transformer" / "config.json").read_text())
    assert config["text_embed_dim_t5"] == 16
    load_parts(v5_row, v5, dtype=torch.float32, device=torch.device("cpu"))["transformer"].save_pretrained(
        renamed / "transformer"
    )
    with pytest.raises(ModelMissing, match="V5 under diffusers' names"):
        recognise(renamed)


def test_the_native_names_of_easyanimate_v5_are_those_of_diffusers_and_no_others() -> None:
    """Upstream's EasyAnimateDiTBlock: attn1 on the video and, in the first 18 blocks, attn2 on the text."""
    with torch.device("meta"):
        model = build(CHECKPOINTS["easyanimate-v5-7b-zh-inp"]["transformer"])
    native = [
        f"transformer_blocks.{block}.{attention}.{part}.{kind}"
        for block in range(36)
        for attention in ("attn1", "attn2")[: 2 if block < 18 else 1]
        for part in ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k")
        for kind in ("weight", "bias")
    ]
    theirs = {key for key in model.state_dict() if ".attn" in key}
    assert {easyanimate_v5.rename(key) for key in native} == theirs
    assert len(native) == len(theirs)
    assert sum(easyanimate_v5.rename(key) != key for key in native) == 216
    rest = set(model.state_dict()) - theirs
    assert {easyanimate_v5.rename(key) for key in rest} == rest
    back = {new: old for old, new in easyanimate_v5.NATIVE_TO_DIFFUSERS.items()}
    assert all(easyanimate_v5.rename(easyanimate_v5.rename(key), back) == key for key in native)


@pytest.mark.parametrize("id", CHECKPOINTS)
def test_saved_and_loaded_again_the_weights_are_the_same_bits(
    id: str, tmp_path: Path, tiny: Callable[[str], Checkpoint], load_fp32: Callable[[Checkpoint], Parts]
) -> None:
    row = tiny(id)
    parts = load_fp32(row)
    for component in row.components:
        parts[component.name].save_pretrained(tmp_path / component.name)
    if row.layout == "easyanimate-v5":
        easyanimate_v5.to_native(tmp_path / "transformer")
    assert row.folder is not None
    shutil.copy(row.folder / "model_index.json", tmp_path)
    again = load_fp32(recognise(tmp_path))
    assert soundness.verify(recognise(tmp_path)) == []
    for component in row.components:
        if component.params:
            before, after = parts[component.name].state_dict(), again[component.name].state_dict()
            assert before.keys() == after.keys()
            assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_fine_tune_keeps_its_own_boundary(tmp_path: Path) -> None:
    save_tiny("wan2.2-i2v-a14b", tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text()) | {"boundary_ratio": 0.875}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert recognise(tmp_path).boundary_ratio == 0.875


def test_fingerprints_tell_weights_of_one_shape_apart(tmp_path: Path) -> None:
    for seed in (0, 1):
        save_tiny("i2vgen-xl", tmp_path / str(seed), seed=seed)
    shutil.copytree(tmp_path / "0", tmp_path / "copy")
    assert fingerprint(tmp_path / "0") == fingerprint(tmp_path / "copy") != fingerprint(tmp_path / "1")


def test_a_header_is_read_and_a_cut_file_refused(tmp_path: Path, tiny: Callable[[str], Checkpoint]) -> None:
    folder = tiny("easyanimate-v5.1-7b-inp").folder
    assert folder is not None
    shapes, wrong = header(folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert shapes is not None
    assert wrong is None
    assert shapes["decoder.conv_in.weight"] == (8, 16, 3, 3, 3)
    shutil.copytree(folder, tmp_path / "cut")
    cut = tmp_path / "cut" / "transformer" / "diffusion_pytorch_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(ModelMissing, match=r"is [\d,]+ bytes long, and its header says"):
        recognise(tmp_path / "cut")


SIZES = Sizes(multiple=16, default=(1280, 720), named=(), max_area=1280 * 720, min_side=64)


@pytest.mark.parametrize(
    ("aspect", "expected"), [(16 / 9, (1280, 720)), (9 / 16, (720, 1280)), (1, (960, 960)), (832 / 480, (1264, 720))]
)
def test_the_size_follows_the_aspect_within_the_area(aspect: float, expected: tuple[int, int]) -> None:
    assert SIZES.for_aspect(aspect) == expected


@pytest.mark.parametrize("aspect", [0.01, 0.3, 0.7, 1.0, 1.33, 2.0, 5.0, 100.0])
def test_every_aspect_gets_a_legal_size(aspect: float) -> None:
    for row in CHECKPOINTS.values():
        width, height = row.sizes.for_aspect(aspect)
        assert row.sizes.refuse(width, height) is None
        if 0.5 < aspect < 2:
            assert width / height == pytest.approx(aspect, rel=0.05)


@pytest.mark.parametrize(
    ("size", "near"),
    [((830, 480), "832x480 or 816x480"), ((1920, 1080), "1280x720 or 1296x704"), ((20, 20), "64x64 or 64x80")],
)
def test_an_illegal_size_is_answered_with_the_two_nearest(size: tuple[int, int], near: str) -> None:
    problem = SIZES.refuse(*size)
    assert problem is not None
    assert near in problem, problem
    assert SIZES.refuse(1280, 720) is None


def test_frame_counts() -> None:
    wan, i2vgen = CHECKPOINTS["wan2.2-i2v-a14b"].frames, CHECKPOINTS["i2vgen-xl"].frames
    wan.check(81)
    i2vgen.check(17)
    with pytest.raises(BadInput, match="80 frames were asked for; this model takes 4n\\+1: use 77 or 81"):
        wan.check(80)
    with pytest.raises(BadInput, match="at most"):
        i2vgen.check(1000)


class FromHost(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shapes of what is copied from the host to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" != result.device.type:
            self.shapes.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("value", ["none", "rows:3"])
@pytest.mark.parametrize("id", ["easyanimate-v5.1-7b-inp", "easyanimate-v5-7b-zh-inp"])
def test_easyanimates_rotation_goes_to_the_device_once_in_a_forward(id: str, value: str) -> None:
    meta = torch.device("meta")
    parts = random_parts(tiny_row(id), dtype=torch.float32, device=meta, models=["transformer"])
    chunk.apply(parts, Chunk(value=value))
    texts = ("text", "text_t5") if id.startswith("easyanimate-v5-") else ("text",)
    given = {name: torch.empty(2, 256, 16, device=meta) for name in texts} | {
        "inpaint": torch.empty(1, 17, 2, 4, 4, device=meta)
    }
    latents, t = torch.empty(1, 16, 2, 4, 4, device=meta), torch.empty((), device=meta)
    for _ in range(2):
        with FromHost() as copied:
            easyanimate.predict(parts, "transformer", latents, t, given, slice(0, 2))
        assert copied.shapes == [(2 * 2 * 2, 16)] * 2  # cosines and sines of all tokens
    with pytest.raises(RuntimeError):
        easyanimate.predict(parts, "transformer", latents[:, 1:], t, given, slice(0, 2))
    assert not parts["transformer"].rope_embedding._forward_hooks
