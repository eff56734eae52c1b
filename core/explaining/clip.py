"""The two towers of a CLIP, in ComfyUI's objects: where in a picture its likeness to a text comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import comfy.clip_vision
import comfy.model_management
import comfy.utils
import torch
from comfy.clip_model import CLIPVisionModelProjection
from comfy.sd1_clip import SDClipModel
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from ..concepts import Concepts, escaped, expect_words, literal_tokenizer, special_words
from ..images import rgb_images
from ..observing.recording import Recording
from . import checkpoints, methods
from .templates import TEMPLATES
from .vit import Linear, VisionTransformer

if TYPE_CHECKING:
    from comfy.clip_vision import ClipVisionModel
    from comfy.sd import CLIP

TEXT_TOWERS = ("clip_l", "clip_h", "clip_g")
PAIRS = (
    "CLIP ViT-L/14 goes with clip_l (Stable Diffusion 1, XL, 3, Flux.1), ViT-H/14 with the text encoder of "
    "Stable Diffusion 2 (clip_h), and ViT-bigG/14 with clip_g (Stable Diffusion XL, 3)."
)
# In files, by transformers and by OpenAI.
_LAYERS = ("text_model.encoder.layers.{}.layer_norm1.weight", "transformer.resblocks.{}.ln_1.weight")
_PROJECTIONS = ("text_projection.weight", "text_projection")
_LARGEST = 100.0  # of a text projection: trained ones stay far below 1


@dataclass(frozen=True)
class VisionTower:
    """
    Attributes:
        projection: of CLS into the space that pictures and texts share, (E, D).
    """

    vit: VisionTransformer
    projection: Tensor

    def head(self, texts: Tensor) -> Linear:
        """CLIP as a classifier: scalar products of the picture's embedding and texts (K, E)."""
        with torch.inference_mode(False):
            return Linear(texts.clone() @ self.projection)


Method = Callable[[VisionTower, Tensor, Tensor], Tensor]
"""Of pixels (3, height, width) and texts (K, E), maps (K, h, w), or (h, w) if they do not depend on texts."""


def _by_head(method: Callable[..., Tensor]) -> Method:
    def maps(tower: VisionTower, pixels: Tensor, texts: Tensor) -> Tensor:
        return method(tower.vit, pixels, tower.head(texts), range(len(texts)))

    return maps


def _textspan(tower: VisionTower, pixels: Tensor, texts: Tensor) -> Tensor:
    return methods.textspan(tower.vit, tower.vit(pixels), tower.projection, texts)


def _lrp(tower: VisionTower, pixels: Tensor, texts: Tensor) -> Tensor:
    relevance = methods.lrp(tower.vit, pixels, tower.head(texts), range(len(texts)))
    return F.avg_pool2d(relevance, tower.vit.patch_size, divisor_override=1)


def _attention_relevance(tower: VisionTower, pixels: Tensor, texts: Tensor) -> Tensor:
    with torch.inference_mode(False):
        texts = texts.clone()

    def cosines(cls: Tensor) -> Tensor:
        return texts @ F.normalize(tower.projection @ cls, dim=0)

    return methods.attention_relevance(tower.vit, pixels, cosines, range(len(texts)))


METHODS: dict[str, Method] = {
    "textspan": _textspan,
    "transinterp": _by_head(methods.transinterp),
    "attention relevance": _attention_relevance,
    "gradcam": _by_head(methods.gradcam),
    "lrp": _lrp,
    "partial lrp": _by_head(methods.partial_lrp),
    "rollout": lambda tower, pixels, _: methods.rollout(tower.vit(pixels)),
    "raw attention": lambda tower, pixels, _: methods.attention(tower.vit(pixels)),
}
TEXTLESS = ("rollout", "raw attention")
"""Those that give all concepts the same map."""


