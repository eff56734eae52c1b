"""Flux.2, Stable Diffusion 3 and CogVideoX against the reference implementation, through ComfyUI's own loader
and sampling. What ours leaves out of theirs is said in golden/README.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import comfy.samplers
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.samplers import KSAMPLER, CFGGuider
from tiny_models import model_config
from torch import Tensor

from concept_attention.benchmarks.segmentation.methods import (
    reference_cogvideox,
    reference_flux2,
    reference_sd3,
)
from concept_attention.core.concepts import Concepts, ConceptTokens
from concept_attention.core.observing.latents import recording_of
from concept_attention.core.observing.observe import WhatToRecord, observe
from concept_attention.core.observing.recording import Recording
from golden_files import Golden, golden_files, relative

TOLERANCE = 1e-5
MAPS = 5e-5
FLUX2_VECTORS = 2e-5  # the reference's float32 RoPE at position 510


@dataclass(frozen=True)
class Run:
    """A sampling run.

    Attributes:
        vectors: o_c, beside the o_x of Stable Diffusion 3's recipe, of each call of the model and layer.
        streams: the concepts after the block (B, K, D). The last of Stable Diffusion 3's gives none.
        velocities: what each call of the model gave.
        samples: what the sampler gave.
    """

    recording: Recording
    vectors: list[list[reference_sd3.Vectors]]
    streams: list[list[Tensor | None]]
    velocities: list[Tensor]
    samples: Tensor

    def scores(self, step: int, layer: int, space: str = "output") -> Tensor:
        """(B, K, N): of every image or video, over all its tokens."""
        scores = self.recording.scores[space][step][layer]
        return scores.unflatten(0, (-1, self.recording.frames)).movedim(1, 2).flatten(2)


def run(
    model: ModelPatcher,
    tokens: ConceptTokens,
    positive: list,
    sigmas: Tensor,
    latents: Sequence[Tensor],
    sampler: KSAMPLER | None = None,
    **options,
) -> Run:
    """Looks at the noisy ``latents`` with the model, one per noise level of the schedule ``sigmas``; or
    samples with a ``sampler`` from the first of them."""
    vectors, streams, velocities = [], [], []

    class Reading(reference_sd3.VectorReading):
        def __init__(self, *args) -> None:
            streams.append([])
            super().__init__(vectors, *args)

        def _record(self, *args) -> None:
            streams[-1].append(self._hidden)
            super()._record(*args)

    def look(model, noise, sigmas, extra_args, callback, disable):
        for latent, sigma in zip(latents, sigmas, strict=False):
            model(latent, sigma.expand(len(latent)), **extra_args)
        return noise

    concepts = Concepts(tuple(f"concept {i}" for i in range(len(tokens.sequences))))
    noise = latents[0] / sigmas[0]  # ComfyUI starts from sigma * noise
    hook = model.model.diffusion_model.register_forward_hook(
        lambda module, args, out: velocities.append(out.clone())
    )
    what = WhatToRecord(concepts, tokens, reader=Reading, **options)
    with torch.inference_mode():
        guider = CFGGuider(observe(model, what))
        guider.inner_set_conds({"positive": positive})
        samples = guider.sample(
            noise, torch.zeros_like(noise), sampler or KSAMPLER(look), sigmas, disable_pbar=True, seed=0
        )
    hook.remove()
    return Run(recording_of({"samples": samples}), vectors, streams, velocities, samples)


def euler() -> KSAMPLER:
    return comfy.samplers.sampler_object("euler")


def once(sigma: Tensor) -> Tensor:
    return torch.stack([sigma, torch.zeros_like(sigma)])


def compare(golden: Golden, name: str, ours: Tensor, tolerance: float, rows: slice = slice(None)) -> None:
    expected = golden[name][rows]
    assert relative(ours, expected) <= tolerance, name


def agrees(
    golden: Golden,
    run: Run,
    prefix: str,
    *,
    call: int = 0,
    tolerance: float = TOLERANCE,
    concepts: int | None = None,
    rows: slice = slice(None),
) -> None:
    """o_c and the stream of one call of the model, in every layer; of the first ``concepts`` alone."""
    assert f"{prefix}.layer0.output_concept_vectors" in golden
    assert f"{prefix}.layer{len(run.vectors[call])}.output_concept_vectors" not in golden
    for layer, (vectors, stream) in enumerate(zip(run.vectors[call], run.streams[call], strict=True)):
        name = f"{prefix}.layer{layer}"
        compare(golden, f"{name}.output_concept_vectors", vectors.concepts[rows, :concepts], tolerance, rows)
        assert (stream is None) == (f"{name}.concept_stream" not in golden)
        if stream is not None:
            compare(golden, f"{name}.concept_stream", stream[rows, :concepts], TOLERANCE, rows)


def files(prefix: str):
    paths = golden_files(prefix)
    return pytest.fixture(
        lambda request: Golden.load(request.param),
        params=paths,
        ids=[path.stem for path in paths],
        scope="module",
    )


flux2, sd3, cogvideox = (files(prefix) for prefix in ("F2", "SD3", "CV"))


def steps(golden: Golden) -> range:
    return range(golden.number("num_steps"))


def choices(golden: Golden):
    yield "", golden.number("heatmap_layers"), golden.number("heatmap_steps")
    yield "subset_", golden.number("heatmap_subset_layers"), golden.number("heatmap_subset_steps")


# Flux.2


def flux2_tokens(golden: Golden) -> ConceptTokens:
    """Concepts at the reference's position, 510: each begins a text of 2 tokens, filled up to 512."""
    tokens, positions = golden["inputs.concepts"][0], golden["inputs.concept_ids"][0, :, 3].int().tolist()
    return ConceptTokens(
        tuple(tokens[:, None]),
        (slice(0, 1),) * len(tokens),
        tuple(512 - position for position in positions),
        "first token",
    )


