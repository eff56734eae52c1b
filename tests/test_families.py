"""Every family, by identities that hold for any model whose text and picture attend to each other."""

from __future__ import annotations

from dataclasses import replace

import comfy.hooks
import pytest
import torch
from comfy.nested_tensor import NestedTensor
from einops import rearrange
from tiny_models import PREFIXES, ROWS, WORDS, Row, concepts_of, sample, tiny
from torch import Tensor

from concept_attention.core.architectures import JointFamily, families, family_of
from concept_attention.core.architectures.family import BlockCall
from concept_attention.core.concepts import ConceptTokens
from concept_attention.core.geometry import Grid
from concept_attention.core.observing import observe as observe_module
from concept_attention.core.observing.latents import recording_of
from concept_attention.core.observing.observe import WhatToRecord, observe
from concept_attention.core.observing.readers import embedding, reading_of
from concept_attention.core.observing.readers.blocks import BlockReading
from concept_attention.core.observing.readers.embedding import embedded
from concept_attention.core.observing.recording import RecordingError
from concept_attention.core.reading.maps import concept_maps
from concept_attention.core.reading.masks import concept_masks


@pytest.fixture(params=ROWS)
def name(request) -> str:
    return request.param


@pytest.fixture
def row(name) -> Row:
    return ROWS[name]


@pytest.fixture
def model(name):
    return tiny(name)


def watched(model, row: Row, tokens: ConceptTokens | None = None, **options):
    tokens = tokens or row.concept_tokens()
    return observe(model, WhatToRecord(concepts_of(len(tokens.sequences)), tokens, **options))


def family(model):
    return family_of(model.model.diffusion_model)


def every_layer(model) -> range:
    return range(len(family(model).layers(model.model.diffusion_model)))


def relative(ours: Tensor, expected: Tensor) -> float:
    return float((ours.double() - expected.double()).norm() / expected.double().norm())


class Reading(BlockReading):
    """Keeps what it reads of each layer: the attention of the block's own call, what the concepts made of it,
    where the picture and the concepts' keys lie in it, and its output."""

    def __init__(self, *args) -> None:
        self.layers: list[tuple] = []
        super().__init__(*args)
        self.calls.append(self)

    def _attended(self, block, seen, out) -> None:
        self.keys = self._family.keys(block.call, seen.length)
        super()._attended(block, seen, out)

    def _record(self, concepts, seen, picture, out) -> None:
        self.layers.append((seen, concepts, picture, self.keys, out))
        super()._record(concepts, seen, picture, out)


class BesideReferences:
    """A family whose concepts attend to what is there beside the prompt, as the model's own text does."""

    def __init__(self, family, prompt: slice) -> None:
        self._family, self._prompt = family, prompt

    def __getattr__(self, name):
        return getattr(self._family, name)

    def keys(self, call, length) -> list[int]:
        return [*range(self._prompt.start), *range(self._prompt.stop, length)]


class PromptAsConcepts(Reading):
    """The text rows of the model's first block go through it once more as concepts."""

    def _embed(self, model, call):
        return None, []

    gap = "nothing is scored"

    def _attended(self, block, seen, out) -> None:
        rows = self._family.text(block.call)
        if block.layer == 0:
            self._hidden, self._positions = rows.clone(), list(range(rows.shape[1]))
        after = self._family.picture(block.call, seen.length).stop
        start = self.row.text_start if self._family.text_first else after
        self.text = slice(start, start + rows.shape[1])
        if "reference_latents" in self.row.values:
            self._family = BesideReferences(family_of(self._model), self.text)
        super()._attended(block, seen, out)


class Embedding(Reading):
    """Embeds the call's own context too, and keeps the text rows of the first block."""

    def _embed(self, model, call):
        context = call.arguments.get("context", call.arguments.get("c_crossattn"))
        first, text = self._blocks[0], self._text_of
        self.embedded = torch.stack(embedded(self._family, model, call, context, first, text))
        return super()._embed(model, call)

    def _attended(self, block, seen, out) -> None:
        if block.layer == 0:
            self.met = self._family.embedded(block.call, self._text).clone()
        super()._attended(block, seen, out)


