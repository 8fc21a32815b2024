"""Make the small image-to-video model's tokenizer and text encoder, and say how well they tell motions apart.

    python -m training.text --out .data/text

The encoder learns by regression: from its states a small head, which is then thrown away, reads the rates of change
that a caption asks for. It is then frozen, as UMT5 is in Wan.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from torch import nn

from framefit.families.wan import clean
from training.captions import NEUTRAL, PLAIN, Language, caption
from training.motion import CATALOGUE, FIELDS, LIGHT, OBJECT_PX, PAN_PX, ROLL_DEGREES, ZOOM, find

__all__ = ["accuracy", "embed", "make_encoder", "make_tokenizer"]

HUGGING: Any = transformers
"""Its types name its classes only in part."""

MAX_TOKENS = 64
VOCABULARY = 1500
WIDTH = 128
BATCH = 64
RATE = 2e-3
WARM_UP = 0.05
"""Share of the training in which the learning rate rises."""
PLAIN_FIRST = 0.35
"""Share of the training on motions alone: short captions cost a third, and teach what the words mean."""
POOL = 8192
"""Captions drawn at a time. Each is seen once."""
NEUTRAL_SHARE = 0.08

NORMAL = (PAN_PX, PAN_PX, ZOOM, ROLL_DEGREES, abs(LIGHT), OBJECT_PX, OBJECT_PX)
"""What each of `FIELDS` is divided by."""

PROMPTS = Path(__file__).parent / "prompts.json"
"""Written by hand, and never trained on."""

_ONE_BY_ONE = re.compile(r"[^\w\u2581]|[\u3400-\u9fff]")
_CHINESE = re.compile(r"[\u3400-\u9fff]")
_SYLLABLES = re.findall(
    r"\w+", "ba co de fi gu ha jo ke li mo nu pa qui re so ta ve wa ex yo zi an el in or un st th er ing ed"
)

Drawn = tuple[str, str]
"""A caption and the name of its motion."""


def target(name: str) -> list[float]:
    """Each field in units of its normal speed, and 1; or zeros for a caption that asks for no motion."""
    if name == NEUTRAL:
        return [0.0] * (len(FIELDS) + 1)
    return [*(value / unit for value, unit in zip(find(name).values(), NORMAL, strict=True)), 1.0]


def draw(count: int, random: Random, language: Language | None = None, *, plain: float = PLAIN) -> list[Drawn]:
    """Captions of all motions; a share of them asks for none. What has no speeds is drawn three times as often."""
    names = [*CATALOGUE, *("still", "darken", "brighten") * 2]
    drawn = [NEUTRAL if random.random() < NEUTRAL_SHARE else random.choice(names) for _ in range(count)]
    return [(clean(caption(name, random, language, plain=plain)), name) for name in drawn]


def disturbed(text: str, random: Random) -> str:
    """Every fourth time with one to three words that mean nothing, or Chinese characters, put in somewhere."""
    if not text or random.random() > 0.25:
        return text
    if _CHINESE.search(text):
        place = random.randint(0, len(text))
        noise = "".join(chr(random.randint(0x4E00, 0x9FA5)) for _ in range(random.randint(1, 4)))
        return text[:place] + noise + text[place:]
    words = text.split(" ")
    for _ in range(random.randint(1, 3)):
        words.insert(random.randint(0, len(words)), "".join(random.choices(_SYLLABLES, k=random.randint(2, 4))))
    return " ".join(words)


def make_tokenizer(texts: Sequence[str]) -> Any:
    """A T5 tokenizer whose pieces are parts of English words, single Chinese characters and printable ASCII."""
    printable = [chr(code) for code in range(33, 127)]
    specials = ["<pad>", "</s>", "<unk>"]
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"),
            pre_tokenizers.Split(Regex(_ONE_BY_ONE.pattern), behavior="isolated"),
        ]
    )
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY, special_tokens=specials, unk_token="<unk>", initial_alphabet=[*printable, "▁"],
        show_progress=False,
    )  # fmt: skip
    unigram.train_from_iterator(texts, trainer)
    scores = {piece: score for piece, score in json.loads(unigram.to_str())["model"]["vocab"] if piece not in specials}
    rarest = min(scores.values())
    # A run of unknown words is spelled; a piece that the trainer dropped costs as much as the rarest one.
    for character in [*printable, "▁"]:
        scores.setdefault(character, rarest)
    pieces = [*((special, 0.0) for special in specials), *scores.items()]
    return HUGGING.T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=MAX_TOKENS)


def make_encoder(vocabulary: int) -> Any:
    """A UMT5 encoder of some half a million parameters, with UMT5's own initialisation."""
    return HUGGING.UMT5EncoderModel(
        HUGGING.UMT5Config(
            vocab_size=vocabulary, d_model=WIDTH, d_kv=32, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        )
    )  # fmt: skip


