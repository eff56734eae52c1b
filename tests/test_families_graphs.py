"""Families among other nodes: conditionings of all kinds, context windows, patches, caches, compilation."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import comfy.controlnet
import comfy.model_base
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy_extras.nodes_context_windows as context_windows
import comfy_extras.nodes_easycache as easycache
import comfy_extras.nodes_flux as flux_nodes
import comfy_extras.nodes_model_advanced as model_advanced
import comfy_extras.nodes_nag as nag
import comfy_extras.nodes_slg as slg
import comfy_extras.nodes_torch_compile as torch_compile
import comfy_extras.nodes_video_model as video_nodes
import node_helpers
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.torch_helpers import set_torch_compile_wrapper
from test_families import same
from tiny_models import ROWS, WORDS, Row, concepts_of, sample, skip_before, tiny
from torch import Tensor, nn

import nodes
from concept_attention.core.architectures import family_of
from concept_attention.core.observing import image as looks
from concept_attention.core.observing.image import (
    encode_images,
    frames_in_one,
    observe_image,
    patch_pixels,
    step_levels,
)
from concept_attention.core.observing.latents import recording_of
from concept_attention.core.observing.observe import WhatToRecord, observe
from concept_attention.core.observing.recording import Recording, RecordingError
from concept_attention.core.reading.maps import concept_maps
from concept_attention.nodes.concept_attention_image import ConceptAttentionImage
from tiny_flux import random_clip

TOLERANCE = 1e-5
# Flux.2's texts, which ComfyUI fills up to 512 tokens, would take most of the time.
JOINT = ("chroma_radiance", "qwen_image", "z_image", "krea2", "sd35_medium")
READ = ("sd15", "sdxl", "wan21_t2v", "wan21_i2v", "ltxv", "ltx2")
NAMES = (*JOINT, *READ)
VIDEOS = ("qwen_image_layered", "cogvideox", "hunyuan_video", "mochi", *READ[2:])
# In latents with sound ComfyUI finds no places, nor windows over a batch.
SILENT = [name for name in NAMES if name != "ltx2"]


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


@pytest.fixture
def row(name) -> Row:
    return (ROWS | WORDS)[name]


@pytest.fixture
def model(name) -> ModelPatcher:
    return tiny(name)


def observed(model: ModelPatcher, row: Row, **options) -> ModelPatcher:
    return observe(model, WhatToRecord(concepts_of(), row.concept_tokens(), **options))


def recording(samples: Tensor) -> Recording:
    return recording_of({"samples": samples})


def first_scores(samples: Tensor) -> Tensor:
    """(L, B * F, K, h, w) of the first evaluation, where runs of one seed still share x."""
    return scores_of(recording(samples))[0]


def scores_of(found: Recording) -> tuple[Tensor, ...]:
    """In the space that the family has first."""
    return next(iter(found.scores.values()))


def relative(ours: Tensor, expected: Tensor) -> float:
    assert ours.shape == expected.shape
    return float((ours.double() - expected.double()).norm() / expected.double().norm())


def both(model: ModelPatcher, row: Row, **run) -> Tensor:
    """The samples of an observed run, which are those of an unobserved one."""
    samples = sample(observed(model, row), row, **run)
    assert same(samples, sample(model, row, **run))
    found = recording(samples)
    assert all(scores.isfinite().all() for scores in scores_of(found))
    return samples


def blocks_of(model: ModelPatcher) -> list[nn.Module]:
    diffusion_model = model.model.diffusion_model
    return family_of(diffusion_model).layers(diffusion_model)


REFERENCES = [
    ("flux2_klein", "offset"),
    ("flux2_klein", "index"),
    ("flux2_klein", "uxo"),
    ("flux2_klein", "index_timestep_zero"),
    ("qwen_image", "index"),
    ("qwen_image", "index_timestep_zero"),
    ("qwen_image", "negative_index"),
    ("qwen_image_layered", "negative_index"),
    ("krea2", "index"),
    ("krea2", "index_timestep_zero"),
    ("omnigen2", None),
    ("boogu", None),
    ("z_image_omni", None),
]


@pytest.mark.parametrize("name,method", REFERENCES)
def test_reference_images_are_not_part_of_the_maps(model, row, method):
    """A token's value in the first block is of itself alone, whatever stands beside it."""
    if row.family == "Krea 2":
        skip_before("0.29", "reference images of Krea 2")
    alone = replace(row, values={n: row.values[n] for n in row.values if n in ("guidance", "attention_mask")})
    g = torch.Generator().manual_seed(8)
    frames = (1,) * (len(row.latent) - 3)
    values = {
        "reference_latents": [torch.randn(1, row.latent[0], *frames, 6, 4, generator=g) for _ in range(2)],
        "reference_latents_text_embeds": [torch.randn(1, 3 + i, row.width, generator=g) for i in range(3)],
        "reference_latents_method": method,
    }
    positive = node_helpers.conditioning_set_values(alone.conditioning(2), values)
    watched = observed(model, row, spaces=("output", "value"))
    samples = sample(watched, row, positive=positive)
    assert same(samples, sample(model, row, positive=positive))
    assert not same(samples, sample(model, alone))
    found = recording(samples).scores
    expected = recording(sample(watched, alone)).scores
    assert relative(found["value"][0][0], expected["value"][0][0]) <= TOLERANCE
    assert relative(found["output"][0], expected["output"][0]) > 1e-3


