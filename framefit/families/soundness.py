"""Whether a checkpoint's files are sound: all there, whole, as published, and of the shape that their classes need."""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from framefit.families import easyanimate_v5
from framefit.families.checkpoint import Checkpoint, Component
from framefit.families.files import Shapes, header, index_file, read_json, survey, weight_files, weight_map
from framefit.families.hub import folder_of

__all__ = ["verify"]


def verify(
    checkpoint: Checkpoint,
    *,
    deep: bool = True,
    on_file: Callable[[str], None] = lambda _: None,
) -> list[str]:
    """What is wrong with the files, a sentence each; an empty list is a sound checkpoint.

    Every needed file is there, every safetensors file is as long as its header says, indexes agree with shards, keys
    and shapes are those of the component's class. `deep` also hashes what the hub's cache names by sha256 (a local
    folder's hashes are not known). `on_file` hears each file's name before it is read. Raises `ModelMissing` where
    there is nothing to verify.
    """
    folder = folder_of(checkpoint)
    files, problems = survey(folder, checkpoint)
    headers: dict[Path, Shapes | None] = {}
    for file in files:
        on_file(name := file.relative_to(folder).as_posix())
        wrong = None
        if file.suffix == ".safetensors":
            headers[file], wrong = header(file)
        elif file.suffix == ".json" and read_json(file) is None:
            wrong = "is not a JSON object"
        if wrong := wrong or (_hash_differs(file) if deep else None):
            again = f"delete {file.resolve()} and run 'framefit models pull {checkpoint.id}'"
            problems.append(f"{name} {wrong}: {'copy it again' if checkpoint.folder else again}.")
    for component in checkpoint.components:
        part = folder / component.name
        native = checkpoint.layout == "easyanimate-v5" and component.name == "transformer"
        found = {file: shapes for file, shapes in headers.items() if file.parent == part}
        problems += _index_differs(part, component, found)
        # With a shard or its header gone, every tensor of it would be reported: the file itself already is.
        whole = found and None not in found.values() and not weight_files(part, component)[1]
        if whole:
            tensors = {key: shape for shapes in found.values() for key, shape in (shapes or {}).items()}
            if native:
                tensors = {easyanimate_v5.rename(key): shape for key, shape in tensors.items()}
            config = easyanimate_v5.config(part) if native else read_json(part / "config.json") or {}
            problems += _class_differs(part, component, tensors, config)
    return problems


def _hash_differs(file: Path) -> str | None:
    # One link only: a blob may itself link into a store that all repositories of the cache share, under another hash.
    blob = file.readlink() if file.is_symlink() else file
    if blob.parent.name != "blobs" or not re.fullmatch("[0-9a-f]{64}", blob.name):
        return None
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    return None if found == blob.name else f"has sha256 {found[:12]}…, and {blob.name[:12]}… was published"


def _index_differs(part: Path, component: Component, found: dict[Path, Shapes | None]) -> Iterator[str]:
    index, entries = index_file(part, component), weight_map(index_file(part, component))
    for file, shapes in found.items():
        if entries and shapes is not None:
            named, held = {key for key, shard in entries.items() if shard == file.name}, set(shapes)
            if named - held:
                yield f"{part.name}/{index.name} puts {_some(named - held)} in {file.name}, which does not hold it."
            if held - named:
                yield f"{part.name}/{file.name} holds {_some(held - named)}, which {index.name} does not put there."


def _class_differs(part: Path, component: Component, tensors: Shapes, config: dict[str, Any]) -> Iterator[str]:
    """How `tensors` differ from the class built from `config`, with no weights allocated."""
    name = component.class_name
    if component.package == "diffusers" and config.get("_class_name", name) != name:
        yield f"{part.name}/config.json is of {config['_class_name']}, not of {name}."
        return
    compare = _compare_diffusers if component.package == "diffusers" else _compare_transformers
    library = importlib.import_module(component.package)
    try:
        with _quiet(library.utils.logging):
            missing, extra, shapes = compare(getattr(library, name), config, tensors)
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