class Head(nn.Module):
    """States (N, T, WIDTH) and mask (N, T) -> (N, fields + 1): attention pooling, then an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(WIDTH, 4)
        self.read = nn.Sequential(nn.Linear(4 * WIDTH, 128), nn.GELU(), nn.Linear(128, len(FIELDS) + 1))

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores = self.score(states).masked_fill(mask[..., None] == 0, -math.inf)
        pooled = torch.einsum("nth,ntc->nhc", scores.softmax(dim=1), states)
        read: torch.Tensor = self.read(pooled.flatten(1))
        return read


def tokens(tokenizer: Any, texts: Sequence[str], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, (N, T), padded to the longest."""
    found = tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    return found["input_ids"].to(device), found["attention_mask"].to(device)


def batches(drawn: list[Drawn], random: Random) -> list[list[Drawn]]:
    """In random order, each of captions of about one length: padding would be most of the work."""
    alike = sorted(drawn, key=lambda one: len(one[0]) if one[0].isascii() else 4 * len(one[0]))
    found = [alike[start : start + BATCH] for start in range(0, len(alike), BATCH)]
    random.shuffle(found)
    return found


def train(
    tokenizer: Any, encoder: Any, head: Head, seconds: float, random: Random, device: torch.device
) -> list[tuple[int, float]]:
    """Until `seconds` have passed. Returns (step, mean loss since the last entry) now and then."""
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    started, step, losses = time.monotonic(), 0, []
    curve: list[tuple[int, float]] = []
    waiting: list[list[Drawn]] = []
    encoder.train()
    while (done := (time.monotonic() - started) / seconds) < 1:
        if not waiting:
            waiting = batches(draw(POOL, random, plain=1.0 if done < PLAIN_FIRST else PLAIN), random)
        batch = waiting.pop()
        ids, mask = tokens(tokenizer, [disturbed(text, random) for text, _ in batch], device)
        wanted = torch.tensor([target(name) for _, name in batch], device=device)
        optimizer.param_groups[0]["lr"] = RATE * min(done / WARM_UP, 0.5 * (1 + math.cos(math.pi * done)))
        loss = (head(encoder(ids, mask).last_hidden_state, mask) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        losses.append(loss.item())
        if step % 100 == 0:
            curve.append((step, round(sum(losses) / len(losses), 5)))
            losses = []
    return curve


@torch.no_grad()
def accuracy(
    tokenizer: Any, encoder: Any, head: Head, drawn: Sequence[Drawn], device: torch.device
) -> tuple[float, list[dict[str, str]]]:
    """Share of the captions whose nearest motion of the catalogue (or none) has the right signs; and the failures."""
    names = (*CATALOGUE, NEUTRAL)
    motions = torch.tensor([target(name) for name in names], device=device)
    encoder.eval()
    wrong = []
    for start in range(0, len(drawn), BATCH):
        part = drawn[start : start + BATCH]
        ids, mask = tokens(tokenizer, [clean(text) for text, _ in part], device)
        read = head(encoder(ids, mask).last_hidden_state, mask)
        nearest = torch.cdist(read, motions).argmin(dim=1).tolist()
        for (text, name), index in zip(part, nearest, strict=True):
            if _signs(names[index]) != _signs(name):
                wrong.append({"text": text, "motion": name, "read": names[index]})
    return 1 - len(wrong) / len(drawn), wrong


def _signs(name: str) -> tuple[bool | None, ...]:
    return tuple(None if value == 0 else value > 0 for value in target(name))


def written(language: Language) -> list[Drawn]:
    """The prompts that were written by hand."""
    prompts = [(one["text"], one["motion"]) for one in json.loads(PROMPTS.read_text(encoding="utf-8"))]
    return [one for one in prompts if bool(_CHINESE.search(one[0])) == (language == "zh")]


@torch.no_grad()
def embed(prompts: Sequence[str], folder: Path, device: torch.device) -> torch.Tensor:
    """(N, 64, 128): the last hidden states of the encoder saved in `folder`, zero past each prompt's own tokens."""
    tokenizer = HUGGING.T5TokenizerFast.from_pretrained(folder / "tokenizer")
    encoder = HUGGING.UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).to(device).eval()
    return torch.cat([_states(tokenizer, encoder, prompts[k : k + 512], device) for k in range(0, len(prompts), 512)])


