"""docs/models.md says what the code and the tests do. ``--write-docs`` writes it anew."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

from tiny_encoders import ENCODERS
from tiny_models import PREFIXES, ROWS, WORDS

from concept_attention.core.architectures import Family, families
from concept_attention.core.architectures.unreadable import UNREADABLE
from concept_attention.core.observing.readers import reading_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"
HEAD = """\
# Models

*Written from the code and the tests, by `nox -s tests -- tests/test_models_page.py --write-docs`.*

A family is all that ComfyUI loads as one class: a model, its fine-tunes, its variants for editing or
inpainting; [adding_a_model.md](adding_a_model.md) says how one is added. Nothing here was tried on real
weights. Where the default layers are not the reference's, they are a guess until that is done: look at other
layers too.

Maps are of the space "output" where text and picture attend to each other, as in the paper. Where the picture
only reads the text, they are of the space "probability": a concept is one more word of the prompt.

| model | class in ComfyUI | text encoders | maps | default layers | checked |
|---|---|---|---|---|---|
"""
CHECKED = {
    "model": ("test_families", "By ComfyUI's own class, tiny and with random weights:"),
    "words": ("test_words", "The same, for models that read words:"),
    "encoder": ("test_encoders", "By ComfyUI's own tokenizer and text encoder, likewise:"),
    "golden data": ("test_golden", "Against numbers that the reference implementation gave:"),
}
_GOLDEN = {"CogVideoX", "Flux.1", "Flux.2", "Stable Diffusion 1, 2, XL", "Stable Diffusion 3"}
_MODELS = {row.family for row in ROWS.values()}
_WORDS = {row.family for row in (WORDS | PREFIXES).values()}
_ENCODERS = {row.family for row in ENCODERS.values()}


def page() -> str:
    rows = "".join(
        f"| {family.name} | `{family.model}` | {family.loader} | {reading_of(family).SPACES[0]} "
        f"| {_layers(family)} | {_checked(family)} |\n"
        for family in families()
    )
    parts = [HEAD + rows, "## What was checked\n"]
    for name, (module, how) in CHECKED.items():
        claims = "".join(f"- {claim}\n" for claim in _claims(module))
        parts.append(f"**{name}**. {how}\n\n{claims}")
    unreadable = "".join(f"| {name} | {reason} |\n" for name, reason in sorted(UNREADABLE.values()))
    parts.append("## Models that cannot be read\n\n| model | why |\n|---|---|\n" + unreadable)
    return "\n".join(parts)


def _layers(family: Family) -> str:
    """The default layers, as the family's page says them."""
    text = inspect.getdoc(type(family).default_layers).replace("\n", " ").rstrip(".")
    if type(family).default_layers is Family.default_layers:
        text = text.partition(": ")[2]
    return text[0].lower() + text[1:]


def _checked(family: Family) -> str:
    kinds = {"golden data": _GOLDEN, "model": _MODELS, "words": _WORDS, "encoder": _ENCODERS}
    return ", ".join(kind for kind, names in kinds.items() if family.name in names)


def _claims(module: str) -> list[str]:
    """The names of a file's tests, which are sentences, but of those that are about the tests themselves."""
    tree = ast.parse(Path(__file__).with_name(f"{module}.py").read_text("utf-8"))
    names = (node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.args.args)
    return [name.removeprefix("test_").replace("_", " ") for name in names if name.startswith("test_")]


def test_the_page_of_models_is_what_the_code_and_the_tests_say(request):
    if request.config.getoption("--write-docs"):
        PAGE.write_text(page(), "utf-8", newline="\n")
    assert PAGE.read_text("utf-8") == page(), f"Write it anew, as {PAGE.name} says in its head."


def test_the_page_has_every_family_and_every_model_that_cannot_be_read():
    text = PAGE.read_text("utf-8")
    assert all(f"| {family.name} | `{family.model}` |" in text for family in families())
    assert all(f"| {name} | {reason} |" in text for name, reason in UNREADABLE.values())
