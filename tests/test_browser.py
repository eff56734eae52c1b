"""What the server tells a page, and what it lets a page ask for."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from server import PromptServer

import nodes
from concept_attention.core.drawing.transport import layer_means, pack, video_mean
from concept_attention.core.reading.maps import concept_maps
from concept_attention.nodes import browser
from concept_attention.nodes.browser import showing
from recordings import recording

CA, VIEWER = "ConceptAttention", "ConceptViewer"


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


@pytest.fixture(autouse=True)
def packs(monkeypatch):
    """Nodes of other packs: a bundle that holds a model, and an output of a type that is no text."""
    bundle = SimpleNamespace(RETURN_TYPES=("BASIC_PIPE", ["euler", "ddim"]))
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "ToBundle", bundle)


LOADERS = {"9": node("UNETLoader", unet_name="flux"), "8": node("DualCLIPLoader")}
PLAIN = {
    **LOADERS,
    "1": node(CA, model=["9", 0], clip=["8", 0]),
    "2": node("KSampler", model=["1", 0], latent_image=["7", 0]),
    "7": node("EmptyLatentImage"),
}


def test_the_viewers_that_maps_will_reach_show_them():
    prompt = {
        **PLAIN,
        "3": node("ConceptSaliency", latent=["2", 0]),
        "4": node(VIEWER, maps=["3", 0]),
        "5": node(VIEWER, maps=["6", 0]),
        "6": node("ConceptMapsLoad", file="other"),
    }
    assert showing(prompt, "2") == ["4"]


def test_without_a_viewer_the_node_that_observes_shows_them():
    assert showing(PLAIN, "2") == ["1"]


def test_in_a_subgraph_nodes_have_the_ids_of_the_run():
    prompt = {
        "9": LOADERS["9"],
        "5:1": node(CA, model=["9", 0]),
        "5:2": node("KSampler", model=["5:1", 0]),
    }
    assert showing(prompt, "5:2") == ["5:1"]


def test_two_equal_branches_are_told_apart():
    prompt = {**PLAIN, "11": node(CA, model=["9", 0], clip=["8", 0]), "12": node("KSampler", model=["11", 0])}
    assert showing(prompt, "2") == ["1"]
    assert showing(prompt, "12") == ["11"]


def test_a_second_sampler_shows_its_own_concepts_and_not_those_of_the_first():
    second = node("KSampler", model=["11", 0], latent_image=["2", 0], positive=["13", 0])
    prompt = {
        **PLAIN,
        "11": node(CA, model=["9", 0]),
        "12": second,
        "13": node("CLIPTextEncode", clip=["14", 1]),
        "14": node("LoraLoader", model=["1", 0], clip=["8", 0]),
    }
    assert showing(prompt, "12") == ["11"]
    assert showing(prompt, "2") == ["1"]


def test_the_model_may_come_through_other_nodes_and_inside_a_guider_or_a_bundle():
    prompt = {
        **PLAIN,
        "3": node("LoraLoaderModelOnly", model=["1", 0]),
        "4": node("BasicGuider", model=["3", 0]),
        "5": node("SamplerCustomAdvanced", guider=["4", 0], latent_image=["7", 0]),
        "6": node("ToBundle", model=["3", 0]),
        "10": node("Unknown", pipe=["6", 0]),
    }
    assert showing(prompt, "5") == ["1"]
    assert showing(prompt, "10") == ["1"]


def test_of_two_nodes_in_a_row_the_last_one_counts():
    prompt = {**PLAIN, "1": node(CA, model=["3", 0]), "3": node(CA, model=["9", 0])}
    assert showing(prompt, "2") == ["1"]


def test_a_sampler_whose_model_is_observed_out_of_sight_shows_them_itself():
    """A node that expands into others while it runs is in the workflow; those are not."""
    assert showing({"2": node("Expands", model=["9", 0]), **LOADERS}, "2") == ["2"]
    assert showing(PLAIN, "gone") == []


def test_lists_that_a_widget_holds_are_no_links():
    lists = {"points": [[1, 2], [3, 4]], "none": [], "pair": [1, 2], "names": ["9", "8"], "other": ["99", 0]}
    prompt = {"2": node("KSampler", **lists), "9": LOADERS["9"], "8": LOADERS["8"]}
    assert showing(prompt, "2") == ["2"]


@pytest.fixture
def page(monkeypatch):
    """Gives the status of the answer to a wish, and status and content of that to a question. The page "here"
    is connected."""
    fake = SimpleNamespace(routes=web.RouteTableDef(), sockets={"here": None}, client_id="here")
    monkeypatch.setattr(PromptServer, "instance", fake, raising=False)
    monkeypatch.setattr(browser, "_listening", set())
    browser.add_routes()

    async def answer(method: str, path: str, **content) -> tuple[int, bytes]:
        app = web.Application(client_max_size=10**8)
        app.add_routes(fake.routes)
        async with TestClient(TestServer(app)) as client:
            answer = await client.request(method, f"/concept_attention/{path}", **content)
            return answer.status, await answer.read()

    page = SimpleNamespace(sockets=fake.sockets)
    page.say = lambda body, headers=None: asyncio.run(answer("POST", "live", data=body, headers=headers))[0]
    page.ask = lambda path: asyncio.run(answer("GET", path))
    return page


def test_a_page_asks_for_the_mean_of_layers_and_steps_in_all_latent_frames_of_a_video(page):
    maps = concept_maps(replace(recording(batch=6), durations=(1, 4, 4)))
    key = browser.publish(maps)
    expected = pack(video_mean(maps, 1, [0, 5], [1, 2]))
    assert page.ask(f"{key}/video/1?layers=0,5&steps=1,2") == (200, expected)
    latent_frame = pack(layer_means(maps, 4))
    assert page.ask(f"{key}/4/layers") == (200, latent_frame)


@pytest.mark.parametrize(
    "path",
    [
        "video/2?layers=0&steps=0",
        "video/-1?layers=0&steps=0",
        "video/0",
        "video/0?layers=&steps=0",
        "video/0?layers=0&steps=9",
        "video/0?layers=17&steps=0",
        "video/0?layers=a&steps=0",
        f"video/{'9' * 5000}?layers=0&steps=0",
        "6/layers",
        "0/none",
    ],
)
def test_what_was_not_recorded_is_not_found(page, path):
    maps = concept_maps(replace(recording(batch=6), durations=(1, 4, 4)))
    status, _ = page.ask(f"{browser.publish(maps)}/{path}")
    assert status == 404


def test_maps_that_are_no_longer_in_memory_are_gone(page):
    assert page.ask("other/video/0?layers=0&steps=0")[0] == 410
    assert page.ask("other/0/layers")[0] == 410


def test_a_page_is_listened_to_until_it_says_otherwise(page):
    assert page.say(b'{"client_id": "here", "on": true}') == 200
    assert browser._listening == {"here"}
    assert page.say(b'{"client_id": "here", "on": false}') == 200
    assert browser._listening == set()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[]",
        b"7",
        b"[" * 500,
        b'{"client_id": "here"}',
        b'{"on": true}',
        b'{"client_id": "here", "on": "yes"}',
        b'{"client_id": "gone", "on": true}',
        b'{"client_id": ["here"], "on": true}',
        b'{"client_id": {}, "on": true}',
        b'{"client_id": null, "on": true}',
        b'{"client_id": "here", "on": true}' + b" " * 5_000_000,
    ],
    ids=lambda body: f"{len(body)} bytes {body[:40]!r}",
)
def test_a_wish_that_is_none_is_refused_and_leaves_nothing(page, body):
    assert page.say(body) == 400
    assert page.say(body, {"Content-Type": "text/plain; charset=none"}) == 400
    assert browser._listening == set()


def test_a_page_that_has_left_is_forgotten(page):
    for client in map(str, range(20)):
        page.sockets[client] = None
        assert page.say(f'{{"client_id": "{client}", "on": true}}'.encode()) == 200
        del page.sockets[client]
    page.say(b'{"client_id": "here", "on": true}')
    assert browser._listening == {"here"}
