"""Concept maps to pictures. An image is (H, W, 3) float32 in 0..1, as in ComfyUI's IMAGE.

Lines and letters are drawn by matplotlib's Agg canvas, without pyplot, so that nodes may run in threads.
Names are a user's text: never mathtext, and letters that no font has are drawn as boxes.
"""

from __future__ import annotations

import bisect
import logging
import sys
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..images import rgb_images
from ..reading.maps import ConceptMaps, upscale
from .palette import magma, palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# perceptually uniform, dark to light
COLOUR_MAPS = ("magma", "inferno", "plasma", "viridis", "cividis")

# Fonts for what DejaVu Sans, which comes with matplotlib, lacks; those installed are used.
_MORE_FONTS = (
    "Noto Sans CJK KR",
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Noto Sans KR",
    "NanumGothic",
    "Malgun Gothic",
    "Yu Gothic",
    "Microsoft YaHei",
    "Apple SD Gothic Neo",
    "Hiragino Sans",
    "PingFang SC",
    "WenQuanYi Micro Hei",
    "Noto Sans Arabic",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Noto Emoji",
    "Segoe UI Emoji",
)

_LUMA = torch.tensor([0.2126, 0.7152, 0.0722])

_SMALLEST = 11.0  # size of letters, in pixels
_LEGEND = 1024  # pixels that a legend may always be wide

_HEATMAPS = 2**30

_DPI = 128  # a power of 2: pixels to inches and back without rounding


def matplotlib() -> ModuleType:
    """matplotlib with all that is used of it, imported when something is drawn: it takes longer to load than
    the rest of the plugin, and where it is missing, the rest works.

    Raises:
        ImportError: it is missing, too old or broken. The message says what to install.
    """
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.cm
        import matplotlib.colors
        import matplotlib.figure
        import matplotlib.font_manager
        import matplotlib.patches
        import matplotlib.patheffects
        import matplotlib.ticker

        if matplotlib.__version_info__ < (3, 8):
            raise ImportError(f"this is version {matplotlib.__version__}")
    except ImportError as error:
        raise ImportError(
            "Names, contours, legends and figures are drawn by matplotlib 3.8 or newer, which cannot be used "
            f"here: {error}. Install it into ComfyUI's Python, and start ComfyUI again:\n"
            f'"{sys.executable}" -m pip install --upgrade "matplotlib>=3.8"\n'
            "Or go on without names, contours and legends, in the colours of magma."
        ) from error
    return matplotlib


def colourise(maps: Tensor, colour_map: str = "magma") -> Tensor:
    """Maps (..., H, W) in 0..1 as colours (..., H, W, 3), by the name of one of matplotlib's colour maps."""
    return _colours(maps, torch.ones(maps.shape[:-2]), colour_map)


def heatmap_images(maps: Tensor, names: Sequence[str] = (), frames: int = 1) -> Tensor:
    """Maps (B, K, H, W) as heatmaps (B, K, H, W, 3). All concepts of an image, or of ``frames`` that follow
    each other in a video, share one scale, from 0 to the highest value of any, so that an absent concept
    looks absent. ``names`` are those of the K concepts, to be written into their pictures, if there is a
    matplotlib to write them."""
    highest = maps.unflatten(0, (-1, frames)).amax((1, 2, 3, 4))
    highest = _positive(highest).repeat_interleave(frames)
    pictures = _colours(maps, highest[:, None].expand(maps.shape[:2]), "magma")
    height, width = maps.shape[-2:]
    if names:
        try:
            matplotlib()
        except ImportError as error:
            logging.warning("Concept Attention: heatmaps without names. %s", error)
            return pictures
    for index, name in enumerate(names):
        tops = pictures[:, index, : _name_height(height)]
        ink = _ink(tops.shape[1:3], lambda axes, n=name: _write_name(axes, n, (height, width)))
        for top in tops:
            top.copy_(_over(top, ink))
    return pictures


def heatmap_size(maps: ConceptMaps) -> tuple[int, int]:
    """Height and width of heatmaps that take ``_HEATMAPS`` bytes at most, all concepts and frames of a video
    together: the image's own, or smaller."""
    height, width = maps.image_size
    needed = 12 * height * width * len(maps.of_frames) * len(maps.concepts.names)
    share = min(1.0, (_HEATMAPS / needed) ** 0.5) if maps.recording.timed else 1.0
    return max(1, int(share * height)), max(1, int(share * width))


