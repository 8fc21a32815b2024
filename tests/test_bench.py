"""The bench: scenarios at true size on no memory, rows on tiny models, files, and the regression compare."""

from __future__ import annotations

import importlib
import json
import statistics
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from framefit.bench import GROUPS, SCENARIOS, Result, Row, Scenario, inputs, measure, report, stock, variants, worker
from framefit.bench.job import Job
from framefit.bench.quality import compare as quality
from framefit.bench.regression import Thresholds, compare
from framefit.bench.result import read
from framefit.bench.scenarios import choose
from framefit.bench.variants import FRAMEFIT, STOCK, Variant, further
from framefit.bench.worker import perform
from framefit.cli import main
from framefit.errors import BadInput, BadOutput, FramefitError, UsageError
from framefit.testing import random_parts

measure_module = importlib.import_module("framefit.bench.measure")  # the package names its function so too

TFLOP = {
    "wan2.2-a14b-480p": 1678, "wan2.2-ti2v-5b": 521, "easyanimate-7b-384": 376, "i2vgen-xl-512": 42,
    "wan2.1-vae-480p": 275, "wan2.2-vae": 2011, "magvit-384": 183,
}  # fmt: skip
"""Counted on an H200 in the models' own runs; one size a model."""

MORE = ["wan2.1-14b-480p", "easyanimate-v5-7b-384", "i2vgen-xl-vae-512"]

SMALL_DECODES = [
    Scenario(name=id, model=id, kind="decode", width=96, height=64, num_frames=5, small=True)
    for id in ("wan2.2-i2v-a14b", "easyanimate-v5.1-7b-inp", "i2vgen-xl")
]


@pytest.fixture(scope="module")
def ceilings_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ceilings")


@pytest.fixture(autouse=True)
def ceilings_are_measured_once(state: None, ceilings_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are filed in a user's state folder, which these tests share."""
    monkeypatch.setenv("XDG_STATE_HOME", str(ceilings_folder))


@pytest.mark.parametrize("name", [*TFLOP, *MORE])
def test_true_size_models_take_the_inputs(name: str) -> None:
    """Shapes only, and exactly the work that was counted on a card. Tiny models show that our road does the same."""
    scenario, meta = SCENARIOS[name], torch.device("meta")
    row, size = scenario.checkpoint("random"), (scenario.width, scenario.height, scenario.num_frames)
    parts = random_parts(scenario.needed(row), dtype=torch.bfloat16, device=meta)
    latents, t = inputs.latents(row, size, meta), torch.tensor(1000.0, device=meta)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter if name in TFLOP else nullcontext():
        if scenario.kind == "decode":
            video = stock.decoder(parts, latents)()
            assert video.shape == (1, 3, scenario.num_frames, scenario.height, scenario.width)
        else:
            conditioning = inputs.conditioning(row, size, scenario.branches, meta)
            scale = 2.0 if scenario.branches == 2 else 1.0
            assert stock.denoiser(parts, latents, t, conditioning, scale)().shape == latents.shape
    if name in TFLOP:
        assert counter.get_total_flops() / 1e12 == pytest.approx(TFLOP[name], rel=0.01)


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=lambda s: s.name)
def test_every_scenario_is_a_legal_job_of_its_model(scenario: Scenario) -> None:
    row = scenario.checkpoint(scenario.weights)
    assert row.sizes.refuse(scenario.width, scenario.height) is None
    row.frames.check(scenario.num_frames)
    assert len([c for c in scenario.needed(row).components if c.params]) == 1


def test_the_group_goals_is_the_table_of_goals() -> None:
    sizes = [(s.kind, s.model, s.width, s.height, s.num_frames, s.branches) for s in choose(["goals"])]
    assert len(set(sizes)) == 13
    assert {s.precision for s in choose(["goals"]) if s.kind == "decode"} == {"bf16"}


@pytest.mark.parametrize("name", ["tiny-wan", "tiny-easyanimate", "tiny-i2vgen"])
def test_our_step_equals_stock(name: str, tmp_path: Path) -> None:
    rows = both(SCENARIOS[name], tmp_path)
    assert rows[1].quality == {"relative_l2": 0.0, "max_abs": 0.0}
    assert rows[0].flops == rows[1].flops > 1e6
    assert all(len(row.seconds) == 2 and min(row.seconds) > 0 for row in rows)
    buffers = [row.measured["weights_bytes"] - row.predicted["weights_bytes"] for row in rows]
    assert all(0 <= each < 2**20 for each in buffers)


@pytest.mark.parametrize("scenario", SMALL_DECODES, ids=lambda s: s.name)
def test_our_decode_equals_stock(scenario: Scenario, tmp_path: Path) -> None:
    rows = both(scenario, tmp_path)
    assert rows[1].quality == {"relative_l2": 0.0, "max_abs": 0.0, "psnr_db": None}


