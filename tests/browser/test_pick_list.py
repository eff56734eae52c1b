"""The concept of Concept Mask, picked from a list in a real browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import comfyui as comfyui_setup
from front_end import READY, RUN

HERE = Path(__file__).parent
MASK = {"combine": True, "method": "argmax", "soft": False, "fill_holes": False, "smallest_area": 0.0}
MASK |= {"grow": 0, "feather": 0.0, "invert": False, "refine": False}
NASTY = "<img src=x onerror=alert(1)>"


def observed(concepts: str, background: str) -> dict:
    """A workflow in API format, from Concept Attention to Concept Mask."""
    attention = {"model": ["9", 0], "clip": ["8", 0], "concepts": concepts, "background": background}
    return {
        "9": {"class_type": "UNETLoader", "inputs": {}},
        "8": {"class_type": "DualCLIPLoader", "inputs": {}},
        "1": {"class_type": "ConceptAttention", "inputs": attention},
        "2": {"class_type": "KSampler", "inputs": {"model": ["1", 0]}},
        "3": {"class_type": "ConceptSaliency", "inputs": {"latent": ["2", 0]}},
        "4": {"class_type": "ConceptMask", "inputs": {"maps": ["3", 0], "concept": "", **MASK}},
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[comfyui_setup.Server]:
    folder = tmp_path_factory.mktemp("comfyui")
    shutil.copytree(HERE / "pack", folder / "custom_nodes" / "made-up")
    with comfyui_setup.Server(comfyui_setup.find(), folder) as server:
        server.post("/settings/Comfy.TutorialCompleted", True)
        yield server


class Page:
    def __init__(self, page, url: str, nodes_2: bool, complaints: list[str]) -> None:
        self.page, self.nodes_2, self.complaints = page, nodes_2, complaints
        page.set_default_timeout(30_000)
        page.goto(url, wait_until="domcontentloaded")
        page.wait_for_function(READY)
        self.list = page.get_by_role("listbox", name="Concepts")

    def load(self, graph: dict) -> None:
        self.page.evaluate("(graph) => app.loadApiJson(graph, 'test')", graph)
        self.place()

    def place(self) -> None:
        """Concept Mask alone in the middle."""
        self.page.evaluate(
            """() => {
                for (const node of app.canvas.graph.nodes) node.pos = [-3000, 0];
                const mask = app.canvas.graph.nodes.find((n) => n.comfyClass === "ConceptMask");
                mask.pos = [300, 200];
                mask.setSize([400, 400]);
                app.canvas.ds.scale = 1;
                app.canvas.ds.offset = [0, 0];
                app.canvas.setDirty(true, true);
            }"""
        )
        self.page.wait_for_timeout(700)

    def open(self) -> None:
        """The text field of the concept: in Nodes 2.0 it is there, the classic canvas opens a dialog."""
        if self.nodes_2:
            self.field.click()
        else:
            x, y = self.page.evaluate(
                """() => {
                    const mask = app.canvas.graph.nodes.find((n) => n.comfyClass === "ConceptMask");
                    const widget = mask.widgets.find((w) => w.name === "concept");
                    const { left, top } = app.canvas.canvas.getBoundingClientRect();
                    return [left + mask.pos[0] + 200, top + mask.pos[1] + widget.last_y + 10];
                }"""
            )
            self.page.mouse.click(x, y)
            self.field.wait_for()
        self.page.wait_for_timeout(300)

    @property
    def field(self):
        return self.page.locator(
            "[data-node-id] input[aria-label=concept]" if self.nodes_2 else ".graphdialog input"
        )

    def leave(self) -> None:
        if self.field.count():
            self.field.blur() if self.nodes_2 else self.field.press("Enter")
        self.page.wait_for_timeout(200)

    def offered(self) -> list[str]:
        return self.list.get_by_role("option").all_text_contents()

    def marked(self) -> list[str]:
        return self.list.locator("[aria-selected=true]").all_text_contents()

    def concept(self) -> str:
        return self.page.evaluate(
            """() => app.canvas.graph.nodes.find((n) => n.comfyClass === "ConceptMask")
                .widgets.find((w) => w.name === "concept").value"""
        )


@pytest.fixture(scope="module", params=[False, True], ids=["classic canvas", "Nodes 2.0"])
def whole_page(request, server, browser, complaints_of) -> Iterator[Page]:
    server.post("/settings/Comfy.VueNodes.Enabled", request.param)
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    page = context.new_page()
    yield Page(page, server.url, request.param, complaints_of(page))
    context.close()


@pytest.fixture
def page(whole_page) -> Iterator[Page]:
    yield whole_page
    whole_page.leave()
    assert whole_page.complaints == []


def test_the_names_of_the_node_that_observes_are_offered_before_any_run(page):
    page.load(observed(f"dragon, rock\nhot  air balloon,{NASTY}, Rock", "sky"))
    page.open()
    assert page.offered() == ["dragon", "rock", "hot air balloon", NASTY, "sky"]
    assert page.list.locator("img").count() == 0
    page.list.get_by_text("rock", exact=True).click()
    page.leave()
    assert page.concept() == "rock"
    assert page.list.count() == 0


def test_several_are_picked_with_ctrl_and_what_is_picked_is_marked(page):
    page.load(observed("dragon, rock, sky", ""))
    page.open()
    page.list.get_by_text("dragon").click(modifiers=["Control"])
    page.list.get_by_text("sky").click(modifiers=["Control"])
    assert page.marked() == ["dragon", "sky"]
    page.list.get_by_text("dragon").click(modifiers=["Control"])
    page.leave()
    assert page.concept() == "sky"
    page.open()
    assert page.marked() == ["sky"]


def test_anything_can_be_typed(page):
    page.load(observed("dragon, rock, sky", ""))
    page.open()
    page.field.fill("castle, ROCK")
    assert page.marked() == ["rock"]
    page.leave()
    assert page.concept() == "castle, ROCK"


def test_the_keyboard_picks(page):
    page.load(observed("dragon, rock, sky", ""))
    page.open()
    page.field.press("ArrowDown")
    page.field.press("ArrowUp")
    page.field.press("ArrowUp")
    page.field.press("Enter")
    page.leave()
    assert page.concept() == "rock"


def test_maps_that_come_from_elsewhere_offer_their_names_after_a_run(page):
    """As those from a file."""
    columns = 8 + page.nodes_2  # or ComfyUI has run it already
    graph = {
        "1": {"class_type": "TestMadeUpMaps", "inputs": {"batch": 1, "rows": 8, "columns": columns}},
        "4": {"class_type": "ConceptMask", "inputs": {"maps": ["1", 0], "concept": "", **MASK}},
        "5": {"class_type": "MaskPreview", "inputs": {"mask": ["4", 0]}},
    }
    graph["1"]["inputs"] |= {"softmax": True, "grounding": "paper"}
    page.load(graph)
    page.open()
    assert page.offered() == []
    page.leave()
    assert page.page.evaluate(RUN).startswith("execution_success")
    page.open()
    assert page.offered()[:4] == ["dragon", "rock", "sky", "sun"]


def test_names_are_found_out_of_a_subgraph_and_of_the_nearest_node(page):
    graph = observed("dragon, rock", "") | {
        "11": {"class_type": "ConceptAttention", "inputs": {"concepts": "tree", "background": "grass"}},
        "12": {"class_type": "KSampler", "inputs": {"model": ["11", 0], "latent_image": ["2", 0]}},
    }
    graph["3"]["inputs"]["latent"] = ["12", 0]
    page.load(graph)
    page.page.evaluate(
        """() => {
            const moved = ["ConceptMask", "ConceptSaliency"];
            const inner = app.graph.nodes.filter((n) => moved.includes(n.comfyClass));
            app.canvas.graph.convertToSubgraph(new Set(inner));
            const outer = app.graph.nodes.find((n) => n.subgraph);
            app.canvas.openSubgraph(outer.subgraph, outer);
        }"""
    )
    page.place()
    page.open()
    assert page.offered() == ["tree", "grass"]
    page.leave()
    page.page.evaluate("() => app.canvas.setGraph(app.graph)")


def test_a_workflow_is_saved_as_it_was_without_the_list(page):
    page.load(observed("dragon, rock, sky", ""))
    before = page.page.evaluate("() => JSON.stringify(app.graph.serialize())")
    assert '"rock"' not in before
    page.open()
    page.list.get_by_text("rock").click()
    page.leave()
    after = page.page.evaluate("() => JSON.stringify(app.graph.serialize())")
    (mask,), (old,) = (
        [node for node in json.loads(saved.replace('"rock"', '""'))["nodes"] if node["type"] == "ConceptMask"]
        for saved in (after, before)
    )
    assert '"rock"' in after
    assert mask == old
