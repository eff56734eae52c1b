from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from xml.dom import minidom

import comfy.model_management
import comfy.utils
import folder_paths
import matplotlib
import numpy as np
import pytest
import torch
from comfy.model_management import InterruptProcessingException
from matplotlib.axes import Axes
from torch.utils._python_dispatch import TorchDispatchMode

from concept_attention.core.concepts import Concepts
from concept_attention.core.drawing.figures import concepts_figure, layers_figures
from concept_attention.core.drawing.palette import difference, hex_colours, magma, palette, seen
from concept_attention.core.drawing.render import (
    COLOUR_MAPS,
    colourise,
    figure_image,
    heatmap_images,
    images_of,
    overlay_images,
    segmentation_images,
    shortened,
    text_width,
)
from concept_attention.core.reading.grounding import propagate_anchors
from concept_attention.core.reading.maps import GROUNDINGS, concept_maps
from concept_attention.core.reading.masks import segment
from concept_attention.nodes.concept_figure import ConceptFigure
from concept_attention.nodes.concept_overlay import ConceptOverlay
from concept_attention.nodes.concept_segmentation import ConceptSegmentation
from recordings import maps_of, recording

HOSTILE = (
    "$x_1$",
    "$\\frac{$",
    "<b>&\"'</b>",
    "-->",
    "%s {0} \\n",
    "고양이",
    "🐱 e\u0301",
    "قطة",
    "\x01\x7f \ud83d",
    "a very long name".replace(" ", "_") * 40,
)


def scene(batch: int = 1):
    """A cat in the left half, a ball in a corner of the right one, sky elsewhere; no dragon. 8 x 16 patches,
    128 x 256 pixels. The further down the batch, the fainter the cat."""
    values = torch.full((batch, 4, 8, 16), 0.01)
    for image in range(batch):
        values[image, 0, :, :8] = 0.9 - 0.1 * image
    values[:, 1, 4:, 12:] = 0.7
    values[:, 3] = 0.3
    return maps_of(values, Concepts(("cat", "ball", "dragon"), ("sky",)), (128, 256))


def photo(batch: int = 1, height: int = 128, width: int = 256) -> torch.Tensor:
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(0))


def bare(maps, images, names, **options):
    """An overlay of colours only."""
    return overlay_images(maps, images, names, **{"opacity": 1.0, "label": False} | options)


LOWEST, HIGHEST = colourise(torch.tensor([0.0, 1.0]))


def test_an_absent_concept_looks_absent_in_an_overlay():
    cat, dragon = bare(scene(), photo(), ["cat", "dragon"])[0]
    assert torch.allclose(cat[64, 32], HIGHEST)
    assert (dragon - LOWEST).abs().max() < 0.05


def test_on_a_scale_of_its_own_a_concept_reaches_the_brightest_colour():
    maps = scene()
    ball = bare(maps, photo(), ["ball"])[0, 0]
    alone = bare(maps, photo(), ["ball"], shared_scale=False)[0, 0]
    assert not torch.allclose(ball[-1, -1], HIGHEST, atol=0.02)
    assert torch.allclose(alone[-1, -1], HIGHEST)


def test_the_scale_is_that_of_all_concepts_even_when_few_are_shown():
    together = bare(scene(), photo(), ["cat", "ball"])[0, 1]
    assert torch.equal(bare(scene(), photo(), ["ball"])[0, 0], together)


def test_an_overlay_without_opacity_contour_and_name_is_the_image():
    picture = bare(scene(), photo(), ["cat"], opacity=0.0)
    assert torch.equal(picture[0, 0], photo()[0])


def test_the_heatmaps_of_each_image_go_from_zero_to_the_highest_value_there():
    maps = scene(2).at_size(128, 256).flip(1)
    for images in (maps, 0.3 * maps, torch.zeros_like(maps)):
        heatmaps = heatmap_images(images)
        for image, own in zip(heatmaps, images, strict=True):
            assert torch.equal(image, colourise(own / (own.max() or 1.0)))


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_a_heatmap_has_its_name_in_the_corner_readable_on_any_colour(value):
    maps = torch.full((2, 2, 128, 192), value)
    maps[:, :, -1] = 1.0
    plain, named = heatmap_images(maps), heatmap_images(maps, ["rock", "dragon"])
    changed = (plain != named).any(-1)
    for one, other in zip(*changed, strict=True):
        assert torch.equal(one, other)  # the same name in each image of the batch
    rock, dragon = changed[0]
    assert rock.any(0).sum() < dragon.any(0).sum() < 96
    assert not changed[..., 40:, :].any()
    luminance = named[0, 1][dragon] @ torch.tensor([0.2126, 0.7152, 0.0722])
    linear = ((luminance + 0.055) / 1.055) ** 2.4
    assert (linear.max() + 0.05) / (linear.median() + 0.05) > 4.5  # WCAG's level AA


