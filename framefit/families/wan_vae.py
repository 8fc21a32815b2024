"""Wan's causal VAEs, 2.1 and 2.2, driven stage by stage: the layers are diffusers' own, and so are their memories.

`AutoencoderKLWan.decode` goes latent frame by latent frame, and keeps every frame until the last is there; here each
leaves when it is made. Only the middle, at the size of the latents, looks over a whole picture: all norms are per
pixel. So whatever else there is can be done in tiles, with the halo that its convolutions need, and equal the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import DupUp3D, WanCausalConv3d, WanResample, WanResidualBlock
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify as patchified
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify as unpatchified
from torch import nn

from framefit.families.fading import REACH, narrowed
from framefit.families.pieces import Frame, Pieces, Stage, Tile, painted, side_by_side, stages_of, through
from framefit.families.pixels import to_frames
from framefit.families.shelved import Stretch, gathered, shelved

__all__ = ["decoded", "encoded"]

KEPT = 2
"""Frames that a convolution over three remembers."""
TAKEN = 2
"""Frames that a layer takes at once where memories lie in RAM; as many as one needs that makes one of two."""

TOGETHER = 2
"""Latent frames that go through tiles together where memories lie in RAM: they travel once for all of them."""

Run = Callable[[torch.Tensor], torch.Tensor]

Row = tuple[Stage, tuple[nn.Module, ...]]
"""A stage and its layers."""


def decoded(vae: Any, latents: torch.Tensor, pieces: Pieces) -> Iterator[torch.Tensor]:
    """Denormalised latents (1, C, F, h, w) -> chunks of frames, uint8 (f, H, W, 3) on the host."""

    def frames(made: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        for piece in made:
            chunk = to_frames(unpatchified(piece, vae.config.patch_size or 1))
            del piece
            yield chunk

    stride = vae.config.scale_factor_spatial
    tiles = pieces.tiles(latents.shape[3], latents.shape[4], stride)
    latents = vae.post_quant_conv(latents)
    if pieces.shelf:
        groups = torch.split_with_sizes(latents, _groups(latents.shape[2], tiles), dim=2)
        yield from frames(shelved(_up_by_layer(vae.decoder, tiles), groups, len(groups), pieces))
        return
    taken = torch.split(latents, 1, dim=2)
    middle = _chain(_convolution(vae.decoder.conv_in), _block(vae.decoder.mid_block))
    coming = map(middle, taken)
    features = list(pieces.made(coming, len(taken), 1)) if tiles else coming  # every tile begins from these

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
    one_by_one = pieces.one_by_one or bool(tiles and not pieces.shelf)  # halos are widest where pictures are largest

    each = config.scale_factor_temporal
    count = 1 + (len(video) - 1) // each

    def taken(groups: Sequence[int]) -> Iterator[torch.Tensor]:
        coming = iter(video)
        for frames in (1, *(each * latents for latents in groups[1:])):
            for together in [1] * frames if one_by_one else [frames]:
                yield patchified(torch.cat([*islice(coming, together)], dim=2), patch)

    def features(tile: Tile | None) -> Iterator[torch.Tensor]:
        return pieces.made(through(_down(vae.encoder), taken([1] * count), tile, one_by_one=one_by_one), count, 1)

    if pieces.shelf:
        groups = _groups(count, tiles)
        made = shelved(_down_by_layer(vae.encoder, tiles), taken(groups), len(groups), pieces)
    else:
        shrunk = side_by_side(pieces.each(tiles), features, 1) if tiles else features(None)
        middle = _chain(_block(vae.encoder.mid_block), _end(vae.encoder))
        made = pieces.made(map(middle, shrunk), count, 1)
    mean: torch.Tensor = vae.quant_conv(gathered(made, count)).chunk(2, dim=1)[0]
    return mean


def _groups(count: int, tiles: Sequence[Tile]) -> list[int]:
    """Latent frames that are together on the way of memories: the first alone, an odd one before all others."""
    size = TOGETHER if tiles else 1
    odd = (count - 1) % size
    return [1, *[odd] * bool(odd), *[size] * ((count - 1) // size)]


def _up(decoder: Any) -> list[Stage]:
    """From the middle to frames."""
    rows = [(Stage(run=_block(block, starts=True)), (block,)) for block in decoder.up_blocks]
    return _measured([*rows, (Stage(run=_end(decoder)), (decoder.conv_out,))], _growth(decoder.up_blocks))


def _near_up(decoder: Any) -> list[Stage]:
    """The same with less of a halo, and with what tiles fade over."""
    stages = _up(decoder)
    last = stages[-1].scale
    return [replace(each, halo=narrowed(each.halo, each.scale / last)) for each in stages]


def _down(encoder: Any) -> list[Stage]:
    """From frames to the middle."""
    groups: list[list[nn.Module]] = [[]]
    for layer in encoder.down_blocks:
        groups[-1].append(layer)
        if _resamples(layer):
            groups.append([])
    rows: list[Row] = []
    for group in groups:
        first = [] if rows else [encoder.conv_in]
        run = _chain(*map(_convolution, first), *map(_block, group))
        rows.append((Stage(run=run, takes=_takes(_resamples(*group))), (*first, *group)))
    return _measured(rows, 1)


def _measured(rows: Sequence[Row], scale: int) -> list[Stage]:
    """The stages with their scales, and with the halo that each and those behind it need.

    Halos are even where a stage halves, so that every tile halves as the whole does.

    Args:
        scale: of what comes out.
    """
    halo, stages = 0, [Stage(run=lambda x: x, scale=scale)]
    for stage, layers in reversed(rows):
        sampler = _resamples(*layers)
        grows = sampler is not None and sampler.mode.startswith("up")
        if grows:
            scale, halo = scale // 2, -(-(halo + 1) // 2)
        elif sampler:
            scale, halo = scale * 2, 2 * halo + 1
        halo += _reach(*layers)
        halo += halo % 2 if sampler and not grows else 0
        stages.append(replace(stage, scale=scale, halo=halo))
    return stages[::-1]


def _up_by_layer(decoder: Any, tiles: Sequence[Tile]) -> list[Stretch]:
    """With tiles from where pictures, a quarter as high as they come out, grow."""

    def rows() -> list[Row]:
        made = [_remembering(_convolution, decoder.conv_in), *_middle(decoder.mid_block)]
        for block in decoder.up_blocks:
            layers = [_remembering(_block, layer) for layer in (*block.resnets, _resamples(block)) if layer]
            made += _around(layers, shortcut) if (shortcut := getattr(block, "avg_shortcut", None)) else layers
        return [*made, _remembering(_end, decoder, decoder.conv_out)]

    whole = rows()
    if not tiles:
        return [{None: [stage for stage, _ in whole]}]
    ups = [i for i, (_, layers) in enumerate(whole) if _resamples(*layers)]
    begin, scale = ups[-2:][0], _growth(decoder.up_blocks)
    return [
        {None: [stage for stage, _ in whole[:begin]]},
        {tile: stages_of(tile, _measured(rows()[begin:], scale)) for tile in tiles},
    ]


def _down_by_layer(encoder: Any, tiles: Sequence[Tile]) -> list[Stretch]:
    """With tiles down to a quarter; layers that have a shortcut around them are one stage."""

    def rows() -> list[Row]:
        made = [_remembering(_convolution, encoder.conv_in)]
        made += [_remembering(_block, layer) for layer in encoder.down_blocks]
        return [*made, *_middle(encoder.mid_block), _remembering(_end, encoder, encoder.conv_out)]

    whole = rows()
    if not tiles:
        return [{None: [stage for stage, _ in whole]}]
    downs = [i for i, (_, layers) in enumerate(whole) if _resamples(*layers)]
    end, scale = downs[:2][-1] + 1, 2 ** len(downs[2:])
    return [
        {tile: stages_of(tile, _measured(rows()[:end], scale)) for tile in tiles},
        {None: [stage for stage, _ in whole[end:]]},
    ]


def _middle(middle: Any) -> list[Row]:
    first, *rest = [_remembering(_block, layer) for layer in middle.resnets]
    made = [first]
    for attention, row in zip(middle.attentions, rest, strict=True):
        made += [(Stage(run=attention), (attention,)), row]
    return made


def _remembering(build: Callable[..., Run], layer: Any, looks: nn.Module | None = None) -> Row:
    memory: list[Any] = []
    return Stage(run=build(layer, memory=memory), memory=memory, takes=TAKEN), (looks or layer,)


def _around(rows: Sequence[Row], shortcut: DupUp3D) -> list[Row]:
    """With a shortcut from the input of the first to the output of the last, to which every frame brings its own."""
    first, *between, last = [stage for stage, _ in rows]
    began = False

    def begin(x: torch.Tensor) -> Frame:
        return first.run(x), x

    def go_on(run: Run, frame: Frame) -> Frame:
        return run(frame[0]), frame[1]

    def end(frame: Frame) -> torch.Tensor:
        nonlocal began
        out, told, began = last.run(frame[0]), not began, True
        return _added(shortcut, out, frame[1], first=told)

    runs: list[Callable[[Frame], Frame]] = [begin, *(partial(go_on, stage.run) for stage in between), end]
    return [(replace(stage, run=run), layers) for run, (stage, layers) in zip(runs, rows, strict=True)]


def _added(shortcut: DupUp3D, out: torch.Tensor, x: torch.Tensor, *, first: bool) -> torch.Tensor:
    """`out` and what `DupUp3D.forward` of diffusers 0.42 makes of x, pixel after pixel of those that one grows to."""
    times, size = shortcut.factor_t, shortcut.factor_s
    parts = x.view(x.shape[0], shortcut.out_channels, -1, *x.shape[2:])
    for place in range(shortcut.factor):
        frame, row, column = place // size**2, place // size % size, place % size
        begin = frame - (times - 1 if first else 0)
        if begin >= 0:
            out[:, :, begin::times, row::size, column::size].add_(parts[:, :, place // shortcut.repeats])
    return out


def _growth(blocks: Iterable[nn.Module]) -> int:
    """Pixels each way that one becomes."""
    growth: int = 2 ** sum(_resamples(block) is not None for block in blocks)
    return growth


def _takes(sampler: WanResample | None) -> int:
    """Frames that it needs at once."""
    return 2 if sampler and sampler.mode == "downsample3d" else 1


def _resamples(*layers: nn.Module) -> WanResample | None:
    return next((each for layer in layers for each in layer.modules() if isinstance(each, WanResample)), None)


def _reach(*layers: nn.Module) -> int:
    """Pixels that layers look around them: of residual blocks one for each of their two convolutions."""
    blocks = sum(isinstance(each, WanResidualBlock) for layer in layers for each in layer.modules())
    return 2 * blocks + sum(isinstance(layer, WanCausalConv3d) for layer in layers)


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
