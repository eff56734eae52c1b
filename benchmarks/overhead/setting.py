"""What the benchmarks run in: ComfyUI and the plugin, models of any size with random weights, and one
evaluation of a model through ComfyUI's own sampling, timed."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher

    from concept_attention.core.concepts import ConceptTokens

ROOT = Path(__file__).resolve().parents[2]


def load(flags: Sequence[str] = ()) -> None:
    """Makes ComfyUI, started with these flags, importable, and this plugin as ``concept_attention``."""
    if "concept_attention" in sys.modules:
        return
    sys.path.insert(0, str(ROOT / "demo"))
    import comfyui

    path = comfyui.find()
    if path is None:
        sys.exit(f"No ComfyUI was found. {comfyui.HELP}")
    sys.path.insert(0, str(path))
    import utils.install_util  # noqa: F401 - before ComfyUI 0.18 puts another module called utils in its place

    argv, sys.argv = sys.argv, ["main.py", "--disable-api-nodes", *flags]
    if not torch.cuda.is_available():
        sys.argv.append("--cpu")
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args

    sys.argv = argv
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    comfyui.name_plugin()


@dataclass(frozen=True)
class Size:
    """A Flux.1 with heads of 128 features."""

    heads: int
    depth: int
    depth_single: int
    context: int
    pooled: int
    text_tokens: int

    @property
    def hidden(self) -> int:
        return 128 * self.heads

    def latent(self, height: int, width: int) -> tuple[int, ...]:
        return 16, height // 8, width // 8

    def conditioning(self, g: torch.Generator) -> dict:
        return {"pooled_output": torch.randn(1, self.pooled, generator=g), "guidance": 3.5}

    def concepts(self, count: int, g: torch.Generator) -> ConceptTokens:
        from concept_attention.core.concepts import ConceptTokens

        return ConceptTokens.single(torch.randn(count, self.context, generator=g))


FLUX_DEV = Size(heads=24, depth=19, depth_single=38, context=4096, pooled=768, text_tokens=256)
# An eighth of the depth and a quarter of the width; text tokens in the ratio that they have to 1024 x 1024.
SCALED = Size(heads=6, depth=3, depth_single=6, context=1024, pooled=192, text_tokens=64)
TINY = Size(heads=1, depth=2, depth_single=1, context=32, pooled=16, text_tokens=8)


@dataclass(frozen=True)
class OtherSize:
    """A model of another family, by the arguments of ComfyUI's class, and what it is given.

    Attributes:
        config: of ``comfy.supported_models``.
        model: the diffusion model's class, below ``comfy.ldm``.
        unet: the arguments of the diffusion model's class.
        context: C, the width of text tokens.
        pixels: height and width of what it makes.
        channels, cell: of latents, and the pixels on a side of one of their cells.
        frames: of latents, if they have any.
        text_tokens: of the prompt.
        name_tokens: of each concept in its template; its name is the last but one to three of them.
        pooled: width of the pooled vector, if the model takes one.
        masked: whether the prompt comes with an attention mask.
    """

    config: str
    model: str
    unet: dict = field(hash=False)
    context: int
    pixels: tuple[int, int]
    channels: int = 16
    cell: int = 8
    frames: int | None = None
    text_tokens: int = 64
    name_tokens: tuple[int, ...] = (11, 12, 11, 13, 11)
    pooled: int | None = None
    masked: bool = False

    def latent(self, height: int, width: int) -> tuple[int, ...]:
        frames = () if self.frames is None else (self.frames,)
        return self.channels, *frames, height // self.cell, width // self.cell

    def conditioning(self, g: torch.Generator) -> dict:
        values = {} if self.pooled is None else {"pooled_output": torch.randn(1, self.pooled, generator=g)}
        return values | ({"attention_mask": torch.ones(1, self.text_tokens)} if self.masked else {})

    def concepts(self, count: int, g: torch.Generator) -> ConceptTokens:
        from concept_attention.core.concepts import ConceptTokens

        lengths = (self.name_tokens * count)[:count]
        sequences = tuple(torch.randn(length, self.context, generator=g) for length in lengths)
        return ConceptTokens(sequences, (slice(9, 10),) * count, lengths, "last token")


def other_sizes(share: int = 1, depth: int = 1, picture: int = 1024) -> dict[str, OtherSize]:
    """Models of a ``share`` of their widths and a ``depth`` of their depths, and squares of so many pixels.

    Stable Diffusion 3.5 large stays in its own proportions, with as many heads as blocks. Stable Diffusion XL
    stays as deep as it is, and up to twice as wide: reading words costs as much as a layer is wide, the layer
    the square of that. A video has about a ``share`` of its height, width, frames and text.
    """
    side, half = 38 // share, max(1, share // 2)
    square = (picture, picture)
    return {
        "Flux.2 Klein": OtherSize(
            "Flux2",
            "flux.model.Flux",
            {
                "image_model": "flux2",
                "in_channels": 128,
                "out_channels": 128,
                "vec_in_dim": None,
                "context_in_dim": 7680 // share,
                "hidden_size": 3072 // share,
                "mlp_ratio": 3.0,
                "num_heads": 24 // share,
                "depth": 5 // depth,
                "depth_single_blocks": 20 // depth,
                "axes_dim": [32, 32, 32, 32],
                "theta": 2000,
                "patch_size": 1,
                "qkv_bias": False,
                "guidance_embed": False,
                "txt_ids_dims": [3],
                "global_modulation": True,
                "mlp_silu_act": True,
                "ops_bias": False,
            },
            7680 // share,
            square,
            channels=128,
            cell=16,
            text_tokens=512,
            name_tokens=(512,),
        ),
        "Qwen-Image": OtherSize(
            "QwenImage",
            "qwen_image.model.QwenImageTransformer2DModel",
            {
                "image_model": "qwen_image",
                "patch_size": 2,
                "in_channels": 64,
                "out_channels": 16,
                "num_layers": 60 // depth,
                "attention_head_dim": 128,
                "num_attention_heads": 24 // share,
                "joint_attention_dim": 3584 // share,
            },
            3584 // share,
            square,
            frames=1,
        ),
        "Z-Image": OtherSize(
            "ZImage",
            "lumina.model.NextDiT",
            {
                "image_model": "lumina2",
                "patch_size": 2,
                "in_channels": 16,
                "dim": 128 * (30 // share),
                "n_layers": 30 // depth,
                "n_refiner_layers": max(1, 2 // depth),
                "n_heads": 30 // share,
                "n_kv_heads": 30 // share,
                "qk_norm": True,
                "cap_feat_dim": 2560 // share,
                "axes_dims": [32, 48, 48],
                "axes_lens": [1536, 512, 512],
                "rope_theta": 256.0,
                "ffn_dim_multiplier": 8 / 3,
                "z_image_modulation": True,
                "time_scale": 1000.0,
                "pad_tokens_multiple": 32,
            },
            2560 // share,
            square,
        ),
        "Stable Diffusion 3.5": OtherSize(
            "SD3",
            "modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper",
            {
                "input_size": None,
                "patch_size": 2,
                "in_channels": 16,
                "depth": side,
                "adm_in_channels": 2048 // share,
                "context_embedder_config": {
                    "target": "torch.nn.Linear",
                    "params": {"in_features": 4096 // share, "out_features": 64 * side},
                },
                "num_patches": 192 * 192,
                "pos_embed_max_size": 192,
                "qk_norm": "rms",
            },
            4096 // share,
            square,
            name_tokens=(77,),
            pooled=2048 // share,
        ),
        "Stable Diffusion XL": OtherSize(
            "SDXL",
            "modules.diffusionmodules.openaimodel.UNetModel",
            {
                "image_size": 32,
                "in_channels": 4,
                "out_channels": 4,
                # Channels are in groups of 32, and those with attention in heads of 64.
                "model_channels": 32 * (10 // half),
                "num_res_blocks": [2, 2, 2],
                "channel_mult": (1, 2, 4),
                "num_head_channels": 64,
                "use_spatial_transformer": True,
                "use_linear_in_transformer": True,
                "transformer_depth": [0, 0, 2, 2, 10, 10],
                "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
                "transformer_depth_middle": 10,
                "context_dim": 2048 // half,
                "num_classes": "sequential",
                "adm_in_channels": 1280 + 6 * 256,
                "legacy": False,
            },
            2048 // half,
            square,
            channels=4,
            text_tokens=77,
            name_tokens=(77,),
            pooled=1280,
        ),
        "Wan 2.1": OtherSize(
            "WAN21_T2V",
            "wan.model.WanModel",
            {
                "image_model": "wan2.1",
                "model_type": "t2v",
                "dim": 128 * (40 // share),
                "ffn_dim": 13824 // share,
                "num_heads": 40 // share,
                "num_layers": 40 // depth,
                "text_dim": 4096 // share,
            },
            4096 // share,
            (480 // share // 16 * 16, 832 // share // 16 * 16),
            frames=20 // share + 1,
            text_tokens=512 // share,
            name_tokens=(512 // share,),
        ),
        "LTX-Video": OtherSize(
            "LTXV",
            "lightricks.model.LTXVModel",
            {
                "image_model": "ltxv",
                "cross_attention_dim": 64 * (32 // share),
                "num_attention_heads": 32 // share,
                "num_layers": 28 // depth,
                "caption_channels": 4096 // share,
            },
            4096 // share,
            (2 * 704 // (share + 1) // 32 * 32, 2 * 1280 // (share + 1) // 32 * 32),
            channels=128,
            cell=32,
            frames=15 // share + 1,
            text_tokens=128 // share,
            masked=True,
        ),
    }


def other_base(size: OtherSize, dtype: torch.dtype, device: torch.device) -> BaseModel:
    """ComfyUI's model, its weights as they come."""
    import comfy.ops
    import comfy.supported_models

    config = getattr(comfy.supported_models, size.config)(size.unet)
    config.unet_config.update(size.unet, dtype=dtype)
    config.custom_operations = comfy.ops.disable_weight_init
    return config.get_model({}, "", device=device)


