"""Calls of any model with joint attention, read by calling its own blocks once more.

The model does its own text side. Its forward pass, once more on one token of picture and left at the first
block, embeds the concepts, unless it has a function that does; each block, once more with the concepts as
its text, takes them on. Inside that second call attention is ours: concepts attend to each other and to the
keys that the picture had in the block's own call, which is seen through ``optimized_attention_override``
(ConceptAttention, arXiv 2502.04320, section 4). Shapes: B rows of the call, K concepts, N tokens of picture,
H heads of d features, D = H * d.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ...architectures.family import BlockCall, JointFamily
from ...geometry import Grid
from .embedding import OTHERS, embedded
from .reading import Complete, Guard, Look, ModelCall, RunningOrder, named, uncompiled
from .stream import dot_products, normalized_over_concepts
from .words import Words, masked

try:
    from comfy import model_prefetch
except ImportError:  # ComfyUI before it had one
    model_prefetch = None


class _Block(NamedTuple):
    layer: int
    module: nn.Module
    call: BlockCall


class BlockReading:
    """A ``Reading`` in which all rows of a call carry the concepts; no argument of a block has to be cut."""

    SPACES = ("output", "query-key", "value", "output, normalized concepts", "probability")

    def __init__(
        self,
        family: JointFamily,
        model: nn.Module,
        call: ModelCall,
        look: Look,
        rows: Sequence[slice],
        grid: Grid,
        guard: Guard,
        stop: bool,
    ) -> None:
        self._family, self._look, self._rows, self._guard, self._stop = family, look, rows, guard, stop
        self._options, self._picture = call.options, grid.size
        self._model, self._blocks = model, family.layers(model)
        context = call.arguments.get("context", call.arguments.get("c_crossattn"))
        self._text = context.shape[1]
        self._words = Words(look.tokens, look.known)
        self._begins = (
            [self._words.begin(context[part], partial(family.embed, model)) for part in rows]
            if "probability" in look.spaces
            else []
        )
        self._hidden, self._positions = self._embed(model, call)
        self._scores: dict[str, list[Tensor]] = {space: [] for space in look.spaces}
        self._block: _Block | None = None
        self._order = RunningOrder(max(look.layers))

    @property
    def gap(self) -> str | None:
        return self._order.gap

    @contextlib.contextmanager
    def watching(self) -> Iterator[dict]:
        hooks = [
            module.register_forward_pre_hook(self._entering(layer), with_kwargs=True)
            for layer, module in enumerate(self._blocks[: max(self._look.layers) + 1])
        ]
        before = self._options.get("optimized_attention_override")

        @torch.compiler.disable
        def attention(function: Callable, *args, **kwargs):
            out = function(*args, **kwargs) if before is None else before(function, *args, **kwargs)
            if self._block is not None and not self._guard.broken:
                # Of a block's attentions the first is the joint one.
                block, self._block = self._block, None
                with self._guard, _outside_allocation_graphs():
                    self._attended(block, Attention.of(*args, **kwargs), out)
                if self._stop and self._order.complete:
                    raise Complete
            return out

        try:
            yield {**self._options, **self._loading(), "optimized_attention_override": attention}
        finally:
            for hook in hooks:
                hook.remove()

    def _loading(self) -> dict:
        """Weights that are loaded ahead are patched in place, at each use: blocks that run twice would have
        them patched twice (LoRAs), and so load theirs when they need them."""
        if self._options.get("prefetch_dynamic_vbars") and any(map(_patched_in_use, self._blocks)):
            return {"prefetch_dynamic_vbars": False}
        return {}

    def scores(self) -> list[dict[str, Tensor]]:
        if self.gap:
            return []
        stacked = {space: torch.stack(layers) for space, layers in self._scores.items()}
        return [{space: scores[:, part] for space, scores in stacked.items()} for part in self._rows]

    def _entering(self, layer: int) -> Callable:
        @torch.compiler.disable
        def entering(module: nn.Module, args: tuple, kwargs: dict) -> None:
            with self._guard:
                block = uncompiled(module)
                call = BlockCall(named(block.forward, args, kwargs), self._model, self._text, self._picture)
                self._block = _Block(layer, block, call)

        return entering

    def _attended(self, block: _Block, seen: Attention, out: Tensor) -> None:
        """Concepts go through the block, and are scored against the picture's rows ``out``."""
        if not self._order.enters(block.layer):
            return
        text = self._family.text(block.call)
        picture = self._family.picture(block.call, seen.length)
        if picture.stop > seen.length:
            raise RuntimeError(
                f"the attention of block {block.layer} has {seen.length} tokens, which a text of "
                f"{text.shape[1]} and a picture of {self._picture} do not fit into"
            )
        hidden = self._hidden.expand(len(text), -1, -1)
        concepts = _Concepts(self._family, self._look, seen, self._family.keys(block.call, seen.length))
        options = {k: v for k, v in self._options.items() if k not in OTHERS}
        options["optimized_attention_override"] = concepts.attention(hidden.shape[1])
        self._hidden = self._family.step(block.module, block.call, hidden.clone(), self._positions, options)
        if block.layer in self._look.layers:
            self._record(
                concepts, seen, picture, out if out.ndim == 3 else rearrange(out, "b h l d -> b l (h d)")
            )
            if "probability" in self._scores:
                self._scores["probability"].append(self._probabilities(block, concepts, seen, picture))
        self._order.left()

    def _record(self, concepts: _Concepts, seen: Attention, picture: slice, out: Tensor) -> None:
        for space, scores in self._scores.items():
            if space == "output":
                scores.append(dot_products(concepts.out, out[:, picture]))
            elif space == "output, normalized concepts":
                scores.append(dot_products(normalized_over_concepts(concepts.out), out[:, picture]))
            elif space == "value":
                values = rearrange(seen.v[:, :, picture], "b h n d -> b n (h d)")
                scores.append(dot_products(rearrange(concepts.v, "b h k d -> b k (h d)"), values))
            elif space == "query-key":
                keys = rearrange(seen.k[:, :, picture], "b h n d -> b n (h d)")
                queries = rearrange(concepts.q, "b h k d -> b k (h d)")
                scores.append(dot_products(queries, keys) * (seen.scale / seen.heads))

    def _probabilities(self, block: _Block, concepts: _Concepts, seen: Attention, picture: slice) -> Tensor:
        """(B, K, N) float32; only of the rows that are asked for."""
        text = self._family.text_start(block.call, seen.length)
        text += self._family.given(block.call, self._text).start
        found = concepts.k.new_zeros(len(seen.q), concepts.k.shape[2], self._picture, dtype=torch.float32)
        for part, begin in zip(self._rows, self._begins, strict=True):
            found[part] = self._words.joint_probabilities(
                seen.q[part, :, picture],
                seen.k[part],
                concepts.k[part],
                text + begin,
                masked(seen.mask, part, picture),
                seen.scale,
            )
        return found

    def _embed(self, model: nn.Module, call: ModelCall) -> tuple[Tensor, list[int]]:
        """The concepts (1, K, D) as the model's first block would be given them, and their positions."""
        tokens = self._look.tokens
        first, known = self._blocks[0], self._look.known
        rows = embedded(self._family, model, call, tokens.sequences, first, self._text_of, known)
        positions = [
            min(self._family.position(length, span), self._text - 1)
            for length, span in zip(tokens.lengths, tokens.spans, strict=True)
        ]
        return tokens.pooled(rows)[None], positions

    def _text_of(self, arguments: dict, model: nn.Module, tokens: int) -> Tensor:
        return self._family.embedded(BlockCall(arguments, model, tokens, 1), tokens)


