"""Group norms of joined moments are torch's own, in whatever layout and precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from framefit.passes import frames
from framefit.passes.norms import Moments, changes, moments, normed

GROUPS, CHANNELS = 8, 32


def made(dtype: torch.dtype, layout: torch.memory_format, deviations: float) -> tuple[nn.GroupNorm, torch.Tensor]:
    """A norm, and pictures whose mean is so many deviations; channels differ in both."""
    generator = torch.Generator().manual_seed(0)
    norm = nn.GroupNorm(GROUPS, CHANNELS, eps=1e-6)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, generator=generator)
    x, each = (torch.randn(3, CHANNELS, *size, generator=generator) for size in ((24, 40), (1, 1)))
    return norm.to(dtype), ((1 + each**2) * x + deviations + each).to(dtype).contiguous(memory_format=layout)


def by_parts(norm: nn.GroupNorm, x: torch.Tensor, lost: bool = False) -> torch.Tensor:
    variances, means = (
        each.unflatten(2, (GROUPS, -1)).transpose(1, 2).flatten(2) for each in moments(x.movedim(1, -1), 2)
    )
    parts: Moments = variances, means.mean(2, keepdim=True).expand_as(means) if lost else means
    scale, shift = changes(norm, parts)
    return normed(x, scale[..., None, None], shift[..., None, None])


def error(norm: nn.GroupNorm, x: torch.Tensor, found: torch.Tensor) -> float:
    right = nn.functional.group_norm(x.double(), GROUPS, norm.weight.double(), norm.bias.double(), norm.eps)
    return float((found - right).norm() / right.norm())


@pytest.mark.parametrize("deviations", [0, 30])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_norms_of_joined_parts_are_torchs(dtype: torch.dtype, layout: torch.memory_format, deviations: float) -> None:
    norm, x = made(dtype, layout, deviations)
    found = by_parts(norm, x)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=layout)
    assert error(norm, x, found) <= max(1.1 * error(norm, x, norm(x)), 2e-6)


@pytest.mark.parametrize("width", [40, 520])
@torch.no_grad()
def test_pictures_are_summed_up_in_short_pieces(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    norm, x = made(torch.float32, torch.channels_last, 3)
    x = x.repeat(1, 1, 1, width // 40).add_(torch.arange(width)).contiguous(memory_format=torch.channels_last)
    pieces = list[int]()
    monkeypatch.setattr(frames, "moments", lambda x, axis: pieces.append(x.shape[axis]) or moments(x, axis))
    assert error(norm, x, frames._MagvitNorm().new_forward(norm, x)) <= 2e-6
    assert pieces == [{40: 40, 520: 130}[width]]


@torch.no_grad()
def test_means_of_parts_that_are_lost_are_seen() -> None:
    norm, x = made(torch.float32, torch.contiguous_format, 3)
    assert error(norm, x, by_parts(norm, x, lost=True)) > 1e-2
