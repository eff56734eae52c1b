"""Recorded scores to concept maps. Shapes: B images, K concepts, patch grid h x w. Of videos each B is a
latent frame, as in a recording."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..concepts import Concepts
from ..observing.recording import AVERAGES, Recording
from .grounding import propagate_anchors

GROUNDINGS = ("paper", "anchor propagation")
BETWEEN_FRAMES = ("linear", "hold")
"""What frames of a video show, of which several share a latent frame: what lies in between its map, at the
middle of its frames, and the next; or its map as it is."""
_LEAST = 1e-9  # of a probability: below it, words are alike


@dataclass(frozen=True)
class ConceptMaps:
    """One map per concept and image.

    Attributes:
        values: (B, K, h, w) float32 in 0..1, background concepts last. With a softmax they add up to 1 in
            every patch; else they share one scale per image or video. All 0 where no positive prompt was at
            work.
        recording: what the maps were made from.
        space, layers, steps, softmax, temperature: what was chosen of it, see ``heatmaps``.
        grounding: one of ``GROUNDINGS``.
        average: one of ``AVERAGES``.
        between_frames: one of ``BETWEEN_FRAMES``.
    """

    values: Tensor
    recording: Recording
    space: str
    layers: tuple[int, ...]
    steps: tuple[int, ...]
    softmax: bool
    temperature: float
    grounding: str = GROUNDINGS[0]
    average: str = AVERAGES[0]
    between_frames: str = BETWEEN_FRAMES[0]

    @property
    def concepts(self) -> Concepts:
        return self.recording.concepts

    @property
    def image_size(self) -> tuple[int, int]:
        return self.recording.image_size

    @property
    def coverage(self) -> tuple[float, float]:
        return self.recording.coverage

    @property
    def of_frames(self) -> list[int]:
        """For each image, or each frame of the videos one after the other, which of the maps shows it."""
        durations = self.recording.durations * self.recording.batch
        return [index for index, duration in enumerate(durations) for _ in range(duration)]

    def shown(self, count: int | None = None) -> Tensor:
        """The maps (V, T, K, h, w) of V images or videos of T frames each: what is asked of them one by one,
        and what of all frames together.

        Args:
            count: how many pictures show what was sampled, V * T. As many as there are images, or frames of
                the videos, by default; or one for each of ``values``. Maps of a single image go with any.

        Raises:
            ValueError: there is another number of pictures.
        """
        recording, whole = self.recording, len(self.of_frames)
        videos = self.values.unflatten(0, (-1, recording.frames))
        if count is None or count == whole:
            return _between_frames(videos, recording.durations, self.between_frames)
        if count == len(self.values):
            return videos
        if whole == 1:
            return videos.expand(count, -1, -1, -1, -1)
        if recording.frames == 1:
            raise ValueError(
                f"There are {count} images, but concept maps of {whole}. "
                "Connect the images decoded from the LATENT that the maps belong to, or a single image."
            )
        videos, frames = recording.batch, sum(recording.durations)
        what = f"a video of {frames} frames" if videos == 1 else f"{videos} videos of {frames} frames each"
        raise ValueError(
            f"There are {count} images, but concept maps of {what}. Connect all frames as the VAE decoded "
            "them, before any are left out, skipped or added by another frame rate; or a single image. If "
            "the LATENT was cut before it was decoded, connect the cut one to Concept Saliency too."
        )

    def index(self, name: str) -> int:
        """Where ``name`` is among the concepts, whatever its case.

        Raises:
            ValueError: it is none of them.
        """
        wanted = " ".join(name.split()).casefold()
        for index, concept in enumerate(self.concepts.all):
            if concept.casefold() == wanted:
                return index
        raise ValueError(f'There is no concept "{name}". The concepts are: {", ".join(self.concepts.all)}.')

    def at_size(self, height: int, width: int, mode: str = "bilinear") -> Tensor:
        """The maps (B, K, height, width) of an image of that size. ``mode`` as in ``interpolate``."""
        return upscale(self.values, (height, width), self.coverage, mode)


def _between_frames(videos: Tensor, durations: Sequence[int], how: str) -> Tensor:
    """Maps (V, F, ...) of latent frames as those of the frames (V, T, ...) that they stand for."""
    lengths = torch.tensor(durations)
    if how == "hold" or len(durations) == 1:
        return videos.repeat_interleave(lengths, 1)
    middles = lengths.cumsum(0) - (lengths + 1) / 2
    frames = torch.arange(int(lengths.sum()))
    after = torch.searchsorted(middles, frames.to(middles)).clamp(1, len(durations) - 1)
    before = after - 1
    share = ((frames - middles[before]) / (middles[after] - middles[before])).clamp(0, 1)
    return torch.lerp(videos[:, before], videos[:, after], share.view(-1, *[1] * (videos.ndim - 2)))


def upscale(
    maps: Tensor, size: tuple[int, int], coverage: tuple[float, float] = (1.0, 1.0), mode: str = "bilinear"
) -> Tensor:
    """Maps (B, K, h, w) at the image's ``size``, of whose grid the image covers the top left part.

    Args:
        mode: "nearest" (the paper's evaluation), "bilinear" or "bicubic".
    """
    whole = [max(n, round(n / share)) for n, share in zip(size, coverage, strict=True)]
    mode = "nearest-exact" if mode == "nearest" else mode
    corners = {"align_corners": False} if mode in ("bilinear", "bicubic") else {}
    return F.interpolate(maps, size=whole, mode=mode, **corners)[..., : size[0], : size[1]]


def heatmaps(
    recording: Recording,
    *,
    space: str | None = None,
    layers: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
    softmax: bool = True,
    temperature: float = 1.0,
    average: str = AVERAGES[0],
) -> Tensor:
    """The paper's heatmaps (B, K, h, w) float32: softmax over the concepts of every patch, in each layer
    and evaluation, then the mean over both (section 4.2; reference ``compute_heatmaps_from_vectors``). The
    mean in a patch is over the evaluations in which a positive prompt was at work there; NaN if in none.

    Args:
        space: ``Recording.space`` if None.
        layers: the default layers of the model's family if None.
        steps: the sampler's steps, all if None.
        softmax: False gives the mean of the raw scores.
        temperature: scores are divided by it; above 1 softer, below 1 harder.
        average: "after softmax", or "before softmax": the softmax of the mean of the scores, which the
            reference has for Flux.2, at a temperature of 1000. Raw scores have the same mean either way.

    Raises:
        ValueError: nothing was recorded for the choice, the temperature is not positive, or there is no such
            average.
    """
    if not temperature > 0:
        raise ValueError(f"The temperature must be above 0, not {temperature}.")
    if average not in AVERAGES:
        raise ValueError(f'Unknown average "{average}". Choose one of: {"; ".join(AVERAGES)}.')
    space = recording.space if space is None else space
    evaluations, weights = recording.select(space, layers, steps), recording.weights(steps)
    if not softmax:
        return mean_where_seen((s.mean(0) / temperature for s in evaluations), weights)
    if average == "before softmax":
        return competing(mean_where_seen((s.mean(0) for s in evaluations), weights), space, temperature, 1)
    return mean_where_seen((competing(s, space, temperature, 2).mean(0) for s in evaluations), weights)


def competing(scores: Tensor, space: str, temperature: float, axis: int) -> Tensor:
    """The softmax of scores over the concepts, which are along ``axis``. Probabilities are compared by their
    logarithms, so that at a temperature of 1 each concept has its share of what they have together."""
    if space == "probability":
        scores = scores.clamp_min(_LEAST).log()
    return (scores / temperature if temperature != 1 else scores).softmax(axis)


def mean_where_seen(maps: Iterable[Tensor], weights: Iterable[int] = itertools.repeat(1)) -> Tensor:
    """The mean of maps of one shape, element by element over those that are not NaN; NaN if all are."""
    mean = MeanWhereSeen()
    for values, weight in zip(maps, weights, strict=False):
        mean.add(values, weight)
    return mean.value


class MeanWhereSeen:
    """``mean_where_seen`` of maps that come one by one."""

    def __init__(self) -> None:
        self._total: Tensor | int = 0
        self._count: Tensor | int = 0

    def add(self, values: Tensor, weight: int = 1) -> None:
        unseen = values.isnan()
        self._total = self._total + weight * values.masked_fill(unseen, 0)
        self._count = self._count + weight * ~unseen

    @property
    def value(self) -> Tensor:
        return self._total / self._count


def concept_maps(
    recording: Recording,
    *,
    space: str | None = None,
    layers: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
    softmax: bool = True,
    temperature: float = 1.0,
    grounding: str = GROUNDINGS[0],
    average: str = AVERAGES[0],
    between_frames: str = BETWEEN_FRAMES[0],
) -> ConceptMaps:
    """``heatmaps`` as maps in 0..1. Raw scores are scaled by the smallest and the largest of all concepts
    of an image or video, so that concepts and frames can still be compared.

    Args:
        grounding: "paper": the heatmaps as they are; "anchor propagation": see ``propagate_anchors``.
        between_frames: one of ``BETWEEN_FRAMES``.

    Raises:
        ValueError: as ``heatmaps``; or there is no such grounding, or it needs a softmax; or no such choice
            of what is between frames.
    """
    if between_frames not in BETWEEN_FRAMES:
        raise ValueError(
            f'Unknown choice between frames "{between_frames}". Choose one of: {", ".join(BETWEEN_FRAMES)}.'
        )
    if grounding not in GROUNDINGS:
        raise ValueError(f'Unknown grounding "{grounding}". Choose one of: {", ".join(GROUNDINGS)}.')
    if grounding == "anchor propagation" and not softmax:
        raise ValueError(
            "Anchor propagation shares out the maps of a softmax. Switch softmax on, or choose the grounding "
            f'"{GROUNDINGS[0]}".'
        )
    layers = recording.default_layers if layers is None else tuple(layers)
    steps = tuple(sorted({step for step in recording.steps if steps is None or step in steps}))
    space = recording.space if space is None else space
    choice = {"space": space, "layers": layers, "steps": steps}
    values = heatmaps(recording, **choice, softmax=softmax, temperature=temperature, average=average)
    unseen = values.isnan()
    if grounding == "anchor propagation":
        scores = heatmaps(recording, **choice, softmax=False).nan_to_num(0)
        maps = values.masked_fill(unseen, 1 / values.shape[1])
        frames = recording.frames if recording.timed else 1
        values = torch.cat(
            [_propagated(*video) for video in zip(maps.split(frames), scores.split(frames), strict=True)]
        )
    if not softmax:
        videos, missing = (v.unflatten(0, (-1, recording.frames)) for v in (values, unseen))
        low = videos.masked_fill(missing, torch.inf).amin((1, 2, 3, 4), keepdim=True)
        high = videos.masked_fill(missing, -torch.inf).amax((1, 2, 3, 4), keepdim=True)
        values = ((videos - low) / torch.where(high > low, high - low, 1.0)).flatten(0, 1)
    values = values.masked_fill(unseen, 0)
    return ConceptMaps(
        values,
        recording,
        **choice,
        softmax=softmax,
        temperature=temperature,
        grounding=grounding,
        average=average,
        between_frames=between_frames,
    )


def _propagated(maps: Tensor, scores: Tensor) -> Tensor:
    """``propagate_anchors`` of the frames (F, K, h, w) of a video, or of an image."""
    return propagate_anchors(maps.movedim(1, 0), scores.movedim(1, 0)).movedim(0, 1)
