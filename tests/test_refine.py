from __future__ import annotations

import pytest
import torch
from torch import Tensor

from concept_attention.core.concepts import Concepts
from concept_attention.core.reading.maps import upscale
from concept_attention.core.reading.masks import METHODS, concept_masks, segment
from concept_attention.core.reading.refine import guided_filter, refine
from concept_attention.nodes.concept_mask import ConceptMask
from concept_attention.nodes.concept_segmentation import ConceptSegmentation
from recordings import maps_of

CONCEPTS = Concepts(("cat", "dog"), ("sky",))


def picture(height: int = 128, width: int = 128, edge: float = 0.45) -> Tensor:
    """An image (H, W, 3): blue left of ``edge``, orange right of it."""
    image = torch.tensor([0.2, 0.4, 0.9]).repeat(height, width, 1)
    image[:, round(edge * width) :] = torch.tensor([0.9, 0.6, 0.2])
    return image


def halves(edge: float = 0.45, grid: int = 8) -> Tensor:
    """Maps (3, h, w) of a cat left of ``edge``, a dog right of it, and hardly any sky; each patch has the
    share of it that a concept covers."""
    cat = (edge * grid - torch.arange(grid)).clamp(0, 1).expand(grid, grid)
    return 0.9 * torch.stack([cat, 1 - cat, torch.zeros(grid, grid)]) + 0.1 / 3


def cut(maps, concept="cat", method="argmax", **widgets):
    """Concept Mask with its default widgets."""
    defaults = {
        "soft": False,
        "fill_holes": False,
        "smallest_area": 0.0,
        "grow": 0,
        "feather": 0.0,
        "invert": False,
    }
    return ConceptMask.execute(maps, concept, {"method": method}, **{**defaults, **widgets}).result


def iou(a: Tensor, b: Tensor) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize("side", [64, 128, 300, 512])
def test_a_mask_snaps_to_the_edge_of_the_image(side):
    maps = maps_of(halves(0.5)[None], CONCEPTS, (128, 128))
    image = picture(side, side, edge=0.45)
    truth = image[..., 2] > 0.5
    plain = concept_masks(maps, ["cat"], size=(side, side))[0][0, 0].bool()
    refined = concept_masks(maps, ["cat"], guide=image[None])[0][0, 0].bool()
    assert iou(plain, truth) < 0.92
    assert iou(refined, truth) > 0.99


def test_a_segmentation_snaps_to_the_edge_of_the_image():
    maps = maps_of(halves(0.5)[None], CONCEPTS, (128, 128))
    image = picture()
    truth = image[..., 2] > 0.5
    assert iou(segment(maps)[0] == 0, truth) < 0.92
    assert iou(segment(maps, guide=image[None])[0] == 0, truth) > 0.99
    options = {"unassigned_below": 0.0, "opacity": 0.6, "legend": False, "image": image[None]}
    plain, refined = (ConceptSegmentation.execute(maps, refine=r, **options).result[1] for r in (False, True))
    assert iou(plain[0].bool(), truth) < 0.92
    assert iou(refined[0].bool(), truth) > 0.99


def test_soft_maps_get_the_edge_of_the_image():
    def step(values):  # the edge is before column 58
        return values[0, 64, 57] - values[0, 64, 58]

    assert step(refine(halves(), picture())) > 0.4
    assert step(upscale(halves()[None], (128, 128))[0]) < 0.05


def test_a_thing_that_is_smaller_than_a_patch_takes_its_shape():
    image = picture(edge=1.0)
    image[40:66, 50:60] = torch.tensor([0.9, 0.1, 0.1])
    cat = image[..., 0].sub(0.2).div(0.7).view(8, 16, 8, 16).mean((1, 3))
    values = torch.stack([cat, torch.zeros(8, 8), 1 - cat])
    maps = maps_of(0.9 * values[None] + 0.1 / 3, CONCEPTS, (128, 128))
    truth = image[..., 0] > 0.5
    options = {"method": "otsu"}
    plain = concept_masks(maps, ["cat"], **options)[0][0, 0].bool()
    refined = concept_masks(maps, ["cat"], guide=image[None], **options)[0][0, 0].bool()
    assert iou(refined, truth) > 0.85
    assert iou(plain, truth) < 0.6


