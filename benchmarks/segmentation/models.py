"""The models that concepts are read from, through ComfyUI's loaders, and what they see in an image."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...core.architectures import family_of
from ...core.concepts import Concepts, ConceptTokens, encode_concepts
from ...core.observing.image import encode_images, observe_image, patch_pixels, step_levels
from ...core.observing.observe import WhatToRecord
from ...core.observing.recording import Recording

if TYPE_CHECKING:
    from .methods import Query

DEMO = Path(__file__).resolve().parents[2] / "demo"


@dataclass(frozen=True)
class View:
    """How an image is shown to the model; what needs a forward pass of its own.

    Attributes:
        pooling: of a concept's text tokens, see ``core.concepts.encode_concepts``.
        pooled_prompt: whether the image's own stream is given the prompt's pooled vector, or zeros.
        attend_image, attend_concepts: keys of the concepts' attention.
        level: the noise level, 0..1.
        guidance: the value that the model is given; its own default if None.
    """

    concepts: Concepts
    prompt: str
    pooling: str
    pooled_prompt: bool
    attend_image: bool
    attend_concepts: bool
    level: float
    guidance: float | None = None


class Models:
    """A model, its text encoders and its VAE.

    Args:
        size: the side in pixels that pictures are resized to, bicubic.
        settings: what tells these models from others; JSON.
    """

    kind = "diffusion"

    def __init__(self, model, clip, vae, size: int, settings: dict) -> None:
        self._model, self._clip, self._vae, self._size = model, clip, vae, size
        self.settings = {**settings, "size": size}
        self._spaces: set[str] = set()
        self._seen: tuple[Query | None, dict[tuple[View, int], Recording]] = (None, {})
        self._latent: tuple[np.ndarray | None, Tensor | None] = (None, None)
        self._token = lru_cache(4096)(lambda name, pooling: self.encode((name,), pooling))
        self._conditioning = lru_cache(64)(self._encode_prompt)

    @classmethod
    def demo(cls, folder: Path = DEMO) -> Models:
        """The bundled demo model."""
        import comfy.sd
        import comfy.utils

        from text_encoder import load_text_encoder

        files = {name: folder / f"{name}.safetensors" for name in ("flux", "text_encoder", "vae")}
        return cls(
            comfy.sd.load_diffusion_model(str(files["flux"])),
            load_text_encoder(files["text_encoder"]),
            comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(files["vae"]))),
            256,
            {"models": "demo", **{name: fingerprint(file) for name, file in files.items()}},
        )

    @classmethod
    def files(
        cls, unet: Path, text_encoders: Sequence[Path], clip_type: str, vae: Path, size: int = 1024
    ) -> Models:
        """A diffusion model, its text encoders and its VAE, from files that ComfyUI's loaders read.

        Args:
            clip_type: as in CLIPLoader, "flux" or "sd3".

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: ComfyUI knows no such type.
        """
        import comfy.sd
        import comfy.utils

        files = fingerprints({"unet": unet, "vae": vae, **numbered(text_encoders)})
        clip = load_text_encoders(text_encoders, clip_type)
        return cls(
            comfy.sd.load_diffusion_model(str(unet)),
            clip,
            comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(vae))),
            size,
            {"models": unet.name, "clip type": clip_type, **files},
        )

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The numbers of the model's main layers, as Flux.1's double-stream blocks."""
        return tuple(self._family.main_layers(self._diffusion_model))

    @cached_property
    def default_layers(self) -> tuple[int, ...]:
        return self._family.default_layers(self._diffusion_model)

    def expect_family(self, name: str) -> None:
        """
        Raises:
            ValueError: the model is of another family.
        """
        if self._family.name != name:
            raise ValueError(f"This method is for {name}, and the model is {self._family.name}.")

    def levels(self, steps: Sequence[int], of: int) -> tuple[float, ...]:
        """The noise levels at which ``steps`` of the model's schedule of ``of`` steps start."""
        return step_levels(self._model, ", ".join(map(str, steps)), of)

    @property
    def _diffusion_model(self):
        return self._model.get_model_object("diffusion_model")

    @property
    def _family(self):
        return family_of(self._diffusion_model)

    def expect(self, space: str) -> None:
        """Record this space too from now on, so that one forward pass serves all methods."""
        if space not in self._spaces:
            self._spaces.add(space)
            self._seen = (None, {})

    def recording(self, query: Query, view: View, samples: int) -> Recording:
        """Scores of all layers in all the spaces expected, with an evaluation for each of the samples of
        noise. Those of one query are kept until the next."""
        if self._seen[0] is not query:
            self._seen = (query, {})
        recordings = self._seen[1]
        for sample in range(samples):
            if (view, sample) not in recordings:
                recordings[view, sample] = self._record(query, view, sample)
        found = [recordings[view, sample] for sample in range(samples)]
        return replace(
            found[0],
            sigmas=tuple(r.sigmas[0] for r in found),
            steps=tuple(range(samples)),
            scores={space: tuple(r.scores[space][0] for r in found) for space in found[0].scores},
        )

    def _record(self, query: Query, view: View, sample: int) -> Recording:
        """One sample at a time, so that scores do not depend on what else was in the batch."""
        what = WhatToRecord(
            view.concepts,
            ConceptTokens.together([self._token(name, view.pooling) for name in view.concepts.all]),
            layers=self.layers,
            spaces=tuple(sorted(self._spaces)),
            attend_image=view.attend_image,
            attend_concepts=view.attend_concepts,
        )
        return self.look(
            query, what, view.prompt, (view.level,), sample, view.guidance, pooled_prompt=view.pooled_prompt
        )

    def look(
        self,
        query: Query,
        what: WhatToRecord,
        prompt: str,
        levels: Sequence[float],
        sample: int = 0,
        guidance: float | None = None,
        *,
        pooled_prompt: bool = True,
    ) -> Recording:
        """What the model sees in the picture, with one sample of noise.

        Args:
            sample: its number.
            guidance, pooled_prompt: see ``View``.
        """
        if self._latent[0] is not query.picture:
            self._latent = (query.picture, self._encode_picture(query.picture))
        conditioning = self._conditioning(prompt)
        if guidance is not None:
            conditioning = [[context, {**values, "guidance": guidance}] for context, values in conditioning]
        return observe_image(
            self._model,
            what,
            self._latent[1],
            conditioning,
            image_size=(self._size, self._size),
            levels=levels,
            seed=query.seed + sample,
            pooled_prompt=pooled_prompt,
        )

    def encode(self, names: tuple[str, ...], pooling: str, **options: int) -> ConceptTokens:
        """The tokens of names, see ``core.concepts.encode_concepts``.

        Args:
            options: of ComfyUI's tokenizers.
        """
        clip = self._clip
        if options:
            clip = clip.clone()
            for name, value in options.items():
                clip.set_tokenizer_option(name, value)
        width = self._family.token_width(self._diffusion_model)
        return encode_concepts(clip, names, pooling, self._family, width)

    def _encode_picture(self, picture: np.ndarray) -> Tensor:
        image = Image.fromarray(picture)
        if image.size != (self._size, self._size):
            image = image.resize((self._size, self._size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).float()[None] / 255
        return encode_images(self._vae, pixels, patch_pixels(self._model))

    def _encode_prompt(self, prompt: str):
        return self._clip.encode_from_tokens_scheduled(self._clip.tokenize(prompt))


def load_text_encoders(files: Sequence[Path], clip_type: str):
    """A CLIP, as CLIPLoader gives it.

    Raises:
        ValueError: ComfyUI knows no such type.
    """
    import comfy.sd

    types = {kind.name.lower(): kind for kind in comfy.sd.CLIPType}
    if clip_type not in types:
        raise ValueError(f'There is no CLIP type "{clip_type}". The types are: {", ".join(types)}.')
    return comfy.sd.load_clip([str(f) for f in files], clip_type=types[clip_type])


def numbered(text_encoders: Sequence[Path]) -> dict[str, Path]:
    return {f"text encoder {i}": file for i, file in enumerate(text_encoders, 1)}


def fingerprints(files: Mapping[str, Path]) -> dict[str, str]:
    """
    Raises:
        FileNotFoundError: a file is missing.
    """
    for name, file in files.items():
        if not file.is_file():
            raise FileNotFoundError(f'There is no file "{file}" for the {name}.')
    return {name: fingerprint(file) for name, file in files.items()}


def fingerprint(file: Path) -> str:
    """Tells files of weights apart, without reading all of them: size, and a hash of 64 pieces."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for piece in range(64):
            stream.seek(size * piece // 64)
            digest.update(stream.read(65536))
    return digest.hexdigest()[:12]
