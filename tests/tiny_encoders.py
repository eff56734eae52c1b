"""ComfyUI's tokenizers and text encoders for every family, the encoders shrunk and with random weights."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest.mock import patch

import comfy.ops
import comfy.sd
import comfy.supported_models_base
import sentencepiece
import torch
from comfy import sd1_clip
from comfy.text_encoders import lt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

WIDTH = 16
T5 = {"d_model": WIDTH, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 1}
CLIP = {"hidden_size": WIDTH, "intermediate_size": 32, "num_attention_heads": 1, "num_hidden_layers": 3}


def llm(layers: int = 4) -> dict[str, int]:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    }


@dataclass(frozen=True)
class EncoderRow:
    """A CLIP as ComfyUI's loaders put it together.

    Attributes:
        family: whose it is.
        tokenizer, model: classes below ``comfy.text_encoders``, or with a dot in front below ``comfy``; the
            second perhaps what returns one, or itself a class.
        rows: where in what it gives the tokens of "dragon" lie, and those of "hot air balloon".
        options: what shrinks it.
        length: how many tokens it gives for "dragon".
        width: of its tokens.
        arguments: of what returns the class.
        data: of a tokenizer that comes with the weights, made up.
    """

    family: str
    tokenizer: str
    model: str | type
    rows: tuple[tuple[int, int], tuple[int, int]]
    length: int
    options: dict[str, Any]
    width: int = WIDTH
    arguments: dict[str, Any] | None = field(default_factory=dict)
    data: Callable[[], dict[str, Any]] = dict


def _sentences() -> dict[str, Any]:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a dragon, a rock and the sky", "hot air balloon", "a user prompt"]),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    return {"spiece_model": torch.frombuffer(bytearray(model.getvalue()), dtype=torch.uint8)}


class _Mistral(sd1_clip.SDTokenizer):
    """Stands in for Mistral 3's: one token for each byte, and its words of command."""

    def __init__(self, embedding_directory=None, tokenizer_data=None):
        super().__init__(
            "",
            tokenizer_class=self,
            has_end_token=False,
            pad_to_max_length=False,
            pad_token=11,
            pad_left=True,
            max_length=99999999,
            min_length=1,
            disable_weights=True,
        )

    def from_pretrained(self, path: str):
        commands = ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
        tokenizer = _bytes("<s>", *commands)
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _bytes(*special: str) -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in special])
    return tokenizer


def _harmony() -> dict[str, Any]:
    words = ("<|start|>", "<|message|>", "<|end|>", "<|channel|>")
    return {
        "tokenizer_json": torch.frombuffer(bytearray(_bytes(*words).to_str().encode()), dtype=torch.uint8)
    }


def ltx2(projection: str, *widths: int) -> type:
    """LTX-2's encoder, its projection to the widths of picture and sound as small as its language model."""

    class Encoder(lt.LTXAVTEModel):
        def __init__(self, **options):
            super().__init__(text_projection_type=projection, **options)
            ops, language = self.gemma3_12b.operations, self.gemma3_12b.transformer.model.config
            states = language.hidden_size * (language.num_hidden_layers + 1)
            if projection == "dual_linear":
                self.text_embedding_projection = lt.DualLinearProjection(states, *widths, operations=ops)
            else:
                self.text_embedding_projection = ops.Linear(states, *widths, bias=False)

    return Encoder


class _Unquantized(comfy.ops.manual_cast):
    """ComfyUI's own experts have no weights until some are loaded."""

    class MoEExperts(nn.Module):
        def __init__(self, num_experts, in_features, out_features, bias=True, device=None, dtype=None):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, dtype=dtype))

        @contextlib.contextmanager
        def bank_resident(self, x: torch.Tensor) -> Iterator[nn.Module]:
            yield self

        def expert_linear(self, x: torch.Tensor, expert: int) -> torch.Tensor:
            return x @ self.weight[expert].mT