def test_the_name_on_a_heatmap_is_the_one_on_an_overlay():
    maps = scene()
    heatmap = heatmap_images(maps.at_size(128, 256)[:, :1], ["cat"])[0, 0]
    overlay = overlay_images(maps, photo(), ["cat"], opacity=1.0)[0, 0]
    assert torch.equal(heatmap, overlay)


def test_making_heatmaps_takes_little_memory_beside_them():
    class Large(TorchDispatchMode):
        """Where tensors are that take more than a single map."""

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if result.untyped_storage().nbytes() > maps[0, 0].nbytes:
                places.add(result.untyped_storage().data_ptr())
            return result

    maps, places = torch.rand(4, 5, 64, 64), set()
    with Large():
        heatmaps = heatmap_images(maps)
    assert places == {t.untyped_storage().data_ptr() for t in (maps, heatmaps)}


def test_opacity_mixes_image_and_colours():
    clear, half, full = (bare(scene(), photo(), ["cat"], opacity=o) for o in (0.0, 0.5, 1.0))
    torch.testing.assert_close(half, (clear + full) / 2)


def test_a_contour_runs_where_the_map_crosses_its_level():
    plain, outlined = (bare(scene(), photo(), ["cat"], contour=c)[0, 0] for c in (0.0, 0.5))
    changed = (plain - outlined).abs().amax(-1) > 0.01
    columns = changed.any(0).nonzero().flatten()
    assert changed[1:-1].any(1).all()  # a line from top to bottom
    assert columns.min() >= 120
    assert columns.max() <= 136


def test_a_concept_that_does_not_reach_the_level_has_no_contour():
    plain, outlined = (bare(scene(), photo(), ["dragon"], contour=c) for c in (0.0, 0.5))
    assert torch.equal(plain, outlined)


@pytest.mark.parametrize("height, width", [(1, 2), (2, 1), (1, 1)])
def test_an_image_of_single_pixels_has_no_contour(height, width):
    values = torch.linspace(0, 1, 2 * height * width).view(1, 2, height, width)
    maps = maps_of(values, Concepts(("cat", "ball")), (16 * height, 16 * width))
    image = photo(1, height, width)
    plain, outlined = (bare(maps, image, ["ball"], contour=c) for c in (0.0, 0.8))
    assert torch.equal(plain, outlined)


def test_a_name_is_written_into_its_corner_only():
    plain, named = (bare(scene(), photo(), ["cat"], label=x)[0, 0] for x in (False, True))
    rows, columns = (plain != named).any(-1).nonzero().T
    assert rows.max() < 40
    assert 5 < columns.max() < 80


def test_a_name_is_written_as_it_is_spelled():
    assert text_width("$x$", 20) > text_width("x", 20) + text_width("$", 20)
    assert text_width("a_b^c", 20) > text_width("abc", 20)


def test_control_characters_are_not_drawn():
    assert shortened("a\x00\x1b\ud83db", 60, 12) == "ab"


def test_a_long_name_is_cut_to_fit():
    short = shortened("a very long name", 60, 12)
    assert short.endswith("…")
    assert text_width(short, 12) <= 60
    assert shortened("cat", 60, 12) == "cat"
    assert text_width(shortened("x" * 100_000, 60, 12), 12) <= 60


def test_overlays_go_image_by_image_with_concepts_in_the_order_asked_for():
    maps, images = scene(2), photo(2)
    both = overlay_images(maps, images, ["ball", "cat"])
    assert both.shape == (2, 2, 128, 256, 3)
    second = scene(2)
    second = maps_of(second.values[1:], second.concepts, second.image_size)
    assert torch.equal(both[1, 1], overlay_images(second, images[1:], ["cat"])[0, 0])


def test_one_image_goes_with_all_maps_and_one_map_with_all_images():
    one, many = photo(1), photo(3)
    assert torch.equal(bare(scene(3), one, ["cat"])[2], bare(scene(3), one.expand(3, -1, -1, -1), ["cat"])[2])
    frames = bare(scene(1), many, ["cat"], opacity=0.4)
    for frame, image in zip(frames, many, strict=True):
        assert torch.equal(frame, bare(scene(1), image[None], ["cat"], opacity=0.4)[0])


