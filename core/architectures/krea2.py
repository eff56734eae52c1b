"""Krea 2: one stream of text, then picture, then reference images; the text without positions, fused from
twelve layers of its encoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..geometry import Patch
from .family import BlockCall, JointFamily, picked


class Krea2(JointFamily):
    name = "Krea 2"
    model = "krea2.model.SingleStreamDiT"
    encoders = ("qwen3vl_4b",)
    loader = 'CLIPLoader, type "krea2": Qwen 3 VL 4B'
    causal = True

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return list(model.blocks)

    def token_width(self, model: nn.Module) -> int:
        return model.txtlayers * model.txtdim

    def patch(self, model: nn.Module) -> Patch:
        return Patch(1, model.patch, model.patch)

    def text(self, call: BlockCall) -> Tensor:
        return call["x"][:, : call.text]

    def changes(self, call: BlockCall, hidden: Tensor, positions: list[int]) -> dict[str, Any]:
        return {
            "x": hidden,
            # The first half, where reference images are modulated at time 0.
            "vec": call["vec"][: len(hidden)],
            "freqs": picked(call["freqs"], 2, positions),
            "mask": None,
            "timestep_zero_index": None,
        }


FAMILIES = (Krea2(),)
