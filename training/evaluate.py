"""What a model makes of photos and prompts that it has not seen, as one JSON on stdout and in a file.

    python -m training.evaluate --model tiny --only vae,first,motion,guidance,time

Videos come from framefit's own pipeline, with its defaults, before they are compressed; the motion in them is measured
by `training.estimate`. Needs opencv-python-headless.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import chain, groupby, repeat
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from framefit import __version__, photo
from framefit.families import find, hub
from framefit.families.files import fingerprint
from framefit.families.pixels import to_frames, to_tensor
from framefit.pipeline import Pipeline, load
from framefit.plan import Plan
from framefit.request import Lora, Request
from framefit.run import Options, prepare
from framefit.video import Frame
from training import estimate as motions
from training.captions import caption
from training.estimate import Estimate
from training.motion import CATALOGUE, DIRECTIONS, PAN_PX, Motion

__all__ = ["main"]

Json = dict[str, Any]
Group = Literal["basic", "slow", "fast", "combined", "by_hand", "neutral"]
"""Why a run is made: one of the nine motions, a variant of them, a prompt of a person, or one that asks for nothing."""

HERE = Path(__file__).parent
SECTIONS = ("vae", "first", "motion", "guidance", "time")
LANGUAGES: tuple[Literal["en"], Literal["zh"]] = ("en", "zh")
BASIC = (*DIRECTIONS, "still")
COMBINED = (
    "pan-left+zoom-in", "pan-right+zoom-out", "pan-up+zoom-in",
    "pan-left+pan-down", "zoom-in+roll-right", "zoom-out+roll-left",
)  # fmt: skip
VARIANTS = (*(f"{name}-{speed}" for name in DIRECTIONS for speed in ("slow", "fast")), *COMBINED)
NEUTRAL = "a video"
BY_HAND_A_PHOTO = 4
CLIP_FRAMES = 17
EASY_FACTOR = 4
FIDELITY_DB = 24.0
HIDDEN_PX = 2
"""Border of the visible area that is left out: there the interpolation and the model may both be right."""
TIMED_RUNS = 3
STRIP_FRAMES = (0, 4, 8, 12, 16)
LABEL_PX = 14


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One video to make and to measure."""

    photo: Path
    group: Group
    asked: str
    """Name in the catalogue; of a neutral one, a direction drawn by lot."""
    language: str
    prompt: str
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Shot:
    """A video as measured."""

    job: Job
    num_frames: int
    estimate: Estimate
    """From the photo, as the model saw it, to the last frame."""
    agrees: bool
    found: str
    first_db: float
    """PSNR of the first frame against the photo."""
    last_db: float
    """PSNR of the last frame against the photo moved by the estimate, where it is visible."""
    sharpness: float
    """Variance of the Laplacian of the last frame over that of the first."""

    def to_json(self) -> Json:
        names = ("pan_x", "pan_y", "zoom", "roll", "light", "confidence")
        return {
            "photo": self.job.photo.name,
            "asked": self.job.asked,
            "prompt": self.job.prompt,
            "seed": self.job.seed,
            "found": self.found,
            "estimate": {name: round(getattr(self.estimate, name), 3) for name in names},
            "last_db": round(self.last_db, 2),
        }