@pytest.mark.parametrize("colour", [0.0, 0.5, 1.0])
def test_an_image_without_edges_leaves_masks_as_they_are(colour):
    cat = torch.zeros(8, 8)
    cat[2:6, 2:6] = 1
    values = 0.9 * torch.stack([cat, torch.zeros(8, 8), 1 - cat]) + 0.1 / 3
    maps = maps_of(values[None], CONCEPTS, (128, 128))
    blank = torch.full((1, 128, 128, 3), colour)
    plain = concept_masks(maps, ["cat"])[0][0, 0].bool()
    refined = concept_masks(maps, ["cat"], guide=blank)[0][0, 0].bool()
    assert iou(plain, refined) > 0.9


def test_constant_maps_stay_constant_whatever_the_image():
    values = torch.tensor([0.5, 0.3, 0.2]).view(3, 1, 1).expand(3, 8, 8)
    noise = torch.rand(128, 128, 3, generator=torch.Generator().manual_seed(0))
    refined = refine(values, noise)
    torch.testing.assert_close(refined, values[:, :1, :1].expand(3, 128, 128), atol=1e-4, rtol=0)


def random_maps(seed: int = 0, grid=(6, 9)) -> Tensor:
    return (4 * torch.randn(5, *grid, generator=torch.Generator().manual_seed(seed))).softmax(0)


@pytest.mark.parametrize("contrast", [0.0, 0.01, 1.0])
def test_refined_maps_are_in_range_and_still_add_up_to_one(contrast):
    image = 0.5 + contrast * (torch.rand(96, 144, 3, generator=torch.Generator().manual_seed(1)) - 0.5)
    refined = refine(random_maps(), image)
    assert refined.min() >= 0
    assert refined.max() <= 1
    torch.testing.assert_close(refined.sum(0), torch.ones(96, 144), atol=1e-5, rtol=0)


def test_raw_maps_stay_in_range_too():
    values = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    values[:, 2, 3], values[:, 5, 5] = 0, 1
    refined = refine(values, torch.rand(128, 128, 3, generator=torch.Generator().manual_seed(1)))
    assert refined.min() >= 0
    assert refined.max() <= 1
    assert refined.isfinite().all()
    assert not refine(torch.zeros(3, 8, 8), picture()).any()


@pytest.mark.parametrize("size", [(1, 1), (17, 250), (96, 144), (95, 145), (600, 900)])
def test_images_of_any_size_can_guide(size):
    refined = refine(random_maps(), torch.rand(*size, 3))
    assert refined.shape == (5, *size)
    assert refined.isfinite().all()


def test_refining_does_not_depend_on_the_scale_of_the_image():
    small = refine(halves(), picture(128, 128))
    large = refine(halves(), picture(512, 512))
    shrunk = torch.nn.functional.interpolate(large[None], size=(128, 128), mode="area")[0]
    assert (small - shrunk).abs().mean() < 0.005


def test_the_part_of_the_grid_outside_the_image_is_left_out():
    coverage = (1.0, 0.75)
    expected = upscale(halves()[None], (128, 96), coverage)[0]
    torch.testing.assert_close(
        refine(halves(), torch.zeros(128, 96, 3), coverage), expected, atol=0.1, rtol=0
    )
    refined = refine(halves(), picture()[:, :96], coverage)
    assert torch.equal(refined.argmax(0) == 0, picture()[:, :96, 2] > 0.5)


def test_each_image_of_a_batch_guides_its_own_maps():
    maps = maps_of(torch.stack([halves(0.45), halves(0.7)]), CONCEPTS, (128, 128))
    images = torch.stack([picture(edge=0.45), picture(edge=0.7)])
    masks, boxes, points = cut(maps, "cat, dog", combine=False, image=images, refine=True)
    assert masks.shape == (4, 128, 128)
    assert len(boxes) == len(points) == 2
    assert torch.equal(masks[0].bool(), images[0, ..., 2] > 0.5)
    assert torch.equal(masks[2].bool(), images[1, ..., 2] > 0.5)
    assert torch.equal(masks[3], 1 - masks[2])
    assert [box[0]["width"] for box in boxes] == [58, 90]


