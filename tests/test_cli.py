"""The command line: what it prints where, and that a video, an interrupted run and a photo are found again.

Commands run in this process where they can; what a terminal or a fresh interpreter does runs in one of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from framefit import __version__, cli, video
from framefit.families import CHECKPOINTS, Checkpoint
from framefit.request import Request

Tiny = Callable[[str], Checkpoint]
Call = Callable[..., "Outcome"]

WAN, EASY = "wan2.2-i2v-a14b", "easyanimate-v5.1-7b-inp"
SMALL = ("-p", "a boat drifts", "--size", "96x64", "--frames", "5", "--steps", "2", "--seed", "7", "--device", "cpu")

pytestmark = pytest.mark.usefixtures("home")


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """stdout, which must be one JSON object and nothing else."""
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found

    @property
    def resume(self) -> list[str]:
        """The arguments of the command that stderr says to go on with."""
        found = re.search(r"with: framefit (run --resume .+)", self.err)
        assert found, self.err
        return shlex.split(found[1])

    @property
    def error(self) -> str:
        """The sentences on stderr."""
        found = re.search(r"^framefit: (.+)$", self.err, re.MULTILINE)
        assert found, self.err
        assert "Traceback" not in self.err
        return found[1]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run one command line in this process."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(a) for a in arguments])
        written = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return Outcome(stop.value.code, written.out, written.err)

    return run


@pytest.fixture
def model(tiny: Tiny) -> Path:
    folder = tiny(EASY).folder
    assert folder is not None
    return folder


@pytest.fixture
def runs(home: Path) -> Path:
    """Where step checkpoints go by default."""
    return home / "state" / "framefit" / "runs"


@pytest.fixture
def interrupts(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """(in which forward, how often): Ctrl-C there, as the terminal sends it."""

    def arrange(forward: int, times: int = 1) -> None:
        from framefit.families import easyanimate

        calls, predict = 0, easyanimate.predict

        def interrupted(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            for _ in range(times if calls == forward else 0):
                signal.raise_signal(signal.SIGINT)
            return predict(*arguments)

        monkeypatch.setattr(easyanimate, "predict", interrupted)

    return arrange


def frames(path: Path) -> np.ndarray:
    return np.stack(list(video.read(path)))


def flags_of(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.Action]]:
    """(command, flag) for every command and flag."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command, below in action.choices.items():
                yield from flags_of(below, f"{name} {command}".strip())
        else:
            yield name, action


# --- flags ---------------------------------------------------------------------------------------------------------


def test_every_flag_says_what_it_does() -> None:
    silent = [f"{name}: {'/'.join(a.option_strings) or a.dest}" for name, a in flags_of(cli.parser()) if not a.help]
    assert not silent


@pytest.mark.parametrize(
    "command", ["", *sorted({name for name, _ in flags_of(cli.parser()) if name})], ids=lambda name: name or "framefit"
)
def test_help_of_every_command(call: Call, command: str) -> None:
    shown = call(*command.split(), "--help")
    assert shown.code == 0
    assert shown.out.startswith(f"usage: framefit {command}".rstrip())
    assert not shown.err


@pytest.mark.parametrize("command", ["run", "plan"])
def test_every_field_of_the_request_has_a_flag(command: str) -> None:
    arguments = [
        command, "a.png", "-p", "b", "-m", "c", "--last-image", "d.png", "--negative", "e", "--size", "96x64",
        "--fit", "pad", "--frames", "9", "--fps", "11", "--steps", "3", "--guidance", "2,3", "--seed", "5",
        "--lora", "f", "--lora", "g",
    ]  # fmt: skip
    given = vars(cli.parser().parse_args(arguments))
    width, height = given.pop("size")
    given |= {"width": width, "height": height}
    assert {f.name: given[f.name] for f in fields(Request)} == {
        "image": Path("a.png"), "prompt": "b", "model": "c", "last_image": Path("d.png"), "negative_prompt": "e",
        "width": 96, "height": 64, "fit": "pad", "num_frames": 9, "fps": 11.0, "steps": 3, "guidance": (2.0, 3.0),
        "seed": 5, "loras": ["f", "g"],
    }  # fmt: skip


