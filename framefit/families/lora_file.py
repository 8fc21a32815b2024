"""What a LoRA file changes, by its header alone: every tensor finds its parameter, or the file is refused.

diffusers and PEFT write `transformer.blocks.0.attn1.to_q.lora_A.weight`, ComfyUI takes upstream's modules as in
`diffusion_model.blocks.0.self_attn.q.lora_down.weight`; kohya's sd-scripts, musubi-tuner and VideoX-Fun have
underscores as in `lora_unet_blocks_0_self_attn_q.lora_down.weight`, VideoX-Fun two of them after `unet`. A name is
looked up among all that the model's modules can be called. Held by test to diffusers' converters; they are not used,
because they need the tensors themselves, know two of these forms, and drop some of what they do not know.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError, safe_open

from framefit.errors import BadInput
from framefit.families import easyanimate_v5, wan
from framefit.families.checkpoint import Checkpoint
from framefit.families.files import Shapes, header
from framefit.request import Lora

__all__ = ["Change", "opened", "place", "reading", "spellings"]

UPSTREAM: dict[str, Mapping[str, str]] = {
    "wan": wan.UPSTREAM,
    "easyanimate": {f"{re.escape(new)}$": old for old, new in easyanimate_v5.NATIVE_TO_DIFFUSERS.items()},
    "i2vgen": {},
}
"""Family -> (module in diffusers' words -> in upstream's), substitutions made one after the other."""

KEY = re.compile(
    r"(?:(?P<part>transformer|transformer_2|unet|diffusion_model)\.)?(?P<module>.+?)\."
    r"(?:(?P<down>lora_(?:A|down)(?:\.default)?\.weight)|(?P<up>lora_(?:B|up)(?:\.default)?\.weight)"
    r"|(?P<bias>lora_(?:B|up)(?:\.default)?\.bias)|(?P<alpha>alpha)|(?P<diff>diff)|(?P<diff_b>diff_b))"
)
"""The last group says what the tensor is; `diff` and `diff_b` are added to weight and bias as they stand."""

NOTES = "lora_adapter_metadata"
"""Where diffusers notes PEFT's configuration beside the tensors."""


@dataclass(frozen=True, slots=True)
class Change:
    """What one file adds to one parameter."""

    expert: str
    parameter: str
    keys: tuple[str, ...]
    """(up, down), or one tensor."""
    alpha: str | float = 1.0
    """A number, or the key that holds it."""
    rank: int = 1


@contextmanager
def opened(lora: Lora) -> Iterator[Any]:
    """The file's tensors by name; raises `BadInput` where it cannot be opened."""
    with reading(lora):
        if not lora.file.is_file():
            raise BadInput(f"there is no LoRA at {lora.file}: check the name and the folder.")
        stream = safe_open(lora.file, framework="pt")
    with stream:
        yield stream


@contextmanager
def reading(lora: Lora) -> Iterator[None]:
    """Raises `BadInput` where the file cannot be read in the block."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{lora.file} cannot be read as safetensors ({error}): use another file.") from None


def place(lora: Lora, checkpoint: Checkpoint, needed: Mapping[str, Shapes]) -> list[Change]:
    """What `lora` does to parameters of these shapes; raises `BadInput` where a tensor has no place among them."""
    with opened(lora) as stream, reading(lora):
        alphas = _alphas(lora, stream.metadata() or {})
        held, wrong = header(lora.file)
    if wrong or not held:
        raise BadInput(f"{lora.file} {wrong or 'holds no tensors'}: use another file.")
    changes = []
    for (expert, module), keys in _modules(lora, checkpoint, held, needed).items():
        for change in _changes(lora, expert, module, keys, held, needed[expert], alphas):
            shape = needed[expert].get(change.parameter)
            if shape is None or _shape([held[key] for key in change.keys]) != shape:
                given = " and ".join(f"{key} {list(held[key])}" for key in change.keys)
                wanted = "does not exist" if shape is None else f"is {list(shape)}"
                raise BadInput(f"{lora.file} holds {given}, and {change.parameter} of {checkpoint.id} {wanted}.")
            changes.append(change)
    return changes


def spellings(shapes: Shapes, family: str) -> dict[str, str]:
    """Every name that a trainer may give to a module -> its name in diffusers' words."""
    spelled: dict[str, str] = {}
    for parameter in shapes:
        module = upstream = re.sub(r"\.(weight|bias)$", "", parameter)
        for pattern, name in UPSTREAM[family].items():
            upstream = re.sub(pattern, name, upstream)
        for name in (upstream, module):
            flat = name.replace(".", "_")
            spelled |= dict.fromkeys((name, f"lora_unet_{flat}", f"lora_unet__{flat}"), module)
    return spelled


