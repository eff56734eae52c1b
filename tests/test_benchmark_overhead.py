"""benchmarks/overhead: its yardstick is the reference's algorithm, and what it counts stays within bounds."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from test_golden import TOLERANCE

import comfyui
import concept_attention.core.observing.readers.stream
from concept_attention.core.architectures import flux1
from concept_attention.core.concepts import ConceptTokens, Prompt
from concept_attention.core.observing.readers.stream import ConceptStream
from golden_files import golden_files, relative
from tiny_flux import FluxGolden

FOLDER = comfyui.ROOT / "benchmarks" / "overhead"
sys.path.insert(0, str(FOLDER))

from accounting import Account, account, other_account  # noqa: E402
from second_attention import SecondAttention, follow  # noqa: E402
from setting import FLUX_DEV, TINY, OtherSize, Scene, other_sizes  # noqa: E402
from side_stream import SideStream  # noqa: E402

AT_1024 = Scene(FLUX_DEV, 1024, 1024)


@pytest.fixture(params=golden_files(), ids=lambda p: p.stem, scope="module")
def golden(request) -> FluxGolden:
    return FluxGolden.load(request.param)


def test_the_yardstick_computes_what_the_reference_does(golden):
    model = golden.model().model.diffusion_model
    for step in range(golden.number("num_steps")):
        t, guidance = golden["inputs.timesteps"][step], golden.tensors.get("inputs.guidance")
        text = flux1.TextStream(model, t, guidance, torch.float32)
        stream = SecondAttention(text, golden["inputs.concepts"][0], range(len(model.double_blocks)))
        model(
            golden["inputs.latents"][step],
            t,
            golden["inputs.context"],
            y=golden["inputs.y"],
            guidance=guidance,
            transformer_options={"patches": follow(stream, flux1.rotate)},
        )
        assert len(stream.vectors) == len(model.double_blocks)
        for layer, scores in enumerate(stream.output_scores()):
            expected = golden[f"expected.step{step}.layer{layer}.concept_scores"]
            assert relative(scores, expected) <= TOLERANCE


class Streams:
    """CUDA's streams, as far as their order goes: what is done on which, and what waits for what."""

    def __init__(self, monkeypatch) -> None:
        self.log: list[str] = []
        self.current = "model's"
        streams = self

        class Stream:
            def __init__(self, name: str = "side") -> None:
                self.name = name

            def wait_stream(self, other: Stream) -> None:
                streams.log.append(f"{self.name} waits for {other.name}")

        @contextlib.contextmanager
        def on(stream: Stream):
            before, self.current = self.current, stream.name
            yield
            self.current = before

        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream(self.current))
        monkeypatch.setattr(torch.cuda, "stream", on)

    def watch(self, monkeypatch, owner: object, name: str) -> None:
        original = getattr(owner, name)

        def logged(*args, **kwargs):
            self.log.append(f"{name} on {self.current}")
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, logged)


def test_the_stream_beside_the_model_computes_the_same_in_an_order_that_is_safe(golden, monkeypatch):
    streams = Streams(monkeypatch)
    for owner, name in (
        (flux1._TextBlock, "qkv"),
        (flux1._TextBlock, "update"),
        (concept_attention.core.observing.readers.stream, "dot_products"),
    ):
        streams.watch(monkeypatch, owner, name)
    model = golden.model().model.diffusion_model
    depth = len(model.double_blocks)
    t, guidance = golden["inputs.timesteps"][0], golden.tensors.get("inputs.guidance")
    text = flux1.TextStream(model, t, guidance, torch.float32)
    stream = SideStream(text, golden["inputs.concepts"][0], range(depth))
    model(
        golden["inputs.latents"][0],
        t,
        golden["inputs.context"],
        y=golden["inputs.y"],
        guidance=guidance,
        transformer_options={"patches": follow(stream, flux1.rotate)},
    )
    for layer, scores in enumerate(stream.scores["output"]):
        assert relative(scores, golden[f"expected.step0.layer{layer}.concept_scores"]) <= TOLERANCE
    block = [
        "side waits for model's",
        "qkv on side",
        "model's waits for side",
        "dot_products on model's",
        "update on side",
    ]
    assert streams.log == (block * depth)[:-1]  # the last block has no update


