"""Results on disk: a folder for each run, a file for each image.

A run's folder is named after a hash of all that its results depend on, so that a continued run never
mixes results of different settings, and workers on different shards of one run share a folder. Files
appear whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path


class Store:
    """The results of one run.

    Args:
        out: where the runs' folders are.
        name: what the folder's name starts with.
        settings: all that the results depend on; JSON.
        about: what else is worth knowing of the run, of its first worker; JSON.
    """

    def __init__(self, out: Path, name: str, settings: dict, about: dict | None = None) -> None:
        self.key = key_of(settings)
        self.folder = out / f"{name}-{self.key}"
        self.settings = settings
        self._images = self.folder / "images"
        self._images.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "run.json").exists():
            write_json(self.folder / "run.json", {"settings": settings, "about": about or {}})

    @classmethod
    def open(cls, folder: Path) -> Store:
        """The store of an existing run's folder.

        Raises:
            ValueError: there is no run in it.
        """
        try:
            run = json.loads((folder / "run.json").read_text("utf-8"))
            settings = run["settings"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f'"{folder}" holds no run: its run.json is missing or damaged ({error}). '
                "Give the folder that `run` or `sweep` wrote to with --out."
            ) from None
        store = cls.__new__(cls)
        store.key, store.folder, store.settings = key_of(settings), folder, settings
        store._images = folder / "images"
        return store

    @property
    def about(self) -> dict:
        return json.loads((self.folder / "run.json").read_text("utf-8"))["about"]

    def read(self, index: int) -> dict | None:
        """The result of the image with this index in the data set, if it is there and whole."""
        path = self._path(index)
        try:
            return json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            logging.warning("%s is damaged and will be made again.", path)
            return None

    def write(self, index: int, result: dict) -> None:
        write_json(self._path(index), result)

    def results(self) -> dict[int, dict]:
        """All results, by index, in the data set's order."""
        found = {}
        for path in sorted(self._images.glob("*.json")):
            result = self.read(int(path.stem))
            if result is not None:
                found[int(path.stem)] = result
        return found

    def _path(self, index: int) -> Path:
        return self._images / f"{index:06d}.json"


def key_of(settings: dict) -> str:
    text = json.dumps(settings, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def write_json(path: Path, value: object) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")), "utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