def other_model(size: OtherSize, dtype: torch.dtype, device: torch.device) -> ModelPatcher:
    """With random weights, drawn so that activations keep their size."""
    from comfy.model_patcher import ModelPatcher

    torch.manual_seed(0)
    model = other_base(size, dtype, device)
    for name, weight in model.diffusion_model.named_parameters():
        if weight.ndim >= 2:
            weight.data.normal_(0, weight[0].numel() ** -0.5)
        else:
            weight.data.fill_(name.endswith("weight"))
    return ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


def random_model(size: Size, dtype: torch.dtype, device: torch.device) -> ModelPatcher:
    """Through ComfyUI's loader. Weights are drawn so that activations keep their size."""
    import comfy.sd

    torch.manual_seed(0)
    hidden, weights = size.hidden, {}

    def linear(name: str, fan_in: int, fan_out: int, gain: float = 1.0) -> None:
        weight = torch.empty(fan_out, fan_in, dtype=dtype, device=device).normal_(0, gain * fan_in**-0.5)
        weights[f"{name}.weight"] = weight.cpu()
        weights[f"{name}.bias"] = torch.zeros(fan_out, dtype=dtype)

    def norms(name: str) -> None:
        for norm in ("query_norm", "key_norm"):
            weights[f"{name}.{norm}.scale"] = torch.ones(128, dtype=dtype)

    linear("img_in", 64, hidden)
    linear("txt_in", size.context, hidden)
    for name, width in {"time_in": 256, "vector_in": size.pooled, "guidance_in": 256}.items():
        linear(f"{name}.in_layer", width, hidden)
        linear(f"{name}.out_layer", hidden, hidden)
    for i in range(size.depth):
        for side in ("img", "txt"):
            block = f"double_blocks.{i}.{side}"
            linear(f"{block}_mod.lin", hidden, 6 * hidden, 0.4)
            linear(f"{block}_attn.qkv", hidden, 3 * hidden)
            linear(f"{block}_attn.proj", hidden, hidden)
            linear(f"{block}_mlp.0", hidden, 4 * hidden)
            linear(f"{block}_mlp.2", 4 * hidden, hidden)
            norms(f"{block}_attn.norm")
    for i in range(size.depth_single):
        linear(f"single_blocks.{i}.linear1", hidden, 7 * hidden)
        linear(f"single_blocks.{i}.linear2", 5 * hidden, hidden)
        linear(f"single_blocks.{i}.modulation.lin", hidden, 3 * hidden, 0.4)
        norms(f"single_blocks.{i}.norm")
    linear("final_layer.linear", hidden, 64)
    linear("final_layer.adaLN_modulation.1", hidden, 2 * hidden, 0.1)
    return comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": dtype})