def extra(concepts: int, scene: Scene = AT_1024, kind=ConceptStream, layers=range(19)) -> Account:
    """What the stream of ``concepts`` adds to an evaluation of Flux.1-dev on a GPU."""

    def stream(text):
        return kind(text, torch.empty(concepts, FLUX_DEV.context, device="cuda"), layers)

    return account(FLUX_DEV, scene, stream) - account(FLUX_DEV, scene)


@pytest.fixture(scope="module")
def five_concepts() -> Account:
    return extra(5)


def test_the_host_never_waits_for_the_device_within_an_evaluation(five_concepts):
    assert five_concepts.waits == 0
    assert extra(5, kind=SecondAttention).waits == 4 * 19  # what is counted can be seen


@pytest.mark.parametrize("concepts, mebibytes", [(5, 2), (64, 32)])
def test_the_extra_peak_of_device_memory_at_1024_is_the_scores(concepts, mebibytes):
    assert extra(concepts).peak <= mebibytes * 2**20


def test_a_block_costs_few_operations(five_concepts):
    assert five_concepts.operations <= 23 * 19


def test_hardly_any_arithmetic_is_added(five_concepts):
    plain = account(FLUX_DEV, AT_1024)
    assert five_concepts.flops < 0.001 * plain.flops
    # Text weights, read once more, and the image's keys, values and outputs.
    assert five_concepts.traffic < 0.1 * plain.traffic


OTHERS = other_sizes()


@pytest.mark.parametrize("name", OTHERS)
def test_models_of_other_families_wait_no_more_either_and_add_hardly_any_arithmetic(name):
    plain, extra = others_with_five_concepts(name)
    assert extra.waits == 0
    assert 0 < extra.flops < 0.009 * plain.flops
    # 40 layers of 32760 patches for Wan 2.1
    assert extra.peak <= (26 if name == "Wan 2.1" else 8) * 2**20


def others_with_five_concepts(name: str) -> tuple[Account, Account]:
    scene = Scene(OTHERS[name], *OTHERS[name].pixels)
    plain = other_account(OTHERS[name], scene)
    return plain, other_account(OTHERS[name], scene, 5) - plain


def test_nor_do_they_where_concepts_are_words_of_a_prompt(monkeypatch):
    concepts = OtherSize.concepts

    def of_a_prompt(size: OtherSize, count: int, g: torch.Generator) -> ConceptTokens:
        words = (*((i, i + 1) for i in range(1, count)), ())
        prompt = Prompt(torch.randn(size.text_tokens, size.context, generator=g), words)
        return replace(concepts(size, count, g), prompt=prompt)

    monkeypatch.setattr(OtherSize, "concepts", of_a_prompt)
    _, extra = others_with_five_concepts("Stable Diffusion XL")
    assert extra.waits == 0


def test_names_of_512_tokens_are_not_all_embedded_at_once():
    size = OTHERS["Flux.2 Klein"]
    scene = Scene(size, 1024, 1024)
    assert (other_account(size, scene, 64, first=True) - other_account(size, scene)).peak <= 256 * 2**20


def test_the_script_runs_from_the_first_section_to_the_last(tmp_path):
    command = [sys.executable, FOLDER / "run.py", "--tiny", "--rounds", "2", "--out", tmp_path]
    command += ["--sections", "step,families,trace,recording,videos,reading,rows"]
    environment = {**os.environ, "COMFYUI_PATH": str(comfyui.find()), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    rows = {row[""]: row for row in found["step"]}
    assert {"without", "K = 5", "K = 64", "reference's algorithm, K = 5"} <= rows.keys()
    assert rows["without"]["time, ratio"] == 1
    assert {row[""] for row in found["families"]} == OTHERS.keys()
    assert {row["bytes per score"] for row in found["recording"]} == {4}
    assert all(0.5 < row["of the limit"] <= 1 for row in found["videos"])
    assert TINY.depth == found["recording"][0]["layers"]
    assert {row["layer"] for row in found["rows"]} == {"qkv", "proj", "mlp.0", "mlp.2"}
