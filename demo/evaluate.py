"""Measure the demo model's concept maps on held-out scenes.

Every scene is encoded, noised to one noise level and passed through the model once, with the plugin's own
code in ComfyUI. The concepts are all that the scene shows and two nouns that it does not.

    python demo/evaluate.py --comfyui PATH --scenes 200
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from scenes import GROUNDS, HELD_OUT, NOUNS, make_scene

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Scores:
    """Of argmax maps at image size: the mean IoU of the concepts shown, and the pixel accuracy. Then the
    share of scenes in which every absent concept's map stays below every present one's, by the mean and
    by the peak of the map."""

    iou: float
    accuracy: float
    absent_below_by_mean: float
    absent_below_by_peak: float


def evaluate(
    core,
    models: Path = HERE,
    *,
    scenes: int = 200,
    sigma: float = 0.5,
    pooling: str = "mean of tokens",
    look_alike: bool = False,
    prompts: bool = True,
) -> Scores:
    """
    Args:
        core: the plugin's ``core`` package.
        sigma: the noise level, 0..1.
        look_alike: scenes with two objects of one noun, named by their colours.
        prompts: condition on the scene's prompt, not on an empty one.
    """
    import comfy.samplers
    import comfy.sd
    import comfy.utils

    from text_encoder import WIDTH, load_text_encoder

    model = comfy.sd.load_diffusion_model(str(models / "flux.safetensors"))
    clip = load_text_encoder(models / "text_encoder.safetensors")
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(models / "vae.safetensors")))
    euler = comfy.samplers.sampler_object("euler")
    ious, hits, by_mean, by_peak = [], [], [], []
    for seed in range(HELD_OUT, HELD_OUT + scenes):
        scene = make_scene(seed, look_alike)
        shown = [r.phrase if look_alike else r.noun for r in scene.regions]
        concepts = core.concepts.Concepts((*shown, *_absent(seed, shown)))
        image = torch.from_numpy(scene.image.copy()).float()[None] / 255
        latent = vae.encode(image)
        tokens = core.concepts.encode_concepts(clip, concepts.all, pooling, WIDTH)
        guider = comfy.samplers.CFGGuider(core.observe.observe(model, concepts, tokens))
        prompt = clip.tokenize(scene.prompt if prompts else "")
        guider.inner_set_conds({"positive": clip.encode_from_tokens_scheduled(prompt)})
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
        schedule = torch.tensor([sigma, 0.0])
        samples = guider.sample(noise, latent, euler, schedule, disable_pbar=True, seed=seed)
        recording = core.recording.recording_of({"samples": samples})
        maps = core.maps.concept_maps(recording).at_size(*image.shape[1:3])[0]
        guess = maps.argmax(0).numpy()
        for index in range(len(shown)):
            a, b = guess == index, scene.labels == index
            ious.append((a & b).sum() / (a | b).sum())
        hits.append((guess == scene.labels).mean())
        present, absent = maps[: len(shown)], maps[len(shown) :]
        by_mean.append(bool(absent.mean((1, 2)).max() < present.mean((1, 2)).min()))
        by_peak.append(bool(absent.amax((1, 2)).max() < present.amax((1, 2)).min()))
    return Scores(*(float(np.mean(values)) for values in (ious, hits, by_mean, by_peak)))


def _absent(seed: int, shown: list[str], count: int = 2) -> tuple[str, ...]:
    words = {word for phrase in shown for word in phrase.split()}
    nouns = [n for n in (*NOUNS, *GROUNDS) if n not in words]
    return tuple(str(n) for n in np.random.default_rng(seed).permutation(nouns)[:count])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--models", type=Path, default=HERE)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--sigma", type=float, default=0.5)
    parser.add_argument("--pooling", default="mean of tokens")
    parser.add_argument("--look-alike", action="store_true")
    parser.add_argument("--no-prompts", action="store_true")
    args = parser.parse_args()
    sys.path[:0] = [str(args.comfyui), str(HERE.parent)]
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import core.maps
    import core.observe

    with torch.inference_mode():
        print(
            evaluate(
                core,
                args.models,
                scenes=args.scenes,
                sigma=args.sigma,
                pooling=args.pooling,
                look_alike=args.look_alike,
                prompts=not args.no_prompts,
            )
        )


if __name__ == "__main__":
    main()
