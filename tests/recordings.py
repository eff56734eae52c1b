"""Recordings and concept maps made by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from concept_attention.core.concepts import Concepts
from concept_attention.core.observing.recording import Recording
from concept_attention.core.reading.maps import ConceptMaps

CONCEPTS = Concepts(("cat", "ball"), ("sky",))


def recording(
    *,
    evaluations: int = 3,
    layers: tuple[int, ...] = (0, 1, 2, 3, 4, 5),
    batch: int = 1,
    concepts: Concepts = CONCEPTS,
    grid: tuple[int, int] = (4, 6),
    seed: int = 0,
) -> Recording:
    g = torch.Generator().manual_seed(seed)
    shape = (len(layers), batch, len(concepts.all), *grid)
    return Recording(
        concepts=concepts,
        layers=layers,
        default_layers=layers[-4:],
        sigmas=tuple(1 - i / evaluations for i in range(evaluations)),
        steps=tuple(range(evaluations)),
        scores={"output": tuple(3 * torch.randn(shape, generator=g) for _ in range(evaluations))},
        image_size=(16 * grid[0], 16 * grid[1]),
        coverage=(1.0, 1.0),
    )


def maps_of(values: Tensor, concepts: Concepts, image_size: tuple[int, int]) -> ConceptMaps:
    """Maps with these values (B, K, h, w), as if made from a single evaluation of a single layer."""
    recording = Recording(
        concepts=concepts,
        layers=(0,),
        default_layers=(0,),
        sigmas=(1.0,),
        steps=(0,),
        scores={"output": (values.log()[None],)},
        image_size=image_size,
        coverage=(1.0, 1.0),
    )
    return ConceptMaps(values, recording, "output", (0,), (0,), softmax=True, temperature=1.0)
