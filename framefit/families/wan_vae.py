"""Wan's causal VAEs, 2.1 and 2.2, driven stage by stage: the layers are diffusers' own, and so are their memories.

`AutoencoderKLWan.decode` goes latent frame by latent frame, and keeps every frame until the last is there; here each
leaves when it is made. Only the middle, at the size of the latents, looks over a whole picture: all norms are per
pixel. So whatever else there is can be done in tiles, with the halo that its convolutions need, and equal the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample, WanResidualBlock
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify as patchified
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify as unpatchified
from torch import nn

from framefit.families.fading import REACH, narrowed
from framefit.families.pieces import Pieces, Stage, Tile, painted, shelved, through
from framefit.families.pixels import to_frames

__all__ = ["decoded", "encoded"]

KEPT = 2
"""Frames that a convolution over three remembers."""

Run = Callable[[torch.Tensor], torch.Tensor]


def decoded(vae: Any, latents: torch.Tensor, pieces: Pieces) -> Iterator[torch.Tensor]:
    """Denormalised latents (1, C, F, h, w) -> chunks of frames, uint8 (f, H, W, 3) on the host."""

    def frames(made: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        for piece in made:
            chunk = to_frames(unpatchified(piece, vae.config.patch_size or 1))
            del piece
            yield chunk

    taken = vae.post_quant_conv(latents).split(1, dim=2)
    if pieces.shelf:
        yield from frames(shelved(list(_small_up(vae.decoder)), taken, len(taken), pieces.shelf()))
        return
    stride = vae.config.scale_factor_spatial
    tiles = pieces.tiles(latents.shape[3], latents.shape[4], stride)
    middle = _chain(_convolution(vae.decoder.conv_in), _block(vae.decoder.mid_block))
    features: Iterable[torch.Tensor] = map(middle, taken)
    if tiles:  # every one of them begins from these
        features = list(pieces.made(map(middle, taken), len(taken), 1))

    stages, reach = _up, 0
    if pieces.blend:
        stages, reach = _near_up, REACH * (vae.config.patch_size or 1)

    def of(tile: Tile | None) -> Iterator[torch.Tensor]:
        made = through(stages(vae.decoder), features, tile, one_by_one=pieces.one_by_one)
        each = vae.config.scale_factor_temporal if pieces.one_by_one else 1
        return frames(pieces.made(made, len(taken), each))

    num_frames = (latents.shape[2] - 1) * vae.config.scale_factor_temporal + 1
    yield from painted(tiles, pieces, of, stride, num_frames, reach) if tiles else of(None)


def encoded(vae: Any, video: Sequence[torch.Tensor], pieces: Pieces) -> torch.Tensor:
    """Frames (1, 3, 1, H, W) in [-1, 1], first the first -> latents (1, C, F, h, w): the posterior's mode."""
    config = vae.config
    patch, stride = config.patch_size or 1, config.scale_factor_spatial
    tiles = pieces.tiles(video[0].shape[3] // stride, video[0].shape[4] // stride, stride)
    one_by_one = pieces.one_by_one or bool(tiles)  # halos are widest where pictures are largest

    def taken() -> Iterator[torch.Tensor]:
        step = 1 if one_by_one else config.scale_factor_temporal
        yield patchified(video[0], patch)
        for start in range(1, len(video), step):
            yield patchified(torch.cat([*video[start : start + step]], dim=2), patch)

    count = 1 + (len(video) - 1) // config.scale_factor_temporal

    def features(tile: Tile | None) -> Iterator[torch.Tensor]:
        return pieces.made(through(_down(vae.encoder), taken(), tile, one_by_one=one_by_one), count, 1)

    if pieces.shelf:
        out = torch.cat(list(shelved(list(_small_down(vae.encoder)), taken(), count, pieces.shelf())), dim=2)
    else:
        shrunk = _joined(tiles, pieces, features) if tiles else features(None)
        middle = _chain(_block(vae.encoder.mid_block), _end(vae.encoder))
        out = torch.cat(list(pieces.made((middle(feature) for feature in shrunk), count, 1)), dim=2)
    mean: torch.Tensor = vae.quant_conv(out).chunk(2, dim=1)[0]
    return mean


def _joined(
    tiles: Sequence[Tile], pieces: Pieces, features: Callable[[Tile], Iterator[torch.Tensor]]
) -> list[torch.Tensor]:
    """The features of all tiles side by side, latent frame by latent frame."""
    whole: list[torch.Tensor] = []
    for tile in pieces.each(tiles):
        for index, feature in enumerate(features(tile)):
            if index == len(whole):
                size = (tile.rows.whole, tile.columns.whole)
                whole.append(feature.new_empty(*feature.shape[:3], *size))
            tile.cut(whole[index], 1).copy_(feature)
    return whole


def _up(decoder: Any) -> list[Stage]:
    """From the middle to frames, with the halo that each stage and those behind it need."""
    blocks = list(decoder.up_blocks)
    growths = [2 if _resamples(block) else 1 for block in blocks]
    scale = 1
    for growth in growths:
        scale *= growth
    halo = 1  # of the last convolution
    stages = [
        Stage(run=lambda x: x, scale=scale),
        Stage(run=_end(decoder), scale=scale, halo=halo),
    ]
    for block, growth in zip(reversed(blocks), reversed(growths), strict=True):
        scale //= growth
        halo = (halo if growth == 1 else -(-(halo + 1) // 2)) + _reach(block)
        stages.append(Stage(run=_block(block, starts=True), scale=scale, halo=halo))
    return stages[::-1]


def _near_up(decoder: Any) -> list[Stage]:
    """The same with less of a halo, and with what tiles fade over."""
    stages = _up(decoder)
    last = stages[-1].scale
    return [replace(each, halo=narrowed(each.halo, each.scale / last)) for each in stages]


def _down(encoder: Any) -> list[Stage]:
    """From frames to the middle. Halos are even where a stage halves, so that every tile halves as the whole does."""
    groups: list[list[nn.Module]] = [[]]
    for layer in encoder.down_blocks:
        groups[-1].append(layer)
        if _resamples(layer):
            groups.append([])
    stages = [Stage(run=lambda x: x)]
    scale, halo = 1, 0
    for group in reversed(groups):
        sampler = _resamples(*group)
        scale *= 2 if sampler else 1
        halo = (2 * halo + 1 if sampler else halo) + _reach(*group) + (group is groups[0])
        halo += halo % 2 if scale > 1 else 0
        run = _chain(*map(_block, group))
        if group is groups[0]:
            run = _chain(_convolution(encoder.conv_in), run)
        takes = 2 if sampler and sampler.mode == "downsample3d" else 1
        stages.append(Stage(run=run, scale=scale, halo=halo, takes=takes))
    return stages[::-1]


def _small_up(decoder: Any) -> Iterator[Stage]:
    """The decoder layer by layer."""
    yield _remembering(_convolution, decoder.conv_in)
    yield from _small_middle(decoder.mid_block)
    for block in decoder.up_blocks:
        layers = [_remembering(_block, layer) for layer in (*block.resnets, _resamples(block)) if layer]
        if shortcut := getattr(block, "avg_shortcut", None):
            layers = _around(layers, shortcut)
        yield from layers
    yield _remembering(_end, decoder)


def _small_down(encoder: Any) -> Iterator[Stage]:
    """The encoder layer by layer; where a shortcut is around several, these together."""
    yield _remembering(_convolution, encoder.conv_in)
    for layer in encoder.down_blocks:
        sampler = _resamples(layer)
        yield _remembering(_block, layer, takes=2 if sampler and sampler.mode == "downsample3d" else 1)
    yield from _small_middle(encoder.mid_block)
    yield _remembering(_end, encoder)


def _small_middle(middle: Any) -> Iterator[Stage]:
    first, *rest = [_remembering(_block, layer) for layer in middle.resnets]
    yield first
    for attention, stage in zip(middle.attentions, rest, strict=True):
        yield Stage(run=attention)
        yield stage


def _remembering(build: Callable[..., Run], layer: nn.Module, takes: int = 1) -> Stage:
    memory: list[Any] = []
    return Stage(run=build(layer, memory=memory), memory=memory, takes=takes)


def _around(stages: Sequence[Stage], shortcut: nn.Module) -> list[Stage]:
    """Stages with a shortcut from the input of the first to the output of the last, where frames wait until then."""
    waiting: list[torch.Tensor] = []
    first, last, began = stages[0], stages[-1], False

    def begin(x: torch.Tensor) -> torch.Tensor:
        waiting.append(x)
        return first.run(x)

    def end(x: torch.Tensor) -> torch.Tensor:
        nonlocal began
        out, told, began = last.run(x), not began, True
        return out.add_(shortcut(waiting.pop(0), first_chunk=told))

    return [replace(first, run=begin), *stages[1:-1], replace(last, run=end)]


def _resamples(*layers: nn.Module) -> WanResample | None:
    return next((each for layer in layers for each in layer.modules() if isinstance(each, WanResample)), None)


def _reach(*layers: nn.Module) -> int:
    """Pixels that residual blocks look around them: a pixel for each of their two convolutions."""
    return 2 * sum(isinstance(each, WanResidualBlock) for layer in layers for each in layer.modules())


def _chain(*runs: Run) -> Run:
    def run(x: torch.Tensor) -> torch.Tensor:
        for each in runs:
            x = each(x)
        return x

    return run


def _block(block: nn.Module, *, starts: bool = False, memory: list[Any] | None = None) -> Run:
    """With a memory of its own. `starts`: it is to be told of the first frame."""
    memory = [] if memory is None else memory
    memory += [None] * sum(isinstance(each, WanCausalConv3d) for each in block.modules())
    first = starts

    def run(x: torch.Tensor) -> torch.Tensor:
        nonlocal first
        told, first = {"first_chunk": first} if starts else {}, False
        out: torch.Tensor = block(x, feat_cache=memory, feat_idx=[0], **told)
        return out

    return run


def _convolution(convolution: nn.Module, *, memory: list[Any] | None = None) -> Run:
    """Over three frames, with a memory of its own."""
    memory = [] if memory is None else memory
    memory.append(None)

    def run(x: torch.Tensor) -> torch.Tensor:
        before, past = memory[0], x[:, :, -KEPT:].clone()
        if before is not None and past.shape[2] < KEPT:
            past = torch.cat([before[:, :, -1:], past], dim=2)
        memory[0] = past
        out: torch.Tensor = convolution(x, before)
        return out

    return run


def _end(part: Any, *, memory: list[Any] | None = None) -> Run:
    """The last layers of the encoder or decoder."""
    convolution = _convolution(part.conv_out, memory=memory)

    def run(x: torch.Tensor) -> torch.Tensor:
        return convolution(part.nonlinearity(part.norm_out(x)))

    return run
