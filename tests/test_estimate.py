"""What a plan says that it will need: by phase, from the dry run, on cards that are here and on cards that are not."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from framefit.cli import main
from framefit.device import Device
from framefit.errors import DoesNotFit
from framefit.families import CHECKPOINTS, find
from framefit.families.parts import Parts, build
from framefit.pipeline import Pipeline
from framefit.plan import Plan
from framefit.planning import check_fits, choose, estimate, estimated
from framefit.planning.traces import PhaseTrace
from framefit.rates import Sort
from framefit.request import Request

GIB = 2**30
NONE = {"elementwise": 0, "host_to_device": 0, "device_to_host": 0}
I2VGEN = CHECKPOINTS["i2vgen-xl"]
TRACES = (
    PhaseTrace(
        name="encode_text", weights_bytes={"unet": 3 * GIB, "vae": GIB}, peak_bytes=0, held={}, flops={}, bytes=NONE,
    ),
    PhaseTrace(
        name="denoise:unet", weights_bytes={"unet": 3 * GIB, "vae": GIB}, peak_bytes=2 * GIB,
        held={"mul bfloat16[1] in unet": GIB}, flops={("matmul", "bf16"): 10**15, ("attention", "bf16"): 10**14},
        bytes=NONE | {"elementwise": 10**12},
        work={
            (Sort("matmul", "bf16", 0), "amount"): 10**15, (Sort("attention", "bf16", 64), "amount"): 10**14,
            (Sort("plain", "", 0), "bytes"): 10**12, (Sort("plain", "", 0), "calls"): 1000,
        },
    ),
    PhaseTrace(
        name="decode", weights_bytes={"unet": 3 * GIB, "vae": GIB}, peak_bytes=3 * GIB, held={},
        flops={("convolution", "bf16"): 10**13}, bytes=NONE,
        work={(Sort("convolution", "bf16", 128), "amount"): 10**13},
    ),
)  # fmt: skip


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dry run is another test's."""
    monkeypatch.setattr(estimate, "traced", lambda plan, checkpoint: TRACES)


def plan_of(photo: Path, device: Device, **fields: Any) -> Plan:
    request = Request(image=photo, prompt="x", model="i2vgen-xl", width=512, height=512, seed=1, **fields)
    return choose(request, I2VGEN, device, photo_size=(120, 80))


@pytest.mark.usefixtures("given")
def test_bytes_and_seconds_come_from_the_trace_and_the_device(photo: Path) -> None:
    plan = estimated(plan_of(photo, Device.named("h100-80gb"), steps=20), I2VGEN)
    load, _, denoise, decode = plan.estimate.phases
    assert [phase.name for phase in plan.estimate.phases] == ["load", "encode_text", "denoise:unet", "decode"]
    assert plan.estimate.binding == decode
    assert plan.estimate.peak_bytes == decode.peak_vram_bytes >= 7 * GIB + 2**25  # 32 MiB is cuBLAS's on Hopper
    assert decode.peak_vram_bytes < 7.5 * GIB
    assert decode.host_bytes == 512 * 512 * 16 * 3
    assert load.host_bytes == 2 * I2VGEN["unet"].params
    assert list(denoise.held)[:2] == ["weights of the unet", "weights of the vae"]
    # 20 steps of 1.1e15 FLOPs at some 60 to 80 % of 989 TFLOP/s, and 1e12 bytes at 3.35 TB/s
    assert denoise.seconds is not None
    assert 25 < denoise.seconds < 45
    assert plan.estimate.seconds == pytest.approx(sum(phase.seconds or 0 for phase in plan.estimate.phases))
    t4 = estimated(plan_of(photo, Device.named("t4")), I2VGEN)
    assert t4.estimate.phases[2].seconds is None  # the trace's bf16, which this card has no rate for
    assert t4.estimate.seconds is None
    assert "data sheet" in plan.estimate.origin


