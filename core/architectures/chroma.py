"""Chroma and Chroma Radiance: Flux.1's blocks, with modulations from a network of their own and T5 alone."""

from __future__ import annotations

from torch import nn

from .flux2 import FluxBlocks


class Chroma(FluxBlocks):
    """Radiance is a Chroma too, and differs only outside its blocks: patches of 16 pixels, no latent."""

    name = "Chroma"
    model = "chroma.model.Chroma"
    encoders = ("t5xxl",)
    loader = 'CLIPLoader, type "chroma": T5'

    def default_layers(self, model: nn.Module) -> tuple[int, ...]:
        """The last four, as of Flux.1, which Chroma was made from."""
        depth = len(model.double_blocks)
        return tuple(range(max(0, depth - 4), depth))

    def token_width(self, model: nn.Module) -> int:
        return model.params.context_in_dim


FAMILIES = (Chroma(),)
