"""Agreement with DAAM, on the U-Nets of Stable Diffusion 2 and XL and on Flux.1."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import comfy.ops
import comfy.samplers
import comfy.supported_models
import comfy.utils
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from test_golden import run as sampled
from torch import Tensor

from concept_attention.core.architectures.stable_diffusion import StableDiffusion
from concept_attention.core.concepts import Concepts, ConceptTokens, Prompt
from concept_attention.core.geometry import Patch
from concept_attention.core.observing.latents import recording_of
from concept_attention.core.observing.observe import WhatToRecord, observe
from concept_attention.core.observing.readers import words as words_module
from concept_attention.core.reading.maps import heatmaps
from golden_files import FOLDER, Golden
from tiny_flux import FluxGolden

TOLERANCE = 1e-5
CPU = torch.device("cpu")


def files(kind: str) -> list[Path]:
    """The repository's files, and those of the folder ``GOLDEN_DIR`` and of ``baselines`` in it."""
    own = [Path(os.environ["GOLDEN_DIR"])] if os.environ.get("GOLDEN_DIR") else []
    folders = (FOLDER, *own, *(folder / "baselines" for folder in own))
    found = {p.name: p for folder in folders for p in folder.glob(f"daam_{kind}*.safetensors")}
    return [path for name, path in sorted(found.items()) if "weights" not in name]


