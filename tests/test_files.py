from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import execution
import folder_paths
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import ROWS, concepts_of, sample, tiny

import nodes
from concept_attention.core.architectures import family_of
from concept_attention.core.concepts import Concepts
from concept_attention.core.observing.latents import recording_of
from concept_attention.core.observing.observe import WhatToRecord, observe
from concept_attention.core.observing.readers import reading_of
from concept_attention.core.reading.files import SUFFIX, load_maps, save_maps
from concept_attention.core.reading.maps import ConceptMaps, concept_maps
from concept_attention.nodes.concept_files import ConceptMapsLoad, ConceptMapsSave
from concept_attention.nodes.concept_saliency import ConceptSaliency
from recordings import recording

ODD = Concepts(('$x_1$ "q"', "<b>&", "고양이 🐱"), ("sky",))


def made(**choice) -> ConceptMaps:
    made_of = recording(batch=2, concepts=ODD)
    made_of.scores["value"] = tuple(-s for s in made_of.scores["output"])
    return concept_maps(made_of, **choice)


def test_maps_come_back_equal_to_the_last_bit(tmp_path):
    choice = {"layers": [1, 4], "steps": [0, 2], "temperature": 0.3, "average": "before softmax"}
    maps = made(space="value", grounding="anchor propagation", **choice)
    save_maps(maps, tmp_path / "maps")
    loaded = load_maps(tmp_path / "maps")
    assert torch.equal(loaded.values, maps.values)
    for field in fields(maps):
        if field.name not in ("values", "recording"):
            assert getattr(loaded, field.name) == getattr(maps, field.name), field.name


def version_of(path: Path) -> int:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["concept_maps"])["version"]


def test_frames_of_a_video_stay_together_and_pictures_keep_their_format(tmp_path):
    video = concept_maps(replace(recording(batch=6), durations=(1, 4, 4)))
    save_maps(video, tmp_path / "video")
    save_maps(made(), tmp_path / "pictures")
    loaded = load_maps(tmp_path / "video")
    assert loaded.recording.durations == (1, 4, 4)
    assert loaded.recording.batch == 2
    assert torch.equal(loaded.values, video.values)
    assert (version_of(tmp_path / "video"), version_of(tmp_path / "pictures")) == (2, 1)


@pytest.mark.parametrize(
    "durations", [[], [0, 1, 1], [1] * 4, [1, -1, 1], [1, 1.5, 1], ["1", 1, 1], 3, None, [1, 10**5, 1]]
)
def test_durations_that_are_not_of_the_maps_are_refused(tmp_path, durations):
    path = tmp_path / "maps"
    save_maps(concept_maps(replace(recording(batch=6), durations=(1, 4, 4))), path)
    with pytest.raises(ValueError, match="durations"):
        load_maps(rewritten(path, lambda tensors, d: d["recorded"].update(durations=durations)))


def with_a_broken_image() -> ConceptMaps:
    """The second of three, from layer 4 of step 1 on."""
    whole = recording(batch=3)
    scores = tuple(s.index_fill(1, torch.tensor([1]), torch.nan) for s in whole.scores["output"])
    return concept_maps(replace(whole, scores={"output": scores}, broken={1: (1, 4)}))


def test_a_file_says_which_images_are_broken_and_why(tmp_path, caplog, monkeypatch):
    maps = with_a_broken_image()
    path = tmp_path / f"maps{SUFFIX}"
    save_maps(maps, path)
    assert load_maps(path).recording.broken == {1: (1, 4)}
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    loaded = ConceptMapsLoad.execute(path.name).result[0]
    assert "in step 1, from layer 4 on (image 2 of 3)" in caplog.text
    assert torch.equal(loaded.values, maps.values)


def test_files_from_before_images_could_be_broken_have_none(tmp_path):
    save_maps(made(), tmp_path / "maps")
    old = rewritten(tmp_path / "maps", lambda tensors, d: d["recorded"].pop("broken"))
    assert load_maps(old).recording.broken == {}


@pytest.mark.parametrize("broken", [3, None, {}, [1], [[1, 0]], [[3, 1, 4]], [[1, 1, 4]] * 2, [[1, 1, -4]]])
def test_broken_images_that_the_file_does_not_have_are_refused(tmp_path, broken):
    save_maps(with_a_broken_image(), tmp_path / "maps")
    with pytest.raises(ValueError, match="broken"):
        load_maps(rewritten(tmp_path / "maps", lambda tensors, d: d["recorded"].update(broken=broken)))


