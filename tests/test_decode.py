"""A video through the VAE in pieces is the video that diffusers' own VAE makes whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry
from diffusers.models.autoencoders.autoencoder_kl_magvit import EasyAnimateResidualBlock3D
from test_dryrun import legal, plan_of

from framefit.errors import Cancelled, UsageError
from framefit.families import CHECKPOINTS, Checkpoint, magvit_vae, wan_vae
from framefit.families.parts import Parts
from framefit.families.pieces import Pieces, Span, Stage, through
from framefit.families.pixels import blank, placed
from framefit.ledger.shelf import Shelf
from framefit.ledger.transfer import Piece, Room, Transfer
from framefit.passes import decode, strips
from framefit.passes import frames as by_frames
from framefit.pipeline import Pipeline
from framefit.plan import Decode, Plan
from framefit.planning import alike, dryrun
from framefit.testing import random_parts, randomise, tiny_row

WAN, WAN_5B, EASYANIMATE = "wan2.2-i2v-a14b", "wan2.2-ti2v-5b", "easyanimate-v5.1-7b-inp"
HEIGHT, WIDTH = 11, 19
"""Latent pixels."""


@pytest.fixture(scope="module")
def vaes() -> dict[str, Parts]:
    """Tiny ones of which every parameter is random, untouched."""
    made = {}
    for id in (WAN, WAN_5B, EASYANIMATE):
        made[id] = random_parts(tiny_row(id), dtype=torch.float32, device=torch.device("cpu"))
        randomise(made[id]["vae"], torch.Generator().manual_seed(0))
    return made


@pytest.fixture(autouse=True)
def in_float(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the VAE makes, before it is rounded to 255 levels, and without gradients."""
    for module in (wan_vae, magvit_vae):
        monkeypatch.setattr(module, "to_frames", lambda video: video[0].permute(1, 2, 3, 0).clone())
    with torch.no_grad():
        yield


