"""The value space: products of image and concept values (the paper's Table 3)."""

from __future__ import annotations

from ..models import Models
from .concept_attention import ConceptAttention


def load(models: Models, **choices) -> ConceptAttention:
    return ConceptAttention(models, space="value", **choices)