def explain(
    clip_vision: ClipVisionModel, clip: CLIP, images: Tensor, concepts: Concepts, method: str
) -> Recording:
    """Maps of all concepts in each image (B, H, W, 3), as scores of the last layer in the space ``method``.

    Images are squeezed to the square that CLIP sees, so that its patches cover all of them.

    Raises:
        ValueError: there is no such method, CLIP_VISION and CLIP are not of one CLIP, or a concept is none
            that its text encoder reads.
    """
    if method not in METHODS:
        raise ValueError(f'There is no method "{method}". Choose one of: {", ".join(METHODS)}.')
    images = rgb_images(images)
    text_tower = matching_text_tower(clip_vision, clip)
    texts = text_vectors(clip, text_tower, concepts.all)
    tower = vision_tower(clip_vision, precision(method, clip_vision.load_device))
    explainer = Explainer(tower, texts)
    progress = comfy.utils.ProgressBar(len(images))
    scores = []
    for image in images:
        comfy.model_management.throw_exception_if_processing_interrupted()
        pixels = preprocessed(clip_vision, image[None].to(clip_vision.load_device))[0]
        scores.append(explainer.maps(pixels, method))
        progress.update(1)
    layer = len(tower.vit.blocks) - 1
    return Recording(
        concepts=concepts,
        layers=(layer,),
        default_layers=(layer,),
        sigmas=(0.0,),
        steps=(0,),
        scores={method: (torch.stack(scores)[None],)},
        image_size=tuple(images.shape[1:3]),
        coverage=(1.0, 1.0),
    )


class Explainer:
    """
    Args:
        texts: unit vectors (K, E).
    """

    def __init__(self, tower: VisionTower, texts: Tensor) -> None:
        self._tower, self._texts = tower, texts.to(tower.projection)

    def maps(self, pixels: Tensor, method: str) -> Tensor:
        """Maps (K, h, w) float32, on the CPU, of a picture as ``preprocessed``, (3, size, size)."""
        maps = METHODS[method](self._tower, pixels.to(self._tower.projection), self._texts)
        return maps.detach().float().cpu().expand(len(self._texts), *maps.shape[-2:])


def precision(method: str, device: torch.device) -> torch.dtype:
    """What a method is computed in. Relevance of pixels is off by more than it is worth in float32."""
    return torch.float64 if method == "lrp" and device.type != "mps" else torch.float32


def preprocessed(clip_vision: ClipVisionModel, images: Tensor) -> Tensor:
    """Images (B, H, W, 3) as the vision tower is given them, (B, 3, size, size)."""
    return comfy.clip_vision.clip_preprocess(
        images.float(),
        size=clip_vision.image_size,
        mean=clip_vision.image_mean,
        std=clip_vision.image_std,
        crop=False,
    )


def vision_tower(clip_vision: ClipVisionModel, dtype: torch.dtype = torch.float32) -> VisionTower:
    """A copy of a CLIP's vision tower, on the device that it runs on."""
    weights = clip_vision.get_sd()
    needed = sum(weight.numel() for weight in weights.values()) * dtype.itemsize
    comfy.model_management.free_memory(2 * needed, clip_vision.load_device)
    block = clip_vision.model.vision_model.encoder.layers[0]
    copies = checkpoints.Weights(weights, dtype, clip_vision.load_device)
    return VisionTower(
        *checkpoints.clip(copies, block.self_attn.heads, block.mlp.activation, block.layer_norm1.eps)
    )


def matching_text_tower(clip_vision: ClipVisionModel, clip: CLIP) -> str:
    """Which of ``TEXT_TOWERS`` of the CLIP was trained together with the CLIP_VISION.

    Raises:
        ValueError: none, or its projection was not in its file.
    """
    model = clip_vision.model
    projection = getattr(model, "visual_projection", None)
    if not isinstance(model, CLIPVisionModelProjection) or not isinstance(projection, torch.nn.Module):
        kind = getattr(clip_vision, "model_type", type(model).__name__)
        raise ValueError(
            f"The CLIP_VISION is a {kind} without a CLIP's projection, so no text is in its space. The CLIP "
            f"that it was given with has {_listed(_encoders(clip))}. {PAIRS}"
        )
    width = len(projection.weight)
    towers = {name: tower for name, tower in _encoders(clip).items() if name in TEXT_TOWERS}
    for name, tower in towers.items():
        weight = tower.transformer.text_projection.weight
        if len(weight) == width:
            if not (_trained(weight) and _in_its_file(clip, tower)):
                raise ValueError(
                    f"The text encoder {name} has no text_projection: its file leaves it out, as those for "
                    "painting often do, and without it texts are not in the space of the CLIP_VISION, which "
                    f"projects to a width of {width}. Load {name} from a file with text_projection.weight."
                )
            return name
    raise ValueError(
        "The CLIP_VISION and the CLIP do not belong together: the CLIP_VISION projects to a width of "
        f"{width}, and the CLIP has {_listed(_encoders(clip))}. {PAIRS}"
    )


