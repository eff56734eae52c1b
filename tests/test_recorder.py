from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from concept_attention.core.concepts import Concepts
from concept_attention.core.geometry import Grid
from concept_attention.core.observing.recorder import Pass, Recorder
from concept_attention.core.observing.recording import Recording, RecordingError
from concept_attention.core.reading.maps import heatmaps

CONCEPTS = Concepts(("cat",), ("sky",))


def recorder(**options) -> Recorder:
    return Recorder(
        CONCEPTS,
        options.pop("layers", (0, 1, 2)),
        options.pop("default_layers", (1, 2)),
        torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]),
        batch=options.pop("batch", 1),
        grid=Grid(1, 2, 2),
        image_size=(32, 32),
        coverage=(1.0, 1.0),
        **options,
    )


def a_pass(value: float, layers=(0, 1, 2), batch=slice(0, 1), rows=1, origin=(0, 0), grid=(2, 2)) -> Pass:
    scores = torch.full((len(layers), rows, 2, 1, *grid), value)
    return Pass(batch, Grid(0, *origin), layers, {"output": scores})


def finish(*passes_of_evaluations, sigmas=None, **options):
    r = recorder(**options)
    for i, passes in enumerate(passes_of_evaluations):
        evaluation = r.evaluation(torch.tensor([sigmas[i] if sigmas else 1.0]))
        for p in passes:
            r.add(evaluation, p)
    return r.finish()


def test_an_evaluation_belongs_to_the_last_step_that_starts_at_its_noise_or_above():
    sigmas = [1.0, 0.75, 0.6, 0.5 - 1e-7, 0.25, 0.1, 2.0]
    found = finish(*[[a_pass(0.0)]] * len(sigmas), sigmas=sigmas)
    assert found.steps == (0, 1, 1, 2, 3, 3, 0)
    assert found.sigmas == pytest.approx(sigmas)


def test_skipped_evaluations_are_absent():
    found = finish([a_pass(1.0)], [], [a_pass(3.0)], sigmas=[1.0, 0.75, 0.5])
    assert found.steps == (0, 2)
    assert [float(s.mean()) for s in found.scores["output"]] == [1.0, 3.0]


@pytest.mark.parametrize("first", [True, False])
def test_of_an_evaluation_that_was_read_in_part_nothing_is_kept(first):
    made = recorder()
    whole, part = (made.evaluation(torch.tensor([sigma])) for sigma in (1.0, 0.5))
    made.add(whole, a_pass(1.0))
    calls = [lambda: made.add(part, a_pass(2.0)), lambda: made.leave_out(part, "block 1 did not run")]
    for call in calls if first else reversed(calls):
        call()
    recording = made.finish()
    assert recording.steps == (0,)
    assert (recording.scores["output"][0] == 1.0).all()


def test_several_conditionings_of_one_evaluation_are_averaged():
    found = finish([a_pass(1.0), a_pass(4.0)])
    assert (found.scores["output"][0] == 2.5).all()


def test_a_conditioning_of_an_area_counts_in_its_area_only():
    area = a_pass(4.0, origin=(0, 1), grid=(2, 1))
    scores = finish([a_pass(1.0), area]).scores["output"][0]
    assert (scores[..., 0] == 1.0).all()
    assert (scores[..., 1] == 2.5).all()


def test_context_windows_fill_their_own_images():
    windows = [a_pass(1.0, batch=[0, 1], rows=2), a_pass(3.0, batch=[1, 2], rows=2)]
    scores = finish(windows, batch=3).scores["output"][0]
    assert scores[0, :, 0, 0, 0].tolist() == [1.0, 2.0, 3.0]


def test_a_recording_over_the_budget_keeps_the_default_layers():
    size = a_pass(0.0).scores["output"].nbytes
    r = recorder(budget=3 * size)
    for value in (1.0, 2.0, 3.0):
        r.add(r.evaluation(torch.tensor([1.0])), a_pass(value))
    r.add(r.evaluation(torch.tensor([1.0])), a_pass(4.0, layers=(1, 2)))
    found = r.finish()
    assert found.layers == (1, 2)
    assert [s.shape[0] for s in found.scores["output"]] == [2] * 4
    assert [float(s.mean()) for s in found.scores["output"]] == [1.0, 2.0, 3.0, 4.0]


