"""``python benchmarks/overhead/plot.py out/overhead/results.json FILE.png``: how the overhead grows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image

plt.switch_backend("agg")
plt.rcParams |= {"font.size": 9}

MEASURES = {
    "traffic, %": "memory traffic, % more",
    "FLOPs, %": "FLOPs, % more",
    "extra peak, MiB": "peak memory, MiB more",
}
AXES = {
    "concepts": "concepts K",
    "patches": "patches N",
    "last layer": "layers recorded, from the first on",
    "batch": "batch",
}


def main(results: Path, picture: Path) -> None:
    rows = json.loads(results.read_text())["growth"]
    figure, panels = plt.subplots(len(MEASURES), len(AXES), figsize=(11, 7.5), sharey="row", squeeze=False)
    for line, (measure, label) in zip(panels, MEASURES.items(), strict=True):
        for panel, (changed, axis) in zip(line, AXES.items(), strict=True):
            points = [row for row in rows if row["changed"] == changed]
            for name, colour in (("ours", "#0b6e99"), ("reference's", "#c2571a")):
                values = [row[f"{name}, {measure}"] for row in points]
                panel.plot([row["to"] for row in points], values, "o-", ms=3, color=colour, label=name)
            panel.grid(alpha=0.25)
            panel.set_xlabel(axis)
        line[0].set_ylabel(label)
        line[0].set_ylim(bottom=0)  # of the whole line, once all of it is drawn
    panels[0][0].legend(frameon=False, labels=["Concept Attention", "the reference's algorithm"])
    figure.tight_layout()
    figure.savefig(picture, dpi=90)
    with Image.open(picture) as image:
        image.quantize(64).save(picture, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
