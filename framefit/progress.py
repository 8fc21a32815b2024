"""What a person sees while a run goes on, on stderr: phases, a bar of steps, notices; and Ctrl-C."""

from __future__ import annotations

import logging
import os
import signal
import sys
from argparse import Namespace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from PIL import Image
from tqdm import tqdm

from framefit.apart import quiet_libraries
from framefit.checkpoint import default_root
from framefit.errors import BadInput, UsageError
from framefit.pipeline import Step
from framefit.run import Options

__all__ = ["Progress"]


class Progress:
    """The terminal's side of one run.

    The first Ctrl-C lets the step finish, so that nothing is lost; a second one stops at once.
    """

    def __init__(self, flags: Namespace) -> None:
        if flags.no_checkpoint and getattr(flags, "resume", None):
            raise UsageError("--resume reads the checkpoint that --no-checkpoint refuses: leave one of them out.")
        if flags.preview:
            _check_preview(flags)
        self._flags = flags
        self._bar: tqdm[Any] | None = None
        self._stop = False

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGINT, self._interrupt)
        handler = logging.StreamHandler(_Console())
        handler.setFormatter(_Lines())
        log = logging.getLogger("framefit")
        self._handler, self._level = handler, log.level
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        quiet_libraries()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)
        log = logging.getLogger("framefit")
        log.removeHandler(self._handler)
        log.setLevel(self._level)
        if self._bar is not None:
            self._bar.close()

    def options(self, **facts: Any) -> Options:
        """The run's options, with this as its listener."""
        flags = self._flags
        return Options(
            device=flags.device or "auto",
            crf=flags.crf,
            overwrite=flags.overwrite,
            checkpoints=None if flags.no_checkpoint else flags.checkpoint_dir or default_root(),
            checkpoint_every_s=flags.checkpoint_every,
            log_every=flags.log_every,
            on_step=self._on_step,
            on_phase=self._on_phase,
            cancelled=lambda: self._stop,
            **facts,
        )

    def _on_phase(self, name: str) -> None:
        if not name.startswith("denoise") and name != "write":
            _say(f"{name.replace('_', ' ')} ...")

    def _on_step(self, step: Step) -> None:
        if self._bar is None:
            self._bar = tqdm(
                total=step.total, initial=step.index - 1, unit="step", desc="denoise", file=sys.stderr, leave=True,
                colour=None if os.environ.get("NO_COLOR") or not sys.stderr.isatty() else "green",
            )  # fmt: skip
        self._bar.update()
        if self._flags.preview:
            _show(step, self._flags.preview)
        if step.index == step.total:
            self._bar.close()
            self._bar = None  # a second try has a bar of its own

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _say("stopping after this step; press Ctrl-C again to stop at once.")


class _Lines(logging.Formatter):
    """What the user should know is a note; how far the run is, a plain line."""

    def format(self, record: logging.LogRecord) -> str:
        return ("note: " if record.levelno >= logging.WARNING else "") + super().format(record)


class _Console:
    """Lines written above the bar instead of through it."""

    def write(self, text: str) -> None:
        if text.strip():
            tqdm.write(text.rstrip("\n"), file=sys.stderr)

    def flush(self) -> None:
        sys.stderr.flush()


def _check_preview(flags: Namespace) -> None:
    file, photos = flags.preview, (getattr(flags, "image", None), getattr(flags, "last_image", None))
    if any(photo is not None and file.absolute() == photo.absolute() for photo in photos):
        raise BadInput(f"--preview would overwrite the photo {file}: give it another name.")
    if file.suffix.lower() != ".png" or file.is_dir() or not os.access(file.absolute().parent, os.W_OK):
        raise BadInput(f"--preview cannot be written to {file}: give the name of a .png in a folder that exists.")


def _show(step: Step, file: Path) -> None:
    """Whoever watches the file sees a whole picture. A preview that fails is told, and ends nothing."""
    temporary = file.with_name(f".{file.name}.part")
    try:
        Image.fromarray(step.preview()).save(temporary, format="PNG")
        temporary.replace(file)
    except Exception as error:
        _say(f"note: no preview of step {step.index} ({' '.join(str(error).split())}).")


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)
