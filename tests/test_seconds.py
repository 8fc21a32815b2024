"""What an operator's seconds depend on: counted by sort, put to rates by size, measured by a probe, told to people."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch.nn import functional

from framefit.device import Device, state_folder
from framefit.durations import duration
from framefit.families import CHECKPOINTS
from framefit.ledger.counts import Tally, count
from framefit.ledger.disk import DiskTransfer, FiledSlab
from framefit.ledger.transfer import Room
from framefit.planning import choose
from framefit.planning.estimate import _beside, with_phases
from framefit.planning.phase import PhaseTrace
from framefit.profiling import ceilings, sized
from framefit.rates import Quantity, Rates, Sort, of
from framefit.request import Request

FLAT = Rates(
    device="flat", torch="", tflops={"matmul": {"fp32": 1.0}, "attention": {"fp32": 1.0}, "convolution": {"fp32": 1.0}},
    memory_gb_per_s=1000.0, host_to_device_gb_per_s=None, device_to_host_gb_per_s=None, launch_s=1e-6,
    by_size={"matmul": {"fp32": {0: 2.0}}, "attention": {"fp32": {64: 1.0, 128: 3.0}}, "row_norm": {"": {64: 0.5}}},
)  # fmt: skip
X = torch.randn(4, 8, 32)
VIDEO = torch.randn(1, 16, 4, 6, 6)


def counted(call: Callable[[], object], *, card: bool = True) -> Counter[tuple[Sort, Quantity]]:
    tally = Tally(card=card)
    with torch.no_grad():
        count(call, tally)
    return tally.counts.work


def amounts(call: Callable[[], object], *, card: bool = True) -> dict[tuple[str, int], int]:
    return {(s.name, s.size): n for (s, quantity), n in counted(call, card=card).items() if quantity == "amount"}


@pytest.mark.parametrize(
    ("call", "sort", "amount"),
    [
        (lambda: X + X, ("plain", 0), 0),
        (lambda: X * X[:1], ("scattered", 0), X.numel()),
        (lambda: X.to(torch.bfloat16), ("scattered", 0), X.numel()),
        (lambda: X.transpose(0, 1).contiguous(), ("scattered", 0), X.numel()),
        (lambda: X.sum(0), ("scattered", 0), X.numel()),
        (lambda: X @ X[0].T, ("matmul", 0), 2 * 32 * 32 * 8),
        (lambda: functional.layer_norm(X, (32,)), ("row_norm", 32), X.numel()),
        (lambda: functional.group_norm(X, 2), ("group_norm", 8), X.numel()),
        (lambda: functional.conv3d(VIDEO, VIDEO.new_ones(8, 16, 1, 1, 1)), ("convolution", 32), 2 * 8 * VIDEO.numel()),
        # eight queries and keys fill a tile of 128 by 128
        (lambda: functional.scaled_dot_product_attention(*[X[:, None]] * 3), ("attention", 64), 4 * 4 * 128 * 128 * 32),
    ],
)
def test_what_an_operator_is_made_of(call: Callable[[], object], sort: tuple[str, int], amount: int) -> None:
    assert amounts(call)[sort] == amount


def test_views_are_nothing_and_bytes_are_those_moved() -> None:
    assert not counted(lambda: X.view(4, 256)[1:].transpose(0, 1))
    assert counted(lambda: X + X)[Sort("plain", "", 0), "bytes"] == 3 * X.nbytes
    assert counted(lambda: X + X)[Sort("plain", "", 0), "calls"] == 1


def test_on_a_card_a_norm_of_rows_is_one_operator() -> None:
    norm = torch.nn.RMSNorm(32)
    card, cpu = counted(lambda: norm(X)), counted(lambda: norm(X), card=False)
    assert {sort.name for sort, _ in card} == {"row_norm"}
    assert card[Sort("row_norm", "", 32), "bytes"] == 2 * X.nbytes
    assert sum(n for (_, quantity), n in cpu.items() if quantity == "calls") > 3
    assert amounts(lambda: functional.layer_norm(X.transpose(0, 1), (32,)))["scattered", 0] == X.numel()  # copied first


def test_channels_first_is_copied_for_a_convolution_and_channels_last_is_not() -> None:
    weight = VIDEO.new_ones(16, 16, 3, 3, 3)
    last = [t.to(memory_format=torch.channels_last_3d) for t in (VIDEO, weight)]
    assert "scattered" in {sort.name for sort, _ in counted(lambda: functional.conv3d(VIDEO, weight))}
    assert "scattered" not in {sort.name for sort, _ in counted(lambda: functional.conv3d(*last))}


def test_seconds_add_up() -> None:
    work: dict[tuple[Sort, Quantity], int] = {
        (Sort("matmul", "fp32", 0), "amount"): 4 * 10**12, (Sort("matmul", "fp32", 0), "bytes"): 10**12,
        (Sort("matmul", "fp32", 0), "calls"): 10**6, (Sort("attention", "fp32", 64), "amount"): 10**12,
    }  # fmt: skip
    assert FLAT.seconds_by_kind(work) == pytest.approx(
        {"matmul": 2.0 + 1.0, "attention": 1.0, "convolution": 0.0, "elementwise": 1.0, "host": 0.0}
    )
    assert FLAT.seconds_by_kind({(Sort("matmul", "bf16", 0), "amount"): 1}) is None


def test_a_rate_lies_between_those_that_were_measured() -> None:
    rate = [FLAT.rate(Sort("attention", "fp32", size)) for size in (32, 64, 96, 128, 512)]
    assert rate == pytest.approx([0.5, 1.0, 2.0, 3.0, 3.0])
    assumed = replace(FLAT, by_size={})
    assert assumed.rate(Sort("convolution", "fp32", 96)) == pytest.approx(0.34)
    assert assumed.rate(Sort("scattered", "", 0)) == pytest.approx(0.175)
    assert Rates.from_json(json.loads(json.dumps(FLAT.to_json()))) == FLAT


def test_work_survives_json() -> None:
    work = dict(counted(lambda: functional.layer_norm(X @ X[0].T, (8,))))
    trace = PhaseTrace(name="decode", weights_bytes={}, peak_bytes=1, held={}, flops={}, bytes={}, work=work)
    assert PhaseTrace.from_json(json.loads(json.dumps(trace.to_json()))) == trace


def test_the_probe_measures_every_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a rate for every one the seconds of what was measured come out again; on a clock on which a call takes 2 ms,
    since a machine does other things beside."""
    monkeypatch.setattr(sized, "HOLD_S", 0.02)
    monkeypatch.setattr(sized, "PRECISIONS", {"fp32": torch.float32})
    assert 1e-7 < sized.launch_s("cpu") < 1e-2
    calls: list[object] = []
    monkeypatch.setattr(sized, "_held", lambda call, device: calls.append(call()) or 2e-3)
    best = replace(FLAT, by_size={}, memory_gb_per_s=1e6)
    found = sized.measured(best, "cpu")
    assert {(name, *by) for name, by in found.by_size.items()} == {
        ("matmul", "fp32"), ("attention", "fp32"), ("convolution", "fp32"), ("scattered", ""), ("row_norm", ""),
        ("group_norm", ""),
    }  # fmt: skip
    assert found.launch_s == best.launch_s
    assert len(calls) > len(found.by_size)
    a = torch.randn(256, 256)
    known = replace(found, launch_s=0.0).seconds_by_kind(counted(lambda: a @ a))
    assert known
    assert sum(known.values()) == pytest.approx(2e-3, rel=0.01)


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.193, "0.19 s"), (54.3, "54 s"), (59.7, "1 min 0 s"), (725.2, "12 min 5 s"), (12700, "3 h 32 min")],
)
def test_people_read_hours_and_minutes(seconds: float, told: str) -> None:
    assert duration(seconds) == told


