"""Observing a model through ComfyUI's own loader, samplers and nodes: what is recorded, and that nothing
else changes."""

from __future__ import annotations

import gc
import logging
import weakref

import comfy.controlnet
import comfy.hooks
import comfy.model_management
import comfy.samplers
import comfy.sd
import comfy_extras.nodes_context_windows as context_windows
import comfy_extras.nodes_custom_sampler as custom_sampler
import comfy_extras.nodes_easycache as easycache
import comfy_extras.nodes_nag as nag
import comfy_extras.nodes_perpneg as perpneg
import comfy_extras.nodes_slg as slg
import comfy_extras.nodes_torch_compile as torch_compile
import pytest
import torch
from comfy.model_management import InterruptProcessingException
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from comfy_api.torch_helpers import set_torch_compile_wrapper
from torch import Tensor

import nodes
from concept_attention.core.architectures import flux1
from concept_attention.core.concepts import Concepts
from concept_attention.core.observing import observe as observe_module
from concept_attention.core.observing.observe import KEY, observe
from concept_attention.core.observing.readers.stream import SPACES, ConceptStream
from concept_attention.core.observing.recording import Recorder, Recording, RecordingError, recording_of
from concept_attention.core.reading.maps import concept_maps
from tiny_flux import CONCEPTS, concept_tokens, conditioning, random_flux, sample

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def model() -> ModelPatcher:
    with torch.inference_mode():
        return random_flux()


def observed(model: ModelPatcher, **options) -> ModelPatcher:
    return observe(model, CONCEPTS, concept_tokens(), **options)


def recording(samples: Tensor) -> Recording:
    return recording_of({"samples": samples})


def first_scores(samples: Tensor) -> Tensor:
    """(L, B, K, h, w) of the first evaluation, where runs of one seed still share x."""
    return recording(samples).scores["output"][0]


def relative(ours: Tensor, expected: Tensor) -> float:
    assert ours.shape == expected.shape
    return float((ours.double() - expected.double()).norm() / expected.double().norm())


def empty(batch: int = 1, height: int = 12, width: int = 16) -> Tensor:
    return torch.zeros(batch, 16, height, width)


def picture(batch: int = 1, height: int = 12, width: int = 16, seed: int = 7) -> Tensor:
    return torch.randn(batch, 16, height, width, generator=torch.Generator().manual_seed(seed))


def noise_mask(height: int, width: int) -> Tensor:
    mask = torch.zeros(1, height * 8, width * 8)
    mask[:, : height * 4] = 1
    return mask


def sample_custom_advanced(guider, sampler: str = "euler", steps: int = 3, latent=None) -> tuple[dict, dict]:
    """The two LATENTs of SamplerCustomAdvanced: output and denoised_output."""
    model_sampling = guider.model_patcher.get_model_object("model_sampling")
    return custom_sampler.SamplerCustomAdvanced.execute(
        custom_sampler.Noise_RandomNoise(1),
        guider,
        comfy.samplers.sampler_object(sampler),
        comfy.samplers.calculate_sigmas(model_sampling, "simple", steps),
        {"samples": empty()} if latent is None else latent,
    ).result


def watch_evaluations(model: ModelPatcher) -> list[float]:
    """Patches ``model`` to list the noise level of every pass through its first block."""
    sigmas = []

    def patch(q, k, v, pe, attn_mask, extra_options):
        if extra_options["block_type"] == "double" and extra_options["block_index"] == 0:
            sigmas.append(float(extra_options["sigmas"][0]))
        return {}

    model.set_model_attn1_patch(patch)
    return sigmas


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


GUIDERS = {
    "BasicGuider": lambda m: custom_sampler.BasicGuider.execute(m, conditioning(2)),
    "CFGGuider": lambda m: custom_sampler.CFGGuider.execute(m, conditioning(2), conditioning(3), 3.0),
    "DualCFGGuider": lambda m: custom_sampler.DualCFGGuider.execute(
        m, conditioning(2), conditioning(4), conditioning(3), 2.0, 3.0, "regular"
    ),
    "DualCFGGuider, nested": lambda m: custom_sampler.DualCFGGuider.execute(
        m, conditioning(2), conditioning(4), conditioning(3), 2.0, 3.0, "nested"
    ),
    "PerpNegGuider": lambda m: perpneg.PerpNegGuider.execute(
        m, conditioning(2), conditioning(3), conditioning(4), 3.0, 1.0
    ),
}
if hasattr(custom_sampler, "DualModelGuider"):
    GUIDERS["DualModelGuider"] = lambda m: custom_sampler.DualModelGuider.execute(
        m, conditioning(2), 3.0, m, conditioning(3)
    )


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


