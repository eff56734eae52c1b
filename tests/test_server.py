"""The plugin in a real ComfyUI server, over HTTP, with the demo model and the example workflows."""

from __future__ import annotations

import asyncio
import functools
import io
import json
import re
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import aiohttp
import numpy as np
import pytest
from PIL import Image

import comfyui
import workflow
from concept_attention import comfy_entrypoint
from scenes import EXAMPLE, make_scene, save_example

FOLDER = comfyui.ROOT / "example_workflows"
WORKFLOWS = sorted(FOLDER.glob("*.json"))
FLUX1 = [path for path in WORKFLOWS if path.stem in workflow.SCENES]
PICK = FOLDER / "3. Pick a concept and repaint it.json"
FILL = FOLDER / "4. Repaint a concept with Flux.1 Fill.json"
SAM3 = "sam3.1_multiplex_fp16.safetensors"
ATTENTION = ("ConceptAttention", "ConceptAttentionImage")
LEGENDS = ("Figure", "Segmented")  # shown with something beside the picture
FLUX_STEPS = 20
STEPS = 4


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    (folder / "models" / "checkpoints").mkdir(parents=True)
    (folder / "models" / "checkpoints" / SAM3).touch()  # to choose, not to load
    save_example(folder / "input")
    with comfyui.Server(comfyui.find(), folder) as server:
        yield server


@pytest.fixture(scope="module")
def definitions(server):
    return server.get("/object_info")


@pytest.fixture
def graph(definitions) -> workflow.Graph:
    graph = workflow.to_api(workflow.swap(json.loads(PICK.read_text("utf-8"))), definitions)
    workflow.add_previews(graph)
    workflow.inputs(graph, "Prompt")["text"] = "a red ball on the grass under the sky"
    workflow.inputs(graph, "Repaint prompt")["text"] = "a red ball on the snow under the sky"
    workflow.inputs(graph, "Concept Attention")["concepts"] = "ball, grass, sky"
    mask = workflow.inputs(graph, "Concept Mask")  # not as picked in the viewer
    mask.update(concept="grass", method="argmax")
    del mask["method.threshold"]
    for sampler in ("KSampler", "KSampler (repaint)"):
        workflow.inputs(graph, sampler)["steps"] = STEPS
    return graph


@pytest.fixture
def example(definitions):
    """Gives an example workflow with what the demo model is asked for in it, at few steps."""
    return functools.partial(_example, definitions)


@pytest.fixture(scope="module")
def shown(server, definitions):
    """Gives what an example workflow shows, each run once."""
    return functools.cache(lambda name: Result(server, _example(definitions, name)))


def _example(definitions: dict, name: str) -> workflow.Graph:
    content = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))
    graph = workflow.to_api(workflow.swap(content), definitions)
    workflow.set_scene(graph, workflow.SCENES[name])
    for node in graph.values():
        inputs = node["inputs"]
        if node["class_type"] in ("KSampler", "KSamplerAdvanced"):
            inputs["steps"] = STEPS
        elif node["class_type"] == "ConceptSaliency":
            for end in ("start_step", "end_step"):
                inputs[end] = inputs[end] * STEPS // FLUX_STEPS
    return graph


