"""What a video file says of how it was made, and the way back from it to a request.

Files are named by name and hash only: a path tells more of its owner than a video should. Where photos, LoRAs and a
local model folder lay is noted on this machine, by hash.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from framefit import __version__, photo, video
from framefit.checkpoint import default_root
from framefit.errors import BadInput
from framefit.families import Checkpoint, bundled
from framefit.plan import Decode, Plan, Window
from framefit.request import Request

__all__ = ["Recipe", "parameters", "recipe", "remember"]

SHIPPED = (Path(__file__).parent / "assets", bundled.FOLDER)
"""Where the package has a photo, and the LoRA of a preset."""

HASH = re.compile("[0-9a-f]{16}|[0-9a-f]{64}")
"""A fingerprint of weights, or a SHA-256."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What it takes to make a video again."""

    request: Request
    precision: str
    settings: dict[str, str]
    crf: int
    weights: str
    """Fingerprint of the weights that it was made with."""


def parameters(checkpoint: Checkpoint, plan: Plan, weights: str, crf: int) -> dict[str, Any]:
    """What goes into the file; `weights` is the fingerprint of the model's weights."""
    request = plan.request
    fields = {k: v for k, v in request.to_json().items() if k != "shift"}
    for name in plan.photos:
        fields[name] = _readable(Path(fields[name]).name)
    fields["loras"] = [lora.to_json() | {"file": _readable(lora.file.name)} for lora in request.loras]
    local = _local_folder(checkpoint)
    if local is not None:
        fields["model"] = _readable(local.name)
    return {
        "made_by": f"framefit {__version__}",
        "request": fields,
        "local_model": local is not None,
        "photos": dict(plan.photos),
        "precision": plan.precision,
        "settings": {s.type: s.value for s in plan.settings},
        **_windows(checkpoint, plan),
        **_tiles(checkpoint, plan),
        "weights": weights,
        "crf": crf,
        "device": plan.device.name,
        "torch": version("torch"),
        "diffusers": version("diffusers"),
        "python": platform.python_version(),
    }


