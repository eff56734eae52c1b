"""Which recording a LATENT belongs to.

A LATENT is known by the very tensor that a sampling run returned. Many nodes hand on another one, so images
are known by what they hold too: those that the run returned, and those that its last step predicted, which
``denoised_output`` and samplers of other packs give in their place. A batch of known images, in any order
and of several runs, has a recording that is put together of theirs. A video is known by its latent frames,
so that a part of it is known too: some nodes cut off what stands before or behind it.
"""

from __future__ import annotations

import hashlib
import logging
import weakref
from collections import deque
from collections.abc import Sequence
from itertools import count

import comfy.utils
from comfy_execution.utils import get_executing_context
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

from ..concepts import Concepts
from .recording import BUDGET, Recording, RecordingError, gathered

Digests = tuple[bytes, ...]
"""What an image or video is known by: a digest of each of its latent frames, of which an image has one."""


class Origin:
    """Where images come from: what was recorded of them, or the reason that nothing was, and what they are
    known by. It lives as long as a LATENT's tensor or a ``History`` that holds it."""

    def __init__(self, recording: Recording | str) -> None:
        self.recording = recording
        self.number = next(_numbers)
        self.images: dict[Digests, int] = {}
        self.sizes: set[tuple[int, ...]] = set()

    @property
    def concepts(self) -> Concepts | None:
        return None if isinstance(self.recording, str) else self.recording.concepts

    @property
    def nbytes(self) -> int:
        return 0 if isinstance(self.recording, str) else self.recording.nbytes

    def know(self, samples: Tensor) -> None:
        """Know the images (B, C, H, W), or videos (B, C, F, H, W), by what they hold."""
        self.images.update({digests: i for i, digests in enumerate(_digests(samples))})
        self.sizes.add(tuple(samples.shape[1:]))
        _origins.add(self)

    def find(self, digests: Digests) -> tuple[int, int] | None:
        """The image or video that this is, and the latent frame that it begins with there: 0, unless it is
        the later part of a video. None if it is unknown. Of models that see several latent frames as one, no
        parts are known: they may begin within one."""
        if digests in self.images:
            return self.images[digests], 0
        for whole, image in self.images.items():
            if not isinstance(self.recording, str) and self.recording.frames != len(whole):
                continue
            for start in range(len(whole) - len(digests) + 1):
                if whole[start : start + len(digests)] == digests:
                    return image, start
        return None


