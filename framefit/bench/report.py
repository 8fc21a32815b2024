"""A result for people: a Markdown table and a picture of the waterfall."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from framefit.bench.result import Result, Row
from framefit.errors import BadOutput

__all__ = [
    "check_outputs", "line", "markdown", "overview", "picture", "seconds", "size", "table", "write",
]  # fmt: skip

COLUMNS = (
    "row", "median", "min to max", "x stock", "peak", "reserved", "predicted -> measured", "TFLOP/s", "of ceiling",
    "relative L2", "max abs", "PSNR", "tier",
)  # fmt: skip

DRIFT = 0.02
"""Stock's change from beginning to end that is called out."""

HELPFUL = 4
"""Findings of a row that are told; the JSON has all."""

COLOURS = {"stock": "#9aa0a6", "exact": "#2f7ed8", "near": "#e08a1e", "lossy": "#b5539c", "peer": "#4f9d69"}


def check_outputs(folder: Path, names: list[str], *, overwrite: bool) -> None:
    """Refuse before anything is measured.

    Raises:
        BadOutput: a file of these names is there and may not be replaced, or the folder cannot be made.
    """
    there = [f for name in names for f in (folder / f"{name}{end}" for end in (".json", ".md", ".png")) if f.exists()]
    if there and not overwrite:
        raise BadOutput(f"{there[0]} is there already: add --overwrite, or give another folder with -o.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadOutput(f"{folder} cannot be made a folder for the results ({error.strerror}).") from None


def write(result: Result, folder: Path) -> str | None:
    """<name>.json, .md and .png in `folder`; says why where there is no picture."""
    stem = folder / result.scenario.name
    table, data = stem.with_name(f"{stem.name}.md"), stem.with_name(f"{stem.name}.json")
    data.write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
    table.write_text(markdown(result), encoding="utf-8")
    try:
        picture(result, stem.with_name(f"{stem.name}.png"))
    except ImportError:
        return "no picture: it needs matplotlib (pip install 'framefit[quality]')."
    return None


def markdown(result: Result) -> str:
    """Heading, machine, one line a row, and whatever was not measured with its reason."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    rows += [_cells(result, row) for row in result.rows if row.seconds]
    rest = [f"- {row.name}: {row.status}, {row.because}" for row in result.rows if not row.seconds]
    if told := _drift(result):
        rest.append(f"- {told}")
    parts = [
        f"# {result.scenario.name}",
        _title(result),
        _machine(result),
        table(rows),
        "\n".join(rest),
        _profiles(result),
        _advice(result),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def overview(results: Sequence[Result]) -> str:
    """All rows of several scenarios in one table."""
    heading = ("scenario", "row", "median", "x stock", "peak", "reserved", "TFLOP", "TFLOP/s", "of ceiling")
    lines = [heading]
    for result in results:
        for row in result.rows:
            rate = result.rate(row)
            lines.append(
                (
                    result.scenario.name, row.name, seconds(row.median_s) if row.seconds else row.status,
                    _or_dash(result.ratio(row), "{:.2f}"), size(row.peak_allocated_bytes),
                    size(row.peak_reserved_bytes), "-" if row.flops is None else f"{row.flops / 1e12:.3g}",
                    "-" if rate is None else f"{rate / 1e12:.3g}", _or_dash(result.share(row), "{:.0%}"),
                )
            )  # fmt: skip
    machines = "\n".join(dict.fromkeys(_machine(result) for result in results))
    return f"# {len(results)} scenarios\n\n{machines}\n\n{table(lines)}\n"


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Markdown with columns as wide as their widest cell; the heading comes first, and alone it is nothing."""
    if len(rows) == 1:
        return ""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    heading, *below = rows
    lines = [heading, tuple("-" * width for width in widths), *below]
    return "\n".join(f"| {' | '.join(map(str.ljust, cells, widths))} |" for cells in lines)


def line(row: Row) -> str:
    """One row while the bench goes on."""
    if not row.seconds:
        return f"{row.name}: {row.status}, {row.because}"
    peak = "" if row.peak_allocated_bytes is None else f", peak {size(row.peak_allocated_bytes)}"
    return f"{row.name}: {seconds(row.median_s)}{peak} (built in {row.build_s or 0:.1f} s)"


def picture(result: Result, file: Path) -> None:
    """The waterfall as a PNG: seconds of every row beside its peak memory.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    rows = result.rows
    figure = Figure(figsize=(11, 1.7 + 0.55 * len(rows)), layout="constrained")
    times, memory = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for y, row in enumerate(rows):
        _bars(result, row, y, times, memory)
    if result.stock_s:
        times.axvline(result.stock_s, color="#555555", linewidth=1, linestyle="--")
    times.set_yticks(range(len(rows)), [row.name for row in rows])
    times.invert_yaxis()
    times.set_title("seconds: median, line from least to most", loc="left", fontsize=10)
    on_card = any(row.peak_reserved_bytes is not None for row in rows)
    memory.set_title(
        "peak memory, GiB: allocated, pale: reserved" if on_card else "peak memory, GiB: the whole process",
        loc="left", fontsize=10,
    )  # fmt: skip
    for axes in (times, memory):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xlim(0, axes.get_xlim()[1] * 1.3)  # room for the figures at the bars' ends
    times.set_xlabel(_drift(result), loc="left", fontsize=9, color="#555555")
    figure.suptitle(f"{_title(result)}\n", x=0.01, ha="left", fontsize=13, fontweight="bold")
    figure.text(0.01, 1 - 0.36 / figure.get_figheight(), _machine(result), fontsize=9, color="#555555", va="top")
    figure.savefig(file, dpi=130)


def _bars(result: Result, row: Row, y: int, times: Any, memory: Any) -> None:
    """One row of both halves; a row without figures says why in their place."""
    if not row.seconds:
        text = f"{row.status}: {row.because}"
        _label(times, textwrap.shorten(text, 90), 0, y, fontsize=9, color="#aa3333")
        return
    colour = COLOURS[row.tier or ("stock" if row.name.startswith("stock") else "peer")]
    least, _, _, most = row.spread_s
    ratio = result.ratio(row)
    times.barh(y, row.median_s, height=0.6, color=colour)
    times.plot((least, most), (y, y), color="black", linewidth=1.2)
    label = seconds(row.median_s) + ("" if ratio is None else f"   {ratio:.2f}x")
    _label(times, label, most, y)
    peaks = [peak / 2**30 for peak in (row.peak_reserved_bytes, row.peak_allocated_bytes) if peak is not None]
    for peak, alpha in zip(peaks, (0.35, 1.0) if len(peaks) == 2 else (1.0,), strict=True):
        memory.barh(y, peak, height=0.6, color=colour, alpha=alpha)
    _label(memory, " / ".join(f"{peak:.2f}" for peak in reversed(peaks)), max(peaks), y)


def _label(axes: Any, text: str, x: float, y: float, *, fontsize: int = 10, color: str = "black") -> None:
    """Right of (x, y), on white, so that the line at stock does not run through it."""
    white = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
    axes.annotate(
        text, (x, y), (8, 0), textcoords="offset points", va="center", fontsize=fontsize, color=color, bbox=white
    )  # fmt: skip


def _profiles(result: Result) -> str:
    """With --profile, a line for each kind of work of each row."""
    heading = ("row", "kind of work", "device time", "share", "TFLOP/s", "GB/s", "of ceiling", "launches")
    lines = [heading]
    for row in result.rows:
        for kind, cost in row.profile.get("kinds", {}).items():
            lines.append(
                (
                    row.name, kind, seconds(cost["seconds"]), _or_dash(cost["share"], "{:.1%}"),
                    f"{cost['tflops']:.3g}", f"{cost['gb_per_s']:.3g}", _or_dash(cost["of_ceiling"], "{:.0%}"),
                    f"{cost['launches']:.0f}",
                )
            )  # fmt: skip
    return table(lines)


def _advice(result: Result) -> str:
    """With --profile, what would help each row most, and how much of a call each may save at the most."""
    lines = []
    for row in result.rows:
        for found in row.advice[:HELPFUL]:
            told = [f"{advice['do']} ({_saved(row, advice)})" for advice in found["advice"] if advice["tier"]]
            lines.append(f"- {row.name}, {found['rule']}: {found['because']}. {'; '.join(told)}")
    return "\n".join(["## Advice", "", *lines]) if lines else ""


def _saved(row: Row, advice: Mapping[str, Any]) -> str:
    return f"{advice['gain_s'] / row.median_s:.0%}, {advice['tier']}"


def _title(result: Result) -> str:
    note = result.scenario.note if result.weights == result.scenario.weights else ""
    return result.scenario.title + (f" ({note})" if note else "")


def _drift(result: Result) -> str:
    if result.drift is None:
        return ""
    doubt = "; ratios nearer to 1 than that mean nothing" if abs(result.drift) > DRIFT else ""
    way = "longer" if result.drift > 0 else "less long"
    return f"stock took {abs(result.drift):.1%} {way} at the end than at the beginning, ratios are to the mean{doubt}"


def _machine(result: Result) -> str:
    threads = f", {result.threads} threads" if result.threads else ""
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    weights = "random weights" if result.weights == "random" else f"weights {result.weights}"
    return f"{result.hardware}{threads}, {result.precision}, {weights}, {versions}, {result.date[:10]}"


def _cells(result: Result, row: Row) -> tuple[str, ...]:
    least, _, _, most = row.spread_s
    ratio, rate, share = result.ratio(row), result.rate(row), result.share(row)
    psnr = row.quality.get("psnr_db", 0.0)
    return (
        row.name,
        seconds(row.median_s),
        f"{seconds(least)} to {seconds(most)}",
        _or_dash(ratio, "{:.2f}"),
        size(row.peak_allocated_bytes),
        size(row.peak_reserved_bytes),
        "; ".join(_prediction(row, name) for name in row.predicted if name in row.measured),
        "-" if rate is None else f"{rate / 1e12:.3g}",
        _or_dash(share, "{:.0%}"),
        _or_dash(row.quality.get("relative_l2"), "{:.2g}"),
        _or_dash(row.quality.get("max_abs"), "{:.2g}"),
        "equal" if psnr is None else f"{psnr:.1f} dB" if psnr else "-",
        row.tier or "-",
    )


def _prediction(row: Row, name: str) -> str:
    predicted, measured = row.predicted[name], row.measured[name]
    show = size if name.endswith("_bytes") else seconds
    what = name.removesuffix("_bytes").removesuffix("_s").replace("_", " ")
    return f"{what} {show(predicted)} -> {show(measured)} ({measured / predicted - 1:+.1%})" if predicted else what


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def seconds(value: float) -> str:
    """For people."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def size(value: float | None) -> str:
    """Bytes for people."""
    if value is None:
        return "-"
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.3g} MiB"
