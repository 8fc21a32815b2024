"""Rules asked about runs in which their condition was really induced, and about runs in which it was not.

What only a card shows is induced in tests/gpu/test_diagnose_on_a_card.py; here its rules are asked about such figures.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from framefit.cli import main
from framefit.device import Device
from framefit.errors import BadInput
from framefit.families import Checkpoint
from framefit.families.parts import Parts
from framefit.ledger.kinds import KINDS
from framefit.pipeline import Pipeline
from framefit.plan import Plan
from framefit.profiling import Breakdown, Cost, breakdown, profile
from framefit.profiling.breakdown import Kernel
from framefit.profiling.findings import PARTS, Case, Finding, diagnose, parts, read, tree
from framefit.profiling.layers import Loss, losses
from framefit.profiling.profile import PhaseProfile
from framefit.profiling.rules import RULES
from framefit.profiling.stalls import Stalls
from framefit.profiling.surroundings import Surroundings, Watch, held_down, throttled_s
from framefit.rates import Rates
from framefit.smi import Sample, Smi

ROOT = Path(__file__).parents[1]
RATES = Rates(
    device="a test", torch="any",
    tflops={kind: {"fp32": 0.1, "bf16": 0.01} for kind in ("matmul", "attention", "convolution")},
    memory_gb_per_s=20.0, host_to_device_gb_per_s=None, device_to_host_gb_per_s=None,
)  # fmt: skip
CARD_RATES = replace(
    RATES, tflops={kind: {"fp32": 50.0, "bf16": 750.0} for kind in ("matmul", "attention", "convolution")},
    host_to_device_gb_per_s=50.0, device_to_host_gb_per_s=50.0,
)  # fmt: skip
CPU = Device(
    id="cpu", name="a processor", compute_capability=None, vram_total_bytes=0, vram_free_bytes=0, ram_total_bytes=1,
    ram_free_bytes=1, disk_free_bytes=1,
)  # fmt: skip
HOPPER = replace(CPU, id="cuda:0", name="a card", compute_capability=(9, 0))
Call = Callable[[], object]


def case(*phases: tuple[str, Breakdown], times: int = 1, **facts: Any) -> Case:
    """On a CPU in fp32, unless said otherwise."""
    usual: dict[str, Any] = {
        "device": CPU, "precision": "fp32", "settings": {"guidance": "apart"}, "ceilings": RATES,
        "surroundings": Surroundings(),
    }  # fmt: skip
    seen = tuple(PhaseProfile(name=n, times=times, peak_bytes=0, breakdown=found) for n, found in phases)
    return Case(phases=seen, **(usual | facts))


def ask(about: Case) -> dict[str, Finding]:
    return {finding.rule: finding for finding in diagnose(about, RULES)}


@torch.no_grad()
def asked(call: Call, *, tries: int = 5) -> dict[str, Finding]:
    """About a call that is warm, as a denoising step, where the machine let it run best."""
    call()
    found = min((breakdown(call, "cpu", ceilings=RATES) for _ in range(tries)), key=lambda found: found.wall_s)
    return ask(case(("denoise:transformer", found)))


def binding(found: dict[str, Finding]) -> list[str]:
    return [name for name, finding in found.items() if finding.binds]


def product() -> object:
    a = torch.ones(512, 512)
    return [a @ a for _ in range(5)]


def attention() -> object:
    q = torch.ones(1, 4, 512, 64)
    return [scaled_dot_product_attention(q, q, q) for _ in range(4)]


CONV = torch.nn.Conv2d(32, 32, 3, padding=1)
LAYERS = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Identity(), torch.nn.ReLU()) for _ in range(80)])


def waits() -> object:
    time.sleep(0.05)
    return torch.ones(64, 64) @ torch.ones(64, 64)


@pytest.mark.alone
@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (product, "matmul-bound"),
        (attention, "attention-bound"),
        (lambda: [CONV(torch.ones(1, 32, 96, 96)) for _ in range(4)], "convolution-bound"),
        (lambda: torch.ones(2**21).sin_().cos_().exp_(), "memory-bound"),
        (waits, "host-bound"),
        (lambda: LAYERS(torch.ones(4)), "launch-gaps"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_takes_most_is_named(call: Call, rule: str) -> None:
    found = asked(call)
    assert binding(found) == [rule]
    assert not {"transfer-bound", "recompiles", "allocator-thrash", "fallback-attention"} & set(found)
    assert "full-precision" not in found  # bf16 is slower here


@pytest.mark.alone
def test_a_wait_is_what_it_costs() -> None:
    found = asked(waits)
    assert 0.05 <= found["host-bound"].gain_s < 0.07
    assert "launch-gaps" not in found
    assert "host-bound" not in asked(product)


def by_parts() -> object:
    with sdpa_kernel(SDPBackend.MATH):
        return attention()


def by_hand() -> object:
    q = torch.ones(4, 512, 8)
    return [(q @ q.transpose(1, 2)).softmax(dim=-1) @ q for _ in range(4)]


@pytest.mark.alone
@pytest.mark.parametrize("call", [by_parts, by_hand])
def test_attention_by_its_parts(call: Call) -> None:
    found = asked(call)["fallback-attention"]
    assert found.evidence["why"] == "parts"
    assert [advice.tier for advice in found.advice] == ["exact"]
    assert found.evidence["share"] > 0.05


@pytest.mark.alone
def test_compiling_again() -> None:
    model = torch.compile(lambda x: x.sin() + 1, backend="eager", dynamic=False)
    sizes = itertools.count(3)
    found = asked(lambda: model(torch.ones(next(sizes))), tries=1)["recompiles"]
    assert found.evidence["graphs"] == 1
    assert 0 < found.gain_s <= found.evidence["lost_s"]
    assert "recompiles" not in asked(lambda: model(torch.ones(3)), tries=1)
    torch._dynamo.reset()


def test_a_number_that_changes_with_every_step_compiles_again(
    tiny: Callable[[str], Checkpoint], make_plan: Callable[..., Plan], load_fp32: Callable[[Checkpoint], Parts],
    tmp_path: Path,
) -> None:  # fmt: skip
    """Although the same steps would not: no way through the phases repeats the steps of the one before it."""
    row = tiny("i2vgen-xl")
    pipeline = Pipeline(make_plan(row, steps=4), load_fp32(row))
    scaled = torch.compile(lambda x, t: x * t, backend="eager", dynamic=False)

    def hook(module: object, args: Any, kwargs: dict[str, Any]) -> None:
        clock = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        scaled(torch.ones(2), int(clock.flatten()[0]))

    pipeline.parts["unet"].register_forward_pre_hook(hook, with_kwargs=True)
    found = diagnose(Case.of(profile(pipeline, tmp_path, RATES, steps=1)), RULES)
    assert [finding.phases for finding in found if finding.rule == "recompiles"] == [("denoise:unet",)]
    torch._dynamo.reset()


@pytest.mark.alone
def test_other_programs_on_the_processor() -> None:
    with Watch("cpu") as before:
        time.sleep(0.3)
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        time.sleep(0.1)
        with Watch("cpu") as beside:
            time.sleep(0.3)
    finally:
        for each in spinning:
            each.kill()
            each.wait()
    assert before.seen.others_cpu is not None
    assert beside.seen.others_cpu is not None
    assert beside.seen.others_cpu > 0.7
    assert beside.seen.others_cpu >= before.seen.others_cpu
    call = breakdown(product, "cpu", ceilings=RATES)
    found = ask(case(("decode", call), surroundings=beside.seen))["other-process"]
    assert found.gain_s == pytest.approx(call.plain_s * beside.seen.others_cpu)
    own = Watch("cpu")
    with own:
        began = time.perf_counter()
        while time.perf_counter() < began + 0.3:
            pass
    assert own.seen.others_cpu is not None
    assert own.seen.others_cpu <= beside.seen.others_cpu  # what we do ourselves is not theirs


QUOTA = """
import json, os, sys, time
from pathlib import Path
import torch
from framefit.profiling.surroundings import Watch
torch.set_num_threads(1)
Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
with Watch("cpu") as watch:
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
print(json.dumps(watch.seen.to_json()), flush=True)
os._exit(0)  # to tidy up under the quota takes ten seconds
"""


@pytest.mark.alone
def test_a_quota_of_the_processor() -> None:
    group = Path("/sys/fs/cgroup/cpu/framefit-test")
    try:
        group.mkdir()
        (group / "cpu.cfs_quota_us").write_text("20000")  # of 100000
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        told = subprocess.run([sys.executable, "-c", QUOTA, str(group)], capture_output=True, text=True, check=True)
    finally:
        group.rmdir()
    seen = Surroundings.from_json(json.loads(told.stdout))
    assert 0.4 < seen.throttled <= 1
    call = breakdown(product, "cpu", ceilings=RATES)
    found = ask(case(("decode", call), surroundings=seen))["throttled"]
    assert [advice.do for advice in found.advice] == ["give the container more of the processor"]
    with Watch("cpu") as free:
        product()
    assert "throttled" not in ask(case(("decode", call), surroundings=free.seen))


def test_quotas_of_both_kinds_of_control_groups(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "cpu.stat").write_text("usage_usec 5\nnr_throttled 3\nthrottled_usec 1500000\n")
    own.write_text("0::/mine\n")
    assert throttled_s(tmp_path, own) == 1.5
    (tmp_path / "cpu,cpuacct").mkdir()
    (tmp_path / "cpu,cpuacct" / "cpu.stat").write_text("nr_throttled 3\nthrottled_time 2500000000\n")
    own.write_text("4:memory:/a\n1:cpu,cpuacct:/docker/of/the/host\n")
    assert throttled_s(tmp_path, own) == 2.5
    assert throttled_s(tmp_path / "none", own) == 0
    assert throttled_s(tmp_path, tmp_path / "none") == 0


def test_decoding_that_takes_longest() -> None:
    call, other = breakdown(product, "cpu", ceilings=RATES), breakdown(waits, "cpu", ceilings=RATES)
    found = ask(case(("denoise:transformer", call), ("decode", other)))["decode-bound"]
    assert found.evidence["share"] == pytest.approx(other.plain_s / (call.plain_s + other.plain_s))
    assert "decode-bound" not in ask(case(("denoise:transformer", other), ("decode", replace(call, plain_s=0.01))))
    assert "decode-bound" not in ask(case(("decode", other)))  # nothing else was measured


def call_of(wall_s: float = 1.0, kernels: tuple[Kernel, ...] = (), **facts: Any) -> Breakdown:
    """A second of a card's work, as figures: seconds by kind, "idle" and "gaps"."""
    kinds = {kind: facts.pop(kind, Cost()) for kind in KINDS}
    kinds = {kind: cost if isinstance(cost, Cost) else Cost(seconds=cost) for kind, cost in kinds.items()}
    usual: dict[str, Any] = {"idle_s": 0.0, "plain_s": wall_s, "transfer_alone_s": kinds["transfer"].seconds}
    return Breakdown(device="cuda:0", wall_s=wall_s, kinds=kinds, transfers={}, kernels=kernels, **(usual | facts))


