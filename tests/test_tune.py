"""The search for settings: what is tried, what wins, what is filed, and that a run uses it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from framefit import cli, tune, tuned, video
from framefit.apart import apart
from framefit.errors import DoesNotFit, UsageError
from framefit.plan import Plan
from framefit.request import Request
from framefit.run import Options, prepare
from framefit.tune import Trial, candidates, winner

pytest.importorskip("skimage")

PHOTO = Path(video.__file__).parent / "assets" / "rocket.jpg"
SMALL = Request(image=PHOTO, prompt="pan", width=64, height=64, num_frames=5, steps=4, seed=1)
CPU = Options(device="cpu", checkpoints=None)


def trial(settings: str, step_s: float | None, peak_bytes: int = 100, failed: str = "") -> Trial:
    return Trial(settings={"guidance": settings}, tier="exact", step_s=step_s, peak_bytes=peak_bytes, failed=failed)


def test_the_fastest_wins_by_more_than_noise() -> None:
    assert winner([trial("a", 1.0), trial("b", 0.9)]).settings == {"guidance": "b"}
    assert winner([trial("a", 1.0), trial("b", 0.99)]).settings == {"guidance": "a"}
    assert winner([trial("a", 1.0), trial("b", 0.5, failed="psnr")]).settings == {"guidance": "a"}
    assert winner([trial("a", 1.0), trial("b", None, failed="out of memory")]).settings == {"guidance": "a"}


def test_a_budget_takes_the_slower_one() -> None:
    trials = [trial("a", 0.5, 200), trial("b", 1.0, 100)]
    assert winner(trials, 150).settings == {"guidance": "b"}
    with pytest.raises(DoesNotFit, match=r"the least is .* with guidance=b"):
        winner(trials, 50)


def test_every_combination_up_to_the_tier_is_tried() -> None:
    plan = prepare(SMALL, CPU)[1]
    assert list(candidates(plan, "exact")) == [
        {
            "guidance": guidance,
            "quantize": "none",
            "chunk": "none",
            "decode": "whole",
            "window": "none",
            "offload": "none",
        }
        for guidance in ("apart", "together")
    ]
    card = replace(plan, device=replace(plan.device, id="cuda:0"))
    assert len(list(candidates(card, "exact"))) == 10
    assert len(list(candidates(card, "near"))) == 30


def test_a_search_files_what_a_run_then_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real trials; only their seconds are set, so that one wins."""
    made, seconds = tune._made, {"apart": 2.0, "together": 1.0}

    def timed(request: Request, output: Path, facts: dict[str, Any]) -> dict[str, Any]:
        value = facts.get("settings", {}).get("guidance", "apart")
        return made(request, output, facts) | {"step_s": seconds[value]}

    monkeypatch.setattr(tune, "_made", timed)
    monkeypatch.setattr(tune, "apart", lambda work: work())
    found = tune.tune(SMALL, CPU)
    assert [t.settings["guidance"] for t in found.trials] == ["apart", "together"]
    assert not any(t.failed for t in found.trials)
    assert all(t.peak_bytes > 2**20 for t in found.trials)
    assert found.best.settings["guidance"] == "together"
    assert [path.name for path in tuned.folder().glob("*.json")] == [found.filed.name]
    assert [path.name for path in tuned.folder().glob("*.partial/*")] == ["lock"]

    setting = prepare(SMALL, CPU)[1].settings[0]
    assert setting.value == "together"
    assert "2.00 times as fast" in setting.because

    def value(request: Request = SMALL, **options: Any) -> str:
        return prepare(request, Options(device="cpu", checkpoints=None, **options))[1].settings[0].value

    assert value(settings={"guidance": "apart"}) == "apart"
    assert value(use_tuned=False) == "apart"
    assert value(Request(image=PHOTO, prompt="pan", width=80, height=64, num_frames=5)) == "apart"
    found.filed.write_text("{}")
    assert value() == "apart"


def test_an_interrupted_search_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    made = tune._made

    def interrupted(request: Request, output: Path, facts: dict[str, Any]) -> dict[str, Any]:
        calls.append(facts["settings"]["guidance"])
        if calls.count("together") == 1 and facts["settings"]["guidance"] == "together":
            raise KeyboardInterrupt
        return made(request, output, facts)

    monkeypatch.setattr(tune, "_made", interrupted)
    monkeypatch.setattr(tune, "apart", lambda work: work())
    with pytest.raises(KeyboardInterrupt):
        tune.tune(SMALL, CPU)
    tune.tune(SMALL, CPU)
    assert calls[:3] == ["apart", "together", "together"]
    assert calls[3:] in ([], ["apart", "together"])  # the better one is confirmed


