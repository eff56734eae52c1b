"""Concept Viewer in a real browser, on the real front end and server."""

from __future__ import annotations

import importlib.util
import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import comfyui as comfyui_setup
from concept_attention.core.concepts import Concepts
from concept_attention.core.observing.recording import Recording
from concept_attention.core.reading.maps import heatmaps
from front_end import READY, RUN

HERE = Path(__file__).parent
ROWS, COLUMNS, BATCH = 64, 64, 2
# half a level, and half of the third decimal that the viewer shows
TOLERANCE = 1 / 510 + 0.0005
# What the server says of runs.
HEAR = """async () => {
    const { api } = await import("/scripts/api.js");
    window.heard = { live: [], end: "" };
    api.addEventListener("concept_attention.maps", ({ detail }) => window.heard.live.push(detail));
    for (const type of ["execution_success", "execution_error", "execution_interrupted"]) {
        api.addEventListener(type, () => (window.heard.end = type));
    }
}"""
VIEWER = "app.graph.nodes.find((n) => n.comfyClass === 'ConceptViewer')"
SALIENCY = "app.graph.nodes.find((n) => n.comfyClass === 'ConceptSaliency')"
PALETTES = ("dark", "light", "solarized", "arc", "nord", "github")
# The least contrast that WCAG 2 asks for.
READABLE = 4.5
# That of every text in the panel, on what is behind it.
CONTRASTS = """() => {
    const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const over = (colours) => {
        context.clearRect(0, 0, 1, 1);
        for (const colour of colours) {
            context.fillStyle = colour;
            context.fillRect(0, 0, 1, 1);
        }
        return context.getImageData(0, 0, 1, 1).data;
    };
    const linear = (v) => (v > 0.04045 ? ((v + 0.055) / 1.055) ** 2.4 : v / 12.92);
    const luminance = (rgb) => {
        const [r, g, b] = [...rgb].map((v) => linear(v / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const found = {};
    const panel = document.querySelector(".concept-viewer");
    for (const element of panel.querySelectorAll("*")) {
        const text = [...element.childNodes].map((n) => (n.nodeType === 3 ? n.data : "")).join("").trim();
        if (!text || !element.checkVisibility()) continue;
        const behind = [];
        for (let e = element; e && e !== panel.parentElement; e = e.parentElement) {
            if (getComputedStyle(e).opacity !== "1") throw new Error(`${text} is translucent`);
            behind.unshift(getComputedStyle(e).backgroundColor);
        }
        // The node behind the panel may have any colour.
        const contrasts = ["black", "white", "red"].map((node) => {
            const paper = luminance(over([node, ...behind]));
            const ink = luminance(over([node, ...behind, getComputedStyle(element).color]));
            return (Math.max(paper, ink) + 0.05) / (Math.min(paper, ink) + 0.05);
        });
        found[text] = Math.min(...contrasts);
    }
    return found;
}"""

spec = importlib.util.spec_from_file_location("made_up", HERE / "pack" / "made_up.py")
made_up = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made_up)


@pytest.fixture(scope="module")
def recording() -> Recording:
    return made_up.recording(Recording, Concepts, BATCH, ROWS, COLUMNS)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[comfyui_setup.Server]:
    folder = tmp_path_factory.mktemp("comfyui")
    shutil.copytree(HERE / "pack", folder / "custom_nodes" / "made-up")
    with comfyui_setup.Server(comfyui_setup.find(), folder) as server:
        server.post("/settings/Comfy.TutorialCompleted", True)
        yield server


