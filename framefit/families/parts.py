"""The loaded components of a checkpoint, and the tensors that travel between them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image

from framefit.errors import FramefitError, ModelMissing
from framefit.families import easyanimate_v5
from framefit.families.checkpoint import Checkpoint, Component
from framefit.families.filed import Filed
from framefit.families.files import weight_files
from framefit.families.pieces import Pieces
from framefit.families.windows import Windows
from framefit.request import ResolvedRequest

__all__ = [
    "IMAGE_ENCODERS", "PRECISIONS", "TEXT_ENCODERS", "Family", "Notice", "Parts", "Placement", "Read", "Tensors",
    "build", "load_parts", "noise", "round_to", "weights",
]  # fmt: skip

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
IMAGE_ENCODERS = ("image_encoder", "vae")
"""What each phase of encoding needs."""

Tensors = dict[str, torch.Tensor]
"""Named conditioning. The first axis is the guidance branch, negative before positive; 1 where both share it."""

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Notice = Callable[[str], None]
"""Tells the user one sentence."""

Read = Callable[[Collection[str] | None], None]
"""Reads the parameters of these names, where they have not been; None: all."""


@dataclass(slots=True)
class Parts:
    """Every component of one checkpoint by folder name."""

    checkpoint: Checkpoint
    components: dict[str, Any]
    device: torch.device
    """Where they compute."""
    precision: torch.dtype = torch.float32
    """That was asked for; a component that its reference keeps in fp32 is in fp32."""
    branches: Literal["together", "apart"] = field(default="together")
    """Whether both guidance branches run in one forward; set by the guidance pass."""
    pieces: Pieces = field(default=Pieces())
    """How much of a video the VAE takes at once; set by the decode pass."""
    windows: Windows | None = field(default=None)
    """How a long video is divided; None: it is not. Set by the window pass."""
    raised: set[str] = field(default_factory=set)
    """Components that overflowed in fp16 and are in fp32 since, where they stay; set by the pipeline."""
    placement: Placement | None = field(default=None)
    """Moves weights to and from the device; None: all stay there. Set by the offload pass."""

    def __getitem__(self, name: str) -> Any:
        return self.components[name]

    def __contains__(self, name: str) -> bool:
        return name in self.components

    def dtype(self, name: str) -> torch.dtype:
        """Precision that a component computes in."""
        dtype: torch.dtype = self.components[name].dtype
        return dtype

    def use(self, *names: str) -> None:
        """From now on only these components compute, until the next call; those that a model lacks are passed over."""
        if self.placement:
            self.placement.use([name for name in names if name in self])

    def forget(self) -> None:
        """Nothing is left in the components of a call that broke off: EasyAnimate's VAE would go on from it."""
        for part in self.components.values():
            for name in ("clear_cache", "_clear_conv_cache"):  # AutoencoderKLWan's, AutoencoderKLMagvit's
                if clear := getattr(part, name, None):
                    clear()

    def expect(self, name: str) -> None:
        """A component will be used before long: its weights may be fetched beside what runs."""
        if self.placement:
            self.placement.expect(name)

    def cast(self, name: str, dtype: torch.dtype) -> None:
        """Let a component compute in another precision."""
        if self.placement:
            self.placement.cast(name, dtype)
            return
        before = [(tensor, tensor.dtype) for tensor in weights(self[name])]
        try:
            round_to(self[name], dtype)
        except torch.OutOfMemoryError:  # half of it would be in each
            for tensor, usual in before:
                tensor.data = tensor.data.to(usual)
            raise

    def close(self) -> None:
        """Nothing computes any more: what weights took beside these objects is given back."""
        if self.placement:
            self.placement.close()
        self.placement = None


class Placement(Protocol):
    """Where weights are when."""

    def use(self, names: Sequence[str]) -> None: ...

    def expect(self, name: str) -> None: ...

    def cast(self, name: str, dtype: torch.dtype) -> None: ...

    def close(self) -> None: ...


