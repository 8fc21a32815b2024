"""How the training went: the parts' reports in one JSON, and their curves in one picture.

    python -m training.curves --name training_h200_20261121 [--data .data] [--out training/results]

Needs matplotlib. A part that has not been trained is left out.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

__all__ = ["PARTS", "collect", "draw", "main", "readable", "thinned"]

Json = dict[str, Any]
Curve = dict[str, list[float]]
"""Figure -> its values; all of one length."""

PARTS = {
    "text": ("text/text.json", "Text encoder"),
    "pictures": ("vae/pictures.json", "Autoencoder, pictures"),
    "clips": ("vae/clips.json", "Autoencoder, clips"),
    "together": ("vae/together.json", "Autoencoder, both"),
    "base": ("experts/base.json", "All noise levels"),
    "high": ("experts/high.json", "High noise"),
    "low": ("experts/low.json", "Low noise"),
    "few": ("experts/few.json", "Few-step form"),
}
"""Part -> its report below the data folder, and its name."""

MOST_POINTS = 120
SHOWN = {
    "loss": ("Loss", "tab:blue"),
    "noisiest": ("Loss, noisiest eighth", "tab:orange"),
    "db": ("PSNR in training", "tab:green"),
}
"""Figure of a curve -> its name and its colour."""


def main() -> None:
    options = _options()
    report = collect(options.data)
    if not report:
        raise SystemExit(f"{options.data} holds no report of a training: train a part first, or name another --data.")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.name}.json").write_text(readable(report), encoding="utf-8")
    draw(report, options.out / f"{options.name}.png")


def collect(data: Path) -> Json:
    """Part -> its report: configuration, seed, seconds, steps, figures, and the curve at few enough points to read."""
    return {
        part: _report(json.loads((data / file).read_text(encoding="utf-8")))
        for part, (file, _) in PARTS.items()
        if (data / file).exists()
    }


def thinned(curve: Sequence[Mapping[str, float]], most: int = MOST_POINTS) -> Curve:
    """Means over neighbours, with the step and the seconds of the last of them, at no more than `most` points."""
    together = math.ceil(len(curve) / most) or 1
    groups = [curve[start : start + together] for start in range(0, len(curve), together)]
    # a figure may be absent where nothing of it was drawn
    names = dict.fromkeys(name for entry in curve for name in entry)
    return {name: [_of_group(name, group) for group in groups] for name in names}


def readable(report: Json) -> str:
    """JSON with a line for each list of numbers."""
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    return re.sub(r"\[[-+.\de,\s]*\]", lambda found: " ".join(found[0].split()), text) + "\n"


def draw(report: Mapping[str, Json], file: Path) -> None:
    """A panel for each part, as PNG."""
    columns = min(3, len(report))
    rows = math.ceil(len(report) / columns)
    figure = Figure(figsize=(5 * columns, 3.8 * rows), layout="constrained")
    for place, (part, one) in enumerate(report.items(), 1):
        _panel(figure.add_subplot(rows, columns, place), PARTS[part][1], one)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    # lines and letters need few colours
    Image.open(drawn).convert("RGB").quantize(64).save(file, optimize=True)


def _report(found: Json) -> Json:
    """Without what is only worth a look while it trains."""
    named = isinstance(found["curve"][0], dict)
    curve = found["curve"] if named else [{"step": step, "loss": loss} for step, loss in found["curve"]]
    kept = {name: value for name, value in found.items() if name != "curve" and not name.startswith("wrong_")}
    return {"step": curve[-1]["step"], **kept, "seconds": round(found["seconds"], 1), "curve": thinned(curve)}


def _of_group(name: str, group: Sequence[Mapping[str, float]]) -> float:
    if name in ("step", "seconds"):
        return group[-1][name]
    values = [entry[name] for entry in group if name in entry]
    return round(sum(values) / len(values), 6) if values else 0.0


def _panel(axes: Any, title: str, report: Json) -> None:
    curve: Curve = report["curve"]
    # the text encoder's curve has steps alone
    along, label = (curve["seconds"], "Training time (s)") if "seconds" in curve else (curve["step"], "Steps")
    for name in ("loss", "noisiest"):
        if name in curve:
            axes.plot(along, curve[name], label=SHOWN[name][0], color=SHOWN[name][1], linewidth=1.8)
    lines = axes.get_lines()
    _scale(axes)
    axes.set_title(f"{title}: {report['parameters'] / 1e6:.2f} M parameters", fontsize=14)
    axes.set_xlabel(label, fontsize=13)
    axes.set_ylabel("Loss", fontsize=13)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    sides = [axes]
    if "db" in curve:
        right = axes.twinx()
        name, colour = SHOWN["db"]
        lines += right.plot(along, curve["db"], label=name, color=colour, linewidth=1.8)
        right.set_ylabel("PSNR (dB)", fontsize=13)
        sides.append(right)
    for side in sides:
        side.tick_params(labelsize=12)
    if len(lines) > 1:
        place = "best" if sides == [axes] else "center right"
        sides[-1].legend(lines, [line.get_label() for line in lines], fontsize=12, loc=place)


def _scale(axes: Any) -> None:
    """Logarithmic where the curves span more than a factor of three, with plain numbers at the ticks."""
    values = [value for line in axes.get_lines() for value in line.get_ydata()]
    if max(values) > 3 * min(values) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="File and draw how the training went.")
    parser.add_argument("--data", type=Path, default=Path(".data"))
    parser.add_argument("--out", type=Path, default=Path("training/results"))
    parser.add_argument("--name", required=True, help="of both files: what, on which card, when")
    return parser.parse_args()


if __name__ == "__main__":
    main()