def _colours(maps: Tensor, highest: Tensor, colour_map: str) -> Tensor:
    """Maps (..., H, W) as colours (..., H, W, 3), each from 0 to its own of ``highest`` (...)."""
    table = magma() if colour_map == "magma" else matplotlib().colormaps[colour_map](range(256))[:, :3]
    table = torch.from_numpy(table).float()
    colours = torch.empty(*maps.shape, 3)
    for i in np.ndindex(maps.shape[:-2]):  # one by one: those of a batch are large together
        entries = (maps[i] / highest[i]).clamp_(0, 1).mul_(255).round_().int()
        torch.index_select(table, 0, entries.flatten(), out=colours[i].view(-1, 3))
    return colours


def _positive(highest: Tensor) -> Tensor:
    return torch.where(highest > 0, highest, 1.0)


def images_of(maps: ConceptMaps, images: Tensor) -> Tensor:
    """Images (N, H, W, 3) float32 on the CPU that the maps belong on: all images, or frames of the videos, or
    an image for each latent frame. A single image goes with all maps, and the maps of a single image with all
    images. ``maps.shown(N)`` are the maps of each.

    Raises:
        ValueError: they are no images (``rgb_images``), there is another number of them, or they have another
            shape than the one sampled.
    """
    images = rgb_images(images)
    count = len(images) if len(images) > 1 else len(maps.of_frames)
    maps.shown(count)
    (height, width), (rows, columns) = images.shape[1:3], maps.image_size
    if not 0.9 < (height / width) / (rows / columns) < 1.1:
        raise ValueError(
            f"The image is {width} x {height} pixels, but the concept maps are of an image of "
            f"{columns} x {rows}, which has another shape. Connect that image, at any scale."
        )
    return images.cpu().float().expand(count, -1, -1, -1)


