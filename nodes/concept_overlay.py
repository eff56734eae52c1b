from __future__ import annotations

import torch
from comfy_api.latest import io

from ..core.concepts import split_names
from ..core.drawing.render import COLOUR_MAPS, overlay_images
from .limits import within_limits
from .progress import progress_bar
from .search import HEATMAPS
from .types import CATEGORY, ConceptMapsType


class ConceptOverlay(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptOverlay",
            display_name="Concept Overlay",
            category=CATEGORY,
            description="Lays concept maps over the image in colours.",
            search_aliases=["overlay", "contour", *HEATMAPS],
            inputs=[
                ConceptMapsType.Input("maps"),
                io.Image.Input("image", tooltip="The image that the maps are of, at any scale."),
                io.String.Input(
                    "concept",
                    default="",
                    dynamic_prompts=False,
                    tooltip=(
                        "The name of a concept, or several separated by commas: one picture for each. "
                        "Empty: every concept in the order of the list."
                    ),
                ),
                io.Combo.Input("colour_map", options=list(COLOUR_MAPS)),
                io.Float.Input("opacity", default=0.6, min=0.0, max=1.0, step=0.05),
                io.Combo.Input(
                    "scale",
                    options=["all concepts", "each concept"],
                    tooltip=(
                        "What the brightest colour stands for: the highest value that any concept has in the "
                        "image, so that an absent concept looks absent, or that of each concept itself."
                    ),
                ),
                io.Float.Input(
                    "contour",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Draws a line at this share of the scale. 0 draws none.",
                ),
                io.Boolean.Input("name", default=True, tooltip="Write the concept's name into the picture."),
            ],
            outputs=[
                io.Image.Output(tooltip="For each image, one picture per concept, in the order of the list.")
            ],
        )

    @classmethod
    @within_limits
    def execute(
        cls,
        maps: ConceptMapsType.Type,
        image: torch.Tensor,
        concept: str,
        colour_map: str,
        opacity: float,
        scale: str,
        contour: float,
        name: bool,
    ) -> io.NodeOutput:
        pictures = overlay_images(
            maps,
            image,
            split_names(concept) or maps.concepts.names,
            colour_map=colour_map,
            opacity=opacity,
            shared_scale=scale == "all concepts",
            contour=contour,
            label=name,
            progress=progress_bar(),
        )
        return io.NodeOutput(pictures.flatten(0, 1))