@pytest.mark.usefixtures("given")
@pytest.mark.parametrize(("vram_gib", "fits"), [(6.9, False), (7.6, True)])
def test_what_is_called_feasible_stays_within_the_budget(vram_gib: float, fits: bool, photo: Path) -> None:
    device = Device.named("h100-80gb", vram_bytes=int(vram_gib * GIB))
    plan = estimated(plan_of(photo, device), I2VGEN)
    assert plan.feasible == fits
    assert fits == all(phase.peak_vram_bytes <= device.budget_bytes for phase in plan.estimate.phases)
    if not fits:
        with pytest.raises(DoesNotFit, match=r"needs 7\.\d GiB in its phase decode in bf16") as told:
            check_fits(plan)
        assert "6.9 GiB by --vram: use --set offload=block (weights in RAM), a smaller --size" in str(told.value)


@pytest.mark.usefixtures("given")
def test_without_a_card_it_is_the_host_that_holds_everything(photo: Path) -> None:
    device = replace(Device.detect("cpu"), ram_free_bytes=6 * GIB)
    plan = estimated(plan_of(photo, device), I2VGEN)
    assert {phase.peak_vram_bytes for phase in plan.estimate.phases} == {0}
    assert plan.estimate.phases[-1].host_bytes == 7 * GIB + 512 * 512 * 16 * 3
    assert plan.estimate.binding is not None
    assert plan.estimate.binding.name == "load"  # the true weights in fp32
    assert plan.estimate.peak_bytes == sum(4 * part.params for part in I2VGEN.components)
    assert not plan.feasible


def test_a_dry_run_that_fails_leaves_the_weights(
    photo: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def traced(plan: Plan, checkpoint: Any) -> None:
        raise NotImplementedError("an operator without a fake")

    monkeypatch.setattr(estimate, "traced", traced)
    plan = plan_of(photo, Device.named("h100-80gb"))
    assert estimated(plan, I2VGEN) == plan
    assert "NotImplementedError: an operator without a fake" in caplog.text
    assert plan.feasible
    assert plan.estimate.peak_bytes == plan.estimate.weights_bytes


@pytest.mark.usefixtures("given")
def test_an_estimate_survives_json(photo: Path) -> None:
    plan = estimated(plan_of(photo, Device.named("rtx-4090")), I2VGEN)
    again = Plan.from_json(json.loads(plan.dumps()))
    assert again == plan
    told = plan.to_json()
    assert set(told["phases"][0]) >= {"name", "seconds", "peak_vram_bytes", "host_bytes", "disk_bytes"}
    assert (told["binding_phase"], told["peak_vram_bytes"]) == ("decode", plan.estimate.peak_bytes)
    assert told["seconds"] == plan.estimate.seconds
    # a plan from before there were phases
    old = plan.to_json() | {"estimate": {"weights_bytes": 1, "free_bytes": 2}}
    del old["phases"]
    assert Plan.from_json(old).estimate.phases == ()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 16, 40, 50])
@pytest.mark.parametrize("size", [(832, 480), (1280, 720)])
def test_steps_are_shared_as_in_a_run(steps: int, size: tuple[int, int], photo: Path) -> None:
    row = CHECKPOINTS["wan2.2-i2v-a14b"]
    request = Request(image=photo, prompt="x", model=row.id, width=size[0], height=size[1], steps=steps, seed=1)
    plan = choose(request, row, Device.detect("cpu"), photo_size=(120, 80))
    pipeline = Pipeline(plan, Parts(row, {"scheduler": build(row["scheduler"])}, torch.device("cpu")))
    served = pipeline.experts()
    assert estimate.steps_of(plan.request, row) == {name: served.count(name) for name in row.experts}


def test_from_the_command_line_to_the_table(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model in the package on a card that is not here: dry run, file, and again without torch."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    asked = ["plan", str(photo), "--size", "96x64", "--frames", "5", "--device", "rtx-3060-12gb", "--seed", "1"]
    with pytest.raises(SystemExit) as ended:
        main(asked)
    assert ended.value.code == 0
    table = capsys.readouterr().out
    for phase in ("load", "encode_text", "denoise:transformer_2", "decode", "after loading"):
        assert phase in table
    assert "data sheet" in table
    code = f"import sys; from framefit.cli import main; main({[*asked, '--json']!r}); assert 'torch' not in sys.modules"
    told = json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert told["feasible"]
    assert told["peak_vram_bytes"] < GIB
    assert {phase["name"] for phase in told["phases"]} >= {"load", "decode"}
    weights = sum(part.params * 2 for part in find("tiny").components)
    assert all(phase["peak_vram_bytes"] >= weights for phase in told["phases"])