def test_a_setting_is_measured_with_the_maths_it_makes(tmp_path: Path) -> None:
    together = Variant(name="+ guidance=together", engine="framefit", settings={"guidance": "together"})
    row = both(SCENARIOS["tiny-wan"], tmp_path, together)[1]
    usual = {"quantize": "none", "chunk": "none", "decode": "whole", "window": "none", "offload": "none"}
    assert row.settings == {"guidance": "together"} | usual
    assert row.tier == "exact"
    assert 0 < row.quality["relative_l2"] < 1e-5


@pytest.mark.parametrize("scenario", [SCENARIOS["tiny-wan"], SMALL_DECODES[0]], ids=lambda s: s.name)
def test_weights_that_come_and_go_are_measured(scenario: Scenario, tmp_path: Path) -> None:
    row = both(scenario, tmp_path, Variant(name="+ offload=block", engine="framefit", settings={"offload": "block"}))[1]
    assert row.settings["offload"] == "block"
    assert row.quality["max_abs"] == 0.0


def test_a_profiled_row_says_where_its_time_goes(tmp_path: Path) -> None:
    job = Job(scenario=SCENARIOS["tiny-wan"], variant=FRAMEFIT, weights="random", repeats=1, profile=True)
    found = run(job)
    assert found.profile["kinds"]["matmul"]["seconds"] > 0
    assert found.profile["kinds"]["attention"]["of_ceiling"] > 0
    assert [advice["binds"] for advice in found.advice].count(True) == 1
    page = report.markdown(waterfall(found))
    assert "| framefit | attention " in page
    assert f"- framefit, {found.advice[0]['rule']}: " in page.partition("## Advice")[2]


@pytest.mark.parametrize("name", ["tiny-wan", "tiny-easyanimate"])
def test_real_weights_are_measured_on_what_their_encoders_say(name: str, tiny: Any, tmp_path: Path) -> None:
    scenario = SCENARIOS[name]
    folder = str(tiny(scenario.model).folder)
    stock_row, ours = both(scenario, tmp_path, weights=folder)
    assert stock_row.settings == {}
    assert ours.quality["relative_l2"] == 0.0
    encoded = torch.load(tmp_path / "o.pt")
    both(scenario, tmp_path)
    assert not torch.equal(encoded, torch.load(tmp_path / "o.pt"))
    with pytest.raises(UsageError, match="is a model of the family"):
        SCENARIOS["wan2.2-vae" if name != "tiny-wan" else "magvit-384"].checkpoint(folder)


def test_rows_add_settings_up_and_new_types_appear(monkeypatch: pytest.MonkeyPatch) -> None:
    # one branch: in guidance there is nothing to change
    usual = {"quantize": "none", "chunk": "none", "decode": "whole", "window": "none", "offload": "none"}
    rows = further(SCENARIOS["wan2.2-a14b-480p"], {"guidance": "apart"} | usual)
    moved = ["+ offload=part", "+ offload=block", "+ offload=leaf", "+ offload=disk"]
    assert [row.name for row in rows] == ["+ chunk=rows", *moved, "+ quantize=fp8", "+ quantize=int8"]
    assert "quantize" not in rows[4].settings, "what rounds the weights comes last"
    first, *_ = further(SCENARIOS["tiny"], {"guidance": "apart", "quantize": "none", "chunk": "none"})
    assert first.settings == {"guidance": "together"}
    kinds = [SimpleNamespace(type="guidance", values=("together", "apart")), SimpleNamespace(type="new", values="ab")]
    monkeypatch.setattr(variants, "ORDER", [(kind, None) for kind in kinds])
    rows = further(SCENARIOS["tiny"], {"guidance": "apart", "new": "a"})
    assert [row.name for row in rows] == ["+ guidance=together", "+ new=b"]
    assert rows[1].settings == {"guidance": "together", "new": "b"}


def test_a_row_that_fails_is_told_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    built = worker._built

    def full(job: Job, *rest: Any) -> Any:
        if job.variant.name == "too large":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return built(job, *rest)

    monkeypatch.setattr(worker, "_built", full)
    monkeypatch.setattr(measure_module, "_perform", in_this_process)
    wrong = Variant(name="wrong", engine="framefit", settings={"guidance": "sideways"})
    large = Variant(name="too large", engine="framefit")
    result = measure(
        SCENARIOS["tiny-i2vgen"], variants=[wrong, large, variants.CACHE_DIT, STOCK], device="cpu", repeats=1
    )
    assert [(row.name, row.status) for row in result.rows] == [
        ("stock", "measured"), ("wrong", "left out"), ("too large", "failed"), ("cache-dit offload", "left out"),
        ("stock again", "measured"),
    ]  # fmt: skip
    assert "guidance=sideways is unknown" in result.rows[1].because
    assert result.rows[2].because == "out of memory at 96x64, 4 frames."
    text = report.markdown(result)
    assert "- too large: failed, out of memory" in text
    assert "- cache-dit offload: left out, it moves weights" in text


