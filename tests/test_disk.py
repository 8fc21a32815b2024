"""Weights on disk: the same video, in the memory that was said, and nothing left of them when the run is over."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from framefit import pipeline as pipelines
from framefit import run, streaming, testing
from framefit.device import Device, state_folder
from framefit.errors import DoesNotFit, FramefitError
from framefit.families import Checkpoint, lora
from framefit.families.parts import Parts, Read, load_parts, weights
from framefit.ledger import Ledger, disk
from framefit.ledger.disk import DiskTransfer, FiledSlab
from framefit.ledger.transfer import Transfer
from framefit.passes import apply_all, offload
from framefit.pipeline import Pipeline, load
from framefit.plan import Plan
from framefit.planning import check_fits, estimated
from framefit.request import Lora, Request
from framefit.scratch import Scratch
from framefit.testing import save_tiny

A14B = "wan2.2-i2v-a14b"
CPU = torch.device("cpu")
Make = Callable[..., Plan]


@pytest.fixture(scope="module")
def row(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Experts of five blocks."""
    with pytest.MonkeyPatch.context() as patch:
        small = {**testing.TINY["WanTransformer3DModel"], "num_layers": 5}
        patch.setattr(testing, "TINY", {**testing.TINY, "WanTransformer3DModel": small})
        return save_tiny(A14B, tmp_path_factory.mktemp("deep"))


@pytest.fixture
def plan(row: Checkpoint, make_plan: Make) -> Plan:
    return make_plan(row, settings={"offload": "disk"})


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a block passes through several."""
    monkeypatch.setattr(streaming, "PIECE_BYTES", 2**12)


def placement(parts: Parts) -> offload.Offloaded:
    found = offload.placed(parts)
    assert found
    return found


def moving(parts: Parts) -> DiskTransfer:
    transfer = placement(parts).transfer
    assert isinstance(transfer, DiskTransfer)
    return transfer


def slabs(parts: Parts) -> Iterator[FiledSlab]:
    for component in placement(parts).components.values():
        for each in (*component.whole, *(unit.slab for unit in component.stream.units), *component.held):
            assert isinstance(each, FiledSlab)
            yield each


def folders() -> list[Path]:
    return [path for path in (state_folder() / "weights").glob("*") if path.is_dir()]


def readers() -> list[threading.Thread]:
    """Of this test; another's may not have been collected yet."""
    return [each for each in threading.enumerate() if each.name.startswith("framefit-") and each not in OTHERS]


def latents(pipeline: Pipeline) -> torch.Tensor:
    state = pipeline.encode()
    pipeline.denoise(state)
    return state.latents


OTHERS: set[threading.Thread] = set()


@pytest.fixture(autouse=True)
def others() -> None:
    OTHERS.clear()
    OTHERS.update(threading.enumerate())


