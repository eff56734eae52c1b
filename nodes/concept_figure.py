from __future__ import annotations

from io import BytesIO
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io, ui

from ..core.concepts import split_names
from ..core.drawing.figures import concepts_figure, frames_figure, layers_figures
from ..core.drawing.render import COLOUR_MAPS, figure_image, images_of
from ..core.observing.recording import parse_layers
from .limits import within_limits
from .progress import progress_bar
from .search import HEATMAPS
from .types import CATEGORY, ConceptMapsType


class ConceptFigure(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptFigure",
            display_name="Concept Figure",
            category=CATEGORY,
            description=(
                "Makes a figure for a page: concepts side by side, or one concept by layer and step, with a "
                "colour bar. Saved as PNG to the output folder, on request also as SVG or PDF."
            ),
            search_aliases=["plot", "matplotlib", "publication figure", "colour bar", *HEATMAPS],
            inputs=[
                ConceptMapsType.Input("maps"),
                io.Image.Input(
                    "image", optional=True, tooltip="Shown first beside the concepts, if connected."
                ),
                io.DynamicCombo.Input(
                    "layout",
                    options=[
                        io.DynamicCombo.Option("concepts", []),
                        io.DynamicCombo.Option(
                            "layers and steps",
                            [
                                io.String.Input(
                                    "concept",
                                    default="",
                                    dynamic_prompts=False,
                                    tooltip="Names, separated by commas. Empty: all. A figure for each.",
                                ),
                                io.String.Input(
                                    "layers",
                                    default="all",
                                    tooltip='Rows: "all", "default", or numbers as in "0, 15-18".',
                                ),
                                io.Int.Input(
                                    "steps",
                                    default=6,
                                    min=1,
                                    max=100,
                                    tooltip="Columns: so many of the maps' steps, evenly spaced.",
                                ),
                            ],
                        ),
                    ],
                ),
                io.String.Input("title", default="", dynamic_prompts=False),
                io.Combo.Input("colour_map", options=list(COLOUR_MAPS)),
                io.Int.Input("dpi", default=200, min=50, max=1200),
                io.Combo.Input(
                    "vector",
                    options=["none", "svg", "pdf"],
                    tooltip="Also save the figure in this format, beside the PNG.",
                ),
                io.String.Input("filename_prefix", default="figures/concepts"),
                io.Int.Input(
                    "frames",
                    default=6,
                    min=1,
                    max=100,
                    optional=True,
                    tooltip=(
                        "Of a video: so many of its frames, evenly spaced. Side by side, or each with a "
                        "figure of layers and steps."
                    ),
                ),
            ],
            outputs=[
                io.Image.Output(tooltip="One figure for each image or video, and for each concept if asked.")
            ],
            is_output_node=True,
        )

    @classmethod
    @within_limits
    def execute(
        cls,
        maps: ConceptMapsType.Type,
        layout: dict,
        title: str,
        colour_map: str,
        dpi: int,
        vector: str,
        filename_prefix: str,
        image: torch.Tensor | None = None,
        frames: int = 6,
    ) -> io.NodeOutput:
        style = {"title": title, "colour_map": colour_map}
        batch = range(maps.recording.batch)
        if layout["layout"] == "concepts":
            images = None if image is None else images_of(maps, image)
            if len(maps.of_frames) > len(batch):
                figures = (frames_figure(maps, i, images, columns=frames, **style) for i in batch)
            else:
                figures = (
                    concepts_figure(maps, i, None if images is None else images[i], **style) for i in batch
                )
        else:
            recording = maps.recording
            layers = parse_layers(
                layout["layers"], recording.layers, recording.default_layers, recording.left_out
            )
            names = split_names(layout["concept"]) or maps.concepts.names
            figures = layers_figures(
                maps,
                names,
                layers=layers,
                columns=layout["steps"],
                frames=frames,
                progress=progress_bar(),
                **style,
            )
        pictures, vectors = [], []
        for figure in figures:  # one at a time: each has large maps
            pictures.append(figure_image(figure, dpi))
            if vector != "none":
                file = BytesIO()
                figure.savefig(file, format=vector, dpi=dpi)
                vectors.append(file.getvalue())
        pictures = torch.stack(pictures)
        saved = ui.ImageSaveHelper.get_save_images_ui(pictures, filename_prefix, cls)
        for content, png in zip(vectors, saved.results, strict=False):
            folder = Path(folder_paths.get_output_directory(), png["subfolder"])
            (folder / png["filename"]).with_suffix(f".{vector}").write_bytes(content)
        return io.NodeOutput(pictures, ui=saved)
