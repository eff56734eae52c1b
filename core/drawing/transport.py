"""Concept maps as bytes for the browser, and the recorded maps behind them: of images those of single layers
and evaluations, of which the browser takes means, and of videos, which would be too many, the means. They are
the paper's, whatever the average of the concept maps.

A packet is a zlib stream of two little-endian float32, ``low`` and ``high``, and of uint8 levels
(E, K, h, w), each frame but the first as the difference from the one before, modulo 256: maps of
neighbouring steps, or frames of a video, are alike. A level q stands for low + q (high - low) / 255, so no
value is off by more than (high - low) / 510: at most 0.002 for maps that a softmax has made.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..observing.recording import gathered
from ..reading.maps import ConceptMaps, competing, heatmaps, mean_where_seen

LEVELS = 255


def pack(frames: Tensor, *, from_zero: bool = True) -> bytes:
    """A packet of maps (E, K, h, w).

    Args:
        from_zero: they are maps in 0..1 and their ``low`` is 0; else it is their smallest value.
    """
    values = frames.float().cpu().numpy()
    low = 0.0 if from_zero else float(values.min())
    span = float(values.max()) - low or 1.0
    levels = np.rint((values - low) * (LEVELS / span)).astype(np.uint8)
    levels[1:] -= levels[:-1].copy()
    return zlib.compress(struct.pack("<ff", low, low + span) + levels.tobytes(), 6)


def layer_means(maps: ConceptMaps, image: int) -> Tensor:
    """For every recorded layer of one image, the mean over the chosen steps: (L, K, h, w)."""
    recording = maps.recording
    evaluations = recording.select(maps.space, recording.layers, maps.steps)
    each = (_maps(maps, scores[:, image]) for scores in evaluations)
    return mean_where_seen(each, recording.weights(maps.steps)).nan_to_num(0)


def evaluation_means(maps: ConceptMaps, image: int) -> Tensor:
    """For every evaluation of one image, the mean over the chosen layers: (E, K, h, w)."""
    evaluations = maps.recording.select(maps.space, maps.layers)
    return torch.stack([_maps(maps, scores[:, image]).mean(0) for scores in evaluations]).nan_to_num(0)


def layer(maps: ConceptMaps, image: int, layer: int) -> Tensor:
    """Every evaluation of one layer and image: (E, K, h, w).

    Raises:
        ValueError: the layer was not recorded.
    """
    evaluations = maps.recording.select(maps.space, [layer])
    return _maps(maps, torch.stack([scores[0, image] for scores in evaluations])).nan_to_num(0)


def video_mean(maps: ConceptMaps, video: int, layers: Sequence[int], steps: Sequence[int]) -> Tensor:
    """For every latent frame of one video, the mean over layers and steps: (F, K, h, w).

    Raises:
        ValueError: a layer, or none of the steps, was recorded.
    """
    mean = heatmaps(
        gathered([(maps.recording, video)]),
        space=maps.space,
        layers=layers,
        steps=steps,
        softmax=maps.softmax,
        temperature=maps.temperature,
    )
    return mean.nan_to_num(0)


def _maps(maps: ConceptMaps, scores: Tensor) -> Tensor:
    if maps.softmax:
        return competing(scores, maps.space, maps.temperature, 1)
    return scores / maps.temperature


def picture(image: Tensor, *, of_video: bool = False) -> bytes:
    """An image (H, W, 3 or more) in 0..1 as a JPEG for looking at; a frame of a video, of which there are
    many, as half as many bytes."""
    pixels = (image[..., :3].clamp(0, 1) * 255).round().byte().cpu().numpy()
    file = io.BytesIO()
    quality = {"quality": 85} if of_video else {"quality": 95, "subsampling": 0}
    Image.fromarray(pixels).save(file, "JPEG", **quality)
    return file.getvalue()