def test_every_flag_of_the_request_reaches_the_plan(call: Call, tiny: Tiny, photo: Path, end_photo: Path) -> None:
    planned = call(
        "plan", photo, "--json", *SMALL, "-m", tiny(WAN).folder, "--last-image", end_photo, "--negative", "fog",
        "--fit", "pad", "--fps", "11", "--guidance", "2,3", "--set", "guidance=together", "--precision", "bf16",
    )  # fmt: skip
    plan = planned.json
    assert plan["request"] == {
        "image": str(photo), "last_image": str(end_photo), "prompt": "a boat drifts", "negative_prompt": "fog",
        "model": str(tiny(WAN).folder), "width": 96, "height": 64, "fit": "pad", "num_frames": 5, "fps": 11.0,
        "steps": 2, "guidance": [2.0, 3.0], "seed": 7, "shift": 3.0, "loras": [],
    }  # fmt: skip
    assert plan["precision"] == "bf16"
    assert plan["settings"][0] == {"type": "guidance", "tier": "exact", "value": "together", "because": "asked for"}
    kinds = ["guidance", "quantize", "chunk", "decode", "window", "offload"]
    assert [setting["type"] for setting in plan["settings"]] == kinds


IMPORTS = """
import sys, time
began = time.perf_counter()
try:
    {what}
except SystemExit as stop:
    assert not stop.code, stop.code
print(time.perf_counter() - began, *sorted({{"torch", "diffusers", "transformers"}} & set(sys.modules)), sep="\\n")
"""


@pytest.mark.parametrize(
    "what",
    [
        "import framefit; framefit.Request",
        "from framefit.cli import main; main(['--help'])",
        "from framefit.cli import main; main(['run', '--help'])",
        "from framefit.cli import main; main(['models', 'ls'])",
    ],
)
def test_what_needs_no_torch_does_not_import_it(what: str) -> None:
    command = [sys.executable, "-c", IMPORTS.format(what=what)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\d+\.\d+", shown.stdout.splitlines()[-1]), shown.stdout


@pytest.mark.alone
def test_help_is_there_in_half_a_second() -> None:
    def seconds() -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "framefit", "--help"], capture_output=True, check=True)
        return time.perf_counter() - began

    assert min(seconds() for _ in range(3)) <= 0.5


def test_version(call: Call) -> None:
    assert call("--version").out.strip() == f"framefit {__version__}"


# --- what is printed, and where ------------------------------------------------------------------------------------


def test_run_prints_one_json_object_and_progress_on_stderr(
    call: Call, model: Path, photo: Path, tmp_path: Path, runs: Path
) -> None:
    made = call("run", photo, *SMALL, "-m", model, "-o", tmp_path / "out" / "a.mp4", "--json")
    assert made.code == 0
    told = made.json
    assert set(told) == {
        "video", "seed", "size", "num_frames", "seconds", "resumed_from_step", "plan", "report",
    }  # fmt: skip
    assert (told["seed"], told["size"], told["num_frames"], told["resumed_from_step"]) == (7, [96, 64], 5, None)
    phases = told["report"]["phases"]
    assert {phase["name"] for phase in phases} == {
        "load", "encode_text", "encode_image", "denoise:transformer", "decode", "write",
    }  # fmt: skip
    for phase in phases:
        assert set(phase) == {"name", "seconds", "peak_bytes"}
        assert phase["seconds"] >= 0
        assert phase["peak_bytes"] > 0
    assert sum(phase["seconds"] for phase in phases) <= told["seconds"] + 0.01
    assert Path(told["video"]) == tmp_path / "out" / "a.mp4"
    assert frames(Path(told["video"])).shape == (5, 64, 96, 3)
    assert "2/2" in made.err
    assert "{" not in made.err
    assert not list(runs.iterdir()), "a finished run leaves no checkpoint"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.mp4"]


def test_run_says_where_the_video_is_and_its_seed(call: Call, model: Path, photo: Path) -> None:
    made = call("run", photo, *SMALL, "-m", model)
    assert made.code == 0
    found = re.fullmatch(r"(outputs/video_\d{8}-\d{6}\.mp4)  \(seed 7, \d+\.\d s\)\n", made.out)
    assert found, made.out
    assert Path(found[1]).is_file()


