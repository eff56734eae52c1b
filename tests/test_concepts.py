from __future__ import annotations

import pytest
import torch

from concept_attention.core.architectures import Family
from concept_attention.core.architectures.flux1 import FAMILIES
from concept_attention.core.concepts import (
    LIMIT,
    Concepts,
    encode_concepts,
    parse_concepts,
    split_names,
)
from tiny_flux import random_clip

(FLUX1,) = FAMILIES


class Letters:
    """One token per letter from 10 on, "?" unknown."""

    unk_token = "?"

    def convert_ids_to_tokens(self, ids):
        return [chr(i - 10) for i in ids]


class Encoder:
    """A tokenizer of ComfyUI's: a template of two tokens before the text, the end token, then padding to
    ``length``. What is written (word:2) is weighted unless weights are disabled."""

    embedding_directory = "embeddings"
    disable_weights = False
    tokenizer = Letters()
    length = 9

    def tokenize_with_weights(self, text, return_word_ids=False, **kwargs):
        if not self.disable_weights or self.embedding_directory is not None:
            text = text.replace("(", "").replace(")", "")
        ids = [7, 8, *(10 + ord(c) for c in text), 1]
        return [[(i, 1.0) for i in ids + [0] * (self.length - len(ids))]]


class Tokenizer:
    def __init__(self, *encoders):
        for name in encoders:
            setattr(self, name, Encoder())

    def tokenize_with_weights(self, text, return_word_ids=False, **kwargs):
        return {name: part.tokenize_with_weights(text) for name, part in vars(self).items()}


class FakeClip:
    """The embedding of a token at position p is (token, p, length of its prompt); ``left_out`` tokens of the
    template are not given, nor are as many at the end as ``behind`` says."""

    def __init__(self, *encoders, left_out=0, behind=0):
        self.tokenizer = Tokenizer(*(encoders or ("letters",)))
        self.tokenizer_options = {}
        self.given = slice(left_out, -behind or None)

    def encode_from_tokens(self, tokens, return_dict):
        section = next(iter(tokens.values()))[0]
        rows = [[float(t), p, len(section)] for p, (t, _) in enumerate(section)]
        return {"cond": torch.tensor(rows)[None, self.given], "pooled_output": None}


class AFamily(Family):
    name = "A model"
    loader = "CLIPLoader, type a"
    encoders = ("letters",)


FAMILY = AFamily()


def encoded(names, pooling="first token", clip=None, family=FAMILY, width=3):
    return encode_concepts(clip or FakeClip(), names, pooling, family, width)


@pytest.mark.parametrize(
    "text,names",
    [
        ("dragon, rock\nsky", ("dragon", "rock", "sky")),
        ("  hot   air balloon ,,\n\n, \r\n tree", ("hot air balloon", "tree")),
        ("Cat, cat, CAT, dog", ("Cat", "dog")),
        ("(sky:1.5), embedding:foo, {a|b}", ("(sky:1.5)", "embedding:foo", "{a|b}")),
        ("<img src=x onerror=alert(1)>, 고양이, 🐱", ("<img src=x onerror=alert(1)>", "고양이", "🐱")),
        ("龙，石头、天空", ("龙", "石头", "天空")),
        (" \n , ", ()),
    ],
)
def test_names_are_trimmed_folded_and_literal(text, names):
    assert split_names(text) == names


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\v", "\f", "\x85", "\u2028", "\u2029"])
def test_every_line_end_of_unicode_parts_names(end):
    assert split_names(f"hot air{end}balloon{end}") == ("hot air", "balloon")


def test_a_background_concept_that_is_also_a_concept_is_a_concept():
    assert parse_concepts("cat, sky", "Sky, grass") == Concepts(("cat", "sky"), ("grass",))


def test_a_lone_concept_gets_a_competitor():
    assert parse_concepts("cat", "") == Concepts(("cat",), ("background",))
    assert parse_concepts("cat, dog", "").background == ()


@pytest.mark.parametrize("text", ["", " ,\n"])
def test_no_concepts_is_an_error_that_says_how_to_name_them(text):
    with pytest.raises(ValueError, match="one per line or separated by commas"):
        parse_concepts(text, "background")


def test_background_alone_is_an_error():
    with pytest.raises(ValueError, match='only the concept "Background"'):
        parse_concepts("Background", "background")


def test_too_many_concepts_is_an_error_with_both_numbers():
    with pytest.raises(ValueError, match=rf"{LIMIT + 1} concepts; the limit is {LIMIT}"):
        parse_concepts(", ".join(f"thing {i}" for i in range(LIMIT)), "background")


