"""Cosmos-Predict2 and Anima: pictures and video. Text by cross-attention."""

from __future__ import annotations

from typing import Any

from einops import rearrange
from torch import Tensor, nn

from ..geometry import Patch
from .family import WordsFamily


class CosmosPredict2(WordsFamily):
    name = "Cosmos-Predict2"
    model = "cosmos.predict2.MiniTrainDIT"
    encoders = ("t5xxl",)
    loader = 'CLIPLoader, type "cosmos": T5'
    frame_length = 4
    queries = "q_norm"
    keys = ("k_proj", "k_norm")

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return [block.cross_attn for block in model.blocks]

    def heads(self, module: nn.Module) -> int:
        return module.n_heads

    def token_width(self, model: nn.Module) -> int:
        return self.layers(model)[0].k_proj.in_features

    def patch(self, model: nn.Module) -> Patch:
        return Patch(model.patch_temporal, model.patch_spatial, model.patch_spatial)

    def embed(self, model: nn.Module, context: Tensor) -> Tensor:
        return context

    def key(self, module: nn.Module, words: Tensor, arguments: dict[str, Any]) -> Tensor:
        keys = rearrange(module.k_proj.forward(words), "b l (h d) -> b l h d", h=module.n_heads)
        return module.k_norm.forward(keys)


FAMILIES = (CosmosPredict2(),)
