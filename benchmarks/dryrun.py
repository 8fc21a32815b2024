"""What the dry run predicts beside what one card measured, row by row and phase by phase. Needs no card.

    python benchmarks/dryrun.py [--measured benchmarks/full_size_h200_20261121.json] [--out benchmarks/dryrun_h200_DATE]

Predicted is what torch would have allocated: weights, tensors, workspaces of cuDNN and cuBLAS. The error is of the
whole and of what is not weights.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from framefit.device import Device
from framefit.families import CHECKPOINTS
from framefit.planning import choose
from framefit.planning.dryrun import trace
from framefit.rates import Unseen
from framefit.request import Request

HERE = Path(__file__).parent
PHOTO = HERE.parent / "framefit" / "assets" / "rocket.jpg"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--measured", type=Path, default=HERE / "full_size_h200_20261121.json")
    arguments.add_argument("--out", type=Path, help="file name without its ending; default: nothing is filed")
    flags = arguments.parse_args()
    rows = [row for filed in json.loads(flags.measured.read_text()) for row in predicted(filed)]
    table = markdown(rows)
    print(table)
    if flags.out:
        flags.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
        flags.out.with_suffix(".md").write_text(f"# The dry run beside {flags.measured.name}\n\n{table}\n")


def predicted(filed: dict[str, Any]) -> list[dict[str, Any]]:
    row, (width, height) = CHECKPOINTS[filed["id"]], filed["size"]
    request = Request(
        image=PHOTO, prompt="the rocket lifts off", model=row.id, width=width, height=height,
        num_frames=filed["num_frames"], steps=3, seed=1,
    )  # fmt: skip
    card = Device.named("h200")
    assert card.compute_capability is not None
    plan = choose(request, row, card, photo_size=(640, 427), precision=filed["precision"])
    began = time.perf_counter()
    traces = trace(plan, row)
    seconds = time.perf_counter() - began
    measured = {phase["name"]: phase["peak_bytes"] for phase in filed["phases"]}
    weights, rows = filed["weights_bytes"]["allocated"], []
    for phase in traces:
        own = phase.peak_bytes + Unseen.assumed(card.compute_capability).cublas_workspace_bytes
        whole = sum(phase.weights_bytes.values()) + own
        rows.append({
            "id": row.id, "size": [width, height], "num_frames": filed["num_frames"], "phase": phase.name,
            "predicted_bytes": whole, "measured_bytes": measured[phase.name],
            "error": round(whole / measured[phase.name] - 1, 4),
            "error_without_weights": round(own / (measured[phase.name] - weights) - 1, 4),
            "tflop": round(sum(phase.flops.values()) / 1e12, 1), "most": next(iter(phase.held), ""),
            "traced_s": round(seconds, 1),
        })  # fmt: skip
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| work | phase | predicted GiB | measured GiB | error | without weights | TFLOP |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        work = f"{row['id']} {row['size'][0]}x{row['size'][1]}x{row['num_frames']}"
        lines.append(
            f"| {work} | {row['phase']} | {row['predicted_bytes'] / 2**30:.2f} | {row['measured_bytes'] / 2**30:.2f} "
            f"| {row['error']:+.1%} | {row['error_without_weights']:+.0%} | {row['tflop']} |"
        )
    errors = [abs(row["error"]) for row in rows]
    under = min(row["error"] for row in rows)
    return "\n".join(
        [*lines, "", f"Largest error {max(errors):.1%}; the furthest under is {under:+.1%}; {len(rows)} phases."]
    )


if __name__ == "__main__":
    main()