class Model:
    """A model's parts, loaded once; each video has its own plan."""

    def __init__(self, arguments: argparse.Namespace, first: Path) -> None:
        self._arguments = arguments
        self.plan = self._plan(first, NEUTRAL, 0)
        self.checkpoint = find(arguments.model)
        self.parts = load(self.plan, self.checkpoint).parts

    def frames(self, photo: Path, prompt: str, seed: int) -> list[Frame]:
        return list(Pipeline(self._plan(photo, prompt, seed), self.parts).run().frames)

    def seen(self, path: Path) -> Frame:
        """The photo as the model is given it."""
        request = self._plan(path, NEUTRAL, 0).request
        return np.asarray(photo.fit(photo.load(path), request.width, request.height, request.fit))

    @torch.no_grad()
    def reconstructed(self, frames: Sequence[Frame]) -> Frame:
        """Encoded and decoded by the VAE, (F, H, W, 3)."""
        vae = self.parts["vae"]
        video = torch.stack([to_tensor(Image.fromarray(frame))[0] for frame in frames], dim=1).unsqueeze(0)
        latents = vae.encode(video.to(self.parts.device, vae.dtype)).latent_dist.mode()
        return to_frames(vae.decode(latents, return_dict=False)[0]).numpy()

    def _plan(self, photo: Path, prompt: str, seed: int) -> Plan:
        arguments = self._arguments
        guidance = None if arguments.guidance is None else (arguments.guidance,)
        request = Request(
            image=photo, prompt=prompt, model=arguments.model, seed=seed, steps=arguments.steps, guidance=guidance,
            loras=tuple(Lora.parse(text) for text in arguments.loras),
        )  # fmt: skip
        return prepare(request, Options(device=arguments.device, checkpoints=None, use_tuned=False))[1]


def main(arguments: list[str] | None = None) -> None:
    """Evaluate, print the JSON and file it."""
    flags = _parser().parse_args(arguments)
    photos = sorted(path for path in flags.photos.glob("*.jp*g"))[: flags.limit]
    if not photos:
        sys.exit(f"there are no JPEGs in {flags.photos}: name another folder with --photos.")
    text = json.dumps(_evaluated(flags, photos), ensure_ascii=False, indent=1)
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tiny", help="model id or folder (default: tiny)")
    parser.add_argument("--photos", type=Path, default=HERE / "heldout", help="folder of JPEGs")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "evaluate.json", help="where the JSON goes")
    parser.add_argument("--only", type=_sections, default=SECTIONS, help=f"sections (default: {','.join(SECTIONS)})")
    parser.add_argument("--limit", type=int, help="use the first N photos")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--processes", type=int, default=1, help="that make videos side by side (default: 1)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the model's)")
    parser.add_argument("--lora", dest="loras", action="append", default=[], help="a LoRA's file, merged")
    parser.add_argument("--motions", type=_names, default=BASIC, help="the basic motions (default: the nine)")
    parser.add_argument("--phrasings", type=int, default=1, help="prompts a photo, motion and language (default: 1)")
    parser.add_argument("--variants", type=int, default=4, help="slow, fast, combined: runs a photo and language")
    parser.add_argument("--prompts", type=Path, default=HERE / "prompts.json", help="prompts written by hand")
    parser.add_argument("--no-prompts", action="store_true", help="leave them out")
    parser.add_argument("--strips", type=Path, metavar="DIR", help="write frames of every run there, a PNG a photo")
    return parser


def _sections(text: str) -> tuple[str, ...]:
    return _known(text, SECTIONS)


def _names(text: str) -> tuple[str, ...]:
    return _known(text, [name for name, motion in CATALOGUE.items() if _of_camera(motion)])


def _known(text: str, names: Sequence[str]) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    if strangers := set(chosen).difference(names):
        raise argparse.ArgumentTypeError(f"{min(strangers)} is none of {', '.join(names)}")
    return chosen


def _evaluated(flags: argparse.Namespace, photos: Sequence[Path]) -> Json:
    result: Json = {}
    model = Model(flags, photos[0])
    if "vae" in flags.only:
        result["vae"] = _vae(model, photos)
    shots = _all_shots(model, _jobs(photos, flags), flags)
    asked = [shot for shot in shots if shot.job.group != "neutral"]
    neutral = [shot for shot in shots if shot.job.group == "neutral"]
    if shots:
        result["first_frame"] = {"runs": len(shots), "psnr_db": _summary(shot.first_db for shot in shots)}
    if asked:
        result["motion"] = _motion(asked)
        result["fidelity"] = _fidelity([shot for shot in asked if shot.job.group == "basic"])
    if "guidance" in flags.only:
        result["guidance"] = _guidance(neutral)
    if "time" in flags.only:
        result["time"] = _time(flags)
    return _facts(model, photos) | result | {"passed": _passed(result)}


