"""A plan: what will be done, with a reason for every choice. Data only: it is saved, mailed, replayed.

Nothing is decided later than this.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, Self, TypeVar

from framefit.device import Device
from framefit.errors import UsageError
from framefit.request import ResolvedRequest

__all__ = ["SETTINGS", "Estimate", "Guidance", "Offload", "Plan", "Setting", "Tier"]

S = TypeVar("S", bound="Setting")

Tier = Literal["exact", "near", "lossy"]
"""exact: the same maths reordered; near: a bounded numeric error; lossy: another computation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One choice of a plan; every type of it is a class below."""

    type: ClassVar[str]
    values: ClassVar[tuple[str, ...]]
    """The plain ones."""
    more: ClassVar[str] = ""
    """A further form of value, as it is written for the user; empty: there is none."""
    tier: ClassVar[Tier] = "exact"

    value: str
    because: str = ""

    def __post_init__(self) -> None:
        if not self.accepts(self.value):
            possible = [*self.values, *filter(None, [self.more])]
            raise UsageError(
                f"{self.type}={self.value} is unknown: use {' or '.join(f'{self.type}={value}' for value in possible)}."
            )

    @classmethod
    def accepts(cls, value: str) -> bool:
        return value in cls.values


@dataclass(frozen=True, kw_only=True, slots=True)
class Guidance(Setting):
    """How the two branches of classifier-free guidance run: in one forward, or one after the other.

    Apart halves the activations; together gives small models fuller kernels. The maths is the same.
    """

    type = "guidance"
    values = ("together", "apart")


@dataclass(frozen=True, kw_only=True, slots=True)
class Offload(Setting):
    """Where the weights are that are not at work: on the device, or in host memory.

    In host memory a component comes as a whole for the phases that need it (part), or block by block or layer by
    layer while it computes. The maths is the same.
    """

    type = "offload"
    values = ("none", "part", "block", "leaf")
    more = "block:K"

    @classmethod
    def accepts(cls, value: str) -> bool:
        kind, colon, kept = value.partition(":")
        return value in cls.values or (kind == "block" and bool(colon) and kept.isdecimal() and int(kept) > 0)

    @property
    def level(self) -> str:
        """none, part, block or leaf."""
        return self.value.partition(":")[0]

    @property
    def kept(self) -> int:
        """Blocks of a denoiser that stay on the device while it is at work."""
        return int(self.value.partition(":")[2] or 0)


SETTINGS: dict[str, type[Setting]] = {kind.type: kind for kind in (Guidance, Offload)}
"""Every type of setting: the vocabulary of a plan."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What the run will need, in bytes."""

    weights_bytes: int
    """All components resident at the plan's precision."""
    free_bytes: int
    """What the device had free when the plan was made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything that a run needs to know."""

    request: ResolvedRequest
    device: Device
    precision: str
    """bf16, fp16 or fp32: of the weights and the arithmetic, except for components that stay in fp32"""
    settings: tuple[Setting, ...]
    estimate: Estimate
    photos: Mapping[str, str] = field(default_factory=dict)
    """"image", "last_image" -> SHA-256 of the file."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Field of the request, or "precision" -> why it is so."""

    @property
    def feasible(self) -> bool:
        """Whether the weights fit; activations come on top."""
        return self.estimate.weights_bytes <= self.estimate.free_bytes

    def setting(self, kind: type[S]) -> S:
        return next(s for s in self.settings if isinstance(s, kind))

    @property
    def offload(self) -> str:
        """The level; "none" too where a plan was made before there was one."""
        return next((s.level for s in self.settings if isinstance(s, Offload)), "none")

    def to_json(self) -> dict[str, Any]:
        settings = [{"type": s.type, "tier": s.tier, "value": s.value, "because": s.because} for s in self.settings]
        return {
            "feasible": self.feasible,
            "request": self.request.to_json(),
            "device": self.device.to_json(),
            "precision": self.precision,
            "settings": settings,
            "estimate": asdict(self.estimate),
            "photos": dict(self.photos),
            "reasons": dict(self.reasons),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        settings = tuple(SETTINGS[s["type"]](value=s["value"], because=s["because"]) for s in data["settings"])
        return cls(
            request=ResolvedRequest.from_json(data["request"]),
            device=Device.from_json(data["device"]),
            precision=data["precision"],
            settings=settings,
            estimate=Estimate(**data["estimate"]),
            photos=data["photos"],
            reasons=data["reasons"],
        )

    def dumps(self) -> str:
        return json.dumps(self.to_json(), indent=2)
