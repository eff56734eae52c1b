"""What differs between model families, one module each.

A family answers: does this model belong to me (``matches``), how many blocks have a text stream
(``depth``), which of them give good maps (``default_layers``), how do concepts enter
(``text_encoder``, ``token_width``, ``TextStream``), which grid do the image's tokens form
(``grid``, ``rotate``), and what stands for the output of a call that ended early (``no_output``).
"""

from __future__ import annotations

from types import ModuleType

from torch import nn

from . import flux1

FAMILIES = (flux1,)


def family_of(model: nn.Module) -> ModuleType:
    """The family of a diffusion model (``ModelPatcher.model.diffusion_model``).

    Raises:
        ValueError: no family has it.
    """
    for family in FAMILIES:
        if family.matches(model):
            return family
    supported = ", ".join(family.name for family in FAMILIES)
    kind = type(model)
    raise ValueError(
        f"Concept Attention does not support this model ({kind.__module__}.{kind.__name__}). "
        f"Supported: {supported}. Load such a model with Load Diffusion Model or Load Checkpoint."
    )
