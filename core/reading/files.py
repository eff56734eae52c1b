"""Concept maps in files: safetensors, with everything but the tensors as JSON in the metadata.

A file holds the maps as they are (``maps``) and the recording that they were made from
(``scores.<space>``, (E, L, B, K, h, w)), so that other maps can be made from it without sampling again. Of
videos each B is a latent frame, and the file says how many frames of the video each stands for
(``durations``); it has version 2 then, and no reader of version 1 takes it for pictures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..concepts import LIMIT, Concepts, split_names
from ..explaining.clip import METHODS
from ..observing.readers import SPACES
from ..observing.recording import AVERAGES, Recording
from .maps import BETWEEN_FRAMES, GROUNDINGS, ConceptMaps

SUFFIX = ".concepts.safetensors"
# Masks and pictures are as large as the image, however small the file is that names its size.
LARGEST_SIDE = 8192  # of a square image, in pixels
LARGEST_PATCH = 64  # pixels along a side
LONGEST = 10_000  # frames of a video
_KEY = "concept_maps"
_VERSIONS = (1, 2)
_SCORES = "scores."
_HIGHEST = 10**6  # number of a layer or step, and noise level
_ROUNDING = 1e-3


def save_maps(maps: ConceptMaps, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write maps and their recording to ``path``. ``metadata`` goes into the file beside their own."""
    recording = maps.recording
    still = recording.durations == (1,)
    tensors = {"maps": maps.values.contiguous()}
    for space, scores in recording.scores.items():
        tensors[_SCORES + space] = torch.stack(scores)
    description = {
        "version": 1 if still else 2,
        "concepts": recording.concepts.names,
        "background": recording.concepts.background,
        "image_size": recording.image_size,
        "coverage": recording.coverage,
        "recorded": {
            "spaces": list(recording.scores),
            "layers": recording.layers,
            "default_layers": recording.default_layers,
            "left_out": recording.left_out,
            "broken": [[image, *place] for image, place in recording.broken.items()],
            "steps": recording.steps,
            "sigmas": recording.sigmas,
            **({"counts": recording.counts} if recording.counts else {}),
            **({} if still else {"durations": recording.durations}),
        },
        "maps": {
            "space": maps.space,
            "layers": maps.layers,
            "steps": maps.steps,
            "softmax": maps.softmax,
            "temperature": maps.temperature,
            "grounding": maps.grounding,
            "average": maps.average,
            **({} if still else {"between_frames": maps.between_frames}),
        },
    }
    save_file(tensors, path, metadata={**(metadata or {}), _KEY: json.dumps(description)})


def load_maps(path: Path) -> ConceptMaps:
    """The maps that ``save_maps`` wrote, equal to the last bit. Files come from strangers too, so everything
    in one is checked.

    Raises:
        ValueError: the file is broken, is something else, or asks for more than there can be.
    """
    try:
        with safe_open(path, "pt") as file:
            return _read(file, json.loads((file.metadata() or {})[_KEY]))
    except SafetensorError as error:
        raise ValueError(f'"{path.name}" is no safetensors file, or is damaged: {error}.') from error
    except (KeyError, ValueError, RecursionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f'"{path.name}" holds no concept maps that can be read: {reason}. '
            "Choose a file that Save Concept Maps wrote."
        ) from error


