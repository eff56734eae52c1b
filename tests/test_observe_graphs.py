"""Observing in a graph: several samplers, and other nodes that patch the model."""

from __future__ import annotations

import gc
import logging
import weakref
from functools import partial
from unittest.mock import patch

import comfy.controlnet
import comfy.hooks
import comfy.model_management
import comfy.sd
import comfy_extras.nodes_easycache as easycache
import comfy_extras.nodes_nag as nag
import comfy_extras.nodes_perpneg as perpneg
import comfy_extras.nodes_slg as slg
import pytest
import torch
from comfy.ldm.flux.layers import timestep_embedding
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

import nodes
from concept_attention.core.architectures import flux1
from concept_attention.core.concepts import Concepts
from concept_attention.core.observing.latents import recording_of
from concept_attention.core.observing.observe import WhatToRecord, observe
from concept_attention.core.observing.readers.stream import SPACES
from concept_attention.core.observing.recording import RecordingError
from observing import (
    GUIDERS,
    TOLERANCE,
    empty,
    failing,
    first_scores,
    observed,
    recording,
    relative,
    sample_custom_advanced,
    watch_evaluations,
    zeros_by_function_wrapper,
)
from tiny_flux import CONCEPTS, concept_tokens, conditioning, random_flux, sample


@pytest.fixture(scope="module")
def model() -> ModelPatcher:
    with torch.inference_mode():
        return random_flux()


def test_two_samplers_on_one_model_have_recordings_of_their_own(model):
    shared = observed(model)
    one = sample(shared, seed=1, steps=2)
    two = sample(shared, seed=2, steps=3, latent=empty(2))
    assert len(recording(one).sigmas) == 2
    assert recording(one).scores["output"][0].shape[1] == 1
    assert torch.equal(first_scores(one), first_scores(sample(shared, seed=1, steps=2)))
    assert len(recording(two).sigmas) == 3
    assert recording(two).scores["output"][0].shape[1] == 2


def test_the_recording_is_found_through_a_copy_of_the_latent(model):
    (latent,) = nodes.common_ksampler(
        observed(model), 1, 2, 1.0, "euler", "simple", conditioning(2), conditioning(3), {"samples": empty()}
    )
    assert recording_of({**latent, "noise_mask": None}) is recording_of(latent)


def test_a_recording_lives_as_long_as_its_latent(model):
    samples = sample(observed(model))
    found = weakref.ref(recording(samples))
    gc.collect()
    assert found() is recording(samples)
    del samples
    gc.collect()
    assert found() is None


@pytest.fixture
def _no_logs():
    """pytest keeps what is logged, and with a traceback all that its frames hold."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("_no_logs")
@pytest.mark.parametrize("kind", ["failed", "never ran"])
def test_the_reason_for_a_missing_recording_lives_as_long_as_its_latent(model, monkeypatch, kind):
    broken = model.clone()
    if kind == "failed":
        monkeypatch.setattr(flux1.TextStream, "block", failing)
    else:
        zeros_by_function_wrapper(broken)
    samples = sample(observed(broken))
    died = weakref.ref(samples)
    with pytest.raises(RecordingError):
        recording(samples)
    del samples
    gc.collect()
    assert died() is None


def test_with_fp16_intermediates_both_kinds_of_samplers_are_recorded(model, monkeypatch):
    """The option makes a copy of what KSampler returns, after the run; not of what custom samplers do."""
    monkeypatch.setattr(comfy.model_management, "intermediate_dtype", lambda: torch.float16)
    watched = observed(model)
    plain, ours = sample(model), sample(watched)
    assert ours.dtype == torch.float16
    assert torch.equal(plain, ours)
    assert len(recording(ours).sigmas) == 3
    plain, ours = (
        sample_custom_advanced(GUIDERS["BasicGuider"](m).result[0])[0] for m in (model, observed(model))
    )
    assert plain["samples"].dtype == ours["samples"].dtype
    assert torch.equal(plain["samples"], ours["samples"])
    assert len(recording_of(ours).sigmas) == 3


def test_observing_an_observed_model_replaces_its_concepts_and_says_so(model, monkeypatch, caplog):
    streams = []

    class TextStream(flux1.TextStream):
        def __init__(self, *args):
            streams.append(self)
            super().__init__(*args)

    first = observed(model)
    assert not caplog.text
    second = observe(first, WhatToRecord(Concepts(("rock", "tree")), concept_tokens(seed=9, count=2)))
    assert "Only the concepts of the last node count: rock, tree" in caplog.text
    monkeypatch.setattr(flux1, "TextStream", TextStream)
    samples = sample(second)
    assert len(streams) == 3
    assert recording(samples).concepts.names == ("rock", "tree")
    assert first_scores(samples).shape[2] == 2
    assert recording(sample(first)).concepts == CONCEPTS
    assert torch.equal(samples, sample(model))


def with_lora(model: ModelPatcher, loader: str) -> ModelPatcher:
    """A LoRA on both sides' weights, by Load LoRA or straight by the patcher."""
    g = torch.Generator().manual_seed(11)
    names = [f"double_blocks.{i}.{side}_attn.qkv" for i in (0, 1) for side in ("img", "txt")]
    if loader == "add_patches":
        patched = model.clone()
        key = "diffusion_model.{}.weight"
        patched.add_patches({key.format(n): (0.05 * torch.randn(384, 128, generator=g),) for n in names}, 1.0)
        return patched
    lora = {}
    for name in names:
        lora[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(4, 128, generator=g)
        lora[f"diffusion_model.{name}.lora_B.weight"] = 0.05 * torch.randn(384, 4, generator=g)
    return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]


