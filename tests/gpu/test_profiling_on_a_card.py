"""Kernels on a card found back to their operators; only where there is one (make test-gpu)."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from framefit.cli import main
from framefit.profiling import breakdown, measure
from framefit.profiling.timeline import read
from framefit.profiling.trace import record

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")]

CARD = "cuda:0"


@torch.no_grad()
def test_kinds_seconds_and_bytes_of_known_work(tmp_path: Path) -> None:
    half = {"device": CARD, "dtype": torch.float16}
    a, q = torch.randn(4096, 4096, **half), torch.randn(1, 16, 4096, 64, **half)
    image, conv = torch.randn(4, 256, 128, 128, **half), torch.nn.Conv2d(256, 256, 3, padding=1, **half)
    host = torch.empty(2**24).pin_memory()

    def call() -> None:
        for _ in range(10):
            a @ a
        for _ in range(10):
            torch.nn.functional.scaled_dot_product_attention(q, q, q)
        for _ in range(10):
            conv(image)
        for _ in range(10):
            a.sin()
        host.to(CARD, non_blocking=True).cpu()
        torch.cuda.synchronize()
        time.sleep(0.02)

    call()
    ceilings = measure(CARD, file=tmp_path / "ceilings.json")
    found = breakdown(call, CARD, ceilings=ceilings)
    kinds = found.kinds
    assert kinds["matmul"].flops == 10 * 2 * 4096**3
    assert kinds["attention"].flops == 10 * 4 * 16 * 4096**2 * 64
    assert kinds["convolution"].flops == 10 * 2 * 4 * 128**2 * 256**2 * 9
    assert kinds["elementwise"].bytes >= 10 * 2 * a.nbytes
    for kind in ("matmul", "attention", "convolution", "elementwise"):
        assert kinds[kind].launches >= 10
        reached = kinds[kind].of_ceiling
        assert reached is not None
        assert 0.05 < reached < 1.3, (kind, reached)
    assert {way: cost.bytes for way, cost in found.transfers.items()} == {
        "host_to_device": host.nbytes, "device_to_host": host.nbytes,
    }  # fmt: skip
    assert all(cost.seconds > 0 for cost in found.transfers.values())
    assert found.idle_s >= 0.02
    assert sum(cost.seconds for cost in kinds.values()) + found.idle_s == pytest.approx(found.wall_s, rel=0.05)
    assert all(kernel.kind != "elementwise" or "gemm" not in kernel.name for kernel in found.kernels)


def test_the_timeline_knows_what_the_card_holds(tmp_path: Path) -> None:
    held = torch.empty(2**26, device=CARD)
    trace = record(lambda: torch.empty(2**24, device=CARD), CARD, memory=True)
    trace.profiler.export_chrome_trace(str(tmp_path / "trace.json.gz"))
    seen = read(tmp_path / "trace.json.gz", CARD)
    assert max(seen.allocated_bytes) >= held.nbytes + 2**26
    assert max(seen.reserved_bytes) >= max(seen.allocated_bytes)


def test_the_command_on_a_card(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(f"profile --size 64x64 --frames 5 --device {CARD} --json -o {tmp_path / 'made'}".split())
    assert ended.value.code == 0
