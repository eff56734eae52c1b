"""Running methods over a data set: a result for each image, kept as it comes."""

from __future__ import annotations

import base64
import hashlib
import io
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ...core.concepts import Concepts
from .datasets import Dataset, Example
from .methods import Query
from .metrics import Tally, above_mean, binary_average_precision, count, resized, unit_range, winners
from .store import Store, key_of
from .sweep import Group

ROOT = Path(__file__).resolve().parents[2]

# What the reference's scripts score at: one class at 224, several on the patches of a 1024 x 1024 image.
SIZES = {False: 224, True: 64}

# Files that results depend on. A change of any of them starts a new run.
CODE = (
    "core/**/*.py",
    "benchmarks/segmentation/datasets.py",
    "benchmarks/segmentation/metrics.py",
    "benchmarks/segmentation/models.py",
    "benchmarks/segmentation/methods/*.py",
    "demo/scenes.py",
    "demo/text_encoder.py",
)


def run(
    dataset: Dataset,
    groups: Sequence[Group],
    models: dict,
    out: Path,
    *,
    shard: tuple[int, int] = (1, 1),
    limit: int | None = None,
    about: dict | None = None,
    progress: bool = True,
) -> Store:
    """Score every method of the groups on every image that has no result yet.

    Args:
        models: the settings of the models.
        shard: (i, n) leaves all images but every n-th from the i-th on to other workers.
        limit: the first so many images of the data set.
        about: what else to write down of the run.
    """
    methods = {key_of(m.settings): m for group in groups for m in group.methods.values()}
    first = next(iter(methods))
    settings = {
        "data": dataset.settings,
        "several": dataset.several,
        "size": SIZES[dataset.several],
        "models": models,
        "methods": {key: method.settings for key, method in methods.items()},
        "groups": [
            [g.name, g.title, [[label, key_of(m.settings)] for label, m in g.methods.items()]] for g in groups
        ],
        "code": code_version(),
    }
    store = Store(out, dataset.name, settings, about)
    indices = range(shard[0] - 1, len(dataset) if limit is None else min(limit, len(dataset)), shard[1])
    tally = Tally()
    with tqdm(indices, desc=dataset.name, unit="image", disable=not progress) as bar:
        for index in bar:
            result = store.read(index)
            if result is None:
                example = dataset.load(index)
                if not example.names:
                    logging.warning("%s shows no class and is left out.", example.id)
                    continue
                result = evaluate(example, dataset, methods)
                store.write(index, result)
            counts, precision = main_result(result["results"][first])
            tally.add(counts, precision)
            scores = tally.scores()
            shown = {"acc": scores.accuracy, "mIoU": scores.miou, "mAP": scores.map}
            bar.set_postfix({k: f"{100 * v:.2f}" for k, v in shown.items() if v is not None})
    return store


def evaluate(example: Example, dataset: Dataset, methods: dict) -> dict:
    """The result of one image: for each method its counts, and the first one's map to look at."""
    names = tuple(dict.fromkeys(example.names.values()))
    concepts = Concepts(names, tuple(name for name in dataset.background if name not in names))
    prompt = ",".join(f"a {name}" for name in names)
    query = Query(example.picture, concepts, prompt, seed_of(dataset.name, example.id))
    size = SIZES[dataset.several]
    labels = resized(example.labels, size)
    classes = [next(c for c, n in example.names.items() if n == name) for name in names]
    results, preview = {}, None
    for key, method in methods.items():
        with torch.inference_mode():
            maps = method(query).float().cpu()
        results[key] = _scored(maps, labels, classes, dataset.several)
        if preview is None:
            preview = maps.argmax(0) if dataset.several else (255 * unit_range(maps[0])).round()
    return {
        "id": example.id,
        "names": list(names),
        "results": results,
        "preview": _png(preview),
    }


def _scored(maps: Tensor, labels: np.ndarray, classes: list[int], several: bool) -> dict:
    size = len(labels)
    everyone = classes + [0] * (len(maps) - len(classes))
    argmax = count(winners(maps, everyone, size), labels)
    if several:
        return {"argmax": argmax}
    precision = binary_average_precision(maps[0], labels)
    return {"mean": count(above_mean(maps[0], size), labels), "argmax": argmax, "ap": precision}


def main_result(result: dict) -> tuple[list, float | None]:
    """The counts by the protocol's own threshold, and the average precision."""
    return result.get("mean", result["argmax"]), result.get("ap")


def seed_of(dataset: str, name: str) -> int:
    """The same for an image in every run and shard."""
    return int(hashlib.sha256(f"{dataset}/{name}".encode()).hexdigest()[:12], 16)


def code_version() -> str:
    digest = hashlib.sha256()
    for pattern in CODE:
        for file in sorted(ROOT.glob(pattern)):
            digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:10]


def _png(map_: Tensor) -> str:
    stream = io.BytesIO()
    Image.fromarray(map_.numpy().astype(np.uint8)).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def preview_of(result: dict) -> np.ndarray:
    """The first method's map (h, w) uint8: the concept's in 0..255, or the index of the winning concept."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(result["preview"]))))
