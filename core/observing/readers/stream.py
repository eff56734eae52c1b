"""The concept stream: concept tokens that ride along a model's double-stream blocks.

Concept tokens use the text weights of every block, attend to themselves and to the image, and are never
seen by image or text (ConceptAttention, arXiv 2502.04320, section 4). Shapes: B rows of the batch,
K concepts, N image patches, H heads of d features, D = H * d.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .reading import RunningOrder

SPACES = ("output", "cross-attention", "value", "output, normalized concepts")

# Matrix products of half-precision factors that keep the float32 they are summed in: CUDA, PyTorch 2.8.
_BMM_TO_FLOAT32 = torch.version.cuda is not None and "dtype" in torch.ops.aten.bmm.overloads()
# Elsewhere so many image rows are made float32 at a time: 12 MiB of Flux.1's.
_ROWS = 1024


class TextBlock(Protocol):
    """The text-side weights of one double-stream block, modulated for one forward pass."""

    def qkv(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, K, d) of the stream (B, K, D), after QK-norm, position 0."""

    def update(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The stream after the block's gated residuals: attention projection, then MLP (B, K, D)."""


class TextStream(Protocol):
    """How concepts enter a model in one forward pass, and its double-stream blocks."""

    def embed(self, concepts: Tensor) -> Tensor:
        """The stream (B, K, D) at the first block, from text encoder tokens (K, C)."""

    def block(self, layer: int) -> TextBlock:
        """The text side of double-stream block ``layer``."""


class ConceptStream:
    """K concept tokens on their way through one forward pass.

    Give it every double-stream block in order: ``attend`` before the block's attention, ``score`` after
    it. ``scores[space]`` then holds one (B, K, N) float32 tensor for each layer of ``layers``. After the
    last of them nothing more is computed, nor after a block that was not due.

    ``attend_image`` and ``attend_concepts`` choose the keys of the concepts' attention (the paper's
    Table 3; both on is the method). With neither, a concept's output is its own value. ``keys`` (B, H, K, d)
    are the concepts' own in the last block that was attended in.
    """

    def __init__(
        self,
        text: TextStream,
        concepts: Tensor,
        layers: Collection[int],
        spaces: Collection[str] = ("output",),
        attend_image: bool = True,
        attend_concepts: bool = True,
    ) -> None:
        self.hidden = text.embed(concepts)
        self.scores: dict[str, list[Tensor]] = {space: [] for space in spaces}
        self._text = text
        self._layers = frozenset(layers)
        self._order = RunningOrder(max(layers))
        self._attend_image = attend_image
        self._attend_concepts = attend_concepts

    @property
    def complete(self) -> bool:
        """Whether every layer to be recorded has been."""
        return self._order.complete

    @property
    def gap(self) -> str | None:
        """Why it is not, once the forward pass has ended."""
        return self._order.gap

    def attend(self, layer: int, image_q: Tensor, image_k: Tensor, image_v: Tensor, rotate) -> None:
        """Concepts attend to [concepts, image]. The image's q, k, v are (B, H, N, d), before RoPE.

        ``rotate`` applies RoPE to the image keys. Concepts sit at position 0, where RoPE is the identity.
        """
        self._entered = self._order.enters(layer)
        if not self._entered:
            return
        self._block = self._text.block(layer)
        q, k, v = self._block.qkv(self.hidden)
        self.keys = k
        if layer in self._layers:
            self._record("cross-attention", q, image_q)
            self._record("value", v, image_v)
        keys, values = [], []
        if self._attend_concepts:
            keys.append(k)
            values.append(v)
        if self._attend_image:
            keys.append(rotate(image_k))
            values.append(image_v)
        if keys:
            v = F.scaled_dot_product_attention(q, torch.cat(keys, 2), torch.cat(values, 2))
        self._attended = _heads_side_by_side(v)

    def score(self, layer: int, image_out: Tensor) -> None:
        """Record o_c . o_x, then update the stream. ``image_out`` is the image's rows (B, N, D) of the
        model's own attention output, before its projection."""
        if not self._entered:
            return
        if layer in self._layers:
            self._record("output", self._attended, image_out)
            if "output, normalized concepts" in self.scores:
                self._record(
                    "output, normalized concepts", normalized_over_concepts(self._attended), image_out
                )
        self._order.left()
        if not self.complete:
            self.hidden = self._block.update(self.hidden, self._attended)

    def _record(self, space: str, concepts: Tensor, image: Tensor) -> None:
        if space not in self.scores:
            return
        if concepts.ndim == 4:
            concepts, image = _heads_side_by_side(concepts), _heads_side_by_side(image)
        self.scores[space].append(dot_products(concepts, image))


def dot_products(concepts: Tensor, image: Tensor) -> Tensor:
    """(B, K, N) float32 of (B, K, D) and (B, N, D). Scores reach hundreds and are compared by softmax: half
    precision would round them by up to 1. The image is not copied to float32 as a whole."""
    if concepts.dtype == image.dtype != torch.float32 and image.is_cuda and _BMM_TO_FLOAT32:
        return torch.bmm(concepts, image.mT, out_dtype=torch.float32)
    concepts = concepts.float()
    if image.dtype == torch.float32:
        return concepts @ image.mT
    return torch.cat([concepts @ rows.float().mT for rows in image.split(_ROWS, 1)], 2)


def _heads_side_by_side(x: Tensor) -> Tensor:
    """(B, H, L, d) to (B, L, H * d)."""
    return x.transpose(1, 2).flatten(2)


def normalized_over_concepts(vectors: Tensor) -> Tensor:
    """Each feature shifted to a minimum of 0 and scaled to a sum of 1 over the concepts, as the
    reference's ``normalize_concepts`` does."""
    vectors = vectors.float()
    vectors = vectors - vectors.amin(1, keepdim=True)
    total = vectors.sum(1, keepdim=True)
    return vectors / torch.where(total == 0, 1.0, total)