class Viewer:
    """The page and the viewer on it."""

    def __init__(self, page, url: str, complaints: list[str]) -> None:
        self.page, self.url, self.complaints = page, url, complaints
        self.seeds = itertools.count()
        page.set_default_timeout(60_000)
        self.open()

    def open(self) -> None:
        self.page.goto(self.url, wait_until="domcontentloaded")
        self.page.wait_for_function(READY)
        self.page.evaluate(HEAR)

    @staticmethod
    def graph() -> dict:
        size = {"batch": BATCH, "rows": ROWS, "columns": COLUMNS}
        return {
            # The front end would take what is not given from the workflow before.
            "1": {
                "class_type": "TestMadeUpMaps",
                "inputs": {**size, "softmax": True, "grounding": "paper", "average": "after softmax"},
            },
            "2": {
                "class_type": "ConceptViewer",
                "inputs": {"maps": ["1", 0], "image": ["1", 1], "threshold": 0.5, "concept": ""},
            },
        }

    def open_workflow(self, workflow: dict) -> None:
        """In a tab of its own, with an id of its own unless it has one."""
        self.page.evaluate("(workflow) => app.loadGraphData(workflow)", workflow)
        self.page.wait_for_timeout(1000)

    def workflow(self) -> dict:
        """What is open, without its id."""
        return {k: v for k, v in self.page.evaluate("() => app.graph.serialize()").items() if k != "id"}

    def command(self, name: str) -> None:
        self.page.evaluate("(name) => app.extensionManager.command.execute(name)", name)
        self.page.wait_for_timeout(1000)

    def load(self, **nodes: dict) -> None:
        self.page.evaluate("(graph) => app.loadApiJson(graph, 'test')", {**self.graph(), **nodes})
        self.resize(420, 720)

    def load_saliency(self, **inputs: object) -> None:
        """The viewer after a Concept Saliency, with a result."""
        given = {"layers": "default", "start_step": 0, "end_step": 10000, "grounding": "paper", **inputs}
        choices = {"space": "output", "softmax": True, "temperature": 1.0, "average": "after softmax"}
        viewer = self.graph()["2"]
        viewer["inputs"]["maps"] = ["4", 0]
        saliency = {
            "class_type": "ConceptSaliency",
            "inputs": {"latent": ["1", 0], **choices, **given},
        }
        self.load(**{"2": viewer, "4": saliency})
        self.run()

    def saliency(self) -> list:
        """The layers and steps in the widgets of Concept Saliency."""
        return self.page.evaluate(
            f"""() => ["layers", "start_step", "end_step"].map(
                (name) => {SALIENCY}.widgets.find((w) => w.name === name).value
            )"""
        )

    def select(self) -> None:
        """The viewer, with a click on it."""
        x, y = self.page.evaluate(
            f"""() => {{
                const {{ scale, offset }} = app.canvas.ds;
                const {{ x, y }} = app.canvas.canvas.getBoundingClientRect();
                const [left, top] = {VIEWER}.pos;
                return [(left + 150 + offset[0]) * scale + x, (top + 20 + offset[1]) * scale + y];
            }}"""
        )
        self.page.mouse.click(x, y)
        self.page.wait_for_timeout(1000)

    def button(self, name: str):
        return self.panel.get_by_role("button", name=name, exact=True)

    def set(self, setting: str, value: object) -> None:
        self.page.evaluate("([id, value]) => app.extensionManager.setting.set(id, value)", [setting, value])
        self.page.wait_for_timeout(500)

    @contextmanager
    def without_answers(self, status: int | None = None) -> Iterator[None]:
        """ComfyUI answers with this status, or not at all."""
        self.page.evaluate(
            """async (status) => {
                const { api } = await import("/scripts/api.js");
                api.fetchApi = async () => {
                    if (status) return new Response("", { status });
                    throw new TypeError("Failed to fetch");
                };
            }""",
            status,
        )
        yield
        self.page.evaluate("async () => { delete (await import('/scripts/api.js')).api.fetchApi }")

    def labels(self) -> tuple[str, ...]:
        """What the panel says that it shows."""
        strips = [
            self.panel.get_by_label(name).get_attribute("aria-valuetext") for name in ("Layers", "Steps")
        ]
        return (*strips, self.panel.locator(".pager span").text_content())

    def middle(self) -> list[int]:
        """The colour in the middle of the picture as shown."""
        self.page.wait_for_timeout(200)
        return self.panel.locator("canvas").evaluate(
            """(canvas) => {
                const copy = new OffscreenCanvas(1, 1).getContext("2d");
                copy.drawImage(canvas, -canvas.width / 2, -canvas.height / 2);
                return [...copy.getImageData(0, 0, 1, 1).data];
            }"""
        )

    def place(self, row: int, column: int) -> tuple[float, float]:
        """Of a patch on the page."""
        box = self.panel.locator("canvas").bounding_box()
        x = box["x"] + box["width"] * (column + 0.5) / COLUMNS
        return x, box["y"] + box["height"] * (row + 0.5) / ROWS

    def resize(self, width: int, height: int, scale: float = 1.0) -> None:
        self.page.evaluate(
            f"""([width, height, scale]) => {{
                const viewer = {VIEWER};
                app.graph.nodes.filter((n) => n !== viewer).forEach((n, i) => (n.pos = [-600, 200 * i]));
                viewer.pos = [80, 60];
                viewer.setSize([width, height]);
                app.canvas.ds.scale = scale;
                app.canvas.ds.offset = [40, 40];
                app.canvas.setDirty(true, true);
            }}""",
            [width, height, scale],
        )
        self.page.wait_for_timeout(500)

    def run(self) -> None:
        assert self.page.evaluate(RUN).startswith("execution_success")
        self.settle()

    def start(self) -> None:
        """Begin a run, up to its first maps."""
        self.page.evaluate(
            """async () => {
                Object.assign(window.heard, { live: [], end: "" });
                await app.queuePrompt(0, 1);
            }"""
        )
        self.wait_for_maps()

    def wait_for_maps(self) -> None:
        """Until more have come, and were shown if they ever are."""
        before = len(self.heard("live"))
        self.page.wait_for_function("(before) => window.heard.live.length > before", arg=before)
        self.page.wait_for_timeout(300)

    def wait_for_end(self) -> str:
        self.page.wait_for_function("() => window.heard.end")
        return self.heard("end")

    def heard(self, what: str):
        return self.page.evaluate("(what) => window.heard[what]", what)

    def nodes_with_a_panel(self) -> list[str]:
        return self.page.evaluate(
            """() => app.graph.nodes.filter((n) => n.widgets?.some((w) => w.name === "view"))
                .map((n) => n.comfyClass)"""
        )

    def status(self) -> str:
        return self.panel.locator(".status").text_content()

    @property
    def panel(self):
        return self.page.locator(".concept-viewer").first

    def chip(self, name: str):
        return self.panel.locator(".chip", has=self.page.get_by_text(name, exact=True))

    def pressed(self) -> list[str]:
        return self.panel.locator(".chip[aria-pressed=true]").all_text_contents()

    def point(self, row: int, column: int) -> dict[str, float]:
        """The values that are shown with the pointer on a patch."""
        self.page.mouse.move(*self.place(row, column))
        return self.card()

    def card(self) -> dict[str, float]:
        lines = self.panel.locator(".card > div")
        self.panel.locator(".card").wait_for()
        return {
            line.locator("b").text_content(): float(line.locator("span").text_content())
            for line in lines.all()
            if line.locator("b").count()
        }

    def inputs(self) -> dict:
        """What the viewer's widgets would be queued with."""
        return self.page.evaluate(
            """async () => Object.values((await app.graphToPrompt()).output)
                .find((node) => node.class_type === "ConceptViewer").inputs"""
        )

    def slide(self, label: str, value: float) -> None:
        self.panel.get_by_role("slider", name=label).evaluate(
            "(input, value) => { input.value = value; input.dispatchEvent(new Event('input')) }", str(value)
        )

    def scrub(self, label: str, first: int, last: int, count: int) -> None:
        box = self.panel.get_by_label(label).bounding_box()
        x = [box["x"] + box["width"] * (index + 0.5) / count for index in (first, last)]
        self.page.mouse.move(x[0], box["y"] + 6)
        self.page.mouse.down()
        self.page.mouse.move(x[1], box["y"] + 6, steps=4)
        self.page.mouse.up()
        self.settle()

    def settle(self) -> None:
        """Wait until what was asked for is shown."""
        self.page.wait_for_function("document.querySelector('.concept-viewer')?.ariaBusy === 'false'")


