"""Whatever is wrong with what a user gives, the answer is a sentence and an exit code, and nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from framefit import cli, video
from framefit.families import CHECKPOINTS, Checkpoint, easyanimate

Tiny = Callable[[str], Checkpoint]
Refused = Callable[..., str]
Run = Callable[..., tuple[int, str, str]]

WAN, EASY, I2VGEN = "wan2.2-i2v-a14b", "easyanimate-v5.1-7b-inp", "i2vgen-xl"
USAGE, BAD_INPUT, DOES_NOT_FIT, MISSING = 2, 3, 4, 5
DENOISER, ENCODER = "transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def run(tiny: Tiny, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """(flags, `image` and the tiny checkpoint's row `id`) -> exit code, stdout, stderr of a short run to out/a.mp4.

    A flag given twice counts as given last, so `flags` change what the run is asked for.
    """

    def start(*flags: object, image: object = photo, id: str = EASY) -> tuple[int, str, str]:
        (tmp_path / "out").mkdir(exist_ok=True)
        asked = [
            "run", image, "-p", "a boat drifts", "-m", tiny(id).folder, "--size", "96x64", "--frames", 5,
            "--steps", 2, "--seed", 7, "--device", "cpu", "-o", tmp_path / "out" / "a.mp4", *flags,
        ]  # fmt: skip
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(word) for word in asked])
        written = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, written.out, written.err

    return start


@pytest.fixture
def refused(run: Run, tmp_path: Path, home: Path) -> Refused:
    """(exit code, flags) -> the sentences of a run that must fail with it and leave nothing behind."""

    def check(expected: int, *flags: object, image: object = None, id: str = EASY) -> str:
        before = sorted((tmp_path / "out").glob("*"))
        code, out, err = run(*flags, id=id, **({} if image is None else {"image": image}))
        assert code == expected, err
        assert out == ""
        assert sorted((tmp_path / "out").glob("*")) == before
        assert not list(home.rglob("step.safetensors*")) + list(home.rglob("plan.json"))
        return sentence(err)

    return check


def sentence(err: str) -> str:
    """What a refusal says: one or two sentences, short enough to be read."""
    found = re.search(r"^framefit: (.+)$", err, re.MULTILINE)
    assert found, err
    assert "Traceback" not in err
    assert len(found[1]) < 600
    assert re.search(r"[.)]$", found[1])
    assert not re.search(r"(are|has|use|:) \.(?!\w)", found[1]), "a list in it is empty"
    return found[1]


def usage(run: Run, capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    """stderr of a command line that argparse refuses."""
    code, out, err = run(*flags)
    assert (code, out) == (USAGE, "")
    return err.splitlines()[-1]


# --- photos --------------------------------------------------------------------------------------------------------


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is of this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ("there is no photo",)),
        (b"", ("JPEG, PNG, WebP or AVIF",)),
        (b"no picture at all", ("JPEG, PNG, WebP or AVIF",)),
        (png_claiming(64, 64), ("corrupt or cut short",)),
        (png_claiming(100_000, 100_000), ("120 million pixels", "scale it down")),
        (png_claiming(20_000, 10_000), ("120 million pixels",)),
        (png_claiming(4, 400), ("4x400", "8 px or more")),
    ],
    ids=["missing", "empty", "text", "cut", "bomb", "huge", "thin"],
)
@pytest.mark.parametrize("flag", [None, "--last-image"])
def test_bad_photo(refused: Refused, content: bytes | None, words: tuple[str, ...], flag: str | None) -> None:
    if content is not None:
        Path("bad.png").write_bytes(content)
    told = refused(BAD_INPUT, flag, "bad.png") if flag else refused(BAD_INPUT, image="bad.png")
    for word in ("bad.png", *words):
        assert word in told


@pytest.mark.parametrize("place", [".", "/dev/zero", "/" + "x" * 300, "bad.png/x.png"])
def test_no_photo_file(refused: Refused, place: str) -> None:
    Path("bad.png").touch()
    assert place in refused(BAD_INPUT, image=place)


def test_photo_whose_name_is_not_unicode(run: Run, photo: Path) -> None:
    """A name in Latin-1, as old cameras and archives leave it, is a legal name on Linux."""
    name = os.fsdecode(b"caf\xe9.png")
    shutil.copy(photo, name)
    code, _, err = run(image=name)
    assert code == 0, err


# --- numbers and words ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("id", "flags", "code", "words"),
    [
        (EASY, ("-p", ""), BAD_INPUT, ("prompt is empty", "-p")),
        (EASY, ("-p", " \n"), BAD_INPUT, ("prompt is empty",)),
        (WAN, ("--frames", 6), BAD_INPUT, ("6 frames", "4n+1", "5 or 9")),
        (WAN, ("--frames", 80), BAD_INPUT, ("80 frames", "77 or 81")),
        (WAN, ("--frames", 2), BAD_INPUT, ("1 or 5",)),
        (WAN, ("--frames", 100_000), BAD_INPUT, ("100000 frames", "1025")),
        (WAN, ("--frames", 0), BAD_INPUT, ("0", "1 or more")),
        (WAN, ("--frames", -5), BAD_INPUT, ("-5", "1 or more")),
        (WAN, ("--size", "100x64"), BAD_INPUT, ("100x64", "multiples of 16", "96x64 or 112x64")),
        (WAN, ("--size", "1920x1080"), BAD_INPUT, ("1920x1080", "921,600")),
        (WAN, ("--size", "0x64"), BAD_INPUT, ("width is 0",)),
        (WAN, ("--fit", "nearest"), USAGE, ("--fit nearest", "--size")),
        (EASY, ("--fps", 0), BAD_INPUT, ("fps is 0", "from 0.1 to 240")),
        (EASY, ("--fps", -1), BAD_INPUT, ("fps is -1",)),
        (EASY, ("--fps", "nan"), BAD_INPUT, ("fps is nan",)),
        (EASY, ("--fps", "inf"), BAD_INPUT, ("fps is inf",)),
        (EASY, ("--fps", "1e-6"), BAD_INPUT, ("fps is 1e-06",)),
        (EASY, ("--steps", 0), BAD_INPUT, ("steps is 0", "1 or more")),
        (EASY, ("--steps", -3), BAD_INPUT, ("steps is -3",)),
        (I2VGEN, ("--steps", 1001), BAD_INPUT, ("1001", "1000")),
        (EASY, ("--guidance", "nan"), BAD_INPUT, ("guidance is nan",)),
        (EASY, ("--guidance", -1), BAD_INPUT, ("guidance is -1", "0 to 100")),
        (EASY, ("--guidance", "1e9"), BAD_INPUT, ("guidance is 1e+09",)),
        (EASY, ("--guidance", "2,3"), BAD_INPUT, ("2 guidance scales", "1 expert:", "give 1")),
        (WAN, ("--guidance", "2,3,4"), BAD_INPUT, ("3 guidance scales", "2 experts", "1 or 2")),
        (EASY, ("--seed", -1), BAD_INPUT, ("seed is -1",)),
        (EASY, ("--seed", 2**63), BAD_INPUT, ("2^63 - 1",)),
        (I2VGEN, ("--last-image", "end.png"), BAD_INPUT, ("end image", "only a start image")),
        (WAN, ("--last-image", "end.png", "--frames", 1), BAD_INPUT, ("1 frame",)),
        (EASY, ("--lora", "x.safetensors"), BAD_INPUT, ("no LoRA at x.safetensors",)),
        (WAN, ("--preset", "best"), USAGE, ("'best'", "draft, standard, quality")),
        (EASY, ("--set", "speed=high"), USAGE, ("'speed'", "the settings are quantize")),
        (EASY, ("--set", "guidance=fast"), USAGE, ("guidance=fast", "guidance=together or guidance=apart")),
        (EASY, ("--device", "gpu"), USAGE, ("'gpu'", "auto, cpu, cuda or cuda:N")),
        (EASY, ("--device", "cuda:99"), USAGE, ("'cuda:99'", "CUDA devices")),
        (EASY, ("--device", "cuda:x"), USAGE, ("'cuda:x'",)),
        (EASY, ("--crf", 52), USAGE, ("--crf is 52", "0 to 51")),
        (EASY, ("--crf", -1), USAGE, ("--crf is -1",)),
        (EASY, ("--checkpoint-every", -1), USAGE, ("--checkpoint-every is -1",)),
        (EASY, ("--checkpoint-every", "nan"), USAGE, ("--checkpoint-every is nan",)),
        (EASY, ("--restart",), USAGE, ("--resume",)),
    ],
    ids=lambda value: " ".join(map(str, value))[:40] if isinstance(value, tuple) else "",
)
def test_bad_request(
    refused: Refused, end_photo: Path, id: str, flags: tuple[object, ...], code: int, words: tuple[str, ...]
) -> None:
    shutil.copy(end_photo, "end.png")
    told = refused(code, *flags, id=id)
    for word in words:
        assert word in told


@pytest.mark.parametrize("size", ["1x1", "10x10", "16x100000", "100000x16", "99999x99999", "97x65", "1300x720"])
@pytest.mark.parametrize("id", [WAN, "wan2.2-ti2v-5b", EASY, I2VGEN])
def test_illegal_size_names_the_two_nearest(refused: Refused, size: str, id: str) -> None:
    told = refused(BAD_INPUT, "--size", size, "-m", id)
    found = re.search(r"the nearest are (\d+)x(\d+) or (\d+)x(\d+)\.$", told)
    assert found, told
    sizes, limits = [int(side) for side in found.groups()], CHECKPOINTS[id].sizes
    for width, height in (sizes[:2], sizes[2:]):
        assert limits.refuse(width, height) is None, f"{width}x{height} is legal"
    assert sizes[:2] != sizes[2:]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--size", "big"), ("--size", "WIDTHxHEIGHT")),
        (("--size", "96"), ("--size",)),
        (("--size", "-96x64"), ("--size",)),
        (("--guidance", "a"), ("--guidance", "3.5,3.5")),
        (("--guidance", ","), ("--guidance",)),
        (("--frames", "5.5"), ("--frames",)),
        (("--steps", "two"), ("--steps",)),
        (("--fps", "fast"), ("--fps",)),
        (("--fit", "stretch"), ("--fit", "nearest")),
        (("--precision", "int8"), ("--precision", "bf16")),
        (("--set", "apart"), ("--set", "SETTING=VALUE")),
        (("--sead", "7"), ("--sead",)),
    ],
    ids=" ".join,
)
def test_bad_flag(run: Run, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], words: tuple[str, ...]) -> None:
    told = usage(run, capsys, *flags)
    for word in words:
        assert word in told


def test_no_better_preset_for_the_bundled_model(refused: Refused) -> None:
    assert "tiny has draft, standard" in refused(USAGE, "-m", "tiny", "--preset", "quality")


@pytest.mark.parametrize("id", [WAN, EASY, "easyanimate-v5-7b-zh-inp", I2VGEN])
def test_long_prompt_is_cut_and_the_user_told(run: Run, tmp_path: Path, id: str) -> None:
    """The tiny tokenizers spell, so that a word is about as many tokens as it has letters."""
    prompt = "a boat " + "drifts to the left " * 60 + "quickly"
    code, out, err = run("-p", prompt, "--guidance", 1, "--json", id=id)
    assert code == 0, err
    notices = [notice for notice in json.loads(out)["report"]["notices"] if "tokens" in notice]
    assert len(notices) == 1
    assert f"note: {notices[0]}" in err
    told = re.search(r"takes (\d+) tokens and this model reads (\d+): .* cut, from '(.+?)(\.\.\.)?' on\.$", notices[0])
    assert told, notices
    assert int(told[1]) > int(told[2]) >= 50
    assert told[3] in prompt
    assert (tmp_path / "out" / "a.mp4").is_file()


def test_a_prompt_that_fits_is_not_cut(run: Run) -> None:
    code, out, err = run("-p", "a boat drifts", "--guidance", 1, "--json", id=WAN)
    assert code == 0, err
    assert json.loads(out)["report"]["notices"] == []


@pytest.mark.parametrize(
    "text", ["a boat \N{SAILBOAT}\N{VARIATION SELECTOR-16}", "船向左漂", "-p", "\x00\x07", "%s {x}"]
)
def test_prompt_of_any_characters(run: Run, text: str) -> None:
    code, _, err = run(f"--prompt={text}")
    assert code == 0, err


def test_prompt_that_is_not_unicode(refused: Refused, run: Run) -> None:
    """Bytes that no encoding explains reach Python as lone surrogates: say so before the model is read."""
    assert "prompt" in refused(BAD_INPUT, "-p", os.fsdecode(b"caf\xe9"))


# --- models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "nearest"),
    [
        ("wan2.2-i2v-14b", "wan2.2-i2v-a14b"),
        ("WAN2.2-TI2V-5", "wan2.2-ti2v-5b"),
        ("i2vgen", "i2vgen-xl"),
        ("wan-ai/wan2.2-ti2v-5b", "wan-ai/wan2.2-ti2v-5b-diffusers"),
        ("zzz", "framefit models ls"),
        ("no/such/folder", "framefit models ls"),
        ("x" * 300, "framefit models ls"),
        ("", "framefit models ls"),
    ],
)
def test_unknown_model(refused: Refused, model: str, nearest: str) -> None:
    told = refused(MISSING, "-m", model)
    assert f"'{model}'" in told
    assert nearest in told.lower()


def test_model_that_is_not_here(refused: Refused) -> None:
    told = refused(MISSING, "-m", I2VGEN, "--size", "512x512", "--precision", "bf16")
    for word in ("i2vgen-xl", "10.0 GB", "MIT", "framefit models pull i2vgen-xl"):
        assert word in told


def test_model_that_does_not_fit(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("framefit.device._memory", lambda: (2**30, 2**29))
    told = refused(DOES_NOT_FIT, "-m", I2VGEN, "--size", "512x512")
    for word in ("i2vgen-xl", "GiB", "0.5 GiB free", "smaller model"):
        assert word in told


@pytest.fixture
def checkpoint(tiny: Tiny, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a tiny checkpoint, to be broken."""

    def copy(id: str = EASY) -> Path:
        folder = tmp_path / "model"
        source = tiny(id).folder
        assert source is not None
        shutil.copytree(source, folder)
        return folder

    return copy


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def configured(name: str, **changes: Any) -> Callable[[Path], None]:
    """Changes in a component's configuration; None takes an entry out."""

    def harm(folder: Path) -> None:
        file = next(p for p in (folder / name).glob("*.json") if p.stem in ("config", "scheduler_config"))
        config = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    return harm


@pytest.mark.parametrize(
    ("id", "harm", "words"),
    [
        (WAN, emptied, ("no model configurations", "model_index.json")),
        (WAN, lambda folder: shutil.rmtree(folder / "transformer"), ("no model configurations",)),
        (WAN, lambda folder: shutil.rmtree(folder / "transformer_2"), ("lacks the folder transformer_2",)),
        (WAN, lambda folder: (folder / "high_noise_model").mkdir(), ("own layout", "Wan-AI/Wan2.2-I2V-A14B-Diffusers")),
        (WAN, lambda folder: (folder / "models_t5_umt5-xxl-enc-bf16.pth").touch(), ("Wan", "own layout")),
        (I2VGEN, lambda folder: (folder / "i2vgen_xl_00854500.pth").touch(), ("ali-vilab/i2vgen-xl",)),
        (WAN, configured("transformer", in_channels=16), ("text-to-video", "16 input channels", "36")),
        (EASY, configured("transformer", in_channels=16), ("16 input channels", "33")),
        (I2VGEN, configured("unet", _class_name="UNet3DConditionModel"), ("UNet3DConditionModel", "models ls")),
        (WAN, configured("transformer", _class_name="FluxTransformer2DModel"), ("FluxTransformer2DModel",)),
        (EASY, lambda folder: (folder / "vae/config.json").unlink(), ("vae/config.json is missing",)),
        (EASY, lambda folder: (folder / "vae/config.json").write_text("{"), ("vae/config.json", "JSON")),
        (EASY, lambda folder: (folder / "vae/config.json").write_text("[]"), ("vae/config.json", "JSON object")),
        (EASY, lambda folder: (folder / "vae/config.json").write_bytes(b"\xff\xfe"), ("vae/config.json",)),
        (EASY, lambda folder: (folder / "model_index.json").write_text("}"), ("model_index.json",)),
        (EASY, lambda folder: [p.unlink() for p in (folder / "tokenizer").glob("*.json") if p.stem == "tokenizer"],
         ("tokenizer", "vocab")),
        (EASY, configured("scheduler", _class_name="NoSuchScheduler"), ("NoSuchScheduler",)),
        (EASY, configured("vae", block_out_channels="wide"), ("vae",)),
        (WAN, configured("transformer", num_layers="two"), ("transformer",)),
    ],
    ids=[
        "empty", "no denoiser", "one expert", "original 2.2", "original 2.1", "original I2VGen", "text-to-video",
        "control", "another unet", "another transformer", "no config", "config cut", "config a list",
        "config of bytes", "index cut", "no vocabulary", "unknown scheduler", "vae of words", "layers of words",
    ],
)  # fmt: skip
def test_folder_that_is_no_model(
    refused: Refused, checkpoint: Callable[..., Path], id: str, harm: Callable[[Path], Any], words: tuple[str, ...]
) -> None:
    folder = checkpoint(id)
    harm(folder)
    told = refused(MISSING, "-m", folder)
    for word in words:
        assert word in told


def pickled(file: Path) -> None:
    """The same weights, as torch pickles them, under the name that the libraries look for."""
    stem = "pytorch_model" if file.stem == "model" else file.stem
    torch.save(load_file(file), file.with_name(f"{stem}.bin"))
    file.unlink()


def sharded(file: Path) -> None:
    """Two shards, the second of them missing."""
    tensors = load_file(file)
    names = [f"{file.stem}-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = {key: names[number % 2] for number, key in enumerate(tensors)}
    save_file({key: tensors[key] for key in tensors if index[key] == names[0]}, file.with_name(names[0]))
    file.with_name(f"{file.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    file.unlink()


def rewritten(change: Callable[[dict[str, torch.Tensor], str], object]) -> Callable[[Path], None]:
    """The largest tensor of the file, changed."""

    def harm(file: Path) -> None:
        tensors = load_file(file)
        change(tensors, max(tensors, key=lambda key: tensors[key].numel()))
        save_file(tensors, file, {"format": "pt"})

    return harm


def header(text: bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))


HARMS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (Path.unlink, "is missing"),
    "pickle": (pickled, "is missing.*pickles.*refused"),
    "shard": (sharded, "00002-of-00002.*is missing"),
    "empty": (lambda file: file.write_bytes(b""), "again"),
    "cut": (lambda file: file.write_bytes(file.read_bytes()[:-100]), "again"),
    "longer": (lambda file: file.write_bytes(file.read_bytes() + b"x"), "again"),
    "text": (lambda file: file.write_text("<html>404 not found</html>" * 9), "again"),
    "pointer": (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\n"), "again"),
    "header a list": (header(b"[]"), "again"),
    "header of nonsense": (header(b'{"a": 1}'), "again"),
    "header without offsets": (header(b'{"a": {"dtype": "F32", "shape": [2]}}'), "again"),
    "int8": (rewritten(lambda tensors, key: tensors.update({key: (9 * tensors[key]).to(torch.int8)})), "int8|I8"),
    "all int8": (
        rewritten(lambda tensors, key: tensors.update({k: (9 * v).to(torch.int8) for k, v in tensors.items()})),
        "int8|I8",
    ),
    "tensor gone": (rewritten(lambda tensors, key: tensors.pop(key)), "lacks|missing"),
    "another shape": (rewritten(lambda tensors, key: tensors.update({key: torch.zeros(3, 5)})), "shape"),
}
"""What can have happened to a safetensors file -> the harm, and what the refusal says."""


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("file", [DENOISER, ENCODER], ids=["diffusers", "transformers"])
def test_damaged_weights(refused: Refused, checkpoint: Callable[..., Path], harm: str, file: str) -> None:
    folder = checkpoint()
    damage, words = HARMS[harm]
    damage(folder / file)
    told = refused(MISSING, "-m", folder)
    assert file.split("/")[0] in told
    assert re.search(words, told)


def test_v5_native_weights_with_a_tensor_gone(refused: Refused, checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("easyanimate-v5-7b-zh-inp")
    HARMS["tensor gone"][0](folder / DENOISER)
    assert "transformer" in refused(MISSING, "-m", folder)


def test_weights_that_are_not_finite(run: Run, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint()
    rewritten(lambda tensors, key: tensors[key].fill_(torch.nan))(folder / DENOISER)
    code, out, err = run("-m", folder)
    assert (code, out) == (1, "")
    assert "the transformer at timestep" in sentence(err)
    assert "NaN or infinity" in sentence(err)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("harm", ["missing", "pickle", "shard", "cut", "tensor gone", "another shape"])
def test_verify_says_what_is_wrong(
    checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str], harm: str
) -> None:
    folder = checkpoint()
    HARMS[harm][0](folder / DENOISER)
    with pytest.raises(SystemExit) as stop:
        cli.main(["models", "verify", str(folder), "--json"])
    out = capsys.readouterr().out
    assert stop.value.code == MISSING
    told = json.loads(out)
    assert "transformer" in json.dumps(told)


def test_verify_passes_what_is_sound(checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["models", "verify", str(checkpoint()), "--json"])
    assert stop.value.code == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []


# --- outputs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("a.avi", (".avi", ".mp4, .webp or .gif")),
        ("a.png", (".png", "folder of numbered PNGs")),
        ("file/a.mp4", ("cannot be written",)),
        ("/proc/a.mp4", ("cannot be written",)),
        ("/proc/framefit/a.mp4", ("cannot be written",)),
        ("folder.mp4", ("is a folder",)),
        ("file", ("is a file", "choose another name")),
        ("photos", ("boat.png", "not a numbered frame")),
        ("x" * 300 + ".mp4", ("cannot be written",)),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_bad_output(refused: Refused, photo: Path, output: str, words: tuple[str, ...]) -> None:
    Path("file").write_bytes(b"x")
    Path("folder.mp4").mkdir()
    Path("photos").mkdir()
    shutil.copy(photo, "photos/boat.png")
    before = sorted(Path.cwd().rglob("*"))
    told = refused(BAD_INPUT, "-o", output)
    for word in (Path(output).name[:200], *words):
        assert word in told
    assert sorted(Path.cwd().rglob("*")) == before


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system that refuses root too."""
    place = tmp_path / "mounted"
    place.mkdir()
    mounted = shutil.which("mount") and not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", place], capture_output=True, check=False
    ).returncode  # fmt: skip
    if not mounted:
        place.chmod(0o500)
        if os.access(place, os.W_OK):
            pytest.skip("root without the right to mount writes everywhere")
    yield place
    if mounted:
        subprocess.run(["umount", place], check=True)


def test_read_only_output(refused: Refused, read_only: Path) -> None:
    assert "cannot be written" in refused(BAD_INPUT, "-o", read_only / "a.mp4")
    assert "cannot be written" in refused(BAD_INPUT, "-o", read_only / "new folder" / "frames")
    told = refused(BAD_INPUT, "--checkpoint-dir", read_only)
    assert "--checkpoint-dir" in told
    assert "--no-checkpoint" in told


@pytest.mark.parametrize("name", ["a.mp4", "frames"])
def test_output_that_exists(refused: Refused, run: Run, tmp_path: Path, name: str) -> None:
    output = tmp_path / "out" / name
    old = output if name == "a.mp4" else output / "00000.png"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"precious")
    told = refused(BAD_INPUT, "-o", output)
    assert "exists" in told
    assert "--overwrite" in told
    assert old.read_bytes() == b"precious"
    code, _, err = run("-o", output, "--overwrite")
    assert code == 0, err
    assert len(list(video.read(output))) == 5


def test_home_that_cannot_be_written(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(Path("file").absolute()))
    told = refused(BAD_INPUT, "-m", "tiny")
    assert "cannot be written" in told or "cannot write" in told
    assert str(Path("file").absolute()) in told


@pytest.mark.parametrize("preview", ["no/such/p.png", "p.txt", "p", "."])
def test_preview_that_cannot_be_written(refused: Refused, preview: str) -> None:
    """Known before the first step, not after it."""
    assert "--preview" in refused(BAD_INPUT, "--preview", preview)


@contextmanager
def full_disk(most: int) -> Iterator[None]:
    """No file can grow beyond `most` bytes: writing fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["a.mp4", "a.webp", "a.gif", "frames"])
def test_full_disk_under_the_video(refused: Refused, tmp_path: Path, name: str) -> None:
    with full_disk(1024):
        told = refused(BAD_INPUT, "--no-checkpoint", "-o", tmp_path / "out" / name)
    assert str(tmp_path / "out" / name) in told
    assert "make room" in told


def test_full_disk_keeps_the_file_that_was_there(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.mp4").write_bytes(b"precious")
    with full_disk(1024):
        refused(BAD_INPUT, "--no-checkpoint", "--overwrite")
    assert (tmp_path / "out" / "a.mp4").read_bytes() == b"precious"


@pytest.mark.parametrize(("most", "what"), [(16, "plan.json"), (4096, "conditioning.safetensors")])
def test_full_disk_under_the_checkpoint(refused: Refused, home: Path, most: int, what: str) -> None:
    with full_disk(most):
        told = refused(BAD_INPUT)
    assert "step checkpoint" in told
    assert "--checkpoint-dir" in told
    assert not list((home / "state").rglob("*-*-*")), "a run that has no state leaves no folder"


def test_full_disk_after_some_steps_costs_no_step(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: Path
) -> None:
    """The disk fills up while the frames are decoded; with room again, the run goes on from its last step."""
    decode, limit = easyanimate.decode, resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(*arguments: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limit[1]))
        return decode(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(easyanimate, "decode", filling)
        try:
            code, out, err = run()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (code, out) == (BAD_INPUT, "")
    assert "make room" in sentence(err)
    assert not list((tmp_path / "out").iterdir())
    id = re.search(r"framefit run --resume (\S+)", err)
    assert id, err
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "--resume", id[1]])
    assert stop.value.code == 0
    assert len(list(video.read(tmp_path / "out" / "a.mp4"))) == 5


def test_full_disk_between_two_steps_keeps_the_step_before(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    predict, limit = easyanimate.predict, resource.getrlimit(resource.RLIMIT_FSIZE)
    calls = 0

    def filling(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limit[1]))
        return predict(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(easyanimate, "predict", filling)
        try:
            code, _, err = run()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert code == BAD_INPUT
    assert "step.safetensors" in sentence(err)
    id = re.search(r"framefit run --resume (\S+)", err)
    assert id, err
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "--resume", id[1]])
    assert stop.value.code == 0
    assert run("-o", tmp_path / "whole.mp4")[0] == 0
    whole, resumed = (np.stack(list(video.read(tmp_path / name))) for name in ("whole.mp4", "out/a.mp4"))
    assert np.array_equal(whole, resumed)


