"""The example workflows for models other than Flux.1, in a real ComfyUI server: their graphs as they are,
with tiny random models in place of what their loaders load."""

from __future__ import annotations

import copy
import functools
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import comfyui
import workflow

FOLDER = comfyui.ROOT / "example_workflows"
TITLE = "Find concepts with "
WORKFLOWS = {path.stem.removeprefix(TITLE): path for path in sorted(FOLDER.glob(f"{TITLE}*.json"))}
# Outputs of the loaders, by what the stand-in gives: MODEL, CLIP, VAE.
LOADERS = {"UNETLoader": (0,), "CLIPLoader": (1,), "VAELoader": (2,), "CheckpointLoaderSimple": (0, 1, 2)}
HEIGHT, WIDTH = 128, 192
# Sampling as in ComfyUI's own templates: steps, cfg, sampler, schedule, shift.
SAMPLING = {
    "Flux.2 Klein": (4, 1, "euler", None, None),
    "Qwen-Image": (20, 4, "euler", "simple", 3.1),
    "Stable Diffusion 3.5": (20, 4.01, "euler", "sgm_uniform", None),
    "Z-Image Turbo": (8, 1, "res_multistep", "simple", 3),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    (folder / "custom_nodes").mkdir()
    (folder / "custom_nodes" / "tiny").symlink_to(Path(__file__).parent / "tiny_pack", True)
    for path in WORKFLOWS.values():
        for node in workflow.all_nodes(json.loads(path.read_text("utf-8"))):
            for model in node["properties"].get("models", ()):
                file = folder / "models" / model["directory"] / model["name"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()  # to choose, not to load
    with comfyui.Server(comfyui.find(), folder) as server:
        yield server


@pytest.fixture(scope="module")
def definitions(server):
    return server.get("/object_info")


@pytest.fixture(params=WORKFLOWS)
def name(request) -> str:
    return request.param


@pytest.fixture
def graph(definitions, name) -> workflow.Graph:
    return workflow.to_api(json.loads(WORKFLOWS[name].read_text("utf-8")), definitions)


@pytest.fixture(scope="module")
def shown(server, definitions):
    """Gives what a workflow shows with the stand-in, each run once."""

    @functools.cache
    def run(name: str) -> tuple[workflow.Graph, dict]:
        graph = workflow.to_api(json.loads(WORKFLOWS[name].read_text("utf-8")), definitions)
        graph = with_stand_in(graph, name)
        maps = [workflow.find(graph, "Concept Saliency"), 0]
        masks = workflow.add(graph, "Concept Mask", "ConceptMask", maps=maps, **defaults(definitions))
        workflow.add(graph, "Masks", "MaskPreview", mask=[masks, 0])
        return graph, server.run(graph)["outputs"]

    return run


def defaults(definitions: dict) -> dict:
    """Of Concept Mask: each concept where it wins."""
    required = definitions["ConceptMask"]["input"]["required"]
    values = {k: o[0]["default"] for k, (_, *o) in required.items() if o and "default" in o[0]}
    return {**values, "method": "argmax", "combine": False}


def with_stand_in(graph: workflow.Graph, name: str) -> workflow.Graph:
    """The graph with the stand-in in place of its loaders, and a small picture."""
    graph = copy.deepcopy(graph)
    loaders = {number: LOADERS[n["class_type"]] for number, n in graph.items() if n["class_type"] in LOADERS}
    for number in loaders:
        del graph[number]
    stand_in = workflow.add(graph, "Stand-in", "TestTinyModel", name=name)
    for node in graph.values():
        for key, value in node["inputs"].items():
            if isinstance(value, list) and value[0] in loaders:
                node["inputs"][key] = [stand_in, loaders[value[0]][value[1]]]
    for node in graph.values():
        if node["_meta"]["title"] in ("Width", "Height"):
            node["inputs"]["value"] = WIDTH if node["_meta"]["title"] == "Width" else HEIGHT
        elif node["class_type"] == "EmptySD3LatentImage":
            node["inputs"].update(width=WIDTH, height=HEIGHT)
    return graph


def pixels(server: comfyui.Server, outputs: dict, number: str) -> np.ndarray:
    """Pixels (images, H, W, 3) that an output node showed."""
    files = [io.BytesIO(server.image(image)) for image in outputs[number]["images"]]
    return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])


def node_of(graph: workflow.Graph, *kinds: str) -> dict:
    (node,) = (n for n in graph.values() if n["class_type"] in kinds)
    return node["inputs"]


def test_there_is_one_for_each_model():
    assert set(WORKFLOWS) == set(SAMPLING)


def test_loaders_offer_what_the_workflow_chooses(graph, definitions):
    loaders = [n for n in graph.values() if n["class_type"] in LOADERS]
    assert sorted(i for n in loaders for i in LOADERS[n["class_type"]]) == [0, 1, 2]
    for node in loaders:
        inputs = definitions[node["class_type"]]["input"]
        offered = {**inputs["required"], **inputs.get("optional", {})}
        for key, value in node["inputs"].items():
            kind, *options = offered[key]
            assert value in (options[0]["options"] if kind == "COMBO" else kind), (node["class_type"], key)


def test_sampling_is_that_of_comfyuis_own_template(graph, name):
    steps, cfg, sampler, schedule, shift = SAMPLING[name]
    assert node_of(graph, "KSampler", "Flux2Scheduler")["steps"] == steps
    assert node_of(graph, "KSampler", "CFGGuider")["cfg"] == cfg
    assert node_of(graph, "KSampler", "KSamplerSelect")["sampler_name"] == sampler
    if schedule:
        assert node_of(graph, "KSampler")["scheduler"] == schedule
    shifts = [n["inputs"]["shift"] for n in graph.values() if n["class_type"] == "ModelSamplingAuraFlow"]
    assert shifts == ([] if shift is None else [shift])


def test_it_runs_from_the_sampler_to_heatmaps_and_masks(server, shown, name):
    graph, outputs = shown(name)
    picture, heatmaps, masks = (
        pixels(server, outputs, workflow.find(graph, title)) for title in ("Picture", "Heatmaps", "Masks")
    )
    assert picture.shape == (1, HEIGHT, WIDTH, 3)
    assert heatmaps.shape == masks.shape == (3, HEIGHT, WIDTH, 3)
    assert all(heatmap.std() > 10 for heatmap in heatmaps)
    assert set(np.unique(masks)) == {0, 255}
    assert (masks[..., 0] == 255).sum(0).max() == 1  # where one concept wins, no other does
    (view,) = outputs[workflow.find(graph, "Concept Viewer")]["concept_view"]
    assert view["concepts"] == ["dragon", "rock", "sky", "background"]
    assert len(view["steps"]) == SAMPLING[name][0]
    assert view["images"][0]["pictures"]


def test_the_picture_is_the_one_without_concept_attention(server, shown, name):
    graph, outputs = shown(name)
    watched = workflow.find(graph, "Concept Attention")
    plain = copy.deepcopy(graph)
    model = plain.pop(watched)["inputs"]["model"]
    sampler = node_of(plain, "KSampler", "CFGGuider")
    assert sampler["model"] == [watched, 0]
    sampler["model"] = model
    number = workflow.find(plain, "Picture")
    without = pixels(server, server.run(plain, [number])["outputs"], number)
    assert np.array_equal(without, pixels(server, outputs, number))
    assert without.std() > 10
