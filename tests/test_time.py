"""Videos through everything that is made of a recording: what belongs together in time."""

from __future__ import annotations

import math
from dataclasses import replace

import comfy.model_management
import folder_paths
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from concept_attention.core.concepts import Concepts
from concept_attention.core.drawing import render
from concept_attention.core.drawing.figures import frames_figure, layers_figures
from concept_attention.core.drawing.render import heatmap_images, heatmap_size, images_of, overlay_images
from concept_attention.core.drawing.transport import layer_means
from concept_attention.core.observing.recording import Recording
from concept_attention.core.reading.files import load_maps, save_maps
from concept_attention.core.reading.grounding import propagate_anchors
from concept_attention.core.reading.maps import BETWEEN_FRAMES, ConceptMaps, concept_maps, upscale
from concept_attention.core.reading.masks import METHODS, clean, concept_masks, segment
from concept_attention.nodes.concept_figure import ConceptFigure
from concept_attention.nodes.concept_mask import ConceptMask
from concept_attention.nodes.concept_overlay import ConceptOverlay
from concept_attention.nodes.concept_saliency import ConceptSaliency
from concept_attention.nodes.concept_segmentation import ConceptSegmentation
from recordings import recording

CLIP = (1, *[4] * 8)
"""33 frames, as a causal VAE folds them into 9."""
SIDE, PATCH = 256, 16
NAMES = ("disc", "square")


def truth() -> Tensor:
    """A disc that goes in an arc and a square that goes up, in the pixels of each frame (T, 2, H, W)."""
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    frames = []
    for frame in range(sum(CLIP)):
        share = frame / (sum(CLIP) - 1)
        x, y = 56 + 144 * share, 90 - 34 * math.sin(math.pi * share)
        disc = (columns - x) ** 2 + (rows - y) ** 2 < 40**2
        left, top = 40 + 20 * share, 190 - 40 * share
        square = (columns - left).abs().lt(30) & (rows - top).abs().lt(30)
        frames.append(torch.stack([disc, square & ~disc]))
    return torch.stack(frames)


def clip(noise: float = 1.0, seed: int = 0) -> Recording:
    """What a model might see in it: of each patch, how much of it a thing takes, in the mean of the frames
    that share a latent frame, in noise."""
    inside = truth().float()
    inside = torch.cat([inside, 1 - inside.sum(1, keepdim=True)], 1)
    patches = torch.stack([F.avg_pool2d(frames.mean(0), PATCH) for frames in inside.split(CLIP)])
    g = torch.Generator().manual_seed(seed)
    scores = tuple(
        4 * patches + noise * torch.randn(2, *patches.shape, generator=g) for _ in range(6)
    )  # (L, F, K, h, w)
    return Recording(
        concepts=Concepts(NAMES, ("background",)),
        layers=(0, 1),
        default_layers=(0, 1),
        sigmas=tuple(1 - i / 6 for i in range(6)),
        steps=tuple(range(6)),
        scores={"output": scores},
        image_size=(SIDE, SIDE),
        coverage=(1.0, 1.0),
        durations=CLIP,
    )


def ious(masks: Tensor, truths: Tensor) -> Tensor:
    masks, truths = masks.bool(), truths.bool()
    return (masks & truths).sum((-2, -1)) / (masks | truths).sum((-2, -1))


def changes(masks: Tensor) -> Tensor:
    """How much the areas of masks (T, N, H, W) change from one frame to the next, as a share."""
    areas = masks.float().sum((2, 3))
    return (areas[1:] - areas[:-1]).abs() / areas[:-1]


def video(*durations: int, batch: int = 1, seed: int = 0) -> ConceptMaps:
    return concept_maps(replace(recording(batch=batch * len(durations), seed=seed), durations=durations))


def filmed(values: Tensor, durations: tuple[int, ...], **choice) -> ConceptMaps:
    """Maps with these values (F, 2, h, w) of a cat and of what is behind it."""
    made = recording(batch=len(values), concepts=Concepts(("cat",), ("rest",)), grid=tuple(values.shape[2:]))
    made = concept_maps(replace(made, durations=durations), **choice)
    return replace(made, values=values)


