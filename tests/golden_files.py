"""Golden data: files that the reference implementation made; see golden/README.md."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from safetensors import safe_open
from torch import Tensor

from concept_attention.core.concepts import Concepts

FOLDER = Path(__file__).parent / "golden"
PREFIXES = ("F2", "SD3", "CV")
"""What follows "case" in the names of files that are not Flux.1's."""


@dataclass(frozen=True)
class Golden:
    """What one file holds."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @classmethod
    def load(cls, path: Path) -> Golden:
        return cls(*_contents(path))

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def number(self, name: str):
        return json.loads(self.metadata[name])

    @property
    def config(self) -> dict:
        return self.number("config")

    @property
    def concepts(self) -> Concepts:
        return Concepts(tuple(f"concept {i}" for i in range(self["inputs.concepts"].shape[1])))

    def model(self) -> ModelPatcher:
        weights = {
            k.removeprefix("weights."): v.float() for k, v in self.tensors.items() if k.startswith("weights.")
        }
        return comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": torch.float32})


@cache
def _contents(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118


def golden_files(prefix: str | None = None) -> list[Path]:
    """The repository's files, and those of the folder ``GOLDEN_DIR``, that are named "case" and one of
    ``PREFIXES``, or neither of them: Flux.1's."""
    found = {path.name: path for path in FOLDER.glob("case*.safetensors")}
    if folder := os.environ.get("GOLDEN_DIR"):
        found = {path.name: path for path in Path(folder).glob("case*.safetensors")} | found
    names = tuple(f"case{p}" for p in ([prefix] if prefix else PREFIXES))
    return [path for name, path in sorted(found.items()) if name.startswith(names) == bool(prefix)]


def relative(ours: Tensor, expected: Tensor) -> float:
    assert ours.shape == expected.shape
    return float((ours.double() - expected.double()).norm() / expected.double().norm())


def off(ours: Tensor, expected: Tensor) -> float:
    """By how much of the largest value ours differ at most."""
    assert ours.numel() == expected.numel(), (ours.shape, expected.shape)
    difference = ours.detach().double().flatten() - expected.double().flatten()
    return float(difference.abs().max() / expected.double().abs().max())
