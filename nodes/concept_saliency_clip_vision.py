from __future__ import annotations

import logging

import torch
from comfy_api.latest import io

from ..core.concepts import parse_concepts, split_names
from ..core.explaining.clip import METHODS, explain
from ..core.reading.maps import concept_maps
from .concept_saliency import saliency, saliency_outputs
from .limits import within_limits
from .recorded import background_input
from .search import DETECTION, EXPLANATION, HEATMAPS
from .types import CATEGORY


class ConceptSaliencyClipVision(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptSaliencyClipVision",
            display_name="Concept Saliency (CLIP Vision)",
            category=CATEGORY,
            description=(
                "Shows where in a picture CLIP sees each concept, by methods that explain vision "
                "transformers, to lay beside the maps of Concept Saliency."
            ),
            search_aliases=[
                *("TextSpan", "GradCAM", "LRP", "TransInterp", "attention rollout", "image text similarity"),
                *HEATMAPS,
                *EXPLANATION,
                *DETECTION,
            ],
            inputs=[
                io.ClipVision.Input(
                    "clip_vision", tooltip="A CLIP with a projection: ViT-L/14, ViT-H/14 or ViT-bigG/14."
                ),
                io.Clip.Input(
                    "clip",
                    tooltip=(
                        "The text encoder of the same CLIP: clip_l for ViT-L/14, that of Stable Diffusion 2 "
                        "for ViT-H/14, clip_g for ViT-bigG/14. It may have others beside it. Its file needs "
                        "its text_projection."
                    ),
                ),
                io.Image.Input("image", tooltip="Any size. A batch, or the frames of a video, one by one."),
                io.String.Input(
                    "concepts",
                    multiline=True,
                    placeholder="dragon, rock, sky",
                    dynamic_prompts=False,
                    tooltip="Things to find, one per line or separated by commas.",
                ),
                background_input(),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    tooltip=(
                        "How the likeness of picture and concept is traced back to patches. textspan adds up "
                        "what each patch says through all heads; transinterp, attention relevance, gradcam, "
                        "lrp and partial lrp follow gradients or relevance backward; rollout and raw "
                        "attention know no concepts, and give all of them one map."
                    ),
                ),
                io.Boolean.Input(
                    "names",
                    default=True,
                    advanced=True,
                    tooltip="Write the names of the concepts into the heatmaps.",
                ),
            ],
            outputs=saliency_outputs(),
        )

    @classmethod
    @within_limits
    def execute(
        cls,
        clip_vision: io.ClipVision.Type,
        clip: io.Clip.Type,
        image: torch.Tensor,
        concepts: str,
        background: str,
        method: str,
        names: bool = True,
    ) -> io.NodeOutput:
        parsed = parse_concepts(concepts, background)
        if parsed.background != split_names(background):
            logging.info(
                "Concept Saliency (CLIP Vision): competing as background: %s", ", ".join(parsed.background)
            )
        recording = explain(clip_vision, clip, image, parsed, method)
        return saliency(concept_maps(recording, softmax=False), names, "Concept Saliency (CLIP Vision)")
