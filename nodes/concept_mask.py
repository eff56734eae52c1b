from __future__ import annotations

import json
import logging

import torch
from comfy_api.latest import io

from ..core.concepts import split_names
from ..core.drawing.render import images_of
from ..core.reading.masks import concept_masks
from .limits import within_limits
from .search import DETECTION, MASKS, REGIONS, SEGMENTATION
from .types import CATEGORY, ConceptMapsType


class ConceptMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptMask",
            display_name="Concept Mask",
            category=CATEGORY,
            description="Cuts a mask for inpainting, compositing or conditioning out of concept maps.",
            search_aliases=[
                "mask from attention",
                "inpaint mask",
                *MASKS,
                *DETECTION,
                *REGIONS,
                *SEGMENTATION,
            ],
            inputs=[
                ConceptMapsType.Input("maps"),
                io.String.Input(
                    "concept",
                    default="",
                    dynamic_prompts=False,
                    tooltip=(
                        "The name of a concept, or several separated by commas. "
                        "Empty: every concept in the order of the list."
                    ),
                ),
                io.Boolean.Input(
                    "combine",
                    default=True,
                    tooltip=(
                        "One mask for each image: of all these concepts together. Off: one mask for each "
                        "concept."
                    ),
                ),
                io.DynamicCombo.Input(
                    "method",
                    options=[
                        io.DynamicCombo.Option("argmax", []),
                        io.DynamicCombo.Option("mean", []),
                        io.DynamicCombo.Option("otsu", []),
                        io.DynamicCombo.Option(
                            "fixed",
                            [io.Float.Input("threshold", default=0.5, min=0.0, max=1.0, step=0.01)],
                        ),
                        io.DynamicCombo.Option(
                            "top fraction",
                            [io.Float.Input("fraction", default=0.1, min=0.0, max=1.0, step=0.01)],
                        ),
                    ],
                    tooltip=(
                        "argmax: where the concept wins over all others, background included. "
                        "mean: above the map's mean, as in the paper. otsu: above the threshold that parts "
                        "the map best. fixed: above a value. top fraction: the highest part of the image. A "
                        "video has one threshold for all its frames."
                    ),
                ),
                io.Boolean.Input(
                    "soft",
                    default=False,
                    tooltip="Inside the mask, keep the map's values instead of 1.",
                ),
                io.Boolean.Input(
                    "fill_holes",
                    default=False,
                    tooltip="Include what the mask encloses; of a video, in each frame.",
                ),
                io.Float.Input(
                    "smallest_area",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip=(
                        "Drop connected parts smaller than this share of the image. In a video parts go on "
                        "from frame to frame, and the share is of all frames: what is there only briefly is "
                        "dropped too."
                    ),
                ),
                io.Int.Input("grow", default=0, min=-512, max=512, tooltip="In pixels; negative shrinks."),
                io.Float.Input(
                    "feather",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.5,
                    tooltip=(
                        "Blurs the edge: the standard deviation of a Gaussian, in pixels. The edge becomes "
                        "soft for about three times as far on each side."
                    ),
                ),
                io.Boolean.Input("invert", default=False),
                io.Boolean.Input(
                    "refine",
                    default=False,
                    tooltip=(
                        "Let the mask follow the edges of the image, finer than patches of 16 pixels "
                        "(a guided filter). Needs the image."
                    ),
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip=(
                        "The sampled image, at any scale. Gives the mask its size, and with refine its "
                        "edges. Without it: the size of the sampled image."
                    ),
                ),
            ],
            outputs=[
                io.Mask.Output(
                    tooltip=(
                        "For each image, one mask. With combine off, one per concept, in the order of the "
                        "list."
                    )
                ),
                io.BoundingBox.Output(
                    display_name="boxes",
                    tooltip=(
                        "For each image, the boxes of each concept's connected parts, the largest first, "
                        "before feather and invert. For the bboxes of SAM3 Detect."
                    ),
                ),
                io.String.Output(
                    display_name="points",
                    is_output_list=True,
                    tooltip=(
                        "For each image, the peak of the concept's map in every box, as JSON. "
                        "For the positive_coords of SAM3 Detect."
                    ),
                ),
            ],
        )

    @classmethod
    @within_limits
    def execute(
        cls,
        maps: ConceptMapsType.Type,
        concept: str,
        method: dict,
        soft: bool,
        fill_holes: bool,
        smallest_area: float,
        grow: int,
        feather: float,
        invert: bool,
        combine: bool = True,
        refine: bool = False,
        image: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        if refine and image is None:
            raise ValueError(
                "To refine a mask, Concept Mask needs the image whose edges it follows. Connect the image "
                "decoded from the LATENT that the maps belong to, or switch refine off."
            )
        names = split_names(concept) or maps.concepts.names
        if image is not None:
            image = images_of(maps, image)
        masks, found = concept_masks(
            maps,
            names,
            combine=combine,
            count=None if image is None else len(image),
            size=None if image is None else tuple(image.shape[1:3]),
            guide=image if refine else None,
            method=method["method"],
            threshold=method.get("threshold", method.get("fraction", 0.5)),
            soft=soft,
            fill_holes=fill_holes,
            smallest_area=smallest_area,
            grow=grow,
            feather=feather,
            invert=invert,
        )
        missing = {maps.index(name) for name in names}
        missing -= {maps.index(part.concept) for parts in found for part in parts}
        for index in sorted(missing):
            logging.warning('Concept Mask found no "%s".', maps.concepts.all[index])
        boxes = [
            [
                dict(zip(("x", "y", "width", "height"), part.box, strict=True))
                | {"label": part.concept, "score": part.score}
                for part in parts
            ]
            for parts in found
        ]
        points = [json.dumps([{"x": x, "y": y} for x, y in (part.peak for part in parts)]) for parts in found]
        # For the page, which offers them to pick from.
        return io.NodeOutput(masks.flatten(0, 1), boxes, points, ui={"concepts": maps.concepts.all})
