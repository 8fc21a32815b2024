"""The command line: flags become a `Request` and `Options`, results go to stdout, progress to stderr.

Exit codes: 0 done, 1 the run failed, 2 usage, 3 bad input, 4 does not fit, 5 model missing, 130 interrupted.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from framefit import __version__, commands
from framefit.device import Budget
from framefit.errors import FramefitError, UsageError
from framefit.plan import QUALITIES
from framefit.request import Request

__all__ = ["main", "parser"]

Command = Callable[[argparse.Namespace], int | None]


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number, or two as in 3.5,3.5") from None


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"'{text}' is not WIDTHxHEIGHT, as in 832x480")
    return int(width), int(height)


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"'{text}' is not SETTING=VALUE, as in guidance=apart")
    return name, value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of 1 or more")
    return int(text)


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?)B?", text.strip(), re.IGNORECASE)
    if not found:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size, as in 12GiB or 800MiB")
    unit = found[2].upper()
    base = 1024 if unit.endswith("I") else 1000
    return int(float(found[1]) * base ** ("KMG".index(unit[0]) + 1))


def _bar(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    try:
        number = float(value) if equals else math.nan
        if not math.isfinite(number):
            raise ValueError
        return name, number
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not METRIC=NUMBER, as in vmaf=95") from None


FLAGS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "prompt": (("-p", "--prompt"), {"metavar": "TEXT"}),
    "model": (("-m", "--model"), {"metavar": "MODEL"}),
    "last_image": (("--last-image",), {"metavar": "FILE", "type": Path}),
    "negative_prompt": (("--negative",), {"metavar": "TEXT"}),
    "fit": (("--fit",), {"choices": ["nearest", "crop", "pad"]}),
    "num_frames": (("--frames",), {"metavar": "N", "type": int}),
    "fps": (("--fps",), {"metavar": "N", "type": float}),
    "steps": (("--steps",), {"metavar": "N", "type": int}),
    "guidance": (("--guidance",), {"metavar": "G[,G]", "type": _numbers}),
    "seed": (("--seed",), {"metavar": "N", "type": int}),
    "loras": (("--lora",), {"metavar": "FILE[:SCALE]", "action": "append"}),
}
"""Field of `Request` -> its flag; its help is the field's own. Image and size are written out below."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run one command and exit with its code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    atexit.register(gc.freeze)  # or Python looks for garbage among all that the libraries made: up to two seconds
    try:
        flags = parser().parse_args(arguments)
        code = flags.command(flags) or 0
        sys.stdout.flush()
        sys.exit(code)
    except FramefitError as error:
        notes = getattr(error, "__notes__", [])
        if "--json" in arguments:
            facts = {"type": type(error).__name__, "message": str(error), "exit_code": error.exit_code}
            if notes:
                facts["notes"] = notes
            print(json.dumps({"error": facts}))
        print(f"framefit: {error}".encode(errors="backslashreplace").decode(), *notes, sep="\n", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("framefit: interrupted.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has gone, as in `framefit models ls | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def parser() -> argparse.ArgumentParser:
    """Every command and flag; the docs are held to it by test."""
    top = _Parser(
        prog="framefit",
        description="Image-to-video models, made to fit your GPU.",
        epilog="Exit codes: 0 done, 1 failed, 2 usage, 3 bad input, 4 does not fit, 5 model missing, 130 interrupted.",
    )
    top.add_argument("--version", action="version", version=f"framefit {__version__}")
    names = top.add_subparsers(required=True, metavar="COMMAND")

    run = _command(names, "run", commands.run, "make a video from a photo")
    _request_flags(run)
    _option_flags(run)
    _output_flags(run)
    run.add_argument(
        "--plan", type=Path, metavar="FILE", help="make the video of a plan that framefit plan --json wrote"
    )
    run.add_argument("--resume", metavar="ID", help="go on with an interrupted run")
    run.add_argument("--restart", action="store_true", help="with --resume: begin again from step 0")

    plan = _command(names, "plan", commands.plan, "show what a run would do, and why, without loading the model")
    _request_flags(plan)
    _option_flags(plan)
    plan.add_argument("--diff", nargs=2, type=Path, metavar=("A", "B"), help="what differs between two saved plans")
    plan.add_argument("--table", action="store_true", help="what fits on cards of 8 to 48 GB, as Markdown; minutes")

    profile = _command(names, "profile", commands.profile, "show where a run's time and memory go, phase by phase")
    _profile_flags(profile)

    diagnose = _command(names, "diagnose", commands.diagnose, "say what holds a run up, and what would help most")
    _profile_flags(diagnose)
    diagnose.add_argument(
        "--from", type=Path, metavar="FOLDER", dest="profile", help="read what framefit profile wrote; run nothing"
    )
    diagnose.add_argument("--layers", action="store_true", help="also trace a loss of quality to a layer")

    models = _command(names, "models", None, "list, fetch and check models").add_subparsers(
        required=True, metavar="COMMAND"
    )
    _command(models, "ls", commands.models_ls, "the models that framefit runs")
    _command(models, "pull", commands.models_pull, "download a model from the hub").add_argument(
        "model", metavar="MODEL", help="model id or hub repository id"
    )
    sound = _command(
        models, "verify", commands.models_verify, "check a model's files: complete, whole, of the right shape"
    )
    sound.add_argument("model", metavar="MODEL", help="model id, or a local folder")
    sound.add_argument("--quick", action="store_true", help="leave the hashes out")

    doctor = _command(names, "doctor", commands.doctor, "show this machine, the models on it and runs to resume")
    doctor.add_argument("--probe", action="store_true", help="measure the device, and file what plans need of it")
    doctor.add_argument("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N (default auto)")
    doctor.add_argument("--checkpoint-dir", metavar="DIR", type=Path, help="where step checkpoints are")
    inspect = _command(names, "inspect", commands.inspect, "show what a video file says of itself")
    inspect.add_argument("file", type=Path, metavar="FILE", help="a video, or a folder of PNGs")

    compare = _command(names, "compare", commands.compare, "measure how far a video is from a reference")
    compare.add_argument("ours", type=Path, metavar="A", help="the video to judge, or a folder of PNGs")
    compare.add_argument("reference", type=Path, metavar="B", help="what it should equal")
    compare.add_argument("--metric", metavar="NAME[,NAME]", help="default: all that can be measured")
    compare.add_argument("--min", action="append", default=[], type=_bar, metavar="NAME=N", help="exit 1 if under")
    compare.add_argument("--max", action="append", default=[], type=_bar, metavar="NAME=N", help="exit 1 if over")
    compare.add_argument("--lpips-weights", type=Path, metavar="FILE", help="safetensors of AlexNet or VGG-16")
    compare.add_argument("--plot", type=Path, metavar="FILE", help="PNG of the metrics frame by frame")
    compare.add_argument("--side-by-side", type=Path, metavar="FILE", help="a video of both")
    compare.add_argument("--overwrite", action="store_true", help="replace these files if they exist")

    verify = _command(names, "verify", commands.verify, "prove a plan: run it beside the untouched model")
    _request_flags(verify)
    _option_flags(verify)
    verify.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="default: outputs/verify_<time>")
    verify.add_argument("--overwrite", action="store_true", help="replace FOLDER if it exists")
    verify.add_argument("--lpips-weights", type=Path, metavar="FILE", help="safetensors of AlexNet or VGG-16")

    tune = _command(names, "tune", commands.tune, "find the fastest settings on this device, and file them for run")
    _request_flags(tune)
    tune.add_argument("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N (default auto)")
    tune.add_argument("--precision", choices=["bf16", "fp16", "fp32"], help="default: what the device computes best")
    tune.add_argument("--quality", choices=list(QUALITIES), default="exact", help="the weakest tier allowed")
    tune.add_argument("--memory", type=_bytes, metavar="SIZE", help="most that a run may hold, e.g. 12GiB")
    tune.add_argument("--restart", action="store_true", help="forget the trials of an interrupted search")

    rerun = _command(names, "rerun", commands.rerun, "make a video again from the parameters inside it")
    rerun.add_argument("file", type=Path, metavar="FILE", help="a video, or a folder of PNGs")
    rerun.add_argument("--image", type=Path, metavar="FILE", help="the photo, where it is not found by itself")
    rerun.add_argument("--last-image", type=Path, metavar="FILE", help="the end photo, likewise")
    rerun.add_argument(
        "--lora", type=Path, metavar="FILE", action="append", default=[], dest="loras", help="a LoRA's file, likewise"
    )
    rerun.add_argument("-m", "--model", metavar="MODEL", help="the model, likewise")
    rerun.add_argument("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N (default auto)")
    _budget_flags(rerun)
    _output_flags(rerun)
    _bench_flags(_command(names, "bench", commands.bench, "measure a model's work, technique by technique"))
    return top


class _Parser(argparse.ArgumentParser):
    """Its complaints are ours: one sentence, exit code 2, JSON where that was asked for."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} ({self.prog} --help shows what is possible).")


def _command(names: Any, name: str, command: Command | None, help: str) -> argparse.ArgumentParser:
    added: argparse.ArgumentParser = names.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    if command is not None:
        added.set_defaults(command=command)
        added.add_argument("--json", action="store_true", help="print one JSON object")
    return added


def _bench_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("names", nargs="*", metavar="NAME", help="scenarios, or groups of them")
    command.add_argument("--list", action="store_true", help="show the scenarios")
    command.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="where NAME.json, .md and .png go")
    command.add_argument("--overwrite", action="store_true", help="replace them if they exist")
    command.add_argument(
        "--rows", nargs="+", metavar="ROW",
        help="stock, framefit, cache-dit, or settings as in guidance=apart (default: all that apply)",
    )  # fmt: skip
    command.add_argument("--weights", metavar="MODEL", help="random, a model id or a local folder")
    command.add_argument("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N (default auto)")
    _budget_flags(command, "vram")
    command.add_argument("--repeats", type=_count, metavar="N", help="measured calls a row (default: 5, by length)")
    command.add_argument("--profile", action="store_true", help="show where the time of a call goes, too")
    command.add_argument(
        "--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="two results of one scenario: is NEW worse?"
    )
    command.add_argument("--percent", type=float, default=5.0, metavar="P", help="with --compare: noise, in %% (5)")
    command.add_argument("--seconds", type=float, default=0.005, metavar="S", help="likewise in seconds (0.005)")
    command.add_argument("--bytes", type=_bytes, default="64MiB", metavar="SIZE", help="likewise in bytes (64MiB)")


def _request_flags(command: argparse.ArgumentParser) -> None:
    fields = Request.__dataclass_fields__
    command.add_argument(
        "image", nargs="?", type=Path, metavar="IMAGE", help=f"{fields['image'].metadata['help']} (default: a rocket)"
    )
    command.add_argument("--size", type=_size, metavar="WxH", help="pixels (default: follows the photo)")
    for name, (flags, facts) in FLAGS.items():
        command.add_argument(*flags, dest=name, help=fields[name].metadata["help"], **facts)


def _profile_flags(command: argparse.ArgumentParser) -> None:
    _request_flags(command)
    _option_flags(command)
    command.add_argument(
        "-o", "--output", type=Path, metavar="FOLDER",
        help="folder for the trace, the pictures and the figures (default: outputs/profile_<time>)",
    )  # fmt: skip
    command.add_argument("--overwrite", action="store_true", help="write into FOLDER although it is not empty")
    command.add_argument(
        "--profile-steps", type=_count, default=2, metavar="N", help="steps to watch of each expert (default 2)"
    )
    command.add_argument("--fresh-ceilings", action="store_true", help="measure what the device does at best again")


def _option_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--preset", metavar="NAME", help="the model's draft, standard or quality")
    command.add_argument("--untuned", action="store_true", help="do not use what framefit tune has filed")
    command.add_argument(
        "--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N (default auto); to plan, also a card, as rtx-4090"
    )
    _budget_flags(command)
    command.add_argument(
        "--quality", choices=list(QUALITIES), help="the weakest tier that a derived setting may have (default exact)"
    )
    command.add_argument("--precision", choices=["bf16", "fp16", "fp32"], help="default: what the device computes best")
    command.add_argument(
        "--set", action="append", default=[], type=_setting, metavar="SETTING=VALUE", dest="settings",
        help="a setting of the plan, e.g. guidance=apart; wins over the derived one",
    )  # fmt: skip


def _budget_flags(command: argparse.ArgumentParser, *only: str) -> None:
    told = Budget.flags()
    for name in only or told:
        command.add_argument(f"--{name}", type=_bytes, metavar="SIZE", help=told[name])


def _output_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "-o", "--output", type=Path, metavar="OUT",
        help=".mp4, .webp, .gif, or a folder for PNGs (default: outputs/video_<time>.mp4)",
    )  # fmt: skip
    command.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    command.add_argument("--crf", type=int, metavar="N", help="MP4 quality, 0 (best) to 51 (default 18)")
    command.add_argument(
        "--checkpoint-dir",
        type=Path,
        metavar="DIR",
        help="where step checkpoints go (default: the user's state folder)",
    )
    command.add_argument(
        "--checkpoint-every",
        type=float,
        default=0.0,
        metavar="S",
        help="seconds between checkpoints (default: each step)",
    )
    command.add_argument("--no-checkpoint", action="store_true", help="keep none: a crash loses the run")
    command.add_argument(
        "--log-every", type=int, default=10, metavar="N", help="steps between two lines of time and memory (default 10)"
    )
    command.add_argument("--preview", type=Path, metavar="FILE", help="PNG that shows the middle frame after each step")