def test_first_try_needs_a_prompt_only(call: Call) -> None:
    """`framefit run -p TEXT`: the bundled photo, the bundled model."""
    small = ("--size", "96x64", "--frames", "5", "--steps", "1", "--device", "cpu", "--json")
    made = [call("run", "-p", "the camera pans up", *small, "-o", f"{name}.mp4") for name in ("a", "b")]
    assert [outcome.code for outcome in made] == [0, 0]
    assert made[0].json["plan"]["request"]["model"] == "tiny"
    assert made[0].json["seed"] != made[1].json["seed"], "a seed that is not given is drawn"


def test_the_bundled_model_is_made_again_by_its_id(call: Call, photo: Path) -> None:
    """A file must not name the folder in which this framefit happens to be installed."""
    assert call("run", photo, *SMALL, "-m", "tiny", "-o", "a.mp4").code == 0
    made = call("inspect", "a.mp4", "--json").json["parameters"]
    assert (made["request"]["model"], made["local_model"]) == ("tiny", False)
    again = call("rerun", "a.mp4", "-o", "b.mp4")
    assert again.code == 0, again.err
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()


@pytest.mark.parametrize("command", ["pull", "verify"])
def test_a_model_that_is_named_to_the_user_is_known(call: Call, command: str) -> None:
    """A message must not offer 'tiny' to someone who has just typed 'tiny'."""
    told = call("models", command, "tiny")
    assert told.code == 0 or not re.search(r"nearest are.*\btiny\b", told.err)


def test_plan_prints_settings_and_leaves_nothing(call: Call, model: Path, photo: Path, home: Path) -> None:
    planned = call("plan", photo, "-m", model, "--size", "96x64", "--json")
    assert planned.code == 0
    for setting in planned.json["settings"]:
        assert set(setting) == {"type", "tier", "value", "because"}
        assert setting["tier"] in ("exact", "near", "lossy")
        assert setting["because"]
    assert planned.json["settings"]
    assert not planned.err
    assert not list(home.rglob("runs"))
    shown = call("plan", photo, "-m", model, "--size", "96x64")
    for word in ("96x64", "as the reference pipeline", "the authors' default", "CPUs compute in fp32", "GiB"):
        assert word in shown.out


def test_models_ls(call: Call) -> None:
    rows = {row["id"]: row for row in call("models", "ls", "--json").json["models"]}
    assert set(rows) == {"tiny", *CHECKPOINTS}
    assert [id for id, row in rows.items() if row["present"]] == ["tiny"], "the hub's cache here is empty"
    assert rows[WAN]["last_image"]
    assert "832x480" in rows[WAN]["sizes"]
    table = call("models", "ls").out.splitlines()
    assert {line.split()[0] for line in table} == {"id", "tiny", *CHECKPOINTS}


def test_doctor_lists_what_can_be_resumed(
    call: Call, model: Path, photo: Path, interrupts: Callable[..., None]
) -> None:
    assert call("doctor", "--json").json["runs"] == []
    interrupts(forward=1)
    stopped = call("run", photo, *SMALL, "-m", model, "-o", "a.mp4")
    found = call("doctor", "--json").json
    assert found["runs"] == [stopped.resume[-1]]
    assert found["framefit"] == __version__
    assert found["device"]["ram_free_bytes"] > 0
    assert re.fullmatch(r"\d+\.\d+.*", found["versions"]["torch"])
    assert stopped.resume[-1] in call("doctor").out


