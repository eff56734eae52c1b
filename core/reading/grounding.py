"""Anchor propagation: concept maps in which concepts that look alike leak less into each other.

Where two concepts look alike (a red boat, a blue boat), one's map may win on both things. But the patch
where a concept is strongest is nearly always on the right one. That patch is its anchor, and decides between
concepts that look alike, by how well a random walk connects it with the other patches.

The idea is AnchorDiff's (arXiv 2605.26460), which walks on image-to-image attention. That is not recorded:
here a walk steps from patch to neighbouring patch, and rarely between patches whose maps differ (as in Grady,
Random Walks for Image Segmentation, TPAMI 2006). And here the maps go on deciding between concepts that do
not look alike, so that edges stay where they are, and a concept that is not in the image still looks absent.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import splu
from torch import Tensor
from torch.nn import functional as F

CONTRAST = 0.5  # the difference of two patches' maps, 0..1, that makes a step between them e times rarer
REACH = 1 / 8  # of a walk: its mean number of steps, as a share of the number of patches
FLOOR = 1e-3  # of a map, so that an anchor can claim patches from which its concept has vanished


def propagate_anchors(maps: Tensor, scores: Tensor) -> Tensor:
    """Maps (K, h, w) that add up to 1 in every patch, made from ``maps`` that do and the raw ``scores``
    (K, h, w) behind them.

    In every patch, what each concept has is shared out anew among the concepts that look like it, in
    proportion to their maps there and to how often a walk from there meets their anchors.
    """
    concepts = maps.flatten(1).double()
    claims = (concepts + FLOOR) * _meetings(maps, concepts.argmax(1))
    alike = look_alikes(scores).double()
    return (claims * (alike @ (concepts / (alike @ claims)))).view_as(maps).to(maps)


def look_alikes(scores: Tensor) -> Tensor:
    """How alike concepts look to the model, (K, K) in 0..1, 1 for a concept and itself: the squared
    correlation of their ``scores`` (K, h, w), less the mean of all concepts, over the patches; 0 where the
    correlation is negative."""
    scores = scores.flatten(1)
    scores = scores - scores.mean(0)
    scores = F.normalize(scores - scores.mean(1, keepdim=True), dim=1)
    return (scores @ scores.T).clamp(0, 1).square().fill_diagonal_(1)


def _meetings(maps: Tensor, anchors: Tensor) -> Tensor:
    """How often a walk from each of the N patches is expected to be at each of the anchors (K,): (K, N).

    A step goes to one of the eight neighbours, likelier the more the ``maps`` (K, h, w) of the two are alike,
    or ends the walk.
    """
    rows, columns = maps.shape[1:]
    count = rows * columns
    patch = torch.arange(count).view(rows, columns)
    first, second, weights = [], [], []
    for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
        here = slice(0, rows - down), slice(max(0, -right), columns - max(0, right))
        there = slice(down, rows), slice(max(0, right), columns + min(0, right))
        difference = (maps[(..., *here)] - maps[(..., *there)]).abs().sum(0) / 2
        first.append(patch[here].flatten())
        second.append(patch[there].flatten())
        weights.append((-difference / CONTRAST).exp().flatten() / math.hypot(down, right))
    start, end = torch.cat(first + second).numpy(), torch.cat(second + first).numpy()
    weight = torch.cat(weights + weights).double().numpy()
    probability = weight / np.bincount(start, weight, minlength=count)[start]
    going_on = 1 - 1 / (1 + REACH * count)
    steps = sparse.csc_matrix((going_on * probability, (start, end)), shape=(count, count))
    at_anchors = np.zeros((count, len(anchors)))
    at_anchors[anchors.numpy(), np.arange(len(anchors))] = 1
    return torch.from_numpy(splu(sparse.identity(count, format="csc") - steps).solve(at_anchors).T)
