"""The algorithm of the paper's reference implementation, as a yardstick: in every double-stream block a
second joint attention over concept and image rows, and all vectors of the output and the cross-attention
space kept on the CPU, to be compared after sampling."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from concept_attention.core.observing.readers.stream import ConceptStream


class SecondAttention(ConceptStream):
    """In the place of ``ConceptStream``. ``vectors`` has for each layer, on the CPU: concepts (B, K, D) and
    image (B, N, D) of the output space, concepts (B, H, K, d) and image (B, H, N, d) of the cross-attention
    space."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.vectors: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def attend(self, layer: int, image_q: Tensor, image_k: Tensor, image_v: Tensor, rotate) -> None:
        self._block = self._text.block(layer)
        q, k, v = self._block.qkv(self.hidden)
        joint = F.scaled_dot_product_attention(
            torch.cat([q, rotate(image_q)], 2), torch.cat([k, rotate(image_k)], 2), torch.cat([v, image_v], 2)
        )
        self._attended = joint.transpose(1, 2).flatten(2)[:, : q.shape[2]]
        self._queries = q.cpu(), image_q.cpu()

    def score(self, layer: int, image_out: Tensor) -> None:
        self.vectors.append((self._attended.cpu(), image_out.cpu(), *self._queries))
        self.hidden = self._block.update(self.hidden, self._attended)

    @property
    def complete(self) -> bool:
        """Never, so that nothing is recorded: the scores are computed after sampling."""
        return False

    def output_scores(self) -> list[Tensor]:
        """(B, K, N) of each layer."""
        return [concepts.float() @ image.float().mT for concepts, image, _, _ in self.vectors]


def follow(stream: ConceptStream, rotate) -> dict:
    """Patches for ``transformer_options`` that lead ``stream`` through one call of the model, whose rows are
    all positive. ``rotate(keys, pe)`` applies RoPE."""

    def before(q, k, v, pe, attn_mask, extra_options):
        if extra_options["block_type"] == "double":
            image = slice(extra_options["img_slice"][0], None)
            stream.attend(
                extra_options["block_index"],
                *(t[:, :, image] for t in (q, k, v)),
                rotate=lambda keys: rotate(keys, pe[:, :, image]),
            )
        return {}

    def after(out, extra_options):
        if extra_options["block_type"] == "double":
            stream.score(extra_options["block_index"], out[:, extra_options["img_slice"][0] :])
        return out

    return {"attn1_patch": [before], "attn1_output_patch": [after]}
