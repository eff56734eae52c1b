"""Models whose picture reads words by cross-attention: a concept is one more word, which only we see."""

from __future__ import annotations

import sys
from dataclasses import replace

import comfy.sd
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from test_families import Beside, frame_length, same, video_of
from tiny_encoders import CLIP, ENCODERS, clip_of
from tiny_models import WORDS, Row, concepts_of, sample, tiny
from torch import Tensor

from concept_attention.core.architectures import family_of
from concept_attention.core.concepts import ConceptTokens, Prompt
from concept_attention.core.geometry import Grid
from concept_attention.core.observing import observe as observe_module
from concept_attention.core.observing.latents import recording_of
from concept_attention.core.observing.observe import WhatToRecord, observe
from concept_attention.core.observing.readers import words as words_module
from concept_attention.core.observing.readers.words import WordReading, probabilities
from concept_attention.core.reading.maps import concept_maps
from concept_attention.nodes.concept_attention import ConceptAttention
from concept_attention.nodes.concept_saliency import ConceptSaliency


@pytest.fixture(params=WORDS)
def name(request) -> str:
    return request.param


@pytest.fixture
def row(name) -> Row:
    return WORDS[name]


@pytest.fixture
def model(name):
    return tiny(name)


def family(model):
    return family_of(model.model.diffusion_model)


def every_layer(model) -> range:
    return range(len(family(model).layers(model.model.diffusion_model)))


def watched(model, row: Row, tokens: ConceptTokens | None = None, **options):
    tokens = tokens or row.concept_tokens()
    return observe(model, WhatToRecord(concepts_of(len(tokens.sequences)), tokens, **options))


def prompt_as_concepts(row: Row) -> ConceptTokens:
    """The tokens of the prompt, each a concept, with the prompt that they are words of."""
    context = row.sequence(row.conditioning(2)[0][0][0])
    return replace(
        ConceptTokens.single(context), prompt=Prompt(context, tuple((i,) for i in range(len(context))))
    )


class Reading(WordReading):
    """Keeps, of each layer, queries, keys and the words' keys."""

    def _read(self, seen, q, k, own):
        self.layers.append((seen.number, q, k, own))
        self.masks.append(self._family.mask(seen.arguments))
        return super()._read(seen, q, k, own)


@pytest.fixture
def read(monkeypatch):
    def run(model, row, tokens=None, **options) -> list:
        calls: list = []

        def reading(*args):
            call = Reading(*args)
            call.layers, call.masks = [], []
            calls.append(call)
            return call

        reading.SPACES = WordReading.SPACES
        monkeypatch.setattr(observe_module, "reading_of", lambda family: reading)
        sample(watched(model, row, tokens, layers=every_layer(model)), row, **options)
        assert calls
        assert not any(call._guard.broken for call in calls)
        return calls

    return run


def relative(ours: Tensor, expected: Tensor) -> float:
    return float((ours.double() - expected.double()).norm() / expected.double().norm())


def test_a_row_is_of_its_family(model, row):
    assert family(model).name == row.family


@pytest.mark.parametrize("cfg,batch", [(1.0, 1), (3.0, 2)])
def test_the_picture_stays_the_same_to_the_last_bit(model, row, cfg, batch):
    batch = min(batch, row.batch)
    plain = sample(model, row, cfg=cfg, batch=batch)
    samples = sample(watched(model, row), row, cfg=cfg, batch=batch)
    assert same(samples, plain)
    recording = recording_of({"samples": samples})
    grid = family(model).grid(model.model.diffusion_model, video_of(row.empty()))
    shape = (len(every_layer(model)), batch * grid.frames, 3, grid.rows, grid.columns)
    assert [s.shape for s in recording.scores["probability"]] == [shape] * 2
    frames = row.latent[1] if len(row.latent) == 4 else 1
    assert sum(recording.durations) == 1 + (frames - 1) * frame_length(model)
    assert all(s.min() >= 0 and s.max() <= 2 for s in recording.scores["probability"])
    assert torch.allclose(concept_maps(recording).values.sum(1), torch.ones(()), atol=1e-5)


@pytest.fixture
def attended(monkeypatch) -> list[tuple[Tensor, Tensor]]:
    """Queries and keys (B, H, L, d) that ComfyUI's attention is given, wherever it is called."""
    calls = []

    def spy(attention):
        def call(q, k, v, heads, *args, skip_reshape=False, **kwargs):
            split = (t if skip_reshape else t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k))
            calls.append(tuple(t.clone() for t in split))
            return attention(q, k, v, heads, *args, skip_reshape=skip_reshape, **kwargs)

        return call

    for module in [m for name, m in sys.modules.items() if name.startswith("comfy.ldm.")]:
        for name in ("optimized_attention", "optimized_attention_masked"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, spy(getattr(module, name)))
    return calls


