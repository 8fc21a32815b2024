"""Videos longer than a model was trained for: overlapping windows of frames, predicted apart and fused at every step.

- Every window is as long as the setting says, so that the denoiser sees what it was trained on, and holds no more.
- Where windows overlap, the prediction is a mean whose weights fall off towards a window's ends. Source:
  MultiDiffusion, arXiv 2302.08113.
- A later window does not see the photo: its first frame is given as the photo is to the first window, and is what the
  windows before it say, at this step, that the frame will be. So it goes on where they are, in place and in motion.
- Noise of later frames is that of earlier ones in another order. Source: FreeNoise, arXiv 2310.15169.

Another computation, beyond the trained length for want of a better one: what it costs is in docs/settings.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from framefit.families import family_of
from framefit.families.parts import Parts, Tensors
from framefit.families.windows import Windows
from framefit.plan import Window

__all__ = ["Estimate", "apply", "correlated", "fused", "remove"]

Predict = Callable[[torch.Tensor, Tensors], torch.Tensor]
"""(1, C, F, H, W) and the conditioning of these frames -> the guided prediction of the same shape."""

Estimate = Callable[[torch.Tensor, slice], torch.Tensor]
"""A prediction for some latent frames, and which these are -> what it says they will be when the last step is taken."""


def apply(parts: Parts, setting: Window) -> None:
    if setting.value != "none":
        parts.windows = Windows.of(setting, parts.checkpoint.frames.stride)


def remove(parts: Parts) -> None:
    parts.windows = None


def fused(
    parts: Parts, predict: Predict, latents: torch.Tensor, conditioning: Tensors, estimate: Estimate
) -> torch.Tensor:
    """The guided prediction (1, C, F, H, W), of windows where the setting asks for them."""
    frames = latents.shape[2]
    spans = parts.windows.spans(frames) if parts.windows else [slice(0, frames)]
    if parts.windows is None or len(spans) == 1:
        return predict(latents, conditioning)
    window = family_of(parts.checkpoint).window
    weights = parts.windows.weights(frames)
    whole, known = torch.zeros_like(latents), torch.zeros(frames)
    for span, weight in zip(spans, weights, strict=True):
        anchor = None
        if span.start:
            first = slice(span.start, span.start + 1)
            anchor = estimate(whole[:, :, first] / known[first.start], first)
        prediction = predict(latents[:, :, span].contiguous(), window(conditioning, span, frames, anchor))
        whole[:, :, span] += prediction * weight.to(prediction).view(-1, 1, 1)
        known[span] += weight
    return whole


def correlated(parts: Parts, noise: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noise (1, C, F, H, W) whose frames beyond the first window are those of a window before, shuffled."""
    frames = noise.shape[2]
    if parts.windows is None or frames <= parts.windows.length:
        return noise
    length, hop = parts.windows.length, parts.windows.length - parts.windows.overlap
    order = list(range(length))
    while len(order) < frames:
        earlier = order[-length:][:hop]
        order += [earlier[i] for i in torch.randperm(hop, generator=generator).tolist()]
    return noise[:, :, order[:frames]].contiguous()