_GPT_OSS = {**llm(3), "head_dim": WIDTH, "num_local_experts": 2, "num_experts_per_tok": 1}
_T5 = {"t5xxl_model_config": T5}
_GEMMA3 = {"model_name": "gemma3_12b", "gemma3_12b_model_config": llm()}
_CLIPS = {"clip_l_model_config": CLIP, "clip_g_model_config": CLIP}
ENCODERS = {
    "flux1": EncoderRow(
        "Flux.1",
        "flux.FluxTokenizer",
        "flux.flux_clip",
        ((0, 1), (0, 3)),
        256,
        {"t5xxl_model_config": T5, "clip_l_model_config": CLIP},
        arguments={"dtype_t5": torch.float32},
    ),
    "chroma": EncoderRow(
        "Chroma", "pixart_t5.PixArtTokenizer", "pixart_t5.pixart_te", ((0, 1), (0, 3)), 2, _T5
    ),
    "cogvideox": EncoderRow(
        "CogVideoX", "cogvideo.CogVideoXTokenizer", "cogvideo.cogvideo_te", ((0, 1), (0, 3)), 226, _T5
    ),
    "mochi": EncoderRow("Mochi", "genmo.MochiT5Tokenizer", "genmo.mochi_te", ((0, 1), (0, 3)), 256, _T5),
    "auraflow": EncoderRow(
        "AuraFlow",
        "aura_t5.AuraT5Tokenizer",
        "aura_t5.AuraT5Model",
        ((0, 2), (0, 5)),
        256,
        {"pile_t5xl_model_config": T5},
        arguments=None,
    ),
    "sd3": EncoderRow(
        "Stable Diffusion 3",
        "sd3_clip.SD3Tokenizer",
        "sd3_clip.sd3_clip",
        ((1, 2), (1, 4)),
        77,
        _CLIPS,
        4096,
        arguments={"t5": False},
    ),
    "sd1": EncoderRow(
        "Stable Diffusion 1, 2, XL",
        ".sd1_clip.SD1Tokenizer",
        ".sd1_clip.SD1ClipModel",
        ((1, 2), (1, 4)),
        77,
        {"clip_l_model_config": CLIP},
        arguments=None,
    ),
    "sd2": EncoderRow(
        "Stable Diffusion 1, 2, XL",
        "sd2_clip.SD2Tokenizer",
        "sd2_clip.SD2ClipModel",
        ((1, 2), (1, 4)),
        77,
        {"clip_h_model_config": CLIP},
        arguments=None,
    ),
    "sdxl": EncoderRow(
        "Stable Diffusion 1, 2, XL",
        ".sdxl_clip.SDXLTokenizer",
        ".sdxl_clip.SDXLClipModel",
        ((1, 2), (1, 4)),
        77,
        _CLIPS,
        2 * WIDTH,
        arguments=None,
    ),
    "sdxl-refiner": EncoderRow(
        "Stable Diffusion 1, 2, XL",
        ".sdxl_clip.SDXLTokenizer",
        ".sdxl_clip.SDXLRefinerClipModel",
        ((1, 2), (1, 4)),
        77,
        {"clip_g_model_config": CLIP},
        arguments=None,
    ),
    "wan": EncoderRow(
        "Wan 2.1, 2.2",
        "wan.WanT5Tokenizer",
        "wan.te",
        ((0, 3), (0, 8)),
        512,
        {"umt5xxl_model_config": T5},
        data=_sentences,
    ),
    "ltx23": EncoderRow(
        "LTX-2",
        "lt.LTXAVGemmaTokenizer",
        ltx2("dual_linear", 2 * WIDTH, WIDTH),
        ((1, 4), (1, 9)),
        4,
        _GEMMA3,
        3 * WIDTH,
        arguments=None,
        data=_sentences,
    ),
    "ltxv": EncoderRow("LTX-Video", "lt.LTXVT5Tokenizer", "lt.ltxv_te", ((0, 1), (0, 3)), 128, _T5),
    "anima": EncoderRow(
        "Anima",
        "anima.AnimaTokenizer",
        "anima.te",
        ((0, 1), (0, 3)),
        2,
        {"qwen3_06b_model_config": llm()},
        width=WIDTH + 4,
    ),
    "hidream-o1": EncoderRow(
        "HiDream-O1",
        "hidream_o1.HiDreamO1Tokenizer",
        "hidream_o1.HiDreamO1TE",
        ((3, 4), (3, 6)),
        11,
        {},
        width=1,
        arguments=None,
    ),
    "cosmos": EncoderRow(
        "Cosmos-Predict2",
        "cosmos.CosmosT5Tokenizer",
        "cosmos.te",
        ((0, 1), (0, 3)),
        512,
        _T5,
    ),
    "cosmos1": EncoderRow("Cosmos 1", "cosmos.CosmosT5Tokenizer", "cosmos.te", ((0, 1), (0, 3)), 512, _T5),
    "pixart": EncoderRow(
        "PixArt Alpha, Sigma", "pixart_t5.PixArtTokenizer", "pixart_t5.pixart_te", ((0, 1), (0, 3)), 2, _T5
    ),
    "kandinsky5": EncoderRow(
        "Kandinsky 5",
        "kandinsky5.Kandinsky5Tokenizer",
        "kandinsky5.te",
        ((0, 1), (0, 3)),
        2,
        {"qwen25_7b_model_config": llm(), "clip_l_model_config": CLIP},
    ),
    "flux2-dev": EncoderRow(
        "Flux.2",
        "flux.Flux2Tokenizer",
        "flux.flux2_te",
        ((172, 178), (172, 187)),
        179,
        {"mistral3_24b_model_config": llm(31)},
        3 * WIDTH,
        data=lambda: {"mistral3_24b_tokenizer_class": _Mistral},
    ),
    "flux2-klein": EncoderRow(
        "Flux.2",
        "flux.KleinTokenizer",
        "flux.klein_te",
        ((3, 4), (3, 6)),
        512,
        {"qwen3_4b_model_config": llm(28)},
        3 * WIDTH,
    ),
    "flux2-klein-8b": EncoderRow(
        "Flux.2",
        "flux.KleinTokenizer8B",
        "flux.klein_te",
        ((3, 4), (3, 6)),
        512,
        {"qwen3_8b_model_config": llm(28)},
        3 * WIDTH,
        arguments={"model_type": "qwen3_8b"},
    ),
    "longcat": EncoderRow(
        "LongCat-Image",
        "longcat_image.LongCatImageTokenizer",
        "longcat_image.te",
        ((0, 1), (0, 3)),
        512,
        {"qwen25_7b_model_config": llm()},
    ),
    "ovis": EncoderRow(
        "Ovis-Image", "ovis.OvisTokenizer", "ovis.te", ((1, 2), (1, 4)), 256, {"qwen3_2b_model_config": llm()}
    ),
    "hunyuan-video": EncoderRow(
        "HunyuanVideo",
        "hunyuan_video.HunyuanVideoTokenizer",
        "hunyuan_video.hunyuan_video_clip",
        ((1, 2), (1, 5)),
        3,
        {"llama_model_config": llm(), "clip_l_model_config": CLIP},
        arguments={"dtype_llama": torch.float32},
    ),
    "hunyuan-image": EncoderRow(
        "HunyuanVideo",
        "hunyuan_image.HunyuanImageTokenizer",
        "hunyuan_image.te",
        ((0, 1), (0, 3)),
        2,
        {"qwen25_7b_model_config": llm()},
        arguments={"byt5": False},
    ),
    "hunyuan-video-15": EncoderRow(
        "HunyuanVideo",
        "hunyuan_video.HunyuanVideo15Tokenizer",
        "hunyuan_image.te",
        ((0, 1), (0, 3)),
        6,
        {"qwen25_7b_model_config": llm()},
        arguments={"byt5": False},
    ),
    "ideogram4": EncoderRow(
        "Ideogram 4",
        "ideogram4.Ideogram4Tokenizer",
        "ideogram4.te",
        ((3, 4), (3, 6)),
        9,
        {"qwen3vl_8b_model_config": llm(36)},
        13 * WIDTH,
    ),
    "ideogram4-vl": EncoderRow(
        "Ideogram 4",
        "ideogram4.Ideogram4Qwen3VLTokenizer",
        "ideogram4.te_qwen3vl",
        ((3, 4), (3, 6)),
        9,
        {"qwen3vl_8b_model_config": llm(36)},
        13 * WIDTH,
    ),
    "joyimage": EncoderRow(
        "JoyImage",
        "joyimage.JoyImageTokenizer",
        "joyimage.te",
        ((2, 3), (2, 5)),
        8,
        {"qwen3vl_8b_model_config": llm()},
    ),
    "krea2": EncoderRow(
        "Krea 2",
        "krea2.Krea2Tokenizer",
        "krea2.te",
        ((0, 1), (0, 3)),
        6,
        {"qwen3vl_4b_model_config": llm(36)},
        12 * WIDTH,
    ),
    "mage-flow": EncoderRow(
        "Mage-Flow",
        "mage_flow.MageFlowTokenizer",
        "mage_flow.te",
        ((0, 1), (0, 3)),
        6,
        {"qwen3vl_4b_model_config": llm()},
    ),
    "minimax-h3": EncoderRow(
        "MiniMax H3",
        "minimax.MiniMaxH3Tokenizer",
        "minimax.te",
        ((0, 1), (0, 3)),
        1,
        {"qwen3vl_32b_model_config": llm()},
    ),
    "lumina2": EncoderRow(
        "Lumina 2",
        "lumina2.LuminaTokenizer",
        "lumina2.te",
        ((1, 4), (1, 9)),
        4,
        {"gemma2_2b_model_config": llm()},
        data=_sentences,
    ),
    "pixeldit": EncoderRow(
        "PixelDiT",
        "pixeldit.PixelDiTGemma2Tokenizer",
        "pixeldit.pixeldit_te",
        ((2, 5), (2, 10)),
        300,
        {"gemma2_2b_model_config": llm()},
        data=_sentences,
    ),
    "z-image": EncoderRow(
        "Z-Image",
        "z_image.ZImageTokenizer",
        "z_image.te",
        ((3, 4), (3, 6)),
        9,
        {"qwen3_4b_model_config": llm()},
    ),
    "omnigen2": EncoderRow(
        "OmniGen2",
        "omnigen2.Omnigen2Tokenizer",
        "omnigen2.te",
        ((23, 24), (23, 26)),
        26,
        {"qwen25_3b_model_config": llm()},
    ),
    "boogu": EncoderRow(
        "Boogu",
        "boogu.BooguTokenizer",
        "boogu.te",
        ((29, 30), (29, 32)),
        32,
        {"qwen3vl_8b_model_config": llm()},
    ),
    "hidream-i1": EncoderRow(
        "HiDream-I1",
        "hidream.HiDreamTokenizer",
        "hidream.hidream_clip",
        ((0, 1), (0, 3)),
        128,
        {**_T5, **_CLIPS, "llama_model_config": llm()},
        arguments={"dtype_t5": torch.float32, "dtype_llama": torch.float32},
    ),
    "kandinsky5-image": EncoderRow(
        "Kandinsky 5",
        "kandinsky5.Kandinsky5TokenizerImage",
        "kandinsky5.te",
        ((0, 1), (0, 3)),
        2,
        {"qwen25_7b_model_config": llm(), **_CLIPS},
    ),
    "lens": EncoderRow(
        "Lens",
        "gpt_oss.LensTokenizer",
        "gpt_oss.lens_te",
        ((301, 307), (301, 316)),
        402,
        {"gpt_oss_config": _GPT_OSS, "selected_layers": (0, 1, 2), "custom_operations": _Unquantized},
        3 * WIDTH,
        data=_harmony,
    ),
    "qwen-image": EncoderRow(
        "Qwen-Image",
        "qwen_image.QwenImageTokenizer",
        "qwen_image.te",
        ((0, 1), (0, 3)),
        6,
        {"qwen25_7b_model_config": llm()},
    ),
}


