"""Rules asked about a card on which their condition was really induced, and about one on which it was not."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from framefit.cli import main
from framefit.device import Device
from framefit.profiling import breakdown, measure
from framefit.profiling.findings import Case, Finding, diagnose
from framefit.profiling.profile import PhaseProfile
from framefit.profiling.rules import RULES
from framefit.profiling.surroundings import Surroundings, Watch
from framefit.profiling.symptoms import SLOW_CLOCK
from framefit.rates import Rates
from framefit.smi import Smi

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")]

CARD = "cuda:0"
Call = Callable[[], object]
Ask = Callable[[Call], dict[str, Finding]]


@pytest.fixture(scope="module")
def ceilings(tmp_path_factory: pytest.TempPathFactory) -> Rates:
    return measure(CARD, file=tmp_path_factory.mktemp("ceilings") / "ceilings.json")


@pytest.fixture
def ask(ceilings: Rates) -> Iterator[Ask]:
    """Rule -> what it finds in a call that is warm."""

    @torch.no_grad()
    def found(call: Call) -> dict[str, Finding]:
        call()
        call()
        return by_rule(case(ceilings, call))

    yield found
    torch.cuda.empty_cache()


def case(ceilings: Rates, call: Call | None = None, around: Surroundings | None = None) -> Case:
    call = call or (lambda: torch.zeros(1, device=CARD))
    found = breakdown(call, CARD, ceilings=ceilings, repeats=3)
    phase = PhaseProfile(name="denoise:transformer", times=1, peak_bytes=0, breakdown=found)
    return Case(
        device=Device.detect(CARD), precision="bf16", settings={"guidance": "apart"}, phases=(phase,),
        ceilings=ceilings, surroundings=around or Surroundings(),
    )  # fmt: skip


def by_rule(case: Case) -> dict[str, Finding]:
    return {finding.rule: finding for finding in diagnose(case, RULES)}


def binding(found: dict[str, Finding]) -> list[str]:
    return [name for name, finding in found.items() if finding.binds]


STALLS = {"recompiles", "allocator-thrash", "fallback-attention", "full-precision"}
HALF = {"device": CARD, "dtype": torch.bfloat16}


def matmuls(count: int = 10, side: int = 8192) -> Call:
    a = torch.randn(side, side, **HALF)
    return lambda: [a @ a for _ in range(count)]


def test_matmul_bound(ask: Ask) -> None:
    found = ask(matmuls())
    assert binding(found) == ["matmul-bound"]
    assert set(found) == {"matmul-bound"}
    if torch.cuda.get_device_capability(CARD) >= (8, 9):
        assert found["matmul-bound"].advice[0].do == "products in fp8 or int8"


def test_attention_bound(ask: Ask) -> None:
    q = torch.randn(1, 16, 8192, 128, **HALF)
    found = ask(lambda: [scaled_dot_product_attention(q, q, q) for _ in range(10)])
    assert binding(found) == ["attention-bound"]
    assert not STALLS & set(found)


def test_convolution_bound(ask: Ask) -> None:
    image, conv = torch.randn(1, 256, 8, 128, 128, **HALF), torch.nn.Conv3d(256, 256, 3, padding=1, **HALF)
    found = ask(lambda: [conv(image) for _ in range(10)])
    assert binding(found) == ["convolution-bound"]
    assert not STALLS & set(found)


def test_memory_bound(ask: Ask) -> None:
    a = torch.randn(2**28, **HALF)
    found = ask(lambda: [a.sin_() for _ in range(10)])
    assert binding(found) == ["memory-bound"]
    assert not STALLS & set(found)


def test_transfer_bound_where_nothing_runs_beside_the_copies(ask: Ask) -> None:
    blocks = [torch.randn(4096, 8192, dtype=torch.bfloat16).pin_memory() for _ in range(8)]
    x = torch.randn(256, 4096, **HALF)
    found = ask(lambda: [x @ block.to(CARD, non_blocking=True) for block in blocks])
    assert binding(found) == ["transfer-bound"]
    assert found["transfer-bound"].evidence["share"] > 0.5
    assert found["transfer-bound"].gain_s > 0


def test_copies_beside_the_compute_bind_nothing(ask: Ask) -> None:
    block, a = torch.randn(4096, 4096, dtype=torch.bfloat16).pin_memory(), torch.randn(8192, 8192, **HALF)
    there, side = torch.empty(4096, 4096, **HALF), torch.cuda.Stream()

    def call() -> None:
        for _ in range(5):
            with torch.cuda.stream(side):
                there.copy_(block, non_blocking=True)
            for _ in range(2):
                a @ a
        torch.cuda.synchronize()

    found = ask(call)
    assert binding(found) == ["matmul-bound"]
    assert "transfer-bound" not in found


def test_launch_gaps(ask: Ask) -> None:
    layers = torch.nn.Sequential(*[torch.nn.LayerNorm(64, device=CARD) for _ in range(500)])
    x = torch.randn(1, 64, device=CARD)
    found = ask(lambda: layers(x))
    assert binding(found) == ["launch-gaps"]
    assert {advice.do.partition(":")[0] for advice in found["launch-gaps"].advice} == {
        "CUDA graphs or torch.compile", "--set guidance=together",
    }  # fmt: skip


def test_host_bound(ask: Ask) -> None:
    product = matmuls(1, 4096)

    def call() -> None:
        for _ in range(5):
            product()
            torch.cuda.synchronize()
            time.sleep(0.01)

    found = ask(call)
    assert binding(found) == ["host-bound"]
    assert 0.04 < found["host-bound"].gain_s < 0.08


def test_attention_by_its_parts(ask: Ask) -> None:
    q = torch.randn(1, 8, 4096, 64, **HALF)

    def call() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            scaled_dot_product_attention(q, q, q)

    found = ask(call)["fallback-attention"]
    assert found.evidence["why"] == "parts"
    assert found.gain_s > 0.5 * found.evidence["seconds"]


def test_attention_in_fp32(ask: Ask) -> None:
    q = torch.randn(1, 8, 8192, 64, device=CARD)
    found = ask(lambda: scaled_dot_product_attention(q, q, q))
    assert found["fallback-attention"].evidence["why"] == "kept"  # the case says that the plan is in bf16
    assert found["fallback-attention"].advice[0].tier == "near"


def test_attention_by_the_memory_efficient_kernel(ask: Ask) -> None:
    q, mask = torch.randn(1, 8, 4096, 64, **HALF), torch.zeros(4096, 4096, **HALF)

    def call() -> None:
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            scaled_dot_product_attention(q, q, q, attn_mask=mask)

    assert ask(call)["fallback-attention"].evidence["why"] == "mask"


def test_full_precision(ask: Ask) -> None:
    a = torch.randn(4096, 4096, device=CARD)
    found = ask(lambda: [a @ a for _ in range(5)])
    assert found["full-precision"].gain_s > 0.5 * found["full-precision"].evidence["seconds"]


def test_allocator_thrash(ask: Ask) -> None:
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CARD).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(CARD) + 2**31) / total, CARD)

    def call() -> None:
        torch.cuda.empty_cache()
        for mebibytes in range(1100, 1800, 100):  # each too large for what is cached, and no room for both
            torch.empty(mebibytes * 2**20, dtype=torch.uint8, device=CARD).fill_(1)

    try:
        found = ask(call)["allocator-thrash"]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, CARD)
    assert found.evidence["retries"] >= 1
    assert found.evidence["seconds"] > 0
    assert found.gain_s > 0


OTHER = """
import torch
held, a = torch.empty(4 * 2**30, dtype=torch.uint8, device="cuda:0"), torch.randn(8192, 8192, device="cuda:0")
print("ready", flush=True)
while True:
    a @ a
    torch.cuda.synchronize()
