"""A stretch of training: ends when the training or the stretch has had its time, and the next one goes on from there.

A training is as long as its recipe says in seconds, on any card: a faster one takes more steps.

The model computes in its own precision (bf16 on a card); the optimisers hold fp32 masters, and beside them their
exponential average, which is what is kept in the end. Matrices learn by Muon (their update is made orthogonal; Jordan
et al. 2024), which was ahead of AdamW in the same time at small scale (LOG), everything else by AdamW. A step's
randomness comes from its number; phases and learning rate follow the time.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

__all__ = ["Pace", "Trainee", "train"]

MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
"""What AdamW and Muon remember of a parameter."""

Loss = Callable[[float, torch.Generator], tuple[Tensor, Mapping[str, Tensor]]]
"""(share of the training that is done, the step's generator) -> the loss, and figures for the curve."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How fast and how long."""

    seconds: float
    """Of training, over all stretches."""
    lr: float
    warmup: int = 200
    """Steps."""
    final: float = 0.02
    """Learning rate at the end, as a share of `lr`; between them half a cosine."""
    weight_decay: float = 0.01
    average: float = 0.999
    """Decay of the exponential average per step."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    muon: bool = True
    """False: AdamW for matrices too."""
    seed: int = 0

    def rate(self, step: int, progress: float) -> float:
        cosine = self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2
        return self.lr * min(1.0, (step + 1) / self.warmup) * cosine


@dataclass(kw_only=True)
class Trainee:
    """A model in training: its parameters that learn, their masters, averages and optimiser."""

    parameters: Mapping[str, nn.Parameter]
    pace: Pace
    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Of the figures since the curve's last entry."""

    def __post_init__(self) -> None:
        parameters = self.parameters.values()
        self.masters = [_matrix(p) if self._by_muon(p) else p.detach().float().clone() for p in parameters]
        self.averages = [m.clone() for m in self.masters]
        by_muon = [m for m, p in zip(self.masters, parameters, strict=True) if self._by_muon(p)]
        by_adam = [m for m, p in zip(self.masters, parameters, strict=True) if not self._by_muon(p)]
        lr, decay = self.pace.lr, self.pace.weight_decay
        # a decoupled decay on matrices only: gains, biases and tables stay free
        groups = [
            {"params": [m for m in by_adam if _wide(m)], "weight_decay": 0.0 if self.pace.muon else decay},
            {"params": [m for m in by_adam if not _wide(m)], "weight_decay": 0.0},
        ]
        self.optimizers: list[torch.optim.Optimizer] = []
        if by_adam:
            self.optimizers.append(torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=by_adam[0].is_cuda))
        if by_muon:
            # with the scale of AdamW's updates, so that one learning rate serves both
            self.optimizers.append(torch.optim.Muon(by_muon, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))

    def _by_muon(self, parameter: nn.Parameter) -> bool:
        """A table of three axes is no matrix, nor are gains that a norm holds as one column."""
        return self.pace.muon and parameter.ndim > 1 and parameter.ndim != 3 and _wide(parameter)

    @property
    def progress(self) -> float:
        return min(1.0, self.seconds / self.pace.seconds)

    def update(self) -> Tensor:
        """One step of the optimiser from the gradients of the model. Returns the norm of the gradient."""
        parameters: list[Tensor] = list(self.parameters.values())
        for master, parameter in zip(self.masters, parameters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float().reshape(master.shape)
            parameter.grad = None
        norm = nn.utils.clip_grad_norm_(self.masters, self.pace.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.pace.rate(self.step, self.progress)
            optimizer.step()
        self.step += 1
        # the average of the first steps would be mostly the random start
        decay = min(self.pace.average, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.averages, self.masters, 1 - decay)
        self._show(self.masters)
        return norm

    def finish(self) -> None:
        """The averages become the model's parameters."""
        self._show(self.averages)

    def _show(self, values: list[Tensor]) -> None:
        """Put masters or averages into the model."""
        parameters: list[Tensor] = list(self.parameters.values())
        torch._foreach_copy_(parameters, [v.view(p.shape) for v, p in zip(values, parameters, strict=True)])

    def save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for name, master, average in zip(self.parameters, self.masters, self.averages, strict=True):
            tensors |= {f"master.{name}": master, f"average.{name}": average}
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(master, {}).items():
                    tensors[f"{key}.{name}"] = value
        partial = file.with_suffix(".partial")
        sums = {name: float(total) for name, total in self.sums.items()}
        progress = json.dumps({"step": self.step, "seconds": self.seconds, "curve": self.curve, "sums": sums})
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, {"progress": progress})
        partial.replace(file)

    def restore(self, file: Path) -> None:
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            progress = json.loads(opened.metadata()["progress"])
        tensors = load_file(file, device=str(self.masters[0].device))
        self.step, self.seconds, self.curve = progress["step"], progress["seconds"], progress["curve"]
        device = self.masters[0].device
        self.sums = {name: torch.tensor(total, device=device) for name, total in progress["sums"].items()}
        for name, master, average in zip(self.parameters, self.masters, self.averages, strict=True):
            master.copy_(tensors[f"master.{name}"])
            average.copy_(tensors[f"average.{name}"])
            kept = {key: tensors[f"{key}.{name}"] for key in MOMENTS if f"{key}.{name}" in tensors}
            # a file holds no strides, and the fused optimiser wants the master's
            kept = {k: v if k == "step" else torch.empty_like(master).copy_(v) for k, v in kept.items()}
            for optimizer in self.optimizers:
                if kept and any(master is p for group in optimizer.param_groups for p in group["params"]):
                    optimizer.state[master] = kept
        self._show(self.masters)


def _wide(tensor: Tensor) -> bool:
    """Whether it has more than one column."""
    return tensor.numel() > len(tensor)


def _matrix(parameter: nn.Parameter) -> Tensor:
    """An fp32 copy; a convolution's weight as (outputs, everything else)."""
    return parameter.detach().float().contiguous().flatten(1).clone()


def train(trainee: Trainee, loss: Loss, state: Path, *, seconds: float, every: int = 50) -> bool:
    """Go on from `state` where it exists, to the end or for `seconds`. Returns whether it is finished.

    Raises:
        FloatingPointError: the loss or its gradient is not finite; the state of the last stretch is untouched.
    """
    if state.exists():
        with torch.no_grad():
            trainee.restore(state)
    began, before = time.monotonic(), trainee.seconds
    device = trainee.masters[0].device
    with_grad = {p.requires_grad for p in trainee.parameters.values()}
    if with_grad != {True}:
        raise ValueError("a parameter to be trained does not require a gradient.")
    while trainee.progress < 1 and time.monotonic() - began < seconds:
        generator = torch.Generator(device).manual_seed(trainee.pace.seed * 1_000_003 + trainee.step)
        value, figures = loss(trainee.progress, generator)
        value.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            norm = trainee.update()
            for name, figure in {"loss": value, "norm": norm, **figures}.items():
                trainee.sums[name] = trainee.sums.get(name, 0) + figure.detach().float()
        trainee.seconds = before + time.monotonic() - began
        if trainee.step % every == 0:
            _check(trainee)
            _note(trainee, {name: float(total) / every for name, total in trainee.sums.items()})
            trainee.sums = {}
    _check(trainee)
    trainee.save(state)
    return trainee.progress >= 1


def _check(trainee: Trainee) -> None:
    """What is not finite stays so in the sums."""
    for name in ("loss", "norm"):
        if not math.isfinite(total := float(trainee.sums.get(name, 0))):
            raise FloatingPointError(f"the {name} is {total} by step {trainee.step}: lower the learning rate.")


def _note(trainee: Trainee, figures: dict[str, float]) -> None:
    entry = {"step": trainee.step, "seconds": round(trainee.seconds, 1), **{k: round(v, 6) for k, v in figures.items()}}
    trainee.curve.append(entry)
    if trainee.step % 500 == 0 or len(trainee.curve) == 1:
        print(json.dumps(entry), flush=True)
