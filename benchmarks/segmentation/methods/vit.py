"""Explanations of an ImageNet classifier, a ViT-B/16, for the class that it ranks first: what the paper's
reference runs as its ViT baselines. The concepts have no part; all of them get the same map."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ....core.explaining import methods
from ..vision import Transformer
from . import Query

KIND = "vit"
EXPLANATIONS = ("transinterp", "raw attention", "rollout", "gradcam", "lrp", "partial lrp")
RULES = ("orig", "ours")


@dataclass(frozen=True)
class ExplainedClassifier:
    """
    Attributes:
        explanation: one of ``EXPLANATIONS``.
        rules: of lrp and partial lrp, by their names in Transformer-Explainability. Its own evaluation has
            "orig"; the paper's reference takes "ours" for partial lrp.
        normalised: the reference gives the classifier pixels from 0 to 1, not as it was trained.
    """

    models: Transformer = field(repr=False, compare=False)
    explanation: str = EXPLANATIONS[0]
    rules: str = RULES[0]
    normalised: bool = True

    def __post_init__(self) -> None:
        if self.models.head is None:
            raise ValueError("This method is for a classifier, and the file has none: no head.weight.")
        for name, value, known in (
            ("explanation", self.explanation, EXPLANATIONS),
            ("set of rules", self.rules, RULES),
        ):
            if value not in known:
                raise ValueError(f'A classifier has no {name} "{value}". There are: {", ".join(known)}.')

    @property
    def settings(self) -> dict:
        return {
            "method": "vit",
            "explanation": self.explanation,
            "rules": self.rules,
            "normalised": self.normalised,
        }

    def __call__(self, query: Query) -> Tensor:
        models, head = self.models, self.models.head
        side = models.side
        pixels = models.pixels(query.picture, (side, side), self.normalised)
        trace = models.vit(pixels)
        top = [int(head(trace.cls).argmax())]
        joint = self.rules == "ours"
        relevant = models.for_relevance, pixels, head, top
        maps = {
            "raw attention": lambda: methods.attention(trace),
            "rollout": lambda: methods.rollout(trace),
            "gradcam": lambda: methods.gradcam(models.vit, pixels, head, top),
            "lrp": lambda: methods.lrp(*relevant, joint),
            "partial lrp": lambda: methods.partial_lrp(*relevant, joint),
            "transinterp": lambda: methods.transinterp(*relevant),
        }[self.explanation]()
        return maps.expand(len(query.concepts.all), *maps.shape[-2:]).detach()


def load(
    models: Transformer,
    *,
    explanation: str = EXPLANATIONS[0],
    rules: str = RULES[0],
    normalised: bool = True,
) -> ExplainedClassifier:
    return ExplainedClassifier(models, explanation, rules, normalised)
