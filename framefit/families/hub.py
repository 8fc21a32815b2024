"""Where a checkpoint's files lie on this machine, and fetching them from the hub.

Knows the hub's cache and its client's errors; does not know how a component is loaded or run.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

from framefit.errors import BadOutput, DoesNotFit, FramefitError, ModelMissing, UsageError
from framefit.families.checkpoint import Checkpoint
from framefit.families.files import needed_files, stem

__all__ = ["folder_of", "is_present", "locate", "pull"]

# A second dot marks a variant of the same weights (*.fp16.safetensors, *.non_ema.safetensors) or its index.
_VARIANTS = ["*.*.safetensors", "*.index.*.json", "*.bin.index.json"]


def locate(checkpoint: Checkpoint) -> Path:
    """The folder that holds every file a run needs; raises `ModelMissing` with the command that fetches them."""
    folder = folder_of(checkpoint)
    needed_files(folder, checkpoint)
    return folder


def is_present(checkpoint: Checkpoint) -> bool:
    try:
        locate(checkpoint)
    except ModelMissing:
        return False
    return True


def folder_of(checkpoint: Checkpoint) -> Path:
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


def _wanted(checkpoint: Checkpoint) -> list[str]:
    """Patterns of the files to fetch, `_VARIANTS` excepted."""
    wanted = ["model_index.json", "LICEN[CS]E*"]
    for part in checkpoint.components:
        names = ["*.json", "*.txt", "*.model"]
        names += [f"{stem(part)}.safetensors", f"{stem(part)}-*-of-*.safetensors"] if part.params else []
        wanted += [f"{part.name}/{name}" for name in names]
    return wanted


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


def _size(count: int) -> str:
    """Disks are sold in GB and tools count GiB, so both; MB below one."""
    return f"{count / 1e9:.1f} GB ({count / 2**30:.1f} GiB)" if count >= 1e9 else f"{count / 1e6:.2f} MB"
