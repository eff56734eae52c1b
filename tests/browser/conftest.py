"""A server and a browser for the tests of a module, and an ear for what goes wrong on a page."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import comfyui as comfyui_setup

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[comfyui_setup.Server]:
    with comfyui_setup.Server(comfyui_setup.find(), tmp_path_factory.mktemp("comfyui")) as server:
        server.post("/settings/Comfy.TutorialCompleted", True)
        yield server


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="the pages are tested with playwright")
    path = pytest.importorskip("chromium").find()
    if path is None:
        pytest.skip("no Chromium: install it, or set CHROMIUM to its path")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class Complaints(list[str]):
    """Errors of a page, and what its console says of this plugin."""

    def __init__(self, page) -> None:
        super().__init__()
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.append(str(error)))
        page.on("dialog", self._answer)

    def _hear(self, message) -> None:
        ours = "concept" in message.location.get("url", "") or "concept" in message.text.lower()
        if message.type in ("error", "warning") and ours:
            self.append(message.text)

    def _answer(self, dialog) -> None:
        if dialog.type != "beforeunload":
            self.append(dialog.message)
        dialog.accept()


@pytest.fixture(scope="session")
def complaints_of() -> type[Complaints]:
    return Complaints
