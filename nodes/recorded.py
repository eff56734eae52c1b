"""What both nodes that record ask for: widgets, and what is made of them."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..core.architectures import family_of
from ..core.concepts import (
    POOLINGS,
    encode_concepts,
    parse_concepts,
    split_names,
)
from ..core.observing.observe import WhatToRecord
from ..core.observing.readers import reading_of
from ..core.observing.recording import parse_layers


def background_input() -> io.String.Input:
    return io.String.Input(
        "background",
        default="background",
        dynamic_prompts=False,
        tooltip="Concepts that compete as well, but get no map of their own.",
    )


def token_pooling_input() -> io.Combo.Input:
    return io.Combo.Input(
        "token_pooling",
        options=list(POOLINGS),
        advanced=True,
        tooltip=(
            'How a concept of several tokens becomes one. "automatic" is the last token where the text '
            "encoder reads forward only, as language models do, and the mean of tokens elsewhere. The "
            'paper\'s reference takes the first token, which for "hot air balloon" is "hot".'
        ),
    )


def space_inputs() -> list[io.Boolean.Input]:
    return [
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
    ]


def probability_input() -> io.Boolean.Input:
    return io.Boolean.Input(
        "record_probability",
        default=False,
        optional=True,
        advanced=True,
        tooltip=(
            "Also record the space of probabilities: how much of its attention a patch gives to a word. "
            "Takes as long as the model's own attention. Models in which the picture only reads the text "
            "(Stable Diffusion 1, 2 and XL, Wan) record it always."
        ),
    )


# Each reader has one of them: see ``Reading.SPACES``.
QUERY_SPACES = ("cross-attention", "query-key")


def what_to_record(
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
) -> WhatToRecord:
    """
    Args:
        prompt: the sampler's, in whose words concepts are looked for where probabilities are recorded.

    Raises:
        ValueError: the model is of no supported family, the CLIP is not the model's, or a text cannot be
            read.
    """
    diffusion_model = model.get_model_object("diffusion_model")
    family = family_of(diffusion_model)
    parsed = parse_concepts(concepts, background)
    if parsed.background != split_names(background):
        logging.info("Concept Attention: competing as background: %s", ", ".join(parsed.background))
    layers = parse_layers(
        record_layers,
        available=range(len(family.layers(diffusion_model))),
        default=family.default_layers(diffusion_model),
        main=family.main_layers(diffusion_model),
    )
    wanted = {
        "output": True,
        **dict.fromkeys(QUERY_SPACES, record_cross_attention),
        "value": record_value,
        "probability": record_probability,
    }
    known = reading_of(family).SPACES
    lacking = [
        name
        for name, on, those in (
            ("queries", record_cross_attention, QUERY_SPACES),
            ("values", record_value, ("value",)),
        )
        if on and not {*those} & {*known}
    ]
    if lacking:
        logging.warning(
            "Concept Attention: %s has no space of %s to record, only: %s.",
            family.name,
            " or ".join(lacking),
            ", ".join(known),
        )
    spaces = [space for space, on in wanted.items() if on and space in known] or known[:1]
    tokens = encode_concepts(
        clip,
        parsed.all,
        token_pooling,
        family,
        family.token_width(diffusion_model),
        prompt if "probability" in spaces else "",
    )
    return WhatToRecord(parsed, tokens, layers, spaces, every=record_every)
