"""Devices: of this machine, named or limited; their rates; what nvidia-smi tells; the probe, as far as a CPU has it."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from framefit import cards, cli, doctor, rates, smi
from framefit.cards import CARDS
from framefit.device import Budget, Device
from framefit.errors import DoesNotFit, UsageError
from framefit.ledger.counts import Counts
from framefit.profiling import measure, unseen
from framefit.rates import ATTAINED, Rates, Unseen
from framefit.smi import Others, Smi

GIB = 2**30
HERE = Device(
    id="cuda:0", name="NVIDIA H200", compute_capability=(9, 0), vram_total_bytes=140 * GIB, vram_free_bytes=100 * GIB,
    context_bytes=2**28, ram_total_bytes=2**38, ram_free_bytes=2**37, disk_free_bytes=2**40,
)  # fmt: skip
SEEN = Unseen(
    origin="measured", context_bytes=500 * 2**20, kernels_bytes=200 * 2**20, cublas_workspace_bytes=2**25,
    convolution={"conv3d": {"bf16": ((1000, 600), (3000, 1600))}},
)  # fmt: skip
RATES = Rates(
    device="NVIDIA H200", torch="2.11", tflops={"matmul": {"bf16": 750.0}}, memory_gb_per_s=4000.0,
    host_to_device_gb_per_s=55.0, device_to_host_gb_per_s=54.0, unseen=SEEN,
)  # fmt: skip


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


# --- cards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("id", CARDS)
def test_a_card_can_be_named(id: str) -> None:
    device, card = Device.named(id), CARDS[id]
    assert (device.origin, device.id, device.name) == ("named", id, card.name)
    assert device.budget_bytes == device.vram_free_bytes - device.context_bytes
    nominal = re.search(r"(\d+)gb", id)
    if nominal:
        assert 0.9 < card.vram_bytes / int(nominal[1]) / GIB < 1
    assert device.vram_free_bytes == device.vram_total_bytes == card.vram_bytes
    assert Device.from_json(json.loads(json.dumps(device.to_json()))) == device
    assert card.source.startswith("[")
    assert ("bf16" in card.tflops) == (card.compute_capability >= (8, 0))
    assert ("fp8" in card.tflops) == (card.compute_capability >= (8, 9))
    assert card.tflops["fp16"] > card.tflops["fp32"]


@pytest.mark.parametrize(
    ("id", "precision", "tflops"),
    [
        ("rtx-3070", "fp16", 40.6),
        ("rtx-3080-10gb", "fp16", 59.5),
        ("rtx-3090", "bf16", 71),
        ("rtx-3090", "int8", 284),
        ("rtx-4080", "bf16", 97.5),
        ("rtx-4090", "bf16", 165.2),
        ("rtx-4090", "fp32", 82.6),
        ("rtx-4090", "fp8", 330.3),
        ("rtx-4090", "int8", 660.6),
        ("rtx-5090", "bf16", 209.5),
        ("rtx-5090", "fp8", 419),
    ],
)
def test_what_is_computed_of_a_card_is_what_the_whitepaper_prints(id: str, precision: str, tflops: float) -> None:
    assert CARDS[id].tflops[precision] == pytest.approx(tflops, rel=0.005)


def test_the_table_is_in_the_docs() -> None:
    page = Path(cards.__file__).parents[1] / "docs" / "cards.md"
    assert cards.table() in page.read_text(encoding="utf-8"), "write it anew: framefit.cards.table()"


def test_naming_a_card_leaves_torch_out() -> None:
    code = (
        "from framefit.device import Device; from framefit import rates; d = Device.find('rtx-3060-12gb');"
        "assert rates.of(d).tflops['matmul']['bf16']; import sys; print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "False False\n"


def test_a_named_card_is_in_this_machine_or_in_one_that_is_stated(cpu: Device) -> None:
    assert Device.named("t4").ram_total_bytes == cpu.ram_total_bytes
    there = Device.find("t4", Budget(ram_bytes=2**50))
    assert (there.ram_free_bytes, there.disk_free_bytes) == (2**50, None)
    assert Device.find("t4", Budget(disk_bytes=2**50)).disk_free_bytes == 2**50
    with pytest.raises(UsageError, match="card 'rtx-1' is unknown: use rtx-3060-12gb, "):
        Device.named("rtx-1")


def test_plan_takes_a_card(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = "plan -m wan2.2-i2v-a14b --size 1280x720 --frames 81 --device rtx-3060-12gb --vram 10GiB --ram 32GiB"
    assert command(*wanted.split(), "--json") == 0
    device = json.loads(capsys.readouterr().out)["device"]
    assert (device["origin"], device["budget_bytes"], device["ram_free_bytes"]) == ("named", 10 * GIB, 32 * GIB)
    command(*wanted.split())
    assert "10.00 GiB for the run: by --vram; not a card of this machine" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wanted",
    [
        "run -p x",
        "profile",
        "diagnose",
        "verify -p x",
        "tune -p x",
        "doctor",
        "doctor --probe",
        "bench tiny --rows stock",
    ],
)
def test_nothing_runs_on_a_card_that_is_only_named(wanted: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = command(*wanted.split(), "--device", "rtx-4090")
    assert code == (1 if "bench" in wanted else 2)
    assert "rtx-4090 is a card to plan for" in (told := capsys.readouterr().err)
    assert "--vram 23.02GiB" in told


# --- limits ----------------------------------------------------------------------------------------------------------


def test_a_run_may_be_held_to_less_of_the_machine(cpu: Device) -> None:
    held = Device.find("cpu", Budget(ram_bytes=GIB, disk_bytes=2**20))
    assert (held.ram_free_bytes, held.budget_bytes, held.disk_free_bytes) == (GIB, GIB, 2**20)
    assert held.ram_total_bytes == cpu.ram_total_bytes
    for flag, budget in (("ram", Budget(ram_bytes=2**50)), ("disk", Budget(disk_bytes=2**60))):
        with pytest.raises(DoesNotFit, match=rf"--{flag} is [\d.]+ GiB and [\d.]+ GiB are free: ask for no more"):
            Device.find("cpu", budget)
    with pytest.raises(UsageError, match="--pinned limits what is pinned for a card and the device is the CPU"):
        Device.find("cpu", Budget(pinned_bytes=GIB))


def test_what_may_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of RAM that is free, unless it is said or Windows is below."""
    card = Device.named("t4", ram_bytes=16 * GIB)
    assert card.pinnable_bytes == 16 * GIB
    assert replace(card, pinned_limit_bytes=GIB).pinnable_bytes == GIB
    assert replace(card, pinned_limit_bytes=2**50).pinnable_bytes == 16 * GIB
    monkeypatch.setattr(platform, "release", lambda: "5.15.153.1-microsoft-standard-WSL2")
    windows = Device.named("t4", ram_bytes=16 * GIB)
    assert windows.pinnable_bytes == int(0.45 * 16 * GIB)
    assert Device.find("t4", Budget(ram_bytes=16 * GIB, pinned_bytes=12 * GIB)).pinnable_bytes == 12 * GIB


