"""OmniGen2: one stream of text, reference images, then picture, after refiners of their own for each."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .family import BlockCall, JointFamily, picked


class OmniGen2(JointFamily):
    name = "OmniGen2"
    model = "omnigen.omnigen2.OmniGen2Transformer2DModel"
    entry = "apply_model"
    encoders = ("qwen25_3b",)
    loader = 'CLIPLoader, type "omnigen2": Qwen 2.5 VL 3B'
    causal = True

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return list(model.layers)

    def token_width(self, model: nn.Module) -> int:
        return model.time_caption_embed.caption_embedder[1].in_features

    def text(self, call: BlockCall) -> Tensor:
        return call["hidden_states"][:, : call.text]

    def picture(self, call: BlockCall, length: int) -> slice:
        return slice(length - call.picture, length)

    def changes(self, call: BlockCall, hidden: Tensor, positions: list[int]) -> dict[str, Any]:
        return {
            "hidden_states": hidden,
            "image_rotary_emb": picked(call["image_rotary_emb"], 1, positions),
            "attention_mask": None,
        }


FAMILIES = (OmniGen2(),)
