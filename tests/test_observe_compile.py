"""Observing a compiled model."""

from __future__ import annotations

import comfy_extras.nodes_torch_compile as torch_compile
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.torch_helpers import set_torch_compile_wrapper

from observing import (
    TOLERANCE,
    observed,
    recording,
    relative,
)
from tiny_flux import random_flux, sample


def by_the_stock_node(model: ModelPatcher) -> ModelPatcher:
    """TorchCompileModel with the backend "eager", which the node does not offer but passes on."""
    return torch_compile.TorchCompileModel.execute(model, "eager").result[0]


def block_by_block(model: ModelPatcher) -> ModelPatcher:
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, "eager", keys=["diffusion_model.double_blocks.0"])
    return compiled


def by_an_object_patch(model: ModelPatcher) -> ModelPatcher:
    """As nodes did before ComfyUI had a function for it."""
    compiled, name = model.clone(), "diffusion_model.double_blocks.0"
    block = getattr(model.get_model_object(name), "_orig_mod", model.get_model_object(name))
    compiled.add_object_patch(name, torch.compile(block, backend="eager"))
    return compiled


@pytest.mark.parametrize("compile_model", [by_the_stock_node, block_by_block, by_an_object_patch])
def test_a_compiled_model_is_recorded_and_stays_usable(compile_model):
    torch._dynamo.reset()
    model = random_flux(depth=1)
    expected = recording(sample(observed(model), steps=2))
    compiled = compile_model(model)
    runs = [
        sample(compile_model(observed(model)), steps=2),
        sample(observed(compiled), steps=2),
        sample(compiled, steps=2),
        sample(observed(compiled), steps=2),  # compiled without the hooks by now
        sample(compiled, steps=2),
    ]
    assert all(torch.equal(run, runs[0]) for run in runs)
    for run in (runs[0], runs[1], runs[3]):
        for found, scores in zip(recording(run).scores["output"], expected.scores["output"], strict=True):
            assert relative(found, scores) <= TOLERANCE
    torch._dynamo.reset()
