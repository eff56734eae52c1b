"""Ideogram 4: one stream of text, then picture. Passes without a prompt have no text, and are not read."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..geometry import Patch
from .family import BlockCall, JointFamily, picked


class Ideogram4(JointFamily):
    name = "Ideogram 4"
    model = "ideogram4.model.Ideogram4Transformer2DModel"
    encoders = ("qwen3vl_8b",)
    loader = 'CLIPLoader, type "ideogram4": Qwen 3 VL 8B'
    causal = True

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return list(model.layers)

    def token_width(self, model: nn.Module) -> int:
        return model.llm_cond_proj.in_features

    def patch(self, model: nn.Module) -> Patch:
        """Its latents come in patches already."""
        return Patch(1, 1, 1)

    def text(self, call: BlockCall) -> Tensor:
        return call["x"][:, : call.text]

    def changes(self, call: BlockCall, hidden: Tensor, positions: list[int]) -> dict[str, Any]:
        table = call["freqs_cis"]  # (1, L, ...); before ComfyUI 0.29 one of cosines and two of sines
        if isinstance(table, tuple):
            table = tuple(picked(t, 1, positions) for t in table)
        else:
            table = picked(table, 1, positions)
        return {"x": hidden, "freqs_cis": table, "attn_mask": None}


FAMILIES = (Ideogram4(),)
