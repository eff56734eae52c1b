"""Stable Diffusion 3 and 3.5: double-stream blocks without positions of text; the last gives no text."""

from __future__ import annotations

from torch import Tensor, nn

from .family import BlockCall, JointFamily


class StableDiffusion3(JointFamily):
    """Concepts are their CLIP tokens, which stand before T5's in the text, as in the reference. What a block
    of 3.5 medium does beside, an attention of the picture alone, has no part in this."""

    name = "Stable Diffusion 3"
    model = "modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper"
    entry = "apply_model"
    encoders = ("l",)
    loader = 'TripleCLIPLoader, or DualCLIPLoader with type "sd3": CLIP-L, CLIP-G, T5'
    causal = True

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return list(model.joint_blocks)

    def default_layers(self, model: nn.Module) -> tuple[int, ...]:
        """All, as in the reference."""
        return tuple(range(len(model.joint_blocks)))

    def token_width(self, model: nn.Module) -> int:
        return model.context_embedder.in_features

    def text(self, call: BlockCall) -> Tensor:
        return call["0"]

    def step(
        self, block: nn.Module, call: BlockCall, hidden: Tensor, positions: list[int], options: dict
    ) -> Tensor | None:
        picture = call["1"][:, :1].clone()
        return block.forward(hidden, picture, c=call["c"], use_checkpoint=False, transformer_options=options)[
            0
        ]


FAMILIES = (StableDiffusion3(),)