@pytest.mark.parametrize("observed_first", [True, False])
def test_reference_images_may_be_cached_after_the_first_step(observed_first):
    model, row = tiny("flux2_klein"), ROWS["flux2_klein"]

    def cached(model: ModelPatcher) -> ModelPatcher:
        return flux_nodes.FluxKVCache.execute(model).result[0]

    g = torch.Generator().manual_seed(8)
    references = {"reference_latents": [torch.randn(1, 128, 6, 4, generator=g)]}
    run = {"positive": node_helpers.conditioning_set_values(row.conditioning(2), references), "steps": 3}
    watched = cached(observed(model, row)) if observed_first else observed(cached(model), row)
    samples = sample(watched, row, **run)
    assert same(samples, sample(cached(model), row, **run))
    assert recording(samples).steps == (0, 1, 2)
    at_time_0 = {**references, "reference_latents_method": "index_timestep_zero"}
    run["positive"] = node_helpers.conditioning_set_values(row.conditioning(2), at_time_0)
    assert relative(first_scores(samples), first_scores(both(model, row, **run))) <= TOLERANCE


@pytest.mark.parametrize("tokens", [7, 9])
def test_only_the_positive_is_recorded(model, row, tokens):
    alone = first_scores(sample(observed(model, row), row, batch=2))
    samples = both(model, row, batch=2, cfg=3.0, negative=row.conditioning(3, tokens))
    assert relative(first_scores(samples), alone) <= TOLERANCE


@pytest.mark.parametrize("tokens", [1, 40])
def test_prompts_may_be_shorter_than_a_concept_or_much_longer(model, row, tokens):
    both(model, row, positive=row.conditioning(2, tokens))


def test_a_prompt_may_be_all_zeros(model, row):
    (zeros,) = nodes.ConditioningZeroOut().zero_out(row.conditioning(2))
    both(model, row, positive=zeros)
    both(model, row, negative=zeros, cfg=3.0)


def test_a_combined_conditioning_is_recorded_as_the_mean(model, row):
    samples = both(model, row, positive=row.conditioning(2) + row.conditioning(4), cfg=3.0, batch=2)
    alone = [
        first_scores(sample(observed(model, row), row, positive=row.conditioning(seed), batch=2))
        for seed in (2, 4)
    ]
    assert relative(first_scores(samples), (alone[0] + alone[1]) / 2) <= TOLERANCE


@pytest.mark.parametrize("name", SILENT)
def test_an_area_counts_where_it_lies(model, row):
    height, width = row.latent[-2:]
    patch = family_of(model.model.diffusion_model).patch(model.model.diffusion_model)

    def area(*area: int) -> list:
        return node_helpers.conditioning_set_values(row.conditioning(4), {"area": area, "strength": 1.0})

    whole = both(model, row, positive=area(height, width, 0, 0), cfg=3.0)
    alone = first_scores(sample(observed(model, row), row, positive=row.conditioning(4)))
    assert relative(first_scores(whole), alone) <= TOLERANCE

    top, left = patch.rows, 2 * patch.columns
    positive = row.conditioning(2) + area(2 * patch.rows, 2 * patch.columns, top, left)
    scores = first_scores(both(model, row, positive=positive, cfg=3.0))
    alone = first_scores(sample(observed(model, row), row))
    inside = torch.zeros_like(scores, dtype=torch.bool)
    inside[..., 1:3, 2:4] = True
    assert relative(scores[~inside], alone[~inside]) <= TOLERANCE
    assert relative(scores[inside], alone[inside]) > 1e-3


