"""The trained parts, put together as a diffusers-layout folder that the package ships.

    python -m training.package [--out framefit/models/tiny]

Refuses what is larger than the package may carry.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tomllib
from pathlib import Path

from diffusers import UniPCMultistepScheduler

from training.experts import BOUNDARY

__all__ = ["main", "scheduler"]

RECIPE = Path(__file__).with_name("recipe.toml")
MOST_BYTES = 32 * 2**20
MOST_BYTES_A_FILE = 14 * 2**20
NOISE = ("_name_or_path", "_diffusers_version", "transformers_version")
"""What depends on where and with what the training ran."""


def main() -> None:
    options = _options()
    recipe = tomllib.loads(RECIPE.read_text())
    parts = {
        "transformer": options.data / "experts" / "high",
        "transformer_2": options.data / "experts" / "low",
        "vae": options.data / "vae" / "vae",
        "text_encoder": options.data / "text" / "text_encoder",
        "tokenizer": options.data / "text" / "tokenizer",
    }
    for name, source in parts.items():
        target = options.out / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for file in source.iterdir():
            (target / file.name).write_bytes(_clean(file) if file.suffix == ".json" else file.read_bytes())
    few = options.data / "experts" / "few_step.safetensors"
    (options.out / few.name).unlink(missing_ok=True)
    if few.exists():
        shutil.copyfile(few, options.out / few.name)
    scheduler(recipe["denoiser"]["shift"]).save_pretrained(options.out / "scheduler")
    config = options.out / "scheduler" / "scheduler_config.json"
    config.write_bytes(_clean(config))
    index = {
        "_class_name": "WanImageToVideoPipeline",
        "boundary_ratio": BOUNDARY,
        "expand_timesteps": False,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (options.out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    _check(options.out)


def scheduler(shift: float) -> UniPCMultistepScheduler:
    """The one that the model is shipped with, which is that of Wan2.2-I2V-A14B."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


def _clean(file: Path) -> bytes:
    if file.name == "tokenizer.json":
        return file.read_bytes()
    kept = {key: value for key, value in json.loads(file.read_text()).items() if key not in NOISE}
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()


def _check(folder: Path) -> None:
    sizes = {file: file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    for file, size in sizes.items():
        if size > MOST_BYTES_A_FILE:
            raise SystemExit(f"{file} has {size / 2**20:.1f} MiB, and a file may have {MOST_BYTES_A_FILE >> 20}.")
    total = sum(sizes.values())
    if total > MOST_BYTES:
        raise SystemExit(f"{folder} has {total / 2**20:.1f} MiB, and may have {MOST_BYTES >> 20}.")
    print(json.dumps({"files": len(sizes), "bytes": total}))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Put the trained parts together.")
    parser.add_argument("--data", type=Path, default=Path(".data"))
    parser.add_argument("--out", type=Path, default=Path("framefit/models/tiny"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
