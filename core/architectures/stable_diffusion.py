"""Stable Diffusion 1, 2 and XL: a U-Net, whose layers look at the picture at several sizes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..geometry import Grid, Patch
from .family import WordsFamily

_BLOCKS = "comfy.ldm.modules.attention.SpatialTransformer"
_SMALLER = "comfy.ldm.modules.diffusionmodules.openaimodel.Downsample"


class StableDiffusion(WordsFamily):
    """Layers are numbered as they run: down, the middle, up."""

    name = "Stable Diffusion 1, 2, XL"
    model = "modules.diffusionmodules.openaimodel.UNetModel"
    encoders = ("l", "h", "g")
    loader = "those of the checkpoint (Load Checkpoint)"
    causal = True
    queries = "to_q"
    keys = ("to_k",)

    def matches(self, model: nn.Module) -> bool:
        """Stable Video Diffusion shares the class, but not its layers: its text is a picture."""
        return super().matches(model) and bool(self.layers(model))

    def layers(self, model: nn.Module) -> list[nn.Module]:
        parts = (model.input_blocks, model.middle_block, model.output_blocks)
        return [layer for part in parts if part is not None for layer in _attentions(part)]

    def default_layers(self, model: nn.Module) -> tuple[int, ...]:
        """All but the middle block's, as in DAAM."""
        down, up = (len(_attentions(part)) for part in (model.input_blocks, model.output_blocks))
        depth = len(self.layers(model))
        return (*range(down), *range(depth - up, depth))

    def token_width(self, model: nn.Module) -> int:
        return self.layers(model)[0].to_k.in_features

    def patch(self, model: nn.Module) -> Patch:
        """What a query of the finest layer covers."""
        smaller = 0
        for block in model.input_blocks:
            if _attentions(block):
                break
            smaller += any(_path(module) == _SMALLER for module in block)
        return Patch(1, 2**smaller, 2**smaller)

    def embed(self, model: nn.Module, context: Tensor) -> Tensor:
        return context

    def own_length(self, context: Tensor) -> int:
        """ComfyUI repeats a text, up to four times, where a longer one is in the same call. That changes
        nothing but how many words there are beside a further one."""
        length = context.shape[1]
        for times in (4, 3, 2):
            if length % times == 0:
                first, *more = context.chunk(times, 1)
                if all(torch.equal(part, first) for part in more):
                    return length // times
        return length

    def place(self, model: nn.Module, call: dict[str, Any], grid: Grid, queries: int) -> tuple[slice, Grid]:
        """Of all grids with so many tokens, the one whose shape is most like the picture's: nodes that shrink
        a picture on its way (Kohya Deep Shrink) do not always halve it."""
        sides = [n for n in range(1, math.isqrt(queries) + 1) if queries % n == 0]
        shapes = [(n, queries // n) for n in sides] + [(queries // n, n) for n in sides]
        wanted = math.log(grid.rows / grid.columns)
        rows, columns = min(shapes, key=lambda shape: abs(math.log(shape[0] / shape[1]) - wanted))
        return slice(0, queries), Grid(1, rows, columns)


def _attentions(part: nn.Module) -> list[nn.Module]:
    return [
        block.attn2
        for module in part.modules()
        if _path(module) == _BLOCKS
        for block in module.transformer_blocks
        if block.attn2 is not None
    ]


def _path(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


FAMILIES = (StableDiffusion(),)
