"""Calls of a language model that paints: its text stands before the picture and never reads it.

A concept could not read the picture either, so it has no output. But the picture reads the text, and what a
text is in each layer does not depend on the picture: a concept's keys are those that the model's layers make
of its own prompt alone, once for a run. Shapes as in ``words``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn

from ...architectures.family import PrefixFamily
from ...geometry import Grid
from .blocks import Attention
from .reading import Complete, Guard, Look, ModelCall, RunningOrder
from .words import Words


class PrefixReading:
    """A ``Reading`` of the attention in which the picture reads all there is."""

    SPACES = ("probability",)

    def __init__(
        self,
        family: PrefixFamily,
        model: nn.Module,
        call: ModelCall,
        look: Look,
        rows: Sequence[slice],
        grid: Grid,
        guard: Guard,
        stop: bool,
    ) -> None:
        self._look, self._rows, self._guard, self._stop = look, rows, guard, stop
        self._options, self._layers = call.options, family.layers(model)
        known = {} if look.known is None else look.known
        self._words = Words(look.tokens, known)
        text = family.given(model, call.arguments)
        self._begins = [self._words.begin(text[part], partial(family.embed, model)) for part in rows]
        start = family.start(call.arguments)
        self._picture = slice(start, start + grid.size)
        name = ("keys", call.x.device, call.x.dtype)
        if name not in known:
            known[name] = self._keys(family, model, call.x)
        self._own: list[Tensor] = known[name]
        self._scores: list[list[Tensor]] = []
        self._order = RunningOrder(max(look.layers))
        self._layer: int | None = None

    def _keys(self, family: PrefixFamily, model: nn.Module, x: Tensor) -> list[Tensor]:
        """Of each layer the concepts' keys (1, H, K, d)."""
        tokens = self._look.tokens
        texts = [family.keys(model, sequence.to(x.device), x.dtype) for sequence in tokens.sequences]
        layers = []
        for keys in zip(*texts, strict=True):
            heads = keys[0].shape[1]
            rows = [rearrange(k, "1 h t d -> t (h d)") for k in keys]
            layers.append(rearrange(tokens.pooled(rows), "k (h d) -> 1 h k d", h=heads))
        return layers

    @property
    def gap(self) -> str | None:
        return self._order.gap

    @contextlib.contextmanager
    def watching(self) -> Iterator[dict]:
        hooks = [
            module.register_forward_pre_hook(self._entering(layer))
            for layer, module in enumerate(self._layers[: max(self._look.layers) + 1])
        ]
        before = self._options.get("optimized_attention_override")

        @torch.compiler.disable
        def attention(function: Callable, *args, **kwargs):
            out = function(*args, **kwargs) if before is None else before(function, *args, **kwargs)
            if self._layer is not None and not self._guard.broken:
                layer, self._layer = self._layer, None
                with self._guard:
                    self._attended(layer, Attention.of(*args, **kwargs))
                if self._stop and self._order.complete:
                    raise Complete
            return out

        try:
            yield {**self._options, "optimized_attention_override": attention}
        finally:
            for hook in hooks:
                hook.remove()

    def _entering(self, layer: int) -> Callable:
        @torch.compiler.disable
        def entering(module: nn.Module, args: tuple) -> None:
            self._layer = layer if self._order.enters(layer) else None

        return entering

    def _attended(self, layer: int, seen: Attention) -> None:
        if self._picture.stop > seen.q.shape[2]:
            raise RuntimeError(
                f"the attention of layer {layer} has {seen.q.shape[2]} queries, which a picture that ends at "
                f"{self._picture.stop} does not fit into"
            )
        if layer in self._look.layers:
            own = self._own[layer].repeat_interleave(seen.heads // self._own[layer].shape[1], 1)
            self._scores.append(
                [
                    self._words.joint_probabilities(
                        (q := seen.q[part, :, self._picture]),
                        seen.k[part],
                        own.expand(len(q), -1, -1, -1),
                        begin,
                        None,
                        seen.scale,
                    )
                    for part, begin in zip(self._rows, self._begins, strict=True)
                ]
            )
        self._order.left()

    def scores(self) -> list[dict[str, Tensor]]:
        if self.gap:
            return []
        return [{"probability": torch.stack(parts)} for parts in zip(*self._scores, strict=True)]
