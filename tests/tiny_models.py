"""Every model family, tiny and with random weights, by ComfyUI's own classes: a row each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from types import SimpleNamespace
from unittest import SkipTest

import comfy.ops
import comfy.sample
import comfy.supported_models
import comfyui_version
import torch
from comfy.ldm.anima.model import LLMAdapter
from comfy.ldm.chroma_radiance.model import ChromaRadianceParams
from comfy.model_patcher import ModelPatcher
from comfy.nested_tensor import NestedTensor
from packaging.version import Version
from torch import Tensor, nn
from torch.nn import functional as F

import comfyui
from concept_attention.core.architectures.anima import Anima
from concept_attention.core.concepts import Concepts, ConceptTokens

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """A model to try a family on.

    Attributes:
        family: its name.
        config: of ``comfy.supported_models``, which knows the model's class, latents and schedule.
        unet: the arguments of the diffusion model's class.
        width: of the text tokens.
        latent: channels, (frames,) height and width of a latent that is no multiple of the patch.
        sound: the shape of the sound that a latent has beside it.
        batch, cfg: how many images, and with what guidance; 1 where ComfyUI takes no more than one row.
        tokens: of the prompt.
        text_start: how much text of other pictures stands before it.
        values: what the conditioning has besides.
        further_keys: whether the model's own text attends to more than concepts do beside each other: to what
            the picture is to be made from, or to other text.
        attention_options: whether the model gives its attention ``transformer_options``. Only then other
            nodes can change it.
        prepare: what else a random model needs.
        sequence: what the family makes of a text's tokens (T, C).
    """

    family: str
    config: str
    unet: dict
    width: int
    latent: tuple[int, ...]
    sound: tuple[int, ...] | None = None
    batch: int = 2
    cfg: float = 3.0
    tokens: int = 7
    text_start: int = 0
    values: dict = field(default_factory=dict)
    further_keys: bool = False
    attention_options: bool = True
    prepare: Callable[[nn.Module], None] = lambda model: None
    sequence: Callable[[Tensor], Tensor] = lambda tokens: tokens

    def conditioning(self, seed: int, tokens: int | None = None) -> list:
        g = torch.Generator().manual_seed(seed)
        context = torch.randn(1, tokens or self.tokens, self.width, generator=g)
        values = {name: value(g) if callable(value) else value for name, value in self.values.items()}
        if (mask := values.get("attention_mask")) is not None:
            values["attention_mask"] = F.pad(mask, (context.shape[1] - mask.shape[1], 0), value=1)
        # Text encoders that make none give None, and ComfyUI 0.18's Flux.2 looks for it.
        return [[context, {"pooled_output": None, **values}]]

    def noise(self, batch: int = 1, seed: int = 1) -> Tensor | NestedTensor:
        g = torch.Generator().manual_seed(seed)
        return self._latent(lambda *shape: torch.randn(batch, *shape, generator=g))

    def empty(self, batch: int = 1) -> Tensor | NestedTensor:
        return self._latent(lambda *shape: torch.zeros(batch, *shape))

    def _latent(self, make: Callable[..., Tensor]) -> Tensor | NestedTensor:
        video = make(*self.latent)
        return video if self.sound is None else NestedTensor([video, make(*self.sound)])

    def concept_tokens(self, count: int = 3, seed: int = 5) -> ConceptTokens:
        """Names of one to ``count`` tokens in a template of three."""
        g = torch.Generator().manual_seed(seed)
        texts = (torch.randn(3 + i, self.width, generator=g) for i in range(1, count + 1))
        sequences = tuple(self.sequence(text) for text in texts)
        spans = tuple(slice(2, 2 + i) for i in range(1, count + 1))
        return ConceptTokens(sequences, spans, tuple(len(s) for s in sequences), "last token")


def _random(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randn(1, *shape, generator=g)


def _clip_vision(*shape: int) -> Callable[[torch.Generator], SimpleNamespace]:
    def output(g: torch.Generator) -> SimpleNamespace:
        states = torch.randn(1, *shape, generator=g)
        return SimpleNamespace(last_hidden_state=states, penultimate_hidden_states=states)

    return output


def _tensors(*shapes: tuple[int, ...]) -> Callable[[torch.Generator], list[Tensor]]:
    return lambda g: [torch.randn(shape, generator=g) for shape in shapes]


_PIXELDIT = {
    "num_groups": 2,
    "hidden_size": 128,
    "pixel_hidden_size": 16,
    "pixel_attn_hidden_size": 64,
    "pixel_num_groups": 2,
    "patch_depth": 3,
    "pixel_depth": 1,
    "patch_size": 4,
    "txt_embed_dim": 64,
    "txt_max_length": 16,
}
_FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": None,
    "context_in_dim": 64,
    "hidden_size": 256,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 3,
    "depth_single_blocks": 2,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": False,
}
_HUNYUAN = {
    "image_model": "hunyuan_video",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 32,
    "context_in_dim": 64,
    "hidden_size": 256,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 3,
    "depth_single_blocks": 2,
    "axes_dim": [16, 56, 56],
    "theta": 256,
    "qkv_bias": True,
    "guidance_embed": True,
    "byt5": False,
    "meanflow": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
}

_MINIMAX = {
    "image_model": "minimax_h3",
    "hidden_size": 256,
    "num_layers": 3,
    "token_refiner_num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 128,
    "ffn_hidden_size": 512,
    "text_dim": 64,
    "timestep_input_dim": 64,
    "time_embed_hidden_size": 128,
    "time_embed_dim": 96,
}


def _keyframes(g: torch.Generator) -> list[dict]:
    return [{"resolved_frame_index": 0, "latent": torch.randn(1, 24, 1, 6, 8, generator=g)}]


def _rope(model: nn.Module) -> None:
    model.rope.inv_freq.copy_(10000 ** (-torch.arange(16) / 16))


_FLUX2 = {
    "image_model": "flux2",
    "in_channels": 128,
    "out_channels": 128,
    "vec_in_dim": None,
    "context_in_dim": 64,
    "hidden_size": 256,
    "mlp_ratio": 3.0,
    "num_heads": 2,
    "depth": 3,
    "depth_single_blocks": 2,
    "axes_dim": [32, 32, 32, 32],
    "theta": 2000,
    "patch_size": 1,
    "qkv_bias": False,
    "guidance_embed": True,
    "txt_ids_dims": [3],
    "global_modulation": True,
    "mlp_silu_act": True,
    "ops_bias": False,
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
}
_CHROMA = {
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "context_in_dim": 64,
    "hidden_size": 256,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 3,
    "depth_single_blocks": 2,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "in_dim": 64,
    "out_dim": 256,
    "hidden_dim": 64,
    "n_layers": 2,
    "txt_ids_dims": [],
    "vec_in_dim": None,
}
# ComfyUI 0.18 places all of Radiance's text at zero.
_SEQUENTIAL = {
    name: True for name in ChromaRadianceParams.__dataclass_fields__ if name == "use_sequential_txt_ids"
}
_QWEN = {
    "image_model": "qwen_image",
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 3,
    "attention_head_dim": 128,
    "num_attention_heads": 2,
    "joint_attention_dim": 64,
}
_Z_IMAGE = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 384,
    "n_layers": 3,
    "n_refiner_layers": 1,
    "n_heads": 3,
    "qk_norm": True,
    "cap_feat_dim": 64,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8 / 3,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
_SD3 = {
    "input_size": None,
    "patch_size": 2,
    "in_channels": 16,
    "depth": 3,
    "adm_in_channels": 32,
    "context_embedder_config": {
        "target": "torch.nn.Linear",
        "params": {"in_features": 64, "out_features": 192},
    },
    "num_patches": 64,
    "pos_embed_max_size": 8,
}


def _sd3(unet: dict) -> Row:
    def prepare(model: nn.Module) -> None:
        model.pos_embed.normal_(generator=torch.Generator().manual_seed(3))

    values = {"pooled_output": _random(32)}
    return Row("Stable Diffusion 3", "SD3", unet, 64, (16, 7, 10), values=values, prepare=prepare)


ROWS = {
    "flux2": Row("Flux.2", "Flux2", _FLUX2, 64, (128, 5, 7), values={"guidance": 4.0}),
    "flux2_klein": Row("Flux.2", "Flux2", {**_FLUX2, "guidance_embed": False}, 64, (128, 5, 7)),
    "chroma": Row("Chroma", "Chroma", _CHROMA, 64, (16, 7, 10)),
    "chroma_radiance": Row(
        "Chroma",
        "ChromaRadiance",
        {
            **_CHROMA,
            "image_model": "chroma_radiance",
            "in_channels": 3,
            "out_channels": 3,
            "patch_size": 16,
            "nerf_hidden_size": 8,
            "nerf_mlp_ratio": 2,
            "nerf_depth": 1,
            "nerf_max_freqs": 4,
            "nerf_tile_size": 512,
            "nerf_final_head_type": "conv",
            "nerf_embedder_dtype": torch.float32,
            "use_x0": False,
            **_SEQUENTIAL,
        },
        64,
        (3, 56, 80),
    ),
    "qwen_image": Row("Qwen-Image", "QwenImage", _QWEN, 64, (16, 1, 7, 10)),
    "qwen_image_layered": Row(
        "Qwen-Image",
        "QwenImage",
        {**_QWEN, "use_additional_t_cond": True, "default_ref_method": "negative_index"},
        64,
        (16, 3, 7, 10),
    ),
    "z_image": Row("Z-Image", "ZImage", _Z_IMAGE, 64, (16, 7, 10)),
    "z_image_omni": Row(
        "Z-Image",
        "ZImage",
        # Refiners would have the prompt read the text of the other picture.
        {**_Z_IMAGE, "siglip_feat_dim": 48, "n_refiner_layers": 0},
        64,
        (16, 7, 10),
        text_start=32,
        values={
            "reference_latents": _tensors((1, 16, 6, 8)),
            "reference_latents_text_embeds": _tensors((1, 5, 64)),
            "clip_vision_outputs": lambda g: [
                SimpleNamespace(
                    last_hidden_state=torch.randn(1, 6, 48, generator=g), image_sizes=[(3, 32, 48)]
                )
            ],
        },
    ),
    "z_image_pixels": Row(
        "Z-Image",
        "ZImagePixelSpace",
        {
            **_Z_IMAGE,
            "image_model": "zimage_pixel",
            "patch_size": 16,
            "in_channels": 3,
            "decoder_in_channels": 768,
            "decoder_hidden_size": 32,
            "decoder_num_res_blocks": 1,
            "decoder_max_freqs": 2,
        },
        64,
        (3, 56, 80),
    ),
    "lumina2": Row(
        "Lumina 2",
        "Lumina2",
        {
            "image_model": "lumina2",
            "patch_size": 2,
            "in_channels": 16,
            "dim": 192,
            "n_layers": 3,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 1,
            "qk_norm": True,
            "cap_feat_dim": 64,
            "axes_dims": [32, 32, 32],
            "axes_lens": [300, 512, 512],
        },
        64,
        (16, 7, 10),
    ),
    "krea2": Row(
        "Krea 2",
        "Krea2",
        {
            "image_model": "krea2",
            "features": 256,
            "tdim": 64,
            "txtdim": 32,
            "heads": 2,
            "kvheads": 1,
            "multiplier": 4,
            "layers": 3,
            "patch": 2,
            "channels": 16,
            "txtlayers": 2,
            "txtheads": 2,
            "txtkvheads": 2,
        },
        64,
        (16, 1, 7, 10),
    ),
    "sd35_medium": _sd3({**_SD3, "qk_norm": "rms", "x_block_self_attn_layers": [0, 1]}),
    "sd35_large": _sd3({**_SD3, "qk_norm": "rms"}),
    "sd3": _sd3(_SD3),
    "cogvideox": Row(
        "CogVideoX",
        "CogVideoX_T2V",
        {
            "image_model": "cogvideox",
            "num_attention_heads": 2,
            "attention_head_dim": 64,
            "in_channels": 16,
            "time_embed_dim": 64,
            "text_embed_dim": 64,
            "num_layers": 3,
            "sample_width": 10,
            "sample_height": 8,
            "sample_frames": 9,
            "use_rotary_positional_embeddings": True,
        },
        64,
        (16, 3, 7, 10),
    ),
    "longcat_image": Row(
        "LongCat-Image",
        "LongCatImage",
        {**_FLUX, "txt_ids_dims": [1, 2]},
        64,
        (16, 7, 10),
    ),
    "ovis_image": Row(
        "Ovis-Image",
        "Flux",
        {**_FLUX, "txt_ids_dims": [1, 2], "yak_mlp": True, "txt_norm": True},
        64,
        (16, 7, 10),
    ),
    "hunyuan_video": Row(
        "HunyuanVideo",
        "HunyuanVideo",
        {**_HUNYUAN, "patch_size": [1, 2, 2]},
        64,
        (16, 3, 6, 8),
        values={"guidance": 6.0, "pooled_output": _random(32)},
    ),
    "hunyuan_video_from_a_frame": Row(
        "HunyuanVideo",
        "HunyuanVideo",
        {**_HUNYUAN, "patch_size": [1, 2, 2]},
        64,
        (16, 3, 6, 8),
        batch=1,
        values={"guidance": 6.0, "pooled_output": _random(32), "guiding_frame_index": 0},
    ),
    "hunyuan_video_from_references": Row(
        "HunyuanVideo",
        "HunyuanVideo",
        {**_HUNYUAN, "patch_size": [1, 2, 2]},
        64,
        (16, 3, 6, 8),
        batch=1,
        cfg=1.0,
        values={"guidance": 6.0, "pooled_output": _random(32), "ref_latent": _random(16, 1, 6, 8)},
        further_keys=True,
    ),
    "hunyuan_video_i2v": Row(
        "HunyuanVideo",
        "HunyuanVideoI2V",
        {**_HUNYUAN, "in_channels": 33, "patch_size": [1, 2, 2]},
        64,
        (16, 3, 6, 8),
        values={
            "guidance": 6.0,
            "pooled_output": _random(32),
            "concat_latent_image": _random(16, 3, 6, 8),
            "concat_mask": torch.ones(1, 1, 3, 6, 8),
        },
    ),
    "hunyuan_video_15": Row(
        "HunyuanVideo",
        "HunyuanVideo15",
        {
            **_HUNYUAN,
            "in_channels": 65,
            "out_channels": 32,
            "vec_in_dim": None,
            "patch_size": [1, 1, 1],
            "guidance_embed": False,
            "byt5": True,
            "use_cond_type_embedding": True,
            "vision_in_dim": 1152,
        },
        64,
        (32, 3, 5, 7),
        values={
            "pooled_output": _random(32),
            "conditioning_byt5small": _random(4, 1472),
            "clip_vision_output": _clip_vision(3, 1152),
            "concat_latent_image": _random(32, 3, 5, 7),
        },
    ),
    "hunyuan_image": Row(
        "HunyuanVideo",
        "HunyuanImage21",
        {
            **_HUNYUAN,
            "in_channels": 64,
            "out_channels": 64,
            "vec_in_dim": None,
            "patch_size": [1, 1],
            "axes_dim": [64, 64],
        },
        64,
        (64, 5, 7),
    ),
    "auraflow": Row(
        "AuraFlow",
        "AuraFlow",
        {
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "dim": 256,
            "n_layers": 5,
            "n_double_layers": 3,
            "n_heads": 2,
            "global_conddim": 256,
            "cond_seq_dim": 64,
            "max_seq": 256,
        },
        64,
        (4, 7, 10),
    ),
    "mage_flow": Row(
        "Mage-Flow",
        "MageFlow",
        {
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 3,
            "attention_head_dim": 128,
            "num_attention_heads": 2,
            "joint_attention_dim": 64,
        },
        64,
        (16, 5, 7),
    ),
    "lens": Row(
        "Lens",
        "Lens",
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 64,
            "num_attention_heads": 2,
            "enc_hidden_dim": 32,
            "selected_layer_index": (0, 1),
        },
        64,
        (16, 5, 7),
    ),
    "joyimage": Row(
        "JoyImage",
        "JoyImage",
        {"in_channels": 16, "hidden_size": 256, "num_attention_heads": 2, "text_dim": 64, "num_layers": 3},
        64,
        (16, 1, 7, 10),
    ),
    "pixeldit": Row("PixelDiT", "PixelDiTT2I", _PIXELDIT, 64, (3, 14, 21)),
    "pid": Row(
        "PixelDiT",
        "PiD",
        {
            **_PIXELDIT,
            "image_model": "pid",
            "lq_hidden_dim": 32,
            "lq_num_res_blocks": 1,
            "sr_scale": 4,
            "latent_spatial_down_factor": 1,
        },
        64,
        (3, 14, 21),
        values={"lq_latent": _random(16, 4, 6), "degrade_sigma": torch.tensor([0.1])},
    ),
    "ideogram4": Row(
        "Ideogram 4",
        "Ideogram4",
        {
            "in_channels": 16,
            "num_layers": 3,
            "num_attention_heads": 2,
            "attention_head_dim": 128,
            "intermediate_size": 256,
            "adaln_dim": 64,
            "llm_features_dim": 64,
            "mrope_section": (24, 20, 20),
        },
        64,
        (16, 5, 7),
    ),
    "omnigen2": Row(
        "OmniGen2",
        "Omnigen2",
        {
            "patch_size": 2,
            "in_channels": 16,
            "hidden_size": 192,
            "num_layers": 3,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "axes_dim_rope": (32, 32, 32),
            "text_feat_dim": 64,
        },
        64,
        (16, 7, 10),
        values={"attention_mask": torch.ones(1, 7, dtype=torch.long)},
    ),
    "hidream_i1": Row(
        "HiDream-I1",
        "HiDream",
        {
            "image_model": "hidream",
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 3,
            "num_single_layers": 1,
            "attention_head_dim": 128,
            "num_attention_heads": 2,
            "caption_channels": [64, 64],
            "text_emb_dim": 32,
            "axes_dims_rope": (64, 32, 32),
            "max_resolution": (128, 128),
            "llama_layers": [0, 1, 2, 3],
        },
        64,
        (16, 7, 10),
        values={"pooled_output": _random(32), "conditioning_llama3": _random(4, 5, 64)},
        further_keys=True,
    ),
    "boogu": Row(
        "Boogu",
        "Boogu",
        {
            "image_model": "boogu",
            "patch_size": 2,
            "in_channels": 16,
            "hidden_size": 192,
            "num_layers": 1,
            "num_double_stream_layers": 3,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "axes_dim_rope": (32, 32, 32),
            "instruction_feat_dim": 64,
        },
        64,
        (16, 7, 10),
        values={"attention_mask": torch.ones(1, 7, dtype=torch.long)},
    ),
    "minimax_h3": Row(
        "MiniMax H3",
        "MiniMaxH3",
        _MINIMAX,
        64,
        (24, 3, 5, 8),
        sound=(32, 2, 5),
        batch=1,
        prepare=_rope,
    ),
    "minimax_h3_from_a_frame": Row(
        "MiniMax H3",
        "MiniMaxH3",
        _MINIMAX,
        64,
        (24, 3, 5, 8),
        sound=(32, 2, 5),
        batch=1,
        values={"minimax_keyframes": _keyframes},
        prepare=_rope,
    ),
    "mochi": Row(
        "Mochi",
        "GenmoMochi",
        {
            "patch_size": 2,
            "in_channels": 12,
            "hidden_size_x": 256,
            "hidden_size_y": 128,
            "depth": 3,
            "num_heads": 2,
            "mlp_ratio_x": 48.0,
            "use_t5": True,
            "t5_feat_dim": 64,
            "t5_token_length": 16,
            "qk_norm": True,
            "learn_sigma": False,
        },
        64,
        (12, 3, 6, 8),
        values={"attention_mask": torch.ones(1, 7, dtype=torch.bool)},
    ),
}

_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1, 1],
    "channel_mult": (1, 2, 2),
    "num_heads": -1,
    "num_head_channels": 16,
    "use_spatial_transformer": True,
    "transformer_depth": [1, 1, 0],
    "transformer_depth_output": [1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "context_dim": 64,
    "use_linear_in_transformer": True,
    "legacy": False,
}
_WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "patch_size": (1, 2, 2),
    "text_len": 16,
    "in_dim": 16,
    "dim": 256,
    "ffn_dim": 512,
    "freq_dim": 64,
    "text_dim": 64,
    "out_dim": 16,
    "num_heads": 2,
    "num_layers": 3,
}
_LTX = {
    "in_channels": 128,
    "cross_attention_dim": 128,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "caption_channels": 64,
    "num_layers": 3,
}
_LTX2 = {
    **_LTX,
    "image_model": "ltxav",
    "audio_cross_attention_dim": 64,
    "audio_attention_head_dim": 32,
    "audio_num_attention_heads": 2,
    "connector_num_layers": 1,
    "connector_num_attention_heads": 2,
    "connector_attention_head_dim": 32,
}
_COSMOS = {
    "image_model": "cosmos_predict2",
    "max_img_h": 64,
    "max_img_w": 64,
    "max_frames": 8,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "concat_padding_mask": True,
    "model_channels": 128,
    "num_blocks": 3,
    "num_heads": 2,
    "crossattn_emb_channels": 64,
    "pos_emb_cls": "rope3d",
    "use_adaln_lora": True,
    "adaln_lora_dim": 16,
}
_COSMOS_1 = {
    **_COSMOS,
    "image_model": "cosmos",
    "block_config": "FA-CA-MLP",
    "block_x_format": "THWBD",
    "affline_emb_norm": True,
    "extra_per_block_abs_pos_emb": True,
    "extra_per_block_abs_pos_emb_type": "learnable",
}
_KANDINSKY = {
    "image_model": "kandinsky5",
    "in_visual_dim": 16,
    "out_visual_dim": 16,
    "in_text_dim": 64,
    "in_text_dim2": 32,
    "time_dim": 64,
    "model_dim": 128,
    "ff_dim": 256,
    "visual_embed_dim": 132,
    "num_text_blocks": 1,
    "num_visual_blocks": 3,
    "axes_dims": (16, 24, 24),
}
_PIXART = {
    "image_model": "pixart_alpha",
    "hidden_size": 192,
    "depth": 3,
    "num_heads": 2,
    "caption_channels": 64,
    "pe_interpolation": 1,
}
_T5_OF_ANIMA = {"t5xxl_ids": torch.arange(1000, 1007), "t5xxl_weights": torch.ones(7)}


def _of_anima(states: Tensor) -> Tensor:
    t5 = {name: values[: len(states)] for name, values in _T5_OF_ANIMA.items()}
    return Anima().sequence({"cond": states[None], **t5})


def _small_adapter(model: nn.Module) -> None:
    operations = {"dtype": torch.float32, "operations": comfy.ops.disable_weight_init}
    model.llm_adapter = LLMAdapter(64, 64, 64, num_layers=1, num_heads=2, **operations)
    randomize(model.llm_adapter)


_SD, _WAN_FAMILY = "Stable Diffusion 1, 2, XL", "Wan 2.1, 2.2"

WORDS = {
    "sd15": Row(_SD, "SD15", {**_UNET, "use_linear_in_transformer": False}, 64, (4, 9, 14), tokens=77),
    "sd2": Row(_SD, "SD20", _UNET, 64, (4, 8, 12), tokens=77),
    "sdxl": Row(
        _SD,
        "SDXL",
        {
            **_UNET,
            "transformer_depth": [0, 1, 2],
            "transformer_depth_output": [0, 0, 1, 1, 2, 2],
            "transformer_depth_middle": 2,
            "num_classes": "sequential",
            "adm_in_channels": 32 + 6 * 256,
        },
        64,
        (4, 16, 24),
        tokens=77,
        values={"pooled_output": _random(32)},
    ),
    "wan21_t2v": Row(_WAN_FAMILY, "WAN21_T2V", _WAN, 64, (16, 3, 5, 8)),
    "wan21_i2v": Row(
        _WAN_FAMILY,
        "WAN21_I2V",
        {**_WAN, "model_type": "i2v", "in_dim": 36},
        64,
        (16, 3, 5, 8),
        values={"clip_vision_output": _clip_vision(257, 1280)},
    ),
    "wan21_fun_control": Row(
        _WAN_FAMILY,
        "WAN21_FunControl2V",
        {**_WAN, "model_type": "i2v", "in_dim": 36, "in_dim_ref_conv": 16},
        64,
        (16, 3, 6, 8),
        values={"reference_latents": _tensors((1, 16, 1, 6, 8))},
    ),
    "wan21_vace": Row(
        _WAN_FAMILY,
        "WAN21_Vace",
        {**_WAN, "model_type": "vace", "vace_layers": 3, "vace_in_dim": 96},
        64,
        (16, 3, 6, 8),
    ),
    "wan22_5b": Row(_WAN_FAMILY, "WAN22_T2V", {**_WAN, "in_dim": 48, "out_dim": 48}, 64, (48, 3, 5, 8)),
    "wan22_s2v": Row(
        _WAN_FAMILY,
        "WAN22_S2V",
        {**_WAN, "model_type": "s2v", "audio_inject_layers": [0], "audio_dim": 64},
        64,
        (16, 3, 6, 8),
        values={"reference_latents": _tensors((1, 16, 1, 6, 8))},
    ),
    "wan21_humo": Row(
        _WAN_FAMILY,
        "WAN21_HuMo",
        {**_WAN, "model_type": "humo"},
        64,
        (16, 3, 6, 8),
        values={"reference_latents": _tensors((1, 16, 1, 6, 8))},
    ),
    "wan21_scail": Row(
        _WAN_FAMILY,
        "WAN21_SCAIL",
        {**_WAN, "model_type": "scail", "in_dim": 20},
        64,
        (16, 3, 6, 8),
        values={"reference_latents": _tensors((1, 16, 1, 6, 8))},
    ),
    "wan22_animate": Row(
        _WAN_FAMILY,
        "WAN22_Animate",
        {**_WAN, "model_type": "animate", "in_dim": 36},
        64,
        (16, 3, 6, 8),
        values={"clip_vision_output": _clip_vision(257, 1280)},
    ),
    "ltxv": Row(
        "LTX-Video",
        "LTXV",
        {**_LTX, "image_model": "ltxv"},
        64,
        (128, 3, 5, 8),
        values={"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1]])},
    ),
    "ltx2": Row(
        "LTX-2",
        "LTXAV",
        _LTX2,
        64,
        (128, 3, 5, 8),
        sound=(8, 6, 16),
        values={"unprocessed_ltxav_embeds": True},
    ),
    "ltx23": Row(
        "LTX-2",
        "LTXAV",
        {
            **_LTX2,
            "connector_attention_head_dim": 64,
            "audio_connector_attention_head_dim": 32,
            "apply_gated_attention": True,
            "caption_proj_before_connector": True,
            "caption_projection_first_linear": False,
            "cross_attention_adaln": True,
        },
        192,
        (128, 3, 5, 8),
        sound=(8, 6, 16),
        values={"unprocessed_ltxav_embeds": True},
    ),
    "cosmos1": Row("Cosmos 1", "CosmosT2V", _COSMOS_1, 64, (16, 3, 6, 8)),
    "cosmos1_i2v": Row("Cosmos 1", "CosmosI2V", {**_COSMOS_1, "in_channels": 17}, 64, (16, 3, 6, 8)),
    "anima": Row(
        "Anima",
        "Anima",
        {**_COSMOS, "image_model": "anima"},
        64,
        (16, 1, 5, 8),
        values=_T5_OF_ANIMA,
        prepare=_small_adapter,
        sequence=_of_anima,
    ),
    "cosmos_predict2": Row("Cosmos-Predict2", "CosmosT2IPredict2", _COSMOS, 64, (16, 3, 5, 8)),
    "pixart_alpha": Row(
        "PixArt Alpha, Sigma", "PixArtAlpha", _PIXART, 64, (4, 32, 36), attention_options=False
    ),
    "pixart_sigma": Row(
        "PixArt Alpha, Sigma",
        "PixArtSigma",
        {**_PIXART, "image_model": "pixart_sigma", "micro_condition": False},
        64,
        (4, 32, 36),
        attention_options=False,
    ),
    "kandinsky5": Row(
        "Kandinsky 5", "Kandinsky5", _KANDINSKY, 64, (16, 3, 6, 8), values={"pooled_output": _random(32)}
    ),
}

# A text is numbers of tokens; the last one stands for the noise level.
_PROMPT_OF_O1 = torch.tensor([[151644, 872, 198, 64, 4086, 9170, 151645, 198, 151673]])

PREFIXES = {
    "hidream_o1": Row(
        "HiDream-O1",
        "HiDreamO1",
        {
            "image_model": "hidream_o1",
            "text_config_overrides": {
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
            },
            "vision_config_overrides": {
                "depth": 1,
                "hidden_size": 32,
                "num_heads": 2,
                "intermediate_size": 64,
            },
        },
        1,
        (3, 96, 128),
        values={"text_input_ids": _PROMPT_OF_O1},
    ),
}

# With references, by the ways in which models take them.
for _name, _method in {
    "flux2_klein": "index_timestep_zero",
    "qwen_image": "index_timestep_zero",
    "krea2": "index_timestep_zero",
    "omnigen2": None,
    "boogu": None,
}.items():
    _row = ROWS[_name]
    ROWS[f"{_name}_edit"] = replace(
        _row,
        values={
            **_row.values,
            "reference_latents": _tensors((1, *_row.latent[:-2], 6, 4), (1, *_row.latent[:-2], 4, 4)),
            "reference_latents_method": _method,
        },
    )


@cache
def tiny(name: str) -> ModelPatcher:
    return build((ROWS | WORDS | PREFIXES)[name])


def skip_before(version: str, what: str) -> None:
    """Skips a test on a ComfyUI older than ``version``."""
    if Version(comfyui_version.__version__) < Version(version):
        raise SkipTest(f"ComfyUI {comfyui_version.__version__} has no {what} yet")


def model_config(name: str) -> type:
    """A class of ``comfy.supported_models``. The ComfyUI that CI tests with has them all: only on an older
    one a test is skipped."""
    if not hasattr(comfy.supported_models, name):
        skip_before(comfyui.COMFYUI_VERSION, name)
    return getattr(comfy.supported_models, name)


def build(row: Row) -> ModelPatcher:
    config = model_config(row.config)(row.unet)
    config.unet_config.update(row.unet, dtype=torch.float32)  # some configurations have sizes of their own
    config.custom_operations = comfy.ops.disable_weight_init
    model = config.get_model({}, "", device=CPU)
    randomize(model.diffusion_model)
    row.prepare(model.diffusion_model)
    return ModelPatcher(model, load_device=CPU, offload_device=CPU)


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Weights of a size that keeps activations near 1, and modulations strong enough to matter."""
    g = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim >= 2:
            gain = 0.5 if "mod" in name.lower() or "adaln" in name.lower() else 1
            values = torch.randn(weight.shape, generator=g) * gain * weight[0].numel() ** -0.5
        elif "norm" in name and name.endswith("weight"):
            values = 1 + 0.15 * torch.randn(weight.shape, generator=g)
        else:
            values = 0.1 * torch.randn(weight.shape, generator=g)
        weight.data.copy_(values)


def concepts_of(count: int = 3) -> Concepts:
    return Concepts(tuple(f"concept {i}" for i in range(count)))


def sample(
    model: ModelPatcher, row: Row, *, batch: int = 1, cfg: float = 1.0, steps: int = 2, **options
) -> Tensor | NestedTensor:
    """What KSampler does."""
    return comfy.sample.sample(
        model,
        options.pop("noise", row.noise(batch)),
        steps,
        cfg,
        "euler",
        "simple",
        options.pop("positive", row.conditioning(2)),
        options.pop("negative", row.conditioning(3)),
        options.pop("latent", row.empty(batch)),
        disable_pbar=True,
        seed=1,
        **options,
    )
