"""Metrics against answers that are known, and against the programs that define them."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from framefit import cli, video
from framefit.errors import BadInput, BadOutput, UsageError
from framefit.quality import METRICS, compare, findings, sheet
from framefit.quality.compare import load
from framefit.quality.fidelity import Frames, psnr, ssim
from framefit.quality.lpips import lpips
from framefit.quality.motion import motion
from framefit.quality.stability import drift, flicker, seam

skimage = pytest.importorskip("skimage")
pytest.importorskip("cv2")
ffmpeg = pytest.importorskip("imageio_ffmpeg")

PHOTO = Path(video.__file__).parent / "assets" / "rocket.jpg"
WIDTH, HEIGHT, COUNT = 256, 192, 9


def panned(step: float = 2.0, count: int = COUNT) -> Frames:
    """The photo under a camera that moves right by `step` px a frame: its content goes left."""
    with Image.open(PHOTO) as opened:
        picture = opened.convert("RGB")
    boxes = [(60 + n * step, 60, 60 + n * step + WIDTH, 60 + HEIGHT) for n in range(count)]
    return np.stack([np.asarray(picture.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=b)) for b in boxes])


def noisy(frames: Frames, deviation: float) -> Frames:
    noise = np.random.default_rng(0).normal(0, deviation, frames.shape)
    return (frames + noise).round().clip(0, 255).astype(np.uint8)


def written(path: Path, frames: Frames) -> Path:
    made = video.Video(frames=iter(frames), num_frames=len(frames), width=WIDTH, height=HEIGHT, fps=8)
    video.write(made, path, parameters={})
    return path


@pytest.fixture(scope="module")
def pan() -> Frames:
    return panned()


@pytest.fixture
def pair(tmp_path: Path, pan: Frames) -> tuple[Path, Path]:
    return written(tmp_path / "a", noisy(pan, 3)), written(tmp_path / "b", pan)


# fidelity


def test_psnr_and_ssim_are_scikit_images(pan: Frames) -> None:
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    other = noisy(pan, 6)
    assert psnr(other, pan) == pytest.approx([peak_signal_noise_ratio(b, a) for a, b in zip(other, pan, strict=True)])
    wanted = [
        structural_similarity(
            a, b, channel_axis=-1, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for a, b in zip(other, pan, strict=True)
    ]
    assert ssim(other, pan) == pytest.approx(wanted)


@pytest.mark.parametrize("deviation", [2.0, 8.0, 20.0])
def test_noise_of_a_known_level_has_its_psnr(deviation: float) -> None:
    grey = np.full((3, 64, 64, 3), 128, np.uint8)
    expected = 10 * math.log10(255**2 / (deviation**2 + 1 / 12))  # rounding adds a twelfth
    assert psnr(noisy(grey, deviation), grey) == pytest.approx([expected] * 3, abs=0.15)


def test_equal_videos(tmp_path: Path, pan: Frames) -> None:
    a, b = written(tmp_path / "a", pan), written(tmp_path / "b", pan)
    found = compare(a, b)
    scores = {name: score.value for name, score in found.scores.items()}
    assert (scores["psnr"], scores["ssim"], scores["ms_ssim"]) == (100, pytest.approx(1), pytest.approx(1))
    assert scores["vmaf"] > 95
    assert (scores["motion"], scores["seam"]) == (1, 1)
    assert list(found.missing) == ["lpips"]
    assert found.notes == []
    assert set(scores) | set(found.missing) == set(METRICS)


def test_more_noise_is_worse_by_every_metric(tmp_path: Path, pan: Frames) -> None:
    b = written(tmp_path / "b", pan)
    names = ("psnr", "ssim", "ms_ssim", "vmaf")
    little, much = (
        compare(written(tmp_path / f"n{n}", noisy(pan, n)), b, metrics=names, required=names) for n in (3, 12)
    )
    assert all(little.scores[name].value > much.scores[name].value for name in names)


def test_vmaf_is_ffmpegs_own(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """The same files, handed to ffmpeg without us between."""
    log = tmp_path / "log.json"
    inputs = [word for path in pair for word in ("-framerate", "25", "-i", str(path / "%05d.png"))]
    yuv = "scale=out_color_matrix=bt709:out_range=limited,format=yuv420p"
    graph = f"[0:v]{yuv}[a];[1:v]{yuv}[b];[a][b]libvmaf=log_fmt=json:log_path={log}:feature=name=float_ms_ssim"
    subprocess.run(
        [ffmpeg.get_ffmpeg_exe(), "-v", "error", *inputs, "-lavfi", graph, "-f", "null", "-"], check=True
    )  # fmt: skip
    own = [frame["metrics"] for frame in json.loads(log.read_text())["frames"]]
    found = compare(*pair, metrics=("vmaf", "ms_ssim")).scores
    assert found["vmaf"].per_frame == pytest.approx([frame["vmaf"] for frame in own], abs=1e-4)
    assert found["ms_ssim"].per_frame == pytest.approx([frame["float_ms_ssim"] for frame in own], abs=1e-5)
    assert found["vmaf"].value < 99


def test_a_size_that_ms_ssim_cannot_measure(tmp_path: Path) -> None:
    small = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    for name in "ab":
        made = video.Video(frames=iter(small), num_frames=2, width=64, height=64, fps=8)
        video.write(made, tmp_path / name, parameters={})
    assert "176 px" in compare(tmp_path / "a", tmp_path / "b").missing["ms_ssim"]


# LPIPS


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """AlexNet's shapes with random numbers."""
    torch.manual_seed(0)
    shapes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    tensors = {}
    for n, (place, (out, into, side)) in enumerate(shapes.items()):
        tensors[f"features.{place}.weight"] = torch.randn(out, into, side, side) / (into * side * side) ** 0.5
        tensors[f"features.{place}.bias"] = torch.zeros(out)
        tensors[f"lin{n}.model.1.weight"] = torch.rand(1, out, 1, 1)
    save_file(tensors, tmp_path / "alex.safetensors")
    return tmp_path / "alex.safetensors"