# --- what goes wrong on the way ------------------------------------------------------------------------------------


def full_card() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**60), full_card], ids=["RAM", "card"])
def test_out_of_memory(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, allocate: Callable[[], object]
) -> None:
    def decode(*arguments: Any) -> Iterator[object]:
        yield allocate()

    monkeypatch.setattr(easyanimate, "decode", decode)
    code, out, err = run()
    assert (code, out) == (DOES_NOT_FIT, "")
    for word in ("out of memory", "decode", "96x64", "5 frames", "--size", "--frames"):
        assert word in sentence(err)
    assert "framefit run --resume" in err
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("json_too", [False, True], ids=["text", "json"])
def test_an_error_that_nobody_foresaw(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, json_too: bool
) -> None:
    """A library may raise anything: exit code 1, a sentence, no traceback, and the finished steps are not lost."""

    def broken(*arguments: Any) -> Iterator[object]:
        yield from ()
        raise RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED")

    monkeypatch.setattr(easyanimate, "decode", broken)
    code, out, err = run(*["--json"] * json_too)
    assert code == 1
    assert "CUDNN_STATUS_EXECUTION_FAILED" in sentence(err)
    assert "framefit run --resume" in err
    assert not json_too or json.loads(out)["error"]["exit_code"] == 1
    assert not list((tmp_path / "out").iterdir())


