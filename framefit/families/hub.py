"""Where a checkpoint's files lie, fetching them from the hub, and checking that they are whole.

Knows the hub's cache and how diffusers and transformers name the files of a component; does not know how a component
is loaded or run. Heavy libraries are imported by the functions that need them: listing models stays quick.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from framefit.errors import BadOutput, DoesNotFit, FramefitError, ModelMissing, UsageError
from framefit.families.checkpoint import Checkpoint, Component

__all__ = ["is_present", "locate", "needed_files", "pull", "verify"]

Shapes = dict[str, tuple[int, ...]]

# A second dot marks a variant of the same weights (*.fp16.safetensors, *.non_ema.safetensors) or its index.
_VARIANTS = ["*.*.safetensors", "*.index.*.json", "*.bin.index.json"]
_PICKLES = {".bin", ".pt", ".pth", ".ckpt"}
_VOCABULARIES = (["tokenizer.json"], ["spiece.model"], ["tokenizer.model"], ["vocab.json", "merges.txt"], ["vocab.txt"])
_SETTINGS = {"Tokenizer": "tokenizer_config", "Scheduler": "scheduler_config", "Processor": "preprocessor_config"}


def locate(checkpoint: Checkpoint) -> Path:
    """The folder that holds every file a run needs; raises `ModelMissing` with the command that fetches them."""
    folder = _folder(checkpoint)
    needed_files(folder, checkpoint)
    return folder


def is_present(checkpoint: Checkpoint) -> bool:
    try:
        locate(checkpoint)
    except ModelMissing:
        return False
    return True


def needed_files(folder: Path, checkpoint: Checkpoint) -> list[Path]:
    """Settings, vocabularies and safetensors weights of every component; raises `ModelMissing` naming the gaps.

    Looks at names and indexes only: `verify` reads the files.
    """
    if not folder.is_dir():
        raise ModelMissing(f"{checkpoint.id} is not at {folder}: there is no such folder.")
    files, gaps = _survey(folder, checkpoint)
    if gaps:
        more = f" and {len(gaps) - 3} more" if len(gaps) > 3 else ""
        way = "complete the folder" if checkpoint.folder else f"run 'framefit models pull {checkpoint.id}'"
        raise ModelMissing(f"{checkpoint.id} is incomplete at {folder}: {'; '.join(gaps[:3])}{more}. To go on, {way}.")
    return files


def pull(checkpoint: Checkpoint, *, on_notice: Callable[[str], None]) -> Path:
    """Fetch what is missing into the hub's cache and return the folder; size, licence and target are told first.

    HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HF_TOKEN and HF_HUB_OFFLINE are respected. An interrupted pull keeps the files
    that arrived whole. Raises `UsageError` for a local folder, `DoesNotFit` for a full disk, `BadOutput` for a cache
    that cannot be written, `ModelMissing` for whatever the hub refuses.
    """
    if checkpoint.folder is not None:
        raise UsageError(f"{checkpoint.id} lies in the local folder {checkpoint.folder}: there is nothing to pull.")
    import httpx2
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        _announce(checkpoint, on_notice)
        wanted = _wanted(checkpoint)
        # huggingface_hub 2.4 drops an unfinished file when a download stops: few at a time bounds what that costs.
        path = snapshot_download(checkpoint.repo, allow_patterns=wanted, ignore_patterns=_VARIANTS, max_workers=2)
    except (OSError, RuntimeError, httpx2.HTTPError, HFValidationError) as error:  # RuntimeError: hf_xet's transfers
        raise _refusal(checkpoint, error) from error
    needed_files(Path(path), checkpoint)
    return Path(path)


def verify(
    checkpoint: Checkpoint,
    *,
    deep: bool = True,
    on_file: Callable[[str], None] = lambda _: None,
    rename: Callable[[str, str], str] | None = None,
) -> list[str]:
    """What is wrong with the files, a sentence each; an empty list is a sound checkpoint.

    Every needed file is there, every safetensors file is as long as its header says, indexes agree with shards, keys
    and shapes are those of the component's class. `deep` also hashes what the hub's cache names by sha256 (a local
    folder's hashes are not known). `on_file` hears each file's name before it is read. `rename` turns (component name,
    key in the file) into the class's key; without it a native layout's keys are not compared. Raises `ModelMissing`
    where there is nothing to verify.
    """
    folder = _folder(checkpoint)
    files, problems = _survey(folder, checkpoint)
    headers: dict[Path, Shapes | None] = {}
    for file in files:
        on_file(name := file.relative_to(folder).as_posix())
        wrong = None
        if file.suffix == ".safetensors":
            headers[file], wrong = _header(file)
        elif file.suffix == ".json" and _json(file) is None:
            wrong = "is not a JSON object"
        if wrong := wrong or (_hash_differs(file) if deep else None):
            again = f"delete {file.resolve()} and run 'framefit models pull {checkpoint.id}'"
            problems.append(f"{name} {wrong}: {'copy it again' if checkpoint.folder else again}.")
    for component in checkpoint.components:
        part, native = folder / component.name, checkpoint.layout != "diffusers" and component.library == "diffusers"
        found = {file: shapes for file, shapes in headers.items() if file.parent == part}
        problems += _index_differs(part, component, found)
        # With a shard or its header gone, every tensor of it would be reported: the file itself already is.
        whole = found and None not in found.values() and not _weights(part, component)[1]
        if whole and (rename or not native):
            tensors = {key: shape for shapes in found.values() for key, shape in (shapes or {}).items()}
            tensors = {rename(component.name, key) if rename else key: shape for key, shape in tensors.items()}
            problems += _class_differs(part, component, tensors, component.config if native else None)
    return problems


def _folder(checkpoint: Checkpoint) -> Path:
    """The local folder or the cached snapshot, complete or not."""
    if checkpoint.folder is not None:
        if not checkpoint.folder.is_dir():
            raise ModelMissing(f"{checkpoint.id} is not at {checkpoint.folder}: there is no such folder.")
        return checkpoint.folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(checkpoint.repo, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        # The library calls a snapshot incomplete that lacks any file of the repository, were it the README.
        if path := getattr(error, "snapshot_path", None):
            return Path(path)
        raise ModelMissing(
            f"{checkpoint.id} is not on this machine: fetch its {_size(checkpoint.download_bytes)} "
            f"(licence {checkpoint.licence}) with 'framefit models pull {checkpoint.id}'."
        ) from error


def _wanted(checkpoint: Checkpoint) -> list[str]:
    """Patterns of the files to fetch, `_VARIANTS` excepted."""
    wanted = ["model_index.json", "LICEN[CS]E*"]
    for part in checkpoint.components:
        stem = _stem(part)
        names = ["*.json", "*.txt", "*.model"]
        names += [f"{stem}.safetensors", f"{stem}-*-of-*.safetensors"] if part.params else []
        wanted += [f"{part.name}/{name}" for name in names]
    return wanted


def _stem(component: Component) -> str:
    return "diffusion_pytorch_model" if component.library == "diffusers" else "model"


def _announce(checkpoint: Checkpoint, on_notice: Callable[[str], None]) -> None:
    """Ask the hub for its file list, refuse what cannot work, and say what is about to happen."""
    from huggingface_hub import HfApi, constants

    def matches(name: str, patterns: list[str]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    info = HfApi().model_info(checkpoint.repo, files_metadata=True)
    source, wanted = f"{constants.ENDPOINT}/{checkpoint.repo}", _wanted(checkpoint)
    files = [f for f in info.siblings or [] if matches(f.rfilename, wanted) and not matches(f.rfilename, _VARIANTS)]
    for part in checkpoint.components:
        what = "safetensors weights (pickles are refused for safety)" if part.params else "files"
        pattern = f"{part.name}/*.safetensors" if part.params else f"{part.name}/*"
        if not any(fnmatchcase(f.rfilename, pattern) for f in files):
            raise ModelMissing(f"{source} has no {what} in {part.name}/, so {checkpoint.id} cannot be fetched from it.")

    target = Path(constants.HF_HUB_CACHE).resolve() / f"models--{checkpoint.repo.replace('/', '--')}"
    blobs, snapshot = target / "blobs", target / "snapshots" / str(info.sha)
    kept = [(blobs / str(f.lfs.sha256 if f.lfs else f.blob_id), snapshot / f.rfilename) for f in files]
    total = sum(f.size or 0 for f in files)
    rest = sum(f.size or 0 for f, places in zip(files, kept, strict=True) if not any(p.exists() for p in places))
    still = f", {_size(rest)} of it still to fetch" if rest < total else ""
    on_notice(
        f"{checkpoint.id}: {_size(total)} in {len(files)} files{still}; licence {checkpoint.licence}; "
        f"from {source} to {target}"
    )
    free = shutil.disk_usage(next(p for p in target.parents if p.exists())).free
    if rest > free:
        raise DoesNotFit(
            f"{checkpoint.id} needs {_size(rest)} more at {target}, and {_size(free)} is free there: "
            "free some space, or set HF_HOME to a folder on a larger disk."
        )


def _refusal(checkpoint: Checkpoint, error: Exception) -> FramefitError:
    """The sentence for what the hub's client raised (most causes come wrapped in a LocalEntryNotFoundError)."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    cause = (error.__cause__ or error) if isinstance(error, hub.LocalEntryNotFoundError) else error
    asked, source = f"{checkpoint.id} cannot be fetched", f"{constants.ENDPOINT}/{checkpoint.repo}"
    if isinstance(cause, hub.HfHubHTTPError):
        status = cause.response.status_code
        if isinstance(cause, hub.GatedRepoError) or status == 403:
            why = f"{source} is gated (HTTP {status}). Accept its terms there, then run 'hf auth login'."
        elif isinstance(cause, hub.RepositoryNotFoundError) or status == 404:
            why = f"{source} does not exist or is private (HTTP {status}). Check the name, or run 'hf auth login'."
        elif status == 401:
            why = f"{source} refused your token (HTTP 401). Run 'hf auth login' again, or correct HF_TOKEN."
        else:
            why = f"{source} answered HTTP {status}. Try again later: files that arrived whole are kept."
        return ModelMissing(f"{asked}: {why}")
    if isinstance(cause, hub.OfflineModeIsEnabled):
        return ModelMissing(f"{asked} in offline mode: unset HF_HUB_OFFLINE, or copy it from another machine's cache.")
    if isinstance(cause, hub.HFValidationError):
        return ModelMissing(f"{asked}: {checkpoint.repo!r} is not a repository id like 'owner/name'.")
    if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
        return DoesNotFit(f"{asked}: the disk of {constants.HF_HUB_CACHE} is full. Free some space, or move HF_HOME.")
    if isinstance(cause, OSError) and cause.filename:
        return BadOutput(f"{asked}: {cause.filename} cannot be written ({cause.strerror}). Set HF_HOME elsewhere.")
    reason = (str(cause).splitlines() or [""])[0]
    return ModelMissing(
        f"{asked}: {constants.ENDPOINT} is out of reach or broke off ({type(cause).__name__}: {reason}). Check the "
        f"network and run 'framefit models pull {checkpoint.id}' again: files that arrived whole are kept."
    )


def _survey(folder: Path, checkpoint: Checkpoint) -> tuple[list[Path], list[str]]:
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
        settings = next((stem for kind, stem in _SETTINGS.items() if kind in component.class_name), "config")
        if f"{settings}.json" not in names:
            gaps.append(f"{part.name}/{settings}.json is missing")
        if "Tokenizer" in component.class_name and not any(names.issuperset(v) for v in _VOCABULARIES):
            gaps.append(f"{part.name}/ has no vocabulary (tokenizer.json or spiece.model, for example)")
        weights, absent = _weights(part, component)
        files += small + weights
        gaps += absent
    return files, gaps


def _weights(part: Path, component: Component) -> tuple[list[Path], list[str]]:
    """The component's safetensors files that are there, and a phrase for each that is not."""
    if not component.params:
        return [], []
    single, index = part / f"{_stem(component)}.safetensors", _index(part, component)
    if index.is_file():
        shards = sorted(set(_weight_map(index).values()))
        if not shards or any(Path(name).name != name for name in shards):
            return [], [f"{part.name}/{index.name} names no shards beside it"]
        lost = [(n, name) for n, name in enumerate(shards, 1) if not (part / name).is_file()]
        gaps = [f"{part.name}/{name} is missing (shard {n} of {len(shards)})" for n, name in lost]
        return [part / name for name in shards if (part / name).is_file()], gaps
    if single.is_file():
        return [single], []
    if any(part.glob(f"{_stem(component)}-*-of-*.safetensors")):
        return [], [f"{part.name}/{index.name} is missing"]
    pickles = sorted(p.name for p in part.iterdir() if p.suffix in _PICKLES)
    refused = f" (pickles such as {pickles[0]} are refused for safety)" if pickles else ""
    return [], [f"{part.name}/{single.name} is missing{refused}"]


def _index(part: Path, component: Component) -> Path:
    return part / f"{_stem(component)}.safetensors.index.json"


def _weight_map(index: Path) -> dict[str, str]:
    entries = (_json(index) or {}).get("weight_map")
    return {key: str(shard) for key, shard in entries.items()} if isinstance(entries, dict) else {}


def _json(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _header(file: Path) -> tuple[Shapes | None, str | None]:
    """Shapes by key, and what is wrong with the file; the format: github.com/huggingface/safetensors#format."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(min(length, 100_000_000))  # the format's own limit
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        shapes = {key: tuple(entry["shape"]) for key, entry in entries.items()}
        whole = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None, f"has a safetensors header that does not parse ({size:,} bytes in all)"
    return shapes, None if size == whole else f"is {size:,} bytes long, and its header says {whole:,}"


def _hash_differs(file: Path) -> str | None:
    # One link only: a blob may itself link into a store that all repositories of the cache share, under another hash.
    blob = file.readlink() if file.is_symlink() else file
    if blob.parent.name != "blobs" or not re.fullmatch("[0-9a-f]{64}", blob.name):
        return None
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    return None if found == blob.name else f"has sha256 {found[:12]}…, and {blob.name[:12]}… was published"


def _index_differs(part: Path, component: Component, found: dict[Path, Shapes | None]) -> Iterator[str]:
    index, entries = _index(part, component), _weight_map(_index(part, component))
    for file, shapes in found.items():
        if entries and shapes is not None:
            named, held = {key for key, shard in entries.items() if shard == file.name}, set(shapes)
            if named - held:
                yield f"{part.name}/{index.name} puts {_some(named - held)} in {file.name}, which does not hold it."
            if held - named:
                yield f"{part.name}/{file.name} holds {_some(held - named)}, which {index.name} does not put there."


def _class_differs(part: Path, component: Component, tensors: Shapes, config: Any) -> Iterator[str]:
    """How `tensors` differ from the class built from `config` (None: from config.json), with no weights allocated."""
    name, settings = component.class_name, _json(part / "config.json") or {}
    if config is None and component.library == "diffusers" and settings.get("_class_name", name) != name:
        yield f"{part.name}/config.json is of {settings['_class_name']}, not of {name}."
        return
    compare = _compare_diffusers if component.library == "diffusers" else _compare_transformers
    library = importlib.import_module(component.library)
    try:
        with _quiet(library.utils.logging):
            missing, extra, shapes = compare(getattr(library, name), dict(config or settings), tensors)
    except Exception as error:  # a damaged configuration can make a constructor raise anything
        yield f"{part.name}/config.json does not build a {name} ({type(error).__name__}: {error})."
        return
    if missing:
        yield f"{part.name}/ lacks {_some(missing)}, which {name} needs."
    if extra:
        yield f"{part.name}/ holds {_some(extra)}, which {name} does not have."
    for key, (got, expected) in sorted(shapes.items())[:3]:
        yield f"{part.name}/ holds {key} of shape {list(got)}, and {name} needs {list(expected)}."


Difference = tuple[set[str], set[str], dict[str, tuple[Any, Any]]]
"""Keys that are missing, keys too many, key -> (shape found, shape expected)."""


def _compare_diffusers(cls: Any, settings: dict[str, Any], tensors: Shapes) -> Difference:
    import torch

    with torch.device("meta"):
        model = cls.from_config(settings)
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    found = dict(tensors)
    model._fix_state_dict_keys_on_load(found)  # the loader's renaming of an old attention layout, in place
    ignored = "|".join(cls._keys_to_ignore_on_load_unexpected or ["(?!)"])
    extra = {key for key in found.keys() - expected.keys() if not re.search(ignored, key)}
    both = {key: (found[key], expected[key]) for key in found.keys() & expected.keys()}
    return expected.keys() - found.keys(), extra, {key: (a, b) for key, (a, b) in both.items() if a != b}


def _compare_transformers(cls: Any, settings: dict[str, Any], tensors: Shapes) -> Difference:
    """Asks transformers' own loader, which knows tied weights, buffers and the keys of its older releases."""
    import torch

    told: dict[str, Any]
    model, told = cls.from_pretrained(
        None,
        config=cls.config_class.from_dict(settings),
        state_dict={key: torch.empty(shape, device="meta") for key, shape in tensors.items()},
        device_map={"": "meta"},
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    # Heads that the class does not have (cls, lm_head, decoder) are usual; one more layer of what it has is not.
    roots = {key.split(".")[0] for key in model.state_dict()}
    extra = {key for key in told["unexpected_keys"] if key.split(".")[0] in roots}
    return set(told["missing_keys"]), extra, {key: (got, needed) for key, got, needed in told["mismatched_keys"]}


@contextmanager
def _quiet(log: Any) -> Iterator[None]:
    """Without the loaders' bars and tables: what they found is returned."""
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    if bars:
        log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _some(keys: set[str]) -> str:
    return f"{min(keys)} (and {len(keys) - 1} more)" if len(keys) > 1 else min(keys)


def _size(count: int) -> str:
    """Disks are sold in GB and tools count GiB, so both; MB below one."""
    return f"{count / 1e9:.1f} GB ({count / 2**30:.1f} GiB)" if count >= 1e9 else f"{count / 1e6:.2f} MB"