def test_the_whole_recording_comes_back(tmp_path):
    maps = made()
    save_maps(maps, tmp_path / "maps")
    loaded = load_maps(tmp_path / "maps").recording
    for field in fields(loaded):
        if field.name != "scores":
            assert getattr(loaded, field.name) == getattr(maps.recording, field.name), field.name
    assert list(loaded.scores) == list(maps.recording.scores)
    for space, scores in maps.recording.scores.items():
        assert all(torch.equal(a, b) for a, b in zip(loaded.scores[space], scores, strict=True))


def test_other_maps_can_be_made_from_a_file(tmp_path):
    maps = made()
    save_maps(maps, tmp_path / "maps")
    choice = {"layers": [0], "steps": [1], "softmax": False}
    again = concept_maps(load_maps(tmp_path / "maps").recording, **choice)
    assert torch.equal(again.values, concept_maps(maps.recording, **choice).values)


def test_a_file_from_before_there_were_groundings_and_averages_has_the_papers(tmp_path):
    path = tmp_path / "mine.safetensors"
    save_maps(made(), path)

    def older(tensors, described):
        del described["maps"]["grounding"], described["maps"]["average"]

    loaded = load_maps(rewritten(path, older))
    assert (loaded.grounding, loaded.average) == ("paper", "after softmax")
    assert torch.equal(loaded.values, made().values)


def test_anyone_can_read_the_file(tmp_path):
    save_maps(made(), tmp_path / "maps", {"workflow": "{}"})
    with safe_open(tmp_path / "maps", "pt") as file:
        assert file.get_slice("maps").get_shape() == [2, 4, 4, 6]
        assert file.get_slice("scores.output").get_shape() == [3, 6, 2, 4, 4, 6]
        described = json.loads(file.metadata()["concept_maps"])
        assert file.metadata()["workflow"] == "{}"
    assert tuple(described["concepts"]) == ODD.names
    assert described["recorded"]["layers"] == [0, 1, 2, 3, 4, 5]
    assert described["recorded"]["sigmas"] == pytest.approx([1, 2 / 3, 1 / 3])


