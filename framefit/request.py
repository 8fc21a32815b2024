"""What the user wants, and nothing about how it is done.

A field left at None means "what the model's authors recommend"; `planning.choose` fills it in. The command line
is generated from these fields, so a field here is a flag there.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args

from framefit.errors import BadInput

__all__ = ["Fit", "Lora", "Request", "ResolvedRequest"]

Fit = Literal["nearest", "crop", "pad"]

KINDS = {
    "image": Path,
    "prompt": str,
    "model": str,
    "last_image": Path | None,
    "negative_prompt": str | None,
    "width": int | None,
    "height": int | None,
    "num_frames": int | None,
    "fps": float | int | None,
    "steps": int | None,
    "guidance": tuple | None,
    "seed": int | None,
    "loras": tuple,
}
"""What a field must be, for requests that come from a file or a program that nobody checked."""

MOST_STEPS = 1000
"""Every family's schedule was trained with this many."""


def _flag(help: str, **facts: Any) -> Any:
    """A field with its one-line meaning, read by the command line and by the docs."""
    return field(metadata={"help": help}, **facts)


LORA = re.compile(r"(?P<file>.+\.safetensors)(@(?P<expert>[^@:]*))?(:(?P<scale>.*))?", re.IGNORECASE | re.DOTALL)
"""FILE, FILE:SCALE, FILE@EXPERT or FILE@EXPERT:SCALE; the extension says where the file's name ends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lora:
    """Low-rank weights in a file, to be merged into the denoiser."""

    file: Path
    scale: float = 1.0
    """Factor of the change that the file makes; 1: as it was trained."""
    expert: Literal["high", "low"] | None = None
    """The one of two experts that it is for, by noise; None: what the file says, or else both."""
    sha256: str | None = None
    """Of the file; None: whatever it holds when the plan is made."""

    def __post_init__(self) -> None:
        if not isinstance(self.file, Path) or not isinstance(self.sha256, str | None):
            raise BadInput(f"the LoRA {self.file!r:.80} must be the path of a file.")
        scale: object = self.scale
        if isinstance(scale, bool) or not isinstance(scale, float | int) or not -100 <= scale <= 100:
            raise BadInput(f"the scale of {self.file} is {scale!r:.40}, and must be a number from -100 to 100.")
        if self.expert not in ("high", "low", None):
            raise BadInput(f"the expert of {self.file} is {self.expert!r:.40}, and must be high or low.")

    def __str__(self) -> str:
        expert = f"@{self.expert}" if self.expert else ""
        return f"{self.file}{expert}" + (f":{self.scale:g}" if self.scale != 1 else "")

    @classmethod
    def parse(cls, text: str) -> Self:
        """What `--lora` takes."""
        found = LORA.fullmatch(text)
        if found is None:
            raise BadInput(
                f"--lora {text} does not name a .safetensors file, as in style.safetensors, style.safetensors:0.8 or "
                f"style.safetensors@high:0.8 (other kinds of files are refused for safety)."
            )
        scale: Any = found["scale"]
        expert: Any = found["expert"]
        with suppress(ValueError):  # what is no number is refused below
            scale = 1.0 if scale is None else float(scale)
        return cls(file=Path(found["file"]), scale=scale, expert=expert)

    def to_json(self) -> dict[str, Any]:
        return {"file": str(self.file), "scale": self.scale, "expert": self.expert, "sha256": self.sha256}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The inverse of `to_json`; whatever it cannot be is refused."""
        if not isinstance(data, dict) or set(data) - set(cls.__dataclass_fields__) or "file" not in data:
            raise BadInput(f"{data!r:.80} describes no LoRA: it has a file, a scale, an expert and a sha256.")
        return cls(**(data | {"file": Path(str(data["file"]))}))


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One image-to-video job.

    Raises `BadInput` on construction for whatever is wrong without knowing the model; what depends on the model
    (legal sizes, frame counts, an end image) is checked when the plan is made.
    """

    image: Path = _flag("photo that becomes the first frame: JPEG, PNG, WebP or AVIF")
    prompt: str = _flag("what should happen, in the model's language (Wan, EasyAnimate: English or Chinese)")
    model: str = _flag("model id, hub repo id, or a local diffusers-layout folder", default="tiny")
    last_image: Path | None = _flag("photo that becomes the last frame, where the model can", default=None)
    negative_prompt: str | None = _flag("what should not appear (default: the authors')", default=None)
    width: int | None = _flag("pixels (default: follows the photo)", default=None)
    height: int | None = _flag("pixels (default: follows the photo)", default=None)
    fit: Fit | None = _flag(
        "nearest: the legal size nearest to the photo's aspect; crop: fill the size; pad: whole photo in it",
        default=None,
    )
    num_frames: int | None = _flag("frames of the video", default=None)
    fps: float | None = _flag("frames a second (I2VGen-XL: also an input of the model)", default=None)
    steps: int | None = _flag("denoising steps", default=None)
    guidance: tuple[float, ...] | None = _flag("guidance scale, one per expert: G or G,G", default=None)
    seed: int | None = _flag("seed of the noise (default: drawn, and reported)", default=None)
    loras: tuple[Lora, ...] = _flag(
        "LoRA merged into the model: FILE, FILE:SCALE, FILE@high or FILE@low; repeatable", default=()
    )

    def __post_init__(self) -> None:
        for name, kind in KINDS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind):
                raise BadInput(f"{name} is {value!r:.80}, and must be {_words(kind)}.")
        if not self.prompt.strip():
            raise BadInput("the prompt is empty: say what should happen in the video, for example -p 'waves roll in'.")
        for name in ("prompt", "negative_prompt"):
            if not _is_unicode(getattr(self, name) or ""):
                raise BadInput(f"{name} is not valid Unicode text: type it again, or save it as UTF-8.")
        if (self.width is None) != (self.height is None):
            raise BadInput("width and height come together: give both, as in --size 832x480, or neither.")
        for name in ("width", "height", "num_frames", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"{name} is {value}, and must be 1 or more.")
        if self.fps is not None and not 0.1 <= self.fps <= 240:
            raise BadInput(f"fps is {_short(self.fps)}, and must be from 0.1 to 240.")
        if self.steps is not None and self.steps > MOST_STEPS:
            raise BadInput(
                f"steps is {self.steps}, and must be at most {MOST_STEPS}, the length of the training schedule."
            )
        if self.guidance is not None:
            if not self.guidance:
                raise BadInput("guidance is empty: give one number, or one per expert as in --guidance 3.5,3.5.")
            for scale in self.guidance:
                if not isinstance(scale, float | int):
                    raise BadInput(f"guidance is {scale!r:.80}, and must be a number, or one per expert.")
                if not 0 <= scale <= 100:
                    raise BadInput(f"guidance is {_short(scale)}, and must be a number from 0 to 100 (1 turns it off).")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise BadInput(f"seed is {self.seed}, and must be from 0 to 2^63 - 1.")
        if self.fit is not None and self.fit not in get_args(Fit):
            raise BadInput(f"fit is '{self.fit}', and must be one of {', '.join(get_args(Fit))}.")
        for lora in self.loras:
            if not isinstance(lora, Lora):
                raise BadInput(f"loras holds {lora!r:.80}, and must be a list of Lora, as Lora.parse gives them.")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; paths as text."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The inverse of `to_json`; unknown keys are refused."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise BadInput(f"the request holds unknown fields: {', '.join(unknown)}.")
        values = dict(data)
        for name in ("image", "last_image"):
            if values.get(name) is not None:
                values[name] = Path(values[name])
        if values.get("guidance") is not None:
            values["guidance"] = tuple(values["guidance"])
        if "loras" in values:
            values["loras"] = tuple(Lora.from_json(lora) for lora in values["loras"])
        return cls(**values)


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedRequest:
    """A `Request` for one model with nothing left open: what a plan holds and a run obeys."""

    image: Path
    last_image: Path | None
    prompt: str
    negative_prompt: str
    model: str
    width: int
    height: int
    fit: Literal["crop", "pad"]
    num_frames: int
    fps: float
    steps: int
    guidance: tuple[float, ...]
    """One per expert."""
    seed: int
    shift: float | None
    """Flow shift of the scheduler; None: the checkpoint's own."""
    loras: tuple[Lora, ...] = ()
    """Each with its SHA-256."""

    @property
    def guided(self) -> bool:
        """Whether any expert needs the negative branch."""
        return max(self.guidance) > 1

    @property
    def prompts(self) -> list[str]:
        """One text a guidance branch, negative before positive, as the references batch them."""
        return [self.negative_prompt, self.prompt] if self.guided else [self.prompt]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types; paths as text."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        last = data["last_image"]
        paths = {"image": Path(data["image"]), "last_image": None if last is None else Path(last)}
        loras = tuple(Lora.from_json(lora) for lora in data.get("loras", ()))
        return cls(**(data | paths | {"guidance": tuple(data["guidance"]), "loras": loras}))


def _short(number: float) -> str:
    return f"{number:g}" if isinstance(number, float) else f"{number!s:.40}"


def _words(kind: Any) -> str:
    names = {str: "text", int: "a whole number", float: "a number", Path: "the path of a file", tuple: "a list"}
    kinds = [names[k] for k in getattr(kind, "__args__", (kind,)) if k in names]
    return " or ".join(kinds)


def _is_unicode(text: str) -> bool:
    """False for bytes that the terminal passed through without being able to decode them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [item.to_json() if isinstance(item, Lora) else item for item in value]
    return value
