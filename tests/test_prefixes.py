"""HiDream-O1: a text that never reads the picture has the same keys without it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import PREFIXES, concepts_of, sample, tiny
from torch import Tensor

from concept_attention.core.concepts import ConceptTokens, Prompt
from concept_attention.core.observing import observe as observe_module
from concept_attention.core.observing.latents import recording_of
from concept_attention.core.observing.observe import WhatToRecord, observe
from concept_attention.core.observing.readers.prefixes import PrefixReading
from concept_attention.core.observing.recording import RecordingError
from concept_attention.core.reading.maps import concept_maps

ROW = PREFIXES["hidream_o1"]
PROMPT = ROW.values["text_input_ids"][0].float()[:, None]
GRID = (3, 4)


def names(*spans: slice, prompt: Tensor | None = None) -> ConceptTokens:
    """The tokens of the prompt that lie there, as if each was all that it says."""
    tokens = ConceptTokens((PROMPT,) * len(spans), spans, (len(PROMPT),) * len(spans), "last token")
    return (
        tokens
        if prompt is None
        else replace(tokens, prompt=Prompt(prompt, tuple(tuple(range(s.start, s.stop)) for s in spans)))
    )


WORDS = (slice(4, 5), slice(5, 6))


def watched(tokens: ConceptTokens):
    return observe(tiny("hidream_o1"), WhatToRecord(concepts_of(len(tokens.sequences)), tokens))


class Reading(PrefixReading):
    def _attended(self, layer, seen) -> None:
        self.seen.append((seen, self._own[layer], self._picture))
        super()._attended(layer, seen)


@pytest.fixture
def calls(monkeypatch) -> list:
    calls: list = []

    def reading(*args):
        call = Reading(*args)
        call.seen = []
        calls.append(call)
        return call

    reading.SPACES = PrefixReading.SPACES
    monkeypatch.setattr(observe_module, "reading_of", lambda family: reading)
    return calls


@pytest.mark.parametrize("cfg,batch", [(1.0, 1), (3.0, 2)])
def test_the_picture_stays_the_same_to_the_last_bit(cfg, batch):
    plain = sample(tiny("hidream_o1"), ROW, cfg=cfg, batch=batch)
    samples = sample(watched(names(*WORDS)), ROW, cfg=cfg, batch=batch)
    assert torch.equal(samples, plain)
    recording = recording_of({"samples": samples})
    assert [s.shape for s in recording.scores["probability"]] == [(3, batch, 2, *GRID)] * 2
    assert torch.allclose(concept_maps(recording).values.sum(1), torch.ones(()), atol=1e-5)


def test_keys_of_a_text_alone_are_those_beside_the_picture(calls):
    sample(watched(names(*WORDS)), ROW)
    assert len(calls) == 2  # the second with the text's keys from ComfyUI's own cache
    for call in calls:
        assert len(call.seen) == 3
        for seen, own, _ in call.seen:
            assert (own - seen.k[:, :1, 4:6]).abs().max() <= 1e-5 * own.abs().max()


def test_words_of_the_prompt_have_the_models_own_probabilities(calls):
    samples = sample(watched(names(*WORDS, prompt=PROMPT)), ROW, steps=1)
    (scores,) = recording_of({"samples": samples}).scores["probability"]
    for layer, (seen, _, picture) in enumerate(calls[0].seen):
        logits = torch.einsum("bhnd,bhtd->bhnt", seen.q[:, :, picture].double(), seen.k.double())
        expected = (logits * seen.q.shape[-1] ** -0.5).softmax(-1)[..., 4:6].mean(1).mT
        assert (scores[layer].flatten(2) - expected).abs().max() <= 1e-5 * expected.max()


def test_a_word_as_a_concept_is_as_if_the_prompt_had_it_twice(calls):
    samples = sample(watched(names(*WORDS)), ROW, steps=1)
    (scores,) = recording_of({"samples": samples}).scores["probability"]
    for layer, (seen, _, picture) in enumerate(calls[0].seen):
        logits = torch.einsum("bhnd,bhtd->bhnt", seen.q[:, :, picture].double(), seen.k.double())
        logits = logits * seen.q.shape[-1] ** -0.5
        for concept, row in enumerate((4, 5)):
            twice = torch.cat([logits, logits[..., row : row + 1]], -1).softmax(-1)[..., -1].mean(1)
            assert (scores[layer][:, concept].flatten(1) - twice).abs().max() <= 1e-5 * twice.max()


def test_the_prompt_must_be_the_samplers():
    other = PROMPT.clone()
    other[4] = 9999
    samples = sample(watched(names(*WORDS, prompt=other)), ROW, steps=1)
    assert torch.equal(samples, sample(tiny("hidream_o1"), ROW, steps=1))
    with pytest.raises(RecordingError, match="is not the sampler's"):
        recording_of({"samples": samples})


def test_a_query_of_the_picture_is_that_of_its_patch(calls):
    noise = ROW.noise()
    for change in (0, 3):
        changed = noise.clone()
        changed[:, :, 32:64, 64:96] += change
        sample(watched(names(*WORDS)), ROW, noise=changed, steps=1)
    first, second = (call.seen[0][0].q[:, :, call.seen[0][2]] for call in calls)
    differences = (second - first)[0].norm(dim=(0, 2)).view(GRID)
    assert differences.argmax() == 1 * GRID[1] + 2
