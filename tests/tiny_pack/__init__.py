"""A node that stands in for the loaders of an example workflow: tiny models with random weights, made of
ComfyUI's own classes, its own tokenizers and prompt templates among them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import comfy.sd
import comfy.supported_models_base
import torch
from comfy import sdxl_clip
from comfy.text_encoders import flux, lt, qwen_image, sd3_clip, wan, z_image
from comfy_api.latest import ComfyExtension, io
from torch import Tensor
from torch.nn import functional as F

TESTS = Path(__file__).resolve().parent.parent
sys.path += [str(TESTS), str(TESTS.parent / "demo")]

import comfyui  # noqa: E402

comfyui.name_plugin()
import tiny_clip_vision  # noqa: E402
import tiny_encoders  # noqa: E402
import tiny_models  # noqa: E402


def _qwen(width: int, layers: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }


_CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3}
_CLIPS = {"clip_l_model_config": _CLIP, "clip_g_model_config": _CLIP}


@dataclass(frozen=True)
class StandIn:
    """For the model of one example workflow.

    Attributes:
        row: of ``tiny_models``.
        tokenizer, encoder: ComfyUI's classes.
        encoder_options: what makes the encoder tiny.
        unet: what the row has otherwise, for the sake of latents and text encoder.
        scale: pixels for each row and column of a latent.
        duration: how many frames of a video a latent's frame stands for, by its number.
        data: of a tokenizer that comes with the weights.
    """

    row: str
    tokenizer: Callable
    encoder: Callable
    encoder_options: dict
    unet: dict = field(default_factory=dict)
    scale: int = 8
    duration: Callable[[int], int] = lambda number: 1
    data: Callable[[], dict] = dict

    def model(self):
        row = (tiny_models.ROWS | tiny_models.WORDS)[self.row]
        return tiny_models.build(replace(row, unet={**row.unet, **self.unet}))

    def clip(self) -> comfy.sd.CLIP:
        target = comfy.supported_models_base.ClipTarget(self.tokenizer, self.encoder)
        with tiny_encoders.blind():
            options = dict(self.encoder_options)
            clip = comfy.sd.CLIP(target=target, tokenizer_data=self.data(), model_options=options)
        tiny_models.randomize(clip.cond_stage_model)
        return clip


class Colours:
    """A VAE that shows the first three channels of a latent as colours."""

    def __init__(self, scale: int, duration: Callable[[int], int]) -> None:
        self.scale, self.duration = scale, duration

    def decode(self, latent: Tensor) -> Tensor:
        """Pixels (B, H, W, 3) of a latent (B, C, h, w), or (B, F, H, W, 3) of (B, C, f, h, w)."""
        colours = latent[:, :3].sigmoid()
        if colours.ndim == 4:
            return F.interpolate(colours, scale_factor=self.scale).movedim(1, -1)
        frames = [i for i in range(colours.shape[2]) for _ in range(self.duration(i))]
        return F.interpolate(colours[:, :, frames], scale_factor=(1, self.scale, self.scale)).movedim(1, -1)


class Noise:
    """A VAE for sound, that of LTX-2 or of MiniMax H3: it makes a noise of the first channel."""

    latent_channels = 8
    audio_sample_rate = 16000
    first_stage_model = SimpleNamespace(
        latent_frequency_bins=16,
        output_sample_rate=audio_sample_rate,
        num_of_latents_from_frames=lambda frames, rate: round(frames * 25 / rate),
    )

    def decode(self, latent: Tensor) -> Tensor:
        """A wave (B, samples, 2)."""
        wave = latent[:, 0].flatten(1).tanh().repeat_interleave(40, 1)
        return torch.stack([wave, wave], -1)


STAND_INS = {
    "Flux.2 Klein": StandIn(
        "flux2",
        flux.KleinTokenizer,
        flux.klein_te(),
        {"qwen3_4b_model_config": _qwen(32, 28)},  # it gives the 9th, 18th and 27th layer
        {"in_channels": 128, "out_channels": 128, "context_in_dim": 96, "guidance_embed": False},
        scale=16,
    ),
    "LTX-2.3": StandIn(
        "ltx23",
        lt.LTXAVGemmaTokenizer,
        tiny_encoders.ltx2("dual_linear", 128, 64),
        {"model_name": "gemma3_12b", "gemma3_12b_model_config": _qwen(64, 2)},
        {"in_channels": 128},
        scale=32,
        duration=lambda number: 1 if number == 0 else 8,
        data=tiny_encoders.ENCODERS["lumina2"].data,
    ),
    "MiniMax H3": StandIn(
        "minimax_h3",
        # Not in every ComfyUI.
        lambda **options: tiny_encoders.found("minimax.MiniMaxH3Tokenizer")(**options),
        lambda **options: tiny_encoders.found("minimax.te")()(**options),
        {"qwen3vl_32b_model_config": _qwen(64, 3)},
        scale=16,
        duration=lambda number: 1 if number % 5 == 0 else 4,
    ),
    "Qwen-Image": StandIn(
        "qwen_image",
        qwen_image.QwenImageTokenizer,
        qwen_image.te(),
        {"qwen25_7b_model_config": _qwen(64, 3)},
    ),
    "Stable Diffusion 3.5": StandIn(
        "sd3",
        sd3_clip.SD3Tokenizer,
        sd3_clip.sd3_clip(t5=False),
        _CLIPS,
        {
            "adm_in_channels": 64,
            "num_patches": 256,
            "pos_embed_max_size": 16,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": 4096, "out_features": 192},
            },
        },
    ),
    "Stable Diffusion XL": StandIn("sdxl", sdxl_clip.SDXLTokenizer, sdxl_clip.SDXLClipModel, _CLIPS),
    "Wan 2.2": StandIn(
        "wan22_5b",
        wan.WanT5Tokenizer,
        wan.te(),
        {"umt5xxl_model_config": {"d_model": 64, "d_ff": 64, "d_kv": 32, "num_heads": 2, "num_layers": 1}},
        scale=16,
        duration=lambda number: 1 if number == 0 else 4,
        data=tiny_encoders.ENCODERS["lumina2"].data,
    ),
    "Z-Image Turbo": StandIn(
        "z_image", z_image.ZImageTokenizer, z_image.te(), {"qwen3_4b_model_config": _qwen(64, 3)}
    ),
}


class TinyModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestTinyModel",
            inputs=[io.Combo.Input("name", options=list(STAND_INS))],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output(), io.Vae.Output()],
        )

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        stand_in = STAND_INS[name]
        pictures = Colours(stand_in.scale, stand_in.duration)
        return io.NodeOutput(stand_in.model(), stand_in.clip(), pictures, Noise())


class TinyClip(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestTinyClip", inputs=[], outputs=[io.ClipVision.Output(), io.Clip.Output()]
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(tiny_clip_vision.clip_vision(), tiny_clip_vision.text_encoder())


class TinyPack(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [TinyModel, TinyClip]


async def comfy_entrypoint() -> TinyPack:
    return TinyPack()
