"""Predicted seconds beside those that one card measured, work by work and phase by phase. Needs no card.

    python benchmarks/seconds.py [--rates FILE] [--out benchmarks/seconds_h200_DATE]

Measured are diffusers' own models (`stock.py`: warm, one forward or decode) and framefit's phases at true size
(`full_size.py`: steps after the first; what runs once in its process is cold). "Before" is what was predicted until
2026-11-21: all FLOPs of a kind at its best rate, all bytes of arithmetic at that of memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from framefit import rates
from framefit.bench.scenarios import SCENARIOS
from framefit.device import Device
from framefit.families import CHECKPOINTS, Checkpoint
from framefit.planning import choose
from framefit.planning.dryrun import trace
from framefit.planning.phase import PhaseTrace
from framefit.rates import Rates
from framefit.request import Request

HERE = Path(__file__).parent
PHOTO = HERE.parent / "framefit" / "assets" / "rocket.jpg"
STOCK, FULL = HERE / "stock_h200_20261121.json", HERE / "full_size_h200_20261121.json"
KINDS = ("attention", "matmul", "convolution", "elementwise")
LIMIT = 0.15
"""The goal's."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rates", type=Path, help="that a probe of the card filed; default: the data sheet's")
    arguments.add_argument("--out", type=Path, help="file name without its ending; default: nothing is filed")
    flags = arguments.parse_args()
    known = _known(flags.rates)
    rows = [*_stock(known), *_full_size(known)]
    table = markdown(rows, known)
    print(table)
    if flags.out:
        flags.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
        flags.out.with_suffix(".md").write_text(f"# Predicted seconds beside measured ones\n\n{table}\n")


def markdown(rows: list[dict[str, Any]], known: Rates) -> str:
    lines = [f"{known.device}, rates: {known.origin}.", ""]
    lines += ["| work | phase | measured s | predicted s | error | before |", "|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['work']} | {row['phase']} | {row['measured_s']:.3g} | {row['predicted_s']:.3g} | "
            f"{row['error']:+.1%} | {row['error_before']:+.1%} |"
        )
    warm = [row for row in rows if row["warm"]]
    for name, key in (("before", "error_before"), ("now", "error")):
        errors = [abs(row[key]) for row in warm]
        within = sum(error <= LIMIT for error in errors)
        lines += [
            "",
            f"Warm, {name}: {within} of {len(warm)} within {LIMIT:.0%}; the largest error is {max(errors):.1%}.",
        ]
    lines += ["", "Seconds by kind of work, predicted and in brackets as profiled:", ""]
    lines += [f"| work | {' | '.join(KINDS)} |", "|---" * (len(KINDS) + 1) + "|"]
    for row in (row for row in rows if "kinds" in row):
        cells = [f"{row['predicted'][kind]:.3g} ({row['kinds'].get(kind, 0.0):.3g})" for kind in KINDS]
        lines.append(f"| {row['work']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _stock(known: Rates) -> Iterator[dict[str, Any]]:
    for filed in json.loads(STOCK.read_text())["rows"]:
        scenario = SCENARIOS[filed["name"]]
        row = scenario.checkpoint("random")
        if scenario.precision:
            row = replace(row, components=tuple(replace(part, keep_fp32=False) for part in row.components))
        guidance = (max(row.guidance[0], 2.0) if scenario.branches == 2 else 1.0,)
        size = (scenario.width, scenario.height, scenario.num_frames)
        traces = _traced(row, size, scenario.precision or "bf16", guidance)
        name = "decode" if scenario.kind == "decode" else f"denoise:{row.experts[0]}"
        kinds = {kind: found["seconds"] for kind, found in filed["kinds"].items()}
        found = _row(filed["name"], next(t for t in traces if t.name == name), filed["seconds"], known)
        yield found | {"kinds": kinds, "warm": True}


def _full_size(known: Rates) -> Iterator[dict[str, Any]]:
    for filed in json.loads(FULL.read_text()):
        row = CHECKPOINTS[filed["id"]]
        measured = {phase["name"]: phase["seconds"] for phase in filed["phases"]}
        a_step = f"denoise:{row.experts[-1]}"
        measured[a_step] = min(filed["seconds_a_step"])
        for phase in _traced(row, (*filed["size"], filed["num_frames"]), filed["precision"], None):
            if phase.name == a_step or not phase.name.startswith("denoise"):
                work = f"{row.id} {filed['size'][0]}x{filed['size'][1]}x{filed['num_frames']}"
                yield _row(work, phase, measured[phase.name], known) | {"warm": phase.name == a_step}


def _traced(
    row: Checkpoint, size: tuple[int, int, int], precision: str, guidance: tuple[float, ...] | None
) -> tuple[PhaseTrace, ...]:
    request = Request(
        image=PHOTO, prompt="the rocket lifts off", model=row.id, width=size[0], height=size[1], num_frames=size[2],
        steps=3, seed=1, guidance=guidance,
    )  # fmt: skip
    plan = choose(request, row, Device.named("h200"), photo_size=(640, 427), precision=precision)
    return trace(plan, row)


def _row(work: str, phase: PhaseTrace, measured: float, known: Rates) -> dict[str, Any]:
    predicted = known.seconds_by_kind(phase.work)
    assert predicted
    before = sum(known.seconds(kind, phase) or 0.0 for kind in KINDS)
    now = sum(predicted.values())
    return {
        "work": work, "phase": phase.name, "measured_s": measured, "predicted_s": now, "error": now / measured - 1,
        "error_before": before / measured - 1, "predicted": predicted,
    }  # fmt: skip


def _known(file: Path | None) -> Rates:
    card = Device.named("h200")
    found = rates.of(card) if file is None else next(
        (Rates.from_json(each) for each in json.loads(file.read_text()).values() if each["device"] == card.name), None
    )  # fmt: skip
    assert found, "no rates of this card"
    return found


if __name__ == "__main__":
    main()
