"""Texts as a model's first layer would be given them.

The model's own forward pass, once more on one token of picture and left at that layer, embeds them, unless
the model has a function that does. Each name is its own sequence, so that names do not read each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ...architectures import Family
from .reading import ModelCall, named, uncompiled

# What other nodes put into transformer_options has no part in the concepts' own calls. Nor do these load
# weights ahead, since a call that is left would leave the queue open.
OTHERS = (
    "patches",
    "patches_replace",
    "wrappers",
    "callbacks",
    "optimized_attention_override",
    "prefetch_dynamic_vbars",
)
# As many tokens of names are embedded at a time as a picture may well have: 16 names of 512 tokens.
_TOKENS = 8192


class _Embedded(BaseException):
    """Leaves the model's forward pass at its first layer."""


def embedded(
    family: Family,
    model: nn.Module,
    call: ModelCall,
    sequences: Sequence[Tensor],
    first: nn.Module,
    text: Callable[[dict, nn.Module, int], Tensor],
    known: dict | None = None,
) -> list[Tensor]:
    """What each of ``sequences`` (T_k, C) is, (T_k, D), where the model's layer ``first`` is called.

    Args:
        call: of the model, whose other arguments it takes.
        text: of the arguments of ``first`` by name, the model and the number of tokens, the text's rows.
        known: see ``Look``; in one run the sequences are the same.
    """
    given = call.arguments.get("context", call.arguments.get("c_crossattn"))
    if known is not None and not family.timed:
        key = ("embedded", given.device, given.dtype)
        if key not in known:
            known[key] = embedded(family, model, call, sequences, first, text)
        return known[key]
    found: list[Tensor] = [None] * len(sequences)
    for together in _calls(sequences, family.batched):
        context = torch.stack([sequences[i] for i in together]).to(given)
        rows = family.embed(model, context)
        if rows is None:
            rows = _at_the_first_layer(family, model, call, context, first, text)
        for i, row in zip(together, rows, strict=True):
            found[i] = row
    return found


def _calls(sequences: Sequence[Tensor], batched: bool) -> list[list[int]]:
    """Which texts are embedded together: those of one length, as far as memory goes, or each alone."""
    if not batched:
        return [[i] for i in range(len(sequences))]
    calls = []
    for length in sorted({len(s) for s in sequences}):
        texts = [i for i, s in enumerate(sequences) if len(s) == length]
        together = max(1, _TOKENS // length)
        calls += [texts[start : start + together] for start in range(0, len(texts), together)]
    return calls


def _at_the_first_layer(
    family: Family,
    model: nn.Module,
    call: ModelCall,
    context: Tensor,
    first: nn.Module,
    text: Callable[[dict, nn.Module, int], Tensor],
) -> Tensor:
    arguments = family.alone(model, call.arguments, context)
    arguments["transformer_options"] = {k: v for k, v in call.options.items() if k not in OTHERS}
    found: list[Tensor] = []

    def leave(module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = named(uncompiled(module).forward, args, kwargs)
        found.append(text(given, model, context.shape[1]).clone())
        raise _Embedded

    hook = first.register_forward_pre_hook(leave, with_kwargs=True)
    try:
        call.function(**arguments)
    except _Embedded:
        pass
    finally:
        hook.remove()
    return found[0]
