"""Every model family, tiny and with random weights, by ComfyUI's own classes: a row each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import comfy.ops
import comfy.sample
import comfy.supported_models
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from concept_attention.core.concepts import Concepts, ConceptTokens

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """A model to try a family on.

    Attributes:
        family: its name.
        config: of ``comfy.supported_models``, which knows the model's class, latents and schedule.
        unet: the arguments of the diffusion model's class.
        width: of the text tokens.
        latent: channels, (frames,) height and width of a latent that is no multiple of the patch.
        tokens: of the prompt.
        values: what the conditioning has besides.
        prepare: what else a random model needs.
    """

    family: str
    config: str
    unet: dict
    width: int
    latent: tuple[int, ...]
    tokens: int = 7
    values: dict = field(default_factory=dict)
    prepare: Callable[[nn.Module], None] = lambda model: None

    def conditioning(self, seed: int, tokens: int | None = None) -> list:
        g = torch.Generator().manual_seed(seed)
        context = torch.randn(1, tokens or self.tokens, self.width, generator=g)
        values = {name: value(g) if callable(value) else value for name, value in self.values.items()}
        return [[context, values]]

    def noise(self, batch: int = 1, seed: int = 1) -> Tensor:
        return torch.randn(batch, *self.latent, generator=torch.Generator().manual_seed(seed))

    def concept_tokens(self, count: int = 3, seed: int = 5) -> ConceptTokens:
        """Names of one to ``count`` tokens in a template of three."""
        g = torch.Generator().manual_seed(seed)
        sequences = tuple(torch.randn(3 + i, self.width, generator=g) for i in range(1, count + 1))
        spans = tuple(slice(2, 2 + i) for i in range(1, count + 1))
        return ConceptTokens(sequences, spans, tuple(len(s) for s in sequences), "last token")


def _pooled(width: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randn(1, width, generator=g)


ROWS = {
    "flux2": Row(
        "Flux.2",
        "Flux2",
        {
            "image_model": "flux2",
            "in_channels": 16,
            "out_channels": 16,
            "vec_in_dim": None,
            "context_in_dim": 64,
            "hidden_size": 256,
            "mlp_ratio": 3.0,
            "num_heads": 2,
            "depth": 3,
            "depth_single_blocks": 2,
            "axes_dim": [32, 32, 32, 32],
            "theta": 2000,
            "patch_size": 1,
            "qkv_bias": False,
            "guidance_embed": True,
            "txt_ids_dims": [3],
            "global_modulation": True,
            "mlp_silu_act": True,
            "ops_bias": False,
        },
        64,
        (16, 5, 7),
        values={"guidance": 4.0},
    ),
}


@cache
def tiny(name: str) -> ModelPatcher:
    row = ROWS[name]
    config = getattr(comfy.supported_models, row.config)(row.unet)
    config.unet_config["dtype"] = torch.float32
    config.custom_operations = comfy.ops.disable_weight_init
    model = config.get_model({}, "", device=CPU)
    randomize(model.diffusion_model)
    row.prepare(model.diffusion_model)
    return ModelPatcher(model, load_device=CPU, offload_device=CPU)


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Weights of a size that keeps activations near 1, and modulations strong enough to matter."""
    g = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim >= 2:
            gain = 0.5 if "mod" in name.lower() or "adaln" in name.lower() else 1
            values = torch.randn(weight.shape, generator=g) * gain * weight[0].numel() ** -0.5
        elif "norm" in name and name.endswith("weight"):
            values = 1 + 0.15 * torch.randn(weight.shape, generator=g)
        else:
            values = 0.1 * torch.randn(weight.shape, generator=g)
        weight.data.copy_(values)


def concepts_of(count: int = 3) -> Concepts:
    return Concepts(tuple(f"concept {i}" for i in range(count)))


def sample(
    model: ModelPatcher, row: Row, *, batch: int = 1, cfg: float = 1.0, steps: int = 2, **options
) -> Tensor:
    """What KSampler does."""
    return comfy.sample.sample(
        model,
        options.pop("noise", row.noise(batch)),
        steps,
        cfg,
        "euler",
        "simple",
        options.pop("positive", row.conditioning(2)),
        options.pop("negative", row.conditioning(3)),
        torch.zeros(batch, *row.latent),
        disable_pbar=True,
        seed=1,
        **options,
    )
