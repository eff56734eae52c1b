"""AuraFlow: double-stream blocks of one modulation; eight registers stand before the text."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .family import BlockCall, JointFamily


class AuraFlow(JointFamily):
    name = "AuraFlow"
    model = "aura.mmdit.MMDiT"
    encoders = ("pile_t5xl",)
    loader = 'CLIPLoader, type "stable_diffusion": Pile T5 XL, or the checkpoint'
    text_result = 0

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return list(model.double_layers)

    def token_width(self, model: nn.Module) -> int:
        return model.cond_seq_linear.in_features

    def text(self, call: BlockCall) -> Tensor:
        return call["c"]

    def given(self, call: BlockCall, tokens: int) -> slice:
        registers = call.model.register_tokens.shape[1]
        return slice(registers, registers + tokens)

    def changes(self, call: BlockCall, hidden: Tensor, positions: list[int]) -> dict[str, Any]:
        return {"c": hidden, "x": call["x"][:, :1].clone()}


FAMILIES = (AuraFlow(),)
