"""Concept maps to masks at image size. A mask is (H, W) float32 in 0..1, one plane of a MASK.

The frames of a video are cut out together, with one threshold, and tidied up together, so that masks do not
blink. An image is a video of one frame here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from .maps import ConceptMaps, upscale
from .refine import refine

METHODS = ("argmax", "mean", "otsu", "fixed", "top fraction")


def region(maps: Tensor, index: int, method: str, threshold: float = 0.5) -> Tensor:
    """Where a concept is: a boolean (H, W), or (T, H, W) of a video.

    Args:
        maps: maps (K, H, W) of one image, or (K, T, H, W) of the frames of a video, background concepts
            included.
        index: the concept.
        method: "argmax": where its map is the highest of all, and not 0; "mean": above the map's mean (the
            paper's segmentation); "otsu": above Otsu's threshold between the map's two classes of values;
            "fixed": above ``threshold``; "top fraction": the ``threshold`` share of the image or video with
            the highest values.
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
    """A region (H, W), or (T, H, W) through the frames of a video, tidied up, in this order.

    Args:
        fill_holes: include what is enclosed. In a video that is what each frame's region encloses: through
            time, what moves would open its holes to where it was before.
        smallest_area: drop connected parts (by edges or corners) smaller than this share of the image. In a
            video parts go on from frame to frame, and it is the share of all frames together: what is small
            or short, and not what is small for a moment.
        grow: pixels to grow by in every direction, negative to shrink. In a video each frame by itself.
    """
    frames = inside.numpy().reshape(-1, *inside.shape[-2:])
    if fill_holes:
        frames = np.stack([ndimage.binary_fill_holes(frame) for frame in frames])
    if smallest_area > 0 and frames.any():
        parts, _ = ndimage.label(frames, structure=np.ones((3, 3, 3)))
        areas = np.bincount(parts.ravel())
        kept = areas >= smallest_area * frames.size
        kept[0] = False
        frames = kept[parts]
    if grow:
        frames = np.stack([_grown(frame, grow) for frame in frames])
    return torch.from_numpy(np.ascontiguousarray(frames)).view_as(inside)


def _grown(plane: np.ndarray, by: int) -> np.ndarray:
    if by > 0 and plane.any():
        return ndimage.distance_transform_edt(~plane) <= by
    if by < 0 and not plane.all():
        return ndimage.distance_transform_edt(plane) > -by
    return plane


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
    count: int | None = None,
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
    """Masks (B, N, H, W) of N concepts, float32 in 0..1 on the CPU, and for each image or frame of a video
    the parts that their regions have, in the order of ``names``. Parts are those of the cleaned region of
    each concept alone, before ``invert`` and ``feather``, whether or not the masks are combined.

    Args:
        combine: one mask (B, 1, H, W) of all the concepts together. The union of their regions is what is
            cleaned, so that a thing in two adjoining parts is as large as both.
        count: how many images there are to mask, B; see ``ConceptMaps.shown``.
        size: height and width; the image's own by default.
        guide: images (B, H, W, 3) in 0..1, by whose edges the maps are refined first, see ``refine``, and
            whose number and size the masks have.
        method, threshold: see ``region``.
        soft: inside the region, the map's values instead of 1; of several combined, the highest.
        fill_holes, smallest_area, grow: see ``clean``.
        feather: standard deviation in pixels of a Gaussian blur.
        invert: everything but the concept.

    Raises:
        ValueError: there is no such concept, no such method, or another number of images.
    """
    indices = [maps.index(name) for name in names]
    together = combine and len(indices) > 1
    tidy = {"fill_holes": fill_holes, "smallest_area": smallest_area, "grow": grow}
    videos = _videos(maps, count, size, guide)
    masks = torch.empty(sum(len(video) for video in videos), 1 if together else len(indices), *videos[0].size)
    found: list[list[Part]] = []
    for video in videos:
        regions, planes_of = _regions(video, indices, method, threshold)
        insides = torch.stack([clean(inside, **tidy) for inside in regions])
        whole = clean(regions.any(0), **tidy)[None] if together else insides
        for frame in range(len(video)):
            planes = planes_of(frame)
            found.append([])
            for index, inside, values in zip(indices, insides[:, frame], planes, strict=True):
                found[-1] += parts(maps.concepts.all[index], inside, values)
            mask = whole[:, frame].float()
            if soft:
                if together:  # of those cut there; where none was, in what is filled or grown, of all
                    cut = regions[:, frame]
                    planes = planes.where(cut | ~cut.any(0), 0).amax(0, keepdim=True)
                mask = torch.where(whole[:, frame], planes, 0.0)
            if invert:
                mask = 1 - mask
            if feather > 0:
                blurred = [ndimage.gaussian_filter(plane.numpy(), feather, mode="nearest") for plane in mask]
                mask = torch.from_numpy(np.stack(blurred))
            masks[len(found) - 1] = mask.clamp(0, 1)
    if count is not None and len(found) < count:
        masks, found = masks.expand(count, -1, -1, -1), found * count
    return masks, found