@pytest.fixture(scope="module", params=[False, True], ids=["classic canvas", "Nodes 2.0"])
def page(request, server, browser, complaints_of) -> Iterator[Viewer]:
    server.post("/settings/Comfy.VueNodes.Enabled", request.param)
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    page = context.new_page()
    yield Viewer(page, server.url, complaints_of(page))
    context.close()


@pytest.fixture
def viewer(page) -> Iterator[Viewer]:
    page.load()
    page.run()
    page.complaints.clear()
    yield page
    assert not page.complaints


def close_to(shown: dict[str, float], maps: torch.Tensor, row: int, column: int) -> bool:
    expected = dict(zip(made_up.CONCEPTS, maps[:, row, column].tolist(), strict=True))
    ranked = sorted(shown.values(), reverse=True)
    return list(shown.values()) == ranked and shown == pytest.approx(expected, abs=TOLERANCE)


def test_values_under_the_pointer_are_those_of_the_maps(viewer, recording):
    maps = heatmaps(recording)[0]
    for row, column in ((0, 0), (20, 41), (63, 63)):
        assert close_to(viewer.point(row, column), maps, row, column)


def test_values_stay_right_at_any_zoom_and_size(viewer, recording):
    maps = heatmaps(recording)[0]
    for size in ((300, 480, 1.0), (700, 900, 0.6), (380, 700, 1.4)):
        viewer.resize(*size)
        assert close_to(viewer.point(12, 50), maps, 12, 50)


def test_scrubbing_recomputes_the_means(viewer, recording):
    viewer.scrub("Layers", 4, 4, 19)
    assert close_to(viewer.point(30, 30), heatmaps(recording, layers=[4])[0], 30, 30)
    viewer.scrub("Steps", 2, 9, 28)
    expected = heatmaps(recording, layers=[4], steps=range(2, 10))[0]
    assert close_to(viewer.point(30, 30), expected, 30, 30)
    viewer.panel.get_by_text("Reset").click()
    viewer.settle()
    viewer.scrub("Steps", 27, 27, 28)
    assert close_to(viewer.point(30, 30), heatmaps(recording, steps=[27])[0], 30, 30)


def test_chips_pick_concepts_and_the_workflow_keeps_them(viewer):
    assert viewer.pressed() == ["All"]
    viewer.chip("rock").click()
    assert viewer.pressed() == ["rock"]
    viewer.chip("dragon").click(modifiers=["Control"])
    assert viewer.pressed() == ["dragon", "rock"]
    assert viewer.inputs()["concept"] == "dragon, rock"
    viewer.chip("rock").press("Enter")
    assert viewer.pressed() == ["rock"]
    viewer.chip("rock").press("Space")
    assert viewer.pressed() == ["All"]
    assert viewer.inputs()["concept"] == ""


@pytest.mark.parametrize(
    "picked, shown, kept",
    [
        ("castle", ["All"], ""),
        ("castle, ROCK", ["rock"], "rock"),
        ("Sky,dragon", ["dragon", "sky"], "dragon, sky"),
    ],
)
def test_what_the_workflow_keeps_is_what_the_chips_show(viewer, picked, shown, kept):
    node = viewer.graph()["2"]
    node["inputs"]["concept"] = picked
    viewer.load(**{"2": node})
    viewer.run()
    assert viewer.pressed() == shown
    assert viewer.inputs()["concept"] == kept


def test_the_threshold_is_a_widget_that_the_workflow_keeps(viewer):
    viewer.slide("Threshold", 0.31)
    assert viewer.inputs()["threshold"] == pytest.approx(0.31)
    workflow = viewer.page.evaluate("() => app.graph.serialize()")
    viewer.page.evaluate("(workflow) => app.loadGraphData(workflow)", workflow)
    viewer.resize(420, 720)
    assert viewer.inputs()["threshold"] == pytest.approx(0.31)
    viewer.run()
    assert viewer.panel.get_by_role("slider", name="Threshold").input_value() == "0.31"


