"""Recordings of existing images: noise is added, the model looks once per noise level and sample, and stops
after the last recorded layer (arXiv 2502.04320, section 5; the reference's ``encode_image``).

Shapes: B images, S noise samples, K concepts. An evaluation has rows: S * B of them, sample by sample, or as
many as fit into memory at once.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import comfy.model_management
import comfy.sample
import comfy.utils
import torch
from comfy.ldm.common_dit import pad_to_patch_size
from comfy.model_sampling import CONST, COSMOS_RFLOW
from comfy.samplers import CFGGuider, Sampler
from torch import Tensor, nn

from ..architectures import family_of
from ..images import rgb_images
from .latents import recorded
from .observe import WhatToRecord, observe
from .recording import AVERAGES, BUDGET, Recording, RecordingError

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE

LEVEL = 0.5


def observe_image(
    model: ModelPatcher,
    what: WhatToRecord,
    latent: Tensor,
    conditioning: list,
    *,
    image_size: tuple[int, int],
    levels: Sequence[float] = (LEVEL,),
    samples: int = 1,
    seed: int = 0,
    noise: Tensor | None = None,
    pooled_prompt: bool = True,
    average: str = "after softmax",
    frames: int | None = None,
) -> Recording:
    """What the model sees in images that it did not paint.

    Everything runs through ComfyUI's own sampling, so that LoRAs, ControlNets, other nodes' patches,
    offloading and Cancel work as they do in a sampler. ``model`` stays as it is; if it is observed already,
    that observer has no part in this.

    The reference's settings: first tokens of concepts, ``step_levels(model, "2", 4)``, guidance 0 in the
    conditioning, and no pooled prompt.

    Args:
        what: its ``every`` and ``budget`` do not matter, since every evaluation is recorded.
        latent: the images as ``encode_images`` gives them, (B, C, H, W) or (B, C, F, H, W).
        conditioning: the prompt, as CLIPTextEncode gives it. Tensors in it with more than one row have one
            for each image.
        image_size: height and width of the images in pixels, which may be less than the latent's: what
            ``encode_images`` padded.
        levels: noise levels (the t of flow matching) from 0, the image as it is, to 1, noise only:
            (1 - t) * latent + t * noise. Models of another schedule are given the noise of t * 1000 of their
            1000 training timesteps.
        samples: noise samples per level, S. All levels share them.
        seed: sample i is the noise that ComfyUI draws for seed + i, as in the reference.
        noise: the noise itself, (S, *latent.shape), in place of that of ``samples`` and ``seed``.
        pooled_prompt: whether the image's own stream is given the prompt's pooled vector. The reference gives
            it zeros.
        average: "after softmax" keeps every level and sample as an evaluation of its own, and maps are means
            of their softmaxes; "before softmax" keeps the mean of their scores as the only evaluation, with
            the mean noise level.
        frames: of the video, which may be less than the latent's: what ``encode_images`` repeated. As many as
            the latent has if None.

    Returns:
        The recording: evaluations by level, the noisiest first, then by sample. Its steps number the levels.

    Raises:
        ValueError: the model is of no supported family, the latent is empty, not the model's or of another
            size than the image, a level lies outside 0..1, or a choice does not exist.
        RecordingError: another node keeps the model's attention from being seen, or the model computed NaN
            or infinite values for every image.
    """
    levels = _checked(levels)
    if average not in AVERAGES:
        raise ValueError(f'Unknown average "{average}". Choose one of: {"; ".join(AVERAGES)}.')
    diffusion_model = model.get_model_object("diffusion_model")
    family = family_of(diffusion_model)
    if family.sound:
        raise ValueError(
            f"{family.name} makes a video and its sound together, and cannot look at pictures alone. Record "
            "what it samples, with Concept Attention."
        )
    coverage = _coverage(model, latent, image_size)
    if latent.ndim == 4 and model.get_model_object("latent_format").latent_dimensions == 3:
        latent, noise = latent.unsqueeze(2), None if noise is None else noise.unsqueeze(3)
    if noise is None:
        if samples < 1:
            raise ValueError(f"Concept Attention needs at least one noise sample, not {samples}.")
        noise = torch.stack([comfy.sample.prepare_noise(latent, (seed + i) % 2**64) for i in range(samples)])
    layers = family.default_layers(diffusion_model) if what.layers is None else what.layers
    # Nothing is recorded here but what was asked for.
    what = replace(what, layers=layers, every=1, budget=sys.maxsize)
    observed = observe(model, what, maps_only=True)
    if not pooled_prompt:
        conditioning = [_without_pooled(entry) for entry in conditioning]
    parts = _evaluate(observed, latent, noise, conditioning, levels, seed)
    recording = _folded(parts, levels, noise.shape[:2], average, image_size, coverage)
    if frames is not None:
        recording = replace(recording, durations=_shortened(recording.durations, frames))
    if recording.nbytes > BUDGET:
        logging.warning(
            "Concept Attention: this recording takes %d MB, all that was asked for. Fewer noise levels, "
            'samples, layers or spaces make it smaller, and so does the average "before softmax".',
            recording.nbytes // 2**20,
        )
    if len(recording.broken) == recording.batch:
        raise RecordingError(recording.failed)
    return recording


def _shortened(durations: tuple[int, ...], frames: int) -> tuple[int, ...]:
    """Those of a video of so many ``frames``, whose last was repeated."""
    return (*durations[:-1], durations[-1] - (sum(durations) - frames))


def encode_images(vae: VAE, images: Tensor, unit: int, frame_length: int | None = None) -> Tensor:
    """The latent of images (B, H, W, 3 or more), of which the first three channels count: (B, C, H, W), or
    (B, C, 1, H, W) by the VAE of a video model; or that of the video (1, C, F, H, W) whose frames they are.

    ``VAE.encode`` would cut off what is no multiple of its patch, on all sides. Here the images are padded to
    a multiple of ``unit`` pixels first, at the bottom and on the right as ComfyUI's models pad latents, so
    that the maps cover all of them. The padding repeats the edge: wrapped around, as in those models, it
    would show what is on the other side. A video's last frame is repeated too, where VAEs would leave out
    the frames that do not fill another of the latent.

    Args:
        unit: see ``patch_pixels``.
        frame_length: see ``frames_in_one``.

    Raises:
        ValueError: they are no images, see ``rgb_images``; or the VAE is not the video model's.
    """
    pixels = rgb_images(images).movedim(-1, 1)
    padded = pad_to_patch_size(pixels, (unit, unit), padding_mode="replicate").movedim(1, -1)
    if getattr(vae, "latent_dim", 2) != 3:
        return vae.encode(padded)
    if frame_length is None:  # it would take the images for frames of one video
        return torch.cat([vae.encode(image[None]) for image in padded])
    missing = (1 - len(padded)) % frame_length
    latent = vae.encode(torch.cat([padded, padded[-1:].expand(missing, -1, -1, -1)]))
    expected = 1 + (len(padded) + missing - 1) // frame_length
    if latent.ndim != 5 or latent.shape[2] != expected:
        raise ValueError(
            f"The VAE makes a latent of the shape {tuple(latent.shape)} of the {len(padded)} frames, where "
            f"{expected} latent frames are needed. Use the VAE that belongs to the model."
        )
    return latent


def frames_in_one(model: ModelPatcher) -> int | None:
    """How many frames of a video share a frame of the latent, beyond the first; None if images are looked at
    one by one, since the model makes no videos."""
    length = family_of(model.get_model_object("diffusion_model")).frame_length
    films = length > 1 and model.get_model_object("latent_format").latent_dimensions == 3
    return length if films else None


def patch_pixels(model: ModelPatcher) -> int:
    """The side of the square of pixels that becomes one patch of the model: 16 for Flux.1."""
    downscale = model.get_model_object("latent_format").spacial_downscale_ratio
    diffusion_model = model.get_model_object("diffusion_model")
    return downscale * family_of(diffusion_model).patch(diffusion_model).rows


def parse_levels(text: str) -> tuple[float, ...]:
    """Noise levels from text: one or more numbers in 0..1, as in "0.3, 0.5".

    Raises:
        ValueError: it is something else.
    """
    try:
        if re.fullmatch(r"\s*0,\d+\s*", text):  # a decimal comma, not two levels
            raise ValueError
        levels = tuple(float(part) for part in re.split(r"[,\s]+", text.strip(" ,\t\r\n")))
    except ValueError:
        raise ValueError(
            f'Noise levels "{text}" cannot be read. Write numbers from 0 (the image as it is) to 1 (noise '
            'only), as in "0.5" or "0.3, 0.5".'
        ) from None
    return _checked(levels)


def step_levels(model: ModelPatcher, text: str, of: int) -> tuple[float, ...]:
    """The noise levels at which steps of a schedule of ``of`` steps start, from text as in "2" or "1, 2".

    Steps count from 0, which is noise only, as in the reference: equal steps from 1 to 0, then the time shift
    of the model. That is the shift that the MODEL has, 1.15 for Flux.1 dev unless a ModelSamplingFlux node
    changed it, and none for schnell: what the reference uses for 1024 x 1024 pixels, its only size.

    Raises:
        ValueError: the text cannot be read, or a step is not one of ``of``.
    """
    parts = re.split(r"[,\s]+", text.strip(" ,\t\r\n"))
    if not all(re.fullmatch(r"\d{1,99}", part) for part in parts):
        raise ValueError(f'Noise steps "{text}" cannot be read. Write whole numbers, as in "2" or "1, 2".')
    steps = [int(part) for part in parts]
    for step in steps:
        if step >= of:
            raise ValueError(
                f"There is no noise step {step} of {of}: steps go from 0 (noise only) to {of - 1}."
            )
    sampling = model.get_model_object("model_sampling")
    return _checked([_step_level(sampling, step / of) for step in steps])


def _sigma(sampling: nn.Module, level: float) -> float:
    """By the model's schedule, of which 0 is no noise and 1 the most that it knows."""
    if isinstance(sampling, CONST):
        return level
    most = float(sampling.sigma_max)
    if isinstance(sampling, COSMOS_RFLOW):  # flow matching, but for the scale of its sigmas
        return min(level / (1 - level), most) if level < 1 else most
    # Some are told the logarithm of the noise, which 0 has none of.
    tells_none = sampling.timestep(torch.zeros(1)).isfinite().all()
    least = 0.0 if tells_none else float(sampling.sigma_min)
    return min(max(sampling.percent_to_sigma(1 - level), least), most)


