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
class Prompt:
    """A prompt in whose words concepts are looked for.

    Attributes:
        sequence: its tokens as the model is given them, (T, C) float32.
        words: for each concept, in which rows its tokens stand, wherever it occurs; empty if it does not.
    """

    sequence: Tensor
    words: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ConceptTokens:
    """K names as a text encoder gives them, each as a prompt of its own in the encoder's template.

    Attributes:
        sequences: for each name the tokens of its prompt, (T_k, C) float32, without padding.
        spans: where in it the name's own tokens lie.
        lengths: how many tokens each prompt has as the encoder gives it, padding included.
        pooling: how they become one: "mean of tokens", "first token" or "last token".
        prompt: the one that the names may be words of.
    """

    sequences: tuple[Tensor, ...]
    spans: tuple[slice, ...]
    lengths: tuple[int, ...]
    pooling: str
    prompt: Prompt | None = None

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
        prompt = self.prompt and replace(self.prompt, sequence=self.prompt.sequence.to(device))
        return replace(self, sequences=tuple(s.to(device) for s in self.sequences), prompt=prompt)

    def pooled(self, sequences: Sequence[Tensor] | None = None) -> Tensor:
        """One token for each concept (K, D), of its own ``sequences`` (T_k, D) or what became of them."""
        own = [s[span] for s, span in zip(sequences or self.sequences, self.spans, strict=True)]
        if self.pooling == "mean of tokens":
            return torch.stack([tokens.mean(0) for tokens in own])
        return torch.stack([tokens[0 if self.pooling == "first token" else -1] for tokens in own])