def _outside_allocation_graphs() -> contextlib.AbstractContextManager:
    """ComfyUI, from 0.34 on, may replay a block's allocations, and then takes back what was made in it."""
    pause = getattr(model_prefetch, "pause_malloc_graph", contextlib.nullcontext)
    return pause()


def _patched_in_use(block: nn.Module) -> bool:
    patches = ("weight_lowvram_function", "bias_lowvram_function", "weight_function", "bias_function")
    return any(getattr(module, name, None) for module in block.modules() for name in patches)


class Attention(NamedTuple):
    """One call of an attention function: q, k and v (B, H, L, d), whatever shape they came in."""

    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    scale: float
    heads_apart: bool
    mask: Tensor | None

    @property
    def length(self) -> int:
        return self.k.shape[2]

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, *args, **kwargs
    ) -> Attention:
        def heads_first(x: Tensor) -> Tensor:
            if not kwargs.get("skip_reshape", False):
                x = x if x.ndim == 4 else x.unflatten(-1, (-1, width))
                x = rearrange(x, "b l h d -> b h l d")
            # Queries may share keys and values among them.
            return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)

        width = q.shape[-1] if q.ndim == 4 else q.shape[-1] // heads
        q, k, v = (heads_first(x) for x in (q, k, v))
        scale = kwargs.get("scale") or q.shape[-1] ** -0.5
        return cls(q, k, v, heads, scale, kwargs.get("skip_output_reshape", False), mask)


class _Concepts:
    """The concepts' own attention in one block: over each other and the picture's keys and values."""

    def __init__(self, family: JointFamily, look: Look, seen: Attention, keys: slice) -> None:
        self._family, self._look, self._seen, self._keys = family, look, seen, keys
        self.q = self.k = self.v = self.out = None

    def attention(self, count: int) -> Callable:
        """In place of an attention function in a block that has ``count`` concepts as its text."""

        def attention(function: Callable, *args, **kwargs) -> Tensor:
            given = Attention.of(*args, **kwargs)
            out = torch.zeros_like(given.q)
            if self.out is None:  # a second attention is one of the picture alone
                rows = slice(0, count) if self._family.text_first else slice(given.length - count, None)
                attended = self._attend(given, rows)
                out[:, :, rows] = attended
                self.out = rearrange(attended, "b h k d -> b k (h d)")
            return out if given.heads_apart else rearrange(out, "b h l d -> b l (h d)")

        return attention

    def _attend(self, given: Attention, rows: slice) -> Tensor:
        self.q, self.k, self.v = (x[:, :, rows] for x in (given.q, given.k, given.v))
        keys, values = [], []
        if self._look.attend_concepts:
            keys.append(self.k)
            values.append(self.v)
        if self._look.attend_image:
            keys.append(self._seen.k[:, :, self._keys])
            values.append(self._seen.v[:, :, self._keys])
        if not keys:
            return self.v
        return F.scaled_dot_product_attention(
            self.q, torch.cat(keys, 2), torch.cat(values, 2), scale=given.scale
        )
