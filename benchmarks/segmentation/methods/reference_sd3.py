"""What the reference does with Stable Diffusion 3, where that is not the paper's method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from ....core.concepts import Concepts, ConceptTokens
from ....core.observing.observe import WhatToRecord
from ....core.observing.readers.blocks import BlockReading
from ..models import Models
from . import Query, check

START = "start token"


class Vectors(NamedTuple):
    """Of one layer in one call of the model: what the concepts, the start token before them, are given by
    their attention (B, K + 1, D), and the picture by one of its own over itself and them (B, N, D)."""

    concepts: Tensor
    picture: Tensor


class VectorReading(BlockReading):
    """Adds the vectors of each recorded layer, as a list, to ``calls``."""

    def __init__(self, calls: list[list[Vectors]], *args) -> None:
        super().__init__(*args)
        self._vectors: list[Vectors] = []
        calls.append(self._vectors)

    def _record(self, concepts, seen, picture, out) -> None:
        super()._record(concepts, seen, picture, out)
        q, k, v = (x[:, :, picture] for x in (seen.q, seen.k, seen.v))
        keys, values = torch.cat((k, concepts.k), 2), torch.cat((v, concepts.v), 2)
        attended = F.scaled_dot_product_attention(q, keys, values, scale=seen.scale)
        self._vectors.append(Vectors(concepts.out, rearrange(attended, "b h n d -> b n (h d)")))


def scores(vectors: Vectors) -> Tensor:
    """(B, K, N): of concepts of length 1, the start token left out."""
    concepts, picture = (v.float() for v in vectors)
    unit = concepts / (concepts.norm(dim=-1, keepdim=True) + 1e-8)
    return (unit @ picture.mT)[:, 1:]


def heatmaps(calls: Sequence[Sequence[Vectors]], softmax: bool = True) -> Tensor:
    """(B, K, N), of the same layers of some calls: the vectors' mean over the calls, and the maps' mean over
    the layers."""
    maps = []
    for layer in zip(*calls, strict=True):
        mean = Vectors(*(torch.stack(each).float().mean(0) for each in zip(*layer, strict=True)))
        maps.append(scores(mean).softmax(1) if softmax else scores(mean))
    return torch.stack(maps).mean(0)


@dataclass(frozen=True)
class ReferenceSD3:
    """All names are one prompt, and concept k is its CLIP token k, even if names before it have several. The
    maps are of all layers.

    Attributes:
        level: the noise level, 0..1.
        samples: of noise, over which the vectors are averaged, as the reference does over its steps.
    """

    models: Models = field(repr=False, compare=False)
    level: float = 0.5
    samples: int = 1

    def __post_init__(self) -> None:
        check(self.level, self.samples)
        self.models.expect_family("Stable Diffusion 3")

    @property
    def settings(self) -> dict:
        return {"method": "reference-sd3", "level": self.level, "samples": self.samples}

    def __call__(self, query: Query) -> Tensor:
        names = query.concepts.all
        prompt = self.models.encode((" ".join(names),), "first token").sequences[0]
        calls: list[list[Vectors]] = []
        what = WhatToRecord(
            Concepts((START, *names)),
            ConceptTokens.single(prompt[: 1 + len(names)]),
            layers=self.models.layers,
            reader=partial(VectorReading, calls),
        )
        for sample in range(self.samples):
            look = self.models.look(query, what, query.prompt, (self.level,), sample)
        return heatmaps(calls)[0].unflatten(-1, look.scores["output"][0].shape[-2:])


def load(models: Models, *, level: float = 0.5, samples: int = 1) -> ReferenceSD3:
    return ReferenceSD3(models, level, samples)
