"""The rows of a waterfall: who computes, and with which settings of the plan.

    stock                 diffusers' model, eager
    framefit              our road with the plan's own choices
    + setting=value       one further setting a row, on top of all before it, in the order of `passes.ORDER`;
                          what rounds the weights last, so that the others stay exact
    cache-dit             the peer, where it is installed and applies

A new type of setting makes its own rows; what a plan then refuses is listed as left out, with the refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from framefit.bench.scenarios import Scenario
from framefit.errors import UsageError
from framefit.passes import ORDER
from framefit.plan import SETTINGS

__all__ = ["AGAIN", "CACHE_DIT", "FRAMEFIT", "STOCK", "Engine", "Variant", "further", "parse"]

Engine = Literal["stock", "framefit", "cache-dit"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One row of a waterfall, before it is measured."""

    name: str
    engine: Engine
    settings: Mapping[str, str] = field(default_factory=dict)
    """Explicit settings of the plan by type; the plan chooses the others."""


STOCK = Variant(name="stock", engine="stock")
AGAIN = Variant(name="stock again", engine="stock")
"""Last, so that a card that warms up or slows down is seen."""
FRAMEFIT = Variant(name="framefit", engine="framefit")
CACHE_DIT = Variant(name="cache-dit offload", engine="cache-dit")

NEEDS: Mapping[str, Callable[[Scenario], bool]] = {
    "decode": lambda scenario: scenario.kind == "decode",
    "guidance": lambda scenario: scenario.branches == 2,
    "chunk": lambda scenario: scenario.group != "cpu",
    "offload": lambda scenario: scenario.group != "cpu",
    "quantize": lambda scenario: scenario.kind == "denoise",
    "window": lambda scenario: False,  # lossy, and only where it is asked for
}
"""Type of setting -> whether it can change anything in a scenario; one that is not here always may."""


def further(scenario: Scenario, chosen: Mapping[str, str]) -> list[Variant]:
    """A row for every value that the plan did not choose, each with the settings of the rows before it.

    Args:
        chosen: the plan's own settings, type -> value.
    """
    rows: list[Variant] = []
    settings: dict[str, str] = {}
    for kind, _ in sorted(ORDER, key=lambda each: each[0].type == "quantize"):
        if (useful := NEEDS.get(kind.type)) and not useful(scenario):
            continue
        for value in kind.values:
            if value != chosen.get(kind.type):
                settings = settings | {kind.type: value}
                rows.append(Variant(name=f"+ {kind.type}={value}", engine="framefit", settings=settings))
    return rows


def parse(texts: Iterable[str]) -> list[Variant]:
    """What `--rows` takes: stock, framefit, cache-dit, or SETTING=VALUE joined by plus signs.

    Raises:
        UsageError: none of these.
    """
    named = {"stock": STOCK, "framefit": FRAMEFIT, "cache-dit": CACHE_DIT}
    return [named.get(text) or _explicit(text) for text in texts]


def _explicit(text: str) -> Variant:
    settings = {}
    for part in text.split("+"):
        name, _, value = part.strip().partition("=")
        if name not in SETTINGS or not SETTINGS[name].accepts(value):
            possible = ", ".join(f"{kind.type}={v}" for kind in SETTINGS.values() for v in kind.possible())
            raise UsageError(f"row '{text}' is unknown: use stock, framefit, cache-dit, {possible}, or A=B+C=D.")
        settings[name] = value
    return Variant(name=text, engine="framefit", settings=settings)
