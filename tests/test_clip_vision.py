"""Concept Saliency (CLIP Vision): pairs of towers, and what is made of them."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import comfy.sd
import comfy.supported_models_base
import comfy.utils
import pytest
import torch
from comfy import sd1_clip
from comfy.clip_vision import ClipVisionModel
from safetensors.torch import save_file
from tiny_clip_vision import CONFIG, GOLDEN, SHAPE, WIDTH, clip_vision, text_encoder, weights
from tiny_encoders import ENCODERS, clip_of, tiny_clip
from torch.nn import functional as F

import comfyui
from concept_attention.core.concepts import Concepts
from concept_attention.core.drawing.transport import layer
from concept_attention.core.explaining import clip as clip_module
from concept_attention.core.explaining.clip import (
    METHODS,
    TEMPLATES,
    TEXTLESS,
    concept_vector,
    explain,
    matching_text_tower,
    text_vectors,
    vision_tower,
)
from concept_attention.core.reading.files import load_maps, save_maps
from concept_attention.nodes.concept_mask import ConceptMask
from concept_attention.nodes.concept_overlay import ConceptOverlay
from concept_attention.nodes.concept_saliency import ConceptSaliency
from concept_attention.nodes.concept_saliency_clip_vision import ConceptSaliencyClipVision
from concept_attention.nodes.concept_segmentation import ConceptSegmentation
from golden_files import off

CONCEPTS = Concepts(("dog", "cat", "grass"), ("sky",))


def picture(count: int = 1, size: tuple[int, int] = (48, 80)) -> torch.Tensor:
    return torch.rand(count, *size, 3, generator=torch.Generator().manual_seed(1))


def golden_picture() -> torch.Tensor:
    return GOLDEN["inputs.picture"].movedim(1, -1)


def test_the_vision_tower_gives_the_embedding_that_comfyui_gives():
    tower = vision_tower(clip_vision())
    pixels = clip_module.preprocessed(clip_vision(), golden_picture())[0]
    assert off(pixels, GOLDEN["inputs.pixels"]) < 1e-6
    ours = tower.projection @ tower.vit(pixels).cls
    assert off(ours, clip_vision().encode_image(golden_picture())["image_embeds"]) < 1e-5
    assert off(ours, GOLDEN["expected.image_embeds"]) < 1e-5


def test_a_concept_is_the_mean_direction_of_its_texts():
    names = comfy.utils.clip_text_transformers_convert(weights(), "", "")
    encoder = sd1_clip.SDClipModel(
        textmodel_json_config={
            "hidden_size": CONFIG["text_width"],
            "num_hidden_layers": CONFIG["text_layers"],
            "num_attention_heads": CONFIG["text_heads"],
            "intermediate_size": 4 * CONFIG["text_width"],
            "hidden_act": "quick_gelu",
            "max_position_embeddings": CONFIG["context"],
            "eos_token_id": CONFIG["vocab"] - 1,
        },
        special_tokens={"start": CONFIG["vocab"] - 2, "end": CONFIG["vocab"] - 1, "pad": 0},
        dtype=torch.float32,
    )
    encoder.transformer.text_projection = comfy.ops.manual_cast.Linear(
        CONFIG["text_width"], WIDTH, bias=False
    )
    words = names["text_model.embeddings.token_embedding.weight"]
    names["text_model.embeddings.token_embedding.weight"] = F.pad(words, (0, 0, 0, 49408 - len(words)))
    missing, _ = encoder.load_sd(names)
    assert not missing
    for tokens, expected in zip(
        GOLDEN["inputs.tokens"].tolist(), GOLDEN["expected.concept_vectors"], strict=True
    ):
        assert off(concept_vector(encoder, tokens), expected) < 1e-5


@pytest.mark.parametrize(
    "method, expected",
    [
        ("textspan", "expected.textspan.heatmaps"),
        ("transinterp", "expected64.dot.transinterp"),
        ("gradcam", "expected64.dot.gradcam"),
        ("lrp", "expected64.dot.lrp_orig"),
        ("partial lrp", "expected64.dot.partial_lrp_orig"),
        ("rollout", "expected.rollout"),
        ("raw attention", "expected.attention"),
    ],
)
def test_a_method_reads_the_towers_as_its_authors_do(monkeypatch, method, expected):
    vectors = GOLDEN["expected.concept_vectors"]
    monkeypatch.setattr(clip_module, "text_vectors", lambda clip, tower, names: vectors)
    recording = explain(clip_vision(), text_encoder(), golden_picture(), CONCEPTS, method)
    assert recording.layers == (CONFIG["layers"] - 1,)
    (scores,) = recording.scores[method]
    wanted = GOLDEN[expected]
    if method == "lrp":
        patch = CONFIG["patch"]
        wanted = wanted.unflatten(2, (-1, patch)).unflatten(1, (-1, patch)).sum((2, 4))
    if method in TEXTLESS:
        wanted = wanted.expand(4, -1)
    assert off(scores, wanted) < 1e-4


def test_texts_are_of_length_1_and_a_name_means_nothing_but_its_words():
    clip = text_encoder()
    names = ("dog", "(dog:1.5)", r"dog \(big\)", "dog (big)", "embedding:dog", "{dog}")
    vectors = text_vectors(clip, "clip_l", names)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(len(names)), atol=1e-5)
    assert len({tuple(v.tolist()) for v in vectors}) == len(names)
    assert torch.equal(text_vectors(clip, "clip_l", ("cat", "dog"))[1], vectors[0])
    tokens = clip.tokenize(TEMPLATES[0].format("dog"))
    ids = [token[0] for token in tokens["l"][0]]
    clip.cond_stage_model.set_clip_options({"projected_pooled": True})
    pooled = clip.cond_stage_model.clip_l([ids])[1][0]
    clip.cond_stage_model.reset_clip_options()
    assert torch.allclose(concept_vector(_projected(clip), [ids]), F.normalize(pooled, dim=0), atol=1e-6)
    clip.cond_stage_model.reset_clip_options()


def _projected(clip: comfy.sd.CLIP) -> sd1_clip.SDClipModel:
    clip.cond_stage_model.set_clip_options({"projected_pooled": True})
    return clip.cond_stage_model.clip_l


@pytest.mark.parametrize(
    "name, message",
    [
        ("<|endoftext|>", "more than words"),
        ("\ud83d dog", "half a character"),
        ("dog " * 100, "longer than what the text encoder reads"),
    ],
)
def test_a_name_that_clip_does_not_read_as_words_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        text_vectors(text_encoder(), "clip_l", (name,))
    assert not text_encoder().cond_stage_model.clip_l.return_projected_pooled


@pytest.mark.parametrize("method", METHODS)
def test_the_node_gives_maps_masks_and_heatmaps_of_every_picture_and_leaves_the_models(method):
    vision, clip = clip_vision(), text_encoder()
    before = {k: v.clone() for k, v in vision.get_sd().items()}
    given = picture(2)
    maps, masks, heatmaps = ConceptSaliencyClipVision.execute(
        vision, clip, given, "dog, cat, grass", "sky", method
    ).args
    assert maps.values.shape == (2, 4, CONFIG["grid"], CONFIG["grid"])
    assert masks.shape == (6, 48, 80)
    assert heatmaps.shape[0] == 6
    assert 0 <= masks.min() < masks.max() <= 1
    assert maps.space == maps.recording.space == method
    same = [torch.equal(maps.values[:, 0], maps.values[:, i]) for i in (1, 2, 3)]
    assert all(same) if method in TEXTLESS else not any(same)
    alone = explain(vision, clip, given[1:], CONCEPTS, method).scores[method][0]
    assert off(maps.recording.scores[method][0][:, 1:], alone) < 1e-5
    assert all(torch.equal(before[k], v) for k, v in vision.get_sd().items())
    assert not any(p.requires_grad and p.grad is not None for p in vision.model.parameters())


def test_other_nodes_take_the_maps(tmp_path):
    maps = ConceptSaliencyClipVision.execute(
        clip_vision(), text_encoder(), picture(), "dog, cat", "sky", "textspan"
    ).args[0]
    again = ConceptSaliency.execute(maps, "default", "default", 0, 10000, True, 0.01).args[0]
    assert torch.allclose(again.values.sum(1), torch.ones(1, 4, 4), atol=1e-5)
    mask = ConceptMask.execute(maps, "dog", {"method": "argmax"}, False, False, 0.0, 0, 0, False).args[0]
    assert mask.shape == (1, 48, 80)
    overlay = ConceptOverlay.execute(maps, picture(), "dog", "inferno", 0.5, "all concepts", 0.5, True).args[
        0
    ]
    assert overlay.shape == (1, 48, 80, 3)
    segmented = ConceptSegmentation.execute(maps, 0.0, 0.5, False, True, picture()).args[0]
    assert segmented.shape == (1, 48, 80, 3)
    assert layer(maps, 0, CONFIG["layers"] - 1).shape == (1, 3, 4, 4)
    save_maps(maps, tmp_path / "a.concepts.safetensors")
    loaded = load_maps(tmp_path / "a.concepts.safetensors")
    assert torch.equal(loaded.values, maps.values)
    assert loaded.image_size == (48, 80)


def _vision(kind: str, **more) -> ClipVisionModel:
    return ClipVisionModel({"model_type": kind, **SHAPE, **more})


WRONG = {
    "other width": (clip_vision, partial(text_encoder, 24), ["width of 32", r"clip_l \(width 24\)"]),
    "no CLIP text encoder": (clip_vision, partial(tiny_clip, "wan"), ["width of 32", "umt5xxl"]),
    "SigLIP": (partial(_vision, "siglip_vision_model"), text_encoder, ["siglip_vision_model", "clip_l"]),
    "DINOv2": (
        partial(_vision, "dinov2", layer_norm_eps=1e-6, use_swiglu_ffn=False),
        text_encoder,
        ["dinov2", "clip_l"],
    ),
}


@pytest.mark.parametrize("vision, clip, named", WRONG.values(), ids=WRONG)
def test_towers_that_do_not_belong_together_are_refused_by_name(vision, clip, named):
    with pytest.raises(ValueError, match="ViT-L/14 goes with clip_l") as error:
        ConceptSaliencyClipVision.execute(vision(), clip(), picture(), "dog", "sky", "textspan")
    assert all(re.search(part, str(error.value)) for part in named)


@pytest.mark.parametrize("left", ["huge", "nan", "zeros", "identity", "noise"])
def test_a_text_encoder_without_a_projection_is_refused(left):
    clip = text_encoder()
    weight = clip.cond_stage_model.clip_l.transformer.text_projection.weight
    kept = weight.detach().clone()
    noise = torch.randint(0, 256, (32, 64), generator=torch.Generator().manual_seed(0)).byte()
    values = {
        "huge": torch.full_like(kept, 3e38),
        "nan": torch.full_like(kept, torch.nan),
        "zeros": torch.zeros_like(kept),
        "identity": torch.eye(*kept.shape),
        "noise": noise.view(torch.float32),
    }
    try:
        weight.data.copy_(values[left])
        with pytest.raises(ValueError, match="clip_l has no text_projection"):
            ConceptSaliencyClipVision.execute(clip_vision(), clip, picture(), "dog", "sky", "textspan")
    finally:
        weight.data.copy_(kept)


@pytest.mark.parametrize("present", [True, False])
def test_what_memory_holds_is_no_projection_if_the_file_has_none(present, tmp_path):
    """ComfyUI's loaders tell the CLIP which file it is of."""
    clip = text_encoder().clone()
    names = {
        f"text_model.encoder.layers.{i}.layer_norm1.weight": torch.zeros(16)
        for i in range(clip.cond_stage_model.clip_l.num_layers)
    }
    if present:
        names["text_projection.weight"] = torch.zeros(WIDTH, 16)
    file = str(tmp_path / "clip_l.safetensors")
    save_file(names, file)
    clip.patcher.cached_patcher_init = (comfy.sd.load_clip, ([file], None))
    run = partial(
        ConceptSaliencyClipVision.execute, clip_vision(), clip, picture(), "dog", "sky", "raw attention"
    )
    if present:
        assert run().args[1].shape == (1, 48, 80)
    else:
        with pytest.raises(ValueError, match="clip_l has no text_projection"):
            run()