class Family(Protocol):
    """The few functions that differ between families; each family file is one."""

    def encode_text(self, parts: Parts, request: ResolvedRequest, notice: Notice) -> Tensors:
        """Prompt and negative prompt -> text conditioning."""

    def encode_image(
        self,
        parts: Parts,
        request: ResolvedRequest,
        first: Image.Image,
        last: Image.Image | None,
        generator: torch.Generator,
    ) -> tuple[torch.Tensor, Tensors]:
        """Fitted photos -> initial latents (1, C, F, H, W) in fp32, and image conditioning.

        Draws from `generator` in the order in which the reference does.
        """

    def predict(
        self, parts: Parts, expert: str, latents: torch.Tensor, t: torch.Tensor, conditioning: Tensors, branches: slice
    ) -> torch.Tensor:
        """One forward of `expert` at timestep `t` for some guidance branches: (B, C, F, H, W)."""

    def window(self, conditioning: Tensors, span: slice, frames: int, anchor: torch.Tensor | None) -> Tensors:
        """The conditioning of some of a video's `frames` latent frames, as if they were a video of their own.

        `anchor` (1, C, 1, H, W) is their first one, in the photo's place; None: they begin with the photo.
        """

    def settle(self, latents: torch.Tensor, conditioning: Tensors) -> torch.Tensor:
        """What is left to do to the latents once the last step is taken."""

    def decode(self, parts: Parts, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """Final latents -> chunks of frames, uint8 (F, H, W, 3) on the host; one of no frames is a place to stop."""


def load_parts(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    on_host: bool = False,
    arrived: Callable[[Parts, str, Read], None] = lambda parts, name, read: None,
) -> Parts:
    """Read every component of a folder. Safetensors only, local files only, no remote code.

    Args:
        device: where they will compute.
        on_host: whether the weights go to the host, for a pass that moves them.
        arrived: called with every component, on the host still, before the next one is read, and with what reads
            parameters of it; of a denoiser none is before that. What is left then is read at once.
    """
    parts = Parts(checkpoint, {}, device, dtype)
    try:
        for row in checkpoint.components:
            with _translated(folder / row.name, row):
                parts.components[row.name], read = _begun(checkpoint, row, folder / row.name, dtype)
            arrived(parts, row.name, read)
            read(None)
            if row.params and not on_host:
                parts[row.name].to(device)
    except BaseException:
        parts.close()
        raise
    return parts


def _begun(checkpoint: Checkpoint, row: Component, folder: Path, dtype: torch.dtype) -> tuple[Any, Read]:
    """A component, and what reads the rest of it."""
    if row.name in checkpoint.experts:
        filed = _filed(checkpoint, row, folder, dtype)
        return filed.model, partial(_read, filed, folder, row)
    if row.params:
        model = _load_model(row, folder, torch.float32 if row.keep_fp32 else dtype).eval()
        return model, lambda names: None
    return _class(row).from_pretrained(folder, local_files_only=True), lambda names: None


def _filed(checkpoint: Checkpoint, row: Component, folder: Path, dtype: torch.dtype) -> Filed:
    kind, files = _class(row), weight_files(folder, row)[0]
    if checkpoint.layout == "easyanimate-v5":
        return Filed.of(kind, easyanimate_v5.config(folder), files, dtype, easyanimate_v5.rename)
    return Filed.of(kind, kind.load_config(folder, local_files_only=True), files, dtype)


def _read(filed: Filed, folder: Path, row: Component, names: Collection[str] | None) -> None:
    with _translated(folder, row):
        filed.read(names)


@contextmanager
def _translated(folder: Path, row: Component) -> Iterator[None]:
    """What the libraries raise on files that do not fit the class, as one sentence; a full memory stays what it is."""
    try:
        yield
    except (FramefitError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelMissing(
            f"{folder} cannot be loaded as {row.class_name} ({type(error).__name__}: {reason}): "
            f"framefit models verify names all that is wrong."
        ) from error


def build(row: Component) -> Any:
    """A fresh component from its configuration; under `torch.device("meta")` it costs no memory."""
    cls = _class(row)
    if row.package == "transformers" and row.params:
        return cls(cls.config_class(**deepcopy(dict(row.config)))).eval()  # it writes into what it is given
    component = cls(**row.config)
    return component.eval() if row.params else component


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    """Its parameters and buffers, shared ones once."""
    return [*module.parameters(), *module.buffers()]


def round_to(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Its floating-point weights in another precision, tensor by tensor."""
    for tensor in weights(module):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def noise(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """Gaussian noise drawn on the CPU in fp32, so that a seed gives one video on every device and precision."""
    return torch.randn(shape, generator=generator).to(device)


def _load_model(row: Component, folder: Path, dtype: torch.dtype) -> Any:
    facts: dict[str, Any] = {"torch_dtype" if row.package == "diffusers" else "dtype": dtype}
    facts |= {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    if row.package == "transformers":
        facts["ignore_mismatched_sizes"] = True  # told below, in a sentence instead of a table
    model, told = _class(row).from_pretrained(folder, **facts)
    for key, found, needed in told["mismatched_keys"]:
        raise ModelMissing(f"{folder} holds {key} of shape {list(found)}, and {row.class_name} needs {list(needed)}.")
    if missing := sorted(told["missing_keys"]):  # the libraries would run on with random numbers in their place
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelMissing(f"{folder} lacks {missing[0]}{more}: framefit models verify names all that is wrong.")
    return model


def _class(row: Component) -> Any:
    return getattr(importlib.import_module(row.package), row.class_name)