@pytest.mark.parametrize("loader", ["add_patches", "load_lora_for_models"])
def test_a_lora_counts_before_and_after_observing(model, loader):
    plain = sample(with_lora(model, loader))
    before = sample(observed(with_lora(model, loader)))
    after = sample(with_lora(observed(model), loader))
    without = sample(observed(model))
    assert torch.equal(before, plain)
    assert torch.equal(after, plain)
    assert torch.equal(without, sample(model))
    assert not torch.equal(plain, without)
    for one, other in zip(recording(before).scores["output"], recording(after).scores["output"], strict=True):
        assert torch.equal(one, other)
    assert relative(first_scores(before), first_scores(without)) > 0.01


def test_a_lora_that_a_conditioning_carries(model):
    """Create Hook LoRA and Set CLIP Hooks: other weights for one conditioning than for the next."""
    g = torch.Generator().manual_seed(11)
    name = "diffusion_model.double_blocks.0.txt_attn.qkv"
    lora = {f"{name}.lora_A.weight": torch.randn(4, 128, generator=g)}
    lora[f"{name}.lora_B.weight"] = 0.05 * torch.randn(384, 4, generator=g)
    hooks = comfy.hooks.create_hook_lora(lora, 1.0, 0.0)
    run = {"positive": comfy.hooks.set_hooks_for_conditioning(conditioning(2), hooks), "cfg": 3.0}
    ours, expected = sample(observed(model), **run), sample(model, **run)
    assert torch.equal(ours, expected)
    loaded = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]
    assert relative(first_scores(ours), first_scores(sample(observed(loaded)))) <= TOLERANCE
    assert relative(first_scores(ours), first_scores(sample(observed(model)))) > 0.01


class OtherNode:
    """A node that patches the MODEL it is given in one of ComfyUI's ways, and counts its calls."""

    def __init__(self, kind: str) -> None:
        self.kind, self.calls = kind, 0

    def __call__(self, model: ModelPatcher) -> ModelPatcher:
        patched = model.clone()
        getattr(self, self.kind)(patched)
        return patched

    def attn1_patch(self, model):
        def patch(q, k, v, pe, attn_mask, extra_options):
            self.calls += 1
            return {"k": k * 1.1, "v": v * 1.1}

        model.set_model_attn1_patch(patch)

    def attn1_output_patch(self, model):
        def patch(attn, extra_options):
            self.calls += 1
            attn *= 1.1  # in place, as NAG does
            return attn

        model.set_model_attn1_output_patch(patch)

    def double_block(self, model):
        def replace(args, extra):
            self.calls += 1
            out = extra["original_block"](args)
            return {"img": out["img"] * 1.1, "txt": out["txt"]}

        for layer in range(3):
            model.set_model_patch_replace(replace, "dit", "double_block", layer)

    def optimized_attention_override(self, model):
        def override(func, *args, **kwargs):
            self.calls += 1
            return func(*args, **kwargs) * 1.1

        model.model_options["transformer_options"]["optimized_attention_override"] = override

    def model_function_wrapper(self, model):
        def wrapper(apply_model, args):
            self.calls += 1
            return apply_model(args["input"], args["timestep"], **args["c"]) * 1.1

        model.set_model_unet_function_wrapper(wrapper)

    def diffusion_model_wrapper(self, model):
        def wrapper(executor, *args, **kwargs):
            self.calls += 1
            return executor(*args, **kwargs) * 1.1

        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "other", wrapper)

    def pre_cfg_function(self, model):
        def function(args):
            self.calls += 1
            return [out * 1.1 for out in args["conds_out"]]

        model.set_model_sampler_pre_cfg_function(function)

    def cfg_function(self, model):
        def function(args):
            self.calls += 1
            return args["uncond"] + 1.1 * (args["cond"] - args["uncond"])

        model.set_model_sampler_cfg_function(function)


