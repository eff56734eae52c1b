"""What was recorded while a sampler ran.

Shapes: E evaluations of the model, L layers, B pictures, K concepts (background concepts last), and the
patch grid h x w. The latent frames of a video are pictures, F of them; those of a batch follow each other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..concepts import Concepts

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
        counts: of each evaluation here, how many of the model, one after the other, it is the mean of: all
            of them would have taken more memory than is allowed. It has the sigma and the step of its first.
            Empty: each is one.
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
    counts: tuple[int, ...] = ()
    broken: dict[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def frames(self) -> int:
        """F, how many pictures belong together as one video; 1 of images."""
        return len(self.durations)

    @property
    def space(self) -> str:
        """The one that maps are made from by default: "output" if it was recorded, else the first."""
        return "output" if "output" in self.scores else next(iter(self.scores))

    @property
    def timed(self) -> bool:
        """Whether its frames follow each other in time. Others are layers of one picture."""
        return max(self.durations) > 1

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

    def part(self, start: int, frames: int) -> Recording:
        """That of so many latent frames of each video, from ``start`` on, as of a video of its own: a VAE
        decodes the first of them to as many frames as the first of the whole."""
        if frames == self.frames:
            return self
        end = start + frames
        return replace(
            self,
            scores={
                space: tuple(
                    s.unflatten(1, (-1, self.frames))[:, :, start:end].flatten(1, 2) for s in evaluations
                )
                for space, evaluations in self.scores.items()
            },
            durations=self.durations[:frames],
        )

    def select(
        self, space: str, layers: Sequence[int] | None = None, steps: Sequence[int] | None = None
    ) -> list[Tensor]:
        """Scores (L', B, K, h, w) of the chosen layers, one tensor for each evaluation in ``steps``.

        Raises:
            ValueError: the space, a layer or all of the steps were not recorded.
        """
        if space not in self.scores:
            hint = "Or, if the model has it, switch it on in Concept Attention and sample again."
            if list(self.scores) == ["probability"]:
                hint = "Models whose picture only reads the text (Stable Diffusion XL, Wan) have no other."
            raise ValueError(
                f'The space "{space}" was not recorded, only: {"; ".join(self.scores)}. Choose one of those, '
                f'or "default". {hint}'
            )
        layers = self.default_layers if layers is None else layers
        missing = [layer for layer in layers if layer not in self.layers]
        if missing or not layers:
            raise ValueError(
                f"Layers {listed(missing)} were not recorded. Recorded: {listed(self.layers)}."
                if missing
                else f"No layers were chosen. Recorded: {listed(self.layers)}."
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
                f"Recorded steps: {listed(sorted(set(self.steps)))}."
            )
        index = [self.layers.index(layer) for layer in layers]
        if index == list(range(len(self.layers))):
            return chosen
        return [scores[index] for scores in chosen]

    def weights(self, steps: Sequence[int] | None = None) -> list[int]:
        """Of how many evaluations of the model each that ``select`` gives for these ``steps`` is the mean."""
        counts = self.counts or (1,) * len(self.steps)
        return [
            count for count, step in zip(counts, self.steps, strict=True) if steps is None or step in steps
        ]


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
        "steps": lambda r: listed(sorted(set(r.steps))),
        "evaluations of the model": lambda r: len(r.sigmas),
        "numbers of evaluations kept as one": lambda r: listed(sorted({*r.counts} or {1})),
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
        return scores[:, [i for number in numbers for i in pictures_of(number, first.frames)]]
    rows = []
    for recording, image in images:
        index = [recording.layers.index(layer) for layer in layers]
        of_image = pictures_of(image, recording.frames)
        rows.append(recording.scores[space][evaluation][index, of_image.start : of_image.stop])
    return torch.cat(rows, 1)


def pictures_of(image: int, frames: int) -> range:
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
                f"available: {listed(available)}."
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
                    f" Layers {listed(left_out)} were left out while sampling, because all together would "
                    f"have taken more than {BUDGET // 2**20} MB. To have them, record less: choose layers "
                    "(record_layers), fewer steps (record_every), concepts or images at a time."
                )
            raise ValueError(f'Layers "{text}" are not all available, only: {listed(available)}.{reason}')
        layers.update(n for n in available if first <= n <= last)
    return tuple(sorted(layers))


def listed(numbers: Sequence[int]) -> str:
    """ "0-3, 7" from 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in runs)
