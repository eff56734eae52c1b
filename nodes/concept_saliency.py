from __future__ import annotations

import logging

from comfy_api.latest import io

from ..core.drawing.render import heatmap_images, heatmap_size
from ..core.observing.latents import recording_of
from ..core.observing.recording import AVERAGES, parse_layers
from ..core.reading.maps import BETWEEN_FRAMES, GROUNDINGS, ConceptMaps, concept_maps, upscale
from .limits import within_limits
from .search import EXPLANATION, HEATMAPS
from .types import CATEGORY, ConceptMapsType

DEFAULT_SPACE = "default"


class ConceptSaliency(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptSaliency",
            display_name="Concept Saliency",
            category=CATEGORY,
            description=(
                "Turns what Concept Attention recorded into one saliency map per concept. Changing "
                "anything here does not sample again."
            ),
            search_aliases=[*HEATMAPS, *EXPLANATION],
            inputs=[
                io.MultiType.Input(
                    "latent",
                    [io.Latent, ConceptMapsType],
                    tooltip=(
                        "From a sampler whose model went through Concept Attention, or from Concept "
                        "Attention (Image); images may be picked from it or batched on the way. Or concept "
                        "maps that were loaded: their recording is read anew."
                    ),
                ),
                io.Combo.Input(
                    "space",
                    options=[DEFAULT_SPACE, "output", "cross-attention", "value", "query-key", "probability"],
                    advanced=True,
                    tooltip=(
                        'Where concepts and patches are compared. "default" is output, the paper\'s and the '
                        "sharpest, or probability in models whose picture only reads the text (Stable "
                        "Diffusion 1, 2 and XL, Wan). Switch the others on in Concept Attention."
                    ),
                ),
                io.String.Input(
                    "layers",
                    default="default",
                    tooltip=(
                        '"default" (which ones depends on the model), "all", or numbers as in "0, 15-18".'
                    ),
                ),
                io.Int.Input(
                    "start_step", default=0, min=0, max=10000, tooltip="First sampling step to take in."
                ),
                io.Int.Input(
                    "end_step", default=10000, min=0, max=10000, tooltip="The step before which to stop."
                ),
                io.Boolean.Input(
                    "softmax",
                    default=True,
                    tooltip="Concepts compete for every patch. Off: raw scores, scaled to 0..1 together.",
                ),
                io.Float.Input(
                    "temperature",
                    default=1.0,
                    min=0.01,
                    max=1000.0,
                    step=0.1,
                    advanced=True,
                    tooltip="Of the softmax: above 1 softer, below 1 harder.",
                ),
                io.Combo.Input(
                    "grounding",
                    options=list(GROUNDINGS),
                    advanced=True,
                    tooltip=(
                        "Anchor propagation keeps concepts that look alike apart, such as a red car and a "
                        "blue car side by side: each is spread from the patch where it is strongest. Needs "
                        "the softmax."
                    ),
                ),
                io.Boolean.Input(
                    "names",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="Write the names of the concepts into the heatmaps.",
                ),
                io.Combo.Input(
                    "average",
                    options=list(AVERAGES),
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Of several layers and steps: the mean of their maps, as in the paper, or the "
                        "softmax of their mean scores, which the paper's code has for Flux.2, at a "
                        "temperature of 1000."
                    ),
                ),
                io.Combo.Input(
                    "between_frames",
                    options=list(BETWEEN_FRAMES),
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Of a video, most models see several frames as one. linear: what they show moves "
                        "evenly from one map to the next. hold: they all show the same map."
                    ),
                ),
            ],
            outputs=saliency_outputs(),
        )

    @classmethod
    @within_limits
    def execute(
        cls,
        latent: io.Latent.Type | ConceptMaps,
        space: str,
        layers: str,
        start_step: int,
        end_step: int,
        softmax: bool,
        temperature: float,
        grounding: str = GROUNDINGS[0],
        names: bool = True,
        average: str = AVERAGES[0],
        between_frames: str = BETWEEN_FRAMES[0],
    ) -> io.NodeOutput:
        recording = latent.recording if isinstance(latent, ConceptMaps) else recording_of(latent)
        chosen = parse_layers(layers, recording.layers, recording.default_layers, recording.left_out)
        maps = concept_maps(
            recording,
            space=None if space == DEFAULT_SPACE else space,
            layers=chosen,
            steps=range(start_step, end_step),
            softmax=softmax,
            temperature=temperature,
            grounding=grounding,
            average=average,
            between_frames=between_frames,
        )
        return saliency(maps, names, "Concept Saliency")


def saliency(maps: ConceptMaps, names: bool, node: str) -> io.NodeOutput:
    """What both saliency nodes give: maps, masks and heatmaps.

    Args:
        names: whether heatmaps have the concepts' names in them.
        node: its name.
    """
    concepts = maps.concepts.names
    shown = maps.shown()[:, :, : len(concepts)]
    values, frames = shown.flatten(0, 1), shown.shape[1]
    masks = upscale(values, maps.image_size, maps.coverage)
    size = heatmap_size(maps)
    if size != maps.image_size:
        logging.info(
            "%s: heatmaps of %d x %d pixels, as %d of the video's %d x %d would fill the memory. Concept "
            "Overlay makes those of single concepts at any size.",
            node,
            *size[::-1],
            len(values) * len(concepts),
            *maps.image_size[::-1],
        )
    smaller = masks if size == maps.image_size else upscale(values, size, maps.coverage)
    heatmaps = heatmap_images(smaller, concepts if names else (), frames)
    return io.NodeOutput(maps, masks.flatten(0, 1), heatmaps.flatten(0, 1))


def saliency_outputs() -> list[io.Output]:
    return [
        ConceptMapsType.Output(display_name="maps"),
        io.Mask.Output(
            display_name="masks",
            tooltip=(
                "Soft masks: for each image or frame of a video, one per concept in the order of the list."
            ),
        ),
        io.Image.Output(
            display_name="heatmaps",
            tooltip=(
                "For each image or frame, one per concept, all of an image or video on one scale from 0 to "
                "the highest value."
            ),
        ),
    ]
