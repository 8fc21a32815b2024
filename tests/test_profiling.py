"""Profiles: what is which kind of work, FLOPs that are known, pictures that can be read, and the command."""

from __future__ import annotations

import gzip
import json
import logging
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.profiler_util import EventList, FunctionEvent
from torch.profiler import DeviceType

from framefit.cli import main
from framefit.errors import BadOutput
from framefit.families import Checkpoint
from framefit.families.parts import Parts
from framefit.ledger import StepLog, read_memory
from framefit.ledger.counts import Counts, Tally, count
from framefit.ledger.kinds import direction, kernel_kind, kind_of, op_kind
from framefit.pipeline import Pipeline
from framefit.plan import Plan
from framefit.profiling import breakdown, flame, measure, profile
from framefit.profiling.breakdown import summarise
from framefit.profiling.modules import named
from framefit.profiling.profile import check_folder
from framefit.profiling.trace import Work, busy_s, record, works
from framefit.rates import Rates

FLAT = Rates(
    device="a test", torch="any",
    tflops={kind: {"fp32": 1.0} for kind in ("matmul", "attention", "convolution")},
    memory_gb_per_s=10.0, host_to_device_gb_per_s=20.0, device_to_host_gb_per_s=5.0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopB_TNT", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_execute_kernel__5x_cublas", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x128_32x4_tn_align8>", "matmul"),
        ("ampere_sgemm_128x64_tn", "matmul"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, 128, 16>", "matmul"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>(cublasSplitKParams)", "matmul"),
        ("triton_tem_fused_addmm_gelu_3", "matmul"),
        ("triton_mm", "matmul"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, false>>(Params)", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel::Params)", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0", "attention"),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90<flash::CollectiveMainloopFwdSm90<2>>>", "attention"),
        ("triton_tem_fused_flex_attention_0", "attention"),
        ("qk_int8_sv_f16_accum_f32_attn_inst_buf_kernel", "attention"),
        ("sm80_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x32", "convolution"),
        ("void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_128x128>", "convolution"),
        ("void cudnn::winograd_nonfused::winogradForwardFilter4x4<float, float>", "convolution"),
        ("void implicit_convolve_sgemm<float, float, 1024, 5, 5, 3, 3, 3, 1>(int, int, int)", "convolution"),
        ("void cudnn::engines_precompiled::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float>", "convolution"),
        ("void at::native::vol2col_kernel<float>(long, float const*, int, int, int)", "convolution"),
        ("void at::native::(anonymous namespace)::conv_depthwise2d_forward_kernel<3, float, int>", "convolution"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_add_5", "elementwise"),
        ("triton_red_fused_native_layer_norm_convolution_mm_1", "elementwise"),
        ("triton_per_fused_mean_0", "elementwise"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "elementwise"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda(TensorIteratorBase&)>", "elementwise"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float, false>", "elementwise"),
        ("void (anonymous namespace)::softmax_warp_forward<float, float, float, 8, false, false>", "elementwise"),
        ("void cudnn::bn_fw_inf_1C11_kernel_NCHW<float, float, true, 1>", "elementwise"),
        ("Memcpy DtoD (Device -> Device)", "elementwise"),
        ("Memset (Device)", "elementwise"),
        ("Memcpy HtoD (Pinned -> Device)", "transfer"),
        ("Memcpy DtoH (Device -> Pageable)", "transfer"),
        ("Memcpy PtoP (Device -> Device)", "transfer"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "transfer"),
    ],
)  # fmt: skip
def test_kernels_are_known_by_name(name: str, kind: str) -> None:
    assert kernel_kind(name) == kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::scaled_dot_product_attention", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::_flash_attention_forward", "attention"),
        ("flash_attn::_flash_attn_forward", "attention"),
        ("aten::conv3d", "convolution"),
        ("aten::_convolution", "convolution"),
        ("aten::mkldnn_convolution", "convolution"),
        ("aten::slow_conv3d_forward", "convolution"),
        ("aten::conv_transpose2d", "convolution"),
        ("aten::linear", "matmul"),
        ("aten::addmm", "matmul"),
        ("aten::bmm", "matmul"),
        ("aten::baddbmm", "matmul"),
        ("aten::_scaled_mm", "matmul"),
        ("aten::_int_mm", "matmul"),
        ("aten::add", None),
        ("aten::convert_element_type", None),
        ("aten::native_layer_norm", None),
        ("triton_poi_fused__scaled_dot_product_flash_attention_add_5", None),
    ],
)
def test_operators_are_known_by_name(name: str, kind: str | None) -> None:
    assert op_kind(name) == kind


