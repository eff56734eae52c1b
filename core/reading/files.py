"""Concept maps in files: safetensors, with everything but the tensors as JSON in the metadata.

A file holds the maps as they are (``maps``) and the recording that they were made from
(``scores.<space>``, (E, L, B, K, h, w)), so that other maps can be made from it without sampling again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..concepts import Concepts
from ..observing.recording import Recording
from .maps import GROUNDINGS, ConceptMaps

SUFFIX = ".concepts.safetensors"
_KEY = "concept_maps"
_VERSION = 1
_SCORES = "scores."


def save_maps(maps: ConceptMaps, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write maps and their recording to ``path``. ``metadata`` goes into the file beside their own."""
    recording = maps.recording
    tensors = {"maps": maps.values.contiguous()}
    for space, scores in recording.scores.items():
        tensors[_SCORES + space] = torch.stack(scores)
    description = {
        "version": _VERSION,
        "concepts": recording.concepts.names,
        "background": recording.concepts.background,
        "image_size": recording.image_size,
        "coverage": recording.coverage,
        "recorded": {
            "spaces": list(recording.scores),
            "layers": recording.layers,
            "default_layers": recording.default_layers,
            "left_out": recording.left_out,
            "steps": recording.steps,
            "sigmas": recording.sigmas,
        },
        "maps": {
            "space": maps.space,
            "layers": maps.layers,
            "steps": maps.steps,
            "softmax": maps.softmax,
            "temperature": maps.temperature,
            "grounding": maps.grounding,
        },
    }
    save_file(tensors, path, metadata={**(metadata or {}), _KEY: json.dumps(description)})


def load_maps(path: Path) -> ConceptMaps:
    """The maps that ``save_maps`` wrote, equal to the last bit.

    Raises:
        ValueError: the file is broken, or is something else.
    """
    try:
        with safe_open(path, "pt") as file:
            return _read(file, json.loads((file.metadata() or {})[_KEY]))
    except SafetensorError as error:
        raise ValueError(f'"{path.name}" is no safetensors file, or is damaged: {error}.') from error
    except (KeyError, TypeError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f'"{path.name}" holds no concept maps that can be read: {reason}. '
            "Choose a file that Save Concept Maps wrote."
        ) from error


def _read(file: safe_open, description: dict) -> ConceptMaps:
    if description["version"] != _VERSION:
        raise ValueError(f"its format has version {description['version']}, this is version {_VERSION}")
    recorded, chosen = description["recorded"], description["maps"]
    concepts = Concepts(tuple(description["concepts"]), tuple(description["background"]))
    tensors = {name: file.get_tensor(name) for name in ("maps", *(_SCORES + s for s in recorded["spaces"]))}

    batch, _, *grid = tensors["maps"].shape
    maps_shape = (batch, len(concepts.all), *grid)
    scores_shape = (len(recorded["sigmas"]), len(recorded["layers"]), *maps_shape)
    for name, tensor in tensors.items():
        expected = maps_shape if name == "maps" else scores_shape
        if tensor.shape != expected:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, not {expected}")
    if len(recorded["steps"]) != len(recorded["sigmas"]):
        raise ValueError(f"it has {len(recorded['steps'])} steps for {len(recorded['sigmas'])} sigmas")

    recording = Recording(
        concepts=concepts,
        layers=tuple(recorded["layers"]),
        default_layers=tuple(recorded["default_layers"]),
        sigmas=tuple(recorded["sigmas"]),
        steps=tuple(recorded["steps"]),
        scores={space: tensors[_SCORES + space].unbind(0) for space in recorded["spaces"]},
        image_size=tuple(description["image_size"]),
        coverage=tuple(description["coverage"]),
        left_out=tuple(recorded.get("left_out", ())),
    )
    return ConceptMaps(
        values=tensors["maps"],
        recording=recording,
        space=chosen["space"],
        layers=tuple(chosen["layers"]),
        steps=tuple(chosen["steps"]),
        softmax=chosen["softmax"],
        temperature=chosen["temperature"],
        grounding=chosen.get("grounding", GROUNDINGS[0]),
    )
