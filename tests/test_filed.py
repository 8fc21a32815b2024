"""A denoiser read piece by piece is, to the last bit, the one that the libraries read whole; and never whole in RAM."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from framefit.errors import ModelMissing
from framefit.families import Checkpoint, easyanimate_v5, lora
from framefit.families.parts import Parts, Read, load_parts
from framefit.passes import quantize
from framefit.pipeline import load
from framefit.plan import Plan, Quantize
from framefit.request import Lora

CPU = torch.device("cpu")
IDS = ("wan2.2-i2v-a14b", "easyanimate-v5.1-7b-inp", "easyanimate-v5-7b-zh-inp", "i2vgen-xl")
Tiny = Callable[[str], Checkpoint]
Make = Callable[..., Plan]


def whole(row: Checkpoint, expert: str, dtype: torch.dtype) -> Any:
    """As diffusers reads it; of upstream's names, which it does not know, all tensors at once."""
    assert row.folder
    folder = row.folder / expert
    kind = getattr(diffusers, row[expert].class_name)
    if row.layout == "diffusers":
        return kind.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True)
    with torch.device("meta"):
        model = kind.from_config(easyanimate_v5.config(folder))
    filed = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
    model.load_state_dict({easyanimate_v5.rename(k): v.to(dtype) for k, v in filed.items()}, assign=True)
    return model.eval()


def assert_same(model: Any, expected: Any) -> None:
    ours, theirs = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (model, expected))
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert ours[name].requires_grad == tensor.requires_grad, name
        assert torch.equal(ours[name], tensor), name
    assert (model.training, model.dtype, model.device) == (expected.training, expected.dtype, expected.device)


def stored_in(row: Checkpoint, folder: Path, dtype: torch.dtype) -> Checkpoint:
    """The same in a file of another precision, and in two shards where the names are diffusers' own."""
    from framefit.families import recognise

    assert row.folder
    shutil.copytree(row.folder, folder)
    for expert in row.experts:
        for file in (folder / expert).glob("*.safetensors"):
            save_file({key: value.to(dtype) for key, value in load_file(file).items()}, file)
        if row.layout == "diffusers":
            kind = getattr(diffusers, row[expert].class_name)
            model = kind.from_pretrained(folder / expert, torch_dtype=dtype)
            for file in (folder / expert).glob("*.safetensors"):
                file.unlink()
            model.save_pretrained(folder / expert, max_shard_size="20KB")
    return recognise(folder)


