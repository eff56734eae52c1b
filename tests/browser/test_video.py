"""Videos in Concept Viewer, in a real browser, on the real front end and server."""

from __future__ import annotations

import importlib.util
import itertools
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import comfyui as comfyui_setup
from concept_attention.core.concepts import Concepts
from concept_attention.core.observing.recording import Recording
from concept_attention.core.reading.maps import ConceptMaps, concept_maps
from front_end import READY, RUN

HERE = Path(__file__).parent
ROWS, COLUMNS, BATCH = 30, 52, 2
DURATIONS = (1, *[4] * 20)
FRAMES = sum(DURATIONS)
# As in test_viewer.py: in between latent frames the error is no larger.
TOLERANCE = 1 / 510 + 0.0005
AT_ONCE = 5
LABEL = "document.querySelector('.concept-viewer .time output').textContent"
VIEWER = "app.graph.nodes.find((n) => n.comfyClass === 'ConceptViewer')"

spec = importlib.util.spec_from_file_location("made_up", HERE / "pack" / "made_up.py")
made_up = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made_up)


@pytest.fixture(scope="module")
def maps() -> ConceptMaps:
    return concept_maps(made_up.video(Recording, Concepts, BATCH, DURATIONS, ROWS, COLUMNS))


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[comfyui_setup.Server]:
    folder = tmp_path_factory.mktemp("comfyui")
    shutil.copytree(HERE / "pack", folder / "custom_nodes" / "made-up")
    with comfyui_setup.Server(comfyui_setup.find(), folder) as server:
        server.post("/settings/Comfy.TutorialCompleted", True)
        yield server


class Page:
    """The page, the viewer on it, and what was asked for."""

    def __init__(self, page, url: str, complaints: list[str]) -> None:
        self.page, self.complaints = page, complaints
        self.requests = []
        page.on("requestfinished", lambda request: self.requests.append(request))
        page.set_default_timeout(60_000)
        page.goto(url, wait_until="domcontentloaded")
        page.wait_for_function(READY)

    def load(self, *, pictures: bool = True, **inputs: object) -> None:
        """A video, or another made with these ``inputs``, and the result of a run."""
        durations = ", ".join(map(str, DURATIONS))
        size = {"batch": BATCH, "durations": durations, "rows": ROWS, "columns": COLUMNS}
        given = {**size, "softmax": True, "between_frames": "linear"}
        image = {"image": ["1", 1]} if pictures else {}
        graph = {
            "1": {"class_type": "TestMadeUpVideo", "inputs": {**given, **inputs}},
            "2": {
                "class_type": "ConceptViewer",
                "inputs": {"maps": ["1", 0], "threshold": 0.5, "concept": "", **image},
            },
        }
        self.requests.clear()
        self.page.evaluate("(graph) => app.loadApiJson(graph, 'test')", graph)
        self.page.evaluate(
            f"""() => {{
                app.graph.nodes.forEach((node) => (node.pos = [-600, 0]));
                {VIEWER}.pos = [80, 60];
                {VIEWER}.setSize([460, 760]);
                app.canvas.ds.scale = 1;
                app.canvas.ds.offset = [40, 40];
                app.canvas.setDirty(true, true);
            }}"""
        )
        assert self.page.evaluate(RUN).startswith("execution_success")
        self.settle()

    def settle(self) -> None:
        self.page.wait_for_function("document.querySelector('.concept-viewer')?.ariaBusy === 'false'")
        self.page.wait_for_timeout(300)

    @property
    def panel(self):
        return self.page.locator(".concept-viewer").first

    @property
    def canvas(self):
        return self.panel.locator("canvas")

    def button(self, name: str):
        return self.panel.get_by_role("button", name=name, exact=True)

    @property
    def slider(self):
        return self.panel.get_by_role("slider", name="Frame")

    def label(self) -> str:
        """Which frame is said to be shown, of how many."""
        return self.panel.locator(".time output").text_content()

    def wait_for(self, frame: int) -> None:
        """Until this one is shown."""
        text = f"{frame + 1} / {FRAMES}"
        self.panel.locator(".time output", has_text=text).wait_for()
        assert self.label() == text

    def is_playing(self) -> bool:
        """As the button says, after a look at whether frames do follow each other or not."""
        if self.button("Pause").is_visible():
            self.page.wait_for_function(f"(before) => {LABEL} !== before", arg=self.label())
            return True
        self.wait_for(int(self.slider.input_value()))  # the one that was on its way
        before = self.label()
        self.page.wait_for_timeout(400)
        assert self.label() == before
        return False

    def place(self, row: int, column: int) -> tuple[float, float]:
        box = self.canvas.bounding_box()
        x = box["x"] + box["width"] * (column + 0.5) / COLUMNS
        return x, box["y"] + box["height"] * (row + 0.5) / ROWS

    def card(self) -> dict[str, float]:
        """The values that are shown with the pointer on a patch."""
        self.panel.locator(".card").wait_for()
        return {
            line.locator("b").text_content(): float(line.locator("span").text_content())
            for line in self.panel.locator(".card > div").all()
        }

    def point(self, row: int, column: int) -> dict[str, float]:
        self.page.mouse.move(*self.place(row, column))
        return self.card()

    def redness(self) -> float:
        """Of the picture without its maps, 0 in the first and 1 in the last frame."""
        for name, value in (("Opacity", 0), ("Threshold", 1)):
            self.panel.get_by_role("slider", name=name).evaluate(
                "(input, value) => { input.value = value; input.dispatchEvent(new Event('input')) }", value
            )
        self.page.wait_for_timeout(200)
        return self.colour()[0] / 255

    def colour(self) -> list[int]:
        return self.canvas.evaluate(
            """(canvas) => {
                const copy = new OffscreenCanvas(1, 1).getContext("2d");
                copy.drawImage(canvas, -canvas.width / 2, -canvas.height / 2);
                return [...copy.getImageData(0, 0, 1, 1).data];
            }"""
        )

    def scrub(self, *frames: int) -> None:
        """Drag the time bar from frame to frame."""
        box = self.slider.bounding_box()
        thumb = 16
        places = [box["x"] + thumb / 2 + (box["width"] - thumb) * frame / (FRAMES - 1) for frame in frames]
        y = box["y"] + box["height"] / 2
        self.page.mouse.move(places[0], y)
        self.page.mouse.down()
        for x in places[1:]:
            self.page.mouse.move(x, y, steps=6)
        self.page.mouse.up()

    def asked_for(self, part: str) -> list:
        return [request for request in self.requests if part in request.url]

    def pictures(self) -> list:
        return [r for r in self.asked_for("concept_viewer_") if ".jpg" in r.url]


