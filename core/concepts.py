"""Concepts: a list of names from text, and their tokens from a CLIP object."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from comfy.sd import CLIP

COMPETITOR = "background"
LIMIT = 128
POOLINGS = ("mean of tokens", "first token")

_T5 = "t5xxl"
_T5_SPACE, _T5_UNKNOWN = 3, 2


@dataclass(frozen=True)
class Concepts:
    """Names of the concepts to be shown, and of background concepts that only compete with them."""

    names: tuple[str, ...]
    background: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        return self.names + self.background


def split_names(text: str) -> tuple[str, ...]:
    """Names from text, one per line (by any line end of Unicode's) or separated by commas (also those of
    Chinese and Japanese): trimmed, in order, each once (whatever its case). Prompt syntax has no meaning."""
    names: dict[str, str] = {}
    for part in re.split("[,，、]", ",".join(text.splitlines())):
        name = " ".join(part.split())
        if name:
            names.setdefault(name.casefold(), name)
    return tuple(names.values())


def parse_concepts(text: str, background: str = "") -> Concepts:
    """Concepts and background concepts from text.

    A softmax over a single concept is constant, so a lone concept competes with "background".

    Raises:
        ValueError: no concepts, more than ``LIMIT`` in all, or "background" alone.
    """
    names = split_names(text)
    if not names:
        raise ValueError(
            "Concept Attention has no concepts. Name at least one, one per line or separated by commas, "
            'for example "dragon, rock, sky".'
        )
    taken = {name.casefold() for name in names}
    others = tuple(name for name in split_names(background) if name.casefold() not in taken)
    if len(names) + len(others) == 1:
        if COMPETITOR in taken:
            raise ValueError(
                f'Concept Attention has only the concept "{names[0]}", with nothing to compare it to. '
                "Name at least one thing in the picture."
            )
        others = (COMPETITOR,)
    if len(names) + len(others) > LIMIT:
        raise ValueError(
            f"Concept Attention was given {len(names) + len(others)} concepts; the limit is {LIMIT}. "
            "Concepts are short names of things, one per line or separated by commas, not a prompt."
        )
    return Concepts(names, others)


def encode_concepts(clip: CLIP, names: tuple[str, ...], pooling: str, width: int) -> Tensor:
    """One token (K, C) float32 for each name, from the T5 of a Flux CLIP, all in one batch.

    Args:
        pooling: ``"first token"`` takes the first piece of the name as T5 sees it, like the reference;
            ``"mean of tokens"`` the mean of all its pieces, without end and padding.
        width: C, the width of the model's text tokens.

    Raises:
        ValueError: the CLIP is not Flux's, does not fit the model, or T5 has no pieces for a name or cannot
            read it.
    """
    if pooling not in POOLINGS:
        raise ValueError(f'Unknown token pooling "{pooling}". Choose one of: {", ".join(POOLINGS)}.')
    empty = clip.tokenize("")
    if set(empty) - {"l", _T5} or _T5 not in empty:
        raise ValueError(
            f"Concept Attention needs Flux's text encoders, CLIP-L and T5; this CLIP has: "
            f'{", ".join(empty)}. Load them with DualCLIPLoader and type "flux".'
        )
    padding = empty[_T5][0]  # the end token, then padding to the encoder's length
    tokenizer = getattr(clip.tokenizer, _T5)
    sections, counts = [], []
    for name in names:
        if any("\ud800" <= c <= "\udfff" for c in name):
            raise ValueError(
                f"The concept {name!a} has half a character in it, as of an emoji. Write it anew."
            )
        # Not clip.tokenize: it would parse weights and embeddings out of the name.
        ids = tokenizer.tokenizer(name, add_special_tokens=False)["input_ids"]
        if all(i in (_T5_SPACE, _T5_UNKNOWN) for i in ids):
            raise ValueError(
                f'The text encoder knows no part of the concept "{name}". '
                "Flux's T5 was trained on Latin script: write the concept in English."
            )
        sections.append([(i, 1.0) for i in ids] + padding[: max(1, len(padding) - len(ids))])
        counts.append(len(ids))

    tokens: list[Tensor] = [None] * len(names)
    # One batch for all; a name longer than the encoder's padded length needs a batch of its own length.
    for length in sorted({len(s) for s in sections}):
        rows = [i for i, s in enumerate(sections) if len(s) == length]
        encoded = clip.encode_from_tokens({**empty, _T5: [sections[i] for i in rows]})
        if encoded.shape[-1] != width:
            raise ValueError(
                f"The CLIP gives text tokens of width {encoded.shape[-1]}, but the model takes {width}. "
                "Use the text encoders that belong to the model."
            )
        for row, i in zip(encoded.float().reshape(len(rows), length, width), rows, strict=True):
            tokens[i] = row[0] if pooling == "first token" else row[: counts[i]].mean(0)
    return torch.stack(tokens)
