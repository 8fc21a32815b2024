"""Clips of known motion: photos and drawn scenes, seen by a moving camera; objects that move before a still background.

Everything is drawn on the device, many clips at once: a frame is the scene sampled on a grid that the motion places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from training.motion import FIELDS, Motion

__all__ = ["Scenes", "draw_scenes", "load", "render"]

SIDE = 896
"""Side of the square canvas that a scene lies in, px."""
CUTOUT_SIDE = 256
NIGHT = (1.08, 1.03, 0.86)
"""Exponents of the gain for red, green, blue: what darkens turns blue."""
MOST_SHRUNK = 3.0
"""px of the scene per px of the frame"""
MARGIN = 5
"""Samples beyond each side of a frame, for the filter that halves it"""
RADIANS = math.pi / 180


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenes:
    """What clips are made of, on one device."""

    canvases: Tensor
    """uint8 (N, 3, SIDE, SIDE); a scene lies in the upper left corner"""
    sizes: Tensor
    """(N, 2): width and height of the scene, px"""
    cutouts: Tensor
    """uint8 (M, 4, CUTOUT_SIDE, CUTOUT_SIDE): red, green, blue, opacity; what moves before a scene"""

    def subset(self, chosen: Tensor) -> Scenes:
        return Scenes(canvases=self.canvases[chosen], sizes=self.sizes[chosen], cutouts=self.cutouts)


def load(folder: Path, device: torch.device, *, drawn: int, seed: int) -> Scenes:
    """The photos (*.jpg) of `folder`, with `drawn` procedural scenes after them and as many cut-outs."""
    photos = [_canvas(file) for file in sorted(folder.glob("*.jpg"))]
    if not photos:
        raise FileNotFoundError(f"{folder} holds no photos: run python -m training.photos first.")
    generator = torch.Generator(device).manual_seed(seed)
    canvases = torch.stack([canvas for canvas, _ in photos]).to(device)
    sizes = torch.tensor([size for _, size in photos], dtype=torch.float32, device=device)
    procedural = draw_scenes(drawn, device, generator)
    cutouts = [_cutout(canvases[i % len(canvases)], generator) for i in range(drawn)]
    return Scenes(
        canvases=torch.cat([canvases, procedural]),
        sizes=torch.cat([sizes, torch.full((drawn, 2), float(SIDE), device=device)]),
        cutouts=torch.stack(cutouts) if cutouts else canvases.new_zeros(0, 4, CUTOUT_SIDE, CUTOUT_SIDE),
    )


def render(
    scenes: Scenes,
    motions: Sequence[Motion],
    width: int,
    height: int,
    num_frames: int,
    generator: torch.Generator,
    *,
    recolour: bool = True,
) -> Tensor:
    """(B, 3, F, H, W) in [-1, 1]: one clip a motion, each of a scene, a view and a flip drawn by `generator`.

    Raises:
        ValueError: an object shall move, and `scenes` holds no cut-outs.
    """
    device, batch = scenes.canvases.device, len(motions)
    rates = torch.tensor([m.values() for m in motions], device=device)
    rate = dict(zip(FIELDS, rates.T, strict=True))
    chosen = torch.randint(len(scenes.canvases), (batch,), generator=generator, device=device)
    where = _camera(rate, width, height, num_frames)
    grid = _place(where, scenes.sizes[chosen], generator)
    clips = _sample(scenes.canvases[chosen], grid, SIDE, outside="border")
    if recolour:
        clips = _recoloured(clips, generator)
    moving = ((rate["object_x"] != 0) | (rate["object_y"] != 0)).nonzero().flatten()
    if len(moving):
        if not len(scenes.cutouts):
            raise ValueError("an object shall move, and the scenes hold no cut-outs: load them with drawn > 0.")
        shift = torch.stack([rate["object_x"], rate["object_y"]], -1)[moving]
        clips[moving] = _with_objects(clips[moving], where[moving], scenes, shift, width, height, generator)
    frame = torch.arange(num_frames, device=device)
    exponent = torch.tensor(NIGHT, device=device).view(1, 3, 1) * (rate["light"].view(-1, 1, 1) * frame)
    lit: Tensor = clips * exponent.exp()[..., None, None]
    return lit.clamp(0, 1) * 2 - 1


def draw_scenes(count: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """uint8 (count, 3, SIDE, SIDE): clouds of colour with discs, bars and stripes on them."""
    scenes = [_drawn(device, generator) for _ in range(count)]
    return torch.stack(scenes) if scenes else torch.zeros(0, 3, SIDE, SIDE, dtype=torch.uint8, device=device)


def _canvas(file: Path) -> tuple[Tensor, tuple[int, int]]:
    picture = Image.open(file).convert("RGB")
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    # the border repeats, so that sampling at the very edge never meets black
    pad = (0, SIDE - picture.width, 0, SIDE - picture.height)
    return functional.pad(pixels[None].float(), pad, mode="replicate")[0].byte(), picture.size


def _cutout(canvas: Tensor, generator: torch.Generator) -> Tensor:
    """A piece of a photo in other colours, with a wavy outline: something that can pass before a scene."""

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=canvas.device)

    x, y = (int(draw(1) * (side - CUTOUT_SIDE)) for side in (600, 400))
    colour = canvas[:, y : y + CUTOUT_SIDE, x : x + CUTOUT_SIDE] / 255
    colour = (colour[torch.randperm(3, generator=generator, device=canvas.device)] - 0.5) * 0.8 + draw(3, 1, 1)
    line = torch.linspace(-1, 1, CUTOUT_SIDE, device=canvas.device)
    v, u = torch.meshgrid(line, line, indexing="ij")
    waves = torch.arange(2, 6, device=canvas.device).view(-1, 1, 1)
    angle = torch.atan2(v, u) * waves + draw(4, 1, 1) * 2 * math.pi
    outline = 0.7 * (1 + (0.5 * draw(4, 1, 1) / waves * torch.sin(angle)).sum(0))
    opacity = torch.sigmoid((outline - (u**2 + v**2).sqrt()) * 60)
    return (torch.cat([colour, opacity[None]]).clamp(0, 1) * 255).byte()


def _camera(rate: dict[str, Tensor], width: int, height: int, num_frames: int) -> Tensor:
    """(B, F, 2H + 10, 2W + 10, 2): where points of a frame lie in the first frame, px from its centre.

    Twice as fine as the frame, or fine texture would flicker, and with the margin that `_halved` takes off.
    """
    device = rate["zoom"].device
    x, y = ((torch.arange(-MARGIN, 2 * side + MARGIN, device=device) + 0.5) / 2 - side / 2 for side in (width, height))
    frame = torch.arange(num_frames, device=device)
    angle, shrink = rate["roll"][:, None] * frame * RADIANS, torch.exp(-rate["zoom"][:, None] * frame)
    cos, sin = ((f(angle) * shrink)[..., None, None] for f in (torch.cos, torch.sin))
    dx, dy = ((rate[name][:, None] * frame)[..., None, None] for name in ("pan_x", "pan_y"))
    x, y = x.view(1, 1, 1, -1), y.view(1, 1, -1, 1)
    return torch.stack([cos * x - sin * y + dx, sin * x + cos * y + dy], dim=-1)


def _place(where: Tensor, sizes: Tensor, generator: torch.Generator) -> Tensor:
    """The camera's points in px of the scene: as large a view as the scene has room for, down to half of it."""
    low, high = where.amin((1, 2, 3)), where.amax((1, 2, 3))
    room = (sizes / (high - low)).amin(1)
    scale = room * 2 ** -torch.rand(room.shape, generator=generator, device=room.device)
    # never enlarged while there is room, and never shrunk so much that two samples a side are too few
    scale = scale.clamp(1.0, MOST_SHRUNK).minimum(room)
    free = sizes - (high - low) * scale[:, None]
    origin = torch.rand(free.shape, generator=generator, device=free.device) * free - low * scale[:, None]
    points = where * scale.view(-1, 1, 1, 1, 1) + origin.view(-1, 1, 1, 1, 2)
    mirrored = torch.rand(room.shape, generator=generator, device=room.device) < 0.5
    points[mirrored, ..., 0] = sizes[mirrored, 0].view(-1, 1, 1, 1) - points[mirrored, ..., 0]
    return points


