"""Nodes that stand in for a model and a sampler: a made-up recording, and a run that is listened to."""

from __future__ import annotations

import importlib
import time

import torch
from comfy_api.latest import ComfyExtension, io
from torch.nn import functional as F

import nodes

CONCEPTS = ("dragon", "rock", "sky", "sun", "<img src=x onerror=alert(1)>", "hot air balloon over the sea")
LAYERS, STEPS = 19, 28


def core(module: str):
    """A module of the plugin, which ComfyUI has loaded under a name of its own."""
    package = nodes.NODE_CLASS_MAPPINGS["ConceptViewer"].__module__.rsplit(".nodes.", 1)[0]
    return importlib.import_module(f"{package}.core.{module}")


def scores(batch: int, rows: int, columns: int, steps: int = STEPS, layers: int = LAYERS, seed: int = 0):
    """One (L, B, K, h, w) per step: blobs that become clearer over the steps and differ between layers."""
    g = torch.Generator().manual_seed(seed)
    count = len(CONCEPTS)

    def blobs(size: int, *lead: int) -> torch.Tensor:
        noise = torch.randn(*lead, size, size, generator=g)
        return F.interpolate(noise.reshape(-1, 1, size, size), (rows, columns), mode="bicubic").reshape(
            *lead, rows, columns
        )

    shape, detail = blobs(5, 1, batch, count), blobs(16, layers, batch, count)
    return [
        (6 * shape + detail) * (0.2 + 0.8 * step / steps)
        + 0.2 * torch.randn(layers, batch, count, rows, columns, generator=g)
        for step in range(steps)
    ]


class MadeUpMaps(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestMadeUpMaps",
            inputs=[
                io.Int.Input("batch", default=1),
                io.Int.Input("rows", default=64),
                io.Int.Input("columns", default=64),
                io.Boolean.Input("softmax", default=True),
            ],
            outputs=[io.Custom("CONCEPT_MAPS").Output(), io.Image.Output()],
        )

    @classmethod
    def execute(cls, batch: int, rows: int, columns: int, softmax: bool) -> io.NodeOutput:
        size = rows * 16, columns * 16
        recording = core("recording").Recording(
            concepts=core("concepts").Concepts(CONCEPTS[:-1], CONCEPTS[-1:]),
            layers=tuple(range(LAYERS)),
            default_layers=(15, 16, 17, 18),
            sigmas=tuple(1 - step / STEPS for step in range(STEPS)),
            steps=tuple(range(STEPS)),
            scores={"output": tuple(scores(batch, rows, columns))},
            image_size=size,
            coverage=(1.0, 1.0),
        )
        maps = core("maps").concept_maps(recording, softmax=softmax)
        ramp = torch.stack(torch.meshgrid(*(torch.linspace(0, 1, n) for n in size), indexing="ij"), -1)
        waves = 0.5 + 0.2 * torch.sin(24 * ramp.sum(-1, keepdim=True))
        image = torch.cat([ramp, waves], -1).expand(batch, -1, -1, -1)
        return io.NodeOutput(maps, image)


class MadeUpRun(io.ComfyNode):
    """A run of two seconds that is listened to."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestMadeUpRun",
            inputs=[io.Custom("CONCEPT_MAPS").Input("maps"), io.Int.Input("seed", default=0)],
            outputs=[io.Custom("CONCEPT_MAPS").Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, maps, seed: int) -> io.NodeOutput:
        recording = core("recording")
        recorder = recording.Recorder(
            maps.concepts, (0, 1), (0, 1), torch.linspace(1, 0, 11), 1, (32, 32), (512, 512), (1.0, 1.0)
        )
        package = core("recording").__name__.rsplit(".core.", 1)[0]
        listener = importlib.import_module(f"{package}.nodes.browser").live_maps(cls.hidden.unique_id)
        for made_up in scores(1, 32, 32, steps=10, layers=2):
            evaluation = recorder.evaluation(torch.ones(1))
            recorder.add(
                evaluation, recording.Pass(slice(0, 1), (0, 0), (0, 1), {"output": made_up}, copied=None)
            )
            listener(recorder)
            time.sleep(0.2)
        return io.NodeOutput(maps)


class TestPack(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [MadeUpMaps, MadeUpRun]


async def comfy_entrypoint() -> TestPack:
    return TestPack()
