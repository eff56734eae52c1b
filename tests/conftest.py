"""Loads ComfyUI and, the way ComfyUI does, this plugin, under the name ``concept_attention``."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "demo"))

import comfyui as comfyui_setup  # noqa: E402

COMFYUI = comfyui_setup.find()
if COMFYUI is None:
    raise RuntimeError(f"No ComfyUI was found. {comfyui_setup.HELP}")

sys.path.insert(0, str(COMFYUI))
# Before anything of ComfyUI 0.18 puts another module called utils in its place.
import utils.install_util  # noqa: E402, F401

_argv, sys.argv = sys.argv, ["main.py", "--cpu", "--disable-api-nodes"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.cli_args  # noqa: E402

sys.argv = _argv
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _load_plugin() -> None:
    spec = importlib.util.spec_from_file_location("concept_attention", ROOT / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["concept_attention"] = module
    spec.loader.exec_module(module)


_load_plugin()

import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-docs", action="store_true", help="write docs/models.md anew")


@pytest.fixture(autouse=True)
def _inference_mode():
    """ComfyUI executes nodes in inference mode."""
    with torch.inference_mode():
        yield