class Names(Reading):
    """Keeps the concepts as they enter the first block."""

    def _embed(self, model, call):
        self.names, positions = super()._embed(model, call)
        return self.names, positions


def all_but_the_text(family: JointFamily, call: BlockCall, length: int) -> list[int]:
    start = 0 if family.text_first else family.picture(call, length).stop
    stop = start + family.text(call).shape[1]
    return [row for row in range(length) if not start <= row < stop]


@pytest.fixture
def read(monkeypatch):
    """Samples with another reading than the families' own, and gives the readings."""

    def run(reading: type[Reading], model, row, **options) -> list:
        calls: list = []
        kind = type("Reading", (reading,), {"calls": calls, "row": row})
        monkeypatch.setattr(observe_module, "reading_of", lambda family: kind)
        sample(watched(model, row, layers=every_layer(model)), row, **options)
        assert calls
        assert not any(call._guard.broken for call in calls)
        return calls

    return run


def test_a_row_is_of_its_family(model, row):
    assert family(model).name == row.family


def test_every_family_has_a_row():
    rows = (ROWS | WORDS | PREFIXES).values()
    assert {row.family for row in rows} | {"Flux.1"} == {f.name for f in families()}


def test_with_the_prompt_as_concepts_they_are_the_models_own_text_in_every_layer(
    model, row, read, monkeypatch
):
    if row.further_keys:
        monkeypatch.setattr(type(family(model)), "keys", all_but_the_text)
    for call in read(PromptAsConcepts, model, row, batch=row.batch, cfg=row.cfg, steps=1):
        assert len(call.layers) == len(every_layer(model))
        for _, concepts, _, _, out in call.layers:
            assert relative(concepts.out, _rows(out)[:, call.text]) <= 2e-6


def test_the_model_embeds_concepts_as_it_does_its_own_text(model, row, read):
    for call in read(Embedding, model, row, batch=row.batch, cfg=row.cfg, steps=1):
        assert torch.equal(call.embedded, call.met)


BESIDE = {
    "clip_vision_output",
    "clip_vision_outputs",
    "conditioning_byt5small",
    "ref_latent",
    "reference_latents",
    "reference_latents_text_embeds",
}
"""What a conditioning may have for the model to see beside the prompt."""


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if BESIDE & row.values.keys()])
def test_names_are_embedded_alike_whatever_stands_beside_the_prompt(model, row, read):
    bare = {name: value for name, value in row.values.items() if name not in BESIDE}
    found = [read(Names, model, replace(row, values=v), steps=1)[0].names for v in (row.values, bare)]
    assert torch.equal(*found)


# Those of the models that take a mask which is not all ones.
@pytest.mark.parametrize("name", ["hunyuan_video", "ideogram4", "krea2", "lens", "lumina2", "mochi"])
def test_a_mask_of_the_prompt_is_none_of_its_names(model, row, read):
    padded = torch.tensor([[True] * (row.tokens - 2) + [False] * 2])
    masks = [{"attention_mask": mask} for mask in (padded, torch.ones_like(padded))]
    found = [
        read(Names, model, replace(row, values={**row.values, **mask}), steps=1)[0].names for mask in masks
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["flux2_klein_edit", "hunyuan_video_from_references", "hunyuan_video_15"])
def test_names_are_embedded_beside_one_token_of_the_picture(model, row, read, monkeypatch):
    pictures = []
    kind = type(family(model))
    embedded = kind.embedded

    def met(self, call, tokens):
        pictures.append(call["img"].shape[1])
        return embedded(self, call, tokens)

    monkeypatch.setattr(kind, "embedded", met)
    read(Reading, model, row, steps=1)
    assert set(pictures) == {1}


