"""Explanations of CLIP, with the concepts' texts for targets. As in Concept Saliency (CLIP Vision)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ....core.explaining.clip import METHODS
from ..vision import Clip
from . import Query

KIND = "clip"
EXPLANATIONS = tuple(METHODS)


@dataclass(frozen=True)
class ExplainedClip:
    """
    Attributes:
        explanation: one of ``core.explaining.clip.METHODS``.
    """

    models: Clip = field(repr=False, compare=False)
    explanation: str = EXPLANATIONS[0]

    def __post_init__(self) -> None:
        if self.explanation not in EXPLANATIONS:
            raise ValueError(
                f'CLIP has no explanation "{self.explanation}". There are: {", ".join(EXPLANATIONS)}.'
            )

    @property
    def settings(self) -> dict:
        return {"method": "clip", "explanation": self.explanation}

    def __call__(self, query: Query) -> Tensor:
        return self.models.maps(query.picture, query.concepts.all, self.explanation)


def load(models: Clip, *, explanation: str = EXPLANATIONS[0]) -> ExplainedClip:
    return ExplainedClip(models, explanation)
