"""Anima: Cosmos-Predict2, and in front of it an adapter that makes its text of two encoders' tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .cosmos import CosmosPredict2

# A row of a sequence: two digits of a T5 token's number, its weight, whether there is a state of Qwen's, and
# that state. -1 where the other encoder has more rows.
_COLUMNS = 4
# Digits up to 255 are exact in bfloat16 too.
_BASE = 128


class Anima(CosmosPredict2):
    """The adapter asks Qwen's states of a text with its T5 tokens: a row for each of those."""

    name = "Anima"
    model = "anima.model.Anima"
    encoders = ("t5xxl",)
    loader = 'CLIPLoader, type "stable_diffusion": Qwen 3 0.6B'
    batched = False

    def token_width(self, model: nn.Module) -> int:
        return _COLUMNS + model.llm_adapter.blocks[0].cross_attn.k_proj.in_features

    def sequence(self, encoded: dict[str, Any]) -> Tensor:
        states = encoded["cond"][0]
        if "t5xxl_ids" not in encoded:
            return states  # of another model's CLIP
        numbers, weights = encoded["t5xxl_ids"].to(states.device), encoded["t5xxl_weights"].to(states)
        rows = states.new_zeros(max(len(numbers), len(states)), _COLUMNS + states.shape[1])
        rows[:, :2], rows[:, 3] = -1, -1
        rows[: len(numbers), 0] = numbers // _BASE
        rows[: len(numbers), 1] = numbers % _BASE
        rows[: len(numbers), 2] = weights
        rows[: len(states), 3] = 0
        rows[: len(states), _COLUMNS:] = states
        return rows

    def embed(self, model: nn.Module, context: Tensor) -> Tensor:
        (rows,) = context
        tokens = rows[rows[:, 0] >= 0]
        states = rows[rows[:, 3] >= 0, _COLUMNS:]
        numbers = (tokens[:, :2].long() * torch.tensor([_BASE, 1], device=rows.device)).sum(1)
        return model.preprocess_text_embeds(states[None], numbers[None], t5xxl_weights=tokens[None, :, 2:3])


FAMILIES = (Anima(),)
