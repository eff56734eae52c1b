"""Calls of any model, read by what its picture's queries make of a concept's key.

Where the picture only reads the text (cross-attention), a concept has no queries and no output.
But the picture attends to words, and a concept is one more word, which only the observer sees: its key is
made by the model's own layers, and its probability is what a patch would give it of its attention beside the
words of the prompt. A concept that is a word of the prompt has its own probability: DAAM (Tang et al., What
the DAAM, arXiv 2210.04885). Shapes: B rows, H heads of d features, N tokens of picture, T of text,
K concepts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ...architectures.family import WordsFamily, picked
from ...concepts import ConceptTokens
from ...geometry import Grid
from .embedding import embedded
from .reading import Complete, Guard, Look, ModelCall, named, uncompiled

# So many tokens of a picture at a time: for each the attention below is as large as the queries are.
_TOKENS = 8192
# By how much of its length a token of a text may differ and be the same: by what rounding may do.
_ALIKE = 0.05
# The keys of so many words are kept for a run: those of all concepts, of a short prompt too.
_KEPT = 128


class WordReading:
    """A ``Reading`` of a model's cross-attention layers.

    Queries and keys are taken from the modules that make them, and not from an attention function: nodes that
    replace the attention of a layer (IPAdapter) still use those.

    A score is the sum over a layer's heads of probabilities, divided by the number of heads that layers have
    on average: where all have as many, the mean over heads. Averages over layers are then DAAM's.
    """

    SPACES = ("probability",)

    def __init__(
        self,
        family: WordsFamily,
        model: nn.Module,
        call: ModelCall,
        look: Look,
        rows: Sequence[slice],
        grid: Grid,
        guard: Guard,
        stop: bool,
    ) -> None:
        self._family, self._look, self._rows, self._grid = family, look, rows, grid
        self._model, self._call, self._options = model, call.arguments, call.options
        self._guard, self._stop = guard, stop
        self._layers = family.layers(model)
        default = family.default_layers(model)
        self._heads = sum(family.heads(self._layers[n]) for n in default) / len(default)
        self._known: dict = {} if look.known is None else look.known
        self._words = Words(look.tokens, self._known)
        self._text = self._words.text(
            embedded(family, model, call, self._words.sequences, self._layers[0], self._given, look.known)
        )
        context = self._call.get("context", self._call.get("c_crossattn"))
        self._length = context.shape[1]
        self._own_lengths = [family.own_length(context[part]) for part in rows]
        self._scores: dict[int, list[Tensor]] = {}

    def _given(self, arguments: dict, model: nn.Module, tokens: int) -> Tensor:
        return self._family.text(arguments)

    @property
    def gap(self) -> str | None:
        absent = [layer for layer in self._look.layers if layer not in self._scores]
        return f"layer {absent[0]} did not run" if absent else None

    @contextlib.contextmanager
    def watching(self) -> Iterator[dict]:
        with contextlib.ExitStack() as hooks:
            for layer in self._look.layers:
                module = self._layers[layer]
                seen = _Layer(layer, uncompiled(module))
                queries, keys = (
                    module.get_submodule(n) for n in (self._family.queries, self._family.keys[-1])
                )
                for handle in (
                    module.register_forward_pre_hook(seen.entered, with_kwargs=True),
                    queries.register_forward_hook(seen.asked),
                    keys.register_forward_hook(self._answered(seen)),
                ):
                    hooks.callback(handle.remove)
            yield self._options

    def _answered(self, seen: _Layer) -> Callable:
        @torch.compiler.disable
        def answered(module: nn.Module, args: tuple, keys: Tensor) -> None:
            if self._guard.broken or seen.queries is None:
                return
            with self._guard:
                rows = len(seen.queries)
                by_heads = partial(self._family.by_heads, seen.module)
                self._scores[seen.number] = self._read(
                    seen, by_heads(seen.queries, rows), by_heads(keys, rows), self._own(seen, keys)
                )
            seen.forget()
            if self._stop and self.gap is None:
                raise Complete

        return answered

    def _read(self, seen: _Layer, q: Tensor, k: Tensor, own: Tensor) -> list[Tensor]:
        """For each part of the rows (B, K, N), of the layer's queries (B, H, N, d), keys (B, H, T, d) and
        those of ``Words.text`` (1 or B, H, T + K', d)."""
        family, count = self._family, q.shape[2]
        picture, grid = family.place(self._model, self._call, self._grid, count)
        if picture.stop > count:
            raise RuntimeError(
                f"the attention of layer {seen.number} has {count} queries, which a picture of {grid.size} "
                "tokens does not fit into"
            )
        found = []
        for part, length in zip(self._rows, self._own_lengths, strict=True):
            mask = family.mask(seen.arguments)
            given = k[part] if k.shape[2] != self._length else k[part, :, :length]
            probabilities = self._words.probabilities(
                q[part, :, picture],
                given,
                own if len(own) == 1 else own[part],
                mask if mask is None or len(mask) == 1 else mask[part],
            )
            summed = _on_grid(probabilities, grid, self._grid, self._known)
            found.append(self._words.pooled(summed / self._heads))
        return found

    def _own(self, seen: _Layer, keys: Tensor) -> Tensor:
        """The keys of ``Words.text`` (1 or B, H, T + K', d) in a layer whose own are ``keys``. They are the
        same in all of a run, unless the layer's arguments have a part in them."""
        family, module, name = self._family, seen.module, ("keys", seen.number, keys.device, keys.dtype)
        if name in self._known:
            return self._known[name]
        own = family.key(module, self._text.to(keys), seen.arguments)
        own = family.by_heads(module, own, len(own))
        if not family.timed and not family.modulated(module) and own.shape[2] <= _KEPT:
            self._known[name] = own
        return own

    def scores(self) -> list[dict[str, Tensor]]:
        if self.gap:
            return []
        layers = [self._scores[layer] for layer in self._look.layers]
        return [{"probability": torch.stack(parts)} for parts in zip(*layers, strict=True)]


class _Layer:
    """A layer while it runs."""

    def __init__(self, number: int, module: nn.Module) -> None:
        self.number, self.module = number, module
        self.arguments: dict = {}
        self.queries: Tensor | None = None

    def entered(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.arguments = named(self.module.forward, args, kwargs)

    def asked(self, module: nn.Module, args: tuple, queries: Tensor) -> None:
        self.queries = queries

    def forget(self) -> None:
        """Both are as large as the picture, and a model has many layers."""
        self.queries, self.arguments = None, {}


class Words:
    """Which words a picture is read with: of a prompt that was given with the concepts, those that are
    concepts; and the concepts that are not among them, each by itself one more word.

    Args:
        known: see ``Look``.
    """

    def __init__(self, tokens: ConceptTokens, known: dict | None = None) -> None:
        self._prompt = tokens.prompt
        places = ((),) * len(tokens.sequences) if tokens.prompt is None else tokens.prompt.words
        self._places = places
        self._more = [index for index, place in enumerate(places) if not place]
        self._columns = sorted({row for place in places for row in place})
        self._tokens = tokens
        self._known = {} if known is None else known
        self.sequences = (*tokens.sequences, *(() if tokens.prompt is None else [tokens.prompt.sequence]))
        """What is to be embedded, (T_k, C): each name, and the prompt if it was given."""

    def text(self, embedded: Sequence[Tensor]) -> Tensor:
        """What keys are made of (1, T + K', D): the prompt, if it was given, and the further words. Of
        ``sequences`` as the model embeds them (T_k, D)."""
        more = self._further(self._tokens.pooled(embedded[: len(self._places)]), 0)
        return (more if self._prompt is None else torch.cat([embedded[-1], more]))[None]

    def _further(self, concepts: Tensor, axis: int) -> Tensor:
        """Of all concepts those that are further words."""
        if len(self._more) == len(self._places):
            return concepts
        return picked(concepts, axis, self._more) if self._more else concepts.narrow(axis, 0, 0)

    def probabilities(self, q: Tensor, k: Tensor, own: Tensor, mask: Tensor | None) -> Tensor:
        """Of each token of picture (B, H, N, d) for each word, (B, H, N, W) float32: those of the prompt that
        are part of concepts, then the further words.

        Args:
            k: the keys (B, H, T, d) of the prompt that the model was given, which ``mask`` is of.
            own: those of ``text`` (1 or B, H, T + K', d).
        """
        own = own.expand(len(q), -1, -1, -1)
        if self._prompt is not None:
            count = own.shape[2] - len(self._more)
            k, own, mask = own[:, :, :count], own[:, :, count:], None
        return probabilities(q, k, own, self._columns, mask, known=self._known)

    def begin(self, context: Tensor, embed: Callable[[Tensor], Tensor]) -> int:
        """The row of the texts that a model is given, (B, T, C), in which the prompt begins; any, if no
        concept is a word of it.

        Args:
            embed: of the family, for a model that is given texts as they are before its first layer.

        Raises:
            RuntimeError: one of them is another text.
        """
        if not self._columns:
            return 0
        prompt = self._prompt.sequence.to(context)
        if prompt.shape[-1] != context.shape[-1]:
            prompt = embed(prompt[None])[0]
        prompt = prompt.float()
        lengths = prompt.norm(dim=-1)
        lengths = lengths.clamp_min(1e-3 * float(lengths.max()))
        last = context.shape[1] - len(prompt)
        for start in sorted({0, last}) if last >= 0 else ():  # models fill texts up from either side
            given = context[:, start : start + len(prompt)].float()
            if bool(((given - prompt).norm(dim=-1) <= _ALIKE * lengths).all()):
                return start
        raise RuntimeError(
            "the prompt in Concept Attention is not the sampler's: its tokens are not those that the model "
            "is given. Connect the same text and the same CLIP to both, or leave the prompt in Concept "
            "Attention empty"
        )

    def joint_probabilities(
        self, q: Tensor, k: Tensor, own: Tensor, start: int, mask: Tensor | None, scale: float | None = None
    ) -> Tensor:
        """Of each token of picture (B, H, N, d) for each concept, (B, K, N) float32, the mean over heads,
        where text and picture attend to each other.

        Args:
            k: all keys (B, H, L, d), which ``mask`` (1 or B, 1 or H, 1 or N, L) is of.
            own: those of the concepts (B, H, K, d).
            start: where in ``k`` the prompt begins.
        """
        columns, own = [start + row for row in self._columns], self._further(own, 2)
        parts = [
            probabilities(
                part, k, own, columns, _of_queries(mask, i * _TOKENS, part), scale, self._known
            ).mean(1)
            for i, part in enumerate(q.split(_TOKENS, 2))
        ]
        return self.pooled(torch.cat(parts, 1).mT)

    def pooled(self, words: Tensor) -> Tensor:
        """Of the words (B, W, N), concepts (B, K, N): the mean of a concept's tokens, wherever the prompt has
        it."""
        if not self._columns:
            return words
        found = []
        for index, place in enumerate(self._places):
            if place:
                found.append(picked(words, 1, [self._columns.index(row) for row in place]).mean(1))
            else:
                found.append(words[:, len(self._columns) + self._more.index(index)])
        return torch.stack(found, 1)


def probabilities(
    q: Tensor,
    k: Tensor,
    own: Tensor,
    columns: Sequence[int],
    mask: Tensor | None = None,
    scale: float | None = None,
    known: dict | None = None,
) -> Tensor:
    """How much of its attention each query (B, H, N, d) gives to single keys, (B, H, N, W) float32: to
    ``columns`` of the keys ``k`` (B, H, T, d), which are all that there is, then to each of ``own``
    (B, H, K, d), as if it alone was there too.

    Args:
        mask: of ``k``, as an attention function takes it: (B or 1, T), or with axes for heads and queries.
        scale: of the attention; 1 / sqrt(d) if None.
        known: keeps what calls on as many keys have in common.
    """
    count = own.shape[2]
    keys = torch.cat([k, own], 2)
    if mask is not None:
        mask = mask[:, None, None] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
        mask = F.pad(mask, (0, count), value=True if mask.dtype == torch.bool else 0.0)
    # An attention whose values are ones and zeros gives the probabilities themselves, without the matrix of
    # all of them.
    found = []
    for some, values in _selectors(keys, k.shape[2], columns, {} if known is None else known):
        values = values.expand(*keys.shape[:2], -1, -1)
        parts = [
            F.scaled_dot_product_attention(
                part, keys, values, attn_mask=_of_queries(mask, i * _TOKENS, part), scale=scale
            )
            for i, part in enumerate(q.split(_TOKENS, 2))
        ]
        found.append(_joined([part[..., :some].float() for part in parts], 2))
    among, alone, rest = _joined(found, 3).split([len(columns), count, 1], -1)
    rest = rest.clamp_min(torch.finfo(torch.float32).tiny)
    alone = alone / (alone + rest)
    return torch.cat([among / rest, alone], -1) if columns else alone


def _selectors(keys: Tensor, given: int, columns: Sequence[int], known: dict) -> list[tuple[int, Tensor]]:
    """Values (T + K, d) for the keys (B, H, T + K, d), of which the first T are ``given``, as many as it
    takes; and how many of their columns count. Each column selects one of ``columns`` or one of the further
    keys, the last one all that are given."""
    length, width = keys.shape[2:]
    name = ("selectors", length, width, given, tuple(columns), keys.device, keys.dtype)
    if name not in known:
        chosen = [*((i, i + 1) for i in (*columns, *range(given, length))), (0, given)]
        known[name] = []
        for start in range(0, len(chosen), width):
            some = chosen[start : start + width]
            values = keys.new_zeros(length, width)
            for column, (first, end) in enumerate(some):
                values[first:end, column] = 1
            known[name].append((len(some), values))
    return known[name]


def _joined(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def masked(mask: Tensor | None, part: slice, queries: slice) -> Tensor | None:
    """What an attention function's mask, with axes for queries and keys, perhaps for rows and heads, is for
    some rows and queries: (1 or B, 1 or H, 1 or N, L)."""
    if mask is None:
        return None
    mask = mask[None, None] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
    mask = mask if len(mask) == 1 else mask[part]
    return mask if mask.shape[2] == 1 else mask[:, :, queries]


def _of_queries(mask: Tensor | None, start: int, queries: Tensor) -> Tensor | None:
    if mask is None or mask.shape[-2] == 1:
        return mask
    return mask[..., start : start + queries.shape[2], :]


def _on_grid(words: Tensor, grid: Grid, whole: Grid, known: dict) -> Tensor:
    """The sum over heads of (B, H, N, W), (B, W, N) on the grid of the whole picture. Coarser layers are
    enlarged as DAAM does it: each head's map bicubic, and no less than 0.

    Args:
        known: keeps the filters.
    """
    if grid == whole:
        return words.sum(1).mT
    maps = rearrange(words, "b h (f r c) w -> b f h w r c", f=grid.frames, r=grid.rows, c=grid.columns)
    down = _bicubic(grid.rows, whole.rows, maps.device, known)
    across = _bicubic(grid.columns, whole.columns, maps.device, known)
    maps = (down @ maps @ across.mT).clamp_min(0).sum(2)
    return rearrange(maps, "b f w r c -> b w (f r c)")


def _bicubic(size: int, wanted: int, device: torch.device, known: dict) -> Tensor:
    """PyTorch's filter along one axis, as a matrix (wanted, size). Many small maps go through it several
    times as fast."""
    name = ("bicubic", size, wanted, device)
    if name not in known:
        one = torch.eye(size, device=device)[None, None]
        known[name] = F.interpolate(one, size=(wanted, size), mode="bicubic", align_corners=False)[0, 0]
    return known[name]
