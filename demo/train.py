"""Train the demo's Flux.1-architecture model and its text encoder, given the demo VAE.

Two losses: flow matching on the scenes' latents, and, since a model this small does not grow readable
concept maps by itself, the cross-entropy between concept maps (softmax over concepts of the output-space
scores of the last four double-stream blocks, as the plugin computes them) and the true labels, at all
noise levels.

    python train.py --comfyui PATH --vae vae.safetensors --out . --minutes 60
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scenes import COLOURS, GROUNDS, NOUNS, OBJECTS, Scene, make_scene

FLUX = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 64,
    "context_in_dim": 64,
    "hidden_size": 128,
    "mlp_ratio": 4.0,
    "num_heads": 1,
    "depth": 7,
    "depth_single_blocks": 3,
    "axes_dim": [16, 56, 56],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "guidance_embed": False,
    "txt_ids_dims": [],
}
SUPERVISED = (3, 4, 5, 6)
BACKGROUND = "background"
UNKNOWN = ""  # stands for any word outside the vocabulary
LABEL_SIZE = 64
IGNORED = -100


def start_comfyui(path: Path) -> None:
    sys.path[:0] = [str(path), str(Path(__file__).resolve().parent.parent)]
    sys.argv = [sys.argv[0], "--cpu", "--use-pytorch-cross-attention"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.model_management

    comfy.model_management.in_training = True


def allow_gradients(model: nn.Module) -> None:
    """ComfyUI's blocks update their residual stream in place, so what a norm keeps must be a copy."""
    for module in model.modules():
        if type(module).__name__ in ("LayerNorm", "T5LayerNorm"):
            module.register_forward_pre_hook(lambda _, args: (args[0].clone(), *args[1:]))


def initialise(model: nn.Module, zero: tuple[str, ...] = ()) -> None:
    for name, p in model.named_parameters():
        if p.ndim == 2 and not any(z in name for z in zero):
            nn.init.normal_(p, std=p.shape[1] ** -0.5)
        elif p.ndim == 1 and name.endswith("weight"):
            nn.init.ones_(p)
        else:
            nn.init.zeros_(p)


