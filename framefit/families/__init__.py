"""The models as rows of facts, and the few functions that differ between families.

Rows are read without torch; the functions of a family are imported when a run needs them.
"""

from __future__ import annotations

import contextlib
import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from framefit.errors import ModelMissing
from framefit.families.bundled import TINY, tiny
from framefit.families.checkpoint import Checkpoint, Component, Frames, Sizes
from framefit.families.folder import recognise
from framefit.families.rows import CHECKPOINTS

if TYPE_CHECKING:
    from framefit.families.parts import Family

__all__ = ["CHECKPOINTS", "TINY", "Checkpoint", "Component", "Frames", "Sizes", "family_of", "find", "recognise"]


def find(model: str) -> Checkpoint:
    """The row for an id, a hub repository id, or a local folder; an id wins over a folder of its name.

    Raises:
        ModelMissing: none of the three; the nearest ids are named.
    """
    if model.lower() == TINY:
        return tiny()
    by_repo = {row.repo.lower(): row for row in CHECKPOINTS.values()}
    if row := CHECKPOINTS.get(model.lower()) or by_repo.get(model.lower()):
        return row
    with contextlib.suppress(OSError):  # a name too long for the file system is no folder
        if model and Path(model).is_dir():
            return recognise(Path(model))
    names = [*CHECKPOINTS, *by_repo, TINY]
    near = difflib.get_close_matches(model.lower(), names, n=3, cutoff=0.3) or list(CHECKPOINTS)[:3]
    raise ModelMissing(
        f"model '{model}' is neither an id nor a hub repository that framefit knows, nor a folder here: "
        f"the nearest are {', '.join(near)} (framefit models ls shows all)."
    )


def family_of(checkpoint: Checkpoint) -> Family:
    """The family's functions; imports torch and diffusers."""
    import importlib
    from typing import cast

    return cast("Family", importlib.import_module(f"framefit.families.{checkpoint.family}"))
