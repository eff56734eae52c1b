"""Agreement with diffusers: its transformers, with the same weights, paint the same; and what concepts score,
computed by its modules and nothing of ours, is what was recorded."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple
from unittest import mock

import comfy.utils
import pytest
import torch
from einops import rearrange
from tiny_models import ROWS, concepts_of, sample, tiny
from torch import Tensor, nn
from torch.nn import functional as F

from concept_attention.core.concepts import ConceptTokens
from concept_attention.core.observing.latents import recording_of
from concept_attention.core.observing.observe import WhatToRecord, observe

pytest.importorskip(
    "diffusers",
    reason="diffusers is not installed; it is among pyproject.toml's dev group from Python 3.11 on",
)

from diffusers.models.embeddings import apply_rotary_emb, get_3d_rotary_pos_embed
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from diffusers.models.transformers.transformer_flux2 import (
    Flux2Modulation,
    Flux2Transformer2DModel,
)
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.transformers.transformer_z_image import (
    TimestepEmbedder,
    ZImageTransformer2DModel,
)

TOLERANCE = 1e-5


class Seen(NamedTuple):
    """What the picture had in an attention: keys and values (B, H, N, d), and its output (B, N, D)."""

    k: Tensor
    v: Tensor
    out: Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, picture: Seen) -> Tensor:
    """Concepts (B, H, K, d) over themselves and the picture: (B, K, D)."""
    k, v = torch.cat((k, picture.k), 2), torch.cat((v, picture.v), 2)
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return rearrange(weights @ v, "b h k d -> b k (h d)")


def heads(x: Tensor, count: int) -> Tensor:
    return rearrange(x, "b l (h d) -> b h l d", h=count)


class Flux2:
    row = ROWS["flux2"]
    picture = slice(512, None)

    def __init__(self) -> None:
        unet = self.row.unet
        self.model = Flux2Transformer2DModel(
            in_channels=unet["in_channels"],
            num_layers=unet["depth"],
            num_single_layers=unet["depth_single_blocks"],
            attention_head_dim=128,
            num_attention_heads=unet["num_heads"],
            joint_attention_dim=self.row.width,
        )
        norms_as_in_comfyui(self.model.transformer_blocks, "attn")
        norms_as_in_comfyui(self.model.single_transformer_blocks, "attn")
        self.names = comfy.utils.flux_to_diffusers(unet)
        for ours in (
            "double_stream_modulation_img",
            "double_stream_modulation_txt",
            "single_stream_modulation",
        ):
            self.names[f"{ours}.linear.weight"] = f"{ours}.lin.weight"
        for theirs, ours in {"timestep": "time_in", "guidance": "guidance_in"}.items():
            embedder = f"time_guidance_embed.{theirs}_embedder"
            self.names[f"{embedder}.linear_1.weight"] = f"{ours}.in_layer.weight"
            self.names[f"{embedder}.linear_2.weight"] = f"{ours}.out_layer.weight"

    def velocity(self, x: Tensor, timestep: Tensor, context: Tensor, guidance: Tensor, **_) -> Tensor:
        rows, columns = x.shape[-2:]
        places = torch.cartesian_prod(*(torch.arange(n) for n in (1, rows, columns, 1)))
        self.temb = self.model.time_guidance_embed(timestep * 1000, guidance * 1000)
        out = self.model(
            rearrange(x, "b c h w -> b (h w) c"),
            context,
            timestep,
            places,
            torch.cartesian_prod(*(torch.arange(n) for n in (1, 1, 1, context.shape[1]))),
            guidance,
        ).sample
        return rearrange(out, "b (h w) c -> b c h w", h=rows)

    def joint(self, attentions: list[tuple]) -> list[tuple]:
        return attentions[: self.row.unet["depth"]]

    def concepts(self, tokens: ConceptTokens, seen: list[Seen]) -> list[Tensor]:
        """Each with the position of its name's last token, in a text filled to 512 tokens from the left."""
        hidden = self.model.context_embedder(last_tokens(tokens))[None]
        places = torch.zeros(len(tokens.spans), 4)
        for place, span, length in zip(places, tokens.spans, tokens.lengths, strict=True):
            place[3] = 512 - length + span.stop - 1
        rotary = self.model.pos_embed(places)
        modulation = Flux2Modulation.split(self.model.double_stream_modulation_txt(self.temb), 2)
        (shift1, scale1, gate1), (shift2, scale2, gate2) = modulation
        outputs = []
        for block, picture in zip(self.model.transformer_blocks, seen, strict=True):
            attn = block.attn
            x = (1 + scale1) * block.norm1_context(hidden) + shift1
            q = attn.norm_added_q(heads(attn.add_q_proj(x), attn.heads))
            k = attn.norm_added_k(heads(attn.add_k_proj(x), attn.heads))
            q, k = (apply_rotary_emb(x, rotary) for x in (q, k))
            outputs.append(attend(q, k, heads(attn.add_v_proj(x), attn.heads), picture))
            hidden = hidden + gate1 * attn.to_add_out(outputs[-1])
            hidden = hidden + gate2 * block.ff_context((1 + scale2) * block.norm2_context(hidden) + shift2)
        return outputs


