"""Recording: what collects the scores of one sampling run while it goes on.

Shapes as in ``recording``; B' of the pictures, and F' x h' x w' of the grid, that one call of the model has.
"""

from __future__ import annotations

import bisect
import logging
import threading
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..concepts import Concepts
from ..geometry import Grid
from .recording import BUDGET, Recording, RecordingError, listed, pictures_of, unrecorded


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
    conditionings ``seen``. With a ``gap`` one of them could not be read, and nothing is kept."""

    recorder: Recorder
    sigma: Tensor
    armed: bool = True
    passes: list[Pass] = field(default_factory=list)
    calls: int = 0
    seen: set = field(default_factory=set)
    gap: str | None = None

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


@dataclass
class _Kept:
    """The mean of evaluations, given by their numbers in the run.

    ``scores[space]`` is (L, B, K, h, w), the frames of videos as pictures; NaN in patches that none has seen.
    """

    numbers: list[int]
    scores: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self.scores.values())

    def join(self, later: _Kept) -> None:
        self.numbers += later.numbers
        share = len(later.numbers) / len(self.numbers)
        for space, theirs in later.scores.items():
            ours = self.scores[space]
            ours, theirs = ours.where(~ours.isnan(), theirs), theirs.where(~theirs.isnan(), ours)
            self.scores[space] = torch.lerp(ours, theirs, share)


class Recorder:
    """Collects the evaluations of one sampling run. Passes may arrive from several threads.

    What would take more than ``budget`` bytes is never kept. First go the layers that are no default ones.
    Then evaluations that follow each other are kept as the mean of their scores, two, four or more in one.
    Both are planned before the run, by the schedule; samplers that evaluate the model more often than once
    in a step are found out on the way.

    Args:
        layers: the layers to record.
        sigmas: the run's schedule (n + 1,).
        batch, grid: the number of images or videos and the tokens of each.
        durations: see ``Recording``.
        every: evaluations from one that is to be recorded to the next.
        spaces: the number of spaces to record.
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
        spaces: int = 1,
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
        self._left_out: tuple[int, ...] = ()
        self._evaluations: list[Evaluation] = []
        self._done = 0  # so many of them are in what is kept
        self._kept: list[_Kept] = []
        self._at_once = 1  # so many of them become one
        self._broken: dict[int, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._plan(spaces)

    @property
    def evaluated(self) -> bool:
        """Whether the sampler has evaluated the model."""
        return bool(self._evaluations)

    @property
    def space(self) -> str | None:
        """The first of those recorded, if there is any yet."""
        recorded = (r for e in self._evaluations[self._done :] for r in e.passes)
        return next((next(iter(r.scores)) for r in (*self._kept, *recorded)), None)

    def evaluation(self, sigma: Tensor) -> Evaluation:
        evaluation = Evaluation(self, sigma, armed=len(self._evaluations) % self._every == 0)
        self._evaluations.append(evaluation)
        return evaluation

    def leave_out(self, evaluation: Evaluation, gap: str) -> None:
        """Keep nothing of the evaluation, as if it had not been: another node left blocks out."""
        with self._lock:
            evaluation.gap = evaluation.gap or gap
            evaluation.passes.clear()

    def add(self, evaluation: Evaluation, recorded: Pass) -> None:
        with self._lock:
            if evaluation.gap:
                return
            if recorded.layers != self.layers and recorded.copied is not None:
                recorded.copied.synchronize()
            evaluation.passes.append(recorded.keep(self.layers))
            while (earlier := self._evaluations[self._done]) is not evaluation and earlier.arrived:
                self._keep(earlier)

    def arrived(self, start: int) -> tuple[list[Tensor], int]:
        """Scores (L, B, K, h, w) of the default layers, in the first space recorded, of the evaluations from
        number ``start`` on that are on the CPU by now; and the number of the next. Where several are kept as
        one, their mean stands for each."""
        scores: list[Tensor] = []
        with self._lock:
            index = [self.layers.index(layer) for layer in self._default_layers]
            for kept in self._kept:
                scores += [kept.scores[self.space][index] for number in kept.numbers if number >= start]
            start = max(start, self._done)
            for evaluation in self._evaluations[start:]:
                if not evaluation.arrived:
                    break
                if evaluation.passes:
                    scores.append(_pictures(self._merged(evaluation, self.space))[index])
                start += 1
        return scores, start

    def fail(self, reason: str) -> None:
        """Give up recording: the image goes on, and the reason is raised when maps are asked for."""
        self.failure = self.failure or reason

    def _plan(self, spaces: int) -> None:
        """As much as the schedule tells before the run, so that nothing is computed in vain."""
        evaluations = max(1, -(-(len(self._schedule) - 1) // self._every))
        of_a_layer = 4 * spaces * self.batch * len(self.concepts.all) * self.grid.size
        most = self._budget // of_a_layer
        if not most:
            self.fail(
                f"the scores of one layer would take {of_a_layer / 2**20:.0f} MB, more than the "
                f"{self._budget / 2**20:.0f} MB that there are for a recording. Name fewer concepts, or make "
                "fewer images or frames at a time"
            )
        elif evaluations * len(self.layers) > most:
            self._keep_layers(self._default_layers[-most:])
            if evaluations * len(self.layers) > most:
                self._keep_at_once(-(-evaluations // (most // len(self.layers))))

    def _keep_layers(self, layers: tuple[int, ...]) -> None:
        """``layers`` only."""
        if layers == self.layers:
            return
        index = [self.layers.index(layer) for layer in layers]
        self._left_out = tuple(sorted({*self._left_out, *self.layers} - {*layers}))
        self.layers = self._default_layers = layers
        logging.warning(
            "Concept Attention: all layers of this run would take more than %d MB; keeping layers %s only.",
            self._budget // 2**20,
            listed(layers),
        )
        for kept in self._kept:
            kept.scores = {space: s[index] for space, s in kept.scores.items()}
        for evaluation in self._evaluations[self._done :]:
            evaluation.wait()
            evaluation.passes = [p.keep(layers) for p in evaluation.passes]

    def _keep_at_once(self, evaluations: int) -> None:
        """So many ``evaluations`` as one. Those kept already are a half of it each."""
        self._at_once = evaluations
        logging.warning(
            "Concept Attention: this run would take more than %d MB even so; every %d evaluations of the "
            "model that follow each other are kept as one, the mean of their scores, and count as its first "
            'step. Of all steps together, raw scores and the average "before softmax" stay exact; "after '
            'softmax" is the mean of fewer maps. To have each step, record fewer concepts, layers '
            "(record_layers) or frames, or every so many evaluations (record_every).",
            self._budget // 2**20,
            evaluations,
        )
        for first, second in zip(self._kept[::2], self._kept[1::2], strict=False):
            first.join(second)
        self._kept = self._kept[::2]

    def _keep(self, evaluation: Evaluation) -> None:
        """The next that is done, as it is or in the last mean, within the budget."""
        evaluation.wait()
        number, self._done = self._done, self._done + 1
        if not evaluation.passes:
            return
        self._broken = self._not_finite(evaluation, number) | self._broken
        spaces = evaluation.passes[0].scores
        kept = _Kept([number], {space: _pictures(self._merged(evaluation, space)) for space in spaces})
        evaluation.passes = []
        if self._kept and len(self._kept[-1].numbers) < self._at_once:
            self._kept[-1].join(kept)
        else:
            self._kept.append(kept)
        while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept) > self._budget:
            if self.layers != self._default_layers:
                self._keep_layers(self._default_layers)
            else:
                self._keep_at_once(2 * self._at_once)

    def finish(self, taken: int = 0) -> Recording:
        """The recording of the run.

        Args:
            taken: how many steps the sampler told of.

        Raises:
            RecordingError: something failed, or nothing was recorded.
        """
        if self.failure is not None:
            raise RecordingError(unrecorded(self.failure))
        for evaluation in self._evaluations[self._done :]:
            self._keep(evaluation)
        if not self._kept:
            raise RecordingError(
                f"Concept Attention recorded nothing while this LATENT was sampled{self._why_nothing(taken)}"
            )
        if gaps := [e.gap for e in self._evaluations if e.gap]:
            logging.warning(
                "Concept Attention: maps are made without %d of the %d evaluations of the model, in which "
                "another node left out blocks or ran them otherwise (%s).",
                len(gaps),
                len(self._evaluations),
                gaps[0],
            )
        noise = [float(evaluation.sigma.flatten()[0]) for evaluation in self._evaluations]
        sigmas = [noise[kept.numbers[0]] for kept in self._kept]
        scores = {space: tuple(kept.scores[space] for kept in self._kept) for space in self._kept[0].scores}
        broken = {
            image: (_step(self._schedule, noise[number]), layer)
            for image, (number, layer) in self._broken.items()
        }
        if broken:
            rows = torch.tensor([i for image in broken for i in pictures_of(image, self.grid.frames)])
            scores = {
                space: tuple(s.index_fill(1, rows, torch.nan) for s in each) for space, each in scores.items()
            }
        unseen = torch.stack([s[0, :, 0].isnan() for s in next(iter(scores.values()))]).all(0)
        whole = [image for image in range(self.batch) if image not in broken]
        unseen = unseen[[i for image in whole for i in pictures_of(image, self.grid.frames)]]
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
            steps=tuple(_step(self._schedule, sigma) for sigma in sigmas),
            scores=scores,
            image_size=self._image_size,
            coverage=self.coverage,
            left_out=self._left_out,
            durations=self._durations,
            broken=broken,
            counts=tuple(len(kept.numbers) for kept in self._kept) if self._at_once > 1 else (),
        )

    def _why_nothing(self, taken: int) -> str:
        count = len(self._evaluations)
        if any(e.calls and not e.seen for e in self._evaluations):
            return (
                f": in none of the {count} evaluations of the model was the positive prompt at work. Look at "
                "its timestep range (ConditioningSetTimestepRange), and at the sampler's steps and denoise."
            )
        if count:
            gap = next((f" ({e.gap})" for e in self._evaluations if e.gap), "")
            return (
                f", although {count} evaluations of the model ran{gap}. Another node replaces the model's "
                "forward pass, skips it or leaves out blocks of it (TeaCache and similar caches, skip-layer "
                "nodes, a compiled or replaced model). Switch such nodes off one by one and sample again."
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

    def _not_finite(self, evaluation: Evaluation, number: int) -> dict[int, tuple[int, int]]:
        """The images for which the model computed NaN or infinite values: its number, and the layer."""
        found: dict[int, tuple[int, int]] = {}
        for recorded in evaluation.passes:
            images = (
                range(self.batch)[recorded.batch] if isinstance(recorded.batch, slice) else recorded.batch
            )
            for scores in recorded.scores.values():
                finite = scores.isfinite().flatten(2).all(2)  # (L, B')
                for row, image in enumerate(images):
                    if not finite[:, row].all():
                        found[image] = (number, self.layers[int(finite[:, row].int().argmin())])
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
