"""What Concept Attention costs: ``python benchmarks/overhead/run.py``.

On a CUDA device with the sizes of Flux.1-dev (24 GB of random weights in bfloat16), else on one thread of the
CPU with a model scaled to fit. Plain and observed evaluations take turns in one process; ratios are of
neighbours. ComfyUI is found as for the tests (``COMFYUI_PATH``).

    python benchmarks/overhead/run.py --sections accounts,reading
    python benchmarks/overhead/run.py --weights flux1-dev.safetensors
    python benchmarks/overhead/run.py --sections step --flags=--novram     weights moved for every use
    python benchmarks/overhead/run.py --tiny                               does the script itself work?
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import random
import statistics
import sys
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from setting import (
    FLUX_DEV,
    ROOT,
    SCALED,
    TINY,
    Scene,
    Size,
    clock,
    evaluate,
    load,
    observed,
    other_model,
    other_sizes,
    random_model,
)

if TYPE_CHECKING:
    from accounting import Account

CONCEPTS = (1, 5, 16, 64)
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", default=",".join(SECTIONS), help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="times that each is measured (%(default)s)")
    parser.add_argument("--weights", help="a Flux.1 checkpoint in place of random weights")
    parser.add_argument("--flags", default="", help="flags for ComfyUI, separated by spaces")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "overhead", help="folder (%(default)s)")
    args = parser.parse_args()
    load(args.flags.split())
    logging.getLogger().setLevel(logging.ERROR)  # the yardstick records nothing, which is a warning
    bench = Bench(args.tiny, args.rounds, args.weights, args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / "results.json"
    found = json.loads(results.read_text()) if results.exists() else {}
    for section in args.sections.split(","):
        found[section] = SECTIONS[section](bench)
        results.write_text(json.dumps(found, indent=1))
        print(f"\n## {section}\n\n{markdown(found[section])}", flush=True)


def markdown(rows: list[dict]) -> str:
    head = list(rows[0])
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    lines += [" | ".join(f"{r[h]:.4g}" if isinstance(r[h], float) else str(r[h]) for h in head) for r in rows]
    return "\n".join(f"| {line} |" for line in lines)


class Bench:
    def __init__(self, tiny: bool, rounds: int, weights: str | None, out: Path) -> None:
        self.rounds, self.out, self._weights = rounds, out, weights
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.cuda else "cpu")
        self.size: Size = TINY if tiny else FLUX_DEV if self.cuda else SCALED
        self.scenes = [Scene(self.size, 64, 96), Scene(self.size, 128, 64, batch=2)]
        if not tiny:
            sides = ((512, 512), (1024, 1024), (2048, 1024)) if self.cuda else ((256, 256), (512, 512))
            batches = (1, 4) if self.cuda else (1, 2)
            self.scenes = [Scene(self.size, *s, batch=b) for s in sides for b in batches]
        self.others = (
            other_sizes(12, 5, 64) if tiny else other_sizes() if self.cuda else other_sizes(4, 5, 512)
        )
        # 1024 x 1024 on a GPU
        self.scene = self.scenes[0 if tiny else 2]
        self._model = None

    @property
    def model(self):
        if self._model is None:
            import comfy.sd

            if self._weights:
                self._model = comfy.sd.load_diffusion_model(self._weights)
            else:
                dtype = torch.bfloat16 if self.cuda else torch.float32
                self._model = random_model(self.size, dtype, self.device)
        return self._model

    @property
    def last_layers(self) -> range:
        return range(max(0, self.size.depth - 4), self.size.depth)

    def compare(self, scene: Scene, models: dict, evaluations: int = 1) -> dict[str, dict]:
        """Times of an evaluation of each of ``models`` in turns, as ratios to that of "without"."""
        for model in models.values():
            evaluate(model, scene)
        times: dict[str, list[float]] = {name: [] for name in models}
        order = random.Random(0)
        for _ in range(self.rounds):
            for name in order.sample(list(models), len(models)):
                seconds, _ = evaluate(models[name], scene, evaluations)
                times[name].append(statistics.mean(seconds))
        peaks = {name: self._peak(model, scene) for name, model in models.items()}
        found = {}
        for name, seconds in times.items():
            ratios = [ours / plain for ours, plain in zip(seconds, times["without"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            found[name] = {"time, ratio": middle, "quartiles": f"{low:.3f} to {high:.3f}"}
            if self.cuda:
                found[name]["extra peak, MiB"] = (peaks[name] - peaks["without"]) / MIB
        return found

    def _peak(self, model, scene: Scene) -> int:
        if not self.cuda:
            return 0
        torch.cuda.reset_peak_memory_stats()
        evaluate(model, scene)
        return torch.cuda.max_memory_allocated()


def step(bench: Bench) -> list[dict]:
    """Time and peak memory of an evaluation, against one without the plugin and the reference's algorithm."""
    from second_attention import SecondAttention
    from side_stream import SideStream

    import concept_attention.core.observing.observe as observe_module
    from concept_attention.core.observing.latents import recording_of
    from concept_attention.core.observing.readers.patches import PatchReading

    def reading_with(stream: type) -> contextlib.AbstractContextManager:
        """For models that are observed meanwhile."""
        reading = type("Reading", (PatchReading,), {"STREAM": stream})
        return mock.patch.object(observe_module, "reading_of", return_value=reading)

    def scores(model, scene: Scene) -> torch.Tensor:
        _, samples = evaluate(model, scene)
        return torch.stack(recording_of({"samples": samples}).scores["output"])

    rows = []
    observe = partial(observed, bench.model, bench.size)
    for scene in bench.scenes:
        # The second "without" shows how far apart two measurements of the same thing are.
        models = {"without": bench.model, "without, again": bench.model.clone()}
        models |= {f"K = {k}": observe(k) for k in CONCEPTS}
        models["K = 5, last 4 layers"] = observe(5, layers=bench.last_layers)
        with reading_with(SecondAttention):
            models["reference's algorithm, K = 5"] = observe(5)
        if bench.cuda:
            with reading_with(SideStream):
                beside = models["K = 5, beside the model"] = observe(5)
            difference = scores(beside, scene) - scores(models["K = 5"], scene)
            print(f"{scene}: beside the model, scores differ by at most {difference.abs().max():.3g}")
        for name, found in bench.compare(scene, models).items():
            rows.append(
                {"pixels": f"{scene.height} x {scene.width}", "batch": scene.batch, "": name, **found}
            )
    return rows