@pytest.fixture(scope="module", params=[False, True], ids=["classic canvas", "Nodes 2.0"])
def page(request, server, browser, complaints_of) -> Iterator[Page]:
    server.post("/settings/Comfy.VueNodes.Enabled", request.param)
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    page = context.new_page()
    yield Page(page, server.url, complaints_of(page))
    context.close()


@pytest.fixture
def video(page) -> Iterator[Page]:
    page.load()
    page.complaints.clear()
    yield page
    page.page.mouse.move(1390, 990)
    assert page.complaints == []


def close_to(
    shown: dict[str, float], maps: ConceptMaps, video: int, frame: int, row: int, column: int
) -> bool:
    values = maps.shown()[video, frame, :, row, column].tolist()
    return shown == pytest.approx(dict(zip(made_up.CONCEPTS, values, strict=True)), abs=TOLERANCE)


def test_values_under_the_pointer_are_those_of_the_frame_that_is_shown(video, maps):
    assert video.label() == f"1 / {FRAMES}"
    first = video.point(12, 30)
    assert close_to(first, maps, 0, 0, 12, 30)
    for frame in (41, 3, FRAMES - 1):
        video.slider.evaluate(
            "(input, frame) => { input.value = frame; input.dispatchEvent(new Event('input')) }", frame
        )
        video.wait_for(frame)
        # What is under a pointer that rests changes with the frame.
        assert close_to(video.card(), maps, 0, frame, 12, 30)
        assert video.card() != first


def test_frames_show_the_map_of_their_latent_frame_if_that_is_held(video, maps):
    video.load(between_frames="hold")
    video.slider.press("ArrowRight")
    video.wait_for(1)
    held = replace(maps, between_frames="hold")
    assert close_to(video.point(12, 30), held, 0, 1, 12, 30)
    assert not close_to(video.card(), maps, 0, 1, 12, 30)


def test_the_picture_is_that_of_the_frame(video):
    assert video.redness() == pytest.approx(0, abs=0.03)
    video.canvas.press("End")
    video.wait_for(FRAMES - 1)
    assert video.redness() == pytest.approx(1, abs=0.03)
    video.canvas.press("Home")
    video.wait_for(0)
    for _ in range(20):
        video.page.keyboard.press("ArrowRight")
    video.wait_for(20)
    assert video.redness() == pytest.approx(0.25, abs=0.03)


def test_the_time_bar_is_scrubbed_with_the_pointer(video, maps):
    video.scrub(0, 70, 40)
    frame = int(video.slider.input_value())
    assert abs(frame - 40) <= 2
    video.wait_for(frame)
    assert close_to(video.point(5, 7), maps, 0, frame, 5, 7)
    assert video.redness() == pytest.approx(frame / (FRAMES - 1), abs=0.03)


