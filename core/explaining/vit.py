"""A vision transformer as plain tensors, and a forward pass that keeps what explanations are made of.

Shapes: T tokens, N of them patches (the last ones) on a grid h x w, H heads, d channels of a head, D channels
of a token. One picture at a time, without a batch axis: the relevance rules take sums over a whole picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Linear(NamedTuple):
    """A linear layer, or a convolution over patches."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Norm(NamedTuple):
    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class Block:
    """A pre-norm block.

    Attributes:
        qkv: queries, keys and values, one after the other.
        gate: of a gated MLP, fc2(activation(gate(x)) * fc1(x)); None of fc2(activation(fc1(x))).
    """

    norm1: Norm
    qkv: Linear
    proj: Linear
    norm2: Norm
    fc1: Linear
    fc2: Linear
    gate: Linear | None = None


class Rules:
    """The operations of a forward pass, as they are. ``relevance.Relevance`` are the same, but what goes
    backward through them is not the gradient."""

    def patches(self, pixels: Tensor, layer: Linear) -> Tensor:
        return F.conv2d(pixels[None], *layer, stride=layer.weight.shape[-2:])[0]

    def linear(self, x: Tensor, layer: Linear) -> Tensor:
        return layer(x)

    def elementwise(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """What keeps the shape: a norm, an activation, a softmax."""
        return function(x)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def branch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """For two readers."""
        return x, x

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    def first(self, x: Tensor) -> Tensor:
        """Of tokens (T, D) the first (D,)."""
        return x[0]


class Layer(NamedTuple):
    """What a forward pass keeps of a block: softmax(q k^T / sqrt(d)) (H, T, T) and v (H, T, d)."""

    attention: Tensor
    values: Tensor


@dataclass(frozen=True)
class Trace:
    """What a forward pass keeps.

    Attributes:
        grid: (h, w).
        tokens: (T, D) behind the last block.
        normed: the same behind the final norm.
        cls: its first token (D,).
    """

    grid: tuple[int, int]
    layers: tuple[Layer, ...]
    tokens: Tensor
    normed: Tensor
    cls: Tensor

    @property
    def prefix(self) -> int:
        """How many tokens come before the patches: CLS, and registers."""
        return len(self.tokens) - self.grid[0] * self.grid[1]

    def patch_map(self, values: Tensor) -> Tensor:
        """Values of all tokens (..., T) as maps of the patches (..., h, w)."""
        return values[..., self.prefix :].unflatten(-1, self.grid)


@dataclass(frozen=True)
class VisionTransformer:
    """
    Attributes:
        patch: the convolution that makes tokens of patches.
        cls: (1, D).
        positions: of CLS and the patches, (1 + N, D); None with rotary positions.
        norm_pre: before the first block, in CLIP.
        rope: the base of rotary positions (DINOv3).
        registers: (R, D), between CLS and the patches.
    """

    patch: Linear
    cls: Tensor
    positions: Tensor | None
    blocks: Sequence[Block]
    norm: Norm
    heads: int
    activation: Callable[[Tensor], Tensor] = F.gelu
    norm_pre: Norm | None = None
    rope: float | None = None
    registers: Tensor | None = None

    @property
    def patch_size(self) -> int:
        return self.patch.weight.shape[-1]

    def __call__(self, pixels: Tensor, rules: Rules | None = None, keep: int | None = None) -> Trace:
        """
        Args:
            keep: how many of the last layers the trace has; all if None.
            pixels: (3, height, width), normalised as the model wants it. What does not fill a patch, at the
                right and the bottom, is left out.
        """
        rules = rules or Rules()
        size = self.patch_size
        rows, columns = (side // size for side in pixels.shape[1:])
        patches = rules.patches(pixels[:, : rows * size, : columns * size], self.patch)
        tokens = torch.cat((self.cls, patches.flatten(1).T))
        if self.positions is not None:
            tokens = rules.add(tokens, self._positions_at(rows, columns))
        if self.registers is not None:
            tokens = torch.cat((tokens[:1], self.registers, tokens[1:]))
        if self.norm_pre is not None:
            tokens = rules.elementwise(self.norm_pre, tokens)
        turned = self._rotary(rows, columns)
        layers: list[Layer] = []
        for block in self.blocks:
            skip, tokens = rules.branch(tokens)
            qkv = rules.linear(rules.elementwise(block.norm1, tokens), block.qkv)
            q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(1, 2, 0, 3)
            q, k = turned(q), turned(k)
            scale = q.shape[-1] ** -0.5
            attention = rules.elementwise(lambda x, s=scale: (x * s).softmax(-1), rules.product(q, k.mT))
            layers = [*layers, Layer(attention, v)][-keep if keep else None :]
            mixed = rules.product(attention, v).transpose(0, 1).flatten(1)
            tokens = rules.add(skip, rules.linear(mixed, block.proj))
            skip, tokens = rules.branch(tokens)
            tokens = rules.add(skip, self._mlp(rules.elementwise(block.norm2, tokens), block, rules))
        normed = rules.elementwise(self.norm, tokens)
        return Trace((rows, columns), tuple(layers), tokens, normed, rules.first(normed))

    def _mlp(self, x: Tensor, block: Block, rules: Rules) -> Tensor:
        if block.gate is not None:
            return block.fc2(self.activation(block.gate(x)) * block.fc1(x))
        return rules.linear(rules.elementwise(self.activation, rules.linear(x, block.fc1)), block.fc2)

    def _positions_at(self, rows: int, columns: int) -> Tensor:
        """Positions for a grid of another size than the trained one, as DINO has them."""
        trained = round((len(self.positions) - 1) ** 0.5)
        if (rows, columns) == (trained, trained):
            return self.positions
        scale = tuple((side + 0.1) / trained for side in (rows, columns))
        grid = self.positions[1:].T.unflatten(1, (trained, trained))[None]
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")[0]
        return torch.cat((self.positions[:1], grid.flatten(1).T))

    def _rotary(self, rows: int, columns: int) -> Callable[[Tensor], Tensor]:
        """Turns the patches among queries or keys (H, T, d) by their rotary positions, as DINOv3."""
        if self.rope is None:
            return lambda x: x
        like = self.cls
        channels = like.shape[1] // self.heads
        places = torch.cartesian_prod(
            *(2 * (torch.arange(n).to(like) + 0.5) / n - 1 for n in (rows, columns))
        )
        frequencies = self.rope ** -torch.arange(0, 1, 4 / channels).to(like)
        angles = (2 * torch.pi * places[:, :, None] * frequencies).flatten(1).tile(2)
        cos, sin = angles.cos(), angles.sin()

        def turned(x: Tensor) -> Tensor:
            before, patches = x[:, : -len(cos)], x[:, -len(cos) :]
            a, b = patches.chunk(2, -1)
            return torch.cat((before, patches * cos + torch.cat((-b, a), -1) * sin), 1)

        return turned
