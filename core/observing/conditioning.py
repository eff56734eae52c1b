"""Which rows of a call of the model are the prompt's, of which images, where, and how strong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from comfy.samplers import get_area_and_mult
from torch import Tensor
from torch.nn import functional

from ..geometry import Grid, Patch
from .latents import video_of

if TYPE_CHECKING:
    from comfy.samplers import CFGGuider


class Chunk(NamedTuple):
    """One positive conditioning in a call of the model.

    Attributes:
        rows: its rows of the call.
        batch, frames: the images that they are, and the latent frames of each; all frames if None.
        origin: where in the grid of the whole latent the call's begins.
        whole: whether the call was given the latent's whole height and width.
        weight, default: as in ``Pass``.
    """

    rows: slice
    batch: slice | list[int]
    frames: list[int] | None
    origin: Grid
    whole: bool
    weight: Tensor | None
    default: bool


class Conditionings:
    """Which chunks of a call of the model are the guider's positive conditionings.

    A chunk has the id of its conditioning, and its place in the guider's list: positive, negative; of
    DualCFGGuider negative, middle, positive. Ids are not always unique: conditionings that ComfyUI makes to
    match a positive's area get the positive's id.

    Args:
        x: the whole latent as the sampler has it, (B, C, H, W), (B, C, F, H, W), or packed with its sound.
        shapes: see ``video_of``.
        weights: of the conditionings that have been asked for in this run.
    """

    def __init__(
        self,
        guider: CFGGuider,
        x: Tensor,
        shapes: Sequence[Sequence[int]] | None,
        patch: Patch,
        weights: dict[object, Tensor],
    ) -> None:
        self._given, self._shapes, self._x = x, shapes, video_of(x, shapes)
        self._patch, self._weights = patch, weights
        self._positives = {c.get("uuid"): c for c in guider.conds.get("positive") or []}
        self._place = 2 if "middle" in guider.conds else 0
        self._others = {
            c.get("uuid") for name, conds in guider.conds.items() if name != "positive" for c in conds or []
        }

    def positive(self, options: dict, seen: set, x: Tensor) -> list[Chunk]:
        """The positive chunks of a call on ``x`` with these ``transformer_options``. Their ids join those
        ``seen`` in the same evaluation.

        Raises:
            RuntimeError: the call is on another number of images than the latent has.
        """
        kinds = options.get("cond_or_uncond") or [0]
        uuids = options.get("uuids") or [None] * len(kinds)
        size = len(x) // len(kinds)
        window = options.get("context_window")
        batch: slice | list[int] = slice(0, size)
        frames = None
        if window is not None:
            indices = list(window.index_list)
            if (anchor := getattr(window, "causal_anchor_index", None)) is not None and anchor >= 0:
                indices.insert(0, anchor)  # one from before the window that ComfyUI puts in front
            if getattr(window, "dim", None) == 0:
                batch = indices
            else:
                frames = [i // self._patch.frames for i in indices[:: self._patch.frames]]
        if isinstance(batch, slice) and size != len(self._x):
            called, whole = (t.shape[-2:] for t in (x, self._x))
            raise RuntimeError(
                f"the model was called with {size} images, the latent has {len(self._x)}"
                if called == whole
                else f"the model was called with {size} tiles of {called[0]} x {called[1]} at once; the "
                f"latent is {whole[0]} x {whole[1]}, and tiled sampling cannot be recorded"
            )
        chunks = []
        for i, (kind, uuid) in enumerate(zip(kinds, uuids, strict=True)):
            if uuid in self._positives and uuid not in self._others:
                positive = True
            else:
                positive = kind == self._place and (uuid is None or uuid in self._positives)
            # The same conditioning twice in one evaluation is a pass that a guidance method added.
            if not positive or (window is None and uuid is not None and uuid in seen):
                continue
            seen.add(uuid)
            conditioning = self._positives.get(uuid, {})
            area = conditioning.get("area")
            weight = self._weight(conditioning)
            if weight is not None:
                weight = weight[batch] if frames is None else weight[batch][:, :, frames]
            chunks.append(
                Chunk(
                    slice(i * size, (i + 1) * size),
                    batch,
                    frames,
                    self._origin(area),
                    area is None,
                    weight,
                    "default" in conditioning,
                )
            )
        return chunks

    def _origin(self, area: tuple[int, ...] | None) -> Grid:
        """Of an area as ComfyUI has it: sizes along its axes, then where it begins, in latent pixels."""
        if area is None:
            return Grid(0, 0, 0)
        begins = area[len(area) // 2 :]
        begins = (0,) * (3 - len(begins)) + tuple(begins[-3:])
        return Grid(*(begin // size for begin, size in zip(begins, self._patch, strict=True)))

    def _weight(self, conditioning: dict) -> Tensor | None:
        """How much the sampler makes of each token (B, 1, F, h, w) of what is predicted with a conditioning:
        its strength, mask and area, by ComfyUI's own rule. The same in every evaluation."""
        if conditioning.keys().isdisjoint(("area", "mask", "strength")):
            return None
        uuid = conditioning.get("uuid")
        if uuid not in self._weights:
            rule = ("area", "mask", "mask_strength", "strength")
            given = {name: conditioning[name] for name in rule if name in conditioning}
            pixels = self._given[:, :1]
            found = get_area_and_mult({**given, "model_conds": {}, "uuid": uuid}, pixels, None).mult.float()
            found = video_of(found, self._shapes)[:, :1]
            found = found if found.ndim == 5 else found[:, :, None]
            self._weights[uuid] = functional.avg_pool3d(found, tuple(self._patch), ceil_mode=True).cpu()
        return self._weights[uuid]
