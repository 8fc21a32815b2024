"""A plan: what will be done, with a reason for every choice. Data only: it is saved, mailed, replayed.

Nothing is decided later than this.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar, get_args

from framefit.device import Device
from framefit.errors import BadInput, UsageError
from framefit.request import ResolvedRequest

__all__ = [
    "ASKED", "QUALITIES", "SETTINGS", "TIERS", "Chunk", "Decode", "Estimate", "Guidance", "Offload", "PhaseEstimate",
    "Plan", "Quantize", "Setting", "Tier", "Window",
]  # fmt: skip

S = TypeVar("S", bound="Setting")

ASKED = "asked for"
"""Why a setting is as it is that the user gave: it wins over whatever would be derived."""

Tier = Literal["exact", "near", "lossy"]
"""exact: the same maths reordered; near: a bounded numeric error; lossy: another computation."""
TIERS: tuple[Tier, ...] = get_args(Tier)
QUALITIES: dict[str, Tier] = {"exact": "exact", "near": "near", "fast": "lossy"}
"""`--quality` -> the weakest tier that is allowed."""


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
    phases: ClassVar[tuple[str, ...]] = ("",)
    """What the names of the phases begin with that it changes; the empty one: of all."""

    value: str
    because: str = ""

    def __post_init__(self) -> None:
        if not self.accepts(self.value):
            possible = " or ".join(f"{self.type}={value}" for value in self.possible())
            raise UsageError(f"{self.type}={self.value} is unknown: use {possible}.")

    @property
    def tier(self) -> Tier:
        return "exact"

    @classmethod
    def accepts(cls, value: str) -> bool:
        return value in cls.values

    @property
    def asked(self) -> bool:
        """Whether the user gave it."""
        return self.because.startswith(ASKED)

    @classmethod
    def touches(cls, phase: str) -> bool:
        """Whether a phase, or what begins so, is another with this type's other values."""
        return any(phase.startswith(name) or name.startswith(phase) for name in cls.phases)

    @classmethod
    def possible(cls) -> tuple[str, ...]:
        """As they are written for the user."""
        return (*cls.values, cls.more) if cls.more else cls.values


