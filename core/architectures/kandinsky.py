"""Kandinsky 5: pictures and video. Text goes through blocks of its own, and then into cross-attention."""

from __future__ import annotations

from typing import Any

from einops import rearrange
from torch import Tensor, nn

from .family import WordsFamily


class Kandinsky5(WordsFamily):
    name = "Kandinsky 5"
    model = "kandinsky5.model.Kandinsky5"
    encoders = ("qwen25_7b",)
    loader = 'DualCLIPLoader, type "kandinsky5": Qwen2.5-VL and CLIP-L'
    causal = True
    frame_length = 4
    timed = True
    queries = "query_norm"
    keys = ("to_key", "key_norm")

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return [block.cross_attention for block in model.visual_transformer_blocks]

    def heads(self, module: nn.Module) -> int:
        return module.num_heads

    def token_width(self, model: nn.Module) -> int:
        return model.text_embeddings.in_layer.in_features

    def key(self, module: nn.Module, words: Tensor, arguments: dict[str, Any]) -> Tensor:
        keys = rearrange(module.to_key.forward(words), "b l (h d) -> b l h d", h=module.num_heads)
        return module.key_norm.forward(keys)


FAMILIES = (Kandinsky5(),)
