"""A run's results as tables beside the paper's, plots, and pictures of the best, median and worst cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from .datasets import Dataset
from .metrics import IGNORED, Counts, Scores, miou_interval, resized, scores_of
from .run import main_result, preview_of
from .store import Store, write_json

PAPER_URL = "https://arxiv.org/abs/2502.04320v2"

# Accuracy, mIoU and mAP in percent, from arXiv 2502.04320v2. Tables 1, 3 and 4, ImageNet-Segmentation:
IMAGENET = {
    "methods": {"ConceptAttention": (83.07, 71.04, 90.45), "Flux cross-attention": (74.92, 59.90, 87.23)},
    "spaces": {
        "Output, softmax": (83.07, 71.04, 90.45),
        "Output, no softmax": (78.75, 64.95, 88.39),
        "Cross-attention, softmax": (74.92, 59.90, 87.23),
        "Cross-attention, no softmax": (66.59, 49.91, 73.17),
        "Value, softmax": (45.78, 29.68, 39.61),
        "Value, no softmax": (45.93, 29.81, 65.79),
    },
    "attention": {
        "Image and concepts": (83.07, 71.04, 90.45),
        "Image": (76.51, 61.96, 86.73),
        "Concepts": (51.68, 34.85, 69.36),
        "Neither": (52.63, 35.72, 70.21),
    },
    "clip": {"textspan": (75.21, 54.50, 81.61)},
    "vit": {"transinterp": (79.70, 61.95, 86.03)},
    "dino": {"DINO self-attention": (81.97, 69.44, 86.12)},
}
# Tables 1 (Pascal VOC, single class) and 2 (several classes; no mAP):
VOC = {
    "methods": {"ConceptAttention": (87.85, 76.45, 90.19), "Flux cross-attention": (80.37, 54.77, 89.08)},
    "clip": {"textspan": (75.00, 56.24, 84.79)},
    "vit": {"transinterp": (76.90, 57.08, 86.74)},
    "dino": {"DINO self-attention": (80.71, 64.33, 88.90)},
}
VOC_MULTI = {
    "methods": {"ConceptAttention": (86.99, 51.39, None), "Flux cross-attention": (79.52, 27.04, None)}
}
# Other methods in Table 1, ImageNet-Segmentation then Pascal VOC (single class), and in Table 2:
OTHERS = {
    "imagenet": {
        "TextSpan, CLIP ViT": (75.21, 54.50, 81.61),
        "TransInterp, CLIP ViT": (79.70, 61.95, 86.03),
        "DINO self-attention": (81.97, 69.44, 86.12),
        "DAAM, SDXL": (78.47, 64.56, 88.79),
        "ConceptAttention, SD3.5": (81.92, 67.47, 90.79),
    },
    "voc": {
        "TextSpan, CLIP ViT": (75.00, 56.24, 84.79),
        "TransInterp, CLIP ViT": (76.90, 57.08, 86.74),
        "DINO self-attention": (80.71, 64.33, 88.90),
        "DAAM, SDXL": (72.76, 55.95, 88.34),
        "ConceptAttention, SD3.5": (83.90, 69.93, 90.02),
    },
    "voc-multi": {"TextSpan": (73.84, 38.10, None), "DAAM": (62.89, 10.97, None)},
}
# Which of the paper's numbers stand beside a data set's, and what they are of.
PAPER = {
    "imagenet": (IMAGENET, "paper"),
    "voc": (VOC, "paper"),
    "voc-multi": (VOC_MULTI, "paper"),
}
ELSEWHERE = {False: (IMAGENET, "paper, ImageNet-Segmentation"), True: (VOC_MULTI, "paper, Pascal VOC")}

FIGURES = {"layers": "double-stream block", "levels": "noise level"}
INK = "#262a33"
COLOURS = {"accuracy": "#0072b2", "miou": "#d55e00", "map": "#009e73"}
NAMES = {"accuracy": "accuracy", "miou": "mIoU", "map": "mAP"}


class Results:
    """All results of a run, by method."""

    def __init__(self, store: Store) -> None:
        self.by_image = store.results()
        self.several: bool = store.settings["several"]
        self.groups = [
            (name, title, dict(map(tuple, rows))) for name, title, rows in store.settings["groups"]
        ]
        self.first = next(iter(store.settings["methods"]))
        self._scores: dict[tuple[str, bool], Scores] = {}

    def counts(self, key: str, argmax: bool = False) -> list[Counts]:
        results = (image["results"][key] for image in self.by_image.values())
        return [result["argmax"] if argmax else main_result(result)[0] for result in results]

    def scores(self, key: str, argmax: bool = False) -> Scores:
        if (key, argmax) not in self._scores:
            precisions = [main_result(image["results"][key])[1] for image in self.by_image.values()]
            self._scores[key, argmax] = scores_of(self.counts(key, argmax), precisions)
        return self._scores[key, argmax]


def summary(store: Store) -> str:
    """The scores of the first method, on one line."""
    results = Results(store)
    scores = results.scores(results.first)
    parts = [
        f"{scores.images} images",
        f"accuracy {_percent(scores.accuracy)}",
        f"mIoU {_percent(scores.miou)}",
    ]
    if scores.map is not None:
        parts.append(f"mAP {_percent(scores.map)}")
    return f"{store.settings['data']['name']}: {', '.join(parts)}"


def report(store: Store, dataset: Dataset) -> Path:
    """Write report.md, scores.json and pictures into the run's folder.

    Raises:
        ValueError: the run has no results.
    """
    results = Results(store)
    results.scores(results.first)
    lines = [f"# {dataset.name}: {len(results.by_image)} images", "", *_introduction(store, results), ""]
    scores = {}
    for name, title, rows in results.groups:
        scores[name] = {label: asdict(results.scores(key)) for label, key in rows.items()}
        lines += [f"## {title}", "", *_table(results, dataset.name, name, rows), ""]
        if name in FIGURES and len(rows) > 2:
            _plot(results, rows, FIGURES[name]).savefig(store.folder / f"{name}.png", dpi=150)
            lines += [f"![Scores by {FIGURES[name]}]({name}.png)", ""]
    if others := OTHERS.get(dataset.name):
        lines += ["## Other methods, from the paper", "", *_others(others), ""]
    cases(results, dataset).savefig(store.folder / "cases.png", dpi=100)
    key = "right green, wrong orange" if results.several else "right green, missed blue, wrong orange"
    lines += ["## Best, median and worst images", "", f"Mask: {key}.", ""]
    lines += ["![Images, true masks and maps](cases.png)", ""]
    write_json(store.folder / "scores.json", scores)
    path = store.folder / "report.md"
    path.write_text("\n".join(lines), "utf-8")
    return path


def _introduction(store: Store, results: Results) -> list[str]:
    settings, about = store.settings, store.about
    rule = (
        "the concept with the highest map wins"
        if results.several
        else "a map is cut at its mean; mAP is the mean over images of the average precision"
    )
    lines = [
        f"Models: {settings['models']['models']}, {settings['models']['size']} pixels. Scores at "
        f"{settings['size']} x {settings['size']}, nearest neighbour: {rule}. In percent.",
        "mIoU is the mean over the classes, with pixels counted over all images. In brackets: 95 % of "
        "resamplings of the images; Δ is the difference in mIoU from the table's first row, likewise.",
    ]
    if not results.several:
        lines.append(
            "*Pooled IoU* is how the reference counts on ImageNet-Segmentation, accuracy / (2 - accuracy): "
            "compare this one with the paper's mIoU there (see metrics.py). *Argmax mIoU*: the mask is where "
            "the concept beats all others, as in the reference's script for Pascal VOC."
        )
    lines.append(f"Background concepts: {', '.join(settings['data']['background']) or 'none'}. ")
    versions = ", ".join(f"{name} {version}" for name, version in about.items())
    lines.append(f"Run {store.key}, code {settings['code']}{', ' + versions if versions else ''}.")
    return "\n\n".join(line.strip() for line in lines).split("\n")


def _table(results: Results, dataset: str, name: str, rows: dict[str, str]) -> list[str]:
    numbers, source = PAPER.get(dataset, ELSEWHERE[results.several])
    paper = numbers.get(name, {})
    titles = ["", "accuracy", "mIoU"]
    if not results.several:
        titles += ["mAP", "pooled IoU", "argmax mIoU"]
    if len(rows) > 1:
        titles.append("Δ mIoU")
    if paper:
        titles.append(f"{source}: acc / mIoU{'' if results.several else ' / mAP'}")
    first = next(iter(rows.values()))
    lines = [_row(titles), _row(["---", *["---:"] * (len(titles) - 1)])]
    for label, key in rows.items():
        scores = results.scores(key)
        low, high = miou_interval(results.counts(key))
        cells = [_escaped(label), _percent(scores.accuracy)]
        cells.append(f"{_percent(scores.miou)} [{_percent(low)}, {_percent(high)}]")
        if not results.several:
            cells += [
                _percent(scores.map),
                _percent(scores.pooled_iou),
                _percent(results.scores(key, True).miou),
            ]
        if len(rows) > 1:
            cells.append("" if key == first else _difference(results, key, first))
        if paper:
            cells.append(" / ".join(f"{n:.2f}" for n in paper.get(label, ()) if n is not None))
        lines.append(_row(cells))
    return lines


def _difference(results: Results, key: str, first: str) -> str:
    change = results.scores(key).miou - results.scores(first).miou
    low, high = miou_interval(results.counts(key), results.counts(first))
    return f"{100 * change:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"


def _others(others: dict) -> list[str]:
    lines = [_row(["", "accuracy", "mIoU", "mAP"]), _row(["---", "---:", "---:", "---:"])]
    for label, numbers in others.items():
        lines.append(_row([label, *("" if n is None else f"{n:.2f}" for n in numbers)]))
    return [*lines, "", f"From {PAPER_URL}, Tables 1 and 2."]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _escaped(text: str) -> str:
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|$" else c for c in text)


def _plot(results: Results, rows: dict[str, str], title: str) -> Figure:
    """Scores over the rows that are numbers; the others as lines across."""
    points = sorted((float(label), key) for label, key in rows.items() if _is_number(label))
    across = {label: key for label, key in rows.items() if not _is_number(label)}
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for kind, colour in COLOURS.items():
        if kind == "map" and results.several:
            continue
        values = [100 * getattr(results.scores(key), kind) for _, key in points]
        axes.plot([x for x, _ in points], values, "o-", color=colour, markersize=4, label=NAMES[kind])
    for (label, key), style in zip(across.items(), ("--", ":", "-."), strict=False):
        name = f"{label.lower()}, mIoU"
        axes.axhline(
            100 * results.scores(key).miou, color=COLOURS["miou"], linestyle=style, linewidth=1, label=name
        )
    if all(x == int(x) for x, _ in points):
        axes.set_xticks([x for x, _ in points])
    axes.set_xlabel(title)
    axes.set_ylabel("percent")
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def cases(results: Results, dataset: Dataset, each: int = 2) -> Figure:
    """The best, the median and the worst images by the first method: picture, truth, map, and what was
    right (green), missed (blue) and wrong (orange)."""
    scored = sorted(
        (-scores_of([main_result(image["results"][results.first])[0]], [None]).miou, index)
        for index, image in results.by_image.items()
    )
    each = min(each, len(scored))
    middle = max(0, (len(scored) - each) // 2)
    chosen = {"best": scored[:each], "median": scored[middle : middle + each], "worst": scored[-each:]}
    shown = [(kind, -score, index) for kind, group in chosen.items() for score, index in group]
    figure = Figure(figsize=(8.4, 2.15 * len(shown)), layout="constrained")
    grid = figure.subplots(len(shown), 4, squeeze=False)
    for axes, (kind, score, index) in zip(grid, shown, strict=True):
        _case(axes, results, dataset.load(index), results.by_image[index], f"{kind}: mIoU {100 * score:.1f}")
    for axes, title in zip(grid[0], ("image", "truth", "map", "mask"), strict=True):
        axes.text(0.5, 1.16, title, transform=axes.transAxes, ha="center", color=INK, weight="bold")
    return figure


def _case(row, results: Results, example, result: dict, title: str) -> None:
    size = 224
    map_ = preview_of(result).astype(np.int64)
    labels = resized(example.labels, size)
    if results.several:
        names = list(result["names"])
        numbers = {c: names.index(name) for c, name in example.names.items()}
        truth = np.vectorize(lambda c: numbers.get(int(c), len(names)))(labels)
        mask = np.minimum(resized(map_, size), len(names))
        right = mask == truth
        row[1].imshow(truth, cmap="tab10", vmin=0, vmax=9, interpolation="nearest")
        row[2].imshow(mask, cmap="tab10", vmin=0, vmax=9, interpolation="nearest")
        painted = np.where(right[..., None], (0, 158, 115), (213, 94, 0))
    else:
        truth, mask = labels == 1, resized(map_, size) > map_.mean()
        row[1].imshow(truth, cmap="gray", interpolation="nearest")
        row[2].imshow(map_, cmap="magma", vmin=0, vmax=255, interpolation="nearest")
        painted = np.zeros((size, size, 3), np.int64)
        painted[mask & truth], painted[~mask & truth] = (0, 158, 115), (0, 114, 178)
        painted[mask & ~truth] = (213, 94, 0)
    painted[labels == IGNORED] = 128
    row[0].imshow(example.picture)
    row[3].imshow(painted)
    row[0].set_title(title, fontsize=8, color=INK, loc="left", parse_math=False)
    row[1].set_title(", ".join(result["names"])[:60], fontsize=8, color=INK, loc="left", parse_math=False)
    row[3].set_title(result["id"][-30:], fontsize=8, color=INK, loc="right", parse_math=False)
    for axes in row:
        axes.set_axis_off()