def given(parts: Parts, seed: int = 1, frames: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents, and a video of noise."""
    generator = torch.Generator().manual_seed(seed)
    vae = parts["vae"]
    channels, stride = getattr(vae.config, "z_dim", 16), vae.spatial_compression_ratio
    latents = torch.randn(1, channels, frames, HEIGHT, WIDTH, generator=generator)
    video = torch.randn(1, 3, 4 * frames - 3, HEIGHT * stride, WIDTH * stride, generator=generator).clamp(-1, 1)
    return latents, video


def divided(parts: Parts, value: str) -> Parts:
    """The same VAE with the pass applied; its hooks are left in place, and gone with `undivided`."""
    parts = replace(parts, pieces=Pieces())
    decode.apply(parts, Decode(value=value))
    return parts


@pytest.fixture(autouse=True)
def undivided(vaes: dict[str, Parts]) -> Iterator[None]:
    yield
    for parts in vaes.values():
        decode.remove(parts)


def ours(parts: Parts, latents: torch.Tensor) -> torch.Tensor:
    """(F, H, W, 3)."""
    way = magvit_vae if parts.checkpoint.id == EASYANIMATE else wan_vae
    return torch.cat([chunk.clone() for chunk in way.decoded(parts["vae"], latents, parts.pieces)])


def reference(parts: Parts, latents: torch.Tensor) -> torch.Tensor:
    whole: torch.Tensor = parts["vae"].decode(latents, return_dict=False)[0]
    return whole[0].permute(1, 2, 3, 0)


def encoded(parts: Parts, video: torch.Tensor) -> torch.Tensor:
    way = magvit_vae if parts.checkpoint.id == EASYANIMATE else wan_vae
    return way.encoded(parts["vae"], video.split(1, dim=2), parts.pieces)


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of a few rows, and the last one of fewer."""
    monkeypatch.setattr(strips, "STRIP_BYTES", 200_000)


@pytest.mark.parametrize("value", ["whole", "frame", "ram"])
@pytest.mark.parametrize("id", [WAN, WAN_5B, EASYANIMATE])
def test_frame_after_frame_is_equal(id: str, value: str, vaes: dict[str, Parts]) -> None:
    """To the last bit where the layers are diffusers' own."""
    latents, video = given(vaes[id])
    frames, known = reference(vaes[id], latents), vaes[id]["vae"].encode(video).latent_dist.mode()
    parts = divided(vaes[id], value)
    bar = 0.0 if value == "whole" else 1e-5
    assert (ours(parts, latents) - frames).abs().max() <= bar * frames.abs().max()
    assert (encoded(parts, video) - known).abs().max() <= bar * known.abs().max()


@pytest.mark.parametrize("value", ["frame", "ram"])
def test_magvit_errs_no_more_than_its_own_layers(value: str, vaes: dict[str, Parts], in_bf16: Parts) -> None:
    latents = given(in_bf16)[0].bfloat16()
    frames = reference(vaes[EASYANIMATE], latents.float())
    own = (ours(in_bf16, latents).float() - frames).norm()
    assert (ours(divided(in_bf16, value), latents).float() - frames).norm() <= 1.1 * own


@pytest.fixture
def in_bf16(vaes: dict[str, Parts]) -> Parts:
    """EasyAnimate's, of which every parameter of the one in fp32 is one in bf16 as well."""
    parts = random_parts(tiny_row(EASYANIMATE), dtype=torch.bfloat16, device=torch.device("cpu"))
    state = {name: each.bfloat16() for name, each in vaes[EASYANIMATE]["vae"].state_dict().items()}
    parts["vae"].load_state_dict(state)
    vaes[EASYANIMATE]["vae"].load_state_dict({name: each.float() for name, each in state.items()})
    return parts


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="other kernels are channels-first")
def test_what_is_channels_last_stays_so() -> None:
    block = EasyAnimateResidualBlock3D(32, 64, norm_num_groups=8).bfloat16()
    for module, hook in list(by_frames.hooked(block)):
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, "test")
    out = block(torch.randn(1, 32, 1, 48, 40, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last_3d))
    assert out.is_contiguous(memory_format=torch.channels_last_3d)
    remembered = block.conv1.prev_features + block.conv2.prev_features
    assert [frame.shape for frame in remembered] == 2 * [(1, 1, 48, 40, 32)] + 2 * [(1, 1, 48, 40, 64)]
    assert all(frame.is_contiguous() for frame in remembered)


TILES = {WAN: (144, 88, 40), WAN_5B: (240, 128)}
"""Two tiles, few, many; the last of a side overlaps where they do not come out even."""


@pytest.mark.parametrize(("id", "px"), [(id, px) for id, sizes in TILES.items() for px in sizes])
def test_tiles_equal_the_whole(id: str, px: int, vaes: dict[str, Parts], canvas_in_float: None) -> None:
    latents, video = given(vaes[id], frames=2)
    frames, known = reference(vaes[id], latents), vaes[id]["vae"].encode(video).latent_dist.mode()
    parts = divided(vaes[id], f"tile:{px}")
    assert (ours(parts, latents) - frames).abs().max() <= 1e-5 * frames.abs().max()
    assert (encoded(parts, video) - known).abs().max() <= 1e-5 * known.abs().max()


IN_RAM = [(WAN, "ram:88"), (WAN, "ram:40"), (WAN_5B, "ram:128")]


@pytest.mark.parametrize(("id", "value"), IN_RAM)
def test_tiles_with_memories_in_ram_equal_the_whole(id: str, value: str, vaes: dict[str, Parts]) -> None:
    latents, video = given(vaes[id])
    frames, known = reference(vaes[id], latents), vaes[id]["vae"].encode(video).latent_dist.mode()
    parts = divided(vaes[id], value)
    assert (ours(parts, latents) - frames).abs().max() <= 1e-5 * frames.abs().max()
    assert (encoded(parts, video) - known).abs().max() <= 1e-5 * known.abs().max()


