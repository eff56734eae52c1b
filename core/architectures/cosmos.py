"""Cosmos 1 and Cosmos-Predict2: pictures and video. Text by cross-attention."""

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


class Cosmos1(CosmosPredict2):
    name = "Cosmos 1"
    model = "cosmos.model.GeneralDIT"
    frame_length = 8
    queries = "to_q.1"
    keys = ("to_k.0", "to_k.1")

    def layers(self, model: nn.Module) -> list[nn.Module]:
        parts = (part for block in model.blocks.values() for part in block.blocks)
        return [part.block.attn for part in parts if part.block_type in ("cross_attn", "ca")]

    def heads(self, module: nn.Module) -> int:
        return module.heads

    def token_width(self, model: nn.Module) -> int:
        return self.layers(model)[0].to_k[0].in_features

    def by_heads(self, module: nn.Module, made: Tensor, rows: int) -> Tensor:
        return made

    def key(self, module: nn.Module, words: Tensor, arguments: dict[str, Any]) -> Tensor:
        project, norm = module.to_k
        return norm.forward(rearrange(project.forward(words), "b l (h d) -> b h l d", h=module.heads))


FAMILIES = (CosmosPredict2(), Cosmos1())