def test_it_plays_when_it_is_asked_to_and_begins_again_after_the_last_frame(video):
    assert not video.is_playing()
    video.canvas.press("End")
    video.wait_for(FRAMES - 1)
    video.button("Play").click()
    video.page.wait_for_function(f"() => parseInt({LABEL}) < 70")
    assert video.is_playing()
    video.button("Pause").click()
    assert not video.is_playing()
    frame = int(video.slider.input_value())
    assert video.label() == f"{frame + 1} / {FRAMES}"
    assert video.redness() == pytest.approx(frame / (FRAMES - 1), abs=0.03)


def test_it_plays_forward_and_not_faster_than_16_frames_a_second(video):
    video.load(pictures=False)
    frames = video.page.evaluate(
        """async () => {
            const label = document.querySelector(".concept-viewer .time output");
            const play = document.querySelector(".concept-viewer .time button");
            const shown = [];
            const tell = () => shown.push([performance.now(), parseInt(label.textContent)]);
            const watch = new MutationObserver(tell);
            play.click();
            await new Promise((resolve) => setTimeout(resolve, 600));
            watch.observe(label, { childList: true });
            await new Promise((resolve) => setTimeout(resolve, 2500));
            watch.disconnect();
            play.click();
            return shown;
        }"""
    )
    steps = [(after - before) % FRAMES for (_, before), (_, after) in itertools.pairwise(frames)]
    assert all(0 < step < FRAMES / 2 for step in steps)
    seconds = (frames[-1][0] - frames[0][0]) / 1000
    assert 3 < sum(steps) / seconds < 18


@pytest.mark.parametrize("focused", ["picture", "slider", "chip", "strip"])
def test_keys_go_through_time_wherever_the_viewer_has_focus(video, focused):
    place = {
        "picture": video.canvas,
        "slider": video.slider,
        "chip": video.panel.locator(".chip").nth(1),
        "strip": video.panel.get_by_label("Layers"),
    }[focused]
    place.focus()
    keyboard = video.page.keyboard
    if focused != "chip":  # where Space is a click
        keyboard.press("Space")
        assert video.is_playing()
        keyboard.press("Space")
        assert not video.is_playing()
    if focused == "strip":  # which has these keys itself
        before = video.label()
        keyboard.press("Home")
        assert video.panel.get_by_label("Layers").get_attribute("aria-valuetext") == "Layers 0"
        video.settle()
        assert video.label() == before
        return
    for key, frame in (("End", FRAMES - 1), ("ArrowLeft", FRAMES - 2), ("Home", 0), ("ArrowRight", 1)):
        keyboard.press(key)
        video.wait_for(frame)
    keyboard.press("Home")
    keyboard.press("ArrowLeft")
    video.wait_for(0)


def test_sliders_and_buttons_keep_their_own_keys(video):
    opacity = video.panel.get_by_role("slider", name="Opacity")
    before = float(opacity.input_value())
    opacity.press("ArrowRight")
    assert float(opacity.input_value()) > before
    video.panel.locator(".chip").nth(1).press("Space")
    assert video.panel.locator(".chip").nth(1).get_attribute("aria-pressed") == "true"
    assert not video.is_playing()
    assert video.label() == f"1 / {FRAMES}"
    video.button("Play").press("Space")
    assert video.is_playing()


def test_keys_are_the_graph_s_where_the_viewer_has_no_focus(video):
    video.page.evaluate("() => document.activeElement.blur()")
    for key in ("End", "ArrowRight", "Space"):
        video.page.keyboard.press(key)
    assert video.label() == f"1 / {FRAMES}"
    assert not video.is_playing()
    heard = video.page.evaluate(
        """() => {
            window.heardKeys = [];
            window.hearKey = (event) => window.heardKeys.push(event.key);
            window.addEventListener("keydown", window.hearKey);
        }"""
    )
    video.canvas.press("Space")
    video.page.keyboard.press("Space")
    video.page.keyboard.press("ArrowRight")
    heard = video.page.evaluate(
        "() => (window.removeEventListener('keydown', window.hearKey), window.heardKeys)"
    )
    assert heard == []


