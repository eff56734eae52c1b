from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from concept_attention.core.concepts import Concepts
from concept_attention.core.observing.recording import parse_layers
from concept_attention.core.reading.maps import concept_maps, heatmaps, upscale
from concept_attention.nodes.concept_saliency import ConceptSaliency
from recordings import maps_of, recording


def test_the_softmax_is_over_concepts_and_before_the_mean():
    r = recording()
    scores = torch.stack(r.scores["output"])[:, 2:]  # (E, L, B, K, h, w), default layers
    expected = torch.stack([s.softmax(-3) for s in scores.flatten(0, 1)]).mean(0)
    torch.testing.assert_close(heatmaps(r), expected)
    assert not torch.allclose(heatmaps(r), scores.mean((0, 1)).softmax(-3), atol=0.01)


def test_raw_maps_are_the_mean_of_the_scores():
    r = recording()
    expected = torch.stack(r.scores["output"])[[0, 2]][:, [1, 3]].mean((0, 1))
    torch.testing.assert_close(heatmaps(r, layers=[1, 3], steps=[0, 2], softmax=False), expected)


def test_the_softmax_may_be_of_the_mean_instead():
    r = recording()
    mean = torch.stack(r.scores["output"])[[0, 2]][:, [1, 3]].mean((0, 1))
    choice = {"layers": [1, 3], "steps": [0, 2], "temperature": 5.0}
    maps = concept_maps(r, **choice, average="before softmax")
    torch.testing.assert_close(maps.values, (mean / 5).softmax(1))
    assert maps.average == "before softmax"
    default = concept_maps(r, **choice)
    assert default.average == "after softmax"
    assert torch.equal(default.values, heatmaps(r, **choice))
    assert not torch.allclose(maps.values, default.values, atol=0.01)


def test_the_softmax_of_the_mean_is_of_the_evaluations_in_which_a_prompt_was_at_work():
    r = recording()
    r.scores["output"][1][..., 0, 0] = torch.nan
    for scores in r.scores["output"]:
        scores[..., 3, 5] = torch.nan
    maps = heatmaps(r, average="before softmax")
    seen = torch.stack(r.scores["output"])[[0, 2]][:, 2:].mean((0, 1)).softmax(1)
    torch.testing.assert_close(maps[..., 0, 0], seen[..., 0, 0])
    assert maps[..., 3, 5].isnan().all()
    assert maps.isnan().sum() == maps.shape[1]
    assert not concept_maps(r, average="before softmax").values[..., 3, 5].any()


def test_raw_maps_do_not_depend_on_the_average():
    r = recording()
    before, after = (heatmaps(r, softmax=False, average=f"{side} softmax") for side in ("before", "after"))
    assert torch.equal(before, after)


def test_an_unknown_average_is_an_error():
    with pytest.raises(ValueError, match='average "median". Choose one of: after softmax; before softmax'):
        concept_maps(recording(), average="median")


def test_the_node_makes_the_maps_of_the_average_that_is_chosen():
    r = recording()
    widgets = {"space": "output", "layers": "default", "start_step": 0, "end_step": 100}
    widgets |= {"softmax": True, "temperature": 1.0, "average": "before softmax"}
    maps = ConceptSaliency.execute(concept_maps(r), **widgets).result[0]
    assert maps.average == "before softmax"
    assert torch.equal(maps.values, heatmaps(r, average="before softmax"))


def test_a_temperature_divides_the_scores():
    r = recording()
    halved = recording()
    for scores in halved.scores["output"]:
        scores /= 2
    torch.testing.assert_close(heatmaps(r, temperature=2.0), heatmaps(halved))


def test_selecting_does_not_change_the_recording():
    r = recording()
    before = [s.clone() for s in r.scores["output"]]
    heatmaps(r, layers=[0])
    heatmaps(r, layers=r.layers, temperature=3.0)
    heatmaps(r, layers=r.layers, softmax=False)
    assert all(torch.equal(a, b) for a, b in zip(before, r.scores["output"], strict=True))


@pytest.mark.parametrize("temperature", [0, -1, float("nan")])
def test_a_temperature_that_is_not_positive_is_an_error(temperature):
    with pytest.raises(ValueError, match="above 0"):
        heatmaps(recording(), temperature=temperature)


def test_what_was_not_recorded_is_an_error_that_says_what_was():
    r = recording()
    with pytest.raises(ValueError, match='"value" was not recorded, only: output'):
        heatmaps(r, space="value")
    with pytest.raises(ValueError, match="Layers 7, 9 were not recorded. Recorded: 0-5"):
        heatmaps(r, layers=[5, 7, 9])
    with pytest.raises(ValueError, match="No layers were chosen. Recorded: 0-5"):
        heatmaps(r, layers=[])
    with pytest.raises(ValueError, match="Recorded steps: 0-2"):
        heatmaps(r, steps=range(3, 10))


