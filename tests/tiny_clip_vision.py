"""A tiny CLIP, its vision tower that of the golden data, as CLIP_VISION and CLIP."""

from __future__ import annotations

from functools import cache

import comfy.ops
import comfy.sd
import comfy.supported_models_base
import torch
from comfy import sd1_clip
from comfy.clip_vision import ClipVisionModel, convert_to_transformers

from golden_files import FOLDER, Golden

GOLDEN = Golden.load(FOLDER / "clip_vit.safetensors")
CONFIG = GOLDEN.config
WIDTH = CONFIG["embed"]


def weights(prefix: str = "") -> dict[str, torch.Tensor]:
    prefix = f"weights.{prefix}"
    return {k.removeprefix("weights."): v.float() for k, v in GOLDEN.tensors.items() if k.startswith(prefix)}


SHAPE = {
    "hidden_size": CONFIG["width"],
    "num_hidden_layers": CONFIG["layers"],
    "num_attention_heads": CONFIG["heads"],
    "intermediate_size": 4 * CONFIG["width"],
    "hidden_act": "quick_gelu",
    "image_size": CONFIG["image"],
    "patch_size": CONFIG["patch"],
    "num_channels": 3,
}


@cache
def clip_vision() -> ClipVisionModel:
    model = ClipVisionModel({"model_type": "clip_vision_model", **SHAPE, "projection_dim": WIDTH})
    missing, unexpected = model.load_sd(convert_to_transformers(weights("visual."), "visual."))
    assert not missing
    assert not unexpected
    return model


@cache
def text_encoder(width: int = WIDTH) -> comfy.sd.CLIP:
    """A CLIP with ComfyUI's tokenizer, whose texts are of that width."""
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 1, "num_hidden_layers": 3}
    target = comfy.supported_models_base.ClipTarget(sd1_clip.SD1Tokenizer, sd1_clip.SD1ClipModel)
    clip = comfy.sd.CLIP(target=target, model_options={"dtype": torch.float32, "clip_l_model_config": size})
    encoder = clip.cond_stage_model.clip_l
    encoder.transformer.text_projection = comfy.ops.manual_cast.Linear(16, width, bias=False)
    g = torch.Generator().manual_seed(0)
    for name, weight in clip.cond_stage_model.named_parameters():
        if weight.ndim > 1:
            weight.data.copy_(torch.randn(weight.shape, generator=g) * weight.shape[-1] ** -0.5)
        elif weight.ndim:
            weight.data.fill_(1.0 if "norm" in name else 0.0)
    return clip