@pytest.mark.parametrize(
    ("value", "coloured"),
    [(None, True), ("1", False), ("", True)],
    ids=["unset", "set", "empty: no-color.org asks for a value"],
)
def test_no_color(
    call: Call, model: Path, photo: Path, monkeypatch: pytest.MonkeyPatch, value: str | None, coloured: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if value is not None:
        monkeypatch.setenv("NO_COLOR", value)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    made = call("run", photo, *SMALL, "-m", model, "-o", "a.mp4")
    assert made.code == 0
    assert ("\x1b[3" in made.err) is coloured


def test_a_pipe_without_a_terminal_gets_no_colour(call: Call, model: Path, photo: Path) -> None:
    assert "\x1b[3" not in call("run", photo, *SMALL, "-m", model, "-o", "a.mp4").err


def test_a_reader_that_leaves_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "framefit", "models", "ls"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    with process.stderr as stream:
        assert stream.read() == b""
    assert process.wait() == 0


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (("run", "no.png", "-p", "x"), 3, "BadImage"),
        (("run", "-p", "x", "-m", "wan"), 5, "ModelMissing"),
        (("run", "-p", "x", "--resume", "1"), 2, "UsageError"),
        (("plan", "-p", "x", "-m", WAN, "--frames", "6"), 3, "BadInput"),
        (("inspect", "no.mp4"), 3, "BadInput"),
        (("rerun", "no.mp4"), 3, "BadInput"),
        (("models", "pull", "wan"), 5, "ModelMissing"),
        (("models", "verify", "wan"), 5, "ModelMissing"),
    ],
)
def test_an_error_is_one_json_object_too(call: Call, arguments: tuple[str, ...], code: int, kind: str) -> None:
    told = call(*arguments, "--json")
    assert told.code == code
    assert told.json == {"error": {"type": kind, "message": told.error, "exit_code": code}}


@pytest.mark.parametrize(
    "arguments",
    [("run", "-p", "x", "--size", "big"), ("run", "-p", "x", "--steps", "two"), ("inspect",), ("plan", "--fit", "x")],
    ids=" ".join,
)
def test_a_usage_error_is_one_json_object_too(call: Call, arguments: tuple[str, ...]) -> None:
    told = call(*arguments, "--json")
    assert told.code == 2
    assert told.json["error"]["exit_code"] == 2


# --- what a file says of itself ------------------------------------------------------------------------------------


@pytest.fixture
def made(call: Call, tiny: Tiny, photo: Path, tmp_path: Path) -> Callable[..., Path]:
    """(name of the file, flags) -> a video of a photo that lies in a folder of its own."""

    def make(name: str = "a.mp4", *extra: object, id: str = EASY) -> Path:
        folder = tmp_path / "my private photos"
        folder.mkdir(exist_ok=True)
        output = tmp_path / "out" / name
        shutil.copy(photo, folder / "boat.png")
        outcome = call("run", folder / "boat.png", *SMALL, "-m", tiny(id).folder, "-o", output, *extra)
        assert outcome.code == 0, outcome.err
        return output

    return make


def photo_of(output: Path) -> Path:
    return output.parent.parent / "my private photos" / "boat.png"


def test_inspect_shows_parameters_and_marks(call: Call, made: Callable[..., Path]) -> None:
    output = made()
    seen = call("inspect", output, "--json").json
    assert (seen["format"], seen["width"], seen["height"], seen["num_frames"]) == ("mp4", 96, 64, 5)
    assert seen["parameters"]["request"]["prompt"] == "a boat drifts"
    assert seen["parameters"]["request"]["seed"] == 7
    assert seen["parameters"]["weights"]
    assert seen["marks"]["DigitalSourceType"].endswith("/trainedAlgorithmicMedia")
    assert json.loads(seen["marks"]["AIGC"])["Label"] == "1"
    shown = call("inspect", output).out
    for word in ("mp4", "96", "trainedAlgorithmicMedia", "AIGC", '"prompt": "a boat drifts"', '"seed": 7'):
        assert word in shown


def test_inspect_of_a_file_that_another_program_made(call: Call, tmp_path: Path) -> None:
    Image.new("RGB", (32, 16)).save(tmp_path / "other.gif")
    seen = call("inspect", tmp_path / "other.gif", "--json").json
    assert (seen["width"], seen["parameters"], seen["marks"]) == (32, None, {})
    assert call("rerun", tmp_path / "other.gif").code == 3


@pytest.mark.parametrize("name", ["a.mp4", "a.webp", "a.gif", "folder"])
def test_no_file_tells_where_the_photo_lay(made: Callable[..., Path], name: str) -> None:
    output = made(name)
    parts = sorted(output.iterdir()) if output.is_dir() else [output]
    for part in parts:
        data = part.read_bytes()
        assert b"boat.png" in data
        assert b"my private photos" not in data