# --- files to inspect and to make again ----------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["inspect", "rerun"])
@pytest.mark.parametrize("content", [None, b"", b"\x00\x00\x00\x18ftypmp42", b"GIF89a", b"RIFF\x00\x00\x00\x00WEBP"])
def test_file_that_is_no_video(capsys: pytest.CaptureFixture[str], command: str, content: bytes | None) -> None:
    if content is not None:
        Path("bad.mp4").write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "bad.mp4"])
    assert stop.value.code == BAD_INPUT
    assert "bad.mp4" in sentence(capsys.readouterr().err)


def file_with(parameters: dict[str, Any]) -> Path:
    """A GIF that says it was made with these parameters."""
    path = Path("odd.gif")
    frame = np.asarray(Image.radial_gradient("L").convert("RGB").resize((32, 32)))
    clip = video.Video(frames=iter([frame]), num_frames=1, width=32, height=32, fps=8)
    video.write(clip, path, parameters=parameters, overwrite=True)
    return path


@pytest.mark.parametrize(
    "change",
    [
        {"request": None}, {"request": []}, {"request": ["abc"]}, {"request": {}}, {"request": "text"},
        {"photos": None},
        {"photos": {}}, {"photos": {"image": 5}}, {"photos": {"image": "x" * 300}}, {"photos": {"image": "../../.."}},
        {"photos": {"image": "/proc/self/exe"}},
        {"precision": "fp99"}, {"precision": 5}, {"settings": None}, {"settings": {"speed": "high"}},
        {"settings": {"guidance": 5}}, {"settings": ["guidance"]}, {"settings": 5},
        *({"request.": {name: value}} for name, value in [
            ("prompt", 5), ("prompt", None), ("model", 5), ("model", None), ("width", "96"), ("width", 96.5),
            ("num_frames", "five"), ("num_frames", 5.5), ("fps", "fast"), ("fps", None), ("steps", 2.5),
            ("steps", [2]), ("guidance", 5), ("guidance", "abc"), ("guidance", []), ("guidance", ["a"]),
            ("seed", "x"), ("seed", 1.5), ("image", 5), ("image", None), ("image", "../boat.png"), ("fit", 5),
            ("negative_prompt", 5), ("last_image", 5), ("unknown", 5), ("loras", ["x"]), ("loras", 5),
            ("loras", [{"file": "x", "sha256": None}]), ("model", "zzz"),
        ]),
    ],
    ids=lambda change: json.dumps(change)[:50],
)  # fmt: skip
def test_rerun_of_a_file_with_odd_parameters(
    capsys: pytest.CaptureFixture[str], run: Run, tmp_path: Path, photo: Path, change: dict[str, Any]
) -> None:
    """Anyone can write anything into a file: it is refused, or it is harmless, and never a traceback."""
    made = sound_parameters(run, tmp_path)
    odd = made | {key: value for key, value in change.items() if not key.endswith(".")}
    odd["request"] = (made["request"] | change["request."]) if "request." in change else odd["request"]
    file = file_with(odd)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(["rerun", str(file), "-o", "again.mp4", "--device", "cpu"])
    if stop.value.code != 0:
        assert stop.value.code in (USAGE, BAD_INPUT, MISSING)
        sentence(capsys.readouterr().err)
        assert not Path("again.mp4").exists()


SOUND: dict[str, Any] = {}


def sound_parameters(run: Run, tmp_path: Path) -> dict[str, Any]:
    """Those of a real run, made once; the photo is found because it lies where it lay."""
    if not SOUND:
        assert run()[0] == 0
        SOUND.update(video.parameters(tmp_path / "out" / "a.mp4"))
    return SOUND


def test_odd_parameters_start_from_sound_ones(run: Run, tmp_path: Path, photo: Path) -> None:
    assert run()[0] == 0
    made = video.parameters(tmp_path / "out" / "a.mp4")
    shutil.copy(photo, made["request"]["image"])
    with pytest.raises(SystemExit) as stop:
        cli.main(["rerun", str(file_with(made)), "-o", "again.mp4", "--device", "cpu"])
    assert stop.value.code == 0
