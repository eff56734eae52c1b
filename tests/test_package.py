"""What is installed with the plugin."""

from __future__ import annotations

import json
import re

import pytest

import comfyui

PROJECT = (comfyui.ROOT / "pyproject.toml").read_text("utf-8")


def test_comfyui_manager_installs_what_the_project_depends_on():
    """It reads requirements.txt and knows nothing of pyproject.toml."""
    declared = json.loads(re.search(r"^dependencies = (\[.*\])$", PROJECT, re.MULTILINE)[1])
    assert (comfyui.ROOT / "requirements.txt").read_text("utf-8").split() == declared


def test_what_the_plugin_runs_on_is_shipped_to_the_registry():
    left_out = (comfyui.ROOT / ".comfyignore").read_text("utf-8").splitlines()
    shipped = {
        path.name
        for path in comfyui.ROOT.iterdir()
        if f"/{path.name}" not in left_out and f"/{path.name}/" not in left_out
    }
    needed = {"__init__.py", "core", "nodes", "web", "locales", "example_workflows", "requirements.txt"}
    assert needed | {"LICENSE", "README.md", "pyproject.toml"} <= shipped


def test_a_browser_is_brought_only_where_there_is_none(monkeypatch, tmp_path):
    pytest.importorskip("playwright", reason="the pages are tested with playwright")
    import chromium

    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", str(tmp_path / "playwright"))
    monkeypatch.setattr(chromium, "START", tmp_path / "start")
    assert chromium.find() is None
    chromium.START.touch()
    assert chromium.find() == str(tmp_path / "start")
    (tmp_path / "google-chrome").touch(0o755)
    assert chromium.find() == str(tmp_path / "google-chrome")
    monkeypatch.setenv("CHROMIUM", "/some/where/else")
    assert chromium.find() == "/some/where/else"
