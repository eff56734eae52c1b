"""Which recording a LATENT belongs to, through ComfyUI's own samplers and latent nodes."""

from __future__ import annotations

import gc
import importlib
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import comfy.model_management
import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom_sampler
import comfy_extras.nodes_post_processing  # noqa: F401 - nodes_latent and it import each other
import folder_paths
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_execution.utils import CurrentNodeContext
from tiny_models import WORDS, concepts_of, tiny
from tiny_models import sample as sample_row
from torch import Tensor

import nodes
from concept_attention.core.concepts import Concepts
from concept_attention.core.observing.latents import History, recording_of, remember
from concept_attention.core.observing.observe import WhatToRecord, observe
from concept_attention.core.observing.recording import Recording, RecordingError
from observing import observed
from recordings import recording
from tiny_flux import CONCEPTS, concept_tokens, conditioning, random_flux, sample

# isort: split
import comfy_extras.nodes_latent as latent_nodes

OTHERS = WhatToRecord(Concepts(("rock", "tree"), ("water",)), concept_tokens(9))


@pytest.fixture(scope="module")
def model() -> ModelPatcher:
    with torch.inference_mode():
        return random_flux()


@pytest.fixture
def watched(model) -> ModelPatcher:
    return observed(model)


def empty(batch: int = 1, height: int = 12, width: int = 16) -> dict:
    return {"samples": torch.zeros(batch, 16, height, width)}


def ksampler(model: ModelPatcher, seed: int = 1, latent: dict | None = None, **options) -> dict:
    """KSampler."""
    run = {"steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", **options}
    run |= {"positive": conditioning(2), "negative": conditioning(3), "latent": latent or empty()}
    return nodes.common_ksampler(model, seed, **run)[0]


def sampler_custom_advanced(model: ModelPatcher, sigmas, sampler="euler", latent=None) -> tuple[dict, dict]:
    return custom_sampler.SamplerCustomAdvanced.execute(
        custom_sampler.Noise_RandomNoise(1),
        custom_sampler.BasicGuider.execute(model, conditioning(2)).result[0],
        comfy.samplers.sampler_object(sampler),
        torch.tensor(sigmas),
        latent or empty(),
    ).result


def pick(latent: dict, index: int, length: int = 1) -> dict:
    return nodes.LatentFromBatch().frombatch(latent, index, length)[0]


def batched(*latents: dict) -> dict:
    batch = latents[0]
    for latent in latents[1:]:
        batch = latent_nodes.LatentBatch.execute(batch, latent).result[0]
    return batch


def scores(latent: dict) -> Tensor:
    """(E, L, B, K, h, w)."""
    return torch.stack(recording_of(latent).scores["output"])


def saved_and_loaded(latent: dict, folder: Path, monkeypatch) -> dict:
    """By SaveLatent and LoadLatent."""
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(folder))
    saving = nodes.SaveLatent()
    saving.output_dir = str(folder)
    (saved,) = saving.save(latent, "latent")["ui"]["latents"]
    return nodes.LoadLatent().load(saved["filename"])[0]


@pytest.mark.parametrize("sigmas", [[1.0, 0.5, 0.0], [1.0, 0.5]], ids=["to the end", "noise left"])
@pytest.mark.parametrize("sampler", ["euler", "res_multistep", "dpmpp_2m", "uni_pc", "lcm"])
def test_both_latents_of_a_custom_sampler_have_the_maps_of_its_run(watched, sampler, sigmas):
    output, denoised = sampler_custom_advanced(watched, sigmas, sampler, empty(2))
    assert denoised["samples"] is not output["samples"]
    assert recording_of(denoised) is recording_of(output)
    for latent in (output, denoised):
        assert torch.equal(scores(pick(latent, 1)), scores(output)[:, :, 1:])


def test_the_denoised_latent_is_known_though_the_sampler_keeps_the_other_to_itself(watched):
    """Samplers of other packs hand on ``denoised_output`` alone."""
    denoised = sampler_custom_advanced(watched, [1.0, 0.5, 0.0])[1]
    gc.collect()
    assert len(recording_of(denoised).sigmas) == 2


def test_with_fp16_intermediates_ksampler_hands_on_a_copy_that_is_known(model, watched, monkeypatch):
    expected = scores(ksampler(watched))
    monkeypatch.setattr(comfy.model_management, "intermediate_dtype", lambda: torch.float16)
    ours = ksampler(watched)
    assert ours["samples"].dtype == torch.float16
    assert torch.equal(ours["samples"], ksampler(model)["samples"])
    assert torch.equal(scores(ours), expected)