def _jobs(photos: Sequence[Path], flags: argparse.Namespace) -> list[Job]:
    """Every run, photo by photo."""
    jobs: list[Job] = []
    if {"first", "guidance"} & set(flags.only):
        jobs += (_job(path, "neutral", Random(path.stem).choice(list(DIRECTIONS)), "en", NEUTRAL) for path in photos)
    if "motion" in flags.only:
        for index, path in enumerate(photos):
            jobs += _drawn(path, flags.motions, flags.phrasings)
            turn = (VARIANTS[(index * flags.variants + n) % len(VARIANTS)] for n in range(flags.variants))
            jobs += _drawn(path, tuple(turn), 1, variants=True)
        if not flags.no_prompts:
            jobs += _by_hand(photos, flags.prompts)
    return sorted(jobs, key=lambda job: job.photo)


def _drawn(path: Path, names: Sequence[str], phrasings: int, *, variants: bool = False) -> Iterator[Job]:
    """Prompts from the grammar of the training captions, others for every photo."""
    for name in names:
        for language in LANGUAGES:
            for n in range(phrasings):
                prompt = caption(name, Random(f"{path.stem} {name} {language} {n}"), language)
                yield _job(path, _variant(name) if variants else "basic", name, language, prompt)


def _variant(name: str) -> Group:
    return "combined" if "+" in name else "slow" if name.endswith("-slow") else "fast"


def _by_hand(photos: Sequence[Path], file: Path) -> Iterator[Job]:
    """The prompts for motions of the camera, each with one photo in turn; of few photos, fewer prompts."""
    prompts = [entry for entry in json.loads(file.read_text(encoding="utf-8")) if entry["motion"] in CATALOGUE]
    prompts = [entry for entry in prompts if _of_camera(CATALOGUE[entry["motion"]])]
    for n, entry in enumerate(prompts[:: math.ceil(len(prompts) / (BY_HAND_A_PHOTO * len(photos)))]):
        language = "zh" if any("\u4e00" <= letter <= "\u9fff" for letter in entry["text"]) else "en"
        yield _job(photos[n % len(photos)], "by_hand", entry["motion"], language, entry["text"])


def _of_camera(motion: Motion) -> bool:
    return not (motion.object_x or motion.object_y)


def _job(path: Path, group: Group, asked: str, language: str, prompt: str) -> Job:
    seed = Random(f"{path.stem} {asked} {prompt}").getrandbits(32)
    return Job(photo=path, group=group, asked=asked, language=language, prompt=prompt, seed=seed)


def _all_shots(model: Model, jobs: Sequence[Job], flags: argparse.Namespace) -> list[Shot]:
    """Of every job, photo by photo. Several processes share the photos out, each with a model of its own."""
    if flags.processes == 1 or not jobs:
        return list(_shots(model, jobs, flags.strips))
    photos = list(dict.fromkeys(job.photo for job in jobs))
    count = min(flags.processes, len(photos))
    shares = [[job for job in jobs if photos.index(job.photo) % count == number] for number in range(count)]
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        shots = chain.from_iterable(pool.map(_share_of_shots, shares, repeat(flags), range(count)))
        return sorted(shots, key=lambda shot: shot.job.photo)


def _share_of_shots(jobs: Sequence[Job], flags: argparse.Namespace, number: int) -> list[Shot]:
    cards = torch.cuda.device_count()
    if cards and flags.device in ("auto", "cuda"):
        flags.device = f"cuda:{number % cards}"
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // flags.processes))
    cv2.setNumThreads(1)
    return list(_shots(Model(flags, jobs[0].photo), jobs, flags.strips))


