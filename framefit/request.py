"""What the user wants, and nothing about how it is done.

A field left at None means "what the model's authors recommend"; `planning.choose` fills it in. The command line
is generated from these fields, so a field here is a flag there.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args

from framefit.errors import BadInput

__all__ = ["Fit", "Request", "ResolvedRequest"]

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
    loras: tuple[str, ...] = _flag("LoRA weights (not available yet)", default=())

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
        if self.loras:
            raise BadInput("LoRA weights cannot be applied yet: leave loras empty.")

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
        for name in ("guidance", "loras"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
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
        return cls(**(data | paths | {"guidance": tuple(data["guidance"])}))


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
    return list(value) if isinstance(value, tuple) else value