def test_maps_with_a_softmax_add_up_to_one():
    maps = concept_maps(recording(batch=2))
    torch.testing.assert_close(maps.values.sum(1), torch.ones(2, 4, 6))


def test_raw_maps_share_one_scale_per_image():
    r = recording(batch=2)
    for scores in r.scores["output"]:
        scores[:, 1] *= 10
    raw, scaled = heatmaps(r, softmax=False), concept_maps(r, softmax=False).values
    assert scaled.amin((1, 2, 3)).tolist() == [0, 0]
    assert scaled.amax((1, 2, 3)).tolist() == [1, 1]
    for image in (0, 1):
        assert raw[image].flatten().argsort().tolist() == scaled[image].flatten().argsort().tolist()


def test_raw_maps_of_constant_scores_are_zero():
    r = recording()
    for scores in r.scores["output"]:
        scores.fill_(2.5)
    assert not concept_maps(r, softmax=False).values.any()


def test_nearest_upscaling_repeats_patches():
    maps = torch.arange(6.0).view(1, 1, 2, 3)
    big = upscale(maps, (32, 48), mode="nearest")
    assert torch.equal(big, maps.repeat_interleave(16, 2).repeat_interleave(16, 3))


def test_a_padded_grid_is_cut_to_the_image():
    """A 15 x 17 latent is 8 x 9 patches of 16 pixels, of which the image covers 120 x 136 pixels."""
    maps = torch.rand(1, 2, 8, 9)
    coverage = (15 / 16, 17 / 18)
    whole = upscale(maps, (128, 144))
    assert torch.equal(upscale(maps, (120, 136), coverage), whole[..., :120, :136])
    assert upscale(maps, (240, 272), coverage).shape == (1, 2, 240, 272)
    assert upscale(maps, (1, 1), coverage).shape == (1, 2, 1, 1)


def test_concepts_are_found_whatever_their_case_and_spacing():
    maps = maps_of(torch.zeros(1, 3, 1, 1), Concepts(("Hot air balloon", "cat"), ("sky",)), (8, 8))
    assert maps.index(" hot  AIR balloon") == 0
    assert maps.index("sky") == 2
    with pytest.raises(ValueError, match='no concept "dog". The concepts are: Hot air balloon, cat, sky'):
        maps.index("dog")


@pytest.mark.parametrize(
    "text,layers",
    [
        ("all", (0, 1, 2, 3, 4)),
        (" Default ", (3, 4)),
        ("2", (2,)),
        ("0, 2-4", (0, 2, 3, 4)),
        ("3 - 4,0,3", (0, 3, 4)),
    ],
)
def test_layers_are_read_from_text(text, layers):
    assert parse_layers(text, range(5), (3, 4)) == layers


def test_all_layers_may_be_fewer_than_there_are():
    assert parse_layers("all", range(5), (1,), main=range(2)) == (0, 1)
    assert parse_layers("1-3", range(5), (1,), main=range(2)) == (1, 2, 3)


@pytest.mark.parametrize("text", ["", "last", "1;2", "1-", "-1", "1.5", "٣x", 5000 * "9"])
def test_layers_that_cannot_be_read_are_an_error(text):
    with pytest.raises(ValueError, match="cannot be read"):
        parse_layers(text, range(5), (3, 4))


@pytest.mark.parametrize("text", ["5", "0-5", "99999999999"])
def test_layers_that_do_not_exist_are_an_error(text):
    with pytest.raises(ValueError, match="only: 0-4"):
        parse_layers(text, range(5), (3, 4))


@pytest.mark.parametrize("text,backwards", [("2-0", "0-2 for 2-0"), ("0, 18-15", "15-18 for 18-15")])
def test_a_range_that_runs_backwards_is_an_error_that_turns_it_round(text, backwards):
    with pytest.raises(ValueError, match=f'"{text}" have a range that runs backwards: write {backwards}'):
        parse_layers(text, range(5), (3, 4))


def test_layers_that_were_left_out_for_their_size_are_an_error_that_says_so():
    with pytest.raises(ValueError, match=r"Layers 0-2 were left out .* 256 MB.*record_every"):
        parse_layers("1, 3", (3, 4), (3, 4), left_out=(0, 1, 2))
    with pytest.raises(ValueError, match=r"only: 3-4\.$"):
        parse_layers("7", (3, 4), (3, 4), left_out=(0, 1, 2))


def test_a_range_skips_layers_that_were_not_recorded():
    assert parse_layers("0-18", (0, 5, 18), (18,)) == (0, 5, 18)


def test_a_latent_frame_shows_as_many_frames_of_the_video_as_it_stands_for():
    video = replace(recording(batch=6), durations=(1, 4, 4))
    assert concept_maps(video).of_frames == [0, *[1] * 4, *[2] * 4, 3, *[4] * 4, *[5] * 4]
    assert concept_maps(replace(video, durations=(1,))).of_frames == [0, 1, 2, 3, 4, 5]
