"""Helpers of the tests that observe a model."""

from __future__ import annotations

import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom_sampler
import comfy_extras.nodes_perpneg as perpneg
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from concept_attention.core.observing.latents import recording_of
from concept_attention.core.observing.observe import WhatToRecord, observe
from concept_attention.core.observing.recording import Recording
from tiny_flux import CONCEPTS, concept_tokens, conditioning

TOLERANCE = 1e-5


def observed(model: ModelPatcher, **options) -> ModelPatcher:
    return observe(model, WhatToRecord(CONCEPTS, concept_tokens(), **options))


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


def failing(*args, **kwargs):
    raise RuntimeError("the concepts got lost")


def zeros_by_function_wrapper(model: ModelPatcher) -> None:
    model.set_model_unet_function_wrapper(lambda apply_model, args: torch.zeros_like(args["input"]))