def test_other_numbers_of_images_and_maps_are_an_error_that_gives_both():
    with pytest.raises(ValueError, match="2 images, but concept maps of 3"):
        images_of(scene(3), photo(2))


def test_an_image_of_another_shape_is_an_error_that_gives_both_sizes():
    with pytest.raises(ValueError, match=r"256 x 256 pixels.* 256 x 128"):
        images_of(scene(), photo(1, 256, 256))


def test_an_image_of_another_scale_keeps_its_size():
    assert bare(scene(), photo(1, 250, 515), ["cat"]).shape == (1, 1, 250, 515, 3)
    assert segmentation_images(segment(scene(), (250, 515)), ["cat"], photo(1, 250, 515)).shape[1] == 250


def test_the_alpha_channel_and_half_precision_of_images_are_left_behind():
    image = torch.cat([photo(), torch.zeros(1, 128, 256, 1)], -1).half()
    assert images_of(scene(), image).dtype == torch.float32
    assert images_of(scene(), image).shape == (1, 128, 256, 3)


def test_the_inputs_are_not_changed():
    maps, images = scene(2), photo(2)
    before = maps.values.clone(), images.clone()
    overlay_images(maps, images, ["cat"], contour=0.5)
    segmentation_images(segment(maps), maps.concepts.names, images)
    concepts_figure(maps, 0, images[0])
    assert torch.equal(maps.values, before[0])
    assert torch.equal(images, before[1])


@pytest.mark.parametrize("name", COLOUR_MAPS)
def test_colour_maps_get_lighter_evenly(name):
    lightness = seen(colourise(torch.linspace(0, 1, 256), name).numpy().astype(float))[0, :, 0]
    steps = np.diff(lightness[::8])
    assert steps.min() > 0
    assert steps.max() < 4 * np.median(steps)


def test_magma_is_the_colour_map_of_that_name_to_half_a_percent():
    assert np.abs(magma() - matplotlib.colormaps["magma"](range(256))[:, :3]).max() < 0.005


@pytest.mark.parametrize("count,apart", [(7, 0.07), (16, 0.07), (32, 0.05), (128, 0.015)])
def test_colours_of_concepts_are_apart_to_colour_blind_eyes_too(count, apart):
    colours = palette(count)
    apart_by = difference(colours, colours)[~np.eye(count, dtype=bool)]
    assert apart_by.min() > apart


def test_more_concepts_leave_the_colours_of_the_first_as_they_are():
    assert np.array_equal(palette(128)[:5], palette(5))
    assert hex_colours(2) == ["#e69f00", "#56b4e9"]


def test_colours_of_concepts_stand_out_from_black_and_from_white():
    ends = np.array([[0, 0, 0], [1, 1, 1]])
    assert difference(palette(128), ends).min() > 0.1


def test_a_pixel_belongs_to_the_highest_map_background_included():
    labels = segment(scene())[0]
    assert labels[64, 10] == 0
    assert labels[-1, -1] == 1
    assert labels[0, -1] == 3
    assert set(labels.unique().tolist()) == {0, 1, 3}


def test_below_the_floor_a_pixel_belongs_to_none():
    labels = segment(scene(), floor=0.8)[0]
    assert labels[64, 10] == 0
    assert set(labels.unique().tolist()) == {-1, 0}
    assert (segment(scene(), floor=1.0) == -1).all()
    assert (segment(scene(), floor=0.0) >= 0).all()


def test_alone_regions_have_exactly_the_colours_of_the_palette():
    maps = scene()
    picture = segmentation_images(segment(maps), maps.concepts.names, legend=False)[0]
    colours = torch.from_numpy(palette(3)).float()
    assert torch.equal(picture[64, 10], colours[0])
    assert torch.equal(picture[-1, -1], colours[1])
    assert not picture[0, -1].any()  # sky


def test_over_an_image_background_and_unassigned_pixels_are_left_clear():
    maps, image = scene(), photo()
    labels = segment(maps, floor=0.8)
    picture = segmentation_images(labels, maps.concepts.names, image, legend=False)
    clear = labels < 0
    assert torch.equal(picture[clear], image[clear])
    assert not torch.isclose(picture[~clear], image[~clear]).all(-1).any()


