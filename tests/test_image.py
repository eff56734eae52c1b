"""Existing images: one evaluation per noise level and sample, which ends when all is recorded."""

from __future__ import annotations

import gc
import io
import json
import math
import weakref
from collections import Counter
from pathlib import Path

import comfy.controlnet
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import comfy_extras.nodes_easycache as easycache
import comfy_extras.nodes_model_advanced as model_advanced
import comfy_extras.nodes_nag as nag
import comfy_extras.nodes_slg as slg
import comfy_extras.nodes_torch_compile as torch_compile
import numpy as np
import pytest
import torch
from comfy.model_base import BaseModel
from comfy.model_management import InterruptProcessingException
from comfy.model_patcher import ModelPatcher
from PIL import Image
from torch import Tensor

import comfyui
import workflow
from concept_attention.core.architectures import flux1
from concept_attention.core.concepts import Concepts, encode_concepts
from concept_attention.core.observing.image import (
    encode_images,
    observe_image,
    parse_levels,
    patch_pixels,
    step_levels,
)
from concept_attention.core.observing.latents import recording_of
from concept_attention.core.observing.observe import KEY, WhatToRecord, observe
from concept_attention.core.observing.readers.stream import SPACES, ConceptStream
from concept_attention.core.observing.recorder import Recorder
from concept_attention.core.observing.recording import Recording, RecordingError
from concept_attention.core.reading.maps import concept_maps, heatmaps
from concept_attention.nodes.concept_attention_image import ConceptAttentionImage
from concept_attention.nodes.concept_mask import ConceptMask
from concept_attention.nodes.concept_saliency import ConceptSaliency
from scenes import HELD_OUT, make_scene
from text_encoder import WIDTH, load_text_encoder
from tiny_flux import CONCEPTS, concept_tokens, conditioning, random_clip, random_flux, sample

DEMO = Path(__file__).resolve().parent.parent / "demo"
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model() -> ModelPatcher:
    with torch.inference_mode():
        return random_flux()


@pytest.fixture(scope="module")
def vae() -> comfy.sd.VAE:
    with torch.inference_mode():
        return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(DEMO / "vae.safetensors")))


def latents(batch: int = 1, height: int = 12, width: int = 16) -> Tensor:
    return torch.randn(batch, 16, height, width, generator=torch.Generator().manual_seed(9))


def what(**choices) -> WhatToRecord:
    return WhatToRecord(CONCEPTS, concept_tokens(), **choices)


def look(
    model: ModelPatcher, latent: Tensor | None = None, positive=None, recorded=None, **options
) -> Recording:
    latent = latents() if latent is None else latent
    options.setdefault("image_size", (latent.shape[-2] * 8, latent.shape[-1] * 8))
    positive = conditioning(2) if positive is None else positive
    return observe_image(model, recorded or what(), latent, positive, **options)


def sampled(model: ModelPatcher, level: float, seed: int = 0, latent: Tensor | None = None, positive=None):
    """The first evaluation, (L, B, K, h, w), of ordinary sampling from this noise level to 0."""
    latent = latents() if latent is None else latent
    guider = comfy.samplers.CFGGuider(observe(model, what(layers=range(3))))
    guider.inner_set_conds({"positive": conditioning(2) if positive is None else positive})
    noise = comfy.sample.prepare_noise(latent, seed)
    euler = comfy.samplers.sampler_object("euler")
    samples = guider.sample(noise, latent, euler, torch.tensor([level, 0.0]), disable_pbar=True, seed=seed)
    return recording_of({"samples": samples}).scores["output"][0]


def relative(ours: Tensor, expected: Tensor) -> float:
    assert ours.shape == expected.shape
    return float((ours - expected).norm() / expected.norm())


def equal(a: Recording, b: Recording) -> bool:
    return all(
        torch.equal(x, y)
        for space in (*a.scores, *b.scores)
        for x, y in zip(a.scores[space], b.scores[space], strict=True)
    )


