"""MiniMax H3: one stream of text, conditions, sound, then video, packed into a sequence without a batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .family import BlockCall, JointFamily, picked

# Each of the timesteps in a sequence has a row of modulations for the video, the text and the sound.
_TEXT, _MODALITIES = 1, 3


class MiniMaxH3(JointFamily):
    name = "MiniMax H3"
    model = "minimax.model.MiniMaxH3Model"
    encoders = ("qwen3vl_32b",)
    loader = 'CLIPLoader, type "minimax": Qwen 3 VL 32B'
    causal = True
    may_stop = False  # the weights of the next blocks are on their way
    sound = True
    batched = False

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return list(model.blocks)

    def token_width(self, model: nn.Module) -> int:
        return model.condition_proj.in_features

    def durations(self, model: nn.Module, x: Tensor) -> tuple[int, ...]:
        """The VAE encodes 17 frames at a time, each time as a video of its own."""
        return tuple(1 if frame % 5 == 0 else 4 for frame in range(x.shape[2]))

    def text(self, call: BlockCall) -> Tensor:
        return call["x"][None, : call.text]

    def picture(self, call: BlockCall, length: int) -> slice:
        return slice(length - call.picture, length)

    def keys(self, call: BlockCall, length: int) -> slice:
        """With conditions and sound: the model's own text attends to them."""
        return slice(call.text, length)

    def changes(self, call: BlockCall, hidden: Tensor, positions: list[int]) -> dict[str, Any]:
        # Of a text with pictures in it, these have the video's modulation.
        row = next(row for _, _, row in call["mod_segments"] if row % _MODALITIES == _TEXT)
        return {
            "x": hidden[0],
            "mod_segments": [(0, hidden.shape[1], row)],
            "rope_freqs": picked(call["rope_freqs"], 1, positions),
        }

    def step(self, *args) -> Tensor:
        return super().step(*args)[None]

    def embed(self, model: nn.Module, context: Tensor) -> Tensor:
        """Left early, its forward pass would leave weights on their way, and allocations half recorded."""
        return model.preprocess_text_embeds(context)


FAMILIES = (MiniMaxH3(),)
