"""A folder on disk that is gone when the run is: removed at its end, and after a kill by whoever comes next."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import weakref
from pathlib import Path
from typing import Self

from framefit.checkpoint import hold
from framefit.device import state_folder
from framefit.errors import BadInput, FramefitError

__all__ = ["Scratch"]


class Scratch:
    """It belongs to this process, by a lock beside it that a kill lets go."""

    def __init__(self, path: Path) -> None:
        """Take `path`, which is new; raises `OSError` where that cannot be."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        release = hold(_lock(path), FramefitError(f"{path} is another process's."))  # before there is what it guards
        path.mkdir()
        self.remove = weakref.finalize(self, _remove, path, release)
        """When it is not needed any more; the end of the process does it too."""

    @classmethod
    def create(cls, root: Path | None = None) -> Self:
        """A new one below `root`, by itself `weights` in the user's state folder; those of dead processes go.

        Raises:
            BadInput: `root` cannot be written.
        """
        root = root or state_folder() / "weights"
        _sweep(root)
        try:
            return cls(root / secrets.token_hex(6))
        except OSError as error:
            raise BadInput(
                f"weights cannot be written to {root} ({error.strerror}): set XDG_STATE_HOME to a folder that can be "
                f"written, or use offload=block."
            ) from None


def _sweep(root: Path) -> None:
    if os.name != "posix":  # there are no locks by which the living are known
        return
    for path in root.glob("*/"):
        with contextlib.suppress(FramefitError, OSError):
            _remove(path, hold(_lock(path), FramefitError("it is at work.")))


def _remove(path: Path, release: object) -> None:
    shutil.rmtree(path, ignore_errors=True)
    _lock(path).unlink(missing_ok=True)
    assert callable(release)
    release()


def _lock(path: Path) -> Path:
    return path.with_suffix(".lock")
