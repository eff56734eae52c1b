"""Lens: double-stream blocks, the picture before the text, which comes of several layers of its encoder."""

from __future__ import annotations

from torch import Tensor, nn

from ..geometry import Patch
from .family import BlockCall, JointFamily, picked


class Lens(JointFamily):
    name = "Lens"
    model = "lens.model.LensTransformer2DModel"
    encoders = ("gpt_oss",)
    loader = 'CLIPLoader, type "lens": GPT-OSS 20B'
    causal = True
    text_first = False

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return list(model.transformer_blocks)

    def token_width(self, model: nn.Module) -> int:
        return model.txt_in.in_features

    def patch(self, model: nn.Module) -> Patch:
        """Its latents come in patches already."""
        return Patch(1, 1, 1)

    def text(self, call: BlockCall) -> Tensor:
        return call["encoder_hidden_states"]

    def step(
        self, block: nn.Module, call: BlockCall, hidden: Tensor, positions: list[int], options: dict
    ) -> Tensor:
        picture = call["hidden_states"].shape[1]
        changed = call.but(
            hidden_states=call["hidden_states"][:, :1].clone(),
            encoder_hidden_states=hidden,
            freqs_cis=picked(call["freqs_cis"], 2, [0, *(picture + p for p in positions)]),
            attention_mask=None,
            transformer_options=options,
        )
        return block.forward(**changed)[0]


FAMILIES = (Lens(),)