def in_percent(conditioning: list, row: Row, sizes: tuple[int, ...], begins: tuple[int, ...]) -> list:
    """What ConditioningSetAreaPercentage, for a video ConditioningSetAreaPercentageVideo, makes of a prompt:
    an area of so many latent pixels along each axis."""
    sizes, begins = (
        [length / whole for length, whole in zip(lengths, row.latent[1:], strict=True)]
        for lengths in (sizes, begins)
    )
    if len(sizes) == 2:
        (height, width), (y, x) = sizes, begins
        return nodes.ConditioningSetAreaPercentage().append(conditioning, width, height, x, y, 1.0)[0]
    (frames, height, width), (z, y, x) = sizes, begins
    place = (width, height, frames, x, y, z)
    return video_nodes.ConditioningSetAreaPercentageVideo().append(conditioning, *place, 1.0)[0]


# ComfyUI takes the node for pictures with latents of pictures alone, not with those of one frame.
@pytest.mark.parametrize("name", ["sd35_medium", "z_image", "cogvideox", "hunyuan_video", "mochi", "ltxv"])
def test_an_area_in_percent_is_the_mean_of_two_prompts_where_it_lies(model, row):
    patch = tuple(family_of(model.model.diffusion_model).patch(model.model.diffusion_model))
    axes = len(row.latent) - 1
    cells, first = (2, 2, 2)[-axes:], (1, 1, 2)[-axes:]
    sizes, begins = (
        tuple(n * size for n, size in zip(numbers, patch[-axes:], strict=True)) for numbers in (cells, first)
    )
    positive = row.conditioning(2) + in_percent(row.conditioning(4), row, sizes, begins)
    scores = first_scores(both(model, row, positive=positive, cfg=3.0))

    place = tuple(slice(b, b + n) for b, n in zip(begins, sizes, strict=True))
    tile = replace(row, latent=(row.latent[0], *sizes))
    noise = row.noise()[(..., *place)]
    inside = first_scores(sample(observed(model, tile), tile, noise=noise, positive=row.conditioning(4)))
    expected = first_scores(sample(observed(model, row), row)).clone()
    at = (slice(None), slice(1, 3) if axes == 3 else slice(None), slice(None), slice(1, 3), slice(2, 4))
    expected[at] = (expected[at] + inside) / 2
    assert relative(scores, expected) <= TOLERANCE


def masked(row: Row, seed: int, mask: Tensor) -> list:
    """What ConditioningSetMask makes of a prompt."""
    return nodes.ConditioningSetMask().append(row.conditioning(seed), mask, "default", 1.0)[0]


@pytest.mark.parametrize("name", [*SILENT, *VIDEOS[:4]])
def test_masked_conditionings_count_where_their_masks_are(model, row):
    diffusion_model = model.model.diffusion_model
    left = torch.zeros(1, *row.latent[-2:])
    left[..., : 2 * family_of(diffusion_model).patch(diffusion_model).columns] = 1
    samples = both(model, row, positive=masked(row, 2, left) + masked(row, 4, 1 - left), cfg=3.0)
    alone = [
        first_scores(sample(observed(model, row), row, positive=row.conditioning(seed))) for seed in (2, 4)
    ]
    expected = torch.cat([alone[0][..., :2], alone[1][..., 2:]], -1)
    assert relative(first_scores(samples), expected) <= TOLERANCE


def test_a_schedule_of_prompts_is_recorded_throughout(model, row):
    early, late = row.conditioning(2), row.conditioning(4)
    early[0][1].update(start_percent=0.0, end_percent=0.5)
    late[0][1].update(start_percent=0.5, end_percent=1.0)
    samples = both(model, row, positive=early + late, steps=4)
    assert recording(samples).steps == (0, 1, 2, 3)
    assert relative(first_scores(samples), first_scores(sample(observed(model, row), row))) <= TOLERANCE


@pytest.mark.parametrize("name", [*NAMES, *VIDEOS[:4]])
def test_inpainting_is_recorded_from_the_step_that_it_starts_at(model, row):
    mask = torch.zeros(1, *row.latent[-2:])
    mask[:, 2:] = 1
    samples = both(model, row, noise_mask=mask, denoise=0.5)
    assert len(recording(samples).sigmas) == 2
    whole = recording(sample(observed(model, row), row, steps=4)).sigmas
    assert recording(samples).sigmas == pytest.approx(whole[-2:])


def windows(
    model: ModelPatcher, length: int, dim: int, schedule: str = "standard_static", loop: bool = False
):
    return context_windows.ContextWindowsManualNode.execute(
        model, length, 1, schedule, 1, loop, "pyramid", dim, False
    ).result[0]