def test_the_legend_says_how_much_of_the_image_each_concept_takes():
    maps = scene(2)
    labels = segment(maps)
    plain, listed = (segmentation_images(labels, maps.concepts.names, legend=x) for x in (False, True))
    assert torch.equal(listed[:, :, :256], plain)
    labels[1, :, :128] = 1
    other = segmentation_images(labels, maps.concepts.names)
    assert torch.equal(other[0], listed[0])
    assert not torch.equal(other[1, :, 256:], listed[1, :, 256:])


def listed(legend: torch.Tensor, count: int) -> list[int]:
    """Which of so many concepts have their colour in a legend (H, W, 3)."""
    colours = torch.from_numpy(palette(count)).float()
    return [i for i in range(count) if ((legend - colours[i]).abs().amax(-1) < 0.003).sum() > 50]


@pytest.mark.parametrize("height, count", [(64, 1), (64, 10), (1024, 1), (1024, 20), (1024, 127)])
def test_a_legend_lists_all_concepts_beside_an_image_of_any_size(height, count):
    labels = torch.zeros(1, height, 16, dtype=torch.long)
    picture = segmentation_images(labels, [f"concept {i}" for i in range(count)])
    legend = picture[0, :, 16:]
    assert listed(legend, count) == [*range(count)]
    edges = torch.cat([legend[[0, -1]].flatten(), legend[:, [0, -1]].flatten()])
    assert (edges == 1).all()


@pytest.mark.parametrize("size", [(64, 16), (256, 256), (100, 2000)])
def test_a_legend_too_wide_for_all_concepts_lists_the_largest_and_counts_the_rest(size, monkeypatch):
    written = []
    text = Axes.text
    monkeypatch.setattr(Axes, "text", lambda *a, **k: (written.append(a[3]), text(*a, **k)))
    labels = torch.arange(127).repeat(2, size[0], 1).repeat_interleave(size[1] // 16, 2)[..., : size[1]]
    labels[1], labels[:, :8] = 126, 100
    picture = segmentation_images(labels, [f"concept {i}" for i in range(127)])
    assert picture.shape[2] - size[1] <= max(1024, *size)
    shown = listed(picture[0, :, size[1] :], 127)
    assert 1 < len(shown) < 127
    assert {100, 126} <= {*shown}
    assert listed(picture[1, :, size[1] :], 127) == shown
    first = written[: len(written) // 2]
    assert first[::2] == [*(f"concept {i}" for i in shown), f"and {127 - len(shown)} more", "none of these"]
    shares = [float(share.removesuffix(" %")) for share in first[1::2]]
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares))


def test_names_of_any_kind_are_drawn_in_every_picture_and_format(tmp_path):
    concepts = Concepts(HOSTILE)
    maps = concept_maps(recording(concepts=concepts))
    overlay_images(maps, photo(1, 64, 96), HOSTILE)
    heatmap_images(maps.at_size(64, 96), maps.concepts.names)
    segmentation_images(segment(maps), HOSTILE, photo(1, 64, 96))
    figures = [concepts_figure(maps, title=HOSTILE[2])]
    figures += layers_figures(maps, HOSTILE[:2], layers=[0], columns=1)
    for figure in figures:
        assert figure_image(figure, 50).isfinite().all()
        for kind in ("svg", "pdf"):
            figure.savefig(tmp_path / f"figure.{kind}")
        minidom.parse(str(tmp_path / "figure.svg"))


def panels(figure):
    """The axes of a figure that show pictures, its colour bar left out."""
    return [axes for axes in figure.axes if axes.images]


def test_a_figure_shows_the_concepts_in_order_beside_the_image():
    figure = concepts_figure(scene(), 0, photo()[0])
    assert [axes.get_title() for axes in panels(figure)] == ["image", "cat", "ball", "dragon"]
    alone = concepts_figure(scene())
    assert [axes.get_title() for axes in panels(alone)] == ["cat", "ball", "dragon"]


def test_all_panels_of_a_figure_share_the_scale_of_its_colour_bar():
    maps = scene()
    figure = concepts_figure(maps)
    (bar,) = (axes for axes in figure.axes if axes not in panels(figure))
    assert bar.get_ylim() == pytest.approx((0, 0.9))
    for axes in panels(figure):
        assert axes.images[0].get_clim() == pytest.approx((0, 0.9))
    assert bar.get_ylabel() == "softmax"