def test_the_keyboard_moves_over_the_patches(viewer, recording):
    viewer.page.mouse.move(900, 500)
    viewer.panel.get_by_role("application").press("ArrowUp")
    viewer.page.keyboard.press("ArrowLeft")
    assert close_to(viewer.card(), heatmaps(recording)[0], ROWS // 2 - 1, COLUMNS // 2 - 1)
    highest = [f"{name} {value:.3f}" for name, value in viewer.card().items()][:2]
    assert viewer.status() == ", ".join(highest)
    viewer.page.keyboard.press("Escape")
    assert viewer.status() == ""
    viewer.page.keyboard.press("ArrowUp")
    assert viewer.status()
    strip = viewer.panel.get_by_label("Layers")
    strip.press("Home")
    assert strip.get_attribute("aria-valuetext") == "Layers 0"
    strip.press("a")
    assert strip.get_attribute("aria-valuetext") == "Layers all 19"
    viewer.settle()
    assert viewer.status() == ""


@pytest.mark.parametrize(
    "choice,said",
    [
        ({"grounding": "anchor propagation"}, "Without anchor propagation"),
        ({"average": "before softmax"}, "Averaged after the softmax"),
    ],
)
def test_layers_and_steps_are_said_to_be_shown_as_in_the_paper(viewer, choice, said):
    note = viewer.panel.get_by_text(said)
    viewer.panel.get_by_label("Layers").press("Home")
    viewer.settle()
    assert not note.is_visible()
    node = viewer.graph()["1"]
    node["inputs"] |= choice
    viewer.load(**{"1": node})
    viewer.run()
    assert not note.is_visible()
    viewer.panel.get_by_label("Steps").press("Home")
    viewer.settle()
    assert note.is_visible()
    viewer.panel.get_by_text("Reset").click()
    viewer.settle()
    assert not note.is_visible()


def test_a_click_picks_what_is_highest_at_a_place(viewer, recording):
    maps = heatmaps(recording)[0]
    names = []
    for row, column in ((5, 40), (20, 15)):
        names.append(made_up.CONCEPTS[maps[:, row, column].argmax()])
        viewer.page.mouse.click(*viewer.place(row, column))
        assert viewer.pressed() == names[-1:]
    assert len(set(names)) == 2
    viewer.page.keyboard.down("Shift")
    viewer.page.mouse.click(*viewer.place(5, 40))
    viewer.page.keyboard.up("Shift")
    assert set(viewer.pressed()) == set(names)
    assert set(viewer.inputs()["concept"].split(", ")) == set(names)
    viewer.panel.locator("canvas").press("ArrowUp")
    viewer.page.keyboard.press("Enter")
    highest, *_ = viewer.card()
    assert viewer.pressed() == [highest]
    viewer.page.keyboard.press("Enter")
    assert viewer.pressed() == ["All"]


def test_the_picture_is_shown_alone_as_long_as_it_is_held(viewer):
    viewer.slide("Opacity", 0)
    viewer.slide("Threshold", 1)
    picture = viewer.middle()
    viewer.slide("Opacity", 1)
    maps = viewer.middle()
    assert maps != picture
    mouse, keyboard = viewer.page.mouse, viewer.page.keyboard

    def held(press, release) -> list[list[int]]:
        press()
        viewer.page.wait_for_timeout(400)
        during = viewer.middle()
        release()
        return [during, viewer.middle()]

    button = viewer.button("Picture alone").bounding_box()
    for place in (viewer.place(20, 20), (button["x"] + 8, button["y"] + 8)):
        mouse.move(*place)
        assert held(mouse.down, mouse.up) == [picture, maps]
    assert viewer.pressed() == ["All"]
    for focused in (viewer.panel.locator("canvas"), viewer.button("Picture alone")):
        focused.focus()
        assert held(lambda: keyboard.down("Space"), lambda: keyboard.up("Space")) == [picture, maps]


def test_full_screen_shows_the_panel_alone_and_keeps_the_graph_out_of_reach(viewer, recording):
    before = viewer.page.evaluate("() => app.canvas.ds.scale")
    viewer.button("Full screen").click()
    viewer.page.wait_for_timeout(500)
    box = viewer.panel.bounding_box()
    screen = viewer.page.evaluate("() => [innerWidth, innerHeight]")
    assert [box["x"], box["y"], box["width"], box["height"]] == [0, 0, *screen]
    assert close_to(viewer.point(12, 50), heatmaps(recording)[0], 12, 50)
    viewer.page.mouse.wheel(0, 300)
    viewer.page.evaluate(f"() => app.canvas.select({VIEWER})")
    viewer.page.mouse.click(screen[0] - 4, screen[1] - 4)
    viewer.page.keyboard.press("Delete")
    viewer.page.wait_for_timeout(300)
    assert viewer.page.evaluate("() => app.canvas.ds.scale") == before
    viewer.button("Leave full screen").click()
    viewer.page.wait_for_timeout(500)
    assert viewer.button("Full screen").is_visible()
    assert viewer.panel.bounding_box()["width"] < 500
    assert close_to(viewer.point(12, 50), heatmaps(recording)[0], 12, 50)


@pytest.mark.parametrize(
    "layers, steps, widgets",
    [
        ((3, 6), None, ["3-6", 0, 10000]),
        (None, (2, 9), ["default", 2, 10]),
        ((4, 4), (27, 27), ["4", 27, 28]),
        ((0, 18), None, ["all", 0, 10000]),
    ],
)
def test_layers_and_steps_are_handed_to_concept_saliency_as_one_change(viewer, layers, steps, widgets):
    viewer.load_saliency()
    apply = viewer.button("Apply")
    assert not apply.is_visible()
    for name, chosen, count in (("Layers", layers, 19), ("Steps", steps, 28)):
        if chosen:
            viewer.scrub(name, *chosen, count)
    shown = viewer.point(30, 30)
    apply.click()
    assert viewer.saliency() == widgets
    assert not apply.is_visible()
    assert viewer.status() == "Set in Concept Saliency. Run the workflow to get these maps."
    viewer.command("Comfy.Undo")
    assert viewer.saliency() == ["default", 0, 10000]
    viewer.command("Comfy.Redo")
    assert viewer.saliency() == widgets
    viewer.resize(420, 720)
    viewer.run()
    assert viewer.point(30, 30) == pytest.approx(shown, abs=TOLERANCE)
    assert not viewer.button("Reset").is_visible()


def test_all_steps_again_are_handed_over_as_no_limit(viewer):
    viewer.load_saliency(start_step=5, end_step=9)
    viewer.panel.get_by_label("Steps").press("a")
    viewer.settle()
    viewer.button("Apply").click()
    assert viewer.saliency() == ["default", 0, 10000]


def test_nothing_is_handed_over_where_no_widget_takes_it(viewer):
    viewer.panel.get_by_label("Layers").press("Home")
    viewer.settle()
    assert viewer.button("Reset").is_visible()
    assert not viewer.button("Apply").is_visible()
    viewer.load_saliency()
    viewer.panel.get_by_label("Layers").press("Home")
    viewer.settle()
    assert viewer.button("Apply").is_visible()
    viewer.page.evaluate(
        f"""() => {{
            const text = LiteGraph.createNode("PrimitiveString");
            app.graph.add(text);
            text.connect(0, {SALIENCY}, {SALIENCY}.inputs.findIndex((i) => i.name === "layers"));
        }}"""
    )
    viewer.page.mouse.move(5, 5)
    viewer.point(5, 5)
    assert not viewer.button("Apply").is_visible()


# What stands between Concept Saliency and the viewer.
BETWEEN = {
    "a reroute node": """
        const reroute = LiteGraph.createNode("Reroute");
        app.graph.add(reroute);
        saliency.connect(0, reroute, 0);
        reroute.connect(0, viewer, 0);
    """,
    "a reroute of the link": """
        const link = app.graph.getLink(viewer.inputs[0].link);
        app.graph.createReroute([0, 0], link);
    """,
    "one that is bypassed": """
        const other = LiteGraph.createNode("ConceptSaliency");
        app.graph.add(other);
        saliency.connect(0, other, 0);
        other.connect(0, viewer, 0);
        other.mode = 4;
    """,
    "out of a subgraph": "app.canvas.graph.convertToSubgraph(new Set([saliency]));",
    "into a subgraph": """
        const { subgraph, node } = app.canvas.graph.convertToSubgraph(new Set([viewer]));
        app.canvas.openSubgraph(subgraph, node);
    """,
}


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN.keys())
def test_concept_saliency_is_found_through(viewer, between):
    viewer.load_saliency()
    viewer.page.evaluate(f"() => {{ const saliency = {SALIENCY}; const viewer = {VIEWER}; {between} }}")
    viewer.page.wait_for_timeout(500)
    viewer.run()
    viewer.panel.get_by_label("Layers").press("Home")
    viewer.settle()
    viewer.button("Apply").click()
    layers = viewer.page.evaluate(
        """() => [app.rootGraph, ...app.rootGraph.subgraphs.values()].flatMap((graph) => graph.nodes)
            .filter((node) => node.comfyClass === "ConceptSaliency" && node.mode === 0)
            .map((node) => node.widgets.find((w) => w.name === "layers").value)"""
    )
    viewer.page.evaluate("() => app.canvas.setGraph(app.graph)")
    assert layers == ["0"]


