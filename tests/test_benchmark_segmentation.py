"""The evaluation: its metrics, methods, results that survive being killed, and its report."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_worker import Brightness, work
from PIL import Image
from test_benchmark_datasets import write_imagenet, write_voc
from tiny_encoders import tiny_clip
from tiny_models import ROWS, build

from concept_attention.benchmarks.segmentation import cli, datasets, metrics, models
from concept_attention.benchmarks.segmentation.methods import Query, available, kind_of, loader, reference_sd3
from concept_attention.benchmarks.segmentation.metrics import IGNORED
from concept_attention.benchmarks.segmentation.models import Models, View
from concept_attention.benchmarks.segmentation.report import Results, cases, report, summary
from concept_attention.benchmarks.segmentation.run import evaluate, run, seed_of
from concept_attention.benchmarks.segmentation.store import Store, key_of
from concept_attention.benchmarks.segmentation.sweep import Group, full, only, single
from concept_attention.core.concepts import Concepts
from concept_attention.core.reading.maps import GROUNDINGS, concept_maps
from concept_attention.core.reading.masks import concept_masks

WORKER = Path(__file__).with_name("benchmark_worker.py")


# Metrics


def test_average_precision_of_a_worked_example():
    scores, truth = np.array([0.9, 0.8, 0.8, 0.3]), np.array([True, False, True, False])
    # above 0.9: precision 1, half of the recall; the two equal ones together: precision 2/3, the other half
    assert metrics.average_precision(scores, truth) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_average_precision_does_not_depend_on_the_order_of_equal_scores():
    scores, truth = np.array([0.5, 0.5, 0.5, 0.1]), np.array([True, False, False, True])
    shuffled = metrics.average_precision(scores[[2, 1, 0, 3]], truth[[2, 1, 0, 3]])
    assert metrics.average_precision(scores, truth) == shuffled == pytest.approx(0.5 / 3 + 0.5 * 2 / 4)


def test_average_precision_of_nothing_true_is_zero():
    assert metrics.average_precision(np.array([0.2, 0.1]), np.array([False, False])) == 0


def test_a_perfect_map_has_precision_one_and_its_opposite_less_than_a_half():
    map_ = torch.tensor([[0.0, 0.0], [0.2, 0.9]])
    labels = np.array([[0, 0], [0, 1]])
    assert metrics.binary_average_precision(map_, labels) == 1
    assert metrics.binary_average_precision(-map_, labels) < 0.5


def test_scores_count_pixels_over_all_images_and_average_over_the_classes():
    tally = metrics.Tally()
    tally.add(metrics.count(np.array([0, 1, 1, 1]), np.array([0, 0, 1, IGNORED])), 0.5)
    tally.add(metrics.count(np.array([1]), np.array([1])), 1.0)
    scores = tally.scores()
    assert scores.images == 2
    assert scores.accuracy == 3 / 4
    assert scores.miou == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert scores.pooled_iou == pytest.approx(3 / 5)
    assert scores.map == 0.75


def test_pooled_iou_follows_from_accuracy_as_the_papers_numbers_do():
    tally = metrics.Tally()
    tally.add([(0, 0, 6000), (0, 1, 900), (1, 0, 793), (1, 1, 2307)])
    scores = tally.scores()
    assert scores.accuracy == pytest.approx(0.8307)
    assert round(scores.pooled_iou, 4) == 0.7104
    assert scores.pooled_iou != pytest.approx(scores.miou, abs=0.01)


def test_a_map_is_cut_at_the_mean_of_its_patches_and_enlarged_without_smoothing():
    mask = metrics.above_mean(torch.tensor([[0.0, 0.2], [0.2, 1.0]]), 4)
    assert mask.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


def test_where_a_background_concept_wins_is_class_0():
    maps = torch.tensor([[[0.9, 0.1]], [[0.2, 0.3]], [[0.1, 0.8]]])
    assert metrics.winners(maps, [7, 3, 0], 2)[0].tolist() == [7, 0]


def test_labels_are_made_smaller_without_mixing_classes():
    labels = np.array([[3, 3, 9, 9], [3, 3, 9, 9], [IGNORED] * 4, [IGNORED] * 4])
    assert metrics.resized(labels, 2).tolist() == [[3, 9], [IGNORED, IGNORED]]


@pytest.mark.parametrize("size", [64, 224])
def test_a_map_finer_than_the_score_is_taken_at_the_places_of_the_labels(size):
    labels = np.random.default_rng(0).integers(0, 9, (256, 300))
    assert np.array_equal(
        metrics.at_size(torch.from_numpy(labels).float(), size), metrics.resized(labels, size)
    )


def test_the_interval_holds_the_score_and_is_nothing_for_a_difference_from_itself():
    rng = np.random.default_rng(1)
    counts = [metrics.count(rng.integers(0, 2, 50), rng.integers(0, 2, 50)) for _ in range(30)]
    low, high = metrics.miou_interval(counts)
    assert low < metrics.scores_of(counts, [None] * 30).miou < high
    assert metrics.miou_interval(counts, counts) == (0, 0)


@pytest.mark.parametrize("winner, predicted", [(-1, 0), (0, 8), (1, 15)])
def test_background_concepts_stand_for_class_0_and_names_for_their_classes(tmp_path, winner, predicted):
    write_voc(tmp_path)
    data = datasets.pascal_voc(tmp_path, several=True)

    def one_wins(query: Query) -> torch.Tensor:
        maps = torch.zeros(len(query.concepts.all), 4, 4)
        maps[winner] = 1
        return maps

    result = evaluate(data.load(1), data, {"method": one_wins})
    assert {p for _, p, _ in result["results"]["method"]["argmax"]} == {predicted}


# Results on disk


def wait_for(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(list(folder.glob("*/images/*.json"))) < count:
        assert time.monotonic() < deadline, "the worker wrote nothing"
        time.sleep(0.01)


def test_200_scenes_killed_twice_and_shared_by_two_give_the_same_table_as_one_run(tmp_path):
    data, whole = work(tmp_path / "whole", (1, 1), 200)
    parts = tmp_path / "parts"
    for shard, until in (("1", 8), ("2", 60)):
        worker = subprocess.Popen([sys.executable, str(WORKER), str(parts), shard, "2", "200"])
        wait_for(parts, until)
        worker.kill()
        assert worker.wait() != 0
    before = {p: p.stat().st_mtime_ns for p in parts.glob("*/images/*.json")}
    assert 60 <= len(before) < 200
    workers = [subprocess.Popen([sys.executable, str(WORKER), str(parts), s, "2", "200"]) for s in "12"]
    assert [worker.wait() for worker in workers] == [0, 0]
    assert all(p.stat().st_mtime_ns == written for p, written in before.items())
    (folder,) = parts.iterdir()
    merged = Store.open(folder)
    assert len(merged.results()) == 200
    assert report(merged, data).read_text() == report(whole, data).read_text()
    assert (folder / "scores.json").read_bytes() == (whole.folder / "scores.json").read_bytes()


def test_an_image_whose_result_was_cut_off_is_done_again(tmp_path):
    _, store = work(tmp_path, (1, 1), 3)
    whole = store.results()
    file = store.folder / "images" / "000001.json"
    file.write_bytes(file.read_bytes()[:40])
    assert set(store.results()) == {0, 2}
    work(tmp_path, (1, 1), 3)
    assert store.results() == whole


def test_other_settings_are_another_run(tmp_path):
    a = Store(tmp_path, "scenes", {"level": 0.5})
    a.write(0, {"id": "x"})
    assert Store(tmp_path, "scenes", {"level": 0.5}).read(0) == {"id": "x"}
    assert Store(tmp_path, "scenes", {"level": 0.6}).read(0) is None


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no run"):
        Store.open(tmp_path)


def test_noise_depends_on_the_image_alone():
    assert seed_of("voc", "a") == seed_of("voc", "a")
    assert len({seed_of("voc", "a"), seed_of("voc", "b"), seed_of("imagenet", "a")}) == 3


# Methods, with the demo model


@pytest.fixture(scope="module")
def demo() -> Models:
    with torch.inference_mode():
        return Models.demo()


@pytest.fixture
def passes(monkeypatch) -> list:
    """One entry for each forward pass."""
    made = []
    observe = models.observe_image

    def observed(*args, **options):
        made.append(options)
        return observe(*args, **options)

    monkeypatch.setattr(models, "observe_image", observed)
    return made


def query(index: int = 0) -> Query:
    example = datasets.scenes().load(index)
    (name,) = example.names.values()
    return Query(example.picture, Concepts((name,), ("background", "sky", "grass")), f"a {name}", 5)


def test_concept_attention_finds_the_object_of_single_scenes(demo, tmp_path):
    data = datasets.scenes()
    store = run(
        data, single(demo, "concept-attention", {}), demo.settings, tmp_path, limit=20, progress=False
    )
    results = Results(store)
    scores = results.scores(results.first)
    assert scores.images == 20
    assert scores.miou >= 0.70
    assert scores.map >= 0.95
    assert results.scores(results.first, argmax=True).miou >= 0.75


@pytest.mark.parametrize("name", [name for name in available() if kind_of(name) == "diffusion"])
def test_every_method_gives_a_map_for_each_concept(demo, name):
    maps = loader(name)(stand_ins(name) if name in STAND_INS else demo)(query())
    assert maps.shape == (4, 16, 16)
    assert maps.isfinite().all()


# The reference's recipes, with tiny random models


class MixingVAE:
    """Makes fixed mixtures of the colours of squares of pixels."""

    def __init__(self, channels: int, pixels: int, latent_dim: int) -> None:
        self.latent_dim, self._pixels = latent_dim, pixels
        self._mixture = torch.randn(channels, 3, generator=torch.Generator().manual_seed(4))

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        squares = torch.nn.functional.avg_pool2d(images.movedim(-1, 1), self._pixels)
        latent = torch.einsum("cd,bdhw->bchw", self._mixture, 2 * squares - 1)
        return latent if self.latent_dim == 2 else latent.unsqueeze(2)


STAND_INS = {
    "reference-sd3": ("sd35_medium", "sd3", 4096, MixingVAE(16, 8, 2)),
    "reference-cogvideox": ("cogvideox", "cogvideox", 16, MixingVAE(16, 8, 3)),
    "reference-flux2": ("flux2", "flux2-klein", 48, MixingVAE(128, 16, 2)),
}
WIDTHS = {
    "reference-sd3": lambda width: {
        "context_embedder_config": {
            "target": "torch.nn.Linear",
            "params": {"in_features": width, "out_features": 192},
        },
        "pos_embed_max_size": 16,
        "num_patches": 256,
    },
    "reference-cogvideox": lambda width: {"text_embed_dim": width},
    "reference-flux2": lambda width: {"context_in_dim": width},
}


@cache
def stand_ins(method: str) -> Models:
    """What the method is for: tiny, random, and taking 256 x 256 pixels."""
    name, clip, width, vae = STAND_INS[method]
    row = ROWS[name]
    row = replace(row, width=width, unet={**row.unet, **WIDTHS[method](width)})
    with torch.inference_mode():
        return Models(build(row), tiny_clip(clip), vae, 256, {"models": name})


@pytest.fixture
def looks(monkeypatch) -> list:
    """The arguments of each look at a picture, and what was recorded."""
    made = []
    observe = models.observe_image

    def observed(*args, **options):
        recording = observe(*args, **options)
        made.append((args, options, recording))
        return recording

    monkeypatch.setattr(models, "observe_image", observed)
    return made


@pytest.mark.parametrize("name", STAND_INS)
def test_a_recipe_is_for_one_family(demo, name):
    with pytest.raises(ValueError, match="This method is for .*, and the model is Flux.1"):
        loader(name)(demo)


@torch.inference_mode()
def test_sd3s_concepts_are_the_first_tokens_of_all_names_in_one_prompt(looks):
    clip = tiny_clip("sd3")
    asked = replace(query(), concepts=Concepts(("hot air balloon", "dragon"), ("sky",)))
    assert loader("reference-sd3")(stand_ins("reference-sd3"))(asked).shape == (3, 16, 16)
    ((_, what, *_), _, _) = looks[0]
    concepts, tokens = what.concepts, what.tokens
    prompt = clip.encode_from_tokens(clip.tokenize("hot air balloon dragon sky"))[0]
    assert concepts.all == ("start token", "hot air balloon", "dragon", "sky")
    assert torch.equal(tokens.pooled(), prompt[:4])


@torch.inference_mode()
def test_sd3s_vectors_of_all_looks_make_one_map(monkeypatch):
    given = []

    def heatmaps(calls) -> torch.Tensor:
        given.append(calls)
        return reference_sd3.scores(calls[0][0])

    monkeypatch.setattr(reference_sd3, "heatmaps", heatmaps)
    method = partial(loader("reference-sd3"), stand_ins("reference-sd3"))
    asked = query()
    method(samples=2)(asked)
    method()(replace(asked, seed=asked.seed + 1))
    both, second = given
    assert [len(layers) for layers in both] == [3, 3]
    assert torch.equal(both[1][2].concepts, second[0][2].concepts)
    assert not torch.equal(both[0][2].concepts, both[1][2].concepts)
    assert both[0][0].concepts.shape == (1, 5, 192)
    assert both[0][0].picture.shape == (1, 256, 192)


@torch.inference_mode()
def test_cogvideoxs_padding_takes_its_share_of_every_map(looks):
    maps = loader("reference-cogvideox")(stand_ins("reference-cogvideox"))(query())
    ((_, what, *_), _, recording) = looks[0]
    concepts, tokens = what.concepts, what.tokens
    assert len(concepts.all) == len(tokens.sequences) == 226
    assert not tokens.pooled()[4:].any()
    scores = recording.scores["output"][0]
    assert torch.equal(scores[:, :, 4], scores[:, :, 225])
    assert torch.allclose(maps, scores.softmax(2).mean(0)[0, :4])
    assert (maps.sum(0) < 0.9).all()


@torch.inference_mode()
def test_cogvideoxs_concepts_are_encoded_in_texts_of_16_tokens(looks):
    clip = tiny_clip("cogvideox").clone()
    loader("reference-cogvideox")(stand_ins("reference-cogvideox"))(query())
    clip.set_tokenizer_option("t5xxl_min_length", 16)
    first = clip.encode_from_tokens(clip.tokenize("background"))[0]
    assert len(first) == 16
    assert torch.equal(looks[0][0][1].tokens.pooled()[1], first[0])
    assert not tiny_clip("cogvideox").tokenizer_options


@torch.inference_mode()
def test_flux2_looks_at_the_last_steps_but_one_and_softens_the_mean_of_its_scores(looks):
    method = partial(loader("reference-flux2"), stand_ins("reference-flux2"))
    maps = method()(query())
    (_, _, recording) = looks[0]
    assert recording.steps == tuple(range(8))
    assert recording.sigmas == stand_ins("reference-flux2").levels(range(19, 27), 28)
    assert recording.layers == (0, 1, 2)
    mean = torch.stack(recording.scores["output"]).mean((0, 1))[0]
    assert (mean.softmax(0) - 1 / 4).abs().max() > 0.1
    assert torch.allclose(1000 * (maps / maps[0]).log(), mean - mean[0], atol=1e-3)
    assert not torch.equal(method(guidance=0.0)(query()), maps)
    assert looks[1][0][3][0][1]["guidance"] == 0.0
    method(level=0.5)(query())
    assert looks[2][2].sigmas == (0.5,)


@pytest.mark.parametrize("name", STAND_INS)
def test_the_command_runs_a_recipe(name, tmp_path, monkeypatch, capsys):
    files = [tmp_path / f"{part}.safetensors" for part in ("unet", "clip", "vae")]
    given = []

    def loaded(*args) -> Models:
        given.append(args)
        return stand_ins(name)

    monkeypatch.setattr(Models, "files", loaded)
    monkeypatch.setattr(sys, "path", list(sys.path))
    command = ["run", "--limit", "2", "--method", name, "--out", str(tmp_path / "out"), "--level", "0.4"]
    command += ["--models", "files", "--clip-type", "sd3", "--size", "256"]
    for part, file in zip(("--unet", "--clip", "--vae"), files, strict=True):
        command += [part, str(file)]
    cli.main(command)
    assert given == [(files[0], [files[1]], "sd3", files[2], 256)]
    assert re.search(r"scenes: 2 images, accuracy \d+\.\d\d, mIoU \d+\.\d\d", capsys.readouterr().out)
    (folder,) = (tmp_path / "out").iterdir()
    (method,) = Store.open(folder).settings["methods"].values()
    assert (method["method"], method["level"]) == (name, 0.4)
    assert "The reference's" in (folder / "report.md").read_text()


def test_a_choice_that_a_recipe_leaves_open_to_none_is_refused():
    with pytest.raises(ValueError, match="reference-sd3 leaves no choice of refine, only of: level, samples"):
        single(stand_ins("reference-sd3"), "reference-sd3", {"refine": True, "level": 0.5})


def test_a_clip_type_that_comfyui_does_not_know_is_refused(tmp_path):
    file = tmp_path / "weights.safetensors"
    file.touch()
    with pytest.raises(ValueError, match='no CLIP type "sd4".*sd3'):
        Models.files(file, [file], "sd4", file)


def test_the_three_methods_differ_in_space_only(demo):
    spaces = {
        name: loader(name)(demo).settings["space"]
        for name in ("concept-attention", "cross-attention", "value")
    }
    assert list(spaces.values()) == ["output", "cross-attention", "value"]


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match='no method "clipseg".*concept-attention'):
        loader("clipseg")


def test_choices_that_only_change_what_is_made_of_scores_share_one_pass(demo, passes):
    asked = query()
    chosen = [
        loader("concept-attention")(demo, **choices)
        for choices in (
            {},
            {"space": "value"},
            {"space": "cross-attention", "softmax": False},
            {"layers": "all"},
            {"layers": "3"},
            {"temperature": 2.0},
            {"bilinear": True},
            {"grounding": "anchor propagation"},
            {"refine": True},
            {"grounding": "anchor propagation", "refine": True},
        )
    ]
    maps = [method(asked) for method in chosen]
    assert len(passes) == 1
    assert len({tuple(m.flatten()[:20].tolist()) for m in maps}) == len(maps)


@pytest.mark.parametrize("grounding", GROUNDINGS)
def test_a_refined_map_gives_the_mask_that_concept_mask_cuts(demo, grounding):
    asked = query()
    refined = loader("concept-attention")(demo, refine=True, grounding=grounding)(asked)
    view = View(asked.concepts, asked.prompt, "mean of tokens", True, True, True, 0.5)
    maps = concept_maps(demo.recording(asked, view, 1), grounding=grounding)
    guide = torch.from_numpy(asked.picture.copy())[None].float() / 255
    masks, _ = concept_masks(maps, asked.concepts.names, guide=guide)
    assert torch.equal((refined.argmax(0) == 0).float(), masks[0, 0])


def compared(models: Models, data: datasets.Dataset, tmp_path: Path, choices: dict) -> dict[str, float]:
    """The mIoU by argmax of each choice on the first 16 images."""
    rows = {label: loader("concept-attention")(models, **choice) for label, choice in choices.items()}
    groups = [Group("compared", "Compared", rows)]
    results = Results(run(data, groups, models.settings, tmp_path, limit=16, progress=False))
    return {label: results.scores(key_of(m.settings), argmax=True).miou for label, m in rows.items()}


@pytest.mark.parametrize("several", [False, True])
def test_refined_maps_are_ahead_of_enlarged_ones(demo, tmp_path, several):
    choices = {"nearest": {}, "bilinear": {"bilinear": True}, "refined": {"refine": True}}
    miou = compared(demo, datasets.scenes(several=several), tmp_path, choices)
    assert miou["refined"] >= max(miou["nearest"], miou["bilinear"]) + 0.05


def test_anchor_propagation_is_ahead_in_crowds(demo, tmp_path):
    choices = {
        f"{grounding}, {refine}": {"grounding": grounding, "refine": refine}
        for grounding in GROUNDINGS
        for refine in (False, True)
    }
    miou = compared(demo, datasets.scenes(several=True, kind="crowd"), tmp_path, choices)
    assert miou["anchor propagation, False"] >= miou["paper, False"] + 0.01
    assert miou["anchor propagation, True"] >= miou["paper, True"] + 0.01


def test_maps_are_enlarged_in_one_way(demo):
    with pytest.raises(ValueError, match="choose one"):
        loader("concept-attention")(demo, bilinear=True, refine=True)


@pytest.mark.parametrize(
    "choices",
    [
        {"level": 0.7},
        {"attend_image": False},
        {"attend_concepts": False},
        {"captioned": False},
        {"pooled_prompt": False},
        {"background": ("background",)},
        {"samples": 2},
    ],
)
def test_what_the_model_sees_changes_the_maps_and_takes_a_pass(demo, passes, choices):
    asked = query()
    plain = loader("concept-attention")(demo)(asked)
    changed = loader("concept-attention")(demo, **choices)(asked)
    assert len(passes) == 2
    assert not torch.equal(plain[0], changed[0])


def test_the_first_token_differs_from_the_mean_for_concepts_of_several(demo):
    example = datasets.scenes(several=True, kind="look-alike").load(0)
    asked = Query(example.picture, Concepts(tuple(example.names.values())), "", 5)
    mean, first = (
        loader("concept-attention")(demo, pooling=pooling)(asked)
        for pooling in ("mean of tokens", "first token")
    )
    assert not torch.equal(mean, first)


def test_maps_of_samples_are_averaged(demo):
    asked = query()
    both = loader("concept-attention")(demo, samples=2)(asked)
    ones = [loader("concept-attention")(demo)(replace(asked, seed=asked.seed + i)) for i in range(2)]
    assert torch.allclose(both, sum(ones) / 2, atol=1e-6)


def test_an_image_scores_the_same_alone_and_after_others(demo, tmp_path):
    data = datasets.scenes(several=True)
    groups = single(demo, "concept-attention", {})
    together = run(data, groups, demo.settings, tmp_path / "a", limit=3, progress=False)
    alone = run(data, groups, demo.settings, tmp_path / "b", shard=(3, 3), limit=3, progress=False)
    assert together.read(2) == alone.read(2)


def test_a_sweep_covers_the_papers_tables_and_figures_and_shares_passes(demo, passes):
    data = datasets.scenes()
    groups = full(demo, data.background)
    labels = {group.name: list(group.methods) for group in groups}
    assert len(labels["spaces"]) == 8
    assert labels["attention"] == ["Image and concepts", "Image", "Concepts", "Neither"]
    assert labels["layers"] == ["Default", "All", *map(str, range(7))]
    assert {"0.1", "0.5", "0.9"} <= set(labels["levels"])
    assert labels["samples"] == ["1", "2", "5"]
    assert len(labels["refine"]) == 3
    assert len(labels["grounding"]) == 4
    methods = {key_of(m.settings): m for group in groups for m in group.methods.values()}
    result = evaluate(data.load(0), data, methods)
    assert set(result["results"]) == set(methods)
    assert len(methods) > 40
    assert len(passes) < 25


def test_a_sweep_of_some_groups_keeps_their_order_and_names_the_others(demo):
    groups = full(demo, ())
    assert [group.name for group in only(groups, ["grounding", "spaces"])] == ["spaces", "grounding"]
    with pytest.raises(ValueError, match='no group "edges".*refine, grounding'):
        only(groups, ["edges"])


def test_levels_and_layers_that_do_not_exist_are_refused(demo):
    with pytest.raises(ValueError, match="noise level"):
        loader("concept-attention")(demo, level=0.0)
    with pytest.raises(ValueError, match="only: 0-6"):
        loader("concept-attention")(demo, layers="7")
    with pytest.raises(ValueError, match="at least one sample"):
        loader("concept-attention")(demo, samples=0)


# The report


class Perfect:
    """The true masks of a data set."""

    def __init__(self, data) -> None:
        self.settings = {"method": "perfect"}
        self._data = data

    def __call__(self, query: Query) -> torch.Tensor:
        for index in range(len(self._data)):
            example = self._data.load(index)
            if np.array_equal(example.picture, query.picture):
                first = torch.from_numpy(metrics.resized(example.labels, 224)).float()
                return torch.stack([first, *[1 - first] * (len(query.concepts.all) - 1)])
        raise AssertionError


@pytest.fixture
def imagenet(tmp_path):
    write_imagenet(tmp_path / "gtsegs_ijcv.mat", 3, 64, 64)
    names = tmp_path / "names.json"
    names.write_text(json.dumps({f"n0208407{i}": name for i, name in enumerate(("dog", "$x_1|y$", "<b>"))}))
    return datasets.imagenet(tmp_path / "gtsegs_ijcv.mat", names)


def test_the_report_puts_the_papers_numbers_beside_the_runs(imagenet, tmp_path):
    groups = [
        Group("methods", "Methods", {"ConceptAttention": Perfect(imagenet), "Bright|ness": Brightness()})
    ]
    store = run(imagenet, groups, {"models": "none", "size": 0}, tmp_path / "out", progress=False)
    text = report(store, imagenet).read_text()
    row = next(line for line in text.splitlines() if line.startswith("| ConceptAttention"))
    assert row.count("100.00") >= 3
    assert "83.07 / 71.04 / 90.45" in row
    assert "Bright\\|ness" in text
    assert "100.00" in summary(store)
    assert (
        json.loads((store.folder / "scores.json").read_text())["methods"]["ConceptAttention"]["accuracy"] == 1
    )
    with Image.open(store.folder / "cases.png") as image:
        assert min(image.size) > 400


def test_the_cases_are_the_best_the_median_and_the_worst(tmp_path):
    data, store = work(tmp_path, (1, 1), 9)
    results = Results(store)
    titles = [axes.get_title(loc="left") for axes in cases(results, data, each=1).axes]
    shown = [float(re.search(r"mIoU ([\d.]+)", t)[1]) for t in titles if "mIoU" in t]
    every = sorted(
        100 * metrics.scores_of([image["results"][results.first]["argmax"]], [None]).miou
        for image in results.by_image.values()
    )
    assert shown == pytest.approx([every[-1], every[4], every[0]], abs=0.06)


def test_a_report_of_no_results_is_refused(tmp_path):
    data, store = work(tmp_path, (1, 1), 0)
    with pytest.raises(ValueError, match="no image has a result"):
        report(store, data)


# The command line


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "--data", "voc"], "--data voc needs --path"),
        (["run", "--data", "imagenet", "--path", "x"], "needs --names.*n02084071"),
        (["run", "--data", "voc", "--path", "nowhere"], "VOCtrainval"),
        (["run", "--models", "files"], "--unet, --clip, --vae"),
        (["report", "nowhere"], "holds no run"),
    ],
)
def test_a_command_that_cannot_run_says_what_it_needs(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        cli.main(arguments)


def test_a_part_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["run", "--shard", "3/2"])
    assert "3/2" in capsys.readouterr().err


def test_a_report_on_other_data_than_the_runs_is_refused(tmp_path):
    _, store = work(tmp_path, (1, 1), 1)
    with pytest.raises(SystemExit, match="scenes-multi"):
        cli.main(["report", str(store.folder), "--data", "scenes"])


def test_the_command_runs_a_method_and_prints_its_scores(tmp_path):
    command = [sys.executable, "-m", "benchmarks.segmentation", "run", "--data", "scenes-multi"]
    command += ["--limit", "2", "--method", "cross-attention", "--out", str(tmp_path)]
    command += ["--refine", "--grounding", "anchor propagation"]
    done = subprocess.run(command, cwd=WORKER.parent.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"scenes-multi: 2 images, accuracy \d+\.\d\d, mIoU \d+\.\d\d", done.stdout)
    (folder,) = tmp_path.iterdir()
    assert (folder / "report.md").exists()
    (method,) = Store.open(folder).settings["methods"].values()
    assert method["refine"] is True
    assert method["grounding"] == "anchor propagation"