def test_a_recording_within_the_budget_keeps_every_layer():
    found = finish(*[[a_pass(1.0)]] * 4, budget=4 * a_pass(0.0).scores["output"].nbytes)
    assert found.layers == (0, 1, 2)
    assert found.counts == ()


def long_run(evaluations: int, steps: int, fitting: int) -> tuple[Recording, Tensor]:
    """A recording of random scores (E, L, 1, 2, 1, 2, 2) with a budget for as many evaluations as are
    ``fitting``."""
    scores = torch.randn(evaluations, 2, 1, 2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    r = Recorder(
        CONCEPTS,
        (1, 2),
        (1, 2),
        torch.linspace(1, 0, steps + 1),
        1,
        Grid(1, 2, 2),
        (32, 32),
        (1.0, 1.0),
        budget=fitting * scores[0].nbytes,
    )
    for number, each in enumerate(scores):
        evaluation = r.evaluation(torch.tensor([1 - number / evaluations]))
        r.add(evaluation, Pass(slice(0, 1), Grid(0, 0, 0), (1, 2), {"output": each}))
        assert sum(kept.nbytes for kept in r._kept) <= fitting * scores[0].nbytes
    return r.finish(), scores[:, :, :, :, 0]


@pytest.mark.parametrize(
    "evaluations, steps, fitting, counts",
    [
        (20, 20, 10, (2,) * 10),
        (20, 20, 19, (2,) * 10),
        (20, 20, 6, (4,) * 5),
        (7, 7, 3, (3, 3, 1)),
        (5, 5, 1, (5,)),
        (40, 20, 20, (2,) * 20),  # two evaluations in a step: found out on the way
        (39, 20, 10, (4,) * 9 + (3,)),
        (9, 1, 4, (4, 4, 1)),
    ],
)
def test_evaluations_of_a_run_that_is_too_long_are_kept_as_means(evaluations, steps, fitting, counts, caplog):
    found, scores = long_run(evaluations, steps, fitting)
    assert found.counts == counts
    assert found.nbytes <= fitting * scores[0].nbytes
    start = 0
    for ours, count in zip(found.scores["output"], counts, strict=True):
        torch.testing.assert_close(ours, scores[start : start + count].mean(0))
        start += count
    assert f"every {max(counts)} evaluations" in caplog.text
    assert "before softmax" in caplog.text


def test_the_average_before_softmax_and_raw_scores_of_a_run_that_is_too_long_are_exact():
    found, scores = long_run(7, 7, 3)
    mean = scores.mean((0, 1))
    torch.testing.assert_close(heatmaps(found, average="before softmax"), mean.softmax(1))
    torch.testing.assert_close(heatmaps(found, softmax=False), mean)


def test_evaluations_kept_as_one_count_as_the_first_step():
    found, scores = long_run(7, 7, 3)
    assert found.steps == (0, 3, 6)
    assert found.sigmas == pytest.approx([1, 4 / 7, 1 / 7])
    made = heatmaps(found, steps=range(3, 7), softmax=False)
    torch.testing.assert_close(made, scores[3:].mean((0, 1)))


@pytest.mark.parametrize("first", [0, 1])
def test_patches_that_some_evaluations_have_not_seen_are_the_mean_of_the_others(first):
    scores = torch.randn(2, 2, 1, 2, 1, 2, 2)
    r = recorder(layers=(1, 2), budget=scores[0].nbytes)
    left = a_pass(0.0, layers=(1, 2), grid=(2, 1))
    passes = [replace(left, scores={"output": s}) for s in (scores[0][..., :1], scores[1])]
    for number in (first, 1 - first):
        r.add(r.evaluation(torch.tensor([1.0])), passes[number])
    (kept,) = r.finish().scores["output"]
    torch.testing.assert_close(kept[..., :1], scores[..., :1].mean(0)[:, :, :, 0])
    assert torch.equal(kept[..., 1:], scores[1][:, :, :, 0, :, 1:])


def test_layers_that_will_not_fit_are_not_recorded_from_the_start():
    size = a_pass(0.0).scores["output"].nbytes
    assert recorder(budget=4 * size).layers == (0, 1, 2)
    assert recorder(budget=4 * size - 1).layers == (1, 2)
    assert recorder(budget=4 * size, spaces=2).layers == (1, 2)
    assert recorder(budget=size, every=4).layers == (0, 1, 2)
    assert recorder(budget=size // 3).layers == (2,)  # of the default ones, the last


def test_a_layer_that_does_not_fit_alone_is_an_error_that_says_how_large_it_is():
    r = Recorder(
        CONCEPTS,
        (0, 1),
        (1,),
        torch.tensor([1.0, 0.0]),
        4,
        Grid(64, 200, 200),
        (3200, 3200),
        (1.0, 1.0),
        spaces=4,
    )
    with pytest.raises(
        RecordingError, match="one layer would take 312 MB, more than the 256 MB.*fewer concepts"
    ):
        r.finish()


@pytest.mark.parametrize(
    "grid, layers, steps",
    [(Grid(21, 30, 52), 40, 20), (Grid(31, 45, 80), 40, 20), (Grid(31, 45, 80), 48, 50)],
    ids=["81 frames of 480p", "121 frames of 720p", "121 frames of 720p, 50 steps"],
)
def test_long_videos_are_planned_to_fit_with_their_default_layers(grid, layers, steps):
    concepts = Concepts(("a", "b", "c", "d", "e", "f"), ("background",))
    default = tuple(range(layers - -(-layers // 3), layers))
    r = Recorder(
        concepts,
        tuple(range(layers)),
        default,
        torch.linspace(1, 0, steps + 1),
        1,
        grid,
        (480, 832),
        (1.0, 1.0),
    )
    assert r.layers == default
    kept = -(-steps // r._at_once)
    assert kept * len(default) * grid.size * 7 * 4 <= 256 * 2**20
    assert kept >= 5


def test_an_image_that_breaks_in_one_evaluation_is_broken_in_their_mean():
    passes = [a_pass(1.0, batch=slice(0, 2), rows=2, layers=(1, 2)) for _ in range(4)]
    passes[2].scores["output"][1, 1] = torch.inf
    found = finish(
        *[[each] for each in passes],
        layers=(1, 2),
        batch=2,
        sigmas=[1.0, 0.75, 0.5, 0.25],
        budget=2 * passes[0].scores["output"].nbytes,
    )
    assert found.counts == (2, 2)
    assert found.broken == {1: (2, 2)}
    assert all(s[:, 1].isnan().all() and (s[:, 0] == 1).all() for s in found.scores["output"])


def test_a_run_that_recorded_nothing_is_an_error_that_names_likely_causes():
    with pytest.raises(RecordingError, match=r"recorded nothing.*2 evaluations.*TeaCache.*compiled"):
        finish([], [])


def test_the_first_failure_is_the_reason():
    r = recorder()
    r.add(r.evaluation(torch.tensor([1.0])), a_pass(1.0))
    r.fail("the reason")
    r.fail("what followed from it")
    with pytest.raises(RecordingError, match="image is not affected.*the reason"):
        r.finish()


def test_a_run_without_a_step_and_one_past_the_wrappers_have_reasons_of_their_own():
    with pytest.raises(RecordingError, match=r"took no step.*go from 1 to 0\. Raise its denoise"):
        recorder().finish()
    with pytest.raises(RecordingError, match=r"although the sampler took 4 steps.*Normalized Attention"):
        recorder().finish(taken=4)


def test_an_image_that_is_no_number_anywhere_is_broken_as_a_whole():
    passes = [a_pass(1.0, batch=slice(0, 3), rows=3), a_pass(2.0, batch=slice(0, 3), rows=3)]
    passes[1].scores["output"][2, 1, 0, 0, 1, 1] = torch.inf
    found = finish(*[[each] for each in passes], batch=3, sigmas=[1.0, 0.75])
    assert found.broken == {1: (1, 2)}
    for scores, value in zip(found.scores["output"], (1.0, 2.0), strict=True):
        assert scores[:, 1].isnan().all()
        assert (scores[:, [0, 2]] == value).all()


def test_a_broken_image_in_a_window_is_the_one_of_the_batch():
    window = a_pass(1.0, batch=[2, 0], rows=2)
    window.scores["output"][0, 0] = torch.nan
    assert finish([a_pass(1.0, batch=[1], rows=1), window], batch=3).broken == {2: (0, 0)}
