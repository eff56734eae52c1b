"""Mochi: video. Double-stream blocks with the picture before a narrower text, which has no positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..geometry import Patch
from .family import BlockCall, JointFamily


class Mochi(JointFamily):
    name = "Mochi"
    model = "genmo.joint_model.asymm_models_joint.AsymmDiTJoint"
    entry = "apply_model"
    encoders = ("t5xxl",)
    loader = 'CLIPLoader, type "mochi": T5'
    frame_length = 6
    text_first = False

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return list(model.blocks)

    def token_width(self, model: nn.Module) -> int:
        return model.t5_yproj.in_features

    def patch(self, model: nn.Module) -> Patch:
        return Patch(1, model.patch_size, model.patch_size)

    def alone(self, model: nn.Module, arguments: dict[str, Any], context: Tensor) -> dict[str, Any]:
        """Mochi pools its text by the mask, which it does not do without."""
        whole = context.new_ones(context.shape[:2], dtype=torch.bool)
        return {**super().alone(model, arguments, context), "attention_mask": whole}

    def text(self, call: BlockCall) -> Tensor:
        return call["y"]

    def changes(self, call: BlockCall, hidden: Tensor, positions: list[int]) -> dict[str, Any]:
        return {
            "x": call["x"][:, :1].clone(),
            "y": hidden,
            "rope_cos": call["rope_cos"][:1],
            "rope_sin": call["rope_sin"][:1],
            "crop_y": hidden.shape[1],
        }


FAMILIES = (Mochi(),)
