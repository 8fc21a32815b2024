"""A convolution strip after strip of its rows: its input is put together by strips, but never whole.

The frames that it looks over may lie apart in memory, so that those that are remembered are the very ones that were
computed; a picture that is enlarged or padded first is so by strips. cuDNN's copies are as small as the strips are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional

__all__ = ["STRIP_BYTES", "enlarged", "halved", "over_frames"]

STRIP_BYTES = 2**27
"""Of a strip's input: rows enough to fill a card's kernels."""

Take = Callable[[int, int], torch.Tensor]
"""Rows of the input, from one on to another: all that there are of them."""


def over_frames(
    convolution: nn.Conv3d, frames: Sequence[torch.Tensor | None], padding: tuple[int, int], scale: int = 1
) -> torch.Tensor:
    """One frame (1, C', 1, H', W') of as many frames (1, C, 1, H, W) as the convolution looks over at once.

    Args:
        frames: None stands for one of zeros.
        padding: of rows and columns, on both sides.
        scale: pixels each way, all equal, that it sees in place of one.
    """
    like = next(frame for frame in frames if frame is not None)

    def take(top: int, bottom: int) -> torch.Tensor:
        rows = slice(top // scale, -(-bottom // scale))
        parts = [torch.zeros_like(like[..., rows, :]) if each is None else each[..., rows, :] for each in frames]
        strip = torch.cat(parts, dim=2)
        if scale == 1:
            return strip
        grown = functional.interpolate(strip, scale_factor=(1, scale, scale), mode="nearest")
        return grown[..., top % scale : top % scale + bottom - top, :]

    size = scale * like.shape[3], scale * like.shape[4] + 2 * padding[1]
    bytes = len(frames) * like.nbytes * scale**2
    return _by_rows(convolution, take, like, size, (padding[0], padding[0]), padding[1], bytes)


def enlarged(upsampling: nn.Module, convolution: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> (N, C', 2H, 2W): a convolution over 3x3 of what `upsampling` makes of every pixel, four equal."""
    rows, columns = 2 * x.shape[2], 2 * x.shape[3]

    def take(top: int, bottom: int) -> torch.Tensor:
        grown: torch.Tensor = upsampling(x[..., top // 2 : -(-bottom // 2), :])
        return grown[..., top % 2 : top % 2 + bottom - top, :]

    return _by_rows(convolution, take, x, (rows, columns + 2), (1, 1), 1, 4 * x.nbytes)


def halved(convolution: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> (N, C', H/2, W/2): with a row and a column of zeros behind the last."""
    rows, columns = x.shape[2:]

    def take(top: int, bottom: int) -> torch.Tensor:
        return functional.pad(x[..., top:bottom, :], (0, 1))

    return _by_rows(convolution, take, x, (rows, columns + 1), (0, 1), 0, x.nbytes)


def _by_rows(
    convolution: nn.Conv2d | nn.Conv3d, take: Take, like: torch.Tensor, size: tuple[int, int], pads: tuple[int, int],
    across: int, bytes: int,
) -> torch.Tensor:  # fmt: skip
    """Of an input of `size`: its rows, and its columns with what is padded; `pads` rows of zeros are before and behind.

    Args:
        like: gives the result its precision and its first axes but the channels.
        across: columns of zeros that the convolution adds on both sides.
        bytes: of the input, if it were whole.
    """
    rows, columns = size
    tall, wide = convolution.kernel_size[-2:]
    down, aside = convolution.stride[-2:]
    height, width = (rows + sum(pads) - tall) // down + 1, (columns - wide) // aside + 1
    flat = isinstance(convolution, nn.Conv2d)

    def convolve(x: torch.Tensor, pad: int) -> torch.Tensor:
        given = x, convolution.weight, convolution.bias, convolution.stride
        return functional.conv2d(*given, (pad, across)) if flat else functional.conv3d(*given, (0, pad, across))

    step = max(1, STRIP_BYTES * rows // bytes // down)
    if step >= height and pads[0] == pads[1]:
        return convolve(take(0, rows), pads[0])
    out = like.new_empty(like.shape[0], convolution.out_channels, *like.shape[2:-2], height, width)
    for begin in range(0, height, step):
        end = min(begin + step, height)
        top, bottom = begin * down - pads[0], (end - 1) * down - pads[0] + tall
        strip = take(max(top, 0), min(bottom, rows))
        edge = top < 0 or bottom > rows
        if edge and pads[0] == pads[1] and down == 1:  # zeros on both sides; what is made of the surplus is left out
            surplus = pads[0] + min(top, 0)
            out[..., begin:end, :] = convolve(strip, pads[0])[..., surplus : surplus + end - begin, :]
            continue
        if edge:
            strip = functional.pad(strip, (0, 0, max(-top, 0), max(bottom - rows, 0)))
        out[..., begin:end, :] = convolve(strip, 0)
    return out