def found(path: str):
    """A class or function by its path below ``comfy.text_encoders``."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f".{module}", "comfy.text_encoders"), name)


@cache
def tiny_clip(name: str) -> comfy.sd.CLIP:
    return clip_of(ENCODERS[name])


def _blind(*args, **kwargs) -> nn.Module:
    return nn.Module()


@contextlib.contextmanager
def blind() -> Iterator[None]:
    """Builds encoders without what sees pictures, which has no options. Names have none."""
    with contextlib.ExitStack() as stack:
        for part in (
            "clip_model.CLIPVision",
            "text_encoders.llama.Gemma3MultiModalProjector",
            "text_encoders.qwen_vl.Qwen2VLVisionTransformer",
            "text_encoders.qwen3vl.Qwen3VLVisionModel",
        ):
            stack.enter_context(patch(f"comfy.{part}", _blind))
        yield


def clip_of(row: EncoderRow) -> comfy.sd.CLIP:
    model = found(row.model) if isinstance(row.model, str) else row.model
    target = comfy.supported_models_base.ClipTarget(
        found(row.tokenizer), model if row.arguments is None else model(**row.arguments)
    )
    options = {"dtype": torch.float32, **row.options}
    with blind():
        clip = comfy.sd.CLIP(target=target, tokenizer_data=row.data(), model_options=options)
    g = torch.Generator().manual_seed(0)
    for name, weight in clip.cond_stage_model.named_parameters():
        if weight.ndim > 1:
            weight.data.copy_(torch.randn(weight.shape, generator=g) * weight.shape[-1] ** -0.5)
        elif weight.ndim:
            weight.data.fill_(1.0 if "norm" in name else 0.0)
    return clip