def overlay_images(
    maps: ConceptMaps,
    images: Tensor,
    names: Sequence[str],
    *,
    colour_map: str = "magma",
    opacity: float = 0.6,
    shared_scale: bool = True,
    contour: float = 0.0,
    label: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """Images (B, H, W, 3) under the maps of concepts, one picture for each image and concept
    (B, len(names), H, W, 3).

    Args:
        shared_scale: colours go from 0 to the highest value that any concept has in the image or video, so
            that an absent concept looks absent; else to the highest value of the concept itself.
        contour: draw a line where a map crosses this share of its scale, 0..1; 0 draws none.
        label: write the concept's name into the picture.
        progress: called with the number of pictures that are done, and of all.

    Raises:
        ValueError: there is no such concept, or maps and images do not go together (``images_of``).
    """
    indices = [maps.index(name) for name in names]
    images = images_of(maps, images)
    shown = list(range(len(maps.concepts.names)))
    pictures = torch.empty(len(images), len(indices), *images.shape[1:])
    videos = maps.shown(len(images))
    frames, done, total = videos.shape[1], 0, len(images) * len(indices)
    for video, under, over in zip(videos, images.split(frames), pictures.split(frames), strict=True):
        common = video[:, shown + indices].max()
        for n, index in enumerate(indices):
            scale = _positive(common if shared_scale else video[:, index].max())
            name = maps.concepts.all[index] if label else ""
            for values, image, picture in zip(video[:, index] / scale, under, over[:, n], strict=True):
                progress(done, total)
                map_ = upscale(values[None, None], image.shape[:2], maps.coverage)[0, 0]
                coloured = torch.lerp(image, colourise(map_, colour_map), opacity)
                if name or contour > 0:
                    coloured = _inked(coloured, lambda axes, m=map_, s=name: _annotate(axes, m, contour, s))
                picture.copy_(coloured)
                done += 1
    progress(done, total)
    return pictures


def _annotate(axes: Axes, map_: Tensor, contour: float, name: str) -> None:
    height, width = map_.shape
    if contour > 0 and min(map_.shape) > 1 and map_.min() < contour < map_.max():
        line = max(1.5, height / 300)
        shadow = matplotlib().patheffects.withStroke(linewidth=_points(2.2 * line), foreground="#000000a0")
        axes.contour(
            np.arange(width) + 0.5,
            np.arange(height) + 0.5,
            map_.numpy(),
            [contour],
            colors="white",
            linewidths=_points(line),
        ).set_path_effects([shadow])
    if name:
        _write_name(axes, name, (height, width))


def _write_name(axes: Axes, name: str, image_size: tuple[int, int]) -> None:
    """Into the top left corner of a picture of that height and width."""
    size = _name_size(image_size[0])
    margin = 0.7 * size
    axes.text(
        margin,
        margin,
        shortened(name, image_size[1] - 2.6 * margin, size),
        **text_style(_points(size)),
        color="white",
        va="top",
        bbox={"boxstyle": "round,pad=0.35", "facecolor": "#000000a0", "edgecolor": "none"},
    )


def _name_size(height: int) -> float:
    return max(_SMALLEST, height / 26)


def _name_height(height: int) -> int:
    """So many of a picture's rows, from the top, hold its name: less to draw than all of them."""
    return min(height, round(4 * _name_size(height)))


def segmentation_images(
    labels: Tensor,
    names: Sequence[str],
    images: Tensor | None = None,
    *,
    opacity: float = 0.6,
    legend: bool = True,
) -> Tensor:
    """Coloured regions (N, H, W, 3), with a legend of names, colours and areas to the right.

    Args:
        labels: (N, H, W), the index in ``names`` that each pixel shows. Other values stay clear.
        images: (N, H, W, 3) to colour, grey under the regions; without them the regions are solid on black.
        opacity: of the regions, their borders are solid.
    """
    table = torch.from_numpy(palette(len(names))).float()
    pictures = torch.empty(*labels.shape, 3)
    for index, (plane, picture) in enumerate(zip(labels, pictures, strict=True)):  # many are large together
        image = None if images is None else images[index]
        picture.copy_(_segmented(plane, table, image, opacity))
    if not legend:
        return pictures
    areas = torch.stack([(labels == i).float().mean((1, 2)) for i in range(len(names))], 1)
    return torch.cat([pictures, _legends(names, table, areas, labels.shape[1:])], 2)


def _segmented(labels: Tensor, table: Tensor, image: Tensor | None, opacity: float) -> Tensor:
    coloured = (labels >= 0) & (labels < len(table))
    colours = table[labels.where(coloured, 0).long()]
    if image is None:
        return colours * coloured.unsqueeze(-1)
    # Over grey, colours keep the hue that the legend shows.
    grey = (image @ _LUMA).unsqueeze(-1).expand_as(image)
    border = _borders(labels, max(1, round(len(labels) / 400))).unsqueeze(-1)
    over = torch.lerp(grey, colours, torch.where(border, 1.0, opacity))
    return torch.where(coloured.unsqueeze(-1), over, image)


def _borders(labels: Tensor, thickness: int) -> Tensor:
    """The pixels (H, W) up to ``thickness`` away from another label."""
    planes = labels.float()[None, None]
    highest, lowest = (
        F.max_pool2d(p, 2 * thickness + 1, stride=1, padding=thickness) for p in (planes, -planes)
    )
    return (highest != -lowest)[0, 0]


class _Entry(NamedTuple):
    """A line of the legends: its share of each image (N), and no colour where it is of no single concept."""

    name: str
    shares: Tensor
    colour: Tensor | None = None
    outlined: bool = False


def _legends(names: Sequence[str], colours: Tensor, areas: Tensor, image_size: tuple[int, int]) -> Tensor:
    """White columns (N, height, width, 3) that list the colour, name and area (N, K) of each concept, and
    how much of the image shows none of them. Where this would take more than ``_LEGEND`` pixels beside a
    smaller image, letters get smaller, and then concepts with the smallest areas are only counted."""
    height, limit = image_size[0], max(_LEGEND, *image_size)
    concepts = [_Entry(name, areas[:, i], colours[i]) for i, name in enumerate(names)]
    clear = _Entry("none of these", 1 - areas.sum(1), outlined=True)
    largest_first = areas.sum(0).argsort(descending=True, stable=True).tolist()
    cut, width_of = cache(shortened), cache(text_width)
    size, listed = max(_SMALLEST, min(height / 30, 40.0, 1.1 * height / (len(names) + 1))), len(names)
    while True:
        entries = [concepts[i] for i in sorted(largest_first[:listed])]
        if rest := largest_first[listed:]:
            entries.append(_Entry(f"and {len(rest)} more", areas[:, rest].sum(1)))
        entries.append(clear)
        entries = [entry._replace(name=cut(entry.name, 14 * size, size)) for entry in entries]
        row, margin, gap = 1.7 * size, size, 1.5 * size
        per_column = max(1, int((height - 2 * margin) // row))
        columns = [entries[i : i + per_column] for i in range(0, len(entries), per_column)]
        number = width_of("100.0 %", size)
        widths = [3.2 * size + max(width_of(e.name, size) for e in c) + number for c in columns]
        width = round(sum(widths) + gap * (len(widths) - 1) + 2 * margin)
        if width <= limit or listed == 1:
            break
        if size > _SMALLEST:
            size = max(_SMALLEST, 0.9 * size)
        else:
            listed -= 1
    lefts = margin + np.cumsum([0, *widths[:-1]]) + gap * np.arange(len(widths))
    paper = torch.ones(height, width, 3)

    def write(axes: Axes, image: int) -> None:
        for column, left, width in zip(columns, lefts, widths, strict=True):
            for i, entry in enumerate(column):
                share, middle = entry.shares[image].item(), margin + (i + 0.5) * row
                ink = "#202020" if round(share, 3) > 0 else "#a0a0a0"
                style = text_style(_points(size)) | {"va": "center_baseline", "color": ink}
                axes.add_patch(
                    matplotlib().patches.Rectangle(
                        (left, middle - 0.6 * size),
                        1.2 * size,
                        1.2 * size,
                        facecolor="none" if entry.colour is None else entry.colour.tolist(),
                        edgecolor="#808080" if entry.outlined else "none",
                    )
                )
                axes.text(left + 2 * size, middle, entry.name, **style)
                axes.text(left + width, middle, f"{100 * share:.1f} %", ha="right", **style)

    return torch.stack([_inked(paper, lambda axes, i=i: write(axes, i)) for i in range(len(areas))])


def _inked(image: Tensor, draw: Callable[[Axes], None]) -> Tensor:
    """The image with what ``draw`` draws over it, in pixels from the top left corner."""
    return _over(image, _ink(image.shape[:2], draw))


def _over(image: Tensor, ink: Tensor) -> Tensor:
    return torch.lerp(image, ink[..., :3], ink[..., 3:])


def _ink(size: tuple[int, int], draw: Callable[[Axes], None]) -> Tensor:
    """RGBA (H, W, 4) of what ``draw`` draws, in pixels from the top left corner."""
    height, width = size
    figure = matplotlib().figure.Figure((width / _DPI, height / _DPI), _DPI)
    figure.patch.set_alpha(0)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    draw(axes)
    return _pixels(figure)


def figure_image(figure: Figure, dpi: int) -> Tensor:
    """A figure as an image."""
    figure.set_dpi(dpi)
    return _pixels(figure)[..., :3]


def _pixels(figure: Figure) -> Tensor:
    """A figure at its own dpi as RGBA (H, W, 4) in 0..1."""
    canvas = matplotlib().backends.backend_agg.FigureCanvasAgg(figure)
    canvas.draw()
    return torch.from_numpy(np.array(canvas.buffer_rgba())).float() / 255


def _points(pixels: float) -> float:
    return pixels * 72 / _DPI


@cache
def font_families() -> tuple[str, ...]:
    installed = {font.name for font in matplotlib().font_manager.fontManager.ttflist}
    return ("DejaVu Sans", *(name for name in _MORE_FONTS if name in installed))


def text_style(points: float) -> dict:
    """What a user's text needs in matplotlib: fonts that have its letters, and no mathtext."""
    return {"fontsize": points, "fontfamily": list(font_families()), "parse_math": False}


def text_width(text: str, size: float) -> float:
    """Width of a line of text of that size, both in pixels."""
    font = matplotlib().font_manager.FontProperties(family=list(font_families()), size=_points(size))
    renderer = matplotlib().backends.backend_agg.RendererAgg(1, 1, _DPI)
    return renderer.get_text_width_height_descent(text, font, ismath=False)[0]


def shortened(text: str, width: float, size: float) -> str:
    """The text without control characters, which SVG forbids, cut to fit ``width`` pixels."""
    text = "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cs"))
    if len(text) <= 200 and text_width(text, size) <= width:
        return text
    lengths = range(min(len(text), 200))
    cut = bisect.bisect_right(lengths, width, key=lambda length: text_width(text[:length] + "…", size)) - 1
    return text[: max(cut, 1)].rstrip() + "…"