def families(bench: Bench) -> list[dict]:
    """Models of other families, with five concepts, against without: runs of four evaluations, of which the
    first embeds the concepts for all."""
    rows = []
    for name, size in bench.others.items():
        scene = Scene(size, *size.pixels)
        model = other_model(size, torch.bfloat16 if bench.cuda else torch.float32, bench.device)
        models = {"without": model, "without, again": model.clone(), "K = 5": observed(model, size, 5)}
        for variant, found in bench.compare(scene, models, 4).items():
            if variant != "without":
                rows.append({"": name, "picture or video": scene.described, " ": variant, **found})
    return rows


def family_accounts(_: Bench) -> list[dict]:
    """What an evaluation of these models in full size, in bfloat16, asks of a GPU more than one without:
    those after a run's first, and the first."""
    from accounting import other_account

    rows = []
    for name, size in other_sizes().items():
        scene = Scene(size, *size.pixels)
        plain = other_account(size, scene)
        for concepts, first in ((5, True), *((k, False) for k in CONCEPTS)):
            extra = other_account(size, scene, concepts, first) - plain
            variant = f"K = {concepts}{', first of a run' * first}"
            rows.append({"": name, " ": variant, **_compared(extra, plain)})
    return rows


def _compared(extra: Account, plain: Account) -> dict:
    return {
        "operations": extra.operations,
        "waits": extra.waits,
        "traffic, MB": round(extra.traffic / 1e6),
        "traffic, %": 100 * extra.traffic / plain.traffic,
        "FLOPs, %": 100 * extra.flops / plain.flops,
        "extra peak, MiB": extra.peak / MIB,
    }


