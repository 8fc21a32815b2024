"""Real photos: a file from a phone or the web becomes an upright 8-bit sRGB image, then the size that a model wants.

Knows nothing of models or legal sizes: whoever plans the run picks the size and the way to fit it.
"""

from __future__ import annotations

import hashlib
import warnings
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Literal

from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from framefit.errors import BadImage

__all__ = ["MAX_PIXELS", "MIN_SIDE_PX", "fit", "load", "sha256"]

MAX_PIXELS = 120_000_000
MIN_SIDE_PX = 8

_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF")  # Pillow's JPEG also opens the MPO files of phones
_GREY16 = ("I;16", "I;16L", "I;16B", "I;16N", "I")


def load(path: Path) -> Image.Image:
    """The photo as an upright RGB image in sRGB, transparency on white; the first frame of an animation.

    Raises `BadImage` for a file that is missing, unreadable, of another format, corrupt, over `MAX_PIXELS`
    (refused before a pixel is decoded) or with a side under `MIN_SIDE_PX`.
    """
    with _open(path) as file, warnings.catch_warnings():
        # What Pillow warns of (many pixels, odd EXIF) is checked below or does not touch the pixels.
        warnings.simplefilter("ignore")
        try:
            with Image.open(file, formats=_FORMATS) as image:
                _check_size(path, image)
                image.load()
                return _srgb(_upright(_opaque(_eight_bit(image))))
        except BadImage:
            raise
        except UnidentifiedImageError as error:
            raise BadImage(f"{path} is not a JPEG, PNG, WebP or AVIF photo: convert it to one of these.") from error
        except Image.DecompressionBombError as error:
            raise _too_large(path) from error
        except Exception as error:  # on corrupt bytes Pillow's decoders raise nearly every built-in type
            reason = str(error) or type(error).__name__
            raise BadImage(f"{path} is corrupt or cut short ({reason}): copy or export it again.") from error


def fit(image: Image.Image, width: int, height: int, mode: Literal["crop", "pad"]) -> Image.Image:
    """The image at exactly width x height, never stretched: cropped around its centre, or whole between black bars."""
    if mode == "crop":
        return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    # Not ImageOps.pad: it rounds the short side of a very long photo to 0 and fails.
    scale = min(width / image.width, height / image.height)
    inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize(inner, Image.Resampling.LANCZOS), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return canvas


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open(path: Path) -> BinaryIO:
    try:
        if path.exists() and not path.is_file():
            raise BadImage(f"{path} is a folder or a device: name one photo.")
        return path.open("rb")
    except FileNotFoundError as error:
        raise BadImage(f"there is no photo at {path}: check the name and the folder.") from error
    except OSError as error:
        raise BadImage(f"{path} cannot be read ({error.strerror}): check its name and its permissions.") from error


def _check_size(path: Path, image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(path)
    if min(image.size) < MIN_SIDE_PX:
        raise BadImage(
            f"{path} is {image.width}x{image.height} px, and both sides must be {MIN_SIDE_PX} px or more: "
            "use a larger photo."
        )


def _too_large(path: Path) -> BadImage:
    limit = f"{MAX_PIXELS // 1_000_000} million pixels"
    return BadImage(f"{path} has more than {limit}, the most that can be read: scale it down first.")


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode not in _GREY16:
        return image
    # Pillow's own conversion clips at 255; the transparent level, if any, would be out of range after scaling.
    grey = image.convert("I").point(lambda level: level * (1 / 257) + 0.5).convert("L")
    grey.info.pop("transparency", None)
    return grey


def _opaque(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    with suppress(Exception):  # a broken EXIF block says nothing about the pixels
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _srgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    rgb = image if image.mode in ("RGB", "L", "CMYK") else image.convert("RGB")
    if profile:
        # A profile that is broken, or made for another colour model, is no reason to refuse the photo.
        with suppress(ImageCms.PyCMSError):
            rgb = _to_srgb(BytesIO(profile), rgb.mode).apply(rgb)
    rgb = rgb.convert("RGB")
    rgb.info.clear()  # EXIF and the profile describe the file, not this image
    return rgb


def _to_srgb(profile: BytesIO, mode: str) -> ImageCms.ImageCmsTransform:
    intent, flags = ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION
    return ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB", intent, flags)