OTHER_NODES = [name for name in vars(OtherNode) if not name.startswith("_")]


@pytest.mark.parametrize("kind", OTHER_NODES)
def test_patches_of_other_nodes_are_kept(model, kind):
    node = OtherNode(kind)
    plain = sample(node(model), cfg=3.0)
    calls = node.calls
    assert calls > 0
    assert not torch.equal(plain, sample(model, cfg=3.0))
    recordings = []
    for first_node in (True, False):
        node = OtherNode(kind)
        samples = sample(observed(node(model)) if first_node else node(observed(model)), cfg=3.0)
        assert torch.equal(samples, plain)
        assert node.calls == calls
        recordings.append(recording(samples))
    for scores in zip(*(r.scores["output"] for r in recordings), strict=True):
        assert torch.equal(*scores)
    assert len(recordings[0].sigmas) == 3


def test_concepts_meet_the_keys_and_values_that_other_nodes_leave(model):
    node = OtherNode("attn1_patch")  # v * 1.1
    ours, without = (
        recording(sample(m, steps=1))
        for m in (observed(node(model), spaces=SPACES), observed(model, spaces=SPACES))
    )
    values, expected = ours.scores["value"][0], without.scores["value"][0]
    assert relative(values[0], expected[0] * 1.1) <= TOLERANCE


def test_scores_come_from_the_attention_before_guidance_nodes_edit_it(model):
    node = OtherNode("attn1_output_patch")
    ours = first_scores(sample(observed(node(model))))
    assert torch.equal(ours[0], first_scores(sample(observed(model)))[0])


GUIDANCE_NODES = {
    "NAGuidance": lambda m: nag.NAGuidance.execute(m, 5.0, 0.5, 1.5),
    "SkipLayerGuidanceDiT, first block": lambda m: slg.SkipLayerGuidanceDiT.execute(
        m, 3.0, 0.0, 1.0, "0", "0"
    ),
    "SkipLayerGuidanceDiT, last block": lambda m: slg.SkipLayerGuidanceDiT.execute(m, 3.0, 0.0, 1.0, "2", ""),
    "SkipLayerGuidanceDiT, single blocks": lambda m: slg.SkipLayerGuidanceDiT.execute(
        m, 3.0, 0.0, 1.0, "", "0"
    ),
    "SkipLayerGuidanceDiTSimple": lambda m: slg.SkipLayerGuidanceDiTSimple.execute(m, 0.0, 1.0, "1", "0"),
    "PerpNeg": lambda m: perpneg.PerpNeg.execute(m, conditioning(4), 1.0),
}


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("name", GUIDANCE_NODES)
def test_guidance_nodes_keep_their_image_and_add_no_entries(model, name, cfg):
    def guided(model):
        return GUIDANCE_NODES[name](model).result[0]

    plain = sample(guided(model), cfg=cfg)
    alone = first_scores(sample(observed(model)))
    for patched in (observed(guided(model)), guided(observed(model))):
        samples = sample(patched, cfg=cfg)
        assert torch.equal(samples, plain)
        assert recording(samples).steps == (0, 1, 2)
        # NAG changes the image from the first block on, so what later blocks see of it too.
        layers = slice(0, 1) if name == "NAGuidance" else slice(None)
        assert relative(first_scores(samples)[layers], alone[layers]) <= TOLERANCE


CACHES = {
    "EasyCache": lambda m: easycache.EasyCacheNode.execute(m, 0.9, 0.0, 1.0, False),
    "LazyCache": lambda m: easycache.LazyCacheNode.execute(m, 0.9, 0.0, 1.0, False),
}


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("name", CACHES)
def test_evaluations_that_a_cache_skips_are_absent(model, name, cfg):
    def cached(model):
        return CACHES[name](model).result[0]

    run = {"steps": 8, "cfg": cfg}
    counted = model.clone()
    sigmas = watch_evaluations(counted)
    plain = sample(cached(counted), **run)
    assert 1 < len(sigmas) < 8
    for patched in (observed(cached(model)), cached(observed(model))):
        samples = sample(patched, **run)
        assert torch.equal(samples, plain)
        assert recording(samples).sigmas == pytest.approx(sigmas)


