from __future__ import annotations

import torch
from comfy_api.latest import io

from ..core.architectures import family_of
from ..core.observing.image import (
    LEVEL,
    encode_images,
    frames_in_one,
    observe_image,
    parse_levels,
    patch_pixels,
    step_levels,
)
from ..core.observing.latents import remember
from ..core.observing.recording import AVERAGES
from .limits import within_limits
from .recorded import (
    background_input,
    probability_input,
    space_inputs,
    token_pooling_input,
    what_to_record,
)
from .search import DETECTION, EXPLANATION, HEATMAPS, MASKS, SEGMENTATION
from .types import CATEGORY


class ConceptAttentionImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptAttentionImage",
            display_name="Concept Attention (Image)",
            category=CATEGORY,
            description=(
                "Finds concepts in a picture that you already have. The model looks at it once, through some "
                "noise, and nothing is painted. Connect the LATENT to Concept Saliency."
            ),
            search_aliases=[
                "existing image",
                "encode image",
                *HEATMAPS,
                *EXPLANATION,
                *DETECTION,
                *MASKS,
                *SEGMENTATION,
            ],
            inputs=[
                io.Model.Input("model", tooltip="Without Concept Attention: it is not sampled."),
                io.Clip.Input("clip", tooltip="The text encoders of the same model."),
                io.Vae.Input("vae", tooltip="The VAE of the same model."),
                io.Image.Input(
                    "image",
                    tooltip="Any size. A batch is looked at image by image, by a video model as one video.",
                ),
                io.String.Input(
                    "concepts",
                    multiline=True,
                    placeholder="dragon, rock, sky",
                    dynamic_prompts=False,
                    tooltip=(
                        "Things to find, one per line or separated by commas. Name all that fills the "
                        "picture: concepts compete for every patch."
                    ),
                ),
                background_input(),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    placeholder="what the picture shows (optional)",
                    tooltip="What the picture shows. It may stay empty.",
                ),
                io.DynamicCombo.Input(
                    "noise",
                    options=[
                        io.DynamicCombo.Option(
                            "level",
                            [
                                io.String.Input(
                                    "levels",
                                    default=f"{LEVEL:g}",
                                    tooltip=(
                                        "From 0, the picture as it is, to 1, noise only. Several, as in "
                                        '"0.3, 0.5, 0.7", are averaged; each takes a pass of the model.'
                                    ),
                                )
                            ],
                        ),
                        io.DynamicCombo.Option(
                            "step",
                            [
                                io.String.Input(
                                    "steps",
                                    default="2",
                                    tooltip=(
                                        "The noise that is left when this step of a schedule begins. Step 0 "
                                        'is noise only. Several, as in "1, 2", are averaged.'
                                    ),
                                ),
                                io.Int.Input(
                                    "of", default=4, min=1, max=1000, tooltip="How many steps it has."
                                ),
                            ],
                        ),
                    ],
                    tooltip=(
                        "How much noise the model sees the picture through: as a level, or as a step of a "
                        "schedule like in the paper's reference: step 2 of 4, and 3 of 4 for segmentation."
                    ),
                ),
                io.Int.Input(
                    "samples",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Noise samples per level, averaged: steadier maps for more time.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Of the noise.",
                ),
                token_pooling_input(),
                io.String.Input(
                    "record_layers",
                    default="default",
                    advanced=True,
                    tooltip=(
                        'Layers of the model to record: "default" (which ones depends on the model), "all", '
                        'or numbers as in "0, 15-18". The model stops after the last of them.'
                    ),
                ),
                *space_inputs(),
                io.Combo.Input(
                    "average",
                    options=list(AVERAGES),
                    advanced=True,
                    tooltip="Of several levels and samples: the mean of their maps, or of their raw scores.",
                ),
                io.Float.Input(
                    "guidance",
                    default=3.5,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    advanced=True,
                    tooltip=(
                        "For models that take a guidance value, such as Flux.1 dev, Flux.2 dev and "
                        "HunyuanVideo; others ignore it. 3.5 is usual for Flux.1 dev. The reference uses 0."
                    ),
                ),
                io.Boolean.Input(
                    "pooled_prompt",
                    default=True,
                    advanced=True,
                    tooltip="Give the model the prompt's CLIP vector too. The reference leaves it out.",
                ),
                probability_input(),
            ],
            outputs=[
                io.Latent.Output(tooltip="The encoded picture, with its recording, for Concept Saliency.")
            ],
        )

    @classmethod
    @within_limits
    def execute(
        cls,
        model: io.Model.Type,
        clip: io.Clip.Type,
        vae: io.Vae.Type,
        image: torch.Tensor,
        concepts: str,
        background: str,
        prompt: str,
        noise: dict,
        samples: int,
        seed: int,
        token_pooling: str,
        record_layers: str,
        record_cross_attention: bool,
        record_value: bool,
        average: str,
        guidance: float,
        pooled_prompt: bool,
        record_probability: bool = False,
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
            record_probability=record_probability,
            prompt=prompt,
        )
        if noise["noise"] == "step":
            levels = step_levels(model, noise["steps"], noise["of"])
        else:
            levels = parse_levels(noise["levels"])
        # Others may take it for what they were not trained on: Chroma for one is always given 0.
        added = (
            {"guidance": guidance} if family_of(model.get_model_object("diffusion_model")).guidance else {}
        )
        conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(prompt), add_dict=added)
        frame_length = frames_in_one(model)
        latent = encode_images(vae, image, patch_pixels(model), frame_length)
        is_video = frame_length is not None and latent.ndim == 5
        recording = observe_image(
            model,
            what,
            latent,
            conditioning,
            image_size=tuple(image.shape[1:3]),
            levels=levels,
            samples=samples,
            seed=seed,
            pooled_prompt=pooled_prompt,
            average=average,
            frames=len(image) if is_video else None,
        )
        remember(latent, recording)
        return io.NodeOutput({"samples": latent})