class Calls(Counter):
    """How often each module of the diffusion model runs while this is entered."""

    def __init__(self, model: ModelPatcher) -> None:
        super().__init__()
        self._modules = dict(model.model.diffusion_model.named_modules())

    def __enter__(self) -> Calls:
        self._handles = [
            module.register_forward_hook(lambda *_, name=name: self.update([name]))
            for name, module in self._modules.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


@pytest.mark.parametrize("latent", [latents(), latents(3), latents(1, 15, 17)], ids=["1", "3", "odd"])
def test_it_is_the_first_evaluation_of_sampling_from_that_noise(model, latent):
    found = look(model, latent, levels=(0.3, 0.8), seed=4)
    assert found.sigmas == (0.8, 0.3)
    assert found.steps == (0, 1)
    assert found.layers == found.default_layers == (0, 1, 2)
    for level, scores in zip(found.sigmas, found.scores["output"], strict=True):
        assert torch.equal(scores, sampled(model, level, 4, latent))


def test_it_is_that_of_a_model_without_guidance_too():
    schnell = random_flux(guidance=False)
    assert torch.equal(look(schnell).scores["output"][0], sampled(schnell, 0.5))


def test_the_default_layers_are_recorded():
    assert look(random_flux(depth=5)).layers == (1, 2, 3, 4)


def test_every_space_can_be_recorded(model):
    found = look(model, recorded=what(spaces=SPACES))
    assert tuple(found.scores) == SPACES
    assert all(len(s) == 1 and s[0].isfinite().all() and s[0].std() > 0 for s in found.scores.values())
    whole = look(model)
    assert torch.equal(found.scores["output"][0], whole.scores["output"][0])


@pytest.mark.parametrize("attend", ["attend_image", "attend_concepts"])
def test_the_attention_of_the_concepts_can_be_cut(model, attend):
    cut = look(model, recorded=what(**{attend: False}))
    assert relative(cut.scores["output"][0], look(model).scores["output"][0]) > 0.01


def test_one_seed_gives_the_same_scores_to_the_last_bit(model):
    run = {"latent": latents(2), "samples": 2, "levels": (0.4, 0.6)}
    assert equal(look(model, seed=7, **run), look(model, seed=7, **run))
    assert not equal(look(model, seed=7, **run), look(model, seed=8, **run))


def test_sample_i_is_the_noise_of_seed_plus_i(model):
    found = look(model, seed=7, samples=3, levels=(0.4, 0.6))
    assert found.sigmas == (0.6, 0.6, 0.6, 0.4, 0.4, 0.4)
    assert found.steps == (0, 0, 0, 1, 1, 1)
    for i, scores in enumerate(found.scores["output"]):
        assert relative(scores, sampled(model, found.sigmas[i], 7 + i % 3)) <= TOLERANCE


def test_the_seed_after_the_last_is_the_first(model):
    found = look(model, seed=2**64 - 1, samples=2)
    assert relative(found.scores["output"][1], sampled(model, 0.5, 0)) <= TOLERANCE


def test_a_batch_is_its_images_one_by_one(model):
    noise = torch.randn(2, 3, 16, 12, 16, generator=torch.Generator().manual_seed(3))
    batch = look(model, latents(3), noise=noise)
    for i in range(3):
        alone = look(model, latents(3)[i : i + 1], noise=noise[:, i : i + 1])
        for scores, expected in zip(batch.scores["output"], alone.scores["output"], strict=True):
            assert relative(scores[:, i : i + 1], expected) <= TOLERANCE


def test_an_image_that_is_no_number_leaves_the_others_their_maps(model):
    batch = latents(3)
    clean = look(model, batch, levels=(0.3, 0.6))
    batch[1, 0, 0, 0] = torch.nan
    found = look(model, batch, levels=(0.3, 0.6))
    assert found.broken == {1: (0, 0)}
    maps, expected = concept_maps(found).values, concept_maps(clean).values
    assert (maps[1] == 0).all()
    assert torch.equal(maps[[0, 2]], expected[[0, 2]])
    with pytest.raises(RecordingError, match=r"NaN or infinite values in step 0.*\(image 1 of 1\)"):
        look(model, batch[1:2])


@pytest.mark.parametrize("average", ["after softmax", "before softmax"])
def test_a_look_that_gives_no_number_is_left_out_of_the_mean(model, average, caplog):
    noise = torch.randn(3, 2, 16, 12, 16, generator=torch.Generator().manual_seed(1))
    expected = look(model, latents(2), noise=noise[[0, 2]], average=average)
    noise[1, 1, 0, 0, 0] = torch.nan
    found = look(model, latents(2), noise=noise, average=average)
    assert found.broken == {}
    assert "in 1 of 3 looks at image 2" in caplog.text
    ours, without = (concept_maps(each).values[1] for each in (found, expected))
    assert torch.allclose(ours, without, atol=1e-6)


def test_no_noise_shows_the_image_itself(model):
    a, b = (look(model, levels=(0,), seed=seed) for seed in (1, 2))
    assert equal(a, b)
    assert relative(look(model, levels=(1,)).scores["output"][0], look(model).scores["output"][0]) > 0.01


def test_the_average_is_taken_after_or_before_the_softmax(model):
    run = {"latent": latents(2), "levels": (0.3, 0.6), "samples": 2, "seed": 1}
    after, before = look(model, **run), look(model, **run, average="before softmax")
    scores = torch.stack(after.scores["output"])
    assert torch.allclose(heatmaps(after), scores.softmax(3).mean((0, 1)), atol=1e-6)
    assert before.sigmas == (pytest.approx(0.45),)
    assert before.steps == (0,)
    assert torch.allclose(heatmaps(before), scores.mean(0).softmax(2).mean(0), atol=1e-6)
    assert not torch.allclose(heatmaps(before), heatmaps(after), atol=1e-2)


def test_without_the_pooled_prompt_the_image_is_given_zeros(model):
    zeros = conditioning(2, pooled_output=torch.zeros(1, 16))
    ours = look(model, pooled_prompt=False)
    assert torch.equal(ours.scores["output"][0], sampled(model, 0.5, positive=zeros))
    assert relative(ours.scores["output"][0], look(model).scores["output"][0]) > 1e-3


@pytest.mark.parametrize("size", [(96, 128), (90, 115), (81, 113)])
def test_maps_cover_the_image_and_not_its_padding(model, size):
    maps = concept_maps(look(model, image_size=size))
    assert maps.values.shape[-2:] == (6, 8)
    whole = maps.at_size(*size, mode="nearest")
    assert whole.shape[-2:] == size
    assert torch.equal(whole[..., 16:32, 32:48], maps.values[..., 1:2, 2:3].expand(-1, -1, 16, 16))
    assert torch.equal(whole[..., -1, -1], maps.values[..., -1, -1])


@pytest.mark.parametrize("layers", [(0,), (0, 1), (2,)])
def test_nothing_runs_after_the_last_recorded_layer(model, layers):
    with Calls(model) as calls:
        look(model, latents(2), recorded=what(layers=layers), levels=(0.3, 0.6), samples=2)
    last = max(layers)
    assert calls["img_in"] == 2
    for block in range(last + 1):
        assert calls[f"double_blocks.{block}.img_attn.qkv"] == 2
        assert calls[f"double_blocks.{block}.img_mlp.0"] == (2 if block < last else 0)
    assert not calls[f"double_blocks.{last}.img_attn.proj"]
    assert not any(calls[f"double_blocks.{block}.img_attn.qkv"] for block in range(last + 1, 3))
    assert not any(calls[name] for name in calls if name.startswith(("single_blocks", "final_layer")))


def test_a_call_that_ends_early_gives_zeros_in_the_shape_of_the_latent(model, monkeypatch):
    """Also where the model takes more channels than it gives."""
    given = []
    original = BaseModel._apply_model

    def apply_model(self, x, *args, **kwargs):
        given.append(original(self, x, *args, **kwargs))
        assert given[-1].shape == x.shape
        return given[-1]

    monkeypatch.setattr(BaseModel, "_apply_model", apply_model)
    look(model)
    assert given


def test_a_sampler_still_runs_the_whole_model(model):
    with Calls(model) as calls:
        sample(observe(model, what(layers=(0,))), steps=1)
    assert calls["double_blocks.2"] == calls["single_blocks.0"] == calls["final_layer"] == 1


def test_passes_that_guidance_nodes_add_do_not_run(model):
    guided = slg.SkipLayerGuidanceDiT.execute(model, 3.0, 0.0, 1.0, "0", "0").result[0]
    with Calls(model) as calls:
        found = look(guided)
    assert calls["img_in"] == 1
    assert equal(found, look(model))


class Uneven(comfy.controlnet.ControlBase):
    """A ControlNet that adds noise as strong as its hint, one number for each image."""

    cleaned = 0

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        hint = self.cond_hint_original
        rows = hint[torch.arange(len(x_noisy)) % len(hint)].reshape(-1, 1, 1)
        added = torch.randn(1, 48, 128, generator=torch.Generator().manual_seed(12))
        return {"input": [rows * added] * 2, "output": []}

    def copy(self):
        copy = Uneven()
        self.copy_to(copy)
        return copy

    def cleanup(self):
        super().cleanup()
        Uneven.cleaned += 1


def test_a_controlnet_counts_and_is_cleaned_up(model):
    control, cleaned = Uneven(), Uneven.cleaned
    control.cond_hint_original = torch.tensor([0.7])
    ours = look(model, positive=conditioning(2, control=control)).scores["output"][0]
    assert Uneven.cleaned > cleaned
    assert relative(ours[:1], look(model).scores["output"][0][:1]) <= TOLERANCE
    assert relative(ours[1:], look(model).scores["output"][0][1:]) > 0.01


@pytest.mark.parametrize(
    "node",
    [
        lambda m: easycache.EasyCacheNode.execute(m, 0.9, 0.0, 1.0, False),
        lambda m: easycache.LazyCacheNode.execute(m, 0.9, 0.0, 1.0, False),
    ],
    ids=["EasyCache", "LazyCache"],
)
def test_no_cache_skips_a_noise_level(model, node):
    levels = [i / 10 for i in range(10)]
    assert equal(look(node(model).result[0], levels=levels), look(model, levels=levels))


def test_a_guidance_node_that_needs_a_negative_does_no_harm(model):
    guided = nag.NAGuidance.execute(model, 5.0, 0.5, 1.5).result[0]
    assert equal(look(guided), look(model))


def with_lora(model: ModelPatcher) -> ModelPatcher:
    g = torch.Generator().manual_seed(11)
    patched = model.clone()
    key = "diffusion_model.double_blocks.0.{}_attn.qkv.weight"
    patched.add_patches(
        {key.format(side): (0.05 * torch.randn(384, 128, generator=g),) for side in ("img", "txt")}, 1.0
    )
    return patched


def test_a_lora_counts(model):
    ours = look(with_lora(model))
    assert torch.equal(ours.scores["output"][0], sampled(with_lora(model), 0.5))
    assert relative(ours.scores["output"][0], look(model).scores["output"][0]) > 0.01


def test_patches_of_other_nodes_count(model):
    def patch(q, k, v, pe, attn_mask, extra_options):
        return {"v": v * 1.1}

    patched = model.clone()
    patched.set_model_attn1_patch(patch)
    ours = look(patched)
    assert torch.equal(ours.scores["output"][0], sampled(patched, 0.5))
    assert relative(ours.scores["output"][0], look(model).scores["output"][0]) > 0.01


def test_an_observer_of_the_model_has_no_part_in_it(model):
    heard = []
    others = WhatToRecord(Concepts(("other", "things")), concept_tokens(6, 2))
    watched = observe(model, others, listener=heard.append)
    assert equal(look(watched), look(model))
    assert not heard
    samples = sample(watched)
    assert recording_of({"samples": samples}).concepts.names == ("other", "things")


def test_a_compiled_model_is_looked_at_and_stays_usable():
    torch._dynamo.reset()
    model = random_flux(depth=1)
    compiled = torch_compile.TorchCompileModel.execute(model, "eager").result[0]
    before = sample(compiled, steps=2)
    expected = look(model).scores["output"][0]
    for _ in range(2):
        assert relative(look(compiled).scores["output"][0], expected) <= TOLERANCE
        assert torch.equal(sample(compiled, steps=2), before)
    torch._dynamo.reset()


def state(model: ModelPatcher) -> tuple:
    options = model.model_options["transformer_options"]
    wrappers = {kind: sorted(map(str, keys)) for kind, keys in model.wrappers.items()}
    return sorted(options), wrappers, KEY in options, str(model.patches_uuid)


def test_nothing_that_it_is_given_changes_and_sampling_stays_the_same():
    model = random_flux()
    weights = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    plain, before = sample(model), state(model)
    positive = conditioning(2, reference_latents=[latents(2, 6, 6)])
    latent, tokens = latents(2), concept_tokens()
    given = [latent, *tokens.sequences, positive[0][0], positive[0][1]["pooled_output"]]
    given += positive[0][1]["reference_latents"]
    copies, names = [tensor.clone() for tensor in given], sorted(positive[0][1])
    recorded = WhatToRecord(CONCEPTS, tokens)
    observe_image(model, recorded, latent, positive, image_size=(90, 128), samples=2, pooled_prompt=False)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, copies, strict=True))
    assert sorted(positive[0][1]) == names
    assert state(model) == before
    assert all(torch.equal(weights[name], weight) for name, weight in model.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.diffusion_model.modules())
    assert torch.equal(sample(model), plain)