@pytest.mark.parametrize("index", [0, 2, 3])
def test_an_image_taken_out_of_a_batch_has_its_own_maps(watched, index):
    four = ksampler(watched, latent=empty(4))
    assert torch.equal(scores(pick(four, index)), scores(four)[:, :, index : index + 1])
    assert recording_of(pick(four, index)).broken == {}


def test_images_in_another_order_and_repeated(watched):
    three = ksampler(watched, latent=empty(3))
    turned = batched(pick(three, 2), pick(three, 0, 2), pick(three, 2))
    assert torch.equal(scores(turned), scores(three)[:, :, [2, 0, 1, 2]])
    (repeated,) = nodes.RepeatLatentBatch().repeat(three, 2)
    assert torch.equal(scores(repeated), scores(three)[:, :, [0, 1, 2, 0, 1, 2]])


def test_a_batch_of_two_runs_has_the_maps_of_both(watched):
    one, two = ksampler(watched, seed=1), ksampler(watched, seed=2, latent=empty(2))
    both = scores(batched(two, one))
    assert torch.equal(both, torch.cat([scores(two), scores(one)], 2))


def test_a_latent_that_was_saved_and_loaded(watched, tmp_path, monkeypatch):
    two = ksampler(watched, latent=empty(2))
    loaded = saved_and_loaded(pick(two, 1), tmp_path, monkeypatch)
    assert torch.equal(scores(loaded), scores(two)[:, :, 1:])


def test_the_image_of_concept_attention_image_is_known_in_a_batch():
    """Which remembers the LATENT that it encoded."""
    latents = [{"samples": torch.randn(n, 16, 8, 12)} for n in (2, 1)]
    for seed, latent in enumerate(latents):
        remember(latent["samples"], recording(batch=len(latent["samples"]), seed=seed))
    both = batched(*latents)
    assert torch.equal(scores(pick(both, 1, 2)), scores(both)[:, :, 1:])
    assert torch.equal(scores(both), torch.cat([scores(latent) for latent in latents], 2))


def test_a_batch_of_runs_with_different_concepts_names_both(model, watched):
    others = observe(model, OTHERS)
    mixed = batched(ksampler(watched, seed=1), ksampler(others, seed=2))
    with pytest.raises(RecordingError, match="different concepts: cat, ball, sky; and rock, tree, water"):
        recording_of(mixed)


def test_images_of_two_runs_with_the_same_concepts_are_of_those(model, watched):
    """The concepts were changed since for one of the images, whose latent stays the same."""
    kept = [ksampler(watched, seed=1), ksampler(watched, seed=2)]
    others = observe(model, OTHERS)
    later = ksampler(others, seed=1)
    assert recording_of(batched(*kept)).concepts == CONCEPTS
    assert torch.equal(scores(batched(*kept)), torch.cat([scores(latent) for latent in kept], 2))
    assert recording_of(pick(later, 0)).concepts == OTHERS.concepts


def test_of_two_runs_that_made_the_same_latent_the_later_one_counts(model, watched):
    first = ksampler(watched)
    second = ksampler(observe(model, OTHERS))
    assert torch.equal(first["samples"], second["samples"])
    assert recording_of(first).concepts == CONCEPTS
    assert recording_of({"samples": first["samples"].clone()}).concepts == OTHERS.concepts


@pytest.mark.parametrize(
    "other, what",
    [
        ({"evaluations": 2}, "different steps: 0-2; and 0-1"),
        ({"image_size": (64, 95)}, "different sizes: 64 x 96; and 64 x 95"),
        ({"sigmas": (1.0, 0.9, 0.8)}, "different noise levels: 1, 0.667, 0.333; and 1, 0.9, 0.8"),
        ({"layers": (6, 7)}, "no recorded layer and space in common"),
    ],
)
def test_runs_that_do_not_go_together_say_in_what(other, what):
    made = {name: other[name] for name in other if name in ("evaluations", "layers")}
    changed = {name: other[name] for name in other if name not in made}
    latents = [{"samples": torch.randn(1, 16, 8, 12)} for _ in range(2)]
    remember(latents[0]["samples"], recording())
    remember(latents[1]["samples"], replace(recording(**made), **changed))
    with pytest.raises(RecordingError, match=what):
        recording_of(batched(*latents))


