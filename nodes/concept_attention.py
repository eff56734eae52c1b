from __future__ import annotations

from comfy_api.latest import io

from ..core.observing.observe import observe
from .browser import live_maps
from .limits import within_limits
from .recorded import (
    background_input,
    probability_input,
    space_inputs,
    token_pooling_input,
    what_to_record,
)
from .search import DETECTION, EXPLANATION, HEATMAPS, MASKS, REGIONS, SEGMENTATION
from .types import CATEGORY


class ConceptAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptAttention",
            display_name="Concept Attention",
            category=CATEGORY,
            description=(
                "Records where each concept lives in the picture while a sampler paints it. The picture "
                "stays the same. Put it between the model and any sampler, and connect the sampler's "
                "LATENT to Concept Saliency."
            ),
            search_aliases=[*HEATMAPS, *EXPLANATION, *DETECTION, *MASKS, *REGIONS, *SEGMENTATION],
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip", tooltip="The text encoders of the same model."),
                io.String.Input(
                    "concepts",
                    multiline=True,
                    placeholder="dragon, rock, sky",
                    dynamic_prompts=False,
                    tooltip=(
                        "Things to find, one per line or separated by commas. They need not be in the "
                        "prompt. Name all that fills the picture: concepts compete for every patch."
                    ),
                ),
                background_input(),
                token_pooling_input(),
                io.String.Input(
                    "record_layers",
                    default="all",
                    advanced=True,
                    tooltip='Layers of the model to record: "all", "default", or numbers as in "0, 15-18".',
                ),
                *space_inputs(),
                io.Int.Input(
                    "record_every",
                    default=1,
                    min=1,
                    max=1000,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Record every so many evaluations of the model: 1 is every step, 2 every other step. "
                        "Each one that is recorded takes a little longer, and much longer when the model "
                        "does not fit on the GPU or is compiled."
                    ),
                ),
                probability_input(),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    dynamic_prompts=False,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "The sampler's prompt, for the space of probabilities: a concept that is a word of "
                        "it is read as that word. May stay empty: then each concept is one more word."
                    ),
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    @within_limits
    def execute(
        cls,
        model: io.Model.Type,
        clip: io.Clip.Type,
        concepts: str,
        background: str,
        token_pooling: str,
        record_layers: str,
        record_cross_attention: bool,
        record_value: bool,
        record_every: int = 1,
        record_probability: bool = False,
        prompt: str = "",
    ) -> io.NodeOutput:
        what = what_to_record(
            model,
            clip,
            concepts,
            background,
            token_pooling,
            record_layers,
            record_cross_attention,
            record_value,
            record_every,
            record_probability,
            prompt,
        )
        return io.NodeOutput(observe(model, what, listener=live_maps()))
