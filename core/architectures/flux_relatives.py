"""LongCat-Image and Ovis-Image: Flux.1 in all but its text, which has positions, and its text encoder."""

from __future__ import annotations

from torch import nn

from .flux2 import FluxBlocks


class FluxRelative(FluxBlocks):
    model = "flux.model.Flux"
    causal = True

    def matches(self, model: nn.Module) -> bool:
        params = getattr(model, "params", None)
        return super().matches(model) and not params.global_modulation and bool(params.txt_ids_dims)

    def default_layers(self, model: nn.Module) -> tuple[int, ...]:
        """The last four, as of Flux.1."""
        depth = len(model.double_blocks)
        return tuple(range(max(0, depth - 4), depth))

    def token_width(self, model: nn.Module) -> int:
        return model.params.context_in_dim


class LongCatImage(FluxRelative):
    name = "LongCat-Image"
    encoders = ("qwen25_7b",)
    loader = 'CLIPLoader, type "longcat_image": Qwen 2.5 VL 7B'

    def matches(self, model: nn.Module) -> bool:
        return super().matches(model) and not model.params.yak_mlp


class OvisImage(FluxRelative):
    name = "Ovis-Image"
    encoders = ("qwen3_2b",)
    loader = 'CLIPLoader, type "ovis": Ovis 2.5'

    def matches(self, model: nn.Module) -> bool:
        return super().matches(model) and model.params.yak_mlp


FAMILIES = (LongCatImage(), OvisImage())