def test_first_token_is_the_first_of_the_name_not_of_the_template():
    assert encoded(("ab", "c")).pooled().tolist() == [[10 + ord("a"), 2, 9], [10 + ord("c"), 2, 9]]


def test_last_token_is_the_last_of_the_name():
    assert encoded(("ab", "c"), "last token").pooled().tolist() == [
        [10 + ord("b"), 3, 9],
        [10 + ord("c"), 2, 9],
    ]


def test_mean_of_tokens_leaves_out_template_end_and_padding():
    tokens = encoded(("ab",), "mean of tokens").pooled()
    assert tokens.tolist() == [[10 + (ord("a") + ord("b")) / 2, 2.5, 9]]


@pytest.mark.parametrize("causal,pooling", [(True, "last token"), (False, "mean of tokens")])
def test_automatic_pooling_is_the_last_token_of_an_encoder_that_reads_forward_only(causal, pooling):
    family = type("B", (AFamily,), {"causal": causal})()
    assert encoded(("ab",), "automatic", family=family).pooling == pooling


def test_what_an_encoder_leaves_out_of_its_template_does_not_shift_the_names():
    assert torch.equal(
        encoded(("ab", "c"), clip=FakeClip(left_out=2)).pooled(), encoded(("ab", "c")).pooled()
    )


CAUSAL = type("B", (AFamily,), {"causal": True})()


def test_what_a_causal_encoder_leaves_out_behind_a_name_does_not_shift_it():
    tokens = encoded(("ab", "c"), clip=FakeClip(left_out=2, behind=3), family=CAUSAL)
    assert torch.equal(tokens.pooled(), encoded(("ab", "c")).pooled())


def test_a_name_that_goes_on_behind_what_is_read_is_an_error():
    with pytest.raises(ValueError, match='"abcde" is longer than what the text encoder reads'):
        encoded(("ab", "abcde"), clip=FakeClip(left_out=2, behind=3), family=CAUSAL)


def test_sequences_are_whole_prompts_without_padding():
    tokens = encoded(("ab", "c"))
    assert [len(s) for s in tokens.sequences] == [5, 4]
    assert tokens.lengths == (9, 9)


def test_a_name_does_not_depend_on_the_others():
    alone, both = encoded(("ab",)), encoded(("abcdefghij", "ab"))
    assert torch.equal(both.sequences[1], alone.sequences[0])


def test_names_are_literal_for_the_text_encoder():
    clip = FakeClip()
    assert encoded(("(a)",), clip=clip).pooled().tolist() == [[10 + ord("("), 2, 9]]
    assert not clip.tokenizer.letters.disable_weights
    assert clip.tokenizer.letters.embedding_directory == "embeddings"


@pytest.mark.parametrize("name", ["0", "z", "z0", "00", "0z0z"])
def test_names_that_begin_or_end_like_a_probe(name):
    tokens = encoded((name,), "mean of tokens")
    assert tokens.spans == (slice(2, 2 + len(name)),)


def test_a_name_that_the_text_encoder_cannot_read_is_an_error():
    with pytest.raises(ValueError, match=r'no part of the concept "\?\?"'):
        encoded(("ab", "??"))
    encoded(("a?",))


def test_a_clip_of_another_width_is_an_error_that_names_both():
    with pytest.raises(
        ValueError, match=r"model is A model, and the CLIP has text tokens of width 3, not 4096"
    ):
        encoded(("ab",), width=4096)


@pytest.mark.parametrize("encoders", [("l",), ("l", "g", "t5xxl")])
def test_a_clip_of_another_model_is_an_error_that_names_both_and_the_loader(encoders):
    with pytest.raises(ValueError, match=rf"A model, .* {', '.join(encoders)}\. .*CLIPLoader, type a"):
        encoded(("ab",), clip=FakeClip(*encoders))


def test_an_unknown_pooling_is_an_error():
    with pytest.raises(ValueError, match=r'"middle token".*automatic, mean of tokens, first token'):
        encoded(("ab",), "middle token")


def test_flux_s_own_tokenizers_and_encoders():
    tokens = encode_concepts(random_clip(), ("dragon", "hot air balloon"), "automatic", FLUX1, 32)
    assert tokens.spans == (slice(0, 1), slice(0, 3))
    assert tokens.lengths == (256, 256)
    whole = random_clip().encode_from_tokens(random_clip().tokenize("hot air balloon"))
    assert torch.allclose(tokens.pooled()[1], whole[0, :3].mean(0), atol=1e-6)


def test_half_a_character_in_a_name_is_an_error_that_shows_it():
    with pytest.raises(ValueError, match=r"'cat\\ud83d' has half a character"):
        encoded(("dog", "cat\ud83d"))