def _shots(model: Model, jobs: Sequence[Job], strips: Path | None) -> Iterator[Shot]:
    with tqdm(total=len(jobs), desc="videos", file=sys.stderr, disable=not jobs) as bar:
        for path, of_photo in groupby(jobs, key=lambda job: job.photo):
            seen, rows = model.seen(path), []
            for job in of_photo:
                frames = model.frames(job.photo, job.prompt, job.seed)
                shot = _measured(job, seen, frames)
                yield shot
                rows.append(_row(shot, frames) if strips else seen)
                bar.update()
            if strips:
                strips.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.concatenate(rows)).save(strips / f"{path.stem}.png")


def _measured(job: Job, seen: Frame, frames: Sequence[Frame]) -> Shot:
    last = frames[-1]
    found = motions.estimate(seen, last)
    warped, visible = motions.warp(seen, found)
    side = 2 * HIDDEN_PX + 1
    inside = cv2.erode(visible.astype(np.uint8), np.ones((side, side), np.uint8)).astype(bool)
    return Shot(
        job=job,
        num_frames=len(frames),
        estimate=found,
        agrees=motions.agrees(found, job.asked, len(frames)),
        found=motions.classify(found, len(frames)),
        first_db=_psnr(seen, frames[0]),
        last_db=_psnr(warped[inside], last[inside]),
        sharpness=_sharpness(last) / max(_sharpness(frames[0]), 1e-6),
    )


def _row(shot: Shot, frames: Sequence[Frame]) -> Frame:
    """Some of the frames side by side, under what was asked and found."""
    shown = np.concatenate([frames[index] for index in STRIP_FRAMES if index < len(frames)], axis=1)
    label = Image.new("RGB", (shown.shape[1], LABEL_PX))
    text = f"{shot.job.asked} ({shot.job.group}, {shot.job.language}): {shot.found}, {shot.last_db:.1f} dB"
    ImageDraw.Draw(label).text((2, 1), text, fill="white" if shot.agrees else "orange")
    return np.concatenate([np.asarray(label), shown])


def _vae(model: Model, photos: Sequence[Path]) -> Json:
    """How near a photo, and a clip that pans over it, come back from the VAE."""
    rows: dict[str, dict[str, float]] = {}
    for path in tqdm(photos, desc="vae", file=sys.stderr):
        seen = model.seen(path)
        clip = _panned(photo.load(path), seen.shape[1], seen.shape[0])
        rows[path.name] = {
            "still_db": _rounded(_psnr(seen, model.reconstructed([seen])[0])),
            "clip_db": _rounded(_psnr(np.stack(clip), model.reconstructed(clip))),
            "shrunk_db": _rounded(_psnr(seen, _shrunk(seen))),
        }
    figures = {name: _summary(row[name] for row in rows.values()) for name in ("still_db", "clip_db", "shrunk_db")}
    return {**figures, "photos": rows}


def _panned(image: Image.Image, width: int, height: int) -> list[Frame]:
    """The photo under a camera that pans right, cut from the file at its own resolution."""
    way = PAN_PX * (CLIP_FRAMES - 1)
    scale = min(image.width / (width + way), image.height / height)
    top = (image.height - height * scale) / 2
    clip = []
    for index in range(CLIP_FRAMES):
        left = (image.width - (width + way) * scale) / 2 + index * PAN_PX * scale
        box = (left, top, min(left + width * scale, image.width), min(top + height * scale, image.height))
        clip.append(np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box)))
    return clip


