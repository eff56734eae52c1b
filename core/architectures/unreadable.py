"""Models that ComfyUI runs and that cannot be read, with what stands in the way."""

from __future__ import annotations

_UNSEEN = "no other node can see its attention"
_ONE_WAY = "its text never reads the picture, so that a concept could not either"

UNREADABLE = {
    "ernie.model.ErnieImageModel": ("Ernie-Image", _UNSEEN),
    "hidream_o1.model.HiDreamO1Transformer": ("HiDream-O1", _ONE_WAY),
    "hydit.models.HunYuanDiT": ("HunyuanDiT", _UNSEEN),
}
