from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import comfy.sampler_helpers
import pytest
import torch

import nodes
from concept_attention.core.concepts import Concepts
from concept_attention.core.reading.masks import concept_masks, parts
from concept_attention.nodes.concept_mask import ConceptMask
from recordings import maps_of

CONCEPTS = Concepts(("cat", "dog", "fish"), ("sky",))


def blob(plane: torch.Tensor, left: int, top: int, width: int, height: int, value: float = 1.0):
    plane[top : top + height, left : left + width] = value
    return plane


def scene():
    """Two images of 16 x 16 patches, 128 x 128 pixels. The first has a large cat, a small cat and a dog,
    the second a dog elsewhere; neither has a fish."""
    values = torch.full((2, 4, 16, 16), 0.01)
    blob(values[0, 0], 1, 2, 6, 4, 0.9)
    blob(values[0, 0], 12, 12, 2, 2, 0.8)
    blob(values[0, 1], 10, 3, 4, 4, 0.7)
    blob(values[1, 1], 2, 9, 4, 4, 0.7)
    values[:, 3] = 0.3
    return maps_of(values, CONCEPTS, (128, 128))


def cut(concept: str = "", image: torch.Tensor | None = None, maps=None, **options):
    settings = {
        "method": {"method": "argmax"},
        "soft": False,
        "fill_holes": True,
        "smallest_area": 0.0,
        "grow": 0,
        "feather": 0.0,
        "invert": False,
    }
    return ConceptMask.execute(
        scene() if maps is None else maps, concept, **settings | options, image=image
    ).args


def test_a_box_encloses_exactly_its_part():
    inside = torch.zeros(20, 30, dtype=torch.bool)
    inside[5:9, 7:18] = True
    inside[12, 10] = True
    large, small = parts("cat", inside, torch.rand(20, 30))
    assert large.box == (7, 5, 11, 4)
    assert small.box == (10, 12, 1, 1)
    assert small.peak == (10, 12)


def test_parts_that_touch_at_a_corner_are_one():
    inside = torch.eye(5, dtype=torch.bool)
    assert [part.box for part in parts("cat", inside, torch.rand(5, 5))] == [(0, 0, 5, 5)]


def test_parts_come_the_largest_first_whatever_their_height():
    inside = torch.zeros(10, 10)
    values = blob(blob(torch.zeros(10, 10), 0, 0, 2, 2, 1.0), 4, 4, 5, 5, 0.2)
    inside = values > 0
    assert [(part.box[2], round(part.score, 2)) for part in parts("cat", inside, values)] == [
        (5, 0.2),
        (2, 1.0),
    ]


def test_a_peak_is_where_the_map_is_highest_inside_its_own_part():
    values = torch.zeros(12, 12)
    blob(values, 1, 1, 4, 4, 0.5)[2, 3] = 0.9
    blob(values, 7, 7, 4, 4, 0.4)[10, 8] = 0.6
    first, second = parts("cat", values > 0, values)
    assert (first.peak, second.peak) == ((3, 2), (8, 10))
    assert (first.score, second.score) == pytest.approx((0.9, 0.6))


def test_a_higher_part_inside_the_box_of_another_does_not_move_its_peak():
    values = blob(blob(torch.zeros(20, 20), 0, 0, 20, 20, 0.4), 2, 2, 18, 18, 0.0)
    blob(values, 10, 10, 5, 5, 0.9)
    around, within = parts("cat", values > 0, values)
    assert within.box == (10, 10, 5, 5)
    assert around.score == pytest.approx(0.4)
    assert min(around.peak) < 2


def test_the_peak_of_a_plateau_is_its_middle():
    values = blob(torch.zeros(40, 40), 10, 20, 15, 9, 0.8)
    (part,) = parts("cat", values > 0, values)
    x, y = part.peak
    assert y == 24
    assert 14 <= x <= 20


def test_the_peak_of_a_ring_is_on_the_ring():
    values = blob(blob(torch.zeros(30, 30), 5, 5, 20, 20, 0.8), 10, 10, 10, 10, 0.0)
    (part,) = parts("cat", values > 0, values)
    assert values[part.peak[1], part.peak[0]] > 0


def test_boxes_are_listed_for_each_image_and_masks_image_by_image():
    masks, boxes, points = cut("dog, cat", combine=False)
    assert masks.shape == (4, 128, 128)
    assert [[box["label"] for box in image] for image in boxes] == [["dog", "cat", "cat"], ["dog"]]
    first_dog, first_cat, second_dog, second_cat = masks
    assert first_dog[40, 96] == first_cat[32, 32] == second_dog[88, 32] == 1
    assert not second_cat.any()
    assert [len(json.loads(text)) for text in points] == [3, 1]


