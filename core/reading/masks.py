"""Concept maps to masks at image size. A mask is (H, W) float32 in 0..1, one plane of a MASK."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from .maps import ConceptMaps, upscale
from .refine import refine

METHODS = ("argmax", "mean", "otsu", "fixed", "top fraction")


def region(maps: Tensor, index: int, method: str, threshold: float = 0.5) -> Tensor:
    """Where a concept is: a boolean (H, W).

    Args:
        maps: maps (K, H, W) of one image, background concepts included.
        index: the concept.
        method: "argmax": where its map is the highest of all, and not 0; "mean": above the map's mean (the
            paper's segmentation); "otsu": above Otsu's threshold between the map's two classes of values;
            "fixed": above ``threshold``; "top fraction": the ``threshold`` share of the image with the
            highest values.
        threshold: 0..1, of the last two methods.
    """
    values = maps[index]
    if method == "argmax":
        inside = values > 0
        for other, rival in enumerate(maps):  # a tie goes to the first; argmax(0) takes ten times as long
            if other != index:
                inside &= values > rival if other < index else values >= rival
        return inside
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


class Part(NamedTuple):
    """A connected part of the region of a concept, in pixels.

    Attributes:
        box: left, top, width, height.
        peak: x and y of a point well inside, where the concept's map is highest or nearly so.
        score: the map's highest value in it, 0..1.
    """

    concept: str
    box: tuple[int, int, int, int]
    peak: tuple[int, int]
    score: float


def parts(concept: str, inside: Tensor, values: Tensor) -> list[Part]:
    """The connected parts (by edges or corners) of a region (H, W), the largest first, with the concept's
    map (H, W) in it."""
    labels, _ = ndimage.label(inside.numpy(), structure=np.ones((3, 3)))
    areas = np.bincount(labels.ravel())[1:]
    boxes = ndimage.find_objects(labels)
    found = []
    for label in np.argsort(-areas, kind="stable"):
        rows, columns = boxes[label]
        part = labels[rows, columns] == label + 1
        heights = np.where(part, values[rows, columns].numpy(), -1)
        score = heights.max()
        # Maps have plateaus: of the points about as high as the highest, the one furthest inside.
        depth = ndimage.distance_transform_edt(np.pad(part, 1))[1:-1, 1:-1]
        y, x = np.unravel_index(np.where(heights >= 0.95 * score, depth, 0).argmax(), part.shape)
        box = (columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start)
        peak = (columns.start + int(x), rows.start + int(y))
        found.append(Part(concept, box, peak, float(score)))
    return found


def concept_masks(
    maps: ConceptMaps,
    names: Sequence[str],
    *,
    combine: bool = False,
    size: tuple[int, int] | None = None,
    guide: Tensor | None = None,
    method: str = "argmax",
    threshold: float = 0.5,
    soft: bool = False,
    fill_holes: bool = False,
    smallest_area: float = 0.0,
    grow: int = 0,
    feather: float = 0.0,
    invert: bool = False,
) -> tuple[Tensor, list[list[Part]]]:
    """Masks (B, N, H, W) of N concepts, float32 in 0..1 on the CPU, and for each image the parts that their
    regions have, in the order of ``names``. Parts are those of the cleaned region of each concept alone,
    before ``invert`` and ``feather``, whether or not the masks are combined.

    Args:
        combine: one mask (B, 1, H, W) of all the concepts together. The union of their regions is what is
            cleaned, so that a thing in two adjoining parts is as large as both.
        size: height and width; the image's own by default.
        guide: images (B, H, W, 3) in 0..1, by whose edges the maps are refined first, see ``refine``, and
            whose size the masks have. Maps of a single image go with any number of them.
        method, threshold: see ``region``.
        soft: inside the region, the map's values instead of 1; of several combined, the highest.
        fill_holes, smallest_area, grow: see ``clean``.
        feather: standard deviation in pixels of a Gaussian blur.
        invert: everything but the concept.

    Raises:
        ValueError: there is no such concept, or no such method.
    """
    indices = [maps.index(name) for name in names]
    together = combine and len(indices) > 1
    tidy = {"fill_holes": fill_holes, "smallest_area": smallest_area, "grow": grow}
    masks, found = [], []
    for values in _at_images(maps, size, guide):
        regions = torch.stack([region(values, index, method, threshold) for index in indices])
        insides = torch.stack([clean(inside, **tidy) for inside in regions])
        found.append([])
        for index, inside in zip(indices, insides, strict=True):
            found[-1] += parts(maps.concepts.all[index], inside, values[index])
        if together:
            insides = clean(regions.any(0), **tidy)[None]
        planes = insides.float()
        if soft:
            shown = values[indices]
            if together:  # of those cut there; where none was, in what is filled or grown, of all
                shown = shown.where(regions | ~regions.any(0), 0).amax(0, keepdim=True)
            planes = torch.where(insides, shown, 0.0)
        if invert:
            planes = 1 - planes
        if feather > 0:
            blurred = [ndimage.gaussian_filter(plane.numpy(), feather, mode="nearest") for plane in planes]
            planes = torch.from_numpy(np.stack(blurred))
        masks.append(planes)
    return torch.stack(masks).clamp(0, 1), found


def segment(
    maps: ConceptMaps,
    size: tuple[int, int] | None = None,
    floor: float = 0.0,
    guide: Tensor | None = None,
) -> Tensor:
    """Which concept each pixel shows (B, H, W): the index in ``maps.concepts.all`` of the highest map, or
    -1 (unassigned) where even that is 0 or below ``floor``. ``size`` and ``guide`` as in
    ``concept_masks``."""
    labels = []
    for values in _at_images(maps, size, guide):
        highest, label = values.max(0)
        labels.append(torch.where((highest < floor) | (highest == 0), -1, label))
    return torch.stack(labels)


def label_masks(labels: Tensor, count: int) -> Tensor:
    """Masks (B, N, H, W) float32, each pixel 0 or 1, of the first ``count`` labels of ``segment``."""
    return (labels[:, None] == torch.arange(count)[:, None, None]).float()


def _at_images(maps: ConceptMaps, size: tuple[int, int] | None, guide: Tensor | None) -> Iterator[Tensor]:
    """The maps (K, H, W) of one image after the other: enlarged, or refined."""
    if guide is None:
        for image in maps.values:
            yield upscale(image[None], size or maps.image_size, maps.coverage)[0]
    else:
        for image, edges in zip(maps.values.expand(len(guide), -1, -1, -1), guide, strict=True):
            yield refine(image, edges, maps.coverage)
