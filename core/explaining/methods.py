"""Explanations of a vision transformer: where in a picture a score comes from.

Maps are (K, h, w), one for each of K scores of the CLS token, or (h, w) where they do not depend on a score.
``head`` is a linear layer that makes those scores of CLS: of a classifier its own, of CLIP the texts in its
embedding space. Gradients and relevance need tensors that were not made in inference mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .relevance import Relevance
from .vit import Linear, Rules, Trace, VisionTransformer

Scores = Callable[[Tensor], Tensor]
"""Of CLS (D,) the scores (K,)."""


def attention(trace: Trace) -> Tensor:
    """The last layer's attention of CLS, the mean over the heads, (h, w)."""
    return trace.patch_map(trace.layers[-1].attention[:, 0].mean(0))


def rollout(trace: Trace, start_layer: int = 1) -> Tensor:
    """Attention rollout (Abnar & Zuidema, arXiv 2005.00928), (h, w)."""
    joint = None
    for layer in trace.layers[start_layer:]:
        mean = layer.attention.mean(0)
        mixed = mean + torch.eye(len(mean)).to(mean)
        mixed = mixed / mixed.sum(-1, keepdim=True)
        joint = mixed if joint is None else mixed @ joint
    return trace.patch_map(joint[0])


class Backward(NamedTuple):
    """What a score hands back, as a gradient or as relevance: to the pixels (3, height, width), and to the
    attention (H, T, T) of each layer."""

    pixels: Tensor
    attention: tuple[Tensor, ...]


def backward(
    vit: VisionTransformer,
    pixels: Tensor,
    scores: Scores,
    targets: Sequence[int],
    rules: Rules | None = None,
) -> tuple[Trace, list[Backward]]:
    """A forward pass, and what each of the ``targets`` among the scores hands back."""
    with torch.inference_mode(False), torch.enable_grad():
        pixels = pixels.clone().requires_grad_()
        trace = vit(pixels, rules)
        inputs = [pixels, *(layer.attention for layer in trace.layers)]
        values = scores(trace.cls)
        handed = []
        for target in targets:
            first, *rest = torch.autograd.grad(values[target], inputs, retain_graph=True)
            handed.append(Backward(first, tuple(rest)))
    return trace, handed


def gradcam(vit: VisionTransformer, pixels: Tensor, scores: Scores, targets: Sequence[int]) -> Tensor:
    """GradCAM of the last layer's attention, each map from 0 to 1; all 0 where no patch speaks for the
    score."""
    trace, handed = backward(vit, pixels, scores, targets)
    attended = trace.layers[-1].attention[:, 0].detach()
    maps = []
    for each in handed:
        weights = each.attention[-1][:, 0, trace.prefix :].mean(1)
        values = trace.patch_map((weights[:, None] * attended).mean(0).clamp(min=0))
        low, high = values.aminmax()
        maps.append((values - low) / torch.where(high > low, high - low, 1))
    return torch.stack(maps)


def attention_relevance(
    vit: VisionTransformer,
    pixels: Tensor,
    scores: Scores,
    targets: Sequence[int],
    start_layer: int | None = None,
) -> Tensor:
    """ "Generic Attention-model Explainability" (Chefer et al., arXiv 2103.15679), as its code for CLIP.

    Args:
        start_layer: the last if None.
    """
    trace, handed = backward(vit, pixels, scores, targets)
    start = len(trace.layers) - 1 if start_layer is None else start_layer
    maps = []
    for each in handed:
        joint = torch.eye(len(trace.tokens)).to(pixels)
        for layer, gradient in list(zip(trace.layers, each.attention, strict=True))[start:]:
            joint = joint + (gradient * layer.attention.detach()).clamp(min=0).mean(0) @ joint
        maps.append(trace.patch_map(joint[0]))
    return torch.stack(maps)


