"""Agreement with the methods that the paper compares itself to, on vision transformers."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import comfy.clip_vision
import comfy.ops
import pytest
import torch
from comfy.image_encoders.dino2 import Dinov2Model
from torch import Tensor
from torch.nn import functional as F

from concept_attention.core.explaining import checkpoints, methods
from concept_attention.core.explaining.checkpoints import Weights
from concept_attention.core.explaining.vit import Linear
from golden_files import FOLDER, Golden, off

TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
"""Of what is made of gradients, in float32."""
RELEVANCE_TOLERANCE = 1e-9
"""Of relevance, in float64; in float32 it is off by more than it is worth."""
RULES = ("ours", "orig")


def files(prefix: str) -> list[Path]:
    """The repository's files of a kind, and those of the folder ``GOLDEN_DIR`` and of its ``baselines``.
    "dino" is no "dino2"."""
    given = os.environ.get("GOLDEN_DIR")
    folders = [Path(given), Path(given) / "baselines"] if given else []
    found = {
        path.name: path for folder in (*folders, FOLDER) for path in folder.glob(f"{prefix}*.safetensors")
    }
    return [found[name] for name in sorted(found) if not name[len(prefix) :][0].isdigit()]


def of(prefix: str) -> Callable:
    return pytest.mark.parametrize("path", files(prefix), ids=lambda path: path.stem)


def weights(golden: Golden, dtype: torch.dtype, prefix: str = "") -> Weights:
    prefix = f"weights.{prefix}"
    return Weights(
        {k.removeprefix(prefix): v.float() for k, v in golden.tensors.items() if k.startswith(prefix)}, dtype
    )


class Classifier:
    def __init__(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        self.golden = Golden.load(path)
        heads = self.golden.config["heads"]
        self.vit, self.head = checkpoints.timm(weights(self.golden, dtype), heads)
        self.for_relevance = replace(self.vit, norm=self.vit.norm._replace(eps=1e-5))
        self.pixels = self.golden["inputs.pixels"][0].to(dtype)
        self.targets = {
            "argmax": self.golden.number("argmax"),
            "other": self.golden.number("other_class"),
        }


class Clip:
    def __init__(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        self.golden = Golden.load(path)
        given = weights(self.golden, dtype)
        names = comfy.clip_vision.convert_to_transformers(
            {k: v for k, v in given.tensors.items() if k.startswith("visual.")}, "visual."
        )
        self.vit, self.projection = checkpoints.clip(
            replace(given, tensors=names), self.golden.config["heads"], lambda x: x * torch.sigmoid(1.702 * x)
        )
        self.pixels = self.golden["inputs.pixels"][0].to(dtype)
        self.concepts = self.golden["expected.concept_vectors"].to(dtype)
        self.targets = range(len(self.concepts))

    @property
    def head(self) -> Linear:
        with torch.inference_mode(False):
            return Linear((self.concepts @ self.projection).clone())

    def cosines(self, texts: Tensor, cls: Tensor) -> Tensor:
        image = self.projection @ cls
        scale = self.golden["weights.logit_scale"].to(cls).exp()
        return scale * (texts @ image) / image.norm()


classifier, clip = cache(Classifier), cache(Clip)


@of("vit_classifier")
def test_raw_attention_and_rollout_of_a_classifier(path):
    case = classifier(path)
    trace = case.vit(case.pixels)
    for index, layer in enumerate(trace.layers):
        expected = case.golden[f"expected.attention_probs.layer{index}.cls"]
        assert off(layer.attention[:, 0], expected) < TOLERANCE
    assert off(case.head(trace.cls), case.golden["expected.logits"]) < TOLERANCE
    assert off(methods.attention(trace), case.golden["expected.attention"]) < TOLERANCE
    assert off(methods.rollout(trace), case.golden["expected.rollout"]) < TOLERANCE
    assert off(methods.rollout(trace, 0), case.golden["expected.rollout_start0"]) < TOLERANCE


@of("vit_classifier")
@pytest.mark.parametrize("target", ["argmax", "other"])
def test_gradcam_of_a_classifier(path, target):
    case = classifier(path)
    index = [case.targets[target]]
    gradients = methods.Pass(case.vit, case.pixels, case.head)
    (last,) = gradients.back(*index, gradients.attention[-1:])
    assert off(last[:, 0], case.golden[f"expected.{target}.gradcam_gradients_cls"]) < TOLERANCE
    map_ = methods.gradcam(case.vit, case.pixels, case.head, index)
    assert off(map_, case.golden[f"expected.{target}.gradcam"]) < GRADIENT_TOLERANCE


@of("vit_classifier")
@pytest.mark.parametrize("target", ["argmax", "other"])
@pytest.mark.parametrize("rules", RULES)
def test_relevance_of_a_classifier(path, target, rules):
    case = classifier(path, torch.float64)
    expected, index = partial(_expected64, case.golden, target), [case.targets[target]]
    given = case.for_relevance, case.pixels, case.head, index, rules == "ours"
    assert off(methods.lrp(*given), expected(f"lrp_{rules}")) < RELEVANCE_TOLERANCE
    assert off(methods.partial_lrp(*given), expected(f"partial_lrp_{rules}")) < RELEVANCE_TOLERANCE
    relevance = methods.relevance_pass(case.for_relevance, case.pixels, case.head, rules == "ours")
    assert off(case.head(relevance.trace.cls), case.golden["expected64.logits_lrp"]) < RELEVANCE_TOLERANCE
    for layer, c in enumerate(relevance.back(*index, relevance.attention)):
        name = f"attn_relevance_{rules}.layer{layer}.cls"
        assert off(c[:, 0], expected(name)) < RELEVANCE_TOLERANCE


@of("vit_classifier")
@pytest.mark.parametrize("target", ["argmax", "other"])
def test_transinterp_of_a_classifier(path, target):
    case = classifier(path, torch.float64)
    given = case.for_relevance, case.pixels, case.head, [case.targets[target]]
    expected = partial(_expected64, case.golden, target)
    assert off(methods.transinterp(*given), expected("transinterp")) < RELEVANCE_TOLERANCE
    assert off(methods.transinterp(*given, 0), expected("transinterp_start0")) < RELEVANCE_TOLERANCE


def _expected64(golden: Golden, target: str, name: str) -> Tensor:
    return golden[f"expected64.{target}.{name}"]


@of("clip_vit")
def test_attention_rollout_and_embedding_of_clip(path):
    case = clip(path)
    trace = case.vit(case.pixels)
    for index, layer in enumerate(trace.layers):
        assert off(layer.attention, case.golden[f"expected.attention_probs.layer{index}"]) < TOLERANCE
    assert off(case.projection @ trace.cls, case.golden["expected.image_embeds"]) < TOLERANCE
    assert off(methods.attention(trace), case.golden["expected.attention"]) < TOLERANCE
    assert off(methods.rollout(trace), case.golden["expected.rollout"]) < TOLERANCE
    assert off(methods.rollout(trace, 0), case.golden["expected.rollout_start0"]) < TOLERANCE


@of("clip_vit")
def test_textspan_and_all_that_clip_adds_up(path):
    case = clip(path)
    trace = case.vit(case.pixels)
    parts = methods.decompose(case.vit, trace, case.projection, case.concepts)
    assert off(parts, case.golden["expected.textspan.by_layer_head"]) < TOLERANCE
    maps = methods.textspan(case.vit, trace, case.projection, case.concepts)
    assert off(maps, case.golden["expected.textspan.heatmaps"]) < TOLERANCE
    cosines = case.cosines(case.concepts, trace.cls) / case.golden["weights.logit_scale"].float().exp()
    mlps = case.golden["expected.textspan.mlps"].sum(0)
    assert off(parts.sum((0, 1, 3)) + mlps, cosines) < 1e-4


@of("clip_vit")
def test_gradients_of_the_cosine_of_clip(path):
    case = clip(path)
    texts = F.normalize(case.golden["expected.text_embeds"][:, 0], dim=-1)
    with torch.inference_mode(False):
        scores = partial(case.cosines, texts.clone())
    given = case.vit, case.pixels, scores, case.targets
    passed = methods.Pass(*given[:3])
    assert off(scores(passed.trace.cls), case.golden["expected.logits_per_image"]) < TOLERANCE
    gradients = [passed.back(target, passed.attention[-1:])[0][:, 0] for target in case.targets]
    assert off(torch.stack(gradients), case.golden["expected.cosine.gradients_last_cls"]) < TOLERANCE
    assert off(methods.gradcam(*given), case.golden["expected.cosine.gradcam"]) < GRADIENT_TOLERANCE
    last, all_ = methods.attention_relevance(*given), methods.attention_relevance(*given, 0)
    assert off(last, case.golden["expected.cosine.relevance_last"]) < TOLERANCE
    assert off(all_, case.golden["expected.cosine.relevance_all"]) < TOLERANCE


@of("clip_vit")
def test_relevance_of_clip_with_texts_for_its_classes(path):
    case = clip(path, torch.float64)
    given = case.vit, case.pixels, case.head, case.targets
    expected = {
        name.removeprefix("expected64.dot."): tensor
        for name, tensor in case.golden.tensors.items()
        if name.startswith("expected64.dot.")
    }
    for rules in RULES:
        joint = rules == "ours"
        assert off(methods.lrp(*given, joint), expected[f"lrp_{rules}"]) < RELEVANCE_TOLERANCE
        assert off(methods.partial_lrp(*given, joint), expected[f"partial_lrp_{rules}"]) < RELEVANCE_TOLERANCE
    assert off(methods.transinterp(*given), expected["transinterp"]) < RELEVANCE_TOLERANCE
    assert off(methods.gradcam(*given), expected["gradcam"]) < RELEVANCE_TOLERANCE


@of("clip_vit")
def test_gradcam_is_zeros_where_no_patch_speaks_for_the_score(path):
    case = clip(path)

    def constant(cls: Tensor) -> Tensor:
        return (cls * 0).sum()[None]

    assert not methods.gradcam(case.vit, case.pixels, constant, [0]).any()


@of("dino")
def test_attention_of_dino_at_every_size(path):
    golden = Golden.load(path)
    vit, _ = checkpoints.timm(weights(golden, torch.float32), golden.config["heads"])
    for size in golden.number("sizes"):
        trace = vit(golden[f"inputs.{size}.pixels"][0])
        heads = trace.patch_map(trace.layers[-1].attention[:, 0])
        assert off(heads, golden[f"expected.{size}.attention_heads"]) < TOLERANCE
        map_ = methods.attention(trace)
        assert map_.shape == golden[f"expected.{size}.attention"].shape
        assert off(map_, golden[f"expected.{size}.attention"]) < TOLERANCE
        assert off(trace.cls, golden[f"expected.{size}.cls"]) < TOLERANCE
        assert ((map_ > map_.mean()) == golden[f"expected.{size}.mask"].bool()).all()


@pytest.mark.parametrize(
    "path, layout",
    [
        pytest.param(path, layout, id=path.stem)
        for prefix, layout in (("dino2", checkpoints.dinov2), ("dino3", checkpoints.dinov3))
        for path in files(prefix)
    ],
)
def test_attention_of_dinov2_and_dinov3(path, layout):
    golden = Golden.load(path)
    vit = layout(weights(golden, torch.float32), golden.config["heads"])
    trace = vit(golden["inputs.pixels"][0])
    heads = trace.patch_map(trace.layers[-1].attention[:, 0])
    assert off(heads, golden["expected.attention_heads"]) < TOLERANCE
    assert off(methods.attention(trace), golden["expected.attention"]) < TOLERANCE
    assert off(trace.normed, golden["expected.last_hidden_state"]) < TOLERANCE


@pytest.mark.parametrize("names", ["comfyui", "transformers"])
@pytest.mark.parametrize("gated", [False, True])
def test_dinov2_is_comfyuis_own(names, gated):
    model = Dinov2Model(
        {
            "num_hidden_layers": 2,
            "hidden_size": 48,
            "num_attention_heads": 3,
            "layer_norm_eps": 1e-6,
            "use_swiglu_ffn": gated,
            "image_size": 56,
        },
        torch.float32,
        "cpu",
        comfy.ops.manual_cast,
    )
    g = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=g) * 0.2)
    tensors = dict(model.state_dict())
    if names == "transformers" and gated:
        for name in [name for name in tensors if "weights_in" in name]:
            gate, up = tensors.pop(name).chunk(2)
            for part, half in (("gate_proj", gate), ("up_proj", up)):
                tensors[name.replace("weights_in", part)] = half
        tensors = {name.replace("weights_out", "down_proj"): tensor for name, tensor in tensors.items()}
    pixels = torch.randn(3, 84, 84, generator=g)
    trace = checkpoints.dinov2(Weights(tensors), heads=3)(pixels)
    assert trace.grid == (6, 6)
    assert off(trace.normed, model(pixels[None])[0]) < TOLERANCE
