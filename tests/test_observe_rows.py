"""Which rows, patches, steps and layers of a model's calls are recorded."""

from __future__ import annotations

import logging

import comfy.hooks
import comfy.samplers
import comfy_extras.nodes_context_windows as context_windows
import comfy_extras.nodes_custom_sampler as custom_sampler
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

import nodes
from concept_attention.core.architectures import flux1
from concept_attention.core.observing import observe as observe_module
from concept_attention.core.observing.latents import recording_of
from concept_attention.core.observing.readers.patches import PatchReading
from concept_attention.core.observing.readers.stream import ConceptStream
from concept_attention.core.observing.recording import RecordingError
from concept_attention.core.reading.maps import concept_maps
from observing import (
    GUIDERS,
    TOLERANCE,
    empty,
    first_scores,
    observed,
    picture,
    recording,
    relative,
    sample_custom_advanced,
    watch_evaluations,
)
from tiny_flux import conditioning, random_flux, sample


@pytest.fixture(scope="module")
def model() -> ModelPatcher:
    with torch.inference_mode():
        return random_flux()


def test_a_positive_with_an_area_is_told_from_negatives_made_to_match_it(model):
    """ComfyUI gives every other conditioning a copy with the area, and the uuid, of the positive's."""
    positive, middle, negative = conditioning(2, area=(12, 16, 0, 0)), conditioning(4), conditioning(3)
    alone = sample_custom_advanced(GUIDERS["BasicGuider"](observed(model)).result[0])
    for guider in (
        custom_sampler.CFGGuider.execute(observed(model), positive, negative, 3.0),
        custom_sampler.DualCFGGuider.execute(
            observed(model), positive, middle, negative, 2.0, 3.0, "regular"
        ),
    ):
        ours = sample_custom_advanced(guider.result[0])
        assert relative(first_scores(ours[0]["samples"]), first_scores(alone[0]["samples"])) <= TOLERANCE


def chunks_reversed(apply_model, args):
    """A model_function_wrapper that runs the batch in the opposite order."""
    count = len(args["cond_or_uncond"])

    def flip(x):
        return torch.cat(x.chunk(count)[::-1]) if isinstance(x, Tensor) else x

    c = {name: flip(value) for name, value in args["c"].items()}
    options = c["transformer_options"] = dict(c["transformer_options"])
    for name in ("cond_or_uncond", "uuids"):
        options[name] = options[name][::-1]
    return flip(apply_model(flip(args["input"]), flip(args["timestep"]), **c))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("order", ["negative first", "positive first", "too little memory", "other length"])
def test_only_the_positive_is_recorded(model, monkeypatch, batch, order):
    latent = empty(batch)
    alone = first_scores(sample(observed(model), latent=latent))
    negative = conditioning(3, tokens=9 if order == "other length" else 7)
    assert relative(first_scores(sample(observed(model), latent=latent, positive=negative)), alone) > 0.1

    under_cfg = model.clone()
    chunks = []

    def note_chunks(attn, extra_options):
        chunks.append(extra_options["cond_or_uncond"])
        return attn

    under_cfg.set_model_attn1_output_patch(note_chunks)
    if order == "positive first":
        under_cfg.set_model_unet_function_wrapper(chunks_reversed)
    if order == "too little memory":
        monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: 0)
    samples = sample(observed(under_cfg), cfg=3.0, latent=latent, negative=negative)

    expected = {"negative first": [[1, 0]], "positive first": [[0, 1]]}.get(order, [[0], [1]])
    assert sorted(map(list, {tuple(c) for c in chunks})) == expected
    assert relative(first_scores(samples), alone) <= TOLERANCE
    assert len(recording(samples).sigmas) == 3


@pytest.mark.parametrize("negative_tokens", [7, 9])
def test_nothing_is_computed_for_the_negative(model, monkeypatch, negative_tokens):
    modulated, attended, scored = [], [], []

    class TextStream(flux1.TextStream):
        def __init__(self, model, timestep, guidance, *args):
            modulated.append((len(timestep), len(guidance)))
            super().__init__(model, timestep, guidance, *args)

    def attend(self, layer, *images, rotate):
        attended.append({len(image) for image in (*images, rotate(images[1]))})
        original_attend(self, layer, *images, rotate=rotate)

    def score(self, layer, image_out):
        scored.append(len(image_out))
        original_score(self, layer, image_out)

    original_attend, original_score = ConceptStream.attend, ConceptStream.score
    monkeypatch.setattr(flux1, "TextStream", TextStream)
    monkeypatch.setattr(ConceptStream, "attend", attend)
    monkeypatch.setattr(ConceptStream, "score", score)
    sample(
        observed(model),
        steps=2,
        cfg=3.0,
        latent=empty(3),
        negative=conditioning(3, tokens=negative_tokens),
    )
    assert modulated == [(3, 3)] * 2
    assert attended == [{3}] * 2 * 3
    assert scored == [3] * 2 * 3