@pytest.mark.parametrize(
    "status, message",
    [
        (410, "ComfyUI no longer has these maps. Run the workflow again to see them."),
        (None, "The maps did not arrive. Is ComfyUI still running?"),
    ],
)
def test_what_does_not_arrive_leaves_the_panel_as_it_was(viewer, recording, status, message):
    viewer.scrub("Layers", 3, 6, 19)
    labels = viewer.labels()
    assert labels == ("Layers 3–6", "Steps all 28", "1 / 2")
    for ask in (
        lambda: viewer.panel.get_by_label("Steps").press("Home"),
        lambda: viewer.panel.get_by_label("Next image").click(),
    ):
        with viewer.without_answers(status):
            ask()
            viewer.settle()
        assert viewer.status() == message
        assert viewer.labels() == labels
        assert close_to(viewer.point(30, 30), heatmaps(recording, layers=range(3, 7))[0], 30, 30)
        assert viewer.panel.locator(".status").evaluate(
            "(e) => e.scrollWidth <= e.clientWidth && e.scrollHeight <= e.clientHeight"
        )
    viewer.panel.get_by_label("Next image").click()
    viewer.settle()
    assert viewer.labels() == ("Layers 3–6", "Steps all 28", "2 / 2")
    assert close_to(viewer.point(8, 9), heatmaps(recording, layers=range(3, 7))[1], 8, 9)
    assert viewer.status() == ""


@pytest.mark.parametrize("palette", PALETTES)
def test_every_text_is_readable_whatever_the_palette_and_the_node_s_colour(viewer, palette):
    viewer.set("Comfy.ColorPalette", palette)
    try:
        viewer.chip("sky").click()
        viewer.panel.get_by_label("Layers").press("Home")
        viewer.settle()
        viewer.panel.locator("canvas").press("ArrowUp")
        contrasts = viewer.page.evaluate(CONTRASTS)
        assert {"Opacity", "0.65", "Layers", "All", "Copy", "1 / 2", viewer.status()} <= contrasts.keys()
        assert {text: c for text, c in contrasts.items() if c < READABLE} == {}
        viewer.open_workflow(viewer.workflow())
        contrasts = viewer.page.evaluate(CONTRASTS)
        assert contrasts["Run the workflow to see the concept maps."] >= READABLE
    finally:
        viewer.set("Comfy.ColorPalette", "dark")


def test_the_card_stays_beside_its_patch_when_the_node_is_resized(viewer):
    viewer.page.mouse.move(1390, 990)
    canvas = viewer.panel.locator("canvas")
    for _ in range(3):
        canvas.press("Shift+ArrowLeft")
    for size in ((420, 720), (900, 800), (300, 600)):
        viewer.resize(*size)
        stage, patch, card = (
            viewer.panel.locator(selector).bounding_box() for selector in (".stage", ".patch", ".card")
        )
        assert card["x"] + card["width"] <= stage["x"] + stage["width"]
        assert card["y"] + card["height"] <= stage["y"] + stage["height"]
        assert card["x"] == pytest.approx(patch["x"] + patch["width"] + 10, abs=2)


def test_sliders_and_buttons_have_room_in_a_narrow_node(viewer):
    viewer.resize(200, 620)
    panel = viewer.panel.bounding_box()
    for name in ("Opacity", "Threshold", "Layers", "Steps"):
        slider = viewer.panel.get_by_role("slider", name=name)
        assert slider.bounding_box()["width"] > 0.75 * panel["width"]
        assert slider.bounding_box()["height"] >= 14
    for button in viewer.panel.locator(".bar button").all():
        box = button.bounding_box()
        if box:
            assert panel["x"] < box["x"]
            assert box["x"] + box["width"] < panel["x"] + panel["width"]
            assert box["y"] + box["height"] < panel["y"] + panel["height"]


def test_pointing_at_a_concept_moves_nothing_under_the_pointer(viewer):
    viewer.load_saliency()
    viewer.panel.get_by_label("Layers").press("Home")
    viewer.settle()
    for size in ((420, 720), (200, 620)):
        viewer.resize(*size)
        viewer.page.mouse.move(1390, 990)
        viewer.page.wait_for_timeout(200)
        before = viewer.chip("rock").bounding_box()
        viewer.chip("rock").hover()
        viewer.page.wait_for_timeout(300)
        assert viewer.panel.locator(".scale").is_visible()
        assert viewer.chip("rock").bounding_box() == before


