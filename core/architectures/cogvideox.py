"""CogVideoX: video. Text and picture share their weights, but for the modulations; text has no positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..geometry import Patch
from .family import BlockCall, JointFamily


class CogVideoX(JointFamily):
    name = "CogVideoX"
    model = "cogvideo.model.CogVideoXTransformer3DModel"
    encoders = ("t5xxl",)
    loader = 'CLIPLoader, type "cogvideox": T5'
    frame_length = 4

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return list(model.blocks)

    def default_layers(self, model: nn.Module) -> tuple[int, ...]:
        """All, as in the reference's example."""
        return tuple(range(len(model.blocks)))

    def token_width(self, model: nn.Module) -> int:
        return model.patch_embed.text_proj.in_features

    def patch(self, model: nn.Module) -> Patch:
        return Patch(model.patch_size_t or 1, model.patch_size, model.patch_size)

    def text(self, call: BlockCall) -> Tensor:
        return call["encoder_hidden_states"]

    def changes(self, call: BlockCall, hidden: Tensor, positions: list[int]) -> dict[str, Any]:
        rotary = call["image_rotary_emb"]
        return {
            "hidden_states": call["hidden_states"][:, :1].clone(),
            "encoder_hidden_states": hidden,
            "image_rotary_emb": None if rotary is None else tuple(table[:1] for table in rotary),
        }


FAMILIES = (CogVideoX(),)