def _shrunk(seen: Frame) -> Frame:
    """A quarter of the size and back: how much of the photo is detail."""
    image = Image.fromarray(seen)
    small = image.resize((image.width // EASY_FACTOR, image.height // EASY_FACTOR), Image.Resampling.BOX)
    return np.asarray(small.resize(image.size, Image.Resampling.BICUBIC))


def _motion(shots: Sequence[Shot]) -> Json:
    groups = {name: [shot for shot in shots if shot.job.group == name] for name in _groups()}
    still = [shot.estimate for shot in groups["basic"] if shot.job.asked == "still"]
    return {
        **{name: _tally(members) for name, members in groups.items() if members},
        "still": {
            "displacement_px": _summary(_moved(found, found.displacement_px) for found in still),
            "largest_px": _summary(_moved(found, found.largest_px) for found in still),
        },
    }


def _moved(found: Estimate, displacement_px: float) -> float:
    """A picture that is lost has not stood still: it counts as moved by its width at least."""
    lost = found.confidence < motions.MIN_CONFIDENCE
    return max(displacement_px, float(found.width)) if lost else displacement_px


def _groups() -> tuple[Group, ...]:
    return ("basic", "slow", "fast", "combined", "by_hand")


def _tally(shots: Sequence[Shot]) -> Json:
    """How many show what was asked, in all, by motion and by language; and those that do not."""
    by_motion: dict[str, Json] = {}
    for name in sorted({shot.job.asked for shot in shots}):
        members = [shot for shot in shots if shot.job.asked == name]
        by_motion[name] = {
            **_share(members),
            "by_language": {language: _share(_in(members, language))["share"] for language in LANGUAGES},
            "of_asked_speed": _summary(filter(math.isfinite, map(_speed, members))),
            "found": dict(Counter(shot.found for shot in members).most_common()),
        }
    return {
        **_share(shots),
        "by_language": {language: _share(_in(shots, language)) for language in LANGUAGES},
        "by_motion": by_motion,
        "failures": [shot.to_json() for shot in shots if not shot.agrees],
    }


def _in(shots: Iterable[Shot], language: str) -> list[Shot]:
    return [shot for shot in shots if shot.job.language == language]


def _share(shots: Sequence[Shot]) -> Json:
    return {"runs": len(shots), "share": _rounded(fmean(shot.agrees for shot in shots)) if shots else None}


def _speed(shot: Shot) -> float:
    """The estimated motion over the asked one, its components on the mean; NaN for still, and for what is lost."""
    if shot.estimate.confidence < motions.MIN_CONFIDENCE:
        return math.nan
    asked, seen = CATALOGUE[shot.job.asked], shot.estimate.total
    pairs = zip(seen.values(), asked.values(), strict=True)
    ratios = [value / (wanted * (shot.num_frames - 1)) for value, wanted in pairs if wanted]
    return fmean(ratios) if ratios else math.nan


def _fidelity(shots: Sequence[Shot]) -> Json:
    values = [shot.last_db for shot in shots]
    return {
        "runs": len(shots),
        "psnr_db": _summary(values),
        "share_24_db": _rounded(fmean(value >= FIDELITY_DB for value in values)) if values else None,
        "sharpness": _summary(shot.sharpness for shot in shots),
    }


def _guidance(shots: Sequence[Shot]) -> Json:
    """What a prompt without a motion gives: nothing but the prompt may make a video agree with a direction."""
    every = [motions.agrees(shot.estimate, name, shot.num_frames) for shot in shots for name in DIRECTIONS]
    return {
        "prompt": NEUTRAL,
        **_share(shots),
        "share_of_all_directions": _rounded(fmean(every)),
        "chance": 1 / len(DIRECTIONS),
        "found": dict(Counter(shot.found for shot in shots).most_common()),
        "displacement_px": _summary(shot.estimate.displacement_px for shot in shots),
    }


def _time(flags: argparse.Namespace) -> Json:
    """A user's first run, from nothing to the file, in a process of its own."""
    command = [sys.executable, "-m", "framefit", "run", "-p", "the camera pans left", "--seed", "1", "--json"]
    command += ["--model", flags.model] + (["--device", flags.device] if flags.device != "auto" else [])
    with tempfile.TemporaryDirectory() as folder:
        runs = [_timed([*command, "-o", f"{folder}/{n}.mp4"], Path(folder)) for n in range(TIMED_RUNS)]
    middle = sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2]
    return {
        "command": shlex.join(["framefit", *command[3:]]),
        "wall_s": _rounded(median(run["seconds"] for run in runs)),
        "walls_s": [_rounded(run["seconds"]) for run in runs],
        "peak_rss_mib": round(max(run["peak_bytes"] for run in runs) / 2**20),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "phases": middle["report"]["report"]["phases"],
        "steps": middle["report"]["plan"]["request"]["steps"],
    }


def _timed(command: list[str], folder: Path) -> Json:
    output = folder / "stdout"
    began = time.perf_counter()
    with output.open("wb") as file:
        process = subprocess.Popen(command, stdout=file)
        _, status, usage = os.wait4(process.pid, 0)  # the usage of this child alone
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed with code {process.returncode}: {output.read_text()}")
    unit = 1 if sys.platform == "darwin" else 1024
    return {"seconds": seconds, "peak_bytes": usage.ru_maxrss * unit, "report": json.loads(output.read_text())}


def _facts(model: Model, photos: Sequence[Path]) -> Json:
    plan = model.plan
    packages = ("torch", "diffusers", "transformers", "numpy", "opencv-python-headless")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": model.checkpoint.id,
        "fingerprint": fingerprint(hub.locate(model.checkpoint)),
        "versions": {"framefit": __version__, "python": platform.python_version()}
        | {name: version(name) for name in packages},
        "device": plan.device.name,
        "precision": plan.precision,
        "steps": plan.request.steps,
        "num_frames": plan.request.num_frames,
        "guidance_scale": list(plan.request.guidance),
        "loras": [{"file": lora.file.name, "sha256": lora.sha256, "scale": lora.scale} for lora in plan.request.loras],
        "photos": {path.name: photo.sha256(path) for path in photos},
    }


