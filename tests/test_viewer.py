"""What Concept Viewer hands on; its panel is tested in browser/."""

from __future__ import annotations

import folder_paths
import pytest

from concept_attention.core.reading.maps import ConceptMaps, concept_maps
from concept_attention.nodes.concept_viewer import ConceptViewer
from recordings import CONCEPTS, recording


@pytest.fixture
def maps() -> ConceptMaps:
    return concept_maps(recording())


@pytest.fixture(autouse=True)
def _temporary(monkeypatch, tmp_path):
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path))


@pytest.mark.parametrize(
    "picked, handed_on",
    [
        ("", ""),
        ("ball, sky", "ball, sky"),
        ("castle", ""),
        ("castle, ball", "ball"),
        ("Cat,  SKY ", "cat, sky"),
    ],
)
def test_it_hands_on_the_concepts_picked_that_the_maps_have(maps, picked, handed_on):
    threshold, concept = ConceptViewer.execute(maps, 0.4, picked).args
    assert (threshold, concept) == (0.4, handed_on)
    assert CONCEPTS.all == ("cat", "ball", "sky")
