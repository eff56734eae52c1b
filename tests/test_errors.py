"""A clear no: what users read when something is missing or does not fit, through the nodes."""

from __future__ import annotations

import importlib

import comfy.ldm.flux.model
import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import pytest
import torch
from comfy.ldm.anima.model import Anima
from comfy.ldm.cosmos.predict2 import MiniTrainDIT
from comfy.model_patcher import ModelPatcher

import nodes
from concept_attention.core.architectures import family_of
from concept_attention.core.architectures.unreadable import UNREADABLE
from concept_attention.nodes.concept_attention import ConceptAttention
from concept_attention.nodes.concept_mask import ConceptMask
from concept_attention.nodes.concept_saliency import ConceptSaliency
from tiny_flux import random_clip, random_flux, sample


@pytest.fixture(scope="module")
def model() -> ModelPatcher:
    with torch.inference_mode():
        return random_flux()


@pytest.fixture(scope="module")
def clip() -> comfy.sd.CLIP:
    with torch.inference_mode():
        return random_clip()


def attend(model, clip, concepts: str = "cat, ball", **widgets) -> ModelPatcher:
    """Concept Attention with its default widgets."""
    defaults = {
        "background": "background",
        "token_pooling": "first token",
        "record_layers": "all",
        "record_cross_attention": False,
        "record_value": False,
    }
    return ConceptAttention.execute(model, clip, concepts, **{**defaults, **widgets}).result[0]


def saliency(latent: dict, **widgets) -> tuple:
    """Concept Saliency with its default widgets."""
    defaults = {
        "space": "output",
        "layers": "default",
        "start_step": 0,
        "end_step": 10000,
        "softmax": True,
        "temperature": 1.0,
    }
    return ConceptSaliency.execute(latent, **{**defaults, **widgets}).result


def mask(maps, concept: str = "", method: str = "argmax") -> torch.Tensor:
    """Concept Mask with its default widgets."""
    return ConceptMask.execute(
        maps,
        concept,
        {"method": method},
        soft=False,
        fill_holes=True,
        smallest_area=0.0,
        grow=0,
        feather=0.0,
        invert=False,
    ).result[0]


@pytest.fixture
def latent(model, clip) -> dict:
    """A LATENT sampled in three steps with Concept Attention."""
    return {"samples": sample(attend(model, clip))}


def says(error, *parts: str) -> None:
    message = str(error.value)
    for part in parts:
        assert part in message


def test_the_nodes_work_with_their_defaults(latent):
    maps, masks, heatmaps = saliency(latent)
    assert masks.shape == (2, 96, 128)
    assert heatmaps.shape == (2, 96, 128, 3)
    assert mask(maps).shape == (1, 96, 128)


def test_heatmaps_have_names_unless_they_are_switched_off(latent):
    _, masks, named = saliency(latent)
    _, same_masks, plain = saliency(latent, names=False)
    assert torch.equal(masks, same_masks)
    changed = (named != plain).any(-1)
    assert changed[:, :48].any((1, 2)).all()
    assert not changed[:, 48:].any()


class Holder(torch.nn.Module):
    def __init__(self, diffusion_model: torch.nn.Module) -> None:
        super().__init__()
        self.diffusion_model = diffusion_model


def video_unet() -> torch.nn.Module:
    return openaimodel.UNetModel(
        image_size=8,
        in_channels=4,
        out_channels=4,
        model_channels=32,
        num_res_blocks=[1],
        channel_mult=[1],
        num_heads=1,
        use_spatial_transformer=True,
        transformer_depth=[1],
        transformer_depth_middle=1,
        transformer_depth_output=[1, 1],
        context_dim=32,
        use_temporal_attention=True,
        merge_strategy="learned_with_images",
        use_temporal_resblock=True,
        video_kernel_size=[3, 1, 1],
        operations=comfy.ops.disable_weight_init,
    )


def flux(**params) -> torch.nn.Module:
    flux1 = {
        "in_channels": 16,
        "out_channels": 16,
        "vec_in_dim": 16,
        "context_in_dim": 32,
        "hidden_size": 128,
        "mlp_ratio": 4.0,
        "num_heads": 1,
        "depth": 1,
        "depth_single_blocks": 1,
        "axes_dim": [16, 56, 56],
        "theta": 10000,
        "patch_size": 2,
        "qkv_bias": True,
        "guidance_embed": True,
        "txt_ids_dims": [],
    }
    operations = comfy.ops.disable_weight_init
    return comfy.ldm.flux.model.Flux(operations=operations, dtype=torch.float32, **{**flux1, **params})


