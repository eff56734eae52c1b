"""Procedural scenes with exact masks: the training and held-out data of the demo model.

A scene is one to three objects on a ground, mostly under a sky, 256 x 256 pixels, together with the
prompt that describes it and a label for every pixel. The same seed always gives the same scene.
Seeds below ``HELD_OUT`` are for training, the others for evaluation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SIZE = 256
HELD_OUT = 10_000_000
EXAMPLE = HELD_OUT + 22
_SCALE = 2  # supersampling

COLOURS = {
    "red": (214, 48, 49),
    "orange": (240, 138, 36),
    "yellow": (250, 208, 44),
    "green": (46, 150, 84),
    "blue": (45, 98, 214),
    "purple": (132, 66, 186),
    "pink": (240, 130, 172),
    "white": (244, 244, 240),
    "black": (44, 44, 52),
}
GROUNDS = ("grass", "sand", "snow", "water")
INK = (38, 36, 44)


@dataclass(frozen=True)
class Region:
    """One thing in a scene. ``colour`` is None for a ground and for the sky."""

    noun: str
    colour: str | None = None

    @property
    def phrase(self) -> str:
        return f"{self.colour} {self.noun}" if self.colour else self.noun


@dataclass(frozen=True)
class Scene:
    """``labels[y, x]`` is the index in ``regions`` of what pixel (x, y) of ``image`` shows."""

    image: np.ndarray  # (256, 256, 3) uint8
    labels: np.ndarray  # (256, 256) uint8
    regions: tuple[Region, ...]
    prompt: str

    def mask(self, index: int) -> np.ndarray:
        return self.labels == index


class _Pen:
    """Draws shapes given in an object's own coordinates, -1..1, into picture and labels alike."""

    def __init__(self, picture: Image.Image, labels: Image.Image) -> None:
        self._picture = ImageDraw.Draw(picture)
        self._labels = ImageDraw.Draw(labels)
        self.label = 0
        self.place(0, 0, 1, 0, False)

    def place(self, x: float, y: float, radius: float, angle: float, flip: bool) -> None:
        self._at = (x, y, radius, math.cos(angle), math.sin(angle), -1 if flip else 1)

    def _pixels(self, points):
        x0, y0, radius, cos, sin, sign = self._at
        return [
            (
                (x0 + radius * (cos * sign * x - sin * y)) * _SCALE,
                (y0 + radius * (sin * sign * x + cos * y)) * _SCALE,
            )
            for x, y in points
        ]

    def polygon(self, points, colour) -> None:
        pixels = self._pixels(points)
        self._picture.polygon(pixels, fill=colour)
        self._labels.polygon(pixels, fill=self.label)

    def ellipse(self, x, y, rx, ry, colour, start=0.0, end=360.0) -> None:
        steps = 40
        angles = [math.radians(start + (end - start) * i / steps) for i in range(steps + 1)]
        self.polygon([(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles], colour)

    def line(self, points, width, colour) -> None:
        pixels = self._pixels(points)
        width = max(1, round(width * self._at[2] * _SCALE))
        self._picture.line(pixels, fill=colour, width=width, joint="curve")
        self._labels.line(pixels, fill=self.label, width=width, joint="curve")


def _shade(colour, factor):
    target = 255 if factor > 1 else 0
    amount = abs(factor - 1)
    return tuple(round(c + (target - c) * amount) for c in colour)


def _cat(pen, colour):
    dark = _shade(colour, 0.72)
    pen.polygon([(-0.8, -0.05), (-0.74, -0.95), (-0.12, -0.55)], colour)
    pen.polygon([(0.8, -0.05), (0.74, -0.95), (0.12, -0.55)], colour)
    pen.polygon([(-0.66, -0.3), (-0.64, -0.72), (-0.32, -0.5)], (236, 150, 160))
    pen.polygon([(0.66, -0.3), (0.64, -0.72), (0.32, -0.5)], (236, 150, 160))
    pen.ellipse(0, 0.14, 0.9, 0.76, colour)
    pen.ellipse(0, 0.44, 0.46, 0.34, _shade(colour, 1.45))
    for side in (-1, 1):
        pen.ellipse(0.38 * side, 0.02, 0.17, 0.2, (250, 240, 180))
        pen.ellipse(0.38 * side, 0.02, 0.07, 0.18, INK)
        pen.line([(0.22 * side, 0.42), (0.78 * side, 0.34)], 0.035, dark)
        pen.line([(0.22 * side, 0.5), (0.76 * side, 0.56)], 0.035, dark)
    pen.polygon([(-0.12, 0.26), (0.12, 0.26), (0, 0.4)], (222, 108, 120))


def _ball(pen, colour):
    pen.ellipse(0, 0, 0.92, 0.92, colour)
    pen.polygon([(-0.91, -0.14), (0.91, -0.14), (0.91, 0.14), (-0.91, 0.14)], _shade(colour, 0.62))
    pen.ellipse(-0.34, -0.46, 0.24, 0.16, _shade(colour, 1.65))


def _tree(pen, colour):
    pen.polygon([(-0.17, 0.2), (0.17, 0.2), (0.24, 1.0), (-0.24, 1.0)], (120, 78, 48))
    for x, y, r in ((-0.4, -0.02, 0.5), (0.4, -0.02, 0.5), (0, -0.46, 0.54)):
        pen.ellipse(x, y, r, r, colour)
    for x, y, r in ((-0.42, -0.14, 0.24), (0.26, -0.2, 0.24), (-0.06, -0.62, 0.26)):
        pen.ellipse(x, y, r, r, _shade(colour, 1.2))


def _house(pen, colour):
    pen.polygon([(-0.76, -0.12), (0.76, -0.12), (0.76, 0.92), (-0.76, 0.92)], colour)
    pen.polygon([(-1.0, -0.1), (0, -0.95), (1.0, -0.1)], (116, 62, 54))
    pen.polygon([(-0.2, 0.3), (0.2, 0.3), (0.2, 0.92), (-0.2, 0.92)], (92, 58, 44))
    for side in (-1, 1):
        left = 0.48 * side - 0.17
        pen.polygon([(left, 0.08), (left + 0.34, 0.08), (left + 0.34, 0.42), (left, 0.42)], (255, 236, 150))


def _car(pen, colour):
    pen.polygon([(-0.56, -0.08), (-0.34, -0.56), (0.34, -0.56), (0.62, -0.08)], colour)
    pen.polygon([(-0.4, -0.1), (-0.26, -0.44), (-0.04, -0.44), (-0.04, -0.1)], (186, 224, 244))
    pen.polygon([(0.06, -0.1), (0.06, -0.44), (0.28, -0.44), (0.46, -0.1)], (186, 224, 244))
    pen.polygon([(-0.98, -0.1), (0.9, -0.1), (1.0, 0.1), (1.0, 0.42), (-0.98, 0.42)], colour)
    for x in (-0.55, 0.55):
        pen.ellipse(x, 0.42, 0.27, 0.27, INK)
        pen.ellipse(x, 0.42, 0.12, 0.12, (190, 190, 196))
    pen.ellipse(0.92, 0.1, 0.08, 0.1, (255, 240, 160))


def _fish(pen, colour):
    dark = _shade(colour, 0.7)
    pen.polygon([(-0.4, 0), (-1.0, -0.52), (-0.84, 0), (-1.0, 0.52)], dark)
    pen.polygon([(-0.2, -0.4), (0.1, -0.78), (0.4, -0.4)], dark)
    pen.ellipse(0.2, 0, 0.78, 0.52, colour)
    pen.ellipse(0.02, 0.08, 0.2, 0.13, dark)
    pen.ellipse(0.62, -0.12, 0.13, 0.13, (255, 255, 250))
    pen.ellipse(0.65, -0.12, 0.06, 0.06, INK)


def _flower(pen, colour):
    pen.polygon([(-0.11, 0.1), (0.11, 0.1), (0.11, 1.0), (-0.11, 1.0)], (52, 124, 60))
    pen.ellipse(0.3, 0.74, 0.28, 0.13, (66, 148, 74))
    for i in range(6):
        angle = i * math.pi / 3
        pen.ellipse(0.36 * math.cos(angle), -0.36 + 0.36 * math.sin(angle), 0.31, 0.31, colour)
    pen.ellipse(0, -0.36, 0.27, 0.27, (255, 206, 74) if colour != COLOURS["yellow"] else (150, 92, 40))


def _mushroom(pen, colour):
    pen.polygon([(-0.28, -0.02), (0.28, -0.02), (0.38, 0.92), (-0.38, 0.92)], (246, 236, 214))
    pen.ellipse(0, 0.06, 0.95, 0.94, colour, 180, 360)
    spot = _shade(colour, 1.8) if colour != COLOURS["white"] else (200, 176, 160)
    for x, y, r in ((-0.5, -0.24, 0.15), (0.02, -0.52, 0.17), (0.48, -0.2, 0.14)):
        pen.ellipse(x, y, r, r, spot)


def _star(pen, colour):
    points = []
    for i in range(10):
        radius = 1.0 if i % 2 == 0 else 0.46
        angle = -math.pi / 2 + i * math.pi / 5
        points.append((radius * math.cos(angle), radius * math.sin(angle)))
    pen.polygon(points, colour)
    pen.polygon([(x * 0.55, y * 0.55) for x, y in points], _shade(colour, 1.3))


def _boat(pen, colour):
    pen.polygon([(-0.04, -0.96), (0.05, -0.96), (0.05, 0.4), (-0.04, 0.4)], (112, 76, 50))
    pen.polygon([(0.1, -0.9), (0.1, 0.22), (0.86, 0.22)], (250, 246, 236))
    pen.polygon([(-0.1, -0.66), (-0.1, 0.22), (-0.7, 0.22)], (228, 220, 204))
    pen.polygon([(-1.0, 0.3), (1.0, 0.3), (0.66, 0.84), (-0.66, 0.84)], colour)
    pen.polygon([(-1.0, 0.3), (1.0, 0.3), (0.93, 0.42), (-0.93, 0.42)], _shade(colour, 0.68))


# noun: (how it is drawn, its colours, does it tilt)
OBJECTS = {
    "cat": (_cat, ("orange", "black", "white", "pink"), True),
    "ball": (_ball, tuple(COLOURS), True),
    "tree": (_tree, ("green", "orange", "pink"), False),
    "house": (_house, ("red", "orange", "yellow", "blue", "purple", "pink", "white"), False),
    "car": (_car, tuple(COLOURS), False),
    "fish": (_fish, tuple(COLOURS), True),
    "flower": (_flower, ("red", "orange", "yellow", "blue", "purple", "pink", "white"), False),
    "mushroom": (_mushroom, ("red", "orange", "purple", "blue", "white", "pink"), False),
    "star": (_star, ("yellow", "red", "orange", "purple", "pink", "white", "blue"), True),
    "boat": (_boat, ("red", "blue", "green", "yellow", "purple", "black"), False),
}
NOUNS = tuple(OBJECTS)


def _gradient(picture: Image.Image, top: int, bottom: int, first, last) -> None:
    draw = ImageDraw.Draw(picture)
    for y in range(top, bottom):
        t = (y - top) / max(1, bottom - top - 1)
        draw.line(
            [(0, y), (picture.width, y)],
            fill=tuple(round(a + (b - a) * t) for a, b in zip(first, last, strict=True)),
        )


def _paint_sky(picture, rng, bottom) -> None:
    _gradient(picture, 0, bottom, (96, 168, 236), (186, 222, 248))
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(0, 3)):
        x, y = rng.uniform(0, picture.width), rng.uniform(0.1, 0.7) * bottom
        for dx, dy, r in ((-34, 6, 22), (0, -6, 30), (34, 6, 24)):
            box = [x + dx - r, y + dy - r * 0.62, x + dx + r, y + dy + r * 0.62]
            draw.ellipse(box, fill=(248, 250, 253))