def test_the_side_panel_leaves_the_viewer_as_wide_as_it_is(viewer):
    width = viewer.panel.bounding_box()["width"]
    viewer.set("Comfy.RightSidePanel.IsOpen", True)
    try:
        viewer.select()
        # Earlier ones have no way to leave a widget out.
        version = viewer.page.evaluate("() => window.__COMFYUI_FRONTEND_VERSION__")
        leaves_out = [int(number) for number in version.split(".")[:2]] >= [1, 47]
        assert viewer.page.get_by_text("No inputs").is_visible() == leaves_out
        # What the side panel of a front end does that does not know to leave a widget out.
        viewer.page.evaluate(f"() => ({VIEWER}.widgets.find((w) => w.name === 'view').width = 150)")
        viewer.resize(420, 720)
        assert viewer.panel.bounding_box()["width"] == pytest.approx(width, abs=1)
    finally:
        viewer.set("Comfy.RightSidePanel.IsOpen", False)
        viewer.page.evaluate("() => app.canvas.deselectAll()")


def test_a_picture_that_is_too_large_to_copy_is_said_to_be(viewer):
    viewer.page.evaluate(
        """() => {
            window.toBlob = HTMLCanvasElement.prototype.toBlob;
            HTMLCanvasElement.prototype.toBlob = (callback) => callback(null);
        }"""
    )
    viewer.panel.get_by_text("Copy").click()
    viewer.page.wait_for_timeout(300)
    viewer.page.evaluate("() => (HTMLCanvasElement.prototype.toBlob = window.toBlob)")
    assert viewer.status() == "The picture is too large."


# What is copied: its size, and the texts that are written into it.
COPY = """(button) => {
    const { fillText } = CanvasRenderingContext2D.prototype;
    const { toBlob } = HTMLCanvasElement.prototype;
    const copied = { texts: [] };
    CanvasRenderingContext2D.prototype.fillText = (text) => copied.texts.push(text);
    HTMLCanvasElement.prototype.toBlob = function (callback) {
        copied.size = [this.width, this.height];
        callback(null);
    };
    button.click();
    CanvasRenderingContext2D.prototype.fillText = fillText;
    HTMLCanvasElement.prototype.toBlob = toBlob;
    return copied;
}"""


def test_a_copy_has_the_names_of_the_concepts_that_it_shows(viewer):
    button = viewer.panel.get_by_text("Copy")
    all_of_them = button.evaluate(COPY)
    assert all_of_them["texts"] == [*made_up.CONCEPTS[:-1]]
    viewer.chip("rock").click()
    alone = button.evaluate(COPY)
    assert alone["texts"] == ["rock"]
    assert alone["size"][0] == all_of_them["size"][0]
    assert alone["size"][1] < all_of_them["size"][1]


def test_names_below_a_copied_picture_are_apart_and_inside_it(viewer):
    picture, below, texts = viewer.page.evaluate(
        """async () => {
            const { withNames } = await import("/extensions/concept-attention/names.mjs");
            const picture = document.createElement("canvas");
            [picture.width, picture.height] = [200, 100];
            const { fillText } = CanvasRenderingContext2D.prototype;
            const texts = [];
            CanvasRenderingContext2D.prototype.fillText = function (text, x, y) {
                texts.push([text, x, y, x + this.measureText(text).width]);
            };
            const names = Array.from({ length: 40 }, (_, i) => "name ".repeat(i === 7 ? 90 : 1 + (i % 3)));
            const copy = withNames(picture, names.map((name) => ({ name, colour: "red" })));
            CanvasRenderingContext2D.prototype.fillText = fillText;
            return [[200, 100], [copy.width, copy.height], texts];
        }"""
    )
    assert below[0] == picture[0]
    assert len(texts) == 40
    assert texts[7][0].endswith("…")
    for _, left, middle, right in texts:
        assert 0 < left < right <= below[0]
        assert picture[1] + 5 < middle < below[1] - 5
    for (_, _, middle, right), (_, left, next_middle, _) in itertools.pairwise(texts):
        assert next_middle >= middle + 11 or (next_middle == middle and left > right)


@pytest.mark.parametrize("count", [2, 60])
def test_an_outline_runs_through_every_cell_where_a_map_crosses_the_threshold(viewer, count):
    crossed, traced = viewer.page.evaluate(
        """async (count) => {
            const { Field } = await import("/extensions/concept-attention/paint.mjs");
            const length = count * 12 * 17;
            const values = Float32Array.from({ length }, (_, i) => (Math.sin(i * i) + 1) / 2);
            const field = new Field({ values, grid: [12, 17], coverage: [1, 0.9] }, 1);
            let traced = 0;
            const line = Path2D.prototype.lineTo;
            Path2D.prototype.lineTo = () => traced++;
            field.outline(0.4);
            Path2D.prototype.lineTo = line;
            const { width, height } = field;
            const above = (i, j) => +(field.values[i * width + j] > 0.4);
            let crossed = 0;
            for (let i = 0; i + 1 < height; i++) {
                for (let j = 0; j + 1 < width; j++) {
                    const [a, b, c, d] = [above(i, j), above(i, j + 1), above(i + 1, j + 1), above(i + 1, j)];
                    const count = a + b + c + d;
                    if (count % 4) crossed += a === c && b === d ? 2 : 1;
                }
            }
            return [crossed, traced];
        }""",
        count,
    )
    assert crossed == traced > 500


def test_the_panel_speaks_the_language_of_the_front_end(viewer, server):
    server.post("/settings/Comfy.Locale", "ko")
    try:
        viewer.open()
        viewer.load()
        viewer.run()
        assert viewer.panel.locator(".chip").first.text_content() == "전체"
        assert viewer.panel.get_by_role("slider", name="임계값").count() == 1
        assert viewer.panel.get_by_label("레이어").get_attribute("aria-valuetext") == "레이어 15–18"
    finally:
        server.post("/settings/Comfy.Locale", "en")
        viewer.open()


def test_names_are_text(viewer):
    assert viewer.chip("<img src=x onerror=alert(1)>").count() == 1
    viewer.point(5, 5)
    assert viewer.panel.locator("img").count() == 0


def test_the_pager_goes_through_the_batch(viewer, recording):
    viewer.panel.get_by_label("Next image").click()
    viewer.settle()
    assert close_to(viewer.point(8, 9), heatmaps(recording)[1], 8, 9)


