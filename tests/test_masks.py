from __future__ import annotations

import pytest
import torch

from concept_attention.core.concepts import Concepts
from concept_attention.core.maps import ConceptMaps
from concept_attention.core.masks import METHODS, clean, concept_mask, otsu_threshold, region
from recordings import maps_of


def square(size=32, start=8, stop=16) -> torch.Tensor:
    plane = torch.zeros(size, size)
    plane[start:stop, start:stop] = 1
    return plane


def two_concepts(batch=1) -> ConceptMaps:
    """A cat in a square of patches, a dog nowhere, sky elsewhere."""
    cat = 0.05 + 0.85 * square(8, 2, 4)
    dog = torch.full((8, 8), 0.02)
    values = torch.stack([cat, dog, 1 - cat - dog]).expand(batch, -1, -1, -1)
    return maps_of(values, Concepts(("cat", "dog"), ("sky",)), (128, 128))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_a_concept_that_is_there(method):
    threshold = 4 / 64 if method == "top fraction" else 0.5
    mask = concept_mask(two_concepts(), "cat", method=method, threshold=threshold)
    truth = square(128, 32, 64).bool()
    found = mask[0].bool()
    assert (found & truth).sum() / (found | truth).sum() > 0.5
    assert found[48, 48]
    assert not found[0, 0]


@pytest.mark.parametrize("method", ["argmax", "fixed"])
def test_an_absent_concept_gives_an_empty_mask_of_the_right_size(method):
    mask = concept_mask(two_concepts(batch=3), "dog", method=method)
    assert mask.shape == (3, 128, 128)
    assert not mask.any()


def test_background_concepts_take_part_in_the_argmax():
    maps = two_concepts()
    mask = concept_mask(maps, "cat")[0].bool()
    assert torch.equal(mask, maps.at_size(128, 128)[0].argmax(0) == 0)
    assert mask.float().mean() < 0.1


def test_hard_masks_are_exactly_zero_or_one():
    for method in METHODS:
        mask = concept_mask(two_concepts(), "cat", method=method, threshold=0.3)
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        assert mask.dtype == torch.float32


def test_soft_masks_are_the_map_inside_and_zero_outside():
    maps = two_concepts()
    hard, soft = (concept_mask(maps, "cat", soft=s)[0] for s in (False, True))
    values = maps.at_size(128, 128)[0, 0]
    assert torch.equal(soft, values * hard)


def test_the_mean_method_is_the_papers():
    values = torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(region(values[None], 0, "mean"), values > values.mean())


@pytest.mark.parametrize("fraction,count", [(0.0, 0), (0.25, 64), (1.0, 256)])
def test_top_fraction_takes_that_share_of_the_pixels(fraction, count):
    values = torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
    chosen = region(values[None], 0, "top fraction", fraction)
    assert chosen.sum() == count
    if 0 < count < 256:
        assert values[chosen].min() > values[~chosen].max()


def test_otsu_parts_two_groups_of_values():
    low = 0.2 + 0.02 * torch.randn(500, generator=torch.Generator().manual_seed(0))
    high = 0.7 + 0.05 * torch.randn(100, generator=torch.Generator().manual_seed(1))
    threshold = otsu_threshold(torch.cat([low, high]))
    assert low.max() < threshold < high.min()


def test_otsu_of_a_constant_map_leaves_nothing_inside():
    assert not region(torch.full((1, 4, 4), 0.3), 0, "otsu").any()


def test_an_unknown_method_is_an_error():
    with pytest.raises(ValueError, match='"median".*argmax, mean'):
        concept_mask(two_concepts(), "cat", method="median")


def test_an_unknown_concept_is_an_error():
    with pytest.raises(ValueError, match="The concepts are: cat, dog, sky"):
        concept_mask(two_concepts(), "horse")


def test_the_mask_takes_the_size_that_is_asked_for():
    assert concept_mask(two_concepts(), "cat", size=(70, 301)).shape == (1, 70, 301)


def test_holes_are_filled():
    ring = square(32, 8, 24)
    ring[12:16, 12:16] = 0
    assert torch.equal(clean(ring.bool(), fill_holes=True), square(32, 8, 24).bool())


def test_small_parts_are_dropped():
    plane = square(32, 8, 16)
    plane[30, 30] = 1
    assert torch.equal(clean(plane.bool(), smallest_area=0.01), square(32, 8, 16).bool())
    assert not clean(plane.bool(), smallest_area=0.5).any()


def test_growing_and_shrinking_by_pixels():
    inside = square(32, 8, 24).bool()
    grown = clean(inside, grow=3)
    assert grown[5, 16]
    assert not grown[4, 16]
    assert not grown[5, 5]  # corners are round
    assert torch.equal(clean(inside, grow=-3), square(32, 11, 21).bool())


def test_growing_nothing_and_shrinking_everything():
    nothing, everything = torch.zeros(8, 8, dtype=torch.bool), torch.ones(8, 8, dtype=torch.bool)
    for grow in (-4, 4):
        assert not clean(nothing, grow=grow, fill_holes=True, smallest_area=0.1).any()
        assert clean(everything, grow=grow).all()


def test_feathering_keeps_the_range_and_the_weight():
    hard, blurred = (concept_mask(two_concepts(), "cat", feather=f) for f in (0, 4))
    assert blurred.min() >= 0
    assert blurred.max() <= 1
    assert (blurred.sum() - hard.sum()).abs() < 0.01 * hard.sum()
    assert len(blurred.unique()) > 10


def test_inverting_gives_the_rest():
    mask, rest = (concept_mask(two_concepts(), "cat", invert=i) for i in (False, True))
    assert torch.equal(mask + rest, torch.ones_like(mask))


def test_the_maps_are_not_changed():
    maps = two_concepts(batch=2)
    before = maps.values.clone()
    concept_mask(maps, "cat", soft=True, grow=3, feather=2.0, invert=True)
    assert torch.equal(maps.values, before)
