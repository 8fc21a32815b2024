"""Stock diffusers at every size of the goals on one page: seconds, memory, where the time goes, what would help.

    framefit bench goals --rows stock --profile -o FOLDER
    python benchmarks/stock.py FOLDER ... --out benchmarks/stock_h200_DATE

Beside each row stands what was measured on the same kind of card before framefit had a bench, by hand: EARLIER.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from framefit.bench.result import Result, read

GIB = 2**30
EARLIER = {
    "wan2.2-a14b-480p": (3.20, 30.2),
    "wan2.2-a14b-720p": (12.1, 34.8),
    "wan2.2-ti2v-5b": (1.15, 14.4),
    "easyanimate-7b-384": (1.14, 14.7),
    "easyanimate-7b-576": (3.59, 17.2),
    "easyanimate-7b-768": (8.98, 20.6),
    "i2vgen-xl-512": (0.202, 5.3),
    "i2vgen-xl-768": (0.653, 11.4),
    "i2vgen-xl-1024": (1.61, 23.4),
    "wan2.1-vae-480p": (1.82, 4.8),
    "wan2.1-vae-720p": (4.17, 10.8),
    "wan2.2-vae": (5.9, 11.9),
    "magvit-384": (1.06, 5.9),
}
"""Scenario -> seconds, GiB allocated; H200, torch 2.11."""
COLOURS = {
    "attention": "#4c72b0", "matmul": "#dd8452", "convolution": "#55a868", "elementwise": "#c44e52",
    "transfer": "#8172b3", "idle": "#d9d9d9",
}  # fmt: skip


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folders", type=Path, nargs="+", help="that framefit bench wrote")
    arguments.add_argument("--out", type=Path, required=True, help="file name without its ending")
    flags = arguments.parse_args()
    found = {result.scenario.name: result for folder in flags.folders for result in _results(folder)}
    results = [found[name] for name in EARLIER if name in found]
    rows = [_row(result) for result in results]
    about = f"{results[0].hardware}, bf16, random weights, torch {results[0].versions['torch']}, diffusers "
    about += f"{results[0].versions['diffusers']}, {results[0].date[:10]}"
    flags.out.with_suffix(".json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    text = f"# Stock diffusers at every size of the goals\n\n{about}\n\n{markdown(rows)}"
    flags.out.with_suffix(".md").write_text(text)
    draw(rows, about, flags.out.with_suffix(".png"))
    print(text)
    if missing := [name for name in EARLIER if name not in found]:
        raise SystemExit(f"not measured: {', '.join(missing)}.")


def markdown(rows: list[dict[str, Any]]) -> str:
    """What it costs, where the time goes, and what would help."""
    lines = ["| work | seconds | min to max | earlier | GiB allocated | earlier | reserved | TFLOP | of ceiling |"]
    lines.append("|---" * 9 + "|")
    for row in rows:
        low, high = row["min_max_s"]
        lines.append(
            f"| {row['work']} | {row['seconds']:.3g} | {low:.3g} to {high:.3g} | {row['seconds_off']:+.1%} | "
            f"{row['allocated_bytes'] / GIB:.2f} | {row['allocated_off']:+.1%} | {row['reserved_bytes'] / GIB:.2f} | "
            f"{row['tflop']:.0f} | {row['of_ceiling']:.0%} |"
        )
    lines += [
        "",
        "Share of one profiled call, and in brackets how much of this card's measured ceiling is reached:",
        "",
    ]
    lines += [f"| work | {' | '.join(COLOURS)} | kernel launches |", "|---" * (len(COLOURS) + 2) + "|"]
    for row in rows:
        cells = [_cell(row["kinds"].get(kind)) for kind in COLOURS]
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {row['launches']:.0f} |")
    lines += ["", "`framefit diagnose`'s advice, the largest gain first; gains are of one call:", ""]
    for row in rows:
        lines += [f"- **{row['name']}**", *(f"    - {finding}" for finding in row["advice"])]
    return "\n".join(lines) + "\n"


def draw(rows: list[dict[str, Any]], about: str, file: Path) -> None:
    """A bar a row, as long as its time is shared out by kind of work."""
    figure, axes = plt.subplots(figsize=(11, 0.48 * len(rows) + 1.6), layout="constrained")
    for place, row in enumerate(rows):
        left = 0.0
        for kind, colour in COLOURS.items():
            share = 100 * row["kinds"].get(kind, {"share": 0.0})["share"]
            axes.barh(place, share, left=left, color=colour, label=kind if place == 0 else None)
            reached = row["kinds"].get(kind, {}).get("of_ceiling")
            if share >= 6:
                told = f"{share:.0f} %" + (f"\n({reached:.0%})" if reached else "")
                axes.text(left + share / 2, place, told, ha="center", va="center", fontsize=7)
            left += share
        axes.text(101, place, f"{row['seconds']:.3g} s", va="center", fontsize=8)
    axes.set(yticks=range(len(rows)), yticklabels=[row["name"] for row in rows], xlim=(0, 107))
    axes.set_xlabel("share of the time in %; in brackets: of the card's measured ceiling for this kind of work")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=len(COLOURS), loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=8)
    figure.suptitle(f"Where stock diffusers spends its time\n{about}", fontsize=10, ha="left", x=0.01)
    figure.savefig(file, dpi=110)


def _results(folder: Path) -> list[Result]:
    return [read(file) for file in sorted(folder.glob("*.json"))]


def _row(result: Result) -> dict[str, Any]:
    """Everything that is told of one scenario."""
    scenario, (row,) = result.scenario, [row for row in result.rows if row.name == "stock"]
    seconds, gib = EARLIER[scenario.name]
    profile = row.profile
    kinds = {
        name: {key: kind[key] for key in ("seconds", "share", "of_ceiling", "tflops", "gb_per_s", "launches")}
        for name, kind in profile["kinds"].items()
    }
    kinds["idle"] = {"seconds": profile["idle_s"], "share": profile["idle_s"] / profile["wall_s"], "of_ceiling": None}
    assert row.peak_allocated_bytes
    return {
        "name": scenario.name, "work": scenario.title, "seconds": row.median_s,
        "min_max_s": [min(row.seconds), max(row.seconds)],
        "seconds_off": row.median_s / seconds - 1, "allocated_bytes": row.peak_allocated_bytes,
        "allocated_off": row.peak_allocated_bytes / GIB / gib - 1, "reserved_bytes": row.peak_reserved_bytes,
        "tflop": (row.flops or 0) / 1e12, "of_ceiling": result.share(row), "launches": profile["launches"],
        "kinds": kinds, "kernels": profile["kernels"][:5], "advice": [_told(each, row.median_s) for each in row.advice],
    }  # fmt: skip


def _told(finding: Any, call_s: float) -> str:
    """A finding with what to do, in a line."""
    remedies = [
        f"{each['do']} ({each['gain_s'] / call_s:.0%}, {each['tier'] or 'less work'})" for each in finding["advice"]
    ]
    return f"{finding['rule']}: {finding['because']}. {'; '.join(remedies)}"


def _cell(kind: dict[str, Any] | None) -> str:
    if not kind or not kind["share"]:
        return "-"
    return f"{kind['share']:.1%}" + (f" ({kind['of_ceiling']:.0%})" if kind["of_ceiling"] else "")


if __name__ == "__main__":
    main()