@dataclass(frozen=True, kw_only=True, slots=True)
class Decode(Setting):
    """How much of a video the VAE takes at once, when it decodes and when it encodes the photo's video.

    Whole pictures, the frames of one latent together, as the reference does (whole); whole pictures one by one (frame),
    with what the layers remember of those before in RAM (ram), and tiles of at most PX pixels each way where pictures
    are largest (ram:PX); or one tile of all pictures after the other (tile:PX). The maths is the same. Tiles that do
    with half of what they depend on, and fade into each other, of a VAE in the plan's precision (blend:PX), differ a
    little.
    """

    type = "decode"
    title = "pieces of the VAE"
    values = ("whole", "frame", "ram")
    more = "tile:PX"
    phases = ("encode_image", "decode")

    @classmethod
    def accepts(cls, value: str) -> bool:
        kind, _, size = value.partition(":")
        return value in cls.values or (kind in ("ram", "tile", "blend") and size.isdecimal() and int(size) > 0)

    @classmethod
    def possible(cls) -> tuple[str, ...]:
        return (*cls.values, "ram:PX", cls.more, "blend:PX")

    @property
    def tier(self) -> Tier:
        return "near" if self.blend else "exact"

    @property
    def blend(self) -> bool:
        """Whether tiles fade into each other."""
        return self.value.startswith("blend:")

    @property
    def in_ram(self) -> bool:
        """Whether what layers remember lies there."""
        return self.value.partition(":")[0] == "ram"

    @property
    def tile_px(self) -> int:
        """0: whole pictures."""
        return int(self.value.partition(":")[2] or 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Guidance(Setting):
    """How the two branches of classifier-free guidance run: in one forward, or one after the other.

    Apart halves the activations; together gives small models fuller kernels. The maths is the same.
    """

    type = "guidance"
    title = "guidance branches"
    values = ("together", "apart")
    phases = ("denoise",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Offload(Setting):
    """Where the weights are that are not at work: on the device, or in host memory.

    In host memory a component comes as a whole for the phases that need it (part), or block by block or layer by
    layer while it computes. On disk it is read block by block. The maths is the same.
    """

    type = "offload"
    title = "offload of weights"
    values = ("none", "part", "block", "leaf", "disk")
    more = "block:K"

    @classmethod
    def accepts(cls, value: str) -> bool:
        kind, colon, kept = value.partition(":")
        counted = kind in ("block", "disk") and bool(colon)
        return value in cls.values or (counted and kept.isdecimal() and int(kept) > 0)

    @classmethod
    def possible(cls) -> tuple[str, ...]:
        return (*cls.values, cls.more, "disk:K")

    @property
    def level(self) -> str:
        """none, part, block, leaf or disk."""
        return self.value.partition(":")[0]

    @property
    def kept(self) -> int:
        """Blocks of a denoiser that stay on the device while it is at work."""
        return int(self.value.partition(":")[2] or 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantize(Setting):
    """How the weights of the large linear layers are kept: as they compute, or in 8 bits each.

    From 8 bits a layer's weight is restored when it computes, in the plan's precision, and dropped again.
    """

    type = "quantize"
    title = "weights in 8 bits"
    values = ("none", "fp8", "int8")
    phases = ("encode_text", "denoise")

    @property
    def tier(self) -> Tier:
        return "exact" if self.value == "none" else "near"


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk(Setting):
    """How much of a denoiser's forward is computed at once: all of it, or some rows after the others.

    A row is a token, or of I2VGen-XL's UNet a pixel of a frame on its first level. The maths is the same.
    """

    type = "chunk"
    title = "rows at once"
    values = ("none", "rows")
    more = "rows:N"
    phases = ("denoise",)

    @classmethod
    def accepts(cls, value: str) -> bool:
        kind, colon, rows = value.partition(":")
        return value in cls.values or (kind == "rows" and bool(colon) and rows.isdecimal() and int(rows) > 0)

    @property
    def rows(self) -> int | None:
        """At once; None: as many as fill the card's kernels."""
        return int(self.value.partition(":")[2] or 0) or None


@dataclass(frozen=True, kw_only=True, slots=True)
class Window(Setting):
    """How a video that is longer than the model was trained for is predicted: whole, or in overlapping windows.

    FRAMES:OVERLAP is in frames of the video: the length of a window, and what it shares with the one before.
    """

    type = "window"
    title = "windows of frames"
    values = ("none",)
    more = "FRAMES:OVERLAP"
    phases = ("denoise",)

    @classmethod
    def accepts(cls, value: str) -> bool:
        frames, _, overlap = value.partition(":")
        whole = frames.isdecimal() and overlap.isdecimal()
        return value in cls.values or (whole and 0 < int(overlap) < int(frames))

    @property
    def tier(self) -> Tier:
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


SETTINGS: dict[str, type[Setting]] = {kind.type: kind for kind in (Quantize, Chunk, Decode, Guidance, Window, Offload)}
"""Every type of setting: the vocabulary of a plan."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseEstimate:
    """What one phase of the run will need."""

    name: str
    seconds: float | None
    """In the whole run, at the device's rates; None where these are not known."""
    peak_vram_bytes: int
    """That the run needs of the card, when it is most; CUDA's context is beside it. 0 on the CPU."""
    host_bytes: int
    """Tensors in RAM, when they are most."""
    pinned_bytes: int = 0
    """Of these, of memory that is pinned for a card."""
    shelf_bytes: int = 0
    """Of the host's, what a VAE remembers between two groups of frames."""
    disk_bytes: int
    """Temporary files."""
    reserved_bytes: int | None = None
    """That torch's allocator will hold of the card: often more than a run needs where there is room, less where what it
    needs was told with more for gaps than there are. None on the CPU, and of loading."""
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
        """Whether every phase fits, on a card in RAM too; without a dry run, whether the weights do."""
        if not self.estimate.phases:
            return self.estimate.weights_bytes <= self.estimate.free_bytes
        return all(self.fits(phase) for phase in self.estimate.phases)

    def fits(self, phase: PhaseEstimate) -> bool:
        return self.excess_bytes(phase) <= 0

    def excess_bytes(self, phase: PhaseEstimate) -> int:
        """What a phase needs beyond what there is, where it is most."""
        return max(self.excess(phase).values())

    def lacks(self, place: str) -> bool:
        """Whether a phase needs more of a place, a key of `needs`, than there is."""
        return any(self.excess(phase).get(place, 0) > 0 for phase in self.estimate.phases)

    def excess(self, phase: PhaseEstimate) -> dict[str, int]:
        """What a phase needs beyond what there is, by place."""
        return {place: need - there for place, (need, there) in self.needs(phase).items()}

    def needs(self, phase: PhaseEstimate) -> dict[str, tuple[int, int]]:
        """Bytes that a phase needs and that there are, by place.

        "device" is the card, or RAM without one; "host" is RAM for weights that are kept there for a card, "pinned"
        what of it is pinned; "shelf" is either with what a VAE remembers, "disk" temporary files, where the machine is
        known.
        """
        device, on_card = self.device, self.device.id != "cpu"
        ram, pinned = (phase.host_bytes, device.ram_free_bytes), (phase.pinned_bytes, device.pinnable_bytes)
        found = {"device": (phase.peak_vram_bytes if on_card else phase.host_bytes, self.estimate.free_bytes)}
        if on_card and self.offload != "none":
            for place, (need, there) in (("host", ram), ("pinned", pinned)):
                found[place] = need - phase.shelf_bytes, there
        if phase.shelf_bytes:
            found["shelf"] = max(ram, pinned, key=lambda each: each[0] - each[1])
        if device.disk_free_bytes is not None:
            found["disk"] = phase.disk_bytes, device.disk_free_bytes
        return found

    def setting(self, kind: type[S]) -> S:
        return next(s for s in self.settings if isinstance(s, kind))

    @property
    def offload(self) -> str:
        """The level; "none" too where a plan was made before there was one."""
        return next((s.level for s in self.settings if isinstance(s, Offload)), "none")

    @property
    def quantize(self) -> str:
        """ "none" too where a plan was made before there was another."""
        return next((s.value for s in self.settings if isinstance(s, Quantize)), "none")

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

    @classmethod
    def read(cls, file: Path) -> Self:
        """From a file that `framefit plan --json` wrote.

        Raises:
            BadInput: it cannot be read, or holds no plan.
        """
        try:
            return cls.from_json(json.loads(file.read_text(encoding="utf-8")))
        except OSError as error:
            raise BadInput(f"{file} cannot be read ({error.strerror}): give a file of framefit plan --json.") from None
        except UsageError as error:
            raise BadInput(f"{file} holds a plan that this framefit does not know ({error}).") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BadInput(f"{file} holds no plan: give a file of framefit plan --json.") from None