@pytest.mark.parametrize(("frames", "groups"), [(1, [1]), (2, [1, 1]), (4, [1, 1, 2]), (5, [1, 2, 2])])
def test_two_latent_frames_are_together_in_tiles(frames: int, groups: list[int], vaes: dict[str, Parts]) -> None:
    latents, video = given(vaes[WAN], frames=frames)
    known, encoding = reference(vaes[WAN], latents), vaes[WAN]["vae"].encode(video).latent_dist.mode()
    parts = divided(vaes[WAN], "ram:88")
    counted = list[int]()
    over = parts.pieces.over
    parts.pieces = replace(parts.pieces, over=lambda count: counted.append(count) or over(count))
    assert (ours(parts, latents) - known).abs().max() <= 1e-5 * known.abs().max()
    assert (encoded(parts, video) - encoding).abs().max() <= 1e-5 * encoding.abs().max()
    assert counted == [len(groups)] * 2
    assert wan_vae._groups(frames, [object()]) == groups
    assert wan_vae._groups(frames, []) == [1] * frames


@pytest.fixture
def canvas_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    from framefit.families import pieces

    monkeypatch.setattr(pieces.np, "uint8", np.float32)


# broken on purpose


def narrowed(stages: Callable[..., list[Stage]], which: int) -> Callable[..., list[Stage]]:
    """With a halo of one stage that is a pixel less; of one that halves pictures, four."""

    def less(*given: Any) -> list[Stage]:
        made = stages(*given)
        pixels = min(4, made[which].halo) if made[0].scale > made[-1].scale and made[which].scale > 1 else 1
        made[which] = replace(made[which], halo=made[which].halo - pixels)
        return made

    return less


@pytest.mark.parametrize("id", [WAN, WAN_5B])
@pytest.mark.parametrize("which", [-2, -3])
def test_a_halo_of_a_pixel_less_is_seen(
    id: str, which: int, vaes: dict[str, Parts], monkeypatch: pytest.MonkeyPatch, canvas_in_float: None
) -> None:
    latents, _ = given(vaes[id], frames=2)
    frames = reference(vaes[id], latents)
    parts = divided(vaes[id], f"tile:{TILES[id][1]}")
    monkeypatch.setattr(wan_vae, "_up", narrowed(wan_vae._up, which))
    assert (ours(parts, latents) - frames).abs().max() > 1e-5 * frames.abs().max()