def on_card(call: Breakdown, **facts: Any) -> dict[str, Finding]:
    usual = {"device": HOPPER, "precision": "bf16", "ceilings": CARD_RATES}
    return ask(case(("denoise:transformer", call), **(usual | facts)))


def test_no_mix_of_work_goes_without_an_answer() -> None:
    steps, binds = 8, set()
    for shares in itertools.product(range(steps + 1), repeat=len(PARTS) - 1):
        if (rest := steps - sum(shares)) < 0:
            continue
        part = dict(zip(PARTS, (share / steps for share in (*shares, rest)), strict=True))
        idle_s = part["gaps"] + part["host"]
        call = call_of(**{kind: part[kind] for kind in KINDS}, idle_s=idle_s, gaps_s=part["gaps"])
        assert parts(call) == pytest.approx(part)
        bound = binding(on_card(call))
        assert len(bound) == 1, part
        found = next(rule for rule in RULES if rule.name == bound[0])
        assert found.part is not None
        assert part[found.part] == max(part.values())
        binds.add(bound[0])
    assert binds == {rule.name for rule in RULES if rule.part}


def test_every_rule_helps_in_every_state_it_can_name() -> None:
    """Whatever binds, there is something to do about it, with a gain."""
    for part in KINDS:
        found = on_card(call_of(**{part: Cost(seconds=1.0, flops=7e14, ceiling_s=0.99, precision="bf16")}))
        bound = found[binding(found)[0]]
        assert bound.gain_s > 0
        assert bound.advice