class ZImage:
    row = replace(ROWS["z_image"], latent=(16, 8, 10))
    picture = slice(0, 32)  # diffusers has it before the text; 20 tokens are filled up to 32

    def __init__(self) -> None:
        unet = self.row.unet
        self.model = ZImageTransformer2DModel(
            dim=unet["dim"],
            n_layers=unet["n_layers"],
            n_refiner_layers=unet["n_refiner_layers"],
            n_heads=unet["n_heads"],
            n_kv_heads=unet["n_heads"],
            cap_feat_dim=self.row.width,
            axes_dims=unet["axes_dims"],
            axes_lens=unet["axes_lens"],
        )
        self.model.t_embedder = TimestepEmbedder(256, mid_size=unet["dim"])  # 1024 of models of any size
        for blocks in (self.model.layers, self.model.noise_refiner, self.model.context_refiner):
            norms_as_in_comfyui(blocks, "attention")
        self.names = comfy.utils.z_image_to_diffusers(unet)

    def velocity(self, x: Tensor, timestep: Tensor, context: Tensor, **_) -> Tensor:
        self.temb = self.model.t_embedder((1 - timestep) * 1000)
        out = self.model(list(x[:, :, None]), 1 - timestep, list(context)).sample
        return -torch.stack(out)[:, :, 0]

    def joint(self, attentions: list[tuple]) -> list[tuple]:
        return attentions[-self.row.unet["n_layers"] :]

    def concepts(self, tokens: ConceptTokens, seen: list[Seen]) -> list[Tensor]:
        """Each with the position of its name's first token, after its whole prompt was refined."""
        embedded, places = [], []
        for sequence, span in zip(tokens.sequences, tokens.spans, strict=True):
            _, (text,), _, _, (at,), _, (filling,) = self.model.patchify_and_embed(
                [torch.zeros(16, 1, 2, 2)], [sequence], 2, 1
            )
            text, at, *_ = self.model._prepare_sequence(
                [self.model.cap_embedder(text)], [at], [filling], self.model.cap_pad_token
            )
            for block in self.model.context_refiner:
                text = block(text, None, at)
            embedded.append(text[0, span.stop - 1])
            places.append(at[:, span.start])
        hidden, rotary = torch.stack(embedded)[None], torch.stack(places, 1)
        outputs = []
        for block, picture in zip(self.model.layers, seen, strict=True):
            attn = block.attention
            modulation = block.adaLN_modulation(self.temb)[:, None].chunk(4, 2)
            scale1, gate1, scale2, gate2 = modulation
            x = block.attention_norm1(hidden) * (1 + scale1)
            q = rotated(attn.norm_q(heads(attn.to_q(x), attn.heads)), rotary)
            k = rotated(attn.norm_k(heads(attn.to_k(x), attn.heads)), rotary)
            outputs.append(attend(q, k, heads(attn.to_v(x), attn.heads), picture))
            hidden = hidden + gate1.tanh() * block.attention_norm2(attn.to_out[0](outputs[-1]))
            mlp = block.feed_forward(block.ffn_norm1(hidden) * (1 + scale2))
            hidden = hidden + gate2.tanh() * block.ffn_norm2(mlp)
        return outputs