def _windows(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """Which frames each window made, for whoever measures them; nothing where the video was made whole."""
    from framefit.families.windows import Windows

    stride = checkpoint.frames.stride
    made = [Windows.of(s, stride) for s in plan.settings if isinstance(s, Window) and s.frames]
    spans = [list(span) for each in made for span in each.frames(plan.request.num_frames, stride)]
    return {"windows": spans} if len(spans) > 1 else {}


def _tiles(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """Where tiles meet, likewise; nothing where all are as they would be in the whole."""
    from framefit.families.pieces import borders

    met = [borders(checkpoint, plan.request, s.tile_px) for s in plan.settings if isinstance(s, Decode) and s.blend]
    return {"tiles": met[0]} if met else {}


def remember(checkpoint: Checkpoint, plan: Plan, weights: str) -> None:
    """Note on this machine where the files of a run lay, by their hashes, so that `rerun` finds them again."""
    seen = {digest: getattr(plan.request, name) for name, digest in plan.photos.items()}
    seen |= {lora.sha256: lora.file for lora in plan.request.loras if lora.sha256}
    if local := _local_folder(checkpoint):
        seen[weights] = local
    with contextlib.suppress(OSError):  # the video matters more than the note
        _seen().mkdir(parents=True, exist_ok=True)
        for digest, path in seen.items():
            (_seen() / digest).write_bytes(os.fsencode(path.resolve()))


def recipe(
    file: Path,
    image: Path | None = None,
    last_image: Path | None = None,
    model: str | None = None,
    loras: Iterable[Path] = (),
) -> Recipe:
    """How `file` was made, from the parameters inside it.

    Args:
        image: the photo; None: the one that `file` names, looked for beside it, here, and where it was last seen.
        last_image: the same for the end photo.
        model: the model; None: the one that `file` names, a local folder where it was last seen.
        loras: LoRA files in any order; those that are not among them are looked for like photos.

    Raises:
        BadInput: `file` carries no complete parameters, or a photo, a LoRA or the model's folder is not found.
    """
    made = video.parameters(file)
    try:
        fields, digests = dict(made["request"]), dict(made["photos"])
        for name, given in (("image", image), ("last_image", last_image)):
            if fields[name] is not None:
                fields[name] = str(_find_photo(str(fields[name]), _digest(digests[name]), given, file, name))
        fields["loras"] = _find_loras(fields.get("loras", []), loras, file)
        fields["model"] = model or _find_model(made, file)
        return Recipe(
            request=Request.from_json(fields),
            precision=str(made["precision"]),
            settings={str(name): str(value) for name, value in made["settings"].items()},
            crf=int(made["crf"]),
            weights=str(made["weights"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise BadInput(f"the parameters in {file} are not complete ({error!r}): it cannot be made again.") from None


def _readable(name: str) -> str:
    """A file name whose bytes are no text, as text."""
    return name.encode(errors="replace").decode()


def _local_folder(checkpoint: Checkpoint) -> Path | None:
    """The model's folder where it is the user's own, and not one that framefit ships or fetches."""
    return None if checkpoint.bundled else checkpoint.folder


def _recall(digest: Any) -> str | None:
    """Where the file or folder with this hash was last seen, if it is still there."""
    if not HASH.fullmatch(str(digest)):
        return None
    with contextlib.suppress(OSError):
        path = os.fsdecode((_seen() / str(digest)).read_bytes())
        return path if Path(path).exists() else None
    return None


def _seen() -> Path:
    return default_root().parent / "seen"


def _digest(text: Any) -> str:
    if not HASH.fullmatch(str(text)):
        raise ValueError(f"{text!r:.80} is no SHA-256")
    return str(text)


def _find_model(made: dict[str, Any], file: Path) -> str:
    name = str(made["request"]["model"])
    if not made["local_model"]:
        return name
    if found := _recall(str(made["weights"])):
        return found
    raise BadInput(f"{file} was made with the model folder '{name}', which is not where it was: give it with --model.")


def _find_photo(name: str, digest: str, given: Path | None, file: Path, field: str) -> Path:
    if given is not None:
        photo.load(given)
        if photo.sha256(given) != digest:
            raise BadInput(f"{given} is not the photo that {file} was made from ({name}, SHA-256 {digest[:16]}...).")
        return given
    if found := _find(name, digest, file):
        return found
    raise BadInput(
        f"the photo that {file} was made from ({name}) is not here: give it with --{field.replace('_', '-')} "
        f"(SHA-256 {digest[:16]}...)."
    )


def _find_loras(named: list[dict[str, Any]], given: Iterable[Path], file: Path) -> list[dict[str, Any]]:
    """The LoRAs that `file` names, with paths."""
    hashes = {path: photo.sha256(path) if path.is_file() else None for path in given}
    needed = [_digest(lora["sha256"]) for lora in named]
    for path, digest in hashes.items():
        if digest not in needed:
            raise BadInput(f"{path} is {'no LoRA' if digest else 'no file'} that {file} was made with: leave it out.")
    found = []
    for lora, digest in zip(named, needed, strict=True):
        name = str(lora["file"])
        place = next((p for p, held in hashes.items() if held == digest), None) or _find(name, digest, file)
        if place is None:
            raise BadInput(
                f"the LoRA that {file} was made with ({name}) is not here: give it with --lora "
                f"(SHA-256 {digest[:16]}...)."
            )
        found.append(lora | {"file": str(place)})
    return found


def _find(name: str, digest: str, file: Path) -> Path | None:
    """The file of this hash: beside the video, here, in the package, or where it was last seen."""
    local = Path(name).name
    shipped = [folder / local for folder in SHIPPED]
    candidates = [file.parent / local, Path(local), *shipped, *map(Path, filter(None, [_recall(digest)]))]
    for candidate in candidates:
        with contextlib.suppress(OSError):  # a namesake that cannot be read is not the one
            if candidate.is_file() and photo.sha256(candidate) == digest:
                return candidate
    return None
