"""A denoiser that is read piece by piece: built without memory, its parameters taken from its files when asked for.

`from_pretrained` of the libraries casts a whole model before anybody can put a part of it away; one expert of
Wan2.2-A14B is larger than many a machine's RAM. What is read here is the same to the last bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import accelerate
import torch
from accelerate.utils import set_module_tensor_to_device
from safetensors import safe_open

from framefit.errors import ModelMissing
from framefit.families.files import header

__all__ = ["Filed", "by_default"]


@dataclass(frozen=True, slots=True)
class Filed:
    """What has not been read is on the meta device."""

    model: Any
    places: Mapping[str, tuple[Path, str]]
    """Parameter -> its file, and its name there."""
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        kind: Any,
        config: Mapping[str, Any],
        files: Sequence[Path],
        dtype: torch.dtype,
        rename: Callable[[str], str] = str,
    ) -> Self:
        """A model of diffusers' class `kind` over the weights in `files`.

        Args:
            dtype: of what is read, but for what the class keeps in fp32.
            rename: a name in the files in diffusers' words.

        Raises:
            ModelMissing: a parameter has no tensor in the files, or one of another shape.
        """
        with by_default(dtype), accelerate.init_empty_weights():
            model = kind.from_config(config).eval()
        needed = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        places = {}
        for file in files:
            for key, shape in (header(file)[0] or {}).items():
                name = rename(key)
                if shape != needed.get(name, shape):
                    raise ModelMissing(
                        f"{file.parent} holds {key} of shape {list(shape)}, and {kind.__name__} needs "
                        f"{list(needed[name])}."
                    )
                places[name] = file, key
        if missing := sorted(set(needed) - set(places)):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ModelMissing(
                f"{files[0].parent} lacks {missing[0]}{more}: framefit models verify names all that is wrong."
            )
        if strange := sorted(set(places) - set(needed)):
            logging.getLogger("framefit").warning(
                "%s holds %d tensors that %s has no place for, %s first: they are left out.",
                files[0].parent, len(strange), kind.__name__, strange[0],
            )  # fmt: skip
        return cls(model, places, dtype)

    def read(self, names: Collection[str] | None = None) -> None:
        """Of these parameters those that have not been; None: of all."""
        unread = [
            name for name, parameter in self.model.named_parameters()
            if parameter.is_meta and (names is None or name in names)
        ]  # fmt: skip
        for file in sorted({self.places[name][0] for name in unread}):
            with safe_open(file, framework="pt") as stream:
                for name in unread:
                    where, key = self.places[name]
                    if where == file:
                        set_module_tensor_to_device(
                            self.model, name, "cpu", stream.get_tensor(key), self._precision(name)
                        )

    def _precision(self, name: str) -> torch.dtype:
        kept = self.model._keep_in_fp32_modules or ()
        return torch.float32 if set(name.split(".")) & set(kept) else self.dtype


@contextmanager
def by_default(dtype: torch.dtype) -> Iterator[None]:
    """In this block tensors of floating point numbers are made in `dtype` where nothing else is said."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)
