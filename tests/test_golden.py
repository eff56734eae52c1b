"""Agreement with the reference implementation, through ComfyUI's own loader and sampler."""

from __future__ import annotations

import comfy.samplers
import pytest
import torch

from concept_attention.core.architectures import flux1
from concept_attention.core.observing.image import observe_image
from concept_attention.core.observing.latents import recording_of
from concept_attention.core.observing.observe import WhatToRecord
from concept_attention.core.observing.readers.stream import SPACES, ConceptStream
from concept_attention.core.reading.maps import heatmaps
from golden_files import golden_files, relative
from tiny_flux import FluxGolden

TOLERANCE = 1e-5


@pytest.fixture(params=golden_files(), ids=lambda p: p.stem, scope="module")
def golden(request) -> FluxGolden:
    return FluxGolden.load(request.param)


def run(golden: FluxGolden, start=None, sigmas=None, positive=None, **options):
    """Sample from ``start`` with Euler, by default golden's main run; the samples and their recording."""
    start = golden["inputs.latents"][0] if start is None else start
    sigmas = golden["inputs.sigmas"] if sigmas is None else sigmas
    guider = comfy.samplers.CFGGuider(golden.observed(golden.model(), **options))
    guider.inner_set_conds({"positive": positive or golden.conditioning()})
    euler = comfy.samplers.sampler_object("euler")
    noise = start / sigmas[0]  # ComfyUI starts from sigma * noise
    samples = guider.sample(noise, torch.zeros_like(noise), euler, sigmas, disable_pbar=True, seed=0)
    return samples, recording_of({"samples": samples})


@pytest.fixture(scope="module")
def main_run(golden):
    with torch.inference_mode():
        return run(golden, spaces=SPACES)


@pytest.fixture(scope="module")
def recording(main_run):
    return main_run[1]


def test_the_sampler_ends_where_the_references_does(golden, main_run):
    # The latent format shifts and scales what leaves the sampler.
    final = golden["expected.final_latent"] / 0.3611 + 0.1159
    assert relative(main_run[0], final) <= TOLERANCE


def test_every_step_and_layer_is_recorded(golden, recording):
    assert recording.layers == tuple(range(golden.config["depth"]))
    assert recording.steps == tuple(range(golden.number("num_steps")))
    assert recording.sigmas == pytest.approx(golden["inputs.sigmas"][:-1].tolist())


def test_scores_of_every_step_and_layer(golden, recording):
    for step, scores in enumerate(recording.scores["output"]):
        for layer in recording.layers:
            expected = golden[f"expected.step{step}.layer{layer}.concept_scores"]
            assert relative(scores[layer].flatten(-2), expected) <= TOLERANCE


def heatmap_choices(golden):
    yield "", golden.number("heatmap_layers"), golden.number("heatmap_steps")
    yield "subset_", golden.number("heatmap_subset_layers"), golden.number("heatmap_subset_steps")


@pytest.mark.parametrize("space,name", [("output", "output"), ("cross-attention", "cross")])
@pytest.mark.parametrize("softmax,kind", [(True, "softmax"), (False, "raw")])
def test_heatmaps_of_all_and_of_chosen_layers_and_steps(golden, recording, space, name, softmax, kind):
    for subset, layers, steps in heatmap_choices(golden):
        ours = heatmaps(recording, space=space, layers=layers, steps=steps, softmax=softmax)
        expected = golden[f"expected.heatmaps.{name}.{subset}{kind}"]
        assert relative(ours, expected) <= TOLERANCE
        if softmax:
            assert (ours - expected).abs().max() <= 5e-5


def test_heatmaps_of_normalized_concepts(golden, recording):
    ours = heatmaps(
        recording,
        space="output, normalized concepts",
        layers=golden.number("heatmap_layers"),
        steps=golden.number("heatmap_steps"),
    )
    assert relative(ours, golden["expected.heatmaps.output.normalized_softmax"]) <= TOLERANCE


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("itself", [False, True])
def test_cross_and_self_attention_ablations(golden, cross, itself):
    _, recording = run(golden, attend_image=cross, attend_concepts=itself)
    name = f"expected.ablation.cross{int(cross)}_self{int(itself)}"
    step = golden.number("ablation_step")
    for layer in recording.layers:
        expected = golden[f"{name}.layer{layer}.concept_scores"]
        assert relative(recording.scores["output"][step][layer].flatten(-2), expected) <= TOLERANCE
    layers = golden.number("heatmap_layers")
    for softmax, kind in ((True, "softmax"), (False, "raw")):
        ours = heatmaps(recording, layers=layers, steps=[step], softmax=softmax)
        assert relative(ours, golden[f"{name}.heatmaps.output.{kind}"]) <= TOLERANCE


