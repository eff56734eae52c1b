from __future__ import annotations

import pytest
import torch

from concept_attention.core.concepts import Concepts
from concept_attention.core.reading.maps import ConceptMaps
from concept_attention.core.reading.masks import (
    METHODS,
    clean,
    concept_masks,
    otsu_threshold,
    region,
    segment,
)
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


def alone(maps: ConceptMaps, name: str, **options) -> torch.Tensor:
    """The masks (B, H, W) of one concept."""
    return concept_masks(maps, [name], **options)[0].squeeze(1)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_a_concept_that_is_there(method):
    threshold = 4 / 64 if method == "top fraction" else 0.5
    mask = alone(two_concepts(), "cat", method=method, threshold=threshold)
    truth = square(128, 32, 64).bool()
    found = mask[0].bool()
    assert (found & truth).sum() / (found | truth).sum() > 0.5
    assert found[48, 48]
    assert not found[0, 0]


@pytest.mark.parametrize("method", ["argmax", "fixed"])
def test_an_absent_concept_gives_an_empty_mask_of_the_right_size(method):
    mask = alone(two_concepts(batch=3), "dog", method=method)
    assert mask.shape == (3, 128, 128)
    assert not mask.any()


def test_nothing_wins_where_no_prompt_was_at_work():
    values = torch.rand(1, 3, 4, 6) + 0.1
    values[..., 3:] = 0
    maps = maps_of(values, Concepts(("cat", "ball"), ("sky",)), (64, 96))
    masks, _ = concept_masks(maps, maps.concepts.all, size=(4, 6))
    assert masks.sum(1)[..., :3].eq(1).all()
    assert masks[..., 3:].eq(0).all()
    assert segment(maps, (4, 6))[..., 3:].eq(-1).all()


def test_background_concepts_take_part_in_the_argmax():
    maps = two_concepts()
    mask = alone(maps, "cat")[0].bool()
    assert torch.equal(mask, maps.at_size(128, 128)[0].argmax(0) == 0)
    assert mask.float().mean() < 0.1


def test_hard_masks_are_exactly_zero_or_one():
    for method in METHODS:
        mask = alone(two_concepts(), "cat", method=method, threshold=0.3)
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        assert mask.dtype == torch.float32


def test_soft_masks_are_the_map_inside_and_zero_outside():
    maps = two_concepts()
    hard, soft = (alone(maps, "cat", soft=s)[0] for s in (False, True))
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
        alone(two_concepts(), "cat", method="median")


def test_an_unknown_concept_is_an_error():
    with pytest.raises(ValueError, match="The concepts are: cat, dog, sky"):
        alone(two_concepts(), "horse")


def test_the_mask_takes_the_size_that_is_asked_for():
    assert alone(two_concepts(), "cat", size=(70, 301)).shape == (1, 70, 301)


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
    hard, blurred = (alone(two_concepts(), "cat", feather=f) for f in (0, 4))
    assert blurred.min() >= 0
    assert blurred.max() <= 1
    assert (blurred.sum() - hard.sum()).abs() < 0.01 * hard.sum()
    assert len(blurred.unique()) > 10


def test_inverting_gives_the_rest():
    mask, rest = (alone(two_concepts(), "cat", invert=i) for i in (False, True))
    assert torch.equal(mask + rest, torch.ones_like(mask))


def test_the_maps_are_not_changed():
    maps = two_concepts(batch=2)
    before = maps.values.clone()
    alone(maps, "cat", soft=True, grow=3, feather=2.0, invert=True)
    assert torch.equal(maps.values, before)


def test_a_feathered_edge_is_soft_for_three_times_the_width_on_each_side_and_clear_beyond():
    values = torch.zeros(1, 2, 8, 400)
    values[:, 0, :, :200], values[:, 1, :, 200:] = 1, 1
    maps = maps_of(values, Concepts(("cat",), ("sky",)), (8, 400))
    row = alone(maps, "cat", feather=10)[0, 4]
    assert row[200 - 30] < 0.999 < row[200 - 32]
    assert row[200 + 32] < 0.001 < row[200 + 28]
    assert set(row[:150].tolist()) == {1.0}
    assert set(row[250:].tolist()) == {0.0}


