"""The demo text encoder: ComfyUI's Flux text encoder (T5 and CLIP-L) shrunk to 64 features.

The file keeps the embedding rows of the words that it was trained on, and one row for all other words.
"""

from __future__ import annotations

from pathlib import Path

import comfy.sd
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.text_encoders.flux import FluxTokenizer, flux_clip

WIDTH = 64
T5_LENGTH = 32
MODEL_OPTIONS = {
    "t5xxl_model_config": {"d_model": WIDTH, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 2},
    "clip_l_model_config": {
        "hidden_size": WIDTH,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
    },
}
# state-dict prefix: (embedding table, its full size)
TABLES = {
    "t5xxl.": ("shared.weight", 32128),
    "clip_l.": ("text_model.embeddings.token_embedding.weight", 49408),
}


def expand(state_dict: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The file's contents as the two state dicts that ComfyUI's CLIP loads, tables at full size."""
    parts = []
    for prefix, (table, size) in TABLES.items():
        part = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        rows, ids = part.pop(table), part.pop("ids")
        part[table] = rows[:1].repeat(size, 1)
        part[table][ids.long()] = rows[1:]
        parts.append(part)
    return parts


def load_text_encoder(path: str | Path) -> comfy.sd.CLIP:
    """A CLIP object for the demo model, made of ComfyUI's own classes and tokenizers."""
    clip = comfy.sd.CLIP(
        target=comfy.supported_models_base.ClipTarget(FluxTokenizer, flux_clip(dtype_t5=torch.float32)),
        model_options=dict(MODEL_OPTIONS),
    )
    for part in expand(comfy.utils.load_torch_file(str(path), safe_load=True)):
        clip.load_sd(part)
    clip.set_tokenizer_option("t5xxl_min_length", T5_LENGTH)
    return clip