def _sample(pictures: Tensor, points: Tensor, side: int, *, outside: str) -> Tensor:
    """uint8 (B, C, side, side) at points (B, F, 2H + 10, 2W + 10, 2) in px -> (B, C, F, H, W) in [0, 1].

    As sharp as a photo that Pillow shrinks with Lanczos's filter, which is what a run gives to the model.
    `outside` is grid_sample's padding, which begins half a pixel before the picture's edge.
    """
    batch, frames, height, width, _ = points.shape
    grid = (points / side * 2 - 1).view(batch, frames * height, width, 2)
    values = functional.grid_sample(
        pictures.float() / 255, grid, mode="bicubic", padding_mode=outside, align_corners=False
    )
    fine = values.view(batch, -1, frames, height, width).transpose(1, 2).flatten(0, 1)
    halved = _halved(fine)
    return halved.view(batch, frames, *halved.shape[1:]).transpose(1, 2).clamp(0, 1)


def _halved(pictures: Tensor) -> Tensor:
    """(N, C, 2H + 10, 2W + 10) -> (N, C, H, W): Lanczos's filter of three lobes."""
    channels = pictures.shape[1]
    x = (torch.arange(2 * MARGIN + 2, device=pictures.device) - MARGIN - 0.5) / 2
    taps = torch.sinc(x) * torch.sinc(x / 3)
    kernel = (taps / taps.sum()).expand(channels, 1, 1, -1)
    rows = functional.conv2d(pictures, kernel, stride=(1, 2), groups=channels)
    return functional.conv2d(rows, kernel.transpose(2, 3), stride=(2, 1), groups=channels)