"""


def test_another_process_on_the_card(ceilings: Rates) -> None:
    with Watch(CARD) as alone:
        matmuls()()
    assert "other-process" not in by_rule(case(ceilings, around=alone.seen)), alone.seen
    with subprocess.Popen([sys.executable, "-c", OTHER], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "ready\n"
            with Watch(CARD) as beside:
                matmuls()()
        finally:
            other.kill()
    found = by_rule(case(ceilings, around=beside.seen))["other-process"]
    assert found.evidence["others_bytes"] > 3 * 2**30
    if beside.seen.others_busy is not None:
        assert beside.seen.others_busy > 0.5
        assert found.gain_s > 0


def test_throttling_is_what_the_card_says(ceilings: Rates) -> None:
    if not (card := Smi.find(CARD)) or card.sample() is None:
        pytest.skip("nvidia-smi does not tell this card's clocks")
    with Watch(CARD) as watch:
        product, end = matmuls(), time.perf_counter() + 4
        while time.perf_counter() < end:
            product()
            torch.cuda.synchronize()
    seen = watch.seen
    assert seen.clock is not None
    found = by_rule(case(ceilings, around=seen))
    if seen.clock >= SLOW_CLOCK:
        assert "throttled" not in found
        pytest.skip(f"four seconds of products did not slow this card down: {seen}")
    assert seen.held_down, seen
    assert "throttled" in found


def test_the_command_on_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "made"
    with pytest.raises(SystemExit) as ended:
        main(f"diagnose --size 64x64 --frames 5 --device {CARD} --layers --json -o {made}".split())
    assert ended.value.code == 0
    facts = json.loads(capsys.readouterr().out)
    assert any(finding["binds"] for finding in facts["findings"])
    assert facts["layers"] == []  # nothing differs from the untouched model