def test_queries_and_keys_are_those_that_the_models_own_attention_is_given(model, row, read, attended):
    for call in read(model, row, batch=row.batch, cfg=1.0, steps=1):
        for number, *ours, _ in call.layers:
            assert any(all(map(same, ours, given)) for given in attended), number


def test_a_query_of_the_picture_is_that_of_its_patch(model, row, read):
    """They change most with it, or behind a U-Net's convolutions with the next one."""
    module = model.model.diffusion_model
    whole = family(model).grid(module, video_of(row.empty()))
    place = Grid(whole.frames - 1, 1, 2)
    noises = row.noise(), row.noise()
    video = video_of(noises[1])
    video = video if video.ndim == 5 else video[:, :, None]
    spans = (slice(i * n, (i + 1) * n) for i, n in zip(place, family(model).patch(module), strict=True))
    video[(..., *spans)] += 3
    queries = []
    for noise in noises:
        (call,) = read(model, row, noise=noise, steps=1)
        _, q, _, _ = call.layers[0]
        picture, grid = family(model).place(module, call._call, whole, q.shape[2])
        queries.append(q[:, :, picture])
    differences = (queries[1] - queries[0])[0].norm(dim=(0, 2)).unflatten(0, grid)
    found = torch.unravel_index(differences.argmax(), differences.shape)
    expected = [i * n // m for i, n, m in zip(place, grid, whole, strict=True)]
    near = 1 if isinstance(module, UNetModel) else 0
    assert all(abs(i - n) <= near for i, n in zip(found, expected, strict=True))


def test_keys_of_the_prompts_words_are_the_models_own(model, row, read):
    for call in read(model, row, prompt_as_concepts(row), batch=row.batch, cfg=1.0):
        assert [number for number, *_ in call.layers] == list(every_layer(model))
        for _, _, keys, own in call.layers:
            keys = keys[:, :, : own.shape[2]]
            assert relative(own.expand_as(keys), keys) <= 1e-6


def test_words_of_the_prompt_have_the_models_own_probabilities(model, row, read, monkeypatch):
    seen = []
    on_grid = words_module._on_grid
    monkeypatch.setattr(words_module, "_on_grid", lambda p, *rest: (seen.append(p), on_grid(p, *rest))[1])
    (call,) = read(model, row, prompt_as_concepts(row), steps=1)
    for (_, queries, keys, _), mask, ours in zip(call.layers, call.masks, seen, strict=True):
        if mask is not None:
            continue  # the prompt as it is given with the concepts has no padding
        q, k = queries.double(), keys.double()
        expected = torch.einsum("bhnd,bhtd->bhnt", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)
        module = model.model.diffusion_model
        picture, _ = family(model).place(module, call._call, call._grid, expected.shape[2])
        assert relative(ours, expected[:, :, picture, : ours.shape[-1]]) <= 1e-5


def test_maps_follow_their_names_into_another_order(model, row):
    tokens = row.concept_tokens()
    order = [2, 0, 1]
    other = ConceptTokens(
        *(tuple(values[i] for i in order) for values in (tokens.sequences, tokens.spans, tokens.lengths)),
        tokens.pooling,
    )
    runs = (sample(watched(model, row, t), row) for t in (tokens, other))
    first, second = (recording_of({"samples": samples}).scores["probability"][-1] for samples in runs)
    assert relative(second, first[:, :, order]) <= 1e-5
    assert relative(first[:, :, 0], first[:, :, 1]) > 1e-4, "names differ"


def test_keys_of_concepts_are_made_once_for_a_run_unless_they_change_in_it(model, row, monkeypatch):
    made: list = []
    kind = type(family(model))
    key = kind.key
    monkeypatch.setattr(kind, "key", lambda self, *args: (made.append(args[0]), key(self, *args))[1])

    def run() -> tuple[int, list[Tensor]]:
        made.clear()
        samples = sample(watched(model, row), row, steps=3)
        return len(made), recording_of({"samples": samples}).scores["probability"]

    layers = family(model).layers(model.model.diffusion_model)
    change = family(model).timed or family(model).modulated(layers[0])
    count, scores = run()
    assert count == len(layers) * (3 if change else 1)
    monkeypatch.setattr(observe_module, "_weights_change", lambda guider: True)
    count, without = run()
    assert count == len(layers) * 3
    assert all(map(torch.equal, scores, without))


def test_nothing_as_large_as_the_picture_outlives_its_layer(model, row, read, monkeypatch):
    """Of a long video, what each layer is called with takes hundreds of megabytes."""
    layers: list = []
    entered = words_module._Layer.entered
    monkeypatch.setattr(
        words_module._Layer, "entered", lambda self, *args: (layers.append(self), entered(self, *args))[1]
    )
    read(model, row, steps=1)
    assert layers
    assert all(layer.queries is None and not layer.arguments for layer in layers)


def test_another_nodes_attention_is_called_as_often_as_without(model, row):
    calls = []
    for observed in (model, watched(model, row)):
        beside = Beside()
        patched = observed.clone()
        patched.model_options["transformer_options"]["optimized_attention_override"] = beside
        calls.append((sample(patched, row), beside.calls))
    assert same(calls[0][0], calls[1][0])
    assert calls[0][1] == calls[1][1]
    assert bool(calls[0][1]) == row.attention_options


def test_no_hook_stays_behind(model, row):
    sample(watched(model, row), row, steps=1)
    modules = list(model.model.diffusion_model.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in modules)


def test_probabilities_are_those_of_a_softmax_in_float64():
    g = torch.Generator().manual_seed(0)
    q, k, own = (3 * torch.randn(2, 3, n, 8, generator=g) for n in (40, 7, 11))
    mask = torch.zeros(2, 1, 1, 7).masked_fill(torch.rand(2, 1, 1, 7, generator=g) < 0.3, -1e4)
    for given in (None, mask):
        ours = probabilities(q, k, own, [1, 5], given)
        logits = torch.einsum("bhnd,bhtd->bhnt", q.double(), k.double()) * 8**-0.5
        logits = logits if given is None else logits + given
        assert relative(ours[..., :2], logits.softmax(-1)[..., [1, 5]]) <= 1e-6
        for i in range(11):
            one = torch.einsum("bhnd,bhd->bhn", q.double(), own[:, :, i].double()) * 8**-0.5
            expected = torch.cat([logits, one[..., None]], -1).softmax(-1)[..., -1]
            assert relative(ours[..., 2 + i], expected) <= 1e-6


@pytest.fixture(scope="module")
def clip() -> comfy.sd.CLIP:
    """Stable Diffusion 2's."""
    options = {"clip_h_model_config": {**CLIP, "hidden_size": WORDS["sd2"].width}}
    with torch.inference_mode():
        return clip_of(replace(ENCODERS["sd2"], options=options))


def attend(clip: comfy.sd.CLIP, prompt: str = "", *, others: bool) -> ModelPatcher:
    """Concept Attention, asked for ``others`` than the space of probabilities or not."""
    widgets = {
        "background": "sky",
        "token_pooling": "automatic",
        "record_layers": "all",
        "record_cross_attention": others,
        "record_value": others,
    }
    return ConceptAttention.execute(tiny("sd2"), clip, "dog, tree", **widgets, prompt=prompt).result[0]


@pytest.fixture(scope="module")
def nodes_latents(clip) -> dict[str, dict]:
    """What Stable Diffusion 2 sampled of "a dog under a tree" through Concept Attention, with and without
    that prompt in the node."""
    prompt = "a dog under a tree"
    with torch.inference_mode():
        positive = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        return {
            given: {"samples": sample(attend(clip, given, others=True), WORDS["sd2"], positive=positive)}
            for given in (prompt, "")
        }


@pytest.mark.parametrize("others", [True, False])
def test_spaces_that_the_model_does_not_have_are_named_in_the_log(clip, caplog, others):
    attend(clip, others=others)
    assert ("has no space of queries or values to record, only: probability." in caplog.text) == others


def saliency(latent: dict, space: str):
    widgets = {"layers": "default", "start_step": 0, "end_step": 10000, "softmax": True, "temperature": 1.0}
    return ConceptSaliency.execute(latent, space, **widgets).result[0]


def test_the_nodes_record_words_and_read_them_by_default(nodes_latents):
    for latent in nodes_latents.values():
        maps = saliency(latent, "default")
        assert maps.space == "probability"
        assert list(maps.recording.scores) == ["probability"]
        assert torch.equal(maps.values, saliency(latent, "probability").values)
        with pytest.raises(
            ValueError, match="only: probability.* whose picture only reads the text.*no other"
        ):
            saliency(latent, "output")


def test_a_concept_that_is_a_word_of_the_nodes_prompt_is_read_as_that_word(nodes_latents):
    given, without = (recording_of(latent).scores["probability"][0] for latent in nodes_latents.values())
    dog, tree, sky = (relative(given[:, :, k], without[:, :, k]) for k in range(3))
    assert sky <= 1e-5, "which the prompt does not have"
    assert dog > 1e-2
    assert tree > 1e-2
