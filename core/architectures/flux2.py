"""Flux.2 dev and Klein: Flux.1's blocks with one modulation for all of them, and a position for every token
of text."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .family import BlockCall, JointFamily, picked


class FluxBlocks(JointFamily):
    """The blocks that Flux.1 began, as other models have them too: double-stream blocks, then single-stream
    ones, in which text and picture share all weights. The former are the main layers, as in the paper."""

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return [*model.double_blocks, *model.single_blocks]

    def main_layers(self, model: nn.Module) -> range:
        return range(len(model.double_blocks))

    def text(self, call: BlockCall) -> Tensor:
        if "txt" in call.arguments:
            return call["txt"]
        text, _ = call["transformer_options"]["img_slice"]
        return call["x"][:, :text]

    def changes(self, call: BlockCall, hidden: Tensor, positions: list[int]) -> dict[str, Any]:
        if "txt" not in call.arguments:
            dims = call.arguments.get("modulation_dims")
            if dims is not None:
                dims = [(i, i + 1, _modulation(dims, position)) for i, position in enumerate(positions)]
            return {
                "x": hidden,
                "pe": picked(call["pe"], 2, positions),
                "attn_mask": None,
                "modulation_dims": dims,
            }
        text = call["txt"].shape[1]
        dims = call.arguments.get("modulation_dims_img")
        return {
            "img": call["img"][:, :1].clone(),
            "txt": hidden,
            "pe": picked(call["pe"], 2, [*positions, text]),
            "attn_mask": None,
            "modulation_dims_img": None if dims is None else [(0, 1, 0)],
        }


def _modulation(segments: list[tuple[int, int | None, int]], row: int) -> int:
    """Which modulation a row of the sequence has."""
    return next(which for start, stop, which in segments if start <= row and (stop is None or row < stop))


class Flux2(FluxBlocks):
    name = "Flux.2"
    model = "flux.model.Flux"
    encoders = ("mistral3_24b", "qwen3_4b", "qwen3_8b")
    loader = 'CLIPLoader, type "flux2": Mistral 3 for dev, Qwen 3 for Klein'
    causal = True
    guidance = True

    def matches(self, model: nn.Module) -> bool:
        return super().matches(model) and model.params.global_modulation

    def default_layers(self, model: nn.Module) -> tuple[int, ...]:
        """The last three: 5 to 7 of Flux.2 dev's 8, as in the reference."""
        depth = len(model.double_blocks)
        return tuple(range(max(0, depth - 3), depth))

    def token_width(self, model: nn.Module) -> int:
        return model.params.context_in_dim

    def position(self, length: int, own: slice) -> int:
        """ComfyUI fills texts up to 512 tokens from the left, so that their ends have the same positions.
        Mistral's come unfilled; Qwen's are filled from the right by their own tokenizer."""
        filled = max(0, 512 - length)
        return filled + own.stop - 1 if filled else own.start


FAMILIES = (Flux2(),)
