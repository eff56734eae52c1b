"""Concept maps as figures for a page: matplotlib figures, to be rendered or saved in any of its formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..reading.maps import ConceptMaps, concept_maps, upscale
from .render import matplotlib, shortened, text_style, text_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

# Lengths in inches, text in points.
_GAP = 0.06
_MARGIN = 0.1
_TEXT, _TITLE, _TICKS = 8, 10, 7
_LINE = 0.17
_LINE_WIDTH = 0.5
_PIXELS = 512  # longer side of a map in a figure
_COLUMNS = 6  # concepts in a row, at most
_LABEL = 1.2  # the longest name beside a row


class _Sheet:
    """Panels of one size in rows and columns, with room for a title, labels and one colour bar.

    Args:
        panel: height and width.
        left: room for row labels.
        header, between: room above the first row and above each other row.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        panel: tuple[float, float],
        *,
        title: str,
        header: float,
        between: float,
        left: float = 0.0,
    ) -> None:
        self._panel, self._between = panel, between
        self._left = _MARGIN + left
        self._top = _MARGIN + (1.3 * _LINE if title else 0) + header
        self._height = rows * (panel[0] + between) - between
        self._width = columns * (panel[1] + _GAP)
        self._size = (self._left + self._width + 0.7, self._top + self._height + _MARGIN)
        self.figure = matplotlib().figure.Figure(self._size)
        if title:
            width, height = self._size
            text = shortened(title, 72 * (width - 2 * _MARGIN), _TITLE)
            position = (self._left + (self._width - _GAP) / 2) / width, 1 - _MARGIN / height
            self.figure.text(*position, text, ha="center", va="top", **text_style(_TITLE))

    def panel(self, row: int, column: int, picture: np.ndarray, above: str = "", **colours) -> Axes:
        height, width = self._panel
        top = self._top + row * (height + self._between)
        axes = self._axes(self._left + column * (width + _GAP), top, height, width)
        axes.imshow(picture, aspect="auto", **colours)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_linewidth(_LINE_WIDTH)
        axes.set_title(above, pad=3, **text_style(_TEXT))
        return axes

    def fitted(self, text: str) -> str:
        """The text, cut to the width of a panel."""
        return shortened(text, 72 * self._panel[1], _TEXT)

    def colour_bar(self, norm: Normalize, colour_map: str, label: str) -> None:
        axes = self._axes(self._left + self._width, self._top, self._height, 0.09)
        colours = matplotlib().cm.ScalarMappable(norm, colour_map)
        bar = self.figure.colorbar(colours, cax=axes, ticks=matplotlib().ticker.MaxNLocator(5))
        bar.outline.set_linewidth(_LINE_WIDTH)
        bar.set_label(label, fontsize=_TICKS)
        axes.tick_params(labelsize=_TICKS, width=_LINE_WIDTH, length=2)

    def _axes(self, left: float, top: float, height: float, width: float) -> Axes:
        whole_width, whole_height = self._size
        bottom = whole_height - top - height
        return self.figure.add_axes(
            (left / whole_width, bottom / whole_height, width / whole_width, height / whole_height)
        )


def _fit(image_size: tuple[int, int], longest: float) -> tuple[float, float]:
    """Height and width of a panel for such images."""
    return tuple(longest * n / max(image_size) for n in image_size)


def _planes(maps: ConceptMaps, values: Tensor) -> np.ndarray:
    """Map values (N, h, w) at the resolution of a figure (N, H, W)."""
    size = tuple(max(1, round(n)) for n in _fit(maps.image_size, min(_PIXELS, max(maps.image_size))))
    return upscale(values[None], size, maps.coverage)[0].numpy()


def _scale(maps: ConceptMaps, highest: float) -> tuple[Normalize, str]:
    """One scale for all maps of a figure, and what it is a scale of."""
    norm = matplotlib().colors.Normalize(0, float(highest) or 1.0)
    return norm, "softmax" if maps.softmax else "scaled score"


