"""framefit makes image-to-video models fit your GPU, and proves it.

    from pathlib import Path
    import framefit

    request = framefit.Request(image=Path("photo.jpg"), prompt="waves roll in", model="wan2.2-ti2v-5b")
    report = framefit.generate(request, Path("video.mp4"))

Importing this is free: torch is imported by the first function that needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from framefit.errors import FramefitError
from framefit.request import Lora, Request

if TYPE_CHECKING:
    from framefit.device import Device
    from framefit.families import CHECKPOINTS
    from framefit.plan import Plan
    from framefit.report import Report
    from framefit.run import Options, generate, prepare, resume

__version__ = "0.1.0"

__all__ = [
    "CHECKPOINTS",
    "Device",
    "FramefitError",
    "Lora",
    "Options",
    "Plan",
    "Report",
    "Request",
    "generate",
    "prepare",
    "resume",
]

_HOMES = {
    "CHECKPOINTS": "families",
    "Device": "device",
    "Options": "run",
    "Plan": "plan",
    "Report": "report",
    "generate": "run",
    "prepare": "run",
    "resume": "run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'framefit' has no attribute '{name}'")
    return getattr(importlib.import_module(f"framefit.{_HOMES[name]}"), name)
