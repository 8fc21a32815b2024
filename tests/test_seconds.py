"""What an operator's seconds depend on: counted by sort, put to rates by size, measured by a probe, told to people."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from framefit.durations import duration
from framefit.ledger.counts import Tally, count
from framefit.planning.phase import PhaseTrace
from framefit.profiling import sized
from framefit.rates import Quantity, Rates, Sort

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
        {"matmul": 2.0 + 1.0, "attention": 1.0, "convolution": 0.0, "elementwise": 1.0}
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
    """With a rate for every one the seconds of what was measured come out again."""
    monkeypatch.setattr(sized, "HOLD_S", 0.02)
    monkeypatch.setattr(sized, "PRECISIONS", {"fp32": torch.float32})
    best = replace(FLAT, by_size={}, memory_gb_per_s=1e6)
    found = sized.measured(best, "cpu")
    assert {(name, *by) for name, by in found.by_size.items()} == {
        ("matmul", "fp32"), ("attention", "fp32"), ("convolution", "fp32"), ("scattered", ""), ("row_norm", ""),
        ("group_norm", ""),
    }  # fmt: skip
    assert found.launch_s == best.launch_s
    a = torch.randn(256, 256)
    with torch.no_grad():
        seconds = sized._held(lambda: a @ a, "cpu")
    known = replace(found, launch_s=0.0).seconds_by_kind(counted(lambda: a @ a))
    assert known
    assert seconds / 4 < sum(known.values()) < seconds * 4  # the machine does other things beside
    assert 1e-7 < sized.launch_s("cpu") < 1e-2


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.193, "0.19 s"), (54.3, "54 s"), (59.7, "1 min 0 s"), (725.2, "12 min 5 s"), (12700, "3 h 32 min")],
)
def test_people_read_hours_and_minutes(seconds: float, told: str) -> None:
    assert duration(seconds) == told
