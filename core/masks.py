"""Concept maps to masks at image size. A mask is (H, W) float32 in 0..1, one plane of a MASK."""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from .maps import ConceptMaps

METHODS = ("argmax", "mean", "otsu", "fixed", "top fraction")


def region(maps: Tensor, index: int, method: str, threshold: float = 0.5) -> Tensor:
    """Where a concept is: a boolean (H, W).

    Args:
        maps: maps (K, H, W) of one image, background concepts included.
        index: the concept.
        method: "argmax": where its map is the highest of all; "mean": above the map's mean (the paper's
            segmentation); "otsu": above Otsu's threshold between the map's two classes of values; "fixed":
            above ``threshold``; "top fraction": the ``threshold`` share of the image with the highest
            values.
        threshold: 0..1, of the last two methods.
    """
    values = maps[index]
    if method == "argmax":
        return maps.argmax(0) == index
    if method == "mean":
        return values > values.mean()
    if method == "otsu":
        return values > otsu_threshold(values)
    if method == "fixed":
        return values > threshold
    if method == "top fraction":
        count = round(threshold * values.numel())
        chosen = torch.zeros(values.numel(), dtype=torch.bool)
        chosen[values.flatten().topk(count).indices] = True
        return chosen.view_as(values)
    raise ValueError(f'Unknown mask method "{method}". Choose one of: {", ".join(METHODS)}.')


def otsu_threshold(values: Tensor, bins: int = 256) -> float:
    """The threshold that maximises the variance between the classes below and above it (Otsu 1979). Of a
    constant map: its value."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        return high
    counts = torch.histc(values.float(), bins, low, high).double()
    centres = low + (torch.arange(bins, dtype=torch.float64) + 0.5) * (high - low) / bins
    below = counts.cumsum(0)
    above = below[-1] - below
    mass = (counts * centres).cumsum(0)
    mean_below = mass / below.clamp_min(1)
    mean_above = (mass[-1] - mass) / above.clamp_min(1)
    between = below * above * (mean_below - mean_above) ** 2
    best = (between == between.max()).nonzero().flatten()
    return low + (float(best.double().mean()) + 1) * (high - low) / bins


def clean(inside: Tensor, *, fill_holes: bool = False, smallest_area: float = 0.0, grow: int = 0) -> Tensor:
    """A region (H, W) tidied up, in this order.

    Args:
        fill_holes: include what is enclosed.
        smallest_area: drop connected parts (by edges or corners) smaller than this share of the image.
        grow: pixels to grow by in every direction, negative to shrink.
    """
    plane = inside.numpy()
    if fill_holes:
        plane = ndimage.binary_fill_holes(plane)
    if smallest_area > 0 and plane.any():
        parts, _ = ndimage.label(plane, structure=np.ones((3, 3)))
        areas = np.bincount(parts.ravel())
        kept = areas >= smallest_area * plane.size
        kept[0] = False
        plane = kept[parts]
    if grow > 0 and plane.any():
        plane = ndimage.distance_transform_edt(~plane) <= grow
    if grow < 0 and not plane.all():
        plane = ndimage.distance_transform_edt(plane) > -grow
    return torch.from_numpy(np.ascontiguousarray(plane))


def concept_mask(
    maps: ConceptMaps,
    name: str,
    *,
    size: tuple[int, int] | None = None,
    method: str = "argmax",
    threshold: float = 0.5,
    soft: bool = False,
    fill_holes: bool = False,
    smallest_area: float = 0.0,
    grow: int = 0,
    feather: float = 0.0,
    invert: bool = False,
) -> Tensor:
    """The mask (B, H, W) of one concept, float32 in 0..1 on the CPU.

    Args:
        size: height and width; the image's own by default.
        method, threshold: see ``region``.
        soft: inside the region, the map's values instead of 1.
        fill_holes, smallest_area, grow: see ``clean``.
        feather: standard deviation in pixels of a Gaussian blur.
        invert: everything but the concept.

    Raises:
        ValueError: there is no such concept, or no such method.
    """
    index = maps.index(name)
    planes = []
    for values in maps.at_size(*(size or maps.image_size)):
        inside = region(values, index, method, threshold)
        inside = clean(inside, fill_holes=fill_holes, smallest_area=smallest_area, grow=grow)
        plane = torch.where(inside, values[index], 0.0) if soft else inside.float()
        if invert:
            plane = 1 - plane
        if feather > 0:
            plane = torch.from_numpy(ndimage.gaussian_filter(plane.numpy(), feather, mode="nearest"))
        planes.append(plane)
    return torch.stack(planes).clamp(0, 1)
