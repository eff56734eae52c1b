"""The plugin in a real ComfyUI server, over HTTP, with the demo model and the example workflow."""

from __future__ import annotations

import asyncio
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

import comfyui
import workflow
from concept_attention import comfy_entrypoint

WORKFLOWS = sorted((comfyui.ROOT / "example_workflows").glob("*.json"))
INPAINT = comfyui.ROOT / "example_workflows" / "concept_mask_to_inpaint.json"
STEPS = 4


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with comfyui.Server(comfyui.find(), tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def definitions(server):
    return server.get("/object_info")


@pytest.fixture
def graph(definitions) -> workflow.Graph:
    graph = workflow.to_api(workflow.swap(json.loads(INPAINT.read_text("utf-8"))), definitions)
    workflow.inputs(graph, "Prompt")["text"] = "a red ball on the grass under the sky"
    workflow.inputs(graph, "Repaint prompt")["text"] = "a red ball on the snow under the sky"
    workflow.inputs(graph, "Concept Attention")["concepts"] = "ball, grass, sky"
    workflow.inputs(graph, "Concept Mask").update(concept="grass", grow=6, feather=3)
    for sampler in ("KSampler", "KSampler (repaint)"):
        workflow.inputs(graph, sampler)["steps"] = STEPS
    return graph


class Result:
    """What a run of the graph showed, by the title of the output node."""

    def __init__(self, server: comfyui.Server, graph: workflow.Graph, *titles: str) -> None:
        self._server, self._graph = server, graph
        self.entry = server.run(graph, [workflow.find(graph, title) for title in titles] or None)

    def __getitem__(self, title: str) -> np.ndarray:
        """Pixels (images, H, W, 3)."""
        shown = self.entry["outputs"][workflow.find(self._graph, title)]["images"]
        files = [io.BytesIO(self._server.image(image)) for image in shown]
        return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])

    @property
    def cached(self) -> set[str]:
        """Titles of the nodes that ComfyUI did not run again."""
        messages = dict(self.entry["status"]["messages"])
        return {self._graph[number]["_meta"]["title"] for number in messages["execution_cached"]["nodes"]}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_links_of_an_example_workflow_agree_with_its_nodes(path):
    content = json.loads(path.read_text("utf-8"))
    nodes = {node["id"]: node for node in content["nodes"]}
    from_links = {(n, a, i, b, j, type_) for n, a, i, b, j, type_ in content["links"]}
    from_inputs = {
        (slot["link"], node["id"], j, slot["type"])
        for node in nodes.values()
        for j, slot in enumerate(node["inputs"])
        if slot.get("link") is not None
    }
    from_outputs = {
        (link, node["id"], i, slot["type"])
        for node in nodes.values()
        for i, slot in enumerate(node["outputs"])
        for link in slot["links"] or ()
    }
    assert from_inputs == {(n, b, j, type_) for n, _, _, b, j, type_ in from_links}
    assert from_outputs == {(n, a, i, type_) for n, a, i, _, _, type_ in from_links}
    assert content["last_node_id"] == max(nodes)
    assert content["last_link_id"] == max(link[0] for link in from_links)


def test_a_workflow_with_too_many_or_too_few_widget_values_is_refused(definitions):
    content = json.loads(INPAINT.read_text("utf-8"))
    (values,) = (n["widgets_values"] for n in content["nodes"] if n["type"] == "ConceptMask")
    values.append(1)
    with pytest.raises(ValueError, match="more values for ConceptMask"):
        workflow.to_api(content, definitions)
    del values[-2:]
    with pytest.raises(ValueError, match="no value for refine of ConceptMask"):
        workflow.to_api(content, definitions)


def test_values_of_a_dynamic_combo_get_dotted_names(definitions):
    content = json.loads(INPAINT.read_text("utf-8"))
    (values,) = (n["widgets_values"] for n in content["nodes"] if n["type"] == "ConceptMask")
    values[1:2] = ["fixed", 0.25]
    inputs = workflow.inputs(workflow.to_api(content, definitions), "Concept Mask")
    assert inputs["method"] == "fixed"
    assert inputs["method.threshold"] == 0.25
    assert inputs["invert"] is False


def test_every_node_has_the_category_a_description_and_tooltips(definitions):
    own = {k: v for k, v in definitions.items() if v["python_module"] == "custom_nodes.concept-attention"}
    assert "ConceptAttention" in own
    for name, definition in own.items():
        assert name.startswith("Concept")
        assert definition["category"] == "Concept Attention"
        assert definition["description"]
        inputs = [spec for section in definition["input"].values() for spec in section.values()]
        assert any("tooltip" in options for _, *rest in inputs for options in rest), name


def test_the_demo_is_no_part_of_the_plugin(definitions):
    assert definitions["ConceptDemoTextEncoder"]["python_module"] == "custom_nodes.concept-attention-demo"
    nodes = asyncio.run(asyncio.run(comfy_entrypoint()).get_node_list())
    assert not [n for n in nodes if "Demo" in n.define_schema().node_id]