def test_layers_are_rows_and_evenly_spaced_steps_are_columns():
    maps = concept_maps(recording(evaluations=9), steps=range(1, 8))
    (figure,) = layers_figures(maps, ["ball"], layers=[0, 2, 5], columns=3)
    shown = panels(figure)
    assert len(shown) == 9
    assert [axes.get_title() for axes in shown[:3]] == [
        "step 1\nσ 0.889",
        "step 4\nσ 0.556",
        "step 7\nσ 0.222",
    ]
    assert [axes.get_ylabel() for axes in shown[::3]] == ["layer 0", "layer 2", "layer 5"]


@pytest.mark.parametrize("grounding", GROUNDINGS)
def test_each_panel_is_the_map_of_its_concept_and_image_in_one_layer_and_step_alone(grounding):
    concepts = Concepts(("cat", "ball", "tree", "cloud", "bird"), ("sky",))  # some of them look alike
    recorded = recording(batch=2, evaluations=2, concepts=concepts)
    choice = {"temperature": 2.0, "grounding": grounding}
    figures = list(layers_figures(concept_maps(recorded, **choice), ["ball", "cat"], layers=[3, 4]))
    assert [figure.texts[0].get_text() for figure in figures] == ["ball", "cat"] * 2
    expected = concept_maps(recorded, layers=[4], steps=[0], **choice).at_size(64, 96)
    for figure, map_ in zip(figures, expected[:, [1, 0]].flatten(0, 1), strict=True):
        shown = panels(figure)[2].images[0].get_array()
        np.testing.assert_allclose(shown, map_.numpy(), rtol=1e-5)


def test_panels_of_steps_with_two_evaluations_are_averaged_as_the_maps_are():
    recorded = replace(recording(evaluations=2), steps=(0, 0))
    maps = concept_maps(recorded, average="before softmax")
    (figure,) = layers_figures(maps, ["cat"], layers=[3])
    expected = concept_maps(recorded, layers=[3], average="before softmax").at_size(64, 96)
    np.testing.assert_allclose(panels(figure)[0].images[0].get_array(), expected[0, 0].numpy(), rtol=1e-5)


def test_figures_of_raw_scores_say_so():
    maps = concept_maps(recording(), softmax=False)
    (figure,) = layers_figures(maps, ["cat"], layers=[0], columns=1)
    assert figure.axes[-1].get_ylabel() == "scaled score"


def test_the_maps_of_an_image_layer_and_step_are_made_once_for_all_concepts(monkeypatch):
    walks = []

    def counted(*image):
        walks.append(image)
        return propagate_anchors(*image)

    maps = concept_maps(recording(batch=2), grounding="anchor propagation")
    monkeypatch.setattr("concept_attention.core.reading.maps.propagate_anchors", counted)
    assert len(list(layers_figures(maps, maps.concepts.all, layers=[0, 2, 5], columns=2))) == 6
    assert len(walks) == 2 * 3 * 2


def test_progress_counts_the_panels_made_and_drawn_and_reaches_the_end():
    seen = []
    maps = concept_maps(recording(batch=2))
    choice = {"layers": [0, 2], "columns": 2, "progress": lambda *counts: seen.append(counts)}
    list(layers_figures(maps, ["cat", "sky"], **choice))
    assert seen == [(n, 24) for n in (0, 1, 2, 3, 4, 8, 12, 13, 14, 15, 16, 20, 24)]