def _recoloured(clips: Tensor, generator: torch.Generator) -> Tensor:
    """Other tones for every clip and, for a quarter of them, other colours: few photos become many."""
    tone = torch.rand(len(clips), 4, generator=generator, device=clips.device) - 0.5
    tone = 2 ** (0.6 * tone[:, :1] + 0.2 * tone[:, 1:])
    order = torch.rand(len(clips), 3, generator=generator, device=clips.device).argsort(1)
    as_is = torch.rand(len(clips), 1, generator=generator, device=clips.device) < 0.75
    order = torch.where(as_is, torch.arange(3, device=clips.device), order)
    clips = clips.gather(1, order.view(-1, 3, 1, 1, 1).expand_as(clips))
    return clips.clamp(min=1e-4) ** tone.view(-1, 3, 1, 1, 1)


def _with_objects(
    clips: Tensor, where: Tensor, scenes: Scenes, shift: Tensor, width: int, height: int, generator: torch.Generator
) -> Tensor:
    """A cut-out on each clip, `shift` px a frame through a scene that stands still."""
    device, batch = clips.device, len(clips)

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, *shape, generator=generator, device=device)

    chosen = torch.randint(len(scenes.cutouts), (batch,), generator=generator, device=device)
    size = draw(0.35, 0.7) * min(width, height)
    start = draw(-0.3, 0.3, 2) * torch.tensor([width, height], device=device)
    frame = torch.arange(where.shape[1], device=device).view(1, -1, 1)
    centre = start[:, None] + shift[:, None] * frame
    points = (where - centre[:, :, None, None]) / size.view(-1, 1, 1, 1, 1) * CUTOUT_SIDE + CUTOUT_SIDE / 2
    objects = _sample(scenes.cutouts[chosen], points, CUTOUT_SIDE, outside="zeros")
    opacity = objects[:, 3:]
    return clips * (1 - opacity) + objects[:, :3] * opacity


def _drawn(device: torch.device, generator: torch.Generator) -> Tensor:
    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    scene = sum(
        functional.interpolate(draw(1, 3, cells, cells) - 0.5, (SIDE, SIDE), mode="bicubic")[0] / cells**0.5
        for cells in (2, 4, 8, 16, 32, 64)
    )
    scene = 0.5 + 0.6 * torch.as_tensor(scene)
    y, x = torch.meshgrid(torch.arange(SIDE, device=device), torch.arange(SIDE, device=device), indexing="ij")
    for _ in range(24):
        colour, centre, angle = draw(3, 1, 1), draw(2) * SIDE, draw(1) * math.pi
        radius = 20 + 120 * draw(2)
        u = (x - centre[0]) * angle.cos() + (y - centre[1]) * angle.sin()
        v = (y - centre[1]) * angle.cos() - (x - centre[0]) * angle.sin()
        disc = ((u / radius[0]) ** 2 + (v / radius[1]) ** 2).sqrt() - 1
        bar = torch.maximum((u / radius[0]).abs(), (v / radius[1]).abs()) - 1
        inside = torch.sigmoid(-(disc if draw(1) < 0.5 else bar) * radius.min())
        stripes = 0.8 + 0.2 * torch.sign(torch.sin(u * (0.1 + 0.3 * draw(1)))) if draw(1) < 0.4 else 1.0
        scene = scene * (1 - inside) + colour * stripes * inside
    return (scene.clamp(0, 1) * 255).byte()
