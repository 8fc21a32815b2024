"""EasyAnimate's VAE at true size: a decode whole, frame by frame, and with its memories in RAM, in seconds and memory.

    python benchmarks/magvit_decode.py --out benchmarks/magvit_decode_h200_DATE      a minute on an H200
    python benchmarks/magvit_decode.py --out FILE --tiny                             whether it runs, on the CPU

Random weights. Each way runs once to warm up, which gives its memory and how far its frames are from the whole one's
before they are rounded (relative L2); then once plainly, once under the profiler, and once to count its work. RAM is
pinned anew in every run, as in a user's, and its seconds are among those of `ram`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from framefit.device import Device, expand_segments
from framefit.families import CHECKPOINTS, magvit_vae
from framefit.families.parts import Parts
from framefit.ledger.kinds import KINDS
from framefit.passes import decode
from framefit.plan import Decode
from framefit.profiling import Breakdown, breakdown
from framefit.testing import random_parts, randomise, tiny_row

MODEL = "easyanimate-v5.1-7b-inp"
SIZES = ((672, 384, 49), (1344, 768, 49))
"""Width, height, frames."""
TINY = ((128, 96, 9),)
WAYS = ("whole", "frame", "ram")
GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    size: tuple[int, int, int]
    way: str
    seconds: float
    """Without the profiler."""
    allocated_bytes: int
    reserved_bytes: int
    relative_l2: float
    """To the frames of `whole`."""
    work: dict[str, Any]
    """By kind, and the longest kernels."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--tiny", action="store_true", help="a tiny VAE on the CPU")
    flags = arguments.parse_args()
    device = Device.detect("cpu" if flags.tiny else "cuda")
    expand_segments()
    parts = _parts(torch.device(device.id), flags.tiny)
    found, lines = [], list[str]()
    for size in TINY if flags.tiny else SIZES:
        latents = _latents(parts, size)
        whole: torch.Tensor | None = None
        for way in WAYS:
            decode.apply(parts, Decode(value=way))
            frames, bytes = _warm(parts, latents)
            whole = frames if whole is None else whole
            call = breakdown(lambda latents=latents: _run(parts, latents), device.id)
            decode.remove(parts)
            apart = float((frames - whole).norm() / whole.norm())
            found.append(
                Result(
                    size=size, way=way, seconds=call.plain_s, allocated_bytes=bytes[0], reserved_bytes=bytes[1],
                    relative_l2=apart, work=call.to_json(),
                )
            )  # fmt: skip
            lines.append(_line(found[-1], found[-1 - WAYS.index(way)], call))
            about = f"{device.name}, torch {torch.__version__}, random weights"
            text = json.dumps({"device": about, "results": [asdict(each) for each in found]}, indent=1)
            flags.out.with_suffix(".json").write_text(text + "\n")
    head = ["size", "decode", "s", "of whole", *KINDS, "idle s", "allocated GiB", "reserved", "relative L2"]
    print("\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines]))


def _parts(device: torch.device, tiny: bool) -> Parts:
    row = tiny_row(MODEL) if tiny else CHECKPOINTS[MODEL]
    parts = random_parts(row, dtype=torch.float32 if tiny else torch.bfloat16, device=device, models={"vae"})
    randomise(parts["vae"], torch.Generator(device).manual_seed(0))
    return parts


def _latents(parts: Parts, size: tuple[int, int, int]) -> torch.Tensor:
    width, height, frames = size
    vae = parts["vae"]
    shape = (1, vae.config.latent_channels, 1 + (frames - 1) // 4, height // 8, width // 8)
    generator = torch.Generator(parts.device).manual_seed(1)
    return torch.randn(shape, generator=generator, device=parts.device).to(vae.dtype)


@torch.no_grad()
def _run(parts: Parts, latents: torch.Tensor) -> list[torch.Tensor]:
    return list(magvit_vae.decoded(parts["vae"], latents, parts.pieces))


def _warm(parts: Parts, latents: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """Its frames before they are rounded, and what was allocated and reserved."""
    on_card = parts.device.type == "cuda"
    if on_card:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with mock.patch.object(magvit_vae, "to_frames", lambda video: video[0].float().cpu()):
        frames = torch.cat(_run(parts, latents), dim=1)
    used = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if on_card else (0, 0)
    return frames, used


def _line(one: Result, whole: Result, call: Breakdown) -> str:
    kinds = " | ".join(f"{call.kinds[kind].seconds:.3f}" if kind in call.kinds else "" for kind in KINDS)
    return (
        f"| {one.size[0]}x{one.size[1]}x{one.size[2]} | {one.way} | {one.seconds:.3f} "
        f"| {one.seconds / whole.seconds:.2f} | {kinds} | {call.waiting_s:.3f} "
        f"| {one.allocated_bytes / GIB:.2f} | {one.reserved_bytes / GIB:.2f} | {one.relative_l2:.2g} |"
    )


if __name__ == "__main__":
    main()
