"""How a long video is divided into windows, and what each is told of the photo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch

from framefit.plan import Window

__all__ = ["Windows", "known"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """How a video is divided, in latent frames."""

    length: int
    overlap: int
    """Of two neighbours; the last window may overlap more."""

    @classmethod
    def of(cls, setting: Window, stride: int) -> Self:
        """`stride`: frames of the video in a latent frame, except for the first one, which has one."""
        return cls(length=(setting.frames - 1) // stride + 1, overlap=setting.overlap // stride)

    def spans(self, frames: int) -> list[slice]:
        """Of `frames` latent frames, in order; together they cover all, and none is shorter than the others."""
        if frames <= self.length:
            return [slice(0, frames)]
        starts = [*range(0, frames - self.length, self.length - self.overlap), frames - self.length]
        return [slice(start, start + self.length) for start in starts]

    def frames(self, num_frames: int, stride: int) -> list[tuple[int, int]]:
        """The first frame of the video that each window has a say in, and the one behind its last."""
        spans = self.spans((num_frames - 1) // stride + 1)
        return [(s.start and s.start * stride + 1, (s.stop - 1) * stride + 1) for s in spans]

    def weights(self, frames: int) -> list[torch.Tensor]:
        """(length,) for each window, less towards its ends, 0 for a first frame it is given; a frame's add up to 1."""
        spans, place = self.spans(frames), torch.arange(self.length)
        falling = [torch.minimum(place + (span.start == 0), self.length - place).float() for span in spans]
        total = torch.zeros(frames)
        for span, weight in zip(spans, falling, strict=True):
            total[span] += weight
        return [weight / total[span] for span, weight in zip(spans, falling, strict=True)]


def known(given: torch.Tensor, span: slice, frames: int, anchor: torch.Tensor | None) -> torch.Tensor:
    """The conditioning channels of a window, (1, M + C, f, H, W): a mask of M channels, and C of encoded frames.

    As if the window were the video: they are those of the video's beginning, with `anchor` in the photo's place. The
    last frame is the video's own where the window ends there, for it may be given too.

    Args:
        given: of the whole video of `frames` latent frames.
        anchor: (1, C, 1, H, W); None: the photo stays.
    """
    channels = given[:, :, : span.stop - span.start].clone()
    if span.stop == frames:
        channels[:, :, -1] = given[:, :, -1]
    if anchor is not None:
        channels[:, -anchor.shape[1] :, :1] = anchor
    return channels
