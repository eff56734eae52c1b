"""Boogu: OmniGen2 with double-stream blocks, in which the picture attends to itself once more, before its
single stream."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .family import BlockCall, JointFamily, picked


class Boogu(JointFamily):
    """Reference images stand between text and picture."""

    name = "Boogu"
    model = "boogu.model.BooguTransformer2DModel"
    entry = "apply_model"
    encoders = ("qwen3vl_8b",)
    loader = 'CLIPLoader, type "boogu": Qwen 3 VL 8B'
    causal = True

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return list(model.double_stream_layers)

    def token_width(self, model: nn.Module) -> int:
        return model.time_caption_embed.caption_embedder[1].in_features

    def text(self, call: BlockCall) -> Tensor:
        return call["instruct_hidden_states"]

    def picture(self, call: BlockCall, length: int) -> slice:
        return slice(length - call.picture, length)

    def changes(self, call: BlockCall, hidden: Tensor, positions: list[int]) -> dict[str, Any]:
        text = self.text(call).shape[1]
        return {
            "img_hidden_states": call["img_hidden_states"][:, :1].clone(),
            "instruct_hidden_states": hidden,
            "joint_rotary_emb": picked(call["joint_rotary_emb"], 1, [*positions, text]),
            "img_rotary_emb": call["img_rotary_emb"][:, :1],
        }


FAMILIES = (Boogu(),)