def encode_concepts(
    clip: CLIP, names: tuple[str, ...], pooling: str, family: Family, width: int, prompt: str = ""
) -> ConceptTokens:
    """The tokens of names from any CLIP object, in its own template, each name by itself.

    Where a name's tokens lie is seen by comparing its token ids with those of two other texts, the probes:
    what all three begin and end with is template and padding. Which rows of the encoding are theirs is seen,
    with a causal encoder, by where the encodings of the probes part.

    Args:
        pooling: one of ``POOLINGS``. "automatic" is the last token of a causal encoder, which has read the
            others, and the mean of the tokens of any other. "first token" is the paper's reference's.
        family: of the model that is to take them.
        width: C, the width of the model's text tokens.
        prompt: a text, with all that prompt syntax can do, in which names are found by their token ids, as
            in DAAM; at the beginning of a word or behind a space, with a capital letter or without.

    Raises:
        ValueError: the CLIP does not belong to the model, there is no such pooling, or the encoder has no
            tokens for a name or takes it, in whole or in part, for more than its words.
    """
    if pooling not in POOLINGS:
        raise ValueError(f'Unknown token pooling "{pooling}". Choose one of: {", ".join(POOLINGS)}.')
    if pooling == "automatic":
        pooling = "last token" if family.causal else "mean of tokens"
    tokenizer = literal_tokenizer(clip)
    options = {"tokenizer_options": clip.tokenizer_options} if clip.tokenizer_options else {}

    def tokenize(text: str) -> dict[str, list]:
        return tokenizer.tokenize_with_weights(text, **options)

    # Most tokenizers take a backslash before a parenthesis for an escape, weights or not.
    escapes = tokenize(r"0\(") == tokenize("0(")

    def tokens_of(name: str) -> dict[str, list]:
        return tokenize(escaped(name) if escapes else name)

    probes = [tokenize(text) for text in _PROBES]
    given = probes[0]
    choice = family.encoders or (list(given) if len(given) == 1 else ())
    encoder = next((e for e in choice if e in given), None)
    if encoder is None:
        raise _not_the_models(family, f"the text encoders {', '.join(given)}")
    padding = _padding(_ids(given[encoder]))

    def encode(tokens: dict[str, list]) -> Tensor:
        encoded = family.sequence(clip.encode_from_tokens(tokens, return_dict=True))
        if encoded.shape[-1] != width:
            raise _not_the_models(family, f"text tokens of width {encoded.shape[-1]}, not {width}")
        return encoded.float().cpu()

    ids = [_unpadded(_ids(probe[encoder]), padding) for probe in probes]
    front = None
    if family.causal:
        encoded = [encode(probe) for probe in probes]
        if _ids(given[encoder])[0] == padding and len(encoded[0]) == len(ids[0]):
            front = 0  # it leaves out the padding, which is in front, and nothing else
        else:
            front = _own(ids[0], ids[1:]).start - _parting(*encoded)
        if not 0 <= front <= max(0, len(_ids(given[encoder])) - len(encoded[0])):
            raise _not_the_models(family, f"no weights for the text encoder {encoder}")
    special = special_words(tokenizer, encoder)
    sequences, spans, lengths = [], [], []
    for name in names:
        expect_words(name, special)
        tokens = tokens_of(name)
        whole = _ids(tokens[encoder])
        own = _unpadded(whole, padding)
        span = _own(own, ids)
        if _unknown(tokenizer, encoder, own[span]):
            raise ValueError(
                f'The text encoder knows no part of the concept "{name}". It was trained on Latin script: '
                "write the concept in English."
            )
        encoded = encode(tokens)
        # Template is left out in front; by LongCat-Image's encoder, which is causal, behind the name too.
        left_out = max(0, len(whole) - len(encoded)) if front is None else front
        if span.start < left_out:
            raise _more_than_words(name, name)
        if span.stop - left_out > len(encoded):
            raise ValueError(
                f'The concept "{name}" is longer than what the text encoder reads. Name it in a few words.'
            )
        sequences.append(encoded[: len(own) - left_out])
        spans.append(slice(span.start - left_out, span.stop - left_out))
        lengths.append(len(encoded))
    tokens = ConceptTokens(tuple(sequences), tuple(spans), tuple(lengths), pooling)
    if not prompt.strip():
        return tokens
    given = clip.tokenize(prompt)
    whole = _begun(_ids(given[encoder]), padding)
    encoded = encode(given)
    left_out = max(0, len(whole) - len(encoded)) if front is None else front
    rows = whole[left_out : left_out + len(encoded)]

    def own_ids(text: str) -> list[int]:
        found = _unpadded(_ids(tokens_of(text)[encoder]), padding)
        return found[_own(found, ids)]

    words = []
    for name in names:
        spelled = []
        for spelling in _spellings(name):
            alone, behind_a_space = own_ids(spelling), own_ids(f" {spelling}")
            spelled.append(alone)
            if behind_a_space[-len(alone) :] != alone:  # else the space is a token of its own, or none
                spelled.append(behind_a_space)
        words.append(_occurrences(spelled, rows))
    return replace(tokens, prompt=Prompt(encoded, tuple(words)))


def _not_the_models(family: Family, what: str) -> ValueError:
    return ValueError(
        f"The CLIP does not belong to the MODEL: the model is {family.name}, and the CLIP has {what}. "
        f"Load the model's own text encoders: {family.loader}."
    )


def expect_words(name: str, special: Sequence[str]) -> None:
    """
    Raises:
        ValueError: the name has half a character in it, or one of the ``special_words`` of its tokenizer.
    """
    if any("\ud800" <= c <= "\udfff" for c in name):
        raise ValueError(f"The concept {name!a} has half a character in it, as of an emoji. Write it anew.")
    if command := next((word for word in special if word in name), None):
        raise _more_than_words(name, command)


def _more_than_words(name: str, command: str) -> ValueError:
    return ValueError(
        f'The concept "{name}" is more than words to the text encoder: "{command}" is a command of its own. '
        "Write the concept without it."
    )


def literal_tokenizer(clip: CLIP):
    """The CLIP's tokenizer, to which weights and embeddings in a text mean nothing."""
    tokenizer = copy.copy(clip.tokenizer)
    for name, part in vars(clip.tokenizer).items():
        if hasattr(part, "embedding_directory"):
            part = copy.copy(part)
            part.embedding_directory, part.disable_weights = None, True
            setattr(tokenizer, name, part)
    return tokenizer


