"""What a dry run has found, on disk by its content: the same plan is traced once. No torch is needed to read it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from framefit.checkpoint import default_root
from framefit.families import Checkpoint
from framefit.plan import Plan

__all__ = ["PhaseTrace", "traced"]

LIBRARIES = ("torch", "diffusers", "transformers")
"""Their code is traced too."""
PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseTrace:
    """One phase of a run; of denoising one step."""

    name: str
    weights_bytes: Mapping[str, int]
    """Component -> bytes on the device for its parameters and buffers, rooms that they pass through too."""
    host_bytes: int = 0
    """Of weights in host memory."""
    pinned_bytes: int = 0
    """Of these, pinned."""
    onload_bytes: int = 0
    """Of weights that come to the device when the phase begins; what streams is in `bytes`."""
    disk_bytes: int = 0
    """Of weights in temporary files."""
    peak_bytes: int
    """Of everything else on the device, when it is most."""
    held: Mapping[str, int]
    """The largest tensors at that moment: what each is, and its bytes."""
    flops: Mapping[tuple[str, str], int]
    """(kind of work, precision) -> floating-point operations."""
    bytes: Mapping[str, int]
    """"elementwise": read and written; "host_to_device", "device_to_host": moved."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"flops": [[*key, n] for key, n in self.flops.items()]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        flops = {(kind, precision): n for kind, precision, n in data["flops"]}
        return cls(**{**data, "flops": flops})


def traced(plan: Plan, checkpoint: Checkpoint, folder: Path | None = None) -> tuple[PhaseTrace, ...]:
    """The phases of `plan`: from an earlier dry run where there was one, else from one now, which takes seconds.

    Args:
        folder: where they are kept; None: `traces` in the user's state folder.
    """
    file = (folder or default_root().parent / "traces") / f"{_key(plan, checkpoint)}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return tuple(PhaseTrace.from_json(phase) for phase in json.loads(file.read_text(encoding="utf-8")))
    from framefit.planning.dryrun import trace

    found = trace(plan, checkpoint)
    with contextlib.suppress(OSError):  # where nothing can be kept, it is traced again
        _write(file, found)
    return found


def _key(plan: Plan, checkpoint: Checkpoint) -> str:
    """All that a trace depends on."""
    request = plan.request
    facts = {
        "code": _code(), "libraries": {name: version(name) for name in LIBRARIES},
        "components": [asdict(component) for component in checkpoint.components],
        "model": [checkpoint.family, checkpoint.layout, checkpoint.first_frame_clean, checkpoint.max_tokens],
        "work": [request.width, request.height, request.num_frames, request.last_image is not None],
        "guided": [scale > 1 for scale in request.guidance], "precision": plan.precision,
        "settings": {setting.type: setting.value for setting in plan.settings}, "card": plan.device.id != "cpu",
    }  # fmt: skip
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@cache
def _code() -> str:
    """Of framefit itself, so that a change to it is traced."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _write(file: Path, found: Sequence[PhaseTrace]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps([phase.to_json() for phase in found]), encoding="utf-8")
    temporary.replace(file)
