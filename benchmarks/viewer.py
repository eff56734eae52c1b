"""What Concept Viewer costs the browser, in a real ComfyUI and Chromium: 6 concepts on 64 x 64 patches, 19
layers, 28 steps, made up.

    COMFYUI_PATH=... python benchmarks/viewer.py

Prints the bytes of a result and of looks into its layers and steps; how long after the result's arrival it is
drawn (aim: under 300 ms); and the longest time for which the page did not answer while somebody dragged over
layers, steps and sliders.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "demo"))

import chromium  # noqa: E402
import comfyui  # noqa: E402

PACK = ROOT / "tests" / "browser" / "pack"
GRAPH = {
    "1": {"class_type": "TestMadeUpMaps", "inputs": {"batch": 1, "rows": 64, "columns": 64, "softmax": True}},
    "2": {
        "class_type": "ConceptViewer",
        "inputs": {"maps": ["1", 0], "image": ["1", 1], "threshold": 0.5, "concept": ""},
    },
}
VIEWER = "app.graph.nodes.find((n) => n.comfyClass === 'ConceptViewer')"
RUN = f"""async () => {{
    const {{ api }} = await import("/scripts/api.js");
    const end = new Promise((resolve) => api.addEventListener("execution_success", resolve));
    await app.queuePrompt(0, 1);
    await end;
    const viewer = {VIEWER};
    viewer.setSize([700, 860]);
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [60 - viewer.pos[0], 60 - viewer.pos[1]];
}}"""
DRAW = f"""async (count) => {{
    const viewer = {VIEWER};
    const pause = () => new Promise((resolve) => setTimeout(resolve, 400));
    const prototype = CanvasRenderingContext2D.prototype;
    const draw = prototype.resetTransform;
    const times = [];
    for (let i = 0; i < count; i++) {{
        await pause();
        const drawn = new Promise((resolve) => {{
            prototype.resetTransform = function () {{
                draw.call(this);
                resolve(performance.now());
            }};
        }});
        const start = performance.now();
        const [view] = app.nodeOutputs[viewer.id].concept_view;
        viewer.onExecuted({{ concept_view: [{{ ...view, key: `${{view.key}}${{i}}` }}] }});
        times.push((await drawn) - start);
        prototype.resetTransform = draw;
    }}
    viewer.onExecuted(app.nodeOutputs[viewer.id]);
    return times;
}}"""
WATCH = """() => {
    window.longest = 0;
    let last = performance.now();
    setInterval(() => {
        const now = performance.now();
        window.longest = Math.max(window.longest, now - last - 5);
        last = now;
    }, 5);
}"""


def main() -> None:
    path = comfyui.find()
    if path is None:
        sys.exit(f"No ComfyUI was found. {comfyui.HELP}")
    browser_path = chromium.find()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        shutil.copytree(PACK, Path(folder, "custom_nodes", "made-up"))
        with comfyui.Server(path, Path(folder)) as server:
            server.post("/settings/Comfy.TutorialCompleted", True)
            browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
            for nodes_2 in (False, True):
                server.post("/settings/Comfy.VueNodes.Enabled", nodes_2)
                page = browser.new_page(viewport={"width": 1400, "height": 1000})
                print("Nodes 2.0" if nodes_2 else "classic canvas")
                _measure(page, server.url)
                page.close()
            browser.close()


def _measure(page: Page, url: str) -> None:
    requests = []
    page.on("requestfinished", lambda request: requests.append(request))
    page.goto(url, wait_until="domcontentloaded")
    page.wait_for_function(
        "window.app?.extensionManager && !!window.LiteGraph?.registered_node_types.ConceptViewer"
    )
    page.evaluate("(graph) => app.loadApiJson(graph, 'viewer')", GRAPH)
    page.evaluate(RUN)
    _settle(page)
    times = page.evaluate(DRAW, 15)
    median, low, high = statistics.median(times), min(times), max(times)
    print(f"  drawn after {median:.0f} ms (median of {len(times)}, {low:.0f} to {high:.0f})")
    page.evaluate(WATCH)
    for name in ("Layers", "Steps", "Opacity", "Threshold"):
        if name == "Steps":
            page.locator(".concept-viewer").get_by_text("Reset").click()
        box = page.locator(".concept-viewer").get_by_label(name, exact=True).bounding_box()
        y = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + 3, y)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] - 3, y, steps=30)
        page.mouse.up()
        _settle(page)
    print(f"  while dragging, the page did not answer for {page.evaluate('window.longest'):.0f} ms at most")
    sizes: dict[str, int] = {}
    for request in requests:
        if _ours(request.url):  # later ones may come from the browser's cache
            sizes.setdefault(request.url, request.sizes()["responseBodySize"])
    for what in (".maps", ".jpg", "/layers", "/evaluations"):
        (size,) = (size for u, size in sizes.items() if what in u)
        print(f"  {what[1:]}: {size / 1000:.0f} KB")
    print(f"  in all: {sum(sizes.values()) / 1e6:.2f} MB")


def _settle(page: Page) -> None:
    page.wait_for_function("document.querySelector('.concept-viewer')?.ariaBusy === 'false'")


def _ours(url: str) -> bool:
    return "filename=concept_viewer_" in url or ("/concept_attention/" in url and "live" not in url)


if __name__ == "__main__":
    main()