@pytest.mark.parametrize("name", SILENT)
@pytest.mark.parametrize("length", [2, 5])
def test_context_windows_over_a_batch_record_every_image(model, row, length):
    samples = sample(windows(observed(model, row), length, 0), row, batch=3, cfg=3.0)
    assert same(samples, sample(windows(model, length, 0), row, batch=3, cfg=3.0))
    assert (
        relative(first_scores(samples), first_scores(sample(observed(model, row), row, batch=3))) <= TOLERANCE
    )


@pytest.mark.parametrize(
    "length,schedule,loop",
    [(5, "standard_static", False), (3, "standard_static", False), (3, "looped_uniform", True)],
)
@pytest.mark.parametrize("name", VIDEOS)
def test_context_windows_over_frames_record_every_frame(model, row, name, length, schedule, loop):
    row = replace(row, latent=(row.latent[0], 5, *row.latent[2:]))
    samples = sample(windows(observed(model, row), length, 2, schedule, loop), row)
    assert same(samples, sample(windows(model, length, 2, schedule, loop), row))
    found = recording(samples)
    assert found.frames == 5
    assert all(scores.shape[1] == 5 and scores.isfinite().all() for scores in scores_of(found))
    if length == 5:
        assert relative(first_scores(samples), first_scores(sample(observed(model, row), row))) == 0


def with_lora(model: ModelPatcher) -> ModelPatcher:
    """Changes what the first block makes of text and picture."""
    g = torch.Generator().manual_seed(11)
    prefix = next(n for n, m in model.model.named_modules() if m is blocks_of(model)[0])
    weights = {n: w for n, w in blocks_of(model)[0].named_parameters() if w.ndim == 2}
    patched = model.clone()
    patched.add_patches(
        {f"{prefix}.{n}": (0.02 * torch.randn(w.shape, generator=g),) for n, w in weights.items()}, 1.0
    )
    return patched


def test_a_lora_counts_before_and_after_observing(model, row):
    plain = sample(with_lora(model), row)
    before, after = sample(observed(with_lora(model), row), row), sample(with_lora(observed(model, row)), row)
    assert same(before, plain)
    assert same(after, plain)
    assert torch.equal(first_scores(before), first_scores(after))
    assert relative(first_scores(before), first_scores(both(model, row))) > 0.01


def test_a_model_that_does_not_fit_is_recorded_the_same(model, row, monkeypatch):
    """Weights stay where they are, and a LoRA is added each time that one is used."""
    expected = first_scores(sample(observed(with_lora(model), row), row))
    load = ModelPatcher.load
    monkeypatch.setattr(
        ModelPatcher,
        "load",
        lambda self, device, **options: load(
            self, device, **{**options, "lowvram_model_memory": 1, "full_load": False}
        ),
    )
    patched = with_lora(model)
    samples = sample(observed(patched, row), row)
    assert any(getattr(m, "weight_function", None) for m in blocks_of(model)[0].modules())
    assert same(samples, sample(patched, row))
    assert relative(first_scores(samples), expected) <= TOLERANCE
    monkeypatch.undo()
    patched.detach()


class Residuals(comfy.controlnet.ControlBase):
    """A ControlNet reduced to what it adds to the picture after the first block."""

    def __init__(self, place: str, tokens: int, width: int) -> None:
        super().__init__()
        self._place = place
        self._added = torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(12))

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        return {"input": [], "output": [], self._place: [self._added]}

    def copy(self):
        return self


@pytest.mark.parametrize(
    "name,place,width",
    [
        ("flux2", "input", 256),
        ("chroma", "input", 256),
        ("qwen_image", "input", 256),
        ("sd35_medium", "output", 192),
    ],
)
def test_a_controlnet_counts_from_the_block_after_its_residual(model, row, place, width):
    tokens = family_of(model.model.diffusion_model).grid(model.model.diffusion_model, row.noise()).size
    control = {"control": Residuals(place, tokens, width), "control_apply_to_uncond": True}
    positive = node_helpers.conditioning_set_values(row.conditioning(2), control)
    ours = first_scores(both(model, row, positive=positive, cfg=3.0))
    without = first_scores(sample(observed(model, row), row, cfg=3.0))
    assert relative(ours[0], without[0]) <= TOLERANCE
    assert relative(ours[1], without[1]) > 1e-3


def test_guidance_by_a_pass_with_a_layer_left_out_adds_no_entries(model, row):
    def guided(model: ModelPatcher) -> ModelPatcher:
        return slg.SkipLayerGuidanceDiT.execute(model, 3.0, 0.0, 1.0, "1", "").result[0]

    plain = sample(guided(model), row, cfg=3.0)
    for patched in (observed(guided(model), row), guided(observed(model, row))):
        samples = sample(patched, row, cfg=3.0)
        assert same(samples, plain)
        assert recording(samples).steps == (0, 1)
        alone = first_scores(sample(observed(model, row), row))
        assert relative(first_scores(samples), alone) <= TOLERANCE