# what a card waits for, and what it takes


def test_noise_takes_the_host_time_and_no_memory_of_the_card() -> None:
    generator = torch.Generator().manual_seed(0)
    work = counted(lambda: torch.randn(4, 1000, generator=generator))
    assert work[Sort("random", "", 0), "amount"] == 4000
    assert not any(n for (_, quantity), n in work.items() if quantity == "bytes")
    told = replace(FLAT, random_per_s=1000.0).seconds_by_kind(work)
    assert told
    assert told["host"] == pytest.approx(4.0)
    assert sum(told.values()) == pytest.approx(4.0)


def test_a_mask_with_rows_in_pieces_is_for_no_fused_kernel_of_a_card() -> None:
    q = torch.randn(1, 4, 16, 8)
    whole = torch.randn(1, 4, 16, 16)
    pieces = torch.randn(16, 16, 4).permute(2, 0, 1).unsqueeze(0)  # a position bias: its heads are the last axis

    def sorts(mask: torch.Tensor, *, card: bool) -> set[str]:
        work = counted(lambda: functional.scaled_dot_product_attention(q, q, q, attn_mask=mask), card=card)
        return {sort.name for sort, _ in work}

    assert "attention" in sorts(whole, card=True)
    assert "attention" not in sorts(pieces, card=True)
    assert "matmul" in sorts(pieces, card=True)
    assert "attention" in sorts(pieces, card=False)


def test_shapes_of_convolutions_are_told_apart_and_met_once() -> None:
    def shapes(*videos: torch.Tensor) -> set[int]:
        tally = Tally(card=True)
        for video in videos:
            count(lambda video=video: functional.conv3d(video, VIDEO.new_ones(8, 16, 3, 3, 3)), tally)  # type: ignore[misc]
        return tally.counts.shapes

    assert len(shapes(VIDEO, VIDEO + 1)) == 1
    assert len(shapes(VIDEO, VIDEO[..., :5], VIDEO.to(memory_format=torch.channels_last_3d))) == 3


