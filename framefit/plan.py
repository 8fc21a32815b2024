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

__all__ = ["SETTINGS", "Estimate", "Guidance", "Offload", "PhaseEstimate", "Plan", "Setting", "Tier", "Window"]

S = TypeVar("S", bound="Setting")

Tier = Literal["exact", "near", "lossy"]
"""exact: the same maths reordered; near: a bounded numeric error; lossy: another computation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One choice of a plan; every type of it is a class below."""

    type: ClassVar[str]
    title: ClassVar[str]
    """As a table of the plan heads it."""
    values: ClassVar[tuple[str, ...]]
    """The plain ones."""
    more: ClassVar[str] = ""
    """A further form of value, as it is written for the user; empty: there is none."""
    tier: ClassVar[Tier] = "exact"

    value: str
    because: str = ""

    def __post_init__(self) -> None:
        if not self.accepts(self.value):
            possible = " or ".join(f"{self.type}={value}" for value in self.possible())
            raise UsageError(f"{self.type}={self.value} is unknown: use {possible}.")

    @classmethod
    def accepts(cls, value: str) -> bool:
        return value in cls.values

    @classmethod
    def possible(cls) -> tuple[str, ...]:
        """As they are written for the user."""
        return (*cls.values, cls.more) if cls.more else cls.values


@dataclass(frozen=True, kw_only=True, slots=True)
class Guidance(Setting):
    """How the two branches of classifier-free guidance run: in one forward, or one after the other.

    Apart halves the activations; together gives small models fuller kernels. The maths is the same.
    """

    type = "guidance"
    title = "guidance branches"
    values = ("together", "apart")


@dataclass(frozen=True, kw_only=True, slots=True)
class Offload(Setting):
    """Where the weights are that are not at work: on the device, or in host memory.

    In host memory a component comes as a whole for the phases that need it (part), or block by block or layer by
    layer while it computes. The maths is the same.
    """

    type = "offload"
    title = "offload of weights"
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Window(Setting):
    """How a video that is longer than the model was trained for is predicted: whole, or in overlapping windows.

    FRAMES:OVERLAP is in frames of the video: the length of a window, and what it shares with the one before.
    """

    type = "window"
    title = "windows of frames"
    values = ("none",)
    more = "FRAMES:OVERLAP"

    @classmethod
    def accepts(cls, value: str) -> bool:
        frames, _, overlap = value.partition(":")
        whole = frames.isdecimal() and overlap.isdecimal()
        return value in cls.values or (whole and 0 < int(overlap) < int(frames))

    @property
    def tier(self) -> Tier:  # type: ignore[override]
        """Without windows nothing changes."""
        return "exact" if self.value == "none" else "lossy"

    @property
    def frames(self) -> int:
        """Of a window; 0: there are none."""
        return 0 if self.value == "none" else int(self.value.partition(":")[0])

    @property
    def overlap(self) -> int:
        """Frames that two neighbours share."""
        return int(self.value.partition(":")[2] or 0)


SETTINGS: dict[str, type[Setting]] = {kind.type: kind for kind in (Guidance, Window, Offload)}
"""Every type of setting: the vocabulary of a plan."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseEstimate:
    """What one phase of the run will need."""

    name: str
    seconds: float | None
    """In the whole run, at the device's rates; None where these are not known."""
    peak_vram_bytes: int
    """Reserved by the run on the card, when it is most; CUDA's context is beside it. 0 on the CPU."""
    host_bytes: int
    """Tensors in RAM, when they are most."""
    disk_bytes: int
    """Temporary files."""
    held: Mapping[str, int]
    """What is largest at the peak, by name, in bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What the run will need."""

    weights_bytes: int
    """All components resident at the plan's precision."""
    phases: tuple[PhaseEstimate, ...] = ()
    """In the order of the run; empty where no dry run was made."""
    origin: str = ""
    """What the seconds rest on."""
    free_bytes: int
    """What a run may reserve where weights and activations go, when the plan was made."""

    @property
    def binding(self) -> PhaseEstimate | None:
        """The phase that needs most of the card, or of RAM without one."""
        return max(self.phases, key=self._needs, default=None)

    @property
    def peak_bytes(self) -> int:
        """On the card, or in RAM without one; without a dry run the weights alone."""
        return self._needs(self.binding) if self.binding else self.weights_bytes

    def _needs(self, phase: PhaseEstimate) -> int:
        on_card = any(each.peak_vram_bytes for each in self.phases)
        return phase.peak_vram_bytes if on_card else phase.host_bytes

    @property
    def seconds(self) -> float | None:
        """After loading; None where those of a phase are not known."""
        known = [phase.seconds for phase in self.phases if phase.name != "load"]
        return None if not known or None in known else sum(seconds for seconds in known if seconds is not None)

    def told(self) -> dict[str, Any]:
        """What a plan says of it on its first level."""
        return {
            "phases": [asdict(phase) for phase in self.phases], "seconds": self.seconds,
            "binding_phase": self.binding.name if self.binding else None,
            "peak_vram_bytes": max((phase.peak_vram_bytes for phase in self.phases), default=None),
        }  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        return {"weights_bytes": self.weights_bytes, "free_bytes": self.free_bytes, "origin": self.origin}

    @classmethod
    def from_json(cls, data: dict[str, Any], phases: list[dict[str, Any]]) -> Self:
        return cls(**data, phases=tuple(PhaseEstimate(**phase) for phase in phases))


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
        """Whether its largest phase fits, on a card in RAM too; without a dry run, whether the weights do."""
        return self.estimate.peak_bytes <= self.estimate.free_bytes and self.host_fits

    @property
    def host_fits(self) -> bool:
        """Whether the weights that are kept in RAM for a card fit there."""
        needs = max((phase.host_bytes for phase in self.estimate.phases), default=0)
        return self.device.id == "cpu" or self.offload == "none" or needs <= self.device.ram_free_bytes

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
            **self.estimate.told(),
            "estimate": self.estimate.to_json(),
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
            estimate=Estimate.from_json(data["estimate"], data.get("phases", [])),
            photos=data["photos"],
            reasons=data["reasons"],
        )

    def dumps(self) -> str:
        return json.dumps(self.to_json(), indent=2)
