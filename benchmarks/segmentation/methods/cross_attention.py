"""Flux's own cross-attention: products of image and concept queries (the paper's section 4.2), for
concepts that need not be in the prompt."""

from __future__ import annotations

from ..models import Models
from .concept_attention import ConceptAttention


def load(models: Models, **choices) -> ConceptAttention:
    return ConceptAttention(models, space="cross-attention", **choices)