def rewritten(path: Path, change) -> Path:
    """The file with its description or tensors changed."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        described = json.loads(file.metadata()["concept_maps"])
    change(tensors, described)
    save_file(tensors, path, metadata={"concept_maps": json.dumps(described)})
    return path


BROKEN = {
    "a layer is missing": lambda tensors, d: d["recorded"]["layers"].pop(),
    "a sigma is missing": lambda tensors, d: d["recorded"]["sigmas"].pop(),
    "a step is missing": lambda tensors, d: d["recorded"]["steps"].pop(),
    "a concept is missing": lambda tensors, d: d["concepts"].pop(),
    "the scores are missing": lambda tensors, d: tensors.pop("scores.value"),
    "the maps are missing": lambda tensors, d: tensors.pop("maps"),
    "the maps are of other images": lambda tensors, d: tensors.update(maps=tensors["maps"][:1].clone()),
    "the maps are no batch": lambda tensors, d: tensors.update(maps=tensors["maps"][0].clone()),
    "the layers are missing": lambda tensors, d: d["recorded"].pop("layers"),
    "the size is no size": lambda tensors, d: d.update(image_size=None),
    "there are no evaluations": lambda tensors, d: [
        tensors.update({s: tensors[s][:0].clone()}) for s in ("scores.output", "scores.value")
    ],
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_a_file_that_does_not_fit_together_is_an_error_that_names_it(tmp_path, change):
    path = tmp_path / "mine.safetensors"
    save_maps(made(), path)
    with pytest.raises(ValueError, match=r'"mine\.safetensors"'):
        load_maps(rewritten(path, change))


def put(*path: str, value) -> Callable:
    """Another value in the description."""

    def change(tensors: dict, described: dict) -> None:
        for key in path[:-1]:
            described = described[key]
        described[path[-1]] = value

    return change


def fill(name: str, value: float) -> Callable:
    """A single value of a tensor."""
    return lambda tensors, described: tensors[name].view(-1)[0].fill_(value)


# What a stranger's file may say, of a picture of 64 x 96, and a part of the answer.
HOSTILE = [
    (put("image_size", value=[16000, 16000]), "16000 x 16000 pixels is larger than .* 8192 x 8192"),
    (put("image_size", value=[4096, 6144]), "image_size: .*4096, 6144.* 4 x 6"),
    (put("image_size", value=[64, 64]), "image_size: .*64, 64.* 4 x 6"),
    (put("image_size", value=[0, 0]), "image_size"),
    (put("image_size", value=[-64, -96]), "image_size: .*-64"),
    (put("image_size", value=["64", "96"]), "image_size: .*'64'"),
    (put("image_size", value=[64.0, 96.0]), "image_size: .*64.0"),
    (put("image_size", value=[64, 96, 1]), "image_size: .*a height and a width"),
    (put("image_size", value={"height": 64}), "image_size"),
    (put("coverage", value=[1e-9, 1]), "coverage: .*1e-09"),
    (put("coverage", value=[0.7, 1]), "coverage: .*0.7"),
    (put("coverage", value=[1, 2]), "coverage: .*2"),
    (put("coverage", value=[1, math.nan]), "coverage: .*nan"),
    (put("concepts", value="cat"), "concepts: 'cat'"),
    (put("concepts", value=["cat", 1, "dog"]), "concepts: .*1"),
    (put("concepts", value=["cat", "Cat", "dog"]), "concepts: .*differ"),
    (put("concepts", value=["cat", "", "dog"]), "concepts: .*''"),
    (put("concepts", value=["cat", "dog, fox", "owl"]), "concepts: .*commas"),
    (put("concepts", value=[f"{i}" for i in range(128)]), "number of concepts: 129, not 128"),
    (put("background", value=None), "background: None"),
    (put("recorded", value=[]), r"recorded: \[\]"),
    (put("maps", value=7), "maps: 7"),
    (put("recorded", "spaces", value=["output", "dreams"]), "spaces: .*dreams"),
    (put("recorded", "spaces", value=[]), "spaces"),
    (put("recorded", "layers", value=[0, 1, 2, 3, 4, 4]), "layers: .*each once"),
    (put("recorded", "layers", value=[0, 1, 2, 3, 4, -5]), "layers: .*-5"),
    (put("recorded", "default_layers", value=[7]), "default_layers: .*7"),
    (put("recorded", "default_layers", value=[]), "default_layers"),
    (put("recorded", "left_out", value="all"), "left_out: 'all'"),
    (put("recorded", "counts", value=[2, 2]), r"counts: \(2, 2\), not one for each sigma"),
    (put("recorded", "counts", value=[1, 0, 1]), "counts"),
    (put("recorded", "steps", value=[0, 1, 10**30]), "steps: .*10{5}"),
    (put("recorded", "steps", value=[0, True, 2]), "steps: .*True"),
    (put("recorded", "sigmas", value=[1, 0.5, math.inf]), "sigmas: .*inf"),
    (put("recorded", "sigmas", value=[1, 0.5, None]), "sigmas: .*None"),
    (put("maps", "space", value="cross-attention"), "space: 'cross-attention'"),
    (put("maps", "layers", value=[6]), "layers of maps: .*6"),
    (put("maps", "steps", value=[]), "steps of maps"),
    (put("maps", "softmax", value="no"), "softmax: 'no'"),
    (put("maps", "temperature", value=0), "temperature: 0"),
    (put("maps", "temperature", value=math.nan), "temperature: .*nan"),
    (put("maps", "grounding", value="guessed"), "grounding: 'guessed'"),
    (put("maps", "grounding", value=["paper"]), "grounding: .*paper"),
    (put("maps", "average", value="guessed"), "average: 'guessed'"),
    (fill("maps", math.nan), "range of maps: .*nan"),
    (fill("maps", 7), "range of maps: .*7"),
    (fill("scores.value", math.inf), "scores.value has infinite values"),
    (lambda tensors, d: tensors.update(maps=tensors["maps"].double()), "type of maps: 'F64', not F32"),
    (
        lambda tensors, d: tensors.update({k: v[..., :0].clone() for k, v in tensors.items()}),
        r"shape of maps: \[2, 4, 4, 0\]",
    ),
]


@pytest.mark.parametrize("change, said", HOSTILE, ids=[said for _, said in HOSTILE])
def test_a_file_that_claims_what_cannot_be_is_an_error_that_says_what(tmp_path, change, said):
    path = tmp_path / "mine.safetensors"
    save_maps(made(), path)
    with pytest.raises(ValueError, match=rf'"mine\.safetensors" holds no concept maps .*: .*{said}'):
        load_maps(rewritten(path, change))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"version": ' + "9" * 10_000 + "}", "\0", "7"])
def test_a_description_that_is_no_description_is_an_error(tmp_path, text):
    save_file({"maps": torch.zeros(1)}, tmp_path / "mine", metadata={"concept_maps": text})
    with pytest.raises(ValueError, match='"mine" holds no concept maps that can be read') as raised:
        load_maps(tmp_path / "mine")
    assert len(str(raised.value)) < 500


def test_scores_without_a_prompt_at_work_and_a_padded_edge_come_back(tmp_path):
    made_of = recording(concepts=ODD)
    for scores in made_of.scores["output"]:
        scores[..., 0, 0] = torch.nan
    made_of = replace(made_of, image_size=(56, 88), coverage=(56 / 64, 88 / 96))
    save_maps(concept_maps(made_of), tmp_path / "maps")
    loaded = load_maps(tmp_path / "maps")
    assert loaded.image_size == (56, 88)
    for ours, theirs in zip(loaded.recording.scores["output"], made_of.scores["output"], strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())


@pytest.mark.parametrize("name", ROWS)
def test_what_any_model_can_record_comes_back(tmp_path, name):
    model, tokens = tiny(name), ROWS[name].concept_tokens()
    spaces = reading_of(family_of(model.get_model_object("diffusion_model"))).SPACES
    observed = observe(model, WhatToRecord(concepts_of(len(tokens.sequences)), tokens, spaces=spaces))
    made_of = recording_of({"samples": sample(observed, ROWS[name])})
    for space in spaces:
        maps = concept_maps(made_of, space=space)
        save_maps(maps, tmp_path / "maps")
        assert torch.equal(load_maps(tmp_path / "maps").values, maps.values)


def test_a_file_of_a_later_format_is_an_error_that_says_so(tmp_path):
    path = tmp_path / "maps"
    save_maps(made(), path)
    with pytest.raises(ValueError, match="version 7, this reads 1 to 2"):
        load_maps(rewritten(path, lambda tensors, d: d.update(version=7)))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_an_error(tmp_path, share):
    save_maps(made(), tmp_path / "maps")
    whole = (tmp_path / "maps").read_bytes()
    (tmp_path / "maps").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match='"maps" is no safetensors file, or is damaged'):
        load_maps(tmp_path / "maps")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"concept_maps": "{"}, {"concept_maps": "[]"}])
def test_a_model_or_a_lora_is_an_error_that_says_what_to_choose(tmp_path, metadata):
    save_file({"lora.weight": torch.zeros(2)}, tmp_path / "lora.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=r'"lora\.safetensors".*Save Concept Maps'):
        load_maps(tmp_path / "lora.safetensors")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for kind in ("input", "output"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(folder_paths, f"{kind}_directory", str(tmp_path / kind))
    return tmp_path


def choices() -> list[str]:
    return ConceptMapsLoad.define_schema().inputs[0].options


def test_what_save_wrote_can_be_chosen_and_loaded(folders):
    maps = made()
    for count in (1, 2):
        result = ConceptMapsSave.execute(maps, "concept_maps/run/cat")
        assert result.ui["files"][0]["filename"] == f"cat_0000{count}_{SUFFIX}"
    ConceptMapsSave.execute(maps, "dog")
    (folders / "input" / "lora.safetensors").touch()
    saved = folders / "output" / "concept_maps" / "run"
    (saved / f"cat_00002_{SUFFIX}").rename(folders / "input" / f"sent{SUFFIX}")
    assert choices() == [
        f"sent{SUFFIX}",
        f"dog_00001_{SUFFIX} [output]",
        f"concept_maps/run/cat_00001_{SUFFIX} [output]",
    ]
    for file in choices():
        (loaded,) = ConceptMapsLoad.execute(file).args
        assert torch.equal(loaded.values, maps.values)


def test_save_writes_where_load_looks_unless_told_otherwise(folders):
    (prefix,) = (i for i in ConceptMapsSave.define_schema().inputs if i.id == "filename_prefix")
    ConceptMapsSave.execute(made(), prefix.default)
    assert choices() == [f"concept_maps/ComfyUI_00001_{SUFFIX} [output]"]


def test_a_file_is_offered_once_where_input_and_output_are_one_folder(folders, monkeypatch):
    monkeypatch.setattr(folder_paths, "input_directory", str(folders / "output"))
    ConceptMapsSave.execute(made(), "cat")
    assert choices() == [f"cat_00001_{SUFFIX}"]


def accepted(file: str | list) -> bool:
    """Whether ComfyUI starts a workflow that loads this file."""
    prompt = {
        "1": {"class_type": "ConceptMapsLoad", "inputs": {"file": file}},
        "2": {"class_type": "ConceptMapsSave", "inputs": {"maps": ["1", 0], "filename_prefix": "x"}},
        "3": {"class_type": "Name", "inputs": {}},
    }
    return asyncio.run(execution.validate_prompt("", prompt, None))[0]


@pytest.fixture
def mapped(monkeypatch):
    """ComfyUI's list of nodes, with those that are needed here."""

    class Name:
        """Gives the name of a file."""

        INPUT_TYPES = classmethod(lambda cls: {"required": {}})
        RETURN_TYPES = ("COMBO",)
        FUNCTION = "run"

    for cls in (ConceptMapsLoad, ConceptMapsSave, Name):
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, cls.__name__, cls)


