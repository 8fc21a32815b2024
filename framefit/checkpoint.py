"""A run's state on disk: what it takes to go on from the last finished step after any crash.

A run has a folder of its own: `plan.json` and `conditioning.safetensors`, written once, and `step.safetensors`,
replaced after every step. Each is written to a temporary name, synced and renamed, so that a kill at any moment
leaves the old state or the new one; each carries a hash of its content and the identity of the run. A state is written
while the next step runs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import shutil
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from framefit.device import state_folder
from framefit.errors import BadCheckpoint, BadInput, FramefitError
from framefit.plan import Plan
from framefit.report import Rung

if TYPE_CHECKING:
    import torch

__all__ = ["RunFolder", "State", "Writer", "default_root", "hold", "list_runs"]

ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")


@dataclass(slots=True)
class State:
    """Where a run stands between two steps."""

    step: int
    """Steps already taken."""
    latents: torch.Tensor
    conditioning: dict[str, torch.Tensor]
    scheduler: dict[str, Any]
    """What the scheduler holds beyond its configuration: tensors, numbers, None, and lists of these."""
    rungs: tuple[Rung, ...] = ()
    """That the plan has come down."""

    def snapshot(self) -> State:
        """A copy in host memory that the next step does not touch."""
        import torch

        host = torch.device("cpu")
        return State(self.step, self.latents.to(host), self.conditioning, _moved(self.scheduler, host), self.rungs)

    def move(self, device: torch.device) -> None:
        """Bring every tensor to `device`."""
        self.latents = self.latents.to(device)
        self.conditioning = {name: tensor.to(device) for name, tensor in self.conditioning.items()}
        self.scheduler = _moved(self.scheduler, device)


def default_root() -> Path:
    """Where runs are kept: `runs` in the user's state folder."""
    return state_folder() / "runs"


