"""Krea 2: one stream of text, then picture, then reference images; the text without positions, fused from
twelve layers of its encoder."""

from __future__ import annotations

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

    def step(
        self, block: nn.Module, call: BlockCall, hidden: Tensor, positions: list[int], options: dict
    ) -> Tensor:
        changed = call.but(
            x=hidden,
            vec=call["vec"][: len(hidden)],  # the first half, where reference images are modulated at time 0
            freqs=picked(call["freqs"], 2, positions),
            mask=None,
            transformer_options=options,
        )
        changed.pop("timestep_zero_index", None)  # None by default; unknown to blocks before ComfyUI 0.29
        return block.forward(**changed)


FAMILIES = (Krea2(),)
