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


def by_object_patches(model: ModelPatcher) -> ModelPatcher:
    """As nodes did before ComfyUI had a function for it: each block by itself, no trace in the options."""
    compiled = model.clone()
    for layer in range(2):
        name = f"diffusion_model.double_blocks.{layer}"
        block = getattr(model.get_model_object(name), "_orig_mod", model.get_model_object(name))
        compiled.add_object_patch(name, torch.compile(block, backend="eager"))
    return compiled


@pytest.mark.parametrize("compile_model", [by_the_stock_node, block_by_block, by_object_patches])
def test_a_compiled_model_is_recorded_and_stays_usable(compile_model):
    torch._dynamo.reset()
    model = random_flux(depth=2)
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


def test_observing_has_no_block_compiled_again():
    torch._dynamo.reset()
    model, compiled_graphs = random_flux(depth=1), []

    def backend(graph, inputs):
        compiled_graphs.append(graph)
        return graph

    compiled, name = model.clone(), "diffusion_model.double_blocks.0"
    compiled.add_object_patch(name, torch.compile(model.get_model_object(name), backend=backend))
    before = sample(compiled)
    count = len(compiled_graphs)
    assert count > 0
    assert torch.equal(sample(observed(compiled)), before)
    assert len(compiled_graphs) == count
    torch._dynamo.reset()
