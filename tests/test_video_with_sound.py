"""Latents that are pairs, a video and its sound: one packed tensor to the sampler, two in the LATENT."""

from __future__ import annotations

import contextlib
import gc
import importlib

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.nested_tensor import NestedTensor
from comfy_extras.nodes_video_model import ConditioningSetAreaPercentageVideo
from tiny_models import ROWS, concepts_of, sample, tiny

import nodes
from concept_attention.core.architectures import family_of
from concept_attention.core.observing.image import observe_image
from concept_attention.core.observing.latents import recording_of
from concept_attention.core.observing.observe import WhatToRecord, observe
from concept_attention.core.observing.recording import RecordingError

ROW = ROWS["minimax_h3"]


@pytest.fixture(autouse=True)
def _model():
    tiny("minimax_h3")  # skips where there is none


def observed(concepts: int = 3) -> ModelPatcher:
    return observe(tiny("minimax_h3"), WhatToRecord(concepts_of(concepts), ROW.concept_tokens(concepts)))


def sampled(concepts: int = 3, **options) -> NestedTensor:
    return sample(observed(concepts), ROW, steps=1, **options)


def test_of_runs_that_made_the_same_video_each_latent_has_its_own_recording():
    first, second = sampled(2), sampled(3)
    assert all(torch.equal(*parts) for parts in zip(first.unbind(), second.unbind(), strict=True))
    gc.collect()  # the MODELs, and what their histories hold
    counts = [len(recording_of({"samples": s}).concepts.all) for s in (first, second)]
    assert counts == [2, 3]


def test_the_recording_goes_with_the_video_alone():
    samples = sampled()
    recording = recording_of({"samples": samples})
    video, sound = samples.unbind()
    assert recording_of({"samples": video}) is recording
    with pytest.raises(RecordingError, match="not sampled with Concept Attention"):
        recording_of({"samples": sound})


@pytest.mark.parametrize("length", [5, 22, 39, 124])
def test_a_video_has_as_many_frames_as_its_latents_stand_for(length):
    minimax = importlib.import_module("comfy_extras.nodes_minimax_h3")
    frames, latents, _ = minimax.temporal_shape(length)
    model = tiny("minimax_h3").model.diffusion_model
    durations = family_of(model).durations(model, torch.zeros(1, 24, latents, 6, 8))
    assert (sum(durations), len(durations)) == (frames, latents)


def test_a_part_of_the_video_is_not_taken_for_all_of_it():
    video, sound = sampled().unbind()
    with pytest.raises(RecordingError, match="upscaled or cropped"):
        recording_of({"samples": NestedTensor([video[:, :, :, :4], sound])})


def test_conditionings_count_by_their_strength():
    (context, _), (other, _) = ROW.conditioning(2)[0], ROW.conditioning(4)[0]
    both = [[context, {"strength": 3.0}], [other, {"strength": 1.0}]]
    runs = ([[context, {}]], [[other, {}]], both)
    one, two, mean = (
        recording_of({"samples": sampled(positive=positive)}).scores["output"][0] for positive in runs
    )
    assert torch.allclose(mean, 0.75 * one + 0.25 * two, atol=1e-5)


def placed(node: str, seed: int = 2) -> list:
    """A prompt that a node gives a place in the picture."""
    prompt = ROW.conditioning(seed)
    if node == "ConditioningSetArea":
        return nodes.ConditioningSetArea().append(prompt, width=64, height=64, x=0, y=0, strength=1.0)[0]
    if node == "ConditioningSetMask":
        return nodes.ConditioningSetMask().append(prompt, torch.ones(1, 5, 8), "default", 1.0)[0]
    half = 0.5 if node == "half of the frames" else 1.0
    whole = ConditioningSetAreaPercentageVideo()
    return whole.append(prompt, 0.5, 0.5, half, 0.5, 0.5, 0.0, 2.0)[0]


@pytest.mark.parametrize("node", ["ConditioningSetArea", "ConditioningSetMask", "half of the frames"])
def test_places_that_comfyui_does_not_find_in_a_packed_latent_fail_as_they_do_unobserved(node):
    errors = []
    for model in (tiny("minimax_h3"), observed()):
        with pytest.raises((IndexError, RuntimeError)) as error:
            sample(model, ROW, steps=1, positive=placed(node))
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]


def test_a_place_that_comfyui_takes_for_the_whole_packed_latent_is_recorded_as_that():
    positive = placed("all frames") + ROW.conditioning(4)
    samples = sampled(positive=positive)
    plain = sample(tiny("minimax_h3"), ROW, steps=1, positive=positive)
    assert all(torch.equal(*parts) for parts in zip(samples.unbind(), plain.unbind(), strict=True))
    mean, one, two = (
        recording_of({"samples": s}).scores["output"][0]
        for s in (samples, *(sampled(positive=ROW.conditioning(seed)) for seed in (2, 4)))
    )
    assert torch.allclose(mean, (2 * one + two) / 3, atol=1e-5)


def test_concepts_are_text_beside_a_prompt_with_pictures_in_it():
    tags = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    positive = [[ROW.conditioning(2)[0][0], {"minimax_token_tags": tags}]]
    plain = sample(tiny("minimax_h3"), ROW, steps=1, positive=positive)
    samples = sampled(positive=positive)
    assert all(torch.equal(*parts) for parts in zip(samples.unbind(), plain.unbind(), strict=True))
    assert recording_of({"samples": samples}).scores["output"][0].isfinite().all()


@pytest.mark.parametrize("patched", [False, True])
def test_weights_are_loaded_ahead_only_where_no_block_would_patch_them_twice(monkeypatch, patched):
    ahead: list[bool] = []

    def queue(blocks, device, options):
        ahead.append(options.get("prefetch_dynamic_vbars", False))

    monkeypatch.setattr("comfy.model_prefetch.make_prefetch_queue", queue)
    monkeypatch.setattr(ModelPatcher, "is_dynamic", lambda patcher: True)
    if patched:
        layer = tiny("minimax_h3").model.diffusion_model.blocks[2].mlp.fc1
        monkeypatch.setattr(layer, "weight_lowvram_function", lambda weight: weight, raising=False)
    sampled()
    assert ahead == [not patched], "one call of the model, and none to embed the names"


def test_what_is_recorded_is_kept_out_of_allocation_graphs(monkeypatch):
    paused = []

    @contextlib.contextmanager
    def pause():
        paused.append(True)
        yield

    monkeypatch.setattr("comfy.model_prefetch.pause_malloc_graph", pause, raising=False)
    sampled()
    assert len(paused) == 3, "once in each block"


def test_pictures_without_sound_are_refused():
    with pytest.raises(ValueError, match="MiniMax H3 makes a video and its sound together"):
        observe_image(
            tiny("minimax_h3"),
            WhatToRecord(concepts_of(), ROW.concept_tokens()),
            torch.zeros(1, 24, 1, 4, 4),
            ROW.conditioning(2),
            image_size=(64, 64),
        )