def recorders() -> int:
    gc.collect()
    return sum(type(o) in (Recorder, Recording) for o in gc.get_objects())


@pytest.mark.parametrize("where", ["in a block", "between evaluations"])
def test_cancelling_half_way_leaves_nothing_behind(monkeypatch, where):
    model = random_flux()
    plain, expected = sample(model), look(model, levels=(0.3, 0.6))
    before, alive, calls = state(model), recorders(), 0

    def cancel(*args):
        nonlocal calls
        calls += 1
        if calls == 5:
            comfy.model_management.interrupt_current_processing()
            if where == "in a block":
                comfy.model_management.throw_exception_if_processing_interrupted()
        return original(*args)

    original = ConceptStream.score
    monkeypatch.setattr(ConceptStream, "score", cancel)
    with pytest.raises(InterruptProcessingException):
        look(model, levels=(0.1, 0.3, 0.6))
    monkeypatch.setattr(ConceptStream, "score", original)
    assert calls < 9
    assert recorders() == alive
    assert state(model) == before
    assert torch.equal(sample(model), plain)
    assert equal(look(model, levels=(0.3, 0.6)), expected)


def test_progress_goes_by_evaluations_and_reaches_the_end(model, monkeypatch):
    class ProgressBar:
        def __init__(self, total, node_id=None):
            self.total = total

        def update_absolute(self, value, *_):
            seen.append((value, self.total))

    seen = []
    monkeypatch.setattr(comfy.utils, "ProgressBar", ProgressBar)
    look(model, latents(2), levels=(0.3, 0.6), samples=2)
    assert seen == [(0, 8), (4, 8), (8, 8)]


