"""Which files of a folder make up a checkpoint, and what their headers say.

Knows how diffusers and transformers name the files of a component; reads no tensor.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from framefit.errors import ModelMissing
from framefit.families.checkpoint import Checkpoint, Component

__all__ = [
    "Shapes",
    "check_headers",
    "fingerprint",
    "header",
    "index_file",
    "needed_files",
    "read_json",
    "stem",
    "survey",
    "weight_files",
    "weight_map",
]

Shapes = dict[str, tuple[int, ...]]
"""Tensor name -> shape."""

_DTYPES = {
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "I64",
    "BOOL",
}  # whole numbers: buffers such as position_ids
_PICKLES = {".bin", ".pt", ".pth", ".ckpt"}
_VOCABULARIES = (["tokenizer.json"], ["spiece.model"], ["tokenizer.model"], ["vocab.json", "merges.txt"], ["vocab.txt"])
_SETTINGS = {"Tokenizer": "tokenizer_config", "Scheduler": "scheduler_config", "Processor": "preprocessor_config"}


def needed_files(folder: Path, checkpoint: Checkpoint) -> list[Path]:
    """Settings, vocabularies and safetensors weights of every component; raises `ModelMissing` naming the gaps.

    Looks at names and indexes only: `verify` reads the files.
    """
    if not folder.is_dir():
        raise ModelMissing(f"{checkpoint.id} is not at {folder}: there is no such folder.")
    files, gaps = survey(folder, checkpoint)
    if gaps:
        more = f" and {len(gaps) - 3} more" if len(gaps) > 3 else ""
        way = "complete the folder" if checkpoint.folder else f"run 'framefit models pull {checkpoint.id}'"
        raise ModelMissing(f"{checkpoint.id} is incomplete at {folder}: {'; '.join(gaps[:3])}{more}. To go on, {way}.")
    return files


def check_headers(folder: Path, checkpoint: Checkpoint) -> None:
    """Raises `ModelMissing` for a weight file that is cut off, garbled, or of whole numbers."""
    for file in needed_files(folder, checkpoint):
        if file.suffix == ".safetensors" and (wrong := header(file)[1]):
            raise ModelMissing(f"{file} {wrong}: framefit models verify names all that is wrong.")


def fingerprint(folder: Path) -> str:
    """A short name for these very weights: sizes, headers and samples of every safetensors file.

    Reading samples keeps it under a second for 70 GB, and tells apart weights of the same shape.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*/*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder)} {size}\n".encode())
        with file.open("rb") as stream:
            for offset in (0, size // 3, 2 * size // 3, max(size - 2**16, 0)):
                stream.seek(offset)
                digest.update(stream.read(2**16))
    return digest.hexdigest()[:16]


def survey(folder: Path, checkpoint: Checkpoint) -> tuple[list[Path], list[str]]:
    """The needed files that are there, and a phrase for each that is not."""
    files: list[Path] = []
    gaps: list[str] = []
    for component in checkpoint.components:
        part = folder / component.name
        if not part.is_dir():
            gaps.append(f"the folder {part.name}/ is missing")
            continue
        small = sorted(p for p in part.iterdir() if p.suffix in {".json", ".txt", ".model"} and p.is_file())
        names = {p.name for p in small}
        settings = next((name for kind, name in _SETTINGS.items() if kind in component.class_name), "config")
        if f"{settings}.json" not in names:
            gaps.append(f"{part.name}/{settings}.json is missing")
        if "Tokenizer" in component.class_name and not any(names.issuperset(v) for v in _VOCABULARIES):
            gaps.append(f"{part.name}/ has no vocabulary (tokenizer.json or spiece.model, for example)")
        weights, absent = weight_files(part, component)
        files += small + weights
        gaps += absent
    return files, gaps


def weight_files(part: Path, component: Component) -> tuple[list[Path], list[str]]:
    """The component's safetensors files that are there, and a phrase for each that is not."""
    if not component.params:
        return [], []
    single, index = part / f"{stem(component)}.safetensors", index_file(part, component)
    if index.is_file():
        shards = sorted(set(weight_map(index).values()))
        if not shards or any(Path(name).name != name for name in shards):
            return [], [f"{part.name}/{index.name} names no shards beside it"]
        lost = [(n, name) for n, name in enumerate(shards, 1) if not (part / name).is_file()]
        gaps = [f"{part.name}/{name} is missing (shard {n} of {len(shards)})" for n, name in lost]
        return [part / name for name in shards if (part / name).is_file()], gaps
    if single.is_file():
        return [single], []
    if any(part.glob(f"{stem(component)}-*-of-*.safetensors")):
        return [], [f"{part.name}/{index.name} is missing"]
    pickles = sorted(p.name for p in part.iterdir() if p.suffix in _PICKLES)
    refused = f" (pickles such as {pickles[0]} are refused for safety)" if pickles else ""
    return [], [f"{part.name}/{single.name} is missing{refused}"]


def stem(component: Component) -> str:
    return "diffusion_pytorch_model" if component.package == "diffusers" else "model"


def index_file(part: Path, component: Component) -> Path:
    return part / f"{stem(component)}.safetensors.index.json"


def weight_map(index: Path) -> dict[str, str]:
    entries = (read_json(index) or {}).get("weight_map")
    return {key: str(shard) for key, shard in entries.items()} if isinstance(entries, dict) else {}


def read_json(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def header(file: Path) -> tuple[Shapes | None, str | None]:
    """Shapes by key, and what is wrong with the file; the format: github.com/huggingface/safetensors#format."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(min(length, 100_000_000))  # the format's own limit
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        shapes = {key: tuple(entry["shape"]) for key, entry in entries.items()}
        packed = {entry["dtype"]: key for key, entry in entries.items() if entry["dtype"] not in _DTYPES}
        whole = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None, f"has a safetensors header that does not parse ({size:,} bytes in all)"
    if size != whole:
        return shapes, f"is {size:,} bytes long, and its header says {whole:,}"
    for dtype, key in packed.items():
        return shapes, f"holds {key} as {dtype}, and framefit reads floating-point weights"
    return shapes, None