def test_components_leave_the_memory_as_they_are_loaded(
    plan: Plan, row: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the weights in memory there are never more than one component's, and none is written twice."""
    in_memory: list[set[str]] = []
    arrived, written = pipelines._arrived, []
    write = FiledSlab.write

    def look(plan: Plan, needed: Any, parts: Parts, name: str, read: Read) -> None:
        placement = offload.placed(parts)
        kept = moving(parts).kept.values() if placement else ()
        filed = {id(tensor) for slab in kept if slab.at_home for tensor in slab.tensors}
        models = {name: part for name, part in parts.components.items() if isinstance(part, nn.Module)}
        in_memory.append({name for name, model in models.items() if any(id(t) not in filed for t in weights(model))})
        arrived(plan, needed, parts, name, read)

    def count(self: FiledSlab, file: Path) -> None:
        written.append(file)
        write(self, file)

    monkeypatch.setattr(pipelines, "_arrived", look)
    monkeypatch.setattr(FiledSlab, "write", count)
    pipeline = load(plan, row)
    assert max(len(names) for names in in_memory) == 1
    assert set().union(*in_memory) == {part.name for part in row.components if part.params}
    (folder,) = folders()
    assert set(written) == set(folder.iterdir()) == {slab.file for slab in slabs(pipeline.parts)}
    everything = {id(t) for part in pipeline.parts.components.values() if isinstance(part, nn.Module)
                  for t in weights(part)}  # fmt: skip
    assert {id(tensor) for slab in slabs(pipeline.parts) for tensor in slab.tensors} == everything
    with safe_open(written[0], framework="pt") as stream:
        assert list(stream.keys()) == ["slab"]
    assert sum(file.stat().st_size for file in written) == pytest.approx(
        max(phase.disk_bytes for phase in estimated(plan, row).estimate.phases), rel=0.5  # headers and padding
    )  # fmt: skip
    pipeline.close()


def test_loras_are_in_what_is_written(row: Checkpoint, make_plan: Make, tmp_path: Path) -> None:
    width = row["transformer"].config["num_attention_heads"] * row["transformer"].config["attention_head_dim"]
    file, name = tmp_path / "lora.safetensors", "blocks.1.attn1.to_q"
    prefixed = {
        f"{expert}.{name}.lora_{half}.weight": torch.randn(shape)
        for expert in row.experts
        for half, shape in (("A", (2, width)), ("B", (width, 2)))
    }
    save_file(prefixed, file)
    loras = lora.check((Lora(file=file),), row)
    on_disk, in_memory = (
        load(make_plan(row, loras=loras, settings={"offload": value}), row) for value in ("disk", "block")
    )
    for expert in row.experts:
        ours, theirs = (pipeline.parts[expert].get_submodule(name).weight for pipeline in (on_disk, in_memory))
        assert torch.equal(ours, theirs)
    assert torch.equal(latents(on_disk), latents(in_memory))
    plain = load(make_plan(row, settings={"offload": "disk"}), row)
    assert not torch.equal(latents(plain), latents(on_disk))
    for pipeline in (on_disk, in_memory, plain):
        pipeline.close()


def test_weights_that_a_pass_changes_are_written_anew(plan: Plan, row: Checkpoint) -> None:
    assert row.folder
    keep = lambda parts, name, read: offload.keep(parts, name, plan.settings[-1], read)  # type: ignore[arg-type]  # noqa: E731
    parts = load_parts(row, row.folder, dtype=torch.float32, device=CPU, arrived=keep)
    layer = parts["transformer"].blocks[1].attn1.to_q
    layer.weight.data = layer.weight.data.half().float()
    expected = layer.weight.data.clone()
    apply_all(parts, plan)
    unit = placement(parts).components["transformer"].stream.units[1]
    room = moving(parts).room(unit.slab.bytes)
    moving(parts).copy(unit.slab, room)
    moving(parts).wait(room)
    unit.slab.point(room)
    assert torch.equal(layer.weight, expected)
    gc.collect()
    (folder,) = folders()
    assert set(folder.iterdir()) == {slab.file for slab in slabs(parts)}, "what it replaces is gone"
    parts.close()


@pytest.mark.parametrize("index", [0, 2])
def test_a_file_that_cannot_be_read_is_told_and_once_it_is_there_the_run_goes_on(
    index: int, plan: Plan, row: Checkpoint
) -> None:
    pipeline = load(plan, row)
    state = pipeline.encode()
    latents, t = state.latents, torch.tensor(900.0)

    def predict() -> torch.Tensor:
        with torch.no_grad():
            return pipeline.predict("transformer", latents, t, state.conditioning, 1.0)

    expected = predict()
    unit = placement(pipeline.parts).components["transformer"].stream.units[index]
    assert isinstance(unit.slab, FiledSlab)
    content = unit.slab.file.read_bytes()
    unit.slab.file.unlink()
    if index == 0:
        predict()  # for which it had come
    with pytest.raises(FramefitError, match=r"cannot be read back \(.*No such file.*\): look after that disk"):
        predict()
    assert len(readers()) == 1
    unit.slab.file.write_bytes(content)
    assert torch.equal(predict(), expected)
    assert torch.equal(predict(), expected)
    pipeline.close()


def test_a_file_that_ends_too_early_is_told(tmp_path: Path) -> None:
    transfer = DiskTransfer(Transfer(CPU), tmp_path)
    slab = transfer.slab([torch.randn(5000)])
    room = transfer.room(slab.bytes)

    os.truncate(slab.file, slab.file.stat().st_size - 1)
    transfer.copy(slab, room)
    with pytest.raises(FramefitError, match="it ends too early"):
        transfer.wait(room)
    transfer.close()


def test_a_room_is_nobodys_once_it_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader may be slow to drop its job, and the room's memory is wanted."""
    transfer = DiskTransfer(Transfer(CPU), tmp_path)
    slab = transfer.slab([torch.randn(5000)])
    room, go, tell = transfer.room(slab.bytes), threading.Event(), Future.set_result

    def slowly(self: Future[None], result: None) -> None:
        tell(self, result)
        go.wait(10)

    monkeypatch.setattr(Future, "set_result", slowly)
    transfer.copy(slab, room)
    transfer.wait(room)
    memory = weakref.ref(room.memory.untyped_storage())
    assert memory() is not None
    del room
    assert memory() is None
    go.set()
    transfer.close()


def test_a_full_disk_is_told_before_and_while_it_fills(
    plan: Plan, row: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(plan, device=replace(plan.device, disk_free_bytes=2**10))
    with pytest.raises(
        DoesNotFit, match=r"offload=disk writes .* GiB of weights below .* GiB may be: .*XDG_STATE_HOME"
    ):
        check_fits(estimated(small, row))
    check_fits(estimated(plan, row))
    left, save = [5], disk.save_file

    def full(tensors: Any, file: Path) -> None:
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, file)

    monkeypatch.setattr(disk, "save_file", full)
    with pytest.raises(DoesNotFit, match=r"cannot write .* No space left on device; .* set XDG_STATE_HOME"):
        load(plan, row)
    assert folders() == []
    assert readers() == []


def test_nothing_is_left_when_a_pipeline_is_closed_or_forgotten(plan: Plan, row: Checkpoint) -> None:
    pipeline = load(plan, row)
    latents(pipeline)
    assert len(folders()) == 1
    assert readers()
    pipeline.close()
    pipeline.close()
    assert folders() == []
    assert readers() == []
    pipeline = load(plan, row)
    latents(pipeline)
    del pipeline
    gc.collect()
    assert folders() == []
    for thread in readers():
        thread.join(10)
    assert readers() == []


def test_a_run_leaves_nothing_whether_it_ends_well_or_not(
    plan: Plan, row: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    options = run.Options(device="cpu", settings={"offload": "disk"}, on_step=lambda step: seen.append(len(folders())))
    fields = ("image", "prompt", "model", "width", "height", "num_frames", "steps", "seed")
    request = Request(**{name: getattr(plan.request, name) for name in fields})
    run.generate(request, tmp_path / "out.mp4", options)
    assert seen == [1] * plan.request.steps
    assert folders() == []
    assert readers() == []

    def broken(step: Any) -> None:
        raise RuntimeError("the listener")

    with pytest.raises(FramefitError, match="the listener"):
        run.generate(request, tmp_path / "other.mp4", replace(options, on_step=broken))
    assert folders() == []
    assert readers() == []


def test_the_next_expert_is_read_before_the_swap(plan: Plan, row: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = load(plan, row)
    served = pipeline.experts()
    last = served.index("transformer_2") - 1
    events: list[tuple[str, int]] = []
    read: list[FiledSlab] = []
    steps = [0]
    expect, opened = offload.Offloaded.expect, FiledSlab.open

    def expecting(self: offload.Offloaded, name: str) -> None:
        events.append((name, steps[0]))
        expect(self, name)

    def noted(self: FiledSlab) -> Any:
        if threading.current_thread().name.startswith("framefit-ahead"):
            read.append(self)
        return opened(self)

    monkeypatch.setattr(offload.Offloaded, "expect", expecting)
    monkeypatch.setattr(FiledSlab, "open", noted)
    state = pipeline.encode()
    pipeline.denoise(state, on_step=lambda step: steps.__setitem__(0, step.index))
    placed = placement(pipeline.parts)
    component = placed.components["transformer_2"]
    pipeline.close()
    assert events == [("transformer_2", last)], "when its last step began, and never else"
    assert read == [*component.whole, *(unit.slab for unit in component.stream.units)], "memory is free for all"
    monkeypatch.setattr(Device, "detect", lambda which: replace(plan.device, ram_free_bytes=0))
    taken: list[int] = []
    monkeypatch.setattr(DiskTransfer, "expect", lambda self, slabs: taken.append(len(slabs)))
    placed.expect("transformer_2")
    assert taken == [len(component.whole) + 1]


def live(root: Path, folder: Any, ready: Any) -> None:
    """In a process of its own: take a folder, and stay."""
    scratch = Scratch.create(root)
    (scratch.path / "0.safetensors").write_bytes(b"weights")
    folder.put(scratch.path)
    ready.wait()


def test_a_killed_process_leaves_its_folder_to_the_next(tmp_path: Path, fork: ForkServerContext) -> None:
    told, ready = fork.SimpleQueue(), fork.Event()
    process = fork.Process(target=live, args=(tmp_path, told, ready))
    process.start()
    theirs: Path = told.get()
    ours = Scratch.create(tmp_path)
    assert theirs.is_dir(), "it is at work"
    process.kill()
    process.join()
    assert theirs.is_dir()
    another = Scratch.create(tmp_path)
    assert not theirs.exists()
    assert ours.path.is_dir(), "our own is not swept"
    for scratch in (ours, another):
        scratch.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FramefitError, match="set XDG_STATE_HOME to a folder that can be written"):
        Scratch.create(tmp_path / "file" / "below")


MEDIUM = {"num_attention_heads": 6, "attention_head_dim": 128, "ffn_dim": 3072, "num_layers": 4}
"""Experts of 150 MB, in blocks of 38 MB."""


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    with pytest.MonkeyPatch.context() as patch:
        small = {**testing.TINY["WanTransformer3DModel"], **MEDIUM}
        patch.setattr(testing, "TINY", {**testing.TINY, "WanTransformer3DModel": small})
        return save_tiny(A14B, tmp_path_factory.mktemp("medium"))


M_MMAP_THRESHOLD = -3
"""glibc's malloc.h."""


def measure(state_home: str, first: tuple[Plan, Checkpoint], plan: Plan, row: Checkpoint, told: Any) -> None:
    """In a process of its own: resident bytes at the peak of each phase, over what was there when it began."""
    os.environ["XDG_STATE_HOME"] = state_home
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)  # what is freed goes back at once, not when a heap is in order
    latents(load(*first))  # whatever is imported or kept for good comes now
    before, ledger = psutil.Process().memory_info().rss, Ledger("cpu")
    pipeline = load(plan, row, ledger)
    latents(pipeline)
    found = {phase.name: phase.peak_bytes - before for phase in ledger.close()}
    pipeline.close()
    told.put(found)


@pytest.mark.parametrize("value", ["block", "disk"])
def test_the_host_holds_what_was_said(
    value: str, medium: Checkpoint, tiny: Callable[[str], Checkpoint], make_plan: Make, fork: ForkServerContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(streaming, "PIECE_BYTES", 2**25)
    first = make_plan(tiny(A14B), settings={"offload": value.partition(":")[0]}), tiny(A14B)
    plan = make_plan(medium, settings={"offload": value}, steps=2)
    told = fork.SimpleQueue()
    process = fork.Process(target=measure, args=(os.environ["XDG_STATE_HOME"], first, plan, medium, told))
    process.start()
    found = told.get()
    process.join()
    said = {phase.name: phase.host_bytes for phase in estimated(plan, medium).estimate.phases}
    experts = {name for name in said if name.startswith("denoise")}
    assert experts <= set(found)
    for name in experts:
        # the first expert has not been everywhere in the pieces, which pinned they would be
        assert said[name] == pytest.approx(max(found[name] for name in experts), rel=0.05), name
    whole = sum(file.stat().st_size for name in medium.experts for file in (medium.folder / name).glob("*.safetensors"))
    assert (whole < found["denoise:transformer"]) == (value == "block")
    if value != "block":  # of an expert a block, and its slab on its way to the file
        assert found["load"] < 0.6 * whole / len(medium.experts)
        assert 0.9 * said["load"] <= found["load"] <= 1.1 * said["load"] + 2**26