class TextEncoder(nn.Module):
    """T5 and CLIP-L as in ``text_encoder.py``, with tables of the vocabulary only. Row 0: other words."""

    def __init__(self) -> None:
        super().__init__()
        import comfy.ops
        from comfy.clip_model import CLIPTextModel
        from comfy.text_encoders import t5
        from comfy.text_encoders.flux import FluxTokenizer

        from text_encoder import MODEL_OPTIONS, T5_LENGTH, TABLES, WIDTH

        def config(module, file, overrides):
            import json

            return {**json.loads((Path(module.__file__).parent / file).read_text()), **overrides}

        from comfy import sd1_clip

        ops = comfy.ops.disable_weight_init
        t5_config = config(t5, "t5_config_xxl.json", MODEL_OPTIONS["t5xxl_model_config"])
        l_config = config(sd1_clip, "sd1_clip_config.json", MODEL_OPTIONS["clip_l_model_config"])
        self.t5xxl = t5.T5({**t5_config, "vocab_size": 1}, torch.float32, "cpu", ops)
        self.clip_l = CLIPTextModel(l_config, torch.float32, "cpu", ops)
        self.clip_l.text_model.embeddings.token_embedding = nn.Embedding(1, WIDTH)
        initialise(self)
        allow_gradients(self)
        self._tokenizer = FluxTokenizer()
        self._length = T5_LENGTH
        self._cache: dict[str, tuple] = {}
        self._pad_id = 0
        texts = ["", BACKGROUND, *_vocabulary_texts()]
        ids = {"t5xxl.": {0}, "clip_l.": set()}
        for text in texts:
            t5_ids, l_ids, _ = self._ids(text)
            ids["t5xxl."].update(t5_ids)
            ids["clip_l."].update(l_ids)
        self.ids, self._index, self.rows = {}, {}, nn.ParameterDict()
        for prefix, (_, size) in TABLES.items():
            known = torch.tensor(sorted(ids[prefix]))
            self.ids[prefix] = known
            self._index[prefix] = torch.zeros(size, dtype=torch.long)
            self._index[prefix][known] = torch.arange(1, len(known) + 1)
            self.rows[prefix.rstrip(".")] = nn.Parameter(torch.randn(len(known) + 1, WIDTH) * 0.5)

    def _ids(self, text: str) -> tuple[list[int], list[int], int]:
        if text not in self._cache:
            options = {"t5xxl_min_length": self._length}
            tokens = self._tokenizer.tokenize_with_weights(text, tokenizer_options=options)
            t5_ids, l_ids = ([t[0] for t in tokens[k][0]] for k in ("t5xxl", "l"))
            self._cache[text] = (t5_ids, l_ids, t5_ids.index(1))
        return self._cache[text]

    def _t5(self, texts: list[str]) -> tuple[Tensor, list[int]]:
        found = [self._ids(t) for t in texts]
        index = self._index["t5xxl."][torch.tensor([f[0] for f in found])]
        for row, text in enumerate(texts):
            if text.startswith("?"):  # one to three unknown pieces
                count = len(text)
                index[row, :count] = 0
                index[row, count] = self._index["t5xxl."][1]
                index[row, count + 1 :] = self._index["t5xxl."][0]
        out = self.t5xxl(None, None, embeds=self.rows["t5xxl"][index])[0]
        return out, [len(t) if t.startswith("?") else f[2] for t, f in zip(texts, found, strict=True)]

    def prompts(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Context (B, 32, 64) and pooled vector (B, 64)."""
        l_ids = torch.tensor([self._ids(t)[1] for t in texts])
        embeds = self.rows["clip_l"][self._index["clip_l."][l_ids]]
        ends = (l_ids == 49407).int().argmax(1) + 1
        # ComfyUI's Flux takes the vector before the text projection
        return self._t5(texts)[0], self.clip_l(None, None, embeds=embeds, num_tokens=ends.tolist())[3]

    def concepts(self, lists: list[list[str]], first_token: list[bool]) -> Tensor:
        """Concept tokens (B, K, 64): the first token or the mean of the tokens."""
        texts = sorted({t for concepts in lists for t in concepts})
        out, counts = self._t5(texts)
        first = {t: out[i, 0] for i, t in enumerate(texts)}
        mean = {t: out[i, : counts[i]].mean(0) for i, t in enumerate(texts)}
        return torch.stack(
            [
                torch.stack([(first if f else mean)[t] for t in concepts])
                for concepts, f in zip(lists, first_token, strict=True)
            ]
        )

    def load(self, state: dict[str, Tensor]) -> None:
        from text_encoder import TABLES

        for prefix, (table, _) in TABLES.items():
            part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            self.rows[prefix.rstrip(".")].data.copy_(part.pop(table))
            if not torch.equal(part.pop("ids").long(), self.ids[prefix]):
                raise ValueError("the vocabulary has changed since this text encoder was saved")
            getattr(self, prefix.rstrip(".")).load_state_dict(part, strict=False)

    def export(self) -> dict[str, Tensor]:
        from text_encoder import TABLES

        out = {}
        for prefix, (table, _) in TABLES.items():
            module = getattr(self, prefix.rstrip("."))
            out |= {prefix + k: v.half() for k, v in module.state_dict().items()}
            out[prefix + table] = self.rows[prefix.rstrip(".")].detach().half()
            out[prefix + "ids"] = self.ids[prefix].to(torch.int32)
        return {k: v.contiguous() for k, v in out.items()}


def _vocabulary_texts() -> list[str]:
    phrases = [f"{c} {n}" for n in NOUNS for c in COLOURS]
    places = [*(f"on the {g} under the sky" for g in GROUNDS), "in the sky"]
    return [
        *(f"a {p}" for p in phrases),
        *(f"an orange {n} and a {n}, a" for n in NOUNS),
        *(f"a {n} {p}" for n in NOUNS for p in places),
        *[*NOUNS, *GROUNDS, "sky", *phrases],
    ]


def concept_list(rng: np.random.Generator, scene: Scene, count: int) -> tuple[list[str], list[int]]:
    """``count`` concepts for a scene, and for each of its regions the index of its concept (or IGNORED).

    Half of the time every region is named; else a few are, and "background" is all the rest.
    """
    regions = scene.regions
    twins = len({r.noun for r in regions}) < len(regions)
    order = [int(i) for i in rng.permutation(len(regions))]
    everything = rng.random() < 0.5 and count > len(regions)
    if not everything:
        order = order[: int(rng.integers(1, max(2, min(count, len(regions)))))]
    names: dict[str, list[int]] = {}
    by_phrase = rng.random() < (0.8 if twins else 0.3)
    for i in order:
        region = regions[i]
        name = region.phrase if by_phrase else region.noun
        names.setdefault(name, []).append(i)
        if not by_phrase:  # the noun names its twin too
            names[name] += [j for j in range(len(regions)) if j != i and regions[j].noun == region.noun]
    target = [IGNORED] * len(regions)
    concepts = list(names)
    rest = BACKGROUND if not everything or rng.random() < 0.2 else None
    if rest:
        concepts.append(rest)
        target = [len(concepts) - 1] * len(regions)
    for index, name in enumerate(names):
        for i in names[name]:
            target[i] = index
    present = {r.noun for r in regions}
    absent = [str(n) for n in rng.permutation([n for n in (*NOUNS, *GROUNDS, "sky") if n not in present])]
    while len(concepts) < count:
        if rng.random() < 0.08:
            concepts.append("?" * int(rng.integers(1, 4)))
            continue
        noun = absent.pop()
        if noun in OBJECTS and rng.random() < 0.3:
            noun = f"{rng.choice(OBJECTS[noun][1])} {noun}"
        concepts.append(noun)
    if by_phrase and rng.random() < 0.3 and len(concepts) > len(names) + 1:  # same noun, wrong colour
        named = [regions[i] for i in order if regions[i].colour]
        if named:
            noun = named[0].noun
            shown = {r.colour for r in regions if r.noun == noun}
            others = [c for c in OBJECTS[noun][1] if c not in shown]
            if others and all(r.noun != noun or r.phrase in names for r in regions):
                concepts[-1] = f"{rng.choice(others)} {noun}"
    concepts = concepts[:count]
    shuffle = [int(i) for i in rng.permutation(count)]
    place = {old: new for new, old in enumerate(shuffle)}
    return [concepts[i] for i in shuffle], [place[t] if t != IGNORED else t for t in target]


class Data:
    """Scenes of seeds 0..count-1 with their latents, rendered and encoded once."""

    def __init__(self, vae_path: Path, count: int, cache: Path | None) -> None:
        self.scenes: list[Scene] = []
        if cache and cache.exists():
            self.latents = torch.load(cache)
        else:
            self.latents = self._encode(vae_path, count)
            if cache:
                torch.save(self.latents, cache)
        self.labels = torch.empty(len(self.latents), LABEL_SIZE, LABEL_SIZE, dtype=torch.uint8)
        step = 256 // LABEL_SIZE
        for seed in range(len(self.latents)):
            scene = self.scene(seed)
            self.labels[seed] = torch.from_numpy(scene.labels[step // 2 :: step, step // 2 :: step].copy())
            empty = np.empty((0,), np.uint8)
            self.scenes.append(Scene(empty, empty, scene.regions, scene.prompt))

    @staticmethod
    def scene(seed: int) -> Scene:
        if seed % 4:
            return make_scene(seed, look_alike=seed % 10 == 1, posed=True)
        return make_scene(seed, look_alike=seed % 5 == 0)

    def _encode(self, vae_path: Path, count: int) -> Tensor:
        from safetensors.torch import load_file

        from train_vae import build_encoder

        encoder = build_encoder()
        full = load_file(vae_path)
        encoder.load_state_dict(
            {
                k: full["taesd_encoder." + k][tuple(slice(0, n) for n in v.shape)].float()
                for k, v in encoder.state_dict().items()
            }
        )
        latents = torch.empty(count, 16, 32, 32, dtype=torch.float16)
        with torch.no_grad():
            for start in range(0, count, 16):
                seeds = range(start, min(count, start + 16))
                images = np.stack([self.scene(s).image for s in seeds])
                x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
                latents[start : start + len(x)] = encoder(x.contiguous(memory_format=torch.channels_last))
        return latents


def forward(model, text_stream, x, sigma, context, pooled, concepts):
    """The model's velocity, and the output-space scores (B, K, N) of the supervised layers."""
    from core.architectures import flux1
    from core.observing.readers.stream import ConceptStream

    rows, columns = flux1.grid(model, x)
    stream = ConceptStream(text_stream(model, sigma, None, x.dtype), concepts, SUPERVISED)

    def before(q, k, v, pe, attn_mask, extra_options):
        if extra_options["block_type"] == "double":
            start = extra_options["img_slice"][0]
            image = slice(start, start + rows * columns)
            stream.attend(
                extra_options["block_index"],
                *(t[:, :, image] for t in (q, k, v)),
                rotate=lambda t: flux1.rotate(t, pe[:, :, image]),
            )
        return {}

    def after(out, extra_options):
        if extra_options["block_type"] == "double":
            start = extra_options["img_slice"][0]
            stream.score(extra_options["block_index"], out[:, start : start + rows * columns])
        return out

    patches = {"attn1_patch": [before], "attn1_output_patch": [after]}
    velocity = model(x, sigma, context, y=pooled, transformer_options={"patches": patches})
    return velocity, stream.scores["output"]


def map_loss(scores: list[Tensor], target: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy (B,) of the maps, of their mean and of each layer's, and the argmax accuracy (B,).

    Pixels weigh by the inverse square root of their concept's area, or else grounds would be all that
    counts.
    """
    batch, count, patches = scores[0].shape
    side = int(patches**0.5)

    def upscaled(probability):
        grid = probability.view(batch, count, side, side)
        return F.interpolate(grid, size=(LABEL_SIZE, LABEL_SIZE), mode="bilinear").clamp_min(1e-5)

    layers = [upscaled(s.softmax(1)) for s in scores]
    mean = torch.stack(layers).mean(0)
    known = target != IGNORED
    areas = F.one_hot(torch.where(known, target, 0), count).float().mul(known[..., None]).sum((1, 2))
    weight = areas.clamp_min(1).rsqrt().gather(1, torch.where(known, target, 0).flatten(1)).view_as(known)
    weight = weight * known
    weight = weight / weight.sum((1, 2), keepdim=True).clamp_min(1e-6)

    def loss(p):
        return (F.nll_loss(p.log(), target, ignore_index=IGNORED, reduction="none") * weight).sum((1, 2))

    total = loss(mean) + 0.25 * sum(loss(p) for p in layers) / len(layers)
    hits = ((mean.argmax(1) == target) * weight).sum((1, 2))
    return total, hits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--scenes", type=int, default=16000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--map-weight", type=float, default=0.4)
    parser.add_argument("--resume", type=Path, help="a folder that this script has written to")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start_comfyui(args.comfyui)
    import comfy.ops
    from comfy.ldm.flux.model import Flux
    from safetensors.torch import load_file, save_file

    from core.architectures.flux1 import TextStream

    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)  # saturated softmaxes would slow the CPU down several times
    rng = np.random.default_rng(args.seed)
    data = Data(args.vae, args.scenes, args.cache)
    print(f"{len(data.latents)} scenes, latent std {data.latents[:500].float().std():.3f}", flush=True)
    model = Flux(**FLUX, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)
    initialise(model, zero=("_mod.lin", "modulation", "final_layer"))
    allow_gradients(model)
    text = TextEncoder()
    both = nn.ModuleDict({"model": model, "text": text})
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    if args.resume:
        text.load(load_file(args.resume / "text_encoder.safetensors"))
        state = load_file(args.resume / "flux.safetensors")
        model.load_state_dict({k.replace("_norm.scale", "_norm.weight"): v for k, v in state.items()})
    matrices = [
        p for p in [*model.double_blocks.parameters(), *model.single_blocks.parameters()] if p.ndim == 2
    ]
    theirs = {id(p) for p in matrices}
    rest = [p for p in both.parameters() if id(p) not in theirs]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.97), weight_decay=0.0),
    ]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    average = torch.optim.swa_utils.AveragedModel(
        both, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.996)
    )

    def save() -> None:
        ema = average.module
        state = {
            k.replace("_norm.weight", "_norm.scale"): v.half().contiguous()
            for k, v in ema["model"].state_dict().items()
        }
        save_file(state, args.out / "flux.safetensors")
        save_file(ema["text"].export(), args.out / "text_encoder.safetensors")

    start, step, log, saved = time.monotonic(), 0, [], 0.0
    while (done := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        for group in groups:
            group["lr"] = args.lr * min(1, (step + 1) / 100) * (1 - done)
        picked = rng.integers(0, len(data.latents), args.batch)
        scenes = [data.scenes[i] for i in picked]
        count = int(rng.integers(2, 9))
        named = [concept_list(rng, s, count) for s in scenes]
        regions = data.labels[torch.from_numpy(picked)].long()
        target = torch.stack([torch.tensor(t)[labels] for (_, t), labels in zip(named, regions, strict=True)])
        prompts = [s.prompt if rng.random() > 0.12 else "" for s in scenes]
        x0 = data.latents[torch.from_numpy(picked)].float()
        noise = torch.randn_like(x0)
        sigma = torch.sigmoid(torch.randn(args.batch) * 1.2 + 0.5)
        xt = torch.lerp(x0, noise, sigma[:, None, None, None])
        with torch.autocast("cpu", torch.bfloat16):
            context, pooled = text.prompts(prompts)
            concepts = text.concepts([c for c, _ in named], list(rng.random(args.batch) < 0.35))
            velocity, scores = forward(model, TextStream, xt, sigma, context, pooled, concepts)
        flow = F.mse_loss(velocity.float(), noise - x0)
        ce, hits = map_loss(scores, target)
        loss = flow + args.map_weight * (ce * (1.1 - sigma)).mean()
        both.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        average.update_parameters(both)
        step += 1
        middle = (sigma - 0.5).abs() < 0.15
        log.append([flow.item(), ce.mean().item(), hits[middle].mean().item() if middle.any() else np.nan])
        if step % 50 == 0:
            flow_mean, ce_mean, accuracy = np.nanmean(log, 0)
            print(
                f"{step:5d} {done:4.0%} flow {flow_mean:.4f} maps {ce_mean:.4f} "
                f"accuracy at mid noise {accuracy:.3f} {time.monotonic() - start:.0f} s",
                flush=True,
            )
            log = []
        if done > saved + 0.05:
            saved = done
            save()
    save()


if __name__ == "__main__":
    main()