@pytest.mark.parametrize("name", ["flux2", "chroma"])
def test_scores_come_from_the_attention_before_guidance_nodes_edit_it(model, row):
    def guided(model: ModelPatcher) -> ModelPatcher:
        return nag.NAGuidance.execute(model, 5.0, 0.5, 1.5).result[0]

    plain = sample(guided(model), row, cfg=3.0)
    assert not same(plain, sample(model, row, cfg=3.0))
    for patched in (observed(guided(model), row), guided(observed(model, row))):
        samples = sample(patched, row, cfg=3.0)
        assert same(samples, plain)
        assert (
            relative(first_scores(samples)[0], first_scores(sample(observed(model, row), row))[0])
            <= TOLERANCE
        )


@pytest.mark.parametrize(
    "name", ["flux2", "chroma", "qwen_image", "sd35_medium", "wan21_t2v", "wan21_i2v", "ltxv", "ltx2"]
)
def test_blocks_that_another_node_wraps_are_recorded(model, row):
    """By ``patches_replace``, as nodes do that cache or weaken blocks."""

    def wrapped(model: ModelPatcher) -> ModelPatcher:
        def replaced(args, extra):
            out = extra["original_block"](args)
            if isinstance(out["img"], tuple):  # video and sound
                return {**out, "img": (out["img"][0] * 1.1, out["img"][1])}
            return {**out, "img": out["img"] * 1.1}

        patched = model.clone()
        for layer in range(3):
            patched.set_model_patch_replace(replaced, "dit", "double_block", layer)
        return patched

    plain = sample(wrapped(model), row, cfg=3.0)
    assert not same(plain, sample(model, row, cfg=3.0))
    for patched in (observed(wrapped(model), row), wrapped(observed(model, row))):
        samples = sample(patched, row, cfg=3.0)
        assert same(samples, plain)
        assert recording(samples).layers == (0, 1, 2)


def leaving_out(model: ModelPatcher, blocks: list[int], evaluations: list[int]) -> ModelPatcher:
    """With a node that leaves blocks out in some evaluations, as caches of blocks do."""
    patched = model.clone()
    for block in blocks:
        count = itertools.count()

        def leave_out(args: dict, extra: dict, count=count) -> dict:
            return args if next(count) in evaluations else extra["original_block"](args)

        patched.set_model_patch_replace(leave_out, "dit", "double_block", block)
    return patched


@pytest.mark.parametrize("blocks", [[0], [1], [1, 2]])
@pytest.mark.parametrize("name", ["chroma", "qwen_image", "sd35_medium"])
def test_evaluations_in_which_a_node_leaves_blocks_out_are_absent(model, row, blocks, caplog):
    samples = sample(observed(leaving_out(model, blocks, [1]), row), row, steps=4, cfg=3.0)
    assert torch.equal(samples, sample(leaving_out(model, blocks, [1]), row, steps=4, cfg=3.0))
    found = recording(samples)
    assert found.steps == (0, 2, 3)
    whole = sample(observed(model, row), row, steps=4, cfg=3.0)
    assert torch.equal(first_scores(samples), first_scores(whole))
    assert "without 1 of the 4 evaluations of the model, in which another node left out blocks" in caplog.text


@pytest.mark.parametrize(
    "block,reason", [(1, "block 2 ran where block 1 was due"), (2, "block 2 did not run")]
)
@pytest.mark.parametrize("name", ["chroma", "qwen_image", "sd35_medium"])
def test_a_block_that_never_runs_is_named_as_the_reason(model, row, block, reason):
    samples = sample(observed(leaving_out(model, [block], [0, 1]), row), row)
    with pytest.raises(
        RecordingError, match=f"although 2 evaluations of the model ran .{reason}.*skip-layer"
    ):
        recording(samples)


@pytest.mark.parametrize("node", [easycache.EasyCacheNode, easycache.LazyCacheNode])
def test_evaluations_that_a_cache_skips_are_absent(model, row, node):
    def cached(model: ModelPatcher) -> ModelPatcher:
        return node.execute(model, 0.9, 0.0, 1.0, False).result[0]

    calls = []
    hook = blocks_of(model)[0].register_forward_hook(lambda *_: calls.append(None))
    plain = sample(cached(model), row, steps=8)
    hook.remove()
    for patched in (observed(cached(model), row), cached(observed(model, row))):
        samples = sample(patched, row, steps=8)
        assert same(samples, plain)
        assert len(recording(samples).sigmas) == len(calls)