@dataclass(frozen=True)
class Scene:
    """What is given to the model: empty latents for ``height`` x ``width`` pixels, and a prompt."""

    size: Size | OtherSize
    height: int
    width: int
    batch: int = 1

    @property
    def patches(self) -> int:
        return self.height * self.width // 256

    @property
    def described(self) -> str:
        frames = self.size.latent(self.height, self.width)[1:-2]
        return f"{self.height} x {self.width}" + "".join(
            f", {n} frames of the latent" for n in frames if n > 1
        )

    @property
    def latent(self) -> Tensor:
        return torch.zeros(self.batch, *self.size.latent(self.height, self.width))

    @property
    def conditioning(self) -> list:
        g = torch.Generator().manual_seed(1)
        values = self.size.conditioning(g)
        return [[torch.randn(1, self.size.text_tokens, self.size.context, generator=g), values]]


def observed(model: ModelPatcher, size: Size | OtherSize, concepts: int, **options) -> ModelPatcher:
    from concept_attention.core.concepts import Concepts
    from concept_attention.core.observing.observe import WhatToRecord, observe

    tokens = size.concepts(concepts, torch.Generator().manual_seed(2))
    names = Concepts(tuple(f"concept {i}" for i in range(concepts)))
    return observe(model, WhatToRecord(names, tokens, budget=2**40, **options))


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds. Of a GPU when all that was asked of it is done; of a CPU the time that this process was given,
    whatever else the machine does."""
    if device.type != "cuda":
        return time.process_time

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def evaluate(model: ModelPatcher, scene: Scene, evaluations: int = 1) -> tuple[list[float], Tensor]:
    """Samples with ComfyUI and a sampler that only evaluates the model: seconds of each, and the samples."""
    import comfy.sample
    from comfy.samplers import CFGGuider, Sampler

    seconds = []
    now = clock(model.load_device)

    class Timed(Sampler):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
            x = noise
            for sigma in sigmas[:-1]:
                start = now()
                out = model_wrap(noise, sigma.expand(len(noise)), **extra_args)
                seconds.append(now() - start)
                x = x + out
            return x

    guider = CFGGuider(model)
    guider.inner_set_conds({"positive": scene.conditioning})
    latent = scene.latent
    sigmas = torch.linspace(1, 0, evaluations + 1)
    noise = comfy.sample.prepare_noise(latent, 0)
    with torch.inference_mode():
        samples = guider.sample(noise, latent, Timed(), sigmas, disable_pbar=True, seed=0)
    return seconds, samples