def test_the_outermost_operator_decides_before_the_kernel() -> None:
    assert kind_of(["aten::scaled_dot_product_attention", "aten::bmm"], "ampere_sgemm_128x64_tn") == "attention"
    assert kind_of(["aten::conv2d", "aten::copy_"], "void at::native::elementwise_kernel<128, 4>") == "convolution"
    assert kind_of(["aten::to", "aten::copy_"], "Memcpy HtoD (Pinned -> Device)") == "transfer"
    assert kind_of([], "nvjet_tst_64x8") == "matmul"
    assert kind_of(["aten::add"]) == "elementwise"
    assert direction("Memcpy DtoH (Device -> Pinned)") == "device_to_host"


class Mixture(torch.nn.Module):
    """Known work: 2 * 256^3 * 40 FLOPs of products, one attention, one convolution, and sleep."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.randn(256, 256)
        self.q = torch.randn(1, 2, 128, 32)
        self.image, self.conv = torch.randn(1, 8, 32, 32), torch.nn.Conv2d(8, 16, 3)

        self.took: list[dict[str, float]] = []

    @torch.no_grad()
    def forward(self) -> None:
        parts: dict[str, Callable[[], object]] = {
            "matmul": lambda: [self.a @ self.a for _ in range(40)],
            "elementwise": lambda: [self.a.sin() for _ in range(40)],
            "attention": lambda: torch.nn.functional.scaled_dot_product_attention(self.q, self.q, self.q),
            "convolution": lambda: self.conv(self.image),
            "idle": lambda: time.sleep(0.05),
        }
        self.took.append({})
        for name, part in parts.items():
            began = time.perf_counter()
            part()
            self.took[-1][name] = time.perf_counter() - began


def test_a_call_of_known_composition_comes_apart_as_it_was_made() -> None:
    mixture = Mixture()
    mixture()
    found = breakdown(mixture, "cpu", ceilings=FLAT)
    kinds, took = found.kinds, mixture.took[2]  # warm, plain, profiled, counted
    for kind in ("matmul", "elementwise"):  # a busy machine takes its time between operators, too
        assert 0.3 * took[kind] < kinds[kind].seconds < 1.05 * took[kind]
    assert 0.05 <= found.idle_s == pytest.approx(found.wall_s - sum(cost.seconds for cost in kinds.values()), rel=0.01)
    assert found.wall_s == pytest.approx(sum(took.values()), rel=0.2)
    assert found.plain_s == pytest.approx(sum(mixture.took[1].values()), rel=0.2)
    assert kinds["matmul"].flops == 40 * 2 * 256**3
    assert kinds["attention"].flops == 4 * 2 * 128 * 128 * 32
    assert kinds["convolution"].flops == 2 * 30 * 30 * 9 * 8 * 16
    assert kinds["elementwise"].bytes == 40 * 2 * 256 * 256 * 4
    assert kinds["matmul"].of_ceiling == pytest.approx(kinds["matmul"].tflops / 1.0)
    assert kinds["elementwise"].of_ceiling == pytest.approx(kinds["elementwise"].gb_per_s / 10.0)
    assert kinds["transfer"].seconds == 0
    assert found.launches == 40 + 40 + 1 + 1
    names = {kernel.name: kernel.launches for kernel in found.kernels}
    assert names["aten::mm"] == names["aten::sin"] == 40


def test_figures_are_for_one_call() -> None:
    a = torch.randn(64, 64)
    once, thrice = breakdown(lambda: a @ a, "cpu"), breakdown(lambda: a @ a, "cpu", repeats=3)
    assert once.launches == thrice.launches == 1
    assert once.flops == thrice.flops == 2 * 64**3
    assert once.kinds["matmul"].of_ceiling is None
    shares = thrice.to_json()["kinds"]
    assert shares["matmul"]["share"] == pytest.approx(thrice.kinds["matmul"].seconds / thrice.wall_s, rel=1e-5)


def counted(call: Callable[[], object]) -> Counts:
    tally = Tally()
    with tally.phase("one"):
        count(call, tally)
    return tally.phases["one"]


@torch.no_grad()
def test_bytes_are_what_has_to_be_read_and_written() -> None:
    a = torch.ones(100, 100)
    size = a.nbytes
    assert counted(lambda: a.t().view(100, 100)[1:]).bytes["elementwise"] == 0
    assert counted(partial(torch.empty, 100, 100)).bytes["elementwise"] == 0
    assert counted(lambda: a.add_(1)).bytes["elementwise"] == 2 * size
    assert counted(a.zero_).bytes["elementwise"] == size
    assert counted(lambda: a[:1].expand(100, 100) + a).bytes["elementwise"] == 3 * size  # a slice shares its storage
    assert counted(a.sum).bytes["elementwise"] == size + 4


@torch.no_grad()
def test_precisions_are_counted_apart() -> None:
    a, b = torch.ones(8, 8), torch.ones(8, 8, dtype=torch.bfloat16)
    flops = counted(lambda: (a @ a, b @ b, b @ b)).flops
    assert flops == Counter({("matmul", "fp32"): 1024, ("matmul", "bf16"): 2048})
    assert FLAT.seconds("matmul", Counts(flops=flops)) is None  # bf16 was not measured
    assert FLAT.seconds("matmul", Counts(flops=Counter({("matmul", "fp32"): 2e12}))) == 2.0


def test_attention_by_its_parts_is_attention() -> None:
    q = torch.randn(1, 2, 16, 8)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found = breakdown(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q), "cpu")
    assert found.kinds["attention"].flops == 4 * 2 * 16 * 16 * 8
    assert found.kinds["matmul"].seconds == found.kinds["matmul"].flops == 0


def test_composites_are_counted_in_inference_mode() -> None:
    layer, x = torch.nn.Linear(8, 4), torch.randn(2, 8)
    with torch.inference_mode():
        assert counted(lambda: layer(x)).flops["matmul", "fp32"] == 2 * 2 * 8 * 4


def event(name: str, start: float, end: float, id: int = 0, **facts: Any) -> FunctionEvent:
    return FunctionEvent(id=id, name=name, thread=1, start_us=start, end_us=end, use_device="cuda", **facts)


def card_events() -> list[FunctionEvent]:
    """A step on a card as torch.profiler gives it: a kernel has the id of its runtime call, operators have others."""
    card = {"device_type": DeviceType.CUDA}
    events = EventList(
        [
            event("phase:denoise", 0, 100, 1, is_user_annotation=True),
            event("module:attn1 Attention", 1, 40, 2, is_user_annotation=True),
            event("aten::linear", 2, 20, 3),
            event("aten::addmm", 3, 19, 4),
            event("cudaLaunchKernel", 5, 8, 10),
            event("aten::scaled_dot_product_attention", 21, 39, 11),  # an operator may have a kernel's id
            event("cudaLaunchKernelExC", 25, 28, 12),
            event("aten::copy_", 41, 50, 13),
            event("cudaMemcpyAsync", 42, 49, 14),
            event("triton_poi_fused__scaled_dot_product_flash_attention_add_5", 51, 60, 15),
            event("cuLaunchKernel", 52, 53, 16),
            event("nvjet_tst_128x256", 10, 40, 10, **card),
            event("void pytorch_flash::flash_fwd_kernel", 40, 60, 12, **card),
            event("Memcpy HtoD (Pinned -> Device)", 50, 70, 14, **card),
            event("triton_poi_fused__scaled_dot_product_flash_attention_add_5", 80, 90, 16, **card),
            event("nvjet_tst_64x8_launched_elsewhere", 92, 94, 99, **card),
            event("phase:denoise", 10, 90, 1, **card),
            event("Stream Sync", 90, 100, 17, **card),
        ],
        use_device="cuda",
    )
    events._build_tree()
    return list(events)


def test_kernels_are_led_back_to_their_operators() -> None:
    pieces = list(works(card_events(), card=True))
    assert [(piece.kind, piece.phase, piece.path) for piece in pieces] == [
        ("matmul", "denoise", ("attn1 Attention",)),
        ("attention", "denoise", ("attn1 Attention",)),
        ("transfer", "denoise", ()),
        ("elementwise", "denoise", ()),
        ("matmul", "denoise", ()),
    ]
    assert busy_s(pieces) == pytest.approx(72e-6)  # 10 to 70, 80 to 90, 92 to 94; the copy overlaps the attention


def test_a_card_is_idle_where_no_stream_works() -> None:
    counts = Counts(flops=Counter({("matmul", "fp32"): 32 * 10**6}), bytes=Counter({"host_to_device": 200_000}))
    pieces = list(works(card_events(), card=True))
    found = summarise(pieces, counts, "cuda:0", wall_s=100e-6, plain_s=90e-6, ceilings=FLAT)
    assert found.idle_s == pytest.approx(28e-6)
    assert found.launches == 4  # a copy is no launch
    assert found.kinds["matmul"].tflops == pytest.approx(1.0)
    assert found.kinds["matmul"].of_ceiling == pytest.approx(1.0)
    copied = found.transfers["host_to_device"]
    assert (copied.gb_per_s, copied.of_ceiling) == (pytest.approx(10.0), pytest.approx(0.5))
    assert found.kernels[0].name == "nvjet_tst_128x256"


def test_modules_are_named_while_asked_for_only() -> None:
    block = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([block, block])})
    with named({"model": model, "scheduler": object()}):
        trace = record(lambda: [layer(torch.ones(1, 4)) for layer in model["blocks"]], "cpu")
    assert {work.path for work in trace.works if work.name == "aten::addmm"} == {
        ("model.blocks.* Sequential", "* Linear")
    }
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def work(name: str, kind: Any, seconds: float, *path: str, phase: str = "decode") -> Work:
    return Work(
        name=name, kind=kind, phase=phase, path=path, start_s=0, end_s=seconds, seconds=seconds, launched=True
    )  # fmt: skip


def test_the_flame_graph_adds_up() -> None:
    pieces = [
        work("aten::<mm>", "matmul", 2.0, "vae & co", "up_blocks.* Block"),
        work("aten::<mm>", "matmul", 1.0, "vae & co", "up_blocks.* Block"),
        work("aten::conv3d", "convolution", 5.0, "vae & co"),
        work("aten::add", "elementwise", 0.5, phase=""),
    ]
    top = flame.tree(pieces)
    assert top.seconds == 8.5
    assert list(top.children) == ["decode", "between phases"]
    assert top.children["decode"].children["vae & co"].children["up_blocks.* Block"].seconds == 3.0
    root = ElementTree.fromstring(flame.svg(top, "a < b"))
    boxes = list(root.iter("{http://www.w3.org/2000/svg}g"))
    widths = {box[0].text.splitlines()[0]: float(box[1].attrib["width"]) for box in boxes}  # type: ignore[union-attr]
    assert float(boxes[0].attrib["data-seconds"]) == 8.5
    assert widths["all phases"] == pytest.approx(widths["decode"] + widths["between phases"], abs=0.02)
    assert widths["decode"] / widths["all phases"] == pytest.approx(8 / 8.5, rel=1e-3)
    assert "aten::<mm>" in widths


def quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("framefit.profiling.ceilings.BUDGET_S", 0.0)
    monkeypatch.setattr("framefit.profiling.ceilings.PRECISIONS", {"fp32": torch.float32})
    monkeypatch.setattr("framefit.profiling.sized.PRECISIONS", {"fp32": torch.float32})
    monkeypatch.setattr("framefit.profiling.sized.HOLD_S", 0.0)


def test_ceilings_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick_ceilings(monkeypatch)
    file = tmp_path / "state" / "rates.json"
    first = measure("cpu", file=file)
    assert min(rate for rates in first.tflops.values() for rate in rates.values()) > 0
    assert first.memory_gb_per_s > 0
    assert first.host_to_device_gb_per_s is None
    assert measure("cpu", file=file) == first
    assert measure("cpu", file=file, fresh=True) != first
    file.write_text("{")
    assert measure("cpu", file=file).device == first.device


def test_every_expert_is_watched_even_with_one_step(
    tiny: Callable[[str], Checkpoint], make_plan: Callable[..., Plan], load_fp32: Callable[[Checkpoint], Parts],
    tmp_path: Path,
) -> None:  # fmt: skip
    row = tiny("wan2.2-i2v-a14b")
    pipeline = Pipeline(make_plan(row, steps=1, guidance=(1.0, 1.0)), load_fp32(row))
    found = profile(pipeline, tmp_path, FLAT, steps=1)
    phases = {phase.name: phase for phase in found.phases}
    assert list(phases) == ["encode_text", "encode_image", "denoise:transformer", "denoise:transformer_2", "decode"]
    assert phases["denoise:transformer"].times == 1
    assert phases["denoise:transformer_2"].times == 0  # the one step of the request is the first expert's
    one, two = (phases[name].breakdown for name in ("denoise:transformer", "denoise:transformer_2"))
    assert one.flops == two.flops > 0
    assert phases["decode"].breakdown.kinds["convolution"].flops > 0


def test_profile_writes_its_files(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    quick_ceilings(monkeypatch)
    folder = tmp_path / "made" / "profile"
    small = ["--size", "64x64", "--frames", "5", "--steps", "4", "--profile-steps", "1", "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        main(["profile", *small, "-o", str(folder), "--json"])
    assert ended.value.code == 0
    facts = json.loads(capsys.readouterr().out)
    assert sorted(path.name for path in folder.iterdir()) == [
        "flame.svg",
        "memory.png",
        "profile.json",
        "trace.json.gz",
    ]
    assert json.loads((folder / "profile.json").read_text()) == facts
    experts = [phase["times"] for phase in facts["phases"] if phase["name"].startswith("denoise:")]
    assert sum(experts) == 4
    for phase in facts["phases"]:
        found = phase["breakdown"]
        assert phase["peak_bytes"] > 0
        assert found["wall_s"] >= found["idle_s"] > 0
        assert sum(kind["share"] for kind in found["kinds"].values()) <= 1.001
    with gzip.open(folder / "trace.json.gz", "rt") as file:
        names = {event["name"] for event in json.load(file)["traceEvents"]}
    assert {"phase:encode_text", "phase:decode", "aten::addmm", "[memory]"} <= names
    ElementTree.fromstring((folder / "flame.svg").read_text())
    assert (folder / "memory.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit) as refused:
        main(["profile", *small, "-o", str(folder)])
    assert refused.value.code == 3
    assert "--overwrite" in capsys.readouterr().err


def test_a_profile_needs_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadOutput, match="is not empty"):
        check_folder(tmp_path, overwrite=False)
    check_folder(tmp_path, overwrite=True)
    for name in ("file", "file/below"):
        with pytest.raises(BadOutput):
            check_folder(tmp_path / name, overwrite=True)


def test_a_line_every_few_steps(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "framefit")
    log, silent = StepLog("cpu", 3), StepLog("cpu", 0)
    for index in range(1, 8):
        log(index, 7, 0.5 * index)
        silent(index, 7, 1.0)
    assert [record.getMessage().partition(" a step")[0] for record in caplog.records] == [
        "step 3 of 7: 1 s", "step 6 of 7: 2.5 s",
    ]  # fmt: skip
    assert "GiB host" in caplog.text
    assert read_memory("cpu").host_bytes > 2**20


def test_a_run_shows_the_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(
            [
                "run",
                "-p",
                "pan left",
                "--size",
                "64x64",
                "--frames",
                "5",
                "--steps",
                "3",
                "--log-every",
                "2",
                "-o",
                "a.mp4",
            ]
        )
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if " a step, " in line]
    assert len(lines) == 1
    assert lines[0].startswith("step 2 of 3: ")
    assert logging.getLogger("framefit").level == logging.NOTSET