@pytest.mark.parametrize("id", IDS)
@pytest.mark.parametrize(("filed", "dtype"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_it_is_what_diffusers_reads(id: str, filed: str, dtype: str, tiny: Tiny, tmp_path: Path) -> None:
    row = stored_in(tiny(id), tmp_path / "model", getattr(torch, filed))
    assert row.folder
    parts = load_parts(row, row.folder, dtype=getattr(torch, dtype), device=CPU)
    for expert in row.experts:
        assert_same(parts[expert], whole(row, expert, getattr(torch, dtype)))


@pytest.mark.parametrize("id", IDS)
@pytest.mark.parametrize("offload", ["none", "disk"])
def test_what_is_merged_and_shrunk_piece_by_piece_is_what_it_is_as_a_whole(
    id: str, offload: str, tiny: Tiny, make_plan: Make, tmp_path: Path
) -> None:
    row = tiny(id)
    loras = lora_for(row, tmp_path / "lora.safetensors")
    settings = {"quantize": "int8", "offload": offload, "chunk": "rows"}
    pipeline = load(make_plan(row, loras=loras, settings=settings), row)
    expected = Parts(row, {expert: whole(row, expert, torch.float32) for expert in row.experts}, CPU)
    lora.merge(expected, loras)
    quantize.apply(expected, Quantize(value="int8"))
    for expert in row.experts:
        assert_same(pipeline.parts[expert], expected[expert])
        assert any(buffer.dtype == torch.int8 for buffer in pipeline.parts[expert].buffers())
    pipeline.close()


def lora_for(row: Checkpoint, file: Path) -> tuple[Lora, ...]:
    """Adds to some linear layer in each half of the model."""
    name = [name for name, _ in whole(row, row.experts[0], torch.float32).named_parameters()]
    layers = [each.removesuffix(".weight") for each in name if each.endswith(("attn1.to_q.weight", "proj_out.weight"))]
    shapes = lora.shapes(row)[row.experts[0]]
    tensors = {}
    for layer in layers:
        size = shapes[f"{layer}.weight"]
        if len(size) == 2:
            tensors[f"transformer.{layer}.lora_A.weight"] = torch.randn(2, size[1])
            tensors[f"transformer.{layer}.lora_B.weight"] = torch.randn(size[0], 2)
    assert len(tensors) >= 4
    save_file(
        tensors if row.family != "i2vgen" else {k.replace("transformer.", "unet.", 1): v for k, v in tensors.items()},
        file,
    )
    return lora.check((Lora(file=file),), row)


def test_nothing_of_a_denoiser_is_in_memory_before_it_is_asked_for(tiny: Tiny) -> None:
    row = tiny("wan2.2-i2v-a14b")
    assert row.folder
    seen = []

    def arrived(parts: Parts, name: str, read: Read) -> None:
        if name in row.experts:
            model = parts[name]
            assert all(parameter.is_meta for parameter in model.parameters())
            some: Collection[str] = {"blocks.1.attn1.to_q.weight", "patch_embedding.bias"}
            read(some)
            assert {name for name, parameter in model.named_parameters() if not parameter.is_meta} == some
            with torch.no_grad():
                model.patch_embedding.bias.fill_(3)
            seen.append(name)

    parts = load_parts(row, row.folder, dtype=torch.bfloat16, device=CPU, arrived=arrived)
    assert tuple(seen) == row.experts
    for expert in row.experts:
        assert not any(parameter.is_meta for parameter in parts[expert].parameters())
        assert (parts[expert].patch_embedding.bias == 3).all(), "what has been read is not read again"


@pytest.mark.parametrize(("change", "words"), [("lost", r"lacks blocks\.1\.attn1\.to_q\.bias: "), ("cut", "needs")])
def test_files_that_do_not_fit_are_refused_before_anything_is_read(
    change: str, words: str, tiny: Tiny, tmp_path: Path
) -> None:
    row = tiny("wan2.2-i2v-a14b")
    assert row.folder
    shutil.copytree(row.folder, tmp_path / "model")
    (file,) = (tmp_path / "model" / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    bias = tensors.pop("blocks.1.attn1.to_q.bias")
    save_file(tensors if change == "lost" else {**tensors, "blocks.1.attn1.to_q.bias": bias[1:].clone()}, file)
    with pytest.raises(ModelMissing, match=words):
        load_parts(row, tmp_path / "model", dtype=torch.float32, device=CPU)


def test_what_has_no_place_is_told(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A scale beside a weight in 8 bits, for example, without which that means another thing."""
    row = tiny("i2vgen-xl")
    assert row.folder
    shutil.copytree(row.folder, tmp_path / "more")
    file = next((tmp_path / "more" / "unet").glob("*.safetensors"))
    save_file(load_file(file) | {"conv_in.scale_weight": torch.ones(1)}, file)
    load_parts(row, tmp_path / "more", dtype=torch.float32, device=CPU)
    assert "holds 1 tensors that I2VGenXLUNet has no place for, conv_in.scale_weight first" in caplog.text


def test_a_fault_that_is_not_a_loras_is_not_put_on_one(tiny: Tiny, tmp_path: Path) -> None:
    row = tiny("wan2.2-i2v-a14b")
    file = tmp_path / "one.safetensors"
    assert row.folder
    parts = load_parts(row, row.folder, dtype=torch.float32, device=CPU)
    weight = parts["transformer"].blocks[0].attn1.to_q.weight
    name = "transformer.blocks.0.attn1.to_q.lora_"
    save_file(
        {f"{name}A.weight": torch.ones(1, weight.shape[1]), f"{name}B.weight": torch.ones(weight.shape[0], 1)}, file
    )
    given = (Lora(file=file),)
    with pytest.raises(OSError, match="no room"), lora.merging(parts, "transformer", given, lora.shapes(row)):
        raise OSError("no room")
