"""HiDream-O1: a language model (Qwen 3 VL) that paints pixels. Its text encoder only counts tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .family import PrefixFamily


class HiDreamO1(PrefixFamily):
    """A text is the numbers of its tokens. The last of a prompt's stands for the noise level; it and the
    picture read all that there is."""

    name = "HiDream-O1"
    model = "hidream_o1.model.HiDreamO1Transformer"
    encoders = ("hidream_o1",)
    loader = "the checkpoint's own (Load Checkpoint)"
    causal = True

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return list(model.language_model.layers)

    def token_width(self, model: nn.Module) -> int:
        return 1

    def embed(self, model: nn.Module, context: Tensor) -> Tensor:
        return model.language_model.embed_tokens(context[..., 0].long())

    def given(self, model: nn.Module, arguments: dict[str, Any]) -> Tensor:
        return model.language_model.embed_tokens(arguments["input_ids"])

    def start(self, arguments: dict[str, Any]) -> int:
        return arguments["input_ids"].shape[1] - arguments["ar_len"]

    def keys(self, model: nn.Module, sequence: Tensor, dtype: torch.dtype) -> list[Tensor]:
        language, count = model.language_model, len(sequence)
        places = torch.arange(count, device=sequence.device).expand(3, -1)
        rotations = tuple(t.to(dtype) for t in language.compute_freqs_cis(places, sequence.device))
        x = self.embed(model, sequence[None]).to(dtype)
        keys = []
        for layer in language.layers:
            x, (k, _, _) = layer.forward(
                x, freqs_cis=rotations, optimized_attention=_causal, past_key_value=()
            )
            keys.append(k)
        return keys


def _causal(q: Tensor, k: Tensor, v: Tensor, heads: int, enable_gqa: bool = False, **kwargs) -> Tensor:
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=enable_gqa)
    return out.transpose(1, 2).flatten(2)


FAMILIES = (HiDreamO1(),)