def test_trials_of_another_photo_or_prompt_are_not_reused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[str] = []
    made = tune._made

    def counted(request: Request, output: Path, facts: dict[str, Any]) -> dict[str, Any]:
        calls.append(request.prompt)
        return made(request, output, facts)

    monkeypatch.setattr(tune, "_made", counted)
    monkeypatch.setattr(tune, "apart", lambda work: work())
    with pytest.raises(DoesNotFit):
        tune.tune(SMALL, CPU, budget_bytes=1)
    with pytest.raises(DoesNotFit):
        tune.tune(replace(SMALL, prompt="zoom"), CPU, budget_bytes=1)
    assert calls == ["pan", "pan", "zoom", "zoom"]
    with pytest.raises(DoesNotFit):  # what is filed is kept
        tune.tune(SMALL, CPU, budget_bytes=1)
    assert len(calls) == 4


def test_one_search_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def another(request: Request, output: Path, facts: dict[str, Any]) -> dict[str, Any]:
        tune.tune(SMALL, CPU)
        raise AssertionError

    monkeypatch.setattr(tune, "_made", another)
    monkeypatch.setattr(tune, "apart", lambda work: work())
    with pytest.raises(UsageError, match=r"another process"):
        tune.tune(SMALL, CPU)


def test_a_gain_that_was_a_busy_machine_is_not_filed(monkeypatch: pytest.MonkeyPatch) -> None:
    made, seconds = tune._made, iter((9.0, 1.0, 1.0, 1.0))

    def busy_at_first(request: Request, output: Path, facts: dict[str, Any]) -> dict[str, Any]:
        return made(request, output, facts) | {"step_s": next(seconds)}

    monkeypatch.setattr(tune, "_made", busy_at_first)
    monkeypatch.setattr(tune, "apart", lambda work: work())
    found = tune.tune(SMALL, CPU)
    assert [t.step_s for t in found.trials] == [1.0, 1.0]
    assert found.best is found.trials[0]
    assert next(seconds, None) is None


def test_a_candidate_that_fails_has_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tune._made

    def broken(request: Request, output: Path, facts: dict[str, Any]) -> dict[str, Any]:
        if facts["settings"]["guidance"] == "together":
            raise DoesNotFit("out of memory")
        return made(request, output, facts)

    monkeypatch.setattr(tune, "_made", broken)
    monkeypatch.setattr(tune, "apart", lambda work: work())
    found = tune.tune(SMALL, CPU)
    assert found.trials[1].failed == "DoesNotFit: out of memory"
    assert found.best == found.trials[0]
    json.dumps(found.to_json(), allow_nan=False)


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first trial in a process of its own, as all are; the others here, which takes half the time."""
    trials: list[Any] = []

    def first_apart(work: Any) -> Any:
        trials.append(work)
        return apart(work) if len(trials) == 1 else work()

    monkeypatch.setattr(tune, "apart", first_apart)
    words = f"tune {PHOTO} -p pan --size 64x64 --frames 5 --steps 4 --device cpu --memory 64GiB".split()
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    assert left.value.code == 0
    shown = capsys.readouterr()
    assert "guidance=together" in shown.out
    assert shown.out.count("filed for run") == 1
    assert "2 of 2" in shown.err
    assert len(trials) >= 2


def test_trials_of_too_few_steps_are_refused() -> None:
    with pytest.raises(UsageError, match=r"--steps 4 or more"):
        tune.tune(replace(SMALL, steps=3), CPU)


def test_a_size_without_a_unit_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["tune", "-p", "x", "--memory", "12"])
    assert left.value.code == 2
    assert "'12' is not a size" in capsys.readouterr().err


def test_the_key_is_of_what_a_search_is_good_for() -> None:
    def key(**changes: Any) -> str:
        fields = {"width": 64, "height": 64, "num_frames": 5} | changes
        plan: Plan = prepare(Request(image=PHOTO, prompt="pan", **fields), CPU)[1]
        return tuned.key(plan)

    assert key() == key(seed=7, steps=3)
    assert len({key(), key(width=80), key(num_frames=9)}) == 3