class UNet:
    """A file's U-Net as a MODEL, and what it is given."""

    def __init__(self, path: Path) -> None:
        self.golden = Golden.load(path)
        kind = self.golden.metadata["kind"]
        weights = path.name.replace(f"daam_{kind}", f"daam_{kind}_weights")
        self.weights = Golden.load(path.with_name(weights))
        self.positions = self.golden.number("word_token_positions")["proper"]
        self.names = tuple(self.golden.number("concepts"))
        side = int(self.golden.metadata["latent_hw"]) ** 0.5
        self.patch = self.golden["inputs.latent"].shape[-1] // round(side)

    @property
    def config(self) -> dict:
        given = self.golden.config
        channels, layers, heads = given["channels"], given["layers"], given["heads"]
        depth = given.get("depth", [1] * len(channels))
        xl = "depth" in given
        # Down, the levels of SDXL's first and of SD2's last block have no attention.
        with_attention = range(1, len(channels)) if xl else range(len(channels) - 1)
        depths = [depth[i] if i in with_attention else 0 for i in range(len(channels))]
        return {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": channels[0],
            "num_res_blocks": [layers] * len(channels),
            "channel_mult": [c // channels[0] for c in channels],
            "num_heads": -1,
            "num_head_channels": channels[0] // heads[0],
            "use_spatial_transformer": True,
            "transformer_depth": [d for d in depths for _ in range(layers)],
            "transformer_depth_output": [d for d in depths for _ in range(layers + 1)],
            "transformer_depth_middle": depth[-1],
            "context_dim": given["context"],
            "use_linear_in_transformer": True,
            "legacy": False,
            **(
                {"num_classes": "sequential", "adm_in_channels": self.golden["inputs.y"].shape[1]}
                if xl
                else {}
            ),
        }

    def model(self) -> ModelPatcher:
        kind = comfy.supported_models.SDXL if "inputs.y" in self.golden else comfy.supported_models.SD20
        config = type("Tiny", (kind,), {"unet_extra_config": {}})(
            {
                **self.config,
                "dtype": torch.float32,
                "channel_mult": [int(m) for m in self.config["channel_mult"]],
            }
        )
        config.custom_operations = comfy.ops.disable_weight_init
        model = config.get_model({}, device=CPU)
        names = comfy.utils.unet_to_diffusers(config.unet_config)
        given = {k.removeprefix("weights."): v for k, v in self.weights.tensors.items()}
        ours = {names[k]: v.float() for k, v in given.items()}
        model.diffusion_model.load_state_dict(ours)
        if "inputs.y" in self.golden:
            model.encode_adm = lambda **kwargs: self.golden["inputs.y"]
        return ModelPatcher(model, load_device=CPU, offload_device=CPU)

    def conditioning(self, prompt: str) -> list:
        return [[self.golden[f"inputs.context_{prompt}"].float()[None], {}]]

    def tokens(self) -> ConceptTokens:
        context = self.golden["inputs.context_proper"].float()
        prompt = Prompt(context, tuple(tuple(rows) for rows in self.positions))
        one = ConceptTokens.single(context[: len(self.names)])
        return ConceptTokens(one.sequences, one.spans, one.lengths, one.pooling, prompt)

    def observed(self) -> ModelPatcher:
        return observe(self.model(), WhatToRecord(Concepts(self.names), self.tokens()))

    def run(self, model: ModelPatcher, positive: str, timesteps: list[int]) -> Tensor:
        guider = comfy.samplers.CFGGuider(model)
        guider.set_cfg(7.0)
        guider.inner_set_conds(
            {"positive": self.conditioning(positive), "negative": self.conditioning("empty")}
        )
        sampling = model.get_model_object("model_sampling")
        sigmas = torch.stack([sampling.sigma(torch.tensor(float(t))) for t in timesteps])
        latent = self.golden["inputs.latent"].float()
        return guider.sample(
            latent, torch.zeros_like(latent), Evaluations(latent), sigmas, disable_pbar=True, seed=0
        )


class Evaluations(comfy.samplers.Sampler):
    """Evaluates the model on one latent at each noise level; gives the last result."""

    def __init__(self, latent: Tensor) -> None:
        self._latent = latent

    def sample(self, model_wrap, sigmas, extra_args, *args, **kwargs) -> Tensor:
        for sigma in sigmas:
            # What the model is given is scaled by 1 / sqrt(sigma^2 + 1).
            x = self._latent * (sigma**2 + 1).sqrt()
            out = model_wrap(x, sigma.expand(len(x)), **extra_args)
        return out


@pytest.fixture(params=files("sd"), ids=lambda p: p.stem, scope="module")
def unet(request) -> UNet:
    return UNet(request.param)


@pytest.fixture(autouse=True)
def daams_grid(request, monkeypatch):
    """DAAM's maps have 64 or 96 rows, whatever sizes the layers have."""
    if "unet" not in request.fixturenames:
        return
    unet = request.getfixturevalue("unet")
    monkeypatch.setattr(StableDiffusion, "patch", lambda self, model: Patch(1, unet.patch, unet.patch))


def timesteps(unet: UNet) -> list[int]:
    return [int(unet.golden["inputs.timestep"])]


def relative(ours: Tensor, expected: Tensor) -> float:
    """Of the largest value, as the files have it."""
    assert ours.shape == expected.shape
    return float((ours - expected).abs().max() / expected.abs().max())


def words(recording) -> Tensor:
    """DAAM's heat maps (K, h, w): the sum over steps, the mean over layers."""
    steps = [
        s[[recording.layers.index(n) for n in recording.default_layers], 0]
        for s in recording.scores["probability"]
    ]
    return torch.stack(steps).mean(1).sum(0)


def test_words_of_the_prompt_have_daams_heat_maps(unet):
    recording = recording_of({"samples": unet.run(unet.observed(), "proper", timesteps(unet))})
    assert relative(words(recording), unet.golden["expected.cfg.words"]) <= TOLERANCE
    # Raw scores have the same mean.
    assert relative(heatmaps(recording, softmax=False)[0], unet.golden["expected.cfg.words"]) <= TOLERANCE


def test_steps_add_up_to_daams_but_for_what_is_below_0(unet):
    """DAAM enlarges the sum over steps, and then cuts off what the bicubic filter makes negative; here that
    is cut off in each step."""
    at = timesteps(unet)
    recording = recording_of({"samples": unet.run(unet.observed(), "proper", [*at, at[0] // 2])})
    assert relative(words(recording), unet.golden["expected.cfg_two_steps.words"]) <= 0.01


def test_every_layer_and_head_has_the_models_own_probabilities(unet, monkeypatch):
    seen = []
    on_grid = words_module._on_grid
    monkeypatch.setattr(words_module, "_on_grid", lambda p, *rest: (seen.append(p), on_grid(p, *rest))[1])
    unet.run(unet.observed(), "proper", timesteps(unet))
    model = unet.model().model.diffusion_model
    family = StableDiffusion()
    down = len(family.default_layers(model)) - sum("up" in name for name in unet.golden.number("modules"))
    default = family.default_layers(model)
    for layer, number in enumerate((*default[down:], *default[:down])):  # DAAM begins with those that go up
        ours = seen[number][0].mT  # (H, W, N)
        expected = unet.golden[f"expected.cfg.layer{layer}"].flatten(1)
        assert relative(ours.mean(0), expected) <= 5e-5
        if (name := f"expected.cfg.layer{layer}_heads") in unet.golden:
            assert relative(ours, unet.golden[name].flatten(2)) <= 5e-5


def test_words_of_another_prompt_are_read_with_the_queries_of_the_models_own(unet):
    recording = recording_of({"samples": unet.run(unet.observed(), "caption", timesteps(unet))})
    assert relative(words(recording), unet.golden["expected.observer.words"]) <= TOLERANCE


def test_the_picture_stays_the_same(unet):
    plain = unet.run(unet.model(), "proper", timesteps(unet))
    assert torch.equal(unet.run(unet.observed(), "proper", timesteps(unet)), plain)


class FluxWords(FluxGolden):
    """A file of Flux.1, with the weights and inputs that it was made from; each token of the prompt is a
    concept."""

    @classmethod
    def load(cls, path: Path) -> FluxWords:
        golden = Golden.load(path)
        if any(name.startswith("weights.") for name in golden.tensors):
            return cls(golden.tensors, golden.metadata)
        named = re.findall(r"\w+\.safetensors", golden.metadata.get("weights_and_inputs", ""))
        names = (path.name.replace("daam_flux", "daam_flux_weights"), *named)
        places = (folder / name for folder in (path.parent, path.parent.parent, FOLDER) for name in names)
        given = Golden.load(next(place for place in places if place.exists()))
        return cls({**given.tensors, **golden.tensors}, {**given.metadata, **golden.metadata})

    @property
    def tokens(self) -> ConceptTokens:
        context = self["inputs.context"][0]
        words = tuple((i,) for i in range(len(self["expected.text"])))
        return replace(ConceptTokens.single(context[: len(words)]), prompt=Prompt(context, words))

    @property
    def concepts(self) -> Concepts:
        return Concepts(tuple(f"token {i}" for i in range(len(self["expected.text"]))))


@pytest.fixture(params=files("flux"), ids=lambda p: p.stem, scope="module")
def flux(request) -> FluxWords:
    return FluxWords.load(request.param)


def test_words_of_flux1s_prompt_have_the_attention_that_image_pays_to_text(flux):
    with torch.inference_mode():
        _, recording = sampled(flux, spaces=["probability"])
    for step, scores in enumerate(recording.scores["probability"]):
        for layer in recording.layers:
            expected = flux[f"expected.step{step}.layer{layer}.text"]
            assert relative(scores[layer, 0].flatten(1), expected) <= TOLERANCE
    every = heatmaps(recording, layers=recording.layers, softmax=False)[0]
    assert relative(every, flux["expected.text"]) <= TOLERANCE
