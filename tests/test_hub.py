"""framefit.families.hub against a hub on 127.0.0.1 that answers what huggingface_hub 2.4 asks.

Pulls run in a process of their own, because HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE are read at import.
"""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from framefit.errors import DoesNotFit, ModelMissing, UsageError
from framefit.families import CHECKPOINTS, Checkpoint, hub, soundness

REPO, COMMIT = "someone/Tiny-Wan", "c0ffee" + 34 * "0"
UNWANTED = {
    "README.md", "assets/demo.mp4", "transformer/diffusion_pytorch_model.fp16.safetensors", "other/config.json",
    "vae/diffusion_pytorch_model.non_ema.safetensors", "vae/diffusion_pytorch_model.bin",
}  # fmt: skip
ROW = replace(CHECKPOINTS["wan2.2-ti2v-5b"], id="tiny-wan", repo=REPO, download_bytes=34_200_000_000)
PULL = """
import json, pickle, sys
from huggingface_hub import constants
from framefit.families import hub
constants.DOWNLOAD_CHUNK_SIZE = 500  # of 10 MB: a tiny file that breaks off would start again
row, notices = pickle.load(sys.stdin.buffer), []
try:
    told = {"path": str(hub.pull(row, on_notice=notices.append)), "located": str(hub.locate(row))}
except Exception as error:
    told = {"path": None, "error": type(error).__name__, "message": str(error)}
print(json.dumps(told | {"notices": notices, "torch": "torch" in sys.modules}))
"""


class FakeHub(BaseHTTPRequestHandler):
    """The hub's model API and file resolver over the files in `server.root`."""

    server: Any

    def do_GET(self) -> None:
        path, hub = self.path.split("?")[0], self.server
        name = path.split(f"/resolve/{COMMIT}/")[-1]
        hub.asked.append((self.command, name, self.headers.get("Range")))
        if REPO not in path:
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        if "/api/" in path:
            files = [entry(hub.root / name, name) for name in sorted(names(hub.root))]  # in this order they are fetched
            told = files if "/tree/" in path else {"id": REPO, "sha": COMMIT, "siblings": files}
            return self.answer(200, {}, json.dumps(told).encode())
        if hub.gated:
            return self.answer(403, {"X-Error-Code": "GatedRepo"})
        data, tag = (hub.root / name).read_bytes(), f'"{etag(hub.root / name)}"'
        about = {"ETag": tag, "X-Repo-Commit": COMMIT, "X-Linked-Etag": tag, "X-Linked-Size": str(len(data))}
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        about |= {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        cut = hub.cut.pop(name, None) if self.command == "GET" else None
        return self.answer(500, {}) if cut == 0 else self.answer(206 if start else 200, about, data[start:], cut)

    def do_HEAD(self) -> None:
        self.do_GET()

    def answer(self, code: int, headers: dict[str, str], body: bytes = b"", cut: int | None = None) -> None:
        self.send_response(code)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])

    def log_message(self, *args: Any) -> None:
        pass


def names(root: Path) -> set[str]:
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}


def entry(file: Path, name: str) -> dict[str, Any]:
    """One file as the tree (path, oid) and the model info (rfilename, blobId) list it."""
    size, tag = file.stat().st_size, etag(file)
    told = {"type": "file", "path": name, "rfilename": name, "size": size, "oid": tag, "blobId": tag}
    lfs = {"size": size, "oid": tag, "sha256": tag, "pointerSize": 134}
    return told | ({"lfs": lfs} if name.endswith(".safetensors") else {})


def etag(file: Path) -> str:
    """sha256 for what the hub keeps in LFS, git's own hash for the rest."""
    data = file.read_bytes()
    plain = hashlib.sha1(b"blob %d\0" % len(data) + data)
    return (hashlib.sha256(data) if file.suffix == ".safetensors" else plain).hexdigest()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as a hub repository: transformer in shards, and files that no run needs."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
    from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

    root = tmp_path_factory.mktemp("published")
    wan = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "ffn_dim": 32}
    WanTransformer3DModel(freq_dim=16, **wan).save_pretrained(root / "transformer", max_shard_size="20KB")
    vae = AutoencoderKLWan(base_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True])
    vae.save_pretrained(root / "vae")
    text = UMT5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    UMT5EncoderModel(text).save_pretrained(root / "text_encoder")
    T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]).save_pretrained(root / "tokenizer")
    UniPCMultistepScheduler().save_pretrained(root / "scheduler")
    for name in ("model_index.json", "LICENSE", *UNWANTED):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(json.dumps({"is": name}))
    return root


