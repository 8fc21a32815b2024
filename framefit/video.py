"""Videos on disk: frames streamed into a file as they are decoded, and read back with what the file says of itself.

A file appears under its name whole or not at all: it is written beside it under a hidden name, synced to the disk, then
renamed. A killed process can leave no more than that hidden `.framefit-*.partial`. Knows nothing of models, and of the
marks only where each format keeps them.
"""

from __future__ import annotations

import mmap
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any, BinaryIO, Literal

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from PIL import Image, ImageSequence
from PIL.PngImagePlugin import PngInfo

from framefit import marks
from framefit.errors import BadInput, BadOutput, FramefitError

__all__ = ["Format", "Frame", "Inspection", "Video", "check_output", "inspect", "parameters", "read", "write"]

Format = Literal["mp4", "webp", "gif", "png"]
Frame = npt.NDArray[np.uint8]

_FORMATS: dict[str, Format] = {".mp4": "mp4", ".webp": "webp", ".gif": "gif", "": "png"}
_RAW_SHARE = {"mp4": 1 / 8, "webp": 1 / 8, "gif": 1 / 3, "png": 1}  # of the uncompressed frames, generously
_SLACK_BYTES = 16 * 2**20
_GIF_MAX_FPS = 50  # browsers play a delay under 2/100 s as 10/100 s
# With PyAV's defaults a photo comes back from YUV 4:2:0 one level too dark, and 1 dB further from what it was.
_EXACT = (
    Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
)
_DISK_ERRORS = (OSError, av.FFmpegError)


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """Frames on their way to a file."""

    frames: Iterator[Frame]
    """RGB, (height, width, 3), decoded as they are asked for"""
    num_frames: int
    """how many `frames` yields, 1 or more"""
    width: int
    height: int
    fps: float
    """frames a second, above 0"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """What a file says of itself; the format png is a folder of them."""

    format: Format
    width: int
    height: int
    num_frames: int
    fps: float
    """frames a second; 0 where the file does not say"""
    parameters: dict[str, Any] | None
    """what framefit made it with"""
    marks: dict[str, str]
    """DigitalSourceType and AIGC, where present"""


def check_output(path: Path, *, overwrite: bool, width: int, height: int, num_frames: int) -> None:
    """Raises `BadOutput` now for what would make `write` fail after the work is done; leaves nothing behind.

    The extension chooses the format; none means a folder of numbered PNGs. A missing folder is fine if it can be made.
    """
    path = _resolved(path)
    format = _output_format(path, width, height)
    with _writing(path):
        _check_vacant(path, format, overwrite)
        folder = next(parent for parent in path.parents if parent.exists())
        with tempfile.TemporaryFile(dir=folder):  # os.access says yes to root, even on a read-only mount
            free = shutil.disk_usage(folder).free
    need = round(width * height * 3 * num_frames * _RAW_SHARE[format]) + _SLACK_BYTES
    if free < need:
        raise BadOutput(
            f"{path} may need {need / 2**20:,.0f} MiB and the disk has {free / 2**20:,.0f} MiB free: "
            "make room or choose another place."
        )


def write(video: Video, path: Path, *, parameters: dict[str, Any], crf: int = 18, overwrite: bool = False) -> None:
    """Writes the video and its marks; makes missing folders. `crf` is x264's quality, 0 (best) to 51, for MP4 only.

    MP4 and PNGs take a frame at a time; Pillow keeps the frames of a WebP or GIF in memory. A GIF runs at 50 fps at
    most. Raises `BadOutput` for what the path or the disk refuses and `FramefitError` for frames other than announced;
    an error of `video.frames` passes through. Whatever is raised, what was at `path` is untouched.
    """
    path = _resolved(path)
    format = _output_format(path, video.width, video.height)
    fps = min(video.fps, _GIF_MAX_FPS) if format == "gif" else video.fps
    properties = marks.properties(parameters, fps=fps, num_frames=video.num_frames)
    source = _Source(video)
    temp = path.with_name(f".framefit-{secrets.token_hex(8)}.partial")
    try:
        with _writing(path, source):
            _check_vacant(path, format, overwrite)
            path.parent.mkdir(parents=True, exist_ok=True)
            _WRITERS[format](temp, source, fps, properties, crf)
            _check_vacant(path, format, overwrite)  # another run may have finished there first
            _place(temp, path)
    finally:
        _remove(temp)


def read(path: Path) -> Iterator[Frame]:
    """The frames of an MP4, WebP, GIF or PNG folder, RGB, decoded as they are asked for. Raises `BadInput`."""
    seen = inspect(path)
    return _read_mp4(path, seen) if seen.format == "mp4" else _read_images(path, seen)


def inspect(path: Path) -> Inspection:
    """What the file says of itself; decodes one frame at most. Raises `BadInput` if it is not one we read."""
    with _reading(path):
        format = _input_format(path)
        return _inspect_mp4(path) if format == "mp4" else _inspect_images(path, format)


def parameters(path: Path) -> dict[str, Any]:
    """What framefit made the file with. Raises `BadInput` if it does not say."""
    found = inspect(path).parameters
    if found is None:
        raise BadInput(f"{path} carries no framefit parameters: another program made it, or removed them.")
    return found


class _Source:
    """The announced frames, held to the announcement; keeps an error of theirs apart from those of the disk."""

    def __init__(self, video: Video) -> None:
        self.video = video
        self.failure: Exception | None = None

    def __iter__(self) -> Iterator[Frame]:
        video, count = self.video, 0
        shape = (video.height, video.width, 3)
        try:
            for count, frame in enumerate(video.frames, start=1):
                if count > video.num_frames:
                    raise FramefitError(f"the video announced {video.num_frames} frames and has more.")
                if frame.shape != shape or frame.dtype != np.uint8:
                    raise FramefitError(f"frame {count} is {frame.dtype} {frame.shape}, and must be uint8 {shape}.")
                yield frame
        except _DISK_ERRORS as error:
            self.failure = error
            raise
        if count < video.num_frames:
            raise FramefitError(f"the video announced {video.num_frames} frames and has {count}.")


def _resolved(path: Path) -> Path:
    return Path(os.path.realpath(path))  # a link stays, and what it points to is replaced


def _output_format(path: Path, width: int, height: int) -> Format:
    format = _FORMATS.get(path.suffix.lower())
    if format is None:
        raise BadOutput(
            f"{path.name} ends in {path.suffix}, which cannot be written: use .mp4, .webp or .gif, "
            "or a name without an extension for a folder of numbered PNGs."
        )
    if format == "mp4" and (width % 2 or height % 2):
        raise BadOutput(f"an MP4 needs even sides and the video is {width}x{height}: use .webp, .gif or another size.")
    return format


def _check_vacant(path: Path, format: Format, overwrite: bool) -> None:
    if path.exists() and path.is_dir() != (format == "png"):
        kind = "folder" if path.is_dir() else "file, and a name without an extension means a folder of PNGs"
        raise BadOutput(f"{path} is a {kind}: choose another name.")
    entries = set(path.iterdir()) if path.is_dir() else set()
    if strangers := entries.difference(_numbered(path)):
        raise BadOutput(f"{path} holds {min(strangers).name}, which is not a numbered frame: choose another folder.")
    if not overwrite and (entries or path.is_file()):
        raise BadOutput(f"{path} exists: add --overwrite to replace it, or choose another name.")


@contextmanager
def _writing(path: Path, source: _Source | None = None) -> Iterator[None]:
    try:
        yield
    except _DISK_ERRORS as error:
        if source is not None and error is source.failure:
            raise
        reason = (error.strerror or str(error)).lower()
        raise BadOutput(f"{path} cannot be written ({reason}): make room or choose another place.") from error


def _write_mp4(temp: Path, source: _Source, fps: float, properties: dict[str, str], crf: int) -> None:
    rate = Fraction(fps).limit_denominator(1001)
    movflags = {"movflags": "faststart+use_metadata_tags"}
    with av.open(str(temp), "w", format="mp4", options=movflags) as container:
        container.metadata.update({tag: properties[name] for name, tag in marks.TAGS.items()})
        # x264's macroblock tree gives short clips of noise in more than one version (libx264 of PyAV 18.1), and equal
        # frames must give equal files
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf), "x264-params": "mbtree=0"})
        stream.width, stream.height, stream.pix_fmt = source.video.width, source.video.height, "yuv420p"
        stream.gop_size = max(1, round(2 * rate))  # a player that seeks decodes two seconds at most
        context = stream.codec_context
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for index, frame in enumerate(source):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,  # PyAV converts to BT.601 by default, whatever the stream says
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
                interpolation=_EXACT,
            )
            picture.pts, picture.time_base = index, 1 / rate
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    with temp.open("ab") as file:
        file.write(marks.uuid_box(marks.packet(properties)))


def _write_webp(temp: Path, source: _Source, fps: float, properties: dict[str, str], crf: int) -> None:
    xmp = marks.packet(properties)
    temp.write_bytes(_animation(source, "WEBP", duration=1000 / fps, quality=90, method=4, xmp=xmp))


def _write_gif(temp: Path, source: _Source, fps: float, properties: dict[str, str], crf: int) -> None:
    # Delays are whole hundredths of a second: rounding the times, not the delays, keeps the pace.
    times = [round(100 * index / fps) for index in range(source.video.num_frames + 1)]
    data = _animation(source, "GIF", duration=[10 * (end - start) for start, end in pairwise(times)], loop=0)
    temp.write_bytes(data[:-1] + marks.gif_extension(marks.packet(properties)) + data[-1:])


def _animation(source: _Source, format: str, **options: Any) -> bytes:
    images = map(Image.fromarray, source)
    buffer = BytesIO()  # Pillow's encoders lose the reason when a disk refuses their bytes
    next(images).save(buffer, format, save_all=True, append_images=images, **options)
    return buffer.getvalue()


def _write_pngs(temp: Path, source: _Source, fps: float, properties: dict[str, str], crf: int) -> None:
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", marks.packet(properties).decode())
    temp.mkdir()
    for index, frame in enumerate(source):
        Image.fromarray(frame).save(temp / f"{index:05d}.png", pnginfo=info)


_WRITERS: dict[Format, Callable[[Path, _Source, float, dict[str, str], int], None]] = {
    "mp4": _write_mp4,
    "webp": _write_webp,
    "gif": _write_gif,
    "png": _write_pngs,
}


def _place(temp: Path, path: Path) -> None:
    for written in (*_numbered(temp), temp):
        _sync(written)
    if path.is_dir():
        old = temp.with_suffix(".old")  # a folder that is not empty cannot be replaced in one step
        path.rename(old)
        try:
            temp.rename(path)
        except BaseException:
            old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        temp.replace(path)
    with suppress(OSError):  # some network file systems cannot sync a folder; what is in it is safe already
        _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(temp: Path) -> None:
    with suppress(OSError):
        if temp.is_dir():
            shutil.rmtree(temp)
        else:
            temp.unlink(missing_ok=True)


def _numbered(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.png") if re.fullmatch(r"\d{5,}", path.stem))


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except BadInput:
        raise
    except FileNotFoundError as error:
        raise BadInput(f"there is no video at {path}: check the name and the folder.") from error
    except Exception as error:  # on corrupt bytes the decoders raise nearly every built-in type
        reason = str(error) or type(error).__name__
        raise BadInput(f"{path} cannot be read ({reason}): check its permissions, or make or copy it again.") from error


def _input_format(path: Path) -> Format:
    if not path.is_dir():
        with path.open("rb") as file:
            head = file.read(12)
        if head[4:8] == b"ftyp":
            return "mp4"
        if head[:4] == b"RIFF" and head[8:] == b"WEBP":
            return "webp"
        if head[:4] == b"GIF8":
            return "gif"
    elif _numbered(path):
        return "png"
    raise BadInput(f"{path} is no MP4, WebP or GIF video, nor a folder of frames 00000.png and on: name one of these.")


def _inspect_mp4(path: Path) -> Inspection:
    with path.open("rb") as file, _open_mp4(file) as container:
        if not container.streams.video:
            raise BadInput(f"{path} holds no video: name another file.")
        stream, tags = container.streams.video[0], container.metadata
        properties = {name: tags[tag] for name, tag in marks.TAGS.items() if tag in tags} | _properties(path)
        return Inspection(
            format="mp4",
            width=stream.width,
            height=stream.height,
            num_frames=stream.frames,
            fps=float(stream.average_rate or 0),
            parameters=marks.parameters(properties),
            marks=marks.statements(properties),
        )


def _inspect_images(path: Path, format: Format) -> Inspection:
    files = _images(path)
    properties = _properties(files[0])
    with _open_image(files[0]) as image:
        image.load()  # only then does a WebP state its delay
        delay_ms = image.info.get("duration", 0)
        num_frames = properties.get("NumFrames", getattr(image, "n_frames", 1))
        return Inspection(
            format=format,
            width=image.width,
            height=image.height,
            num_frames=len(files) if format == "png" else int(num_frames),
            fps=float(properties.get("FrameRate", 1000 / delay_ms if delay_ms else 0)),
            parameters=marks.parameters(properties),
            marks=marks.statements(properties),
        )


def _read_mp4(path: Path, seen: Inspection) -> Iterator[Frame]:
    shown = 0
    with _reading(path), path.open("rb") as file, _open_mp4(file) as container:
        container.streams.video[0].thread_type = "AUTO"
        for picture in container.decode(video=0):
            shown += 1
            yield np.asarray(picture.to_ndarray(format="rgb24", interpolation=_EXACT), np.uint8)
    if shown < seen.num_frames:  # ffmpeg takes the end of a cut file for the end of the video
        raise BadInput(f"{path} holds {shown} of its {seen.num_frames} frames: it was cut short, copy it again.")


def _read_images(path: Path, seen: Inspection) -> Iterator[Frame]:
    # The encoders of GIF and WebP merge equal frames into one that is shown for longer.
    per_ms = seen.fps / 1000 if seen.parameters is not None else 0
    shown, clock_ms = 0, 0.0
    with _reading(path):
        for file in _images(path):
            with _open_image(file) as image:
                for page in ImageSequence.Iterator(image):
                    frame = np.array(page.convert("RGB"))
                    clock_ms += page.info.get("duration", 0)
                    until = max(shown + 1, round(clock_ms * per_ms))
                    yield from repeat(frame, until - shown)
                    shown = until
        yield from repeat(frame, seen.num_frames - shown)  # a still video is one image without a delay


def _open_mp4(file: BinaryIO) -> InputContainer:
    # A file and not its name, which ffmpeg could take for a protocol; the format is given, so no playlist is followed.
    return av.open(file, "r", format="mp4", metadata_errors="replace")


def _images(path: Path) -> list[Path]:
    return _numbered(path) if path.is_dir() else [path]


def _open_image(path: Path) -> Image.Image:
    return Image.open(path, formats=("PNG", "WEBP", "GIF"))


def _properties(path: Path) -> dict[str, str]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return marks.find(data)