def test_with_fp16_intermediates_custom_samplers_are_recorded_and_ksampler_says_why_not(model, monkeypatch):
    """The option makes a copy of what KSampler returns, after the run; not of what custom samplers do."""
    monkeypatch.setattr(comfy.model_management, "intermediate_dtype", lambda: torch.float16)
    plain, ours = sample(model), sample(observed(model))
    assert ours.dtype == torch.float16
    assert torch.equal(plain, ours)
    with pytest.raises(RecordingError, match="--fp16-intermediates"):
        recording(ours)
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
    second = observe(first, Concepts(("rock", "tree")), concept_tokens(seed=9, count=2))
    assert "Only the concepts of the last node count: rock, tree" in caplog.text
    monkeypatch.setattr(flux1, "TextStream", TextStream)
    samples = sample(second)
    assert len(streams) == 3
    assert recording(samples).concepts.names == ("rock", "tree")
    assert first_scores(samples).shape[2] == 2
    assert recording(sample(first)).concepts == CONCEPTS
    assert torch.equal(samples, sample(model))


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


def test_what_a_broken_model_computes_is_no_recording(model, monkeypatch):
    original = ConceptStream.score

    def score(self, layer, image_out):
        original(self, layer, image_out * (torch.nan if layer == 1 else 1))

    monkeypatch.setattr(ConceptStream, "score", score)
    samples = sample(observed(model))
    with pytest.raises(RecordingError, match="NaN or infinite values in step 0, from layer 1 on"):
        recording(samples)


def test_a_schedule_of_prompts_is_recorded_throughout(model):
    early = conditioning(2, start_percent=0.0, end_percent=0.5)
    late = conditioning(4, start_percent=0.5, end_percent=1.0)
    samples = sample(observed(model), positive=early + late, steps=4)
    assert torch.equal(samples, sample(model, positive=early + late, steps=4))
    assert recording(samples).steps == (0, 1, 2, 3)
    assert relative(first_scores(samples), first_scores(sample(observed(model)))) <= TOLERANCE


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


def failing(*args, **kwargs):
    raise RuntimeError("the concepts got lost")


FAILURES = {
    "entering the stream": (flux1.TextStream, "embed"),
    "text weights": (flux1.TextStream, "block"),
    "concepts' attention": (ConceptStream, "attend"),
    "scores": (ConceptStream, "score"),
    "keeping them": (Recorder, "add"),
    "bringing them together": (Recorder, "_merged"),
    "grid": (flux1, "grid"),
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


def in_tiles(apply_model, args):
    """A model_function_wrapper like those of tiled diffusion nodes."""
    return torch.cat([apply_model(x, args["timestep"], **args["c"]) for x in args["input"].chunk(2, 3)], 3)


def test_tiled_sampling_is_named_as_the_reason(model):
    tiled = model.clone()
    tiled.set_model_unet_function_wrapper(in_tiles)
    samples = sample(observed(tiled), cfg=3.0)
    assert torch.equal(samples, sample(tiled, cfg=3.0))
    with pytest.raises(RecordingError, match=r"tile of 6 x 4 patches; the image has 6 x 8.*tiled sampling"):
        recording(samples)


def test_a_block_left_out_is_named_as_the_reason(model):
    skipping = model.clone()
    skipping.set_model_patch_replace(lambda args, extra: args, "dit", "double_block", 1)
    samples = sample(observed(skipping))
    assert torch.equal(samples, sample(skipping))
    with pytest.raises(RecordingError, match="block 2 ran where block 1 was due"):
        recording(samples)


def zeros_by_function_wrapper(model: ModelPatcher) -> None:
    model.set_model_unet_function_wrapper(lambda apply_model, args: torch.zeros_like(args["input"]))


def zeros_by_diffusion_model_wrapper(model: ModelPatcher) -> None:
    def skip(executor, x, *args, **kwargs):
        return torch.zeros_like(x)

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "skip", skip)


@pytest.mark.parametrize("replace", [zeros_by_function_wrapper, zeros_by_diffusion_model_wrapper])
def test_a_model_that_never_runs_leaves_an_error_with_likely_causes(model, replace):
    plain = model.clone()
    replace(plain)
    after = observed(model)
    replace(after)
    for patched in (observed(plain), after):
        samples = sample(patched)
        assert torch.equal(samples, sample(plain))
        with pytest.raises(RecordingError, match="recorded nothing") as error:
            recording(samples)
        for word in ("3 evaluations", "TeaCache", "compiled", "Switch such nodes off"):
            assert word in str(error.value)