def test_copies_count_where_nothing_hides_them() -> None:
    copies = Cost(seconds=0.5, bytes=10e9, ceiling_s=0.2)
    found = on_card(call_of(transfer=copies, matmul=0.5))["transfer-bound"]
    assert [advice.gain_s for advice in found.advice] == pytest.approx([0.5, 0.5])  # either hides or spares them
    longer = on_card(call_of(transfer=replace(copies, seconds=0.9, ceiling_s=0.8), matmul=0.1))["transfer-bound"]
    assert [advice.gain_s for advice in longer.advice] == pytest.approx([0.9, 0.2])  # 0.8 s cannot hide behind 0.1
    assert "transfer-bound" not in on_card(call_of(transfer=copies, matmul=1.0, transfer_alone_s=0.0))


def test_a_thrashing_allocator() -> None:
    call = call_of(matmul=0.5, idle_s=0.5, allocating_s=0.4, stalls=Stalls(retries=7))
    found = on_card(call)["allocator-thrash"]
    assert found.gain_s == 0.4
    assert len(on_card(call, settings={"guidance": "together"})["allocator-thrash"].advice) == 2
    assert "allocator-thrash" in on_card(replace(call, stalls=Stalls()))
    assert "allocator-thrash" not in on_card(replace(call, stalls=Stalls(), allocating_s=0.001))


