"""What a dry run has found, on disk by its content: the same stage of a plan is traced once. No torch to read it.

Another setting of the denoiser leaves the stage of decoding as it is, and another place of the weights all of them.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path

from framefit.checkpoint import default_root
from framefit.families import Checkpoint
from framefit.plan import Offload, Plan
from framefit.planning.moved import can_move, moved
from framefit.planning.phase import Given, PhaseTrace

__all__ = ["STAGES", "PhaseTrace", "resident", "traced"]

STAGES = ("encode_text", "encode_image", "denoise", "decode")
"""What a run does, in order; denoising is a phase for every expert."""

LIBRARIES = ("torch", "diffusers", "transformers")
"""Their code is traced too."""
PACKAGE = Path(__file__).parents[1]


def traced(plan: Plan, checkpoint: Checkpoint, folder: Path | None = None) -> tuple[PhaseTrace, ...]:
    """The phases of `plan`: from an earlier dry run where there was one, else from one now, which takes seconds.

    Args:
        folder: where they are kept; None: `traces` in the user's state folder.
    """
    offload = _offload(plan)
    if can_move(found := resident(plan, checkpoint, folder), offload):
        return moved(found, offload)
    return _kept(plan, checkpoint, folder)


def resident(plan: Plan, checkpoint: Checkpoint, folder: Path | None = None) -> tuple[PhaseTrace, ...]:
    """As `traced`, with all weights on the device whatever `plan` says."""
    stay = replace(plan, settings=tuple(s for s in plan.settings if not isinstance(s, Offload)))
    return moved(_kept(stay, checkpoint, folder), Offload(value="none"))


def _offload(plan: Plan) -> Offload:
    return next((s for s in plan.settings if isinstance(s, Offload)), Offload(value="none"))


def _kept(plan: Plan, checkpoint: Checkpoint, folder: Path | None) -> tuple[PhaseTrace, ...]:
    folder = folder or default_root().parent / "traces"
    files = {stage: folder / f"{_key(plan, checkpoint, stage)}.json" for stage in STAGES}
    found = {stage: phases for stage, file in files.items() if (phases := _read(file))}
    if len(found) < len(STAGES):
        known = {stage: phases[0].gives for stage, phases in found.items()}
        for phase in _dry(plan, checkpoint, known):
            stage = phase.name.partition(":")[0]
            found[stage] = (*found.get(stage, ()), phase)
        for stage in (stage for stage in STAGES if stage not in known):
            with contextlib.suppress(OSError):  # where nothing can be kept, it is traced again
                _write(files[stage], found[stage])
    return tuple(phase for stage in STAGES for phase in found[stage])


def _dry(plan: Plan, checkpoint: Checkpoint, known: Mapping[str, Given]) -> tuple[PhaseTrace, ...]:
    """The libraries make much at import that stays: looking it over for garbage again and again would take a third of
    the time."""
    others, was = gc.get_freeze_count(), gc.isenabled()
    gc.disable()
    try:
        from framefit.planning.dryrun import trace

        gc.freeze()
        if was:  # what a dry run lets go must not seem to be held
            gc.enable()
        return trace(plan, checkpoint, known)
    finally:
        if was:
            gc.enable()
        if not others:
            gc.unfreeze()


def _read(file: Path) -> tuple[PhaseTrace, ...]:
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        return tuple(PhaseTrace.from_json(phase) for phase in json.loads(file.read_text(encoding="utf-8")))
    return ()


def _key(plan: Plan, checkpoint: Checkpoint, stage: str) -> str:
    """All that a stage's trace depends on."""
    request = plan.request
    size = request.width, request.height, request.num_frames, request.last_image is not None
    facts = {
        "stage": stage, "code": _code(), "libraries": {name: version(name) for name in LIBRARIES},
        "components": [asdict(component) for component in checkpoint.components],
        "model": [checkpoint.family, checkpoint.layout, checkpoint.first_frame_clean, checkpoint.max_tokens],
        "work": [] if stage == "encode_text" else size,  # a text is encoded before anything knows the frames
        "guided": [scale > 1 for scale in request.guidance], "precision": plan.precision,
        "settings": {s.type: s.value for s in plan.settings if s.touches(stage)}, "card": plan.device.id != "cpu",
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