def patcher(diffusion_model: torch.nn.Module) -> ModelPatcher:
    cpu = torch.device("cpu")
    return ModelPatcher(Holder(diffusion_model), cpu, cpu)


UNSUPPORTED = {
    "Stable Video Diffusion": (video_unet, "openaimodel.UNetModel"),
    "another model of Flux's class": (lambda: flux(patch_size=4), "flux.model.Flux"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_model_is_named_with_those_that_are_supported(clip, name):
    build, kind = UNSUPPORTED[name]
    with pytest.raises(ValueError, match="does not support this model") as error:
        attend(patcher(build()), clip)
    says(error, kind, "Supported: ", "Flux.1", "Z-Image")


@pytest.mark.parametrize("path", UNREADABLE)
def test_a_model_that_cannot_be_read_is_named_with_what_stands_in_the_way(clip, path):
    module, name = path.rsplit(".", 1)
    model = type(name, (torch.nn.Module,), {"__module__": f"comfy.ldm.{module}"})()
    with pytest.raises(ValueError, match=f"cannot read {UNREADABLE[path][0]}: ") as error:
        attend(patcher(model), clip)
    says(error, UNREADABLE[path][1], "Supported: ")
    assert isinstance(getattr(importlib.import_module(f"comfy.ldm.{module}"), name), type)


def test_a_model_is_not_taken_for_the_one_that_it_was_made_from():
    """Anima's class is Cosmos-Predict2's, and its text another."""
    assert issubclass(Anima, MiniTrainDIT)
    assert family_of(Anima.__new__(Anima)).name == "Anima"
    assert family_of(MiniTrainDIT.__new__(MiniTrainDIT)).name == "Cosmos-Predict2"


@pytest.mark.parametrize("concepts", ["", "  ", ",\n ,\r\n"])
def test_without_concepts_there_is_an_example(model, clip, concepts):
    with pytest.raises(ValueError, match="has no concepts") as error:
        attend(model, clip, concepts)
    says(error, "one per line or separated by commas", "dragon, rock, sky")


@pytest.mark.parametrize("background", ["", "background", " Background "])
def test_background_alone_has_nothing_to_be_compared_to(model, clip, background):
    with pytest.raises(ValueError, match='only the concept "background"') as error:
        attend(model, clip, "background", background=background)
    says(error, "nothing to compare it to", "Name at least one thing")


def test_too_many_concepts(model, clip):
    with pytest.raises(ValueError, match="129 concepts; the limit is 128") as error:
        attend(model, clip, ", ".join(f"thing {i}" for i in range(128)))
    says(error, "not a prompt")


def test_a_clip_without_t5_is_named_with_the_loader_to_use(model):
    shrunk = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 1, "num_hidden_layers": 2}
    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
    sd1 = comfy.sd.CLIP(target=target, model_options={"clip_l_model_config": shrunk})
    with pytest.raises(ValueError, match="the CLIP has the text encoders l") as error:
        attend(model, sd1)
    says(error, "the model is Flux.1", "CLIP-L and T5", "DualCLIPLoader", '"flux"')


def test_a_clip_of_another_width(model):
    with pytest.raises(ValueError, match="width 64, not 32") as error:
        attend(model, random_clip(64))
    says(error, "the model is Flux.1", "does not belong to the MODEL")


@pytest.mark.parametrize("concepts", ["龙", "cat, ドラゴン", "ball\n🐉"])
def test_a_concept_that_t5_does_not_know(model, clip, concepts):
    unknown = concepts.replace("\n", ",").split(",")[-1].strip()
    with pytest.raises(ValueError, match="knows no part of the concept") as error:
        attend(model, clip, concepts)
    says(error, f'"{unknown}"', "Latin script", "English")


def test_an_unknown_token_pooling(model, clip):
    with pytest.raises(ValueError, match='Unknown token pooling "max"') as error:
        attend(model, clip, token_pooling="max")
    says(error, "mean of tokens", "first token")


@pytest.mark.parametrize("layers", ["fifteen", "", "0,", "-1", "0:2", "1.5"])
def test_layers_that_cannot_be_read(model, clip, latent, layers):
    for node in (lambda: attend(model, clip, record_layers=layers), lambda: saliency(latent, layers=layers)):
        with pytest.raises(ValueError, match="cannot be read") as error:
            node()
        says(error, f'"{layers}"', '"default"', '"all"', '"0, 15-18"', "available: 0-2")


@pytest.mark.parametrize("layers", ["3", "0, 15-18", "1-3"])
def test_layers_that_the_model_does_not_have(model, clip, layers):
    with pytest.raises(ValueError, match="not all available, only: 0-2") as error:
        attend(model, clip, record_layers=layers)
    says(error, f'"{layers}"')


def test_layers_that_were_not_recorded(model, clip):
    latent = {"samples": sample(attend(model, clip, record_layers="0, 2"))}
    for layers in ("1", "0-1", "0-2, 1"):
        with pytest.raises(ValueError, match="not all available, only: 0, 2"):
            saliency(latent, layers=layers)
    assert saliency(latent, layers="all")[1].shape == (2, 96, 128)


def test_a_range_with_a_gap_means_the_layers_in_it(model, clip):
    latent = {"samples": sample(attend(model, clip, record_layers="0, 2"))}
    assert torch.equal(saliency(latent, layers="0-2")[1], saliency(latent, layers="all")[1])


NOT_SAMPLED = {
    "an empty latent": lambda model, clip: nodes.EmptyLatentImage().generate(128, 96)[0],
    "sampled without the plugin": lambda model, clip: {"samples": sample(model, seed=77)},
    "upscaled": lambda model, clip: nodes.LatentUpscaleBy().upscale(
        {"samples": sample(attend(model, clip))}, "nearest-exact", 2.0
    )[0],
    "of a sampler without a step": lambda model, clip: {
        "samples": sample(attend(model, clip), latent=torch.ones(1, 16, 12, 16), denoise=0.0)
    },
}


@pytest.mark.parametrize("name", NOT_SAMPLED)
def test_a_latent_that_no_observed_run_returned(model, clip, name):
    latent = NOT_SAMPLED[name](model, clip)
    with pytest.raises(ValueError, match="was not sampled with Concept Attention") as error:
        saliency(latent)
    says(error, "between the model and the sampler", "last run of their sampler", "upscale", "denoise 0")


def test_a_run_that_could_not_be_recorded_says_why(model, clip):
    tiled = attend(model, clip)

    def in_tiles(apply_model, args):
        return torch.cat(
            [apply_model(x, args["timestep"], **args["c"]) for x in args["input"].chunk(2, 3)], 3
        )

    tiled.set_model_unet_function_wrapper(in_tiles)
    with pytest.raises(ValueError, match="could not record this sampling run") as error:
        saliency({"samples": sample(tiled)})
    says(error, "the image is not affected", "tiled sampling")


@pytest.mark.parametrize("space", ["cross-attention", "value"])
def test_a_space_that_was_not_recorded(model, clip, latent, space):
    with pytest.raises(ValueError, match=f'The space "{space}" was not recorded, only: output') as error:
        saliency(latent, space=space)
    says(error, "switch it on in Concept Attention")
    widget = {"record_" + space.replace("-", "_"): True}
    recorded = {"samples": sample(attend(model, clip, **widget))}
    assert saliency(recorded, space=space)[1].shape == (2, 96, 128)


@pytest.mark.parametrize("start,end", [(3, 10000), (2, 2), (2, 1), (0, 0)])
def test_a_range_without_a_recorded_step(latent, start, end):
    with pytest.raises(ValueError, match="No step of the chosen range") as error:
        saliency(latent, start_step=start, end_step=end)
    says(error, "Recorded steps: 0-2")


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive(latent, temperature):
    with pytest.raises(ValueError, match=f'"temperature" is {temperature}; it goes from 0.01'):
        saliency(latent, temperature=temperature)


@pytest.mark.parametrize("concept", ["dog", "cat, dog", "ca"])
def test_an_unknown_concept_is_answered_with_the_list(latent, concept):
    maps = saliency(latent)[0]
    with pytest.raises(ValueError, match="There is no concept") as error:
        mask(maps, concept)
    says(error, '"ca"' if concept == "ca" else '"dog"', "The concepts are: cat, ball, background")


def test_an_unknown_mask_method(latent):
    with pytest.raises(ValueError, match='Unknown mask method "median"') as error:
        mask(saliency(latent)[0], "cat", method="median")
    says(error, "argmax, mean, otsu")
