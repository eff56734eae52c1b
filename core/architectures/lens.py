"""Lens: double-stream blocks, the picture before the text, which comes of several layers of its encoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..geometry import Patch
from .family import BlockCall, JointFamily, picked


class Lens(JointFamily):
    name = "Lens"
    model = "lens.model.LensTransformer2DModel"
    encoders = ("gpt_oss",)
    loader = 'CLIPLoader, type "lens": GPT-OSS 20B'
    causal = True
    text_first = False
    text_result = 0

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return list(model.transformer_blocks)

    def token_width(self, model: nn.Module) -> int:
        return model.txt_in.in_features

    def patch(self, model: nn.Module) -> Patch:
        """Its latents come in patches already."""
        return Patch(1, 1, 1)

    def text(self, call: BlockCall) -> Tensor:
        return call["encoder_hidden_states"]

    def changes(self, call: BlockCall, hidden: Tensor, positions: list[int]) -> dict[str, Any]:
        picture = call["hidden_states"].shape[1]
        return {
            "hidden_states": call["hidden_states"][:, :1].clone(),
            "encoder_hidden_states": hidden,
            "freqs_cis": picked(call["freqs_cis"], 2, [0, *(picture + p for p in positions)]),
            "attention_mask": None,
        }


FAMILIES = (Lens(),)