def test_frames_that_share_the_maps_of_one_image_can_all_be_looked_into(viewer, recording):
    one = {**viewer.graph()["1"]["inputs"], "batch": 1}
    maps = {"class_type": "TestMadeUpMaps", "inputs": one}
    frames = viewer.graph()["1"]
    shown = {
        "class_type": "ConceptViewer",
        "inputs": {"maps": ["1", 0], "image": ["3", 1], "threshold": 0.5, "concept": ""},
    }
    viewer.load(**{"1": maps, "2": shown, "3": frames})
    viewer.run()
    viewer.panel.get_by_label("Next image").click()
    viewer.settle()
    viewer.scrub("Layers", 4, 4, 19)
    expected = heatmaps(made_up.recording(Recording, Concepts, 1, ROWS, COLUMNS), layers=[4])
    assert close_to(viewer.point(30, 30), expected[0], 30, 30)


def test_a_reloaded_page_shows_the_result_without_a_run(viewer, recording):
    viewer.page.evaluate("() => app.loadGraphData(app.graph.serialize())")
    viewer.resize(420, 720)
    viewer.run()
    viewer.slide("Threshold", 0.4)
    viewer.page.keyboard.press("Escape")  # the front end keeps a draft whenever a key was pressed
    viewer.page.wait_for_timeout(1500)
    viewer.open()
    viewer.settle()
    viewer.resize(420, 720)
    assert viewer.panel.get_by_role("slider", name="Threshold").input_value() == "0.4"
    assert close_to(viewer.point(20, 41), heatmaps(recording)[0], 20, 41)


def test_a_result_is_shown_although_the_browser_has_no_room_to_keep_it(viewer, recording):
    viewer.page.evaluate(
        """() => {
            window.setItem = Storage.prototype.setItem;
            Storage.prototype.setItem = function (key, value) {
                if (key.startsWith("ConceptAttention")) throw new DOMException("full", "QuotaExceededError");
                window.setItem.call(this, key, value);
            };
        }"""
    )
    viewer.load()
    viewer.run()
    viewer.page.evaluate("() => (Storage.prototype.setItem = window.setItem)")
    assert close_to(viewer.point(20, 41), heatmaps(recording)[0], 20, 41)


def test_a_workflow_with_other_values_does_not_show_a_result_that_it_would_not_get(viewer):
    viewer.open_workflow(viewer.workflow())
    viewer.run()
    same = viewer.page.evaluate("() => app.graph.serialize()")
    maps = {
        "batch": 1,
        "rows": ROWS,
        "columns": COLUMNS,
        "softmax": True,
        "grounding": "paper",
        "average": "after softmax",
    }
    node = {
        **next(n for n in same["nodes"] if n["type"] == "TestMadeUpMaps"),
        "widgets_values": [*maps.values()],
    }
    other = {**same, "nodes": [node if n["id"] == node["id"] else n for n in same["nodes"]]}
    for workflow, chips in ((other, 0), (same, 1 + len(made_up.CONCEPTS))):
        viewer.open_workflow(workflow)
        assert viewer.panel.locator(".chip").count() == chips


def test_a_workflow_loaded_again_has_a_panel_that_works(viewer, recording):
    """Nodes 2.0 would go on showing the panel of the node before."""
    viewer.panel.get_by_label("Layers").press("Home")
    viewer.settle()
    workflow = viewer.page.evaluate("() => app.graph.serialize()")
    for _ in range(2):
        viewer.page.evaluate("(workflow) => app.loadGraphData(workflow)", workflow)
        viewer.resize(420, 720)
    viewer.run()
    assert close_to(viewer.point(20, 41), heatmaps(recording)[0], 20, 41)


def test_a_copy_has_a_view_of_its_own(viewer):
    viewer.chip("rock").click()
    viewer.page.evaluate(
        f"""() => {{
            const copy = {VIEWER}.clone();
            copy.pos = [900, 60];
            app.graph.add(copy);
            app.graph.getNodeById("1").connect(0, copy, 0);
        }}"""
    )
    viewer.run()
    chips = viewer.page.locator(".concept-viewer").nth(1).locator(".chip")
    chips.first.wait_for()
    assert chips.locator("xpath=self::*[@aria-pressed='true']").all_text_contents() == ["rock"]
    chips.get_by_text("sky").click()
    assert viewer.pressed() == ["rock"]


def test_the_result_arrives_in_a_subgraph(viewer):
    viewer.page.evaluate(f"() => app.canvas.graph.convertToSubgraph(new Set([{VIEWER}]))")
    viewer.page.evaluate(
        """() => {
            const outer = app.graph.nodes.find((n) => n.subgraph);
            app.canvas.openSubgraph(outer.subgraph, outer);
        }"""
    )
    viewer.run()
    assert viewer.panel.locator(".chip").count() == 1 + len(made_up.CONCEPTS)
    viewer.page.evaluate("() => app.canvas.setGraph(app.graph)")


def run_of(seed: int) -> dict:
    return {
        "3": {"class_type": "TestMadeUpRun", "inputs": {"maps": ["1", 0], "seed": seed}},
        "2": {
            "class_type": "ConceptViewer",
            "inputs": {"maps": ["3", 0], "image": ["1", 1], "threshold": 0.5, "concept": ""},
        },
    }


@pytest.mark.parametrize("on", [True, False], ids=["on", "off"])
def test_maps_arrive_while_it_samples_unless_switched_off(viewer, on):
    viewer.page.evaluate("(on) => app.extensionManager.setting.set('ConceptAttention.LivePreview', on)", on)
    viewer.load(**run_of(next(viewer.seeds)))
    viewer.page.evaluate("() => (window.heard.live = [])")
    viewer.run()
    messages = viewer.heard("live")
    assert bool(messages) == on
    assert len(messages) <= 8  # of ten evaluations in two seconds
    assert all(
        message["nodes"] == {"2": "ConceptViewer"} and message["sampler"] == "3" for message in messages
    )