FLASH = "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, false>>(Params)"
EFFICIENT = "fmha_cutlassF_{}_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel::Params)"


def attends(precision: str, *names: str) -> Breakdown:
    kernels = tuple(Kernel(name=name, kind="attention", seconds=1 / len(names), launches=1) for name in names)
    return call_of(attention=Cost(seconds=1.0, flops=25e12, ceiling_s=0.5, precision=precision), kernels=kernels)


def test_a_card_s_slow_kernels_of_attention() -> None:
    full = on_card(attends("fp32", EFFICIENT.format("f32")), precision="fp32")["fallback-attention"]
    assert (full.evidence["why"], full.advice[0].tier) == ("fp32", "near")
    assert full.gain_s == pytest.approx(1 - 25 / 750)
    kept = on_card(attends("fp32", EFFICIENT.format("f32")))["fallback-attention"]
    assert "kept in fp32" in kept.advice[0].do
    masked = on_card(attends("bf16", EFFICIENT.format("bf16")))["fallback-attention"]
    assert (masked.evidence["why"], masked.advice[0].tier) == ("mask", "exact")
    parted = on_card(attends("bf16", "nvjet_tst_128x256", "void softmax_warp_forward<float>", "nvjet_tst_64x8"))
    assert parted["fallback-attention"].evidence["why"] == "parts"
    assert "fallback-attention" not in on_card(attends("bf16", FLASH, "void at::native::elementwise_kernel<128, 4>"))


def test_attention_at_its_ceiling_has_advice_by_card() -> None:
    call = attends("bf16", FLASH)
    at_best = replace(call, kinds=call.kinds | {"attention": replace(call.kinds["attention"], ceiling_s=1.0)})
    tiers = [(advice.tier, advice.gain_s) for advice in on_card(at_best)["attention-bound"].advice]
    assert tiers == [("near", 0.25), ("exact", 0.16), (None, 0.1)]
    ampere = replace(HOPPER, compute_capability=(8, 0))
    assert len(on_card(at_best, device=ampere)["attention-bound"].advice) == 2


def test_full_precision_where_half_is_faster() -> None:
    call = call_of(convolution=Cost(seconds=1.0, flops=50e12, ceiling_s=1.0, precision="fp32"))
    found = on_card(call)["full-precision"]
    assert found.gain_s == pytest.approx(1 - 50 / 750)
    assert "kept in fp32" in found.advice[0].do
    assert "--precision" in on_card(call, precision="fp32")["full-precision"].advice[0].do
    assert "full-precision" not in on_card(call, ceilings=RATES)


