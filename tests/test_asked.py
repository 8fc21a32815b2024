"""Settings as a user writes them: our words and EasyAnimate's, and a sentence where two of them disagree."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from framefit import tuned
from framefit.errors import UsageError
from framefit.families import Checkpoint, find
from framefit.plan import Guidance, Plan
from framefit.planning import choose, prepare
from framefit.planning.asked import ALIASES, asked
from framefit.request import Request
from framefit.tuned import Tuned

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_is_what_it_means(
    alias: str, make_plan: Callable[..., Plan], tiny: Callable[[str], Checkpoint]
) -> None:
    row = tiny("easyanimate-v5.1-7b-inp")
    ours, plain = make_plan(row, settings={"offload": alias}), make_plan(row, settings=dict(ALIASES[alias]))
    assert [(s.type, s.value) for s in ours.settings] == [(s.type, s.value) for s in plain.settings]
    because = {s.type: s.because for s in ours.settings}
    assert {because[name] for name in ALIASES[alias]} == {f"asked for as {alias}"}
    assert because["guidance"] != f"asked for as {alias}"


def test_what_is_asked_for_beside_it_stays() -> None:
    both = asked({"offload": "model_cpu_offload_and_qfloat8", "quantize": "fp8", "guidance": "apart"})
    assert {name: s.value for name, s in both.items()} == {"offload": "part", "quantize": "fp8", "guidance": "apart"}
    assert both["guidance"].because == "asked for"
    assert asked({"offload": "model_cpu_offload", "quantize": "int8"})["quantize"].value == "int8"
    assert asked({}) == {}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"offload": "model_cpu_offload_and_qfloat8", "quantize": "int8"},
            r"offload=model_cpu_offload_and_qfloat8 means offload=part and quantize=fp8, and quantize=int8 was asked "
            r"for beside it: leave quantize=int8 out, or use offload=part\.",
        ),
        ({"offload": "model_offload"}, "offload=model_offload is unknown: use offload=none or offload=part"),
        ({"quantize": "model_cpu_offload"}, "quantize=model_cpu_offload is unknown: use quantize=none or quantize=fp8"),
        ({"model_cpu_offload": "yes"}, "setting 'model_cpu_offload' is unknown: the settings are "),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(settings: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        asked(settings)


def test_what_a_search_has_filed_does_not_win_over_an_alias(photo: Path) -> None:
    request = Request(image=photo, model="tiny", prompt="x", width=96, height=64, seed=1)
    plain = choose(request, find("tiny"), prepare(request, device="cpu")[1].device, photo_size=(120, 80))
    tuned.save(plain, Tuned(settings={"quantize": "int8", "guidance": "together"}, date="2026-11-21", ratio=1.5))
    filed = prepare(request, device="cpu")[1]
    assert filed.quantize == "int8"
    plan = prepare(request, device="cpu", settings={"offload": "model_full_load_and_qfloat8"})[1]
    assert (plan.quantize, plan.offload, plan.setting(Guidance).value) == ("fp8", "none", "together")


def test_the_page_lists_them() -> None:
    rows = re.findall(r"^\| `offload=(\w+)` \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    written = {alias: dict(re.findall(r"`(\w+)=(\w+)`", means)) for alias, means in rows if alias in ALIASES}
    assert written == ALIASES