def test_one_image_guides_the_maps_of_a_batch_and_the_maps_of_one_image_go_with_many():
    two = maps_of(halves().expand(2, -1, -1, -1), CONCEPTS, (128, 128))
    one = maps_of(halves()[None], CONCEPTS, (128, 128))
    image = picture()[None]
    alone = cut(one, image=image, refine=True)[0]
    assert torch.equal(cut(two, image=image, refine=True)[0], alone.expand(2, -1, -1))
    assert torch.equal(cut(one, image=image.expand(2, -1, -1, -1), refine=True)[0], alone.expand(2, -1, -1))


@pytest.mark.parametrize("method", METHODS[:3])
def test_every_method_and_option_cuts_the_refined_maps(method):
    maps = maps_of(halves()[None], CONCEPTS, (128, 128))
    truth = picture()[..., 2] > 0.5
    mask = cut(maps, method=method, image=picture()[None], refine=True)[0][0]
    assert iou(mask.bool(), truth) > 0.98
    soft = cut(maps, method=method, image=picture()[None], refine=True, soft=True)[0][0]
    torch.testing.assert_close(soft, refine(halves(), picture())[0] * mask)


def test_without_refine_an_image_gives_size_and_number_only():
    maps = maps_of(halves()[None], CONCEPTS, (128, 128))
    plain = concept_masks(maps, ["cat"], size=(200, 210))[0][0]
    assert torch.equal(cut(maps, image=torch.rand(3, 200, 210, 3))[0], plain.expand(3, -1, -1))


@pytest.mark.parametrize("combine", [False, True])
@pytest.mark.parametrize("images,frames", [(1, 1), (1, 3), (3, 1), (3, 3)])
def test_there_are_as_many_masks_boxes_and_points_with_refine_as_without(images, frames, combine):
    maps = maps_of(halves().expand(images, -1, -1, -1), CONCEPTS, (128, 128))
    image = picture().expand(frames, -1, -1, -1)
    for refine_ in (False, True):
        masks, boxes, points = cut(maps, "cat, dog", combine=combine, image=image, refine=refine_)
        assert len(masks) == max(images, frames) * (1 if combine else 2)
        assert len(boxes) == len(points) == max(images, frames)
        assert all(len(found) == 2 for found in boxes)


def test_refining_changes_neither_maps_nor_image():
    maps = maps_of(halves()[None], CONCEPTS, (128, 128))
    image = picture()[None]
    before = maps.values.clone(), image.clone()
    cut(maps, image=image, refine=True)
    assert torch.equal(maps.values, before[0])
    assert torch.equal(image, before[1])


def test_refining_needs_an_image():
    maps = maps_of(halves()[None], CONCEPTS, (128, 128))
    with pytest.raises(ValueError, match="needs the image whose edges it follows. Connect the image"):
        cut(maps, refine=True)
    with pytest.raises(ValueError, match="needs the image whose edges they follow. Connect the image"):
        ConceptSegmentation.execute(maps, unassigned_below=0.0, opacity=0.6, legend=True, refine=True)


@pytest.mark.parametrize("refine_", [False, True])
def test_an_image_that_does_not_belong_to_the_maps_is_an_error(refine_):
    maps = maps_of(halves().expand(2, -1, -1, -1), CONCEPTS, (128, 128))
    with pytest.raises(ValueError, match="3 images, but concept maps of 2"):
        cut(maps, image=picture().expand(3, -1, -1, -1), refine=refine_)
    with pytest.raises(ValueError, match="256 x 128 pixels.*128 x 128, which has another shape"):
        cut(maps, image=picture(128, 256)[None], refine=refine_)


def test_images_with_an_alpha_channel_can_guide():
    maps = maps_of(halves()[None], CONCEPTS, (128, 128))
    alpha = torch.cat([picture(), torch.rand(128, 128, 1)], -1)[None]
    assert torch.equal(
        cut(maps, image=alpha, refine=True)[0], cut(maps, image=picture()[None], refine=True)[0]
    )


def test_the_guided_filter_reproduces_what_is_linear_in_the_guide():
    guide = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    plane = 0.2 + 0.5 * guide[0] - 0.3 * guide[2]
    torch.testing.assert_close(guided_filter(guide, plane[None], 4, 1e-8)[0], plane, atol=1e-3, rtol=0)