def _states(tokenizer: Any, encoder: Any, prompts: Sequence[str], device: torch.device) -> torch.Tensor:
    found = tokenizer(
        [clean(prompt) for prompt in prompts], padding="max_length", truncation=True, max_length=MAX_TOKENS,
        return_tensors="pt",
    ).to(device)  # fmt: skip
    states: torch.Tensor = encoder(found["input_ids"], found["attention_mask"]).last_hidden_state
    own: torch.Tensor = states * found["attention_mask"][..., None]
    return own


def save(tokenizer: Any, encoder: Any, folder: Path, probes: Sequence[str]) -> dict[str, float]:
    """Write both, the encoder in fp16; returns how far the states of the probes move when it is read again."""
    device = next(encoder.parameters()).device
    with torch.no_grad():
        before = _states(tokenizer, encoder.eval(), probes, device)
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder.half().save_pretrained(folder / "text_encoder")
    again = HUGGING.T5TokenizerFast.from_pretrained(folder / "tokenizer")
    if again(list(probes)).input_ids != tokenizer(list(probes)).input_ids:
        raise RuntimeError(f"The tokenizer saved in {folder} gives other ids than the one that was trained.")
    change = (embed(probes, folder, device) - before).abs()
    return {"largest": float(change.max()), "mean": float(change.mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(".data/text"), help="folder for the results")
    parser.add_argument("--seconds", type=float, default=150, help="time for training the encoder")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="two are slower than one where the cores are shared")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    started = time.monotonic()
    torch.manual_seed(options.seed)
    random, device = Random(options.seed), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = make_tokenizer(
        [disturbed(text, random) if text.isascii() else text for text, _ in draw(60_000, random)]
    )
    encoder, head = make_encoder(len(tokenizer)).to(device), Head().to(device)
    curve = train(tokenizer, encoder, head, options.seconds, random, device)
    report: dict[str, Any] = {"seed": options.seed, "max_tokens": MAX_TOKENS, "vocabulary": len(tokenizer)}
    report |= {"parameters": sum(p.numel() for p in encoder.parameters()), "device": device.type}
    unseen = Random(options.seed + 1_000_000)
    languages: tuple[Language, ...] = ("en", "zh")
    for language in languages:
        for kind, sample in (("drawn", draw(3000, unseen, language)), ("written", written(language))):
            share, wrong = accuracy(tokenizer, encoder, head, sample, device)
            report |= {f"{kind}_{language}": round(share, 4), f"wrong_{kind}_{language}": wrong[:20]}
    probes = [text for language in languages for text, _ in written(language)]
    report["fp16_change"] = save(tokenizer, encoder, options.out, probes)
    report |= {"seconds": round(time.monotonic() - started, 1), "config": encoder.config.to_diff_dict(), "curve": curve}
    (options.out / "text.json").write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")
    print(json.dumps(report, ensure_ascii=False))


if __name__ == "__main__":
    main()