@pytest.mark.parametrize("folder, mark", [("input", ""), ("input", " [input]"), ("output", " [output]")])
def test_a_workflow_may_name_a_file_in_a_folder_that_is_not_offered(folders, mapped, folder, mark):
    path = folders / folder / "pictures" / "of cats" / f"a{SUFFIX}"
    path.parent.mkdir(parents=True)
    save_maps(made(), path)
    file = f"pictures/of cats/a{SUFFIX}{mark}"
    assert not choices()
    assert accepted(file)
    (loaded,) = ConceptMapsLoad.execute(file).args
    assert torch.equal(loaded.values, made().values)


def test_a_file_that_another_node_names_is_not_known_before_the_run(folders, mapped):
    assert accepted(["3", 0])


@pytest.mark.parametrize(
    "file",
    [
        f"gone{SUFFIX}",
        f"here{SUFFIX}",
        "folder [output]",
        f"folder{SUFFIX} [output]",
        "lora.safetensors [output]",
        f"../outside{SUFFIX}",
        f"folder/../../outside{SUFFIX} [output]",
        "",
    ],
)
def test_what_is_no_file_of_maps_in_the_two_folders_is_refused(folders, mapped, file):
    for path in (f"here{SUFFIX}", "lora.safetensors", f"../outside{SUFFIX}"):
        (folders / "output" / path).touch()
    for path in ("folder", f"folder{SUFFIX}"):
        (folders / "output" / path).mkdir()
    assert accepted(f"here{SUFFIX} [output]")
    assert not accepted(file)
    with pytest.raises(ValueError, match="cannot be loaded: there is no"):
        ConceptMapsLoad.execute(file)
    assert not accepted(str(folders / "outside") + SUFFIX)