def test_every_box_holds_its_point_and_touches_the_mask_on_all_sides():
    masks, boxes, points = cut("dog")
    for mask, (box,), text in zip(masks, boxes, points, strict=True):
        x, y, width, height = (box[key] for key in ("x", "y", "width", "height"))
        inside = mask[y : y + height, x : x + width]
        assert inside.sum() == mask.sum()
        assert all(side.any() for side in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
        (point,) = json.loads(text)
        assert mask[point["y"], point["x"]] == 1


def test_boxes_are_in_pixels_of_the_image_that_gives_the_size():
    image = torch.zeros(1, 500, 460, 3)
    masks, boxes, _ = cut("dog", image=image)
    small = cut("dog")[1][1][0]
    (large,) = boxes[1]
    assert masks.shape == (2, 500, 460)
    for key, factor in (("x", 460 / 128), ("width", 460 / 128), ("y", 500 / 128), ("height", 500 / 128)):
        assert large[key] == pytest.approx(factor * small[key], abs=2 * factor)


def test_small_parts_get_no_box():
    assert len(cut("cat")[1][0]) == 2
    assert len(cut("cat", smallest_area=0.03)[1][0]) == 1


def test_boxes_are_those_of_the_concept_before_it_is_inverted_and_feathered():
    assert cut("cat", invert=True, feather=9.0)[1:] == cut("cat")[1:]


def test_boxes_hold_plain_numbers():
    _, boxes, _ = cut("cat")
    assert {type(v) for box in boxes[0] for v in box.values()} <= {int, float, str}
    assert json.loads(json.dumps(boxes)) == boxes


@pytest.mark.parametrize("combine", [False, True])
def test_nothing_found_is_no_mask_no_box_and_a_warning(caplog, combine):
    with caplog.at_level(logging.WARNING):
        masks, boxes, points = cut("FISH, dog", combine=combine)
    assert caplog.messages == ['Concept Mask found no "fish".']
    dog = cut("dog")[0]
    if combine:
        assert torch.equal(masks, dog)
    else:
        assert not masks[0::2].any()
        assert torch.equal(masks[1::2], dog)
    assert [len(image) for image in boxes] == [len(json.loads(text)) for text in points] == [1, 1]
    assert not cut("fish")[0].any()
    assert cut("fish")[1:] == ([[], []], ["[]", "[]"])


def test_without_a_name_every_concept_but_no_background_is_cut():
    masks, boxes, _ = cut(combine=False)
    assert len(masks) == 2 * len(CONCEPTS.names)
    assert torch.equal(cut()[0], masks.unflatten(0, (2, -1)).amax(1))
    assert not cut()[0].all()
    assert {box["label"] for image in boxes for box in image} == {"cat", "dog"}


def test_by_default_each_image_has_one_mask_of_all_the_concepts_named():
    masks, boxes, points = cut("dog, cat")
    _, *apart = cut("dog, cat", combine=False)
    assert masks.shape == (2, 128, 128)
    assert masks[0, 40, 96] == masks[0, 32, 32] == masks[1, 88, 32] == 1
    assert masks[0, 120, 8] == 0
    assert [boxes, points] == apart


def test_comfyuis_inpainting_nodes_repaint_every_concept_named():
    """They take one mask for each image: of more, the one cuts off the rest and the other stops."""
    masks = cut("dog, cat")[0]
    latent = {"samples": torch.zeros(2, 16, 16, 16)}
    noise_mask = nodes.SetLatentNoiseMask().set_mask(latent, masks)[0]["noise_mask"]
    prepared = comfy.sampler_helpers.prepare_mask(noise_mask, (2, 16, 16, 16), torch.device("cpu"))
    shrunk = torch.nn.functional.interpolate(masks[:, None], (16, 16), mode="bilinear")
    assert torch.equal(prepared[:, :1], shrunk)

    class VAE:
        def spacial_compression_encode(self) -> int:
            return 8

        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            self.seen = pixels
            return torch.zeros(len(pixels), 16, 16, 16)

    vae = VAE()
    encoded = nodes.VAEEncodeForInpaint().encode(vae, torch.ones(2, 128, 128, 3), masks, grow_mask_by=0)[0]
    assert torch.equal(encoded["noise_mask"][:, 0], masks)
    assert torch.equal(vae.seen[..., 0] == 0.5, masks == 1)


def test_all_concepts_at_once_are_what_each_is_alone():
    together, found = concept_masks(scene(), ["cat", "sky"], fill_holes=True, grow=2)
    for i, name in enumerate(("cat", "sky")):
        alone, parts_alone = concept_masks(scene(), [name], fill_holes=True, grow=2)
        assert torch.equal(together[:, i], alone[:, 0])
        assert [p for p in found[0] if p.concept == name] == parts_alone[0]


@pytest.fixture
def sam3(monkeypatch):
    """SAM3 Detect with a model that only notes its prompts."""
    nodes = pytest.importorskip("comfy_extras.nodes_sam3")
    prompts = []

    class Model:
        def forward_segment(self, frame, **prompt):
            prompts.append(prompt)
            return torch.zeros(1, 1, 8, 8)

    monkeypatch.setattr(nodes.comfy.model_management, "load_model_gpu", lambda model: None)
    model = SimpleNamespace(model=SimpleNamespace(get_dtype=lambda: torch.float32, diffusion_model=Model()))

    def detect(**inputs):
        image = torch.zeros(2, 128, 128, 3)
        nodes.SAM3_Detect.execute(model, image, refine_iterations=1, **inputs)
        return prompts

    return detect


def test_sam3_takes_the_boxes_image_by_image(sam3):
    prompts = sam3(bboxes=cut("cat, dog")[1])
    corners = [p["box_inputs"][0] / 1008 * 128 for p in prompts]
    assert len(corners) == 4  # two cats and a dog, then a dog
    for corner, box in zip(corners, (box for image in cut("cat, dog")[1] for box in image), strict=True):
        expected = [box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"]]
        torch.testing.assert_close(corner.flatten(), torch.tensor(expected).float())


def test_sam3_takes_the_points(sam3):
    points = cut("cat")[2][0]
    given = sam3(positive_coords=points)[0]["point_inputs"]
    expected = torch.tensor([[p["x"], p["y"]] for p in json.loads(points)]).float()
    torch.testing.assert_close(given["point_coords"][0] / 1008 * 128, expected)
    assert given["point_labels"].tolist() == [[1, 1]]
