"""Weights of vision transformers, by the names that their checkpoints have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .vit import Block, Linear, Norm, VisionTransformer


@dataclass(frozen=True)
class Weights(Mapping[str, Tensor]):
    """A state dict, of which each tensor is copied as it is asked for.

    Attributes:
        dtype, device: of the copies.
    """

    tensors: Mapping[str, Tensor]
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"

    def __getitem__(self, name: str) -> Tensor:
        # Nodes run in inference mode, and of tensors made there no gradient can be had.
        with torch.inference_mode(False):
            return self.tensors[name].to(self.device, self.dtype, copy=True)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def linear(self, *names: str) -> Linear:
        """One layer of several, one below the other. What has no bias, beside some that have, has zeros."""
        weights = [self[f"{name}.weight"] for name in names]
        biases = [self.get(f"{name}.bias") for name in names]
        with torch.inference_mode(False):
            if all(bias is None for bias in biases):
                return Linear(torch.cat(weights))
            filled = [
                weight.new_zeros(len(weight)) if bias is None else bias
                for weight, bias in zip(weights, biases, strict=True)
            ]
            return Linear(torch.cat(weights), torch.cat(filled))

    def scaled(self, name: str, scale: str) -> Linear:
        """A layer and the layer scale behind it."""
        layer, factor = self.linear(name), self[scale]
        with torch.inference_mode(False):
            return Linear(layer.weight * factor[:, None], layer.bias * factor)

    def norm(self, name: str, eps: float) -> Norm:
        return Norm(self[f"{name}.weight"], self[f"{name}.bias"], eps)

    def count(self, blocks: str) -> int:
        """How many blocks there are, whose names begin with ``blocks`` and their number."""
        found = (name.removeprefix(blocks) for name in self if name.startswith(blocks))
        return 1 + max(int(rest.split(".")[0]) for rest in found)


def timm(weights: Weights, heads: int, final_eps: float = 1e-6) -> tuple[VisionTransformer, Linear | None]:
    """timm's ViT with its classifier, and DINO, which has none."""

    def block(name: str) -> Block:
        return Block(
            weights.norm(f"{name}.norm1", 1e-6),
            weights.linear(f"{name}.attn.qkv"),
            weights.linear(f"{name}.attn.proj"),
            weights.norm(f"{name}.norm2", 1e-6),
            weights.linear(f"{name}.mlp.fc1"),
            weights.linear(f"{name}.mlp.fc2"),
        )

    vit = VisionTransformer(
        weights.linear("patch_embed.proj"),
        weights["cls_token"][0],
        weights["pos_embed"][0],
        [block(f"blocks.{i}") for i in range(weights.count("blocks."))],
        weights.norm("norm", final_eps),
        heads,
    )
    return vit, weights.linear("head") if "head.weight" in weights else None


def clip(
    weights: Weights, heads: int, activation: Callable[[Tensor], Tensor], eps: float = 1e-5
) -> tuple[VisionTransformer, Tensor]:
    """CLIP's, by ComfyUI's names, and its projection (E, D)."""

    def block(name: str) -> Block:
        return Block(
            weights.norm(f"{name}.layer_norm1", eps),
            weights.linear(*(f"{name}.self_attn.{x}_proj" for x in "qkv")),
            weights.linear(f"{name}.self_attn.out_proj"),
            weights.norm(f"{name}.layer_norm2", eps),
            weights.linear(f"{name}.mlp.fc1"),
            weights.linear(f"{name}.mlp.fc2"),
        )

    model, layers = "vision_model", "vision_model.encoder.layers."
    vit = VisionTransformer(
        weights.linear(f"{model}.embeddings.patch_embedding"),
        weights[f"{model}.embeddings.class_embedding"][None],
        weights[f"{model}.embeddings.position_embedding.weight"],
        [block(f"{layers}{i}") for i in range(weights.count(layers))],
        weights.norm(f"{model}.post_layernorm", eps),
        heads,
        activation,
        weights.norm(f"{model}.pre_layrnorm", eps),
    )
    return vit, weights["visual_projection.weight"]


