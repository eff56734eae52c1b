"""Runs the example workflow with the demo model in a real ComfyUI on the CPU and writes its pictures, or
leaves that ComfyUI running for your browser."""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import comfyui
import workflow
from serve import OPENED, WORKFLOWS, serve

sys.path.insert(0, str(comfyui.ROOT))
from core.concepts import split_names

WORKFLOW = "3. Pick a concept and repaint it"
PROMPT = "a boat and a red mushroom on the water under the sky"
CONCEPTS = "mushroom, boat, water, sky"
INTO = "house"


def main() -> None:
    parser = argparse.ArgumentParser(prog="nox -s demo --", description=__doc__)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--concepts", default=CONCEPTS, help="separated by commas")
    parser.add_argument("--repaint", metavar="CONCEPT", help="the concept to repaint (default: the first)")
    parser.add_argument("--into", metavar="THING", default=INTO, help="what to repaint it into (%(default)s)")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--out", type=Path, default=comfyui.ROOT / "out", help="folder (%(default)s)")
    parser.add_argument("--serve", action="store_true", help="leave ComfyUI running for your browser")
    args = parser.parse_args()
    try:
        path = comfyui.find()
        if path is None:
            raise RuntimeError(f"No ComfyUI was found. {comfyui.HELP}")
        for file in (*comfyui.MODELS.values(), comfyui.TEXT_ENCODER):
            if not file.exists():
                raise RuntimeError(f"{file} is missing. Check out the repository again.")
        folder = comfyui.FOLDER / "demo-server"
        folder.mkdir(parents=True, exist_ok=True)
        server = comfyui.Server(path, folder)
        scene = asked_for(args)
        if args.serve:
            looks_only = {title: scene[title] for title in ("Prompt", "Concept Attention", "KSampler")}
            serve(server, {WORKFLOW: scene, OPENED: looks_only})
        else:
            run(server, args, scene)
    except RuntimeError as error:
        sys.exit(str(error))


def run(server: comfyui.Server, args: argparse.Namespace, scene: workflow.Scene) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    names = split_names(args.concepts)
    repainted = scene["Concept Viewer"]["concept"]

    start = time.monotonic()
    with ExitStack() as stack:
        with timed("ComfyUI started"):
            stack.enter_context(server)
        content = workflow.swap(json.loads((WORKFLOWS / f"{WORKFLOW}.json").read_text("utf-8")))
        graph = workflow.to_api(content, server.get("/object_info"))
        workflow.add_previews(graph)
        workflow.set_scene(graph, scene)
        mask = workflow.inputs(graph, "Concept Mask")  # asked for, not picked in the viewer
        mask.update(concept=repainted, method="argmax")
        del mask["method.threshold"]
        add_every_concept(graph)

        with timed("picture painted"):
            (picture,) = images(server, graph, "Picture")
        with timed("heatmaps and masks made"):
            heatmaps = images(server, graph, "Heatmaps")
            overlays = images(server, graph, "Overlays")
            masks = images(server, graph, "Masks")
            (mask,) = images(server, graph, "Mask")
        with timed(f"{repainted} repainted"):
            (inpainted,) = images(server, graph, "Repainted")

    with timed("files written"):
        rows = []
        shown = zip(names, file_names(names), heatmaps, overlays, masks, strict=True)
        for name, file_name, heatmap, overlay, own_mask in shown:
            heatmap.save(args.out / f"heatmap_{file_name}.png")
            overlay.save(args.out / f"overlay_{file_name}.png")
            own_mask.save(args.out / f"mask_{file_name}.png")
            rows.append((name, [picture, heatmap, overlay, own_mask]))
        picture.save(args.out / "picture.png")
        inpainted.save(args.out / "inpainted.png")
        last = (f"{repainted} to {args.into}", [picture, mask, inpainted])
        contact_sheet(args.prompt, rows, last).save(args.out / "contact_sheet.png")
    print(f"{time.monotonic() - start:6.1f} s  in all\n{args.out}: contact_sheet.png and what it shows")