def test_the_example_workflow_gives_pictures_of_the_right_size(server, graph):
    result = Result(server, graph)
    size = (workflow.SIZE, workflow.SIZE, 3)
    assert result["Picture"].shape == (1, *size)
    assert result["Heatmaps"].shape == (3, *size)
    assert result["Mask"].shape == (1, *size)
    assert result["Repainted"].shape == (1, *size)
    assert result["Heatmaps"].max() > 200
    assert 0 < result["Mask"].mean() < 255


def test_repainting_changes_the_masked_concept_only(server, graph):
    result = Result(server, graph)
    changed = np.abs(result["Repainted"].astype(int) - result["Picture"]).mean(-1)
    inside = result["Mask"][..., 0] / 255
    assert changed[inside == 1].mean() > 4 * changed[inside == 0].mean()


def test_the_picture_is_the_same_without_concept_attention(server, graph):
    observed = Result(server, graph, "Picture")["Picture"]
    workflow.inputs(graph, "KSampler")["model"] = workflow.inputs(graph, "Concept Attention")["model"]
    plain = Result(server, graph, "Picture")
    assert "KSampler" not in plain.cached
    assert np.array_equal(plain["Picture"], observed)


def test_other_layers_need_no_sampling(server, graph):
    before = Result(server, graph, "Heatmaps")["Heatmaps"]
    workflow.inputs(graph, "Concept Saliency")["layers"] = "0"
    after = Result(server, graph, "Heatmaps")
    assert {"Concept Attention", "KSampler"} <= after.cached
    assert "Concept Saliency" not in after.cached
    assert not np.array_equal(after["Heatmaps"], before)


def test_two_samplers_on_one_model_keep_their_recordings_apart(server, graph):
    sampler = workflow.inputs(graph, "KSampler")
    alone = Result(server, graph, "Heatmaps")["Heatmaps"]
    sampler["denoise"] = 0.99999  # so that this one samples again
    other = workflow.add(graph, "Other KSampler", "KSampler", **sampler | {"seed": sampler["seed"] + 1})
    workflow.add(graph, "Other latent", "SaveLatent", samples=[other, 0], filename_prefix="other")
    sampled = Result(server, graph, "Picture", "Other latent")
    assert not {"KSampler", "Other KSampler"} & sampled.cached

    options = workflow.inputs(graph, "Concept Saliency") | {"latent": [other, 0]}
    maps = workflow.add(graph, "Other Saliency", "ConceptSaliency", **options)
    workflow.add(graph, "Other heatmaps", "PreviewImage", images=[maps, 2])
    both = Result(server, graph, "Heatmaps", "Other heatmaps")
    assert {"KSampler", "Other KSampler"} <= both.cached
    assert np.array_equal(both["Heatmaps"], alone)
    assert np.abs(both["Other heatmaps"].astype(int) - alone).max() > 20


def test_a_latent_that_was_not_sampled_is_an_error_with_a_way_out(server, graph):
    workflow.inputs(graph, "Concept Saliency")["latent"] = workflow.inputs(graph, "KSampler")["latent_image"]
    with pytest.raises(RuntimeError, match="ConceptSaliency: This LATENT was not sampled with Concept Att"):
        Result(server, graph, "Heatmaps")


def test_a_concept_may_look_like_html(server, graph):
    name = "<img src=x onerror=alert(1)>"
    workflow.inputs(graph, "Concept Attention")["concepts"] = f"{name}, grass, sky"
    workflow.inputs(graph, "Concept Mask")["concept"] = name
    result = Result(server, graph, "Heatmaps", "Mask")
    assert len(result["Heatmaps"]) == 3
    assert len(result["Mask"]) == 1


@pytest.mark.parametrize("name", ["고양이", "🐱"])
def test_a_concept_that_t5_cannot_read_is_a_clear_error(server, graph, name):
    workflow.inputs(graph, "Concept Attention")["concepts"] = f"ball, {name}"
    with pytest.raises(RuntimeError, match=f'ConceptAttention: .*the concept "{name}".* in English'):
        Result(server, graph, "Heatmaps")


def test_after_an_interrupted_run_the_next_one_works(server, graph):
    sampler = workflow.inputs(graph, "KSampler")
    before = Result(server, graph, "Heatmaps")["Heatmaps"]
    with ThreadPoolExecutor() as pool:
        sampler["steps"] = 5000
        running = pool.submit(Result, server, graph, "Heatmaps")
        while not server.get("/queue")["queue_running"]:
            assert not running.done()
            time.sleep(0.05)
        time.sleep(0.5)
        server.post("/interrupt", {})
        with pytest.raises(RuntimeError, match="KSampler: interrupted"):
            running.result()
    sampler["steps"] = STEPS
    assert np.array_equal(Result(server, graph, "Heatmaps")["Heatmaps"], before)
