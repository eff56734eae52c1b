"""Where the tokens of a picture or a video lie."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Grid(NamedTuple):
    """Tokens by latent frame, row and column; a picture has one frame. As an origin: where a part begins."""

    frames: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        return self.frames * self.rows * self.columns


class Patch(NamedTuple):
    """How much of a latent becomes one token."""

    frames: int
    rows: int
    columns: int

    def grid(self, latent: Tensor) -> Grid:
        """The tokens of a latent (B, C, H, W) or (B, C, F, H, W). Models pad what is no multiple."""
        frames = latent.shape[2] if latent.ndim == 5 else 1
        sizes = (frames, *latent.shape[-2:])
        return Grid(*(-(-size // patch) for size, patch in zip(sizes, self, strict=True)))
