"""Anchor propagation: concept maps in which concepts that look alike leak less into each other.

Where two concepts look alike (a red boat, a blue boat), one's map may win on both things. But the patch
where a concept is strongest is nearly always on the right one. That patch is its anchor, and decides between
concepts that look alike, by how well a random walk connects it with the other patches.

The idea is AnchorDiff's (arXiv 2605.26460), which walks on image-to-image attention. That is not recorded:
here a walk steps from patch to neighbouring patch, and rarely between patches whose maps differ (as in Grady,
Random Walks for Image Segmentation, TPAMI 2006). In a video neighbours are also those of the frames before
and after, and a concept has one anchor for all of it, so that things keep their names from frame to frame.
And here the maps go on deciding between concepts that do not look alike, so that edges stay where they are,
and a concept that is not in the image still looks absent.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import cg, splu
from torch import Tensor
from torch.nn import functional as F

CONTRAST = 0.5  # the difference of two patches' maps, 0..1, that makes a step between them e times rarer
CONTRAST_OF_VIDEOS = 0.1  # through time there are many more ways from one thing to another, and longer ones
REACH = 1 / 8  # of a walk: its mean number of steps, as a share of the number of patches
_HALF_OF_THE_NEIGHBOURS = [(0, 0, 1), (0, 1, 0), (0, 1, 1), (0, 1, -1)]
_HALF_OF_THE_NEIGHBOURS += [(1, down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
FLOOR = 1e-3  # of a map, so that an anchor can claim patches from which its concept has vanished


def propagate_anchors(maps: Tensor, scores: Tensor) -> Tensor:
    """Maps (K, h, w), or (K, F, h, w) of a video, that add up to 1 in every patch, made from ``maps`` that do
    and the raw ``scores`` of the same shape behind them.

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

    A step goes to one of the eight neighbours, or of the 26 in a video, likelier the more the ``maps`` of the
    two are alike, or ends the walk.
    """
    grid = (1, *maps.shape[1:])[-3:]
    maps = maps.reshape(len(maps), *grid)
    count = math.prod(grid)
    contrast = CONTRAST if grid[0] == 1 else CONTRAST_OF_VIDEOS
    patch = torch.arange(count).view(grid)
    first, second, weights = [], [], []
    for step in _HALF_OF_THE_NEIGHBOURS:
        here = tuple(slice(max(0, -by), size - max(0, by)) for by, size in zip(step, grid, strict=True))
        there = tuple(slice(max(0, by), size + min(0, by)) for by, size in zip(step, grid, strict=True))
        difference = (maps[(..., *here)] - maps[(..., *there)]).abs().sum(0) / 2
        first.append(patch[here].flatten())
        second.append(patch[there].flatten())
        weights.append((-difference / contrast).exp().flatten() / math.hypot(*step))
    start, end = torch.cat(first + second).numpy(), torch.cat(second + first).numpy()
    weight = torch.cat(weights + weights).double().numpy()
    total = np.bincount(start, weight, minlength=count)
    going_on = 1 - 1 / (1 + REACH * count)
    at_anchors = np.zeros((count, len(anchors)))
    at_anchors[anchors.numpy(), np.arange(len(anchors))] = 1
    if grid[0] == 1:
        steps = sparse.csc_matrix((going_on * (weight / total[start]), (start, end)), shape=(count, count))
        return torch.from_numpy(splu(sparse.identity(count, format="csc") - steps).solve(at_anchors).T)
    # Three axes would fill the factors. The same equations, symmetric, and step by step.
    walks = sparse.diags(total) - going_on * sparse.csr_matrix((weight, (start, end)), shape=(count, count))
    likely = sparse.diags(1 / total)
    meetings = [cg(walks, total * anchor, M=likely, rtol=1e-8, atol=0)[0] for anchor in at_anchors.T]
    return torch.from_numpy(np.stack(meetings))
