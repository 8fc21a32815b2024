"""The plan against the untouched model: what passes, what fails, and what the report holds."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from framefit import cli, video
from framefit.apart import apart
from framefit.errors import DoesNotFit, FramefitError
from framefit.plan import Plan
from framefit.quality import Comparison
from framefit.quality.compare import Score
from framefit.request import Request
from framefit.run import Options, prepare
from framefit.verify import GATES, judge, tier_of

pytest.importorskip("skimage")
pytest.importorskip("matplotlib")

PHOTO = Path(video.__file__).parent / "assets" / "rocket.jpg"


def comparison(missing: dict[str, str] | None = None, **values: float) -> Comparison:
    return Comparison(
        ours=Path("plan"), reference=Path("reference"), width=64, height=64, num_frames=5, first=(0, 0),
        scores={name: Score(value=value) for name, value in values.items()}, missing=missing or {},
        lengths=(5, 5), faults=((), ()), lag=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("tier", "values", "passed"),
    [
        ("exact", {"psnr": 40.0}, True),
        ("exact", {"psnr": 39.9}, False),
        ("near", {"vmaf": 95.0, "ssim": 0.97, "lpips": 0.05}, True),
        ("near", {"vmaf": 94.9, "ssim": 0.97, "lpips": 0.05}, False),
        ("near", {"vmaf": 95.0, "ssim": 0.97, "lpips": 0.06}, False),
        ("lossy", {"vmaf": 85.0, "ssim": 0.92, "lpips": 0.1, "motion": 0.95}, True),
        ("lossy", {"vmaf": 85.0, "ssim": 0.92, "lpips": 0.1, "motion": 0.85}, False),
        ("lossy", {"vmaf": 85.0, "ssim": 0.92, "lpips": 0.1, "motion": 1.15}, False),
    ],
)
def test_every_tier_has_its_gate(tier: str, values: dict[str, float], passed: bool) -> None:
    assert all(check.passed for check in judge(comparison(**values), tier)) is passed  # type: ignore[arg-type]


def test_what_cannot_be_measured_is_not_passed() -> None:
    found = comparison({"vmaf": "no ffmpeg", "lpips": "no weights"}, ssim=0.99)
    checks = {check.what: check for check in judge(found, "near")}
    assert not checks["vmaf"].passed
    assert checks["vmaf"].reason == "not measured: no ffmpeg"
    assert checks["lpips"].passed  # its weights are the user's to bring, and that is said
    assert checks["lpips"].reason == "not measured: no weights"
    assert checks["ssim"].passed


def test_a_fault_that_the_reference_has_too_is_not_the_plans() -> None:
    black = ("black: frame 0",)
    assert not judge(replace(comparison(psnr=50), faults=(black, ())), "exact")[-1].passed
    assert judge(replace(comparison(psnr=50), faults=(black, black)), "exact")[-1].passed


def test_the_tier_is_that_of_what_differs() -> None:
    def made(**options: object) -> Plan:
        request = Request(image=PHOTO, prompt="x", width=64, height=64, num_frames=5, seed=1)
        return prepare(request, Options(device="cpu", checkpoints=None, **options))[1]  # type: ignore[arg-type]

    untouched = made()
    assert tier_of(made(settings={"guidance": "together"}), untouched) == "exact"
    assert tier_of(made(precision="bf16"), untouched) == "near"
    assert set(GATES) == {"exact", "near", "lossy"}


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main([str(a) for a in arguments])
    return int(left.value.code or 0)


SMALL = ["-p", "pan", "--size", "64x64", "--frames", "5", "--steps", "2", "--seed", "1", "--device", "cpu"]


def test_an_exact_setting_passes_and_the_page_holds_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "proof"
    assert run("verify", PHOTO, *SMALL, "--set", "guidance=together", "-o", folder, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["passed"], facts["tier"]) == (True, "exact")
    assert facts["comparison"]["scores"]["psnr"]["value"] > 60
    settings = [facts[name]["plan"]["settings"][0]["value"] for name in ("plan", "reference")]
    assert settings == ["together", "apart"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "metrics.png", "plan.mp4", "reference.mp4", "verdict.html", "verdict.json",
    ]  # fmt: skip
    page = (folder / "verdict.html").read_text()
    assert page.count("data:video/mp4;base64,") == 2
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "partial" not in page + (folder / "verdict.json").read_text()
    assert video.inspect(folder / "plan.mp4").num_frames == 5
    assert [path.name for path in tmp_path.iterdir()] == ["proof"]
    assert run("verify", PHOTO, *SMALL, "-o", folder) == 3  # before anything is run
    assert "--overwrite" in capsys.readouterr().err


def test_a_precision_that_shows_is_held_to_the_near_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = run("verify", PHOTO, *SMALL, "--precision", "bf16", "-o", tmp_path / "proof", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["tier"] == "near"
    assert [facts[name]["plan"]["precision"] for name in ("plan", "reference")] == ["bf16", "fp32"]
    assert {check["what"] for check in facts["checks"]} == {"vmaf", "ssim", "lpips", "sound"}
    assert code == (0 if facts["passed"] else 1)
    assert facts["comparison"]["scores"]["psnr"]["value"] < 60


def test_a_fault_counts_by_its_kind_not_by_its_frames() -> None:
    found = replace(comparison(psnr=50), faults=(("black: frame 3",), ("black: frames 3-4",)))
    assert judge(found, "exact")[-1].passed


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for place, sentence in (("mine", "holds thesis.txt"), ("file", "is a file"), ("file/x", "cannot be made")):
        assert run("verify", PHOTO, *SMALL, "-o", tmp_path / place, "--overwrite") == 3
        assert sentence in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_weights_for_lpips_are_read_before_anything_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ("verify", PHOTO, *SMALL, "-o", tmp_path / "proof", "--lpips-weights", tmp_path / "none")
    assert run(*wanted) == 3
    assert "cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "proof").exists()


def test_what_is_raised_apart_comes_back_as_it_is() -> None:
    with pytest.raises(DoesNotFit, match=r"too small"):
        apart(partial(_fails, "too small"))


def _fails(message: str) -> dict[str, object]:
    raise DoesNotFit(message)


def test_a_killed_process_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FramefitError, match=r"was killed"):
        apart(partial(os._exit, 9))


def test_a_run_that_fails_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", PHOTO, *SMALL, "--set", "guidance=sideways", "-o", tmp_path / "proof") == 2
    assert "guidance=sideways is unknown" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