@pytest.mark.parametrize("name", ["a.mp4", "a.webp", "a.gif", "folder"])
def test_rerun_gives_the_same_frames(call: Call, made: Callable[..., Path], name: str) -> None:
    output = made(name)
    again = output.with_name(f"again{output.suffix}")
    outcome = call("rerun", output, "-o", again, "--device", "cpu", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["seed"] == 7
    assert np.array_equal(frames(again), frames(output))
    assert len(np.unique(frames(output))) > 20, "a picture, not a flat field"


def test_the_same_frames_make_the_same_file(tmp_path: Path) -> None:
    """What `rerun` and `--resume` promise rests on it: a dozen writes, with the memory in between moved about."""
    rng = np.random.default_rng(0)
    clip = [np.clip(rng.normal(150, 20, (480, 832, 3)), 0, 255).astype(np.uint8) for _ in range(5)]
    files: set[bytes] = set()
    held: list[np.ndarray] = []
    for _ in range(12):
        held = [*held[-3:], rng.integers(0, 255, rng.integers(1, 3_000_000), dtype=np.uint8)]
        copies = iter([frame.copy() for frame in clip])
        video.write(
            video.Video(frames=copies, num_frames=5, width=832, height=480, fps=8), tmp_path / "a.mp4",
            parameters={}, overwrite=True,
        )  # fmt: skip
        files.add((tmp_path / "a.mp4").read_bytes())
    assert len(files) == 1


def test_rerun_obeys_every_parameter(call: Call, made: Callable[..., Path], end_photo: Path) -> None:
    output = made(
        "a.mp4", "--last-image", end_photo, "--negative", "fog", "--fit", "pad", "--fps", "11", "--guidance", "2,3",
        "--set", "guidance=together", "--precision", "bf16", id=WAN,
    )  # fmt: skip
    again = output.with_name("again.mp4")
    assert call("rerun", output, "-o", again, "--device", "cpu").code == 0
    old, new = video.inspect(output), video.inspect(again)
    assert new.parameters == old.parameters
    assert new.fps == 11
    assert np.array_equal(frames(again), frames(output))


@pytest.mark.parametrize("where", ["where it was", "beside the video", "here"])
def test_rerun_finds_the_photo(call: Call, made: Callable[..., Path], home: Path, where: str) -> None:
    output = made()
    if where != "where it was":
        for note in (home / "state" / "framefit" / "seen").glob(
            "?" * 64
        ):  # by SHA-256: photos; the model's name is shorter
            note.unlink()
        target = output.parent if where == "beside the video" else Path.cwd()
        photo_of(output).rename(target / "boat.png")
    assert call("rerun", output, "-o", "again.mp4", "--device", "cpu").code == 0


@pytest.mark.parametrize("gone", ["deleted", "moved", "changed"])
def test_rerun_says_that_the_photo_is_gone(
    call: Call, made: Callable[..., Path], end_photo: Path, tmp_path: Path, gone: str
) -> None:
    output = made()
    place = photo_of(output)
    if gone == "moved":
        place.rename(tmp_path / "elsewhere.png")
    elif gone == "changed":
        shutil.copy(end_photo, place)
    else:
        place.unlink()
    refused = call("rerun", output, "-o", "again.mp4")
    assert refused.code == 3
    assert "boat.png" in refused.error
    assert "--image" in refused.error
    assert not Path("again.mp4").exists()
    if gone == "moved":
        assert call("rerun", output, "--image", tmp_path / "elsewhere.png", "-o", "again.mp4").code == 0


def test_rerun_without_the_end_image_asks_for_what_can_be_given(
    call: Call, made: Callable[..., Path], end_photo: Path, tmp_path: Path
) -> None:
    """`--image` is the first photo: it does not help where the end image is the one that is gone."""
    shutil.copy(end_photo, tmp_path / "end.png")
    output = made("a.mp4", "--last-image", tmp_path / "end.png")
    (tmp_path / "end.png").unlink()
    refused = call("rerun", output, "-o", "again.mp4")
    assert refused.code == 3
    assert "end.png" in refused.error
    assert not re.search(r"give it with --image\b", refused.error)


def test_rerun_refuses_another_photo(call: Call, made: Callable[..., Path], end_photo: Path) -> None:
    output = made()
    refused = call("rerun", output, "--image", end_photo, "-o", "again.mp4")
    assert refused.code == 3
    assert "is not the photo" in refused.error
    assert not Path("again.mp4").exists()


@pytest.mark.parametrize("given", ["no-such.png", "."], ids=["missing", "folder"])
def test_rerun_refuses_what_is_no_photo(call: Call, made: Callable[..., Path], given: str) -> None:
    refused = call("rerun", made(), "--image", given, "-o", "again.mp4")
    assert refused.code == 3
    assert given in refused.error


def test_rerun_does_not_replace_the_original(call: Call, made: Callable[..., Path]) -> None:
    output = made()
    content = output.read_bytes()
    refused = call("rerun", output, "-o", output)
    assert refused.code == 3
    assert "--overwrite" in refused.error
    assert output.read_bytes() == content
    assert call("rerun", output, "-o", output, "--overwrite").code == 0


def test_photos_are_remembered_in_the_state_folder_only(call: Call, made: Callable[..., Path], tmp_path: Path) -> None:
    """A folder for checkpoints is no licence to write beside it, and rerun need not be told of it."""
    output = made("a.mp4", "--checkpoint-dir", tmp_path / "disk" / "steps")
    assert {path.name for path in (tmp_path / "disk").iterdir()} <= {"steps"}
    assert call("rerun", output, "-o", "again.mp4").code == 0


# --- Ctrl-C and going on -------------------------------------------------------------------------------------------

STEPS = 120


def test_ctrl_c_then_resume_gives_the_uninterrupted_video(
    call: Call, model: Path, photo: Path, runs: Path, tmp_path: Path
) -> None:
    asked = ["run", photo, *SMALL, "-m", model, "--steps", STEPS, "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "framefit", *map(str, asked), "-o", str(tmp_path / "out" / "a.mp4")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not list(runs.glob("*/step.safetensors")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    stopped = Outcome(process.returncode, out, err)
    assert stopped.code == 130
    assert stopped.json["error"]["exit_code"] == 130
    found = re.search(rf"stopped after step (\d+) of {STEPS}\b", stopped.error)
    assert found, err
    assert "press Ctrl-C again" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())

    resumed = call(*stopped.resume, "--json")
    assert resumed.code == 0, resumed.err
    assert resumed.json["resumed_from_step"] == int(found[1])
    assert 1 <= int(found[1]) < STEPS
    assert Path(resumed.json["video"]) == tmp_path / "out" / "a.mp4"
    assert not list(runs.iterdir())
    assert call(*asked, "-o", "b.mp4").code == 0
    assert np.array_equal(frames(tmp_path / "out" / "a.mp4"), frames(Path("b.mp4")))
    assert call(*stopped.resume).code == 3, "a finished run cannot be resumed"


@pytest.fixture
def stopped(
    call: Call, model: Path, photo: Path, tmp_path: Path, interrupts: Callable[..., None]
) -> Callable[..., Outcome]:
    """(flags, Ctrl-C in which forward and how often) -> a run of four steps that was interrupted."""

    def stop(*extra: object, forward: int = 2, times: int = 1) -> Outcome:
        shutil.copy(photo, tmp_path / "boat.png")
        copied = tmp_path / "model"
        if not copied.exists():
            shutil.copytree(model, copied)
        interrupts(forward, times)
        return call("run", tmp_path / "boat.png", *SMALL, "--steps", 4, "-m", copied, "-o", "a.mp4", *extra)

    return stop


def test_the_command_that_is_printed_works(call: Call, stopped: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = stopped("--checkpoint-dir", tmp_path / "my steps")
    assert outcome.code == 130
    resumed = call(*outcome.resume, "--json")
    assert resumed.code == 0, resumed.err
    assert resumed.json["resumed_from_step"] == 2


def test_a_second_ctrl_c_stops_at_once_and_says_how_to_go_on(call: Call, stopped: Callable[..., Outcome]) -> None:
    outcome = stopped(forward=2, times=2)
    assert outcome.code == 130
    assert outcome.error
    resumed = call(*outcome.resume, "--json")
    assert resumed.code == 0, resumed.err
    assert resumed.json["resumed_from_step"] == 1, "the step that was cut short is taken again"


def test_ctrl_c_after_the_last_step(call: Call, stopped: Callable[..., Outcome]) -> None:
    outcome = stopped(forward=4)
    assert outcome.code == 130
    assert not Path("a.mp4").exists()
    resumed = call(*outcome.resume, "--json")
    assert resumed.json["resumed_from_step"] == 4
    assert frames(Path("a.mp4")).shape == (5, 64, 96, 3)


def test_ctrl_c_without_checkpoints(stopped: Callable[..., Outcome], runs: Path) -> None:
    outcome = stopped("--no-checkpoint")
    assert outcome.code == 130
    assert "--resume" not in outcome.err
    assert not runs.exists()
    assert not Path("a.mp4").exists()


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_under_json_names_the_run(stopped: Callable[..., Outcome], runs: Path, times: int) -> None:
    """A program that stops a run must learn from stdout how to go on with it."""
    outcome = stopped("--json", times=times)
    assert outcome.code == 130
    assert next(runs.iterdir()).name in json.dumps(outcome.json["error"])


def test_ctrl_c_is_python_s_own_again_after_a_run(stopped: Callable[..., Outcome]) -> None:
    before = signal.getsignal(signal.SIGINT)
    assert stopped().code == 130
    assert signal.getsignal(signal.SIGINT) is before


def test_checkpoints_now_and_then(call: Call, stopped: Callable[..., Outcome]) -> None:
    """Where not every step is saved, the one that the user stopped at is."""
    outcome = stopped("--checkpoint-every", 1000, forward=3)
    assert call(*outcome.resume, "--json").json["resumed_from_step"] == 3


def test_resume_elsewhere(call: Call, stopped: Callable[..., Outcome]) -> None:
    resumed = call(*stopped().resume, "-o", "b.webp", "--json")
    assert resumed.code == 0, resumed.err
    assert not Path("a.mp4").exists()
    assert frames(Path("b.webp")).shape == (5, 64, 96, 3)


def test_restart_begins_again(call: Call, stopped: Callable[..., Outcome], runs: Path) -> None:
    resumed = call(*stopped().resume, "--restart", "--json")
    assert resumed.code == 0, resumed.err
    assert resumed.json["resumed_from_step"] is None
    assert not list(runs.iterdir())


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("-p", "x"), ("--model", "tiny"), ("--last-image", "x.png"), ("--negative", "x"), ("--size", "64x64"),
        ("--fit", "crop"), ("--frames", "9"), ("--fps", "9"), ("--steps", "9"), ("--guidance", "2"), ("--seed", "8"),
        ("--lora", "x"), ("--preset", "draft"), ("--precision", "bf16"), ("--set", "guidance=apart"),
    ],
)  # fmt: skip
def test_resume_refuses_a_flag_that_would_change_the_run(call: Call, flag: str, value: str) -> None:
    refused = call("run", "--resume", "20250101-000000-abcdef", flag, value)
    assert refused.code == 2
    assert {"-p": "prompt"}.get(flag, flag) in refused.error, "the flag as it is typed"


