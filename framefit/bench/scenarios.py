"""What is measured, by name: one denoiser step or one decode of one model at one size.

The group `goals` is every row of the project's goals at true size; `cpu` is small enough for any machine.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

from framefit.errors import UsageError
from framefit.families import TINY, Checkpoint, Component, find

__all__ = ["GROUPS", "SCENARIOS", "Scenario", "choose"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """One piece of work. Speed and memory do not depend on the weights, so that they may be random."""

    name: str
    model: str
    """Row id, or "tiny" for the model in the package."""
    kind: Literal["denoise", "decode"]
    width: int
    height: int
    """Pixels."""
    num_frames: int
    branches: Literal[1, 2] = 1
    """Guidance branches of a denoiser step: the positive one alone, or the pair."""
    precision: Literal["bf16", "fp16", "fp32"] | None = None
    """Of the component; None: what a plan chooses on the device. A Wan VAE given one leaves the fp32 of its row."""
    small: bool = False
    """The row's architecture made tiny (`framefit.testing.tiny_row`)."""
    group: str = ""
    note: str = ""

    @property
    def title(self) -> str:
        work = {"denoise": f"denoiser, {self.branches} branch{'es' * (self.branches - 1)}", "decode": "VAE decode"}
        return f"{self.model} {work[self.kind]}, {self.width}x{self.height}, {self.num_frames} frames"

    @property
    def weights(self) -> str:
        """Where its weights come from unless something else is asked for."""
        return TINY if self.model == TINY else "random"

    def checkpoint(self, weights: str) -> Checkpoint:
        """The model's row.

        Args:
            weights: "random", or a model id or folder whose weights are read.

        Raises:
            ModelMissing: `weights` is no model that framefit knows.
            UsageError: it is a model of another family.
        """
        row = find(self.model)
        if weights == "random":
            if not self.small:
                return row
            return _small(self.model)
        given = find(weights)
        if given.family != row.family:
            raise UsageError(
                f"{weights} is a model of the family {given.family}, and {self.name} measures {row.family}."
            )
        return given

    def needed(self, row: Checkpoint) -> Checkpoint:
        """`row` with no more than the components that the work needs, in the scenario's precision."""
        names = ("vae",) if self.kind == "decode" else (row.experts[0], "scheduler")
        kept = tuple(c for c in row.components if c.name in names)
        if self.precision:
            kept = tuple(replace(c, keep_fp32=False) for c in kept)
        return replace(row, components=kept)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(**data)


def _small(model: str) -> Checkpoint:
    """The tiny row, its parameters counted; imports torch."""
    import torch

    from framefit.families.parts import build
    from framefit.testing import tiny_row

    def counted(component: Component) -> Component:
        with torch.device("meta"):
            return replace(component, params=sum(p.numel() for p in build(component).parameters()))

    row = tiny_row(model)
    models = {c.name for c in row.components if c.package == "diffusers" and c.params}
    return replace(row, components=tuple(counted(c) if c.name in models else c for c in row.components))


def _denoise(name: str, model: str, size: tuple[int, int, int], **facts: Any) -> Scenario:
    width, height, num_frames = size
    facts = {"group": "goals"} | facts
    return Scenario(
        name=name, model=model, kind="denoise", width=width, height=height, num_frames=num_frames, **facts
    )  # fmt: skip


def _decode(name: str, model: str, size: tuple[int, int, int], **facts: Any) -> Scenario:
    width, height, num_frames = size
    facts = {"group": "goals", "precision": "bf16"} | facts
    return Scenario(name=name, model=model, kind="decode", width=width, height=height, num_frames=num_frames, **facts)


A14B, TI2V, EASYANIMATE, I2VGEN = "wan2.2-i2v-a14b", "wan2.2-ti2v-5b", "easyanimate-v5.1-7b-inp", "i2vgen-xl"
SMALL: dict[str, Any] = {"branches": 2, "small": True, "group": "cpu", "note": "made tiny, random weights"}

SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        _denoise("wan2.2-a14b-480p", A14B, (832, 480, 81), note="one of the two experts"),
        _denoise("wan2.2-a14b-720p", A14B, (1280, 720, 81), note="one of the two experts"),
        _denoise("wan2.2-ti2v-5b", TI2V, (1280, 704, 121), note="a timestep per token"),
        _denoise("easyanimate-7b-384", EASYANIMATE, (672, 384, 49), branches=2),
        _denoise("easyanimate-7b-576", EASYANIMATE, (1008, 576, 49), branches=2),
        _denoise("easyanimate-7b-768", EASYANIMATE, (1344, 768, 49), branches=2),
        _denoise("i2vgen-xl-512", I2VGEN, (512, 512, 16), branches=2),
        _denoise("i2vgen-xl-768", I2VGEN, (768, 768, 24), branches=2),
        _denoise("i2vgen-xl-1024", I2VGEN, (1024, 1024, 32), branches=2),
        _decode("wan2.1-vae-480p", A14B, (832, 480, 81), note="the VAE of Wan2.1 and of Wan2.2 A14B"),
        _decode("wan2.1-vae-720p", A14B, (1280, 720, 81), note="the VAE of Wan2.1 and of Wan2.2 A14B"),
        _decode("wan2.2-vae", TI2V, (1280, 704, 121), note="the VAE of Wan2.2 TI2V 5B"),
        _decode("magvit-384", EASYANIMATE, (672, 384, 49)),
        _denoise("wan2.1-14b-480p", "wan2.1-i2v-14b-480p", (832, 480, 81), group="", note="with image tokens"),
        _denoise("easyanimate-v5-7b-384", "easyanimate-v5-7b-zh-inp", (672, 384, 49), branches=2, group=""),
        _decode("i2vgen-xl-vae-512", I2VGEN, (512, 512, 16), group="", note="frame by frame"),
        _denoise("tiny", TINY, (384, 256, 17), branches=2, group="cpu", note="the model in the package, trained"),
        _decode("tiny-decode", TINY, (384, 256, 17), precision=None, group="cpu", note="the same model's VAE"),
        _denoise("tiny-wan", A14B, (96, 64, 9), **SMALL),
        _denoise("tiny-easyanimate", EASYANIMATE, (96, 64, 9), **SMALL),
        _denoise("tiny-i2vgen", I2VGEN, (96, 64, 4), **SMALL),
    )
}

GROUPS = {group: [s.name for s in SCENARIOS.values() if s.group == group] for group in ("goals", "cpu")}


def choose(names: Sequence[str]) -> list[Scenario]:
    """The scenarios of these names and groups, each once, in the order given.

    Raises:
        UsageError: a name that is neither.
    """
    found: dict[str, Scenario] = {}
    for name in names:
        if name not in SCENARIOS and name not in GROUPS:
            near = difflib.get_close_matches(name, [*SCENARIOS, *GROUPS], n=3, cutoff=0.3)
            hint = f"the nearest are {', '.join(near)}; " if near else ""
            raise UsageError(f"scenario '{name}' is unknown: {hint}framefit bench --list shows all.")
        found |= {each: SCENARIOS[each] for each in GROUPS.get(name, [name])}
    return list(found.values())
