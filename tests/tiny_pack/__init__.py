"""A node that stands in for the loaders of an example workflow: tiny models with random weights, made of
ComfyUI's own classes, its own tokenizers and prompt templates among them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import comfy.sd
import comfy.supported_models_base
from comfy.text_encoders import flux, qwen_image, sd3_clip, z_image
from comfy_api.latest import ComfyExtension, io
from torch import Tensor
from torch.nn import functional as F

TESTS = Path(__file__).resolve().parent.parent
sys.path += [str(TESTS), str(TESTS.parent / "demo")]

import comfyui  # noqa: E402

comfyui.name_plugin()
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


@dataclass(frozen=True)
class StandIn:
    """For the model of one example workflow.

    Attributes:
        row: of ``tiny_models.ROWS``.
        tokenizer, encoder: ComfyUI's classes.
        encoder_options: what makes the encoder tiny.
        unet: what the row has otherwise, for the sake of latents and text encoder.
        scale: pixels for each row and column of a latent.
    """

    row: str
    tokenizer: Callable
    encoder: Callable
    encoder_options: dict
    unet: dict = field(default_factory=dict)
    scale: int = 8

    def model(self):
        row = tiny_models.ROWS[self.row]
        return tiny_models.build(replace(row, unet={**row.unet, **self.unet}))

    def clip(self) -> comfy.sd.CLIP:
        target = comfy.supported_models_base.ClipTarget(self.tokenizer, self.encoder)
        clip = comfy.sd.CLIP(target=target, model_options=dict(self.encoder_options))
        tiny_models.randomize(clip.cond_stage_model)
        return clip


class Colours:
    """A VAE that shows the first three channels of a latent as colours."""

    def __init__(self, scale: int) -> None:
        self.scale = scale

    def decode(self, latent: Tensor) -> Tensor:
        """Pixels (B, H, W, 3) of a latent (B, C, h, w) or (B, C, 1, h, w)."""
        picture = latent[:, :, 0] if latent.ndim == 5 else latent
        return F.interpolate(picture[:, :3].sigmoid(), scale_factor=self.scale).movedim(1, -1)


STAND_INS = {
    "Flux.2 Klein": StandIn(
        "flux2",
        flux.KleinTokenizer,
        flux.klein_te(),
        {"qwen3_4b_model_config": _qwen(32, 28)},  # it gives the 9th, 18th and 27th layer
        {"in_channels": 128, "out_channels": 128, "context_in_dim": 96, "guidance_embed": False},
        scale=16,
    ),
    "Qwen-Image": StandIn(
        "qwen_image",
        qwen_image.QwenImageTokenizer,
        qwen_image.te(),
        # Without the part that looks at pictures.
        {"qwen25_7b_class": z_image.Qwen3_4BModel, "qwen25_7b_model_config": _qwen(64, 3)},
    ),
    "Stable Diffusion 3.5": StandIn(
        "sd3",
        sd3_clip.SD3Tokenizer,
        sd3_clip.sd3_clip(t5=False),
        {"clip_l_model_config": _CLIP, "clip_g_model_config": _CLIP},
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
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        stand_in = STAND_INS[name]
        return io.NodeOutput(stand_in.model(), stand_in.clip(), Colours(stand_in.scale))


class TinyPack(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [TinyModel]


async def comfy_entrypoint() -> TinyPack:
    return TinyPack()
