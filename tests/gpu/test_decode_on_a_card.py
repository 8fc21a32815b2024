"""On a card: a VAE in pieces makes the same video, in the memory that was said, and copies to RAM and back hide."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from framefit.device import Device
from framefit.families import CHECKPOINTS, magvit_vae, wan_vae
from framefit.families.parts import Parts
from framefit.passes import decode
from framefit.plan import Decode
from framefit.planning import choose, dryrun
from framefit.request import Request
from framefit.testing import random_parts, randomise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card"),
]

CARD = torch.device("cuda:0")
GIB = 2**30
PINNED = 9
"""Frames after which no group's memories differ in size from those before."""
WAYS = {"wan2.2-i2v-a14b": wan_vae, "wan2.2-ti2v-5b": wan_vae, "easyanimate-v5.1-7b-inp": magvit_vae}
SIZES = {
    "wan2.2-i2v-a14b": (832, 480, 33),
    "wan2.2-ti2v-5b": (1280, 704, 33),
    "easyanimate-v5.1-7b-inp": (1344, 768, 33),
}


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with torch.no_grad():
        yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 that is fp32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """Of one decode."""

    peak_bytes: int
    said_bytes: int
    """By the dry run, weights and all."""
    frame_s: float

    def __str__(self) -> str:
        return f"{self.peak_bytes / GIB:.2f} GiB of {self.said_bytes / GIB:.2f} said, {self.frame_s:.4f} s a frame"


def vae_of(id: str, dtype: torch.dtype) -> Parts:
    parts = random_parts(CHECKPOINTS[id], dtype=dtype, device=CARD, models=("vae",))
    assert isinstance(parts["vae"], nn.Module)
    randomise(parts["vae"], torch.Generator(CARD).manual_seed(0))
    return parts


def latents_of(parts: Parts, size: tuple[int, int, int]) -> torch.Tensor:
    vae = parts["vae"]
    width, height, frames = (
        size[0] // vae.spatial_compression_ratio,
        size[1] // vae.spatial_compression_ratio,
        size[2],
    )
    channels = getattr(vae.config, "z_dim", None) or vae.config.latent_channels
    generator = torch.Generator(CARD).manual_seed(1)
    shape = 1, channels, (frames - 1) // 4 + 1, height, width
    return torch.randn(shape, generator=generator, device=CARD, dtype=vae.dtype)


def decoded(parts: Parts, latents: torch.Tensor) -> tuple[torch.Tensor, int, float]:
    """Frames, bytes allocated at the peak and seconds a frame, once all memory for it has been pinned."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(CARD)
    torch.cuda.synchronize(CARD)
    way, chunks, there = WAYS[parts.checkpoint.id], list[torch.Tensor](), list[tuple[int, float]]()
    for chunk in way.decoded(parts["vae"], latents, parts.pieces):
        chunks.append(chunk.clone())
        there.append((sum(map(len, chunks)), time.perf_counter()))
    (first, began), (last, ended) = next(each for each in there if each[0] >= PINNED), there[-1]
    return torch.cat(chunks), torch.cuda.max_memory_allocated(CARD), (ended - began) / (last - first)


@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize(
    ("id", "value"),
    [(id, value) for id in WAYS for value in (("frame", "ram") if "easy" in id else ("ram", "ram:128"))],
)
def test_pieces_change_nothing(id: str, value: str) -> None:
    parts = vae_of(id, torch.float32)
    latents = latents_of(parts, (256, 256, 21))
    known, _, _ = decoded(parts, latents)
    decode.apply(parts, Decode(value=value))
    for _ in range(3):
        frames, _, _ = decoded(parts, latents)
        assert (frames.int() - known.int()).abs().max() <= 1


@pytest.mark.parametrize("id", WAYS)
def test_it_takes_what_was_said_and_its_copies_hide(id: str, tmp_path: Path) -> None:
    from PIL import Image

    photo = tmp_path / "photo.png"
    Image.new("RGB", (64, 64)).save(photo)
    width, height, num_frames = SIZES[id]
    row = CHECKPOINTS[id]
    request = Request(image=photo, prompt="-", model=id, width=width, height=height, num_frames=num_frames, seed=1)
    found: dict[str, Found] = {}
    for value in ("frame", "ram", *([] if "easy" in id else ["ram:352"])):
        plan = choose(request, row, Device.detect("cuda"), photo_size=(64, 64), settings={"decode": value})
        said = next(phase for phase in dryrun.trace(plan, row) if phase.name == "decode")
        parts = vae_of(id, torch.bfloat16 if id.startswith("easyanimate") else torch.float32)
        decode.apply(parts, Decode(value=value))
        latents = latents_of(parts, SIZES[id])
        decoded(parts, latents)
        _, peak, frame_s = decoded(parts, latents)
        said_bytes = said.peak_bytes + said.weights_bytes["vae"]
        found[value] = Found(peak_bytes=peak, said_bytes=said_bytes, frame_s=frame_s)
        del parts
    told = "; ".join(f"{value}: {one}" for value, one in found.items())
    frame = found["frame"]
    for value, one in found.items():
        assert one.peak_bytes < 1.05 * one.said_bytes, f"{value} takes more than was said: {told}"
        # 0.88 to 1.25 on an H200; 1.7 where kernels and copies each way take turns
        assert one.frame_s < 1.45 * frame.frame_s, f"copies of {value} do not hide: {told}"
    assert found["ram"].peak_bytes < 0.75 * frame.peak_bytes, f"ram spares too little: {told}"
