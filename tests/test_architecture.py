"""Keeps the drawing in ARCHITECTURE.md true: who may import whom, what importing costs, what is public."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import framefit
from framefit import passes, plan
from framefit.cli import FLAGS, parser
from framefit.request import Request

PACKAGE = Path(framefit.__file__).parent
ROOT = PACKAGE.parent

RANKS = (
    {
        "errors",
        "request",
        "device",
        "cards",
        "rates",
        "durations",
        "smi",
        "plan",
        "photo",
        "marks",
        "video",
        "report",
        "streaming",
    },
    {"families", "ledger", "apart", "checkpoint", "schedule", "scratch", "quality", "tuned"},
    {"passes", "testing"},
    {"planning"},
    {"pipeline"},
    {"run", "recipe", "retry", "profiling"},
    {"verify", "tune", "bench"},
    {"cli", "commands", "doctor", "plans", "progress", "__main__"},
)
"""Room -> rank by position. A room imports rooms of a lower rank, and inside itself."""

WITHIN = {
    # the nouns are one room: a plan holds a request and a device, and all of them raise errors
    **dict.fromkeys(RANKS[0], "nouns"),
    # a run writes the recipe that a rerun reads
    **dict.fromkeys(("run", "recipe", "retry"), "run"),
    # a search judges candidates as a verdict does
    **dict.fromkeys(("verify", "tune"), "proof"),
    # a search is filed beside the runs, and what a run writes for itself
    **dict.fromkeys(("checkpoint", "scratch", "tuned"), "state"),
    # the command line is one room
    **dict.fromkeys(RANKS[-1], "cli"),
}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "framefit"


def rank(name: str) -> int:
    return next(i for i, rooms in enumerate(RANKS) if name in rooms)


def modules() -> Iterator[tuple[str, ast.Module]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        relative = file.relative_to(ROOT).with_suffix("")
        name = ".".join(relative.parts).removesuffix(".__init__")
        yield name, ast.parse(file.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> Iterator[str]:
    """Every framefit module that is imported, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("framefit"):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                is_module = (ROOT / whole.replace(".", "/")).with_suffix(".py").exists() or (
                    ROOT / whole.replace(".", "/") / "__init__.py"
                ).exists()
                yield whole if is_module else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("framefit"))


def test_every_module_has_a_rank() -> None:
    found = {room(name) for name, _ in modules()} - {"framefit"}
    assert found == set().union(*RANKS)


def test_rooms_import_downwards_only() -> None:
    wrong = []
    for name, tree in modules():
        here = room(name)
        if here == "framefit":
            continue  # the public face re-exports, lazily
        for target in imports(tree):
            there = room(target)
            same = here == there or (here in WITHIN and WITHIN.get(here) == WITHIN.get(there))
            if there != "framefit" and not same and rank(there) >= rank(here):
                wrong.append(f"{name} (rank {rank(here)}) imports {target} (rank {rank(there)})")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("code", ["import framefit", "from framefit.cli import parser; parser().format_help()"])
def test_importing_leaves_torch_out(code: str) -> None:
    heavy = ("torch", "diffusers", "transformers", "numpy", "av", "huggingface_hub")
    check = f"{code}; import sys; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_models_are_listed_without_torch() -> None:
    check = "import framefit; framefit.CHECKPOINTS; import sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout == "False\n"


def test_public_names_exist() -> None:
    for name in framefit.__all__:
        assert getattr(framefit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        framefit.nonsense  # noqa: B018


def test_every_module_says_what_is_public() -> None:
    for name, tree in modules():
        if name.endswith("__main__"):
            continue
        assigned = {
            t.id for node in tree.body if isinstance(node, ast.Assign) for t in node.targets if isinstance(t, ast.Name)
        }
        assert "__all__" in assigned, name
        assert ast.get_docstring(tree), name


def test_files_stay_readable() -> None:
    for file in PACKAGE.rglob("*.py"):
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 500, file


def test_every_setting_type_has_a_pass_and_a_section() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    applied = [kind for kind, _ in passes.ORDER]
    assert set(applied) == set(plan.SETTINGS.values())
    for name, kind in plan.SETTINGS.items():
        assert f"## {name}" in page
        for value in kind.possible():
            assert f"`{name}={value}`" in page


def test_every_flag_is_documented() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    flags = {flag for command in commands(parser()) for action in command._actions for flag in action.option_strings}
    missing = sorted(flag for flag in flags if flag.startswith("--") and f"`{flag}" not in page)
    assert not missing
    gone = sorted(set(re.findall(r"`(--[a-z-]+)", page)) - flags)
    assert not gone, "documented flags that do not exist"


def test_every_request_field_is_a_flag() -> None:
    written_out = {"image", "width", "height"}
    assert set(Request.__dataclass_fields__) - written_out == set(FLAGS)


def commands(top: object) -> Iterator[object]:
    """A parser and all parsers below it."""
    yield top
    for action in top._actions:  # type: ignore[attr-defined]
        for below in (action.choices or {}).values() if hasattr(action, "add_parser") else ():
            yield from commands(below)