def test_a_limit_is_the_budget(cpu: Device) -> None:
    assert (HERE.origin, HERE.budget_bytes) == ("detected", 100 * GIB - 2**28)
    limited = HERE._limited(12 * GIB)
    assert (limited.origin, limited.budget_bytes) == ("emulated", 12 * GIB)
    assert limited.to_json()["origin"] == "emulated"
    assert Device.from_json(json.loads(json.dumps(limited.to_json()))) == limited
    with pytest.raises(DoesNotFit, match=r"--vram is 101.00 GiB and NVIDIA H200 has 99.75 GiB for a run"):
        HERE._limited(101 * GIB)
    with pytest.raises(UsageError, match="--vram is 0"):
        HERE._limited(0)
    with pytest.raises(DoesNotFit, match=r"RTX 4090 has 23\.02 GiB"):
        Device.find("rtx-4090", Budget(vram_bytes=24 * GIB))


@pytest.mark.parametrize("wanted", ["run -p x", "plan", "profile"])
def test_a_cpu_has_nothing_to_limit(wanted: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*wanted.split(), "--device", "cpu", "--vram", "2GiB") != 0
    assert "--vram limits the memory of a card and the device is the CPU" in capsys.readouterr().err


def test_what_was_measured_before_cannot_be_limited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("diagnose", "--from", tmp_path, "--vram", "2GiB") == 2
    assert "--vram asks to measure" in capsys.readouterr().err


