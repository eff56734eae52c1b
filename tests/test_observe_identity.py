"""An observed model paints the same picture, whatever happens, and nothing that it is given changes."""

from __future__ import annotations

import gc

import comfy.model_management
import comfy.samplers
import comfy.sd
import pytest
import torch
from comfy.model_management import InterruptProcessingException
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor

from concept_attention.core.architectures import Family, flux1
from concept_attention.core.observing.latents import recording_of
from concept_attention.core.observing.observe import KEY, WhatToRecord, observe
from concept_attention.core.observing.readers.stream import SPACES, ConceptStream
from concept_attention.core.observing.recorder import Recorder
from concept_attention.core.observing.recording import RecordingError
from observing import (
    GUIDERS,
    TOLERANCE,
    empty,
    failing,
    first_scores,
    noise_mask,
    observed,
    picture,
    recording,
    relative,
    sample_custom_advanced,
)
from tiny_flux import CONCEPTS, concept_tokens, conditioning, random_flux, sample


@pytest.fixture(scope="module")
def model() -> ModelPatcher:
    with torch.inference_mode():
        return random_flux()


RUNS = {
    "euler": {},
    "euler, cfg": {"cfg": 3.0},
    "euler, batch of 3": {"latent": empty(3)},
    "heun, cfg, odd size": {"sampler": "heun", "cfg": 3.0, "latent": empty(1, 15, 17)},
    "dpmpp_2m, cfg, batch of 3": {"sampler": "dpmpp_2m", "cfg": 3.0, "latent": empty(3)},
    "res_multistep, cfg, batch of 3, odd size": {
        "sampler": "res_multistep",
        "cfg": 3.0,
        "latent": empty(3, 15, 17),
    },
    "euler_ancestral, which draws noise": {"sampler": "euler_ancestral", "cfg": 3.0},
    "euler_cfg_pp, which adds a post-CFG function": {"sampler": "euler_cfg_pp", "cfg": 1.5},
    "img2img": {"latent": picture(), "denoise": 0.6},
    "img2img, cfg, batch of 3": {"sampler": "dpmpp_2m", "cfg": 3.0, "latent": picture(3), "denoise": 0.6},
    "inpainting, odd size": {"latent": picture(1, 15, 17), "noise_mask": noise_mask(15, 17), "denoise": 0.8},
    "inpainting, cfg": {"latent": picture(), "noise_mask": noise_mask(12, 16), "cfg": 3.0, "sampler": "heun"},
}


