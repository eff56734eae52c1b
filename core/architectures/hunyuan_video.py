"""HunyuanVideo, HunyuanVideo 1.5 and HunyuanImage 2.1: Flux.1's blocks, after refiners of the text."""

from __future__ import annotations

from torch import nn

from ..geometry import Patch
from .family import BlockCall
from .flux2 import FluxBlocks


class HunyuanVideo(FluxBlocks):
    """Reference frames stand between text and picture; other text (glyphs, an image's) stands beside the
    prompt's, and is left out where concepts are embedded: before it where kinds of text are told apart (1.5),
    glyphs behind it elsewhere."""

    name = "HunyuanVideo"
    model = "hunyuan_video.model.HunyuanVideo"
    encoders = ("llama", "qwen25_7b")
    loader = 'DualCLIPLoader, type "hunyuan_video", "hunyuan_video_15" or "hunyuan_image"'
    causal = True
    guidance = True
    frame_length = 4
    timed = True

    def token_width(self, model: nn.Module) -> int:
        return model.params.context_in_dim

    def patch(self, model: nn.Module) -> Patch:
        """HunyuanImage's has no frames."""
        return Patch(*((1,) * (3 - len(model.patch_size))), *model.patch_size)

    def picture(self, call: BlockCall, length: int) -> slice:
        return slice(length - call.picture, length)

    def given(self, call: BlockCall, tokens: int) -> slice:
        count = self.text(call).shape[1]
        return slice(0, tokens) if call.model.cond_type_embedding is None else slice(count - tokens, count)


FAMILIES = (HunyuanVideo(),)