def test_runs_of_several_layers_have_those_that_they_share():
    latents = [{"samples": torch.randn(1, 16, 8, 12)} for _ in range(2)]
    full, thin = recording(layers=(0, 1, 2, 3)), recording(layers=(1, 3, 5), seed=1)
    for latent, made in zip(latents, (full, thin), strict=True):
        remember(latent["samples"], made)
    both = recording_of(batched(*latents))
    assert both.layers == both.default_layers == (1, 3)
    for evaluation, joined in enumerate(both.scores["output"]):
        expected = full.scores["output"][evaluation][[1, 3]], thin.scores["output"][evaluation][[0, 1]]
        assert torch.equal(joined, torch.cat(expected, 1))


def trimmed(latent: dict, start: int) -> dict:
    return importlib.import_module("comfy_extras.nodes_wan").TrimVideoLatent.execute(latent, start).result[0]


def cut(latent: dict, start: int, length: int) -> dict:
    return latent_nodes.LatentCut.execute(latent, "t", start, length).result[0]


CUT = {
    "the first": (lambda latent: trimmed(latent, 1), slice(1, 3)),  # as after Wan VACE with a reference
    "the last": (lambda latent: cut(latent, 0, 2), slice(0, 2)),  # as after LTX-Video with guides
    "all but one": (lambda latent: cut(latent, 1, 1), slice(1, 2)),
    "the first of one video": (lambda latent: trimmed(pick(latent, 1), 2), slice(2, 3)),
}


@pytest.mark.parametrize("name", CUT)
def test_a_video_of_which_frames_were_cut_off_has_the_maps_of_the_others(name):
    change, kept = CUT[name]
    row = WORDS["wan21_t2v"]
    what = WhatToRecord(concepts_of(), row.concept_tokens())
    latent = {"samples": sample_row(observe(tiny("wan21_t2v"), what), row, batch=2)}
    whole, part = recording_of(latent), recording_of(change(latent))
    assert whole.durations == (1, 4, 4)
    assert part.durations == whole.durations[: kept.stop - kept.start]
    videos = slice(1, 2) if name.endswith("of one video") else slice(None)
    for evaluation, scores in enumerate(whole.scores["probability"]):
        expected = scores.unflatten(1, (2, 3))[:, videos, kept].flatten(1, 2)
        assert torch.equal(part.scores["probability"][evaluation], expected)


def test_guides_that_ltx_video_is_sampled_with_are_cropped_off_its_maps_too():
    """They stand behind the video."""
    lt, row = importlib.import_module("comfy_extras.nodes_lt"), WORDS["ltxv"]
    guide = torch.randn(1, row.latent[0], 1, *row.latent[2:])
    positive, negative, latent, mask = lt.LTXVAddGuide.append_keyframe(
        row.conditioning(2),
        row.conditioning(3),
        0,
        row.empty(),
        torch.ones(1, 1, row.latent[1], 1, 1),
        guide,
        1.0,
        [8, 32, 32],
    )
    watched = observe(tiny("ltxv"), WhatToRecord(concepts_of(), row.concept_tokens()))
    options = {"noise": torch.randn_like(latent), "positive": positive, "negative": negative}
    sampled = {
        "samples": sample_row(watched, row, latent=latent, noise_mask=mask, **options),
        "noise_mask": mask,
    }
    whole = recording_of(sampled)
    video = recording_of(lt.LTXVCropGuides.execute(positive, negative, sampled).result[2])
    assert (whole.durations, video.durations) == ((1, 8, 8, 8), (1, 8, 8))
    assert torch.equal(video.scores["probability"][0], whole.scores["probability"][0][:, :3])


def test_frames_that_do_not_follow_each_other_are_no_part_of_a_video():
    samples = torch.randn(1, 16, 3, 8, 12)
    remember(samples, replace(recording(batch=3), durations=(1, 4, 4)))
    for frames in ([0, 2], [1, 0], [0, 1, 2, 2]):
        with pytest.raises(RecordingError, match="has the size of one that was, but holds something else"):
            recording_of({"samples": samples[:, :, frames]})


def test_a_part_of_a_video_is_not_known_to_models_that_see_frames_as_one():
    """It would begin within one of them."""
    samples = torch.randn(1, 16, 4, 8, 12)
    remember(samples, replace(recording(batch=2), durations=(5, 8)))
    with pytest.raises(RecordingError, match="holds something else"):
        recording_of(trimmed({"samples": samples}, 1))


