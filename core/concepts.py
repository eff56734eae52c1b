"""Concepts: a list of names from text, and their tokens from a CLIP object."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from comfy.sd import CLIP

    from .architectures import Family

COMPETITOR = "background"
LIMIT = 128
POOLINGS = ("automatic", "mean of tokens", "first token", "last token")

# Two texts that no name begins like both or ends like both. Not an empty one, for which templates may change.
_PROBES = ("0", "z")


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


@dataclass(frozen=True)
class ConceptTokens:
    """K names as a text encoder gives them, each as a prompt of its own in the encoder's template.

    Attributes:
        sequences: for each name the tokens of its prompt, (T_k, C) float32, without padding.
        spans: where in it the name's own tokens lie.
        lengths: how many tokens each prompt has as the encoder gives it, padding included.
        pooling: how they become one: "mean of tokens", "first token" or "last token".
    """

    sequences: tuple[Tensor, ...]
    spans: tuple[slice, ...]
    lengths: tuple[int, ...]
    pooling: str

    @classmethod
    def single(cls, tokens: Tensor) -> ConceptTokens:
        """Concepts of one token each, (K, C)."""
        count = len(tokens)
        return cls(tuple(tokens[:, None]), (slice(0, 1),) * count, (1,) * count, "first token")

    @classmethod
    def together(cls, parts: Sequence[ConceptTokens]) -> ConceptTokens:
        """The concepts of all parts, pooled like the first's."""

        def joined(name: str) -> tuple:
            return tuple(itertools.chain.from_iterable(getattr(part, name) for part in parts))

        return cls(joined("sequences"), joined("spans"), joined("lengths"), parts[0].pooling)

    def to(self, device: torch.device) -> ConceptTokens:
        return replace(self, sequences=tuple(s.to(device) for s in self.sequences))

    def pooled(self, sequences: Sequence[Tensor] | None = None) -> Tensor:
        """One token for each concept (K, D), of its own ``sequences`` (T_k, D) or what became of them."""
        own = [s[span] for s, span in zip(sequences or self.sequences, self.spans, strict=True)]
        if self.pooling == "mean of tokens":
            return torch.stack([tokens.mean(0) for tokens in own])
        return torch.stack([tokens[0 if self.pooling == "first token" else -1] for tokens in own])