def test_the_keyboard_moves_over_the_patches_of_a_frame_with_shift(video, maps):
    video.page.mouse.move(1390, 990)
    video.canvas.press("Shift+ArrowUp")
    video.page.keyboard.press("Shift+ArrowLeft")
    assert close_to(video.card(), maps, 0, 0, ROWS // 2 - 1, COLUMNS // 2 - 1)
    video.page.keyboard.press("ArrowRight")
    video.wait_for(1)
    assert close_to(video.card(), maps, 0, 1, ROWS // 2 - 1, COLUMNS // 2 - 1)
    video.page.keyboard.press("Enter")
    highest = next(iter(video.card()))
    assert video.panel.locator(".chip[aria-pressed=true]").all_text_contents() == [highest]


def test_all_frames_have_one_scale(video, maps):
    video.panel.locator(".chip", has=video.page.get_by_text("sun", exact=True)).click()
    highest = maps.values[: len(DURATIONS), : len(maps.concepts.names)].max().item()
    for key in ("Home", "End"):
        video.canvas.press(key)
        video.page.wait_for_timeout(300)
        assert video.panel.locator(".scale span").all_text_contents() == ["0", f"{highest:.2f}"]


@pytest.mark.parametrize("softmax", [True, False])
def test_other_layers_and_steps_are_looked_at_in_every_frame(video, softmax):
    video.load(softmax=softmax)
    for key in ("Home", "Shift+ArrowRight"):
        video.panel.get_by_label("Layers").press(key)
        video.settle()
    video.panel.get_by_label("Steps").press("End")
    video.settle()
    asked = video.asked_for("/concept_attention/")
    assert [request.url.rpartition("/video/")[2] for request in asked] == [
        "0?layers=0&steps=0,1,2",
        "0?layers=0,1&steps=0,1,2",
        "0?layers=0,1&steps=2",
    ]
    assert all(request.sizes()["responseBodySize"] < 256 * 1024 for request in asked)
    recording = made_up.video(Recording, Concepts, BATCH, DURATIONS, ROWS, COLUMNS)
    expected = concept_maps(recording, layers=[0, 1], steps=[2], softmax=softmax)
    assert close_to(video.point(20, 30), expected, 0, 0, 20, 30)
    video.slider.press("End")
    video.wait_for(FRAMES - 1)
    assert close_to(video.card(), expected, 0, FRAMES - 1, 20, 30)
    video.panel.get_by_text("Reset").click()
    video.settle()
    assert len(video.asked_for("/concept_attention/")) == 3


def test_the_pager_goes_to_the_same_frame_of_the_next_video(video, maps):
    video.slider.press("ArrowRight")
    video.slider.press("ArrowRight")
    video.wait_for(2)
    video.panel.get_by_label("Next image").click()
    video.settle()
    assert video.panel.locator(".pager span").text_content() == "2 / 2"
    assert video.label() == f"3 / {FRAMES}"
    assert close_to(video.point(8, 9), maps, 1, 2, 8, 9)


def test_pictures_are_fetched_when_they_are_about_to_be_shown_and_once(video):
    """At once, with what the node says and its maps, they are less than two megabytes."""
    (packet,) = video.asked_for(".maps")
    assert len(video.pictures()) == AT_ONCE
    message = video.page.evaluate(f"JSON.stringify(app.nodeOutputs[{VIEWER}.id]).length")
    at_once = [r.sizes()["responseBodySize"] for r in (packet, *video.pictures())]
    assert message + sum(at_once) < 2e6
    video.slider.press("End")
    video.wait_for(FRAMES - 1)
    video.settle()
    assert len(video.pictures()) == AT_ONCE + 1
    video.canvas.focus()
    video.page.keyboard.press("Space")
    for _ in range(2):
        video.page.wait_for_function(f"() => parseInt({LABEL}) > {FRAMES - 10}")
        video.page.wait_for_function(f"() => parseInt({LABEL}) < {FRAMES - 10}")
    video.page.keyboard.press("Space")
    urls = [request.url for request in video.pictures()]
    assert len(urls) == len(set(urls)) <= FRAMES


def test_a_picture_that_does_not_arrive_stops_it_where_it_is(video):
    video.page.evaluate(
        """async () => {
            const { api } = await import("/scripts/api.js");
            api.fetchApi = async () => { throw new TypeError("Failed to fetch") };
        }"""
    )
    video.canvas.focus()
    video.page.keyboard.press("Space")
    video.panel.get_by_text("The maps did not arrive. Is ComfyUI still running?").wait_for()
    video.page.evaluate("async () => { delete (await import('/scripts/api.js')).api.fetchApi }")
    assert video.button("Play").is_visible()
    assert int(video.label().split()[0]) <= AT_ONCE
    video.canvas.press("End")
    video.wait_for(FRAMES - 1)


def test_maps_without_pictures_play_too(video, maps):
    video.load(pictures=False)
    video.canvas.press("End")
    video.wait_for(FRAMES - 1)
    assert close_to(video.point(12, 30), maps, 0, FRAMES - 1, 12, 30)
    video.button("Play").click()
    assert video.is_playing()
    video.button("Pause").click()


def test_an_image_has_no_time_bar_and_its_keys(video):
    video.load(batch=1, durations="1")
    assert not video.panel.locator(".time").is_visible()
    video.page.mouse.move(1390, 990)
    video.canvas.press("ArrowUp")
    assert video.card()
