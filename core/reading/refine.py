"""Concept maps sharpened by the edges of the image that they belong to.

A map has one value per patch of 16 pixels; the image knows where in the patch a thing ends. The guided filter
(He, Sun and Tang, Guided Image Filtering, TPAMI 2013) makes each map a linear function of the image's colours
in every small window, so that it changes where they do. The functions are found at a lower resolution and
applied at the image's own (He and Sun, Fast Guided Filter, arXiv 1505.00996).
"""

from __future__ import annotations

import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from .maps import upscale

# Everything is relative to the patch, so that the result does not depend on the size of the image.
CELLS_PER_PATCH = 4  # the resolution of the coefficients
RADIUS = 6  # of the windows, in cells: a patch and its neighbours
EPSILON = 1e-3  # of the variance of colours in 0..1


def refine(values: Tensor, image: Tensor, coverage: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Maps (K, H, W) of one image at its size, from ``values`` (K, h, w) on the patch grid, of which the
    image covers the top left part.

    Args:
        values: not below 0. What they add up to in a place, such as the 1 of a softmax, stays as it is.
        image: (H, W, 3) float32 in 0..1 on the CPU.
    """
    grid = values.shape[-2:]
    cells = tuple(max(1, round(CELLS_PER_PATCH * n * c)) for n, c in zip(grid, coverage, strict=True))
    coarse = upscale(values[None], cells, coverage)[0]
    refined = guided_filter(image.movedim(-1, 0), coarse, RADIUS, EPSILON)
    # A linear fit overshoots at strong edges. What is cut off below 0 is taken from the other maps.
    total = refined.sum(0).clamp_min_(0)
    refined.clamp_min_(0)
    return refined.mul_(total / refined.sum(0).clamp_min_(1e-12)).clamp_max_(1)


def guided_filter(guide: Tensor, values: Tensor, radius: int, epsilon: float) -> Tensor:
    """Planes (K, h, w) at the size of ``guide`` (3, H, W), as locally linear functions of its colours.

    A window in which the colours say little about the values keeps them, where the plain filter would blur
    them: its weight is the multiple correlation of the two.

    Args:
        radius: of the square windows, in pixels of ``values``.
        epsilon: regularizes the fit in windows with less variance of colour.
    """
    size = guide.shape[-2:]
    small = F.interpolate(guide[None], size=values.shape[-2:], mode="area")[0]
    mean, mean_values = _box(small, radius), _box(values, radius)
    covariance = _box(small[:, None] * small, radius) - mean[:, None] * mean  # (3, 3, h, w)
    shared = _box(small[:, None] * values, radius) - mean[:, None] * mean_values  # (3, K, h, w)
    regularized = covariance.permute(2, 3, 0, 1) + epsilon * torch.eye(len(guide))
    slope = torch.linalg.solve(regularized, shared.permute(2, 3, 0, 1)).permute(2, 3, 0, 1)
    offset = mean_values - (slope * mean[:, None]).sum(0)

    # One weight for all planes, so that what they add up to stays the same.
    variance = (_box(values * values, radius) - mean_values * mean_values).sum(0)
    explained = (slope * shared).sum((0, 1))
    weight = (explained / variance.clamp_min(1e-8)).clamp(0, 1).sqrt()

    def spread(coefficients: Tensor) -> Tensor:
        return _resize(_box(coefficients * weight, radius), size)

    filtered = spread(offset) + (1 - spread(torch.ones_like(offset[:1]))) * _resize(values, size)
    for colour, slopes in zip(guide, slope, strict=True):
        filtered.addcmul_(spread(slopes), colour)
    return filtered


def _resize(planes: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(planes[None], size=size, mode="bilinear", align_corners=False)[0]


def _box(planes: Tensor, radius: int) -> Tensor:
    """The mean over square windows of the last two dimensions, the edge repeated beyond it."""
    size = (*(1 for _ in planes.shape[:-2]), 2 * radius + 1, 2 * radius + 1)
    return torch.from_numpy(ndimage.uniform_filter(planes.numpy(), size, mode="nearest"))
