"""The concept stream's own arithmetic. That the numbers are the paper's is in test_golden.py."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from concept_attention.core.observing.readers.stream import ConceptStream


class Made(TorchDispatchMode):
    """Notes the float32 tensors that come into being, as (operation, number of elements)."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            found = [t for t in tree_iter(out) if isinstance(t, torch.Tensor)]
            self.tensors += [(func.name(), t.numel()) for t in found if t.dtype == torch.float32]
        return out


class OneBlock:
    """A model of one block whose text weights do nothing: one head, concepts are their own queries, keys and
    values."""

    def embed(self, concepts):
        return concepts[None]

    def block(self, layer):
        return [self][layer]

    def qkv(self, hidden):
        return (hidden[:, None],) * 3


def vectors(*shape: int, dtype: torch.dtype, seed: int, size: float = 1.0) -> torch.Tensor:
    return (size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def scored(concepts, image_out, patches: int) -> tuple[torch.Tensor, ConceptStream, Made]:
    """Scores (B, K, N) of one block in which concepts see nothing, so that o_c is the concept itself."""
    with torch.inference_mode(False), torch.no_grad():  # inference tensors hide what matmul does
        concepts, image_out = concepts.clone(), image_out.clone()
        stream = ConceptStream(OneBlock(), concepts, [0], attend_image=False, attend_concepts=False)
        image = image_out[:, None]
        stream.attend(0, image, image, image, rotate=lambda keys: keys)
        with Made() as made:
            stream.score(0, image_out)
    (scores,) = stream.scores["output"]
    assert scores.shape == (1, len(concepts), patches)
    return scores, stream, made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("patches", [7, 1024, 2500])
def test_scores_keep_float32_whatever_the_model_computes_in(dtype, patches):
    concepts = vectors(5, 256, dtype=dtype, seed=1, size=4)
    image_out = vectors(1, patches, 256, dtype=dtype, seed=2, size=4)
    scores, _, _ = scored(concepts, image_out, patches)
    exact = concepts.double() @ image_out[0].double().T
    assert scores.dtype == torch.float32
    assert exact.abs().max() > 256  # where bfloat16 would be off by 1
    assert (scores[0] - exact).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_image_is_never_copied_to_float32_as_a_whole(dtype):
    _, _, made = scored(
        vectors(5, 256, dtype=dtype, seed=1), vectors(1, 4096, 256, dtype=dtype, seed=2), 4096
    )
    assert max(count for _, count in made.tensors) <= 1024 * 256


def test_a_float32_image_is_not_copied_at_all():
    _, _, made = scored(
        vectors(5, 256, dtype=torch.float32, seed=1), vectors(1, 4096, 256, dtype=torch.float32, seed=2), 4096
    )
    assert {count for _, count in made.tensors} == {5 * 4096}


def test_after_the_last_layer_nothing_is_computed():
    concepts = vectors(3, 8, dtype=torch.float32, seed=1)
    _, stream, _ = scored(concepts, vectors(1, 4, 8, dtype=torch.float32, seed=2), 4)
    assert stream.complete
    with Made() as made:
        stream.attend(1, None, None, None, rotate=None)
        stream.score(1, None)
    assert not made.tensors