def _encoders(clip: CLIP) -> dict[str, SDClipModel]:
    """The CLIP's text encoders by name."""
    parts = clip.cond_stage_model.named_children()
    return {name: part for name, part in parts if isinstance(part, SDClipModel)}


def _listed(encoders: dict[str, SDClipModel]) -> str:
    def described(name: str, encoder: SDClipModel) -> str:
        projection = getattr(encoder.transformer, "text_projection", None)
        width = len(projection.weight) if name in TEXT_TOWERS and projection is not None else None
        return name if width is None else f"{name} (width {width})"

    return ", ".join(described(*each) for each in encoders.items()) or "none"


def _trained(projection: Tensor) -> bool:
    """Whether a projection may come from a file. ComfyUI leaves one that was in none as the memory was, or
    makes it zeros or the identity."""
    weight = projection.detach().float()
    finite = bool(weight.isfinite().all()) and bool(weight.abs().max() < _LARGEST)
    return finite and bool((weight != 0).float().mean() > 0.5)


def _in_its_file(clip: CLIP, tower: SDClipModel) -> bool:
    """Whether the tower's projection is in the file that the CLIP was loaded from. Memory may happen to hold
    what looks like one. True where no file is known: of ComfyUI's loaders before 0.30, and of others."""
    known = getattr(clip.patcher, "cached_patcher_init", None)
    first = known[1][0] if known and known[1] else None
    for path in map(str, first if isinstance(first, list | tuple) else [first]):
        if not path.endswith((".safetensors", ".sft")) or not Path(path).is_file():
            continue
        with safe_open(path, "pt") as file:
            names = set(file.keys())
        for layer in _LAYERS:
            last, further = (layer.format(tower.num_layers - 1 + i) for i in (0, 1))
            for prefix in [name.removesuffix(last) for name in names if name.endswith(last)]:
                if prefix + further not in names and not prefix.endswith("visual."):
                    return any(prefix + name in names for name in _PROJECTIONS)
    return True


def text_vectors(clip: CLIP, tower: str, names: Sequence[str]) -> Tensor:
    """For each name the mean of its unit embeddings in all ``TEMPLATES``, of length 1: (K, E) float32.

    Raises:
        ValueError: a name is more than words to the text encoder, or longer than it reads.
    """
    tokenizers = literal_tokenizer(clip)
    special = special_words(tokenizers, tower)
    for name in names:
        expect_words(name, special)
    tokenizer, encoder = getattr(tokenizers, tower), getattr(clip.cond_stage_model, tower)
    clip.load_model()
    clip.cond_stage_model.reset_clip_options()
    encoder.set_clip_options({"execution_device": clip.patcher.load_device, "projected_pooled": True})
    try:
        vectors = []
        for name in names:
            comfy.model_management.throw_exception_if_processing_interrupted()
            texts = [tokenizer.tokenize_with_weights(t.format(escaped(name))) for t in TEMPLATES]
            if any(len(sections) > 1 for sections in texts):
                raise ValueError(
                    f'The concept "{name}" is longer than what the text encoder reads. Name it in a few '
                    "words."
                )
            vectors.append(concept_vector(encoder, [[token[0] for token in s] for (s,) in texts]))
    finally:
        clip.cond_stage_model.reset_clip_options()
    return torch.stack(vectors)


def concept_vector(encoder: SDClipModel, texts: Sequence[Sequence[int]]) -> Tensor:
    """The mean direction (E,) of texts of one length, given by their token ids."""
    embeddings = encoder(texts)[1].float().cpu()
    return F.normalize(F.normalize(embeddings, dim=-1).mean(0), dim=0)
