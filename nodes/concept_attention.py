from __future__ import annotations

import logging

from comfy_api.latest import io

from ..core.architectures import family_of
from ..core.concepts import POOLINGS, encode_concepts, parse_concepts, split_names
from ..core.observe import observe
from ..core.recording import parse_layers
from .browser import live_maps
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
            search_aliases=[
                "concept attention",
                "saliency",
                "heatmap",
                "attention map",
                "where is",
                "interpretability",
                "segmentation",
                "DAAM",
            ],
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
                io.String.Input(
                    "background",
                    default="background",
                    dynamic_prompts=False,
                    tooltip="Concepts that compete as well, but get no map of their own.",
                ),
                io.Combo.Input(
                    "token_pooling",
                    options=list(POOLINGS),
                    advanced=True,
                    tooltip=(
                        "How a concept of several tokens becomes one. The paper's reference takes the "
                        'first token, which for "hot air balloon" is "hot".'
                    ),
                ),
                io.String.Input(
                    "record_layers",
                    default="all",
                    advanced=True,
                    tooltip='Double-stream blocks to record: "all", "default", or numbers as in "0, 15-18".',
                ),
                io.Boolean.Input(
                    "record_cross_attention",
                    default=False,
                    advanced=True,
                    tooltip="Also record the space of queries, to compare with the output space.",
                ),
                io.Boolean.Input(
                    "record_value",
                    default=False,
                    advanced=True,
                    tooltip="Also record the space of values, to compare with the output space.",
                ),
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
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
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
    ) -> io.NodeOutput:
        diffusion_model = model.get_model_object("diffusion_model")
        family = family_of(diffusion_model)
        parsed = parse_concepts(concepts, background)
        if parsed.background != split_names(background):
            logging.info("Concept Attention: competing as background: %s", ", ".join(parsed.background))
        layers = parse_layers(
            record_layers,
            available=range(family.depth(diffusion_model)),
            default=family.default_layers(diffusion_model),
        )
        spaces = ["output"]
        if record_cross_attention:
            spaces.append("cross-attention")
        if record_value:
            spaces.append("value")
        tokens = encode_concepts(clip, parsed.all, token_pooling, family.token_width(diffusion_model))
        listener = live_maps(cls.hidden.unique_id) if cls.hidden else None
        observed = observe(
            model, parsed, tokens, layers=layers, spaces=spaces, listener=listener, every=record_every
        )
        return io.NodeOutput(observed)
