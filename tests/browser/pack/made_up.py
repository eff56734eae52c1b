"""A made-up recording: blobs that become clearer over the steps and differ between layers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CONCEPTS = ("dragon", "rock", "sky", "sun", "<img src=x onerror=alert(1)>", "hot air balloon over the sea")
LAYERS, STEPS = 19, 28


def scores(batch: int, rows: int, columns: int, steps: int = STEPS, layers: int = LAYERS) -> list[Tensor]:
    """One (L, B, K, h, w) per step."""
    g = torch.Generator().manual_seed(0)
    count = len(CONCEPTS)

    def blobs(size: int, *lead: int) -> Tensor:
        noise = torch.randn(*lead, size, size, generator=g)
        return F.interpolate(noise.reshape(-1, 1, size, size), (rows, columns), mode="bicubic").reshape(
            *lead, rows, columns
        )

    shape, detail = blobs(5, 1, batch, count), blobs(16, layers, batch, count)
    return [
        (6 * shape + detail) * (0.2 + 0.8 * step / steps)
        + 0.2 * torch.randn(layers, batch, count, rows, columns, generator=g)
        for step in range(steps)
    ]


def video(
    recording_class: type,
    concepts_class: type,
    batch: int,
    durations: tuple[int, ...],
    rows: int,
    columns: int,
):
    """As ``recording``, of videos in which the blobs move to the right; of few layers and steps."""
    moving = [
        torch.stack([first.roll(2 * frame, -1) for frame in range(len(durations))], 2).flatten(1, 2)
        for first in scores(batch, rows, columns, steps=3, layers=4)
    ]
    return recording_class(
        concepts=concepts_class(CONCEPTS[:-1], CONCEPTS[-1:]),
        layers=(0, 1, 2, 3),
        default_layers=(2, 3),
        sigmas=(1.0, 0.75, 0.5),
        steps=(0, 1, 2),
        scores={"output": tuple(moving)},
        image_size=(rows * 16, columns * 16),
        coverage=(1.0, 1.0),
        durations=durations,
    )


def recording(recording_class: type, concepts_class: type, batch: int, rows: int, columns: int):
    """The plugin's Recording of them, made with its classes: ComfyUI loads them under another name than
    the tests do."""
    return recording_class(
        concepts=concepts_class(CONCEPTS[:-1], CONCEPTS[-1:]),
        layers=tuple(range(LAYERS)),
        default_layers=(15, 16, 17, 18),
        sigmas=tuple(1 - step / STEPS for step in range(STEPS)),
        steps=tuple(range(STEPS)),
        scores={"output": tuple(scores(batch, rows, columns))},
        image_size=(rows * 16, columns * 16),
        coverage=(1.0, 1.0),
    )
