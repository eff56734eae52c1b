"""What the plugin does without matplotlib, and when it imports it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import folder_paths
import matplotlib
import pytest
import torch

from concept_attention.core.reading.maps import ConceptMaps, concept_maps
from concept_attention.nodes.concept_figure import ConceptFigure
from concept_attention.nodes.concept_files import ConceptMapsLoad, ConceptMapsSave
from concept_attention.nodes.concept_mask import ConceptMask
from concept_attention.nodes.concept_overlay import ConceptOverlay
from concept_attention.nodes.concept_saliency import ConceptSaliency
from concept_attention.nodes.concept_segmentation import ConceptSegmentation
from concept_attention.nodes.concept_viewer import ConceptViewer
from recordings import recording


@pytest.fixture
def missing(monkeypatch):
    """matplotlib is not installed."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture
def maps() -> ConceptMaps:
    """Of one image of 64 x 96 pixels."""
    return concept_maps(recording())


@pytest.fixture(autouse=True)
def _folders(monkeypatch, tmp_path):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))


def overlay(maps, *, colour_map="magma", contour=0.0, name=False) -> torch.Tensor:
    image = torch.full((1, 64, 96, 3), 0.5)
    return ConceptOverlay.execute(maps, image, "", colour_map, 0.6, "all concepts", contour, name).args[0]


def segmentation(maps, *, legend=False) -> torch.Tensor:
    return ConceptSegmentation.execute(maps, 0.0, 0.6, legend).args[0]


def figure(maps, layout="concepts") -> torch.Tensor:
    chosen = {"layout": layout, "concept": "", "layers": "all", "steps": 2}
    return ConceptFigure.execute(maps, chosen, "", "magma", 60, "none", "figure").args[0]


def test_starting_comfyui_does_not_import_matplotlib():
    """conftest.py loads all nodes, as ComfyUI does at its start."""
    script = (
        'import sys, conftest; print("concept_attention.nodes" in sys.modules, "matplotlib" in sys.modules)'
    )
    folder = Path(__file__).parent
    started = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True
    )
    assert started.stdout.splitlines()[-1] == "True False"


@pytest.mark.usefixtures("missing")
def test_without_matplotlib_maps_masks_and_heatmaps_are_made(maps):
    maps, masks, heatmaps = ConceptSaliency.execute(
        maps, "output", "default", 0, 10000, softmax=True, temperature=1.0
    ).args
    assert masks.shape == (2, 64, 96)
    assert heatmaps.shape == (2, 64, 96, 3)
    clean_up = {"soft": False, "fill_holes": True, "smallest_area": 0.0, "grow": 1, "feather": 1.0}
    mask = ConceptMask.execute(maps, "cat", {"method": "otsu"}, **clean_up, invert=False).args[0]
    assert mask.shape == (1, 64, 96)


@pytest.mark.usefixtures("missing")
def test_without_matplotlib_maps_are_viewed_saved_and_loaded(maps, tmp_path):
    assert ConceptViewer.execute(maps, 0.5, "cat").args == (0.5, "cat")
    (saved,) = ConceptMapsSave.execute(maps, "run").ui["files"]
    loaded = ConceptMapsLoad.execute(f"{saved['filename']} [output]").args[0]
    assert torch.equal(loaded.values, maps.values)


@pytest.mark.usefixtures("missing")
def test_without_matplotlib_pictures_that_are_only_colours_are_made(maps):
    assert overlay(maps).shape == (2, 64, 96, 3)
    assert segmentation(maps).shape == (1, 64, 96, 3)


DRAWN = {
    "a name": lambda maps: overlay(maps, name=True),
    "a contour": lambda maps: overlay(maps, contour=0.5),
    "another colour map": lambda maps: overlay(maps, colour_map="viridis"),
    "a legend": lambda maps: segmentation(maps, legend=True),
    "a figure of concepts": figure,
    "a figure of layers": lambda maps: figure(maps, "layers and steps"),
}


@pytest.mark.usefixtures("missing")
@pytest.mark.parametrize("drawn", DRAWN)
def test_without_matplotlib_what_it_draws_is_an_error_that_says_what_to_install(maps, drawn):
    with pytest.raises(ImportError, match="drawn by matplotlib 3.8 or newer") as error:
        DRAWN[drawn](maps)
    assert f'"{sys.executable}" -m pip install --upgrade "matplotlib>=3.8"' in str(error.value)
    assert "without names, contours and legends" in str(error.value)


def test_a_matplotlib_that_is_too_old_is_named(maps, monkeypatch):
    monkeypatch.setattr(matplotlib, "__version_info__", (3, 7, 5, "final", 0))
    monkeypatch.setattr(matplotlib, "__version__", "3.7.5")
    with pytest.raises(ImportError, match=r"this is version 3\.7\.5\. Install it"):
        figure(maps)


@pytest.mark.parametrize("drawn", DRAWN)
def test_with_matplotlib_it_is_drawn(maps, drawn):
    assert DRAWN[drawn](maps).std() > 0