def test_what_a_process_has_met_is_not_looked_for_again(photo: Path) -> None:
    row = CHECKPOINTS["i2vgen-xl"]
    request = Request(image=photo, prompt="x", model=row.id, width=512, height=512, seed=1)
    plan = choose(request, row, Device.named("h100-80gb"), photo_size=(120, 80))
    ways = {"elementwise": 0, "host_to_device": 0, "device_to_host": 0}
    blank = PhaseTrace(name="", weights_bytes={}, peak_bytes=0, held={}, flops={}, bytes=ways)
    traces = [replace(blank, name="encode_image", shapes=(1, 2)), replace(blank, name="decode", shapes=(2, 3))]

    def seconds(met: tuple[int, ...] = (), shelf_bytes: int = 0) -> list[float | None]:
        given = [replace(trace, shelf_bytes=shelf_bytes) for trace in traces]
        return [phase.seconds for phase in with_phases(plan, row, given, met).estimate.phases[1:]]

    known = of(plan.device)
    assert known
    assert seconds() == pytest.approx([2 * known.first_s, known.first_s])
    assert seconds((1, 3)) == pytest.approx([known.first_s, 0])
    pinned = 10**9 / known.pinned_gb_per_s / 1e9
    assert seconds((1, 2, 3), 10**9) == pytest.approx([pinned, pinned])


def test_the_probes_copies_both_ways_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = list[tuple[str, str]]()

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            waits.append((self.name, other.name))

    names = iter(("there", "back"))
    empty = torch.empty
    monkeypatch.setattr(ceilings.torch, "empty", lambda size, **_: empty(1))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(next(names)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("current"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(
        ceilings, "_best", lambda probes, device: [waits.clear(), *(call() for _, call in probes)] and 1
    )
    assert [way for way, _ in ceilings._host_copies("cpu")] == ["to", "from", "both"]
    assert waits == [("there", "current"), ("back", "current"), ("current", "there"), ("current", "back")]


def test_a_stage_of_a_vae_hides_copies_that_take_no_longer_and_both_ways_share_a_link() -> None:
    known = replace(FLAT, host_to_device_gb_per_s=10.0, both_ways_gb_per_s=5.0)
    stages = ((0.5, 10**9), (0.5, 4 * 10**9))
    through = 5e9 / known.memory_gb_per_s / 1e9
    assert _beside(1.0, 5 * 10**9, stages, "both_ways", known) == pytest.approx(1 + 0.3 + through)
    assert _beside(1.0, 5 * 10**9, stages, "block", known) == pytest.approx(1 + through)
    alone = replace(known, both_ways_gb_per_s=None)
    assert _beside(1.0, 5 * 10**9, stages, "both_ways", alone) == pytest.approx(1 + through)


def test_a_probe_tells_what_the_host_does_a_second() -> None:
    assert 1e6 < sized.random_per_s() < 1e10
    assert 0 <= sized.first_s("cpu") < 1


def test_the_probe_reads_files_that_the_systems_cache_was_told_to_forget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    happened: list[tuple[str, int]] = []
    fill = DiskTransfer._fill

    def read(self: DiskTransfer, job: list[tuple[FiledSlab, Room]]) -> None:
        happened.append(("read", job[0][0].file.stat().st_ino))
        fill(self, job)

    def told(what: str) -> Callable[..., None]:
        return lambda file, *_: happened.append((what, os.fstat(file).st_ino))

    monkeypatch.setattr(DiskTransfer, "_fill", read)
    monkeypatch.setattr(os, "fsync", told("written"))
    monkeypatch.setattr(os, "posix_fadvise", told("forgotten"), raising=False)
    rate = sized.disk_gb_per_s("cpu")
    assert rate
    assert 0 < rate < 1000
    (_, first), *others = happened
    files = [file for what, file in others if what == "written"]
    assert len({first, *files}) == 4
    assert others == [(what, file) for file in files for what in ("written", "forgotten")] + [
        ("read", file) for file in files
    ]
    assert list(state_folder().joinpath("weights").iterdir()) == []


@pytest.mark.parametrize("how", ["no folder", "no disk"])
def test_where_no_file_can_be_written_the_probe_does_not_know_the_disk(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("XDG_STATE_HOME", str(home))
    if how == "no folder":
        home.touch()
    else:
        monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
        monkeypatch.setattr(os, "posix_fadvise", Mock(), raising=False)
    assert sized.disk_gb_per_s("cpu") is None
    assert FLAT.disk_seconds(4 * 10**9) == 2.0


def test_weights_in_files_come_as_fast_as_the_probe_read_them() -> None:
    known = replace(FLAT, disk_gb_per_s=4.0)
    through = 8e9 / known.memory_gb_per_s / 1e9
    assert _beside(1.0, 8 * 10**9, ((1.0, 8 * 10**9),), "disk", known) == pytest.approx(1 + 1 + through)