CHANGED: dict[str, tuple[Callable[[dict], dict], str]] = {
    "upscaled": (
        lambda latent: nodes.LatentUpscaleBy().upscale(latent, "nearest-exact", 2.0)[0],
        "is 24 x 32 in size .* one that was is 12 x 16: it was probably upscaled or cropped",
    ),
    "cropped": (
        lambda latent: nodes.LatentCrop().crop(latent, 64, 64, 0, 0)[0],
        "is 8 x 8 in size .* one that was is 12 x 16: it was probably upscaled or cropped",
    ),
    "blended": (
        lambda latent: nodes.LatentBlend().blend(latent, ksampler(random_flux(1)), 0.5)[0],
        "holds something else",
    ),
    "changed in one place": (
        lambda latent: nodes.LatentComposite().composite(latent, empty(1, 2, 2), 0, 0)[0],
        "holds something else",
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_latent_that_was_changed_says_what_was_done_to_it(watched, name):
    change, what = CHANGED[name]
    latent = ksampler(watched)
    assert recording_of(latent)
    with pytest.raises(RecordingError, match=f"was not sampled with Concept Attention.*{what}"):
        recording_of(change(latent))


def test_the_images_of_a_batch_that_are_not_known_are_named(watched, model):
    mixed = batched(ksampler(watched, seed=1), ksampler(model, seed=2), ksampler(model, seed=3))
    with pytest.raises(RecordingError, match="Of the 3 images in this LATENT, number 2, 3 was not sampled"):
        recording_of(mixed)


def test_an_empty_batch_and_what_is_no_tensor_are_not_known():
    for samples in (torch.zeros(0, 16, 8, 8), object()):
        with pytest.raises(RecordingError, match="was not sampled with Concept Attention"):
            recording_of({"samples": samples})


def test_copies_of_a_run_that_could_not_be_recorded_say_why(model):
    broken = model.clone()
    broken.set_model_unet_function_wrapper(lambda apply_model, args: torch.zeros_like(args["input"]))
    _, denoised = sampler_custom_advanced(observed(broken), [1.0, 0.5, 0.0])
    with pytest.raises(RecordingError, match="although 2 evaluations of the model ran"):
        recording_of(denoised)


@pytest.mark.parametrize("hires", [True, False])
def test_a_second_sampler_on_the_same_model_has_a_recording_of_its_own(watched, hires):
    first = ksampler(watched, latent=empty(1, 6, 8))
    between = nodes.LatentUpscaleBy().upscale(first, "nearest-exact", 2.0)[0] if hires else first
    second = ksampler(watched, latent=between, denoise=0.5, steps=3)
    assert len(recording_of(first).sigmas) == 2
    assert len(recording_of(second).sigmas) == 3
    assert recording_of(pick(second, 0)).image_size == (96, 128) if hires else (48, 64)
    assert len(recording_of(pick(first, 0)).sigmas) == 2


@pytest.mark.parametrize(
    "sampler, sigmas",
    [("euler", [0.5]), ("euler", [0.0]), ("dpm_adaptive", [0.5]), ("dpm_adaptive", [0.5, 0.5])],
)
def test_a_sampler_that_takes_no_step_is_named_as_the_reason(watched, sampler, sigmas):
    before = ksampler(watched)
    output, denoised = sampler_custom_advanced(watched, sigmas, sampler, before)
    for latent in (output, denoised):
        with pytest.raises(RecordingError, match=f"took no step.*go from {sigmas[0]:g} to {sigmas[0]:g}"):
            recording_of(latent)
    assert len(recording_of(pick(before, 0)).sigmas) == 2


def test_ksampler_without_a_step_hands_on_the_latent_with_its_maps(model, watched):
    """It returns the very tensor, and calls nothing of the MODEL on the way."""
    before = ksampler(watched)
    after = ksampler(observe(model, OTHERS), latent=before, denoise=0.0)
    assert after["samples"] is before["samples"]
    assert recording_of(after) is recording_of(before)
    nothing = ksampler(watched, denoise=0.0)
    with pytest.raises(RecordingError, match=r"takes no step \(denoise 0"):
        recording_of(nothing)


class CallsTheModelItself(comfy.samplers.CFGGuider):
    """As ComfyUI-NAG's guider does, past the wrappers of PREDICT_NOISE."""

    def __call__(self, *args, **kwargs):
        return self.predict_noise(*args, **kwargs)


def test_a_guider_that_calls_the_model_itself_is_named_as_the_reason(model, watched):
    runs = []
    for each in (model, watched):
        guider = CallsTheModelItself(each)
        guider.set_conds(conditioning(2), conditioning(3))
        euler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.5, 0.0])
        noise = comfy.sample.prepare_noise(empty()["samples"], 1)
        runs.append(guider.sample(noise, empty()["samples"], euler, sigmas, disable_pbar=True, seed=1))
    assert torch.equal(*runs)
    with pytest.raises(RecordingError, match="took 2 steps: its guider calls the model in a way of its own"):
        recording_of({"samples": runs[1]})