def _regions(
    video: _Video, indices: list[int], method: str, threshold: float
) -> tuple[Tensor, Callable[[int], Tensor]]:
    """The regions (N, T, H, W) of N concepts, and what gives the maps (N, H, W) of one frame."""
    regions = torch.empty(len(indices), len(video), *video.size, dtype=torch.bool)
    kept: list[Tensor] = []
    keep = video.refined or len(video) == 1  # many large ones are only kept where they took long to make
    if keep or method == "argmax":
        for frame in range(len(video)):
            values = video.frame(frame)
            if method == "argmax":
                for n, index in enumerate(indices):
                    regions[n, frame] = region(values, index, method)
            if keep:
                kept.append(values[indices])
    if method != "argmax":
        for n, index in enumerate(indices):
            if keep:
                planes = [planes[n] for planes in kept]
            else:
                planes = [video.frame(frame, [index])[0] for frame in range(len(video))]
            regions[n] = region(torch.stack(planes)[None], 0, method, threshold)
    return regions, kept.__getitem__ if keep else lambda frame: video.frame(frame, indices)


def segment(
    maps: ConceptMaps,
    size: tuple[int, int] | None = None,
    floor: float = 0.0,
    guide: Tensor | None = None,
    count: int | None = None,
) -> Tensor:
    """Which concept each pixel shows (B, H, W): the index in ``maps.concepts.all`` of the highest map, or
    -1 (unassigned) where even that is 0 or below ``floor``. ``count``, ``size`` and ``guide`` as in
    ``concept_masks``."""
    videos = _videos(maps, count, size, guide)
    labels = torch.empty(sum(len(video) for video in videos), *videos[0].size, dtype=torch.int16)
    frames = (video.frame(frame) for video in videos for frame in range(len(video)))
    for values, plane in zip(frames, labels, strict=True):
        highest, label = values.max(0)
        plane.copy_(torch.where((highest < floor) | (highest == 0), -1, label))
    return labels.expand(count or len(labels), -1, -1)


def label_masks(labels: Tensor, count: int) -> Tensor:
    """Masks (B, N, H, W) float32, each pixel 0 or 1, of the first ``count`` labels of ``segment``."""
    return (labels[:, None] == torch.arange(count)[:, None, None]).float()


class _Video:
    """The maps ``values`` (T, K, h, w) of a video's frames at image size, one frame at a time: all of them
    would fill the memory. Refined, if there is a ``guide`` (T, H, W, 3)."""

    def __init__(
        self, values: Tensor, size: tuple[int, int], coverage: tuple[float, float], guide: Tensor | None
    ) -> None:
        self._values, self._coverage, self._guide = values, coverage, guide
        self.size = size
        self.refined = guide is not None

    def __len__(self) -> int:
        return len(self._values)

    def frame(self, index: int, concepts: list[int] | slice = slice(None)) -> Tensor:
        """(K', H, W)"""
        values = self._values[index]
        if self._guide is None:
            return upscale(values[concepts][None], self.size, self._coverage)[0]
        return refine(values, self._guide[index], self._coverage)[concepts]


def _videos(
    maps: ConceptMaps, count: int | None, size: tuple[int, int] | None, guide: Tensor | None
) -> list[_Video]:
    """Those of a single image, not refined, are the same on every other, and come once."""
    once = guide is None and len(maps.of_frames) == 1
    videos = maps.shown(None if once else count if guide is None else len(guide))
    if not maps.recording.timed:  # nothing goes on from one layer of a picture to the next
        videos = videos.flatten(0, 1)[:, None]
    size = size or maps.image_size
    guides = [None] * len(videos)
    if guide is not None:
        size, guides = tuple(guide.shape[1:3]), guide.split(videos.shape[1])
    return [_Video(video, size, maps.coverage, g) for video, g in zip(videos, guides, strict=True)]
