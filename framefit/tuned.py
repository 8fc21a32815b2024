"""Settings that `framefit tune` found fastest, on disk: one file for each model, size and device.

Knows nothing of how they were found. A file is for the versions that it was measured with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from framefit import __version__
from framefit.errors import UsageError
from framefit.plan import SETTINGS, Plan

__all__ = ["Tuned", "find", "folder", "key", "save"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuned:
    """The winner of a search."""

    settings: Mapping[str, str]
    """By type, as `--set` takes them."""
    date: str
    ratio: float
    """Seconds a step with the untouched settings over seconds a step with these."""

    @property
    def because(self) -> str:
        return f"tuned on this device on {self.date}: {self.ratio:.2f} times as fast as the reference's"

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        return cls(**(data | {"ratio": float(data["ratio"])}))


def key(plan: Plan) -> str:
    """What a search is good for: model, size, length, precision, device and versions."""
    request = plan.request
    facts = [request.model, request.width, request.height, request.num_frames, plan.precision, plan.device.name]
    facts += [version("torch"), version("diffusers"), __version__]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def find(plan: Plan) -> Tuned | None:
    """What was filed for such a plan; None where nothing was, or where the file is not ours."""
    try:
        found = Tuned.from_json(json.loads((folder() / f"{key(plan)}.json").read_text()))
        for name, value in found.settings.items():
            SETTINGS[name](value=value)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, UsageError):
        return None
    return found


def save(plan: Plan, tuned: Tuned) -> Path:
    file = folder() / f"{key(plan)}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(tuned), indent=1) + "\n")
    partial.replace(file)
    return file


def folder() -> Path:
    """In the user's state folder, beside the runs."""
    from framefit.checkpoint import default_root

    return default_root().parent / "tuned"