def flux2_conditioning(context: Tensor, guidance: Tensor) -> list:
    return [[context, {"guidance": float(guidance), "pooled_output": None}]]


@pytest.fixture(scope="module")
def flux2_run(flux2) -> Run:
    return run(
        flux2.model(),
        flux2_tokens(flux2),
        flux2_conditioning(flux2["inputs.context"], flux2["inputs.guidance"][0]),
        flux2["inputs.sigmas"],
        flux2["inputs.latents"],
        euler(),
    )


def test_flux2_samples_what_the_reference_does(flux2, flux2_run):
    assert relative(flux2_run.samples, flux2["expected.final_latent"]) <= TOLERANCE
    for step in steps(flux2):
        compare(flux2, f"expected.step{step}.velocity", flux2_run.velocities[step], TOLERANCE)


def test_flux2_concepts_in_every_step_and_layer(flux2, flux2_run):
    for step in steps(flux2):
        agrees(flux2, flux2_run, f"expected.step{step}", call=step, tolerance=FLUX2_VECTORS)


def test_flux2_scores_of_every_step_and_layer(flux2, flux2_run):
    for step in steps(flux2):
        for layer in flux2_run.recording.layers:
            name = f"expected.step{step}.layer{layer}.concept_scores"
            compare(flux2, name, flux2_run.scores(step, layer), FLUX2_VECTORS)


def test_flux2_heatmaps_of_all_and_of_chosen_layers_and_steps(flux2, flux2_run):
    for subset, layers, chosen in choices(flux2):
        recipe = partial(reference_flux2.heatmaps, flux2_run.recording, layers=layers, steps=chosen)
        maps = {"raw": recipe(1.0, softmax=False), "softmax": recipe(1.0), "softmax1000": recipe()}
        for kind, of_kind in maps.items():
            name = f"expected.heatmaps.output.{subset}{kind}"
            compare(flux2, name, of_kind, FLUX2_VECTORS)
            if kind != "raw":
                assert (of_kind - flux2[name]).abs().max() <= MAPS


