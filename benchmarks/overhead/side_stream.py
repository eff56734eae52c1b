"""A candidate, to be measured before it is believed: the concepts' text weights are read while the model
computes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from concept_attention.core.observing.readers.stream import ConceptStream, TextBlock


class SideStream(ConceptStream):
    """In the place of ``ConceptStream``, on a CUDA stream of its own: its attention beside the model's, its
    residual updates beside the model's MLPs. Scores stay on the model's stream.

    Memory goes back to the stream that it was allocated on. So what is read of the model's is held until the
    model's stream has waited for this one, and the first ``hidden`` until the end; what is allocated here is
    used again after this stream has waited for the model's.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._side = _side_of(self.hidden.device)
        self._held = [self.hidden]

    def attend(self, layer: int, image_q: Tensor, image_k: Tensor, image_v: Tensor, rotate) -> None:
        if self.complete:
            return
        self._held[1:] = image_q, image_k, image_v
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            super().attend(layer, image_q, image_k, image_v, rotate)
        self._block = _UpdatedOn(self._side, self._block)

    def score(self, layer: int, image_out: Tensor) -> None:
        if self.complete:
            return
        torch.cuda.current_stream().wait_stream(self._side)
        super().score(layer, image_out)
        del self._held[1:]


class _UpdatedOn:
    def __init__(self, stream: torch.cuda.Stream, block: TextBlock) -> None:
        self._stream, self._block = stream, block

    def update(self, hidden: Tensor, attended: Tensor) -> Tensor:
        with torch.cuda.stream(self._stream):
            return self._block.update(hidden, attended)


@cache
def _side_of(device: torch.device) -> torch.cuda.Stream:
    """One for all evaluations: each stream keeps memory of its own."""
    return torch.cuda.Stream(device)
