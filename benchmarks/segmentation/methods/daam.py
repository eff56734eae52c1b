"""Attention of patches to words, as in DAAM (arXiv 2210.04885): the cross-attention of Stable Diffusion 1, 2
and XL, and of models with joint attention the same probabilities. Raw, without a softmax over concepts."""

from __future__ import annotations

from ..models import Models
from .concept_attention import ConceptAttention


def load(models: Models, *, softmax: bool = False, **choices) -> ConceptAttention:
    return ConceptAttention(models, space="probability", softmax=softmax, **choices)
