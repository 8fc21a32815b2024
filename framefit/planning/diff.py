"""What differs between two plans: what was asked, the machine, the settings, and what each phase needs and takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from framefit.plan import PhaseEstimate, Plan

__all__ = ["Difference", "differences"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One fact; None where a plan lacks it."""

    what: str
    """Path of the fact, as in "decode.peak_vram_bytes"."""
    a: Any
    b: Any
    because: tuple[str, str] = ("", "")
    """Of a setting: why it is as it is, in each."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def differences(a: Plan, b: Plan) -> tuple[Difference, ...]:
    """In the order of a plan."""
    return tuple(each for each in _facts(a, b) if each.a != each.b)


def _facts(a: Plan, b: Plan) -> Iterator[Difference]:
    asked = a.request.to_json(), b.request.to_json()
    for name in asked[0]:
        yield Difference(what=f"request.{name}", a=asked[0][name], b=asked[1][name])
    yield Difference(what="device", a=a.device.name, b=b.device.name)
    yield Difference(what="budget_bytes", a=a.device.budget_bytes, b=b.device.budget_bytes)
    yield Difference(what="precision", a=a.precision, b=b.precision)
    settings = {s.type: s for s in a.settings}, {s.type: s for s in b.settings}
    for name in _both(*settings):
        one, other = settings[0].get(name), settings[1].get(name)
        yield Difference(
            what=name, a=one and one.value, b=other and other.value,
            because=(one.because if one else "", other.because if other else ""),
        )  # fmt: skip
    yield Difference(what="feasible", a=a.feasible, b=b.feasible)
    phases = {p.name: p for p in a.estimate.phases}, {p.name: p for p in b.estimate.phases}
    for name in _both(*phases):
        for fact in ("seconds", "peak_vram_bytes", "host_bytes", "disk_bytes"):
            yield Difference(what=f"{name}.{fact}", a=_of(phases[0], name, fact), b=_of(phases[1], name, fact))
    yield Difference(what="seconds", a=a.estimate.seconds, b=b.estimate.seconds)
    yield Difference(what="peak_bytes", a=a.estimate.peak_bytes, b=b.estimate.peak_bytes)


def _of(phases: dict[str, PhaseEstimate], name: str, fact: str) -> Any:
    return getattr(phases[name], fact) if name in phases else None


def _both(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return [*a, *(name for name in b if name not in a)]