def test_a_failure_while_recording_is_raised_as_it_is(model, monkeypatch):
    def fail(self, layer, image_out):
        raise ZeroDivisionError("of our own")

    monkeypatch.setattr(ConceptStream, "score", fail)
    with pytest.raises(ZeroDivisionError, match="of our own"):
        look(model)


def test_a_model_whose_blocks_are_skipped_says_so(model):
    skipping = model.clone()
    skipping.set_model_patch_replace(lambda args, extra: args, "dit", "double_block", 2)
    with pytest.raises(RecordingError, match="recorded nothing"):
        look(skipping)


def rows_seen(model: ModelPatcher) -> tuple[ModelPatcher, list[int]]:
    seen = []

    def patch(q, k, v, pe, attn_mask, extra_options):
        if extra_options["block_index"] == 0:
            seen.append(len(q))
        return {}

    patched = model.clone()
    patched.set_model_attn1_patch(patch)
    return patched, seen


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_rows_that_do_not_fit_into_memory_run_one_after_the_other(model, monkeypatch, rows):
    """Each image keeps its own prompt, reference and ControlNet hint."""
    control = Uneven()
    control.cond_hint_original = torch.tensor([0.3, 0.7, -0.2])
    prompts = conditioning(2, control=control, reference_latents=[latents(3, 6, 6)])
    g = torch.Generator().manual_seed(4)
    prompts[0][0] = torch.randn(3, 7, 32, generator=g)
    prompts[0][1]["pooled_output"] = torch.randn(3, 16, generator=g)
    run = {"latent": latents(3), "positive": prompts, "samples": 2, "levels": (0.3, 0.6)}

    patched, seen = rows_seen(model)
    whole = look(patched, **run)
    assert seen == [6, 6]
    seen.clear()
    needed = 1.5 * model.model.memory_required([1, 16, 12, 16])
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: rows * needed * 1.01)
    parts = look(patched, **run)
    assert seen == {1: [1] * 12, 2: [2] * 6, 4: [4, 4, 2, 2]}[rows]
    for scores, expected in zip(parts.scores["output"], whole.scores["output"], strict=True):
        assert relative(scores, expected) <= TOLERANCE