def accounts(_: Bench) -> list[dict]:
    """What an evaluation of Flux.1-dev in bfloat16 asks of a GPU more than one without, on any machine."""
    rows = []
    for height, width, batch in ((512, 512, 1), (1024, 1024, 1), (2048, 1024, 1), (1024, 1024, 4)):
        scene = Scene(FLUX_DEV, height, width, batch)
        plain = added(scene)
        streams = {f"K = {k}": {"concepts": k} for k in CONCEPTS}
        streams["K = 5, last 4 layers"] = {"concepts": 5, "layers": range(15, 19)}
        streams["reference's algorithm, K = 5"] = {"concepts": 5, "reference": True}
        for name, stream in streams.items():
            extra = added(scene, **stream) - plain
            rows.append(
                {"pixels": f"{height} x {width}", "batch": batch, "": name, **_compared(extra, plain)}
            )
    return rows


@cache
def added(scene: Scene, concepts: int = 0, layers: range = range(19), reference: bool = False):
    """The account of an evaluation of Flux.1-dev with so many concepts."""
    from accounting import account
    from second_attention import SecondAttention

    from concept_attention.core.observing.readers.stream import ConceptStream

    def stream(text):
        tokens = torch.empty(concepts, FLUX_DEV.context, device="cuda")
        return (SecondAttention if reference else ConceptStream)(text, tokens, tuple(layers))

    return account(FLUX_DEV, scene, stream if concepts else None)


