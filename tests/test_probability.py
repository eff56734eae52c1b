"""Probabilities where text and picture attend to each other: of words of the prompt, and of one more word."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_families import every_layer, relative, same, watched
from tiny_models import ROWS, Row, sample, tiny
from torch import Tensor

from concept_attention.core.concepts import ConceptTokens, Prompt
from concept_attention.core.observing.latents import recording_of
from concept_attention.core.observing.observe import WhatToRecord, observe
from concept_attention.core.observing.readers import blocks as blocks_module
from concept_attention.core.observing.readers import words as words_module
from concept_attention.core.observing.readers.words import Words
from concept_attention.core.observing.recording import RecordingError
from concept_attention.core.reading.maps import concept_maps
from tiny_flux import CONCEPTS, concept_tokens, conditioning, random_flux
from tiny_flux import sample as sample_flux

SPACES = ("output", "probability")
WORDS_OF = ((1, 4), (), (2,))
"""Where the prompt has each concept."""


@pytest.fixture(params=ROWS)
def name(request) -> str:
    return request.param


@pytest.fixture
def row(name) -> Row:
    return ROWS[name]


@pytest.fixture
def model(name):
    return tiny(name)


def with_prompt(tokens: ConceptTokens, positive: list) -> ConceptTokens:
    return replace(tokens, prompt=Prompt(positive[0][0][0], WORDS_OF))


def probabilities(samples: Tensor) -> Tensor:
    """(L, B * F, K, h, w) of the first evaluation."""
    return recording_of({"samples": samples}).scores["probability"][0]


class Calls:
    """What is read: the attentions of the blocks' own calls, and the concepts' keys beside them."""

    def __init__(self, monkeypatch) -> None:
        self.given: list[tuple] = []
        self.found: list[Tensor] = []
        self.attentions: list = []
        joint, of = Words.joint_probabilities, blocks_module.masked

        def watched(words, *args):
            self.given.append(args)
            self.found.append(joint(words, *args))
            return self.found[-1]

        def mask(given, part, queries):
            self.attentions.append((given, part, queries))
            return of(given, part, queries)

        monkeypatch.setattr(Words, "joint_probabilities", watched)
        monkeypatch.setattr(blocks_module, "masked", mask)


def expected(q: Tensor, k: Tensor, own: Tensor, start: int, mask: Tensor | None, scale: float) -> Tensor:
    """In float64, the mean over heads (B, K, N)."""
    q, k, own = q.double(), k.double(), own.double()
    logits = torch.einsum("bhnd,bhld->bhnl", q, k) * scale
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    among = logits.softmax(-1)
    found = []
    for concept, places in enumerate(WORDS_OF):
        if places:
            found.append(among[..., [start + place for place in places]].mean(-1))
        else:
            one = torch.einsum("bhnd,bhd->bhn", q, own[:, :, concept]) * scale
            found.append(torch.cat([logits, one[..., None]], -1).softmax(-1)[..., -1])
    return torch.stack(found, 1).mean(2)


def test_probabilities_are_those_of_a_softmax_over_all_keys(model, row, monkeypatch):
    calls = Calls(monkeypatch)
    tokens = with_prompt(row.concept_tokens(), row.conditioning(2))
    asked = {"spaces": SPACES, "layers": every_layer(model)}
    sample(watched(model, row, tokens, **asked), row, batch=row.batch, cfg=row.cfg, steps=1)
    assert len(calls.found) == len(every_layer(model))
    for (q, k, own, start, _, scale), (mask, part, queries), ours in zip(
        calls.given, calls.attentions, calls.found, strict=True
    ):
        if mask is not None:
            mask = mask[None, None] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
            mask = mask.expand(max(len(mask), part.stop), -1, max(mask.shape[2], queries.stop), -1)
            mask = mask[part, :, queries]
        assert relative(ours, expected(q, k, own, start, mask, scale)) <= 1e-5


def test_a_words_key_is_the_one_that_its_token_makes_as_a_concept(model, row, monkeypatch):
    """In the first layer, where concepts have not attended to anything yet."""
    calls = Calls(monkeypatch)
    positive = row.conditioning(2)
    context, places = positive[0][0][0], (0, 4, 6)
    spans = tuple(slice(place, place + 1) for place in places)
    tokens = ConceptTokens((context,) * 3, spans, (len(context),) * 3, "first token")
    watching = watched(model, row, with_prompt(tokens, positive), spaces=SPACES, layers=[0])
    sample(watching, row, steps=1)
    ((_, k, own, start, *_),) = calls.given
    assert relative(k[:, :, [start + place for place in places]], own) <= 1e-5


@pytest.mark.parametrize("cfg,batch", [(3.0, 2)])
def test_the_picture_stays_the_same_to_the_last_bit(model, row, cfg, batch):
    cfg, batch = min(cfg, row.cfg), min(batch, row.batch)
    tokens = with_prompt(row.concept_tokens(), row.conditioning(2))
    samples = sample(watched(model, row, tokens, spaces=SPACES), row, cfg=cfg, batch=batch)
    assert same(samples, sample(model, row, cfg=cfg, batch=batch))
    recording = recording_of({"samples": samples})
    assert list(recording.scores) == list(SPACES)
    assert all(s.min() > 0 and s.sum(2).max() < 1 for s in recording.scores["probability"])
    maps = concept_maps(recording, space="probability")
    assert torch.allclose(maps.values.sum(1), torch.ones(()), atol=1e-5)


def test_another_prompt_than_the_samplers_is_an_error(model, row):
    tokens = with_prompt(row.concept_tokens(), row.conditioning(3))
    samples = sample(watched(model, row, tokens, spaces=SPACES), row)
    assert same(samples, sample(model, row))
    with pytest.raises(RecordingError, match="the prompt in Concept Attention is not the sampler's"):
        recording_of({"samples": samples})


@pytest.mark.parametrize("name", ["qwen_image"])
def test_another_prompt_does_no_harm_where_it_is_not_asked_for(model, row):
    tokens = with_prompt(row.concept_tokens(), row.conditioning(3))
    found = recording_of({"samples": sample(watched(model, row, tokens), row)})
    assert list(found.scores) == ["output"]


@pytest.mark.parametrize("name", ["qwen_image", "krea2"])
def test_queries_are_weighed_in_parts(model, row, monkeypatch):
    tokens = with_prompt(row.concept_tokens(), row.conditioning(2))
    found = []
    for count in (8192, 3):
        monkeypatch.setattr(words_module, "_TOKENS", count)
        found.append(probabilities(sample(watched(model, row, tokens, spaces=SPACES), row)))
    assert relative(*found) <= 1e-6


@pytest.fixture(scope="module")
def flux():
    with torch.inference_mode():
        return random_flux()


def test_flux1s_are_those_of_a_softmax_over_all_rotated_keys(flux, monkeypatch):
    calls, attentions = Calls(monkeypatch), []

    def attention(function, q, k, v, heads, *args, **kwargs):
        attentions.append((q, k))
        return function(q, k, v, heads, *args, **kwargs)

    tokens = with_prompt(concept_tokens(), conditioning(2))
    observed = observe(flux, WhatToRecord(CONCEPTS, tokens, spaces=SPACES))
    observed.model_options["transformer_options"]["optimized_attention_override"] = attention
    samples = sample_flux(observed, steps=1)
    assert torch.equal(samples, sample_flux(flux, steps=1))
    assert len(calls.found) == 3
    for (_, _, own, start, *_), (q, k), ours in zip(calls.given, attentions, calls.found, strict=False):
        assert start == 0
        picture = q[:, :, 7:]
        assert relative(ours, expected(picture, k, own, 0, None, q.shape[-1] ** -0.5)) <= 1e-5
    (scores,) = recording_of({"samples": samples}).scores["probability"]
    assert torch.equal(scores.flatten(-2), torch.stack(calls.found))


def test_flux1_does_not_take_another_prompt_for_the_samplers(flux):
    tokens = with_prompt(concept_tokens(), conditioning(3))
    samples = sample_flux(observe(flux, WhatToRecord(CONCEPTS, tokens, spaces=SPACES)), cfg=2.0)
    assert torch.equal(samples, sample_flux(flux, cfg=2.0))
    with pytest.raises(RecordingError, match="the prompt in Concept Attention is not the sampler's"):
        recording_of({"samples": samples})