def test_a_text_becomes_the_same_at_every_noise_level_unless_its_family_says_otherwise(model, row, read):
    first, second = read(Embedding, model, row, batch=1, steps=2)
    assert torch.equal(first.embedded, second.embedded) != family(model).timed


def _rows(out: Tensor) -> Tensor:
    return out if out.ndim == 3 else rearrange(out, "b h l d -> b l (h d)")


def test_scores_are_those_of_an_einsum_in_float64(model, row, read):
    for call in read(Reading, model, row, batch=row.batch, steps=1):
        for layer, (seen, concepts, picture, keys, out) in enumerate(call.layers):
            k = torch.cat((concepts.k, seen.k[:, :, keys]), 2).double()
            v = torch.cat((concepts.v, seen.v[:, :, keys]), 2).double()
            logits = torch.einsum("bhkd,bhnd->bhkn", concepts.q.double(), k) * seen.scale
            attended = torch.einsum("bhkn,bhnd->bkhd", logits.softmax(-1), v).flatten(2)
            expected = torch.einsum("bkd,bnd->bkn", attended, _rows(out)[:, picture].double())
            assert relative(call._scores["output"][layer], expected) <= 1e-5


def test_a_token_of_the_picture_is_the_one_of_its_patch(model, row, read):
    module = model.model.diffusion_model
    grid = family(model).grid(module, video_of(row.empty()))
    place = Grid(grid.frames - 1, 1, 2)
    noises = row.noise(), row.noise()
    video = video_of(noises[1])
    video = video if video.ndim == 5 else video[:, :, None]
    spans = (slice(i * n, (i + 1) * n) for i, n in zip(place, family(model).patch(module), strict=True))
    video[(..., *spans)] += 3
    values = []
    for noise in noises:
        seen, _, picture, _, _ = read(Reading, model, row, noise=noise, steps=1)[0].layers[0]
        values.append(seen.v[:, :, picture])
    differences = (values[1] - values[0])[0].norm(dim=(0, 2)).unflatten(0, grid)
    assert torch.equal(differences == differences.max(), one_of(grid, place))


def one_of(grid: Grid, place: Grid) -> Tensor:
    found = torch.zeros(grid, dtype=torch.bool)
    found[place] = True
    return found


def video_of(latent: Tensor | NestedTensor) -> Tensor:
    return latent if isinstance(latent, Tensor) else latent.unbind()[0]


class Beside:
    """Another node's attention override: what it is given goes through it, once per attention."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, function, *args, **kwargs):
        self.calls += 1
        return function(*args, **kwargs)


def same(ours: Tensor | NestedTensor, plain: Tensor | NestedTensor) -> bool:
    parts = ([t] if isinstance(t, Tensor) else t.unbind() for t in (ours, plain))
    return all(torch.equal(a, b) for a, b in zip(*parts, strict=True))


@pytest.mark.parametrize("cfg,batch,layers", [(1.0, 1, "main"), (3.0, 2, "every")])
def test_the_picture_stays_the_same_to_the_last_bit(model, row, cfg, batch, layers):
    cfg, batch = min(cfg, row.cfg), min(batch, row.batch)
    plain = sample(model, row, cfg=cfg, batch=batch)
    asked = {"layers": every_layer(model)} if layers == "every" else {}
    samples = sample(watched(model, row, **asked), row, cfg=cfg, batch=batch)
    assert same(samples, plain)
    recording = recording_of({"samples": samples})
    main = family(model).main_layers(model.model.diffusion_model)
    assert recording.layers == tuple(asked.get("layers", main))
    grid = family(model).grid(model.model.diffusion_model, row.empty())
    shape = (len(recording.layers), batch * grid.frames, 3, grid.rows, grid.columns)
    assert [s.shape for s in recording.scores["output"]] == [shape] * 2
    maps = concept_maps(recording)
    assert torch.allclose(maps.values.sum(1), torch.ones(()), atol=1e-5)
    masks = concept_masks(maps, ["concept 1"])
    assert masks[0].shape[-2:] == recording.image_size
    frames = row.latent[1] if len(row.latent) == 4 else 1
    length = 1 if family(model).layered else frame_length(model)
    assert sum(recording.durations) == 1 + (frames - 1) * length


def frame_length(model) -> int:
    """As ComfyUI's latent format says it, from 0.21 on."""
    return getattr(model.model.latent_format, "temporal_downscale_ratio", family(model).frame_length)


