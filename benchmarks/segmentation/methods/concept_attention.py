"""ConceptAttention: scores of the concept stream in the output space of attention (section 4.1)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from ....core.concepts import Concepts
from ....core.observing.recording import parse_layers
from ....core.reading.maps import GROUNDINGS, concept_maps
from ....core.reading.refine import refine
from ..models import Models, View
from . import Query, check

SMOOTH_SIZE = 224


@dataclass(frozen=True)
class ConceptAttention:
    """The maps of one choice. Those that differ only in what is made of the scores share a forward pass.

    Attributes:
        space, softmax, temperature, grounding: see ``core.reading.maps.concept_maps``.
        layers: "default", "all", "last N", or numbers as in "0, 15-18".
        level: the noise level, 0..1. The paper takes 0.5.
        samples: of noise; their maps are averaged.
        pooling, pooled_prompt, attend_image, attend_concepts, guidance: see ``View``.
        background: instead of the data set's background concepts.
        captioned: whether the model sees the caption, as in the reference, or an empty prompt.
        bilinear: maps are enlarged to 224 x 224 smoothly, before they are cut.
        refine: maps are refined by the picture at its size before they are cut; see ``core.reading.refine``.
    """

    models: Models = field(repr=False, compare=False)
    space: str = "output"
    softmax: bool = True
    temperature: float = 1.0
    grounding: str = GROUNDINGS[0]
    layers: str = "default"
    level: float = 0.5
    samples: int = 1
    pooling: str = "mean of tokens"
    attend_image: bool = True
    attend_concepts: bool = True
    background: tuple[str, ...] | None = None
    captioned: bool = True
    pooled_prompt: bool = True
    guidance: float | None = None
    bilinear: bool = False
    refine: bool = False

    def __post_init__(self) -> None:
        check(self.level, self.samples)
        if self.bilinear and self.refine:
            raise ValueError("Maps are enlarged either smoothly or by the picture's edges: choose one.")
        layers_of(self.layers, self.models.layers, self.models.default_layers)
        self.models.expect(self.space)

    @property
    def settings(self) -> dict:
        choices = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "models"}
        return {"method": "concept-attention", **choices}

    def __call__(self, query: Query) -> Tensor:
        concepts = query.concepts
        if self.background is not None:
            concepts = Concepts(concepts.names, tuple(b for b in self.background if b not in concepts.names))
        view = View(
            concepts,
            query.prompt if self.captioned else "",
            self.pooling,
            self.pooled_prompt,
            self.attend_image,
            self.attend_concepts,
            self.level,
            self.guidance,
        )
        recording = self.models.recording(query, view, self.samples)
        layers = layers_of(self.layers, recording.layers, recording.default_layers)
        maps = concept_maps(
            recording,
            space=self.space,
            layers=layers,
            softmax=self.softmax,
            temperature=self.temperature,
            grounding=self.grounding,
        )
        if self.refine:
            picture = torch.from_numpy(query.picture.copy()).float() / 255
            return refine(maps.values[0], picture, maps.coverage)
        if self.bilinear:
            return maps.at_size(SMOOTH_SIZE, SMOOTH_SIZE)[0]
        return maps.values[0]


def load(models: Models, **choices) -> ConceptAttention:
    return ConceptAttention(models, **choices)


def layers_of(text: str, available: Sequence[int], default: Sequence[int]) -> tuple[int, ...]:
    """Layers from text: as ``core.observing.recording.parse_layers``, or "last N".

    Raises:
        ValueError: it is neither, or names layers that the model does not have.
    """
    if last := re.fullmatch(r"\s*last\s+(\d+)\s*", text):
        return tuple(available)[-int(last[1]) :]
    return parse_layers(text, available, default)
