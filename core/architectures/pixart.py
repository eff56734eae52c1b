"""PixArt Alpha and Sigma. Text by cross-attention, for which all rows of a call stand in one sequence."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .family import WordsFamily


class PixArt(WordsFamily):
    name = "PixArt Alpha, Sigma"
    model = "pixart.pixartms.PixArtMS"
    entry = "apply_model"
    encoders = ("t5xxl",)
    loader = 'CLIPLoader, type "pixart": T5'
    queries = "cross_attn.q_linear"
    keys = ("cross_attn.kv_linear",)

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return list(model.blocks)

    def heads(self, module: nn.Module) -> int:
        return module.cross_attn.num_heads

    def token_width(self, model: nn.Module) -> int:
        return model.y_embedder.y_proj.fc1.in_features

    def alone(self, model: nn.Module, arguments: dict[str, Any], context: Tensor) -> dict[str, Any]:
        """On all of the picture: positions are relative to its size, which a token has too little of."""
        picture = arguments["x"][:1]
        return {
            **super().alone(model, arguments, context),
            "x": picture.expand(len(context), *picture.shape[1:]),
        }

    def text(self, arguments: dict[str, Any]) -> Tensor:
        return arguments["y"].unflatten(1, (len(arguments["x"]), -1))[0]

    def by_heads(self, module: nn.Module, made: Tensor, rows: int) -> Tensor:
        """Behind the keys are the values."""
        width = module.cross_attn.d_model
        return super().by_heads(module, made[..., :width].reshape(rows, -1, width), rows)


FAMILIES = (PixArt(),)