def test_out_of_memory_halves_the_rows(model):
    def patch(q, k, v, pe, attn_mask, extra_options):
        if len(q) > 2:
            raise torch.cuda.OutOfMemoryError("made up")
        return {}

    small = model.clone()
    small.set_model_attn1_patch(patch)
    patched, seen = rows_seen(small)
    ours = look(patched, latents(5), levels=(0.3, 0.6))
    assert seen == [2, 2, 2, 2, 1, 1]
    for scores, expected in zip(
        ours.scores["output"], look(model, latents(5), levels=(0.3, 0.6)).scores["output"], strict=True
    ):
        assert relative(scores, expected) <= TOLERANCE


def test_out_of_memory_with_one_row_is_raised(model):
    def patch(q, k, v, pe, attn_mask, extra_options):
        raise torch.cuda.OutOfMemoryError("made up")

    small = model.clone()
    small.set_model_attn1_patch(patch)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        look(small, latents(3))


class Encoder:
    """A VAE that keeps what it is given to encode."""

    def encode(self, pixels: Tensor) -> Tensor:
        self.pixels = pixels
        return torch.zeros(len(pixels), 16, pixels.shape[1] // 8, pixels.shape[2] // 8)


@pytest.mark.parametrize("size", [(96, 128), (100, 129), (1, 1), (15, 16)])
def test_images_of_any_size_are_padded_with_their_edge(size):
    images = torch.rand(2, *size, 4)
    encoder = Encoder()
    latent = encode_images(encoder, images, 16)
    height, width = (math.ceil(n / 16) * 16 for n in size)
    assert latent.shape == (2, 16, height // 8, width // 8)
    assert encoder.pixels.shape == (2, height, width, 3)
    assert torch.equal(encoder.pixels[:, : size[0], : size[1]], images[..., :3])
    assert torch.equal(encoder.pixels[:, -1, -1], images[:, -1, -1, :3])


def test_a_patch_of_flux_is_16_pixels(model):
    assert patch_pixels(model) == 16


@pytest.mark.parametrize(
    "text,levels",
    [("0.5", (0.5,)), ("0.3, 0.7", (0.7, 0.3)), (" 1 0\n.5,", (1, 0.5, 0)), ("0.5, 0.5", (0.5,))],
)
def test_levels_from_text_go_from_noise_to_image(text, levels):
    assert parse_levels(text) == levels


@pytest.mark.parametrize("text", ["", "half", "0.5; 0.7", "0,5x", "0,5", "0,1", "50%"])
def test_levels_that_cannot_be_read_are_an_error_with_an_example(text):
    with pytest.raises(ValueError, match=r'cannot be read.*"0.3, 0.5"'):
        parse_levels(text)


@pytest.mark.parametrize("text", ["1.01", "-0.1", "0.5, 50", "nan"])
def test_levels_outside_0_to_1_are_an_error(text):
    with pytest.raises(ValueError, match="outside 0"):
        parse_levels(text)


def reference_schedule(steps: int, shift: float | None) -> list[float]:
    """``get_schedule`` of the reference; ``shift`` is 1.15 for dev at 1024 x 1024, None for schnell."""
    t = [1 - i / steps for i in range(steps)]
    return t if shift is None else [math.exp(shift) / (math.exp(shift) + 1 / x - 1) for x in t]


@pytest.mark.parametrize("guidance,shift", [(True, 1.15), (False, None)], ids=["dev", "schnell"])
@pytest.mark.parametrize("steps", [1, 4, 50])
def test_steps_are_those_of_the_references_schedule(guidance, shift, steps):
    model = random_flux(guidance=guidance)
    every = ", ".join(map(str, range(steps)))
    assert step_levels(model, every, steps) == pytest.approx(reference_schedule(steps, shift))


def test_steps_follow_the_shift_that_the_model_was_given(model):
    shifted = model_advanced.ModelSamplingFlux().patch(model, 1.15, 0.5, 256, 256)[0]
    assert step_levels(shifted, "2", 4) == pytest.approx((reference_schedule(4, 0.5)[2],))


@pytest.mark.parametrize(
    "text,message",
    [("4", "0 .noise only. to 3"), ("1.5", "whole numbers"), ("", "read"), (5000 * "9", "cannot be read")],
)
def test_steps_that_do_not_exist_are_an_error(model, text, message):
    with pytest.raises(ValueError, match=message):
        step_levels(model, text, 4)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"levels": ()}, "No noise level"),
        ({"levels": (0.5, 1.5)}, "1.5 is outside"),
        ({"samples": 0}, "at least one noise sample"),
        ({"latent": latents()[:0]}, "no images"),
        ({"latent": torch.zeros(1, 4, 12, 16)}, r"\(1, 4, 12, 16\); this model takes \(images, 16,"),
        ({"latent": torch.zeros(1, 16, 1, 12, 16)}, "this model takes"),
        ({"image_size": (96, 96)}, "6 x 8 patches of 16 pixels.*96 x 96"),
        ({"image_size": (97, 128)}, "does not fill"),
        ({"average": "never"}, "never.*after softmax"),
        ({"recorded": what(layers=(3,))}, "layers 0 to 2"),
        ({"recorded": what(spaces=("outer",))}, "outer"),
    ],
)
def test_what_does_not_fit_is_an_error(model, options, message):
    with pytest.raises(ValueError, match=message):
        look(model, **options)