def by_the_stock_node(model: ModelPatcher) -> ModelPatcher:
    return torch_compile.TorchCompileModel.execute(model, "eager").result[0]


def block_by_block(model: ModelPatcher) -> ModelPatcher:
    compiled = model.clone()
    prefix = next(n for n, m in model.model.named_modules() if m is blocks_of(model)[0])
    set_torch_compile_wrapper(compiled, "eager", keys=[prefix])
    return compiled


def by_object_patches(model: ModelPatcher) -> ModelPatcher:
    compiled = model.clone()
    prefix = next(n for n, m in model.model.named_modules() if m is blocks_of(model)[0])
    compiled.add_object_patch(prefix, torch.compile(model.get_model_object(prefix), backend="eager"))
    return compiled


@pytest.mark.parametrize(
    "name,compile_model",
    [
        ("qwen_image", by_the_stock_node),
        ("sd35_medium", by_the_stock_node),
        ("z_image", block_by_block),
        ("krea2", by_object_patches),
        ("sdxl", by_the_stock_node),
        ("wan21_t2v", block_by_block),
        ("ltxv", by_object_patches),
    ],
)
def test_a_compiled_model_is_recorded_and_stays_usable(model, row, compile_model):
    torch._dynamo.reset()
    expected = first_scores(sample(observed(model, row), row))
    compiled = compile_model(model)
    runs = [
        sample(compiled, row),
        sample(observed(compiled, row), row),
        sample(compile_model(observed(model, row)), row),
        sample(compiled, row),
    ]
    assert all(same(run, runs[0]) for run in runs)
    for run in runs[1:3]:
        assert relative(first_scores(run), expected) <= TOLERANCE
    torch._dynamo.reset()


IMAGES = (*JOINT, *READ[:-1], "flux2_klein", "cogvideox", "hunyuan_video", "omnigen2")


def look(model: ModelPatcher, row: Row, latent: Tensor, layers=None, **options) -> Recording:
    size = model.get_model_object("latent_format").spacial_downscale_ratio
    image_size = (latent.shape[-2] * size, latent.shape[-1] * size)
    return observe_image(
        model,
        WhatToRecord(concepts_of(), row.concept_tokens(), layers),
        latent,
        row.conditioning(2),
        image_size=image_size,
        **options,
    )


@pytest.mark.parametrize("name", IMAGES)
def test_a_look_at_a_picture_is_the_first_evaluation_of_sampling_and_leaves_nothing_behind(model, row):
    row = replace(row, latent=(row.latent[0], *(1 for _ in row.latent[3:]), *row.latent[-2:]))
    plain = sample(model, row)
    latent = row.noise(2, seed=9)
    found = look(model, row, latent, levels=(1.0, 0.3), layers=[1])
    assert found.sigmas == (1.0, 0.3)
    assert same(sample(model, row), plain)
    assert not any(m._forward_pre_hooks for m in model.model.diffusion_model.modules())

    sampling = model.get_model_object("model_sampling")
    guider = comfy.samplers.CFGGuider(observed(model, row, layers=[1]))
    guider.inner_set_conds({"positive": row.conditioning(2)})
    for level, scores in zip(found.sigmas, scores_of(found), strict=True):
        sigma = noise_of(sampling, level)
        noise = comfy.sample.prepare_noise(latent, 0)
        x = sampling.noise_scaling(
            torch.tensor(sigma), noise.clone(), guider.model_patcher.model.process_latent_in(latent)
        )
        alone = Once(x)
        sampled = guider.sample(noise, latent, alone, torch.tensor([sigma, 0.0]), disable_pbar=True, seed=0)
        assert relative(scores, first_scores(sampled)) <= TOLERANCE


class Once(comfy.samplers.Sampler):
    """Evaluates the model at ``x`` and the first noise level."""

    def __init__(self, x: Tensor) -> None:
        self._x = x

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args) -> Tensor:
        model_wrap(self._x, sigmas[:1].expand(len(self._x)), **extra_args)
        return self._x.clone()


def noise_of(sampling: nn.Module, level: float) -> float:
    """The sigma that a level stands for: of flow matching its own, else the training timestep's."""
    if isinstance(sampling, comfy.model_sampling.CONST):
        return level
    place = level * (len(sampling.log_sigmas) - 1)
    low, share = int(place), place % 1
    logs = [float(s) for s in sampling.log_sigmas[low : low + 2]]
    return math.exp(logs[0] + share * (logs[-1] - logs[0]))