def test_flux2_two_images_with_prompts_of_their_own(flux2):
    if "inputs.batch2.latents" not in flux2:
        pytest.skip("this golden file has no batch")
    for item, sigma in enumerate(flux2["inputs.batch2.timesteps"]):  # a sampler has one for the batch
        positive = flux2_conditioning(flux2["inputs.batch2.context"], flux2["inputs.batch2.guidance"][item])
        latents = flux2["inputs.batch2.latents"][None]
        both = run(flux2.model(), flux2_tokens(flux2), positive, once(sigma), latents)
        row = slice(item, item + 1)
        agrees(flux2, both, "expected.batch2", tolerance=FLUX2_VECTORS, rows=row)
        for layer in both.recording.layers:
            name = f"expected.batch2.layer{layer}.concept_scores"
            compare(flux2, name, both.scores(0, layer)[row], FLUX2_VECTORS, row)


# Stable Diffusion 3


def sd3_tokens(golden: Golden) -> ConceptTokens:
    """The reference's concepts have a start token before them, here a concept of its own."""
    return ConceptTokens.single(golden["inputs.concepts"][0])


def sd3_conditioning(context: Tensor, y: Tensor) -> list:
    return [[context, {"pooled_output": y}]]


@pytest.fixture(scope="module")
def sd3_run(sd3) -> Run:
    return run(
        sd3.model(),
        sd3_tokens(sd3),
        sd3_conditioning(sd3["inputs.context"], sd3["inputs.y"]),
        sd3["inputs.sigmas"],
        sd3["inputs.latents"],
        euler(),
    )


def test_sd3_samples_what_the_reference_does(sd3, sd3_run):
    # The latent format shifts and scales what leaves the sampler.
    assert relative(sd3_run.samples, sd3["expected.final_latent"] / 1.5305 + 0.0609) <= TOLERANCE
    for step in steps(sd3):
        compare(sd3, f"expected.step{step}.velocity", sd3_run.velocities[step], TOLERANCE)


def test_sd3_concepts_in_every_step_and_layer(sd3, sd3_run):
    for step in steps(sd3):
        agrees(sd3, sd3_run, f"expected.step{step}", call=step)


def test_sd3_scores_and_heatmaps_by_the_references_recipe(sd3, sd3_run):
    for step in steps(sd3):
        for layer, vectors in enumerate(sd3_run.vectors[step]):
            name = f"expected.step{step}.layer{layer}.concept_scores"
            compare(sd3, name, reference_sd3.scores(vectors), TOLERANCE)
    for subset, layers, chosen in choices(sd3):
        calls = [[sd3_run.vectors[step][layer] for layer in layers] for step in chosen]
        for kind in ("raw", "softmax"):
            name = f"expected.heatmaps.output.{subset}{kind}"
            maps = reference_sd3.heatmaps(calls, softmax=kind == "softmax")
            compare(sd3, name, maps.unflatten(-1, sd3.number("token_hw")), TOLERANCE)


def test_sd3_two_images_with_prompts_of_their_own(sd3):
    if "inputs.batch2.latents" not in sd3:
        pytest.skip("this golden file has no batch")
    for item, time in enumerate(sd3["inputs.batch2.timesteps"]):
        positive = sd3_conditioning(sd3["inputs.batch2.context"], sd3["inputs.batch2.y"])
        latents = sd3["inputs.batch2.latents"][None]
        both = run(sd3.model(), sd3_tokens(sd3), positive, once(time / 1000), latents)
        agrees(sd3, both, "expected.batch2", rows=slice(item, item + 1))


# CogVideoX