def pictures(count: int) -> Tensor:
    return torch.rand(count, 64, 96, 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", ["argmax", "otsu", "fixed"])
def test_masks_of_moving_things_are_where_the_things_are_in_every_frame(method):
    masks, _ = concept_masks(concept_maps(clip()), NAMES, method=method)
    assert masks.shape == (33, 2, SIDE, SIDE)
    overlap = ious(masks, truth())
    assert overlap.min() > 0.75
    assert overlap.mean() > 0.85


@pytest.mark.parametrize("method", ["argmax", "otsu", "fixed"])
@pytest.mark.parametrize("noise", [1.0, 2.0])
def test_masks_of_moving_things_do_not_blink(method, noise):
    masks, _ = concept_masks(concept_maps(clip(noise)), NAMES, method=method)
    assert masks.flatten(2).any(2).all()
    assert changes(masks).max() < 0.1


def test_maps_that_are_held_jump_where_those_in_between_move():
    overlap, jumps = {}, {}
    for how in BETWEEN_FRAMES:
        masks, _ = concept_masks(concept_maps(clip(), between_frames=how), NAMES)
        overlap[how], jumps[how] = ious(masks, truth()).mean(), changes(masks).max()
    assert overlap["linear"] > overlap["hold"] + 0.03
    assert jumps["linear"] < jumps["hold"] / 2


def test_frames_show_their_latent_frame_in_their_middle_and_what_lies_between_elsewhere():
    maps = video(1, 3, 3)
    first, second, third = maps.values
    shown = maps.shown()
    assert shown.shape == (1, 7, 3, 4, 6)
    assert torch.equal(shown[0, 0], first)
    assert torch.equal(shown[0, 2], second)
    assert torch.equal(shown[0, 5], shown[0, 6])
    assert torch.equal(shown[0, 5], third)
    torch.testing.assert_close(shown[0, 1], (first + second) / 2)
    torch.testing.assert_close(shown[0, 3], (2 * second + third) / 3)
    torch.testing.assert_close(shown.sum(2), torch.ones(1, 7, 4, 6))


def test_frames_that_hold_show_their_latent_frame():
    maps = replace(video(1, 3, 3, batch=2), between_frames="hold")
    assert torch.equal(maps.shown().flatten(0, 1), maps.values[maps.of_frames])


def test_layers_of_a_picture_and_images_are_shown_as_they_are():
    for maps in (video(1, 1, 1), video(1, batch=3)):
        assert torch.equal(maps.shown().flatten(0, 1), maps.values)


def test_what_is_between_frames_is_one_of_two():
    with pytest.raises(ValueError, match='"cubic". Choose one of: linear, hold'):
        concept_maps(recording(), between_frames="cubic")


def test_a_video_goes_with_its_frames_its_latent_frames_and_a_single_image():
    maps = video(1, 4, 4, batch=2)
    assert len(images_of(maps, pictures(18))) == 18
    assert len(images_of(maps, pictures(6))) == 6
    assert len(images_of(maps, pictures(1))) == 18
    assert torch.equal(maps.shown(6).flatten(0, 1), maps.values)


@pytest.mark.parametrize("count", [2, 8, 16, 17, 19])
def test_another_number_of_frames_is_an_error_that_gives_both_numbers(count):
    with pytest.raises(ValueError, match=f"are {count} images, but concept maps of a video of 9 frames"):
        images_of(video(1, 4, 4), pictures(count))
    with pytest.raises(ValueError, match="2 videos of 9 frames each.*frame rate.*a single image"):
        images_of(video(1, 4, 4, batch=2), pictures(count + 3))


def test_raw_scores_of_a_video_share_one_scale_and_videos_do_not():
    r = replace(recording(batch=4), durations=(1, 4))
    values = concept_maps(r, softmax=False).values
    for start in (0, 2):
        own = values[start : start + 2]
        assert (own.min(), own.max()) == (0, 1)
    apart = concept_maps(replace(r, durations=(1,)), softmax=False).values
    assert not torch.equal(values, apart)


def fading() -> ConceptMaps:
    """A cat that is fully there at first, and hardly in the end."""
    there = torch.zeros(3, 1, 4, 6)
    there[0, :, 1:3, 1:4], there[1, :, 1:3, 1:4], there[2, :, 1:3, 1:4] = 0.9, 0.5, 0.2
    return filmed(torch.cat([there, 1 - there], 1), (1, 4, 4), between_frames="hold")


def test_colours_have_one_scale_in_all_frames():
    black = torch.zeros(9, 64, 96, 3)
    maps = fading()
    for shared_scale in (True, False):
        overlays = overlay_images(maps, black, ["cat"], opacity=1.0, label=False, shared_scale=shared_scale)[
            :, 0
        ]
        brightness = [float(o.sum(-1).max()) for o in overlays]
        assert brightness[0] > 1.5 * brightness[1] > 2 * brightness[-1]
    heatmaps = heatmap_images(maps.shown()[0, :, :1], frames=9)[:, 0].sum(-1).amax((1, 2))
    assert heatmaps[0] > 1.5 * heatmaps[-1]


@pytest.mark.parametrize("method", ["mean", "otsu", "top fraction"])
def test_a_thing_that_has_left_gets_no_mask_in_the_frames_after(method):
    there = torch.rand(3, 1, 4, 6, generator=torch.Generator().manual_seed(0)) / 20
    there[:2, :, 1:3, 1:4] = 0.9
    maps = filmed(torch.cat([there, 1 - there], 1), (1, 4, 4), between_frames="hold")
    masks, found = concept_masks(maps, ["cat"], method=method, threshold=0.1)
    assert [bool(mask.any()) for mask in masks] == [True] * 5 + [False] * 4
    assert [len(parts) for parts in found] == [1] * 5 + [0] * 4


def test_top_fraction_is_a_share_of_the_whole_video():
    masks, _ = concept_masks(fading(), ["cat"], method="top fraction", threshold=0.05)
    assert masks.mean() == pytest.approx(0.05, abs=1e-4)
    assert masks[0].any()
    assert not masks[5:].any()


def tube() -> Tensor:
    """A square through all of 12 frames (T, H, W)."""
    inside = torch.zeros(12, 32, 32, dtype=torch.bool)
    inside[:, 8:16, 8:16] = True
    return inside


def test_a_speck_of_one_frame_is_dropped_and_a_thing_as_small_that_stays_is_not():
    inside = tube()
    inside[5, 24:29, 24:29] = True
    assert torch.equal(clean(inside, smallest_area=0.01), tube())
    assert clean(inside[5], smallest_area=0.01)[26, 26]  # in a picture, it is large enough
    lasting = tube()
    lasting[:, 24:29, 24:29] = True
    assert torch.equal(clean(lasting, smallest_area=0.01), lasting)


def test_a_thing_may_shrink_to_a_speck_for_a_while():
    inside = tube()
    inside[5:7] = False
    inside[5:7, 11, 11] = True
    assert torch.equal(clean(inside, smallest_area=0.01), inside)


def test_a_part_may_move_and_stays_one():
    inside = torch.zeros(12, 32, 32, dtype=torch.bool)
    for frame, plane in enumerate(inside):
        plane[10:14, 2 * frame : 2 * frame + 4] = True
    assert torch.equal(clean(inside, smallest_area=0.01), inside)


@pytest.mark.parametrize("frames", [slice(0, 3), slice(5, 6), slice(9, 12), slice(0, 12)])
def test_holes_are_filled_in_the_frames_that_enclose_them_the_first_and_the_last_too(frames):
    inside = tube()
    inside[frames, 11:13, 11:13] = False
    assert torch.equal(clean(inside, fill_holes=True), tube())


def test_what_moves_keeps_its_holes_filled():
    inside, whole = (torch.zeros(8, 32, 64, dtype=torch.bool) for _ in range(2))
    for frame in range(8):
        whole[frame, 10:22, 6 * frame : 6 * frame + 12] = True
        inside[frame] = whole[frame]
        inside[frame, 12:20, 6 * frame + 2 : 6 * frame + 10] = False
    assert torch.equal(clean(inside, fill_holes=True), whole)


@pytest.mark.parametrize("grow", [3, -2])
def test_masks_grow_in_their_frame_and_not_in_time(grow):
    inside = tube()
    inside[6:] = False
    grown = clean(inside, grow=grow)
    for frame, plane in zip(inside, grown, strict=True):
        assert torch.equal(plane, clean(frame, grow=grow))
    assert not grown[6:].any()


def test_a_frame_with_noise_only_is_cleaned_through_the_clip():
    r = clip()
    scores = [s.clone() for s in r.scores["output"]]
    for s in scores:
        s[:, 4, 0, 12:14, 12:14] += 9  # a disc, where there is none, in one latent frame
    masks, found = concept_masks(
        concept_maps(replace(r, scores={"output": tuple(scores)})), ["disc"], smallest_area=0.005
    )
    plain, _ = concept_masks(concept_maps(r), ["disc"], smallest_area=0.005)
    assert torch.equal(masks, plain)
    assert {len(parts) for parts in found} == {1}


def test_the_layers_of_a_picture_are_tidied_up_one_by_one():
    there = torch.zeros(4, 1, 8, 8)
    there[2, :, 2:4, 2:4] = 0.9
    values = torch.cat([there, 1 - there], 1)
    masks, _ = concept_masks(filmed(values, (1, 1, 1, 1)), ["cat"], smallest_area=0.05)
    assert masks[2].any()
    masks, _ = concept_masks(filmed(values, (1, 4, 4, 4), between_frames="hold"), ["cat"], smallest_area=0.05)
    assert not masks.any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("soft", [False, True])
def test_every_video_of_a_batch_is_masked_on_its_own(method, soft):
    together = video(1, 4, 4, batch=2)
    choice = {"method": method, "threshold": 0.3, "soft": soft, "smallest_area": 0.02}
    masks, found = concept_masks(together, ["cat", "ball"], **choice)
    for number in range(2):
        scores = tuple(s[:, 3 * number : 3 * number + 3] for s in together.recording.scores["output"])
        alone = concept_maps(replace(together.recording, scores={"output": scores}))
        expected, parts = concept_masks(alone, ["cat", "ball"], **choice)
        assert torch.equal(masks[9 * number : 9 * number + 9], expected)
        assert found[9 * number : 9 * number + 9] == parts


def test_refined_masks_follow_the_image_of_their_frame():
    maps, frames = video(1, 4, 4), pictures(9)
    masks, _ = concept_masks(maps, ["cat", "ball"], guide=frames, soft=True)
    labels = segment(maps, guide=frames)
    for frame in range(9):
        alone = filmed(maps.shown()[0, frame, None], (1,))
        alone = replace(alone, recording=replace(alone.recording, concepts=maps.concepts))
        expected, _ = concept_masks(alone, ["cat", "ball"], guide=frames[frame, None], soft=True)
        assert torch.equal(masks[frame], expected[0])
        assert torch.equal(labels[frame], segment(alone, guide=frames[frame, None])[0])


def crossing() -> tuple[Tensor, Tensor]:
    """Raw scores (3, F, h, w) of a red and a blue boat that sail past each other, on the sea, and where they
    are (2, F, h, w). Both look red in all frames, and the blue one looks bluer in its middle, but not in the
    last frames, where it looks red only and the red one a little blue."""
    frames, grid = 6, 16
    where = torch.zeros(2, frames, grid, grid, dtype=torch.bool)
    for frame in range(frames):
        where[0, frame, 2:6, 1 + 2 * frame : 5 + 2 * frame] = True
        where[1, frame, 9:13, 11 - 2 * frame : 15 - 2 * frame] = True
    red, blue, sea = scores = torch.full((3, frames, grid, grid), -2.0)
    sea[~where.any(0)] = 3
    red[where.any(0)] = 3
    blue[where[0]], blue[where[1]] = 0, 1
    for frame in range(frames):
        middle = 11 - 2 * frame + 1
        blue[frame, 10:12, middle : middle + 2] = 5 if frame < 3 else 1
    blue[3:][where[0, 3:]] = 1.5
    return scores, where


def test_one_anchor_for_the_whole_video_keeps_the_names_of_what_moves():
    scores, where = crossing()
    maps = scores.softmax(0)
    together = propagate_anchors(maps, scores).argmax(0)
    alone = torch.stack(
        [propagate_anchors(maps[:, f], scores[:, f]).argmax(0) for f in range(scores.shape[1])]
    )
    for frame in range(scores.shape[1]):
        for boat in range(2):
            assert ious(together[frame] == boat, where[boat, frame]) > 0.9
    assert ious(alone[-1] == 1, where[1, -1]) < 0.5
    made = propagate_anchors(maps, scores)
    torch.testing.assert_close(made.sum(0), torch.ones(made.shape[1:]))
    assert made.dtype == torch.float32


def test_walks_through_a_video_of_one_frame_are_those_in_an_image():
    scores = 3 * torch.randn(4, 9, 14, generator=torch.Generator().manual_seed(0))
    maps = scores.softmax(0)
    image = propagate_anchors(maps, scores)
    assert torch.equal(propagate_anchors(maps[:, None], scores[:, None])[:, 0], image)


def test_the_maps_of_every_video_are_propagated_through_all_its_frames():
    r = replace(recording(batch=6), durations=(1, 4, 4))
    maps, plain, raw = (
        concept_maps(r, grounding="anchor propagation").values,
        concept_maps(r).values,
        torch.stack([s[-4:].mean(0) for s in r.scores["output"]]).mean(0),
    )
    for video_ in (slice(0, 3), slice(3, 6)):
        expected = propagate_anchors(plain[video_].movedim(1, 0), raw[video_].movedim(1, 0))
        torch.testing.assert_close(maps[video_], expected.movedim(0, 1), atol=1e-5, rtol=0)
    layers = replace(r, durations=(1, 1, 1))
    apart = concept_maps(replace(r, durations=(1,)), grounding="anchor propagation")
    assert torch.equal(concept_maps(layers, grounding="anchor propagation").values, apart.values)


@pytest.mark.parametrize("how", BETWEEN_FRAMES)
def test_files_keep_what_is_between_frames(tmp_path, how):
    maps = replace(video(1, 4, 4, batch=2), between_frames=how)
    save_maps(maps, tmp_path / "maps")
    loaded = load_maps(tmp_path / "maps")
    assert loaded.between_frames == how
    assert torch.equal(loaded.shown(), maps.shown())


def test_files_keep_how_many_evaluations_were_kept_as_one(tmp_path):
    r = replace(recording(batch=3), durations=(1, 4, 4), counts=(4, 4, 1))
    maps = concept_maps(r, average="before softmax")
    save_maps(maps, tmp_path / "maps")
    loaded = load_maps(tmp_path / "maps")
    assert loaded.recording.counts == (4, 4, 1)
    assert torch.equal(concept_maps(loaded.recording, average="before softmax").values, maps.values)
    plain = concept_maps(replace(r, counts=()), average="before softmax")
    assert not torch.allclose(plain.values, maps.values, atol=0.01)


def test_means_that_the_viewer_is_sent_count_each_evaluation_of_the_model():
    r = recording()
    maps = concept_maps(replace(r, counts=(2, 2, 1)))
    three = [s[:, 0].softmax(1) for s in r.scores["output"]]
    torch.testing.assert_close(layer_means(maps, 0), (2 * three[0] + 2 * three[1] + three[2]) / 5)


def test_a_figure_of_a_video_is_a_strip_of_frames_with_their_numbers():
    maps = concept_maps(clip())
    frames = truth().any(1).float()[..., None].expand(-1, -1, -1, 3)
    figure = frames_figure(maps, 0, frames, columns=5)
    *panels, bar = figure.axes
    assert len(panels) == 3 * 5
    assert [axes.get_title() for axes in panels[:5]] == [f"frame {n}" for n in (1, 9, 17, 25, 33)]
    assert [axes.get_ylabel() for axes in panels[::5]] == ["", *NAMES]
    assert len({axes.images[0].get_clim() for axes in panels[5:]}) == 1
    assert (panels[3].images[0].get_array() == frames[24].numpy()).all()
    expected = upscale(maps.shown()[0, 16, None, :1], (SIDE, SIDE))[0, 0]
    assert (panels[7].images[0].get_array() == expected.numpy()).all()
    assert bar.get_ylabel() == "softmax"


def test_figures_of_layers_are_of_the_frames_that_are_asked_for():
    maps = concept_maps(clip())
    figures = list(layers_figures(maps, ["square"], columns=2, frames=3))
    assert len(figures) == 3
    expected = concept_maps(clip(), layers=[1], steps=[5]).shown()[0, 16, 1]
    panel = figures[1].axes[3].images[0].get_array()
    assert panel.max() == pytest.approx(float(expected.max()), abs=0.05)
    assert [figure.texts[0].get_text() for figure in figures] == [
        f"square, frame {number}" for number in (1, 17, 33)
    ]


def test_every_node_gives_a_picture_for_every_frame(tmp_path, monkeypatch):
    maps = video(1, 4, 4, batch=2)
    saliency = {"space": "output", "layers": "default", "start_step": 0, "end_step": 9}
    saliency |= {"softmax": True, "temperature": 1.0}
    made, masks, heatmaps = ConceptSaliency.execute(maps, **saliency, between_frames="hold").result
    assert made.between_frames == "hold"
    assert masks.shape == (18 * 2, 64, 96)
    assert heatmaps.shape == (18 * 2, 64, 96, 3)
    torch.testing.assert_close(masks[2:4], made.at_size(64, 96)[1, :2])
    cut = {"concept": "", "method": {"method": "otsu"}, "soft": False, "fill_holes": False}
    cut |= {"smallest_area": 0.0, "grow": 0, "feather": 0.0, "invert": False}
    for image, count in ((None, 18), (pictures(18), 18), (pictures(6), 6), (pictures(1), 18)):
        masks, boxes, points = ConceptMask.execute(maps, **cut, image=image).result
        assert masks.shape == (count, 64, 96)
        assert len(boxes) == len(points) == count
        regions, masks = ConceptSegmentation.execute(maps, 0.0, 0.6, False, image=image).result
        assert regions.shape == (count, 64, 96, 3)
        assert masks.shape == (count * 2, 64, 96)
        if image is not None:
            over = ConceptOverlay.execute(maps, image, "", "magma", 0.6, "all concepts", 0.0, False).result[0]
            assert over.shape == (count * 2, 64, 96, 3)
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    drawn = {"title": "", "colour_map": "magma", "dpi": 60, "vector": "none", "filename_prefix": "figure"}
    figures = ConceptFigure.execute(maps, {"layout": "concepts"}, **drawn, image=pictures(18)).result[0]
    assert len(figures) == 2
    of_layers = {"layout": "layers and steps", "concept": "cat", "layers": "0, 1", "steps": 2}
    assert len(ConceptFigure.execute(maps, of_layers, **drawn, frames=3).result[0]) == 2 * 3


def test_overlays_of_a_video_tell_how_far_they_are_and_can_be_cancelled():
    told = []
    maps = video(1, 4)
    overlay_images(maps, pictures(5), ["cat", "ball"], progress=lambda *counts: told.append(counts))
    assert told == [(done, 10) for done in range(11)]
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        ConceptOverlay.execute(maps, pictures(5), "", "magma", 0.6, "all concepts", 0.0, False)


def test_heatmaps_of_a_long_video_are_smaller_than_it(monkeypatch):
    maps = video(1, 4, 4)
    assert heatmap_size(maps) == (64, 96)
    monkeypatch.setattr(render, "_HEATMAPS", 12 * 32 * 48 * 9 * 2)
    assert heatmap_size(maps) == (32, 48)
    made = ConceptSaliency.execute(maps, "output", "default", 0, 9, True, 1.0).result
    assert made[1].shape == (18, 64, 96)
    assert made[2].shape == (18, 32, 48, 3)
    assert heatmap_size(video(1, batch=9)) == (64, 96)
