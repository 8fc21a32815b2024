"""A convolution strip after strip of its rows: its input is put together by strips, but never whole.

The frames that it looks over may lie apart in memory, so that those that are remembered are the very ones that were
computed; a picture that is enlarged or padded first is so by strips. cuDNN's copies are as small as the strips are, and
there are none of frames that lie channels-last: their rows are put together as its kernels read them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional

from framefit.passes.rows import each, pieces

__all__ = ["STRIP_BYTES", "enlarged", "halved", "over_frames"]

STRIP_BYTES = 2**28
"""Of a strip's input: rows enough to fill a card's kernels."""

Take = Callable[[int, int], torch.Tensor]
"""Rows of the input, from one on to another."""


def over_frames(
    convolution: nn.Conv3d, frames: Sequence[torch.Tensor | None], padding: tuple[int, int], scale: int = 1
) -> torch.Tensor:
    """(1, C', F', H', W') of frames (1, C, 1, H, W) in a row; before them and behind them there are no others.

    Args:
        frames: None stands for one of zeros.
        padding: of rows and columns, on both sides.
        scale: pixels each way, all equal, that it sees in place of one.
    """
    like = next(frame for frame in frames if frame is not None)

    def take(top: int, bottom: int) -> torch.Tensor:
        rows = slice(top // scale, bottom // scale)
        parts = [torch.zeros_like(like[..., rows, :]) if frame is None else frame[..., rows, :] for frame in frames]
        return _grown(_joined(parts), scale)

    bytes = len(frames) * like.nbytes * scale**2
    return _by_rows(convolution, take, like, scale * like.shape[3], padding, bytes, scale)


def enlarged(upsampling: nn.Module, convolution: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> (N, C', 2H, 2W): a convolution over 3x3 of what `upsampling` makes of every pixel, four equal."""

    def take(top: int, bottom: int) -> torch.Tensor:
        grown: torch.Tensor = upsampling(x[..., top // 2 : bottom // 2, :])
        return grown

    return _by_rows(convolution, take, x, 2 * x.shape[2], (1, 1), 4 * x.nbytes, 2)


def halved(convolution: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> (N, C', H/2, W/2): with a row and a column of zeros behind the last."""
    rows = x.shape[2]

    def take(top: int, bottom: int) -> torch.Tensor:
        return functional.pad(x[..., top:bottom, :], (0, 1, 0, max(bottom - rows, 0)))

    return _by_rows(convolution, take, x, rows + 1, (0, 0), x.nbytes)


def _by_rows(
    convolution: nn.Conv2d | nn.Conv3d, take: Take, like: torch.Tensor, rows: int, padding: tuple[int, int],
    bytes: int, scale: int = 1,
) -> torch.Tensor:  # fmt: skip
    """Every strip gets the zeros that are around the picture; what is made of those inside of it is left out.

    Args:
        like: whose layout the result has.
        rows: of the input.
        bytes: of the input, if it were whole.
        scale: rows that are taken together.
    """
    tall, down, above = convolution.kernel_size[-2], convolution.stride[-2], padding[0]
    height = (rows + 2 * above - tall) // down + 1
    step = max(1, STRIP_BYTES * rows // bytes // down)
    if step >= height:
        return _convolved(convolution, take(0, rows), padding)
    out: list[torch.Tensor] = []

    def compute(strip: slice) -> None:
        top = max(strip.start * down - above, 0) // scale * scale
        bottom = min(-(-((strip.stop - 1) * down - above + tall) // scale) * scale, rows)
        made = _convolved(convolution, take(top, bottom), padding)
        if not out:
            out.append(_empty(made, height, channels_last=like.stride(1) == 1))
        first = strip.start - top // down
        out[0][..., strip, :] = made[..., first : first + strip.stop - strip.start, :]

    each(pieces(height, step), compute)
    return out[0]


def _convolved(convolution: nn.Conv2d | nn.Conv3d, x: torch.Tensor, padding: tuple[int, int]) -> torch.Tensor:
    given = x, convolution.weight, convolution.bias, convolution.stride
    return functional.conv2d(*given, padding) if x.ndim == 4 else functional.conv3d(*given, (0, *padding))


def _joined(frames: Sequence[torch.Tensor]) -> torch.Tensor:
    """(1, C, F, H, W), channels-last where the frames are; torch.cat does not see that of a single one."""
    if frames[0].stride(1) != 1:
        return torch.cat([*frames], dim=2)
    return torch.cat([frame.movedim(1, -1) for frame in frames], dim=1).movedim(-1, 1)


def _grown(x: torch.Tensor, scale: int) -> torch.Tensor:
    """(1, C, F, H, W), every pixel as a square of equal ones, channels-last."""
    if scale == 1:
        return x
    pixels = x.movedim(1, -1)[:, :, :, None, :, None]
    squares = pixels.expand(-1, -1, -1, scale, -1, scale, -1)
    return squares.flatten(4, 5).flatten(2, 3).movedim(-1, 1)


def _empty(part: torch.Tensor, height: int, channels_last: bool) -> torch.Tensor:
    """As `part`, `height` tall."""
    shape = (*part.shape[:-2], height, part.shape[-1])
    last = torch.channels_last if part.ndim == 4 else torch.channels_last_3d
    layout = last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=layout)
