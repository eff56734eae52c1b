"""Lumina 2 and Z-Image: one stream of text, then picture, after refiners of their own for each."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .family import BlockCall, JointFamily, picked


class NextDiT(JointFamily):
    causal = True

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return list(model.layers)

    def token_width(self, model: nn.Module) -> int:
        return model.cap_embedder[1].in_features

    def text(self, call: BlockCall) -> Tensor:
        start = _start(call)
        return call["x"][:, start : start + _filled(call.model, call.text)]

    def picture(self, call: BlockCall, length: int) -> slice:
        """The last, after those that are only to be referred to."""
        start = length - _filled(call.model, call.picture)
        return slice(start, start + call.picture)

    def text_start(self, call: BlockCall, length: int) -> int:
        return _start(call)

    def keys(self, call: BlockCall, length: int) -> slice:
        """With what fills the picture up: the model's own text attends to it."""
        return slice(length - _filled(call.model, call.picture), length)

    def changes(self, call: BlockCall, hidden: Tensor, positions: list[int]) -> dict[str, Any]:
        return {
            "x": hidden,
            "x_mask": None,
            "freqs_cis": picked(call["freqs_cis"], 1, [_start(call) + position for position in positions]),
            # The second half, where reference images are modulated at time 0.
            "adaln_input": call["adaln_input"][-len(hidden) :],
            "timestep_zero_index": None,
        }


def _start(call: BlockCall) -> int:
    """Where the prompt begins: after the text of reference images."""
    current = call.arguments.get("timestep_zero_index")  # the parts that are not at time 0: picture, prompt
    return current[1][0] if current else 0


def _filled(model: nn.Module, tokens: int) -> int:
    """Z-Image fills text and picture up to multiples of 32 tokens."""
    multiple = model.pad_tokens_multiple or 1
    return -(-tokens // multiple) * multiple


class Lumina2(NextDiT):
    name = "Lumina 2"
    model = "lumina.model.NextDiT"
    encoders = ("gemma2_2b", "gemma3_4b")
    loader = 'CLIPLoader, type "lumina2": Gemma 2'

    def matches(self, model: nn.Module) -> bool:
        return super().matches(model) and model.pad_tokens_multiple is None


class ZImage(NextDiT):
    name = "Z-Image"
    model = "lumina.model.NextDiT"
    encoders = ("qwen3_4b",)
    loader = 'CLIPLoader, type "lumina2": Qwen 3 4B'

    def matches(self, model: nn.Module) -> bool:
        return super().matches(model) and model.pad_tokens_multiple is not None


FAMILIES = (Lumina2(), ZImage())
