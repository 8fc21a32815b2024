"""photo: whatever a phone or the web hands over becomes an upright sRGB image, or one clear sentence."""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from framefit import photo
from framefit.errors import BadImage

RED, BLUE = (255, 0, 0), (0, 0, 255)


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    value = image.getpixel((x, y))
    assert isinstance(value, tuple)
    return value


def quadrants() -> Image.Image:
    """Four colours, so that each of the eight orientations looks different."""
    image = Image.new("RGB", (32, 48), "red")
    image.paste("lime", (16, 0, 32, 24))
    image.paste("blue", (0, 24, 16, 48))
    image.paste("white", (16, 24, 32, 48))
    return image


def display_p3() -> bytes:
    """An sRGB profile with the primaries of Display P3 put in (D50-adapted, as ICC wants them)."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    primaries = {
        b"rXYZ": (0.51512, 0.24120, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.15710, 0.06657, 0.78407),
    }
    count = struct.unpack_from(">I", profile, 128)[0]
    for entry in range(132, 132 + 12 * count, 12):
        name, offset, _ = struct.unpack_from(">4sII", profile, entry)
        if name in primaries:
            struct.pack_into(">3i", profile, offset + 8, *(round(v * 65536) for v in primaries[name]))
    return bytes(profile)


def png_claiming(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "avif"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_format_loads_as_rgb(tmp_path: Path, extension: str, mode: str) -> None:
    colour = (200, 100, 50) if mode == "RGB" else 200
    image = photo.load(saved(tmp_path / f"a.{extension}", Image.new(mode, (40, 24), colour)))
    assert (image.mode, image.size) == ("RGB", (40, 24))
    expected = (200, 100, 50) if mode == "RGB" else (200, 200, 200)
    assert np.abs(np.subtract(pixel(image), expected)).max() <= 3


def test_phone_jpeg_of_several_pictures_gives_the_first(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (32, 16), RED), Image.new("RGB", (32, 16), BLUE)
    path = saved(tmp_path / "a.jpg", first, format="MPO", save_all=True, append_images=[second])
    assert pixel(photo.load(path))[0] > 250


@pytest.mark.parametrize("extension", ["png", "webp", "avif"])
def test_animation_gives_its_first_frame(tmp_path: Path, extension: str) -> None:
    first, second = Image.new("RGB", (32, 16), RED), Image.new("RGB", (32, 16), BLUE)
    path = saved(tmp_path / f"a.{extension}", first, save_all=True, append_images=[second])
    assert pixel(photo.load(path))[0] > 250


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path: Path, orientation: int, extension: str) -> None:
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    upright = quadrants()
    stored = upright.transpose(inverse[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = photo.load(saved(tmp_path / f"a.{extension}", stored, exif=exif))
    assert image.size == upright.size
    for corner in ((4, 4), (27, 4), (4, 43), (27, 43)):
        assert np.abs(np.subtract(pixel(image, *corner), pixel(upright, *corner))).max() <= 40


@pytest.mark.parametrize(
    ("extension", "exif"),
    [("jpg", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"), ("png", b"Exif\0\0no TIFF header")],
)
def test_broken_exif_is_ignored(tmp_path: Path, extension: str, exif: bytes) -> None:
    path = saved(tmp_path / f"a.{extension}", Image.new("RGB", (32, 16), RED), exif=exif)
    assert photo.load(path).size == (32, 16)


@pytest.mark.parametrize(
    ("image", "options"),
    [
        (Image.new("RGBA", (16, 16), (255, 0, 0, 0)), {}),
        (Image.new("LA", (16, 16), (0, 0)), {}),
        (Image.new("RGB", (16, 16), RED).quantize(2), {"transparency": 0}),
        (Image.new("RGB", (16, 16), RED), {"transparency": RED}),
    ],
    ids=["rgba", "la", "palette", "colour key"],
)
def test_transparency_becomes_white(tmp_path: Path, image: Image.Image, options: dict[str, Any]) -> None:
    assert pixel(photo.load(saved(tmp_path / "a.png", image, **options))) == (255, 255, 255)


def test_half_transparency_is_blended(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Image.new("RGBA", (16, 16), (255, 0, 0, 128)))
    assert pixel(photo.load(path)) == (255, 127, 127)


@pytest.mark.parametrize("options", [{}, {"transparency": 300}])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, options: dict[str, Any]) -> None:
    ramp = np.linspace(0, 65535, 512).astype(np.uint16)[None].repeat(8, 0)
    loaded = np.asarray(photo.load(saved(tmp_path / "a.png", Image.fromarray(ramp), **options)))
    assert np.abs(loaded[0, :, 1] - ramp[0] / 257).max() <= 0.5


def test_cmyk(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jpg", Image.new("CMYK", (16, 16), (0, 255, 255, 0)))
    assert np.abs(np.subtract(pixel(photo.load(path)), RED)).max() <= 3


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "avif"])
def test_wide_gamut_becomes_srgb(tmp_path: Path, extension: str) -> None:
    image = Image.new("RGB", (32, 16), (180, 90, 60))
    path = saved(tmp_path / f"a.{extension}", image, icc_profile=display_p3(), quality=95)
    loaded = photo.load(path)
    # Display P3 (180, 90, 60) by the matrices of both spaces and the one transfer curve that they share.
    assert np.abs(np.subtract(pixel(loaded), (193, 83, 51))).max() <= 4
    assert "icc_profile" not in loaded.info


@pytest.mark.parametrize("profile", [b"not a profile", display_p3()[:300]], ids=["garbage", "cut"])
def test_broken_profile_is_ignored(tmp_path: Path, profile: bytes) -> None:
    path = saved(tmp_path / "a.png", Image.new("RGB", (16, 16), (180, 90, 60)), icc_profile=profile)
    assert pixel(photo.load(path)) == (180, 90, 60)


def test_profile_of_another_colour_model_is_ignored(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", Image.new("L", (16, 16), 90), icc_profile=display_p3())
    assert pixel(photo.load(path)) == (90, 90, 90)


def test_private_metadata_stays_behind(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "home address"
    assert photo.load(saved(tmp_path / "a.jpg", quadrants(), exif=exif)).info == {}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "there is no photo at"),
        (lambda path: path.mkdir(), "folder"),
        (lambda path: path.write_bytes(b""), "JPEG, PNG, WebP or AVIF"),
        (lambda path: path.write_text("hello"), "JPEG, PNG, WebP or AVIF"),
        (lambda path: path.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>"), "JPEG, PNG, WebP or AVIF"),
        (lambda path: quadrants().save(path, "TIFF"), "JPEG, PNG, WebP or AVIF"),
        (lambda path: quadrants().save(path, "GIF"), "JPEG, PNG, WebP or AVIF"),
        (lambda path: path.write_bytes(png_claiming(50_000, 50_000)), "120 million pixels"),
        (lambda path: path.write_bytes(png_claiming(12_000, 11_000)), "120 million pixels"),
        (lambda path: path.write_bytes(png_claiming(100, 100)), "corrupt or cut short"),
        (lambda path: Image.new("RGB", (64, 7)).save(path, "PNG"), "64x7 px, and both sides must be 8 px"),
    ],
    ids=["missing", "folder", "empty", "text", "svg", "tiff", "gif", "bomb", "big", "no pixels", "thin"],
)
def test_unusable_files_are_refused_in_a_sentence(tmp_path: Path, make: Any, says: str) -> None:
    path = tmp_path / "a.png"
    make(path)
    with pytest.raises(BadImage, match=says) as caught:
        photo.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pixel_limit_holds_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.png", quadrants())
    monkeypatch.setattr(photo, "MAX_PIXELS", 32 * 48 - 1)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(BadImage, match="million pixels"):
        photo.load(path)


def test_a_photo_that_only_pillow_finds_large_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.png", quadrants())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow now warns of it, and warnings are errors here
    assert photo.load(path).size == (32, 48)


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "avif"])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, extension: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8))
    whole = saved(tmp_path / f"a.{extension}", noise).read_bytes()
    cut = tmp_path / f"cut.{extension}"
    for keep in (0.1, 0.5, 0.8):
        cut.write_bytes(whole[: int(len(whole) * keep)])
        with pytest.raises(BadImage):
            photo.load(cut)


@contextmanager
def unprivileged() -> Iterator[None]:
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_unreadable_file_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", quadrants())
    path.chmod(0)
    with unprivileged(), pytest.raises(BadImage, match="Permission denied"):
        photo.load(path)


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (333, 500), (2000, 100)])
@pytest.mark.parametrize("target", [(832, 480), (480, 832), (64, 64)])
def test_crop_fills_the_size_around_the_centre(size: tuple[int, int], target: tuple[int, int]) -> None:
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    fitted = photo.fit(image, *target, "crop")
    assert fitted.size == target
    # The gradient runs down the whole photo; unstretched, its slope per pixel is 255 / height / scale.
    scale = max(target[0] / size[0], target[1] / size[1])
    column = np.asarray(fitted, np.float64)[:, target[0] // 2, 0]
    assert column.mean() == pytest.approx(127.5, abs=4)
    assert column[-1] - column[0] == pytest.approx(255 * target[1] / (size[1] * scale), abs=12)


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (333, 500), (4000, 8)])
@pytest.mark.parametrize("target", [(832, 480), (480, 832), (64, 64)])
def test_pad_keeps_the_whole_photo_between_black_bars(size: tuple[int, int], target: tuple[int, int]) -> None:
    fitted = photo.fit(Image.new("RGB", size, "white"), *target, "pad")
    assert fitted.size == target
    white = np.asarray(fitted)[..., 0] > 127
    rows, columns = np.flatnonzero(white.any(1)), np.flatnonzero(white.any(0))
    scale = min(target[0] / size[0], target[1] / size[1])
    assert len(columns) == pytest.approx(size[0] * scale, abs=1)
    assert len(rows) == pytest.approx(size[1] * scale, abs=1)
    assert abs(columns[0] - (target[0] - 1 - columns[-1])) <= 1
    assert abs(rows[0] - (target[1] - 1 - rows[-1])) <= 1


def test_fit_leaves_a_photo_of_the_right_size_alone() -> None:
    image = quadrants()
    for mode in ("crop", "pad"):
        assert np.array_equal(photo.fit(image, 32, 48, mode), image)  # type: ignore[arg-type]


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert photo.sha256(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
