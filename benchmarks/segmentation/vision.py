"""Vision transformers that methods explain, in place of the diffusion models of ``models``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...core.explaining import checkpoints
from ...core.explaining.clip import (
    Explainer,
    VisionTower,
    matching_text_tower,
    precision,
    preprocessed,
    text_vectors,
    vision_tower,
)
from ...core.explaining.vit import Linear, VisionTransformer
from .models import fingerprints, load_text_encoders, numbered

HEAD_CHANNELS = 64
"""Of each head of all published models of timm, DINO, DINOv2 and DINOv3."""

SHORTER_SIDE = 480
"""Of pictures for DINO, in pixels, as in its demo and the paper's reference."""


class Clip:
    """A CLIP's two towers, as ComfyUI loads them.

    Args:
        settings: what tells them from others; JSON.

    Raises:
        ValueError: they are not of one CLIP.
    """

    kind = "clip"

    def __init__(self, clip_vision, clip, settings: dict) -> None:
        self._vision, self.settings = clip_vision, {**settings, "size": clip_vision.image_size}
        text_tower = matching_text_tower(clip_vision, clip)
        self._text = lru_cache(4096)(lambda name: text_vectors(clip, text_tower, (name,))[0])
        self._tower = cache(lambda dtype: vision_tower(clip_vision, dtype))

    @classmethod
    def files(cls, vision: Path, text_encoders: Sequence[Path], clip_type: str) -> Clip:
        """
        Raises:
            FileNotFoundError: a file is missing.
            ValueError: they are not of one CLIP, or ComfyUI does not know the vision tower.
        """
        import comfy.clip_vision

        files = fingerprints({"CLIP_VISION": vision, **numbered(text_encoders)})
        clip_vision = comfy.clip_vision.load(str(vision))
        if clip_vision is None:
            raise ValueError(f'ComfyUI knows no vision model like "{vision}".')
        settings = {"models": vision.name, "clip type": clip_type, **files}
        return cls(clip_vision, load_text_encoders(text_encoders, clip_type), settings)

    def maps(self, picture: np.ndarray, names: Sequence[str], method: str) -> Tensor:
        """Maps (K, h, w) of names in a picture (H, W, 3) uint8, see ``core.explaining.clip.METHODS``."""
        device = self._vision.load_device
        tower: VisionTower = self._tower(precision(method, device))
        image = torch.from_numpy(picture.copy()).float()[None] / 255
        pixels = preprocessed(self._vision, image.to(device))[0]
        return Explainer(tower, torch.stack([self._text(name) for name in names])).maps(pixels, method)


class Transformer:
    """A vision transformer alone.

    Attributes:
        head: its classifier; None of DINO.
        mean, std: of the pixels that it was trained on, by colour.
    """

    kind = "vit"

    def __init__(
        self,
        vit: VisionTransformer,
        head: Linear | None,
        settings: dict,
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
    ) -> None:
        self.vit, self.head = vit, head
        self.settings = {**settings, "size": SHORTER_SIDE if head is None else self.side}
        self._mean, self._std = (torch.tensor(v)[:, None, None] for v in (mean, std))

    @classmethod
    def file(cls, path: Path) -> Transformer:
        """A classifier of timm's, DINO, DINOv2 or DINOv3, by the names in the file. The classifier in
        double precision, for relevance's sake.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is none of these.
        """
        import comfy.model_management
        import comfy.utils

        settings = {"models": path.name, **fingerprints({"vit": path})}
        tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
        device = comfy.model_management.get_torch_device()
        exact = "head.weight" in tensors and device.type != "mps"
        return cls.of(tensors, settings, torch.float64 if exact else torch.float32, device)

    @classmethod
    def of(
        cls,
        tensors: dict[str, Tensor],
        settings: dict,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        heads: int | None = None,
    ) -> Transformer:
        """The model of these weights.

        Args:
            heads: by the width if None.

        Raises:
            ValueError: their names are no model's.
        """
        weights = checkpoints.Weights(tensors, dtype, device)
        cls_token = tensors.get("cls_token", tensors.get("embeddings.cls_token"))
        if cls_token is None:
            raise ValueError("The file has no names of timm, DINO, DINOv2 or DINOv3, such as cls_token.")
        heads = heads or cls_token.shape[-1] // HEAD_CHANNELS
        if "pos_embed" in tensors:
            vit, head = checkpoints.timm(weights, heads)
            half = (0.5, 0.5, 0.5)
            return cls(vit, head, settings) if head is None else cls(vit, head, settings, half, half)
        layout = checkpoints.dinov2 if "embeddings.position_embeddings" in tensors else checkpoints.dinov3
        return cls(layout(weights, heads), None, settings)

    @property
    def for_relevance(self) -> VisionTransformer:
        """The relevance models of the paper's reference have another epsilon in the last norm."""
        return replace(self.vit, norm=self.vit.norm._replace(eps=1e-5))

    @property
    def side(self) -> int:
        """Of the pictures that it was trained on, in pixels."""
        return round((len(self.vit.positions) - 1) ** 0.5) * self.vit.patch_size

    def pixels(self, picture: np.ndarray, size: tuple[int, int], normalised: bool) -> Tensor:
        """A picture (H, W, 3) uint8 at a size, as the model is given it, (3, h, w)."""
        image = torch.from_numpy(picture.copy()).movedim(-1, 0).float()[None] / 255
        image = F.interpolate(image, size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)
        if normalised:
            image = (image - self._mean) / self._std
        return image.to(self.vit.cls)