@pytest.mark.parametrize("change", [("other.png",), ("--device", "cuda:99")], ids=" ".join)
def test_resume_does_not_ignore_another_photo_or_device(
    call: Call, stopped: Callable[..., Outcome], change: tuple[str, ...], end_photo: Path
) -> None:
    shutil.copy(end_photo, "other.png")
    assert call(*stopped().resume, *change).code == 2
    assert not Path("a.mp4").exists()


def test_resume_of_an_unknown_run_lists_those_that_exist(call: Call, stopped: Callable[..., Outcome]) -> None:
    none = call("run", "--resume", "20250101-000000-abcdef")
    assert none.code == 3
    assert "none" in none.error
    id = stopped().resume[-1]
    for unknown in ("20250101-000000-abcdef", "nonsense", "../runs", "x" * 300):
        refused = call("run", "--resume", unknown)
        assert refused.code == 3
        assert id in refused.error


def test_a_folder_without_a_plan_is_not_offered(call: Call, stopped: Callable[..., Outcome], runs: Path) -> None:
    stopped()
    (runs / "20250101-000000-abcdef").mkdir()
    assert "20250101-000000-abcdef" not in call("run", "--resume", "nonsense").error


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--restart", "-p", "x"), "--resume"),
        (("--resume", "20250101-000000-abcdef", "--no-checkpoint"), "--no-checkpoint"),
        ((), "-p"),
    ],
)
def test_run_refuses_flags_that_make_no_sense(call: Call, arguments: tuple[str, ...], word: str) -> None:
    refused = call("run", *arguments)
    assert refused.code == 2
    assert word in refused.error


