from __future__ import annotations

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from .browser import add_routes
from .concept_attention import ConceptAttention
from .concept_attention_image import ConceptAttentionImage
from .concept_figure import ConceptFigure
from .concept_files import ConceptMapsLoad, ConceptMapsSave
from .concept_mask import ConceptMask
from .concept_overlay import ConceptOverlay
from .concept_saliency import ConceptSaliency
from .concept_saliency_clip_vision import ConceptSaliencyClipVision
from .concept_segmentation import ConceptSegmentation
from .concept_viewer import ConceptViewer


class ConceptAttentionExtension(ComfyExtension):
    @override
    async def on_load(self) -> None:
        add_routes()

    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            ConceptAttention,
            ConceptAttentionImage,
            ConceptSaliency,
            ConceptSaliencyClipVision,
            ConceptMask,
            ConceptSegmentation,
            ConceptOverlay,
            ConceptFigure,
            ConceptMapsSave,
            ConceptMapsLoad,
            ConceptViewer,
        ]


async def comfy_entrypoint() -> ConceptAttentionExtension:
    return ConceptAttentionExtension()
