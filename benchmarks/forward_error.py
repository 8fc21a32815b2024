"""One forward at true size against the same in fp32: stock's error in the run's precision, and every exact pass's.

    python benchmarks/forward_error.py --out benchmarks/forward_error_h200_DATE [--only WORK ...]

The weights are random and the same to the bit everywhere: numbers of the run's precision, which fp32 holds exactly.
An exact pass computes the same in another order: its relative L2 error may be 1.1 times stock's (GOALS of the tier).
The reference uses no TF32. Wan's VAE runs in fp32; stock's error there is that of cuDNN's TF32 convolutions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from framefit.bench import inputs
from framefit.device import Device
from framefit.families import CHECKPOINTS, Checkpoint, family_of, magvit_vae, pieces, wan_vae
from framefit.families.parts import PRECISIONS, Parts
from framefit.passes import apply_all, change
from framefit.pipeline import Pipeline
from framefit.plan import Plan
from framefit.planning import choose
from framefit.request import Request
from framefit.testing import random_parts, randomise

PHOTO = Path(__file__).parents[1] / "framefit" / "assets" / "rocket.jpg"
BAR = 1.1


@dataclass(frozen=True, slots=True)
class Work:
    model: str
    part: str
    """The component that computes."""
    width: int
    height: int
    num_frames: int
    plans: tuple[Mapping[str, str], ...]
    """Settings of exact passes, beside which stock has none."""


ALONE = ({"chunk": "rows"}, {"offload": "block"}, {"chunk": "rows", "offload": "leaf"})
LARGE = (*ALONE, {"chunk": "rows:16384"}, {"chunk": "rows:32768"})
GUIDED = (*ALONE, {"guidance": "apart"}, {"guidance": "apart", "chunk": "rows", "offload": "block"})
WAN_PIECES = ({"decode": "frame"}, {"decode": "tile:256"}, {"decode": "ram:640"}, {"decode": "ram:352"})

WORKS = {
    "wan2.2-a14b-480p": Work("wan2.2-i2v-a14b", "transformer", 832, 480, 81, LARGE),
    "wan2.2-ti2v-5b": Work("wan2.2-ti2v-5b", "transformer", 1280, 704, 121, LARGE),
    "easyanimate-7b-384": Work("easyanimate-v5.1-7b-inp", "transformer", 672, 384, 49, GUIDED),
    "i2vgen-xl-512": Work("i2vgen-xl", "unet", 512, 512, 16, GUIDED),
    "wan2.1-vae-480p": Work("wan2.2-i2v-a14b", "vae", 832, 480, 81, WAN_PIECES),
    "wan2.2-vae-480p": Work("wan2.2-ti2v-5b", "vae", 832, 480, 81, WAN_PIECES),
    "magvit-384": Work("easyanimate-v5.1-7b-inp", "vae", 672, 384, 49, ({"decode": "frame"}, {"decode": "ram"})),
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--only", nargs="*", default=list(WORKS), choices=list(WORKS))
    arguments.add_argument("--device", default="cuda")
    flags = arguments.parse_args()
    card = Device.detect(flags.device)
    about = f"{card.name}, torch {torch.__version__}, random weights"
    lines = [
        f"# Error of a forward against fp32\n\n{about}\n",
        "| work | precision | settings | relative L2 | of stock's |",
    ]
    lines.append("|---" * 5 + "|")
    found = []
    for name in flags.only:
        for each in _measured(name, WORKS[name], card):
            found.append(each)
            lines.append(f"| {each['work']} | {each['precision']} | {each['settings']} | {each['relative_l2']:.3g} "
                         f"| {each['of_stock']:.3f}{'' if each['of_stock'] <= BAR else ' **over**'} |")  # fmt: skip
            print(lines[-1], flush=True)
        flags.out.with_suffix(".json").write_text(json.dumps({"about": about, "found": found}, indent=1) + "\n")
        flags.out.with_suffix(".md").write_text("\n".join(lines) + "\n")


def _measured(name: str, work: Work, card: Device) -> Iterator[dict[str, Any]]:
    """Stock, then every plan."""
    plan = _plan(work, card, {})
    parts = _random(work, plan)
    model = parts[work.part]
    kept = {key: tensor.detach().to("cpu", copy=True) for key, tensor in model.named_parameters()}
    with _exactly():
        model.float()
        reference = _forward(work, plan, parts)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.data = kept[key].to(parameter.device)
    del kept
    stock = None
    for settings in ({}, *work.plans):
        other = _plan(work, card, settings)
        (change(parts, plan, other) if stock is not None else apply_all(parts, other))
        plan = other
        parts.use(work.part)
        error = _far(_forward(work, plan, parts), reference)
        stock = error if stock is None else stock
        parts.use()
        yield {
            "work": name, "precision": str(parts.dtype(work.part)).removeprefix("torch."),
            "settings": " ".join(f"{kind}={value}" for kind, value in settings.items()) or "stock",
            "relative_l2": error, "of_stock": error / stock if stock else 1.0,
        }  # fmt: skip


def _row(work: Work) -> Checkpoint:
    """With one of its experts."""
    row = CHECKPOINTS[work.model]
    return replace(row, components=tuple(each for each in row.components if each.name not in row.experts[1:]))


def _plan(work: Work, card: Device, settings: Mapping[str, str]) -> Plan:
    request = Request(
        image=PHOTO,
        prompt="-",
        model=work.model,
        width=work.width,
        height=work.height,
        num_frames=work.num_frames,
        seed=1,
    )
    return choose(request, CHECKPOINTS[work.model], card, photo_size=(640, 427), settings=dict(settings))


def _random(work: Work, plan: Plan) -> Parts:
    device = torch.device(plan.device.id)
    parts = random_parts(_row(work), dtype=PRECISIONS[plan.precision], device=device, models=[work.part, "vae"])
    randomise(parts[work.part], torch.Generator(device).manual_seed(0))
    return parts


@torch.no_grad()
def _forward(work: Work, plan: Plan, parts: Parts) -> torch.Tensor:
    """What the component computes, on the host in fp32."""
    whole, size = _row(work), (work.width, work.height, work.num_frames)
    latents = inputs.latents(whole, size, parts.device)
    if work.part == "vae":
        canvas = SimpleNamespace(empty=np.empty, uint8=np.float32)
        with (
            mock.patch.object(wan_vae, "to_frames", _raw), mock.patch.object(magvit_vae, "to_frames", _raw),
            mock.patch.object(pieces, "np", canvas),
        ):  # fmt: skip
            return torch.cat(list(family_of(whole).decode(parts, latents)))
    conditioning = inputs.conditioning(whole, size, 1 if whole.family == "wan" else 2, parts.device)
    t = torch.tensor(900.0, device=parts.device)
    scale = 1.0 if whole.family == "wan" else 5.0  # the reference runs Wan's branches apart
    return Pipeline(plan, parts).predict(work.part, latents, t, conditioning, scale).float().cpu()


def _raw(video: torch.Tensor) -> torch.Tensor:
    """(1, 3, F, H, W) -> (F, H, W, 3) on the host, in fp32 and not in 8 bits."""
    return video[0].float().permute(1, 2, 3, 0).cpu()


def _far(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative L2, summed in fp64."""
    return float((found.double() - reference.double()).norm() / reference.double().norm())


@contextmanager
def _exactly() -> Iterator[None]:
    """No TF32, in products nor convolutions."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


if __name__ == "__main__":
    main()
