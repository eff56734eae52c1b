"""Layer-wise relevance propagation (LRP) through a vision transformer, alpha = 1.

"Transformer Interpretability Beyond Attention Visualization" (Chefer et al., CVPR 2021, arXiv 2012.09838).
Each operation is an autograd function whose backward pass hands on relevance in place of a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from .vit import Linear, Rules

EPS = 1e-9


def safe_divide(a: Tensor, b: Tensor) -> Tensor:
    """a / (b + 1e-9), and 0 where b is."""
    divisor = b + EPS
    divisor = torch.where(divisor == 0, EPS, divisor)
    return torch.where(b == 0, 0, a / divisor)


@dataclass(frozen=True)
class Relevance(Rules):
    """The two rule sets of the authors' code.

    Attributes:
        joint: "ours" there: positive and negative products share the relevance of a linear layer by their
            sum, and the summands of an addition share it by their own. Else "orig": each kind of product
            takes all of it, and sums are not rescaled.
    """

    joint: bool = True

    def patches(self, pixels: Tensor, layer: Linear) -> Tensor:
        return _Patches.apply(pixels, *layer)

    def linear(self, x: Tensor, layer: Linear) -> Tensor:
        return _Linear.apply(x, *layer, self.joint)

    def elementwise(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return _Unchanged.apply(x, function)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return _Add.apply(a, b, self.joint)

    def branch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _Branch.apply(x)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return _Product.apply(a, b)

    def first(self, x: Tensor) -> Tensor:
        return _First.apply(x)


class _Linear(Function):
    """The bias has no part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, joint: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.joint = joint
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, relevance: Tensor):
        x, weight = ctx.saved_tensors
        parts = [(x.clamp(min=0), weight.clamp(min=0)), (x.clamp(max=0), weight.clamp(max=0))]
        sums = [part @ w.T for part, w in parts]
        if ctx.joint:
            sums = [sums[0] + sums[1]] * 2
        handed = (p * (safe_divide(relevance, z) @ w) for (p, w), z in zip(parts, sums, strict=True))
        return sum(handed), None, None, None


class _Unchanged(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(x)

    @staticmethod
    def backward(ctx: Any, relevance: Tensor):
        return relevance, None


class _Add(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, joint: bool) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.joint = joint
        return a + b

    @staticmethod
    def backward(ctx: Any, relevance: Tensor):
        a, b = ctx.saved_tensors
        share = safe_divide(relevance, a + b)
        parts = [a * share, b * share]
        if ctx.joint:
            sums = [part.sum() for part in parts]
            size = sums[0].abs() + sums[1].abs()
            parts = [
                part * safe_divide(safe_divide(own.abs(), size) * relevance.sum(), own)
                for part, own in zip(parts, sums, strict=True)
            ]
        return *parts, None


class _Branch(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        return x.clone(), x.clone()

    @staticmethod
    def backward(ctx: Any, one: Tensor, other: Tensor):
        (x,) = ctx.saved_tensors
        return x * (safe_divide(one, x) + safe_divide(other, x))


class _Product(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        product = a @ b
        ctx.save_for_backward(a, b, product)
        return product

    @staticmethod
    def backward(ctx: Any, relevance: Tensor):
        a, b, product = ctx.saved_tensors
        share = safe_divide(relevance, product)
        return a * (share @ b.mT) / 2, b * (a.mT @ share) / 2


class _First(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x[0].clone()

    @staticmethod
    def backward(ctx: Any, relevance: Tensor):
        (x,) = ctx.saved_tensors
        handed = torch.zeros_like(x)
        handed[0] = x[0] * safe_divide(relevance, x[0])
        return handed


class _Patches(Function):
    """The zB rule: pixels lie between the least and the greatest of the picture."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(pixels, weight)
        return F.conv2d(pixels[None], weight, bias, stride=weight.shape[-2:])[0]

    @staticmethod
    def backward(ctx: Any, relevance: Tensor):
        pixels, weight = ctx.saved_tensors
        stride = weight.shape[-2:]
        low, high = (torch.full_like(pixels, float(bound)) for bound in pixels.aminmax())
        terms = [(pixels, weight, 1), (low, weight.clamp(min=0), -1), (high, weight.clamp(max=0), -1)]
        total = sum(sign * F.conv2d(x[None], w, stride=stride) for x, w, sign in terms) + EPS
        share = relevance[None] / total
        handed = sum(sign * x * F.conv_transpose2d(share, w, stride=stride)[0] for x, w, sign in terms)
        return handed, None, None