def without_patches(args: dict, extra: dict) -> dict:
    """Runs a block as caches do that call the model's blocks themselves."""
    return extra["original_block"]({**args, "transformer_options": {}})


@pytest.mark.parametrize(
    "blocks, reason",
    [
        ([0, 1, 2], "recorded nothing.*3 evaluations.*TeaCache"),
        ([2], "recorded nothing.*3 evaluations.*TeaCache"),
        ([0], "block 1 ran where block 0 was due"),
    ],
    ids=["all", "the last", "the first"],
)
def test_blocks_that_run_without_their_patches_are_never_passed_over(model, blocks, reason):
    patched = model.clone()
    for block in blocks:
        patched.set_model_patch_replace(without_patches, "dit", "double_block", block)
    samples = sample(observed(patched))
    assert torch.equal(samples, sample(patched))
    with pytest.raises(RecordingError, match=reason):
        recording(samples)


@pytest.mark.parametrize("sampler, steps", [("euler", (0, 2, 4)), ("heun", (0, 1, 2, 3, 4))])
def test_every_second_evaluation(model, monkeypatch, sampler, steps):
    """Heun evaluates all steps but the last twice."""
    run = {"sampler": sampler, "steps": 5, "cfg": 3.0}
    whole = recording(sample(observed(model), **run))
    seen = []

    def follow(self, *args):
        seen.append(self)
        return original(self, *args)

    original = observe_module._Hooks.follow
    monkeypatch.setattr(observe_module._Hooks, "follow", follow)
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


@pytest.mark.parametrize("budget", [1, 8000], ids=["full at once", "full at the third evaluation"])
def test_a_full_budget_leaves_the_default_layers(budget, caplog):
    model = random_flux(depth=6)
    whole = sample(observed(model, spaces=("output", "value")), steps=4)
    assert recording(whole).layers == tuple(range(6))
    assert "default layers" not in caplog.text
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


def test_a_budget_never_drops_the_layers_that_were_asked_for():
    deep = random_flux(depth=6)
    assert recording(sample(observed(deep, layers=[0, 1], budget=1))).layers == (0, 1)


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


def by_the_stock_node(model: ModelPatcher) -> ModelPatcher:
    """TorchCompileModel with the backend "eager", which the node does not offer but passes on."""
    return torch_compile.TorchCompileModel.execute(model, "eager").result[0]


def block_by_block(model: ModelPatcher) -> ModelPatcher:
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, "eager", keys=["diffusion_model.double_blocks.0"])
    return compiled


def by_object_patches(model: ModelPatcher) -> ModelPatcher:
    """As nodes did before ComfyUI had a function for it: each block by itself, no trace in the options."""
    compiled = model.clone()
    for layer in range(2):
        name = f"diffusion_model.double_blocks.{layer}"
        block = getattr(model.get_model_object(name), "_orig_mod", model.get_model_object(name))
        compiled.add_object_patch(name, torch.compile(block, backend="eager"))
    return compiled


@pytest.mark.parametrize("compile_model", [by_the_stock_node, block_by_block, by_object_patches])
def test_a_compiled_model_is_recorded_and_stays_usable(compile_model):
    torch._dynamo.reset()
    model = random_flux(depth=2)
    expected = recording(sample(observed(model), steps=2))
    compiled = compile_model(model)
    runs = [
        sample(compile_model(observed(model)), steps=2),
        sample(observed(compiled), steps=2),
        sample(compiled, steps=2),
        sample(observed(compiled), steps=2),  # compiled without the hooks by now
        sample(compiled, steps=2),
    ]
    assert all(torch.equal(run, runs[0]) for run in runs)
    for run in (runs[0], runs[1], runs[3]):
        for found, scores in zip(recording(run).scores["output"], expected.scores["output"], strict=True):
            assert relative(found, scores) <= TOLERANCE
    torch._dynamo.reset()


def test_observing_has_no_block_compiled_again():
    torch._dynamo.reset()
    model, compiled_graphs = random_flux(depth=1), []

    def backend(graph, inputs):
        compiled_graphs.append(graph)
        return graph

    compiled, name = model.clone(), "diffusion_model.double_blocks.0"
    compiled.add_object_patch(name, torch.compile(model.get_model_object(name), backend=backend))
    before = sample(compiled)
    count = len(compiled_graphs)
    assert count > 0
    assert torch.equal(sample(observed(compiled)), before)
    assert len(compiled_graphs) == count
    torch._dynamo.reset()


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
    given += [negative[0][0], negative[0][1]["pooled_output"], latent, mask, tokens]
    before = [tensor.clone() for tensor in given]
    names = [sorted(positive[0][1]), sorted(negative[0][1])]
    watched = observe(model, CONCEPTS, tokens)
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
