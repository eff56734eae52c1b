from __future__ import annotations

import pytest
import torch
from torch import Tensor

from concept_attention.core.concepts import Concepts
from concept_attention.core.observing.recording import Recording
from concept_attention.core.reading.grounding import look_alikes, propagate_anchors
from concept_attention.core.reading.maps import GROUNDINGS, concept_maps, heatmaps
from concept_attention.nodes.concept_saliency import ConceptSaliency
from recordings import recording

RED, BLUE, SEA, TREE = range(4)


def boats(leak: float = 3.0, touching: bool = True, grid: int = 12) -> tuple[Tensor, Tensor]:
    """Raw scores (4, h, w) of a red boat on the left, a blue boat on the right, the sea around them and a
    tree that is not there; and where the boats are, (2, h, w). ``leak`` is how red the blue boat looks; only
    its middle looks bluer."""
    where = torch.zeros(2, grid, grid, dtype=torch.bool)
    middle = grid // 2
    where[0, 4:8, middle - 4 : middle] = True
    gap = 0 if touching else 1
    where[1, 4:8, middle + gap : middle + gap + 4] = True
    scores = torch.full((4, grid, grid), -2.0)
    scores[SEA] = torch.where(where.any(0), -2.0, 3.0)
    scores[RED][where.any(0)] = leak
    scores[BLUE][where[0]] = 0.0
    scores[BLUE][where[1]] = 2.0
    scores[BLUE, 5:7, middle + gap + 1 : middle + gap + 3] = 3.5
    scores[TREE] -= 1
    return scores, where


def iou(a: Tensor, b: Tensor) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize("touching", [True, False])
def test_a_look_alike_gets_back_what_leaked(touching):
    scores, where = boats(touching=touching)
    maps = scores.softmax(0)
    plain, propagated = maps.argmax(0), propagate_anchors(maps, scores).argmax(0)
    assert iou(plain == BLUE, where[1]) < 0.3
    assert iou(propagated == BLUE, where[1]) > 0.7
    assert iou(propagated == RED, where[0]) > 0.75 > iou(plain == RED, where[0])


def test_things_keep_their_edges_against_what_looks_different():
    scores, where = boats()
    propagated = propagate_anchors(scores.softmax(0), scores).argmax(0)
    assert torch.equal((propagated == RED) | (propagated == BLUE), where.any(0))


def test_a_concept_that_is_not_there_still_looks_absent():
    scores, _ = boats()
    maps = scores.softmax(0)
    propagated = propagate_anchors(maps, scores)
    assert maps[TREE].max() < 0.02
    assert propagated[TREE].max() < 0.02


def test_maps_that_are_right_stay_right():
    scores, where = boats()
    scores[RED][where[1]] = 0.0
    maps = scores.softmax(0)
    assert torch.equal(propagate_anchors(maps, scores).argmax(0), maps.argmax(0))


def test_concepts_that_do_not_look_alike_keep_their_maps():
    a = torch.arange(6.0).expand(5, 6)
    scores = torch.stack([a, -a])
    maps = (0.3 * scores).softmax(0)
    torch.testing.assert_close(propagate_anchors(maps, scores), maps)


def random_scores(count: int, *grid: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(count, *grid, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (7, 1), (2, 2), (9, 14)])
@pytest.mark.parametrize("count", [1, 2, 6])
@pytest.mark.parametrize("scale", [0.0, 3.0, 100.0])
def test_propagated_maps_add_up_to_one(grid, count, scale):
    scores = random_scores(count, *grid, scale=scale)
    propagated = propagate_anchors(scores.softmax(0), scores)
    assert propagated.shape == scores.shape
    assert propagated.dtype == torch.float32
    assert propagated.min() >= 0
    torch.testing.assert_close(propagated.sum(0), torch.ones(grid))


def test_concepts_in_another_order_get_the_same_maps():
    scores, _ = boats()
    order = [3, 1, 0, 2]
    expected = propagate_anchors(scores.softmax(0), scores)[order]
    torch.testing.assert_close(propagate_anchors(scores[order].softmax(0), scores[order]), expected)


def test_look_alikes_are_concepts_whose_scores_go_together():
    scores, _ = boats()
    alike = look_alikes(scores)
    torch.testing.assert_close(alike, alike.T)
    assert torch.equal(alike.diagonal(), torch.ones(4))
    assert alike[RED, BLUE] > 0.5
    assert alike[RED, SEA] == alike[BLUE, SEA] == 0
    strong = 10 * torch.rand(12, 12, generator=torch.Generator().manual_seed(0))  # patches for all concepts
    torch.testing.assert_close(look_alikes(scores + strong), alike, atol=1e-4, rtol=0)
    assert look_alikes(torch.ones(2, 3, 3)).tolist() == [[1, 0], [0, 1]]


def recorded(batch: int = 2) -> Recording:
    concepts = Concepts(("red boat", "blue boat", "tree", "cloud", "bird"), ("sea",))
    return recording(batch=batch, concepts=concepts, grid=(6, 8))


def test_every_image_of_a_batch_is_propagated_on_its_own():
    r = recorded()
    choice = {"layers": [1, 4], "steps": [0, 2], "temperature": 2.0}
    maps = concept_maps(r, **choice, grounding="anchor propagation")
    plain = heatmaps(r, **choice)
    raw = heatmaps(r, layers=[1, 4], steps=[0, 2], softmax=False)
    assert maps.grounding == "anchor propagation"
    for i in range(2):
        assert torch.equal(maps.values[i], propagate_anchors(plain[i], raw[i]))
    assert not torch.equal(maps.values, plain)


def test_without_a_choice_maps_are_the_papers():
    maps = concept_maps(recorded())
    assert maps.grounding == GROUNDINGS[0] == "paper"
    assert torch.equal(maps.values, heatmaps(recorded()))


def test_anchor_propagation_changes_no_recording():
    r = recorded()
    before = [s.clone() for s in r.scores["output"]]
    concept_maps(r, grounding="anchor propagation")
    assert all(torch.equal(a, b) for a, b in zip(before, r.scores["output"], strict=True))


def test_anchor_propagation_needs_a_softmax():
    with pytest.raises(ValueError, match='Switch softmax on, or choose the grounding "paper"'):
        concept_maps(recorded(), softmax=False, grounding="anchor propagation")


def test_an_unknown_grounding_is_an_error():
    with pytest.raises(ValueError, match='Unknown grounding "sam". Choose one of: paper, anchor propagation'):
        concept_maps(recorded(), grounding="sam")


def test_the_node_makes_the_maps_of_the_grounding_that_is_chosen():
    plain = concept_maps(recorded())
    widgets = {"space": "output", "layers": "default", "start_step": 0, "end_step": 100}
    widgets |= {"softmax": True, "temperature": 1.0}
    for grounding in GROUNDINGS:
        expected = concept_maps(recorded(), grounding=grounding)
        maps, masks, _ = ConceptSaliency.execute(plain, **widgets, grounding=grounding).result
        assert maps.grounding == grounding
        assert torch.equal(maps.values, expected.values)
        assert torch.equal(masks, expected.at_size(96, 128)[:, :5].flatten(0, 1))
    without = ConceptSaliency.execute(plain, **widgets).result[0]
    assert torch.equal(without.values, plain.values)