def _paint_ground(picture, rng, noun, top) -> None:
    width, height = picture.size
    draw = ImageDraw.Draw(picture)
    if noun == "grass":
        _gradient(picture, top, height, (110, 176, 84), (78, 150, 62))
        for _ in range((height - top) // 4):
            x, y, h = rng.uniform(0, width), rng.uniform(top + 20, height), rng.uniform(12, 22)
            draw.line([(x, y), (x + rng.uniform(-7, 7), y - h)], fill=(60, 128, 52), width=4)
    elif noun == "sand":
        _gradient(picture, top, height, (238, 214, 160), (222, 190, 128))
        for _ in range((height - top) // 4):
            x, y, r = rng.uniform(0, width), rng.uniform(top + 4, height), rng.uniform(2, 4.5)
            draw.ellipse([x - r, y - r, x + r, y + r], fill=(196, 160, 104))
    elif noun == "snow":
        _gradient(picture, top, height, (236, 243, 250), (218, 230, 243))
        for _ in range(5):
            x, y, r = rng.uniform(0, width), rng.uniform(top + 30, height), rng.uniform(40, 90)
            draw.chord([x - r, y - r * 0.3, x + r, y + r * 0.3], 180, 360, fill=(198, 214, 234))
    else:
        _gradient(picture, top, height, (52, 138, 178), (26, 92, 146))
        for _ in range((height - top) // 16):
            x, y, r = rng.uniform(0, width), rng.uniform(top + 12, height), rng.uniform(12, 24)
            for i in (-1, 1):
                box = [x + i * r - r, y - 8, x + i * r + r, y + 8]
                draw.arc(box, 180, 360, fill=(128, 196, 220), width=4)


def _places(rng, count: int, top: float) -> list[tuple[float, float, float]] | None:
    """x, y, radius of objects that hardly overlap, or None when this try found no room."""
    placed: list[tuple[float, float, float]] = []
    for _ in range(count):
        for _ in range(30):
            radius = rng.uniform(*((44, 66) if count < 3 else (38, 52)))
            x = rng.uniform(radius + 4, SIZE - radius - 4)
            y = rng.uniform(max(radius + 4, top - 0.5 * radius), SIZE - radius - 4)
            if all(math.hypot(x - a, y - b) > 0.98 * (radius + r) for a, b, r in placed):
                placed.append((x, y, radius))
                break
        else:
            return None
    return placed


def _crowd(rng, count: int, top: float) -> list[tuple[float, float, float]] | None:
    """x, y, radius of objects of which each touches one before it, or None when this try found no room."""
    placed: list[tuple[float, float, float]] = []
    for _ in range(count):
        for _ in range(30):
            radius = rng.uniform(36, 50)
            if placed:
                a, b, r = placed[rng.integers(len(placed))]
                angle = rng.uniform(0, 2 * math.pi)
                x, y = (c + 0.9 * (radius + r) * f(angle) for c, f in ((a, math.cos), (b, math.sin)))
            else:
                x, y = rng.uniform(radius, SIZE - radius), rng.uniform(radius, SIZE - radius)
            within = radius <= x <= SIZE - radius and max(radius, top - 0.5 * radius) <= y <= SIZE - radius
            if within and all(math.hypot(x - a, y - b) > 0.89 * (radius + r) for a, b, r in placed):
                placed.append((x, y, radius))
                break
        else:
            return None
    return placed


# x, y, radius of one, two or three objects in a posed scene
_POSES = {
    1: [(128.0, 150.0, 64.0)],
    2: [(70.0, 160.0, 54.0), (186.0, 160.0, 54.0)],
    3: [(52.0, 176.0, 44.0), (128.0, 108.0, 44.0), (204.0, 176.0, 44.0)],
}


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def make_scene(seed: int, look_alike: bool = False, posed: bool = False, crowd: bool = False) -> Scene:
    """The scene of this seed.

    Args:
        look_alike: two objects of one noun in two colours.
        posed: nothing is left to chance that the prompt does not say. Objects stand in the order in which
            they are named, each noun has a colour of its own unless the prompt gives another, and there is
            a sky where the prompt says so.
        crowd: three or four objects of one noun that touch, in neighbouring colours of ``COLOURS``, anywhere.
            The model was not trained on such scenes.
    """
    kind = 2 if crowd else int(look_alike)
    rng = np.random.default_rng([seed, kind, int(posed)] if posed else [seed, kind])
    side = SIZE * _SCALE
    ground = None if rng.random() < 0.1 else str(rng.choice(GROUNDS))
    horizon = SIZE if ground is None else int(rng.uniform(0.22, 0.5) * SIZE)
    if ground is not None and rng.random() < (0.5 if posed else 0.25):
        horizon = 0
    elif ground is not None and posed:
        horizon = int(0.36 * SIZE)

    places = None
    while places is None:
        top = 0 if ground is None else horizon
        if crowd:
            count = int(rng.integers(3, 5))
            places = _crowd(rng, count, top)
        else:
            count = 2 if look_alike else int(rng.choice([1, 2, 3], p=[0.25, 0.5, 0.25]))
            places = _POSES[count] if posed else _places(rng, count, top)
    if crowd:
        noun = str(rng.choice([n for n in NOUNS if len(OBJECTS[n][1]) > 3]))
        colours = sorted(OBJECTS[noun][1], key=list(COLOURS).index)
        first = int(rng.integers(len(colours)))
        objects = [Region(noun, colours[(first + i) % len(colours)]) for i in range(count)]
    elif look_alike:
        noun = str(rng.choice([n for n in NOUNS if len(OBJECTS[n][1]) > 2]))
        objects = [Region(noun, str(c)) for c in rng.permutation(OBJECTS[noun][1])[:2]]
    else:
        nouns = [str(n) for n in rng.permutation(NOUNS)[:count]]
        objects = [Region(n, str(rng.choice(OBJECTS[n][1]))) for n in nouns]
    named = [o.phrase if look_alike or crowd or rng.random() < 0.7 else o.noun for o in objects]
    if posed:
        objects = [
            o if o.phrase == name else Region(o.noun, OBJECTS[o.noun][1][0])
            for o, name in zip(objects, named, strict=True)
        ]

    regions = list(objects)
    picture, labels = Image.new("RGB", (side, side)), Image.new("L", (side, side))
    if horizon > 0:
        _paint_sky(picture, np.random.default_rng(0) if posed else rng, horizon * _SCALE)
        labels.paste(len(regions), (0, 0, side, horizon * _SCALE))
        regions.append(Region("sky"))
    if ground is not None:
        _paint_ground(picture, np.random.default_rng(0) if posed else rng, ground, horizon * _SCALE)
        labels.paste(len(regions), (0, horizon * _SCALE, side, side))
        regions.append(Region(ground))

    pen = _Pen(picture, labels)
    for index in sorted(range(len(objects)), key=lambda i: places[i][1]):
        draw, _, tilts = OBJECTS[objects[index].noun]
        tilt = rng.uniform(-0.35, 0.35) if tilts else rng.uniform(-0.06, 0.06)
        flip = bool(rng.random() < 0.5)
        pen.label = index
        pen.place(*places[index], 0.0 if posed else tilt, flip and not posed)
        draw(pen, COLOURS[objects[index].colour])

    named = [_article(name) for name in named]
    if not posed:
        rng.shuffle(named)
    prompt = _listed(named)
    if ground is None:
        prompt += " in the sky"
    else:
        prompt += f" on the {ground}"
        if horizon > 0 and (posed or rng.random() < 0.5):
            prompt += " under the sky"
    return Scene(
        image=np.asarray(picture.reduce(_SCALE)),
        labels=np.asarray(labels)[::_SCALE, ::_SCALE].copy(),
        regions=tuple(regions),
        prompt=prompt,
    )


def save_example(folder: Path) -> Scene:
    """Save a scene as ``example.png``, the picture that a fresh ComfyUI has to load, into an input folder."""
    scene = make_scene(EXAMPLE)
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene.image).save(folder / "example.png")
    return scene
