"""`framefit bench` from its flags to its answer; printing is the command line's."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from framefit.bench import regression, report, variants
from framefit.bench.measure import measure
from framefit.bench.result import Result, read
from framefit.bench.scenarios import GROUPS, SCENARIOS, Scenario, choose
from framefit.errors import FramefitError, UsageError

__all__ = ["answer"]

Answer = tuple[dict[str, Any], str, int]
"""For a program, for a person, and the exit code."""

Say = Callable[[str], None]


def answer(flags: Namespace, say: Say) -> Answer:
    """List the scenarios, compare two results, or measure.

    Args:
        say: tells one line of progress.

    Raises:
        FramefitError: nothing could be begun; what fails later is in the answer.
    """
    if flags.compare:
        if flags.names:
            raise UsageError(f"--compare reads two results, and measures no {flags.names[0]}: leave one of them out.")
        return _compared(flags)
    if flags.list:
        return _listed()
    if not flags.names:
        raise UsageError("a scenario is needed, as in framefit bench tiny (framefit bench --list shows all).")
    return _measured(flags, say)


def _listed() -> Answer:
    rows = [("name", "group", "work", "note"), *((s.name, s.group, s.title, s.note) for s in SCENARIOS.values())]
    return {"scenarios": [s.to_json() for s in SCENARIOS.values()], "groups": GROUPS}, report.table(rows), 0


def _measured(flags: Namespace, say: Say) -> Answer:
    chosen = choose(flags.names)
    for scenario in chosen:  # before anything takes time
        scenario.checkpoint(flags.weights or scenario.weights)
    rows = variants.parse(flags.rows) if flags.rows else None
    if flags.output:
        names = [scenario.name for scenario in chosen] + ["overview"] * (len(chosen) > 1)
        report.check_outputs(flags.output, names, overwrite=flags.overwrite)
    found = [_one(scenario, rows, flags, say) for scenario in chosen]
    results = [result for result in found if result is not None]
    texts = [report.markdown(result) for result in results]
    if len(results) > 1:
        texts.append(report.overview(results))
        if flags.output:
            (flags.output / "overview.md").write_text(texts[-1], encoding="utf-8")
    failed = None in found or any(row.status == "failed" for result in results for row in result.rows)
    return {"results": [result.to_json() for result in results]}, "\n".join(texts), int(failed)


def _one(scenario: Scenario, rows: list[variants.Variant] | None, flags: Namespace, say: Say) -> Result | None:
    """One scenario measured and written; None where it cannot be, so that the others are not lost."""
    say(f"{scenario.name}: {scenario.title}")
    try:
        result = measure(
            scenario, variants=rows, device=flags.device or "auto", vram_bytes=flags.vram, weights=flags.weights,
            repeats=flags.repeats, profile=flags.profile, on_row=lambda row: say(f"  {report.line(row)}"),
        )  # fmt: skip
    except FramefitError as error:
        say(f"  {scenario.name} was not measured: {error}")
        return None
    if flags.output and (problem := report.write(result, flags.output)):
        say(f"note: {problem}")
    return result


def _compared(flags: Namespace) -> Answer:
    old, new = (read(file) for file in flags.compare)
    limits = regression.Thresholds(share=flags.percent / 100, seconds=flags.seconds, bytes=flags.bytes)
    changes = regression.compare(old, new, limits)
    rows = [("row", "figure", "old", "new", "change", ""), *map(_cells, changes)]
    worse = any(change.regression for change in changes)
    return {"regression": worse, "changes": [asdict(change) for change in changes]}, report.table(rows), int(worse)


def _cells(change: regression.Change) -> tuple[str, ...]:
    share = "" if change.share is None else f"{change.share:+.1%}"
    figures = (_shown(change.figure, change.old), _shown(change.figure, change.new))
    return change.row, change.figure, *figures, share, "WORSE" if change.regression else ""


def _shown(figure: str, value: float | str) -> str:
    if isinstance(value, str):
        return value
    return report.size(value) if figure.endswith("_bytes") else report.seconds(value)
