"""Concept Viewer in a real browser, on the real front end and server."""

from __future__ import annotations

import importlib.util
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import comfyui as comfyui_setup
from concept_attention.core.concepts import Concepts
from concept_attention.core.maps import heatmaps
from concept_attention.core.recording import Recording
from front_end import READY, RUN

HERE = Path(__file__).parent
ROWS, COLUMNS, BATCH = 64, 64, 2
# half a level, and half of the third decimal that the viewer shows
TOLERANCE = 1 / 510 + 0.0005
VIEWER = "app.graph.nodes.find((n) => n.comfyClass === 'ConceptViewer')"

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

    @staticmethod
    def graph() -> dict:
        size = {"batch": BATCH, "rows": ROWS, "columns": COLUMNS}
        return {
            "1": {"class_type": "TestMadeUpMaps", "inputs": {**size, "softmax": True}},
            "2": {
                "class_type": "ConceptViewer",
                "inputs": {"maps": ["1", 0], "image": ["1", 1], "threshold": 0.5, "concept": ""},
            },
        }

    def load(self, **nodes: dict) -> None:
        self.page.evaluate("(graph) => app.loadApiJson(graph, 'test')", {**self.graph(), **nodes})
        self.resize(420, 720)

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

    @property
    def panel(self):
        return self.page.locator(".concept-viewer").first

    def chip(self, name: str):
        return self.panel.locator(".chip", has=self.page.get_by_text(name, exact=True))

    def pressed(self) -> list[str]:
        return self.panel.locator(".chip[aria-pressed=true]").all_text_contents()

    def point(self, row: int, column: int) -> dict[str, float]:
        """The values that are shown with the pointer on a patch."""
        box = self.panel.locator("canvas").bounding_box()
        self.page.mouse.move(
            box["x"] + box["width"] * (column + 0.5) / COLUMNS, box["y"] + box["height"] * (row + 0.5) / ROWS
        )
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
    viewer.panel.locator("canvas").press("ArrowUp")
    viewer.page.keyboard.press("ArrowLeft")
    assert close_to(viewer.card(), heatmaps(recording)[0], ROWS // 2 - 1, COLUMNS // 2 - 1)
    strip = viewer.panel.get_by_label("Layers")
    strip.press("Home")
    assert strip.get_attribute("aria-valuetext") == "Layers 0"
    strip.press("a")
    assert strip.get_attribute("aria-valuetext") == "Layers all 19"


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
    viewer.page.evaluate(
        """async () => {
            const { api } = await import("/scripts/api.js");
            window.live = [];
            api.addEventListener("concept_attention.maps", (e) => window.live.push(e.detail));
        }"""
    )
    viewer.run()
    messages = viewer.page.evaluate("() => window.live")
    assert bool(messages) == on
    assert len(messages) <= 8  # of ten evaluations in two seconds
    assert all(message["nodes"] == ["2"] and message["sampler"] == "3" for message in messages)


def test_without_a_viewer_the_node_that_observes_shows_them(viewer):
    viewer.page.evaluate("() => app.extensionManager.setting.set('ConceptAttention.LivePreview', true)")
    maps, run = viewer.graph()["1"], run_of(next(viewer.seeds))["3"]
    viewer.page.evaluate("(graph) => app.loadApiJson(graph, 'test')", {"1": maps, "3": run})
    viewer.run()
    owner = "() => app.graph.nodes.find((n) => n.widgets?.some((w) => w.name === 'view')).comfyClass"
    assert viewer.page.evaluate(owner) == "TestMadeUpRun"


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
