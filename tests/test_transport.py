"""Concept maps as bytes for the browser."""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import replace

import folder_paths
import numpy as np
import pytest
import torch

from concept_attention.core.concepts import Concepts
from concept_attention.core.drawing.transport import (
    evaluation_means,
    layer,
    layer_means,
    pack,
    picture,
    video_mean,
)
from concept_attention.core.observing.recording import Recording
from concept_attention.core.reading.maps import ConceptMaps, concept_maps, heatmaps
from concept_attention.nodes.concept_viewer import ConceptViewer
from recordings import recording as small_recording

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
def send(tmp_path, monkeypatch):
    """Gives what Concept Viewer sends of maps, and of so many pictures of a size."""
    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path))

    def send(maps: ConceptMaps, *size: int) -> dict:
        shown = ConceptViewer.execute(maps, 0.5, "", torch.rand(*size, 3) if size else None)
        return shown.ui["concept_view"][0]

    return send


@pytest.fixture
def view(send):
    """Gives what Concept Viewer sends of so many images and so many pictures."""
    return lambda images, *size: send(concept_maps(recording(images, 4, 6)), *size)["images"]


def maps_files(images: list[dict]) -> list[str]:
    return [image["maps"]["filename"] for image in images]


def picture_files(images: list[dict]) -> list[list[str]]:
    return [[picture["filename"] for picture in image["pictures"]] for image in images]


def test_each_image_has_its_own_maps_and_picture(view):
    images = view(2, 2, 64, 96)
    assert [image["recorded"] for image in images] == [0, 1]
    (first,), (second,) = picture_files(images)
    assert first != second
    assert len(set(maps_files(images))) == 2
    assert picture_files(view(2)) == [[], []]


def test_images_may_share_a_picture_and_frames_may_share_maps(view):
    images = view(2, 1, 64, 96)
    assert [image["recorded"] for image in images] == [0, 1]
    assert len(set(maps_files(images))) == 2
    (first,), (second,) = picture_files(images)
    assert first == second
    frames = view(1, 3, 64, 96)
    assert [frame["recorded"] for frame in frames] == [0, 0, 0]
    assert len(set(maps_files(frames))) == 1
    assert len({file for (file,) in picture_files(frames)}) == 3


def test_a_picture_that_does_not_belong_to_the_maps_is_not_shown(view):
    with pytest.raises(ValueError, match="64 x 96 pixels.* 96 x 64, which has another shape"):
        view(1, 1, 96, 64)
    with pytest.raises(ValueError, match="3 images, but concept maps of 2"):
        view(2, 3, 64, 96)


def videos(count: int, *, softmax: bool = True) -> ConceptMaps:
    """Of nine frames each, which are three latent frames."""
    return concept_maps(replace(small_recording(batch=3 * count), durations=(1, 4, 4)), softmax=softmax)


def test_a_video_is_one_packet_of_all_latent_frames_and_a_picture_for_each_frame(send, tmp_path):
    maps = videos(2)
    view = send(maps, 18, 64, 96)
    assert view["durations"] == (1, 4, 4)
    assert [video["recorded"] for video in view["images"]] == [0, 1]
    first, second = picture_files(view["images"])
    assert len({*first, *second}) == 18
    for name, values in zip(maps_files(view["images"]), maps.values.split(3), strict=True):
        shown = unpack((tmp_path / name).read_bytes(), *values.shape)
        assert (shown - values).abs().max() <= 1 / 510
    assert picture_files(send(maps)["images"]) == [[], []]


def test_all_frames_of_all_videos_may_share_one_picture(send):
    first, second = picture_files(send(videos(2), 1, 64, 96)["images"])
    assert first == second
    assert len(first) == 1


def test_there_may_be_a_picture_for_each_latent_frame(send):
    view = send(videos(2), 6, 64, 96)
    assert view["durations"] == (1, 1, 1)
    first, second = picture_files(view["images"])
    assert len({*first, *second}) == 6


def test_layers_are_frames_of_a_video_too(send):
    layered = concept_maps(replace(small_recording(batch=3), durations=(1, 1, 1)))
    view = send(layered, 3, 64, 96)
    assert view["durations"] == (1, 1, 1)
    (layers,) = picture_files(view["images"])
    assert len(set(layers)) == 3


@pytest.mark.parametrize("softmax", [True, False])
def test_any_choice_of_layers_and_steps_of_a_video_is_a_mean_of_its_latent_frames(softmax):
    maps = videos(2, softmax=softmax)
    expected = heatmaps(maps.recording, layers=[1, 4], steps=[0, 2], softmax=softmax)
    assert torch.allclose(video_mean(maps, 1, [1, 4], [0, 2]), expected[3:], atol=1e-6)
    with pytest.raises(ValueError, match="Layers 7 were not recorded"):
        video_mean(maps, 0, [7], [0])


@pytest.mark.parametrize("smooth", [True, False], ids=["moving blobs", "noise"])
def test_81_frames_of_480p_take_less_than_two_megabytes_until_they_are_played(send, tmp_path, smooth):
    """With the pictures that the page asks for at once, the one shown and four more."""
    g = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(4, 21, 7, 30, 52, generator=g)
    if smooth:
        blobs = torch.nn.functional.interpolate(scores[0, 0, None, :, ::6, ::6], (30, 52), mode="bicubic")[0]
        scores = torch.stack([blobs.roll(frame, -1) for frame in range(21)]).expand(4, -1, -1, -1, -1)
    video = Recording(
        concepts=Concepts(tuple("abcdef"), ("background",)),
        layers=tuple(range(4)),
        default_layers=tuple(range(4)),
        sigmas=(1.0,),
        steps=(0,),
        scores={"output": (scores,)},
        image_size=(480, 832),
        coverage=(1.0, 1.0),
        durations=(1, *[4] * 20),
    )
    view = send(concept_maps(video), 81, 480, 832)
    (shown,) = view["images"]
    files = [shown["maps"], *shown["pictures"][:5]]
    sizes = [(tmp_path / file["filename"]).stat().st_size for file in files]
    assert len(shown["pictures"]) == 81
    assert len(json.dumps(view)) < 16 * 1024
    assert sizes[0] < 256 * 1024
    assert len(json.dumps(view)) + sum(sizes) < 2e6
