"""video and marks: frames survive the disk, a file says what it is, and a failure leaves nothing under its name."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image

from framefit import marks, video
from framefit.errors import BadInput, BadOutput, FramefitError

WIDTH, HEIGHT, NUM_FRAMES = 96, 64, 10
NAMES = ["clip.mp4", "clip.webp", "clip.gif", "clip"]
PARAMETERS = {"prompt": "海浪拍打礁石,黄昏 <&>\"' 🌊" * 100, "seed": 7, "guidance": [3.5, 3.5], "fps": 24.0}
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 0, 0), (255, 255, 255)]


def moving(num_frames: int = NUM_FRAMES) -> Iterator[video.Frame]:
    """A white square that walks over a gradient."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    for index in range(num_frames):
        frame = np.stack([x * 2, y * 3, np.full_like(x, 90)], -1).astype(np.uint8)
        frame[20:36, 6 * index : 6 * index + 16] = 255
        yield frame


def still(colour: tuple[int, int, int], num_frames: int = 1) -> Iterator[video.Frame]:
    return iter([np.full((HEIGHT, WIDTH, 3), colour, np.uint8)] * num_frames)


def clip(frames: Iterator[video.Frame] | None = None, **facts: Any) -> video.Video:
    defaults = {"num_frames": NUM_FRAMES, "width": WIDTH, "height": HEIGHT, "fps": 24.0}
    return video.Video(frames=moving() if frames is None else frames, **(defaults | facts))


def boxes(data: bytes) -> list[tuple[str, int, int]]:
    """(name, start, size) of an MP4's top-level boxes, which must fill the file exactly."""
    found, at = [], 0
    while at < len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        if size == 1:
            size = struct.unpack_from(">Q", data, at + 8)[0]
        assert size >= 8
        found.append((name.decode(), at, size))
        at += size
    assert at == len(data)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Round trips


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fps", [8, 23.976, 24, 30])
def test_frames_and_facts_come_back(tmp_path: Path, name: str, fps: float) -> None:
    video.write(clip(fps=fps), tmp_path / name, parameters=PARAMETERS)
    seen = video.inspect(tmp_path / name)
    assert (seen.width, seen.height, seen.num_frames, seen.fps) == (WIDTH, HEIGHT, NUM_FRAMES, fps)
    assert seen.format == (Path(name).suffix[1:] or "png")
    assert list(tmp_path.iterdir()) == [tmp_path / name]
    back = list(video.read(tmp_path / name))
    assert len(back) == NUM_FRAMES
    for frame, original in zip(back, moving(), strict=True):
        assert frame.dtype == np.uint8
        assert np.abs(frame.astype(int) - original).mean() < 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_frames", [1, 6])
def test_a_still_video_keeps_its_frames(tmp_path: Path, name: str, num_frames: int) -> None:
    video.write(clip(still((90, 90, 90), num_frames), num_frames=num_frames), tmp_path / name, parameters={})
    assert video.inspect(tmp_path / name).num_frames == num_frames
    assert len(list(video.read(tmp_path / name))) == num_frames


@pytest.mark.parametrize("name", ["clip.webp", "clip.gif"])
def test_a_pause_keeps_its_length(tmp_path: Path, name: str) -> None:
    frames = [*still((255, 0, 0)), *still((0, 0, 255), 4), *still((0, 255, 0))]
    video.write(clip(iter(frames), num_frames=6), tmp_path / name, parameters={})
    for frame, original in zip(video.read(tmp_path / name), frames, strict=True):
        assert np.abs(frame.astype(int) - original).max() < 10


@pytest.mark.parametrize("name", NAMES)
def test_saturated_colours_survive(tmp_path: Path, name: str) -> None:
    frame = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for index, colour in enumerate(COLOURS):
        frame[:, 16 * index : 16 * index + 16] = colour
    video.write(clip(iter([frame] * 3), num_frames=3), tmp_path / name, parameters={})
    back = list(video.read(tmp_path / name))[-1]
    for index, colour in enumerate(COLOURS):
        assert np.abs(back[32, 16 * index + 8].astype(int) - colour).max() <= 6, colour