def _modules(
    lora: Lora, checkpoint: Checkpoint, held: Shapes, needed: Mapping[str, Shapes]
) -> dict[tuple[str, str], dict[str, str]]:
    """(expert, module) -> what a tensor is -> its key."""
    read = {key: KEY.fullmatch(key) for key in held}
    split = any(found and found["part"] == "transformer_2" for found in read.values())
    spelled = {expert: spellings(shapes, checkpoint.family) for expert, shapes in needed.items()}
    groups: dict[tuple[str, str], dict[str, str]] = {}
    stray = []
    for key, found in read.items():
        for expert in _experts(lora, checkpoint, found["part"] if found and split else None):
            module = spelled.get(expert, {}).get(found["module"]) if found else None
            if found is None or module is None:
                stray.append(key)
            elif (same := groups.setdefault((expert, module), {}).setdefault(str(found.lastgroup), key)) != key:
                raise BadInput(f"{lora.file} holds {same} and {key}, two names of one thing: use another file.")
    if stray:
        count = f"{len(set(stray)) if groups else 'none'} of its {len(held)} tensors"
        say = f"{count} {'have no' if groups else 'has a'} place in it ({stray[0]}, for example)"
        raise BadInput(f"{lora.file} is no LoRA for {checkpoint.id}: {say}.")
    return groups


def _experts(lora: Lora, checkpoint: Checkpoint, part: str | None) -> tuple[str, ...]:
    """Those that a tensor is for; `part` is its prefix, in a file that has one for the second expert."""
    experts = checkpoint.experts
    if lora.expert and (part or len(experts) == 1):
        why = "the file names its experts itself" if part else f"{checkpoint.id} has one"
        raise BadInput(f"@{lora.expert} chooses one of two experts for {lora.file}, and {why}: leave it out.")
    if part in ("transformer", "transformer_2"):
        return (part,)
    return {"high": experts[:1], "low": experts[1:], None: experts}[lora.expert]


def _changes(
    lora: Lora, expert: str, module: str, keys: dict[str, str], held: Shapes, needed: Shapes, alphas: dict[str, float]
) -> Iterator[Change]:
    """Those of one module, by the tensors that are there."""
    weight, bias = (module if module in needed else f"{module}.weight"), f"{module}.bias"
    if halves := {kind: keys[kind] for kind in ("down", "up", "bias", "alpha") if kind in keys}:
        if not {"down", "up"} <= set(halves):
            raise BadInput(f"{lora.file} holds {min(halves.values())} without its other half: use another file.")
        down, up, alpha = halves["down"], halves["up"], halves.get("alpha")
        if alpha and math.prod(held[alpha]) != 1:
            raise BadInput(f"{lora.file} holds {alpha} of shape {list(held[alpha])}, and it must be one number.")
        rank = max(held[down][:1], default=0)
        found = KEY.fullmatch(down)
        factor = alpha or alphas.get((found and found["part"]) or "", float(rank))
        yield Change(expert, weight, (up, down), factor, rank)
        if "bias" in halves:
            yield Change(expert, bias, (halves["bias"],), factor, rank)
    if "diff" in keys:
        yield Change(expert, weight, (keys["diff"],))
    if "diff_b" in keys:
        yield Change(expert, bias, (keys["diff_b"],))


def _shape(given: list[tuple[int, ...]]) -> tuple[int, ...] | None:
    """Of what is added; None where `up` and `down` cannot be multiplied."""
    if len(given) == 1:
        return given[0]
    up, down = given
    fit = len(up) >= 2 and len(down) >= 2 and up[1] == down[0] > 0 and set(up[2:]) <= {1}
    return (up[0], *down[1:]) if fit else None


def _alphas(lora: Lora, metadata: Mapping[str, str]) -> dict[str, float]:
    """Prefix -> alpha, where diffusers noted it."""
    try:
        notes = [(*name.rpartition(".")[::2], value) for name, value in json.loads(metadata.get(NOTES, "{}")).items()]
        if odd := [name for _, name, value in notes if value and name in ("alpha_pattern", "use_rslora", "use_dora")]:
            raise BadInput(f"{lora.file} was trained with {odd[0]}, which framefit does not do: use another file.")
        found = {part: float(value) for part, name, value in notes if name == "lora_alpha"}
        if all(math.isfinite(value) for value in found.values()):
            return found
    except (ValueError, TypeError, AttributeError):
        pass
    raise BadInput(f"the alpha that {lora.file} notes in its {NOTES} cannot be read: use another file.")