def test_a_device_of_an_older_file_is_read() -> None:
    new = {"origin", "budget_bytes", "vram_limit_bytes", "vram_others_bytes", "context_bytes"}
    old = {name: value for name, value in HERE.to_json().items() if name not in new}
    assert Device.from_json(old) == replace(HERE, context_bytes=0)


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """torch's, as far as the cap asks it: a card of 139.8 GiB of which nothing is held."""
    state: dict[str, Any] = {"fraction": 1.0, "held": 0, "emptied": 0, "settings": []}
    total = type("Properties", (), {"total_memory": 150_110_011_392})

    def set_fraction(fraction: float, device: str) -> None:
        assert isinstance(fraction, float)
        assert 0 <= fraction <= 1
        state["fraction"] = fraction

    for name, fake in {
        "empty_cache": lambda: state.update(emptied=state["emptied"] + 1),
        "memory_reserved": lambda device: state["held"],
        "get_device_properties": lambda device: total,
        "get_per_process_memory_fraction": lambda device: state["fraction"],
        "set_per_process_memory_fraction": set_fraction,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", state["settings"].append)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    state["allowed"] = lambda: int(state["fraction"] * total.total_memory)  # as CUDACachingAllocator computes it
    return state


@pytest.mark.parametrize("limit", [1, 11_811_160_065, 12 * GIB, 12 * GIB + 12345])
def test_a_cap_is_set_and_lifted(limit: int, allocator: dict[str, Any]) -> None:
    device, before = HERE._limited(limit), 0.75
    allocator["fraction"] = before

    def fails() -> None:
        with device.capped():
            cap = max(0, limit - 20 * 2**20)  # by which segments that grow do so past it
            assert cap - 1 <= allocator["allowed"]() <= cap
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert allocator["fraction"] == before
    assert allocator["emptied"] == 1
    with HERE.capped():
        assert allocator["fraction"] == before


def test_segments_grow_in_a_run_unless_the_user_says_otherwise(
    allocator: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with HERE.capped(growing=False), Device.detect("cpu").capped():
        assert allocator["settings"] == []
    with HERE.capped(), HERE._limited(2 * GIB).capped():
        assert allocator["settings"] == ["expandable_segments:True"] * 2
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    with HERE.capped():
        assert len(allocator["settings"]) == 2


def test_a_cap_below_what_is_held_is_refused(allocator: dict[str, Any]) -> None:
    allocator["held"] = 3 * GIB
    with pytest.raises(DoesNotFit, match=r"this process holds 3\.00 GiB"), HERE._limited(2 * GIB).capped():
        pass
    with pytest.raises(UsageError, match="h200 is a card to plan for"), Device.named("h200", vram_bytes=GIB).capped():
        pass


# --- rates -----------------------------------------------------------------------------------------------------------


def test_rates_are_filed_by_name(tmp_path: Path) -> None:
    file = tmp_path / "state" / "rates.json"
    assert rates.filed("NVIDIA H200", file) is None
    rates.save(RATES, file)
    rates.save(replace(RATES, device="another"), file)
    assert rates.filed("NVIDIA H200", file) == RATES
    file.write_text(json.dumps({key: {"device": "no rates"} for key in json.loads(file.read_text())}))
    assert rates.filed("NVIDIA H200", file) is None


def test_measured_rates_come_before_the_data_sheet() -> None:
    sheet = rates.of(HERE)
    assert sheet is not None
    assert sheet.origin == "data sheet x share"
    assert sheet.tflops["matmul"]["bf16"] == pytest.approx(770, rel=0.05)
    assert sheet.tflops["attention"]["bf16"] == pytest.approx(571, rel=0.05)
    assert sheet.tflops["convolution"]["fp32"] == pytest.approx(989.5 / 2 * ATTAINED["convolution"])
    assert "fp8" in sheet.tflops["matmul"]
    assert "fp8" not in sheet.tflops["attention"]
    assert sheet.host_to_device_gb_per_s == pytest.approx(55, rel=0.02)
    assert sheet.unseen == Unseen.assumed((9, 0))
    rates.save(replace(RATES, unseen=None))
    found = rates.of(HERE)
    assert found is not None
    assert (found.origin, found.unseen) == ("measured", Unseen.assumed((9, 0)))
    rates.save(RATES)
    assert rates.of(HERE) == rates.of(Device.named("h200")) == RATES
    assert Device.named("h200").context_bytes == SEEN.context_bytes
    assert rates.of(replace(HERE, name="a card of next year")) is None
    t4 = rates.of(Device.named("t4"))
    assert t4 is not None
    assert "bf16" not in t4.tflops["attention"]
    assert t4.tflops["convolution"]["fp32"] == pytest.approx(8.1 * ATTAINED["convolution"])  # no TF32 before Ampere


def test_seconds_of_work() -> None:
    work = Counts()
    work.flops["matmul", "bf16"] = 75 * 10**13
    work.bytes["elementwise"] = 8 * 10**12
    work.bytes["host_to_device"] = 55 * 10**9
    assert RATES.seconds("matmul", work) == pytest.approx(1.0)
    assert RATES.seconds("elementwise", work) == pytest.approx(2.0)
    assert RATES.seconds("transfer", work) == pytest.approx(1.0)
    work.flops["matmul", "fp16"] = 1
    assert RATES.seconds("matmul", work) is None


def test_what_is_unseen_is_read_back() -> None:
    assert Unseen.from_json(json.loads(json.dumps(asdict(SEEN)))) == SEEN


def test_measuring_rates_again_keeps_what_a_probe_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)
    file = tmp_path / "rates.json"
    rates.save(replace(measure("cpu", file=file), unseen=SEEN), file)
    assert measure("cpu", file=file, fresh=True).unseen == SEEN


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("framefit.profiling.ceilings.BUDGET_S", 0.0)
    monkeypatch.setattr("framefit.profiling.ceilings.PRECISIONS", {"fp32": torch.float32})
    monkeypatch.setattr("framefit.profiling.sized.PRECISIONS", {"fp32": torch.float32})
    monkeypatch.setattr("framefit.profiling.sized.HOLD_S", 0.0)


# --- doctor and probe ------------------------------------------------------------------------------------------------


def test_the_probe_on_a_cpu(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    quick(monkeypatch)
    command("doctor", "--device", "cpu", "--json")
    assert json.loads(capsys.readouterr().out)["rates"] is None
    assert command("doctor", "--probe", "--device", "cpu", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["others"] is None
    assert facts["rates"]["origin"] == "measured"
    assert facts["rates"]["unseen"] is None
    command("doctor", "--device", "cpu")
    told = capsys.readouterr().out
    assert f"fp32 {facts['rates']['tflops']['matmul']['fp32']:.3g}" in told
    assert "does not apply" in told
    found = rates.of(Device.detect("cpu"))
    assert found is not None
    assert found.to_json() == facts["rates"]


def test_what_the_probe_does_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        unseen.denoising("cpu", tokens=8, width=128, blocks=2)
        unseen.decoding("cpu", height=4, width=6, channels=8, frames=2)
    for kind, shapes in unseen.CONVOLUTIONS.items():
        sizes = [torch.Size(image).numel() for image, _ in shapes]
        assert sizes == sorted(sizes)
        for image, weight in shapes:
            call = getattr(torch.nn.functional, kind)
            assert call(torch.empty(image, device="meta"), torch.empty(weight, device="meta")).numel() > 0


def test_the_probes_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an allocator's counters in place of a card: the calls are real, on the CPU and small."""
    free = iter([900, 700])  # with the bare context; at the end, 120 of them reserved
    for name, fake in {
        "set_device": lambda device: None, "synchronize": lambda device: None, "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device: None,
        "mem_get_info": lambda device: (next(free), 10_000), "memory_reserved": lambda device: 120,
        "memory_allocated": lambda device: 1000, "max_memory_allocated": lambda device: 10_000,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    small = {"conv2d": (((1, 2, 8, 8), (2, 2, 3, 3)),), "conv3d": (((1, 2, 3, 8, 8), (2, 2, 3, 3, 3)),)}
    monkeypatch.setattr(unseen, "CONVOLUTIONS", small)
    monkeypatch.setattr(unseen, "PRECISIONS", {"fp32": torch.float32})
    monkeypatch.setattr(unseen, "denoising", lambda device: None)
    monkeypatch.setattr(unseen, "decoding", lambda device: None)
    seen = Unseen.from_json(unseen._measured("cpu", 1000))
    assert (seen.context_bytes, seen.kernels_bytes) == (1000 - 700 - 120, 900 - 700 - 120)
    assert seen.cublas_workspace_bytes == 9000
    size, result = 4 * (2 * 64 + 2 * 2 * 9 + 2 * 36), 4 * 2 * 36
    assert seen.convolution["conv2d"]["fp32"] == ((size, 9000 - result),)


def test_doctor_tells_a_card(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setattr(Device, "detect", lambda which="auto": HERE)
    monkeypatch.setattr(doctor, "others", lambda device: Others(count=2, bytes=3 * GIB))
    facts, rows = doctor.examine()
    told = dict(rows)
    assert told["others on it"] == "2 processes, 3.0 GiB at the least"
    assert told["rates"].startswith("data sheet x share; framefit doctor --probe")
    assert told["unseen memory"] == "assumed"
    rates.save(RATES)
    facts, rows = doctor.examine()
    assert dict(rows)["CUDA context"] == "500 MiB, of it kernels 200 MiB"
    assert dict(rows)["conv3d workspace"] == "bf16 0 MiB for 0 MiB and 0 MiB for 0 MiB"
    assert Rates.from_json(json.loads(json.dumps(facts["rates"]))) == RATES


# --- nvidia-smi ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """An imitation of nvidia-smi that lists these processes."""
    program = tmp_path / "nvidia-smi"
    monkeypatch.setattr(Smi, "find", lambda device: Smi(str(program), "GPU-0"))
    monkeypatch.setattr(smi, "least_of_others", lambda device: 5 * GIB)

    def arrange(lines: str) -> None:
        rule = f'case "$*" in *--query-compute-apps=pid,used_memory*) printf "{lines}";; *) exit 1;; esac'
        program.write_text(f"#!/bin/sh\n{rule}\n")
        program.chmod(0o755)

    return arrange


def test_other_processes_are_those_that_are_not_us(tells: Callable[[str], None]) -> None:
    us = os.getpid()
    tells(rf"{us}, 500\n1, 1024\n2, 2048\n")
    assert smi.others("cuda:0") == Others(count=2, bytes=3 * GIB)
    tells(rf"{us}, 500\n")
    assert smi.others("cuda:0") == Others(count=0, bytes=0)


@pytest.mark.parametrize("lines", ["", "2, 1024\\n", "{us}, [N/A]\\n", "No devices were found\\n"])
def test_where_nvidia_smi_does_not_know_us_others_are_estimated(lines: str, tells: Callable[[str], None]) -> None:
    tells(lines.format(us=os.getpid()))
    assert smi.others("cuda:0") == Others(count=None, bytes=5 * GIB)