@pytest.fixture
def server(published: Path) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.root, server.asked, server.gated, server.cut = published, [], False, {}
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def pull(server: Any, home: Path, row: Checkpoint = ROW, **hf: str) -> Any:
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    env |= {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **hf}
    env["PYTHONPATH"] = str(Path(hub.__file__).parents[2])
    command = [sys.executable, "-W", "error", "-c", PULL]
    done = subprocess.run(command, input=pickle.dumps(row), env=env, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def fetched(server: Any) -> set[str]:
    return {name for method, name, _ in server.asked if method == "GET" and "/api/" not in name}


def shards(folder: Path) -> list[str]:
    return sorted(f"transformer/{p.name}" for p in folder.glob("transformer/*-of-*.safetensors"))


@pytest.fixture
def cached(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A snapshot that was pulled, in the cache that this process reads too."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return Path(pull(server, tmp_path)["path"])


def test_pull_fetches_what_is_needed_and_says_so_first(server: Any, tmp_path: Path) -> None:
    told, needed = pull(server, tmp_path), names(server.root) - UNWANTED
    assert fetched(server) == needed
    assert told["path"] == told["located"] == f"{tmp_path}/hub/models--someone--Tiny-Wan/snapshots/{COMMIT}"
    megabytes = sum((server.root / name).stat().st_size for name in needed) / 1e6
    facts = f"{megabytes:.2f} MB in {len(needed)} files; licence Apache-2.0; from {server.url}/{REPO}"
    assert told["notices"] == [f"tiny-wan: {facts} to {tmp_path}/hub/models--someone--Tiny-Wan"]
    assert not told["torch"]


def test_a_pull_that_breaks_off_is_taken_up_where_it_broke(server: Any, tmp_path: Path) -> None:
    cut, refused = shards(server.root)[1:3]
    server.cut = {cut: 1000, refused: 0}
    told = pull(server, tmp_path)
    assert told["error"] == "ModelMissing"
    assert "answered HTTP 500" in told["message"]
    assert [r for method, name, r in server.asked if method == "GET" and name == cut] == [None, "bytes=1000-"]
    before, server.asked = fetched(server) - {refused}, []
    again = pull(server, tmp_path)
    assert again["path"]
    assert " of it still to fetch;" in again["notices"][0]
    assert fetched(server) == names(server.root) - UNWANTED - before


def test_what_the_hub_refuses_is_one_clear_sentence(server: Any, tmp_path: Path) -> None:
    def message(row: Checkpoint = ROW, **environment: str) -> str:
        told = pull(server, tmp_path, row, **environment)
        assert told["error"] == "ModelMissing"
        return str(told["message"])

    asked = "tiny-wan cannot be fetched"
    nothing = replace(ROW, repo="someone/nothing")
    assert message(nothing).startswith(f"{asked}: {server.url}/someone/nothing does not exist or is private (HTTP 404)")
    assert message(HF_HUB_OFFLINE="1").startswith(f"{asked} in offline mode: unset HF_HUB_OFFLINE")
    assert "127.0.0.1:1 is out of reach or broke off (ConnectError" in message(HF_ENDPOINT="http://127.0.0.1:1")
    unet = replace(ROW, components=(replace(ROW["vae"], name="unet"), *ROW.components))
    assert "has no safetensors weights (pickles are refused for safety) in unet/" in message(unet)
    server.gated = True
    assert message().startswith(f"{asked}: {server.url}/{REPO} is gated (HTTP 403). Accept its terms there")
    assert not [name for name in fetched(server) if "/" in name and "safetensors" in name]


def test_a_full_disk_is_told_first(server: Any, cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    shutil.rmtree(cached.parents[1])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 10))
    with pytest.raises(DoesNotFit, match=r"needs 0\.\d\d MB more at .* and 0\.00 MB is free there"):
        hub.pull(ROW, on_notice=lambda _: None)


def test_a_sound_checkpoint_has_no_problems(cached: Path, published: Path) -> None:
    read: list[str] = []
    assert hub.locate(ROW) == cached
    assert hub.is_present(ROW)
    assert soundness.verify(ROW, on_file=read.append) == soundness.verify(replace(ROW, folder=published)) == []
    assert set(read) == names(cached) - {"model_index.json", "LICENSE"}


def test_a_cut_file_and_a_flipped_byte_are_named_and_mended(cached: Path, server: Any, tmp_path: Path) -> None:
    cut, flipped = shards(cached)[1:3]
    blobs = (cached / cut).resolve(), (cached / flipped).resolve()
    size, data = blobs[0].stat().st_size, bytearray(blobs[1].read_bytes())
    os.truncate(blobs[0], size - 10)
    blobs[1].write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    ways = [f"delete {blob} and run 'framefit models pull tiny-wan'." for blob in blobs]
    length = f"{cut} is {size - 10:,} bytes long, and its header says {size:,}: {ways[0]}"
    assert soundness.verify(ROW, deep=False) == [length]
    assert soundness.verify(ROW)[0] == length
    assert len(soundness.verify(ROW)) == 2
    assert soundness.verify(ROW)[1].startswith(f"{flipped} has sha256 ")
    assert soundness.verify(ROW)[1].endswith(ways[1])
    for blob in blobs:
        blob.unlink()
    server.asked.clear()
    assert pull(server, tmp_path)["path"]
    assert fetched(server) == {cut, flipped}
    assert soundness.verify(ROW) == []


def test_what_is_missing_is_named(cached: Path, tmp_path: Path) -> None:
    second, vae = cached / shards(cached)[1], cached / "vae/diffusion_pytorch_model.safetensors"
    gaps = [f"transformer/{second.name} is missing (shard 2 of {len(shards(cached))})"]
    second.unlink()
    assert soundness.verify(ROW) == gaps
    assert not hub.is_present(ROW)
    with pytest.raises(ModelMissing) as told:
        hub.locate(ROW)
    assert str(told.value).startswith(f"tiny-wan is incomplete at {cached}: {gaps[0]}. To go on, run 'framefit models")
    vae.rename(vae.with_suffix(".bin"))
    (cached / "text_encoder/config.json").unlink()
    (cached / "tokenizer/tokenizer.json").unlink()
    shutil.rmtree(cached / "scheduler")
    for gap in (
        f"vae/{vae.name} is missing (pickles such as {vae.stem}.bin are refused for safety)",
        "text_encoder/config.json is missing",
        "tokenizer/ has no vocabulary (tokenizer.json or spiece.model, for example)",
        "the folder scheduler/ is missing",
    ):
        assert gap in soundness.verify(ROW)
    with pytest.raises(ModelMissing, match=r"its 34.2 GB \(31.9 GiB\) \(licence Apache-2.0\) with 'framefit models"):
        hub.locate(replace(ROW, repo="someone/else"))
    with pytest.raises(ModelMissing, match="there is no such folder"):
        hub.locate(replace(ROW, folder=tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="there is nothing to pull"):
        hub.pull(replace(ROW, folder=cached), on_notice=print)


def rewrite(file: Path, change: Callable[[Any], Any]) -> None:
    from safetensors.torch import load, save_file

    tensors = load(file.read_bytes())
    change(tensors)
    save_file(tensors, file)


def test_keys_shapes_and_indexes_are_compared(published: Path, tmp_path: Path) -> None:
    import torch

    folder = Path(shutil.copytree(published, tmp_path / "mine"))
    row, index = replace(ROW, folder=folder), "transformer/diffusion_pytorch_model.safetensors.index.json"
    rewrite(folder / "vae/diffusion_pytorch_model.safetensors", lambda t: t.update({"quant_conv.bias": torch.zeros(3)}))
    rewrite(folder / "text_encoder/model.safetensors", lambda t: t.pop("encoder.final_layer_norm.weight"))
    entries = json.loads((folder / index).read_text())["weight_map"]
    first, second = sorted(set(entries.values()))[:2]
    moved = next(key for key, shard in entries.items() if shard == first)
    (folder / index).write_text(json.dumps({"weight_map": entries | {moved: second}}))
    problems = [
        f"transformer/{first} holds {moved}, which {Path(index).name} does not put there.",
        f"{index} puts {moved} in {second}, which does not hold it.",
        "vae/ holds quant_conv.bias of shape [3], and AutoencoderKLWan needs [32].",
        "text_encoder/ lacks encoder.final_layer_norm.weight, which UMT5EncoderModel needs.",
    ]
    assert soundness.verify(row) == problems