def _step_level(sampling: nn.Module, progress: float) -> float:
    """The level at which that part of a schedule is done."""
    if isinstance(sampling, CONST):
        return float(sampling.percent_to_sigma(progress))
    if isinstance(sampling, COSMOS_RFLOW):
        sigma = float(sampling.percent_to_sigma(progress))
        return sigma / (1 + sigma)
    return 1 - progress


def _checked(levels: Sequence[float]) -> tuple[float, ...]:
    """Each level once, from noise to image."""
    outside = [level for level in levels if not 0 <= level <= 1]
    if outside or not levels:
        raise ValueError(
            f"Noise level {outside[0]:g} is outside 0 (the image as it is) to 1 (noise only)."
            if outside
            else "No noise level was given. Name at least one, from 0 to 1."
        )
    return tuple(sorted(set(levels), reverse=True))


def _coverage(model: ModelPatcher, latent: Tensor, image_size: tuple[int, int]) -> tuple[float, float]:
    """The share of the patch grid that the image covers."""
    latent_format = model.get_model_object("latent_format")
    channels, axes = latent_format.latent_channels, latent_format.latent_dimensions
    if latent.ndim not in (4, axes + 2) or latent.shape[1] != channels:
        expected = ("images", str(channels), *(["frames"] if axes == 3 else []), "height", "width")
        raise ValueError(
            f"The latent has the shape {tuple(latent.shape)}; this model takes ({', '.join(expected)}). "
            "Use the VAE that belongs to the model."
        )
    if not len(latent):
        raise ValueError("There are no images: the latent is an empty batch.")
    diffusion_model = model.get_model_object("diffusion_model")
    grid = family_of(diffusion_model).grid(diffusion_model, latent)
    unit = patch_pixels(model)
    if tuple(-(-n // unit) for n in image_size) != grid[1:]:
        raise ValueError(
            f"A latent of {latent.shape[-2]} x {latent.shape[-1]} is {grid.rows} x {grid.columns} patches of "
            f"{unit} pixels, which an image of {image_size[0]} x {image_size[1]} pixels does not fill."
        )
    return (image_size[0] / (grid.rows * unit), image_size[1] / (grid.columns * unit))


def _evaluate(
    model: ModelPatcher,
    latent: Tensor,
    noise: Tensor,
    conditioning: list,
    levels: tuple[float, ...],
    seed: int,
) -> list[list[Recording]]:
    """For parts of the rows, one after the other, a recording for each level."""
    images = torch.arange(len(latent)).repeat(len(noise))
    noise = noise.flatten(0, 1)
    at_once = min(len(images), _rows_that_fit(model, latent))
    progress = comfy.utils.ProgressBar(len(images) * len(levels))
    parts: list[list[Recording]] = []
    start = 0
    while start < len(images):
        rows = slice(start, start + at_once)
        part = []
        try:
            for level in levels:
                done = start * len(levels) + len(part) * len(images[rows])
                progress.update_absolute(done)
                part.append(
                    _one_evaluation(
                        model,
                        latent[images[rows]],
                        noise[rows],
                        [_of_images(entry, images[rows]) for entry in conditioning],
                        level,
                        seed,
                    )
                )
        except Exception as error:
            comfy.model_management.raise_non_oom(error)
            if at_once == 1:
                raise
            too_much = True
        else:
            too_much = False
        if too_much:  # out here, where no traceback keeps the failed evaluation's tensors
            at_once = -(-at_once // 2)
            comfy.model_management.soft_empty_cache()
            continue
        parts.append(part)
        start += at_once
    progress.update_absolute(len(images) * len(levels))
    return parts


def _rows_that_fit(model: ModelPatcher, latent: Tensor) -> int:
    """By ComfyUI's estimate of the memory that the model needs, with the reserve that it keeps itself."""
    needed = 1.5 * model.model.memory_required([1, *latent.shape[1:]])
    comfy.model_management.load_models_gpu([model], memory_required=needed)
    return max(1, int(model.get_free_memory(model.load_device) // needed))


def _one_evaluation(
    model: ModelPatcher, latent: Tensor, noise: Tensor, conditioning: list, level: float, seed: int
) -> Recording:
    """A sampling run of its own, since caches such as EasyCache would skip what resembles the evaluation
    before."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    guider = CFGGuider(model)
    guider.inner_set_conds({"positive": conditioning})
    sigmas = torch.tensor([_sigma(model.get_model_object("model_sampling"), level), 0.0])
    sampled = guider.sample(noise, latent, _Once(), sigmas, disable_pbar=True, seed=seed)
    return recorded(sampled)


class _Once(Sampler):
    """Evaluates the model at the first noise level, and that is all."""

    def sample(
        self,
        model_wrap,
        sigmas,
        extra_args,
        callback,
        noise,
        latent_image=None,
        denoise_mask=None,
        disable_pbar=False,
    ) -> Tensor:
        x = model_wrap.inner_model.model_sampling.noise_scaling(sigmas[0], noise, latent_image)
        model_wrap(x, sigmas[:1].expand(len(x)), **extra_args)
        return x


def _without_pooled(entry: list) -> list:
    context, values = entry
    pooled = values.get("pooled_output")
    return [context, values if pooled is None else {**values, "pooled_output": torch.zeros_like(pooled)}]


def _of_images(entry: list, images: Tensor) -> list:
    """A conditioning's rows for these images. ComfyUI would count from its first row in every part."""

    def rows(value):
        if isinstance(value, Tensor) and value.ndim and len(value) > 1:
            return value[images % len(value)]
        if isinstance(value, list):  # reference latents
            return [rows(v) for v in value]
        return value

    context, values = entry
    values = {name: rows(value) for name, value in values.items()}
    if "control" in values:
        values["control"] = _control_of_images(values["control"], rows)
    return [rows(context), values]


def _control_of_images(control, rows):
    """A ControlNet, and those before it, whose hint has an image for each of ours."""
    previous = control.previous_controlnet
    chosen = None if previous is None else _control_of_images(previous, rows)
    hint = rows(control.cond_hint_original)
    if chosen is previous and hint is control.cond_hint_original:
        return control
    copy = control.copy()
    copy.cond_hint_original = hint
    copy.set_previous_controlnet(chosen)
    return copy


def _folded(
    parts: list[list[Recording]],
    levels: tuple[float, ...],
    shape: tuple[int, int],
    average: str,
    image_size: tuple[int, int],
    coverage: tuple[float, float],
) -> Recording:
    """One recording of (S, B) images, or videos, out of those of parts of the rows."""
    first = parts[0][0]
    scores: dict[str, tuple[Tensor, ...]] = {}
    for space in first.scores:
        evaluations: list[Tensor] = []
        for at_level in zip(*parts, strict=True):
            rows = torch.cat([recording.scores[space][0] for recording in at_level], 1)
            evaluations.extend(rows.unflatten(1, (shape[0], -1)).unbind(1))
        if average == "before softmax":
            evaluations = [torch.stack(evaluations).nanmean(0)]
        scores[space] = tuple(evaluations)
    sigmas = [level for level in levels for _ in range(shape[0])]
    steps = [step for step in range(len(levels)) for _ in range(shape[0])]
    if average == "before softmax":
        sigmas, steps = [sum(levels) / len(levels)], [0]
    return Recording(
        concepts=first.concepts,
        layers=first.layers,
        default_layers=first.default_layers,
        sigmas=tuple(sigmas),
        steps=tuple(steps),
        scores=scores,
        image_size=image_size,
        coverage=coverage,
        durations=first.durations,
        broken=_broken(parts, shape),
    )


def _broken(parts: list[list[Recording]], shape: tuple[int, int]) -> dict[int, tuple[int, int]]:
    """The images that are broken at every level and in every noise sample. The maps of one that is broken in
    some are of the others, and the user is told."""
    samples, images = shape
    found: dict[int, list[tuple[int, int]]] = {}
    for level, at_level in enumerate(zip(*parts, strict=True)):
        start = 0
        for recording in at_level:
            for row, (_, layer) in recording.broken.items():
                found.setdefault((start + row) % images, []).append((level, layer))
            start += recording.batch
    broken = {}
    for image, places in sorted(found.items()):
        if len(places) == samples * len(parts[0]):
            broken[image] = places[0]
        else:
            logging.warning(
                "Concept Attention: the model computed NaN or infinite values in %d of %d looks at image %d; "
                "its maps are of the others.",
                len(places),
                samples * len(parts[0]),
                image + 1,
            )
    return broken
