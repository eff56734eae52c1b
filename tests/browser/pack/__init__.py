"""Nodes that stand in for a model and a sampler: a made-up recording, and a run that is listened to."""

from __future__ import annotations

import importlib
import time

import comfy.model_management
import torch
from comfy_api.latest import ComfyExtension, io

import nodes

from . import made_up


def core(module: str):
    """A module of the plugin, which ComfyUI has loaded under a name of its own."""
    package = nodes.NODE_CLASS_MAPPINGS["ConceptViewer"].__module__.rsplit(".nodes.", 1)[0]
    return importlib.import_module(f"{package}.core.{module}")


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
                io.String.Input("grounding", default="paper"),
                io.String.Input("average", default="after softmax", optional=True),
            ],
            outputs=[io.Custom("CONCEPT_MAPS").Output(), io.Image.Output()],
        )

    @classmethod
    def execute(
        cls,
        batch: int,
        rows: int,
        columns: int,
        softmax: bool,
        grounding: str,
        average: str = "after softmax",
    ) -> io.NodeOutput:
        recording = made_up.recording(
            core("observing.recording").Recording, core("concepts").Concepts, batch, rows, columns
        )
        maps = core("reading.maps").concept_maps(
            recording, softmax=softmax, grounding=grounding, average=average
        )
        axes = (torch.linspace(0, 1, n) for n in recording.image_size)
        ramp = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
        waves = 0.5 + 0.2 * torch.sin(24 * ramp.sum(-1, keepdim=True))
        image = torch.cat([ramp, waves], -1).expand(batch, -1, -1, -1)
        return io.NodeOutput(maps, image)


class MadeUpVideo(io.ComfyNode):
    """Maps of videos, and their frames, which become redder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestMadeUpVideo",
            inputs=[
                io.Int.Input("batch", default=1),
                io.String.Input("durations", default="1, 4, 4"),
                io.Int.Input("rows", default=30),
                io.Int.Input("columns", default=52),
                io.Boolean.Input("softmax", default=True),
                io.String.Input("between_frames", default="linear"),
            ],
            outputs=[io.Custom("CONCEPT_MAPS").Output(), io.Image.Output()],
        )

    @classmethod
    def execute(
        cls, batch: int, durations: str, rows: int, columns: int, softmax: bool, between_frames: str
    ) -> io.NodeOutput:
        numbers = tuple(int(number) for number in durations.split(","))
        recording = made_up.video(
            core("observing.recording").Recording, core("concepts").Concepts, batch, numbers, rows, columns
        )
        axes = (torch.linspace(0, 1, n) for n in recording.image_size)
        y, x = torch.meshgrid(*axes, indexing="ij")
        waves = 0.5 + 0.2 * torch.sin(24 * (x + y))
        frames = [
            torch.stack([torch.full_like(x, t), y, waves], -1) for t in torch.linspace(0, 1, sum(numbers))
        ]
        maps = core("reading.maps").concept_maps(recording, softmax=softmax, between_frames=between_frames)
        return io.NodeOutput(maps, torch.stack(frames * batch))


class MadeUpRun(io.ComfyNode):
    """A run that is listened to, five evaluations a second."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TestMadeUpRun",
            inputs=[
                io.Custom("CONCEPT_MAPS").Input("maps"),
                io.Int.Input("seed", default=0),
                io.Int.Input("evaluations", default=10),
            ],
            outputs=[io.Custom("CONCEPT_MAPS").Output()],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, maps, seed: int, evaluations: int) -> io.NodeOutput:
        recorder_module = core("observing.recorder")
        recorder = recorder_module.Recorder(
            maps.concepts,
            (0, 1),
            (0, 1),
            torch.linspace(1, 0, evaluations + 1),
            1,
            core("geometry").Grid(1, 32, 32),
            (512, 512),
            (1.0, 1.0),
        )
        package = recorder_module.__name__.rsplit(".core.", 1)[0]
        listener = importlib.import_module(f"{package}.nodes.browser").live_maps()
        for scores in made_up.scores(1, 32, 32, steps=evaluations, layers=2):
            evaluation = recorder.evaluation(torch.ones(1))
            recorder.add(
                evaluation,
                recorder_module.Pass(
                    slice(0, 1), core("geometry").Grid(0, 0, 0), (0, 1), {"output": scores[:, :, :, None]}
                ),
            )
            listener(recorder)
            comfy.model_management.throw_exception_if_processing_interrupted()
            time.sleep(0.2)
        return io.NodeOutput(maps)


class TestPack(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [MadeUpMaps, MadeUpVideo, MadeUpRun]


async def comfy_entrypoint() -> TestPack:
    return TestPack()
