"""Mage-Flow: Qwen-Image's blocks on latents without patches."""

from __future__ import annotations

from torch import nn

from ..geometry import Patch
from .qwen_image import QwenBlocks


class MageFlow(QwenBlocks):
    name = "Mage-Flow"
    model = "mage_flow.model.MageFlowTransformer2DModel"
    encoders = ("qwen3vl_4b",)
    loader = 'CLIPLoader, type "mage": Qwen 3 VL 4B'
    causal = True

    def patch(self, model: nn.Module) -> Patch:
        return Patch(1, 1, 1)


FAMILIES = (MageFlow(),)
