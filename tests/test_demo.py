"""The demo's models and the scenes that they were trained on."""

from __future__ import annotations

from pathlib import Path

import comfy.sd
import numpy as np
import pytest
from safetensors import safe_open

from concept_attention.benchmarks.segmentation import datasets
from concept_attention.benchmarks.segmentation.methods import Query, loader
from concept_attention.benchmarks.segmentation.metrics import Tally, count, resized, winners
from concept_attention.benchmarks.segmentation.models import Models
from concept_attention.core.concepts import Concepts
from scenes import GROUNDS, HELD_OUT, NOUNS, make_scene

DEMO = Path(__file__).resolve().parent.parent / "demo"
FILES = [DEMO / f"{name}.safetensors" for name in ("flux", "vae", "text_encoder")]


def test_the_models_take_at_most_16_mb():
    assert sum(file.stat().st_size for file in FILES) <= 16e6


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_weights_are_fp16(file):
    with safe_open(file, "pt") as tensors:
        kinds = {tensors.get_slice(name).get_dtype() for name in tensors.keys() if "vae_s" not in name}  # noqa: SIM118
    assert kinds <= {"F16", "I32"}


def test_comfyui_loads_the_model_as_flux1():
    model = comfy.sd.load_diffusion_model(str(DEMO / "flux.safetensors"))
    assert type(model.model.model_config).__name__ == "FluxSchnell"


def test_the_same_seed_gives_the_same_scene():
    a, b = (make_scene(HELD_OUT + 7) for _ in range(2))
    assert np.array_equal(a.image, b.image)
    assert np.array_equal(a.labels, b.labels)
    assert (a.prompt, a.regions) == (b.prompt, b.regions)


def test_scenes_show_every_region_and_no_others():
    nouns = set()
    for seed in range(200):
        scene = make_scene(seed, look_alike=seed % 5 == 0)
        assert set(np.unique(scene.labels)) == set(range(len(scene.regions)))
        nouns |= {region.noun for region in scene.regions}
    assert nouns == {*NOUNS, *GROUNDS, "sky"}


def test_look_alike_scenes_have_two_objects_that_differ_in_colour_only():
    for seed in range(50):
        first, second = make_scene(seed, look_alike=True).regions[:2]
        assert first.noun == second.noun
        assert first.colour != second.colour


def test_crowds_are_three_or_four_objects_that_differ_in_colour_only():
    for seed in range(50):
        scene = make_scene(seed, crowd=True)
        objects = [region for region in scene.regions if region.colour]
        assert len(objects) in (3, 4)
        assert len({region.noun for region in objects}) == 1
        assert len({region.colour for region in objects}) == len(objects)
        assert set(np.unique(scene.labels)) == set(range(len(scene.regions)))


@pytest.mark.parametrize(
    "options,prompt",
    [
        ({}, "a green fish, a white cat and a green tree on the snow"),
        ({"look_alike": True}, "a red flower and a pink flower on the sand"),
        ({"posed": True}, "a yellow car on the sand"),
        (
            {"crowd": True},
            "a white house, an orange house, a red house and a pink house on the grass under the sky",
        ),
    ],
)
def test_scenes_are_those_that_the_model_was_trained_and_measured_on(options, prompt):
    assert make_scene(HELD_OUT, **options).prompt == prompt


def test_concept_maps_of_held_out_scenes_are_right():
    """Of the concepts, two are not in the scene."""
    data, nouns = datasets.scenes(several=True), (*NOUNS, *GROUNDS, "sky")
    tally, below = Tally(), []
    find = loader("concept-attention")(Models.demo(), bilinear=True)
    for index in range(30):
        example = data.load(index)
        shown = tuple(example.names.values())
        others = [noun for noun in (*NOUNS, *GROUNDS) if noun not in shown]
        absent = tuple(np.random.default_rng(index).permutation(others)[:2].tolist())
        query = Query(example.picture, Concepts((*shown, *absent)), ", ".join(shown), index)
        maps = find(query)
        labels = resized(example.labels, len(maps[0]))
        classes = [nouns.index(name) + 1 for name in query.concepts.all]
        tally.add(count(winners(maps, classes, len(labels)), labels))
        means = maps.mean((1, 2))
        below.append(bool(means[len(shown) :].max() < means[: len(shown)].min()))
    assert tally.scores().miou >= 0.70
    assert tally.scores().accuracy >= 0.92
    assert np.mean(below) >= 0.90
