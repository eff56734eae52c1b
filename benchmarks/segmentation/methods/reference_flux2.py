"""What the reference does with Flux.2, where that is not the paper's method."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ....core.observing.observe import WhatToRecord
from ....core.observing.recording import Recording
from ....core.reading import maps
from ..models import Models
from . import Query, check

TEMPERATURE = 1000.0
STEPS = 28


def steps_of(count: int) -> range:
    """Which of a run's steps maps are made from: of the last 30 %, all but the very last."""
    return range(int(0.7 * count), count - 1)


def heatmaps(recording: Recording, temperature: float = TEMPERATURE, **choices) -> Tensor:
    """Maps (B, K, h, w): a softmax of the mean of the scores, so soft that maps are nearly 1 / K everywhere.

    Args:
        temperature, choices: of ``core.reading.maps.heatmaps``.
    """
    return maps.heatmaps(recording, temperature=temperature, average="before softmax", **choices)


@dataclass(frozen=True)
class ReferenceFlux2:
    """Concepts are their last token. The maps are of the last three layers, 5 to 7 of Flux.2 dev's.

    Attributes:
        level: the noise level, 0..1. None: all those of ``steps_of`` the reference's 28 steps.
        guidance: that the model is given. The reference samples at 4, and looks at existing pictures at 0.
    """

    models: Models = field(repr=False, compare=False)
    level: float | None = None
    guidance: float = 4.0

    def __post_init__(self) -> None:
        check(1.0 if self.level is None else self.level, samples=1)
        self.models.expect_family("Flux.2")

    @property
    def settings(self) -> dict:
        return {"method": "reference-flux2", "level": self.level, "guidance": self.guidance}

    def __call__(self, query: Query) -> Tensor:
        tokens = self.models.encode(query.concepts.all, "last token")
        levels = self.models.levels(steps_of(STEPS), STEPS) if self.level is None else (self.level,)
        what = WhatToRecord(query.concepts, tokens)
        look = self.models.look(query, what, query.prompt, levels, guidance=self.guidance)
        return heatmaps(look)[0]


def load(models: Models, *, level: float | None = None, guidance: float = 4.0) -> ReferenceFlux2:
    return ReferenceFlux2(models, level, guidance)
