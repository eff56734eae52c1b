"""Leaves a ComfyUI running for a browser, with the example workflows made over for the demo model."""

from __future__ import annotations

import json
import re
import signal
import urllib.parse

import comfyui
import workflow
from scenes import save_example

WORKFLOWS = comfyui.ROOT / "example_workflows"
OPENED = "1. Find concepts in a new picture"  # it has the viewer
WITHOUT_MODEL = "5. Cut a concept out with SAM3"
# A custom node that brings workflows and no nodes.
SOURCE = "concept-attention-demo-workflows"


def serve(server: comfyui.Server, own: dict[str, workflow.Scene]) -> None:
    """Until Ctrl-C.

    Args:
        own: what is asked for in place of ``workflow.SCENES``, by the name of the workflow.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = server.folder / "custom_nodes" / SOURCE
    templates = folder / "example_workflows"
    templates.mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}\n")
    save_example(server.folder / "input")
    try:
        with server:
            definitions = server.get("/object_info")
            for name, scene in {**workflow.SCENES, **own}.items():
                if name == WITHOUT_MODEL:
                    continue
                content = workflow.swap(json.loads((WORKFLOWS / f"{name}.json").read_text("utf-8")))
                content = workflow.with_scene(content, scene, definitions)
                (templates / f"{_plain(name)}.json").write_text(json.dumps(content), "utf-8")
            server.post("/settings/Comfy.TutorialCompleted", True)
            address = (
                f"{server.url}/?{urllib.parse.urlencode({'template': _plain(OPENED), 'source': SOURCE})}"
            )
            print(
                f"Open this in a browser, and run the workflow:\n\n    {address}\n\n"
                f"More workflows for the demo model: Workflow > Browse Templates > {SOURCE}.\n"
                "Ctrl-C ends it.",
                flush=True,
            )
            server.wait()
    except KeyboardInterrupt:
        print("ComfyUI has ended.")


def _plain(name: str) -> str:
    """A name as the front end takes it from an address."""
    return re.sub(r"\W+", "_", name)
