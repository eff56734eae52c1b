"""``python -m benchmarks.segmentation``: the plugin becomes importable the way ComfyUI names it."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    sys.path.append(str(ROOT / "demo"))
    import_module("comfyui").name_plugin()
    import_module("concept_attention.benchmarks.segmentation.cli").main()
