"""A picture of what the bundled model does, for the README: frames of one video a row.

    python -m training.strips [--out docs/tiny.jpg]

The photos are held-out ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from framefit.families import find
from framefit.pipeline import Pipeline, load
from framefit.request import Request
from framefit.run import Options, prepare

__all__ = ["main"]

HELDOUT = Path(__file__).with_name("heldout")
SHOWN = (
    ("mont-st-michel.jpg", "the camera pans left"),
    ("scarlet-macaw.jpg", "镜头推近"),
    ("machu-picchu.jpg", "the camera rolls clockwise"),
)
FRAMES = (0, 8, 16)
GAP = 4


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw frames of three videos of the bundled model.")
    parser.add_argument("--out", type=Path, default=Path("docs/tiny.jpg"))
    out: Path = parser.parse_args().out
    rows = [_row(HELDOUT / photo, prompt) for photo, prompt in SHOWN]
    width, height = rows[0].size
    sheet = Image.new("RGB", (width, (height + GAP) * len(rows) - GAP), "white")
    for number, row in enumerate(rows):
        sheet.paste(row, (0, number * (height + GAP)))
    sheet.save(out, quality=85)


def _row(photo: Path, prompt: str) -> Image.Image:
    request = Request(image=photo, prompt=prompt, seed=1)
    _, plan = prepare(request, Options(device="cpu", checkpoints=None, use_tuned=False))
    frames = list(Pipeline(plan, load(plan, find("tiny")).parts).run().frames)
    height = frames[0].shape[0]
    gap = np.full((height, GAP, 3), 255, dtype=np.uint8)
    parts = [part for number in FRAMES for part in (frames[number], gap)][:-1]
    row = Image.fromarray(np.concatenate(parts, axis=1))
    if prompt.isascii():  # Pillow's own font has no Chinese; the caption beside the picture names those prompts
        ImageDraw.Draw(row).text(
            (6, height - 18), prompt, fill="white", stroke_fill="black", stroke_width=2,
            font=ImageFont.load_default(12),
        )  # fmt: skip
    return row


if __name__ == "__main__":
    main()
