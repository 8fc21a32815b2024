"""The table of what fits where: every model on cards of 8 to 48 GB, the largest size and length, and how.

Some minutes the first time; what was traced is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from framefit.device import Device
from framefit.families import CHECKPOINTS, Checkpoint
from framefit.plan import Plan, Tier
from framefit.planning.choose import choose, untouched
from framefit.planning.fit import fitted
from framefit.request import Request

__all__ = ["COLUMNS", "MACHINES", "Row", "markdown", "rows"]

GIB = 2**30
MACHINES = {"rtx-3070": 8, "rtx-3060-12gb": 12, "rtx-4080": 16, "rtx-4090": 24, "l40s": 48}
"""Card -> its nominal GB."""
RAM_BYTES = 96 * GIB
"""Free in the machine that each is taken to be in."""
COLUMNS = ("model", "card", "size", "frames", "settings", "minutes", "card GiB", "RAM GiB")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One model on one card."""

    model: str
    card: str
    plan: Plan | None
    """The largest that fits; None: nothing does."""

    def cells(self) -> tuple[str, ...]:
        card = f"{MACHINES[self.card]} GB ({self.card})"
        if self.plan is None:
            return (self.model, card, "nothing", *("-" for _ in COLUMNS[3:]))
        request, estimate = self.plan.request, self.plan.estimate
        usual = {s.type: s.value for s in untouched(CHECKPOINTS[self.model])}
        settings = " ".join(f"{s.type}={s.value}" for s in self.plan.settings if s.value != usual[s.type]) or "-"
        minutes = "-" if estimate.seconds is None else f"{estimate.seconds / 60:.1f}"
        # all on the card: RAM holds one component at a time while loading
        host = max(phase.host_bytes for phase in estimate.phases)
        return (
            self.model, card, f"{request.width}x{request.height}", str(request.num_frames), settings, minutes,
            f"{estimate.peak_bytes / GIB:.1f}", f"{host / GIB:.1f}",
        )  # fmt: skip


def rows(
    *, tier: Tier = "exact", ram_bytes: int | None = None, models: tuple[str, ...] = (), told: Callable[[str], None]
) -> Iterator[Row]:
    """Model by model, card by card.

    Args:
        models: ids; empty: all that are published.
        told: hears what is planned next.
    """
    for id in models or tuple(CHECKPOINTS):
        for card in MACHINES:
            told(f"{id} on {card}")
            device = Device.named(card, ram_bytes=ram_bytes or RAM_BYTES)
            yield Row(model=id, card=card, plan=_largest(CHECKPOINTS[id], device, tier))


def markdown(rows: list[Row]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row.cells())} |" for row in rows)])


def _largest(checkpoint: Checkpoint, device: Device, tier: Tier) -> Plan | None:
    """Of the sizes and lengths of the model's presets, the one with most pixels that fits."""
    for width, height, num_frames in _works(checkpoint):
        request = Request(
            image=Path("photo.jpg"), prompt="-", model=checkpoint.id, width=width, height=height,
            num_frames=num_frames, seed=0,
        )  # fmt: skip
        plan = fitted(choose(request, checkpoint, device, photo_size=(width, height)), checkpoint, tier=tier)
        if plan.feasible:
            return replace(plan, photos={})
    return None


def _works(checkpoint: Checkpoint) -> list[tuple[int, int, int]]:
    named = set()
    for fields in checkpoint.presets.values():
        size = (fields["width"], fields["height"]) if fields.get("width") else checkpoint.sizes.default
        named.add((*size, fields.get("num_frames", checkpoint.frames.default)))
    return sorted(named, key=lambda work: (-work[0] * work[1] * work[2], work))
