"""The last layer's attention of DINO, DINOv2 or DINOv3. The concepts have no part; all of them get the same
map."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ....core.explaining.methods import attention
from ..vision import SHORTER_SIDE, Transformer
from . import Query

KIND = "vit"


@dataclass(frozen=True)
class Dino:
    """What does not fill a patch at the right and the bottom is left out, as in DINO's demo.

    Attributes:
        normalised: the paper's reference gives DINO pixels from 0 to 1, not as it was trained.
    """

    models: Transformer = field(repr=False, compare=False)
    normalised: bool = True

    @property
    def settings(self) -> dict:
        return {"method": "dino", "normalised": self.normalised}

    def __call__(self, query: Query) -> Tensor:
        height, width = query.picture.shape[:2]
        scale = SHORTER_SIDE / min(height, width)
        size = (round(scale * height), round(scale * width))
        pixels = self.models.pixels(query.picture, size, self.normalised)
        return attention(self.models.vit(pixels, keep=1)).expand(len(query.concepts.all), -1, -1)


def load(models: Transformer, *, normalised: bool = True) -> Dino:
    return Dino(models, normalised)