def test_all_rows_that_apply_are_measured_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_module, "_perform", in_this_process)
    result = measure(SCENARIOS["tiny-wan"], device="cpu", repeats=1)
    names = [row.name for row in result.rows]
    rounded = ["+ quantize=fp8", "+ quantize=int8"]
    assert names == ["stock", "framefit", "+ guidance=together", *rounded, "cache-dit offload", "stock again"]
    assert result.stock_s == pytest.approx(statistics.mean((result.rows[0].median_s, result.rows[-1].median_s)))
    assert Result.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_work_that_no_process_can_plan_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_module, "_perform", in_this_process)
    with pytest.raises(FramefitError, match="97x64 is not a size of this model"):
        measure(replace(SCENARIOS["tiny-wan"], width=97), variants=[STOCK], device="cpu")


def test_a_process_that_dies_says_how() -> None:
    assert measure_module._death(-9, "") == "its process was ended by SIGKILL (out of host memory, most likely)."
    assert measure_module._death(1, "a\nValueError: no\n\n") == "its process ended with code 1: ValueError: no"


def test_from_the_command_line_to_the_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fresh process, three files, and a comparison of the result with itself and with a slower one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = ["bench", "tiny-i2vgen", "-o", str(tmp_path), "--device", "cpu", "--repeats", "3", "--rows", "framefit"]
    assert exit_code(command) == 0
    out, err = capsys.readouterr()
    assert "| framefit |" in out
    assert "  framefit: " in err
    file = tmp_path / "tiny-i2vgen.json"
    result = read(file)
    assert [row.status for row in result.rows] == ["measured"]
    assert result.rows[0].peak_allocated_bytes > 2**26
    assert 0 < result.share(result.rows[0]) < 1
    assert out == (tmp_path / "tiny-i2vgen.md").read_text() + "\n"
    assert (tmp_path / "tiny-i2vgen.png").read_bytes().startswith(b"\x89PNG")
    assert exit_code(command) == 3
    assert "is there already: add --overwrite" in capsys.readouterr().err
    assert exit_code(["bench", "--compare", str(file), str(file)]) == 0
    slow = slower(result, 2.0)
    (tmp_path / "slow.json").write_text(json.dumps(slow.to_json()))
    assert exit_code(["bench", "--compare", str(file), str(tmp_path / "slow.json"), "--seconds", "0"]) == 1
    assert "WORSE" in capsys.readouterr().out
    (tmp_path / "other.json").write_text(json.dumps(replace(result, hardware="another card").to_json()))
    assert exit_code(["bench", "--compare", str(file), str(tmp_path / "other.json")]) == 3
    assert "differ in hardware" in capsys.readouterr().err


def test_worse_by_a_share_and_by_an_amount_is_a_regression() -> None:
    limits = Thresholds(share=0.05, seconds=0.005, bytes=64 * 2**20)

    def regressions(old: Row, new: Row) -> list[str]:
        changes = compare(waterfall(old), waterfall(new), limits)
        return [change.figure for change in changes if change.regression]

    base = row(seconds=1.0, peak=2**30)
    assert regressions(base, row(seconds=1.06, peak=2**30)) == ["median_s"]
    assert regressions(base, row(seconds=1.04, peak=2**30)) == []  # under the share
    assert regressions(row(seconds=0.01), row(seconds=0.014)) == []  # 40 %, and under the amount
    assert regressions(row(seconds=0.01), row(seconds=0.016)) == ["median_s"]
    assert regressions(base, row(seconds=0.5, peak=2**30 + 70 * 2**20)) == ["peak_allocated_bytes"]
    assert regressions(base, row(seconds=1.0, peak=2**30 + 60 * 2**20)) == []
    assert regressions(base, Row(name="framefit", status="failed", because="out of memory")) == ["status"]
    assert regressions(base, replace(base, name="another")) == ["status"]


@pytest.mark.parametrize("change", ["scenario", "precision", "weights", "threads"])
def test_only_the_same_work_on_the_same_machine_is_compared(change: str) -> None:
    old = waterfall(row(seconds=1.0))
    other = {"scenario": SCENARIOS["tiny-wan"], "precision": "bf16", "weights": "x", "threads": 64}[change]
    with pytest.raises(BadInput, match=f"differ in {change}"):
        compare(old, replace(old, **{change: other}))


