"""Measure the demo model's concept maps on held-out scenes.

Every scene is encoded, noised to one noise level and passed through the model once, with the plugin's own
code in ComfyUI. The concepts are all that the scene shows and two nouns that it does not.

    python demo/evaluate.py --comfyui PATH --scenes 200
    python demo/evaluate.py --comfyui PATH --refine
    python demo/evaluate.py --comfyui PATH --crowd --grounding "anchor propagation"
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from scenes import GROUNDS, HELD_OUT, NOUNS, make_scene

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Scores:
    """Of argmax maps at image size: the mean IoU of the concepts shown, and the pixel accuracy. Then the
    share of scenes in which every absent concept's map stays below every present one's, by the mean and
    by the peak of the map. ``ious`` has the IoU of every concept shown, scene by scene."""

    iou: float
    accuracy: float
    absent_below_by_mean: float
    absent_below_by_peak: float
    ious: tuple[tuple[float, ...], ...] = field(repr=False)

    def interval(self, other: Scores | None = None, draws: int = 10_000) -> tuple[float, float]:
        """A 95 % confidence interval of the mean IoU, or of its difference from that of ``other`` on the same
        scenes, by drawing scenes anew (percentile bootstrap)."""
        sums = np.array([sum(scene) for scene in self.ious])
        if other is not None:
            sums = sums - [sum(scene) for scene in other.ious]
        counts = np.array([len(scene) for scene in self.ious])
        drawn = np.random.default_rng(0).integers(0, len(sums), (draws, len(sums)))
        low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), (2.5, 97.5))
        return float(low), float(high)


def evaluate(
    core,
    models: Path = HERE,
    *,
    scenes: int = 200,
    sigma: float = 0.5,
    pooling: str = "mean of tokens",
    look_alike: bool = False,
    crowd: bool = False,
    prompts: bool = True,
    grounding: str = "paper",
    refine: bool = False,
    first: int = HELD_OUT,
) -> Scores:
    """
    Args:
        core: the plugin's ``core`` package.
        sigma: the noise level, 0..1.
        look_alike: scenes with two objects of one noun, named by their colours.
        crowd: scenes with three or four touching objects of one noun, named by their colours.
        prompts: condition on the scene's prompt, not on an empty one.
        grounding: how maps are made, see ``core.maps.concept_maps``.
        refine: refine the maps by the image, see ``core.refine``.
        first: the seed of the first scene.
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
    for seed in range(first, first + scenes):
        scene = make_scene(seed, look_alike, crowd=crowd)
        shown = [r.phrase if look_alike or crowd else r.noun for r in scene.regions]
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
        made = core.maps.concept_maps(recording, grounding=grounding)
        if refine:
            maps = core.refine.refine(made.values[0], image[0], made.coverage)
        else:
            maps = made.at_size(*image.shape[1:3])[0]
        guess = maps.argmax(0).numpy()
        pairs = [(guess == index, scene.labels == index) for index in range(len(shown))]
        ious.append(tuple(float((a & b).sum() / (a | b).sum()) for a, b in pairs))
        hits.append((guess == scene.labels).mean())
        present, absent = maps[: len(shown)], maps[len(shown) :]
        by_mean.append(bool(absent.mean((1, 2)).max() < present.mean((1, 2)).min()))
        by_peak.append(bool(absent.amax((1, 2)).max() < present.amax((1, 2)).min()))
    each = [iou for scene in ious for iou in scene]
    return Scores(*(float(np.mean(values)) for values in (each, hits, by_mean, by_peak)), tuple(ious))


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
    parser.add_argument("--crowd", action="store_true")
    parser.add_argument("--grounding", default="paper")
    parser.add_argument("--refine", action="store_true")
    parser.add_argument("--no-prompts", action="store_true")
    args = parser.parse_args()
    sys.path[:0] = [str(args.comfyui), str(HERE.parent)]
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import core.maps
    import core.observe
    import core.refine

    with torch.inference_mode():
        scores = evaluate(
            core,
            args.models,
            scenes=args.scenes,
            sigma=args.sigma,
            pooling=args.pooling,
            look_alike=args.look_alike,
            crowd=args.crowd,
            prompts=not args.no_prompts,
            grounding=args.grounding,
            refine=args.refine,
        )
        print(scores)
        print("mean IoU, 95 % confidence: {:.4f} to {:.4f}".format(*scores.interval()))


if __name__ == "__main__":
    main()