def test_each_of_two_stages_has_its_own_part_of_the_recording(model):
    def stages(model):
        run = ("euler", "simple", conditioning(2), conditioning(3))
        stage = nodes.KSamplerAdvanced().sample
        (first,) = stage(model, "enable", 1, 4, 3.0, *run, {"samples": empty()}, 0, 2, "enable")
        (second,) = stage(model, "disable", 1, 4, 3.0, *run, first, 2, 10000, "disable")
        return first, second

    plain, ours = stages(model), stages(observed(model))
    for expected, found in zip(plain, ours, strict=True):
        assert torch.equal(expected["samples"], found["samples"])
    first, second = map(recording_of, ours)
    whole = recording(sample(observed(model), steps=4, cfg=3.0))
    assert first.sigmas + second.sigmas == whole.sigmas
    assert relative(second.scores["output"][1], whole.scores["output"][3]) <= TOLERANCE


class Residuals(comfy.controlnet.ControlBase):
    """A ControlNet for Flux reduced to what it adds after each block."""

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        tokens = x_noisy.shape[-2] * x_noisy.shape[-1] // 4
        added = torch.randn(1, tokens, 128, generator=torch.Generator().manual_seed(12))
        return {"input": [added] * 2, "output": [added]}

    def copy(self):
        return self


def test_a_controlnet_works_and_counts_from_the_block_after_its_residual(model):
    run = {"positive": conditioning(2, control=Residuals(), control_apply_to_uncond=True), "cfg": 3.0}
    samples = sample(observed(model), **run)
    assert torch.equal(samples, sample(model, **run))
    ours, without = first_scores(samples), first_scores(sample(observed(model), cfg=3.0))
    assert relative(ours[0], without[0]) <= TOLERANCE  # the residual comes after the block
    assert relative(ours[1], without[1]) > 0.01


class BlockCache:
    """A node like TeaCache: it puts a forward pass of its own in the model's place, which calls the blocks
    without their options and skips them in every other evaluation."""

    def __init__(self) -> None:
        self.evaluations, self.residual = 0, None

    def __call__(self, model: ModelPatcher) -> ModelPatcher:
        cached, flux = model.clone(), model.get_model_object("diffusion_model")

        def wrapper(apply_model, args):
            with patch.object(flux, "forward_orig", partial(self.forward, flux)):
                return apply_model(args["input"], args["timestep"], **args["c"])

        cached.set_model_unet_function_wrapper(wrapper)
        return cached

    def forward(self, flux, img, img_ids, txt, txt_ids, timesteps, y, guidance=None, *args, **kwargs):
        img, txt = flux.img_in(img), flux.txt_in(txt)
        vec = flux.time_in(timestep_embedding(timesteps, 256)) + flux.vector_in(y)
        vec = vec + flux.guidance_in(timestep_embedding(guidance, 256))
        pe = flux.pe_embedder(torch.cat((txt_ids, img_ids), dim=1))
        if self.evaluations % 2 == 0:
            before = img.clone()
            for block in flux.double_blocks:
                img, txt = block(img=img, txt=txt, vec=vec, pe=pe, attn_mask=None)
            both = torch.cat((txt, img), 1)
            for block in flux.single_blocks:
                both = block(both, vec=vec, pe=pe, attn_mask=None)
            self.residual = both[:, txt.shape[1] :] - before
            img = before
        self.evaluations += 1
        return flux.final_layer(img + self.residual, vec)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_evaluations_that_a_forward_pass_of_another_node_runs_are_recorded(model, cfg):
    run = {"steps": 4, "cfg": cfg}
    plain = sample(BlockCache()(model), **run)
    assert not torch.equal(plain, sample(model, **run))
    expected = first_scores(sample(observed(model), **run))
    for patched in (observed(BlockCache()(model)), BlockCache()(observed(model))):
        samples = sample(patched, **run)
        assert torch.equal(samples, plain)
        assert recording(samples).steps == (0, 2)
        assert relative(first_scores(samples), expected) <= TOLERANCE
    blocks = model.get_model_object("diffusion_model").double_blocks
    assert not any(block._forward_pre_hooks for block in blocks)
