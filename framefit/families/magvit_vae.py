"""EasyAnimate's causal VAE (Magvit), driven stage by stage: the layers are diffusers' own, and so are their memories.

`AutoencoderKLMagvit.decode` goes latent frame by latent frame, and keeps every frame until the last is there; here each
leaves when it is made. Its group norms are over a whole picture, so that no tile of one can equal it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from framefit.families.pieces import Pieces, Stage, through
from framefit.families.pixels import to_frames

__all__ = ["decoded", "encoded"]


def decoded(vae: Any, latents: torch.Tensor, pieces: Pieces) -> Iterator[torch.Tensor]:
    """Unscaled latents (1, C, F, h, w) -> chunks of frames, uint8 (f, H, W, 3) on the host."""
    decoder = vae.decoder
    layers = [_chain(decoder.conv_in, decoder.mid_block), *map(_chain, decoder.up_blocks), _end(decoder)]
    taken = vae.post_quant_conv(latents).split(1, dim=2)
    for piece in through([Stage(run=run) for run in layers], taken, one_by_one=pieces.one_by_one):
        chunk = to_frames(piece)
        del piece
        yield chunk


def encoded(vae: Any, video: Sequence[torch.Tensor], pieces: Pieces) -> torch.Tensor:
    """Frames (1, 3, 1, H, W) in [-1, 1], first the first -> latents (1, C, F, h, w): the posterior's mode."""
    encoder, step = vae.encoder, 1 if pieces.one_by_one else vae.temporal_compression_ratio

    def taken() -> Iterator[torch.Tensor]:
        yield video[0]
        for start in range(1, len(video), step):
            yield torch.cat([*video[start : start + step]], dim=2)

    stages = [
        Stage(run=_chain(encoder.conv_in)),
        *(Stage(run=_chain(block), takes=block.temporal_downsample_factor) for block in encoder.down_blocks),
        Stage(run=_chain(encoder.mid_block)),
        Stage(run=_end(encoder)),
    ]
    out = torch.cat(list(through(stages, taken(), one_by_one=pieces.one_by_one)), dim=2)
    mean: torch.Tensor = vae.quant_conv(out).chunk(2, dim=1)[0]
    return mean


def _chain(*layers: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Layers whose memories are this way's own: they are theirs only while they compute."""
    cells: list[Any] = [each for layer in layers for each in layer.modules() if hasattr(each, "prev_features")]
    memory: dict[Any, torch.Tensor | None] = {}

    def run(x: torch.Tensor) -> torch.Tensor:
        for cell in cells:
            cell.prev_features = memory.pop(cell, None)
        try:
            for layer in layers:
                x = layer(x)
            return x
        finally:
            for cell in cells:
                memory[cell], cell.prev_features = cell.prev_features, None

    return run


def _end(part: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The last layers of the encoder or decoder."""
    convolution = _chain(part.conv_out)

    def run(x: torch.Tensor) -> torch.Tensor:
        if part.spatial_group_norm:  # frame by frame
            x = part.conv_norm_out(x.permute(0, 2, 1, 3, 4).flatten(0, 1))
            x = x.unsqueeze(0).permute(0, 2, 1, 3, 4)
        else:
            x = part.conv_norm_out(x)
        return convolution(part.conv_act(x))

    return run