@pytest.mark.parametrize("name", RUNS)
def test_the_image_is_bit_identical(model, name):
    run = RUNS[name]
    plain, ours = sample(model, **run), sample(observed(model, spaces=SPACES), **run)
    assert torch.equal(plain, ours)
    batch, _, height, width = ours.shape
    for scores in recording(ours).scores.values():
        assert {s.shape for s in scores} == {(3, batch, 3, (height + 1) // 2, (width + 1) // 2)}
        assert all(s.isfinite().all() and s.std() > 0 for s in scores)


def test_the_image_of_a_model_without_guidance_is_bit_identical():
    schnell = random_flux(guidance=False)
    ours = sample(observed(schnell))
    assert torch.equal(sample(schnell), ours)
    assert len(recording(ours).sigmas) == 3


@pytest.mark.parametrize("sampler", comfy.samplers.KSampler.SAMPLERS)
def test_every_sampler_paints_the_same_and_is_recorded(model, sampler):
    run = {"sampler": sampler, "steps": 2, "cfg": 2.0, "latent": empty(1, 4, 6)}
    plain, ours = sample(model, **run), sample(observed(model), **run)
    assert plain.isfinite().all()
    assert torch.equal(plain, ours)
    assert len(recording(ours).sigmas) >= 2
    assert recording(ours).sigmas[0] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    "latent", [{"samples": empty()}, {"samples": picture(3, 15, 17)}], ids=["1", "3, odd"]
)
@pytest.mark.parametrize("name", GUIDERS)
def test_sampler_custom_advanced_paints_the_same_and_records_the_positive(model, name, latent):
    plain = sample_custom_advanced(GUIDERS[name](model).result[0], "res_multistep", latent=latent)
    ours = sample_custom_advanced(GUIDERS[name](observed(model)).result[0], "res_multistep", latent=latent)
    for expected, found in zip(plain, ours, strict=True):
        assert torch.equal(expected["samples"], found["samples"])
    alone = sample_custom_advanced(GUIDERS["BasicGuider"](observed(model)).result[0], latent=latent)
    assert len(recording_of(ours[0]).sigmas) == 3
    assert relative(first_scores(ours[0]["samples"]), first_scores(alone[0]["samples"])) <= TOLERANCE


def state(patcher: ModelPatcher) -> dict:
    """All that a node could have changed, containers copied."""

    def copied(value):
        if isinstance(value, dict):
            return {k: copied(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [copied(v) for v in value]
        return value

    names = ("model_options", "wrappers", "callbacks", "patches", "patches_uuid", "object_patches")
    names += ("injections", "attachments", "additional_models", "hook_patches", "backup")
    return {name: copied(getattr(patcher, name)) for name in names}


def test_observing_leaves_the_model_as_it_is():
    model = random_flux()
    model.set_model_attn1_patch(lambda q, k, v, pe, attn_mask, extra_options: {})
    weights = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    plain = sample(model)
    before = state(model)
    watched = observed(model)
    assert state(model) == before
    own = state(watched)
    assert own != before
    sample(watched, cfg=3.0)
    assert state(model) == before
    assert state(watched) == own
    assert all(torch.equal(weights[name], weight) for name, weight in model.model.state_dict().items())
    assert torch.equal(sample(model), plain)


class Cancelled:
    """Raises what ComfyUI raises on Cancel."""

    def __init__(self, where: str) -> None:
        self.where, self.calls = where, 0

    def between_steps(self, step, x0, x, total):
        if step == 1:
            raise InterruptProcessingException

    def in_a_block(self, attn, extra_options):
        self.calls += 1
        if self.calls == 6:
            raise InterruptProcessingException
        return attn

    def sample(self, model: ModelPatcher) -> Tensor:
        if self.where == "between steps":
            return sample(model, steps=4, callback=self.between_steps)
        model = model.clone()
        model.set_model_attn1_output_patch(self.in_a_block)
        return sample(model, steps=4)


def recorders() -> int:
    gc.collect()
    return sum(type(o) is Recorder for o in gc.get_objects())


@pytest.mark.parametrize("where", ["between steps", "in a block"])
def test_a_cancelled_run_leaves_no_recording_and_no_trace(where):
    model = random_flux()
    plain = sample(model, steps=4)
    watched = observed(model)
    before, own, alive = state(model), state(watched), recorders()
    with pytest.raises(InterruptProcessingException):
        Cancelled(where).sample(watched)
    assert recorders() == alive
    assert state(model) == before
    assert state(watched) == own
    assert torch.equal(sample(model, steps=4), plain)
    again = sample(watched, steps=4)
    assert torch.equal(again, plain)
    assert recording(again).steps == (0, 1, 2, 3)


def test_cancel_works_while_the_concepts_are_computed(model, monkeypatch):
    """ComfyUI looks for a click on Cancel in every layer, so also in those that the concepts run through."""

    def cancelled(self, layer):
        comfy.model_management.interrupt_current_processing()
        return original(self, layer)

    original = flux1.TextStream.block
    monkeypatch.setattr(flux1.TextStream, "block", cancelled)
    with pytest.raises(InterruptProcessingException):
        sample(observed(model))


def test_a_model_of_another_family_runs_as_it_is_under_the_same_wrappers(model):
    """DualModelGuider calls the negative's model with the positive's wrappers."""

    class Chroma:
        def forward(self, x, timestep, context, guidance, control=None, transformer_options={}, **kwargs):  # noqa: B006
            executor = WrapperExecutor.new_class_executor(
                self._forward, self, get_all_wrappers(WrappersMP.DIFFUSION_MODEL, transformer_options)
            )
            return executor.execute(x, timestep, context, guidance, control, transformer_options, **kwargs)

        def _forward(self, x, timestep, context, guidance, control, transformer_options):
            return x + guidance

    wrappers = {"wrappers": observed(model).wrappers}
    x = torch.ones(1, 16, 8, 8)
    assert torch.equal(Chroma().forward(x, x, x, torch.ones(1), None, wrappers), x + 1)


FAILURES = {
    "entering the stream": (flux1.TextStream, "embed"),
    "text weights": (flux1.TextStream, "block"),
    "concepts' attention": (ConceptStream, "attend"),
    "scores": (ConceptStream, "score"),
    "keeping them": (Recorder, "add"),
    "bringing them together": (Recorder, "_merged"),
    "grid": (Family, "grid"),
}


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("where", FAILURES)
def test_a_failure_to_record_never_loses_the_image(model, monkeypatch, where, cfg):
    plain = sample(model, cfg=cfg)
    watched = observed(model)
    monkeypatch.setattr(*FAILURES[where], failing)
    samples = sample(watched, cfg=cfg)
    assert torch.equal(samples, plain)
    for _ in range(2):
        with pytest.raises(RecordingError, match=r"image is not affected.*the concepts got lost"):
            recording(samples)
    monkeypatch.undo()
    assert len(recording(sample(watched, cfg=cfg)).sigmas) == 3


def test_a_failure_in_a_later_block_never_loses_the_image(model, monkeypatch):
    def block(self, layer):
        return failing() if layer == 2 else original(self, layer)

    original = flux1.TextStream.block
    monkeypatch.setattr(flux1.TextStream, "block", block)
    samples = sample(observed(model))
    assert torch.equal(samples, sample(model))
    with pytest.raises(RecordingError, match="the concepts got lost"):
        recording(samples)


def test_a_model_in_bfloat16_gives_nearly_the_same_scores():
    """bfloat16 keeps 8 bits: each of the few dozen roundings on the way to a score is off by up to 1/512."""
    full = random_flux()
    weights = full.model.diffusion_model.state_dict()
    half = comfy.sd.load_diffusion_model_state_dict(
        {name: weight.bfloat16() for name, weight in weights.items()},
        model_options={"dtype": torch.bfloat16},
    )
    assert half.model_dtype() == torch.bfloat16
    samples = sample(observed(half), cfg=3.0)
    assert torch.equal(samples, sample(half, cfg=3.0))
    expected = first_scores(sample(observed(full), cfg=3.0))
    assert first_scores(samples).dtype == torch.float32
    assert 0 < relative(first_scores(samples), expected) < 0.02


def test_nothing_that_the_run_is_given_changes(model):
    positive = conditioning(2, reference_latents=[picture(1, 6, 6)])
    negative, latent, mask, tokens = conditioning(3), picture(2), noise_mask(12, 16), concept_tokens()
    given = [positive[0][0], positive[0][1]["pooled_output"], positive[0][1]["reference_latents"][0]]
    given += [negative[0][0], negative[0][1]["pooled_output"], latent, mask, *tokens.sequences]
    before = [tensor.clone() for tensor in given]
    names = [sorted(positive[0][1]), sorted(negative[0][1])]
    watched = observe(model, WhatToRecord(CONCEPTS, tokens))
    sample(
        watched, latent=latent, positive=positive, negative=negative, noise_mask=mask, cfg=3.0, denoise=0.7
    )
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, before, strict=True))
    assert names == [sorted(positive[0][1]), sorted(negative[0][1])]


def test_the_hooks_are_gone_when_the_run_is_over(model):
    watched = observed(model)
    sample(watched)
    assert "patches" not in watched.model_options["transformer_options"]
    assert KEY not in watched.model_options["transformer_options"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.diffusion_model.modules())
