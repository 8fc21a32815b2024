"""A scheduler on its way through one run: its timesteps, its steps, and what it remembers between them."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["Schedule"]

PLAIN = bool | int | float | str | None


class Schedule:
    """One of diffusers' schedulers, set to `steps` steps."""

    def __init__(self, scheduler: Any, steps: int, device: torch.device) -> None:
        # EasyAnimate's reference passes mu=1 whatever the size; no other family shifts dynamically
        shifted = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
        scheduler.set_timesteps(steps, device=device, **shifted)
        self._scheduler = scheduler
        self._fixed = {name for name, value in vars(scheduler).items() if isinstance(value, torch.Tensor)}
        self.timesteps: torch.Tensor = scheduler.timesteps

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def train_timesteps(self) -> int:
        """Length of the training range: 1000 for every family."""
        length: int = self._scheduler.config.num_train_timesteps
        return length

    def scaled(self, latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The latents as the denoiser takes them at `t`."""
        if not hasattr(self._scheduler, "scale_model_input"):
            return latents
        scaled: torch.Tensor = self._scheduler.scale_model_input(latents, t)
        return scaled

    def step(self, prediction: torch.Tensor, t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The latents one step on.

        Contiguous, as they are after a resume: kernels round by memory layout.
        """
        after: torch.Tensor = self._scheduler.step(prediction, t, latents, return_dict=False)[0]
        return after.contiguous()

    def denoised(self, prediction: torch.Tensor, index: int, latents: torch.Tensor) -> torch.Tensor:
        """What the prediction of step `index`, made from `latents`, says the finished latents are."""
        if self._scheduler.config.get("prediction_type") == "v_prediction":
            alpha: torch.Tensor = self._scheduler.alphas_cumprod[int(self.timesteps[index])].to(latents)
            return alpha.sqrt() * latents - (1 - alpha).sqrt() * prediction
        sigma: torch.Tensor = self._scheduler.sigmas[index].to(latents)
        return latents - sigma * prediction

    def state(self) -> dict[str, Any]:
        """What it remembers: plain values, tensors, and lists of these. The schedule itself is not in it."""
        kept = {k: v for k, v in vars(self._scheduler).items() if k not in self._fixed and k != "_internal_dict"}
        return {name: _checked(name, value) for name, value in kept.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`, which `state()` gave, and which stays as it is."""
        for name, value in state.items():
            setattr(self._scheduler, name, _checked(name, value))


def _checked(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_checked(name, item) for item in value]
    assert isinstance(value, torch.Tensor | PLAIN), f"scheduler state {name} is a {type(value).__name__}"
    return value
