"""Small Flux.1 models, a file of golden data, and sampling through ComfyUI's own loader and samplers."""

from __future__ import annotations

from functools import cache

import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.supported_models_base
import torch
from comfy.model_patcher import ModelPatcher
from comfy.text_encoders.flux import FluxTokenizer, flux_clip
from torch import Tensor

from concept_attention.core.concepts import Concepts, ConceptTokens
from concept_attention.core.observing.observe import WhatToRecord, observe
from golden_files import Golden


class FluxGolden(Golden):
    """A file of Flux.1's."""

    @property
    def tokens(self) -> ConceptTokens:
        return ConceptTokens.single(self["inputs.concepts"][0])

    def conditioning(self) -> list:
        values = {"pooled_output": self["inputs.y"]}
        if "inputs.guidance" in self:
            values["guidance"] = float(self["inputs.guidance"][0])
        return [[self["inputs.context"], values]]

    def observed(self, model: ModelPatcher, **options) -> ModelPatcher:
        return observe(model, WhatToRecord(self.concepts, self.tokens, **options))


def random_flux(seed: int = 0, guidance: bool = True, depth: int = 3) -> ModelPatcher:
    """A Flux.1 of hidden size 128 with random weights, through ComfyUI's loader."""
    hidden, context, pooled = 128, 32, 16
    g = torch.Generator().manual_seed(seed)
    sd: dict[str, Tensor] = {}

    def linear(name: str, fan_in: int, fan_out: int, gain: float = 1.0) -> None:
        sd[f"{name}.weight"] = torch.randn(fan_out, fan_in, generator=g) * gain * fan_in**-0.5
        sd[f"{name}.bias"] = torch.randn(fan_out, generator=g) * 0.05

    linear("img_in", 64, hidden)
    linear("txt_in", context, hidden)
    embedders = {"time_in": 256, "vector_in": pooled} | ({"guidance_in": 256} if guidance else {})
    for name, width in embedders.items():
        linear(f"{name}.in_layer", width, hidden)
        linear(f"{name}.out_layer", hidden, hidden)
    for i in range(depth):
        for side in ("img", "txt"):
            block = f"double_blocks.{i}.{side}"
            linear(f"{block}_mod.lin", hidden, 6 * hidden, 0.4)
            linear(f"{block}_attn.qkv", hidden, 3 * hidden)
            linear(f"{block}_attn.proj", hidden, hidden)
            linear(f"{block}_mlp.0", hidden, 4 * hidden)
            linear(f"{block}_mlp.2", 4 * hidden, hidden)
            for norm in ("query_norm", "key_norm"):
                sd[f"{block}_attn.norm.{norm}.scale"] = torch.ones(128)
    linear("single_blocks.0.linear1", hidden, 7 * hidden)
    linear("single_blocks.0.linear2", 5 * hidden, hidden)
    linear("single_blocks.0.modulation.lin", hidden, 3 * hidden, 0.4)
    for norm in ("query_norm", "key_norm"):
        sd[f"single_blocks.0.norm.{norm}.scale"] = torch.ones(128)
    linear("final_layer.linear", hidden, 64)
    linear("final_layer.adaLN_modulation.1", hidden, 2 * hidden, 0.1)
    return comfy.sd.load_diffusion_model_state_dict(sd, model_options={"dtype": torch.float32})


def conditioning(seed: int, tokens: int = 7, context: int = 32, pooled: int = 16, **values) -> list:
    g = torch.Generator().manual_seed(seed)
    values = {"pooled_output": torch.randn(1, pooled, generator=g), "guidance": 3.5, **values}
    return [[torch.randn(1, tokens, context, generator=g), values]]


CONCEPTS = Concepts(("cat", "ball"), ("sky",))


def concept_tokens(seed: int = 5, count: int = 3, context: int = 32) -> ConceptTokens:
    return ConceptTokens.single(torch.randn(count, context, generator=torch.Generator().manual_seed(seed)))


def sample(
    model: ModelPatcher,
    *,
    sampler: str = "euler",
    steps: int = 3,
    cfg: float = 1.0,
    latent: Tensor | None = None,
    positive: list | None = None,
    negative: list | None = None,
    noise: Tensor | None = None,
    seed: int = 1,
    **options,
) -> Tensor:
    """What KSampler does."""
    latent = torch.zeros(1, 16, 12, 16) if latent is None else latent
    return comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(latent, seed) if noise is None else noise,
        steps,
        cfg,
        sampler,
        "simple",
        conditioning(2) if positive is None else positive,
        conditioning(3) if negative is None else negative,
        latent,
        disable_pbar=True,
        seed=seed,
        **options,
    )


@cache
def random_clip(width: int = 32, seed: int = 0) -> comfy.sd.CLIP:
    """Flux's text encoders, T5 of that width and CLIP-L, shrunk and with random weights."""
    shrunk = {
        "t5xxl_model_config": {"d_model": width, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 1},
        "clip_l_model_config": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_attention_heads": 1,
            "num_hidden_layers": 2,
        },
    }
    clip = comfy.sd.CLIP(
        target=comfy.supported_models_base.ClipTarget(FluxTokenizer, flux_clip(dtype_t5=torch.float32)),
        model_options=shrunk,
    )
    g = torch.Generator().manual_seed(seed)
    for name, weight in clip.cond_stage_model.named_parameters():
        values = torch.randn(weight.shape, generator=g) * (
            weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.1
        )
        weight.data.copy_(values + 1 if weight.ndim == 1 and name.endswith("weight") else values)
    return clip
