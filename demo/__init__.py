"""The demo's text encoder as a node. Only the servers of ``comfyui.Server`` load this folder as a node pack;
the plugin itself does not import it."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .text_encoder import load_text_encoder

FILE = Path(__file__).with_name("text_encoder.safetensors")


class ConceptDemoTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptDemoTextEncoder",
            display_name="Load Demo Text Encoder",
            category="Concept Attention/demo",
            description="The text encoder of Concept Attention's small demo model.",
            inputs=[],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(load_text_encoder(FILE))


class ConceptAttentionDemo(ComfyExtension):
    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [ConceptDemoTextEncoder]


async def comfy_entrypoint() -> ConceptAttentionDemo:
    return ConceptAttentionDemo()
