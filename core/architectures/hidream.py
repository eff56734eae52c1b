"""HiDream-I1: double-stream blocks with the picture before the text, whose end is another layer of Llama's in
every block."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .family import BlockCall, JointFamily, picked


class HiDream(JointFamily):
    """Concepts are T5's, and go on from block to block as its tokens do. The model's own text attends to
    Llama's beside them."""

    name = "HiDream-I1"
    model = "hidream.model.HiDreamImageTransformer2DModel"
    encoders = ("t5xxl",)
    loader = (
        'QuadrupleCLIPLoader: CLIP-L, CLIP-G, T5 and Llama 3.1, or DualCLIPLoader, type "hidream", with T5'
    )
    text_first = False

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return list(model.double_stream_blocks)

    def token_width(self, model: nn.Module) -> int:
        return model.caption_projection[-1].linear.in_features

    def text(self, call: BlockCall) -> Tensor:
        return call["text_tokens"][:, : call.text]

    def picture(self, call: BlockCall, length: int) -> slice:
        if call["image_tokens"].shape[1] != call.picture:
            raise RuntimeError(
                "another picture lies beside the one that is sampled, row by row, as HiDream-E1's does, and "
                "cannot be told from it"
            )
        return slice(0, call.picture)

    def changes(self, call: BlockCall, hidden: Tensor, positions: list[int]) -> dict[str, Any]:
        return {
            "image_tokens": call["image_tokens"][:, :1].clone(),
            "text_tokens": hidden,
            "rope": picked(call["rope"], 1, [0, *(call.picture + p for p in positions)]),
        }


FAMILIES = (HiDream(),)