def test_another_nodes_attention_is_called_as_often_as_without(model, row):
    calls = []
    for observed in (model, watched(model, row)):
        beside = Beside()
        patched = observed.clone()
        patched.model_options["transformer_options"]["optimized_attention_override"] = beside
        calls.append((beside.calls, sample(patched, row), beside.calls))
    assert same(calls[0][1], calls[1][1])
    assert calls[0][2] == calls[1][2] > 0


def test_maps_follow_their_names_into_another_order(model, row):
    tokens = row.concept_tokens()
    order = [2, 0, 1]
    other = ConceptTokens(
        *(tuple(values[i] for i in order) for values in (tokens.sequences, tokens.spans, tokens.lengths)),
        tokens.pooling,
    )
    runs = (sample(watched(model, row, t), row) for t in (tokens, other))
    first, second = (recording_of({"samples": samples}).scores["output"][-1] for samples in runs)
    assert relative(second, first[:, :, order]) <= 1e-5
    assert relative(first[:, :, 0], first[:, :, 1]) > 1e-4, "names differ"


def test_no_hook_stays_behind(model, row):
    sample(watched(model, row), row, steps=1)
    assert not any(m._forward_pre_hooks for m in model.model.diffusion_model.modules())


def test_every_space_of_the_reader_is_recorded(model, row):
    spaces = reading_of(family(model)).SPACES
    recording = recording_of({"samples": sample(watched(model, row, spaces=spaces), row, steps=1)})
    assert set(recording.scores) == set(spaces)
    assert all(s.isfinite().all() for scores in recording.scores.values() for s in scores)


def test_a_picture_beside_hidreams_own_is_told_apart():
    row = replace(ROWS["hidream_i1"], values={**ROWS["hidream_i1"].values, "concat_latent_image": _latent})
    model = tiny("hidream_i1")
    samples = sample(watched(model, row), row, steps=1)
    assert torch.equal(samples, sample(model, row, steps=1))
    with pytest.raises(RecordingError, match="another picture lies beside the one that is sampled"):
        recording_of({"samples": samples})


def _latent(g: torch.Generator) -> Tensor:
    return torch.randn(1, 16, 7, 10, generator=g)


@pytest.mark.parametrize("hooked,times", [(False, 1), (True, 3)])
def test_concepts_are_embedded_once_in_a_run_unless_weights_change_in_it(monkeypatch, hooked, times):
    calls = []
    left = embedding._at_the_first_layer
    monkeypatch.setattr(embedding, "_at_the_first_layer", lambda *a: (calls.append(a), left(*a))[1])
    model, row = tiny("z_image"), ROWS["z_image"]
    positive = row.conditioning(2)
    if hooked:
        key = "diffusion_model.layers.0.attention.qkv.weight"
        shape = model.model.state_dict()[key].shape
        lora = {f"{key.removesuffix('.weight')}.diff": torch.ones(shape)}
        hooks = comfy.hooks.create_hook_lora(lora, strength_model=0.01, strength_clip=0.0)
        positive = comfy.hooks.set_hooks_for_conditioning(positive, hooks=hooks)
    tokens = ConceptTokens.single(torch.randn(3, row.width))
    samples = sample(watched(model, row, tokens), row, steps=3, positive=positive)
    assert len(recording_of({"samples": samples}).sigmas) == 3
    assert len(calls) == times
