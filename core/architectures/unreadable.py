"""Models that ComfyUI runs and that cannot be read, with what stands in the way."""

from __future__ import annotations

_UNSEEN = "no other node can see its attention"

UNREADABLE = {
    "cascade.stage_b.StageB": (
        "stage B of Stable Cascade",
        "it is given the prompt as a whole, and no words",
    ),
    "cascade.stage_c.StageC": (
        "Stable Cascade",
        "its picture attends to words and to itself at once, and words have no part in it of their own",
    ),
    "ernie.model.ErnieImageModel": ("Ernie-Image", _UNSEEN),
    "hydit.models.HunYuanDiT": (
        "HunyuanDiT",
        "its picture reads the words of two text encoders at once, and no other node can see its queries",
    ),
    "seedvr.model.NaDiT": ("SeedVR2", "its text is always the same, and no prompt of yours"),
}

# Of ``comfy.model_base``: their diffusion models are those of readable ones.
WITHOUT_TEXT = {"Stable_Zero123": "Stable Zero123"}
