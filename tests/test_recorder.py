from __future__ import annotations

import pytest
import torch

from concept_attention.core.concepts import Concepts
from concept_attention.core.geometry import Grid
from concept_attention.core.observing.recorder import Pass, Recorder
from concept_attention.core.observing.recording import RecordingError

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
    r = recorder(budget=2 * size)
    for value in (1.0, 2.0, 3.0):
        r.add(r.evaluation(torch.tensor([1.0])), a_pass(value))
    r.add(r.evaluation(torch.tensor([1.0])), a_pass(4.0, layers=(1, 2)))
    found = r.finish()
    assert found.layers == (1, 2)
    assert [s.shape[0] for s in found.scores["output"]] == [2] * 4
    assert [float(s.mean()) for s in found.scores["output"]] == [1.0, 2.0, 3.0, 4.0]


def test_a_recording_within_the_budget_keeps_every_layer():
    r = recorder(budget=a_pass(0.0).scores["output"].nbytes)
    r.add(r.evaluation(torch.tensor([1.0])), a_pass(1.0))
    assert r.finish().layers == (0, 1, 2)


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