def crowd() -> ConceptMaps:
    """Two images in which three concepts and the background take turns from patch to patch."""
    values = (2 * torch.randn(2, 4, 9, 7, generator=torch.Generator().manual_seed(0))).softmax(1)
    return maps_of(values, Concepts(("cat", "dog", "fish"), ("sky",)), (144, 112))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_combined_a_mask_is_the_largest_value_of_the_masks_of_each(method, soft):
    options = {"method": method, "threshold": 0.3, "soft": soft}
    together, _ = concept_masks(crowd(), ["fish", "cat"], combine=True, **options)
    apart, _ = concept_masks(crowd(), ["fish", "cat"], **options)
    assert together.shape == (2, 1, 144, 112)
    assert apart.shape == (2, 2, 144, 112)
    assert torch.equal(together, apart.amax(1, keepdim=True))
    assert not any(torch.equal(together[:, 0], apart[:, i]) for i in (0, 1))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(
    "tidy",
    [
        {"fill_holes": True},
        {"smallest_area": 0.1},
        {"grow": 2},
        {"grow": -2},
        {"feather": 3.0},
        {"invert": True},
        {"fill_holes": True, "smallest_area": 0.1, "grow": 2, "feather": 1.5, "invert": True},
    ],
    ids=lambda tidy: "+".join(tidy),
)
def test_concepts_combined_are_cleaned_like_one_that_covers_them_all(tidy, soft):
    """A ring whose halves are a cat and a dog, neither of which has a hole or a tenth of the image."""
    cat, dog = 0.1 * torch.ones(2, 32, 32)
    cat[8:24, 8:16], dog[8:24, 16:24] = 0.9, 0.8
    cat[12:20, 12:16] = dog[12:20, 16:20] = 0.1
    dog[2, 2] = 0.8
    halves = maps_of(torch.stack([cat, dog])[None], Concepts(("cat", "dog"), ()), (32, 32))
    whole = maps_of(torch.maximum(cat, dog)[None, None], Concepts(("ring",), ()), (32, 32))
    options = {"method": "fixed", "soft": soft, **tidy}
    together, _ = concept_masks(halves, ["cat", "dog"], combine=True, **options)
    assert torch.equal(together, concept_masks(whole, ["ring"], **options)[0])


@pytest.mark.parametrize("grow", [-2, 0, 2])
def test_parts_are_those_of_each_concept_whether_combined_or_not_and_lie_in_the_mask(grow):
    options = {"fill_holes": True, "smallest_area": 0.02, "grow": grow}
    masks, found = concept_masks(crowd(), ["cat", "dog"], combine=True, **options)
    assert found == concept_masks(crowd(), ["cat", "dog"], **options)[1]
    assert {part.concept for part in found[0]} == {"cat", "dog"}
    for mask, image in zip(masks[:, 0], found, strict=True):
        assert all(mask[y, x] == 1 for x, y in (part.peak for part in image))


def test_what_is_too_small_alone_gets_no_part_but_stays_beside_another_concept():
    cat, dog = torch.zeros(2, 32, 32)
    cat[8:16, 8:16], dog[8:16, 16:18] = 0.9, 0.9
    maps = maps_of(torch.stack([cat, dog])[None], Concepts(("cat", "dog"), ()), (32, 32))
    options = {"method": "fixed", "smallest_area": 0.05}
    masks, found = concept_masks(maps, ["cat", "dog"], combine=True, **options)
    assert [part.concept for part in found[0]] == ["cat"]
    assert masks[0, 0, 10, 17] == 1
    assert not concept_masks(maps, ["cat", "dog"], **options)[0][0, 1].any()