def lrp(
    vit: VisionTransformer, pixels: Tensor, head: Linear, targets: Sequence[int], joint: bool = False
) -> Tensor:
    """Relevance of the pixels, summed over the colours, signed: (K, height, width).

    Ill-conditioned: float32 can be off by a hundredth of the highest value and more.

    Args:
        joint: the rule set, see ``relevance.Relevance``.
    """
    return torch.stack([each.pixels.sum(0) for each in _relevance(vit, pixels, head, targets, joint)[1]])


def partial_lrp(
    vit: VisionTransformer, pixels: Tensor, head: Linear, targets: Sequence[int], joint: bool = False
) -> Tensor:
    """Relevance of the last layer's attention (Voita et al., arXiv 1905.09418).

    Args:
        joint: the rule set, see ``relevance.Relevance``.
    """
    trace, handed = _relevance(vit, pixels, head, targets, joint)
    return torch.stack([trace.patch_map(each.attention[-1].clamp(min=0).mean(0)[0]) for each in handed])


def transinterp(
    vit: VisionTransformer, pixels: Tensor, head: Linear, targets: Sequence[int], start_layer: int = 1
) -> Tensor:
    """Transformer attribution: relevance times gradient, rolled out over the layers (Chefer et al., arXiv
    2012.09838)."""
    trace, relevance = _relevance(vit, pixels, head, targets, joint=True)
    _, gradients = backward(vit, pixels, head, targets)
    maps = []
    for one, other in zip(relevance, gradients, strict=True):
        joint = torch.eye(len(trace.tokens)).to(pixels)
        for c, gradient in list(zip(one.attention, other.attention, strict=True))[start_layer:]:
            joint = joint + (gradient * c).clamp(min=0).mean(0) @ joint
        maps.append(trace.patch_map(joint[0]))
    return torch.stack(maps)


def _relevance(
    vit: VisionTransformer, pixels: Tensor, head: Linear, targets: Sequence[int], joint: bool
) -> tuple[Trace, list[Backward]]:
    if vit.rope is not None or any(block.gate is not None for block in vit.blocks):
        raise ValueError("Relevance has no rules for gated MLPs and rotary positions.")
    rules = Relevance(joint)
    return backward(vit, pixels, lambda cls: rules.linear(cls, head), targets, rules)


def decompose(vit: VisionTransformer, trace: Trace, projection: Tensor, texts: Tensor) -> Tensor:
    """What each token adds to the cosines of picture and texts through each head of each layer (Gandelsman et
    al., "Interpreting CLIP's Image Representation via Text-Based Decomposition", arXiv 2310.05916).

    Args:
        projection: of CLS behind the final norm into the space of the texts, (E, D).
        texts: unit vectors (K, E).

    Returns:
        (L, H, K, T). MLPs and CLS at the start add the rest.
    """
    cls = trace.tokens[0]
    deviation = (cls.var(correction=0) + vit.norm.eps).sqrt()
    image = projection @ trace.cls
    # A text's share of what is added to CLS before the final norm, (K, D), and of the norm's shift.
    towards = texts @ projection / image.norm()
    shift = towards @ vit.norm.bias
    towards = towards * vit.norm.weight / deviation
    # The mean and the shift are taken in equal parts from all that is added up.
    parts = (2 * len(vit.blocks) + 1) * len(trace.tokens) * vit.heads
    constant = (shift - cls.mean() * towards.sum(1)) / parts
    layers = []
    for block, layer in zip(vit.blocks, trace.layers, strict=True):
        heads = block.proj.weight.unflatten(1, (vit.heads, -1))  # (D, H, d)
        said = torch.einsum("htd,chd,kc->hkt", layer.values, heads, towards)
        bias = towards @ block.proj.bias / (len(trace.tokens) * vit.heads)
        layers.append(layer.attention[:, None, 0] * said + (bias + constant)[:, None])
    return torch.stack(layers)


def textspan(vit: VisionTransformer, trace: Trace, projection: Tensor, texts: Tensor) -> Tensor:
    """``decompose``, summed over heads and layers."""
    return trace.patch_map(decompose(vit, trace, projection, texts).sum((0, 1)))