def resampled(model: ModelPatcher, sampling: str, **options) -> ModelPatcher:
    node = {"edm": model_advanced.ModelSamplingContinuousEDM}.get(
        sampling, model_advanced.ModelSamplingDiscrete
    )
    (patched,) = node().patch(model, sampling, **options)
    return patched


SCHEDULES = {
    "eps": lambda: tiny("sdxl"),
    "v": lambda: resampled(tiny("sdxl"), "v_prediction", zsnr=False),
    "v to pure noise": lambda: resampled(tiny("sdxl"), "v_prediction", zsnr=True),
    "CogVideoX": lambda: tiny("cogvideox"),
    "EDM": lambda: resampled(tiny("sdxl"), "edm", sigma_max=80.0, sigma_min=0.002),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_levels_are_progress_through_the_training_timesteps(schedule, monkeypatch):
    model = SCHEDULES[schedule]()
    row = ROWS["cogvideox"] if schedule == "CogVideoX" else WORDS["sdxl"]
    seen = []
    apply = comfy.model_base.BaseModel.apply_model
    monkeypatch.setattr(
        comfy.model_base.BaseModel,
        "apply_model",
        lambda self, x, t, *args, **options: (seen.append(float(t[0])), apply(self, x, t, *args, **options))[
            1
        ],
    )
    levels = (1.0, 0.7, 0.31, 0.001)
    found = look(model, row, row.noise(seed=9), levels=levels)
    assert found.sigmas == levels, "as it was asked for"
    assert all(scores.isfinite().all() for scores in scores_of(found))
    sampling = model.get_model_object("model_sampling")
    assert seen == pytest.approx([noise_of(sampling, level) for level in levels], rel=1e-4)
    assert seen[0] == pytest.approx(float(sampling.sigma_max))
    assert step_levels(model, "0, 1, 3", 4) == (1.0, 0.75, 0.25)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_at_level_0_the_picture_is_looked_at_as_it_is(schedule):
    model = SCHEDULES[schedule]()
    row = ROWS["cogvideox"] if schedule == "CogVideoX" else WORDS["sdxl"]
    looks = [look(model, row, row.noise(seed=9), levels=(0.0,), seed=seed) for seed in (0, 1)]
    first, second = (scores_of(found)[0] for found in looks)
    assert first.isfinite().all()
    assert relative(second, first) <= (0.05 if schedule == "EDM" else 0)  # it knows no picture without noise


def test_levels_of_cosmos_are_those_of_its_flow(monkeypatch):
    model, row = tiny("cosmos_predict2"), WORDS["cosmos_predict2"]
    seen = []
    scaling = comfy.model_sampling.COSMOS_RFLOW.noise_scaling
    monkeypatch.setattr(
        comfy.model_sampling.COSMOS_RFLOW,
        "noise_scaling",
        lambda self, sigma, *args: (seen.append(float(sigma)), scaling(self, sigma, *args))[1],
    )
    look(model, row, row.noise(seed=9), levels=(1.0, 0.5, 0.2, 0.0))
    assert seen == pytest.approx([80.0, 1.0, 0.25, 0.0])


@pytest.mark.parametrize("name", IMAGES)
def test_noise_levels_by_step_lie_in_the_models_schedule(model):
    levels = step_levels(model, "0, 1, 3", 4)
    assert len(levels) == 3
    assert all(0 <= level <= 1 for level in levels)
    assert levels[0] == pytest.approx(1.0)


@pytest.mark.parametrize("name", VIDEOS[:-1])
def test_a_look_at_a_video_has_all_its_frames(model, row):
    found = look(model, row, row.noise(2, seed=9), samples=2)
    assert found.frames == 3
    assert [s.shape[1] for s in scores_of(found)] == [6, 6]
    assert found.batch == 2


def test_looks_at_a_video_that_take_more_than_a_run_may_say_so(monkeypatch, caplog):
    row, model = ROWS["cogvideox"], tiny("cogvideox")
    look(model, row, row.noise(seed=9))
    assert "MB" not in caplog.text
    monkeypatch.setattr(looks, "BUDGET", 1)
    assert look(model, row, row.noise(seed=9), samples=2).nbytes > 1
    assert 'and so does the average "before softmax"' in caplog.text


@pytest.mark.parametrize("name", ["qwen_image", "krea2"])
def test_a_picture_without_frames_is_looked_at_as_one_frame(model, row):
    latent = row.noise(2, seed=9)
    ours, expected = look(model, row, latent[:, :, 0]), look(model, row, latent)
    assert torch.equal(scores_of(ours)[0], scores_of(expected)[0])


class VideoVAE:
    """Takes a batch of images for the frames of one video, as ComfyUI's does with a video model's."""

    latent_dim = 3

    def encode(self, images: Tensor) -> Tensor:
        frames = images.movedim(-1, 0)[None]
        return torch.nn.functional.avg_pool3d(frames[:, :, ::4], (1, 8, 8))


@pytest.mark.parametrize("frames, of_latent", [(1, 1), (4, 2), (5, 2), (6, 3), (9, 3)])
def test_images_are_frames_of_one_video_to_a_video_model(frames, of_latent):
    images = torch.rand(frames, 24, 40, 3)
    latent = encode_images(VideoVAE(), images, 16, 4)
    assert latent.shape == (1, 3, of_latent, 4, 6)
    missing = 4 * (of_latent - 1) + 1 - frames
    whole = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)])
    assert torch.equal(latent, encode_images(VideoVAE(), whole, 16, 4))


