"""Group norms in two steps: the moments of equally large parts of every group, joined, and what they make of x.

torch's own kernel gives every group of a picture to one block of threads, so that 32 groups leave most of a card idle.
Reductions fill it. Moments are in fp32, whatever x is in, and no copy of x is made for them; variances are about the
part's own mean and join as those of parts do (Chan, Golub, LeVeque 1979), so that no digits are lost where means are
large.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["Moments", "changes", "moments", "normed"]

Moments = tuple[torch.Tensor, torch.Tensor]
"""Variances and means, in fp32."""


def moments(x: torch.Tensor, axis: int) -> Moments:
    """Over one axis."""
    variances = torch.empty((*x.shape[:axis], *x.shape[axis + 1 :]), dtype=torch.float32, device=x.device)
    torch.var(x, axis, correction=0, out=variances)  # it has no `dtype`; a result in fp32 has it compute so
    return variances, x.mean(axis, dtype=torch.float32)


def changes(norm: nn.GroupNorm, parts: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    """Moments (N, groups, parts) -> what each channel is to be multiplied by and moved by, in fp32, (N, C) each."""
    variances, means = parts
    variance, mean = torch.var_mean(means, 2, correction=0, keepdim=True)
    variance += variances.mean(2, keepdim=True) + norm.eps
    scale = variance.rsqrt_() * norm.weight.view(norm.num_groups, -1)
    shift = torch.addcmul(norm.bias.view(norm.num_groups, -1), mean, scale, value=-1)
    return scale.flatten(1), shift.flatten(1)


def normed(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """x times `scale` and moved by `shift`, both in fp32, rounded once."""
    return torch.addcmul(shift, x, scale, out=torch.empty_like(x))