def escaped(name: str) -> str:
    """The name for a tokenizer that takes a backslash before a parenthesis for an escape."""
    return re.sub(r"\\([()])", r"\\\\\1", name)


def _ids(sections: list[list[tuple]]) -> list[int]:
    return [token[0] for section in sections for token in section]


def _padding(ids: list[int]) -> int | None:
    """The token that fills a short text up to the encoder's length: the longest run of three or more."""
    runs = [(len(list(run)), token) for token, run in itertools.groupby(ids)]
    length, token = max(runs, key=lambda run: run[0], default=(0, None))
    return token if length > 2 else None


def _unpadded(ids: list[int], padding: int | None) -> list[int]:
    ids = _begun(ids, padding)
    return ids[: ids.index(padding)] if padding in ids else ids


def _begun(ids: list[int], padding: int | None) -> list[int]:
    """Without the padding in front, which some encoders leave out of what they give."""
    return list(itertools.dropwhile(lambda token: token == padding, ids))


def _parting(a: Tensor, b: Tensor) -> int:
    """The first row in which two encodings (T, C) differ by more than rounding; -1 if none does."""
    length = min(len(a), len(b))
    a, b = a[:length], b[:length]
    difference = (a - b).norm(dim=-1) / a.norm(dim=-1).clamp(min=1e-9)
    apart = (difference > difference.amax() / 10).nonzero()
    return int(apart[0]) if len(apart) else -1


def _own(ids: list[int], probes: list[list[int]]) -> slice:
    """Which of the ids are the text's own: not what the probes begin with too, nor what they end with."""

    def shared(ids: list[int], probes: list[list[int]]) -> int:
        alike = (all(a == probe for probe in others) for a, *others in zip(ids, *probes, strict=False))
        return sum(1 for _ in itertools.takewhile(bool, alike))

    start = shared(ids, probes)
    end = shared(ids[start:][::-1], [probe[start:][::-1] for probe in probes])
    return slice(start, len(ids) - end)


def _spellings(name: str) -> list[str]:
    """How a name may be written within a text, where tokenizers have other tokens for it with a capital
    letter."""
    return list(dict.fromkeys((name, name.lower(), name[:1].upper() + name[1:])))


def _occurrences(spellings: list[list[int]], text: list[int]) -> tuple[int, ...]:
    """Where in ``text`` the ids of one of the spellings stand one after the other: the places of all."""
    found = set()
    for ids in filter(None, spellings):
        length = len(ids)
        for start in range(len(text) - length + 1):
            if text[start : start + length] == ids:
                found.update(range(start, start + length))
    return tuple(sorted(found))


def _unknown(tokenizer, encoder: str, ids: list[int]) -> bool:
    """Whether the text has no tokens but spaces and the one for what the tokenizer does not know."""
    pieces = _pieces(tokenizer, encoder)
    unknown = getattr(pieces, "unk_token", None)
    if not ids or unknown is None:
        return not ids
    return all(piece in (unknown, "▁") for piece in pieces.convert_ids_to_tokens(ids))


def special_words(tokenizer, encoder: str) -> list[str]:
    """What is one token to the encoder that no other text gives, such as the beginning of a message."""
    pieces = _pieces(tokenizer, encoder)
    if getattr(pieces, "special_tokens", None):  # SentencePiece's, as ComfyUI wraps it
        return list(pieces.special_tokens)
    added = getattr(pieces, "added_tokens_decoder", None)
    if added is None and hasattr(getattr(pieces, "tokenizer", None), "get_added_tokens_decoder"):
        added = pieces.tokenizer.get_added_tokens_decoder()
    return [token.content for token in (added or {}).values() if token.special]


def _pieces(tokenizer, encoder: str):
    """What cuts a text into tokens for that encoder."""
    part = getattr(tokenizer, encoder, None) or getattr(tokenizer, f"clip_{encoder}", None)
    return getattr(part, "tokenizer", None)