def dinov2(weights: Weights, heads: int) -> VisionTransformer:
    """By the names of transformers, before and since its version 5, or of ComfyUI."""

    def block(name: str) -> Block:
        old = f"{name}.attention.attention.query.weight" in weights
        attention = f"{name}.attention" + (".attention" if old else "")
        qkv = (
            f"{attention}.{x}" for x in (("query", "key", "value") if old else ("q_proj", "k_proj", "v_proj"))
        )
        proj = f"{name}.attention." + ("output.dense" if old else "o_proj")
        return Block(
            weights.norm(f"{name}.norm1", 1e-6),
            weights.linear(*qkv),
            weights.scaled(proj, f"{name}.layer_scale1.lambda1"),
            weights.norm(f"{name}.norm2", 1e-6),
            *_dinov2_mlp(weights, name),
        )

    gated = "encoder.layer.0.mlp.fc1.weight" not in weights
    return VisionTransformer(
        weights.linear("embeddings.patch_embeddings.projection"),
        weights["embeddings.cls_token"][0],
        weights["embeddings.position_embeddings"][0],
        [block(f"encoder.layer.{i}") for i in range(weights.count("encoder.layer."))],
        weights.norm("layernorm", 1e-6),
        heads,
        F.silu if gated else F.gelu,
        registers=_registers(weights),
    )


def _dinov2_mlp(weights: Weights, name: str) -> tuple[Linear, Linear, Linear | None]:
    """fc1, fc2 and the gate."""
    scale = f"{name}.layer_scale2.lambda1"
    if f"{name}.mlp.fc1.weight" in weights:
        return weights.linear(f"{name}.mlp.fc1"), weights.scaled(f"{name}.mlp.fc2", scale), None
    if f"{name}.mlp.gate_proj.weight" in weights:
        gate, up = weights.linear(f"{name}.mlp.gate_proj"), weights.linear(f"{name}.mlp.up_proj")
        return up, weights.scaled(f"{name}.mlp.down_proj", scale), gate
    both = weights.linear(f"{name}.mlp.weights_in")
    gate, up = (Linear(w, b) for w, b in zip(both.weight.chunk(2), both.bias.chunk(2), strict=True))
    return up, weights.scaled(f"{name}.mlp.weights_out", scale), gate


def dinov3(weights: Weights, heads: int) -> VisionTransformer:
    """By the names of transformers, or of ComfyUI, which leaves out their "model."."""
    model = "model." if "model.layer.0.norm1.weight" in weights else ""
    gated = f"{model}layer.0.mlp.gate_proj.weight" in weights

    def block(name: str) -> Block:
        return Block(
            weights.norm(f"{name}.norm1", 1e-5),
            weights.linear(*(f"{name}.attention.{x}_proj" for x in "qkv")),
            weights.scaled(f"{name}.attention.o_proj", f"{name}.layer_scale1.lambda1"),
            weights.norm(f"{name}.norm2", 1e-5),
            weights.linear(f"{name}.mlp.up_proj"),
            weights.scaled(f"{name}.mlp.down_proj", f"{name}.layer_scale2.lambda1"),
            weights.linear(f"{name}.mlp.gate_proj") if gated else None,
        )

    return VisionTransformer(
        weights.linear("embeddings.patch_embeddings"),
        weights["embeddings.cls_token"][0],
        None,
        [block(f"{model}layer.{i}") for i in range(weights.count(f"{model}layer."))],
        weights.norm("norm", 1e-5),
        heads,
        F.silu if gated else F.gelu,
        rope=100.0,
        registers=_registers(weights),
    )


def _registers(weights: Weights) -> Tensor | None:
    tokens = weights.get("embeddings.register_tokens")
    return None if tokens is None else tokens[0]
