"""How long a video is beside those that the model was trained on."""

from __future__ import annotations

from framefit.errors import UsageError
from framefit.families import Checkpoint
from framefit.plan import Plan, Window

__all__ = ["beyond_trained", "check"]


def check(window: Window, checkpoint: Checkpoint) -> None:
    """Raises `UsageError` where windows do not fall on the model's latent frames."""
    stride, frames = checkpoint.frames.stride, window.frames
    if frames and ((frames - 1) % stride or window.overlap % stride):
        length = max(stride, (frames - 1) // stride * stride) + 1
        overlap = min(max(stride, window.overlap // stride * stride), length - 1)
        raise UsageError(
            f"window={window.value} was asked for; {checkpoint.id} takes windows of {stride}n+1 frames that overlap by "
            f"a multiple of {stride}: use window={length}:{overlap}."
        )


def beyond_trained(plan: Plan, checkpoint: Checkpoint) -> str:
    """A sentence where the model sees more frames at once than it was trained on; else nothing."""
    frames = checkpoint.frames
    window = next((s.frames for s in plan.settings if isinstance(s, Window)), 0)
    seen = min(plan.request.num_frames, window or plan.request.num_frames)
    if seen <= frames.trained:
        return ""
    half = frames.trained // 2 // frames.stride * frames.stride
    return (
        f"{checkpoint.id} was trained on {frames.trained} frames and sees {seen} at once, beyond which it drifts: "
        f"--set window={frames.trained}:{half} goes on in windows of its own length."
    )
