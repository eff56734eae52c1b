"""PixelDiT: double-stream blocks on patches of pixels; text has learned positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .family import BlockCall, JointFamily, picked


class PixelDiT(JointFamily):
    """What follows its blocks of patches, blocks of pixels, knows no text."""

    name = "PixelDiT"
    model = "pixeldit.model.PixDiT_T2I"
    encoders = ("gemma2_2b",)
    loader = 'CLIPLoader, type "pixeldit": Gemma 2 2B'
    causal = True

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return list(model.patch_blocks)

    def token_width(self, model: nn.Module) -> int:
        return model.y_embedder.proj.in_features

    def text(self, call: BlockCall) -> Tensor:
        return call["y"]

    def changes(self, call: BlockCall, hidden: Tensor, positions: list[int]) -> dict[str, Any]:
        text = call["pos_txt"]
        return {
            "x": call["x"][:, :1].clone(),
            "y": hidden,
            "pos_img": call["pos_img"][:1],
            "pos_txt": None if text is None else picked(text, 0, positions),
            "attn_mask": None,
        }


FAMILIES = (PixelDiT(),)