def test_an_empty_batch_is_an_error():
    with pytest.raises(ValueError, match=r"at least one image"):
        encode_images(Encoder(), torch.zeros(0, 64, 64, 3), 16)


def test_a_model_of_another_family_is_an_error(model):
    other = model.clone()
    other.add_object_patch("diffusion_model", torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="does not support this model"):
        look(other)


def node(model, clip, vae, image, concepts="cat, ball", **widgets) -> dict:
    """The LATENT of Concept Attention (Image) with its default widgets."""
    defaults = {
        "background": "background",
        "prompt": "",
        "noise": {"noise": "level", "levels": "0.5"},
        "samples": 1,
        "seed": 0,
        "token_pooling": "mean of tokens",
        "record_layers": "default",
        "record_cross_attention": False,
        "record_value": False,
        "average": "after softmax",
        "guidance": 3.5,
        "pooled_prompt": True,
    }
    return ConceptAttentionImage.execute(model, clip, vae, image, concepts, **{**defaults, **widgets}).result[
        0
    ]


def test_the_latent_is_the_encoded_image_and_keeps_the_recording(model, vae):
    image = torch.rand(2, 60, 90, 3)
    latent = node(model, random_clip(), vae, image, noise={"noise": "step", "steps": "1, 2", "of": 4})
    assert torch.equal(latent["samples"], encode_images(vae, image, 16))
    found = recording_of(latent)
    assert found.sigmas == step_levels(model, "1, 2", 4)
    maps, masks, heatmaps = ConceptSaliency.execute(
        dict(latent), "output", "default", 0, 10000, True, 1.0
    ).result
    assert masks.shape == (4, 60, 90)
    assert heatmaps.shape == (4, 60, 90, 3)
    cut = {
        "soft": False,
        "fill_holes": False,
        "smallest_area": 0.0,
        "grow": 0,
        "feather": 0.0,
        "invert": False,
    }
    assert ConceptMask.execute(maps, "ball", {"method": "argmax"}, **cut).result[0].shape == (2, 60, 90)

    second = recording_of({"samples": latent["samples"][1:].clone()})
    for ours, both in zip(second.scores["output"], found.scores["output"], strict=True):
        assert torch.equal(ours, both[:, 1:])

    recording = weakref.ref(found)
    del found, latent, maps
    gc.collect()
    assert recording() is None