def test_a_file_that_was_written_again_is_loaded_again(folders):
    ConceptMapsSave.execute(made(), "cat")
    (file,) = choices()
    before = ConceptMapsLoad.fingerprint_inputs(file)
    assert ConceptMapsLoad.fingerprint_inputs(file) == before
    (path,) = (folders / "output").iterdir()
    path.write_bytes(path.read_bytes())
    assert ConceptMapsLoad.fingerprint_inputs(file) != before


def test_the_workflow_is_saved_with_the_maps(folders, monkeypatch):
    hidden = SimpleNamespace(prompt={"1": {}}, extra_pnginfo={"workflow": {"nodes": []}})
    monkeypatch.setattr(ConceptMapsSave, "hidden", hidden)
    ConceptMapsSave.execute(made(), "cat")
    (path,) = (folders / "output").iterdir()
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["prompt"]) == hidden.prompt
        assert json.loads(file.metadata()["workflow"]) == hidden.extra_pnginfo["workflow"]


def test_concept_saliency_makes_other_maps_from_loaded_ones(folders):
    ConceptMapsSave.execute(made(), "cat")
    (loaded,) = ConceptMapsLoad.execute(choices()[0]).args
    settings = {"space": "value", "start_step": 1, "end_step": 3, "softmax": True, "temperature": 1.0}
    maps, masks, _ = ConceptSaliency.execute(loaded, layers="0, 2", **settings).args
    assert torch.equal(maps.values, made(space="value", layers=[0, 2], steps=[1, 2]).values)
    assert masks.shape == (6, 64, 96)