def hold(file: Path, taken: FramefitError) -> Callable[[], None]:
    """Lock `file` for this process until it ends or calls what is returned; raises `taken` where another one does."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        return lambda: None
    lock = os.open(file, os.O_CREAT | os.O_WRONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise taken from None
    except OSError:  # some network file systems have no locks
        pass
    return lambda: os.close(lock)


class RunFolder:
    """One run on disk."""

    def __init__(self, path: Path, plan: Plan, weights: str, output: Path, crf: int, filed: Any = None) -> None:
        """`filed`: the plan as an earlier version wrote it, by which its files know the run."""
        self.path = path
        self.plan = plan
        self.weights = weights
        self.output = output
        self.crf = crf
        plan_text = plan.dumps() if filed is None else json.dumps(filed, indent=2)
        self._identity = _digest(plan_text.encode(), weights.encode())
        self._conditioning_saved = False
        self._lock: Callable[[], object] = lambda: None

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def has_state(self) -> bool:
        """Whether there is anything to go on from."""
        return (self.path / "step.safetensors").exists()

    @classmethod
    def create(cls, root: Path, plan: Plan, weights: str, output: Path, crf: int = 18) -> Self:
        """A new folder below `root`. `weights` names the model's weights, so that others are not mistaken for them.

        Raises:
            BadInput: `root` cannot be written.
        """
        path = root / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        run = cls(path, plan, weights, output.absolute(), crf)
        try:
            path.mkdir(parents=True)
            run._describe()
            run._take()
        except OSError as error:
            run.discard()
            raise BadInput(
                f"step checkpoints cannot be written to {root} ({error.strerror}): "
                f"give another folder with --checkpoint-dir, or --no-checkpoint."
            ) from None
        return run

    @classmethod
    def open(cls, root: Path, id: str) -> Self:
        """The run `id` below `root`.

        Raises:
            BadCheckpoint: there is none, or its plan cannot be read.
        """
        path = root / id
        if not ID.fullmatch(id) or not path.is_dir():
            others = ", ".join(run.name for run in list_runs(root)) or "none"
            raise BadCheckpoint(f"there is no run '{id}' in {root}: the runs that can be resumed are {others}.")
        try:
            data = json.loads((path / "plan.json").read_bytes())
            plan, output = Plan.from_json(data["plan"]), Path(data["output"])
            run = cls(path, plan, data["weights"], output, int(data["crf"]), data["plan"])
            run._take()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadCheckpoint(f"the plan of run {id} cannot be read ({error!r}): start the run anew.") from None
        return run

    def restart(self, weights: str) -> None:
        """Forget the state, and begin again from step 0 with these weights."""
        (self.path / "step.safetensors").unlink(missing_ok=True)
        self.weights = weights
        self._identity = _digest(self.plan.dumps().encode(), weights.encode())
        self._conditioning_saved = False
        self._describe()

    def save(self, state: State) -> None:
        """Keep `state`; once this returns, a crash costs no more than what comes after."""
        if not self._conditioning_saved:
            self._save_tensors("conditioning.safetensors", state.conditioning, {})
            self._conditioning_saved = True
        tensors = {"latents": state.latents}
        plain = _flatten(state.scheduler, tensors)
        rungs = [asdict(rung) for rung in state.rungs]
        self._save_tensors("step.safetensors", tensors, {"step": state.step, "scheduler": plain, "rungs": rungs})

    def load(self) -> State | None:
        """The last state saved, on the CPU; None where the run had not come to its first.

        Raises:
            BadCheckpoint: a file is corrupt, or belongs to another run.
        """
        if not self.has_state:
            return None
        conditioning, _ = self._load_tensors("conditioning.safetensors")
        tensors, facts = self._load_tensors("step.safetensors")
        self._conditioning_saved = True
        return State(
            step=facts["step"],
            latents=tensors["latents"],
            conditioning=conditioning,
            scheduler=_unflatten(facts["scheduler"], tensors),
            rungs=tuple(Rung(**rung) for rung in facts.get("rungs", ())),  # files of earlier versions have none
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Let another process have the folder."""
        self._lock()

    def discard(self) -> None:
        """The run is finished, or is to start anew."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.release()

    def _describe(self) -> None:
        facts = {"plan": self.plan.to_json(), "weights": self.weights, "output": str(self.output), "crf": self.crf}
        _write(self.path / "plan.json", json.dumps(facts).encode())

    def _take(self) -> None:
        """Hold the folder for this process until it ends; raises `BadCheckpoint` where another one does."""
        taken = f"run {self.id} is being worked on by another process: wait for it, or stop it."
        self._lock = weakref.finalize(self, hold(self.path / "lock", BadCheckpoint(taken)))

    def _save_tensors(self, name: str, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
        from safetensors.torch import save

        # clone: a view into a larger storage would be refused, and two names for one storage too
        content = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        metadata = {"run": self._identity, "facts": json.dumps(facts)}
        metadata["hash"] = _content_hash(content, metadata)
        try:
            _write(self.path / name, save(content, metadata))
        except OSError as error:
            raise BadInput(
                f"the step checkpoint {self.path / name} cannot be written ({error.strerror}): make room, or give "
                f"another folder with --checkpoint-dir."
            ) from None

    def _load_tensors(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        from safetensors import SafetensorError, safe_open

        file = self.path / name
        try:
            with safe_open(file, framework="pt") as stream:
                metadata = dict(stream.metadata() or {})
                # clone: a view of the file is aligned otherwise than torch's own memory, and kernels round by that
                tensors = {key: stream.get_tensor(key).clone() for key in stream.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise BadCheckpoint(f"the checkpoint {file} is corrupt ({error}): {_ANEW}") from None
        if metadata.pop("hash", None) != _content_hash(tensors, metadata):
            raise BadCheckpoint(f"the checkpoint {file} is corrupt (its hash does not match its content): {_ANEW}")
        if metadata["run"] != self._identity:
            raise BadCheckpoint(f"the checkpoint {file} belongs to another run: {_ANEW}")
        return tensors, json.loads(metadata["facts"])


class Writer:
    """Saves states beside the computation: the next step runs while the last one is written.

    One state is under way at a time, so that a kill loses at most the step that finished last.
    """

    def __init__(self, run: RunFolder, *, every_s: float, always: Callable[[State], bool]) -> None:
        """Save at most once in `every_s` seconds, and whatever `always` says."""
        self._run = run
        self._every_s = every_s
        self._always = always
        self._saved = -math.inf
        self._last: tuple[int, int] | None = None
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[None] | None = None

    def __call__(self, state: State) -> None:
        """Take a copy of `state`, and write it if it is due."""
        due = time.monotonic() - self._saved >= self._every_s or self._always(state)
        now = state.step, len(state.rungs)
        if not due or now == self._last:
            return
        self.wait()
        self._pending = self._pool.submit(self._run.save, state.snapshot())
        self._saved, self._last = time.monotonic(), now

    def wait(self) -> None:
        """Return once everything taken is on disk; raises what went wrong there."""
        if self._pending is None:
            return
        try:
            self._pending.result()
        except Exception:
            self._pending = None
            raise
        self._pending = None  # not before: an interrupted wait must be taken up again


_ANEW = "add --restart to begin again from step 0."


def list_runs(root: Path) -> list[Path]:
    """The folders of runs that can be resumed, oldest first."""
    return sorted(path for path in root.glob("*") if ID.fullmatch(path.name) and (path / "plan.json").is_file())


def _write(file: Path, content: bytes) -> None:
    """Atomic: the name shows the old content or the new, whatever happens.

    The folder is not synced: after a power cut the name may show the old content, which is a state to go on from too.
    """
    temporary = file.with_name(f".{file.name}.part")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _content_hash(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    import torch

    parts = [json.dumps(metadata, sort_keys=True).encode()]
    for key in sorted(tensors):
        value = tensors[key]
        parts += [
            f"{key} {value.dtype} {list(value.shape)}".encode(),
            value.flatten().view(torch.uint8).numpy().tobytes(),
        ]
    return _digest(*parts)


def _flatten(value: Any, tensors: dict[str, torch.Tensor], path: str = "scheduler") -> Any:
    """`value` as JSON, with each tensor moved to `tensors` and its name in its place."""
    import torch

    if isinstance(value, torch.Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, dict):
        return {key: _flatten(item, tensors, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_flatten(item, tensors, f"{path}.{i}") for i, item in enumerate(value)]
    return value


def _unflatten(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {"tensor"}:
            return tensors[value["tensor"]]
        return {key: _unflatten(item, tensors) for key, item in value.items()}
    return [_unflatten(item, tensors) for item in value] if isinstance(value, list) else value


def _moved(value: Any, device: torch.device) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return [_moved(item, device) for item in value] if isinstance(value, list) else value
