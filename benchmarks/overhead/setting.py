"""What the benchmarks run in: ComfyUI and the plugin, Flux.1 models of any size with random weights, and one
evaluation of a model through ComfyUI's own sampling, timed."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

ROOT = Path(__file__).resolve().parents[2]


def load(flags: Sequence[str] = ()) -> None:
    """Makes ComfyUI, started with these flags, importable, and this plugin as ``concept_attention``."""
    if "concept_attention" in sys.modules:
        return
    sys.path.insert(0, str(ROOT / "demo"))
    import comfyui

    path = comfyui.find()
    if path is None:
        sys.exit(f"No ComfyUI was found. {comfyui.HELP}")
    sys.path.insert(0, str(path))
    import utils.install_util  # noqa: F401 - before ComfyUI 0.18 puts another module called utils in its place

    argv, sys.argv = sys.argv, ["main.py", "--disable-api-nodes", *flags]
    if not torch.cuda.is_available():
        sys.argv.append("--cpu")
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args

    sys.argv = argv
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    comfyui.name_plugin()


@dataclass(frozen=True)
class Size:
    """A Flux.1 with heads of 128 features."""

    heads: int
    depth: int
    depth_single: int
    context: int
    pooled: int
    text_tokens: int

    @property
    def hidden(self) -> int:
        return 128 * self.heads


FLUX_DEV = Size(heads=24, depth=19, depth_single=38, context=4096, pooled=768, text_tokens=256)
# An eighth of the depth and a quarter of the width; text tokens in the ratio that they have to 1024 x 1024.
SCALED = Size(heads=6, depth=3, depth_single=6, context=1024, pooled=192, text_tokens=64)
TINY = Size(heads=1, depth=2, depth_single=1, context=32, pooled=16, text_tokens=8)


def random_model(size: Size, dtype: torch.dtype, device: torch.device) -> ModelPatcher:
    """Through ComfyUI's loader. Weights are drawn so that activations keep their size."""
    import comfy.sd

    torch.manual_seed(0)
    hidden, weights = size.hidden, {}

    def linear(name: str, fan_in: int, fan_out: int, gain: float = 1.0) -> None:
        weight = torch.empty(fan_out, fan_in, dtype=dtype, device=device).normal_(0, gain * fan_in**-0.5)
        weights[f"{name}.weight"] = weight.cpu()
        weights[f"{name}.bias"] = torch.zeros(fan_out, dtype=dtype)

    def norms(name: str) -> None:
        for norm in ("query_norm", "key_norm"):
            weights[f"{name}.{norm}.scale"] = torch.ones(128, dtype=dtype)

    linear("img_in", 64, hidden)
    linear("txt_in", size.context, hidden)
    for name, width in {"time_in": 256, "vector_in": size.pooled, "guidance_in": 256}.items():
        linear(f"{name}.in_layer", width, hidden)
        linear(f"{name}.out_layer", hidden, hidden)
    for i in range(size.depth):
        for side in ("img", "txt"):
            block = f"double_blocks.{i}.{side}"
            linear(f"{block}_mod.lin", hidden, 6 * hidden, 0.4)
            linear(f"{block}_attn.qkv", hidden, 3 * hidden)
            linear(f"{block}_attn.proj", hidden, hidden)
            linear(f"{block}_mlp.0", hidden, 4 * hidden)
            linear(f"{block}_mlp.2", 4 * hidden, hidden)
            norms(f"{block}_attn.norm")
    for i in range(size.depth_single):
        linear(f"single_blocks.{i}.linear1", hidden, 7 * hidden)
        linear(f"single_blocks.{i}.linear2", 5 * hidden, hidden)
        linear(f"single_blocks.{i}.modulation.lin", hidden, 3 * hidden, 0.4)
        norms(f"single_blocks.{i}.norm")
    linear("final_layer.linear", hidden, 64)
    linear("final_layer.adaLN_modulation.1", hidden, 2 * hidden, 0.1)
    return comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": dtype})


@dataclass(frozen=True)
class Scene:
    """What is given to the model: empty latents for ``height`` x ``width`` pixels, and a prompt."""

    size: Size
    height: int
    width: int
    batch: int = 1

    @property
    def patches(self) -> int:
        return self.height * self.width // 256

    @property
    def latent(self) -> Tensor:
        return torch.zeros(self.batch, 16, self.height // 8, self.width // 8)

    @property
    def conditioning(self) -> list:
        g = torch.Generator().manual_seed(1)
        values = {"pooled_output": torch.randn(1, self.size.pooled, generator=g), "guidance": 3.5}
        return [[torch.randn(1, self.size.text_tokens, self.size.context, generator=g), values]]


def observed(model: ModelPatcher, size: Size, concepts: int, **options) -> ModelPatcher:
    from concept_attention.core.concepts import Concepts, ConceptTokens
    from concept_attention.core.observing.observe import observe

    tokens = torch.randn(concepts, size.context, generator=torch.Generator().manual_seed(2))
    names = Concepts(tuple(f"concept {i}" for i in range(concepts)))
    return observe(model, names, ConceptTokens.single(tokens), budget=2**40, **options)


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds. Of a GPU when all that was asked of it is done; of a CPU the time that this process was given,
    whatever else the machine does."""
    if device.type != "cuda":
        return time.process_time

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def evaluate(model: ModelPatcher, scene: Scene, evaluations: int = 1) -> tuple[list[float], Tensor]:
    """Samples with ComfyUI and a sampler that only evaluates the model: seconds of each, and the samples."""
    import comfy.sample
    from comfy.samplers import CFGGuider, Sampler

    seconds = []
    now = clock(model.load_device)

    class Timed(Sampler):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
            x = noise
            for sigma in sigmas[:-1]:
                start = now()
                out = model_wrap(noise, sigma.expand(len(noise)), **extra_args)
                seconds.append(now() - start)
                x = x + out
            return x

    guider = CFGGuider(model)
    guider.inner_set_conds({"positive": scene.conditioning})
    latent = scene.latent
    sigmas = torch.linspace(1, 0, evaluations + 1)
    noise = comfy.sample.prepare_noise(latent, 0)
    with torch.inference_mode():
        samples = guider.sample(noise, latent, Timed(), sigmas, disable_pbar=True, seed=0)
    return seconds, samples
