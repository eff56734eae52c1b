"""What users find on ComfyUI's page: nodes by the words that they search for, and the nodes' help."""

from __future__ import annotations

import pytest

import comfyui as comfyui_setup
from front_end import READY

DOCS = comfyui_setup.ROOT / "web" / "docs"
# Names and search aliases. The names that the page searches are those of its language, here English.
FOUND = {
    "Concept Attention": [
        *("cross attention", "find object", "detect", "clipseg", "regional", "explain", "xai", "daam"),
        *(
            "text to mask",
            "mask from prompt",
            "히트맵",
            "ヒートマップ",
            "热力图",
            "객체 찾기",
            "物体検出",
            "目标检测",
        ),
    ],
    "Concept Attention (Image)": ["find object", "existing image", "explain", "어텐션 맵", "目标检测"],
    "Concept Saliency": ["heatmap", "cross attention", "xai", "히트맵", "ヒートマップ", "热力图", "可解释性"],
    "Concept Mask": ["mask from prompt", "text to mask", "clipseg", "detect", "regional", "마스크", "蒙版"],
    "Concept Segmentation": ["segmentation", "legend", "분할", "領域分割", "语义分割"],
    "Concept Overlay": ["heatmap", "히트맵", "ヒートマップ", "热力图"],
    "Concept Figure": ["plot", "히트맵", "ヒートマップ", "热力图"],
    "Concept Viewer": ["heatmap", "explain", "히트맵", "ヒートマップ", "热力图"],
}


@pytest.fixture(scope="module")
def page(browser, server, complaints_of):
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    complaints = complaints_of(page)
    page.set_default_timeout(60_000)
    page.goto(server.url, wait_until="domcontentloaded")
    page.wait_for_function(READY)
    page.evaluate("() => app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    yield page
    page.close()
    assert not complaints


@pytest.mark.parametrize("node, words", [(node, words) for node, all_ in FOUND.items() for words in all_])
def test_a_search_for_what_a_node_does_finds_it(page, node, words):
    box, found = page.get_by_placeholder("Add a node"), page.get_by_role("option")
    box.fill("no such node")
    found.first.wait_for(state="detached")
    box.fill(words)
    found.first.wait_for()
    names = found.evaluate_all("(options) => options.map((option) => option.innerText.split('\\n')[0])")
    assert node in names


@pytest.mark.parametrize("language", ["ja", "fr"])
def test_the_help_of_every_node_is_in_the_users_language_or_else_in_english(browser, server, language):
    server.post("/settings/Comfy.Locale", language)
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    page.set_default_timeout(20_000)
    page.goto(server.url, wait_until="domcontentloaded")
    page.wait_for_function(READY)
    page.wait_for_timeout(1500)  # until it has opened a workflow
    for english in sorted(DOCS.glob("*.md")):
        translated = DOCS / english.stem / f"{language}.md"
        text = (translated if translated.exists() else english).read_text("utf-8")
        page.evaluate(
            """(type) => {
                app.graph.clear();
                const node = LiteGraph.createNode(type);
                node.pos = [500, 300];
                app.graph.add(node);
                app.canvas.selectNode(node);
                app.canvas.setDirty(true, true);
            }""",
            english.stem,
        )
        page.wait_for_timeout(300)
        if not page.locator(".node-help-content").count():
            page.get_by_test_id("info-button").click()
        shown = page.locator(".node-help-content")
        shown.get_by_text(text.splitlines()[0]).wait_for()
        assert "**" not in shown.inner_text()
        assert shown.locator("img").count() == text.count("](" + english.stem)
        assert shown.locator("strong").count() == text.count("**") / 2
    page.close()
    server.post("/settings/Comfy.Locale", "en")