def encode_concepts(
    clip: CLIP, names: tuple[str, ...], pooling: str, family: Family, width: int
) -> ConceptTokens:
    """The tokens of names from any CLIP object, in its own template, each name by itself.

    Where a name's tokens lie is seen by comparing its token ids with those of two other texts: what all three
    begin and end with is template and padding.

    Args:
        pooling: one of ``POOLINGS``. "automatic" is the last token of a causal encoder, which has read the
            others, and the mean of the tokens of any other. "first token" is the paper's reference's.
        family: of the model that is to take them.
        width: C, the width of the model's text tokens.

    Raises:
        ValueError: the CLIP does not belong to the model, there is no such pooling, or the encoder has no
            tokens for a name.
    """
    if pooling not in POOLINGS:
        raise ValueError(f'Unknown token pooling "{pooling}". Choose one of: {", ".join(POOLINGS)}.')
    if pooling == "automatic":
        pooling = "last token" if family.causal else "mean of tokens"
    tokenizer = _literal(clip)
    options = {"tokenizer_options": clip.tokenizer_options} if clip.tokenizer_options else {}

    def tokenize(text: str) -> dict[str, list]:
        # A backslash before a parenthesis is taken for an escape, weights or not.
        return tokenizer.tokenize_with_weights(re.sub(r"\\([()])", r"\\\\\1", text), **options)

    probes = [tokenize(text) for text in _PROBES]
    given = probes[0]
    choice = family.encoders or (list(given) if len(given) == 1 else ())
    encoder = next((e for e in choice if e in given), None)
    if encoder is None:
        raise _not_the_models(family, f"the text encoders {', '.join(given)}")
    padding = _padding(_ids(given[encoder]))
    probes = [_unpadded(_ids(probe[encoder]), padding) for probe in probes]
    sequences, spans, lengths = [], [], []
    for name in names:
        if any("\ud800" <= c <= "\udfff" for c in name):
            raise ValueError(
                f"The concept {name!a} has half a character in it, as of an emoji. Write it anew."
            )
        tokens = tokenize(name)
        whole = _ids(tokens[encoder])
        ids = _unpadded(whole, padding)
        span = _own(ids, probes)
        if _unknown(tokenizer, encoder, ids[span]):
            raise ValueError(
                f'The text encoder knows no part of the concept "{name}". It was trained on Latin script: '
                "write the concept in English."
            )
        encoded = clip.encode_from_tokens(tokens, return_dict=True)["cond"]
        if not encoded.any():  # what ComfyUI gives for an encoder that was not loaded
            raise ValueError(
                f"The CLIP lacks the text encoder {encoder}, which the concepts of {family.name} come from. "
                f"Load it with the others: {family.loader}."
            )
        if encoded.shape[-1] != width:
            raise _not_the_models(family, f"text tokens of width {encoded.shape[-1]}, not {width}")
        # Encoders that leave their template out of what they give leave it out in front.
        left_out = max(0, len(whole) - encoded.shape[1])
        sequences.append(encoded[0, : len(ids) - left_out].float().cpu())
        spans.append(slice(span.start - left_out, span.stop - left_out))
        lengths.append(encoded.shape[1])
    return ConceptTokens(tuple(sequences), tuple(spans), tuple(lengths), pooling)


def _not_the_models(family: Family, what: str) -> ValueError:
    return ValueError(
        f"The CLIP does not belong to the MODEL: the model is {family.name}, and the CLIP has {what}. "
        f"Load the model's own text encoders: {family.loader}."
    )


def _literal(clip: CLIP):
    """The CLIP's tokenizer, to which weights and embeddings in a text mean nothing."""
    tokenizer = copy.copy(clip.tokenizer)
    for name, part in vars(clip.tokenizer).items():
        if hasattr(part, "embedding_directory"):
            part = copy.copy(part)
            part.embedding_directory, part.disable_weights = None, True
            setattr(tokenizer, name, part)
    return tokenizer


def _ids(sections: list[list[tuple]]) -> list[int]:
    return [token[0] for section in sections for token in section]


def _padding(ids: list[int]) -> int | None:
    """The token that fills a short text up to the encoder's length: a run of three or more at the end."""
    return ids[-1] if len(ids) > 2 and ids[-3:] == ids[-1:] * 3 else None


def _unpadded(ids: list[int], padding: int | None) -> list[int]:
    end = len(ids)
    while end and ids[end - 1] == padding:
        end -= 1
    return ids[:end]


def _own(ids: list[int], probes: list[list[int]]) -> slice:
    """Which of the ids are the text's own: not what the probes begin with too, nor what they end with."""

    def shared(ids: list[int], probes: list[list[int]]) -> int:
        alike = (all(a == probe for probe in others) for a, *others in zip(ids, *probes, strict=False))
        return sum(1 for _ in itertools.takewhile(bool, alike))

    start = shared(ids, probes)
    end = shared(ids[start:][::-1], [probe[start:][::-1] for probe in probes])
    return slice(start, len(ids) - end)


def _unknown(tokenizer, encoder: str, ids: list[int]) -> bool:
    """Whether the text has no tokens but spaces and the one for what the tokenizer does not know."""
    part = getattr(tokenizer, encoder, None) or getattr(tokenizer, f"clip_{encoder}", None)
    pieces = getattr(part, "tokenizer", None)
    unknown = getattr(pieces, "unk_token", None)
    if not ids or unknown is None:
        return not ids
    return all(piece in (unknown, "▁") for piece in pieces.convert_ids_to_tokens(ids))