def test_the_vae_of_another_model_is_an_error_that_gives_the_frames():
    with pytest.raises(ValueError, match="of the 17 frames, where 3 latent frames are needed"):
        encode_images(VideoVAE(), torch.rand(17, 16, 16, 3), 16, 8)


def test_which_models_take_a_batch_for_a_video():
    lengths = {
        "cogvideox": 4,
        "hunyuan_video": 4,
        "mochi": 6,
        "wan21_t2v": 4,
        "ltxv": 8,
        "cosmos_predict2": 4,
    }
    for name, length in lengths.items():
        assert frames_in_one(tiny(name)) == length, name
    for name in ("qwen_image", "qwen_image_layered", "krea2", "flux2"):
        assert frames_in_one(tiny(name)) is None, name


def test_a_video_that_exists_has_maps_for_each_of_its_frames():
    class VAE(VideoVAE):
        def encode(self, images: Tensor) -> Tensor:
            return super().encode(images).repeat(1, 6, 1, 1, 1)[:, :16]

    model = tiny("cogvideox")
    width = family_of(model.model.diffusion_model).token_width(model.model.diffusion_model)
    images = torch.rand(11, 32, 48, 3, generator=torch.Generator().manual_seed(3))
    (latent,) = ConceptAttentionImage.execute(
        model,
        random_clip(width),
        VAE(),
        images,
        "cat, ball",
        "sky",
        "a cat",
        {"noise": "level", "levels": "0.5"},
        samples=1,
        seed=0,
        token_pooling="automatic",
        record_layers="default",
        record_cross_attention=False,
        record_value=False,
        average="after softmax",
        guidance=3.5,
        pooled_prompt=True,
    ).result
    found = recording_of(latent)
    assert found.durations == (1, 4, 4, 2)
    assert found.batch == 1
    maps = concept_maps(found)
    assert maps.shown(len(images)).shape[:3] == (1, 11, 3)


def test_images_are_no_frames_of_one_video():
    images = torch.rand(5, 24, 40, 3)
    latent = encode_images(VideoVAE(), images, 16)
    assert latent.shape == (5, 3, 1, 4, 6)
    for ours, image in zip(latent, images, strict=True):
        assert torch.equal(ours, encode_images(VideoVAE(), image[None], 16)[0])


PIXELS = {"flux2": 16, "chroma": 16, "chroma_radiance": 16, "qwen_image": 16, "z_image": 16, "krea2": 16}


@pytest.mark.parametrize("name", PIXELS)
def test_a_patch_has_as_many_pixels_as_the_familys_vae_and_patches_say(model, name):
    assert patch_pixels(model) == PIXELS[name]


class PictureVAE:
    latent_dim = 2

    def encode(self, images: Tensor) -> Tensor:
        size = (len(images), 16, images.shape[1] // 8, images.shape[2] // 8)
        return torch.randn(size, generator=torch.Generator().manual_seed(9))


def test_guidance_reaches_only_models_that_are_distilled_for_it():
    """Chroma takes a guidance value, and was trained on 0."""
    scores = []
    for guidance in (0.0, 9.0):
        (latent,) = ConceptAttentionImage.execute(
            tiny("chroma"),
            random_clip(64),
            PictureVAE(),
            torch.rand(1, 32, 48, 3, generator=torch.Generator().manual_seed(3)),
            "cat, ball",
            "sky",
            "a cat",
            {"noise": "level", "levels": "0.5"},
            samples=1,
            seed=0,
            token_pooling="automatic",
            record_layers="default",
            record_cross_attention=False,
            record_value=False,
            average="after softmax",
            guidance=guidance,
            pooled_prompt=True,
        ).result
        scores.append(recording_of(latent).scores["output"][0])
    assert torch.equal(*scores)
