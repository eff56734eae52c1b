"""Measure the demo model's concept maps on held-out scenes.

Every scene is encoded, noised to one noise level and passed through the model once, with the plugin's own
code in ComfyUI. The concepts are all that the scene shows and two nouns that it does not.

    python evaluate.py --comfyui PATH --scenes 200
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--models", type=Path, default=HERE)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--sigma", type=float, default=0.5)
    parser.add_argument("--pooling", default="mean of tokens")
    parser.add_argument("--look-alike", action="store_true", help="two objects of one noun, named by colour")
    parser.add_argument("--no-prompt", action="store_true")
    args = parser.parse_args()
    sys.path[:0] = [str(args.comfyui), str(HERE.parent)]
    sys.argv = [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import torch

    with torch.inference_mode():
        evaluate(args)


def evaluate(args: argparse.Namespace) -> None:
    import comfy.samplers
    import comfy.sd
    import comfy.utils
    import torch
    from scenes import HELD_OUT, make_scene
    from text_encoder import WIDTH, load_text_encoder

    from core.concepts import Concepts, encode_concepts
    from core.maps import concept_maps
    from core.observe import observe
    from core.recording import recording_of

    model = comfy.sd.load_diffusion_model(str(args.models / "flux.safetensors"))
    clip = load_text_encoder(args.models / "text_encoder.safetensors")
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(args.models / "vae.safetensors")))
    ious, accuracies, mean_order, peak_order = [], [], [], []
    for seed in range(HELD_OUT, HELD_OUT + args.scenes):
        scene = make_scene(seed, look_alike=args.look_alike)
        shown = [r.phrase if args.look_alike else r.noun for r in scene.regions]
        concepts = Concepts((*shown, *_absent(seed, shown)))
        image = torch.from_numpy(scene.image).float()[None] / 255
        latent = vae.encode(image)
        tokens = encode_concepts(clip, concepts.all, args.pooling, WIDTH)
        guider = comfy.samplers.CFGGuider(observe(model, concepts, tokens))
        prompt = "" if args.no_prompt else scene.prompt
        guider.inner_set_conds({"positive": clip.encode_from_tokens_scheduled(clip.tokenize(prompt))})
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
        samples = guider.sample(
            noise,
            latent,
            comfy.samplers.sampler_object("euler"),
            torch.tensor([args.sigma, 0.0]),
            disable_pbar=True,
            seed=seed,
        )
        maps = concept_maps(recording_of({"samples": samples})).at_size(*image.shape[1:3])[0]
        guess, truth = maps.argmax(0).numpy(), scene.labels
        for index in range(len(shown)):
            a, b = guess == index, truth == index
            ious.append((a & b).sum() / (a | b).sum())
        accuracies.append((guess == truth).mean())
        present, absent = maps[: len(shown)], maps[len(shown) :]
        mean_order.append(bool(absent.mean((1, 2)).max() < present.mean((1, 2)).min()))
        peak_order.append(bool(absent.amax((1, 2)).max() < present.amax((1, 2)).min()))
    print(
        f"{args.scenes} scenes, noise level {args.sigma}, {args.pooling}: "
        f"mean IoU {np.mean(ious):.3f}, pixel accuracy {np.mean(accuracies):.3f}; absent concepts below "
        f"every present one in {np.mean(mean_order):.1%} (mean of the map), {np.mean(peak_order):.1%} (peak)"
    )


def _absent(seed: int, shown: list[str], count: int = 2) -> tuple[str, ...]:
    from scenes import GROUNDS, NOUNS

    present = {word for phrase in shown for word in phrase.split()}
    nouns = [n for n in (*NOUNS, *GROUNDS) if n not in present]
    return tuple(str(n) for n in np.random.default_rng(seed).permutation(nouns)[:count])


if __name__ == "__main__":
    main()