def _read(file: safe_open, description: Any) -> ConceptMaps:
    _expect(description, isinstance(description, dict), "its description", "a table")
    if description["version"] not in _VERSIONS:
        version = shortened(description["version"])
        raise ValueError(f"its format has version {version}, this reads {_VERSIONS[0]} to {_VERSIONS[-1]}")
    recorded, chosen = description["recorded"], description["maps"]
    for name, section in (("recorded", recorded), ("maps", chosen)):
        _expect(section, isinstance(section, dict), name, "a table")

    names = _texts(description["concepts"], "concepts")
    concepts = Concepts(names, _texts(description["background"], "background"))
    different = split_names("\n".join(concepts.all)) == concepts.all
    _expect(concepts.all, names and different, "concepts", "names that differ, without commas")
    _expect(len(concepts.all), len(concepts.all) <= LIMIT, "the number of concepts", f"{LIMIT} at most")
    spaces = _texts(recorded["spaces"], "spaces")
    known = (*SPACES, *METHODS)
    _expect(spaces, spaces and set(spaces) <= set(known), "spaces", f"out of {'; '.join(known)}")
    layers = _numbers(recorded["layers"], "layers", int)
    _expect(layers, layers == tuple(sorted(set(layers))), "layers", "in order, each once")
    sigmas = _numbers(recorded["sigmas"], "sigmas", (int, float))
    steps = _numbers(recorded["steps"], "steps", int)
    if len(steps) != len(sigmas):
        raise ValueError(f"it has {len(steps)} steps for {len(sigmas)} sigmas")

    counts = _numbers(recorded.get("counts", []), "counts", int)
    _expect(
        counts, not counts or (all(counts) and len(counts) == len(sigmas)), "counts", "one for each sigma"
    )

    tensors = {}
    for name in ("maps", *(_SCORES + space for space in spaces)):
        if name not in file.keys():  # noqa: SIM118  it is no dictionary
            raise ValueError(f"it has no tensor {name}")
        tensors[name] = file.get_slice(name)
    batch, _, *grid = maps_shape = tensors["maps"].get_shape()
    _expect(maps_shape, len(maps_shape) == 4 and min(maps_shape) > 0, "the shape of maps", "(B, K, h, w)")
    maps_shape = [batch, len(concepts.all), *grid]
    scores_shape = [len(sigmas), len(layers), *maps_shape]
    for name, tensor in tensors.items():
        expected = maps_shape if name == "maps" else scores_shape
        if tensor.get_shape() != expected or not all(expected):
            raise ValueError(f"{name} has the shape {tuple(tensor.get_shape())}, not {tuple(expected)}")
        _expect(tensor.get_dtype(), tensor.get_dtype() == "F32", f"the type of {name}", "F32")
    durations = _numbers(recorded.get("durations", [1]), "durations", int)
    fits = durations and all(durations) and batch % len(durations) == 0 and sum(durations) <= LONGEST
    _expect(durations, fits, "durations", f"a part of {batch} maps, and of {LONGEST} frames at most")
    squeezed = set(spaces) <= set(METHODS)
    coverage, image_size = _geometry(description["coverage"], description["image_size"], grid, squeezed)

    recording = Recording(
        concepts=concepts,
        layers=layers,
        default_layers=_choice(recorded["default_layers"], "default_layers", layers),
        sigmas=sigmas,
        steps=steps,
        scores={space: _scores(file.get_tensor(_SCORES + space), space) for space in spaces},
        image_size=image_size,
        coverage=coverage,
        left_out=_numbers(recorded.get("left_out", []), "left_out", int),
        durations=durations,
        counts=counts,
        broken=_broken(recorded.get("broken", []), batch // len(durations)),
    )
    space, softmax, temperature = chosen["space"], chosen["softmax"], chosen["temperature"]
    grounding = chosen.get("grounding", GROUNDINGS[0])
    average = chosen.get("average", AVERAGES[0])
    between_frames = chosen.get("between_frames", BETWEEN_FRAMES[0])
    _expect(space, space in spaces, "space", f"out of {'; '.join(spaces)}")
    _expect(softmax, isinstance(softmax, bool), "softmax", "true or false")
    _numbers([temperature], "temperature", (int, float))
    _expect(temperature, temperature > 0, "temperature", "above 0")
    _expect(grounding, grounding in GROUNDINGS, "grounding", f"out of {'; '.join(GROUNDINGS)}")
    _expect(average, average in AVERAGES, "average", f"out of {'; '.join(AVERAGES)}")
    known = between_frames in BETWEEN_FRAMES
    _expect(between_frames, known, "between_frames", f"out of {'; '.join(BETWEEN_FRAMES)}")
    values = file.get_tensor("maps")
    low, high = (float(value) for value in values.aminmax())
    _expect((low, high), low >= -_ROUNDING and high <= 1 + _ROUNDING, "the range of maps", "in 0..1")
    return ConceptMaps(
        values=values,
        recording=recording,
        space=space,
        layers=_choice(chosen["layers"], "layers of maps", layers),
        steps=_choice(chosen["steps"], "steps of maps", steps),
        softmax=softmax,
        temperature=temperature,
        grounding=grounding,
        average=average,
        between_frames=between_frames,
    )


def _expect(value: object, fits: object, name: str, expected: str) -> None:
    if not fits:
        raise ValueError(f"{name}: {shortened(value)}, not {expected}")


def _texts(values: Any, name: str) -> tuple[str, ...]:
    fits = isinstance(values, list) and all(isinstance(value, str) for value in values)
    _expect(values, fits, name, "a list of texts")
    return tuple(values)


def _numbers(values: Any, name: str, kind: type | tuple[type, ...]) -> tuple:
    """``values``, which is to be a list of numbers of this kind that are finite and not negative."""
    fits = isinstance(values, list) and all(
        isinstance(value, kind) and not isinstance(value, bool) and 0 <= value <= _HIGHEST for value in values
    )
    _expect(values, fits, name, f"a list of {'whole ' * (kind is int)}numbers from 0 to {_HIGHEST}")
    return tuple(values)


def _choice(values: Any, name: str, recorded: tuple[int, ...]) -> tuple[int, ...]:
    chosen = _numbers(values, name, int)
    _expect(chosen, chosen and set(chosen) <= set(recorded), name, f"out of {shortened(recorded)}")
    return chosen


def _broken(values: Any, images: int) -> dict[int, tuple[int, int]]:
    """``Recording.broken`` of image, step and layer, image by image."""
    _expect(values, isinstance(values, list), "broken", "a list")
    rows = [_numbers(row, "broken", int) for row in values]
    broken = {row[0]: row[1:] for row in rows if len(row) == 3 and row[0] < images}
    _expect(values, len(broken) == len(rows), "broken", f"image, step and layer of some of {images} images")
    return broken


def _geometry(
    coverage: Any, size: Any, grid: list[int], squeezed: bool
) -> tuple[tuple[float, float], tuple[int, int]]:
    """The image's share of the grid's height and width, and its size: it ends in the last row and column, and
    patches are squares, if it was not ``squeezed`` for the model."""
    coverage = _numbers(coverage, "coverage", (int, float))
    size = _numbers(size, "image_size", int)
    for name, values in (("coverage", coverage), ("image_size", size)):
        _expect(values, len(values) == 2, name, "a height and a width")
    if size[0] * size[1] > LARGEST_SIDE**2:
        raise ValueError(
            f"its image of {size[0]} x {size[1]} pixels is larger than the largest that is read, "
            f"{LARGEST_SIDE} x {LARGEST_SIDE}"
        )
    ends = all(n - 1 < share * n <= n for share, n in zip(coverage, grid, strict=True))
    _expect(coverage, ends, "coverage", f"that of a grid of {grid[0]} x {grid[1]}")
    if squeezed:
        _expect(size, all(size), "image_size", "above 0")
        return coverage, size
    patch = [pixels / (share * n) for pixels, share, n in zip(size, coverage, grid, strict=True)]
    square = 1 <= patch[0] <= LARGEST_PATCH and abs(patch[0] - patch[1]) < _ROUNDING
    _expect(size, square, "image_size", f"that of a grid of {grid[0]} x {grid[1]}")
    return coverage, size


def _scores(scores: Tensor, space: str) -> tuple[Tensor, ...]:
    """One tensor for each evaluation; NaN where no prompt was at work, but never infinite."""
    evaluations = scores.unbind(0)
    if any(evaluation.isinf().any() for evaluation in evaluations):
        raise ValueError(f"{_SCORES}{space} has infinite values")
    return evaluations
