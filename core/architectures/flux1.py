"""Flux.1: dev, schnell, Krea, Kontext, Fill and whatever else ComfyUI loads as the same class."""

from __future__ import annotations

import torch
from comfy.ldm.flux.layers import timestep_embedding
from comfy.ldm.flux.math import apply_rope1
from torch import Tensor, nn

from .family import Family


class Flux1(Family):
    name = "Flux.1"
    model = "flux.model.Flux"
    reader = "patches"
    encoders = ("t5xxl",)
    loader = 'DualCLIPLoader, type "flux": CLIP-L and T5'
    guidance = True

    def matches(self, model: nn.Module) -> bool:
        """Flux.2 (global modulation, patch 1) and LongCat and Ovis (text has positions) share the class, but
        not what the concept stream relies on."""
        if not super().matches(model):
            return False
        params = model.params
        return params.patch_size == 2 and not params.global_modulation and not params.txt_ids_dims

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return list(model.double_blocks)

    def default_layers(self, model: nn.Module) -> tuple[int, ...]:
        """The last four: 15 to 18 of Flux.1's 19, as in the reference."""
        depth = len(model.double_blocks)
        return tuple(range(max(0, depth - 4), depth))

    def token_width(self, model: nn.Module) -> int:
        return model.params.context_in_dim


FAMILIES = (Flux1(),)


def forward_replaced(model: nn.Module) -> bool:
    """Whether another node runs the blocks in a way of its own, as TeaCache does."""
    return getattr(model.forward_orig, "__func__", None) is not type(model).forward_orig


def rotate(keys: Tensor, pe: Tensor | None) -> Tensor:
    return keys if pe is None else apply_rope1(keys, pe)


class TextStream:
    """The text weights of ``model`` with the concepts' modulation vector: that of the prompt, with zeros
    in place of the pooled text (``vector_in`` of zeros is not zero).

    ``timestep`` and ``guidance`` are those given to the model for these rows, each (B,).
    """

    def __init__(
        self, model: nn.Module, timestep: Tensor, guidance: Tensor | None, dtype: torch.dtype
    ) -> None:
        self._model = model
        vec = model.time_in(timestep_embedding(timestep, 256).to(dtype))
        if model.params.guidance_embed and guidance is not None:
            vec = vec + model.guidance_in(timestep_embedding(guidance, 256).to(dtype))
        if model.vector_in is not None:
            vec = vec + model.vector_in(vec.new_zeros(len(vec), model.params.vec_in_dim))
        self.vec = vec
        self._activated = nn.functional.silu(vec)[:, None]

    def embed(self, concepts: Tensor) -> Tensor:
        hidden = concepts.to(self.vec)[None]
        if self._model.txt_norm is not None:
            hidden = self._model.txt_norm(hidden)
        return self._model.txt_in(hidden).expand(len(self.vec), -1, -1)

    def block(self, layer: int) -> _TextBlock:
        return _TextBlock(self._model.double_blocks[layer], self._activated)


class _TextBlock:
    """On so few rows an operation costs its launch, whatever it does: what can be one is one, and what is the
    same for every block is done once."""

    def __init__(self, block: nn.Module, activated: Tensor) -> None:
        self._block = block
        modulation = block.txt_mod.lin(activated).unflatten(-1, (2, 3, -1))  # (B, 1, 2, 3, D)
        shifts, scales, gates = modulation.unbind(-2)
        self._attention, self._mlp = zip(
            shifts.unbind(-2), (1 + scales).unbind(-2), gates.unbind(-2), strict=True
        )

    def qkv(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        block = self._block
        shift, scale, _ = self._attention
        qkv = block.txt_attn.qkv(torch.addcmul(shift, block.txt_norm1(hidden), scale))
        q, k, v = qkv.view(*qkv.shape[:2], 3, block.num_heads, -1).permute(2, 0, 3, 1, 4)
        return *block.txt_attn.norm(q, k, v), v

    def update(self, hidden: Tensor, attended: Tensor) -> Tensor:
        block = self._block
        _, _, gate = self._attention
        hidden = torch.addcmul(hidden, block.txt_attn.proj(attended), gate)
        shift, scale, gate = self._mlp
        mlp = block.txt_mlp(torch.addcmul(shift, block.txt_norm2(hidden), scale))
        hidden = torch.addcmul(hidden, mlp, gate)
        if hidden.dtype == torch.float16:  # as the model's block does with its text
            hidden = torch.nan_to_num(hidden, nan=0.0, posinf=65504, neginf=-65504)
        return hidden
