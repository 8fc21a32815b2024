"""A card as it is found, limited and probed; only where there is one (make test-gpu)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from framefit import rates, smi
from framefit.cli import main
from framefit.device import Budget, Device
from framefit.errors import DoesNotFit
from framefit.profiling import unseen
from framefit.request import Request
from framefit.run import Options, generate, prepare

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")]

CARD = "cuda:0"
MIB, GIB = 2**20, 2**30


@pytest.fixture(autouse=True)
def nothing_held() -> Iterator[None]:
    torch.cuda.init()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(CARD)
    yield
    torch.cuda.empty_cache()
    assert torch.cuda.get_per_process_memory_fraction(CARD) == 1.0


def test_a_card_is_detected() -> None:
    device = Device.detect(CARD)
    assert device.origin == "detected"
    assert 0 < device.budget_bytes == device.vram_free_bytes - device.context_bytes
    assert device.vram_free_bytes <= device.vram_total_bytes
    assert device.vram_others_bytes < device.vram_total_bytes
    assert device.vram_total_bytes == pytest.approx(torch.cuda.get_device_properties(CARD).total_memory, rel=0.01)
    assert device.compute_capability == torch.cuda.get_device_capability(CARD)
    assert Device.from_json(json.loads(json.dumps(device.to_json()))) == device


def test_what_this_process_caches_is_free() -> None:
    before = Device.detect(CARD).vram_free_bytes
    held = torch.empty(2 * GIB, dtype=torch.uint8, device=CARD)
    assert Device.detect(CARD).vram_free_bytes < before - 1.9 * GIB
    del held
    assert torch.cuda.memory_reserved(CARD) >= 2 * GIB
    assert Device.detect(CARD).vram_free_bytes == pytest.approx(before, abs=64 * MIB)


@pytest.mark.parametrize("limit", [2 * GIB, 3 * GIB + 12345])
def test_no_more_than_the_limit_is_reserved(limit: int) -> None:
    held: list[torch.Tensor] = []
    with Device.detect(CARD, vram_bytes=limit).capped():
        with pytest.raises(torch.OutOfMemoryError):
            held.extend(torch.empty(96 * MIB, dtype=torch.uint8, device=CARD) for _ in range(1000))
        reserved = torch.cuda.memory_reserved(CARD)
    assert limit - 128 * MIB < reserved <= limit
    assert torch.cuda.max_memory_reserved(CARD) <= limit
    held.append(torch.empty(limit, dtype=torch.uint8, device=CARD))  # the process goes on without the cap


def test_what_is_cached_is_given_back_before_the_limit_is_hit() -> None:
    with Device.detect(CARD, vram_bytes=2 * GIB).capped():
        for size in (900, 1100, 1300, 1500, 1700):
            torch.empty(size * MIB, dtype=torch.uint8, device=CARD)
    assert torch.cuda.max_memory_reserved(CARD) <= 2 * GIB


def test_a_cap_below_what_is_held_is_refused() -> None:
    device, held = Device.detect(CARD, vram_bytes=GIB), torch.empty(2 * GIB, dtype=torch.uint8, device=CARD)
    with pytest.raises(DoesNotFit, match="this process holds"), device.capped():
        pass
    assert held.nbytes == 2 * GIB


def test_more_than_is_free_is_refused() -> None:
    with pytest.raises(DoesNotFit, match="ask for no more"):
        Device.detect(CARD, vram_bytes=Device.detect(CARD).vram_total_bytes)


def request_for(photo: Path) -> Request:
    return Request(image=photo, prompt="a boat drifts", width=96, height=64, num_frames=5, steps=2, seed=7)


def test_a_run_stays_within_its_limit(photo: Path, tmp_path: Path) -> None:
    pytest.importorskip("av")
    report = generate(
        request_for(photo), tmp_path / "a.webp", Options(budget=Budget(vram_bytes=GIB), checkpoints=tmp_path / "runs")
    )
    assert (report.plan.device.origin, report.plan.device.budget_bytes) == ("emulated", GIB)
    assert 0 < torch.cuda.max_memory_reserved(CARD) <= GIB


def test_a_run_that_outgrows_its_limit_says_so(photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(checkpoints=None)
    weights = prepare(request_for(photo), options)[1].estimate.weights_bytes
    torch.cuda.empty_cache()
    limit = max(weights, torch.cuda.memory_reserved(CARD)) + 2 * MIB
    # which would refuse it unseen
    monkeypatch.setattr("framefit.run.check_runs", lambda plan, checkpoint, tier: plan)
    asked = {"guidance": "apart", "offload": "none"}
    options = Options(budget=Budget(vram_bytes=limit), checkpoints=None, settings=asked)
    with pytest.raises(DoesNotFit, match=r"GiB of --vram ran out in the phase .*leave out --set"):
        generate(request_for(photo), tmp_path / "a.mp4", options)
    assert not (tmp_path / "a.mp4").exists()


def test_the_probe_sees_what_no_ledger_does(tmp_path: Path) -> None:
    found = unseen.probe(CARD)
    seen = found.unseen
    assert seen is not None
    assert seen.origin == "measured"
    assert 64 * MIB < seen.context_bytes < 3 * GIB
    assert 0 <= seen.kernels_bytes < seen.context_bytes
    assert MIB <= seen.cublas_workspace_bytes <= 256 * MIB
    for kind in ("conv2d", "conv3d"):
        for precision, points in seen.convolution[kind].items():
            assert [size for size, _ in points] == sorted(size for size, _ in points), (kind, precision)
            assert all(0 <= workspace < 100 * size for size, workspace in points), (kind, precision, points)
        assert "fp16" in seen.convolution[kind]
    assert 1.0 <= seen.rounding < 1.1
    assert all(1.0 <= share < 3.0 for share in seen.reserved.values())
    assert 0.001 < found.tflops["matmul"]["fp16"] < 10_000
    device = Device.detect(CARD)
    assert rates.of(device) == found
    assert device.context_bytes == seen.kernels_bytes
    if device.compute_capability and device.compute_capability >= (8, 9):
        assert found.tflops["matmul"]["fp8"] > found.tflops["matmul"]["bf16"]
    print(json.dumps(found.to_json(), indent=1))  # noqa: T201


OTHER = """
import torch
held = torch.empty(4 * 2**30, dtype=torch.uint8, device="cuda:0")
torch.cuda.synchronize()
print("ready", flush=True)
input()
"""


def test_another_process_is_seen() -> None:
    torch.zeros(1, device=CARD)
    before = smi.others(CARD)
    with subprocess.Popen(
        [sys.executable, "-c", OTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "ready\n"
            seen, device = smi.others(CARD), Device.detect(CARD)
        finally:
            other.kill()
    assert seen.bytes > 3 * GIB
    assert device.vram_others_bytes > 3 * GIB
    if seen.count is not None and before.count is not None:
        assert seen.count == before.count + 1


def test_doctor_on_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--device", CARD, "--json"])
    assert ended.value.code == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["device"]["id"] == CARD
    assert set(facts["others"]) == {"count", "bytes"}


def test_bench_names_the_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["bench", "tiny-decode", "--rows", "stock", "--repeats", "1", "--device", CARD, "--vram", "2GiB", "--json"]
    with pytest.raises(SystemExit) as ended:
        main(wanted)
    assert ended.value.code == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["hardware"].endswith(", 2.00 GiB of it")
    assert result["rows"][0]["peak_reserved_bytes"] <= 2 * GIB