def test_mp4_pixels_are_bt709_limited_as_its_tags_say(tmp_path: Path) -> None:
    video.write(clip(still((255, 0, 0), 3), num_frames=3), tmp_path / "red.mp4", parameters={})
    with av.open(str(tmp_path / "red.mp4")) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert context.colorspace == Colorspace.ITU709
        assert context.color_range == ColorRange.MPEG
        assert context.color_primaries == ColorPrimaries.BT709
        assert context.color_trc == ColorTrc.BT709
        picture = next(container.decode(stream))
    planes = [bytes(plane)[0] for plane in picture.planes]
    assert np.abs(np.subtract(planes, (63, 102, 240))).max() <= 2  # BT.601 would be 81, 90, 240


def test_mp4_does_not_darken(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8))
    frame = np.array(noise.resize((WIDTH, HEIGHT)))
    video.write(clip(iter([frame] * 2), num_frames=2), tmp_path / "a.mp4", parameters={}, crf=1)
    assert abs((next(video.read(tmp_path / "a.mp4")).astype(float) - frame).mean()) < 0.4


def test_mp4_frame_times_are_even(tmp_path: Path) -> None:
    video.write(clip(fps=23.976), tmp_path / "clip.mp4", parameters={})
    with av.open(str(tmp_path / "clip.mp4")) as container:
        times = [picture.time for picture in container.decode(video=0)]
    assert times == pytest.approx([index / 23.976 for index in range(NUM_FRAMES)], abs=1e-3)


def test_gif_and_webp_keep_the_pace(tmp_path: Path) -> None:
    for name, fps, expected_s in (("a.gif", 24, 10 / 24), ("a.webp", 24, 10 / 24), ("fast.gif", 100, 10 / 50)):
        video.write(clip(fps=fps), tmp_path / name, parameters={})
        with Image.open(tmp_path / name) as image:
            delays = []
            for index in range(NUM_FRAMES):
                image.seek(index)
                image.load()
                delays.append(image.info["duration"])
        assert sum(delays) / 1000 == pytest.approx(expected_s, abs=0.006)


def test_equal_frames_give_equal_files(tmp_path: Path) -> None:
    for name in NAMES:
        for copy in ("a", "b"):
            video.write(clip(), tmp_path / copy / name, parameters=PARAMETERS)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_frames_are_taken_one_at_a_time(tmp_path: Path) -> None:
    """The writer never asks for a frame while it still holds more than the encoder's look-ahead."""
    alive: list[int] = []

    class Counted(np.ndarray[Any, np.dtype[np.uint8]]):
        def __del__(self) -> None:
            alive.remove(id(self))

    def frames() -> Iterator[video.Frame]:
        for frame in moving(60):
            counted = frame.view(Counted)
            alive.append(id(counted))
            assert len(alive) <= 3
            yield counted
            del counted

    for name in ("clip.mp4", "clip"):
        video.write(clip(frames(), num_frames=60), tmp_path / name, parameters={})


# Marks


@pytest.mark.parametrize("name", NAMES)
def test_marks_come_back(tmp_path: Path, name: str) -> None:
    video.write(clip(), tmp_path / name, parameters=PARAMETERS)
    seen = video.inspect(tmp_path / name)
    assert seen.parameters == PARAMETERS == video.parameters(tmp_path / name)
    assert seen.marks["DigitalSourceType"].endswith("/digitalsourcetype/trainedAlgorithmicMedia")
    label = json.loads(seen.marks["AIGC"])
    assert (label["Label"], label["ContentProducer"], len(label["ProduceID"])) == ("1", "framefit", 32)
    assert set(label) == {
        "Label", "ContentProducer", "ProduceID", "ReservedCode1", "ContentPropagator", "PropagateID", "ReservedCode2",
    }  # fmt: skip


