"""``nox -s demo -- --serve``, as its user meets it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

import comfyui as comfyui_setup
from front_end import RUN

PROMPT, CONCEPTS = "a boat on the water", "boat, water"
SERVE = [sys.executable, "demo/run.py", "--serve", "--prompt", PROMPT, "--concepts", CONCEPTS]
VALUES = """() => app.graph.nodes.flatMap((node) => (node.widgets ?? []).map((widget) => widget.value))"""
COLOURS = """(canvas) => {
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return new Set(new Uint32Array(data.buffer)).size;
}"""


@pytest.fixture
def demo() -> Iterator[subprocess.Popen]:
    process = subprocess.Popen(SERVE, cwd=comfyui_setup.ROOT, stdout=subprocess.PIPE, text=True)
    yield process
    process.terminate()
    process.communicate()


def test_the_served_demo_opens_runs_and_ends(demo, browser, complaints_of):
    address = next(match[0] for line in demo.stdout if (match := re.search(r"http://\S+", line)))
    page = browser.new_page(viewport={"width": 1800, "height": 1000})
    page.set_default_timeout(60_000)
    complaints = complaints_of(page)
    page.goto(address, wait_until="domcontentloaded")
    page.wait_for_function("window.app?.graph?.nodes?.some((node) => node.type === 'ConceptViewer')")
    assert {PROMPT, CONCEPTS} <= set(page.evaluate(VALUES))
    assert page.evaluate(RUN).startswith("execution_success")
    panel = page.locator(".concept-viewer")
    panel.get_by_text("water").wait_for()
    assert panel.locator("canvas").evaluate(COLOURS) > 1000
    assert complaints == []
    page.close()

    demo.send_signal(signal.SIGINT)
    assert demo.wait(30) == 0
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(address)