def test_a_batch_of_two_with_prompts_of_their_own(golden):
    if "inputs.batch2.latents" not in golden:
        pytest.skip("this golden file has no batch")
    values = {"pooled_output": golden["inputs.batch2.y"], "guidance": 0.0}  # the reference's default
    positive = [[golden["inputs.batch2.context"], values]]
    for item, sigma in enumerate(golden["inputs.batch2.timesteps"]):  # a sampler has one for the batch
        _, recording = run(
            golden,
            golden["inputs.batch2.latents"],
            torch.stack([sigma, torch.zeros_like(sigma)]),
            positive,
            spaces=("output", "cross-attention"),
        )
        for layer in recording.layers:
            ours = recording.scores["output"][0][layer][item].flatten(-2)
            expected = golden[f"expected.batch2.layer{layer}.concept_scores"][item]
            assert relative(ours, expected) <= TOLERANCE
        layers = golden.number("heatmap_layers")
        for name, space in (("output", "output"), ("cross", "cross-attention")):
            for softmax, kind in ((True, "softmax"), (False, "raw")):
                ours = heatmaps(recording, space=space, layers=layers, softmax=softmax)[item]
                assert relative(ours, golden[f"expected.batch2.heatmaps.{name}.{kind}"][item]) <= TOLERANCE


def look(golden: FluxGolden, noisy: torch.Tensor, sigma: torch.Tensor, positive: list | None = None):
    """The recording of an existing noisy latent (B, C, H, W) at its noise level."""
    clean = torch.zeros_like(noisy)  # then all that the model is given is sigma * noise
    return observe_image(
        golden.model(),
        WhatToRecord(golden.concepts, golden.tokens, range(golden.config["depth"]), SPACES[:2]),
        clean,
        positive or golden.conditioning(),
        image_size=(noisy.shape[-2] * 8, noisy.shape[-1] * 8),
        levels=(float(sigma),),
        noise=(noisy / sigma)[None],
    )


def test_an_existing_latent_at_every_step(golden):
    choice = golden.number("heatmap_layers")
    maps = {"output": [], "cross-attention": []}
    for step in range(golden.number("num_steps")):
        recording = look(golden, golden["inputs.latents"][step], golden["inputs.sigmas"][step])
        for layer in recording.layers:
            expected = golden[f"expected.step{step}.layer{layer}.concept_scores"]
            assert relative(recording.scores["output"][0][layer].flatten(-2), expected) <= TOLERANCE
        for space, steps in maps.items():
            steps.append(heatmaps(recording, space=space, layers=choice))
    for space, name in (("output", "output"), ("cross-attention", "cross")):
        expected = golden[f"expected.heatmaps.{name}.softmax"]
        assert relative(torch.stack(maps[space]).mean(0), expected) <= TOLERANCE


def test_existing_latents_of_a_batch_with_prompts_of_their_own(golden):
    if "inputs.batch2.latents" not in golden:
        pytest.skip("this golden file has no batch")
    values = {"pooled_output": golden["inputs.batch2.y"], "guidance": 0.0}  # the reference's default
    positive = [[golden["inputs.batch2.context"], values]]
    for item, sigma in enumerate(golden["inputs.batch2.timesteps"]):
        recording = look(golden, golden["inputs.batch2.latents"], sigma, positive)
        for layer in recording.layers:
            ours = recording.scores["output"][0][layer][item].flatten(-2)
            expected = golden[f"expected.batch2.layer{layer}.concept_scores"][item]
            assert relative(ours, expected) <= TOLERANCE


def test_the_concept_stream_after_every_block(golden):
    for step in range(golden.number("num_steps")):
        for layer, stream in enumerate(concept_streams(golden, step)):
            expected = golden[f"expected.step{step}.layer{layer}.concept_stream"]
            assert relative(stream, expected) <= TOLERANCE


def test_the_modulation_vector_of_the_concepts(golden):
    model = golden.model().model.diffusion_model
    for step in range(golden.number("num_steps")):
        guidance = golden.tensors.get("inputs.guidance")
        text = flux1.TextStream(model, golden["inputs.timesteps"][step], guidance, torch.float32)
        assert relative(text.vec, golden[f"expected.step{step}.concept_vec"]) <= TOLERANCE


def concept_streams(golden: FluxGolden, step: int) -> list[torch.Tensor]:
    """The concept stream after every block of one forward pass of the model. It runs to the end, past the
    last layer that anyone would record."""
    model = golden.model().model.diffusion_model
    depth = len(model.double_blocks)
    t, guidance = golden["inputs.timesteps"][step], golden.tensors.get("inputs.guidance")
    text = flux1.TextStream(model, t, guidance, torch.float32)
    stream = ConceptStream(text, golden["inputs.concepts"][0], (*range(depth), depth))
    streams = []

    def before(q, k, v, pe, attn_mask, extra_options):
        if extra_options["block_type"] == "double":
            image = slice(extra_options["img_slice"][0], None)
            stream.attend(
                extra_options["block_index"],
                *(t[:, :, image] for t in (q, k, v)),
                rotate=lambda keys: flux1.rotate(keys, pe[:, :, image]),
            )
        return {}

    def after(out, extra_options):
        if extra_options["block_type"] == "double":
            stream.score(extra_options["block_index"], out[:, extra_options["img_slice"][0] :])
            streams.append(stream.hidden)
        return out

    patches = {"attn1_patch": [before], "attn1_output_patch": [after]}
    model(
        golden["inputs.latents"][step],
        t,
        golden["inputs.context"],
        y=golden["inputs.y"],
        guidance=guidance,
        transformer_options={"patches": patches},
    )
    return streams
