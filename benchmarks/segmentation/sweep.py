"""Which methods are compared: groups of them, each a table or a figure of the report.

Groups that share a method share its results, and methods that differ only in what they make of the scores
share forward passes (``Models.recording``), so that a sweep takes about 20 passes per image for some 50
methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .methods import Method, load, loader

if TYPE_CHECKING:
    from .models import Models
    from .vision import Clip, Transformer

LEVELS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
SAMPLES = (1, 2, 5)
TEMPERATURES = (0.25, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Group:
    """Methods to compare, by label; the first is what the others are compared with.

    ``name`` is that of the paper's numbers in ``report.PAPER``, and tells which groups are figures.
    """

    name: str
    title: str
    methods: Mapping[str, Method]


def single(models: Models | Clip | Transformer, method: str, choices: Mapping) -> list[Group]:
    return [Group("methods", "Result", {LABELS.get(method, method): load(method, models, choices)})]


LABELS = {
    "concept-attention": "ConceptAttention",
    "clip": "CLIP",
    "cross-attention": "Flux cross-attention",
    "value": "Value space",
    "daam": "DAAM",
    "dino": "DINO self-attention",
    "reference-cogvideox": "The reference's CogVideoX",
    "reference-flux2": "The reference's Flux.2",
    "reference-sd3": "The reference's Stable Diffusion 3",
    "vit": "ImageNet classifier",
}


def explanations(models: Clip | Transformer) -> list[Group]:
    """All that a CLIP or a vision transformer explains."""
    from .methods import clip, vit

    if models.kind == "clip":
        choices = [("clip", {"explanation": name}) for name in clip.EXPLANATIONS]
    elif models.head is not None:
        choices = [("vit", {"explanation": name}) for name in vit.EXPLANATIONS]
    else:
        choices = [("dino", {})]
    (group,) = {name for name, _ in choices}
    methods = {
        choice.get("explanation", LABELS[name]): load(name, models, choice) for name, choice in choices
    }
    return [Group(group, f"Explanations ({LABELS[group]}; the paper's Table 1)", methods)]


def full(models: Models, background: tuple[str, ...]) -> list[Group]:
    """What the paper's Tables 1 to 4 and Figure 7 compare, and the choices that it leaves open."""
    concept_attention = loader("concept-attention")

    def choose(**choices) -> Method:
        return concept_attention(models, **choices)

    spaces = {"Output": "output", "Cross-attention": "cross-attention", "Value": "value"}
    groups = [
        Group(
            "methods",
            "Methods (the paper's Tables 1 and 2)",
            {
                LABELS[name]: loader(name)(models)
                for name in ("concept-attention", "cross-attention", "value")
            },
        ),
        Group(
            "spaces",
            "Space and softmax (Table 3)",
            {
                **{
                    f"{label}, {'softmax' if softmax else 'no softmax'}": choose(space=space, softmax=softmax)
                    for label, space in spaces.items()
                    for softmax in (True, False)
                },
                "Output, concepts normalised, softmax": choose(space="output, normalized concepts"),
                "Output, concepts normalised, no softmax": choose(
                    space="output, normalized concepts", softmax=False
                ),
            },
        ),
        Group(
            "attention",
            "What concepts attend to (Table 4)",
            {
                label: choose(attend_image=image, attend_concepts=concepts)
                for label, image, concepts in (
                    ("Image and concepts", True, True),
                    ("Image", True, False),
                    ("Concepts", False, True),
                    ("Neither", False, False),
                )
            },
        ),
        Group(
            "layers",
            "Layers (Figure 7, left)",
            {
                "Default": choose(),
                "All": choose(layers="all"),
                **({"Last 10, the paper's": choose(layers="last 10")} if len(models.layers) > 10 else {}),
                **{str(layer): choose(layers=str(layer)) for layer in models.layers},
            },
        ),
        Group(
            "levels",
            "Noise level (Figure 7, right)",
            {"0.5": choose(), **{str(level): choose(level=level) for level in LEVELS}},
        ),
        Group("samples", "Samples of noise", {str(n): choose(samples=n) for n in SAMPLES}),
        Group(
            "tokens",
            "Tokens of a concept",
            {"Mean of tokens": choose(), "First token": choose(pooling="first token")},
        ),
        Group(
            "temperature",
            "Temperature of the softmax",
            {str(t): choose(temperature=t) for t in (1.0, *TEMPERATURES)},
        ),
        Group(
            "refine",
            "Refined by the picture's edges",
            {
                "Nearest neighbour": choose(),
                "Bilinear, then the threshold": choose(bilinear=True),
                "Refined, then the threshold": choose(refine=True),
            },
        ),
        Group(
            "grounding",
            "Grounding (look-alike objects)",
            {
                "Paper": choose(),
                "Anchor propagation": choose(grounding="anchor propagation"),
                "Paper, refined": choose(refine=True),
                "Anchor propagation, refined": choose(grounding="anchor propagation", refine=True),
            },
        ),
        Group(
            "prompt",
            "Prompt",
            {
                "Caption": choose(),
                "Caption, pooled vector of zeros as in the reference": choose(pooled_prompt=False),
                "Empty": choose(captioned=False),
            },
        ),
    ]
    if background:
        rest = tuple(name for name in background if name != "background")
        groups.append(
            Group(
                "background",
                "Background concepts",
                {
                    ", ".join(background): choose(),
                    "background": choose(background=("background",)),
                    ", ".join(rest): choose(background=rest),
                },
            )
        )
    return groups


def only(groups: Sequence[Group], names: Sequence[str]) -> list[Group]:
    """The groups of these names, in their own order.

    Raises:
        ValueError: there is no such group.
    """
    there = [group.name for group in groups]
    for name in names:
        if name not in there:
            raise ValueError(f'There is no group "{name}". The groups are: {", ".join(there)}.')
    return [group for group in groups if group.name in names]