SAMPLERS = {
    "euler": (0, 1, 2),
    "dpmpp_2m": (0, 1, 2),
    "res_multistep": (0, 1, 2),
    "heun": (0, 1, 1, 2, 2),  # the second evaluation of a step is where the next step starts
    "dpm_2": (0, 0, 1, 1, 2),  # the second evaluation of a step is between steps
    "dpmpp_2s_ancestral": None,
    "uni_pc": None,
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_evaluation_is_an_entry_of_its_step(model, sampler):
    counted = model.clone()
    sigmas = watch_evaluations(counted)
    found = recording(sample(observed(counted), sampler=sampler))
    schedule = comfy.samplers.KSampler(model, 3, model.load_device, sampler, "simple").sigmas.tolist()
    assert found.sigmas == pytest.approx(sigmas)
    for sigma, step in zip(found.sigmas, found.steps, strict=True):
        assert schedule[step + 1] < sigma <= schedule[step] * 1.001
    assert SAMPLERS[sampler] in (None, found.steps)


def test_steps_of_a_flipped_schedule_are_in_the_order_they_run(model):
    """FlipSigmas turns sampling around, to find the noise of an existing picture."""
    guider = GUIDERS["BasicGuider"](observed(model)).result[0]
    (sigmas,) = custom_sampler.FlipSigmas.execute(torch.tensor([0.9, 0.6, 0.3, 0.0])).result
    euler = comfy.samplers.sampler_object("euler")
    samples = guider.sample(torch.zeros_like(picture()), picture(), euler, sigmas, disable_pbar=True, seed=0)
    assert recording(samples).sigmas == pytest.approx(sigmas[:-1].tolist())
    assert recording(samples).steps == (0, 1, 2)


def test_steps_of_a_part_of_the_schedule_start_at_zero(model):
    whole = recording(sample(observed(model), steps=4))
    samples = sample(observed(model), steps=4, start_step=1, last_step=3)
    assert torch.equal(samples, sample(model, steps=4, start_step=1, last_step=3))
    assert recording(samples).sigmas == whole.sigmas[1:3]
    assert recording(samples).steps == (0, 1)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("method", ["offset", "index", "uxo"])
def test_reference_latents_are_not_part_of_the_grid(model, monkeypatch, method, cfg):
    references = [picture(1, 8, 10), picture(1, 6, 6, seed=8)]
    positive = conditioning(2, reference_latents=references, reference_latents_method=method)
    own_rows, scored = [], []

    def note(attn, extra_options):
        if extra_options["block_type"] == "double":
            row = extra_options["cond_or_uncond"].index(0) if 0 in extra_options["cond_or_uncond"] else None
            start, end = extra_options["img_slice"]
            if row is not None:
                assert end - start == 6 * 8 + 4 * 5 + 3 * 3
                own_rows.append(attn[row : row + 1, start : start + 6 * 8].clone())
        return attn

    def score(self, layer, image_out):
        scored.append(image_out.clone())
        original(self, layer, image_out)

    original = ConceptStream.score
    monkeypatch.setattr(ConceptStream, "score", score)
    watched = model.clone()
    watched.set_model_attn1_output_patch(note)
    samples = sample(observed(watched), cfg=cfg, positive=positive)
    assert torch.equal(samples, sample(model, cfg=cfg, positive=positive))
    assert first_scores(samples).shape == (3, 1, 3, 6, 8)
    assert len(scored) == 3 * 3
    for ours, expected in zip(scored, own_rows, strict=True):
        assert torch.equal(ours, expected)
    assert relative(first_scores(samples), first_scores(sample(observed(model)))) > 0.01


def test_a_combined_conditioning_is_recorded_as_the_mean(model):
    run = {"positive": conditioning(2) + conditioning(4), "cfg": 3.0, "latent": empty(3)}
    samples = sample(observed(model), **run)
    assert torch.equal(samples, sample(model, **run))
    alone = [
        first_scores(sample(observed(model), positive=conditioning(seed), latent=empty(3))) for seed in (2, 4)
    ]
    assert relative(first_scores(samples), (alone[0] + alone[1]) / 2) <= TOLERANCE
    assert len(recording(samples).sigmas) == 3


def test_an_area_is_recorded_where_it_lies(model):
    whole = conditioning(2)
    (area,) = nodes.ConditioningSetArea().append(
        conditioning(4), width=64, height=64, x=48, y=32, strength=1.0
    )
    positive = whole + area
    samples = sample(observed(model), positive=positive, cfg=3.0)
    assert torch.equal(samples, sample(model, positive=positive, cfg=3.0))

    noise = comfy.sample.prepare_noise(empty(), 1)
    tile = noise[:, :, 4:12, 6:14]
    inside = first_scores(
        sample(observed(model), latent=empty(1, 8, 8), noise=tile, positive=conditioning(4))
    )
    expected = first_scores(sample(observed(model), positive=whole)).clone()
    # ComfyUI fades this area out over two pixels, but not at the edge of the image.
    weight = torch.tensor([0.75, 1, 1, 1])[:, None] * torch.tensor([0.75, 1, 1, 0.75])
    expected[..., 2:6, 3:7] = (expected[..., 2:6, 3:7] + weight * inside) / (1 + weight)
    assert relative(first_scores(samples), expected) <= TOLERANCE


def test_an_area_in_percent_at_the_edge_of_an_odd_latent_fits_the_grid(model):
    (area,) = nodes.ConditioningSetAreaPercentage().append(conditioning(4), 0.5, 0.5, 0.5, 0.5, 1.0)
    run = {"positive": conditioning(2) + area, "cfg": 3.0, "latent": empty(2, 15, 17)}
    samples = sample(observed(model), **run)
    assert torch.equal(samples, sample(model, **run))
    assert first_scores(samples).shape == (3, 2, 3, 8, 9)


LEFT = torch.zeros(1, 12, 16)


LEFT[..., :8] = 1


def masked(seed: int, mask: Tensor, strength: float = 1.0) -> list:
    """What ConditioningSetMask makes of a prompt."""
    return nodes.ConditioningSetMask().append(conditioning(seed), mask, "default", strength)[0]


def test_masked_conditionings_count_where_their_masks_are(model):
    positive = masked(2, LEFT) + masked(4, 1 - LEFT)
    samples = sample(observed(model), positive=positive, cfg=3.0)
    assert torch.equal(samples, sample(model, positive=positive, cfg=3.0))
    alone = [first_scores(sample(observed(model), positive=conditioning(seed))) for seed in (2, 4)]
    expected = torch.cat([alone[0][..., :4], alone[1][..., 4:]], -1)
    assert relative(first_scores(samples), expected) <= TOLERANCE


def test_conditionings_count_by_their_strength_as_they_do_for_the_image(model):
    everywhere = torch.ones(1, 12, 16)
    samples = sample(observed(model), positive=masked(2, everywhere) + masked(4, everywhere, 0.25))
    alone = [first_scores(sample(observed(model), positive=conditioning(seed))) for seed in (2, 4)]
    assert relative(first_scores(samples), (alone[0] + 0.25 * alone[1]) / 1.25) <= TOLERANCE


def test_masks_of_a_batch_count_image_by_image(model):
    masks = torch.cat([LEFT, 1 - LEFT])
    positive = masked(2, masks) + masked(4, 1 - masks)
    scores = first_scores(sample(observed(model), positive=positive, latent=empty(2)))
    alone = [
        first_scores(sample(observed(model), positive=conditioning(seed), latent=empty(2))) for seed in (2, 4)
    ]
    here = LEFT[:, ::2, ::2].bool()
    assert relative(scores[:, 0], torch.where(here, alone[0][:, 0], alone[1][:, 0])) <= TOLERANCE
    assert relative(scores[:, 1], torch.where(here, alone[1][:, 1], alone[0][:, 1])) <= TOLERANCE


def test_a_default_conditioning_counts_where_the_others_leave_room(model):
    (positive,) = comfy.hooks.set_default_conds_and_combine([masked(2, LEFT)], [conditioning(4)])
    samples = sample(observed(model), positive=positive)
    assert torch.equal(samples, sample(model, positive=positive))
    alone = [first_scores(sample(observed(model), positive=conditioning(seed))) for seed in (2, 4)]
    expected = torch.cat([alone[0][..., :4], alone[1][..., 4:]], -1)
    assert relative(first_scores(samples), expected) <= TOLERANCE


def test_where_no_prompt_is_at_work_nothing_is_recorded_and_the_user_is_told(model, caplog):
    samples = sample(observed(model), positive=masked(2, LEFT))
    assert torch.equal(samples, sample(model, positive=masked(2, LEFT)))
    scores = first_scores(samples)
    assert scores[..., 4:].isnan().all()
    assert scores[..., :4].isfinite().all()
    assert "in 50 % of the image no positive prompt is at work" in caplog.text
    maps = concept_maps(recording(samples)).values
    assert (maps[..., 4:] == 0).all()
    assert torch.allclose(maps[..., :4].sum(1), torch.tensor(1.0))


def test_a_patch_is_the_mean_of_the_steps_in_which_a_prompt_was_at_work_there(model):
    early = conditioning(2, start_percent=0.0, end_percent=0.5)
    late = conditioning(4, start_percent=0.5, end_percent=1.0, area=(12, 8, 0, 0))
    found = recording(sample(observed(model), positive=early + late, steps=4))
    seen = [
        step
        for step, scores in zip(found.steps, found.scores["output"], strict=True)
        if scores[..., 4:].isfinite().all()
    ]
    assert 0 < len(seen) < 4
    right = [concept_maps(found, steps=steps).values[..., 4:] for steps in (None, seen)]
    assert torch.allclose(*right)


def test_a_prompt_that_is_never_at_work_is_named_as_the_reason(model):
    late = conditioning(2, start_percent=0.9, end_percent=1.0)
    samples = sample(observed(model), positive=late, steps=4, last_step=2, cfg=3.0)
    with pytest.raises(RecordingError, match="none of the 2 evaluations .*ConditioningSetTimestepRange"):
        recording(samples)


def test_what_a_broken_model_computes_is_no_recording(model, monkeypatch):
    original = ConceptStream.score

    def score(self, layer, image_out):
        original(self, layer, image_out * (torch.nan if layer == 1 else 1))

    monkeypatch.setattr(ConceptStream, "score", score)
    samples = sample(observed(model))
    with pytest.raises(RecordingError, match="NaN or infinite values in step 0, from layer 1 on"):
        recording(samples)


def test_an_image_that_is_no_number_leaves_the_others_their_maps(model, caplog):
    latent = picture(3)
    clean = recording(sample(observed(model), latent=latent, denoise=0.6))
    latent[1, 0, 0, 0] = torch.nan
    samples = sample(observed(model), latent=latent, denoise=0.6)
    assert torch.equal(samples.isnan(), sample(model, latent=latent, denoise=0.6).isnan())
    found = recording(samples)
    assert "step 0, from layer 0 on (image 2 of 3), so there are no maps" in caplog.text
    maps, expected = concept_maps(found).values, concept_maps(clean).values
    assert (maps[1] == 0).all()
    assert torch.equal(maps[[0, 2]], expected[[0, 2]])
    one = {"samples": samples}
    assert recording_of(nodes.LatentFromBatch().frombatch(one, 2, 1)[0]).broken == {}
    with pytest.raises(RecordingError, match=r"NaN or infinite values in step 0.*\(image 1 of 1\)"):
        recording_of(nodes.LatentFromBatch().frombatch(one, 1, 1)[0])


def test_a_schedule_of_prompts_is_recorded_throughout(model):
    early = conditioning(2, start_percent=0.0, end_percent=0.5)
    late = conditioning(4, start_percent=0.5, end_percent=1.0)
    samples = sample(observed(model), positive=early + late, steps=4)
    assert torch.equal(samples, sample(model, positive=early + late, steps=4))
    assert recording(samples).steps == (0, 1, 2, 3)
    assert relative(first_scores(samples), first_scores(sample(observed(model)))) <= TOLERANCE


@pytest.mark.parametrize("length", [3, 4])
def test_context_windows_over_a_batch_record_every_image(model, length):
    """ComfyUI may put the image before a window in front of it."""

    def windows(model):
        return context_windows.ContextWindowsManualNode.execute(
            model, length, 1, "standard_static", 1, False, "pyramid", 0, False
        ).result[0]

    run = {"latent": empty(5), "cfg": 3.0}
    samples = sample(windows(observed(model)), **run)
    assert torch.equal(samples, sample(windows(model), **run))
    assert relative(first_scores(samples), first_scores(sample(observed(model), **run))) <= TOLERANCE


@pytest.mark.parametrize("sampler, steps", [("euler", (0, 2, 4)), ("heun", (0, 1, 2, 3, 4))])
def test_every_second_evaluation(model, monkeypatch, sampler, steps):
    """Heun evaluates all steps but the last twice."""
    run = {"sampler": sampler, "steps": 5, "cfg": 3.0}
    whole = recording(sample(observed(model), **run))
    seen = []

    class Counted(PatchReading):
        def __init__(self, *args):
            seen.append(self)
            super().__init__(*args)

    monkeypatch.setattr(observe_module, "reading_of", lambda family: Counted)
    samples = sample(observed(model, every=2), **run)
    assert torch.equal(samples, sample(model, **run))
    found = recording(samples)
    assert found.steps == steps
    assert found.sigmas == whole.sigmas[::2]
    assert len(seen) == len(found.sigmas)
    for ours, expected in zip(found.scores["output"], whole.scores["output"][::2], strict=True):
        assert torch.equal(ours, expected)


def test_evaluations_are_recorded_every_one_or_more(model):
    with pytest.raises(ValueError, match="every 1 or more, not every 0"):
        observed(model, every=0)


def test_a_full_budget_leaves_the_default_layers(caplog):
    model = random_flux(depth=6)
    whole = sample(observed(model, spaces=("output", "value")), steps=4)
    assert recording(whole).layers == tuple(range(6))
    assert "keeping layers" not in caplog.text
    budget = recording(whole).nbytes * 4 // 6
    with caplog.at_level(logging.WARNING):
        samples = sample(observed(model, spaces=("output", "value"), budget=budget), steps=4)
    assert torch.equal(samples, whole)
    assert "keeping layers 2-5 only" in caplog.text
    assert recording(samples).layers == recording(samples).default_layers == (2, 3, 4, 5)
    assert recording(samples).steps == recording(whole).steps
    for space in ("output", "value"):
        for ours, expected in zip(
            recording(samples).scores[space], recording(whole).scores[space], strict=True
        ):
            assert torch.equal(ours, expected[2:])


def test_a_budget_keeps_the_layers_that_were_asked_for_and_the_mean_of_their_evaluations():
    deep = random_flux(depth=6)
    asked = observed(deep, layers=[0, 1])
    each = recording(sample(asked, steps=4))
    samples = sample(observed(deep, layers=[0, 1], budget=each.nbytes // 2), steps=4)
    assert torch.equal(samples, sample(asked, steps=4))
    found = recording(samples)
    assert found.layers == (0, 1)
    assert found.counts == (2, 2)
    assert found.steps == (0, 2)
    for ours, pair in zip(found.scores["output"], (slice(0, 2), slice(2, 4)), strict=True):
        torch.testing.assert_close(ours, torch.stack(each.scores["output"][pair]).mean(0))


def test_a_layer_that_is_too_large_is_not_recorded_and_the_image_is_as_it_would_be():
    model = random_flux(depth=2)
    samples = sample(observed(model, budget=1))
    assert torch.equal(samples, sample(model))
    with pytest.raises(RecordingError, match="scores of one layer"):
        recording(samples)


@pytest.mark.parametrize("layers", [[0], [1], [0, 2]])
def test_the_stream_stops_after_the_last_recorded_layer(model, monkeypatch, layers):
    whole = recording(sample(observed(model)))
    blocks = []

    def block(self, layer):
        blocks.append(layer)
        return original(self, layer)

    original = flux1.TextStream.block
    monkeypatch.setattr(flux1.TextStream, "block", block)
    found = recording(sample(observed(model, layers=layers)))
    assert blocks == list(range(max(layers) + 1)) * 3
    assert found.layers == tuple(layers)
    for ours, expected in zip(found.scores["output"], whole.scores["output"], strict=True):
        assert torch.equal(ours, expected[layers])