@pytest.fixture
def live(viewer) -> Viewer:
    viewer.page.evaluate("() => app.extensionManager.setting.set('ConceptAttention.LivePreview', true)")
    return viewer


def test_without_a_viewer_the_node_that_observes_shows_them_until_the_run_ends(live):
    load_run_alone(live)
    sizes = "() => app.graph.serialize().nodes.map((node) => node.size)"
    before = live.page.evaluate(sizes)
    for _ in range(2):
        set_seed(live)
        live.start()
        assert live.nodes_with_a_panel() == ["TestMadeUpRun"]
        assert live.panel.locator(".chip").count() == 1 + len(made_up.CONCEPTS)
        assert live.page.evaluate(sizes) == before
        live.wait_for_end()
        live.page.wait_for_timeout(500)
        assert live.nodes_with_a_panel() == []
        assert live.page.locator(".concept-viewer").count() == 0
        assert live.page.evaluate(sizes) == before


def load_run_alone(live: Viewer, evaluations: int = 10) -> None:
    """A workflow with an id, in which maps can only be shown by the node that samples, "3"."""
    run = run_of(next(live.seeds))["3"]
    run["inputs"]["evaluations"] = evaluations
    graph = {"1": live.graph()["1"], "3": run}
    live.page.evaluate("(graph) => app.loadApiJson(graph, 'test')", graph)
    live.page.evaluate("() => (app.graph.getNodeById('3').pos = [500, 60])")
    live.open_workflow(live.workflow())


def set_seed(live: Viewer) -> None:
    """So that it runs again."""
    live.page.evaluate(
        """(seed) => {
            const run = app.graph.nodes.find((n) => n.comfyClass === "TestMadeUpRun");
            run.widgets.find((w) => w.name === "seed").value = seed;
        }""",
        next(live.seeds),
    )


def test_maps_are_shown_in_the_workflow_that_runs_and_no_other(live):
    load_run_alone(live, evaluations=40)
    copy = live.workflow()
    live.start()
    live.open_workflow(copy)
    live.wait_for_maps()
    assert live.nodes_with_a_panel() == []
    live.command("Workspace.PreviousOpenedWorkflow")
    live.wait_for_maps()
    assert live.nodes_with_a_panel() == ["TestMadeUpRun"]
    assert live.wait_for_end() == "execution_success"


def test_maps_are_shown_by_nodes_of_the_class_that_they_are_for(live):
    load_run_alone(live, evaluations=25)
    live.start()
    live.page.evaluate(
        """() => {
            app.graph.remove(app.graph.getNodeById("3"));
            const other = LiteGraph.createNode("PreviewAny");
            other.id = 3;
            app.graph.add(other);
        }"""
    )
    live.wait_for_maps()
    assert live.nodes_with_a_panel() == []
    live.wait_for_end()


def test_a_result_goes_to_the_workflow_that_was_queued(live, recording):
    live.load(**run_of(next(live.seeds)))
    live.open_workflow(live.workflow())
    copy = live.workflow()
    live.start()
    live.open_workflow(copy)
    live.wait_for_end()
    live.page.wait_for_timeout(500)
    assert live.panel.get_by_text("Run the workflow to see the concept maps.").is_visible()
    for _ in range(2):
        live.command("Workspace.PreviousOpenedWorkflow")
        live.resize(420, 720)
        live.settle()
        assert close_to(live.point(20, 41), heatmaps(recording)[0], 20, 41)
        live.command("Workspace.NextOpenedWorkflow")
        assert live.panel.locator(".notice").is_visible()


def test_a_run_of_which_a_workflow_has_the_result_already_shows_it(viewer, recording):
    """ComfyUI runs nothing again and sends what it sent for the other workflow."""
    viewer.open_workflow(viewer.workflow())
    viewer.resize(420, 720)
    viewer.run()
    assert close_to(viewer.point(20, 41), heatmaps(recording)[0], 20, 41)


def test_an_interrupted_run_leaves_the_result_before_it(live, recording):
    live.load(**run_of(next(live.seeds)))
    live.run()
    set_seed(live)
    live.page.evaluate(
        """() => {
            const read = Response.prototype.arrayBuffer;
            Response.prototype.arrayBuffer = async function () {
                if (window.heard.live.length) await new Promise((resolve) => setTimeout(resolve, 700));
                return read.call(this);
            };
        }"""
    )
    try:
        live.start()
        live.page.evaluate("async () => (await import('/scripts/api.js')).api.interrupt()")
        assert live.wait_for_end() == "execution_interrupted"
        live.page.wait_for_timeout(2000)
        live.settle()
        assert live.status() == ""
        assert close_to(live.point(20, 41), heatmaps(recording)[0], 20, 41)
    finally:
        live.open()


def test_there_is_nothing_to_reset_while_a_run_is_shown(live):
    live.load(**run_of(next(live.seeds)))
    live.run()
    live.panel.get_by_label("Layers").press("Home")
    live.settle()
    reset = live.panel.get_by_text("Reset")
    assert reset.is_visible()
    set_seed(live)
    live.start()
    assert not reset.is_visible()
    live.wait_for_end()


def test_what_is_sent_stays_under_1_5_megabytes_and_waits_until_it_is_asked_for(viewer):
    """Of six concepts, 64 x 64 patches, 19 layers and 28 steps: picture and maps at once; for a look into
    the layers one packet more, for one into the steps another."""
    requests = []

    def hear(request) -> None:
        requests.append(request)

    viewer.page.on("requestfinished", hear)
    viewer.load()
    viewer.run()
    result = [r for r in requests if "filename=concept_viewer_" in r.url]
    assert len(result) == 2
    viewer.scrub("Layers", 4, 4, 19)
    viewer.panel.get_by_text("Reset").click()
    viewer.settle()
    viewer.scrub("Steps", 2, 9, 28)
    viewer.page.remove_listener("requestfinished", hear)
    looked = [r for r in requests if "/concept_attention/" in r.url]
    assert [r.url.rpartition("/")[2] for r in looked] == ["layers", "evaluations"]
    assert sum(r.sizes()["responseBodySize"] for r in result + looked) < 1.5e6