def _passed(result: Json) -> Json:
    """The bars; a figure is None, and so is its verdict, where it was not measured."""
    bars = (
        ("vae_still_db", ("vae", "still_db", "mean"), ">=", 30.0),
        ("vae_clip_db", ("vae", "clip_db", "mean"), ">=", 30.0),
        ("first_frame_db", ("first_frame", "psnr_db", "mean"), ">=", 28.0),
        ("motion", ("motion", "basic", "share"), ">=", 0.95),
        ("still_px", ("motion", "still", "displacement_px", "max"), "<", 1.0),
        ("fidelity_db", ("fidelity", "psnr_db", "mean"), ">=", FIDELITY_DB),
        ("sharpness", ("fidelity", "sharpness", "mean"), ">=", 0.5),
        ("time_s", ("time", "wall_s"), "<=", 45.0),
    )
    return {name: _verdict(_at(result, path), sign, bar) for name, path, sign, bar in bars}


def _verdict(figure: float | None, sign: str, bar: float) -> Json:
    holds = None
    if figure is not None:
        holds = {">=": figure >= bar, "<": figure < bar, "<=": figure <= bar}[sign]
    return {"figure": figure, "bar": f"{sign} {bar:g}", "passed": holds}


def _at(result: Json, path: Sequence[str]) -> float | None:
    value: Any = result
    for name in path:
        value = (value or {}).get(name)
    figure: float | None = value
    return figure


def _summary(values: Iterable[float]) -> Json | None:
    numbers = list(values)
    if not numbers:
        return None
    return {"mean": _rounded(fmean(numbers)), "min": _rounded(min(numbers)), "max": _rounded(max(numbers))}


def _rounded(value: float) -> float:
    return round(value, 4)


def _psnr(one: Frame, other: Frame) -> float:
    """In dB; at most 99, which stands for equal pictures, and for no picture 0."""
    if not one.size:
        return 0.0
    error = float(np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2))
    return min(99.0, 10 * math.log10(255**2 / error)) if error else 99.0


def _sharpness(frame: Frame) -> float:
    grey: npt.NDArray[Any] = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float64)
    return float(cv2.Laplacian(grey, cv2.CV_64F).var())


if __name__ == "__main__":
    main()
