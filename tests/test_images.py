"""What every node says of an IMAGE that it cannot use."""

from __future__ import annotations

import folder_paths
import pytest
import torch
from torch import Tensor

from concept_attention.core.images import rgb_images
from concept_attention.core.reading.maps import ConceptMaps, concept_maps
from concept_attention.nodes.concept_attention_image import ConceptAttentionImage
from concept_attention.nodes.concept_figure import ConceptFigure
from concept_attention.nodes.concept_mask import ConceptMask
from concept_attention.nodes.concept_overlay import ConceptOverlay
from concept_attention.nodes.concept_segmentation import ConceptSegmentation
from concept_attention.nodes.concept_viewer import ConceptViewer
from recordings import recording
from tiny_flux import random_clip, random_flux


@pytest.fixture(autouse=True)
def _folders(monkeypatch, tmp_path):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))


@pytest.fixture(scope="module")
def maps() -> ConceptMaps:
    """Of one image of 64 x 96 pixels."""
    return concept_maps(recording())


class Encoder:
    """A VAE for any pixels."""

    def encode(self, pixels: Tensor) -> Tensor:
        return torch.zeros(len(pixels), 16, pixels.shape[1] // 8, pixels.shape[2] // 8)


def look(maps: ConceptMaps, image: Tensor) -> None:
    ConceptAttentionImage.execute(
        random_flux(),
        random_clip(),
        Encoder(),
        image,
        "cat, ball",
        background="",
        prompt="",
        noise={"noise": "level", "levels": "0.5"},
        samples=1,
        seed=0,
        token_pooling="mean of tokens",
        record_layers="0",
        record_cross_attention=False,
        record_value=False,
        average="after softmax",
        guidance=3.5,
        pooled_prompt=True,
    )


def mask(refine: bool):
    def execute(maps: ConceptMaps, image: Tensor) -> None:
        settings = {"soft": False, "fill_holes": True, "smallest_area": 0.01, "grow": 1, "feather": 1.0}
        method = {"method": "argmax"}
        ConceptMask.execute(maps, "", method, **settings, invert=False, refine=refine, image=image)

    return execute


def segmentation(refine: bool):
    def execute(maps: ConceptMaps, image: Tensor) -> None:
        ConceptSegmentation.execute(maps, 0.0, 0.6, legend=True, refine=refine, image=image)

    return execute


def overlay(maps: ConceptMaps, image: Tensor) -> None:
    ConceptOverlay.execute(maps, image, "", "magma", 0.6, "all concepts", contour=0.5, name=True)


def figure(maps: ConceptMaps, image: Tensor) -> None:
    ConceptFigure.execute(maps, {"layout": "concepts"}, "", "magma", 60, "none", "figure", image)


def viewer(maps: ConceptMaps, image: Tensor) -> None:
    ConceptViewer.execute(maps, 0.5, "", image)


NODES = {
    "Concept Attention (Image)": look,
    "Concept Mask": mask(refine=False),
    "Concept Mask, refined": mask(refine=True),
    "Concept Segmentation": segmentation(refine=False),
    "Concept Segmentation, refined": segmentation(refine=True),
    "Concept Overlay": overlay,
    "Concept Figure": figure,
    "Concept Viewer": viewer,
}


def photo(channels: int = 3, images: int = 1) -> Tensor:
    return torch.rand(images, 64, 96, channels, generator=torch.Generator().manual_seed(0))


def with_one(value: float) -> Tensor:
    image = photo()
    image[0, 5, 7, 1] = value
    return image


def no_image(shape: str) -> list[str]:
    return [f"has the shape {shape}", "(images, height, width, channels)", "3 channels of RGB or 4 of RGBA"]


UNUSABLE = {
    "grey": (photo(1), [*no_image("(1, 64, 96, 1)"), "Convert Mask to Image"]),
    "grey with alpha": (photo(2), [*no_image("(1, 64, 96, 2)"), "Convert Mask to Image"]),
    "no colours": (photo(0), no_image("(1, 64, 96, 0)")),
    "no pixels": (torch.zeros(1, 0, 0, 3), no_image("(1, 0, 0, 3)")),
    "no rows": (torch.zeros(1, 0, 96, 3), no_image("(1, 0, 96, 3)")),
    "no images": (torch.zeros(0, 64, 96, 3), no_image("(0, 64, 96, 3)")),
    "a single picture": (photo()[0], no_image("(64, 96, 3)")),
    "NaN": (torch.full((1, 64, 96, 3), torch.nan), ["1 of its 1 images have NaN or infinite", "--fp32-vae"]),
    "a NaN": (with_one(torch.nan), ["1 of its 1 images have NaN or infinite", "--fp32-vae"]),
    "an infinite value": (with_one(torch.inf), ["1 of its 1 images have NaN or infinite", "--fp32-vae"]),
}


@pytest.mark.parametrize("unusable", UNUSABLE)
@pytest.mark.parametrize("node", NODES)
def test_an_image_that_cannot_be_used_is_an_error_that_says_why(maps, node, unusable):
    image, parts = UNUSABLE[unusable]
    with pytest.raises(ValueError, match="This IMAGE cannot be used") as error:
        NODES[node](maps, image)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("node", NODES)
def test_every_node_takes_images_in_rgb_and_rgba(maps, node, channels):
    NODES[node](maps, photo(channels))


def test_the_images_with_nan_are_counted_and_the_first_is_named():
    images = photo(images=4)
    images[1], images[3, 0, 0, 0] = torch.nan, -torch.inf
    with pytest.raises(ValueError, match="2 of its 4 images .* first image 2\\."):
        rgb_images(images)


def test_what_lies_in_the_alpha_channel_does_not_matter():
    images = photo(4)
    images[..., 3] = torch.nan
    assert torch.equal(rgb_images(images), images[..., :3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8])
def test_images_may_be_of_any_precision(dtype):
    assert rgb_images(photo().to(dtype)).dtype == dtype
