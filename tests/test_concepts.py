from __future__ import annotations

import pytest
import torch

from concept_attention.core.concepts import (
    LIMIT,
    Concepts,
    encode_concepts,
    parse_concepts,
    split_names,
)


class FakeTokenizer:
    """One token per letter from 10 on, "?" unknown (2); end token 1, padding 0."""

    def tokenizer(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [2 if c == "?" else 10 + ord(c) for c in text]}


class FakeClip:
    """The embedding of a token at position p is (token, p, length of the section)."""

    def __init__(self, length=6):
        self.length = length
        self.batches = []
        self.tokenizer = type("Tokenizers", (), {"t5xxl": FakeTokenizer()})()

    def tokenize(self, text):
        assert text == ""
        return {"l": [[(0, 1.0)]], "t5xxl": [[(1, 1.0)] + [(0, 1.0)] * (self.length - 1)]}

    def encode_from_tokens(self, tokens):
        sections = tokens["t5xxl"]
        self.batches.append(sections)
        assert len({len(s) for s in sections}) == 1
        rows = [[(t, p, len(s)) for p, (t, _) in enumerate(s)] for s in sections]
        return torch.tensor(rows, dtype=torch.float32).flatten(0, 1)[None]


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


def test_first_token_is_the_first_piece_of_the_name():
    tokens = encode_concepts(FakeClip(), ("ab", "c"), "first token", 3)
    assert tokens.tolist() == [[10 + ord("a"), 0, 6], [10 + ord("c"), 0, 6]]


def test_mean_of_tokens_leaves_out_the_end_and_the_padding():
    tokens = encode_concepts(FakeClip(), ("ab",), "mean of tokens", 3)
    assert tokens.tolist() == [[10 + (ord("a") + ord("b")) / 2, 0.5, 6]]


def test_all_concepts_are_encoded_in_one_batch():
    clip = FakeClip()
    encode_concepts(clip, ("ab", "c", "def"), "first token", 3)
    assert [len(batch) for batch in clip.batches] == [3]


def test_a_long_name_does_not_change_the_others():
    clip = FakeClip()
    alone = encode_concepts(clip, ("ab",), "mean of tokens", 3)
    both = encode_concepts(clip, ("abcdefghij", "ab"), "mean of tokens", 3)
    assert torch.equal(both[1], alone[0])
    assert both[0].tolist() == [10 + sum(map(ord, "abcdefghij")) / 10, 4.5, 11]


def test_a_name_that_the_text_encoder_cannot_read_is_an_error():
    with pytest.raises(ValueError, match=r'no part of the concept "\?\?"'):
        encode_concepts(FakeClip(), ("ab", "??"), "first token", 3)
    encode_concepts(FakeClip(), ("a?",), "first token", 3)


def test_a_clip_of_another_width_is_an_error_with_both_widths():
    with pytest.raises(ValueError, match="width 3, but the model takes 4096"):
        encode_concepts(FakeClip(), ("ab",), "first token", 4096)


@pytest.mark.parametrize("keys", [("l",), ("l", "g", "t5xxl"), ("qwen3_4b",)])
def test_a_clip_of_another_model_is_an_error_that_names_the_loader(keys):
    clip = FakeClip()
    clip.tokenize = lambda text: {key: [[(1, 1.0)]] for key in keys}
    with pytest.raises(ValueError, match=r'DualCLIPLoader and type "flux"'):
        encode_concepts(clip, ("ab",), "first token", 3)


def test_an_unknown_pooling_is_an_error():
    with pytest.raises(ValueError, match=r'"last token".*mean of tokens, first token'):
        encode_concepts(FakeClip(), ("ab",), "last token", 3)


def test_half_a_character_in_a_name_is_an_error_that_shows_it():
    with pytest.raises(ValueError, match=r"'cat\\ud83d' has half a character"):
        encode_concepts(FakeClip(), ("dog", "cat\ud83d"), "first token", 3)