def test_widgets_reach_the_model(model, vae):
    image, clip = torch.rand(1, 48, 64, 3), random_clip()
    plain = recording_of(node(model, clip, vae, image, prompt="a cat"))
    assert plain.layers == (0, 1, 2)
    for widgets in (
        {"prompt": "a dog"},
        {"prompt": "a cat", "guidance": 0.0},
        {"prompt": "a cat", "pooled_prompt": False},
        {"prompt": "a cat", "seed": 1},
        {"prompt": "a cat", "noise": {"noise": "level", "levels": "0.4"}},
        {"prompt": "a cat", "concepts": "hot air balloon, ball"},
    ):
        assert not equal(recording_of(node(model, clip, vae, image, **widgets)), plain)
    more = {"record_cross_attention": True, "record_value": True, "record_layers": "0, 1", "samples": 2}
    found = recording_of(node(model, clip, vae, image, **more, average="before softmax"))
    assert tuple(found.scores) == ("output", "cross-attention", "value")
    assert found.layers == (0, 1)
    assert len(found.sigmas) == 1


def test_no_concepts_are_an_error_before_anything_runs(model):
    with pytest.raises(ValueError, match="no concepts"):
        node(model, None, None, torch.rand(1, 48, 64, 3), concepts=" ")


def test_maps_of_existing_pictures_are_right(vae):
    """The demo model on scenes that it did not paint and was not trained on."""
    model = comfy.sd.load_diffusion_model(str(DEMO / "flux.safetensors"))
    clip = load_text_encoder(DEMO / "text_encoder.safetensors")
    ious = []
    for seed in range(HELD_OUT, HELD_OUT + 12):
        scene = make_scene(seed)
        names = tuple(region.noun for region in scene.regions)
        image = torch.from_numpy(scene.image.copy()).float()[None] / 255
        recording = observe_image(
            model,
            WhatToRecord(
                Concepts(names), encode_concepts(clip, names, "mean of tokens", flux1.FAMILIES[0], WIDTH)
            ),
            encode_images(vae, image, 16),
            clip.encode_from_tokens_scheduled(clip.tokenize(scene.prompt)),
            image_size=tuple(image.shape[1:3]),
            seed=seed,
        )
        guess = concept_maps(recording).at_size(*image.shape[1:3])[0].argmax(0).numpy()
        for index in range(len(names)):
            a, b = guess == index, scene.labels == index
            ious.append((a & b).sum() / (a | b).sum())
    assert np.mean(ious) > 0.7


