"""Makes the pictures of the example workflows for Flux.1 with the demo model in a real ComfyUI: four outputs
each, two by two. Those for other models have a picture of their graph."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw
from run import images

import comfyui
import workflow
from scenes import save_example

FOLDER = comfyui.ROOT / "example_workflows"
CELL, GAP = workflow.SIZE, 4
# An output node's title, and which of its images.
TILES = {
    "1. Find concepts in a new picture": [("Picture", 0), ("Heatmaps", 0), ("Heatmaps", 1), ("Heatmaps", 2)],
    "2. Find concepts in your own picture": [
        ("Your picture", 0),
        ("Heatmaps", 0),
        ("Segmented", 0),
        ("Mask", 0),
    ],
    "3. Pick a concept and repaint it": [("Picture", 0), ("Heatmaps", 0), ("Mask", 0), ("Repainted", 0)],
    "4. Repaint a concept with Flux.1 Fill": [("Picture", 0), ("Heatmaps", 1), ("Mask", 0), ("Repainted", 0)],
    "5. Cut a concept out with SAM3": [("Picture", 0), ("Heatmaps", 0), ("Mask", 0), ("Boxes and points", 0)],
    "6. Lay a concept over another picture": [
        ("Picture A", 0),
        ("Picture B", 0),
        ("Mask", 0),
        ("Composite", 0),
    ],
    "7. A prompt for each concept": [
        ("One prompt", 0),
        ("Mask of the first region", 0),
        ("Mask of the second region", 0),
        ("Finished", 0),
    ],
    "8. Compare layers and steps": [
        ("Picture", 0),
        ("Concept in early layers", 0),
        ("Concept in late layers", 0),
        ("Figure", 0),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, default=comfyui.find())
    args = parser.parse_args()
    folder = comfyui.FOLDER / "demo-server"
    folder.mkdir(parents=True, exist_ok=True)
    save_example(folder / "input")
    with comfyui.Server(args.comfyui, folder) as server:
        definitions = server.get("/object_info")
        for name in TILES:
            content = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
            graph = workflow.to_api(workflow.swap(content), definitions)
            workflow.set_scene(graph, workflow.SCENES[name])
            if name == "3. Pick a concept and repaint it":
                workflow.add_previews(graph)
            elif name == "2. Find concepts in your own picture":
                workflow.inputs(graph, "Concept Segmentation")["legend"] = False
            thumbnail(server, graph, name).save(FOLDER / f"{name}.jpg", quality=85, optimize=True)
            print(name, flush=True)


def thumbnail(server: comfyui.Server, graph: workflow.Graph, name: str) -> Image.Image:
    sheet = Image.new("RGB", (2 * CELL + GAP, 2 * CELL + GAP), (24, 24, 28))
    for i, (title, index) in enumerate(TILES[name]):
        if title == "One prompt":
            tile = one_prompt(server, graph)
        elif title == "Boxes and points":
            tile = boxes_and_points(server, graph)
        elif title == "Your picture":
            tile = Image.open(server.folder / "input" / workflow.inputs(graph, title)["image"])
        else:
            tile = images(server, graph, title)[index]
        tile = tile.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS)
        sheet.paste(tile, ((CELL + GAP) * (i % 2), (CELL + GAP) * (i // 2)))
    return sheet


def one_prompt(server: comfyui.Server, graph: workflow.Graph) -> Image.Image:
    """The picture that the regional prompts change."""
    rest = workflow.inputs(graph, "KSampler (the rest)")
    combined = rest["positive"]
    rest["positive"] = workflow.inputs(graph, "KSampler (first steps)")["positive"]
    (picture,) = images(server, graph, "Finished")
    rest["positive"] = combined
    return picture


def boxes_and_points(server: comfyui.Server, graph: workflow.Graph) -> Image.Image:
    """What SAM3 is given, drawn into the picture."""
    (picture,) = images(server, graph, "Picture")
    boxes, points = workflow.shown_as_text(server, graph, "Concept Mask", 1, 2)
    draw = ImageDraw.Draw(picture)
    for box in json.loads(boxes)[0]:
        left, top = box["x"], box["y"]
        draw.rectangle((left, top, left + box["width"], top + box["height"]), outline="white", width=2)
    for point in json.loads(points):
        x, y = point["x"], point["y"]
        draw.ellipse((x - 5, y - 5, x + 5, y + 5), fill="white", outline="black", width=2)
    return picture


if __name__ == "__main__":
    main()
