"""A flame graph of device time as one SVG: phases, their modules, the kinds of work in them, the kernels.

Read from the top down; width is device time, and what a frame is shows on hovering. The file needs nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from xml.sax.saxutils import escape, quoteattr

from framefit.ledger.kinds import KINDS, Kind
from framefit.profiling.trace import Work

__all__ = ["Frame", "svg", "tree"]

COLOURS: dict[Kind | None, str] = {
    "attention": "#e4784f", "matmul": "#5b8fc9", "convolution": "#58a87c", "elementwise": "#d9b44a",
    "transfer": "#9c7bb8", None: "#d8d6d1",
}  # fmt: skip
WIDTH, ROW, MARGIN, LETTER = 1400, 20, 12, 6.4
"""Pixels: the picture, a row, around it, a letter of the labels."""

SMALLEST = 0.4
"""Pixels below which a frame is left out."""


@dataclass(slots=True)
class Frame:
    """A box of the graph, as wide as its seconds; its children are within it."""

    name: str
    kind: Kind | None = None
    seconds: float = 0.0
    count: int = 0
    children: dict[str, Frame] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        return 1 + max((child.depth for child in self.children.values()), default=0)

    def child(self, name: str, kind: Kind | None) -> Frame:
        return self.children.setdefault(name, Frame(name, kind))


def tree(works: Iterable[Work], root: str = "all phases") -> Frame:
    """Phases, modules, kinds, kernels; pieces of one path are added up."""
    top = Frame(root)
    for work in works:
        frames = [top, top.child(work.phase or "between phases", None)]
        for module in work.path:
            frames.append(frames[-1].child(module, None))
        frames.append(frames[-1].child(work.kind, work.kind))
        frames.append(frames[-1].child(work.name, work.kind))
        for frame in frames:
            frame.seconds += work.seconds
            frame.count += 1
    return top


def svg(top: Frame, title: str) -> str:
    """The picture of `top`."""
    height = 3 * MARGIN + (top.depth + 2) * ROW
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
            ' font-family="ui-monospace, Menlo, Consolas, monospace" font-size="11">',
            f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
            f'<text x="{MARGIN}" y="{MARGIN + 12}" font-size="14" fill="#222222">{escape(title)}</text>',
            *_legend(MARGIN + ROW + 6),
            *_boxes(top, top, MARGIN, 2 * MARGIN + 2 * ROW, WIDTH - 2 * MARGIN),
            "</svg>",
            "",
        ]
    )


def _legend(y: float) -> Iterator[str]:
    x = MARGIN
    for kind in KINDS:
        yield f'<rect x="{x}" y="{y}" width="11" height="11" rx="2" fill="{COLOURS[kind]}"/>'
        yield f'<text x="{x + 16}" y="{y + 10}" fill="#444444">{kind}</text>'
        x += round(34 + len(kind) * LETTER)
    yield f'<text x="{x}" y="{y + 10}" fill="#888888">width: device time; hover for figures</text>'


def _boxes(frame: Frame, top: Frame, x: float, y: float, width: float) -> Iterator[str]:
    """Phases stand in the order of the run, all else by size."""
    if width < SMALLEST:
        return
    share = frame.seconds / top.seconds if top.seconds else 0.0
    told = f"{frame.name}\n{_seconds(frame.seconds)}, {share:.1%} of all, {frame.count} pieces of work"
    yield (
        f'<g data-seconds="{frame.seconds:.9g}"><title>{escape(told)}</title>'
        f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{ROW - 1}" rx="1.5" fill="{COLOURS[frame.kind]}" '
        f'stroke="#ffffff" stroke-width="0.6" aria-label={quoteattr(frame.name)}/>{_label(frame, x, y, width)}</g>'
    )
    for child in sorted(frame.children.values(), key=lambda child: 0 if frame is top else -child.seconds):
        inside = width * child.seconds / frame.seconds if frame.seconds else 0.0
        yield from _boxes(child, top, x, y + ROW, inside)
        x += inside


def _label(frame: Frame, x: float, y: float, width: float) -> str:
    """As much of the name as there is room for."""
    letters = int((width - 8) / LETTER)
    if letters < 3:
        return ""
    name = frame.name.removeprefix("aten::")
    text = f"{name}  {_seconds(frame.seconds)}"
    if len(text) > letters:
        text = name if len(name) <= letters else name[: letters - 1] + "…"
    return f'<text x="{x + 4:.2f}" y="{y + 13}" fill="#1c1c1c" pointer-events="none">{escape(text)}</text>'


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} µs"