def cogvideox_run(
    golden: Golden, times: Tensor, context: Tensor, latents: Sequence[Tensor], padded: bool
) -> Run:
    """One look per time of the schedule."""
    tokens = golden["inputs.concepts"][0]
    tokens = reference_cogvideox.padded(tokens) if padded else ConceptTokens.single(tokens)
    model_config("CogVideoX_T2V")  # skips where there is none
    model = golden.model()
    # ComfyUI multiplies positions by 1.875 where diffusers does not.
    model.model.diffusion_model.spatial_interpolation_scale = 1.0
    sigmas = model.get_model_object("model_sampling").sigma(times)
    sigmas = torch.cat((sigmas, sigmas.new_zeros(1)))
    return run(model, tokens, [[context, {}]], sigmas, latents)


@pytest.fixture(scope="module", params=["padded", "alone"])
def padded(cogvideox, request) -> bool:
    if request.param == "alone" and "expected.nopad.step0.layer0.concept_scores" not in cogvideox:
        pytest.skip("this golden file has no run without padding")
    return request.param == "padded"


@pytest.fixture(scope="module")
def looks(cogvideox, padded) -> Run:
    """The two rows of the reference's guidance, negative and positive, as a batch of two videos."""
    latents = cogvideox["inputs.latents"].expand(-1, 2, -1, -1, -1, -1)
    times = cogvideox["inputs.timesteps"][:, 0]
    return cogvideox_run(cogvideox, times, cogvideox["inputs.context"], latents, padded)


@pytest.fixture(scope="module")
def expected(padded) -> str:
    """What the names of the tensors expected of a step begin with."""
    return "expected.step" if padded else "expected.nopad.step"


@pytest.fixture(scope="module")
def count(cogvideox, padded) -> int:
    """Of how many concepts there are expected tensors: one stands for all of the padding."""
    return cogvideox.number("num_concepts") + padded


def test_cogvideox_predicts_what_the_reference_does(cogvideox, looks):
    for step in steps(cogvideox):
        compare(cogvideox, f"expected.step{step}.velocity", looks.velocities[step], TOLERANCE)


def test_cogvideox_concepts_in_every_step_and_layer(cogvideox, looks, expected, count):
    for step in steps(cogvideox):
        agrees(cogvideox, looks, f"{expected}{step}", call=step, concepts=count)


def test_cogvideox_scores_of_every_step_and_layer(cogvideox, looks, expected, count):
    for step in steps(cogvideox):
        for layer in looks.recording.layers:
            name = f"{expected}{step}.layer{layer}.concept_scores"
            compare(cogvideox, name, looks.scores(step, layer)[:, :count], TOLERANCE)


def test_cogvideox_heatmaps_of_all_and_of_chosen_layers_and_steps(cogvideox, looks, padded):
    for subset, layers, chosen in choices(cogvideox):
        name = f"expected.heatmaps.output.{subset}{'softmax' if padded else 'nopad_softmax'}"
        if subset and name not in cogvideox:
            continue
        count = cogvideox.number("num_concepts")
        maps = reference_cogvideox.heatmaps(looks.recording, count, layers=layers, steps=chosen)
        of_videos = maps.unflatten(0, (2, -1)).movedim(1, 2)
        compare(cogvideox, name, of_videos[1:], TOLERANCE)


def test_cogvideox_two_videos_with_prompts_of_their_own(cogvideox):
    if "inputs.batch2.latents" not in cogvideox:
        pytest.skip("this golden file has no batch")
    count = cogvideox.number("num_concepts") + 1
    for item, time in enumerate(cogvideox["inputs.batch2.timesteps"]):
        context, latents = cogvideox["inputs.batch2.context"], cogvideox["inputs.batch2.latents"][None]
        both = cogvideox_run(cogvideox, time[None], context, latents, padded=True)
        row = slice(item, item + 1)
        agrees(cogvideox, both, "expected.batch2", concepts=count, rows=row)
        for layer in both.recording.layers:
            name = f"expected.batch2.layer{layer}.concept_scores"
            compare(cogvideox, name, both.scores(0, layer)[row, :count], TOLERANCE, row)
