"""Every error a user can meet, and the exit code that each one means.

    FramefitError                 exit 1   the run failed
    ├── UsageError                exit 2   the command or its flags contradict each other
    ├── BadInput                  exit 3   an image, a number or a file that cannot be used
    │   ├── BadImage
    │   ├── BadOutput
    │   └── BadCheckpoint                  a step checkpoint that is corrupt or of another run
    ├── DoesNotFit                exit 4   the machine is too small for the plan
    │   └── Unpinnable                     host memory that cannot be pinned for a card
    ├── ModelMissing              exit 5   an unknown, absent or incomplete model
    ├── NotFinite                 exit 1   the model produced NaN or infinity
    └── Cancelled                 exit 130 stopped by the user between two steps

A message is one sentence or two: what was asked, what is possible, what to do, with numbers and units.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "BadCheckpoint",
    "BadImage",
    "BadInput",
    "BadOutput",
    "Cancelled",
    "DoesNotFit",
    "FramefitError",
    "ModelMissing",
    "NotFinite",
    "Unpinnable",
    "UsageError",
]


class FramefitError(Exception):
    """The root: anything framefit raises on purpose."""

    exit_code: ClassVar[int] = 1


class UsageError(FramefitError):
    exit_code = 2


class BadInput(FramefitError):
    exit_code = 3


class BadImage(BadInput):
    pass


class BadOutput(BadInput):
    pass


class BadCheckpoint(BadInput):
    pass


class DoesNotFit(FramefitError):
    exit_code = 4


class Unpinnable(DoesNotFit):
    pass


class ModelMissing(FramefitError):
    exit_code = 5


class NotFinite(FramefitError):
    pass


class Cancelled(FramefitError):
    exit_code = 130
