"""VMAF and MS-SSIM, by the libvmaf that the ffmpeg of imageio-ffmpeg has built in.

Both look at brightness alone. Source: github.com/Netflix/vmaf, model vmaf_v0.6.1; Wang et al. 2003 for MS-SSIM.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

from framefit.errors import FramefitError, UsageError
from framefit.quality.fidelity import Frames

__all__ = ["MS_SSIM_MIN_PX", "ms_ssim", "vmaf"]

MS_SSIM_MIN_PX = 176
"""libvmaf halves the picture four times, under a window of 11."""
TO_YUV = "scale=out_color_matrix=bt709:out_range=limited,format=yuv420p"


def vmaf(ours: Frames, reference: Frames) -> list[float]:
    """Of each frame, 0 to 100; equal videos come out a little under 100."""
    return [frame["vmaf"] for frame in _measured(ours, reference, "model=version=vmaf_v0.6.1")]


def ms_ssim(ours: Frames, reference: Frames) -> list[float]:
    """Of each frame, 0 to 1.

    Raises:
        UsageError: a side is shorter than `MS_SSIM_MIN_PX`.
    """
    height, width = ours.shape[1:3]
    if min(height, width) < MS_SSIM_MIN_PX:
        raise UsageError(f"MS-SSIM needs sides of {MS_SSIM_MIN_PX} px at least, and the videos are {width}x{height}.")
    return [frame["float_ms_ssim"] for frame in _measured(ours, reference, "feature=name=float_ms_ssim")]


def _measured(ours: Frames, reference: Frames, what: str) -> list[dict[str, float]]:
    """libvmaf's figures for each frame."""
    try:
        from imageio_ffmpeg import get_ffmpeg_exe
    except ImportError:
        raise UsageError("VMAF and MS-SSIM need imageio-ffmpeg: pip install 'framefit[quality]'.") from None
    _, height, width, _ = ours.shape
    with tempfile.TemporaryDirectory() as folder:
        command = [get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-v", "error"]
        for name, frames in (("ours", ours), ("reference", reference)):
            frames.tofile(Path(folder) / name)
            command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", "25", "-i", name]
        measure = f"libvmaf=log_fmt=json:log_path=log:n_threads={os.cpu_count()}:{what}"
        command += ["-lavfi", f"[0:v]{TO_YUV}[a];[1:v]{TO_YUV}[b];[a][b]{measure}", "-f", "null", "-"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise FramefitError(f"ffmpeg could not measure VMAF: {done.stderr.strip() or done.returncode}")
        frames_found = json.loads((Path(folder) / "log").read_text())["frames"]
    return [frame["metrics"] for frame in frames_found]
