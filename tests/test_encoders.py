"""Concepts from ComfyUI's own tokenizers and text encoders, for every family: the rows are the name's."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from comfy.sd import CLIPType
from tiny_encoders import ENCODERS, T5, WIDTH, EncoderRow, clip_of, ltx2, tiny_clip

from concept_attention.core.architectures import families
from concept_attention.core.concepts import ConceptTokens, Prompt, encode_concepts

FAMILIES = {family.name: family for family in families()}


@pytest.fixture(params=ENCODERS)
def name(request) -> str:
    return request.param


@pytest.fixture
def row(name) -> EncoderRow:
    return ENCODERS[name]


@cache
def encoded(name: str, *concepts: str) -> ConceptTokens:
    row = ENCODERS[name]
    return encode_concepts(tiny_clip(name), concepts, "automatic", FAMILIES[row.family], row.width)


# What loads their text encoders has no types to choose from.
WITHOUT_TYPES = {"HiDream-O1", "LTX-2", "Stable Diffusion 1, 2, XL"}


def test_every_family_has_an_encoder_here():
    assert {row.family for row in ENCODERS.values()} == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_the_loaders_types_are_comfyuis(family):
    types = re.findall('"([a-z0-9_]+)"', family.loader)
    assert bool(types) != (family.name in WITHOUT_TYPES)
    assert all(hasattr(CLIPType, kind.upper()) for kind in types)


def test_a_names_tokens_lie_where_the_encoder_puts_them(name, row):
    tokens = encoded(name, "dragon", "hot air balloon")
    assert [(span.start, span.stop) for span in tokens.spans] == list(row.rows)
    assert tokens.lengths[0] == row.length


def test_the_first_ltx2_scales_a_text_as_a_whole_and_its_rows_are_found_too():
    """No row of a text is that of another text, however they begin."""
    row = replace(ENCODERS["ltx23"], model=ltx2("single_linear", WIDTH), width=WIDTH)
    names = ("dragon", "hot air balloon")
    tokens = encode_concepts(clip_of(row), names, "automatic", FAMILIES[row.family], WIDTH)
    assert [(span.start, span.stop) for span in tokens.spans] == list(row.rows)
    assert not torch.allclose(tokens.sequences[0][0], tokens.sequences[1][0], atol=1e-3)


@pytest.mark.parametrize(
    "name,user,dragon",
    [("ltx23", (3, 4), (9, 10, 11)), ("wan", (2, 3), (8, 9, 10)), ("sdxl", (2,), (5,))],
)
def test_names_are_found_in_a_prompt_on_whichever_side_it_is_filled_up(name, user, dragon):
    row = ENCODERS[name]
    family, names = FAMILIES[row.family], ("dragon", "user", "sky")
    prompt = "a user and a dragon"
    tokens = encode_concepts(tiny_clip(name), names, "automatic", family, row.width, prompt)
    assert tokens.prompt.words == (dragon, user, ())


def test_the_rows_are_those_that_the_clip_gives_for_the_name_as_a_prompt(name):
    (sequence,) = encoded(name, "hot air balloon").sequences
    clip = tiny_clip(name)
    prompt = clip.encode_from_tokens(clip.tokenize("hot air balloon"), return_dict=True)
    assert torch.equal(sequence, FAMILIES[ENCODERS[name].family].sequence(prompt)[: len(sequence)])


def test_only_from_its_first_row_on_a_name_differs_from_another(name, row):
    tokens = encoded(name, "hot air balloon", "hot air pump", "sky")
    balloon, pump, sky = tokens.sequences
    start = min(span.start for span in tokens.spans)
    assert not torch.allclose(balloon[start], sky[start], atol=1e-3)
    if FAMILIES[row.family].causal:
        assert torch.allclose(balloon[:start], sky[:start], atol=1e-4)
        same = min(span.stop for span in tokens.spans[:2]) - start
        parted = next(
            i for i in range(same) if not torch.allclose(balloon[start + i], pump[start + i], atol=1e-3)
        )
        assert parted >= 2  # the words in common are alike, whatever follows
        assert torch.allclose(balloon[: start + parted], pump[: start + parted], atol=1e-4)


def test_a_causal_name_ends_before_the_template_goes_on(name, row):
    """With one more word, the tokens of the name stay the same, and the next is another."""
    if not FAMILIES[row.family].causal:
        return
    short, long = encoded(name, "hot air", "hot air balloon").sequences
    short_span, long_span = encoded(name, "hot air", "hot air balloon").spans
    assert torch.allclose(short[short_span], long[short_span], atol=1e-4)
    assert long_span.stop > short_span.stop
    assert len(short) == short_span.stop or not torch.allclose(
        short[short_span.stop], long[short_span.stop], atol=1e-3
    )


NAMES = ["(a:1.5)", "embedding:x", r"\(a\)", r"a\b", "{a|b}"]


def test_names_are_literal(name, row, monkeypatch):
    clip = tiny_clip(name)
    seen = []
    encode = clip.encode_from_tokens

    def watched(tokens, **options):
        seen.append(tokens)
        return encode(tokens, **options)

    monkeypatch.setattr(clip, "encode_from_tokens", watched)
    family = FAMILIES[row.family]
    encode_concepts(clip, tuple(NAMES), "automatic", family, row.width)
    key = next(key for key in family.encoders if key in seen[-1])
    part = getattr(clip.tokenizer, key, None) or getattr(clip.tokenizer, f"clip_{key}")
    for written, tokens in zip(NAMES, seen[-len(NAMES) :], strict=True):
        ids = [token[0] for section in tokens[key] for token in section]
        assert {token[1] for section in tokens[key] for token in section} == {1.0}
        assert any(_holds(ids, _plain(part, text)) for text in (written, f" {written}")), written


def _plain(part, text: str) -> list[int]:
    """The ids of a text without what the tokenizer puts around any."""
    ids = part.tokenizer(text)["input_ids"]
    return ids[part.tokens_start : -1 if part.tokenizer_adds_end_token else None]


def _holds(ids: list[int], part: list[int]) -> bool:
    return any(ids[i : i + len(part)] == part for i in range(len(ids) - len(part) + 1))


@pytest.mark.parametrize(
    "name,written",
    [
        ("qwen-image", "<|im_start|>"),
        ("qwen-image", "a <|im_end|> b"),
        ("qwen-image", "<|start_header_id|>"),  # for which ComfyUI leaves the template away
        ("krea2", "<|im_start|>user"),
        ("longcat", "<|start_header_id|>"),
        ("z-image", "<|im_start|>"),
        ("hunyuan-video", "<|eot_id|>"),
        ("flux2-dev", "cat [/INST]"),
        ("chroma", "</s>"),
        ("sd3", "cat <|endoftext|>"),
        ("lumina2", "<end_of_turn>"),
    ],
)
def test_words_of_an_encoders_template_are_an_error_that_shows_them(name, written):
    with pytest.raises(ValueError, match=rf"The concept \"{re.escape(written)}\" is more than words"):
        encoded(name, "dragon", written)


@pytest.mark.parametrize(
    "name,family,has",
    [
        ("flux1", "Z-Image", "the text encoders l, t5xxl"),
        ("qwen-image", "Krea 2", "the text encoders qwen25_7b"),
        ("z-image", "Mage-Flow", "the text encoders qwen3_4b"),  # of the same width
        ("lumina2", "Z-Image", "the text encoders gemma2_2b"),
        ("flux2-klein", "Z-Image", f"text tokens of width {3 * WIDTH}, not {WIDTH}"),
        ("joyimage", "Ideogram 4", f"text tokens of width {WIDTH}, not {13 * WIDTH}"),
        ("chroma", "Stable Diffusion 3", "the text encoders t5xxl"),
        ("sd3", "Qwen-Image", "the text encoders g, l, t5xxl"),
        ("sdxl", "Wan 2.1, 2.2", "the text encoders g, l"),
        ("wan", "Stable Diffusion 1, 2, XL", "the text encoders umt5xxl"),
        ("ltxv", "LTX-2", "the text encoders t5xxl"),
        ("qwen-image", "Kandinsky 5", f"text tokens of width {WIDTH}, not {2 * WIDTH}"),
        ("sd1", "Stable Diffusion 1, 2, XL", f"text tokens of width {WIDTH}, not {2 * WIDTH}"),
    ],
)
def test_another_models_clip_is_an_error_that_names_both(name, family, has):
    family = FAMILIES[family]
    clip = tiny_clip(name)
    widths = {"Ideogram 4": 13, "Kandinsky 5": 2, "Stable Diffusion 1, 2, XL": 2}
    width = widths.get(family.name, 1) * WIDTH
    both = f"the model is {family.name}, and the CLIP has {has}."
    with pytest.raises(ValueError, match=f"{re.escape(both)}.*{re.escape(family.loader)}"):
        encode_concepts(clip, ("dragon",), "automatic", family, width)


@pytest.mark.parametrize("loaded", [{"t5": True}, {"t5": False}], ids=["T5 alone", "none"])
def test_stable_diffusion_3_without_clip_is_an_error_and_not_t5s_rows(loaded):
    row = ENCODERS["sd3"]
    options = {"t5xxl_model_config": T5}
    without = EncoderRow(
        row.family, row.tokenizer, row.model, row.rows, 77, options,
        arguments={"clip_l": False, "clip_g": False, **loaded},
    )  # fmt: skip
    with pytest.raises(ValueError, match="no weights for the text encoder l"):
        encode_concepts(
            clip_of(without), ("dragon",), "automatic", FAMILIES[row.family], WIDTH if loaded["t5"] else 4096
        )


@pytest.mark.parametrize("name,position", [("flux2-klein", 3), ("flux2-dev", 510)])
def test_flux2s_concepts_take_the_position_of_their_names(name, position):
    """Klein's texts are filled up from the right by their tokenizer, dev's from the left by the model."""
    tokens = encoded(name, "dragon")
    assert FAMILIES["Flux.2"].position(tokens.lengths[0], tokens.spans[0]) == position


def words(name: str, prompt: str, *concepts: str) -> tuple[tuple[int, ...], ...]:
    """Which rows of the prompt each concept has."""
    return prompted(name, prompt, *concepts).words


def prompted(name: str, prompt: str, *concepts: str) -> Prompt:
    row = ENCODERS[name]
    family = FAMILIES[row.family]
    return encode_concepts(tiny_clip(name), concepts, "automatic", family, row.width, prompt).prompt


# transformers 5 takes Llama 3's spaces out of a text, and cuts other tokens then.
@pytest.mark.parametrize("name", [name for name in ENCODERS if name != "hunyuan-video"])
def test_a_word_is_where_the_prompts_rows_change_with_it(name, row):
    one, other = "a rock, the dragon", "a rock, the rabbit"
    found = prompted(name, one, "dragon", "sky")
    (dragon, sky), rows = found.words, found.sequence
    assert sky == ()
    assert list(dragon) == list(range(dragon[0], dragon[-1] + 1))
    if FAMILIES[row.family].causal:
        changed = prompted(name, other, "rabbit").sequence
        length = min(len(rows), len(changed))
        differences = (rows[:length] - changed[:length]).norm(dim=-1)
        assert int((differences > differences.max() / 10).nonzero()[0]) == dragon[0]
    else:  # all rows change; but these encoders have no template, and their rows are those of token ids
        key = FAMILIES[row.family].encoders[0]
        ids, own = (
            [token[0] for section in tiny_clip(name).tokenize(text)[key] for token in section]
            for text in (one, "dragon")
        )
        own = own[encoded(name, "dragon").spans[0]]
        assert [ids[place] for place in dragon] == own


def test_the_prompts_rows_are_those_that_the_sampler_is_given(name):
    text = "a (dragon:1.3) over a rock"
    clip = tiny_clip(name)
    context, values = clip.encode_from_tokens_scheduled(clip.tokenize(text))[0]
    given = FAMILIES[ENCODERS[name].family].sequence({"cond": context, **values})
    assert torch.equal(prompted(name, text, "rock").sequence, given)


# Names, then how many tokens each has; CLIP and T5 by their own vocabularies, Qwen's in its template.
@pytest.mark.parametrize("name,tokens", [("sd1", (1, 3)), ("flux1", (1, 3)), ("qwen-image", (1, 3))])
def test_words_are_found_wherever_they_occur(name, tokens):
    prompt = "Dragon and dragon, a hot air balloon. A dragon in a hot air balloon"
    dragon, balloon, cold = words(name, prompt, "dragon", "hot air balloon", "cold air balloon")
    assert (len(dragon), len(balloon)) == (3 * tokens[0], 2 * tokens[1])
    assert cold == ()
    assert dragon[0] < dragon[1] < balloon[0] < dragon[2] < balloon[3]
    for start in (0, 3):
        assert list(balloon[start : start + 3]) == list(range(balloon[start], balloon[start] + 3))


# T5 has one more token, for a space, behind what is weighted.
@pytest.mark.parametrize("name,more", [("sd1", 0), ("sdxl", 0), ("flux1", 1)])
def test_weights_in_a_prompt_are_no_part_of_its_words(name, more):
    dog, rock = words(name, "a dragon, a rock", "dragon", "rock")
    assert dog
    assert rock
    weighted = words(name, "a (dragon:1.3), a rock", "dragon", "rock")
    assert weighted == (dog, tuple(place + more for place in rock))


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
def test_words_of_a_prompt_of_more_than_77_tokens_lie_in_their_part(name):
    prompt = "a dog, " + "very " * 80 + "tall tree and a dog"
    found = prompted(name, prompt, "dog", "tall tree")
    (first, second), (tall, tree) = found.words
    assert len(found.sequence) == 2 * 77
    assert first == 2
    assert 77 < tall < tree < second < 2 * 77
    # The second part begins with a token of its own: 4 of "a dog," and 80 more were before, 75 in the first.
    assert tall == 77 + 1 + (3 + 80 - 75)


def test_a_prompt_of_flux1_may_be_longer_than_its_padding():
    prompt = "a dog, " + "very " * 300 + "tall tree"
    found = prompted("flux1", prompt, "dog", "tree")
    (dog,), (tree,) = found.words
    assert dog < 5
    assert 300 < tree < len(found.sequence)


@pytest.mark.parametrize("name", ["sd1", "flux1", "qwen-image"])
@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_is_none(name, prompt):
    assert prompted(name, prompt, "dog") is None