def test_the_content_number_tells_videos_apart() -> None:
    numbers = set()
    for seed in (1, 2, 1):
        properties = marks.properties({"seed": seed}, fps=24, num_frames=1)
        numbers.add(json.loads(properties["AIGC"])["ProduceID"])
    assert len(numbers) == 2


def test_mp4_states_its_parameters_and_label_as_tags_too(tmp_path: Path) -> None:
    video.write(clip(), tmp_path / "clip.mp4", parameters=PARAMETERS)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        tags = container.metadata
    assert json.loads(tags["framefit"]) == PARAMETERS
    assert json.loads(tags["AIGC"])["Label"] == "1"


def test_mp4_that_lost_its_xmp_still_has_its_parameters(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    video.write(clip(), path, parameters=PARAMETERS)
    data = path.read_bytes()
    path.write_bytes(data[: boxes(data)[-1][1]])
    seen = video.inspect(path)
    assert seen.parameters == PARAMETERS
    assert set(seen.marks) == {"AIGC"}


def test_mp4_layout(tmp_path: Path) -> None:
    video.write(clip(), tmp_path / "clip.mp4", parameters=PARAMETERS)
    data = (tmp_path / "clip.mp4").read_bytes()
    layout = boxes(data)
    names = [name for name, _, _ in layout]
    assert names.index("moov") < names.index("mdat")
    name, start, size = layout[-1]
    assert name == "uuid"
    assert data[start + 8 : start + 24].hex() == "be7acfcb97a942e89c71999491e3afac"
    assert data[start + 24 : start + size].startswith(b"<?xpacket begin=")


def test_other_readers_find_the_xmp(tmp_path: Path) -> None:
    for name in ("clip.webp", "clip"):
        video.write(clip(), tmp_path / name, parameters=PARAMETERS)
    with Image.open(tmp_path / "clip.webp") as image:
        assert b"trainedAlgorithmicMedia" in image.info["xmp"]
    for frame in (tmp_path / "clip").iterdir():
        with Image.open(frame) as image:
            assert "TC260:AIGC" in image.info["XML:com.adobe.xmp"]


def test_gif_blocks_stay_readable_around_the_xmp(tmp_path: Path) -> None:
    """A reader that knows no XMP skips the text as if it were length-prefixed blocks, and meets the GIF's end."""
    video.write(clip(), tmp_path / "clip.gif", parameters=PARAMETERS)
    data = (tmp_path / "clip.gif").read_bytes()
    at = data.index(b"\x21\xff\x0bXMP DataXMP") + 14
    while data[at]:
        at += data[at] + 1
    assert data[at + 1 :] == b";"


def test_a_prompt_cannot_forge_a_mark(tmp_path: Path) -> None:
    forged = marks.packet(marks.properties({"seed": "forged"}, fps=1, num_frames=9)).decode()
    for name in NAMES:
        video.write(clip(), tmp_path / name, parameters={"prompt": forged})
        seen = video.inspect(tmp_path / name)
        assert seen.parameters == {"prompt": forged}
        assert (seen.num_frames, set(seen.marks)) == (NUM_FRAMES, {"AIGC", "DigitalSourceType"})


@pytest.mark.parametrize(
    "damage", [b"<?xpacket begin=", b'<?xpacket begin=""?><a><?xpacket end="w"?>', b'<?xpacket end="w"?>', b""]
)
def test_a_damaged_packet_is_no_packet(damage: bytes) -> None:
    assert marks.find(damage) == {}


def test_the_order_of_parameters_does_not_matter() -> None:
    one, other = ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    assert marks.properties(one, fps=8, num_frames=1) == marks.properties(other, fps=8, num_frames=1)


def test_a_huge_packet_is_not_parsed() -> None:
    properties = marks.properties({"prompt": "x" * 2**24}, fps=8, num_frames=1)
    assert marks.find(marks.packet(properties)) == {}


# Refusals before any work


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("clip.avi", r"\.mp4, \.webp or \.gif, or a name without an extension for a folder of numbered PNGs"),
        ("clip.png", "without an extension for a folder"),
        ("folder.mp4", "is a folder"),
        ("there.mp4", "--overwrite"),
        ("frames", "--overwrite"),
        ("photos", r"holds holiday\.jpg, which is not a numbered frame"),
        ("there", "is a file"),
        ("there.mp4/clip.mp4", "not a directory|file exists"),
        ("x" * 300 + ".mp4", "name too long"),
    ],
)
def test_unusable_outputs_are_refused_early_and_late(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "folder.mp4").mkdir()
    for file in ("there.mp4", "there", "frames/00000.png", "photos/holiday.jpg"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"mine")
    before = contents(tmp_path)
    with pytest.raises(BadOutput, match=says):
        video.check_output(tmp_path / name, overwrite=False, width=WIDTH, height=HEIGHT, num_frames=NUM_FRAMES)
    with pytest.raises(BadOutput, match=says):
        video.write(clip(), tmp_path / name, parameters={})
    assert contents(tmp_path) == before


