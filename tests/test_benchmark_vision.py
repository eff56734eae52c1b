"""Methods of the evaluation that explain vision transformers."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from test_benchmark_segmentation import MixingVAE
from tiny_clip_vision import clip_vision, text_encoder
from tiny_encoders import tiny_clip
from tiny_models import WORDS, build

from concept_attention.benchmarks.segmentation import cli, datasets
from concept_attention.benchmarks.segmentation.methods import Query, load, vit
from concept_attention.benchmarks.segmentation.models import Models
from concept_attention.benchmarks.segmentation.report import report
from concept_attention.benchmarks.segmentation.run import run
from concept_attention.benchmarks.segmentation.store import Store
from concept_attention.benchmarks.segmentation.sweep import explanations, single
from concept_attention.benchmarks.segmentation.vision import Clip, Transformer
from concept_attention.core.concepts import Concepts
from concept_attention.core.explaining.clip import METHODS, explain
from golden_files import FOLDER, Golden, off

QUERY = Query(
    np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8), Concepts(("dog",), ("sky",)), "a dog", 0
)


@cache
def clip() -> Clip:
    return Clip(clip_vision(), text_encoder(), {"models": "tiny CLIP"})


@cache
def transformer(name: str) -> Transformer:
    golden = Golden.load(FOLDER / f"{name}.safetensors")
    tensors = {
        k.removeprefix("weights."): v.float() for k, v in golden.tensors.items() if k.startswith("weights.")
    }
    return Transformer.of(tensors, {"models": name}, heads=golden.config["heads"])


@pytest.mark.parametrize("explanation", METHODS)
def test_clip_is_explained_as_by_the_node(explanation):
    maps = load("clip", clip(), {"explanation": explanation})(QUERY)
    image = torch.from_numpy(QUERY.picture.copy()).float()[None] / 255
    recording = explain(clip_vision(), text_encoder(), image, QUERY.concepts, explanation)
    assert maps.shape == (2, 4, 4)
    assert off(maps, recording.scores[explanation][0]) < 1e-6


def test_a_classifier_is_explained_for_the_class_that_it_ranks_first(monkeypatch):
    golden = Golden.load(FOLDER / "vit_classifier.safetensors")
    models = transformer("vit_classifier")
    given = golden["inputs.pixels"][0].double()
    monkeypatch.setattr(models, "pixels", lambda picture, size, normalised: given)
    expected = {
        "raw attention": "expected.attention",
        "rollout": "expected.rollout",
        "gradcam": "expected.argmax.gradcam",
        "lrp": "expected64.argmax.lrp_orig",
        "partial lrp": "expected64.argmax.partial_lrp_orig",
        "transinterp": "expected64.argmax.transinterp",
    }
    assert set(expected) == set(vit.EXPLANATIONS)
    for explanation, name in expected.items():
        maps = load("vit", models, {"explanation": explanation})(QUERY)
        assert torch.equal(maps[0], maps[1])
        assert off(maps[0], golden[name]) < 1e-5
    maps = load("vit", models, {"explanation": "partial lrp", "rules": "ours"})(QUERY)
    assert off(maps[0], golden["expected64.argmax.partial_lrp_ours"]) < 1e-9


def test_the_reference_gives_pixels_as_they_are():
    models = transformer("vit_classifier")
    given = models.pixels(QUERY.picture, (56, 56), normalised=False)
    assert given.min() >= 0
    assert given.max() <= 1
    assert torch.allclose(models.pixels(QUERY.picture, (56, 56), normalised=True), 2 * given - 1, atol=1e-6)
    plain = load("vit", models, {"normalised": False})(QUERY)
    assert not torch.allclose(plain, load("vit", models, {})(QUERY))


@pytest.mark.parametrize("name, patch", [("dino", 8), ("dino2", 14), ("dino3", 16)])
def test_dino_sees_the_shorter_side_at_480_pixels(name, patch):
    maps = load("dino", transformer(name), {})(QUERY)
    assert maps.shape == (2, 480 // patch, 720 // patch)
    assert torch.equal(maps[0], maps[1])
    assert maps.min() > 0


@pytest.mark.parametrize(
    "name, models, message",
    [
        ("clip", lambda: transformer("vit_classifier"), "clip is for clip models.*vit models.*dino, vit"),
        ("concept-attention", clip, "is for diffusion models, and these are clip models.*: clip"),
        ("vit", lambda: transformer("dino"), "for a classifier"),
    ],
)
def test_a_method_for_other_models_is_refused(name, models, message):
    with pytest.raises(ValueError, match=message):
        load(name, models(), {})


def test_an_unknown_explanation_is_refused():
    with pytest.raises(ValueError, match="CLIP has no explanation .*textspan"):
        load("clip", clip(), {"explanation": "grad"})
    with pytest.raises(ValueError, match="no set of rules .*orig, ours"):
        load("vit", transformer("vit_classifier"), {"rules": "theirs"})


def test_weights_of_no_known_model_are_refused():
    with pytest.raises(ValueError, match="no names of timm, DINO, DINOv2 or DINOv3"):
        Transformer.of({"conv1.weight": torch.zeros(1)}, {})


def test_a_sweep_has_all_that_the_models_explain(tmp_path):
    labels = [list(explanations(m)[0].methods) for m in (clip(), transformer("vit_classifier"))]
    assert labels == [list(METHODS), list(vit.EXPLANATIONS)]
    (group,) = explanations(transformer("dino"))
    assert list(group.methods) == ["DINO self-attention"]
    scenes = datasets.scenes(several=False, kind="")
    store = run(scenes, explanations(clip()), clip().settings, tmp_path, limit=2, progress=False)
    assert len(store.results()) == 2
    text = report(store, scenes).read_text()
    assert re.search(r"\| textspan \|.*75\.21 / 54\.50 / 81\.61", text)
    assert len(next(iter(store.results().values()))["results"]) == len(METHODS)


def test_the_command_explains_a_clip(tmp_path, monkeypatch, capsys):
    given = []

    def loaded(*args) -> Clip:
        given.append(args)
        return clip()

    monkeypatch.setattr(Clip, "files", loaded)
    monkeypatch.setattr(sys, "path", list(sys.path))
    command = ["run", "--limit", "2", "--out", str(tmp_path / "out"), "--models", "clip", "--method", "clip"]
    command += ["--explanation", "transinterp", "--clip-vision", "v.safetensors", "--clip", "l.safetensors"]
    cli.main(command)
    assert [str(path) for path in given[0][:1]] == ["v.safetensors"]
    assert re.search(r"scenes: 2 images, accuracy \d+\.\d\d, mIoU \d+\.\d\d", capsys.readouterr().out)
    (folder,) = (tmp_path / "out").iterdir()
    (method,) = Store.open(folder).settings["methods"].values()
    assert method == {"method": "clip", "explanation": "transinterp"}
    assert "| CLIP |" in (folder / "report.md").read_text()


@pytest.mark.parametrize("kind, missing", [("clip", "--clip-vision, --clip"), ("vit", "--vit")])
def test_the_command_names_files_that_it_lacks(kind, missing, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit, match=f"--models {kind} needs the files of the models: {missing}"):
        cli.main(["run", "--models", kind, "--method", "clip"])


def test_a_classifier_comes_from_a_file(tmp_path):
    models = transformer("vit_classifier")
    file = tmp_path / "vit.pth"
    golden = Golden.load(FOLDER / "vit_classifier.safetensors")
    torch.save(
        {k.removeprefix("weights."): v for k, v in golden.tensors.items() if k.startswith("weights.")}, file
    )
    with pytest.raises(FileNotFoundError, match="for the vit"):
        Transformer.file(tmp_path / "none.pth")
    loaded = Transformer.file(file)
    assert loaded.side == models.side == 56
    assert torch.equal(loaded.head.weight, models.head.weight)
    assert loaded.settings["models"] == "vit.pth"


def test_daam_is_the_space_of_probabilities_without_a_softmax():
    demo = Models.demo()
    settings = single(demo, "daam", {})[0].methods["DAAM"].settings
    assert (settings["space"], settings["softmax"]) == ("probability", False)
    maps = load("daam", demo, {})(QUERY)
    assert maps.min() >= 0
    assert maps.shape[0] == 2


def test_daam_reads_the_cross_attention_of_stable_diffusion_2():
    row = WORDS["sd2"]
    row = replace(row, width=16, unet={**row.unet, "context_dim": 16})
    with torch.inference_mode():
        models = Models(build(row), tiny_clip("sd2"), MixingVAE(4, 8, 2), 128, {"models": "sd2"})
        maps = load("daam", models, {})(QUERY)
    assert maps.shape[0] == 2
    assert 0 <= maps.min() < maps.max() <= 1
    assert not torch.allclose(maps[0], maps[1])