def test_another_program_on_the_card() -> None:
    call = call_of(matmul=1.0)
    found = on_card(call, surroundings=Surroundings(others_bytes=5 * 2**30, others_busy=1.0))["other-process"]
    assert found.gain_s == 0.5
    assert "5.0 GiB" in found.because
    assert "other-process" in on_card(call, surroundings=Surroundings(others_bytes=5 * 2**30))
    quiet = Surroundings(others_bytes=2**20, others_busy=0.0, others_cpu=0.9)
    assert "other-process" not in on_card(call, surroundings=quiet)


NVIDIA_SMI = """#!/bin/sh
case "$*" in
*clocks_event_reasons*) echo 'Field "clocks_event_reasons.active" is not a valid field to query.'; exit 2;;
*clocks_throttle_reasons*) echo '1290, 1980, 0x0000000000000044';;
*utilization*) echo '37';;
*) exit 1;;
esac
"""


def test_a_card_that_holds_its_clocks_down(tmp_path: Path) -> None:
    """By an imitation of nvidia-smi of an older driver: there is no card to heat here."""
    program = tmp_path / "nvidia-smi"
    program.write_text(NVIDIA_SMI)
    program.chmod(0o755)
    card = Smi(str(program), "GPU-0")
    assert card.utilisation() == 0.37
    sample = card.sample()
    assert sample == Sample(clock=pytest.approx(1290 / 1980), reasons=0x44)
    assert sample is not None
    seen = Surroundings(**held_down([sample, sample, Sample(clock=0.1, reasons=1)]))
    assert seen.held_down == ("power cap", "heat, by the card")
    call = call_of(matmul=1.0)
    found = on_card(call, surroundings=seen)["throttled"]
    assert found.gain_s == pytest.approx(1 - 1290 / 1980)
    for free in (replace(seen, clock=0.97), replace(seen, held_down=())):
        assert "throttled" not in on_card(call, surroundings=free)
    assert held_down([Sample(clock=0.1, reasons=1)]) == {}
    program.write_text("#!/bin/sh\necho '[N/A], [N/A], [N/A]'\n")
    assert card.sample() is None
    assert Smi(str(tmp_path / "none"), "GPU-0").utilisation() is None


def test_short_phases_are_left_alone_and_gains_are_of_a_run() -> None:
    long, short = call_of(matmul=1.0), call_of(0.1, elementwise=0.1)
    found = diagnose(case(("denoise:transformer", long), ("decode", short), times=4, device=HOPPER), RULES)
    assert {finding.phases for finding in found} - {()} == {("denoise:transformer",), ("decode",)}
    assert found[0].gain_s == max(finding.gain_s for finding in found)
    assert max(advice.gain_s for advice in found[-1].advice) == found[-1].gain_s
    bound = next(finding for finding in found if finding.phases == ("decode",))
    assert bound.gain_s == pytest.approx(4 * 0.05)
    alone = diagnose(case(("denoise:transformer", long), ("decode", call_of(0.01, elementwise=0.01))), RULES)
    assert {finding.phases for finding in alone} - {()} == {("denoise:transformer",)}


def test_one_finding_of_two_experts() -> None:
    call = call_of(matmul=Cost(seconds=1.0, precision="bf16"))
    experts = [("denoise:transformer", call), ("denoise:transformer_2", replace(call, plain_s=0.5))]
    found = ask(case(*experts, times=10, device=HOPPER, precision="bf16"))["matmul-bound"]
    assert found.phases == ("denoise:transformer", "denoise:transformer_2")
    assert found.gain_s == pytest.approx(2 * 10 * 0.44)


@pytest.fixture
def pipelines(
    tiny: Callable[[str], Checkpoint], make_plan: Callable[..., Plan], load_fp32: Callable[[Checkpoint], Parts]
) -> Any:
    """Of a plan, and an untouched one."""
    row = tiny("wan2.2-i2v-a14b")
    return [Pipeline(make_plan(row, steps=4), load_fp32(row)) for _ in range(2)]


