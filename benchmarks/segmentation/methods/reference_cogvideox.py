"""What the reference does with CogVideoX, where that is not the paper's method."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ....core.concepts import Concepts, ConceptTokens
from ....core.observing.observe import WhatToRecord
from ....core.observing.recording import Recording
from ....core.reading import maps
from ..models import Models
from . import Query, check

LENGTH = 226
"""Of every prompt of CogVideoX; the reference fills its concepts up to it too."""
TOKENIZED = 16
"""To how many tokens the text of one concept is filled up."""


def padded(tokens: Tensor) -> ConceptTokens:
    """The concepts (K, C) and rows of zeros up to ``LENGTH``, which take part in attention and softmax."""
    return ConceptTokens.single(torch.cat((tokens, tokens.new_zeros(LENGTH - len(tokens), tokens.shape[1]))))


def heatmaps(recording: Recording, count: int, **choices) -> Tensor:
    """Maps (B, count, h, w) of the concepts before the padding, which has a share in each patch too.

    Args:
        choices: of ``core.reading.maps.heatmaps``.
    """
    return maps.heatmaps(recording, **choices)[:, :count]


@dataclass(frozen=True)
class ReferenceCogVideoX:
    """Concepts are their first token. The maps are of all layers.

    Attributes:
        level: the noise level, 0..1.
        samples: of noise; their maps are averaged, as the reference does over its steps.
    """

    models: Models = field(repr=False, compare=False)
    level: float = 0.5
    samples: int = 1

    def __post_init__(self) -> None:
        check(self.level, self.samples)
        self.models.expect_family("CogVideoX")

    @property
    def settings(self) -> dict:
        return {"method": "reference-cogvideox", "level": self.level, "samples": self.samples}

    def __call__(self, query: Query) -> Tensor:
        names = query.concepts.all
        tokens = padded(self.models.encode(names, "first token", t5xxl_min_length=TOKENIZED).pooled())
        padding = tuple(f"padding {i}" for i in range(len(names), LENGTH))
        what = WhatToRecord(Concepts(names, padding), tokens, layers=self.models.layers)
        looks = [
            self.models.look(query, what, query.prompt, (self.level,), sample)
            for sample in range(self.samples)
        ]
        return torch.stack([heatmaps(look, len(names))[0] for look in looks]).mean(0)


def load(models: Models, *, level: float = 0.5, samples: int = 1) -> ReferenceCogVideoX:
    return ReferenceCogVideoX(models, level, samples)
