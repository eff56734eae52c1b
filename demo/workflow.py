"""Workflows without a browser: from the front end's format to the API's, and onto the demo model.
Standard library only."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import comfyui

SIZE = 256  # of the demo model's pictures
CFG = 3.0  # unlike Flux.1 dev, the demo model has no guidance of its own
NOTES = ("Note", "MarkdownNote")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")

Graph = dict[str, dict]


def swap(workflow: dict) -> dict:
    """A workflow file with the demo's model, text encoder, VAE, guidance and image size in place of
    Flux.1's."""
    workflow = copy.deepcopy(workflow)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    (encoder,) = (node for node in nodes.values() if node["type"] == "DualCLIPLoader")
    for node in nodes.values():
        kind, values = node["type"], node["widgets_values"]
        node["properties"].pop("models", None)
        if kind == "UNETLoader":
            values[0] = comfyui.model_name("diffusion_models")
        elif kind == "VAELoader":
            values[0] = comfyui.model_name("vae")
        elif kind == "DualCLIPLoader":
            node["type"], node["widgets_values"] = "ConceptDemoTextEncoder", []
        elif kind == "EmptySD3LatentImage":
            values[:2] = [SIZE, SIZE]
        elif kind == "KSampler":
            values[3] = CFG
        elif kind == "ConditioningZeroOut":  # the model was trained with empty prompts, not with zeros
            node["type"], node["widgets_values"] = "CLIPTextEncode", [""]
            (link,) = (link for link in workflow["links"] if link[3] == node["id"])
            nodes[link[1]]["outputs"][link[2]]["links"].remove(link[0])
            encoder["outputs"][0]["links"].append(link[0])
            link[1], link[2], link[5] = encoder["id"], 0, "CLIP"
            node["inputs"] = [{"name": "clip", "type": "CLIP", "link": link[0]}]
    return workflow


def to_api(workflow: dict, definitions: dict[str, dict]) -> Graph:
    """What the front end's ``graphToPrompt`` makes of a workflow file without subgraphs, reroutes, and
    muted or bypassed nodes.

    Args:
        definitions: the server's ``/object_info``.

    Raises:
        ValueError: the server lacks a node, or the values of a node do not fit its definition.
    """
    links = {number: [str(node), slot] for number, node, slot, *_ in workflow["links"]}
    graph: Graph = {}
    for node in workflow["nodes"]:
        kind = node["type"]
        if kind in NOTES:
            continue
        if kind not in definitions:
            raise ValueError(f"This ComfyUI has no node {kind}.")
        values = iter(node.get("widgets_values", ()))
        inputs = dict(_widget_values(kind, definitions[kind]["input"], values))
        if left := list(values):
            raise ValueError(f"The workflow has more values for {kind} than it has widgets: {left}.")
        for slot in node["inputs"]:
            if slot["link"] is not None:
                inputs[slot["name"]] = links[slot["link"]]
        title = node.get("title") or definitions[kind]["display_name"] or kind
        graph[str(node["id"])] = {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}
    return graph


def _widget_values(
    kind: str, inputs: dict, values: Iterator, prefix: str = ""
) -> Iterator[tuple[str, object]]:
    for name, (type_, *rest) in {**inputs.get("required", {}), **inputs.get("optional", {})}.items():
        options = rest[0] if rest else {}
        if not (isinstance(type_, list) or type_ in WIDGETS) or options.get("forceInput"):
            continue
        try:
            value = next(values)
        except StopIteration:
            raise ValueError(f"The workflow has no value for {prefix}{name} of {kind}.") from None
        yield prefix + name, value
        if type_ == "COMFY_DYNAMICCOMBO_V3":
            (option,) = (o for o in options["options"] if o["key"] == value)
            yield from _widget_values(kind, option["inputs"], values, f"{prefix}{name}.")
        elif type_ == "INT" and options.get("control_after_generate", name in ("seed", "noise_seed")):
            next(values)


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
    number = str(max(map(int, graph)) + 1)
    graph[number] = {"class_type": class_type, "inputs": inputs, "_meta": {"title": title}}
    return number
