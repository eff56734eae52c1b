"""What differs between model families, a page each: which models are its, which blocks they have, where the
text lies in a block's call, and how the block is called with another text.

A page is a module with ``FAMILIES``, instances of ``family.Family``. Every module in this folder that has it
is a page.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from torch import nn

from .family import Family, JointFamily
from .unreadable import UNREADABLE, WITHOUT_TEXT

__all__ = ["Family", "JointFamily", "check_text", "families", "family_of"]


@cache
def families() -> tuple[Family, ...]:
    """All families, by name."""
    pages = (importlib.import_module(f".{page.name}", __name__) for page in pkgutil.iter_modules(__path__))
    found = (family for page in pages for family in getattr(page, "FAMILIES", ()))
    return tuple(sorted(found, key=lambda family: family.name))


def family_of(model: nn.Module) -> Family:
    """The family of a diffusion model (``ModelPatcher.model.diffusion_model``).

    Raises:
        ValueError: no family has it.
    """
    kind = type(model)
    path = f"{kind.__module__}.{kind.__qualname__}"
    if (known := path.removeprefix("comfy.ldm.")) in UNREADABLE:  # though it may be made from a readable one
        name, reason = UNREADABLE[known]
        raise ValueError(f"Concept Attention cannot read {name}: {reason}. {_supported()}")
    if found := [family for family in families() if family.matches(model)]:
        return min(found, key=lambda family: family.distance(model))
    raise ValueError(f"Concept Attention does not support this model ({path}). {_supported()}")


def _supported() -> str:
    return f"Supported: {', '.join(family.name for family in families())}."


def check_text(model: nn.Module) -> None:
    """
    Raises:
        ValueError: the model (``ModelPatcher.model``) reads a picture in place of a text.
    """
    if (kind := type(model).__name__) in WITHOUT_TEXT:
        raise ValueError(
            f"Concept Attention cannot read {WITHOUT_TEXT[kind]}: it is told by a picture what to show, and "
            "knows no words."
        )
