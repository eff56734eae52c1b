"""How a map is scored against true labels, as in the paper's section 5.2.

The protocol is that of Chefer et al. (https://github.com/hila-chefer/Transformer-Explainability/blob/c3e578f76b954e8528afeaaee26de3f07e3fe559/baselines/ViT/imagenet_seg_eval.py,
utils/metrices.py), as the paper's authors run it
(https://github.com/helblazer811/ConceptAttention/blob/db30c4dcee01184c4d3f9fc9e46477eeb4e3eef3/experiments/imagenet_segmentation/run_experiment.py
and experiments/pascal_voc_segmentation):

- one class: the concept's map, scaled to 0..1, is a mask where it is above its own mean, at 224 x 224,
  nearest neighbour; average precision is that of the map and of one minus the map together against the
  one-hot labels, for each image, and its mean over images is the mAP;
- several classes: the concept with the highest map wins; background concepts win for class 0;
- accuracy and IoU are of pixels counted over the whole data set; IoU is the mean over the classes.

The reference stacks foreground and background into one array before it counts for ImageNet-Segmentation,
so that both classes get one pooled IoU, which is accuracy / (2 - accuracy). All rows of Flux in the
paper's Tables 1, 3 and 4 fulfil that to rounding (0.8307 / (2 - 0.8307) = 0.7104). ``Scores.pooled_iou`` is
that number, for comparing with the paper; ``Scores.miou`` is the mean over the classes, as its text says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

IGNORED = -1

Counts = list[tuple[int, int, int]]
"""Rows (true class, predicted class, pixels). Pixels with the label ``IGNORED`` are left out."""


def resized(labels: np.ndarray, size: int) -> np.ndarray:
    """Labels (H, W) at size x size, nearest neighbour."""
    image = Image.fromarray(labels.astype(np.int32))
    return np.asarray(image.resize((size, size), Image.Resampling.NEAREST)).astype(np.int64)


def count(predicted: np.ndarray, labels: np.ndarray) -> Counts:
    """How many pixels of each true class were predicted to be which."""
    known = labels != IGNORED
    pairs, pixels = np.unique(np.stack([labels[known], predicted[known]]), axis=1, return_counts=True)
    return [(int(t), int(p), int(n)) for t, p, n in zip(*pairs, pixels, strict=True)]


def unit_range(map_: Tensor) -> Tensor:
    """The map shifted and scaled to 0..1. A flat one is 0."""
    low, high = map_.amin(), map_.amax()
    return (map_ - low) / (high - low) if high > low else torch.zeros_like(map_)


def at_size(map_: Tensor, size: int) -> np.ndarray:
    """A map (h, w) at size x size, nearest neighbour: enlarged as the reference does it; one that is finer
    is taken at the same pixels as the labels."""
    if max(map_.shape) > size:
        return np.asarray(Image.fromarray(map_.numpy()).resize((size, size), Image.Resampling.NEAREST))
    return F.interpolate(map_[None, None], size=(size, size), mode="nearest")[0, 0].numpy()


def above_mean(map_: Tensor, size: int) -> np.ndarray:
    """1 where the map (h, w) is above its mean, else 0; int64 (size, size)."""
    return at_size((map_ > map_.mean()).float(), size).astype(np.int64)


def winners(maps: Tensor, classes: Sequence[int], size: int) -> np.ndarray:
    """The class of the highest of the maps (K, h, w) in each place; int64 (size, size).

    Args:
        classes: the class of each concept; 0 for background concepts.
    """
    winner = torch.tensor(classes)[maps.argmax(0)]
    return at_size(winner.float(), size).astype(np.int64)


def binary_average_precision(map_: Tensor, labels: np.ndarray) -> float:
    """Of a map (h, w) and labels (size, size) that are 0, 1 or ``IGNORED``: the average precision of the
    map in 0..1 for class 1 and of one minus it for class 0, pooled."""
    scores = at_size(unit_range(map_), len(labels)).astype(np.float64)
    known = labels != IGNORED
    scores, truth = scores[known], labels[known] == 1
    return average_precision(np.concatenate([1 - scores, scores]), np.concatenate([~truth, truth]))


def average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """The sum over distinct scores, from the highest down, of precision times the gain in recall; equal
    scores count as one step. 0 where nothing is true."""
    order = np.argsort(-scores, kind="stable")
    scores, truth = scores[order], truth[order]
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
    hits = np.cumsum(truth)[last]
    if not hits[-1]:
        return 0.0
    precision, recall = hits / (last + 1), hits / hits[-1]
    return float((np.diff(recall, prepend=0) * precision).sum())


@dataclass(frozen=True)
class Scores:
    """Of a data set, each in 0..1.

    Attributes:
        images: how many were counted.
        accuracy: share of pixels that are right.
        miou: mean over the classes of intersection over union.
        pooled_iou: intersections over unions, both summed over the classes first.
        map: mean average precision over the images, None where it has no meaning (several classes).
    """

    images: int
    accuracy: float
    miou: float
    pooled_iou: float
    map: float | None


class Tally:
    """Adds up results image by image."""

    def __init__(self) -> None:
        self._total: Counter[tuple[int, int]] = Counter()
        self._precisions: list[float] = []
        self._images = 0

    def add(self, counts: Counts, precision: float | None = None) -> None:
        self._images += 1
        for true, predicted, pixels in counts:
            self._total[true, predicted] += pixels
        if precision is not None:
            self._precisions.append(precision)

    def scores(self) -> Scores:
        """
        Raises:
            ValueError: nothing was added.
        """
        if not self._images:
            raise ValueError("There is nothing to score: no image has a result.")
        inter, union = _inter_and_union(self._total)
        right = sum(inter.values())
        return Scores(
            self._images,
            accuracy=right / max(1, sum(self._total.values())),
            miou=sum(inter[c] / union[c] for c in union) / max(1, len(union)),
            pooled_iou=right / max(1, sum(union.values())),
            map=sum(self._precisions) / len(self._precisions) if self._precisions else None,
        )


def scores_of(counts: Iterable[Counts], precisions: Iterable[float | None]) -> Scores:
    tally = Tally()
    for rows, precision in zip(counts, precisions, strict=True):
        tally.add(rows, precision)
    return tally.scores()


def _inter_and_union(total: Counter[tuple[int, int]]) -> tuple[Counter[int], Counter[int]]:
    inter: Counter[int] = Counter()
    union: Counter[int] = Counter()
    for (true, predicted), pixels in sorted(total.items()):
        union[true] += pixels
        if true == predicted:
            inter[true] += pixels
        else:
            union[predicted] += pixels
    return inter, union


def miou_interval(counts: Sequence[Counts], against: Sequence[Counts] | None = None) -> tuple[float, float]:
    """The 95 % interval of the mIoU over 1000 resamplings of the images, or, with ``against``, of the
    difference from other results on the same images."""
    rng = np.random.default_rng(0)
    draws = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), 1000)
    values = _resampled_mious(counts, draws)
    if against is not None:
        values = values - _resampled_mious(against, draws)
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def _resampled_mious(counts: Sequence[Counts], draws: np.ndarray) -> np.ndarray:
    per_image = [_inter_and_union(Counter({(t, p): n for t, p, n in rows})) for rows in counts]
    classes = sorted({c for _, union in per_image for c in union})
    inter = draws @ np.array([[i[c] for c in classes] for i, _ in per_image], np.float64)
    union = draws @ np.array([[u[c] for c in classes] for _, u in per_image], np.float64)
    return np.nanmean(np.where(union > 0, inter / np.maximum(union, 1), np.nan), 1)
