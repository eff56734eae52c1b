"""Maps while a model samples."""

from __future__ import annotations

import pytest
import torch

from concept_attention.core.concepts import Concepts
from concept_attention.core.drawing.live import LiveMaps
from concept_attention.core.geometry import Grid
from concept_attention.core.observing.latents import recording_of
from concept_attention.core.observing.observe import WhatToRecord, observe
from concept_attention.core.observing.recorder import Pass, Recorder
from concept_attention.core.reading.maps import heatmaps
from tiny_flux import CONCEPTS, concept_tokens, random_flux, sample


class Arrival:
    """Stands in for a CUDA event."""

    def __init__(self) -> None:
        self.happened = False

    def query(self) -> bool:
        return self.happened

    def synchronize(self) -> None:
        raise AssertionError("waited for the GPU")


@pytest.fixture
def recorder() -> Recorder:
    concepts = Concepts(("a", "b"), ("c",))
    return Recorder(
        concepts, (0, 1, 2), (1, 2), torch.linspace(1, 0, 5), 1, Grid(1, 4, 4), (64, 64), (1.0, 1.0)
    )


def record(recorder: Recorder, scores: torch.Tensor, copied: Arrival | None = None) -> None:
    evaluation = recorder.evaluation(torch.ones(1))
    recorder.add(
        evaluation, Pass(slice(0, 1), Grid(0, 0, 0), (0, 1, 2), {"output": scores[:, :, :, None]}, copied)
    )


def test_maps_so_far_are_the_mean_over_evaluations_and_default_layers(recorder):
    sent = []
    listener = LiveMaps(sent.append, lambda: True, interval=0)
    scores = torch.randn(3, 3, 1, 3, 4, 4)
    for evaluation in scores:
        record(recorder, evaluation)
        listener(recorder)
    assert [s.evaluations for s in sent] == [1, 2, 3]
    assert torch.allclose(sent[-1].values, scores[:, 1:, 0].softmax(2).mean((0, 1)), atol=1e-6)


def test_scores_still_on_their_way_from_the_gpu_are_not_waited_for(recorder):
    sent = []
    listener = LiveMaps(sent.append, lambda: True, interval=0)
    record(recorder, torch.randn(3, 1, 3, 4, 4))
    on_its_way = Arrival()
    record(recorder, torch.randn(3, 1, 3, 4, 4), on_its_way)
    listener(recorder)
    assert sent[-1].evaluations == 1
    on_its_way.happened = True
    listener(recorder)
    assert sent[-1].evaluations == 2


def test_nothing_is_sent_more_often_than_the_interval_or_while_nobody_listens(recorder):
    sent, listening = [], False
    listener = LiveMaps(sent.append, lambda: listening, interval=60)
    record(recorder, torch.randn(3, 1, 3, 4, 4))
    listener(recorder)
    assert not sent
    listening = True
    for _ in range(3):
        record(recorder, torch.randn(3, 1, 3, 4, 4))
        listener(recorder)
    assert len(sent) == 1


def test_listening_leaves_the_samples_as_they_are():
    model = random_flux()
    sent = []
    listener = LiveMaps(sent.append, lambda: True, interval=0)
    samples = sample(observe(model, WhatToRecord(CONCEPTS, concept_tokens()), listener=listener))
    assert torch.equal(samples, sample(model))
    assert torch.allclose(sent[-1].values, heatmaps(recording_of({"samples": samples}))[0], atol=1e-6)


def test_a_listener_that_fails_costs_neither_the_picture_nor_the_recording(caplog):
    calls = []

    def listener(recorder):
        calls.append(recorder)
        raise OSError("the browser is gone")

    observed = observe(random_flux(), WhatToRecord(CONCEPTS, concept_tokens()), listener=listener)
    samples = sample(observed)
    assert len(calls) == 1
    assert len(recording_of({"samples": samples}).steps) == 3
    assert "stops showing maps" in caplog.text
    sample(observed)
    assert len(calls) == 2, "the next run tries again"


def test_maps_so_far_are_nothing_where_no_prompt_is_at_work(recorder):
    sent = []
    listener = LiveMaps(sent.append, lambda: True, interval=0)
    scores = torch.randn(3, 1, 3, 4, 4)
    left = torch.zeros(1, 1, 1, 4, 4)
    left[..., :2] = 1
    for weight in (left, None):
        evaluation = recorder.evaluation(torch.ones(1))
        recorder.add(
            evaluation,
            Pass(slice(0, 1), Grid(0, 0, 0), (0, 1, 2), {"output": scores[:, :, :, None]}, weight=weight),
        )
        listener(recorder)
    expected = scores[1:, 0].softmax(1).mean(0)
    assert torch.allclose(sent[0].values, expected * left[0, 0], atol=1e-6)
    assert torch.allclose(sent[1].values, expected, atol=1e-6)


def test_of_videos_they_are_those_of_the_first_frame_which_is_the_one_that_comfyui_previews(recorder):
    video = Recorder(
        recorder.concepts,
        (0, 1),
        (0, 1),
        torch.linspace(1, 0, 5),
        2,
        Grid(3, 4, 4),
        (64, 64),
        (1.0, 1.0),
        durations=(1, 4, 4),
    )
    sent = []
    scores = torch.randn(2, 2, 3, 3, 4, 4)
    video.add(video.evaluation(torch.ones(1)), Pass(slice(0, 2), Grid(0, 0, 0), (0, 1), {"output": scores}))
    LiveMaps(sent.append, lambda: True, interval=0)(video)
    assert torch.allclose(sent[0].values, scores[:, 0, :, 0].softmax(1).mean(0), atol=1e-6)


def test_scores_leave_pinned_memory_as_soon_as_they_have_arrived(recorder):
    class Event(Arrival):
        def synchronize(self) -> None:
            assert self.happened

    arrived, on_its_way = Event(), Event()
    scores = [torch.randn(3, 1, 3, 4, 4) for _ in range(3)]
    record(recorder, scores[0], arrived)
    arrived.happened = True
    record(recorder, scores[1], on_its_way)
    pinned = {s.data_ptr() for s in scores}
    assert [kept.scores["output"].data_ptr() in pinned for kept in recorder._kept] == [False]
    (waiting,) = (recorded for e in recorder._evaluations for recorded in e.passes)
    assert waiting.copied is on_its_way
    assert waiting.scores["output"].data_ptr() == scores[1].data_ptr()


def test_live_maps_of_a_run_that_is_too_long_are_of_the_means_that_are_kept(caplog):
    concepts = Concepts(("a", "b"), ("c",))
    scores = torch.randn(6, 2, 1, 3, 4, 4)
    recorder = Recorder(
        concepts,
        (0, 1),
        (0, 1),
        torch.linspace(1, 0, 7),
        1,
        Grid(1, 4, 4),
        (64, 64),
        (1.0, 1.0),
        budget=2 * scores[0].nbytes,
    )
    sent = []
    listener = LiveMaps(sent.append, lambda: True, interval=0)
    for number, evaluation in enumerate(scores):
        recorder.add(
            recorder.evaluation(torch.ones(1)),
            Pass(slice(0, 1), Grid(0, 0, 0), (0, 1), {"output": evaluation[:, :, :, None]}),
        )
        if number in (0, 5):
            listener(recorder)
    assert [s.evaluations for s in sent] == [1, 6]
    means = [scores[0], *[scores[:3].mean(0)] * 2, *[scores[3:5].mean(0)] * 2, scores[5]]
    expected = torch.stack(means)[:, :, 0].softmax(2).mean((0, 1))
    assert torch.allclose(sent[-1].values, expected, atol=1e-6)
