"""What the browser is sent while a model samples, and what it asks for when a viewer looks further."""

from __future__ import annotations

import asyncio
import base64
import json
import uuid
import weakref
from collections.abc import Callable, Iterator

from aiohttp import web
from server import PromptServer

import nodes

from ..core.drawing.live import LiveMaps, MapsSoFar
from ..core.drawing.palette import hex_colours
from ..core.drawing.transport import evaluation_means, layer, layer_means, pack, video_mean
from ..core.reading.maps import ConceptMaps

# As long as ComfyUI keeps the maps in its cache, a viewer can ask for their layers.
_views: weakref.WeakValueDictionary[str, ConceptMaps] = weakref.WeakValueDictionary()
# The clients that show maps while a model samples; those that have left are forgotten with the next wish.
_listening: set[str] = set()
_LONGEST_WISH = 512  # bytes
# What is made with a model, but holds none. Other packs have types of their own that may.
_WITHOUT_A_MODEL = {"LATENT", "IMAGE", "MASK", "CONDITIONING", "CLIP", "VAE", "SIGMAS", "NOISE", "SAMPLER"}
_WITHOUT_A_MODEL |= {"STRING", "INT", "FLOAT", "BOOLEAN", "CONCEPT_MAPS"}


def publish(maps: ConceptMaps) -> str:
    """The key under which the browser can ask for the layers of ``maps``."""
    key = uuid.uuid4().hex
    _views[key] = maps
    return key


def workflow_id(extra_pnginfo: dict | None) -> str | None:
    """The workflow that a run was queued from, of which the page may show another one by now."""
    return ((extra_pnginfo or {}).get("workflow") or {}).get("id")


def live_maps() -> LiveMaps:
    """A listener that sends the maps so far, and the nodes to show them, to the page whose workflow runs."""

    def listening() -> bool:
        server = getattr(PromptServer, "instance", None)
        return server is not None and server.client_id in _listening

    def send(so_far: MapsSoFar) -> None:
        server = PromptServer.instance
        running, _ = server.prompt_queue.get_current_queue_volatile()
        prompt, extra_data = running[0][2:4] if running else ({}, {})
        message = {
            "workflow": workflow_id(extra_data.get("extra_pnginfo")),
            "nodes": {n: prompt[n]["class_type"] for n in showing(prompt, server.last_node_id)},
            "sampler": server.last_node_id,
            "evaluations": so_far.evaluations,
            "concepts": so_far.concepts.all,
            "colours": hex_colours(len(so_far.concepts.all)),
            "shown": len(so_far.concepts.names),
            "grid": so_far.values.shape[1:],
            "coverage": so_far.coverage,
            "maps": base64.b64encode(pack(so_far.values[None])).decode(),
        }
        server.send_sync("concept_attention.maps", message, server.client_id)

    return LiveMaps(send, listening)


def showing(prompt: dict, sampler: str) -> list[str]:
    """The nodes of a workflow in API format that show the maps of a run of ``sampler``: the viewers that they
    will reach; or else the nodes that had its model observed; or else itself.

    They are found anew in every run. A node that ComfyUI serves from its cache was executed in another
    workflow, or for another node that is like it, and does not know its own id.
    """
    if sampler not in prompt:
        return []
    return _reached(prompt, sampler, "ConceptViewer") or _observing(prompt, sampler) or [sampler]


def _reached(prompt: dict, start: str, class_type: str) -> list[str]:
    """The nodes of a class that are reached from node ``start``."""
    reached, grown = {start}, True
    while grown:
        more = {n for n in prompt if any(giver in reached for giver, _ in _links(prompt, n))}
        grown = not more <= reached
        reached |= more
    return [n for n in prompt if n in reached and prompt[n]["class_type"] == class_type]


