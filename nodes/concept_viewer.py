from __future__ import annotations

import uuid
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io

from ..core.concepts import split_names
from ..core.drawing.palette import hex_colours
from ..core.drawing.render import images_of
from ..core.drawing.transport import pack, picture
from ..core.reading.maps import ConceptMaps
from .browser import publish, workflow_id
from .limits import within_limits
from .search import EXPLANATION, HEATMAPS
from .types import CATEGORY, ConceptMapsType


class ConceptViewer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptViewer",
            display_name="Concept Viewer",
            category=CATEGORY,
            description=(
                "Shows concept maps on the picture or video: point at it to see which concepts live there, "
                "pick concepts and a threshold, and look through frames, layers and steps. Nothing is "
                "sampled again."
            ),
            search_aliases=["interactive", "explore", *HEATMAPS, *EXPLANATION],
            inputs=[
                ConceptMapsType.Input("maps"),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The picture that the maps belong to, or the frames of the video.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    socketless=True,
                    tooltip="Where the outlines run.",
                ),
                io.String.Input(
                    "concept",
                    default="",
                    socketless=True,
                    dynamic_prompts=False,
                    tooltip="The concepts picked, separated by commas. Empty: all of them.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    display_name="threshold",
                    tooltip='For the method "fixed" of Concept Mask: its mask is what the outline shows.',
                ),
                io.String.Output(display_name="concept", tooltip="For the concept of Concept Mask."),
            ],
            hidden=[io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    @within_limits
    def execute(
        cls,
        maps: ConceptMapsType.Type,
        threshold: float,
        concept: str,
        image: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        durations = maps.recording.durations
        count = len(maps.of_frames) if image is None else len(images_of(maps, image))
        if count == len(maps.values):  # a picture for each latent frame
            durations = (1,) * len(durations)
        frames = sum(durations)
        packets = [_saved(pack(v), "maps") for v in maps.values.split(len(durations))]
        pictures = [] if image is None else [_saved(picture(i, of_video=frames > 1), "jpg") for i in image]
        view = {
            **_description(maps),
            "durations": durations,
            "between_frames": maps.between_frames,
            "key": publish(maps),
            "workflow": workflow_id(cls.hidden.extra_pnginfo) if cls.hidden else None,
            "images": [
                {
                    "recorded": i % len(packets),
                    "maps": packets[i % len(packets)],
                    # A single picture is that of all.
                    "pictures": pictures[i * frames : (i + 1) * frames] or pictures,
                }
                for i in range(count // frames)
            ],
        }
        return io.NodeOutput(threshold, _known(concept, maps), ui={"concept_view": [view]})


def _known(concept: str, maps: ConceptMaps) -> str:
    """The names that the maps have. Others were picked in another list; the panel does not show them."""
    names = {name.casefold(): name for name in maps.concepts.all}
    return ", ".join(names[n.casefold()] for n in split_names(concept) if n.casefold() in names)


def _description(maps: ConceptMaps) -> dict:
    recording = maps.recording
    return {
        "concepts": maps.concepts.all,
        "colours": hex_colours(len(maps.concepts.all)),
        "shown": len(maps.concepts.names),
        "grid": maps.values.shape[-2:],
        "coverage": maps.coverage,
        "softmax": maps.softmax,
        "grounding": maps.grounding,
        "average": maps.average,
        "layers": recording.layers,
        "steps": recording.steps,
        "sigmas": [round(sigma, 4) for sigma in recording.sigmas],
        "chosen_layers": maps.layers,
        "chosen_steps": maps.steps,
    }


def _saved(content: bytes, extension: str) -> dict:
    """A new file in ComfyUI's temporary folder, as ``/view`` finds it."""
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    name = f"concept_viewer_{uuid.uuid4().hex}.{extension}"
    (folder / name).write_bytes(content)
    return {"filename": name, "subfolder": "", "type": "temp"}
