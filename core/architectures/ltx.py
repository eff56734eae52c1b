"""LTX-Video and LTX-2: video, LTX-2 with sound. Text by cross-attention, in LTX-2 through connectors."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..geometry import Patch
from .family import WordsFamily


class LTXVideo(WordsFamily):
    name = "LTX-Video"
    model = "lightricks.model.LTXVModel"
    encoders = ("t5xxl",)
    loader = 'CLIPLoader, type "ltxv": T5'
    frame_length = 8
    queries = "attn2.q_norm"
    keys = ("attn2.to_k", "attn2.k_norm")
    timestep = "prompt_timestep"
    """The block's argument that its text is modulated by, where it is at all."""

    def layers(self, model: nn.Module) -> list[nn.Module]:
        return list(model.transformer_blocks)

    def heads(self, module: nn.Module) -> int:
        return module.attn2.heads

    def token_width(self, model: nn.Module) -> int:
        return model.caption_channels

    def patch(self, model: nn.Module) -> Patch:
        return Patch(1, 1, 1)

    def embed(self, model: nn.Module, context: Tensor) -> Tensor:
        return model.caption_projection(context)

    def key(self, module: nn.Module, words: Tensor, arguments: dict[str, Any]) -> Tensor:
        if self.modulated(module):
            timestep = arguments[self.timestep]
            table = module.prompt_scale_shift_table[None, None].to(words)
            shift, scale = (table + timestep.reshape(*timestep.shape[:2], 2, -1)).unbind(2)
            words = words * (1 + scale) + shift
        return super().key(module, words, arguments)

    def modulated(self, module: nn.Module) -> bool:
        return module.cross_attention_adaln

    def mask(self, arguments: dict[str, Any]) -> Tensor | None:
        return arguments.get("attention_mask")


class LTX2(LTXVideo):
    """Its video; concepts have no part in its sound."""

    name = "LTX-2"
    model = "lightricks.av_model.LTXAVModel"
    encoders = ("gemma3_12b",)
    loader = "LTXAVTextEncoderLoader: Gemma 3, with the checkpoint's projection"
    causal = True
    sound = True
    batched = False  # the connectors of ComfyUI 0.18 take one text at a time
    timestep = "v_prompt_timestep"

    def token_width(self, model: nn.Module) -> int:
        """Before the connectors: of the video's part and the sound's where those are projected apart."""
        if model.caption_proj_before_connector and not model.caption_projection_first_linear:
            return model.cross_attention_dim + model.audio_cross_attention_dim
        return model.caption_channels

    def embed(self, model: nn.Module, context: Tensor) -> Tensor:
        """By the video's connector, which fills a text up with tokens of its own."""
        context = model.preprocess_text_embeds(context, unprocessed=True)
        if model.caption_proj_before_connector:
            return context[..., : model.cross_attention_dim]
        return model.caption_projection(context[..., : model.caption_channels])


FAMILIES = (LTXVideo(), LTX2())
