"""Where a model runs, or would: the card, the memory, the disk. It knows nothing of models.

Device.detect("cuda")                       this machine
Device.detect("cuda", vram_bytes=12 * GiB)  emulated: this card, and a run that may reserve no more of it
Device.named("rtx-3060-12gb")               a card that is not here, for a plan
Device.find("auto", Budget(ram_bytes=16 * GiB))  any of these, of which a run is to take no more
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

from framefit import rates
from framefit.cards import CARDS
from framefit.errors import DoesNotFit, UsageError
from framefit.rates import Unseen

__all__ = ["EXPANDING_BYTES", "Budget", "Device", "expand_segments", "state_folder"]

CONTROL_GROUP = Path("/sys/fs/cgroup")
GIB = 2**30
EXPANDING_BYTES = 20 * 2**20
"""By which torch's expandable segments grow, past a cap too (CUDACachingAllocator, kLargeBuffer)."""
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Environment variables that configure torch's allocator, the second an older name."""
WINDOWS_PINS = 0.45
"""Of RAM, which is as much as other tools of this field dare to pin under Windows, in a Linux inside of it too."""


def _most(help: str) -> Any:
    """A field with what its flag says."""
    return field(default=None, metadata={"help": f"most that {help}"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Most that a run may take; None: what there is. Each field is a flag of the command line."""

    vram_bytes: int | None = _most("torch may reserve of the card, e.g. 12GiB (default: free)")
    """Reserved of the card, which is enforced."""
    ram_bytes: int | None = _most("the plan may keep in RAM (default: free); of a named card, what its machine has")
    """Of RAM; with a card that is only named, what the machine has that it is in."""
    pinned_bytes: int | None = _most("the plan may pin of RAM for a card")
    """Of that, pinned for a card."""
    disk_bytes: int | None = _most("the plan may write as temporary files (default: free)")
    """Of temporary files."""

    @classmethod
    def flags(cls) -> dict[str, str]:
        """Name of a flag, without dashes -> its help."""
        return {each.name.removesuffix("_bytes"): each.metadata["help"] for each in fields(cls)}


ALL = Budget()


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One place to run on, or to plan for. All sizes in bytes."""

    id: str
    """What torch calls it, "cpu" or "cuda:0"; of a card that is not here, its id in `framefit.cards`."""
    name: str
    compute_capability: tuple[int, int] | None
    vram_total_bytes: int
    """0 without a card."""
    vram_free_bytes: int
    """Of the card, or unused in what this process reserves of it."""
    vram_limit_bytes: int | None = None
    """Most that a run may reserve, enforced by `capped`; None: what is free."""
    vram_others_bytes: int = 0
    """Held by other processes, at the least."""
    context_bytes: int = 0
    """Of what is free, for CUDA's context and kernels beside what a run reserves: as probed, or assumed."""
    ram_total_bytes: int
    """What this process may use: the control group's limit where there is one."""
    ram_free_bytes: int
    """Of it, or what a run may take where that is less."""
    ram_limit_bytes: int | None = None
    """Most that a run may take of it, which nothing enforces but the plan; None: what is free."""
    pinned_limit_bytes: int | None = None
    """Most of it that may be pinned for a card; None: all that is free."""
    disk_free_bytes: int | None
    """In the user's state folder, where temporary files go; None: of a machine that is not here."""

    @classmethod
    def find(cls, which: str = "auto", budget: Budget = ALL) -> Self:
        """What `--device` and the flags of the budget say: a device of this machine, or a named card.

        Raises:
            UsageError: as `detect` and `named`, or memory is to be pinned for the CPU.
            DoesNotFit: there is less than that.
        """
        if which in CARDS:
            found = cls.named(which, vram_bytes=budget.vram_bytes, ram_bytes=budget.ram_bytes)
        else:
            found = cls.detect(which, vram_bytes=budget.vram_bytes)
        return found._within(budget)

    @classmethod
    def detect(cls, which: str = "auto", *, vram_bytes: int | None = None) -> Self:
        """Look at the machine.

        Args:
            which: "auto" (a CUDA card if there is one), "cpu", "cuda" or "cuda:N".
            vram_bytes: most that a run may reserve of the card; None: what is free.

        Raises:
            UsageError: there is no such device, or it has no memory to limit.
            DoesNotFit: less than `vram_bytes` is free.
        """
        if which == "cpu" or (which == "auto" and not _cuda_is_here()):
            found = cls(
                id="cpu", name=_cpu_name(), compute_capability=None, vram_total_bytes=0, vram_free_bytes=0, **_host()
            )
            return found._limited(vram_bytes)
        import torch

        from framefit.smi import least_of_others

        index = _cuda_index(which)
        name = torch.cuda.get_device_name(index)
        free, total = torch.cuda.mem_get_info(index)
        cached = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
        capability = torch.cuda.get_device_capability(index)
        return cls(
            id=f"cuda:{index}", name=name, compute_capability=capability, vram_total_bytes=total,
            vram_free_bytes=free + cached, vram_others_bytes=least_of_others(index),
            context_bytes=_unseen(name, capability).kernels_bytes,  # the bare context is there since torch was asked
            **_host(),
        )._limited(vram_bytes)  # fmt: skip

    @classmethod
    def named(cls, id: str, *, vram_bytes: int | None = None, ram_bytes: int | None = None) -> Self:
        """A card of `framefit.cards` with nothing else on it. Torch is not imported.

        Args:
            vram_bytes: as in `detect`.
            ram_bytes: memory of the machine that it is in, all of it free; None: this machine's, as it is.

        Raises:
            UsageError: there is no such row.
            DoesNotFit: the card has less than `vram_bytes`.
        """
        if id not in CARDS:
            raise UsageError(f"card '{id}' is unknown: use {', '.join(CARDS)}.")
        card, host = CARDS[id], _host() | {"disk_free_bytes": None}
        context_bytes = _unseen(card.name, card.compute_capability).context_bytes
        if ram_bytes is not None:
            host |= dict.fromkeys(("ram_total_bytes", "ram_free_bytes"), ram_bytes)
            host["pinned_limit_bytes"] = _pinnable(ram_bytes)
        return cls(
            id=id, name=card.name, compute_capability=card.compute_capability, vram_total_bytes=card.vram_bytes,
            vram_free_bytes=card.vram_bytes, context_bytes=context_bytes, **host,
        )._limited(vram_bytes)  # fmt: skip

    @property
    def origin(self) -> Literal["detected", "named", "emulated"]:
        if self.id in CARDS:
            return "named"
        return "detected" if self.vram_limit_bytes is None else "emulated"

    @property
    def budget_bytes(self) -> int:
        """What a run may reserve where weights and activations go: of the card, or of RAM without one."""
        if self.id == "cpu":
            return self.ram_free_bytes
        if self.vram_limit_bytes is not None:
            return self.vram_limit_bytes
        return max(0, self.vram_free_bytes - self.context_bytes)

    @property
    def pinnable_bytes(self) -> int:
        """What a run may pin of RAM."""
        limit = self.pinned_limit_bytes
        return self.ram_free_bytes if limit is None else min(limit, self.ram_free_bytes)

    def check_here(self) -> None:
        """Raises `UsageError` where nothing can run: on a card that is only named."""
        if self.origin == "named":
            raise UsageError(_not_here(self.id))

    @contextlib.contextmanager
    def capped(self, *, growing: bool = True) -> Iterator[None]:
        """In this block torch reserves no more than the limit, and raises its out-of-memory error where it would.

        Args:
            growing: whether its segments may grow from here on, see `expand_segments`; else as torch is configured.

        Raises:
            DoesNotFit: this process holds more than that already.
        """
        if growing and self.id.startswith("cuda") and self.origin != "named":
            expand_segments()
        if self.vram_limit_bytes is None:
            yield
            return
        import torch

        self.check_here()
        torch.cuda.empty_cache()
        if (held := torch.cuda.memory_reserved(self.id)) > self.vram_limit_bytes:
            raise DoesNotFit(
                f"--vram is {self.vram_limit_bytes / GIB:.2f} GiB and this process holds {held / GIB:.2f} GiB of "
                f"{self.name} already: free it, or run in a process of its own."
            )
        before = torch.cuda.get_per_process_memory_fraction(self.id)
        total = torch.cuda.get_device_properties(self.id).total_memory
        cap = self.vram_limit_bytes - EXPANDING_BYTES
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, cap) / total), self.id)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(before, self.id)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"origin": self.origin, "budget_bytes": self.budget_bytes}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The inverse of `to_json`; fields that an older file lacks have their defaults."""
        capability = data["compute_capability"]
        facts = {name: value for name, value in data.items() if name not in ("origin", "budget_bytes")}
        return cls(**(facts | {"compute_capability": None if capability is None else tuple(capability)}))

    def _within(self, budget: Budget) -> Self:
        """With no more RAM and disk than that."""
        if budget.pinned_bytes is not None and self.id == "cpu":
            raise UsageError("--pinned limits what is pinned for a card and the device is the CPU: leave it out.")
        there = {"--ram": (budget.ram_bytes, self.ram_free_bytes), "--disk": (budget.disk_bytes, self.disk_free_bytes)}
        for flag, (asked, free) in there.items():
            if asked is not None and free is not None and asked > free:
                raise DoesNotFit(f"{flag} is {asked / GIB:.2f} GiB and {free / GIB:.2f} GiB are free: ask for no more.")
        limits: dict[str, Any] = {
            "ram_free_bytes": budget.ram_bytes, "ram_limit_bytes": budget.ram_bytes,
            "pinned_limit_bytes": budget.pinned_bytes, "disk_free_bytes": budget.disk_bytes,
        }  # fmt: skip
        return replace(self, **{name: limit for name, limit in limits.items() if limit is not None})

    def _limited(self, vram_bytes: int | None) -> Self:
        if vram_bytes is None:
            return self
        if self.id == "cpu":
            raise UsageError("--vram limits the memory of a card and the device is the CPU: leave it out.")
        if vram_bytes <= 0:
            raise UsageError("--vram is 0 and must be more.")
        if vram_bytes > (most := self.budget_bytes):
            raise DoesNotFit(
                f"--vram is {vram_bytes / GIB:.2f} GiB and {self.name} has {most / GIB:.2f} GiB for a run "
                f"({self.vram_free_bytes / GIB:.2f} GiB free, of which CUDA's context takes "
                f"{self.context_bytes / GIB:.2f}): ask for no more."
            )
        return replace(self, vram_limit_bytes=vram_bytes)


def expand_segments() -> None:
    """Let the segments of torch's allocator grow, so that what it reserves of a card stays near what is allocated.

    Where the environment says how torch is to allocate, that holds. Segments that are there already stay as they are.
    """
    if not any(os.environ.get(name) for name in ALLOCATOR):
        import torch

        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def _not_here(id: str) -> str:
    return (
        f"{id} is a card to plan for (framefit plan --device {id}) and not one of this machine: to run within its "
        f"memory here, use --device cuda --vram {Device.named(id).budget_bytes / GIB:.2f}GiB."
    )


def _unseen(name: str, compute_capability: tuple[int, int]) -> Unseen:
    filed = rates.filed(name)
    return (filed and filed.unseen) or Unseen.assumed(compute_capability)


def _cuda_is_here() -> bool:
    import torch

    return torch.cuda.is_available()


def _cuda_index(which: str) -> int:
    import torch

    if which in CARDS:
        raise UsageError(_not_here(which))
    kind, _, index = ("cuda" if which == "auto" else which).partition(":")
    if kind != "cuda" or (index and not index.isdecimal()):
        raise UsageError(
            f"device '{which}' is unknown: use auto, cpu, cuda or cuda:N; to plan, also {', '.join(CARDS)}."
        )
    count = torch.cuda.device_count()
    if int(index or 0) >= count:
        raise UsageError(f"device '{which}' was asked for and torch sees {count} CUDA devices: use --device cpu.")
    return int(index or 0)


def state_folder() -> Path:
    """What a run leaves for another one, and what it writes for itself (on Linux $XDG_STATE_HOME/framefit)."""
    import platformdirs

    return Path(platformdirs.user_state_dir("framefit"))


def _host() -> dict[str, Any]:
    total, free = _memory()
    folder = state_folder().absolute()
    disk = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.is_dir())).free
    return {
        "ram_total_bytes": total, "ram_free_bytes": free, "pinned_limit_bytes": _pinnable(total),
        "disk_free_bytes": disk,
    }  # fmt: skip


def _pinnable(total_bytes: int) -> int | None:
    under_windows = sys.platform == "win32" or "microsoft" in platform.release().lower()
    return int(WINDOWS_PINS * total_bytes) if under_windows else None


def _memory() -> tuple[int, int]:
    """(total, free) RAM in bytes, within the control group's limit (cgroup v2, then v1)."""
    import psutil

    memory = psutil.virtual_memory()
    for limit, used, stat, cache in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        try:
            ceiling, current = (int((CONTROL_GROUP / name).read_text()) for name in (limit, used))
        except (OSError, ValueError):
            continue
        if ceiling < memory.total:
            return ceiling, min(memory.available, ceiling - current + _cached(CONTROL_GROUP / stat, cache))
    return memory.total, memory.available


def _cached(stat: Path, name: str) -> int:
    """Bytes of cached files, which the system drops where memory is needed; 0 where it does not tell."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        return next(int(line.split()[1]) for line in stat.read_text().splitlines() if line.startswith(f"{name} "))
    return 0


def _cpu_name() -> str:
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux tells more
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"{model} ({os.cpu_count()} cores)"
