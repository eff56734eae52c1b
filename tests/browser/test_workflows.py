"""The example workflows on the real front end: every node known and in its place, and the page runs them.

``CONCEPT_ATTENTION_SCREENSHOTS``: a folder for a picture of each workflow, before and after it ran.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest

import comfyui as comfyui_setup
import workflow
from front_end import READY, RUN
from scenes import save_example

PATHS = sorted((comfyui_setup.ROOT / "example_workflows").glob("*.json"))
OTHER_MODELS = [path.stem for path in PATHS if path.stem not in workflow.SCENES]
SCREENSHOTS = os.environ.get("CONCEPT_ATTENTION_SCREENSHOTS")
STEPS = 4
MODES = {False: "classic canvas", True: "Nodes 2.0"}
# What a node covers of the canvas, its title included.
BOXES = """() => {
    const { scale, offset } = app.canvas.ds;
    const origin = app.canvas.canvas.getBoundingClientRect();
    return app.canvas.graph.nodes.map((node) => {
        const element = document.querySelector(`[data-node-id="${node.id}"]`);
        if (!element) return [node.title, ...node.getBounding()];
        const { x, y, width, height } = element.getBoundingClientRect();
        const [left, top] = [(x - origin.x) / scale - offset[0], (y - origin.y) / scale - offset[1]];
        return [node.title, left, top, width / scale, height / scale];
    });
}"""
FIT = """() => {
    const things = [...app.graph.nodes, ...app.graph.groups];
    const left = Math.min(...things.map((t) => t.pos[0]));
    const top = Math.min(...things.map((t) => t.pos[1]));
    const right = Math.max(...things.map((t) => t.pos[0] + t.size[0]));
    const bottom = Math.max(...things.map((t) => t.pos[1] + t.size[1]));
    const scale = Math.min((innerWidth - 120) / (right - left), (innerHeight - 200) / (bottom - top));
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [80 / scale - left, 100 / scale - top];
    app.canvas.setDirty(true, true);
}"""


class Page:
    def __init__(self, page, url: str, nodes_2: bool, complaints) -> None:
        self.page, self.nodes_2, self.complaints = page, nodes_2, complaints
        page.set_default_timeout(120_000)
        page.goto(url, wait_until="domcontentloaded")
        page.wait_for_function(READY)

    def load(self, content: dict) -> None:
        self.page.evaluate("(content) => app.loadGraphData(content)", content)
        self.page.evaluate(FIT)
        if self.nodes_2:
            self.page.wait_for_function(
                "(count) => document.querySelectorAll('[data-node-id]').length >= count",
                arg=len(content["nodes"]),
            )
        self.page.wait_for_timeout(1000)

    def boxes(self) -> list[list]:
        return self.page.evaluate(BOXES)

    def enter_subgraph(self, name: str) -> None:
        self.page.evaluate(
            """(name) => {
                const node = app.rootGraph.nodes.find((node) => node.subgraph?.name === name);
                app.canvas.openSubgraph(node.subgraph, node);
            }""",
            name,
        )
        self.page.wait_for_timeout(1000)

    def leave_subgraph(self) -> None:
        self.page.evaluate("() => app.canvas.setGraph(app.rootGraph)")
        self.page.wait_for_timeout(200)

    def show_advanced_inputs(self) -> None:
        """Of every node. The classic canvas always shows them."""
        if self.nodes_2:
            buttons = self.page.get_by_text("Show advanced inputs")
            buttons.evaluate_all("(buttons) => buttons.forEach((button) => button.click())")
            self.page.wait_for_timeout(1000)

    def unknown(self) -> list[str]:
        """Types of nodes that the front end does not know."""
        types = self.page.evaluate(
            """() => [app.rootGraph, ...app.rootGraph.subgraphs.values()]
                .flatMap((graph) => graph.nodes).map((node) => node.type)"""
        )
        known = self.page.evaluate("() => Object.keys(LiteGraph.registered_node_types)")
        return sorted(set(types) - set(known))

    def red(self) -> list[str]:
        """Titles of nodes with an error."""
        return self.page.evaluate("() => app.graph.nodes.filter((n) => n.has_errors).map((n) => n.title)")

    def set_scene(self, name: str) -> None:
        """Type into the widgets what the demo model is asked for, at few steps. Those that a subgraph shows
        outside are typed into there."""
        self.page.evaluate(
            """([scene, steps]) => {
                const type = (title, type, name, widget) => {
                    const value = scene[title]?.[name];
                    if (value !== undefined) widget.value = value;
                    if (name === "steps" && type.startsWith("KSampler")) widget.value = steps;
                    if (name === "start_step") widget.value = Math.min(widget.value, steps - 1);
                };
                for (const node of app.graph.nodes) {
                    if (!node.subgraph) {
                        for (const widget of node.widgets ?? []) {
                            type(node.title, node.type, widget.name, widget);
                        }
                    }
                    for (const { name, linkIds } of node.subgraph?.inputs ?? []) {
                        const link = node.subgraph.getLink(linkIds[0]);
                        const inner = node.subgraph.getNodeById(link.target_id);
                        const slot = inner.inputs[link.target_slot].widget;
                        const widget = node.widgets.find((widget) => widget.name === name);
                        if (slot) type(inner.title, inner.type, slot.name, widget);
                    }
                }
            }""",
            [workflow.SCENES[name], STEPS],
        )

    def queued(self) -> dict:
        """The workflow as the page would queue it, by the titles of its nodes."""
        output = self.page.evaluate("async () => (await app.graphToPrompt()).output")
        return {
            number: {**node, "_meta": {"title": node["_meta"]["title"]}} for number, node in output.items()
        }

    def run(self) -> str:
        return self.page.evaluate(RUN)

    def wait_for_picture(self, title: str) -> None:
        """Until the node with this title shows one, no smaller than the demo model paints."""
        if self.nodes_2:
            number = self.page.evaluate("(t) => app.graph.nodes.find((n) => n.title === t).id", title)
            self.page.wait_for_function(
                """([number, size]) => [...document.querySelectorAll(`[data-node-id="${number}"] img`)]
                    .some((image) => image.checkVisibility() && image.naturalWidth >= size)""",
                arg=[number, workflow.SIZE],
            )
        else:
            self.page.wait_for_function(
                """([title, size]) => {
                    const node = app.graph.nodes.find((n) => n.title === title);
                    return node.imgs?.[0]?.naturalWidth >= size;
                }""",
                arg=[title, workflow.SIZE],
            )

    def screenshot(self, name: str) -> None:
        if SCREENSHOTS:
            self.page.wait_for_timeout(1500)
            mode = "nodes2" if self.nodes_2 else "classic"
            self.page.screenshot(path=Path(SCREENSHOTS, f"{name}_{mode}.png"))


@pytest.fixture(scope="module")
def models(server) -> None:
    """Empty files in place of the models that the workflows name: to choose, not to load. And a picture."""
    save_example(server.folder / "input")
    for path in PATHS:
        for node in workflow.all_nodes(json.loads(path.read_text("utf-8"))):
            for model in node["properties"].get("models", ()):
                folder = server.folder / "models" / model["directory"]
                folder.mkdir(parents=True, exist_ok=True)
                (folder / model["name"]).touch()


@pytest.fixture(scope="module", params=MODES, ids=MODES.values())
def page(request, server, models, browser, complaints_of) -> Iterator[Page]:
    server.post("/settings/Comfy.VueNodes.Enabled", request.param)
    context = browser.new_context(viewport={"width": 2400, "height": 1000})
    page = context.new_page()
    yield Page(page, server.url, request.param, complaints_of(page))
    context.close()


def overlapping(boxes: list[list]) -> list[tuple[str, str]]:
    """Titles of two nodes that cover each other, by more than the pixel that measuring may be off."""
    return [
        (a[0], b[0])
        for a, b in combinations(boxes, 2)
        if min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1]) > 1
        and min(a[2] + a[4], b[2] + b[4]) - max(a[2], b[2]) > 1
    ]


def skip_without_its_nodes(server: comfyui_setup.Server, content: dict) -> None:
    definitions = server.get("/object_info")
    known = {*definitions, *workflow.NOTES, *(subgraph["id"] for subgraph in workflow.graphs(content)[1:])}
    missing = {n["type"] for n in workflow.all_nodes(content)} - known
    if missing and all(kind.startswith("SAM3") for kind in missing):
        pytest.skip("this ComfyUI has no SAM3 nodes")


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_node_is_known_and_has_room(server, page, path):
    content = json.loads(path.read_text("utf-8"))
    skip_without_its_nodes(server, content)
    page.load(content)
    page.screenshot(path.stem)
    assert page.unknown() == []
    assert page.red() == []
    assert overlapping(page.boxes()) == []
    page.show_advanced_inputs()
    page.screenshot(f"{path.stem}_advanced")
    assert overlapping(page.boxes()) == []
    assert page.page.get_by_role("dialog").count() == 0
    assert page.complaints == []


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_nodes_in_subgraphs_have_room(server, page, path):
    content = json.loads(path.read_text("utf-8"))
    skip_without_its_nodes(server, content)
    page.load(content)
    for subgraph in workflow.graphs(content)[1:]:
        page.enter_subgraph(subgraph["name"])
        page.screenshot(f"{path.stem}_{subgraph['name']}")
        boxes = page.boxes()
        page.leave_subgraph()
        assert len(boxes) == len(subgraph["nodes"])
        assert overlapping(boxes) == [], subgraph["name"]


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_what_is_typed_into_paint_reaches_the_nodes_in_it(page, name):
    path = comfyui_setup.ROOT / "example_workflows" / f"{name}.json"
    page.load(json.loads(path.read_text("utf-8")))
    text = "a red ball"
    values = {"width": 768, "height": 512, "length": 41, "seed": 7, "noise_seed": 7, "steps": 3}
    paint, typed = page.page.evaluate(
        """(values) => {
            const paint = app.graph.nodes.find((node) => node.subgraph?.name === "Paint");
            const widgets = paint.widgets.filter((widget) => widget.name in values);
            for (const widget of widgets) widget.value = values[widget.name];
            return [String(paint.id), widgets.map((widget) => widget.name)];
        }""",
        {**values, "text": text, "prompt": text},
    )
    queued = page.queued()
    reached = {}
    for number, node in queued.items():
        if number.startswith(f"{paint}:"):
            inputs, title = node["inputs"], node["_meta"]["title"]
            reached.update({k: v for k, v in inputs.items() if k in values and not isinstance(v, list)})
            if node["class_type"] == "PrimitiveInt":
                reached[title.lower()] = inputs["value"]
    assert reached == {name: values[name] for name in typed if name in values}
    assert {"width", "height"} <= set(reached)
    prompt = workflow.find(queued, "Prompt")
    if prompt.startswith(f"{paint}:"):
        assert text in queued[prompt]["inputs"].values()


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_page_queues_what_the_demo_makes_of_the_file(server, page, path):
    content = json.loads(path.read_text("utf-8"))
    skip_without_its_nodes(server, content)
    page.load(content)
    assert page.queued() == workflow.to_api(content, server.get("/object_info"))


# One with the viewer, one where Concept Attention grows by the maps that it shows, one with a figure, one
# without a sampler.
@pytest.mark.parametrize(
    "name",
    [
        "1. Find concepts in a new picture",
        "3. Pick a concept and repaint it",
        "8. Compare layers and steps",
        "2. Find concepts in your own picture",
    ],
)
def test_the_page_runs_it_and_shows_the_result(page, name):
    path = comfyui_setup.ROOT / "example_workflows" / f"{name}.json"
    page.load(workflow.swap(json.loads(path.read_text("utf-8"))))
    page.set_scene(name)
    assert page.run().startswith("execution_success")
    for node in json.loads(path.read_text("utf-8"))["nodes"]:
        if node["type"] in ("PreviewImage", "SaveImage", "MaskPreview"):
            page.wait_for_picture(node["title"])
    page.screenshot(f"{name}_run")
    # The demo's empty prompt has a text box, unlike the node in whose place it is.
    assert overlapping([box for box in page.boxes() if box[0] != "No negative prompt"]) == []
    assert page.complaints == []
