"""What cannot be recorded leaves an error that says why."""

from __future__ import annotations

import itertools

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from concept_attention.core.observing.recording import RecordingError
from observing import (
    observed,
    recording,
    zeros_by_function_wrapper,
)
from tiny_flux import random_flux, sample


@pytest.fixture(scope="module")
def model() -> ModelPatcher:
    with torch.inference_mode():
        return random_flux()


def in_tiles(apply_model, args):
    """A model_function_wrapper like those of tiled diffusion nodes."""
    return torch.cat([apply_model(x, args["timestep"], **args["c"]) for x in args["input"].chunk(2, 3)], 3)


def test_tiled_sampling_is_named_as_the_reason(model):
    tiled = model.clone()
    tiled.set_model_unet_function_wrapper(in_tiles)
    samples = sample(observed(tiled), cfg=3.0)
    assert torch.equal(samples, sample(tiled, cfg=3.0))
    with pytest.raises(RecordingError, match=r"tile of 6 x 4 patches; the image has 6 x 8.*tiled sampling"):
        recording(samples)


def in_tiles_at_once(apply_model, args):
    """As Tiled Diffusion does with a tile batch size of 2."""
    tiles = torch.cat(args["input"].chunk(2, 3))
    doubled = {k: torch.cat([v, v]) if isinstance(v, Tensor) else v for k, v in args["c"].items()}
    return torch.cat(apply_model(tiles, args["timestep"].repeat(2), **doubled).chunk(2), 3)


def test_tiles_in_one_batch_are_named_as_the_reason(model):
    tiled = model.clone()
    tiled.set_model_unet_function_wrapper(in_tiles_at_once)
    samples = sample(observed(tiled))
    assert torch.equal(samples, sample(tiled))
    with pytest.raises(RecordingError, match=r"2 tiles of 12 x 8 at once.*is 12 x 16, and tiled sampling"):
        recording(samples)


def test_a_block_left_out_is_named_as_the_reason(model):
    skipping = model.clone()
    skipping.set_model_patch_replace(lambda args, extra: args, "dit", "double_block", 1)
    samples = sample(observed(skipping))
    assert torch.equal(samples, sample(skipping))
    with pytest.raises(RecordingError, match="nothing.*3 evaluations.*block 2 ran where block 1 was due"):
        recording(samples)


def test_evaluations_in_which_a_node_leaves_a_block_out_are_absent(model, caplog):
    count = itertools.count()

    def leave_out(args: dict, extra: dict) -> dict:
        return args if next(count) % 3 == 1 else extra["original_block"](args)

    skipping = model.clone()
    skipping.set_model_patch_replace(leave_out, "dit", "double_block", 1)
    samples = sample(observed(skipping))
    assert torch.equal(samples, sample(skipping))
    assert recording(samples).steps == (0, 2)
    assert "1 of the 3 evaluations" in caplog.text
    assert "block 2 ran where block 1 was due" in caplog.text


def zeros_by_diffusion_model_wrapper(model: ModelPatcher) -> None:
    def skip(executor, x, *args, **kwargs):
        return torch.zeros_like(x)

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "skip", skip)


@pytest.mark.parametrize("replace", [zeros_by_function_wrapper, zeros_by_diffusion_model_wrapper])
def test_a_model_that_never_runs_leaves_an_error_with_likely_causes(model, replace):
    plain = model.clone()
    replace(plain)
    after = observed(model)
    replace(after)
    for patched in (observed(plain), after):
        samples = sample(patched)
        assert torch.equal(samples, sample(plain))
        with pytest.raises(RecordingError, match="recorded nothing") as error:
            recording(samples)
        for word in ("3 evaluations", "TeaCache", "compiled", "Switch such nodes off"):
            assert word in str(error.value)


def without_patches(args: dict, extra: dict) -> dict:
    """Runs a block as caches do that call the model's blocks themselves."""
    return extra["original_block"]({**args, "transformer_options": {}})


@pytest.mark.parametrize(
    "blocks, reason",
    [
        ([0, 1, 2], "recorded nothing.*3 evaluations.*TeaCache"),
        ([2], "recorded nothing.*3 evaluations.*TeaCache"),
        ([0], "recorded nothing.*3 evaluations.*block 1 ran where block 0 was due"),
    ],
    ids=["all", "the last", "the first"],
)
def test_blocks_that_run_without_their_patches_are_never_passed_over(model, blocks, reason):
    patched = model.clone()
    for block in blocks:
        patched.set_model_patch_replace(without_patches, "dit", "double_block", block)
    samples = sample(observed(patched))
    assert torch.equal(samples, sample(patched))
    with pytest.raises(RecordingError, match=reason):
        recording(samples)
