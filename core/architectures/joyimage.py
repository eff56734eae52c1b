"""JoyImage: double-stream blocks with the picture before the text, which has no positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .family import BlockCall, JointFamily


class JoyImage(JointFamily):
    name = "JoyImage"
    model = "joyimage.model.JoyImageTransformer3DModel"
    encoders = ("qwen3vl_8b",)
    loader = 'CLIPLoader, type "joyimage": Qwen 3 VL 8B'
    causal = True
    text_first = False

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return list(model.double_blocks)

    def token_width(self, model: nn.Module) -> int:
        return model.condition_embedder.text_embedder.linear_1.in_features

    def text(self, call: BlockCall) -> Tensor:
        return call["encoder_hidden_states"]

    def changes(self, call: BlockCall, hidden: Tensor, positions: list[int]) -> dict[str, Any]:
        return {
            "hidden_states": call["hidden_states"][:, :1].clone(),
            "encoder_hidden_states": hidden,
            "image_rotary_emb": call["image_rotary_emb"][:, :1],
        }


FAMILIES = (JoyImage(),)