_numbers = count()
_origins: weakref.WeakSet[Origin] = weakref.WeakSet()
_by_tensor: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_by_memory: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Of packed latents, by what their parts share, with the shape of the video."""


def remember(
    samples: Tensor,
    recording: Recording | str,
    *,
    by_content: bool = True,
    shapes: Sequence[Sequence[int]] | None = None,
) -> Origin:
    """Tie a recording, or the reason that there is none, to the tensor that a sampling run returned, and to
    its images if ``by_content``. Both are forgotten with the tensor, or with the last of its parts.

    Args:
        shapes: see ``video_of``.
    """
    origin = _by_tensor[samples] = Origin(recording)
    if shapes is not None and len(shapes) > 1:
        _by_memory[samples.untyped_storage()] = origin, tuple(video_of(samples, shapes).shape)
    if by_content:
        origin.know(samples)
    return origin


class History:
    """The last runs of an observed MODEL, for LATENTs that are none of the tensors which those returned. At
    most ``budget`` bytes and ``runs`` of them, but always the last. When a node samples again in a later
    prompt, what it sampled before is over."""

    def __init__(self, budget: int = BUDGET, runs: int = 32) -> None:
        self._budget = budget
        self._held: deque[tuple[object, object, Origin]] = deque(maxlen=runs)

    def add(self, origin: Origin) -> None:
        context = get_executing_context()
        node, prompt = (None, None) if context is None else (context.node_id, context.prompt_id)
        for held in list(self._held):
            if node is not None and held[0] == node and held[1] != prompt:
                self._held.remove(held)
        self._held.append((node, prompt, origin))
        while len(self._held) > 1 and sum(held.nbytes for *_, held in self._held) > self._budget:
            self._held.popleft()


def recorded(samples: Tensor) -> Recording:
    """The recording of the very run that returned this tensor.

    Raises:
        RecordingError: that run could not be recorded.
    """
    found = _by_tensor[samples].recording
    if isinstance(found, str):
        raise RecordingError(found)
    return found


def recording_of(latent: dict) -> Recording:
    """The recording of this LATENT: of the run that returned it, or of the runs that its images come from.

    Raises:
        RecordingError: an image is of no observed run, or of one that could not be recorded; the images are
            of runs that do not go together; or for none of them the model computed numbers.
    """
    samples = latent["samples"]
    if getattr(samples, "is_nested", False):
        samples = samples.unbind()[0]
        origin, shape = _by_memory.get(samples.untyped_storage(), (None, None))
        if origin is not None and samples not in _by_tensor and samples.shape == shape:
            _by_tensor[samples] = origin
    if not isinstance(samples, Tensor):
        raise RecordingError(_unknown())
    if samples not in _by_tensor:
        # Its tensor is known from now on, and keeps what it was put together from.
        remember(samples, _recognised(samples))
    found = recorded(samples)
    if len(found.broken) == found.batch:
        raise RecordingError(found.failed)
    if found.broken:
        logging.warning("Concept Attention: %s", found.failed)
    return found


def video_of(latent: Tensor, shapes: Sequence[Sequence[int]] | None) -> Tensor:
    """The video in a latent that a sampler works on. With sound, both lie packed in one tensor, and ComfyUI
    unpacks it into the LATENT's two parts only after the run.

    Args:
        shapes: of what is packed; None or one of anything else.
    """
    return latent if shapes is None else comfy.utils.unpack_latents(latent, shapes)[0]


def _recognised(samples: Tensor) -> Recording:
    digests = _digests(samples)
    origins = sorted(_origins, key=lambda origin: origin.number, reverse=True)
    known = [[origin for origin in origins if origin.find(image)] for image in digests]
    if not digests or not all(known):
        raise RecordingError(_unknown(samples, known, origins))
    chosen = _together(known)
    for number, origin in enumerate(chosen):
        if isinstance(origin.recording, str):
            alone = all(other is origin for other in chosen)
            which = "" if alone else f"Image {number + 1} of {len(chosen)}: "
            raise RecordingError(which + origin.recording)
    parts: dict[tuple[Origin, int], Recording] = {}  # one for all the images of a run
    images = []
    for origin, frames in zip(chosen, digests, strict=True):
        image, start = origin.find(frames)
        part = parts.setdefault((origin, start), origin.recording.part(start, len(frames)))
        images.append((part, image))
    return gathered(images)


def _together(known: list[list[Origin]]) -> list[Origin]:
    """An origin for each image, out of those that know it, the latest first: one for all if there is, or else
    of the same concepts."""
    for origin in known[0]:
        if all(origin in candidates for candidates in known):
            return [origin] * len(known)
    for origin in known[0]:
        alike = [[o for o in candidates if o.concepts == origin.concepts] for candidates in known]
        if all(alike):
            return [candidates[0] for candidates in alike]
    return [candidates[0] for candidates in known]


def _digests(samples: Tensor) -> list[Digests]:
    """What each image is known by. In half precision, since ComfyUI may round what samplers return
    (``--fp16-intermediates``); by way of float32, since rounding twice is not rounding once."""
    images = samples.detach().float().half().cpu()
    return [tuple(map(_digest, image.unbind(1) if image.ndim == 4 else (image,))) for image in images]


def _digest(frame: Tensor) -> bytes:
    digest = hashlib.blake2b(repr(tuple(frame.shape)).encode(), digest_size=16)
    digest.update(frame.contiguous().numpy())
    return digest.digest()


def _unknown(
    samples: Tensor | None = None, known: Sequence[list[Origin]] = (), origins: Sequence[Origin] = ()
) -> str:
    missing = [str(i + 1) for i, candidates in enumerate(known) if not candidates]
    what = "This LATENT was"
    if len(missing) < len(known):
        what = f"Of the {len(known)} images in this LATENT, number {', '.join(missing)} was"
    done = ""
    sizes = sorted({size for origin in origins for size in origin.sizes})
    if samples is not None and sizes:
        size = tuple(samples.shape[1:])
        if size[-2:] in [other[-2:] for other in sizes]:
            done = (
                " It has the size of one that was, but holds something else: another node has changed it, or "
                "another sampler made it."
            )
        else:
            ours, theirs = (" x ".join(map(str, s[-2:])) for s in (size, sizes[-1]))
            done = (
                f" It is {ours} in size (height x width of the latent) and one that was is {theirs}: it was "
                "probably upscaled or cropped."
            )
    return (
        f"{what} not sampled with Concept Attention.{done} Put the Concept Attention node between the model "
        "and the sampler, and connect the sampler's LATENT. Nodes in between may pick, repeat, batch, save "
        "or load images, as long as they are of the last run of their sampler, and cut off frames of videos; "
        "not upscale, crop, blend or otherwise change them. A sampler that takes no step (denoise 0, an "
        "empty range of steps) hands on the LATENT that it is given. For a picture that was not sampled "
        "here, use Concept Attention (Image)."
    )
