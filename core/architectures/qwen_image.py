"""Qwen-Image, its Edit and Layered: double-stream blocks; text has positions beside the centred picture's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .family import BlockCall, JointFamily, picked


class QwenBlocks(JointFamily):
    layered = True
    text_result = 0

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return list(model.transformer_blocks)

    def token_width(self, model: nn.Module) -> int:
        return model.txt_in.in_features

    def text(self, call: BlockCall) -> Tensor:
        return call["encoder_hidden_states"]

    def changes(self, call: BlockCall, hidden: Tensor, positions: list[int]) -> dict[str, Any]:
        text = self.text(call).shape[1]
        return {
            "hidden_states": call["hidden_states"][:, :1].clone(),
            "encoder_hidden_states": hidden,
            "encoder_hidden_states_mask": None,
            # The first half, where reference images are modulated at time 0.
            "temb": call["temb"][: len(hidden)],
            "image_rotary_emb": picked(call["image_rotary_emb"], 2, [*positions, text]),
            "timestep_zero_index": None,
        }


class QwenImage(QwenBlocks):
    name = "Qwen-Image"
    model = "qwen_image.model.QwenImageTransformer2DModel"
    encoders = ("qwen25_7b",)
    loader = 'CLIPLoader, type "qwen_image": Qwen 2.5 VL 7B'
    causal = True


FAMILIES = (QwenImage(),)