@pytest.mark.parametrize("id", [WAN, WAN_5B])
@pytest.mark.parametrize("which", [-2, -3])
def test_an_encoder_with_less_of_a_halo_is_seen(
    id: str, which: int, vaes: dict[str, Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, video = given(vaes[id], frames=2)
    known = vaes[id]["vae"].encode(video).latent_dist.mode()
    parts = divided(vaes[id], f"tile:{TILES[id][1]}")
    monkeypatch.setattr(wan_vae, "_down", narrowed(wan_vae._down, which))
    assert (encoded(parts, video) - known).abs().max() > 1e-5 * known.abs().max()


@pytest.mark.parametrize("id", [WAN, WAN_5B])
@pytest.mark.parametrize("which", [-2, -3])
def test_a_layer_with_less_of_a_halo_is_seen(
    id: str, which: int, vaes: dict[str, Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    latents, _ = given(vaes[id], frames=2)
    frames, parts = reference(vaes[id], latents), divided(vaes[id], "ram:128")
    monkeypatch.setattr(wan_vae, "_measured", narrowed(wan_vae._measured, which))
    assert (ours(parts, latents) - frames).abs().max() > 1e-5 * frames.abs().max()


@pytest.mark.parametrize("id", [WAN, WAN_5B])
def test_an_encoders_layer_with_less_of_a_halo_is_seen(
    id: str, vaes: dict[str, Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, video = given(vaes[id], frames=2)
    known, parts = vaes[id]["vae"].encode(video).latent_dist.mode(), divided(vaes[id], f"ram:{TILES[id][-1]}")
    monkeypatch.setattr(wan_vae, "_measured", narrowed(wan_vae._measured, -2))
    assert (encoded(parts, video) - known).abs().max() > 1e-5 * known.abs().max()


def test_a_tile_with_the_memory_of_another_is_seen(vaes: dict[str, Parts]) -> None:
    latents, _ = given(vaes[WAN])
    frames, parts = reference(vaes[WAN], latents), divided(vaes[WAN], "ram:88")

    class Mixed(Shelf):
        def put(self, name: Any, tree: Any) -> None:
            before[name[0], name[2]], tree = list(tree), before.get((name[0], name[2]), tree) if name[1] else tree
            super().put(name, tree)

    before: dict[Any, Any] = {}
    parts.pieces = replace(parts.pieces, shelf=partial(Mixed, Transfer(torch.device("cpu"))))
    assert (ours(parts, latents) - frames).abs().max() > 1e-3 * frames.abs().max()


def test_a_shortcut_with_other_pixels_is_seen(vaes: dict[str, Parts], monkeypatch: pytest.MonkeyPatch) -> None:
    latents, _ = given(vaes[WAN_5B], frames=2)
    frames, parts = reference(vaes[WAN_5B], latents), divided(vaes[WAN_5B], "ram:128")
    added = wan_vae._added
    monkeypatch.setattr(
        wan_vae, "_added", lambda shortcut, out, x, first: added(shortcut, out, x.roll(1, 4), first=first)
    )
    assert (ours(parts, latents) - frames).abs().max() > 1e-3 * frames.abs().max()


def forgetful(build: Callable[..., Any]) -> Callable[..., Any]:
    """Layers that begin anew with every piece."""

    def anew(*layers: Any, **more: Any) -> Any:
        def run(x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = build(*layers, **more)(x)
            return out

        return run

    return anew


@pytest.mark.parametrize("layers", ["_block", "_convolution"])
def test_a_memory_that_is_dropped_is_seen(layers: str, vaes: dict[str, Parts], monkeypatch: pytest.MonkeyPatch) -> None:
    latents, video = given(vaes[WAN])
    known = vaes[WAN]["vae"].encode(video).latent_dist.mode()
    monkeypatch.setattr(wan_vae, layers, forgetful(getattr(wan_vae, layers)))
    out = ours(vaes[WAN], latents)
    frames = reference(vaes[WAN], latents)
    assert out.shape != frames.shape or (out - frames).abs().max() > 1e-3
    got = encoded(vaes[WAN], video) if layers == "_convolution" else known[:, :, :1]
    assert got.shape != known.shape or (got - known).abs().max() > 1e-3


def test_a_magvit_memory_that_is_dropped_is_seen(vaes: dict[str, Parts], monkeypatch: pytest.MonkeyPatch) -> None:
    latents, _ = given(vaes[EASYANIMATE])
    frames = reference(vaes[EASYANIMATE], latents)
    build = magvit_vae._stage

    def anew(*layers: Any, takes: int = 1) -> Stage:
        return Stage(run=lambda x: build(*layers).run(x), takes=takes)

    monkeypatch.setattr(magvit_vae, "_stage", anew)
    out = ours(vaes[EASYANIMATE], latents)
    assert out.shape != frames.shape


class Lost(Transfer):
    """What is sent for the second time to a piece of RAM does not arrive."""

    def send(self, tensor: torch.Tensor, piece: Piece) -> None:
        if piece.read != "sent before":
            super().send(tensor, piece)
        piece.read = "sent before"


class Late(Transfer):
    """What is recalled does not arrive."""

    def recall(self, piece: Piece, room: Room) -> None:
        room.memory.zero_()


@pytest.mark.parametrize("way", [Lost, Late])
@pytest.mark.parametrize("id", [WAN, WAN_5B, EASYANIMATE])
def test_a_memory_that_does_not_come_back_from_ram_is_seen(
    id: str, way: type[Transfer], vaes: dict[str, Parts]
) -> None:
    latents, video = given(vaes[id])
    frames, known = reference(vaes[id], latents), vaes[id]["vae"].encode(video).latent_dist.mode()
    parts = divided(vaes[id], "ram")
    parts.pieces = replace(parts.pieces, shelf=partial(Shelf, way(torch.device("cpu"))))
    assert (ours(parts, latents) - frames).abs().max() > 1e-3 * frames.abs().max()
    assert (encoded(parts, video) - known).abs().max() > 1e-3 * known.abs().max()


def test_norms_by_another_groups_moments_are_seen(vaes: dict[str, Parts], monkeypatch: pytest.MonkeyPatch) -> None:
    latents, video = given(vaes[EASYANIMATE])
    frames, known = reference(vaes[EASYANIMATE], latents), vaes[EASYANIMATE]["vae"].encode(video).latent_dist.mode()
    parts, changes = divided(vaes[EASYANIMATE], "frame"), by_frames.changes
    monkeypatch.setattr(by_frames, "changes", lambda norm, both: changes(norm, tuple(each.roll(1, 1) for each in both)))
    assert (ours(parts, latents) - frames).abs().max() > 1e-3 * frames.abs().max()
    assert (encoded(parts, video) - known).abs().max() > 1e-3 * known.abs().max()


def test_a_strip_without_its_neighbours_rows_is_seen(vaes: dict[str, Parts], monkeypatch: pytest.MonkeyPatch) -> None:
    latents, _ = given(vaes[EASYANIMATE])
    frames, parts = reference(vaes[EASYANIMATE], latents), divided(vaes[EASYANIMATE], "ram")
    by_rows = strips._by_rows

    def short(convolution: Any, take: strips.Take, *rest: Any) -> torch.Tensor:
        def last_is_lost(top: int, bottom: int) -> torch.Tensor:
            strip = take(top, bottom).clone()
            strip[..., -1, :] = 0
            return strip

        return by_rows(convolution, last_is_lost, *rest)

    monkeypatch.setattr(strips, "_by_rows", short)
    assert (ours(parts, latents) - frames).abs().max() > 1e-3 * frames.abs().max()


@pytest.mark.parametrize("id", [WAN, WAN_5B, EASYANIMATE])
def test_every_memory_travels_once_for_a_latent_frame(id: str, vaes: dict[str, Parts]) -> None:
    """And none does for a preview, or after the last."""
    parts = divided(vaes[id], "ram")
    way = Transfer(torch.device("cpu"))
    parts.pieces = replace(parts.pieces, shelf=partial(Shelf, way))
    moved = []
    for frames in (1, 3, 4, 5):
        before = way.moved_bytes, way.returned_bytes
        ours(parts, given(parts, frames=frames)[0])
        moved.append((way.moved_bytes - before[0], way.returned_bytes - before[1]))
    assert moved[0] == (0, 0)
    assert all(came == went for came, went in moved)
    assert moved[2][0] - moved[1][0] == moved[3][0] - moved[2][0] > 0


# when frames come


@pytest.mark.parametrize("id", [WAN, WAN_5B, EASYANIMATE])
def test_frames_come_before_the_last_of_the_latents_is_read(id: str, vaes: dict[str, Parts]) -> None:
    parts = vaes[id]
    latents, _ = given(parts, frames=4)
    read = []
    handle = parts["vae"].decoder.mid_block.register_forward_hook(lambda *_: read.append(1))
    way = magvit_vae if id == EASYANIMATE else wan_vae
    try:
        seen = [(len(chunk), len(read)) for chunk in way.decoded(parts["vae"], latents, parts.pieces)]
    finally:
        handle.remove()
    assert seen == [(1, 1), (4, 2), (4, 3), (4, 4)]


@pytest.mark.parametrize("id", [WAN, EASYANIMATE])
def test_two_videos_at_a_time_do_not_know_of_each_other(id: str, vaes: dict[str, Parts]) -> None:
    """A preview in the middle of a video, or a video that nobody read to its end."""
    parts = vaes[id]
    way = magvit_vae if id == EASYANIMATE else wan_vae
    one, other = given(parts, 1)[0], given(parts, 2)[0]
    expected = [ours(parts, one), ours(parts, other)]
    ways = [way.decoded(parts["vae"], latents, parts.pieces) for latents in (one, other)]
    chunks = list(zip(*ways, strict=True))
    for index in range(2):
        assert torch.equal(torch.cat([pair[index] for pair in chunks]), expected[index])
    assert all(getattr(module, "prev_features", None) is None for module in parts["vae"].modules())


@pytest.mark.parametrize(("value", "chunks"), [("whole", 2), ("frame", 3), ("tile:48", 2)])
def test_a_run_that_is_cancelled_stops_between_pieces(
    value: str, chunks: int, tiny: Any, make_plan: Callable[..., Plan], load_fp32: Callable[[Checkpoint], Parts],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.undo()
    row = tiny(WAN)
    plan = make_plan(row, steps=1, num_frames=13, settings={"decode": value})
    parts = load_fp32(row)
    Pipeline(plan, parts)
    decode.apply(parts, plan.setting(Decode))
    pipeline = Pipeline(plan, parts)
    state = pipeline.encode()
    pipeline.denoise(state)
    expected = list(Pipeline(plan, parts).decode(state))
    assert len(expected) == 13
    read = []
    handle = parts["vae"].decoder.conv_out.register_forward_hook(lambda *_: read.append(1))
    whole = len(list(pipeline.decode(state))) and len(read)
    read.clear()
    with pytest.raises(Cancelled):
        list(pipeline.decode(state, cancelled=lambda: len(read) >= chunks))
    handle.remove()
    assert len(read) <= chunks < whole
    again = list(pipeline.decode(state))
    assert all((a == b).all() for a, b in zip(again, expected, strict=True))


def test_a_preview_is_a_whole_frame(
    tiny: Any, make_plan: Callable[..., Plan], load_fp32: Callable[[Checkpoint], Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    row = tiny(WAN)
    previews = []
    for value in ("whole", "tile:48"):
        plan = make_plan(row, steps=1, settings={"decode": value})
        parts = load_fp32(row)
        decode.apply(parts, plan.setting(Decode))
        pipeline = Pipeline(plan, parts)
        pipeline.denoise(pipeline.encode(), on_step=lambda step: previews.append(step.preview()))
    assert previews[0].shape == (64, 96, 3)
    assert abs(previews[0].astype(int) - previews[1]).max() <= 1


# what is refused


@pytest.mark.parametrize(
    ("id", "value", "told"),
    [
        (EASYANIMATE, "tile:256", "norms are over whole pictures, use decode=frame or decode=ram"),
        (EASYANIMATE, "ram:256", "norms are over whole pictures, use decode=frame or decode=ram"),
        ("i2vgen-xl", "frame", "takes single frames already, use decode=whole"),
        ("i2vgen-xl", "ram", "takes single frames already, use decode=whole"),
    ],
)
def test_what_a_vae_cannot_is_refused(id: str, value: str, told: str) -> None:
    parts = random_parts(tiny_row(id), dtype=torch.float32, device=torch.device("meta"))
    with pytest.raises(UsageError, match=told):
        decode.apply(parts, Decode(value=value))


@pytest.mark.parametrize("px", [4, 152, 9999])
def test_a_tile_that_divides_nothing_is_refused(px: int, vaes: dict[str, Parts]) -> None:
    for kind in ("tile", "ram"):
        decode.remove(vaes[WAN])
        parts = divided(vaes[WAN], f"{kind}:{px}")
        told = rf"decode={kind}:{px} cannot divide frames of 152x88: use a tile of 8 to 151"
        with pytest.raises(UsageError, match=told):
            ours(parts, given(parts)[0])


@pytest.mark.parametrize("value", ["tile", "tile:", "tile:0", "ram:-5", "ram:x", "frames", "frame:2"])
def test_other_values_are_refused(value: str) -> None:
    with pytest.raises(UsageError, match="decode=frame or decode=ram or decode=ram:PX or decode=tile:PX"):
        Decode(value=value)


# tiles


@pytest.mark.parametrize("whole", [1, 2, 7, 12, 29])
def test_tiles_of_a_side_cover_it_and_are_of_one_size(whole: int) -> None:
    for most in range(1, whole + 1):
        tiles = Pieces(tile_px=8 * most).tiles(whole, 99, 8)
        spans = list(dict.fromkeys(tile.rows for tile in tiles))
        assert {pixel for s in spans for pixel in range(s.start, s.start + s.size)} == set(range(whole))
        assert all(s.size <= most for s in spans)
        for scale, halo in ((1, 0), (1, 4), (4, 3)):
            windows = [s.window(scale, halo) for s in spans]
            assert len({end - begin for begin, end in windows}) == 1
            for span, (begin, end) in zip(spans, windows, strict=True):
                assert 0 <= begin <= max(span.start * scale - halo, 0)
                assert min((span.start + span.size) * scale + halo, whole * scale) <= end <= whole * scale


def test_a_piece_is_dropped_once_it_is_read() -> None:
    import weakref

    alive: list[Any] = []

    def run(x: torch.Tensor) -> torch.Tensor:
        assert sum(each() is not None for each in alive) <= 2  # the one read and, where it is a view, its own
        out = x + 1
        alive.append(weakref.ref(out))
        return out

    stages = [Stage(run=run) for _ in range(5)]
    made = (torch.zeros(1, 1, 1, 2, 2) for _ in range(4))
    assert len(list(map(torch.sum, through(stages, made, one_by_one=False)))) == 4
    assert Span(0, 2, 4, 2).window(8, 3) == (0, 19)


# the dry run


def test_a_plan_says_what_pieces_save(photo: Path) -> None:
    row = legal(tiny_row(WAN))
    peaks = {}
    for value in ("whole", "frame", "tile:96"):
        plan = plan_of(row, photo, (320, 256, 13), precision="fp32", settings={"decode": value})
        peaks[value] = {p.name: p.peak_bytes for p in dryrun.trace(plan, row)}
    for name in ("decode", "encode_image"):
        assert peaks["frame"][name] < 0.75 * peaks["whole"][name]
        assert peaks["tile:96"][name] < 0.75 * peaks["frame"][name]


@pytest.mark.parametrize("id", [WAN, WAN_5B, EASYANIMATE])
def test_a_plan_says_what_lies_in_ram_and_what_moves(
    id: str, photo: Path, vaes: dict[str, Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = legal(tiny_row(id))
    stride = vaes[id]["vae"].spatial_compression_ratio
    size = 18 * stride, 12 * stride, 9
    usual = plan_of(row, photo, size, precision="fp32", settings={"decode": "frame"})
    *before, frame = dryrun.trace(usual, row)
    known = {phase.name.partition(":")[0]: phase.gives for phase in before}
    plan = plan_of(row, photo, size, precision="fp32", settings={"decode": "ram"})
    (said,) = dryrun.trace(plan, row, known)
    assert said.peak_bytes < (0.85 if id == EASYANIMATE else 0.95) * frame.peak_bytes  # Wan's takes two frames at once
    assert frame.shelf_bytes == frame.bytes["device_to_host"] == 0
    way = Transfer(torch.device("cpu"))
    parts = divided(vaes[id], "ram")
    parts.pieces = replace(parts.pieces, shelf=partial(Shelf, way))
    ours(parts, torch.randn(1, getattr(vaes[id]["vae"].config, "z_dim", 16), 3, 12, 18))
    assert (said.bytes["host_to_device"], said.bytes["device_to_host"]) == (way.moved_bytes, way.returned_bytes)
    assert way.moved_bytes / 2 <= said.shelf_bytes <= way.moved_bytes
    monkeypatch.setattr(alike, "calls", lambda *_: nullcontext())
    (longer,) = dryrun.trace(plan, row, known)
    assert longer.flops == said.flops
    assert longer.peak_bytes == pytest.approx(said.peak_bytes, rel=0.02)


def test_few_groups_and_tiles_stand_for_the_others(
    photo: Path, vaes: dict[str, Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what moves and lies in RAM is what does on the way of real tensors."""
    row, vae = legal(tiny_row(WAN_5B)), vaes[WAN_5B]["vae"]
    plan = plan_of(row, photo, (288, 192, 17), precision="fp32", settings={"decode": "ram:128"})
    stages = dryrun.trace(plan, row)
    known = {"encode_text": stages[0].gives, "denoise": {}}
    short = [phase for phase in stages if phase.name in ("encode_image", "decode")]
    monkeypatch.setattr(alike, "tiles", lambda tally, transfer, shelved, tiles: iter(tiles))
    monkeypatch.setattr(alike, "groups", lambda tally, transfer, count: range(count))
    monkeypatch.setattr(alike, "calls", lambda *_: nullcontext())
    for one, other in zip(short, dryrun.trace(plan, row, known), strict=True):
        assert (one.flops, one.shelf_bytes, one.gives) == (other.flops, other.shelf_bytes, other.gives), one.name
        assert one.bytes == pytest.approx(other.bytes, rel=0.02), one.name
        assert one.peak_bytes == pytest.approx(other.peak_bytes, rel=0.03), one.name
    way, parts = Transfer(torch.device("cpu")), divided(vaes[WAN_5B], "ram:128")
    parts.pieces = replace(parts.pieces, shelf=partial(Shelf, way))
    ours(parts, torch.randn(1, vae.config.z_dim, 5, 12, 18))
    said = short[-1]
    assert (said.bytes["host_to_device"], said.bytes["device_to_host"]) == (way.moved_bytes, way.returned_bytes)
    assert said.shelf_bytes == way.pieces_bytes


def test_a_tile_stands_for_the_others(photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = legal(tiny_row(WAN))
    plan = plan_of(row, photo, (96, 64, 13), precision="fp32", settings={"decode": "tile:64"})
    short = dryrun.trace(plan, row)
    monkeypatch.setattr(alike, "tiles", lambda tally, transfer, shelved, tiles: iter(tiles))
    for one, other in zip(short, dryrun.trace(plan, row), strict=True):
        assert one.flops == other.flops, one.name
        assert one.bytes == pytest.approx(other.bytes, rel=0.02), one.name
        assert one.peak_bytes == pytest.approx(other.peak_bytes, rel=0.02), one.name


def test_every_row_has_a_vae_that_the_pass_knows() -> None:
    known = {"AutoencoderKL", "AutoencoderKLMagvit", "AutoencoderKLWan"}
    assert {row["vae"].class_name for row in CHECKPOINTS.values()} == known


def test_blank_frames_are_one_value_in_memory() -> None:
    photo = torch.rand(1, 3, 1, 8, 6)
    black = torch.zeros(1, 1, 1, 1, 1).expand_as(photo)
    there = placed([photo, black], torch.device("cpu"), torch.float64)
    assert blank(black)
    assert not blank(photo)
    assert [frame.untyped_storage().nbytes() for frame in there] == [8 * photo.numel(), 8]
    assert there[1].shape == photo.shape
