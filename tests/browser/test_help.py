"""What users find on ComfyUI's page: nodes by the words that they search for, and the nodes' help."""

from __future__ import annotations

import pytest

from front_end import READY

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