def damaged(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["step.safetensors", "conditioning.safetensors"])
@pytest.mark.parametrize("harm", [damaged, lambda path: path.write_bytes(path.read_bytes()[:-9])], ids=["bit", "cut"])
def test_resume_of_a_corrupt_run_offers_a_restart(
    call: Call, stopped: Callable[..., Outcome], runs: Path, file: str, harm: Callable[[Path], Any]
) -> None:
    resume = stopped().resume
    harm(runs / resume[-1] / file)
    refused = call(*resume)
    assert refused.code == 3
    assert "corrupt" in refused.error
    assert "--restart" in refused.error
    assert call(*resume, "--restart").code == 0


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"plan": 1, "weights": "", "output": ""}'])
def test_resume_of_a_run_without_its_plan(call: Call, stopped: Callable[..., Outcome], runs: Path, text: str) -> None:
    resume = stopped().resume
    (runs / resume[-1] / "plan.json").write_text(text)
    refused = call(*resume)
    assert refused.code == 3
    assert resume[-1] in refused.error


def test_resume_with_other_weights(call: Call, stopped: Callable[..., Outcome], tmp_path: Path) -> None:
    resume = stopped().resume
    damaged(tmp_path / "model" / "transformer" / "diffusion_pytorch_model.safetensors")
    refused = call(*resume)
    assert refused.code == 3
    assert "other weights" in refused.error
    again = call(*resume, "--restart", "--json")
    assert (again.code, again.json["resumed_from_step"]) == (0, None)