def test_the_node_works_in_a_graph(tmp_path):
    """A picture from disk to heatmaps and a mask, in a real ComfyUI."""
    scene = make_scene(HELD_OUT + 1)
    words = ", ".join(region.noun for region in scene.regions)
    picture = Image.fromarray(scene.image).crop((0, 0, scene.image.shape[1] - 9, scene.image.shape[0] - 3))
    (tmp_path / "input").mkdir()
    picture.save(tmp_path / "input" / "scene.png")
    graph: workflow.Graph = {}

    def add(title, class_type, **inputs):
        number = str(len(graph) + 1)
        graph[number] = {"class_type": class_type, "inputs": inputs, "_meta": {"title": title}}
        return number

    model = add(
        "Model", "UNETLoader", unet_name=comfyui.model_name("diffusion_models"), weight_dtype="default"
    )
    clip = add("CLIP", "ConceptDemoTextEncoder")
    vae = add("VAE", "VAELoader", vae_name=comfyui.model_name("vae"))
    image = add("Picture", "LoadImage", image="scene.png")
    latent = add(
        "Look",
        "ConceptAttentionImage",
        model=[model, 0],
        clip=[clip, 0],
        vae=[vae, 0],
        image=[image, 0],
        concepts=words,
        background="",
        prompt=scene.prompt,
        samples=1,
        seed=0,
        **{"noise": "level", "noise.levels": "0.4, 0.5", "token_pooling": "mean of tokens"},
        record_layers="default",
        record_cross_attention=False,
        record_value=False,
        average="after softmax",
        guidance=3.5,
        pooled_prompt=True,
    )
    maps = add(
        "Saliency",
        "ConceptSaliency",
        latent=[latent, 0],
        space="output",
        layers="default",
        start_step=0,
        end_step=10000,
        softmax=True,
        temperature=1.0,
        grounding="paper",
    )
    cut = add(
        "Mask",
        "ConceptMask",
        maps=[maps, 0],
        concept=scene.regions[0].noun,
        combine=True,
        method="argmax",
        soft=False,
        fill_holes=False,
        smallest_area=0.0,
        grow=0,
        feather=0.0,
        invert=False,
        refine=False,
    )
    shown = add("Show mask", "MaskToImage", mask=[cut, 0])
    add("Heatmaps", "PreviewImage", images=[maps, 2])
    add("Masks", "PreviewImage", images=[shown, 0])

    with comfyui.Server(comfyui.find(), tmp_path) as server:
        definition = server.get("/object_info/ConceptAttentionImage")["ConceptAttentionImage"]
        assert json.dumps(definition["input"]).count("tooltip") > 10
        outputs = server.run(graph)["outputs"]
        heatmaps, masks = (
            [np.asarray(Image.open(io.BytesIO(server.image(file)))) for file in outputs[number]["images"]]
            for number in (workflow.find(graph, "Heatmaps"), workflow.find(graph, "Masks"))
        )
        graph[maps]["inputs"]["layers"] = "4"
        again = server.run(graph)
        assert latent in dict(again["status"]["messages"])["execution_cached"]["nodes"]
        graph[latent]["inputs"]["noise.levels"] = "2"
        with pytest.raises(RuntimeError, match="ConceptAttentionImage: Noise level 2 is outside 0"):
            server.run(graph)
    assert len(heatmaps) == len(scene.regions)
    assert {h.shape[:2] for h in (*heatmaps, *masks)} == {(picture.height, picture.width)}
    inside, truth = masks[0][..., 0] > 0, scene.labels[: picture.height, : picture.width] == 0
    assert (inside & truth).sum() / (inside | truth).sum() > 0.5
