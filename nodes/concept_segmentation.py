from __future__ import annotations

import logging

import torch
from comfy_api.latest import io

from ..core.drawing.render import images_of, segmentation_images
from ..core.reading.masks import label_masks, segment
from .limits import within_limits
from .search import MASKS, SEGMENTATION
from .types import CATEGORY, ConceptMapsType


class ConceptSegmentation(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptSegmentation",
            display_name="Concept Segmentation",
            category=CATEGORY,
            description="Gives every pixel to the concept that wins there: a coloured picture, and masks.",
            search_aliases=["argmax", "label map", "legend", *SEGMENTATION, *MASKS],
            inputs=[
                ConceptMapsType.Input("maps"),
                io.Image.Input(
                    "image", optional=True, tooltip="To colour, at any scale. Without it: colours on black."
                ),
                io.Float.Input(
                    "unassigned_below",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Where even the highest map is below this value, no concept wins.",
                ),
                io.Float.Input("opacity", default=0.6, min=0.0, max=1.0, step=0.05),
                io.Boolean.Input(
                    "legend", default=True, tooltip="Names, colours and areas, beside the picture."
                ),
                io.Boolean.Input(
                    "refine",
                    default=False,
                    tooltip=(
                        "Let borders follow the edges of the image, finer than patches of 16 pixels (a "
                        "guided filter). Needs the image."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(tooltip="Background concepts compete, but are left clear."),
                io.Mask.Output(tooltip="For each image, one mask per concept, in the order of the list."),
            ],
        )

    @classmethod
    @within_limits
    def execute(
        cls,
        maps: ConceptMapsType.Type,
        unassigned_below: float,
        opacity: float,
        legend: bool,
        refine: bool = False,
        image: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        if refine and image is None:
            raise ValueError(
                "To refine its borders, Concept Segmentation needs the image whose edges they follow. "
                "Connect the image decoded from the LATENT that the maps belong to, or switch refine off."
            )
        names = maps.concepts.names
        if image is None:
            labels = segment(maps, floor=unassigned_below)
        else:
            image = images_of(maps, image)
            guide, size = image if refine else None, tuple(image.shape[1:3])
            labels = segment(maps, size, unassigned_below, guide, len(image))
        masks = label_masks(labels, len(names))
        for name, found in zip(names, masks.any(3).any(2).any(0), strict=True):
            if not found:
                logging.warning('Concept Segmentation found no "%s": its masks are empty.', name)
        pictures = segmentation_images(labels, names, image, opacity=opacity, legend=legend)
        return io.NodeOutput(pictures, masks.flatten(0, 1))