def test_resume_without_the_model_keeps_the_run(call: Call, stopped: Callable[..., Outcome], tmp_path: Path) -> None:
    resume = stopped().resume
    (tmp_path / "model").rename(tmp_path / "away")
    assert call(*resume).code == 5
    (tmp_path / "away").rename(tmp_path / "model")
    assert call(*resume).code == 0


def test_resume_does_not_need_the_photo(call: Call, stopped: Callable[..., Outcome], tmp_path: Path) -> None:
    """It is encoded already: its hash was known when the run began."""
    resume = stopped().resume
    (tmp_path / "boat.png").unlink()
    resumed = call(*resume, "--json")
    assert resumed.code == 0, resumed.err


def test_resume_marks_the_video_with_the_photo_that_it_was_made_from(
    call: Call, stopped: Callable[..., Outcome], tmp_path: Path, photo: Path, end_photo: Path
) -> None:
    resume = stopped().resume
    shutil.copy(end_photo, tmp_path / "boat.png")  # another photo under the same name
    outcome = call(*resume)
    assert outcome.code == 0, outcome.err
    assert call("rerun", "a.mp4", "--image", photo, "-o", "again.mp4").code == 0
    assert np.array_equal(frames(Path("again.mp4")), frames(Path("a.mp4")))


def test_resume_does_not_replace_a_file(call: Call, stopped: Callable[..., Outcome]) -> None:
    resume = stopped().resume
    Path("a.mp4").write_bytes(b"precious")
    refused = call(*resume)
    assert refused.code == 3
    assert "--overwrite" in refused.error
    assert Path("a.mp4").read_bytes() == b"precious"
    assert call(*resume, "--overwrite").code == 0


# --- preview -------------------------------------------------------------------------------------------------------


def test_preview(call: Call, model: Path, photo: Path) -> None:
    assert call("run", photo, *SMALL, "-m", model, "-o", "a.mp4", "--preview", "p.png").code == 0
    with Image.open("p.png") as image:
        assert (image.format, image.size) == ("PNG", (96, 64))