def test_figures_follow_from_what_was_measured() -> None:
    first, ours, again = row("stock", 2.0), row("framefit", 1.0), row("stock again", 3.0)
    result = replace(waterfall(first, ours, again), ceiling_flops=4e12)
    assert result.stock_s == 2.5
    assert result.drift == 0.5
    assert result.ratio(ours) == 2.5
    assert result.rate(ours) == 2e12
    assert result.share(ours) == 0.5
    assert "stock took 50.0% longer at the end than at the beginning" in report.markdown(result)
    assert replace(ours, seconds=(1.0, 2.0, 3.0, 4.0, 5.0)).spread_s == (1.0, 2.0, 4.0, 5.0)


def test_long_calls_are_repeated_less_than_short_ones() -> None:
    def calls(each_s: float, repeats: int | None = None) -> int:
        done: list[float] = []
        while worker._more(repeats, done):
            done.append(each_s)
        return len(done)

    assert [calls(s) for s in (12.0, 3.2, 1.0, 0.2, 0.05, 0.001)] == [3, 4, 5, 5, 20, 100]
    assert calls(12.0, repeats=1) == 1


def test_quality_is_against_the_reference() -> None:
    reference = torch.ones(1, 4)
    assert quality(reference + 0.1, reference) == pytest.approx({"relative_l2": 0.1, "max_abs": 0.1}, rel=1e-5)
    frames = torch.full((2, 4, 4, 3), 100, dtype=torch.uint8)
    assert quality(frames + 1, frames)["psnr_db"] == pytest.approx(48.13, abs=0.01)
    with pytest.raises(ValueError, match="shape"):
        quality(frames[:1], frames)


def test_names_rows_and_files_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the nearest are tiny-wan"):
        choose(["tiny-wam"])
    assert [s.name for s in choose(["tiny", "cpu"])] == GROUPS["cpu"]
    with pytest.raises(UsageError, match="row 'guidance=up' is unknown: use stock"):
        variants.parse(["guidance=up"])
    assert variants.parse(["stock", "guidance=apart"])[1].settings == {"guidance": "apart"}
    (tmp_path / "tiny.md").touch()
    with pytest.raises(BadOutput, match="--overwrite"):
        report.check_outputs(tmp_path, ["tiny"], overwrite=False)
    report.check_outputs(tmp_path, ["tiny"], overwrite=True)
    (tmp_path / "x.json").write_text('{"format": 1}')
    with pytest.raises(BadInput, match="no result of framefit bench"):
        read(tmp_path / "x.json")
    for command in (["bench"], ["bench", "tiny", "--compare", "a", "b"], ["bench", "--repeats", "0"]):
        assert exit_code(command) == 2


def test_the_list_needs_no_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["bench", "--list", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [Scenario.from_json(s) for s in told["scenarios"]] == list(SCENARIOS.values())


def test_the_picture_shows_rows_without_figures_too(tmp_path: Path) -> None:
    failed = Row(name="framefit", status="failed", because="out of memory " * 20)
    report.picture(
        waterfall(row("stock", 2.0), failed, replace(row("b"), peak_reserved_bytes=2**31)), tmp_path / "p.png"
    )
    assert (tmp_path / "p.png").stat().st_size > 10_000


def row(name: str = "framefit", seconds: float = 1.0, peak: int = 2**30) -> Row:
    return Row(
        name=name, status="measured", seconds=(seconds,), peak_allocated_bytes=peak, flops=2 * 10**12,
        tier="exact" if name == "framefit" else "",
    )  # fmt: skip


def waterfall(*rows: Row) -> Result:
    return Result(
        scenario=SCENARIOS["tiny"], weights="tiny", hardware="a card", precision="fp32", date="2026-01-01T00:00:00",
        versions={"torch": "2"}, ceiling_flops=None, rows=rows,
    )  # fmt: skip


def slower(result: Result, factor: float) -> Result:
    rows = [replace(r, seconds=tuple(s * factor for s in r.seconds)) for r in result.rows]
    return replace(result, rows=tuple(rows))


def both(scenario: Scenario, folder: Path, ours: Variant = FRAMEFIT, weights: str = "random") -> list[Row]:
    """Stock and ours in this process, ours against stock's output."""
    job = Job(scenario=scenario, variant=STOCK, device="cpu", weights=weights, repeats=2, output=str(folder / "o.pt"))
    return [run(job), run(replace(job, variant=ours, output="", reference=job.output))]


def run(job: Job) -> Row:
    found = in_this_process(replace(job, device="cpu"))["row"]
    assert isinstance(found, Row)
    assert found.status == "measured", found.because
    return found


def in_this_process(job: Job) -> dict[str, Any]:
    reply = json.loads(json.dumps(perform(Job.from_json(json.loads(json.dumps(job.to_json()))))))
    return reply | {"row": Row.from_json(reply["row"])}


def exit_code(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert isinstance(caught.value.code, int)
    return caught.value.code
