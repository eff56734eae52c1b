"""Concept maps to pictures. An image is (H, W, 3) float32 in 0..1, as in ComfyUI's IMAGE."""

from __future__ import annotations

import matplotlib
import torch
from torch import Tensor

# perceptually uniform, dark to light
COLOUR_MAPS = ("magma", "inferno", "plasma", "viridis", "cividis")


def colourise(maps: Tensor, colour_map: str = "magma") -> Tensor:
    """Maps (..., H, W) in 0..1 as colours (..., H, W, 3), by the name of one of matplotlib's colour maps."""
    table = torch.from_numpy(matplotlib.colormaps[colour_map].resampled(256)(range(256))[:, :3]).float()
    return table[(maps.clamp(0, 1) * 255).round().long()]


def heatmap_images(maps: Tensor, colour_map: str = "magma") -> Tensor:
    """Maps (B, K, H, W) as heatmaps (B, K, H, W, 3). All concepts of an image share one scale, from 0 to
    the highest value of any, so that an absent concept looks absent."""
    highest = maps.amax((1, 2, 3), keepdim=True)
    return colourise(maps / torch.where(highest > 0, highest, 1.0), colour_map)
