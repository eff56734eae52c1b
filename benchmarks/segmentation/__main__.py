"""``python -m benchmarks.segmentation``: the plugin becomes importable the way ComfyUI names it."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]

if __name__ == "__main__":
    package = ModuleType("concept_attention")
    package.__path__ = [str(ROOT)]
    sys.modules["concept_attention"] = package
    sys.path.append(str(ROOT / "demo"))
    import_module("concept_attention.benchmarks.segmentation.cli").main()
