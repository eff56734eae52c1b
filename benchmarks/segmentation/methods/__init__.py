"""Methods that find concepts in images. A method is one file here, with one function::

    def load(models: Models, **choices) -> Method

A ``Method`` is called with a ``Query`` and returns a map for each of its concepts, (K, h, w) float32 of any
size and scale; higher where the concept is. Its ``settings`` are all that its maps depend on besides the
models. The file's name, with dashes, is the method's name. A file for another ``kind`` of models than the
diffusion models of ``models`` has ``KIND``.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor

from ....core.concepts import Concepts

if TYPE_CHECKING:
    from ..models import Models
    from ..vision import Clip, Transformer


@dataclass(frozen=True)
class Query:
    """What a method is asked: where each concept is in the picture.

    Attributes:
        picture: (H, W, 3) uint8.
        concepts: its names first, then the background concepts.
        prompt: a caption, such as "a dog".
        seed: of any noise; it depends on the image alone.
    """

    picture: np.ndarray
    concepts: Concepts
    prompt: str
    seed: int


class Method(Protocol):
    @property
    def settings(self) -> dict:
        """JSON."""

    def __call__(self, query: Query) -> Tensor:
        """Maps (K, h, w)."""


def available() -> tuple[str, ...]:
    return tuple(sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(__path__)))


def loader(name: str) -> Callable[..., Method]:
    """The ``load`` of a method.

    Raises:
        ValueError: there is no such method.
    """
    return _file(name).load


def kind_of(name: str) -> str:
    """Which models the method is for, by their ``kind``.

    Raises:
        ValueError: there is no such method.
    """
    return getattr(_file(name), "KIND", "diffusion")


def _file(name: str) -> ModuleType:
    if name not in available():
        raise ValueError(f'There is no method "{name}". The methods are: {", ".join(available())}.')
    return import_module(f"{__name__}.{name.replace('-', '_')}")


def load(name: str, models: Models | Clip | Transformer, choices: Mapping) -> Method:
    """A method by its name.

    Raises:
        ValueError: there is no such method, or it does not leave one of the choices open or the model is not
            for it.
    """
    if kind_of(name) != models.kind:
        fitting = [method for method in available() if kind_of(method) == models.kind]
        raise ValueError(
            f"{name} is for {kind_of(name)} models, and these are {models.kind} models. For those there are: "
            f"{', '.join(fitting)}."
        )
    parameters = inspect.signature(loader(name)).parameters
    open_to_choice = [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY]
    closed = [choice for choice in choices if choice not in open_to_choice]
    if closed and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise ValueError(
            f"{name} leaves no choice of {', '.join(closed)}, only of: {', '.join(open_to_choice)}."
        )
    return loader(name)(models, **choices)


def check(level: float, samples: int) -> None:
    """
    Raises:
        ValueError: there is no such noise level or number of samples.
    """
    if not 0 < level <= 1:
        raise ValueError(f"The noise level must be above 0 and at most 1, not {level}.")
    if samples < 1:
        raise ValueError(f"There must be at least one sample of noise, not {samples}.")