def test_pictures_made_in_threads_are_those_made_one_by_one():
    maps = concept_maps(recording(concepts=Concepts(("cat", "고양이"), ("sky",))))

    def pictures(seed: int) -> list[torch.Tensor]:
        image = torch.full((1, 64, 96, 3), seed / 8)
        return [
            overlay_images(maps, image, maps.concepts.names, contour=0.5),
            segmentation_images(segment(maps), maps.concepts.names, image),
            figure_image(concepts_figure(maps, 0, image[0], title=str(seed)), 60),
        ]

    alone = [pictures(seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(torch.inference_mode()(pictures), range(3)))
    for a, b in zip(alone, together, strict=True):
        assert all(map(torch.equal, a, b))


def test_no_figure_is_left_in_pyplot():
    import matplotlib._pylab_helpers as pylab

    before = dict(matplotlib.rcParams)
    figure_image(concepts_figure(scene()), 60)
    overlay_images(scene(), photo(), ["cat"], contour=0.5)
    assert not pylab.Gcf.figs
    assert dict(matplotlib.rcParams) == before


def node(cls, maps, image=None, **changes):
    settings = {
        ConceptSegmentation: {"unassigned_below": 0.0, "opacity": 0.6, "legend": False},
        ConceptOverlay: {
            "concept": "",
            "colour_map": "viridis",
            "opacity": 0.6,
            "scale": "all concepts",
            "contour": 0.5,
            "name": True,
        },
    }[cls]
    return cls.execute(maps, **settings | changes, image=image).args


def test_concept_segmentation_gives_masks_of_the_concepts_that_part_the_picture(caplog):
    maps = scene(2)
    with caplog.at_level(logging.WARNING):
        pictures, masks = node(ConceptSegmentation, maps, photo(2))
    assert pictures.shape == (2, 128, 256, 3)
    assert masks.shape == (6, 128, 256)
    assert masks.dtype == torch.float32
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(masks.view(2, 3, 128, 256).sum(1), (segment(maps) < 3).float())
    assert not masks[2::3].any()
    assert caplog.messages == ['Concept Segmentation found no "dragon": its masks are empty.']


def test_concept_segmentation_has_a_picture_and_masks_for_every_frame():
    pictures, masks = node(ConceptSegmentation, scene(1), photo(3))
    assert len(pictures) == 3
    assert len(masks) == 9
    assert torch.equal(masks[:3], masks[6:])


def test_concept_overlay_shows_all_concepts_or_those_named():
    assert node(ConceptOverlay, scene(2), photo(2))[0].shape == (6, 128, 256, 3)
    assert node(ConceptOverlay, scene(2), photo(2), concept="Ball, sky")[0].shape == (4, 128, 256, 3)
    with pytest.raises(ValueError, match='no concept "horse"'):
        node(ConceptOverlay, scene(), photo(), concept="cat, horse")


def figure_node(maps, layout, tmp_path, monkeypatch, image=None, vector="none"):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    settings = {"title": "A title", "colour_map": "magma", "filename_prefix": "figures/run"}
    return ConceptFigure.execute(maps, layout, **settings, dpi=60, vector=vector, image=image)


@pytest.mark.parametrize("vector", ["svg", "pdf"])
def test_concept_figure_saves_a_png_for_each_image_and_the_vectors_beside(tmp_path, monkeypatch, vector):
    layout = {"layout": "concepts"}
    result = figure_node(scene(2), layout, tmp_path, monkeypatch, photo(2), vector)
    assert len(result.args[0]) == 2
    assert [(r["filename"], r["subfolder"]) for r in result.ui.results] == [
        ("run_00001_.png", "figures"),
        ("run_00002_.png", "figures"),
    ]
    written = sorted(path.name for path in Path(tmp_path, "figures").iterdir())
    assert written == sorted(f"run_0000{i}_.{kind}" for i in (1, 2) for kind in ("png", vector))


def test_concept_figure_makes_a_grid_for_each_image_and_concept(tmp_path, monkeypatch):
    layout = {"layout": "layers and steps", "concept": "", "layers": "0, 2-3", "steps": 2}
    result = figure_node(concept_maps(recording(batch=2)), layout, tmp_path, monkeypatch)
    assert len(result.args[0]) == 4
    with pytest.raises(ValueError, match="only: 0-5"):
        figure_node(concept_maps(recording()), {**layout, "layers": "9"}, tmp_path, monkeypatch)


class Bar:
    """A progress bar that gives the button to cancel to ``at``, when so much of the work is done."""

    at = 0

    def __init__(self, total, node_id=None):
        pass

    def update_absolute(self, value, total):
        self.shown.append((value, total))
        if value == self.at:
            comfy.model_management.interrupt_current_processing()


@pytest.fixture
def bar(monkeypatch):
    monkeypatch.setattr(comfy.utils, "ProgressBar", Bar)
    monkeypatch.setattr(Bar, "shown", [], raising=False)
    yield Bar
    comfy.model_management.interrupt_current_processing(False)


def test_a_grid_can_be_cancelled_half_way_and_saves_nothing(tmp_path, monkeypatch, bar):
    monkeypatch.setattr(bar, "at", 20)
    layout = {"layout": "layers and steps", "concept": "", "layers": "0, 2-3", "steps": 2}
    with pytest.raises(InterruptProcessingException):
        figure_node(concept_maps(recording(batch=2)), layout, tmp_path, monkeypatch)
    assert not list(tmp_path.iterdir())
