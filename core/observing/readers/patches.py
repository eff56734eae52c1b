"""Calls of Flux.1, read through the attention patches that its blocks have.

The hooks are put into a copy of ``transformer_options``: last of the ``attn1_patch`` list, so that they see
the final q, k, v, and first of ``attn1_output_patch``, so that they see the attention's output as it is,
before guidance nodes edit it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...architectures import Family, flux1
from ...geometry import Grid
from .reading import Complete, Guard, Look, ModelCall
from .stream import SPACES, ConceptStream
from .words import Words, masked


class PatchReading:
    """A ``Reading`` by a concept stream of its own for each part of the rows."""

    SPACES = (*SPACES, "probability")
    STREAM: ClassVar[type[ConceptStream]] = ConceptStream

    def __init__(
        self,
        family: Family,
        model: nn.Module,
        call: ModelCall,
        look: Look,
        rows: Sequence[slice],
        grid: Grid,
        guard: Guard,
        stop: bool,
    ) -> None:
        self._model, self._options, self._picture = model, call.options, grid.size
        self._guard, self._stop = guard, stop
        timestep, guidance = call.arguments["timestep"], call.arguments.get("guidance")
        concepts = look.tokens.pooled().to(call.x.device)
        self._look, self._words = look, Words(look.tokens, look.known)
        self._probabilities: list[list[Tensor]] = [[] for _ in rows]
        context = call.arguments["context"]
        self._text = context.shape[1]
        self._begins = (
            [self._words.begin(context[part], partial(family.embed, model)) for part in rows]
            if "probability" in look.spaces
            else []
        )
        self._streams = [
            (
                part,
                self.STREAM(
                    flux1.TextStream(
                        model, timestep[part], None if guidance is None else guidance[part], call.x.dtype
                    ),
                    concepts,
                    look.layers,
                    tuple(space for space in look.spaces if space in SPACES),
                    look.attend_image,
                    look.attend_concepts,
                ),
            )
            for part in rows
        ]

    @contextlib.contextmanager
    def watching(self) -> Iterator[dict]:
        patches = {name: list(patches) for name, patches in self._options.get("patches", {}).items()}
        patches.setdefault("attn1_patch", []).append(self._before_attention)
        patches.setdefault("attn1_output_patch", []).insert(0, self._after_attention)
        with self._given_to_blocks():
            yield {**self._options, "patches": patches}

    @contextlib.contextmanager
    def _given_to_blocks(self) -> Iterator[None]:
        """A forward pass that another node has put in the model's place may call the blocks without the
        patches: such blocks are given these hooks, and no other node's patches. Not where calls end early,
        since what that node caches would be left in disorder."""

        def give(layer: int, block: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
            options = kwargs.get("transformer_options") or {}
            if self._before_attention in options.get("patches", {}).get("attn1_patch", ()):
                return None
            own = {"attn1_patch": [self._before_attention], "attn1_output_patch": [self._after_attention]}
            place = {"block_type": "double", "block_index": layer, "patches": own}
            return args, {**kwargs, "transformer_options": {**options, **place}}

        with contextlib.ExitStack() as handles:
            if not self._stop and flux1.forward_replaced(self._model):
                for layer, block in enumerate(self._model.double_blocks):
                    hook = block.register_forward_pre_hook(partial(give, layer), with_kwargs=True)
                    handles.callback(hook.remove)
            yield

    def scores(self) -> list[dict[str, Tensor]]:
        if self.gap:
            return []
        scores = [
            {**stream.scores, "probability": probabilities}
            for (_, stream), probabilities in zip(self._streams, self._probabilities, strict=True)
        ]
        return [{space: torch.stack(part[space]) for space in self._look.spaces} for part in scores]

    @property
    def gap(self) -> str | None:
        return self._streams[0][1].gap

    # What dynamo makes of a hook for one call it would keep for all: compiled blocks call it uncompiled.
    @torch.compiler.disable
    def _before_attention(self, q, k, v, pe=None, attn_mask=None, extra_options=None):
        if extra_options.get("block_type") == "double" and not self._guard.broken:
            with self._guard:
                patches, layer = self._patches(extra_options), extra_options["block_index"]
                for part, stream in self._streams:
                    stream.attend(
                        layer,
                        *(t[part, :, patches] for t in (q, k, v)),
                        rotate=lambda keys, part=part: _rotated(keys, pe, patches, part),
                    )
                if self._begins and layer in self._look.layers:
                    self._weigh(q, k, pe, attn_mask, patches)
        return {}

    def _weigh(self, q: Tensor, k: Tensor, pe: Tensor | None, mask: Tensor | None, patches: slice) -> None:
        """What the prompt's tokens, which are the last before the picture, and the concepts get of the
        picture's attention."""
        for (part, stream), begin, found in zip(
            self._streams, self._begins, self._probabilities, strict=True
        ):
            found.append(
                self._words.joint_probabilities(
                    _rotated(q[part, :, patches], pe, patches, part),
                    _rotated(k[part], pe, slice(None), part),
                    stream.keys,
                    patches.start - self._text + begin,
                    masked(mask, part, patches),
                )
            )

    @torch.compiler.disable
    def _after_attention(self, out, extra_options):
        if extra_options.get("block_type") == "double" and not self._guard.broken:
            with self._guard:
                for part, stream in self._streams:
                    stream.score(extra_options["block_index"], out[part, self._patches(extra_options)])
            if self._stop and self._streams[0][1].complete:
                raise Complete
        return out

    def _patches(self, extra_options: dict) -> slice:
        """The image's own tokens: after the text, before the tokens of reference images."""
        start = extra_options["img_slice"][0]
        return slice(start, start + self._picture)


def _rotated(keys: Tensor, pe: Tensor | None, patches: slice, part: slice) -> Tensor:
    if pe is not None:
        pe = pe[part if len(pe) > 1 else slice(None), :, patches]
    return flux1.rotate(keys, pe)
