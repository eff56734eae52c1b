"""Workflows without a browser: from the front end's format to the API's, and onto the demo model.
Standard library only."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import comfyui

SIZE = 256  # of the demo model's pictures
FLUX_SIZE = 1024  # of the example workflows'
CFG = 3.0  # unlike Flux.1 dev, the demo model has no guidance of its own
NOTES = ("Note", "MarkdownNote")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")

FROM_OUTSIDE = -10  # where links into a subgraph come from

Graph = dict[str, dict]
Scene = dict[str, dict]  # what is asked for: inputs by name, by the title of their node

_READINGS = ("early layers", "late layers", "early steps", "late steps")
_HOUSE = {
    "Prompt": {"text": "a red house on the grass under the sky"},
    "Concept Attention": {"concepts": "house, grass, sky"},
}
_MUSHROOM = {
    "Prompt": {"text": "a red mushroom on the grass under the sky"},
    "Concept Attention": {"concepts": "mushroom, grass, sky"},
}
# What the demo model is asked for in each example workflow, by the name of its file.
SCENES: dict[str, Scene] = {
    "1. Find concepts in a new picture": {
        "Prompt": {"text": "a boat on the water under the sky"},
        "Concept Attention": {"concepts": "boat, water, sky"},
        "KSampler": {"seed": 6},
    },
    "2. Find concepts in your own picture": {
        "Concept Attention (Image)": {
            "concepts": "house, cat, boat, water, sky",
            "prompt": "a white house, a cat and a black boat on the water under the sky",
        },
        "Concept Mask": {"concept": "house"},
    },
    "3. Pick a concept and repaint it": {
        "Prompt": {"text": "a boat and a red mushroom on the water under the sky"},
        "Concept Attention": {"concepts": "mushroom, boat, water, sky"},
        "Concept Viewer": {"concept": "mushroom"},
        "Repaint prompt": {"text": "a boat and a red house on the water under the sky"},
        "KSampler": {"seed": 5},
        "KSampler (repaint)": {"seed": 5},
    },
    "4. Repaint a concept with Flux.1 Fill": {
        **_MUSHROOM,
        "KSampler": {"seed": 1},
        "Concept Mask": {"concept": "grass"},
        "Repaint prompt": {"text": "a red mushroom on the sand under the sky"},
    },
    "5. Cut a concept out with SAM3": {
        **_MUSHROOM,
        "KSampler": {"seed": 1},
        "Concept Mask": {"concept": "mushroom"},
    },
    "6. Lay a concept over another picture": {
        "Prompt A": _MUSHROOM["Prompt"],
        "Concept Attention": _MUSHROOM["Concept Attention"],
        "KSampler A": {"seed": 1},
        "Concept Mask": {"concept": "mushroom", "grow": -5},
        "Prompt B": {"text": "the sand under the sky"},
        "KSampler B": {"seed": 1},
    },
    # Flux.1's schedule stays longer at high noise levels, and Flux.1 can mix prompts.
    "7. A prompt for each concept": {
        **_HOUSE,
        "KSampler (first steps)": {"noise_seed": 1, "end_at_step": 2},
        "KSampler (the rest)": {"start_at_step": 2},
        "Concept Saliency": {"start_step": 1},
        "Concept Mask (first region)": {"concept": "house"},
        "Prompt of the first region": {"text": "a mushroom on the snow under the sky"},
        "First region": {"strength": 8.0},
        "Concept Mask (second region)": {"concept": "grass"},
        "Prompt of the second region": {"text": "a red house on the snow under the sky"},
        "Second region": {"strength": 8.0},
    },
    "8. Compare layers and steps": {
        **_HOUSE,
        "KSampler": {"seed": 1},
        **{f"Overlay of {part}": {"concept": "house"} for part in _READINGS},
        "Concept Figure": {"layout.concept": "house"},
    },
}


def graphs(workflow: dict) -> list[dict]:
    """The workflow itself, then the subgraphs that it defines."""
    return [workflow, *workflow.get("definitions", {}).get("subgraphs", ())]


def all_nodes(workflow: dict) -> Iterator[dict]:
    """Those in subgraphs too."""
    for graph in graphs(workflow):
        yield from graph["nodes"]


def swap(workflow: dict) -> dict:
    """A workflow file with the demo's model, text encoder, VAE, guidance and image size in place of
    Flux.1's; margins of masks shrink with the picture. What it says of loading Flux.1 is left out.

    There is no Fill model among the demo's. In its place comes the demo model itself, which does not see
    what InpaintModelConditioning adds for a Fill model, the picture without what is to be repainted; the
    noise mask alone then keeps the rest of the picture.
    """
    workflow = copy.deepcopy(workflow)
    for graph in graphs(workflow):
        if graph.get("name", "").startswith("Load Flux.1"):
            graph["name"] = "Load the demo model"
        for node in graph["nodes"]:
            kind, values = node["type"], node["widgets_values"]
            node["properties"].pop("models", None)
            if kind == "UNETLoader":
                values[0] = comfyui.model_name("diffusion_models")
            elif kind == "VAELoader":
                values[0] = comfyui.model_name("vae")
            elif kind == "DualCLIPLoader":
                _unplug(workflow, graph, node)
                node["type"], node["widgets_values"] = "ConceptDemoTextEncoder", []
            elif kind in NOTES and node["title"] == "Models":
                values[0] = "The demo model is here already."
            elif kind == "EmptySD3LatentImage":
                values[:2] = [SIZE, SIZE]
            elif kind == "KSampler":
                values[3] = CFG
            elif kind == "KSamplerAdvanced":
                values[4] = CFG
            elif kind == "ConceptMask":
                *_, grow, feather, _, _ = values
                values[-4:-2] = [round(grow * SIZE / FLUX_SIZE), feather * SIZE / FLUX_SIZE]
            elif kind == "ConditioningZeroOut":  # the model was trained with empty prompts, not with zeros
                _empty_prompt(graph, node)
    return workflow


def _unplug(workflow: dict, subgraph: dict, node: dict) -> None:
    """Take the inputs away from a node in a subgraph, and from the subgraph those that only they used."""
    node["inputs"] = []
    gone = {link["id"] for link in subgraph["links"] if link["target_id"] == node["id"]}
    kept = [slot for slot in subgraph["inputs"] if not gone.issuperset(slot["linkIds"])]
    subgraph["links"] = [link for link in subgraph["links"] if link["id"] not in gone]
    for link in subgraph["links"]:
        if link["origin_id"] == FROM_OUTSIDE:
            link["origin_slot"] = kept.index(subgraph["inputs"][link["origin_slot"]])
    subgraph["inputs"] = kept
    for outer in all_nodes(workflow):
        if outer["type"] == subgraph["id"]:
            names = [slot["name"] for slot in kept]
            outer["inputs"] = [slot for slot in outer["inputs"] if slot["name"] in names]
            shown = outer["properties"]["proxyWidgets"]
            outer["properties"]["proxyWidgets"] = [w for w in shown if w[0] != str(node["id"])]


def _empty_prompt(subgraph: dict, node: dict) -> None:
    """Make a node that zeroes a prompt into an empty prompt, encoded by what encodes that prompt."""
    links = {link["id"]: link for link in subgraph["links"]}
    (link,) = (link for link in links.values() if link["target_id"] == node["id"])
    (prompt,) = (n for n in subgraph["nodes"] if n["id"] == link["origin_id"])
    prompt["outputs"][0]["links"].remove(link["id"])
    clip = links[prompt["inputs"][0]["link"]]
    link.update(origin_id=clip["origin_id"], origin_slot=clip["origin_slot"], type="CLIP")
    subgraph["inputs"][clip["origin_slot"]]["linkIds"].append(link["id"])
    node["type"], node["widgets_values"] = "CLIPTextEncode", [""]
    node["inputs"] = [{"name": "clip", "type": "CLIP", "link": link["id"]}]


def to_api(workflow: dict, definitions: dict[str, dict]) -> Graph:
    """What the front end's ``graphToPrompt`` makes of a workflow file without reroutes, and muted or
    bypassed nodes.

    Args:
        definitions: the server's ``/object_info``.

    Raises:
        ValueError: the server lacks a node, or the values of a node do not fit its definition.
    """
    graph: Graph = {}
    for level in _levels(workflow):
        for node in level.nodes.values():
            kind = node["type"]
            if kind in NOTES or kind in level.subgraphs:
                continue
            if kind not in definitions:
                raise ValueError(f"This ComfyUI has no node {kind}.")
            values = enumerate(node.get("widgets_values", ()))
            inputs = {name: value for name, _, value in _widgets(kind, definitions[kind]["input"], values)}
            if left := [value for _, value in values]:
                raise ValueError(f"The workflow has more values for {kind} than it has widgets: {left}.")
            for slot in node["inputs"]:
                if slot["link"] is not None and (source := level.source(slot["link"])):
                    inputs[slot["name"]] = source
            meta = {"title": _title(node, definitions)}
            graph[f"{level.prefix}{node['id']}"] = {"class_type": kind, "inputs": inputs, "_meta": meta}
    return graph


class _Level:
    """A workflow, or a subgraph as the node ``outer`` of the level ``above`` stands for it."""

    def __init__(self, graph: dict, subgraphs: dict[str, dict], above: _Level | None, outer: dict) -> None:
        self.graph, self.subgraphs, self.above, self.outer = graph, subgraphs, above, outer
        self.prefix = "" if above is None else f"{above.prefix}{outer['id']}:"
        self.nodes = {node["id"]: node for node in graph["nodes"]}
        if above is None:
            self.links = {number: (node, slot) for number, node, slot, *_ in graph["links"]}
        else:
            self.links = {link["id"]: (link["origin_id"], link["origin_slot"]) for link in graph["links"]}

    def within(self, outer: dict) -> _Level:
        return _Level(self.subgraphs[outer["type"]], self.subgraphs, self, outer)

    def source(self, link: int) -> list | None:
        """The node and output that a link comes from; None for a widget that the subgraph shows outside."""
        number, slot = self.links[link]
        if number == FROM_OUTSIDE:
            outside = {slot["name"]: slot["link"] for slot in self.outer["inputs"]}
            link = outside.get(self.graph["inputs"][slot]["name"])
            return None if link is None else self.above.source(link)
        node = self.nodes[number]
        if node["type"] in self.subgraphs:
            inner = self.within(node)
            return inner.source(inner.graph["outputs"][slot]["linkIds"][0])
        return [f"{self.prefix}{number}", slot]


def _levels(workflow: dict) -> Iterator[_Level]:
    top, *subgraphs = graphs(workflow)
    levels = [_Level(top, {subgraph["id"]: subgraph for subgraph in subgraphs}, None, {})]
    for level in levels:  # also those that are added on the way
        yield level
        levels += [level.within(node) for node in level.nodes.values() if node["type"] in level.subgraphs]


def _title(node: dict, definitions: dict[str, dict]) -> str:
    kind = node["type"]
    return node.get("title") or definitions[kind]["display_name"] or kind


def _widgets(
    kind: str, inputs: dict, values: Iterator[tuple[int, object]], prefix: str = ""
) -> Iterator[tuple[str, int, object]]:
    """Name, place and value of each widget that is an input of the node, from its values by place."""
    for name, (type_, *rest) in {**inputs.get("required", {}), **inputs.get("optional", {})}.items():
        options = rest[0] if rest else {}
        type_ = options.get("widgetType", type_)  # of an input of several types
        if not (isinstance(type_, list) or type_ in WIDGETS) or options.get("forceInput"):
            continue
        try:
            place, value = next(values)
        except StopIteration:
            raise ValueError(f"The workflow has no value for {prefix}{name} of {kind}.") from None
        yield prefix + name, place, value
        if type_ == "COMFY_DYNAMICCOMBO_V3":
            (option,) = (o for o in options["options"] if o["key"] == value)
            yield from _widgets(kind, option["inputs"], values, f"{prefix}{name}.")
        # A widget beside it: the upload button, or what becomes of a seed.
        elif options.get("image_upload") or (
            type_ == "INT" and options.get("control_after_generate", name in ("seed", "noise_seed"))
        ):
            next(values)


def set_scene(graph: Graph, scene: Scene) -> None:
    for title, values in scene.items():
        inputs(graph, title).update(values)


def with_scene(workflow: dict, scene: Scene, definitions: dict[str, dict]) -> dict:
    """A workflow file with these inputs in the widgets of its nodes.

    Raises:
        ValueError: a node or a widget of it is not there.
    """
    workflow = copy.deepcopy(workflow)
    missing = {(title, name) for title, values in scene.items() for name in values}
    subgraphs = [graph["id"] for graph in graphs(workflow)[1:]]
    for node in all_nodes(workflow):
        kind = node["type"]
        if kind in (*NOTES, *subgraphs):
            continue
        title, values = _title(node, definitions), node.get("widgets_values", [])
        for name, place, _ in list(_widgets(kind, definitions[kind]["input"], enumerate(values))):
            if name in scene.get(title, {}):
                values[place] = scene[title][name]
                missing.discard((title, name))
    if missing:
        raise ValueError(f"The workflow has no widgets {sorted(missing)}.")
    return workflow


def find(graph: Graph, title: str) -> str:
    """The id of the node with this title.

    Raises:
        ValueError: there is none, or more than one.
    """
    found = [number for number, node in graph.items() if node["_meta"]["title"] == title]
    if len(found) != 1:
        raise ValueError(f'{len(found)} nodes are titled "{title}", not one.')
    return found[0]


def inputs(graph: Graph, title: str) -> dict:
    """The inputs of the node with this title, to be changed in place."""
    return graph[find(graph, title)]["inputs"]


def add(graph: Graph, title: str, class_type: str, **inputs) -> str:
    """Add a node to the graph and return its id."""
    number = str(max(int(number.split(":")[0]) for number in graph) + 1)
    graph[number] = {"class_type": class_type, "inputs": inputs, "_meta": {"title": title}}
    return number


def add_previews(graph: Graph) -> None:
    """Picture and heatmaps on their own, where the example shows them in Concept Viewer only."""
    add(graph, "Picture", "PreviewImage", images=inputs(graph, "Concept Viewer")["image"])
    add(graph, "Heatmaps", "PreviewImage", images=[find(graph, "Concept Saliency"), 2])


def shown_as_text(server: comfyui.Server, graph: Graph, title: str, *outputs: int) -> list[str]:
    """Outputs of the node with this title, by number, as core's PreviewAny writes them."""
    source = find(graph, title)
    graph = dict(graph)
    added = [add(graph, f"Output {i}", "PreviewAny", source=[source, i]) for i in outputs]
    shown = server.run(graph, added)["outputs"]
    return [shown[number]["text"][0] for number in added]
