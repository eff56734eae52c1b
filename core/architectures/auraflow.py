"""AuraFlow: double-stream blocks of one modulation; eight registers stand before the text."""

from __future__ import annotations

from torch import Tensor, nn

from .family import BlockCall, JointFamily


class AuraFlow(JointFamily):
    name = "AuraFlow"
    model = "aura.mmdit.MMDiT"
    encoders = ("pile_t5xl",)
    loader = 'CLIPLoader, type "stable_diffusion": Pile T5 XL, or the checkpoint'

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return list(model.double_layers)

    def token_width(self, model: nn.Module) -> int:
        return model.cond_seq_linear.in_features

    def text(self, call: BlockCall) -> Tensor:
        return call["c"]

    def embedded(self, call: BlockCall, tokens: int) -> Tensor:
        registers = call.model.register_tokens.shape[1]
        return call["c"][:, registers : registers + tokens]

    def step(
        self, block: nn.Module, call: BlockCall, hidden: Tensor, positions: list[int], options: dict
    ) -> Tensor:
        changed = call.but(c=hidden, x=call["x"][:, :1].clone(), transformer_options=options)
        return block.forward(**changed)[0]


FAMILIES = (AuraFlow(),)
