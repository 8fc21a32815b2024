"""Tokenizing a prompt to a fixed length, and saying what did not fit."""

from __future__ import annotations

from typing import Any

import torch

from framefit.families.parts import Notice

__all__ = ["tokenize"]


def tokenize(
    tokenizer: Any, prompt: str, max_tokens: int, notice: Notice, *, text: str | None = None, **facts: Any
) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, each (1, max_tokens), padded.

    `text` is the prompt inside its chat template, where there is one. Words past the limit are reported.
    """
    text = prompt if text is None else text
    tokens = tokenizer(
        text, padding="max_length", max_length=max_tokens, truncation=True, return_attention_mask=True,
        return_tensors="pt", **facts,
    )  # fmt: skip
    whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    room = max_tokens - tokenizer.num_special_tokens_to_add()
    if len(whole.input_ids) > room:
        end = text.rfind(prompt) + len(prompt)
        if lost := text[whole.offset_mapping[room][0] : end].strip():
            notice(
                f"'{prompt[:24]}...' takes {len(whole.input_ids)} tokens and this model reads {room}: the end was "
                f"cut, from '{lost[:80]}{'...' if len(lost) > 80 else ''}' on."
            )
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