def alive(kind: type = Recording) -> int:
    gc.collect()
    return sum(type(o) is kind for o in gc.get_objects())


def test_a_picked_recording_lives_as_long_as_its_latent(model):
    four = ksampler(observed(model), latent=empty(4))
    one = pick(four, 2)
    whole, own = weakref.ref(recording_of(four)), weakref.ref(recording_of(one))
    del four
    gc.collect()
    assert whole() is None
    assert own() is recording_of(one)
    del one
    gc.collect()
    assert own() is None


def test_nothing_is_known_when_latents_and_model_are_gone(model):
    watched = observed(model)
    output, denoised = sampler_custom_advanced(watched, [1.0, 0.5, 0.0])
    picked = batched(denoised, output)
    found = [weakref.ref(recording_of(latent)) for latent in (output, picked)]
    del output, denoised, picked
    gc.collect()
    assert [each() is not None for each in found] == [True, False]  # the MODEL still has the run
    del watched
    gc.collect()
    assert [each() for each in found] == [None, None]


def test_a_hundred_queued_runs_keep_what_one_keeps(watched):
    """Of a sampler whose LATENT is a copy, so that only the MODEL holds the recording."""
    found = []
    for run in range(100):
        with CurrentNodeContext(prompt_id=f"prompt {run}", node_id="3"):
            denoised = sampler_custom_advanced(watched, [1.0, 0.0], latent=empty(1, 4, 6))[1]
        found.append(weakref.ref(recording_of(denoised)))
        assert sum(each() is not None for each in found) == 1


def test_two_samplers_of_one_prompt_are_both_known(watched):
    for prompt in ("first", "second"):
        latents = []
        for node in ("3", "4"):
            with CurrentNodeContext(prompt_id=prompt, node_id=node):
                run = sampler_custom_advanced(watched, [1.0, 0.5 + int(node) / 100, 0.0])
                latents.append(run[1])
                del run
    assert {len(recording_of(latent).sigmas) for latent in latents} == {2}
    assert recording_of(latents[0]).sigmas != recording_of(latents[1]).sigmas


def test_a_history_has_its_bounds():
    size = recording().nbytes
    history = History(budget=2 * size, runs=10)
    made = [weakref.ref(each) for each in map(recording_held_by(history), range(5))]
    gc.collect()
    assert [ref() is not None for ref in made] == [False, False, False, True, True]
    small = History(budget=1)
    made = [weakref.ref(each) for each in map(recording_held_by(small), range(2))]
    gc.collect()
    assert [ref() is not None for ref in made] == [False, True]


def test_the_latents_tensor_is_known_first():
    samples, found = torch.zeros(1, 16, 4, 4), recording()
    remember(samples, found)
    remember(samples.clone(), recording(seed=1))
    assert recording_of({"samples": samples, "noise_mask": None}) is found


def test_the_reason_for_no_recording_is_raised_when_maps_are_asked_for():
    samples = torch.zeros(1)
    remember(samples, "because")
    with pytest.raises(RecordingError, match="because"):
        recording_of({"samples": samples})


def recording_held_by(history: History) -> Callable[[int], Recording]:
    def make(seed: int) -> Recording:
        made = recording(seed=seed)
        history.add(remember(torch.zeros(1), made))
        return made

    return make


def test_other_callbacks_still_see_every_step(watched, model):
    seen = {True: [], False: []}
    for each, ours in ((watched, True), (model, False)):
        sample(each, callback=lambda *args, o=ours: seen[o].append((args[0], args[1].clone(), args[3])))
    for ours, expected in zip(seen[True], seen[False], strict=True):
        assert ours[::2] == expected[::2]
        assert torch.equal(ours[1], expected[1])