def growth(_: Bench) -> list[dict]:
    """The same, from 5 concepts in all layers at 1024 x 1024 on, one thing changed at a time."""
    rows = []

    def row(changed: str, value: int, scene: Scene, **stream) -> None:
        plain, with_concepts = added(scene), added(scene, **stream)
        second = added(scene, **{**stream, "reference": True})
        rows.append({"changed": changed, "to": value})
        for name, found in (("ours", with_concepts - plain), ("reference's", second - plain)):
            rows[-1][f"{name}, traffic, %"] = 100 * found.traffic / plain.traffic
            rows[-1][f"{name}, FLOPs, %"] = 100 * found.flops / plain.flops
            rows[-1][f"{name}, extra peak, MiB"] = found.peak / MIB

    square = Scene(FLUX_DEV, 1024, 1024)
    for k in (1, 5, 32, 128):
        row("concepts", k, square, concepts=k)
    for side in (512, 1024, 2048):
        row("patches", (side // 16) ** 2, Scene(FLUX_DEV, side, side), concepts=5)
    for last in (1, 10, 19):
        row("last layer", last, square, concepts=5, layers=range(last))
    for batch in (1, 4):
        row("batch", batch, Scene(FLUX_DEV, 1024, 1024, batch), concepts=5)
    return rows


def trace(bench: Bench) -> list[dict]:
    """Operators, kernels and waits of an evaluation by PyTorch's profiler; the traces are kept."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if bench.cuda else []
    rows = []
    for name, model in {"without": bench.model, "K = 5": observed(bench.model, bench.size, 5)}.items():
        evaluate(model, bench.scene)
        with torch.profiler.profile(activities=activities) as profile:
            evaluate(model, bench.scene)
        profile.export_chrome_trace(str(bench.out / f"trace, {name}.json.gz"))
        counts = {e.key: e.count for e in profile.key_averages()}
        waits = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::item")
        rows.append(
            {
                "": name,
                "operators": sum(n for key, n in counts.items() if key.startswith("aten::")),
                "kernels": counts.get("cudaLaunchKernel", 0) + counts.get("cuLaunchKernelEx", 0),
                **{wait: counts.get(wait, 0) for wait in waits},
            }
        )
    return rows


def recording(bench: Bench) -> list[dict]:
    """What a recording takes on the CPU: measured of a sampled one, and in proportion."""
    from concept_attention.core.observing.latents import recording_of

    rows = []
    for scene in bench.scenes:
        for k in CONCEPTS:
            for steps in (1, 2):
                _, samples = evaluate(observed(bench.model, bench.size, k), scene, steps)
                scores = recording_of({"samples": samples}).scores["output"]
                size = sum(s.nbytes for s in scores)
                rows.append(
                    {
                        "patches": scene.patches,
                        "batch": scene.batch,
                        "K": k,
                        "steps": steps,
                        "layers": bench.size.depth,
                        "bytes": size,
                        "bytes per score": size
                        / (scene.patches * scene.batch * k * steps * bench.size.depth),
                    }
                )
    return rows


def videos(_: Bench) -> list[dict]:
    """What the recorder makes of 20 steps of long videos with six concepts in all 40 layers of Wan 2.1."""
    from concept_attention.core.concepts import Concepts
    from concept_attention.core.geometry import Grid
    from concept_attention.core.observing.recorder import Pass, Recorder
    from concept_attention.core.observing.recording import BUDGET

    layers, steps, concepts = range(40), 20, Concepts(tuple("abcdef"))
    rows = []
    for frames, height, width in ((81, 480, 832), (121, 720, 1280)):
        grid = Grid(frames // 4 + 1, height // 16, width // 16)
        sigmas = torch.linspace(1, 0, steps + 1)
        recorder = Recorder(
            concepts, tuple(layers), tuple(layers[26:]), sigmas, 1, grid, (height, width), (1.0, 1.0)
        )
        for sigma in sigmas[:-1]:
            evaluation = recorder.evaluation(sigma[None])
            scores = {"probability": torch.zeros(len(recorder.layers), 1, len(concepts.all), *grid)}
            recorder.add(evaluation, Pass(slice(None), Grid(0, 0, 0), recorder.layers, scores))
        kept = recorder.finish()
        found = sum(s.nbytes for s in kept.scores["probability"])
        rows.append(
            {
                "video": f"{frames} frames, {width} x {height}",
                "patches": grid.size,
                "all of it, MB": 4 * len(concepts.all) * grid.size * len(layers) * steps / 1e6,
                "MB": found / 1e6,
                "of the limit": found / BUDGET,
                "layers": len(kept.layers),
                "evaluations kept": len(kept.scores["probability"]),
            }
        )
    return rows


def reading(bench: Bench) -> list[dict]:
    """Maps and masks from a recording of 28 steps, 19 layers and 5 concepts at 1024 x 1024, in milliseconds
    of one CPU thread."""
    from concept_attention.core.concepts import Concepts
    from concept_attention.core.observing.latents import remember
    from concept_attention.core.observing.recording import Recording
    from concept_attention.core.reading.maps import concept_maps
    from concept_attention.core.reading.masks import concept_masks
    from concept_attention.nodes.concept_saliency import ConceptSaliency

    torch.manual_seed(0)
    blobs = torch.nn.functional.interpolate(20 * torch.randn(19, 5, 5, 5), (64, 64), mode="bicubic")
    scores = tuple((blobs + torch.randn_like(blobs))[:, None] for _ in range(28))
    made_up = Recording(
        concepts=Concepts(tuple("abcd"), ("background",)),
        layers=tuple(range(19)),
        default_layers=tuple(range(15, 19)),
        sigmas=tuple(1 - i / 28 for i in range(28)),
        steps=tuple(range(28)),
        scores={"output": scores},
        image_size=(1024, 1024),
        coverage=(1.0, 1.0),
    )
    maps = concept_maps(made_up)
    samples = torch.zeros(1, 16, 128, 128)
    remember(samples, made_up)
    widgets = {"space": "output", "start_step": 0, "end_step": 10000, "softmax": True, "temperature": 1.0}

    def saliency(layers: str) -> None:
        ConceptSaliency.execute({"samples": samples}, layers=layers, **widgets)

    tasks = {
        "maps of the default layers": lambda: concept_maps(made_up),
        "maps of all layers": lambda: concept_maps(made_up, layers=range(19)),
        "Concept Saliency, default layers": lambda: saliency("default"),
        "Concept Saliency, all layers": lambda: saliency("all"),
        "Concept Mask, argmax": lambda: concept_masks(maps, ("a",), method="argmax"),
        "Concept Mask, mean": lambda: concept_masks(maps, ("a",), method="mean"),
        "Concept Mask, argmax, holes filled": lambda: concept_masks(maps, ("a",), fill_holes=True),
        "Concept Mask, soft": lambda: concept_masks(maps, ("a",), soft=True),
    }
    now = clock(torch.device("cpu"))
    rows = []
    for name, task in tasks.items():
        task()
        milliseconds = []
        for _ in range(bench.rounds):
            start = now()
            task()
            milliseconds.append(1000 * (now() - start))
        low, middle, high = statistics.quantiles(milliseconds, n=4)
        rows.append({"": name, "ms": middle, "quartiles": f"{low:.0f} to {high:.0f}"})
    return rows


def rows(bench: Bench) -> list[dict]:
    """In how many of 10 random cases a text layer gives the same bits for its rows when concepts' rows go
    with them."""
    dtype = torch.bfloat16 if bench.cuda else torch.float32
    hidden, text = bench.size.hidden, bench.size.text_tokens
    shapes = {"qkv": (1, 3), "proj": (1, 1), "mlp.0": (1, 4), "mlp.2": (4, 1)}
    found = []
    for (name, (fan_in, fan_out)), tokens in itertools.product(shapes.items(), (text, 2 * text)):
        found.append({"layer": name, "text tokens": tokens})
        for k in CONCEPTS:
            same = 0
            for seed in range(10):
                g = torch.Generator(bench.device).manual_seed(seed)
                draw = partial(torch.randn, generator=g, device=bench.device, dtype=dtype)
                weight = draw(fan_out * hidden, fan_in * hidden)
                bias = draw(fan_out * hidden)
                x = draw(1, tokens + k, fan_in * hidden)
                layer = partial(torch.nn.functional.linear, weight=weight, bias=bias)
                same += torch.equal(layer(x)[:, :tokens], layer(x[:, :tokens].contiguous()))
            found[-1][f"K = {k}"] = same
    return found


def compiled(bench: Bench) -> list[dict]:
    """Four evaluations with ComfyUI's node for torch.compile, against four without."""
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    def compile_model(model):
        return TorchCompileModel.execute(model, "inductor").result[0]

    models = {
        "without": bench.model,
        "compiled": compile_model(bench.model),
        "compiled, K = 5": compile_model(observed(bench.model, bench.size, 5)),
        "compiled, K = 5, every 4th": compile_model(observed(bench.model, bench.size, 5, every=4)),
    }
    for model in models.values():
        evaluate(model, bench.scene, 4)
    return [{"": name, **found} for name, found in bench.compare(bench.scene, models, 4).items()]


def image(bench: Bench) -> list[dict]:
    """Maps of an existing latent, from the call to the recording, against a whole evaluation."""
    from concept_attention.core.concepts import Concepts, ConceptTokens
    from concept_attention.core.observing.image import observe_image
    from concept_attention.core.observing.observe import WhatToRecord

    scene, now = bench.scene, clock(bench.device)
    tokens = torch.randn(5, bench.size.context, generator=torch.Generator().manual_seed(2))
    names = Concepts(tuple("abcde"))

    def look() -> None:
        with torch.inference_mode():
            observe_image(
                bench.model,
                WhatToRecord(names, ConceptTokens.single(tokens)),
                scene.latent,
                scene.conditioning,
                image_size=(scene.height, scene.width),
            )

    ratios = []
    for i in range(bench.rounds + 1):
        seconds = {}
        for task in (look, partial(evaluate, bench.model, scene)):
            start = now()
            task()
            seconds[task is look] = now() - start
        if i:
            ratios.append(seconds[True] / seconds[False])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return [{"": "existing image", "time, ratio": middle, "quartiles": f"{low:.3f} to {high:.3f}"}]


SECTIONS = {
    "accounts": accounts,
    "growth": growth,
    "step": step,
    "families": families,
    "family_accounts": family_accounts,
    "trace": trace,
    "recording": recording,
    "videos": videos,
    "reading": reading,
    "rows": rows,
    "compiled": compiled,
    "image": image,
}

if __name__ == "__main__":
    main()
