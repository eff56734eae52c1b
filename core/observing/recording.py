"""What was recorded while a sampler ran.

Shapes: E evaluations of the model, L layers, B pictures, K concepts (background concepts last), and the
patch grid h x w. The latent frames of a video are pictures, F of them; those of a batch follow each other.
"""

from __future__ import annotations

import bisect
import logging
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..concepts import Concepts
from ..geometry import Grid

AVERAGES = ("after softmax", "before softmax")
"""What is averaged over layers and evaluations: the maps that a softmax made of each, or their scores."""
BUDGET = 256 * 2**20


class RecordingError(ValueError):
    """There is no usable recording; the message says why and what to do."""


def unrecorded(reason: str) -> str:
    """Why a LATENT has no recording, as its user is told."""
    return (
        "Concept Attention could not record this sampling run (the image is not affected): "
        f"{reason.rstrip('.')}."
    )


@dataclass(frozen=True)
class Recording:
    """Scores of one sampling run, or of existing images.

    Attributes:
        layers: the layers recorded.
        default_layers: those of ``layers`` that the model's family makes maps from by default.
        sigmas: the noise level of each evaluation, in the order they ran.
        steps: the sampler's step that each evaluation belongs to: the last one that starts at its noise
            level or above. Samplers that evaluate the model twice have two evaluations for some steps. Of
            existing images: the number of its noise level, the noisiest first.
        scores: for each space, E tensors (L, B, K, h, w) float32 on the CPU. NaN in patches where no positive
            prompt was at work in that evaluation.
        image_size: height and width of the image in pixels.
        coverage: the share of the grid's height and width that the image covers; below 1 where the model
            padded an odd latent.
        left_out: layers that were to be recorded too, but would have taken more memory than is allowed.
        durations: for each of a video's F latent frames, how many frames of the video it stands for; a single
            1 of images.
        broken: the images whose scores are all NaN, because the model computed NaN or infinite values, with
            the step and the layer in which it first did.
    """

    concepts: Concepts
    layers: tuple[int, ...]
    default_layers: tuple[int, ...]
    sigmas: tuple[float, ...]
    steps: tuple[int, ...]
    scores: dict[str, tuple[Tensor, ...]]
    image_size: tuple[int, int]
    coverage: tuple[float, float]
    left_out: tuple[int, ...] = ()
    durations: tuple[int, ...] = (1,)
    broken: dict[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def frames(self) -> int:
        """F, how many pictures belong together as one video; 1 of images."""
        return len(self.durations)

    @property
    def batch(self) -> int:
        """How many images or videos it has."""
        return next(iter(self.scores.values()))[0].shape[1] // self.frames

    @property
    def nbytes(self) -> int:
        return sum(scores.nbytes for evaluations in self.scores.values() for scores in evaluations)

    @property
    def failed(self) -> str:
        """What became of the images in ``broken``, for the user."""
        where = "; ".join(
            f"in step {step}, from layer {layer} on (image {image + 1} of {self.batch})"
            for image, (step, layer) in self.broken.items()
        )
        return (
            f"The model computed NaN or infinite values {where}, so there are no maps, and the image is "
            "probably black or noise. Try another precision (weight_dtype), or without the LoRAs and other "
            "patches, one by one."
        )

    def select(
        self, space: str, layers: Sequence[int] | None = None, steps: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Scores (L', B, K, h, w) of the chosen layers, one tensor for each evaluation in ``steps``.

        Raises:
            ValueError: the space, a layer or all of the steps were not recorded.
        """
        if space not in self.scores:
            raise ValueError(
                f'The space "{space}" was not recorded, only: {", ".join(self.scores)}. '
                "Switch it on in Concept Attention and sample again."
            )
        layers = self.default_layers if layers is None else layers
        missing = [layer for layer in layers if layer not in self.layers]
        if missing or not layers:
            raise ValueError(
                f"Layers {_listed(missing)} were not recorded. Recorded: {_listed(self.layers)}."
                if missing
                else f"No layers were chosen. Recorded: {_listed(self.layers)}."
            )
        wanted = None if steps is None else set(steps)
        chosen = [
            scores
            for scores, step in zip(self.scores[space], self.steps, strict=True)
            if wanted is None or step in wanted
        ]
        if not chosen:
            raise ValueError(
                "No step of the chosen range was recorded. "
                f"Recorded steps: {_listed(sorted(set(self.steps)))}."
            )
        index = [self.layers.index(layer) for layer in layers]
        if index == list(range(len(self.layers))):
            return chosen
        return [scores[index] for scores in chosen]


def gathered(images: Sequence[tuple[Recording, int]]) -> Recording:
    """The recording of a batch of images, each given by its recording and its number there: of the layers
    and spaces that all of those have.

    Raises:
        RecordingError: they cannot be in one recording.
    """
    first, _ = images[0]
    if [image for _, image in images] == list(range(first.batch)) and all(r is first for r, _ in images):
        return first
    recordings = list({id(recording): recording for recording, _ in images}.values())
    for other in recordings[1:]:
        _check_alike(first, other)
    layers = tuple(n for n in first.layers if all(n in r.layers for r in recordings))
    spaces = [space for space in first.scores if all(space in r.scores for r in recordings)]
    if not layers or not spaces:
        raise RecordingError(
            "The images of this LATENT were sampled in several runs that have no recorded layer and space in "
            "common. Record the same ones (record_layers) in all of them."
        )
    return replace(
        first,
        layers=layers,
        default_layers=tuple(n for n in first.default_layers if n in layers) or layers,
        scores={
            space: tuple(_images(images, space, e, layers) for e in range(len(first.sigmas)))
            for space in spaces
        },
        left_out=tuple(sorted({n for r in recordings for n in r.left_out})),
        broken={i: r.broken[image] for i, (r, image) in enumerate(images) if image in r.broken},
    )


def _check_alike(one: Recording, other: Recording) -> None:
    differences = {
        "concepts": lambda r: ", ".join(r.concepts.all),
        "steps": lambda r: _listed(sorted(set(r.steps))),
        "evaluations of the model": lambda r: len(r.sigmas),
        "noise levels": lambda r: ", ".join(f"{sigma:.3g}" for sigma in r.sigmas),
        "numbers of frames": lambda r: sum(r.durations),
        "sizes": lambda r: "{} x {}".format(*r.image_size),
    }
    for name, value in differences.items():
        if value(one) != value(other):
            raise RecordingError(
                f"The images of this LATENT were sampled with different {name}: {value(one)}; and "
                f"{value(other)}. Give each of those LATENTs a Concept Saliency of its own."
            )


def _images(
    images: Sequence[tuple[Recording, int]], space: str, evaluation: int, layers: tuple[int, ...]
) -> Tensor:
    """Their scores (L, B, K, h, w). Where they lie side by side already, no copy is made."""
    first, start = images[0]
    numbers = [image for _, image in images]
    if all(r is first for r, _ in images):
        scores = first.scores[space][evaluation]
        if numbers == list(range(start, start + len(numbers))):
            return scores[:, start * first.frames : (start + len(numbers)) * first.frames]
        return scores[:, [i for number in numbers for i in _pictures_of(number, first.frames)]]
    rows = []
    for recording, image in images:
        index = [recording.layers.index(layer) for layer in layers]
        of_image = _pictures_of(image, recording.frames)
        rows.append(recording.scores[space][evaluation][index, of_image.start : of_image.stop])
    return torch.cat(rows, 1)


def _pictures_of(image: int, frames: int) -> range:
    """Which pictures of a recording a latent's ``image`` is: itself, or the frames of a video."""
    return range(image * frames, (image + 1) * frames)


def parse_layers(
    text: str,
    available: Sequence[int],
    default: Sequence[int],
    left_out: Sequence[int] = (),
    main: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """Layers from text: "all", "default", or numbers and ranges as in "0, 15-18".

    Args:
        left_out: see ``Recording``.
        main: what "all" stands for; what is available if None.

    Raises:
        ValueError: it is none of these, has a range that runs backwards, or names layers that are not
            available.
    """
    words = text.strip().casefold()
    if words == "all":
        return tuple(available if main is None else main)
    if words == "default":
        return tuple(default)
    layers: set[int] = set()
    for part in words.split(","):
        # Of thousands of digits, int would raise an error of its own.
        match = re.fullmatch(r"\s*(\d{1,99})\s*(?:-\s*(\d{1,99})\s*)?", part)
        if not match:
            raise ValueError(
                f'Layers "{text}" cannot be read. Write "default", "all", or numbers as in "0, 15-18"; '
                f"available: {_listed(available)}."
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise ValueError(
                f'Layers "{text}" have a range that runs backwards: write {last}-{first} for {first}-{last}.'
            )
        missing = [n for n in (first, last) if n not in available]
        if missing:
            reason = ""
            if set(missing) <= set(left_out):
                reason = (
                    f" Layers {_listed(left_out)} were left out while sampling, because all together would "
                    f"have taken more than {BUDGET // 2**20} MB. To have them, record less: choose layers "
                    "(record_layers), fewer steps (record_every), concepts or images at a time."
                )
            raise ValueError(f'Layers "{text}" are not all available, only: {_listed(available)}.{reason}')
        layers.update(n for n in available if first <= n <= last)
    return tuple(sorted(layers))


def _listed(numbers: Sequence[int]) -> str:
    """ "0-3, 7" from 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in runs)


@dataclass(frozen=True)
class Pass:
    """Scores of one call of the model for the images ``batch`` and their ``frames``, all if None, the first
    token at ``origin``.

    ``scores[space]`` is (L, B', K, F', h', w') on the CPU; with ``copied``, once that event has happened.
    ``weight`` (B', 1, F', h', w'), 1 if None, is how much the prompt counts in each patch beside others; with
    ``default`` it counts where they leave something.
    """

    batch: slice | list[int]
    origin: Grid
    layers: tuple[int, ...]
    scores: dict[str, Tensor]
    copied: torch.cuda.Event | None = None
    weight: Tensor | None = None
    default: bool = False
    frames: list[int] | None = None

    def keep(self, layers: tuple[int, ...]) -> Pass:
        if layers == self.layers:
            return self
        index = [self.layers.index(layer) for layer in layers]
        scores = {space: s[index] for space, s in self.scores.items()}
        return replace(self, layers=layers, scores=scores, copied=None)


@dataclass
class Evaluation:
    """One evaluation of the model by the sampler. ``armed`` while its main pass runs, if it is to be recorded
    at all: extra passes that guidance methods add are not. ``calls`` of the model were met, with the positive
    conditionings ``seen``."""

    recorder: Recorder
    sigma: Tensor
    armed: bool = True
    passes: list[Pass] = field(default_factory=list)
    calls: int = 0
    seen: set = field(default_factory=set)

    @property
    def arrived(self) -> bool:
        """Whether its scores are on the CPU. Does not wait for them."""
        return all(recorded.copied is None or recorded.copied.query() for recorded in self.passes)

    def wait(self) -> None:
        """Also moves the scores out of pinned memory, which is scarce and made for copies on their way."""
        for i, recorded in enumerate(self.passes):
            if recorded.copied is not None:
                recorded.copied.synchronize()
                scores = {space: s.clone() for space, s in recorded.scores.items()}
                self.passes[i] = replace(recorded, scores=scores, copied=None)


class Recorder:
    """Collects the evaluations of one sampling run. Passes may arrive from several threads.

    Args:
        layers: the layers to record; once ``budget`` bytes are full, only the default ones are kept.
        sigmas: the run's schedule (n + 1,).
        batch, grid: the number of images or videos and the tokens of each.
        durations: see ``Recording``.
        every: evaluations from one that is to be recorded to the next.
    """

    def __init__(
        self,
        concepts: Concepts,
        layers: tuple[int, ...],
        default_layers: tuple[int, ...],
        sigmas: Tensor,
        batch: int,
        grid: Grid,
        image_size: tuple[int, int],
        coverage: tuple[float, float],
        durations: tuple[int, ...] = (1,),
        budget: int = BUDGET,
        every: int = 1,
    ) -> None:
        self.layers = layers
        self.batch = batch
        self.grid = grid
        self._durations = durations
        self.failure: str | None = None
        self.concepts = concepts
        self.coverage = coverage
        self._default_layers = tuple(layer for layer in default_layers if layer in layers) or layers
        self._schedule = [float(s) for s in sigmas]
        self._image_size = image_size
        self._budget = budget
        self._every = every
        self._bytes = 0
        self._left_out: tuple[int, ...] = ()
        self._evaluations: list[Evaluation] = []
        self._lock = threading.Lock()

    @property
    def evaluated(self) -> bool:
        """Whether the sampler has evaluated the model."""
        return bool(self._evaluations)

    def evaluation(self, sigma: Tensor) -> Evaluation:
        evaluation = Evaluation(self, sigma, armed=len(self._evaluations) % self._every == 0)
        self._evaluations.append(evaluation)
        return evaluation

    def add(self, evaluation: Evaluation, recorded: Pass) -> None:
        with self._lock:
            if recorded.layers != self.layers and recorded.copied is not None:
                recorded.copied.synchronize()
            for earlier in self._evaluations:
                if earlier.arrived:
                    earlier.wait()
            evaluation.passes.append(recorded.keep(self.layers))
            self._bytes += sum(s.nbytes for s in recorded.scores.values())
            if self._bytes > self._budget and self.layers != self._default_layers:
                self._thin()

    def arrived(self, start: int) -> tuple[list[Tensor], int]:
        """Scores (L, B, K, h, w) of the default layers, in the first space recorded, of the evaluations from
        number ``start`` on that are on the CPU by now; and the number of the next."""
        scores = []
        with self._lock:
            index = [self.layers.index(layer) for layer in self._default_layers]
            for evaluation in self._evaluations[start:]:
                if not evaluation.arrived:
                    break
                if evaluation.passes:
                    space = next(iter(evaluation.passes[0].scores))
                    scores.append(_pictures(self._merged(evaluation, space))[index])
                start += 1
        return scores, start

    def fail(self, reason: str) -> None:
        """Give up recording: the image goes on, and the reason is raised when maps are asked for."""
        self.failure = self.failure or reason

    def _thin(self) -> None:
        self._left_out = tuple(layer for layer in self.layers if layer not in self._default_layers)
        self.layers = self._default_layers
        logging.warning(
            "Concept Attention: all layers of this run would take more than %d MB; keeping layers %s only.",
            self._budget // 2**20,
            _listed(self.layers),
        )
        for evaluation in self._evaluations:
            evaluation.wait()
            evaluation.passes = [p.keep(self.layers) for p in evaluation.passes]
        self._bytes = sum(s.nbytes for e in self._evaluations for p in e.passes for s in p.scores.values())

    def finish(self, taken: int = 0) -> Recording:
        """The recording of the run.

        Args:
            taken: how many steps the sampler told of.

        Raises:
            RecordingError: something failed, or nothing was recorded.
        """
        if self.failure is not None:
            raise RecordingError(unrecorded(self.failure))
        evaluations = [e for e in self._evaluations if e.passes]
        if not evaluations:
            raise RecordingError(
                f"Concept Attention recorded nothing while this LATENT was sampled{self._why_nothing(taken)}"
            )
        sigmas = [float(e.sigma.flatten()[0]) for e in evaluations]
        steps = tuple(_step(self._schedule, sigma) for sigma in sigmas)
        broken: dict[int, tuple[int, int]] = {}
        for evaluation, step in zip(evaluations, steps, strict=True):
            evaluation.wait()
            broken = self._not_finite(evaluation, step) | broken
        spaces = evaluations[0].passes[0].scores
        scores = {space: tuple(_pictures(self._merged(e, space)) for e in evaluations) for space in spaces}
        if broken:
            rows = torch.tensor([i for image in broken for i in _pictures_of(image, self.grid.frames)])
            scores = {
                space: tuple(s.index_fill(1, rows, torch.nan) for s in each) for space, each in scores.items()
            }
        unseen = torch.stack([s[0, :, 0].isnan() for s in next(iter(scores.values()))]).all(0)
        whole = [image for image in range(self.batch) if image not in broken]
        unseen = unseen[[i for image in whole for i in _pictures_of(image, self.grid.frames)]]
        if unseen.any():
            logging.warning(
                "Concept Attention: in %.0f %% of the image no positive prompt is at work (areas, masks, "
                "strengths). Concepts have no maps there.",
                100 * unseen.float().mean(),
            )
        return Recording(
            concepts=self.concepts,
            layers=self.layers,
            default_layers=self._default_layers,
            sigmas=tuple(sigmas),
            steps=steps,
            scores=scores,
            image_size=self._image_size,
            coverage=self.coverage,
            left_out=self._left_out,
            durations=self._durations,
            broken=broken,
        )

    def _why_nothing(self, taken: int) -> str:
        count = len(self._evaluations)
        if any(e.calls and not e.seen for e in self._evaluations):
            return (
                f": in none of the {count} evaluations of the model was the positive prompt at work. Look at "
                "its timestep range (ConditioningSetTimestepRange), and at the sampler's steps and denoise."
            )
        if count:
            return (
                f", although {count} evaluations of the model ran. Another node replaces the model's forward "
                "pass or skips it (TeaCache and similar caches, a compiled or replaced model). Switch such "
                "nodes off one by one and sample again."
            )
        if taken:
            return (
                f", although the sampler took {taken} steps: its guider calls the model in a way of its own "
                "that no other node sees, as those of ComfyUI-NAG do. Use an ordinary sampler or guider; for "
                "NAG, put ComfyUI's own node, Normalized Attention Guidance, behind the model."
            )
        levels = [f"{self._schedule[i]:.3g}" for i in (0, -1)] if self._schedule else ["none", "none"]
        return (
            ": the sampler took no step, so the model did not look at the picture. Its noise levels go from "
            f"{levels[0]} to {levels[1]}. Raise its denoise, widen its range of steps, or look at the nodes "
            "that make or split its SIGMAS."
        )

    def _not_finite(self, evaluation: Evaluation, step: int) -> dict[int, tuple[int, int]]:
        """The images for which the model computed NaN or infinite values: see ``Recording.broken``."""
        found: dict[int, tuple[int, int]] = {}
        for recorded in evaluation.passes:
            images = (
                range(self.batch)[recorded.batch] if isinstance(recorded.batch, slice) else recorded.batch
            )
            for scores in recorded.scores.values():
                finite = scores.isfinite().flatten(2).all(2)  # (L, B')
                for row, image in enumerate(images):
                    if not finite[:, row].all():
                        found[image] = (step, self.layers[int(finite[:, row].int().argmin())])
        return found

    def _merged(self, evaluation: Evaluation, space: str) -> Tensor:
        """The mean of the passes over each patch, weighted as the sampler weights what they predict: several
        conditionings, areas, masks or context windows. NaN in patches without any."""
        first = evaluation.passes[0]
        whole = (len(self.layers), self.batch, len(self.concepts.all), *self.grid)
        if len(evaluation.passes) == 1 and first.scores[space].shape == whole and first.weight is None:
            return first.scores[space]
        total, weights = torch.zeros(whole), torch.zeros(self.batch, 1, *self.grid)
        for p in sorted(evaluation.passes, key=lambda p: p.default):
            scores = p.scores[space]
            frames, rows, columns = (
                slice(o, o + n) for o, n in zip(p.origin, scores.shape[-3:], strict=True)
            )
            weight = torch.ones(1) if p.weight is None else p.weight
            at = (p.batch, slice(None), frames if p.frames is None else p.frames, rows, columns)
            if p.default:
                weight = (1 - weights[at]).clamp_min(0)
            total[(slice(None), *at)] += weight * scores
            weights[at] += weight
        return total / weights  # 0 / 0 is NaN


def _pictures(scores: Tensor) -> Tensor:
    """(L, B, K, F, h, w) as (L, B * F, K, h, w)."""
    return scores.movedim(3, 2).flatten(1, 2)


def _step(schedule: list[float], sigma: float) -> int:
    """The last step of the schedule that starts at this noise level or beyond, in the schedule's own
    direction: noise goes up when an image is turned back into noise."""
    if schedule[0] >= schedule[-1]:
        step = bisect.bisect_right([-s for s in schedule], -sigma * (1 - 1e-5)) - 1
    else:
        step = bisect.bisect_right(schedule, sigma * (1 + 1e-5)) - 1
    return min(max(step, 0), max(0, len(schedule) - 2))