@torch.no_grad()
@pytest.mark.parametrize("layer", ["blocks.1.ffn.net.2", "blocks.0.attn1.to_v", "patch_embedding"])
def test_a_loss_is_traced_to_the_layer_that_was_damaged(pipelines: Any, layer: str) -> None:
    plan, untouched = pipelines
    weight = plan.parts["transformer"].get_submodule(layer).weight
    weight.copy_(weight.clamp(-0.05, 0.05).to(torch.float8_e4m3fn).float())
    found = losses(plan, plan.encode(), untouched.parts.__getitem__)
    assert found[0].layer == f"transformer.{layer}"
    assert found[0].share > 0.99
    assert {loss.layer for loss in found} == {f"transformer.{layer}"}  # the other expert, and all else, is as it was
    advice = ask(case(("decode", call_of(matmul=1.0)), losses=tuple(found)))["quality-loss"]
    assert layer in advice.because


def test_nothing_is_lost_where_nothing_differs(pipelines: Any) -> None:
    plan, untouched = pipelines
    assert losses(plan, plan.encode(), untouched.parts.__getitem__) == []
    small = Loss(layer="a", added=0.01, whole=0.01, share=1.0)
    assert "quality-loss" not in ask(case(("decode", call_of(matmul=1.0)), losses=(small,)))
    assert not plan.parts["transformer"]._forward_hooks


def test_half_precision_loses_a_little_everywhere(pipelines: Any) -> None:
    plan, untouched = pipelines
    plan.parts["transformer"].to(torch.bfloat16)
    found = losses(plan, plan.encode(), untouched.parts.__getitem__)
    assert all(0 < loss.added < 0.05 for loss in found)
    assert len(found) > 2


def test_a_profile_is_read_back(
    tiny: Callable[[str], Checkpoint], make_plan: Callable[..., Plan], load_fp32: Callable[[Checkpoint], Parts],
    tmp_path: Path,
) -> None:  # fmt: skip
    row = tiny("wan2.2-i2v-a14b")
    seen = profile(Pipeline(make_plan(row, steps=4), load_fp32(row)), tmp_path, RATES, steps=1)
    for where in (tmp_path, tmp_path / "profile.json"):
        again = read(where)
        told = [(f.rule, f.phases, f.binds) for f in diagnose(again, RULES)]
        assert told == [(f.rule, f.phases, f.binds) for f in diagnose(Case.of(seen), RULES)]
    phases = {phase.name for phase in seen.phases if phase.times * phase.breakdown.plain_s > 0.05 * seen.run_s}
    assert {phase for _, named, binds in told if binds for phase in named} == phases
    (tmp_path / "profile.json").write_text("{}")
    with pytest.raises(BadInput, match="is no profile of this framefit"):
        read(tmp_path)


def test_the_command(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("framefit.profiling.ceilings.BUDGET_S", 0.0)
    small = ["--size", "64x64", "--frames", "5", "--steps", "4", "--profile-steps", "1", "--device", "cpu"]

    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["diagnose", *arguments])
        assert ended.value.code == 0
        return capsys.readouterr().out

    folder = str(tmp_path / "made")
    facts = json.loads(said(*small, "--precision", "bf16", "--layers", "-o", folder, "--json"))
    differs = facts.pop("layers")
    assert all(0 < layer["added"] <= 0.1 and layer["layer"].startswith("transformer") for layer in differs)
    assert len(differs) == 5
    assert facts["findings"]
    gains = [finding["gain_s"] for finding in facts["findings"]]
    assert gains == sorted(gains, reverse=True)
    assert json.loads(said("--from", folder, "--json")) == facts | {"layers": []}
    text = said("--from", folder)
    assert all(finding["rule"] in text for finding in facts["findings"])
    for more in ("--layers", "--steps=4", "--device=cpu"):
        with pytest.raises(SystemExit) as refused:
            main(["diagnose", "--from", folder, more])
        assert refused.value.code == 2


def test_the_docs_show_the_tree_of_the_rules() -> None:
    page = (ROOT / "docs" / "diagnose.md").read_text(encoding="utf-8")
    assert f"```mermaid\n{tree(RULES)}```\n" in page