def rotated(x: Tensor, by: Tensor) -> Tensor:
    """(B, H, K, d), by complex numbers (1, K, d / 2): adjacent pairs of features, as diffusers' processor."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * by[:, None]).flatten(-2)


class StableDiffusion3:
    row = replace(ROWS["sd35_medium"], latent=(16, 8, 10))
    picture = slice(0, 20)  # diffusers has it before the text

    def __init__(self) -> None:
        unet = self.row.unet
        self.model = SD3Transformer2DModel(
            num_layers=unet["depth"],
            num_attention_heads=unet["depth"],
            joint_attention_dim=self.row.width,
            caption_projection_dim=64 * unet["depth"],
            pooled_projection_dim=unet["adm_in_channels"],
            pos_embed_max_size=unet["pos_embed_max_size"],
            dual_attention_layers=tuple(unet["x_block_self_attn_layers"]),
            qk_norm="rms_norm",
        )
        self.names = comfy.utils.mmdit_to_diffusers(unet)

    def velocity(self, x: Tensor, timestep: Tensor, context: Tensor, y: Tensor, **_) -> Tensor:
        self.temb = self.model.time_text_embed(timestep, y)
        return self.model(x, context, y, timestep).sample

    def joint(self, attentions: list[tuple]) -> list[tuple]:
        """Others are of the picture alone."""
        return [a for a in attentions if a[0].shape[2] > 20]

    def concepts(self, tokens: ConceptTokens, seen: list[Seen]) -> list[Tensor]:
        hidden = self.model.context_embedder(last_tokens(tokens))[None].expand(len(self.temb), -1, -1)
        outputs = []
        for block, picture in zip(self.model.transformer_blocks, seen, strict=True):
            attn = block.attn
            if block.context_pre_only:
                x = block.norm1_context(hidden, self.temb)
            else:
                x, *modulation = block.norm1_context(hidden, emb=self.temb)
            q = attn.norm_added_q(heads(attn.add_q_proj(x), attn.heads))
            k = attn.norm_added_k(heads(attn.add_k_proj(x), attn.heads))
            outputs.append(attend(q, k, heads(attn.add_v_proj(x), attn.heads), picture))
            if not block.context_pre_only:
                gate1, shift2, scale2, gate2 = (m[:, None] for m in modulation)
                hidden = hidden + gate1 * attn.to_add_out(outputs[-1])
                x = block.norm2_context(hidden) * (1 + scale2) + shift2
                hidden = hidden + gate2 * block.ff_context(x)
        return outputs


class CogVideoX:
    # Of the size that the model was made for: elsewhere ComfyUI's positions differ from diffusers'.
    row = replace(ROWS["cogvideox"], latent=(16, 3, 8, 10))
    picture = slice(7, None)

    def __init__(self) -> None:
        unet = self.row.unet
        self.model = CogVideoXTransformer3DModel(
            num_attention_heads=unet["num_attention_heads"],
            time_embed_dim=unet["time_embed_dim"],
            text_embed_dim=unet["text_embed_dim"],
            num_layers=unet["num_layers"],
            use_rotary_positional_embeddings=True,
        )
        self.names = {name: _cogvideox(name) for name in self.model.state_dict()}

    def velocity(self, x: Tensor, timestep: Tensor, context: Tensor, **_) -> Tensor:
        self.temb = self.model.time_embedding(self.model.time_proj(timestep))
        frames, rows, columns = x.shape[2], x.shape[3] // 2, x.shape[4] // 2
        scale = 1.875  # ComfyUI's positions of rows and columns, which diffusers' pipeline does not scale
        corners = ((0, 0), (scale * rows, scale * columns))
        rotary = get_3d_rotary_pos_embed(64, corners, (rows, columns), frames)
        return self.model(x.transpose(1, 2), context, timestep, image_rotary_emb=rotary).sample.transpose(
            1, 2
        )

    def joint(self, attentions: list[tuple]) -> list[tuple]:
        return attentions

    def concepts(self, tokens: ConceptTokens, seen: list[Seen]) -> list[Tensor]:
        hidden = self.model.patch_embed.text_proj(last_tokens(tokens))[None].expand(len(self.temb), -1, -1)
        nothing = hidden[:, :0]
        outputs = []
        for block, picture in zip(self.model.transformer_blocks, seen, strict=True):
            attn = block.attn1
            _, x, _, gate1 = block.norm1(nothing, hidden, self.temb)
            q = attn.norm_q(heads(attn.to_q(x), attn.heads))
            k = attn.norm_k(heads(attn.to_k(x), attn.heads))
            outputs.append(attend(q, k, heads(attn.to_v(x), attn.heads), picture))
            hidden = hidden + gate1 * attn.to_out[0](outputs[-1])
            _, x, _, gate2 = block.norm2(nothing, hidden, self.temb)
            hidden = hidden + gate2 * block.ff(x)
        return outputs


def _cogvideox(name: str) -> str:
    """ComfyUI's name for one of diffusers' weights."""
    for theirs, ours in {
        "transformer_blocks.": "blocks.",
        "attn1.to_out.0": "attn_out",
        "attn1.to_": "",
        "attn1.": "",
        "ff.net.0.proj": "ff_proj",
        "ff.net.2": "ff_out",
        "time_embedding.linear_": "time_embedding_linear_",
    }.items():
        name = name.replace(theirs, ours)
    return name


def last_tokens(tokens: ConceptTokens) -> Tensor:
    return torch.stack([s[span.stop - 1] for s, span in zip(tokens.sequences, tokens.spans, strict=True)])


def transfer(model: nn.Module, weights: dict[str, Tensor], names: dict) -> None:
    """Fills diffusers' model with weights of ComfyUI's: each of its names stands for one of them, or for
    (weight, (axis, start, length) of a part, what to do with it)."""
    found = {}
    for name in model.state_dict():
        place = names[name]
        ours, part, change = (*place, None)[:3] if isinstance(place, tuple) else (place, None, None)
        value = weights[ours] if part is None else weights[ours].narrow(*part)
        found[name] = value if change is None else change(value)
    model.load_state_dict(found)


def norms_as_in_comfyui(blocks: nn.ModuleList, attention: str) -> None:
    """The RMS norms of queries and keys add 1e-6 or 1e-5 in diffusers, and hardly anything in ComfyUI: a
    difference of 1e-5 in scores."""
    for block in blocks:
        for name, norm in block.get_submodule(attention).named_modules():
            if name.startswith("norm_"):
                norm.eps = torch.finfo(torch.float32).eps


def relative(ours: Tensor, expected: Tensor) -> float:
    assert ours.shape == expected.shape
    return float((ours.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("twin", [Flux2, ZImage, StableDiffusion3, CogVideoX], ids=lambda t: t.__name__)
def test_diffusers_paints_the_same_and_scores_concepts_alike(twin):
    row = twin.row
    model = tiny(next(name for name, other in ROWS.items() if other.family == row.family))
    calls: list[tuple] = []
    hook = model.model.diffusion_model.register_forward_hook(
        lambda module, args, kwargs, out: calls.append((args, kwargs, out)), with_kwargs=True
    )
    tokens = row.concept_tokens()
    try:
        recording = recording_of(
            {"samples": sample(observe(model, WhatToRecord(concepts_of(), tokens)), row, batch=2, steps=1)}
        )
    finally:
        hook.remove()

    other = twin()
    transfer(other.model, model.model.diffusion_model.state_dict(), other.names)
    ((args, kwargs, velocity),) = calls
    attentions: list[tuple] = []
    attention = F.scaled_dot_product_attention

    def seen(query: Tensor, key: Tensor, value: Tensor, **kwargs) -> Tensor:
        attentions.append((key, value, out := attention(query, key, value, **kwargs)))
        return out

    with mock.patch.object(F, "scaled_dot_product_attention", seen):
        assert relative(velocity, other.velocity(*args, **kwargs)) <= TOLERANCE

    pictures = []
    for k, v, out in other.joint(attentions):
        k, v, out = (x[:, :, other.picture] for x in (k, v, out))
        pictures.append(Seen(k, v, rearrange(out, "b h n d -> b n (h d)")))
    scores = recording.scores["output"][0]
    layers = zip(scores, other.concepts(tokens, pictures), pictures, strict=True)
    for recorded, concepts, picture in layers:
        frames, (rows, columns) = len(recorded) // 2, recorded.shape[-2:]
        expected = (concepts @ picture.out.mT)[..., : frames * rows * columns]
        expected = rearrange(expected, "b k (f h w) -> (b f) k h w", f=frames, h=rows)
        assert relative(recorded, expected) <= TOLERANCE