def asked_for(args: argparse.Namespace) -> workflow.Scene:
    """The texts and the seed of the example workflow."""
    names = split_names(args.concepts)
    repainted = args.repaint or (names[0] if names else "")
    word = rf"\b{re.escape(repainted)}\b"
    new_prompt, count = re.subn(word, lambda _: args.into, args.prompt, flags=re.IGNORECASE)
    return {
        "Prompt": {"text": args.prompt},
        "Concept Attention": {"concepts": args.concepts},
        "Concept Viewer": {"concept": repainted},
        "Repaint prompt": {"text": new_prompt if count else f"{args.into}, {args.prompt}"},
        "KSampler": {"seed": args.seed},
        "KSampler (repaint)": {"seed": args.seed},
    }


def add_every_concept(graph: workflow.Graph) -> None:
    """Overlay and mask of every concept, where the example has one mask that is wide enough to repaint in."""
    image = workflow.inputs(graph, "Picture")["images"]
    mask = workflow.inputs(graph, "Concept Mask") | {"image": image, "refine": True}
    mask |= {"concept": "", "combine": False, "fill_holes": False, "grow": 0, "feather": 0}
    every = workflow.add(graph, "Mask of every concept", "ConceptMask", **mask)
    workflow.add(graph, "Masks", "MaskPreview", mask=[every, 0])
    overlay = {"concept": "", "colour_map": "magma", "opacity": 0.6, "scale": "all concepts"}
    overlay |= {"maps": mask["maps"], "image": image, "contour": 0.5, "name": False}
    every = workflow.add(graph, "Overlay of every concept", "ConceptOverlay", **overlay)
    workflow.add(graph, "Overlays", "PreviewImage", images=[every, 0])


def images(server: comfyui.Server, graph: workflow.Graph, title: str) -> list[Image.Image]:
    """What the output node with this title shows. ComfyUI does not run again what it has run already."""
    number = workflow.find(graph, title)
    entry = server.run(graph, [number])
    shown = entry["outputs"][number]["images"]
    return [Image.open(io.BytesIO(server.image(image))).convert("RGB") for image in shown]


@contextmanager
def timed(what: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    print(f"{time.monotonic() - start:6.1f} s  {what}", flush=True)


def file_names(names: tuple[str, ...]) -> list[str]:
    """A file name for each concept: letters, digits, - and _ only, and no two the same."""
    safe: list[str] = []
    for name in names:
        base = re.sub(r"[^\w-]+", "_", name).strip("_").lower()[:60] or "concept"
        number = sum(s == base or s.startswith(f"{base}~") for s in safe)
        safe.append(f"{base}~{number + 1}" if number else base)
    return safe


def contact_sheet(
    title: str, rows: list[tuple[str, list[Image.Image]]], last: tuple[str, list[Image.Image]]
) -> Image.Image:
    """One row for each concept, and below them how one of them was repainted."""
    cell, gap, left, top, caption = workflow.SIZE, 10, 170, 52, 26
    width = left + 4 * (cell + gap) + gap
    height = top + caption + len(rows) * (cell + gap) + 2 * gap + caption + cell + 2 * gap
    sheet = Image.new("RGB", (width, height), (24, 24, 28))
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(22), ImageFont.load_default(15)
    bright, dim = (240, 240, 240), (150, 150, 158)
    draw.text((2 * gap, top / 2), textwrap.shorten(title, 100), bright, large, anchor="lm")

    def row(y: int, name: str, pictures: list[Image.Image]) -> None:
        wrapped = textwrap.fill(textwrap.shorten(name, 80), 12)
        draw.multiline_text((2 * gap, y + cell / 2), wrapped, bright, large, anchor="lm")
        for i, picture in enumerate(pictures):
            sheet.paste(picture.resize((cell, cell)), (left + i * (cell + gap), y))

    def captions(y: int, *texts: str) -> None:
        for i, text in enumerate(texts):
            draw.text((left + i * (cell + gap), y + caption / 2), text, dim, small, anchor="lm")

    captions(top, "picture", "heatmap", "overlay", "mask (argmax, refined)")
    y = top + caption
    for name, pictures in rows:
        row(y, name, pictures)
        y += cell + gap
    y += 2 * gap
    captions(y, "picture", "mask, grown and feathered", "repainted")
    row(y + caption, *last)
    return sheet


if __name__ == "__main__":
    main()
