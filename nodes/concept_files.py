from __future__ import annotations

import json
from pathlib import Path

import folder_paths
from comfy.cli_args import args
from comfy_api.latest import io, ui

from ..core.files import SUFFIX, load_maps, save_maps
from .types import CATEGORY, ConceptMapsType


class ConceptMapsSave(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptMapsSave",
            display_name="Save Concept Maps",
            category=CATEGORY,
            description=(
                "Saves concept maps to the output folder, together with the recording that they were made "
                "from. Record fewer layers in Concept Attention for smaller files."
            ),
            search_aliases=["export concept maps", "save recording", "safetensors"],
            inputs=[
                ConceptMapsType.Input("maps"),
                io.String.Input(
                    "filename_prefix",
                    default="concept_maps/ComfyUI",
                    tooltip="In the output folder; may name a subfolder.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, maps: ConceptMapsType.Type, filename_prefix: str) -> io.NodeOutput:
        height, width = maps.image_size
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory(), width, height
        )
        workflow = {}
        if cls.hidden and not args.disable_metadata:
            workflow = {"prompt": cls.hidden.prompt, **(cls.hidden.extra_pnginfo or {})}
        file = f"{name}_{counter:05}_{SUFFIX}"
        save_maps(maps, Path(folder, file), {key: json.dumps(value) for key, value in workflow.items()})
        return io.NodeOutput(ui={"files": [ui.SavedResult(file, subfolder, io.FolderType.output)]})


class ConceptMapsLoad(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptMapsLoad",
            display_name="Load Concept Maps",
            category=CATEGORY,
            description=(
                "Loads concept maps that Save Concept Maps wrote, from the input or the output folder. "
                "Connect them to Concept Saliency to choose other layers or steps."
            ),
            search_aliases=["import concept maps", "load recording", "safetensors"],
            inputs=[io.Combo.Input("file", options=_files(), tooltip=f'The files that end in "{SUFFIX}".')],
            outputs=[ConceptMapsType.Output(display_name="maps")],
        )

    @classmethod
    def fingerprint_inputs(cls, file: str) -> int:
        return Path(folder_paths.get_annotated_filepath(file)).stat().st_mtime_ns

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        return io.NodeOutput(load_maps(Path(folder_paths.get_annotated_filepath(file))))


def _files() -> list[str]:
    """Files of concept maps as ComfyUI writes them: those of the output folder are marked."""
    folders = {"": folder_paths.get_input_directory(), " [output]": folder_paths.get_output_directory()}
    return [
        path.relative_to(folder).as_posix() + mark
        for mark, folder in folders.items()
        for path in sorted(Path(folder).rglob(f"*{SUFFIX}"))
    ]
