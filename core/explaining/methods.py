"""Explanations of a vision transformer: where in a picture a score comes from.

Maps are (K, h, w), one for each of K scores of the CLS token, or (h, w) where they do not depend on a score.
``head`` is a linear layer that makes those scores of CLS: of a classifier its own, of CLIP the texts in its
embedding space. Gradients and relevance need tensors that were not made in inference mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

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


class Pass:
    """A forward pass through which scores are traced back, as gradients or as relevance.

    Attributes:
        pixels, trace: what it was made of, and what it kept.
    """

    def __init__(
        self, vit: VisionTransformer, pixels: Tensor, scores: Scores, rules: Rules | None = None
    ) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            self.pixels = pixels.clone().requires_grad_()
            self.trace = vit(self.pixels, rules)
            self._scores = scores(self.trace.cls)

    @property
    def attention(self) -> list[Tensor]:
        """Of all layers, (H, T, T)."""
        return [layer.attention for layer in self.trace.layers]

    def back(self, target: int, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What a score hands back to these tensors of the pass."""
        with torch.inference_mode(False):
            return torch.autograd.grad(self._scores[target], tensors, retain_graph=True)


def gradcam(vit: VisionTransformer, pixels: Tensor, scores: Scores, targets: Sequence[int]) -> Tensor:
    """GradCAM of the last layer's attention, each map from 0 to 1; all 0 where no patch speaks for the
    score."""
    gradients = Pass(vit, pixels, scores)
    trace, last = gradients.trace, gradients.attention[-1]
    maps = []
    for target in targets:
        (gradient,) = gradients.back(target, [last])
        weights = gradient[:, 0, trace.prefix :].mean(1)
        values = trace.patch_map((weights[:, None] * last[:, 0].detach()).mean(0).clamp(min=0))
        low, high = values.aminmax()
        maps.append((values - low) / torch.where(high > low, high - low, 1))
    return torch.stack(maps)


def attention_relevance(
    vit: VisionTransformer,
    pixels: Tensor,
    scores: Scores,
    targets: Sequence[int],
    start_layer: int = -1,
) -> Tensor:
    """ "Generic Attention-model Explainability" (Chefer et al., arXiv 2103.15679), as its code for CLIP."""
    gradients = Pass(vit, pixels, scores)
    layers = gradients.attention[start_layer:]
    maps = []
    for target in targets:
        pairs = zip(layers, gradients.back(target, layers), strict=True)
        maps.append(_rolled_out(gradients.trace, (layer.detach() * gradient for layer, gradient in pairs)))
    return torch.stack(maps)


def lrp(
    vit: VisionTransformer, pixels: Tensor, head: Linear, targets: Sequence[int], joint: bool = False
) -> Tensor:
    """Relevance of the pixels, summed over the colours, signed: (K, height, width).

    Ill-conditioned: float32 can be off by a hundredth of the highest value and more.

    Args:
        joint: the rule set, see ``relevance.Relevance``.
    """
    relevance = relevance_pass(vit, pixels, head, joint)
    return torch.stack([relevance.back(target, [relevance.pixels])[0].sum(0) for target in targets])


def partial_lrp(
    vit: VisionTransformer, pixels: Tensor, head: Linear, targets: Sequence[int], joint: bool = False
) -> Tensor:
    """Relevance of the last layer's attention (Voita et al., arXiv 1905.09418).

    Args:
        joint: the rule set, see ``relevance.Relevance``.
    """
    relevance = relevance_pass(vit, pixels, head, joint)
    last = relevance.attention[-1:]
    rows = [relevance.back(target, last)[0].clamp(min=0).mean(0)[0] for target in targets]
    return relevance.trace.patch_map(torch.stack(rows))


def transinterp(
    vit: VisionTransformer, pixels: Tensor, head: Linear, targets: Sequence[int], start_layer: int = 1
) -> Tensor:
    """Transformer attribution: relevance times gradient, rolled out over the layers (Chefer et al., arXiv
    2012.09838)."""
    passes = relevance_pass(vit, pixels, head, joint=True), Pass(vit, pixels, head)
    maps = []
    for target in targets:
        handed = (each.back(target, each.attention[start_layer:]) for each in passes)
        maps.append(_rolled_out(passes[0].trace, (c * g for c, g in zip(*handed, strict=True))))
    return torch.stack(maps)


def relevance_pass(vit: VisionTransformer, pixels: Tensor, head: Linear, joint: bool) -> Pass:
    """A pass that hands relevance back.

    Raises:
        ValueError: the model has parts for which there are no rules.
    """
    if vit.rope is not None or any(block.gate is not None for block in vit.blocks):
        raise ValueError("Relevance has no rules for gated MLPs and rotary positions.")
    rules = Relevance(joint)
    return Pass(vit, pixels, lambda cls: rules.linear(cls, head), rules)


def _rolled_out(trace: Trace, layers: Iterable[Tensor]) -> Tensor:
    """What reaches CLS of each patch, (h, w), through layers (H, T, T) that each add to what was before."""
    joint = torch.eye(len(trace.tokens)).to(trace.tokens)
    for layer in layers:
        joint = joint + layer.clamp(min=0).mean(0) @ joint
    return trace.patch_map(joint[0])


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
