"""The example workflows for models other than Flux.1, in a real ComfyUI server: their graphs as they are,
with tiny random models in place of what their loaders load."""

from __future__ import annotations

import copy
import functools
import io
import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import maximum_filter
from tiny_models import skip_before

import comfyui
import workflow

FOLDER = comfyui.ROOT / "example_workflows"
TITLE = "Find concepts with "
WORKFLOWS = {path.stem.removeprefix(TITLE): path for path in sorted(FOLDER.glob(f"{TITLE}*.json"))}
# Outputs of the loaders, by what the stand-in gives: MODEL, CLIP, VAE, and a VAE for sound.
LOADERS = {
    "UNETLoader": (0,),
    "LoraLoaderModelOnly": (0,),
    "CLIPLoader": (1,),
    "LTXAVTextEncoderLoader": (1,),
    "VAELoader": (2,),
    "LTXVAudioVAELoader": (3,),
    "CheckpointLoaderSimple": (0, 1, 2),
}
HEIGHT, WIDTH = 128, 192
FRAMES = {"LTX-2.3": 17, "MiniMax H3": 22, "Wan 2.2": 9}
WITH_SOUND = ("LTX-2.3", "MiniMax H3")
# Sampling as in ComfyUI's own templates.
SAMPLING = {
    "Flux.2 Klein": {"steps": 4, "cfg": 1, "sampler_name": "euler"},
    "LTX-2.3": {
        "cfg": 1,
        "sampler_name": "euler",
        "sigmas": "1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0",
    },
    "MiniMax H3": {"steps": 20, "sampler_name": "res_multistep", "scheduler": "simple"},
    "Qwen-Image": {"steps": 20, "cfg": 4, "sampler_name": "euler", "scheduler": "simple", "shift": 3.1},
    "Stable Diffusion 3.5": {
        "steps": 20,
        "cfg": 4.01,
        "sampler_name": "euler",
        "scheduler": "sgm_uniform",
    },
    "Stable Diffusion XL": {"steps": 25, "cfg": 8, "sampler_name": "euler", "scheduler": "normal"},
    "Wan 2.2": {"steps": 20, "cfg": 5, "sampler_name": "uni_pc", "scheduler": "simple", "shift": 8},
    "Z-Image Turbo": {
        "steps": 8,
        "cfg": 1,
        "sampler_name": "res_multistep",
        "scheduler": "simple",
        "shift": 3,
    },
}
REPAINTING = ("Stable Diffusion XL", "Wan 2.2")


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
    return graph_of(name, definitions)


def graph_of(name: str, definitions: dict) -> workflow.Graph:
    try:
        return workflow.to_api(json.loads(WORKFLOWS[name].read_text("utf-8")), definitions)
    except ValueError as error:  # of nodes that an older ComfyUI lacks or knows otherwise
        skip_before(comfyui.COMFYUI_VERSION, f"what {name} needs: {error}")
        raise


@pytest.fixture(scope="module")
def shown(server, definitions):
    """Gives what a workflow shows with the stand-in, each run once."""

    @functools.cache
    def run(name: str) -> tuple[workflow.Graph, dict]:
        graph = with_stand_in(graph_of(name, definitions), name)
        if name in FRAMES:
            workflow.add_previews(graph)
        if name in REPAINTING:
            latent = [workflow.find(graph, "KSampler (repaint)"), 0]
            (again,) = (number for number, n in graph.items() if n["inputs"].get("samples") == latent)
            workflow.add(graph, "Painted anew", "PreviewImage", images=[again, 0])
            workflow.add(graph, "Masked", "MaskPreview", mask=[workflow.find(graph, "Concept Mask"), 0])
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
    loaders = {number: loaded(n) for number, n in graph.items() if n["class_type"] in LOADERS}
    for number in loaders:
        del graph[number]
    stand_in = workflow.add(graph, "Stand-in", "TestTinyModel", name=name)
    for node in graph.values():
        for key, value in node["inputs"].items():
            if isinstance(value, list) and value[0] in loaders:
                node["inputs"][key] = [stand_in, loaders[value[0]][value[1]]]
    smaller = {"width": WIDTH, "height": HEIGHT, "length": FRAMES.get(name)}
    for node in graph.values():
        title, inputs = node["_meta"]["title"].lower(), node["inputs"]
        inputs.update({key: size for key, size in smaller.items() if isinstance(inputs.get(key), int)})
        if title in smaller:
            inputs["value"] = smaller[title]
        if node["class_type"] == "ConceptMask":
            inputs.update(grow=0, feather=0)
    return graph


def loaded(loader: dict) -> tuple[int, ...]:
    """Outputs of the stand-in that come in place of a loader's."""
    return (3,) if "audio" in loader["inputs"].get("vae_name", "") else LOADERS[loader["class_type"]]


