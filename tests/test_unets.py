"""U-Nets beside the nodes and in the variants that their users have: the picture stays, maps are whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import comfy.cldm.cldm
import comfy.controlnet
import comfy.ops
import comfy.supported_models
import comfy_extras.nodes_attention_multiply as attention_multiply
import comfy_extras.nodes_freelunch as freelunch
import comfy_extras.nodes_hypertile as hypertile
import comfy_extras.nodes_model_advanced as model_advanced
import comfy_extras.nodes_model_downscale as downscale
import comfy_extras.nodes_pag as pag
import comfy_extras.nodes_sag as sag
import comfy_extras.nodes_tomesd as tomesd
import node_helpers
import pytest
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from tiny_models import CPU, WORDS, Row, build, concepts_of, randomize, sample, tiny
from torch import Tensor

from concept_attention.core.architectures import family_of
from concept_attention.core.geometry import Grid
from concept_attention.core.observing.latents import recording_of
from concept_attention.core.observing.observe import WhatToRecord, observe
from concept_attention.core.observing.recording import Recording

TOLERANCE = 1e-5
NAMES = ("sd15", "sdxl")


def observed(model: ModelPatcher, row: Row) -> ModelPatcher:
    return observe(model, WhatToRecord(concepts_of(), row.concept_tokens()))


def recording(samples: Tensor, steps: int = 2) -> Recording:
    found = recording_of({"samples": samples})
    assert len(found.sigmas) == steps
    assert all(scores.isfinite().all() and scores.amax() > 0 for scores in found.scores["probability"])
    return found


def first_scores(samples: Tensor) -> Tensor:
    return recording(samples).scores["probability"][0]


def relative(ours: Tensor, expected: Tensor) -> float:
    assert ours.shape == expected.shape
    return float((ours.double() - expected.double()).norm() / expected.double().norm())


def with_images(model: ModelPatcher) -> ModelPatcher:
    """What IPAdapter does: the attention of layers is replaced by one to the prompt and one to a picture. It
    gives the attention function no transformer_options."""
    keys = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(21))

    def attention(q: Tensor, k: Tensor, v: Tensor, extra_options: dict) -> Tensor:
        heads = extra_options["n_heads"]
        picture = keys[..., : q.shape[-1]].repeat(len(q), 1, -(-q.shape[-1] // 64))[..., : q.shape[-1]]
        return optimized_attention(q, k, v, heads) + 0.5 * optimized_attention(q, picture, picture, heads)

    patched = model.clone()
    for place in [*(("input", n) for n in range(1, 9)), ("middle", 1), *(("output", n) for n in range(9))]:
        patched.set_model_attn2_replace(attention, *place)
    return patched


def with_more_context(model: ModelPatcher) -> ModelPatcher:
    """What nodes of regional prompts do: other text, and more of it."""

    def patch(n: Tensor, context: Tensor, value: Tensor, extra_options: dict) -> tuple[Tensor, ...]:
        return n, torch.cat([context, context.flip(1)], 1), torch.cat([value, value.flip(1)], 1)

    patched = model.clone()
    patched.set_model_attn2_patch(patch)
    return patched


def deep_shrink(block: int, factor: float, after_skip: bool = True) -> Callable[[ModelPatcher], ModelPatcher]:
    def shrunk(model: ModelPatcher) -> ModelPatcher:
        return downscale.PatchModelAddDownscale.execute(
            model, block, factor, 0.0, 1.0, after_skip, "bicubic", "bicubic"
        ).result[0]

    return shrunk


def _self_attention_guided(model: ModelPatcher) -> ModelPatcher:
    return sag.SelfAttentionGuidance.execute(model, 0.5, 2.0).result[0]


def _hypertiled(model: ModelPatcher) -> ModelPatcher:
    result = hypertile.HyperTile.execute(model, 32, 2, 1, False)
    return (result if isinstance(result, tuple) else result.result)[0]


def _differently_sampled(sampling: str, zsnr: bool) -> Callable[[ModelPatcher], ModelPatcher]:
    return lambda model: model_advanced.ModelSamplingDiscrete().patch(model, sampling, zsnr)[0]


PATCHES: dict[str, Callable[[ModelPatcher], ModelPatcher]] = {
    "IPAdapter": with_images,
    "more context": with_more_context,
    "PAG": lambda model: pag.PerturbedAttentionGuidance.execute(model, 3.0).result[0],
    "SAG": _self_attention_guided,
    "FreeU": lambda model: freelunch.FreeU.execute(model, 1.1, 1.2, 0.9, 0.2).result[0],
    "FreeU V2": lambda model: freelunch.FreeU_V2.execute(model, 1.3, 1.4, 0.9, 0.2).result[0],
    "HyperTile": _hypertiled,
    "ToMe": lambda model: tomesd.TomePatchModel.execute(model, 0.3).result[0],
    "Deep Shrink": deep_shrink(2, 2.0),
    "Deep Shrink before the skip": deep_shrink(2, 2.0, after_skip=False),
    "Deep Shrink by 1.5": deep_shrink(2, 1.5),
    "attention multiplied": lambda model: attention_multiply.UNetCrossAttentionMultiply.execute(
        model, 1.2, 0.9, 1.1, 1.0
    ).result[0],
    "v-prediction": _differently_sampled("v_prediction", False),
    "v-prediction to pure noise": _differently_sampled("v_prediction", True),
    "RescaleCFG": lambda model: model_advanced.RescaleCFG().patch(model, 0.7)[0],
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("patch", PATCHES)
def test_beside_another_node_the_picture_stays_and_every_evaluation_has_its_maps(name, patch):
    model, row, patched = tiny(name), WORDS[name], PATCHES[patch]
    row = replace(row, latent=(4, 16, 24))
    torch.manual_seed(0)  # HyperTile draws its tiles
    plain = sample(patched(model), row, cfg=3.0, batch=2)
    merged = patch == "ToMe" and name == "sdxl"  # of tokens as fine as the latent, which it has none of
    assert torch.equal(plain, sample(model, row, cfg=3.0, batch=2)) == merged
    for ours in (observed(patched(model), row), patched(observed(model, row))):
        torch.manual_seed(0)
        samples = sample(ours, row, cfg=3.0, batch=2)
        assert torch.equal(samples, plain)
        recording(samples)


@pytest.mark.parametrize("patch", ["PAG", "SAG", "RescaleCFG"])
def test_extra_passes_and_scaled_guidance_leave_the_first_maps_as_they_are(patch):
    model, row = tiny("sdxl"), WORDS["sdxl"]
    alone = first_scores(sample(observed(model, row), row))
    guided = first_scores(sample(PATCHES[patch](observed(model, row)), row, cfg=3.0))
    assert relative(guided, alone) <= TOLERANCE


@pytest.mark.parametrize("size", [(16, 24), (104, 152), (128, 128), (96, 168), (66, 100)])
@pytest.mark.parametrize("factor", [1.0, 1.2, 1.5, 1.75, 2.0, 2.5, 3.0])
def test_a_picture_that_is_shrunk_on_its_way_lies_on_the_grid_that_it_was_given(size, factor):
    family, grid = family_of(tiny("sdxl").model.diffusion_model), Grid(1, *size)
    for halved in (0, 1, 2):
        rows, columns = (round(-(-n // 2**halved) / factor) for n in size)
        picture, found = family.place(tiny("sdxl").model.diffusion_model, {}, grid, rows * columns)
        assert (picture, found) == (slice(0, rows * columns), Grid(1, rows, columns))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens", [(77, 154), (154, 77), (154, 231), (77, 231)])
def test_prompts_of_several_sections_beside_negatives_of_fewer(name, tokens):
    """ComfyUI repeats both until they are of one length; a word is one beside those of its own prompt."""
    model, row = tiny(name), WORDS[name]
    run = {"positive": row.conditioning(2, tokens[0]), "negative": row.conditioning(3, tokens[1]), "cfg": 3.0}
    samples = sample(observed(model, row), row, batch=2, **run)
    assert torch.equal(samples, sample(model, row, batch=2, **run))
    alone = sample(observed(model, row), row, batch=2, positive=run["positive"])
    assert relative(first_scores(samples), first_scores(alone)) <= TOLERANCE


def control_net(row: Row) -> comfy.controlnet.ControlNet:
    """ComfyUI's own, of the U-Net's size, with random weights."""
    options = {**row.unet, "hint_channels": 3, "dtype": torch.float32}
    for name in ("out_channels", "transformer_depth_output"):
        options.pop(name, None)
    net = comfy.cldm.cldm.ControlNet(**options, device=CPU, operations=comfy.ops.disable_weight_init)
    randomize(net)
    return comfy.controlnet.ControlNet(net, load_device=CPU, manual_cast_dtype=None)


@pytest.mark.parametrize("name", NAMES)
def test_a_controlnet_shapes_the_maps_of_the_layers_that_read_it(name):
    model, row = tiny(name), replace(WORDS[name], latent=(4, 16, 24))
    hint = torch.rand(1, 3, 128, 192, generator=torch.Generator().manual_seed(7))
    control = control_net(row).set_cond_hint(hint, 1.0, (0.0, 1.0))
    values = {"control": control, "control_apply_to_uncond": True}
    run = {
        "positive": node_helpers.conditioning_set_values(row.conditioning(2), values),
        "negative": node_helpers.conditioning_set_values(row.conditioning(3), values),
        "cfg": 3.0,
        "batch": 2,
    }
    samples = sample(observed(model, row), row, **run)
    assert torch.equal(samples, sample(model, row, **run))
    assert not torch.equal(samples, sample(model, row, cfg=3.0, batch=2))
    ours, without = (first_scores(s)[:, :1] for s in (samples, sample(observed(model, row), row, batch=2)))
    down = len(family_of(model.model.diffusion_model).default_layers(model.model.diffusion_model)) // 3
    assert relative(ours[:down], without[:down]) <= TOLERANCE
    assert relative(ours[-1], without[-1]) > 1e-3


_SD15, _SDXL = WORDS["sd15"], WORDS["sdxl"]
_PICTURE = torch.randn(1, 4, 9, 14, generator=torch.Generator().manual_seed(31))
VARIANTS = {
    "SDXL refiner": replace(
        _SDXL,
        config="SDXLRefiner",
        unet={
            **_SDXL.unet,
            "transformer_depth": [0, 2, 2],
            "transformer_depth_output": [0, 0, 2, 2, 2, 2],
            "adm_in_channels": 32 + 5 * 256,
        },
    ),
    "SDXL without a layer in the middle (KOALA)": replace(
        _SDXL, config="KOALA_700M", unet={**_SDXL.unet, "transformer_depth_middle": -2}
    ),
    "SD1.5 inpainting": replace(
        _SD15,
        unet={**_SD15.unet, "in_channels": 9},
        values={"concat_latent_image": _PICTURE, "concat_mask": torch.ones(1, 1, 9, 14)},
    ),
    "SDXL inpainting": replace(
        _SDXL,
        unet={**_SDXL.unet, "in_channels": 9},
        latent=(4, 9, 14),
        values={
            **_SDXL.values,
            "concat_latent_image": _PICTURE,
            "concat_mask": torch.ones(1, 1, 9, 14),
        },
    ),
    "SD1.5 InstructPix2Pix": replace(
        _SD15,
        config="SD15_instructpix2pix",
        unet={**_SD15.unet, "in_channels": 8},
        values={"concat_latent_image": _PICTURE},
    ),
    "SDXL InstructPix2Pix": replace(
        _SDXL,
        config="SDXL_instructpix2pix",
        unet={**_SDXL.unet, "in_channels": 8},
        latent=(4, 9, 14),
        values={**_SDXL.values, "concat_latent_image": _PICTURE},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_model_are_read(variant):
    row = VARIANTS[variant]
    model = build(row)
    samples = sample(observed(model, row), row, cfg=3.0, batch=2)
    assert torch.equal(samples, sample(model, row, cfg=3.0, batch=2))
    recording(samples)


def test_a_model_whose_text_is_a_picture_is_an_error():
    """Stable Zero123 is built as Stable Diffusion 1.5 is."""
    row = WORDS["sd15"]
    config = comfy.supported_models.Stable_Zero123({**row.unet, "in_channels": 8})
    config.unet_config.update(row.unet, in_channels=8, dtype=torch.float32)
    config.custom_operations = comfy.ops.disable_weight_init
    weights = {"cc_projection.weight": torch.randn(64, 68), "cc_projection.bias": torch.randn(64)}
    model = ModelPatcher(config.get_model(weights, "", device=CPU), load_device=CPU, offload_device=CPU)
    with pytest.raises(ValueError, match="Zero123"):
        observed(model, row)
