"""EasyAnimate's causal VAE (Magvit), driven stage by stage: the layers are diffusers' own, and so are their memories.

`AutoencoderKLMagvit.decode` goes latent frame by latent frame, and keeps every frame until the last is there; here each
leaves when it is made. Its group norms are over a whole picture, so that no tile of one can equal it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_magvit import EasyAnimateUpsampler3D
from torch import nn

from framefit.families.pieces import Pieces, Stage, through
from framefit.families.pixels import to_frames
from framefit.families.shelved import gathered, shelved

__all__ = ["SEEN", "decoded", "encoded"]

Run = Callable[[torch.Tensor], torch.Tensor]

SEEN = True
"""What an upsampler remembers: that there was a frame."""


def decoded(vae: Any, latents: torch.Tensor, pieces: Pieces) -> Iterator[torch.Tensor]:
    """Unscaled latents (1, C, F, h, w) -> chunks of frames, uint8 (f, H, W, 3) on the host."""
    decoder = vae.decoder
    taken = vae.post_quant_conv(latents).split(1, dim=2)
    if pieces.shelf:
        small = [decoder.conv_in, *decoder.mid_block.convs]
        small += [layer for block in decoder.up_blocks for layer in (*block.convs, block.upsampler) if layer]
        made = shelved([{None: [*map(_stage, small), _end(decoder)]}], taken, len(taken), pieces)
    else:
        stages = [_stage(decoder.conv_in, decoder.mid_block), *map(_stage, decoder.up_blocks), _end(decoder)]
        each = vae.temporal_compression_ratio if pieces.one_by_one else 1
        made = pieces.made(through(stages, taken, one_by_one=pieces.one_by_one), len(taken), each)
    for piece in made:
        chunk = to_frames(piece)
        del piece
        yield chunk


def encoded(vae: Any, video: Sequence[torch.Tensor], pieces: Pieces) -> torch.Tensor:
    """Frames (1, 3, 1, H, W) in [-1, 1], first the first -> latents (1, C, F, h, w): the posterior's mode."""
    encoder, most = vae.encoder, vae.temporal_compression_ratio
    step, count = 1 if pieces.one_by_one else most, 1 + (len(video) - 1) // most

    def taken() -> Iterator[torch.Tensor]:
        yield video[0]
        for start in range(1, len(video), step):
            yield torch.cat([*video[start : start + step]], dim=2)

    if pieces.shelf:
        stages = [_stage(encoder.conv_in), *_small(encoder), _end(encoder)]
        made = shelved([{None: stages}], taken(), count, pieces)
    else:
        downs = [_stage(block, takes=block.temporal_downsample_factor) for block in encoder.down_blocks]
        stages = [_stage(encoder.conv_in), *downs, _stage(encoder.mid_block), _end(encoder)]
        made = pieces.made(through(stages, taken(), one_by_one=pieces.one_by_one), count, 1)
    mean: torch.Tensor = vae.quant_conv(gathered(made, count)).chunk(2, dim=1)[0]
    return mean


def _small(encoder: Any) -> Iterator[Stage]:
    """The layers of the blocks, each by itself."""
    for block in encoder.down_blocks:
        yield from map(_stage, block.convs)
        if block.downsampler:
            yield _stage(block.downsampler, takes=block.temporal_downsample_factor)
    yield from map(_stage, encoder.mid_block.convs)


def _stage(*layers: Run, takes: int = 1) -> Stage:
    """Layers whose memories are this way's own: they are theirs only while they compute."""
    modules = [layer for layer in layers if isinstance(layer, nn.Module)]
    cells: list[Any] = [each for layer in modules for each in layer.modules() if hasattr(each, "prev_features")]
    memory: list[Any] = [None] * len(cells)

    def run(x: torch.Tensor) -> torch.Tensor:
        for index, cell in enumerate(cells):
            cell.prev_features, memory[index] = memory[index], None
        try:
            for layer in layers:
                x = layer(x)
            return x
        finally:
            for index, cell in enumerate(cells):
                kept, cell.prev_features = cell.prev_features, None
                if isinstance(cell, EasyAnimateUpsampler3D) and kept is not None:
                    kept = SEEN  # it asks whether there is something, and would keep a whole frame for that
                memory[index] = kept

    return Stage(run=run, takes=takes, memory=memory)


def _end(part: Any) -> Stage:
    """The last layers of the encoder or decoder."""

    def normed(x: torch.Tensor) -> torch.Tensor:
        if part.spatial_group_norm:  # frame by frame
            x = part.conv_norm_out(x.permute(0, 2, 1, 3, 4).flatten(0, 1))
            return x.unsqueeze(0).permute(0, 2, 1, 3, 4)
        out: torch.Tensor = part.conv_norm_out(x)
        return out

    return _stage(normed, part.conv_act, part.conv_out)