class Result:
    """What a run of the graph showed, by the title of the output node."""

    def __init__(self, server: comfyui.Server, graph: workflow.Graph, *titles: str) -> None:
        self._server, self.graph = server, graph
        self.entry = server.run(graph, [workflow.find(graph, title) for title in titles] or None)

    def __getitem__(self, title: str) -> np.ndarray:
        """Pixels (images, H, W, 3)."""
        shown = self.entry["outputs"][workflow.find(self.graph, title)]["images"]
        files = [io.BytesIO(self._server.image(image)) for image in shown]
        return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])

    @property
    def cached(self) -> set[str]:
        """Titles of the nodes that ComfyUI did not run again."""
        messages = dict(self.entry["status"]["messages"])
        return {self.graph[number]["_meta"]["title"] for number in messages["execution_cached"]["nodes"]}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_links_of_an_example_workflow_agree_with_its_nodes(path):
    content = json.loads(path.read_text("utf-8"))
    ids = [node["id"] for node in workflow.all_nodes(content)]
    assert len(ids) == len(set(ids))
    assert content["last_node_id"] == max(ids)
    for graph in workflow.graphs(content):
        links = {tuple(link.values() if isinstance(link, dict) else link) for link in graph["links"]}
        ends = {
            (link, node["id"], i, type_)
            for node in graph["nodes"]
            for i, slot in enumerate(node["inputs"])
            if (link := slot.get("link")) is not None
            for type_ in slot["type"].split(",")
        } | {(n, -20, i, s["type"]) for i, s in enumerate(graph.get("outputs", ())) for n in s["linkIds"]}
        starts = {
            (link, node["id"], i, slot["type"])
            for node in graph["nodes"]
            for i, slot in enumerate(node["outputs"])
            for link in slot["links"] or ()
        } | {(n, -10, i, s["type"]) for i, s in enumerate(graph.get("inputs", ())) for n in s["linkIds"]}
        assert ends >= {(n, b, j, type_) for n, _, _, b, j, type_ in links}
        assert {n for n, *_ in ends} == {n for n, *_ in links}
        assert starts == {(n, a, i, type_) for n, a, i, _, _, type_ in links}
        assert max(n for n, *_ in links) <= content["last_link_id"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_a_subgraph_and_its_node_have_the_same_inputs_and_outputs(path):
    content = json.loads(path.read_text("utf-8"))
    top, *subgraphs = workflow.graphs(content)
    if path in FLUX1:
        assert subgraphs[0]["name"].startswith("Load Flux.1 dev")
    assert subgraphs
    for subgraph in subgraphs:
        (outer,) = (node for node in top["nodes"] if node["type"] == subgraph["id"])
        widgets = {node["id"]: node["widgets_values"] for node in subgraph["nodes"]}
        for end in ("inputs", "outputs"):
            slots = [[(slot["name"], slot["type"]) for slot in part[end]] for part in (outer, subgraph)]
            assert slots[0] == slots[1]
        assert all(int(number) in widgets for number, _ in outer["properties"]["proxyWidgets"])


def test_example_workflows_are_titled_in_order_the_smallest_first_other_models_last():
    """ComfyUI shows the names of the files."""
    titles = [path.stem for path in WORKFLOWS]
    assert all(re.fullmatch(rf"{i + 1}\. [A-Z][A-Za-z0-9. ]+", title) for i, title in enumerate(titles[:8]))
    assert all(re.fullmatch(r"Find concepts with [A-Z][A-Za-z0-9. -]+", title) for title in titles[8:])
    sizes = [len(json.loads(path.read_text("utf-8"))["nodes"]) for path in WORKFLOWS]
    assert sizes[0] == min(sizes)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_notes_name_every_file_with_its_link_size_and_folder(path):
    content = json.loads(path.read_text("utf-8"))
    (text,) = (n["widgets_values"][0] for n in content["nodes"] if n.get("title") == "Models")
    for node in workflow.all_nodes(content):
        for model in node["properties"].get("models", ()):
            line = rf"- \[{model['name']}\]\({model['url']}\), [\d.]+ GB, in {model['directory']}"
            assert re.search(line, text), model["name"]
    if path in FLUX1:
        assert "fp8_e4m3fn:" in text


def test_a_workflow_with_too_many_or_too_few_widget_values_is_refused(definitions):
    content = json.loads(FILL.read_text("utf-8"))
    (values,) = (n["widgets_values"] for n in content["nodes"] if n["type"] == "ConceptMask")
    values.append(1)
    with pytest.raises(ValueError, match="more values for ConceptMask"):
        workflow.to_api(content, definitions)
    del values[-2:]
    with pytest.raises(ValueError, match="no value for refine of ConceptMask"):
        workflow.to_api(content, definitions)


def test_values_of_a_dynamic_combo_get_dotted_names(definitions):
    content = json.loads(FILL.read_text("utf-8"))
    (values,) = (n["widgets_values"] for n in content["nodes"] if n["type"] == "ConceptMask")
    values[2:3] = ["fixed", 0.25]
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


def test_every_example_workflow_has_a_picture_and_those_of_flux1_a_scene_for_the_demo():
    names = {path.stem for path in WORKFLOWS}
    assert names == {path.stem for path in FOLDER.glob("*.jpg")}
    assert set(workflow.SCENES) == {name for name in names if not name.startswith("Find concepts with")}


def test_loaders_of_the_example_workflows_say_where_their_models_are_from():
    for path in WORKFLOWS:
        for node in workflow.all_nodes(json.loads(path.read_text("utf-8"))):
            files = [v for v in node["widgets_values"] if str(v).endswith(".safetensors")]
            models = node["properties"].get("models", [])
            assert [model["name"] for model in models] == files, (path.stem, node["type"])
            assert all(model["url"].endswith(f"/{model['name']}") for model in models)


def test_the_swap_onto_the_demo_model_keeps_what_the_workflow_shows(definitions):
    content = json.loads(FILL.read_text("utf-8"))
    (mask,) = (n for n in content["nodes"] if n["type"] == "ConceptMask")
    mask["widgets_values"][2:3] = ["fixed", 0.25]
    before = json.dumps(content)
    swapped = workflow.swap(content)
    assert json.dumps(content) == before
    assert len(swapped["nodes"]) == len(content["nodes"])
    inputs = workflow.inputs(workflow.to_api(swapped, definitions), "Concept Mask")
    assert (inputs["method.threshold"], inputs["grow"], inputs["feather"]) == (0.25, 6, 3.0)


@pytest.mark.parametrize("name", sorted(set(workflow.SCENES) - {"5. Cut a concept out with SAM3"}))
def test_a_scene_in_a_workflow_file_is_that_of_its_graph(definitions, name):
    """So the demo's server offers what the demo paints."""
    content, scene = json.loads((FOLDER / f"{name}.json").read_text("utf-8")), workflow.SCENES[name]
    before = json.dumps(content)
    graph = workflow.to_api(content, definitions)
    workflow.set_scene(graph, scene)
    assert workflow.to_api(workflow.with_scene(content, scene, definitions), definitions) == graph
    assert json.dumps(content) == before
    with pytest.raises(ValueError, match=r"no widgets \[\('Prompt', 'words'\)\]"):
        workflow.with_scene(content, {"Prompt": {"words": "none"}}, definitions)


@pytest.mark.parametrize("name", sorted(set(workflow.SCENES) - {"5. Cut a concept out with SAM3"}))
def test_an_example_workflow_shows_pictures_and_masks_of_the_right_size(shown, name):
    result = shown(name)
    (watched,) = (n for n in result.graph.values() if n["class_type"] in ATTENTION)
    concepts = watched["inputs"]["concepts"].split(",")
    for node in result.graph.values():
        title = node["_meta"]["title"]
        if node["class_type"] in ("PreviewImage", "SaveImage", "MaskPreview") and title not in LEGENDS:
            count = len(concepts) if title in ("Heatmaps", "Overlays") else 1
            assert result[title].shape == (count, workflow.SIZE, workflow.SIZE, 3), title
            assert result[title].std() > 10, title
        if node["class_type"] == "MaskPreview":
            assert 0.02 < result[title].mean() / 255 < 0.8, title


def test_the_viewer_of_the_saliency_workflow_has_every_concept_and_the_picture(shown):
    result = shown("1. Find concepts in a new picture")
    number = workflow.find(result.graph, "Concept Viewer")
    (view,) = result.entry["outputs"][number]["concept_view"]
    assert view["concepts"] == ["boat", "water", "sky", "background"]
    assert len(view["steps"]) == STEPS
    assert view["images"][0]["pictures"]


def test_fill_changes_the_mask_and_leaves_what_is_outside_it(shown):
    result = shown("4. Repaint a concept with Flux.1 Fill")
    changed = np.abs(result["Repainted"].astype(int) - result["Picture"]).max(-1)
    assert changed[result["Mask"][..., 0] == 0].max() <= 1  # a mask's last level before 0 is shown as 0
    assert changed[result["Mask"][..., 0] == 255].mean() > 20


def test_regional_prompts_change_their_regions(server, shown, example):
    regional, graph = shown("7. A prompt for each concept"), example("7. A prompt for each concept")
    rest = workflow.inputs(graph, "KSampler (the rest)")
    rest["positive"] = workflow.inputs(graph, "KSampler (first steps)")["positive"]
    plain = Result(server, graph, "Finished")["Finished"]
    changed = np.abs(regional["Finished"].astype(int) - plain).mean(-1)
    first, second = (regional[f"Mask of the {which} region"][..., 0] for which in ("first", "second"))
    outside = changed[(first == 0) & (second == 0)].mean()
    assert changed[first == 255].mean() > 4 * outside
    assert changed[second == 255].mean() > 4 * outside


def test_without_regional_prompts_both_samplers_paint_what_one_would(server, example):
    graph = example("7. A prompt for each concept")
    first, rest = (workflow.inputs(graph, f"KSampler ({part})") for part in ("first steps", "the rest"))
    rest["positive"] = first["positive"]
    in_two = Result(server, graph, "Finished")["Finished"]
    rest.update(add_noise="enable", noise_seed=first["noise_seed"], start_at_step=0)
    rest["latent_image"] = first["latent_image"]
    in_one = Result(server, graph, "Finished")["Finished"]
    assert np.abs(in_two.astype(int) - in_one).max() <= 2


def test_layers_and_steps_are_read_from_one_run(shown):
    result = shown("8. Compare layers and steps")
    parts = ("early layers", "late layers", "early steps", "late steps")
    overlays = [result[f"Concept in {part}"].astype(int) for part in parts]
    for i, overlay in enumerate(overlays):
        assert all(np.abs(overlay - other).mean() > 0.5 for other in overlays[:i])
    latents = [workflow.inputs(result.graph, part.capitalize())["latent"] for part in parts]
    assert latents == [[workflow.find(result.graph, "KSampler"), 0]] * len(parts)
    _, height, width, _ = result["Figure"].shape
    assert height > workflow.SIZE < width


def test_a_composite_is_picture_a_inside_the_mask_and_picture_b_outside(shown):
    result = shown("6. Lay a concept over another picture")
    composite, a, b = (result[title].astype(int) for title in ("Composite", "Picture A", "Picture B"))
    mask = result["Mask"][..., 0]
    assert np.array_equal(composite[mask == 255], a[mask == 255])
    assert np.abs(composite - b)[mask == 0].max() <= 1
    assert np.abs(a - b)[mask == 255].mean() > 20
    assert ((mask > 0) & (mask < 255)).any()


def test_an_existing_picture_is_read_where_its_things_are_and_nothing_is_sampled(shown):
    result = shown("2. Find concepts in your own picture")
    assert not [n for n in result.graph.values() if "Sampler" in n["class_type"]]
    scene = make_scene(EXAMPLE)
    (house,) = (i for i, region in enumerate(scene.regions) if region.noun == "house")
    mask = result["Mask"][0, ..., 0] == 255
    found = scene.mask(house)
    assert (mask & found).sum() / (mask | found).sum() > 0.7
    heatmaps = result["Heatmaps"].mean(-1)
    concepts = workflow.inputs(result.graph, "Concept Attention (Image)")["concepts"].split(", ")
    for heatmap, concept in zip(heatmaps, concepts, strict=True):
        (index,) = (i for i, region in enumerate(scene.regions) if region.noun == concept)
        inside = scene.mask(index)
        assert heatmap[inside].mean() > 3 * heatmap[~inside].mean(), concept
    _, height, width, _ = result["Segmented"].shape
    assert height >= workflow.SIZE < width
    (view,) = result.entry["outputs"][workflow.find(result.graph, "Concept Viewer")]["concept_view"]
    assert view["concepts"] == [*concepts, "background"]
    assert len(view["steps"]) == 1


@pytest.fixture
def sam3(definitions, example) -> workflow.Graph:
    if "SAM3_Detect" not in definitions:
        pytest.skip("this ComfyUI has no SAM3 nodes")
    return example("5. Cut a concept out with SAM3")


def test_boxes_and_points_for_sam3_are_those_of_the_mask(server, sam3):
    mask = Result(server, sam3, "Mask")["Mask"][0, ..., 0] == 255
    boxes, points = map(json.loads, workflow.shown_as_text(server, sam3, "Concept Mask", 1, 2))
    inside = np.zeros_like(mask)
    for box in boxes[0]:
        assert box["label"] == "mushroom"
        inside[box["y"] : box["y"] + box["height"], box["x"] : box["x"] + box["width"]] = True
    assert inside[mask].all()
    assert len(points) == len(boxes[0]) > 0
    assert all(mask[point["y"], point["x"]] for point in points)


def test_the_sam3_workflow_is_valid_up_to_the_weights_that_the_tests_lack(server, sam3):
    with pytest.raises(RuntimeError, match="^CheckpointLoaderSimple: "):
        Result(server, sam3, "SAM3 mask", "Cut out")
    workflow.inputs(sam3, "SAM3 Detect")["bboxes"] = [workflow.find(sam3, "Concept Mask"), 0]
    with pytest.raises(RuntimeError, match="refused /prompt: .*bboxes, received_type"):
        Result(server, sam3, "SAM3 mask", "Cut out")


def test_repainting_changes_the_masked_concept_only(server, graph):
    result = Result(server, graph)
    changed = np.abs(result["Repainted"].astype(int) - result["Picture"]).mean(-1)
    inside = result["Mask"][..., 0] / 255
    assert changed[inside == 1].mean() > 4 * changed[inside == 0].mean()


def test_several_concepts_are_repainted_together(server, graph):
    """One mask, their union, goes through both of ComfyUI's nodes for repainting."""
    together = workflow.inputs(graph, "Concept Mask")
    together.update(concept="ball, grass", grow=0, feather=0.0)
    workflow.inputs(graph, "Repaint prompt")["text"] = "a black house on the snow under the sky"
    apart = workflow.add(graph, "Apart", "ConceptMask", **together | {"combine": False})
    workflow.add(graph, "Masks", "MaskPreview", mask=[apart, 0])
    vae = [workflow.find(graph, "Load VAE"), 0]
    encoded = workflow.add(
        graph,
        "VAE Encode (for Inpainting)",
        "VAEEncodeForInpaint",
        pixels=workflow.inputs(graph, "Picture")["images"],
        vae=vae,
        mask=[workflow.find(graph, "Concept Mask"), 0],
        grow_mask_by=0,
    )
    greyed = workflow.add(graph, "Greyed", "VAEDecode", samples=[encoded, 0], vae=vae)
    workflow.add(graph, "Grey inside", "PreviewImage", images=[greyed, 0])
    result = Result(server, graph)
    (mask,), masks = result["Mask"][..., 0], result["Masks"][..., 0]
    assert len(masks) == 2
    assert np.array_equal(mask, masks.max(0))
    for title in ("Repainted", "Grey inside"):
        changed = np.abs(result[title].astype(int) - result["Picture"]).mean(-1)[0]
        for own in masks:
            assert changed[own == 255].mean() > 4 * changed[mask == 0].mean(), title


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


async def _live(server: comfyui.Server, graph: workflow.Graph, target: str) -> list[dict[str, str]]:
    """The nodes that a page is told to show maps on, each time, while it runs a workflow."""
    page = uuid.uuid4().hex
    wish = {"client_id": page, "on": True}
    run = {"client_id": page, "prompt": graph, "partial_execution_targets": [target]}
    async with (
        aiohttp.ClientSession(server.url) as session,
        session.ws_connect("/ws", params={"clientId": page}) as events,
    ):
        await events.receive()
        await session.post("/concept_attention/live", json=wish, raise_for_status=True)
        await session.post("/prompt", json=run, raise_for_status=True)
        shown, kind = [], ""
        while kind != "execution_success":
            event = await events.receive()
            message = event.json() if event.type is aiohttp.WSMsgType.TEXT else {}
            kind = message.get("type")
            assert kind != "execution_error", message
            if kind == "concept_attention.maps":
                shown.append(message["data"]["nodes"])
        return shown


def _renumbered(graph: workflow.Graph, new: dict[str, str]) -> workflow.Graph:
    text = json.dumps({new.get(number, number): node for number, node in graph.items()})
    for old, number in new.items():
        text = text.replace(f'["{old}", ', f'["{number}", ')
    return json.loads(text)


def test_live_maps_go_to_the_viewer_that_they_will_reach(server, graph):
    workflow.inputs(graph, "KSampler")["seed"] = 100
    shown = asyncio.run(_live(server, graph, workflow.find(graph, "Picture")))
    assert shown
    assert all(nodes == {workflow.find(graph, "Concept Viewer"): "ConceptViewer"} for nodes in shown)


def test_live_maps_go_to_the_node_of_the_workflow_that_runs_also_when_it_comes_from_the_cache(
    server, example
):
    graph = example("4. Repaint a concept with Flux.1 Fill")
    attention, loader = (workflow.find(graph, title) for title in ("Concept Attention", "Load VAE"))
    # In its own workflow; in another, with another node under its number; in a subgraph.
    for seed, moved in enumerate(({}, {attention: "77", loader: attention}, {attention: "90:1"})):
        workflow.inputs(graph, "KSampler")["seed"] = 200 + seed
        renumbered = _renumbered(graph, moved)
        shown = asyncio.run(_live(server, renumbered, workflow.find(renumbered, "Picture")))
        assert shown
        assert all(nodes == {moved.get(attention, attention): "ConceptAttention"} for nodes in shown)


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
