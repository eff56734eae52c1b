"""Colours that tell many things apart, also for colour-blind readers, and a colour map for heatmaps."""

from __future__ import annotations

from functools import cache

import numpy as np

# Okabe and Ito, "Color universal design" (2008), without black
_FIRST = ("e69f00", "56b4e9", "009e73", "f0e442", "0072b2", "d55e00", "cc79a7")

# Linear RGB as seen without L, M or S cones: Machado et al., "A physiologically-based model for
# simulation of color vision deficiency" (2009), severity 1.
_VISION = np.array(
    [
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ]
)

# Linear sRGB to cone responses, and their cube roots to Oklab (Ottosson 2020)
_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_OKLAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def seen(colours: np.ndarray) -> np.ndarray:
    """sRGB colours (N, 3) in 0..1 in Oklab (4, N, 3), where distance is difference in appearance: to
    normal, protanopic, deuteranopic and tritanopic eyes."""
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ _VISION.transpose(0, 2, 1), 0, 1)
    return np.cbrt(linear @ _CONES.T) @ _OKLAB.T


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How far colours ``a`` (N, 3) and ``b`` (M, 3) are apart (N, M), to the eyes that see it least."""
    return np.linalg.norm(seen(a)[:, :, None] - seen(b)[:, None], axis=-1).min(0)


# The colour map of Smith and van der Walt (2015, CC0) at 33 equal distances
_MAGMA = (
    "000004 030311 0a0822 130d33 1d1146 28115a 36106a 430f76 50127c 5d177f 691c81 "
    "762181 822681 8f2a81 9c2e7f a9327d b63779 c33b75 cf4170 db486a e65163 ee5c5e "
    "f5695c f9785d fb8761 fd9668 fea571 feb47b fec387 fed194 fde0a2 fceeb0 fcfdbf"
)


@cache
def _palette(count: int) -> np.ndarray:
    colours = [tuple(bytes.fromhex(code)) for code in _FIRST]
    steps = np.linspace(0, 1, 11)
    candidates = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 3)
    lightness, *chroma = seen(candidates)[0].T
    to_white = difference(candidates, np.ones((1, 3)))[:, 0]
    # neither dark, nor close to the white of a page, nor to the greys of a picture
    candidates = candidates[(lightness > 0.35) & (to_white > 0.1) & (np.hypot(*chroma) > 0.06)]
    chosen = np.array(colours) / 255
    nearest = difference(candidates, chosen).min(1)
    while len(chosen) < count:
        best = candidates[[nearest.argmax()]]
        chosen = np.concatenate([chosen, best])
        nearest = np.minimum(nearest, difference(candidates, best)[:, 0])
    return chosen[:count]


def palette(count: int) -> np.ndarray:
    """``count`` sRGB colours (count, 3) in 0..1. First the seven of Okabe and Ito, then each time the
    colour that is furthest from all before it, to the eyes that see the least difference."""
    return _palette(count).copy()


def hex_colours(count: int) -> list[str]:
    """The same as "#rrggbb"."""
    return [f"#{bytes(colour).hex()}" for colour in np.rint(palette(count) * 255).astype(np.uint8)]


def magma() -> np.ndarray:
    """256 sRGB colours (256, 3) in 0..1 from dark to light: the colour map of that name, to 0.005."""
    known = np.array([tuple(bytes.fromhex(code)) for code in _MAGMA.split()]) / 255
    places = np.linspace(0, 1, len(known))
    return np.stack([np.interp(np.linspace(0, 1, 256), places, channel) for channel in known.T], 1)
