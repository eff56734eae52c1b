from __future__ import annotations

import json
import logging
from pathlib import Path

import folder_paths
from comfy.cli_args import args
from comfy_api.latest import io, ui

from ..core.reading.files import SUFFIX, load_maps, save_maps
from .types import CATEGORY, ConceptMapsType

FOLDER = "concept_maps"  # in the output folder


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
                    default=f"{FOLDER}/ComfyUI",
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
            inputs=[
                io.Combo.Input(
                    "file",
                    options=_files(),
                    tooltip=(
                        f'The files that end in "{SUFFIX}": in the input folder, in the output folder, and '
                        f"anywhere in its subfolder {FOLDER}."
                    ),
                )
            ],
            outputs=[ConceptMapsType.Output(display_name="maps")],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        """A workflow may name any file in the two folders, also one that is not offered. None: it is not
        known before the run, as another node gives it."""
        if file is None:
            return True
        name, folder = folder_paths.annotated_filepath(file)
        folder = Path(folder or folder_paths.get_input_directory())
        path = folder / name
        inside = path.is_relative_to(folder) and ".." not in Path(name).parts
        return (inside and name.endswith(SUFFIX) and path.is_file()) or f'there is no "{file}"'

    @classmethod
    def fingerprint_inputs(cls, file: str) -> int:
        return Path(folder_paths.get_annotated_filepath(file)).stat().st_mtime_ns

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        problem = cls.validate_inputs(file)  # not asked before, where another node gives the name
        if problem is not True:
            raise ValueError(f"Concept maps cannot be loaded: {problem}.")
        maps = load_maps(Path(folder_paths.get_annotated_filepath(file)))
        if maps.recording.broken:
            logging.warning("Concept Attention: %s", maps.recording.failed)
        return io.NodeOutput(maps)


def _files() -> list[str]:
    """Files to offer, as ComfyUI writes them: those of the output folder are marked. ComfyUI asks for them
    whenever it describes the node, checks a workflow or runs it, so folders full of pictures are left out."""
    input_, output = Path(folder_paths.get_input_directory()), Path(folder_paths.get_output_directory())
    found: dict[Path, str] = {}
    for folder, pattern, mark in (
        (input_, "*", ""),
        (output, "*", " [output]"),
        (output, f"{FOLDER}/**/*", " [output]"),
    ):
        for path in sorted(folder.glob(pattern + SUFFIX)):
            found.setdefault(path, path.relative_to(folder).as_posix() + mark)
    return list(found.values())
