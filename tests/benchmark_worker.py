"""A worker of the evaluation with a made-up method, as a process of its own that can be killed."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Brightness:
    """Maps from the picture and the query's seed. Pixels are as bright as the first concept is present."""

    settings = {"method": "brightness"}

    def __call__(self, query):
        import torch

        grey = torch.from_numpy(query.picture[::8, ::8].copy()).float().mean(-1)
        noise = torch.rand(
            len(query.concepts.all), *grey.shape, generator=torch.Generator().manual_seed(query.seed)
        )
        return torch.stack([grey / 255 + i / 9 for i in range(len(noise))]) + noise


def work(out: Path, shard: tuple[int, int], limit: int):
    from concept_attention.benchmarks.segmentation import datasets
    from concept_attention.benchmarks.segmentation.run import run
    from concept_attention.benchmarks.segmentation.sweep import Group

    data = datasets.scenes(several=True)
    groups = [Group("methods", "Result", {"Brightness": Brightness()})]
    return data, run(
        data, groups, {"models": "none", "size": 0}, out, shard=shard, limit=limit, progress=False
    )


if __name__ == "__main__":
    sys.path.append(str(ROOT / "demo"))
    import_module("comfyui").name_plugin()
    work(Path(sys.argv[1]), (int(sys.argv[2]), int(sys.argv[3])), int(sys.argv[4]))