def test_lpips_is_zero_for_equal_frames_and_grows_with_noise(network: Path, pan: Frames) -> None:
    same, little, much = (
        lpips(other, pan[:1], network)[0] for other in (pan[:1], noisy(pan[:1], 4), noisy(pan[:1], 20))
    )
    assert same == 0
    assert 0 < little < much


def test_lpips_reads_the_five_layers_of_alexnet(network: Path, pan: Frames) -> None:
    """The same network out of torch's own modules."""
    from safetensors.torch import load_file

    weights = load_file(network)
    nn = torch.nn
    layers = nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(),
        nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    )  # fmt: skip
    layers.load_state_dict({k.removeprefix("features."): v for k, v in weights.items() if k.startswith("features")})

    def features(frame: Frames) -> list[torch.Tensor]:
        x = torch.tensor(frame).permute(2, 0, 1)[None].float() / 127.5 - 1
        x = (x - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[
            :, None, None
        ]
        found = []
        for n, layer in enumerate(layers):
            x = layer(x)
            if n in (1, 4, 7, 9, 11):
                found.append(nn.functional.normalize(x, dim=1))
        return found

    one, other = pan[0], noisy(pan[:1], 10)[0]
    with torch.no_grad():
        wanted = sum(
            ((a - b) ** 2 * weights[f"lin{n}.model.1.weight"]).sum(1).mean().item()
            for n, (a, b) in enumerate(zip(features(one), features(other), strict=True))
        )
    assert lpips(one[None], other[None], network)[0] == pytest.approx(wanted, rel=1e-4)


def test_weights_that_are_no_network_are_refused(tmp_path: Path, pan: Frames) -> None:
    save_file({"features.0.weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(BadInput, match=r"neither AlexNet nor VGG-16"):
        lpips(pan, pan, tmp_path / "w.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(BadInput, match=r"cannot be read"):
        lpips(pan, pan, tmp_path / "x.safetensors")


# what changes in time


def test_a_pan_is_measured_in_px_a_frame(pan: Frames) -> None:
    found = motion(pan)
    assert found.mean_px == pytest.approx(2.0, abs=0.25)
    assert (found.dx_px, found.dy_px) == (pytest.approx(-2.0, abs=0.25), pytest.approx(0, abs=0.1))
    assert found.direction_degrees == pytest.approx(180, abs=5)
    assert motion(panned(4.0)).mean_px == pytest.approx(4.0, abs=0.5)
    assert motion(pan[:1]).mean_px == 0


def test_half_the_motion_is_half_the_score(tmp_path: Path, pan: Frames) -> None:
    a, b = written(tmp_path / "a", panned(1.0)), written(tmp_path / "b", pan)
    score = compare(a, b, metrics=["motion"]).scores["motion"]
    assert score.value == pytest.approx(0.5, abs=0.08)
    assert score.detail["turned_degrees"] < 5
    assert (score.first, len(score.per_frame)) == (1, COUNT - 1)
    assert np.mean(score.per_frame) == pytest.approx(score.value)


def test_flicker_is_what_jumps_not_what_moves_or_fades(pan: Frames) -> None:
    jumping = pan.copy()
    jumping[::2] = np.minimum(jumping[::2].astype(int) + 10, 255).astype(np.uint8)
    fade = np.stack([(frame * (1 - 0.03 * n)).astype(np.uint8) for n, frame in enumerate(pan)])
    assert min(flicker(jumping)) > 5
    assert max(flicker(pan)) < 1
    assert max(flicker(fade)) < 1.5
    assert flicker(pan[:2]) == []


def test_drift_is_the_colour_difference_from_the_first_frame() -> None:
    greys = np.stack([np.full((8, 8, 3), level, np.uint8) for level in (119, 119, 255)])
    first, second, third = drift(greys)
    assert (first, second) == (0, 0)
    assert third == pytest.approx(50, abs=0.5)  # L* of 119 is 50, of 255 it is 100


@pytest.mark.parametrize("axis", ["x", "y"])
def test_a_seam_is_found_where_it_is(pan: Frames, axis: str) -> None:
    broken = pan.astype(int)
    if axis == "x":
        broken[:, :, 100:] += 6
    else:
        broken[:, 100:] += 6
    broken = noisy(broken.clip(0, 255).astype(np.uint8), 1)
    found = seam(broken, pan)
    assert (found.axis, found.at_px) == (axis, 100)
    assert found.ratio > 3
    assert seam(noisy(pan, 3), pan).ratio < 1.3


# soundness


def test_what_is_no_video_is_named(pan: Frames) -> None:
    assert findings(pan) == []
    black = pan.copy()
    black[3:5] = 2
    assert findings(black) == ["black: frames 3-4", "the same as the one before: frame 4"]
    assert findings(np.repeat(pan[:1], 5, axis=0)) == ["frozen: all 5 frames are the same"]
    flat = pan.copy()
    flat[2] = 90
    assert findings(flat) == ["of one colour: frame 2"]
    broken = pan.astype(np.float32) / 255
    broken[4, 0, 0, 0] = np.nan
    broken[6, 0, 0, 0] = np.inf
    assert findings(broken) == ["not numbers (NaN or infinity): frames 4, 6"]
    assert findings(pan.astype(np.float32) / 255) == []


# videos against each other


def test_a_longer_video_is_aligned(tmp_path: Path, pan: Frames) -> None:
    a, b = written(tmp_path / "a", pan[2:7]), written(tmp_path / "b", pan)
    found = compare(a, b, metrics=["psnr"])
    assert (found.first, found.num_frames, found.scores["psnr"].value) == ((0, 2), 5, 100)
    assert compare(b, a, metrics=["psnr"]).first == (2, 0)


def test_good_frames_do_not_make_up_for_lost_ones(tmp_path: Path, pan: Frames) -> None:
    lost = pan.copy()
    lost[5:] = np.random.default_rng(0).integers(0, 255, lost[5:].shape)
    score = compare(written(tmp_path / "a", lost), written(tmp_path / "b", pan), metrics=["psnr"]).scores["psnr"]
    assert np.mean(score.per_frame) > 40
    assert score.value < 15
    assert score.value == pytest.approx(10 * np.log10(255**2 / np.mean(np.square(lost.astype(float) - pan))))


def test_lengths_that_differ_are_said(tmp_path: Path, pan: Frames) -> None:
    found = compare(written(tmp_path / "a", pan[3:4]), written(tmp_path / "b", pan), metrics=["psnr"])
    assert "has 1 frames" in found.notes[0]
    assert "from frame 0 and from frame 3" in found.notes[0]


def test_a_frozen_video_is_frozen_in_an_mp4_too(tmp_path: Path, pan: Frames) -> None:
    frozen = np.repeat(pan[:1], COUNT, axis=0)
    file = written(tmp_path / "frozen.mp4", noisy(frozen, 0))
    assert findings(load(file)) == [f"frozen: all {COUNT} frames are the same"]
    assert findings(load(written(tmp_path / "pan.mp4", pan))) == []


def test_of_two_that_stand_still_neither_moves_more(tmp_path: Path, pan: Frames) -> None:
    still = np.repeat(pan[:1], COUNT, axis=0)
    a, b = written(tmp_path / "a", noisy(still, 0.5)), written(tmp_path / "b", still)
    assert compare(a, b, metrics=["motion"]).scores["motion"].value == 1
    moving = compare(written(tmp_path / "c", pan), b, metrics=["motion"]).scores["motion"].value
    assert 8 < moving < 12  # 2 px over the 0.2 that count as none


def test_frames_of_several_sizes_are_refused(tmp_path: Path, pan: Frames) -> None:
    a = written(tmp_path / "a", pan)
    Image.fromarray(pan[0, :64, :64]).save(a / "00003.png")
    with pytest.raises(BadInput, match=r"256x192 and 64x64"):
        compare(a, a)


def test_what_is_too_small_for_a_metric_is_missing(tmp_path: Path, network: Path) -> None:
    small = np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3), dtype=np.uint8)
    made = video.Video(frames=iter(small), num_frames=2, width=8, height=8, fps=8)
    video.write(made, tmp_path / "small", parameters={})
    found = compare(tmp_path / "small", tmp_path / "small", lpips_weights=network)
    assert set(found.missing) == {"ssim", "ms_ssim", "vmaf", "lpips"}
    assert all("px at least" in why for why in found.missing.values())


def test_an_ffmpeg_without_vmaf_leaves_the_other_metrics(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\necho No such filter: libvmaf >&2; exit 8\n")
    program.chmod(0o755)
    for path, why in ((program, "No such filter"), (tmp_path / "nowhere", "cannot be run")):
        monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda path=path: str(path))
        found = compare(*pair)
        assert why in found.missing["vmaf"]
        assert "psnr" in found.scores


def test_a_lag_is_said_and_not_hidden(tmp_path: Path) -> None:
    long = panned(3.0, 12)
    a, b = written(tmp_path / "a", long[2:]), written(tmp_path / "b", long[:-2])
    found = compare(a, b, metrics=["psnr"])
    assert found.first == (0, 0)
    assert found.scores["psnr"].value < 40
    assert found.lag == 2
    assert "2 frames later" in found.notes[0]


def test_two_sizes_are_refused(tmp_path: Path, pan: Frames) -> None:
    a = written(tmp_path / "a", pan)
    small = video.Video(frames=iter(pan[:, :64, :64]), num_frames=COUNT, width=64, height=64, fps=8)
    video.write(small, tmp_path / "b", parameters={})
    with pytest.raises(BadInput, match=r"256x192 and .* is 64x64"):
        compare(a, tmp_path / "b")


def test_a_required_metric_that_cannot_be_measured_is_an_error(pair: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match=r"--lpips-weights"):
        compare(*pair, required=["lpips"])


# the command


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main([str(a) for a in arguments])
    return int(left.value.code or 0)


def test_bars_decide_the_exit_code(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    a, b = pair
    assert run("compare", a, b, "--metric", "psnr", "--min", "psnr=30", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["scores"]["psnr"]["value"] == pytest.approx(38.5, abs=0.5)
    assert facts["failures"] == []
    assert run("compare", a, b, "--metric", "psnr", "--min", "ssim=0.999", "--max", "seam=0.5") == 1
    shown = capsys.readouterr().out
    assert "ssim is 0." in shown
    assert "under 0.999" in shown
    assert "over 0.5" in shown


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--metric", "beauty"], "'beauty' is no metric"),
        (["--min", "vmaf"], "is not METRIC=NUMBER"),
        (["--max", "lpips=1"], "--lpips-weights"),
        (["--min", "lpips=1"], "use --max lpips"),
        (["--min", "psnr=nan"], "is not METRIC=NUMBER"),
        (["--min", "psnr=50", "--min", "psnr=10"], "--min psnr was given twice"),
    ],
)
def test_wrong_flags(
    pair: tuple[Path, Path], arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("compare", *pair, *arguments) == 2
    assert sentence in capsys.readouterr().err


def test_the_plot_and_the_video_of_both(pair: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture, both = tmp_path / "out" / "plot.png", tmp_path / "both.mp4"
    wanted = ["compare", *pair, "--metric", "psnr,flicker", "--plot", picture, "--side-by-side", both]
    assert run(*wanted) == 0
    with Image.open(picture) as drawn:
        assert drawn.size[0] > 600
    seen = video.inspect(both)
    assert (seen.width, seen.height, seen.num_frames) == (2 * WIDTH, HEIGHT, COUNT)
    left = np.stack(list(video.read(both)))[:, :, :WIDTH]
    assert min(psnr(left, np.stack(list(video.read(pair[0]))))) > 30
    assert run(*wanted) == 3
    assert run(*wanted, "--overwrite") == 0


def test_outputs_are_refused_before_anything_is_measured(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("compare", *pair, "--plot", tmp_path / "p.png", "--side-by-side", tmp_path / "x.txt") == 3
    assert run("compare", *pair, "--side-by-side", pair[0], "--overwrite") == 2
    assert "is compared" in capsys.readouterr().err
    folder = tmp_path / "d.png"
    folder.mkdir()
    assert run("compare", *pair, "--plot", folder, "--overwrite") == 3
    assert not (tmp_path / "p.png").exists()


def test_all_may_stand_anywhere(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compare", *pair, "--metric", "psnr, all", "--json") == 0
    assert set(METRICS) == set((facts := json.loads(capsys.readouterr().out))["scores"]) | set(facts["missing"])


def test_a_plot_of_nothing_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = compare(*pair, metrics=["seam"])
    with pytest.raises(UsageError, match=r"figures by frame"):
        sheet.plot(found, tmp_path / "plot.png")
    with pytest.raises(BadOutput, match=r"is no PNG"):
        sheet.plot(found, tmp_path / "plot.svg")