def test_of_several_text_encoders_the_one_of_the_same_width_is_taken():
    clip = clip_of(ENCODERS["sdxl"])
    tower = clip.cond_stage_model.clip_g
    tower.transformer.text_projection = comfy.ops.manual_cast.Linear(16, WIDTH, bias=False)
    torch.nn.init.normal_(tower.transformer.text_projection.weight, generator=torch.Generator())
    assert matching_text_tower(clip_vision(), clip) == "clip_g"
    assert text_vectors(clip, "clip_g", ("dog",)).shape == (1, WIDTH)


def test_a_workflow_explains_a_picture_with_gradients(tmp_path):
    """In a server, where models are loaded and nodes run in inference mode."""
    (tmp_path / "custom_nodes").mkdir()
    (tmp_path / "custom_nodes" / "tiny").symlink_to(Path(__file__).parent / "tiny_pack", True)
    size = {"width": 80, "height": 48, "batch_size": 2, "color": 0x3366CC}
    given = {"clip_vision": ["2", 0], "clip": ["2", 1], "image": ["1", 0]}
    choices = {"concepts": "dog, cat", "background": "sky", "method": "transinterp", "names": True}
    graph = {
        "1": {"class_type": "EmptyImage", "inputs": size},
        "2": {"class_type": "TestTinyClip", "inputs": {}},
        "3": {"class_type": "ConceptSaliencyClipVision", "inputs": {**given, **choices}},
        "4": {"class_type": "PreviewImage", "inputs": {"images": ["3", 2]}},
    }
    with comfyui.Server(comfyui.find(), tmp_path) as server:
        images = server.run(graph)["outputs"]["4"]["images"]
    assert len(images) == 4