def test_overwrite_does_not_extend_to_other_peoples_folders(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(BadOutput, match=r"holiday\.jpg"):
        video.check_output(tmp_path, overwrite=True, width=WIDTH, height=HEIGHT, num_frames=NUM_FRAMES)


def test_odd_sizes_are_refused_for_mp4_only(tmp_path: Path) -> None:
    with pytest.raises(BadOutput, match="even sides and the video is 33x32"):
        video.check_output(tmp_path / "a.mp4", overwrite=False, width=33, height=32, num_frames=1)
    frame = np.full((31, 33, 3), 50, np.uint8)
    for name in ("a.webp", "a.gif", "a"):
        video.write(clip(iter([frame]), num_frames=1, width=33, height=31), tmp_path / name, parameters={})
        assert next(video.read(tmp_path / name)).shape == (31, 33, 3)


def test_a_good_output_passes_and_nothing_is_made(tmp_path: Path) -> None:
    for name in (*NAMES, "new/folders/clip.mp4"):
        video.check_output(tmp_path / name, overwrite=False, width=WIDTH, height=HEIGHT, num_frames=NUM_FRAMES)
    assert list(tmp_path.iterdir()) == []


def test_a_small_disk_is_named_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=20 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    video.check_output(tmp_path / "a.mp4", overwrite=False, width=320, height=256, num_frames=16)
    with pytest.raises(BadOutput, match="may need 43 MiB and the disk has 20 MiB free"):
        video.check_output(tmp_path / "a.mp4", overwrite=False, width=1280, height=720, num_frames=81)


def test_a_place_that_takes_no_files_is_refused() -> None:
    with pytest.raises(BadOutput, match="cannot be written"):
        video.check_output(Path("/proc/new/clip.mp4"), overwrite=False, width=64, height=64, num_frames=1)


# Overwriting


@pytest.mark.parametrize("name", NAMES)
def test_overwriting(tmp_path: Path, name: str) -> None:
    video.write(clip(), tmp_path / name, parameters={"take": 1})
    with pytest.raises(BadOutput, match="--overwrite"):
        video.write(clip(), tmp_path / name, parameters={"take": 2})
    assert video.parameters(tmp_path / name) == {"take": 1}
    video.write(clip(moving(4), num_frames=4), tmp_path / name, parameters={"take": 3}, overwrite=True)
    assert video.parameters(tmp_path / name) == {"take": 3}
    assert len(list(video.read(tmp_path / name))) == 4
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_a_folder_comes_back_if_its_replacement_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video.write(clip(), tmp_path / "clip", parameters={})
    before = contents(tmp_path)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(BadOutput, match="input/output error"):
        video.write(clip(), tmp_path / "clip", parameters={"take": 2}, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", NAMES)
def test_everything_is_synced_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    synced: dict[int, bool] = {}
    monkeypatch.setattr(os, "fsync", lambda fd: synced.setdefault(os.fstat(fd).st_ino, (tmp_path / name).exists()))
    video.write(clip(), tmp_path / name, parameters={})
    written = [tmp_path / name, *(tmp_path / name).glob("*")]
    assert [synced[path.stat().st_ino] for path in written] == [False] * len(written)
    assert synced[tmp_path.stat().st_ino] is True


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    def frames() -> Iterator[video.Frame]:
        yield from moving()
        (tmp_path / "clip.mp4").write_bytes(b"theirs")

    with pytest.raises(BadOutput, match="--overwrite"):
        video.write(clip(frames()), tmp_path / "clip.mp4", parameters={})
    assert contents(tmp_path) == {"clip.mp4": b"theirs"}


def test_an_empty_folder_and_a_link_are_written_into(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    video.write(clip(), tmp_path / "link", parameters={})
    assert (tmp_path / "link").is_symlink()
    assert len(list((tmp_path / "real").iterdir())) == NUM_FRAMES


def test_a_new_file_has_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    for name in NAMES:
        if name != "clip":
            video.write(clip(), tmp_path / name, parameters={})
            assert (tmp_path / name).stat().st_mode == (tmp_path / "ordinary").stat().st_mode


# Failures while writing


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("error", [ValueError("x"), OSError(errno.ENOSPC, "x"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("after", [0, 5])
def test_an_error_of_the_frames_passes_through(tmp_path: Path, name: str, error: BaseException, after: int) -> None:
    def frames() -> Iterator[video.Frame]:
        yield from moving(after)
        raise error

    with pytest.raises(type(error)) as caught:
        video.write(clip(frames()), tmp_path / name, parameters={})
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_failure_keeps_what_was_there(tmp_path: Path, name: str) -> None:
    video.write(clip(), tmp_path / name, parameters={})
    before = contents(tmp_path)
    with pytest.raises(FramefitError):
        video.write(clip(moving(3)), tmp_path / name, parameters={}, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("frames", "says"),
    [
        (moving, "announced 5 frames and has more"),
        (lambda: moving(4), "announced 5 frames and has 4"),
        (lambda: moving(0), "announced 5 frames and has 0"),
        (lambda: iter([np.zeros((HEIGHT, WIDTH + 2, 3), np.uint8)]), r"frame 1 is uint8 \(64, 98, 3\)"),
        (lambda: iter([np.zeros((HEIGHT, WIDTH, 3), np.float32)]), "frame 1 is float32"),
    ],
    ids=["more", "fewer", "none", "shape", "type"],
)
def test_frames_other_than_announced_are_refused(tmp_path: Path, name: str, frames: Any, says: str) -> None:
    with pytest.raises(FramefitError, match=says):
        video.write(clip(frames(), num_frames=5), tmp_path / name, parameters={})
    assert list(tmp_path.iterdir()) == []


CHILD = """
import sys, time
from pathlib import Path
sys.path[:0] = {paths!r}
import test_video
from framefit import video
from framefit.errors import BadOutput

def slow():
    for index, frame in enumerate(test_video.moving(120)):
        if {hang!r} == "frames" and index == 110:
            hang()
        yield frame

def hang(*_):
    print("writing", flush=True)
    time.sleep(60)

if {hang!r} == "rename":
    video._place = hang

try:
    video.write(test_video.clip(slow(), num_frames=120), Path(sys.argv[1]), parameters=test_video.PARAMETERS)
except BadOutput as error:
    print(error)
"""


def child(path: Path, hang: str = "") -> list[str]:
    here = Path(__file__).parent
    return [sys.executable, "-c", CHILD.format(paths=[str(here), str(here.parent)], hang=hang), str(path)]


def limited(path: Path, limit: int) -> str:
    """What the writer says when no file may grow over `limit` bytes, which is a full disk in miniature."""
    return subprocess.run(
        child(path),
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    ).stdout


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    said = limited(tmp_path / name, 3000)
    assert f"{name} cannot be written (file too large): make room" in said
    assert list(tmp_path.iterdir()) == []


def test_no_limit_cuts_an_mp4_silently(tmp_path: Path) -> None:
    """The muxer moves its index to the front at the end: a failure there must not pass for success."""
    video.write(clip(), tmp_path / "whole.mp4", parameters=PARAMETERS)
    whole = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "whole.mp4").unlink()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    limits = [*range(0, len(whole), len(whole) // 30), len(whole) - 1]
    try:
        for limit in limits:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
            with pytest.raises(BadOutput, match="file too large"):
                video.write(clip(), tmp_path / "clip.mp4", parameters=PARAMETERS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "hang"),
    [("clip.mp4", "frames"), ("clip", "frames"), *((name, "rename") for name in NAMES)],
)
def test_a_killed_writer_leaves_nothing_under_the_name(tmp_path: Path, name: str, hang: str) -> None:
    with subprocess.Popen(child(tmp_path / name, hang), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".framefit-")
    assert left.name.endswith(".partial")
    assert left.stat().st_size > 0


# Reading what others made


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "there is no video at"),
        (lambda path: path.write_bytes(b""), "no MP4, WebP or GIF"),
        (lambda path: path.write_text("#EXTM3U\nhttp://example.com/a.ts"), "no MP4, WebP or GIF"),
        (lambda path: path.mkdir(), "no MP4, WebP or GIF"),
        (lambda path: path.write_bytes(b"\0\0\0\x20ftypisom" + bytes(40)), "cannot be read|holds no video"),
        (lambda path: path.write_bytes(b"GIF89a" + struct.pack("<HH", 60000, 60000) + bytes(40)), "cannot be read"),
    ],
    ids=["missing", "empty", "playlist", "empty folder", "broken mp4", "gif bomb"],
)
def test_what_is_no_video_is_refused(tmp_path: Path, make: Any, says: str) -> None:
    make(tmp_path / "a.mp4")
    for ask in (video.inspect, video.parameters, video.read):
        with pytest.raises(BadInput, match=says):
            ask(tmp_path / "a.mp4")


def test_a_foreign_animation_is_read_without_parameters(tmp_path: Path) -> None:
    images = [Image.fromarray(frame) for frame in moving(4)]
    for name in ("a.gif", "a.webp"):
        images[0].save(tmp_path / name, save_all=True, append_images=images[1:], duration=100)
        seen = video.inspect(tmp_path / name)
        assert (seen.num_frames, seen.fps, seen.parameters, seen.marks) == (4, 10, None, {})
        assert len(list(video.read(tmp_path / name))) == 4
        with pytest.raises(BadInput, match="carries no framefit parameters"):
            video.parameters(tmp_path / name)


def test_a_cut_mp4_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    video.write(clip(), path, parameters=PARAMETERS)
    whole = path.read_bytes()
    for name, start, size in boxes(whole):
        if name in ("moov", "mdat"):
            for keep in (start + 8, start + size // 2, start + size - 40):
                path.write_bytes(whole[:keep])
                with pytest.raises(BadInput):
                    list(video.read(path))


def test_short_clips_of_noise_encode_to_one_version(tmp_path: Path) -> None:
    frames = list(np.random.default_rng(0).integers(0, 255, (5, 64, 96, 3), dtype=np.uint8))
    contents = set()
    for _ in range(12):
        made = video.Video(frames=iter(frames), num_frames=5, width=96, height=64, fps=16)
        video.write(made, tmp_path / "a.mp4", parameters={}, overwrite=True)
        contents.add((tmp_path / "a.mp4").read_bytes())
    assert len(contents) == 1