def concepts_figure(
    maps: ConceptMaps,
    index: int = 0,
    image: Tensor | None = None,
    *,
    title: str = "",
    colour_map: str = "magma",
) -> Figure:
    """The concepts of image ``index`` side by side, on one scale from 0 to the highest value of any, with a
    colour bar. ``image`` (H, W, 3) comes first if given."""
    names = maps.concepts.names
    planes = _planes(maps, maps.values[index, : len(names)])
    norm, measure = _scale(maps, planes.max())
    panels = [] if image is None else [("image", image.cpu().float().numpy())]
    panels += zip(names, planes, strict=True)
    rows = -(-len(panels) // _COLUMNS)
    columns = -(-len(panels) // rows)
    size = _fit(maps.image_size, 1.5)
    sheet = _Sheet(rows, columns, size, title=title, header=1.2 * _LINE, between=1.5 * _LINE)
    for position, (name, picture) in enumerate(panels):
        sheet.panel(*divmod(position, columns), picture, sheet.fitted(name), norm=norm, cmap=colour_map)
    sheet.colour_bar(norm, colour_map, measure)
    return sheet.figure


def frames_figure(
    maps: ConceptMaps,
    index: int = 0,
    images: Tensor | None = None,
    *,
    columns: int = 6,
    title: str = "",
    colour_map: str = "magma",
) -> Figure:
    """The concepts of video ``index`` (rows) through its frames (columns), all on one scale from 0 to the
    highest value of any, with a colour bar.

    Args:
        images: the first row, if given: the frames of all videos, see ``ConceptMaps.shown``.
        columns: at most as many frames, evenly spaced.
    """
    names = maps.concepts.names
    videos = maps.shown(None if images is None else len(images))
    frames = _spaced(videos.shape[1], columns)
    planes = _planes(maps, videos[index, frames][:, : len(names)].flatten(0, 1))
    norm, measure = _scale(maps, planes.max())
    fitted = [shortened(name, 72 * _LABEL, _TEXT) for name in names]
    rows = list(
        zip(fitted, planes.reshape(len(frames), len(names), *planes.shape[1:]).swapaxes(0, 1), strict=True)
    )
    if images is not None:
        of_video = images.split(videos.shape[1])[index]
        rows.insert(0, ("", of_video[frames].cpu().float().numpy()))
    sheet = _Sheet(
        len(rows),
        len(frames),
        _fit(maps.image_size, 1.2),
        title=title,
        header=1.2 * _LINE,
        between=_GAP,
        left=_GAP + max(text_width(name, _TEXT) for name in fitted) / 72,
    )
    for row, (name, pictures) in enumerate(rows):
        for column, (frame, picture) in enumerate(zip(frames, pictures, strict=True)):
            above = _frame(maps, frame) if row == 0 else ""
            axes = sheet.panel(row, column, picture, above, norm=norm, cmap=colour_map)
            if column == 0:
                axes.set_ylabel(name, rotation="horizontal", ha="right", va="center", **text_style(_TEXT))
    sheet.colour_bar(norm, colour_map, measure)
    return sheet.figure


def _frame(maps: ConceptMaps, number: int) -> str:
    """As the viewer counts them, from 1."""
    return f"{'frame' if maps.recording.timed else 'layer'} {number + 1}"


def _spaced(count: int, most: int) -> list[int]:
    """At most ``most`` of the numbers below ``count``, evenly spaced, the first and the last among them."""
    return torch.linspace(0, count - 1, min(most, count)).round().int().tolist()


def layers_figures(
    maps: ConceptMaps,
    names: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    columns: int = 6,
    frames: int = 6,
    title: str = "",
    colour_map: str = "magma",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Figure]:
    """For each image, or frame of a video, the figures of these concepts, one after the other: the concept's
    maps by layer (rows) and step (columns), all on one scale (the paper's figures 6 and 7). Each map is made
    as ``maps`` were, but from that layer and step alone.

    Args:
        layers: all that were recorded by default.
        columns: at most as many of the steps that ``maps`` were made from, evenly spaced.
        frames: at most as many of the frames of a video, evenly spaced.
        title: the concept's name by default.
        progress: called now and then with what is done and what there is to do, counted in panels: each is
            made once for all concepts of an image or video, and drawn, by who takes the figures, for each of
            them.

    Raises:
        ValueError: there is no such concept, or a layer was not recorded.
    """
    concepts = [maps.index(name) for name in names]
    recording = maps.recording
    layers = recording.layers if layers is None else layers
    steps = [maps.steps[i] for i in _spaced(len(maps.steps), columns)]
    choice = {
        "softmax": maps.softmax,
        "temperature": maps.temperature,
        "grounding": maps.grounding,
        "average": maps.average,
        "between_frames": maps.between_frames,
    }
    panels = [(layer, step) for layer in layers for step in steps]
    shown = _spaced(maps.shown().shape[1], frames)
    done, total = 0, recording.batch * len(panels) * (1 + len(shown) * len(concepts))
    for video in range(recording.batch):
        pictures = slice(video * recording.frames, (video + 1) * recording.frames)
        scores = {space: tuple(s[:, pictures] for s in each) for space, each in recording.scores.items()}
        alone = replace(recording, scores=scores)
        values = []
        for layer, step in panels:
            progress(done, total)
            made = concept_maps(alone, space=maps.space, layers=[layer], steps=[step], **choice)
            values.append(made.shown()[0, shown])
            done += 1
        for frame, number in enumerate(shown):
            for concept in concepts:
                progress(done, total)
                planes = torch.stack([panel[frame, concept] for panel in values])
                heading = title or maps.concepts.all[concept]
                if recording.frames > 1:
                    heading += f", {_frame(maps, number)}"
                yield _layers_figure(maps, planes, layers, steps, heading, colour_map)
                done += len(panels)
    progress(done, total)


def _layers_figure(
    maps: ConceptMaps,
    values: Tensor,
    layers: Sequence[int],
    steps: Sequence[int],
    title: str,
    colour_map: str,
) -> Figure:
    """``values`` (N, h, w) are those of each layer's steps, layer by layer."""
    planes = _planes(maps, values)
    norm, measure = _scale(maps, planes.max())
    sheet = _Sheet(
        len(layers),
        len(steps),
        _fit(maps.image_size, 0.8),
        title=title,
        header=2 * _LINE,
        between=_GAP,
        left=0.55,
    )
    for position, plane in enumerate(planes):
        row, column = divmod(position, len(steps))
        step = steps[column]
        sigma = maps.recording.sigmas[maps.recording.steps.index(step)]
        above = f"step {step}\nσ {sigma:.3g}" if row == 0 else ""
        axes = sheet.panel(row, column, plane, above, norm=norm, cmap=colour_map)
        if column == 0:
            label = f"layer {layers[row]}"
            axes.set_ylabel(label, rotation="horizontal", ha="right", va="center", size=_TEXT)
    sheet.colour_bar(norm, colour_map, measure)
    return sheet.figure
