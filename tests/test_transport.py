"""Concept maps as bytes for the browser."""

from __future__ import annotations

import struct
import zlib

import folder_paths
import numpy as np
import pytest
import torch

from concept_attention.core.concepts import Concepts
from concept_attention.core.drawing.transport import evaluation_means, layer, layer_means, pack, picture
from concept_attention.core.observing.recording import Recording
from concept_attention.core.reading.maps import concept_maps, heatmaps
from concept_attention.nodes.concept_viewer import ConceptViewer

LAYERS, STEPS, CONCEPTS, ROWS, COLUMNS = 19, 28, 6, 64, 64


def unpack(packet: bytes, *shape: int) -> torch.Tensor:
    """What web/maps.mjs does."""
    content = zlib.decompress(packet)
    low, high = struct.unpack_from("<ff", content)
    levels = np.frombuffer(content, np.uint8, offset=8).reshape(shape)
    return torch.from_numpy(low + np.cumsum(levels, 0, dtype=np.uint8) * ((high - low) / 255))


def recording(batch: int = 1, rows: int = ROWS, columns: int = COLUMNS) -> Recording:
    """Steps resemble each other, as they do when a picture takes shape."""
    g = torch.Generator().manual_seed(0)
    lasting = 3 * torch.randn(LAYERS, batch, CONCEPTS, rows, columns, generator=g)
    scores = tuple(
        lasting * (step + 5) / STEPS + 0.1 * torch.randn(lasting.shape, generator=g) for step in range(STEPS)
    )
    return Recording(
        concepts=Concepts(tuple("abcde"), ("background",)),
        layers=tuple(range(LAYERS)),
        default_layers=(15, 16, 17, 18),
        sigmas=tuple(1 - step / STEPS for step in range(STEPS)),
        steps=tuple(range(STEPS)),
        scores={"output": scores},
        image_size=(rows * 16, columns * 16),
        coverage=(1.0, 1.0),
    )


def test_unpacked_values_are_within_half_a_level():
    maps = torch.rand(5, 3, 8, 9).softmax(1)
    error = (unpack(pack(maps), 5, 3, 8, 9) - maps).abs().max()
    assert error <= maps.max() / 510 + 1e-6
    assert error <= 1 / 510


def test_raw_scores_keep_their_range():
    scores = 40 * torch.randn(4, 2, 6, 6)
    unpacked = unpack(pack(scores, from_zero=False), 4, 2, 6, 6)
    assert (unpacked - scores).abs().max() <= (scores.max() - scores.min()) / 510 * 1.001


@pytest.mark.parametrize("maps", [torch.zeros(2, 1, 3, 3), torch.full((1, 2, 3, 3), 0.5)])
def test_constant_maps(maps):
    assert torch.allclose(unpack(pack(maps), *maps.shape).float(), maps)


@pytest.mark.parametrize("softmax", [True, False])
def test_every_choice_of_layers_or_steps_is_a_mean_of_frames(softmax):
    record = recording(batch=2, rows=8, columns=8)
    maps = concept_maps(record, layers=(3, 7), steps=range(4, 20), softmax=softmax, temperature=2.0)

    def expected(**choice):
        return heatmaps(record, softmax=softmax, temperature=2.0, **choice)[1]

    by_layer = layer_means(maps, 1)
    assert torch.allclose(by_layer[[3, 7]].mean(0), expected(layers=(3, 7), steps=range(4, 20)), atol=1e-5)
    assert torch.allclose(by_layer[5:9].mean(0), expected(layers=range(5, 9), steps=range(4, 20)), atol=1e-5)
    by_step = evaluation_means(maps, 1)
    assert torch.allclose(by_step[20:].mean(0), expected(layers=(3, 7), steps=range(20, STEPS)), atol=1e-5)
    one_layer = layer(maps, 1, 11)
    assert torch.allclose(one_layer[2:5].mean(0), expected(layers=[11], steps=range(2, 5)), atol=1e-5)


def test_a_layer_that_was_not_recorded():
    with pytest.raises(ValueError, match="Layers 19 were not recorded"):
        layer(concept_maps(recording(rows=4, columns=4)), 0, 19)


def test_looking_through_all_layers_and_all_steps_takes_less_than_one_and_a_half_megabytes():
    maps = concept_maps(recording())
    packets = [pack(maps.values), pack(layer_means(maps, 0)), pack(evaluation_means(maps, 0))]
    sizes = [len(packet) for packet in packets]
    assert sizes[0] < 32 * 1024
    assert sum(sizes) < 1.5 * 2**20


def test_pictures_keep_their_pixels():
    ramp = torch.linspace(0, 1, 64).expand(48, 64)
    assert picture(torch.stack([ramp, ramp, ramp, ramp], -1))[:2] == b"\xff\xd8"


@pytest.fixture
def view(tmp_path, monkeypatch):
    """Gives what Concept Viewer sends of maps of so many images and so many pictures."""
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path))

    def view(images: int, *size: int) -> list[dict]:
        maps = concept_maps(recording(images, 4, 6))
        shown = ConceptViewer.execute(maps, 0.5, "", torch.rand(*size, 3) if size else None)
        return shown.ui["concept_view"][0]["images"]

    return view


def names(images: list[dict], what: str) -> list[str]:
    return [image[what]["filename"] for image in images]


def test_each_image_has_its_own_maps_and_picture(view):
    images = view(2, 2, 64, 96)
    assert [image["recorded"] for image in images] == [0, 1]
    assert len(set(names(images, "maps"))) == len(set(names(images, "picture"))) == 2
    assert [image["picture"] for image in view(2)] == [None, None]


def test_images_may_share_a_picture_and_frames_may_share_maps(view):
    images = view(2, 1, 64, 96)
    assert [image["recorded"] for image in images] == [0, 1]
    assert len(set(names(images, "maps"))) == 2
    assert len(set(names(images, "picture"))) == 1
    frames = view(1, 3, 64, 96)
    assert [frame["recorded"] for frame in frames] == [0, 0, 0]
    assert len(set(names(frames, "maps"))) == 1
    assert len(set(names(frames, "picture"))) == 3


def test_a_picture_that_does_not_belong_to_the_maps_is_not_shown(view):
    with pytest.raises(ValueError, match="64 x 96 pixels.* 96 x 64, which has another shape"):
        view(1, 1, 96, 64)
    with pytest.raises(ValueError, match="3 images, but concept maps of 2"):
        view(2, 3, 64, 96)