def _observing(prompt: dict, sampler: str) -> list[str]:
    """The Concept Attention nodes that the model of a sampler comes from. It may come inside a guider, or in
    a bundle of a type that only another pack knows, but not inside what a model has made."""
    reached, found = [sampler], []
    for node_id in reached:  # also those that are added on the way
        if prompt[node_id]["class_type"] == "ConceptAttention":
            found.append(node_id)
            continue
        for giver, output in _links(prompt, node_id):
            if giver not in reached and _may_hold_a_model(prompt[giver]["class_type"], output):
                reached.append(giver)
    return found


def _may_hold_a_model(class_type: str, output: int) -> bool:
    types = getattr(nodes.NODE_CLASS_MAPPINGS.get(class_type), "RETURN_TYPES", ())
    # Some packs have types that are lists, or that compare as equal to all others.
    return output >= len(types) or str(types[output]) not in _WITHOUT_A_MODEL


def _links(prompt: dict, node_id: str) -> Iterator[tuple[str, int]]:
    """Where the inputs of a node come from: node and output. Lists that a widget holds are none, although
    ComfyUI has unwrapped them by the time the workflow runs."""
    for value in prompt[node_id]["inputs"].values():
        match value:
            case [str(giver), int(output)] if giver in prompt:
                yield giver, output


def add_routes() -> None:
    routes = PromptServer.instance.routes

    @routes.get(r"/concept_attention/{key}/{image:\d+}/{frames}")
    async def recorded(request: web.Request) -> web.Response:
        return await _answer(request, _packet, request.match_info["image"], request.match_info["frames"])

    @routes.get(r"/concept_attention/{key}/video/{video:\d+}")
    async def recorded_video(request: web.Request) -> web.Response:
        layers, steps = (request.query.get(name, "") for name in ("layers", "steps"))
        return await _answer(request, _video_packet, request.match_info["video"], layers, steps)

    @routes.post("/concept_attention/live")
    async def live(request: web.Request) -> web.Response:
        connected = PromptServer.instance.sockets
        _listening.intersection_update(connected)
        if not 0 < (request.content_length or 0) <= _LONGEST_WISH:
            raise web.HTTPBadRequest(text=f"Say it in up to {_LONGEST_WISH} bytes of JSON.")
        try:
            wish = json.loads(await request.read())
        except ValueError as error:
            raise web.HTTPBadRequest(text=f"This is no JSON: {error}.") from error
        match wish:
            case {"client_id": str(client), "on": bool(on)} if client in connected:
                (_listening.add if on else _listening.discard)(client)
            case _:
                raise web.HTTPBadRequest(text='Give the "client_id" of a page that is connected, and "on".')
        return web.Response()


async def _answer(request: web.Request, packet: Callable[..., bytes], *choice: str) -> web.Response:
    """A packet of the maps that were asked for."""
    maps = _views.get(request.match_info["key"])
    if maps is None:
        raise web.HTTPGone(text="The recording is no longer in memory.")
    try:
        content = await asyncio.to_thread(packet, maps, *choice)
    except ValueError as error:
        raise web.HTTPNotFound(text=str(error)) from error
    return web.Response(body=content, content_type="application/octet-stream")


def _packet(maps: ConceptMaps, image: str, frames: str) -> bytes:
    """Frames of an image: the "layers", the "evaluations", or all evaluations of the layer of a number. The
    latent frames of videos are images here."""
    index = int(image)
    if not 0 <= index < len(maps.values):
        raise ValueError(f"There is no image {index}.")
    if frames == "layers":
        chosen = layer_means(maps, index)
    elif frames == "evaluations":
        chosen = evaluation_means(maps, index)
    else:
        chosen = layer(maps, index, int(frames))
    return pack(chosen, from_zero=maps.softmax)


def _video_packet(maps: ConceptMaps, video: str, layers: str, steps: str) -> bytes:
    """The mean over layers and steps, of which numbers are given, in all latent frames of a video."""
    if int(video) >= maps.recording.batch:
        raise ValueError(f"There is no video {video}.")
    chosen = ([int(number) for number in numbers.split(",")] for numbers in (layers, steps))
    return pack(video_mean(maps, int(video), *chosen), from_zero=maps.softmax)
