"""Wan 2.1 and 2.2: video. Text by cross-attention; a picture's CLIP tokens have keys of their own."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from ..geometry import Grid
from .family import WordsFamily

# Speech to video and HuMo put their reference behind the video.
_BEHIND = ("WanModel_S2V", "HumoWanModel")


class Wan(WordsFamily):
    """Text or image to video, VACE, Animate, and what else shares the class. Of 2.2's two experts each is a
    MODEL of its own."""

    name = "Wan 2.1, 2.2"
    model = "wan.model.WanModel"
    encoders = ("umt5xxl",)
    loader = 'CLIPLoader, type "wan": UMT5'
    frame_length = 4
    queries = "norm_q"
    keys = ("k", "norm_k")

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return [block.cross_attn for block in model.blocks]

    def heads(self, module: nn.Module) -> int:
        return module.num_heads

    def token_width(self, model: nn.Module) -> int:
        return model.text_embedding[0].in_features

    def embed(self, model: nn.Module, context: Tensor) -> Tensor:
        return model.text_embedding(context)

    def place(self, model: nn.Module, call: dict[str, Any], grid: Grid, queries: int) -> tuple[slice, Grid]:
        """Some models put a reference before the video, of one frame (``ref_conv``) or of several."""
        start = 0
        reference = None if type(model).__name__ in _BEHIND else call.get("reference_latent")
        if reference is not None and (reference.ndim == 5 or getattr(model, "ref_conv", None) is not None):
            patch = tuple(model.patch_size)[-(reference.ndim - 2) :]
            start = math.prod(n // p for n, p in zip(reference.shape[2:], patch, strict=True))
        return slice(start, start + grid.size), grid


FAMILIES = (Wan(),)