def pixels(server: comfyui.Server, outputs: dict, number: str) -> np.ndarray:
    """Pixels (images, H, W, 3) that an output node showed."""
    files = [io.BytesIO(server.image(image)) for image in outputs[number]["images"]]
    return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])


def concepts(graph: workflow.Graph) -> list[str]:
    return workflow.inputs(graph, "Concept Attention")["concepts"].split(", ")


def test_there_is_one_for_each_model():
    assert set(WORKFLOWS) == set(SAMPLING)


def test_loaders_offer_what_the_workflow_chooses(graph, definitions, name):
    loaders = [n for n in graph.values() if n["class_type"] in LOADERS]
    assert {i for n in loaders for i in loaded(n)} == set(range(4 if name in WITH_SOUND else 3))
    for node in loaders:
        inputs = definitions[node["class_type"]]["input"]
        offered = {**inputs["required"], **inputs.get("optional", {})}
        for key, value in node["inputs"].items():
            kind, *options = offered[key]
            if kind == "COMBO" or isinstance(kind, list):
                choices = options[0]["options"] if kind == "COMBO" else kind
                assert value in choices, (node["class_type"], key)


def test_sampling_is_that_of_comfyuis_own_template(graph, name):
    names = ("steps", "cfg", "sampler_name", "scheduler", "shift", "sigmas")
    nodes = [n["inputs"] for n in graph.values() if "(repaint)" not in n["_meta"]["title"]]
    values = {k: v for n in nodes for k, v in n.items() if k in names and not isinstance(v, list)}
    assert values == SAMPLING[name]


def test_it_runs_from_the_sampler_to_heatmaps_and_masks(server, shown, name):
    graph, outputs = shown(name)
    picture, heatmaps, masks = (
        pixels(server, outputs, workflow.find(graph, title)) for title in ("Picture", "Heatmaps", "Masks")
    )
    count, shape = len(concepts(graph)), (FRAMES.get(name, 1), HEIGHT, WIDTH, 3)
    assert picture.shape == shape
    assert heatmaps.shape == masks.shape == (shape[0] * count, *shape[1:])
    assert all(heatmap.std() > 10 for heatmap in heatmaps)
    assert set(np.unique(masks)) == {0, 255}
    of_frames = masks[..., 0].reshape(-1, count, HEIGHT, WIDTH)
    assert (of_frames == 255).sum(1).max() == 1  # where one concept wins, no other does
    (view,) = outputs[workflow.find(graph, "Concept Viewer")]["concept_view"]
    assert view["concepts"] == [*concepts(graph), "background"]
    assert len(view["steps"]) == SAMPLING[name].get("steps", 8)
    assert view["images"][0]["pictures"]


def test_the_picture_is_the_one_without_concept_attention(server, shown, name):
    graph, outputs = shown(name)
    watched = workflow.find(graph, "Concept Attention")
    plain = copy.deepcopy(graph)
    model = plain.pop(watched)["inputs"]["model"]
    observed = [n["inputs"] for n in plain.values() if n["inputs"].get("model") == [watched, 0]]
    assert observed
    for inputs in observed:
        inputs["model"] = model
    number = workflow.find(plain, "Picture")
    without = pixels(server, server.run(plain, [number])["outputs"], number)
    assert np.array_equal(without, pixels(server, outputs, number))
    assert without.std() > 10


@pytest.mark.parametrize("name", REPAINTING)
def test_only_what_is_masked_is_painted_anew(server, shown, name):
    graph, outputs = shown(name)
    picture, repainted, mask = (
        pixels(server, outputs, workflow.find(graph, title))
        for title in ("Picture", "Painted anew", "Masked")
    )
    changed = np.abs(repainted.astype(int) - picture).max(-1)
    masked = (mask[..., 0] > 0).any(0)
    cells = maximum_filter(masked, 31)  # a latent's pixels change together
    assert 0.02 < masked.mean() < 0.9
    assert changed[:, ~cells].max() <= 1
    assert changed[mask[..., 0] == 255].mean() > 2


@pytest.mark.parametrize("name", FRAMES)
def test_videos_have_every_frame_and_the_sound(server, shown, name):
    graph, outputs = shown(name)
    videos = [number for number, node in graph.items() if node["class_type"] == "SaveVideo"]
    for number in videos:
        (file,) = outputs[number]["images"]
        with av.open(io.BytesIO(server.image(file))) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            title = graph[number]["_meta"]["title"]
            assert np.shape(frames) == (FRAMES[name], HEIGHT, WIDTH, 3), title
            assert np.std(frames) > 10, title
            assert bool(container.streams.audio) == (name in WITH_SOUND), title
    assert videos
