"""What the browser is sent while a model samples, and what it asks for when a viewer looks further."""

from __future__ import annotations

import asyncio
import base64
import uuid
import weakref

from aiohttp import web
from server import PromptServer

from ..core.drawing.live import LiveMaps, MapsSoFar
from ..core.drawing.palette import hex_colours
from ..core.drawing.transport import evaluation_means, layer, layer_means, pack
from ..core.reading.maps import ConceptMaps

# As long as ComfyUI keeps the maps in its cache, a viewer can ask for their layers.
_views: weakref.WeakValueDictionary[str, ConceptMaps] = weakref.WeakValueDictionary()
# The clients that show maps while a model samples.
_listening: set[str] = set()


def publish(maps: ConceptMaps) -> str:
    """The key under which the browser can ask for the layers of ``maps``."""
    key = uuid.uuid4().hex
    _views[key] = maps
    return key


def workflow_id(extra_pnginfo: dict | None) -> str | None:
    """The workflow that a run was queued from, of which the page may show another one by now."""
    return ((extra_pnginfo or {}).get("workflow") or {}).get("id")


def live_maps(node_id: str) -> LiveMaps:
    """A listener that sends the maps so far to the client whose workflow runs. They are shown by the
    viewers that they will reach, or else by the node ``node_id``."""

    def send(so_far: MapsSoFar) -> None:
        server = PromptServer.instance
        running, _ = server.prompt_queue.get_current_queue_volatile()
        prompt, extra_data = running[0][2:4] if running else ({}, {})
        nodes = downstream(prompt, node_id, "ConceptViewer") or [node_id]
        message = {
            "workflow": workflow_id(extra_data.get("extra_pnginfo")),
            "nodes": {n: prompt[n]["class_type"] for n in nodes if n in prompt},
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

    return LiveMaps(send, lambda: PromptServer.instance.client_id in _listening)


def downstream(prompt: dict, start: str, class_type: str) -> list[str]:
    """The nodes of a class that are reached from node ``start`` of a workflow in API format."""
    reached, grown = {start}, True
    while grown:
        more = {
            node_id
            for node_id, node in prompt.items()
            if any(_is_link(v) and v[0] in reached for v in node["inputs"].values())
        }
        grown = not more <= reached
        reached |= more
    return [n for n in prompt if n in reached and prompt[n]["class_type"] == class_type]


def _is_link(value: object) -> bool:
    """Or a list that a widget holds, which ComfyUI has unwrapped by the time the workflow runs."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def add_routes() -> None:
    routes = PromptServer.instance.routes

    @routes.get("/concept_attention/{key}/{image}/{frames}")
    async def recorded(request: web.Request) -> web.Response:
        maps = _views.get(request.match_info["key"])
        if maps is None:
            raise web.HTTPGone(text="The recording is no longer in memory.")
        try:
            packet = await asyncio.to_thread(_packet, maps, **request.match_info)
        except ValueError as error:
            raise web.HTTPNotFound(text=str(error)) from error
        return web.Response(body=packet, content_type="application/octet-stream")

    @routes.post("/concept_attention/live")
    async def live(request: web.Request) -> web.Response:
        wish = await request.json()
        (_listening.add if wish["on"] else _listening.discard)(wish["client_id"])
        return web.Response()


def _packet(maps: ConceptMaps, key: str, image: str, frames: str) -> bytes:
    """Frames of an image: the "layers", the "evaluations", or all evaluations of the layer of a number."""
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
