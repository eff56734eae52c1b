"""The texts beside the nodes: locales/, in the form that the front end looks them up, and web/docs/."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.request
from collections.abc import Iterator
from urllib.parse import quote

import pytest
from PIL import Image

import comfyui
from concept_attention import comfy_entrypoint

LOCALES = comfyui.ROOT / "locales"
DOCS = comfyui.ROOT / "web" / "docs"
FRONT_END = (comfyui.ROOT / "web" / "concept_attention.js").read_text("utf-8")
VIEWER_TEXTS = (comfyui.ROOT / "web" / "texts.mjs").read_text("utf-8")

TRANSLATIONS = ("ko", "zh", "ja")
LANGUAGES = ("en", *TRANSLATIONS)
FILES = ("nodeDefs", "settings", "main")
LARGEST_PICTURE = 60 * 1024

NODES = {
    node.define_schema().node_id: node.GET_NODE_INFO_V1()
    for node in asyncio.run(asyncio.run(comfy_entrypoint()).get_node_list())
}
PAGES = [(node, language) for node in NODES for language in LANGUAGES]


def read(language: str, file: str) -> dict:
    path = LOCALES / language / f"{file}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def flat(texts: dict, prefix: str = "") -> dict[str, str]:
    """Texts by their path: ``{"a.b": text}`` of ``{"a": {"b": text}}``."""
    found = {}
    for key, value in texts.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def inputs(sections: dict, prefix: str = "") -> Iterator[tuple[str, str, list, dict]]:
    """Key, name, options to choose from and definition of each input, also of those that a choice brings
    up: the front end knows "threshold" of "method" as ``method.threshold`` and looks up a ``_`` for a dot."""
    for name, (kind, *rest) in {**sections.get("required", {}), **sections.get("optional", {})}.items():
        definition = rest[0] if rest else {}
        options = kind if isinstance(kind, list) else definition.get("options", [])
        dynamic = [option for option in options if isinstance(option, dict)]
        yield prefix + name, name, [o["key"] if o in dynamic else o for o in options], definition
        for option in dynamic:
            yield from inputs(option["inputs"], f"{prefix}{name}_")


def english(node: dict) -> dict:
    """A node's entry in nodeDefs.json. An output that is named like its type is translated as that."""
    texts = {"display_name": node["display_name"], "description": node["description"], "inputs": {}}
    for key, name, _, definition in inputs(node["input"]):
        texts["inputs"][key] = {"name": definition.get("display_name") or name}
        if tooltip := definition.get("tooltip"):
            texts["inputs"][key]["tooltip"] = tooltip
    outputs = zip(node["output"], node["output_name"], node["output_tooltips"], strict=True)
    for index, (kind, name, tooltip) in enumerate(outputs):
        entry = {"name": name} if name != kind else {}
        if tooltip:
            entry["tooltip"] = tooltip
        if entry:
            texts.setdefault("outputs", {})[str(index)] = entry
    return texts


def test_english_says_what_the_nodes_say():
    expected = flat({node_id: english(node) for node_id, node in NODES.items()})
    found = flat(read("en", "nodeDefs"))
    wrong = [f'"{key}" should be "{text}"' for key, text in expected.items() if found.get(key) != text]
    wrong += [f'"{key}" is of no node' for key in found.keys() - expected.keys()]
    assert not wrong, "locales/en/nodeDefs.json:\n" + "\n".join(wrong)


def test_english_says_what_the_front_end_says():
    setting = re.search(r'LIVE_PREVIEW = "([\w.]+)"', FRONT_END)[1]
    name = re.search(r'id: LIVE_PREVIEW,.*?name: "([^"]+)"', FRONT_END, re.DOTALL)[1]
    groups = re.findall(r'"([^"]+)"', re.search(r"category: \[(.*?)\]", FRONT_END)[1])
    assert read("en", "settings") == {setting.replace(".", "_"): {"name": name}}
    assert read("en", "main") == {
        "nodeCategories": {node["category"]: node["category"] for node in NODES.values()},
        "settingsCategories": {group: group for group in groups},
        "conceptViewer": dict(re.findall(r'^  (\w+): "(.*)",$', VIEWER_TEXTS, re.MULTILINE)),
    }


@pytest.mark.parametrize("language", TRANSLATIONS)
@pytest.mark.parametrize("file", FILES)
def test_a_translation_has_every_text_and_no_other(language, file):
    expected, found = flat(read("en", file)).keys(), flat(read(language, file)).keys()
    assert not expected - found, f"locales/{language}/{file}.json lacks {sorted(expected - found)}"
    assert not found - expected, f"locales/{language}/{file}.json has too much: {sorted(found - expected)}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_text_is_empty_or_has_signs_that_mean_something_to_the_front_end(language):
    for file in FILES:
        for key, text in flat(read(language, file)).items():
            assert text.strip() == text != "", key
            assert not re.search(r"[{}@|]", text), f"{key} in {language} has vue-i18n's syntax: {text}"


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_a_translation_of_the_viewer_says_numbers_and_names_where_english_does(language):
    english, translated = (read(other, "main")["conceptViewer"] for other in ("en", language))
    assert sum("%s" in text for text in english.values()) > 2
    for key, text in english.items():
        assert translated[key].count("%s") == text.count("%s"), key


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_a_translation_keeps_what_a_user_types_and_reads_in_english(language):
    """What stands in quotes, numbers, kinds of files and data, names with an underscore, and the choices
    that a tooltip explains."""
    translated = flat(read(language, "nodeDefs"))
    kept = {
        key: re.findall(r'"([^"]+)"|(?<![\w.])(\d+(?:\.\.\d+)?)\b|\b([A-Z]{3,}\d?|[a-z]+_[a-z]+)\b', text)
        for key, text in flat(read("en", "nodeDefs")).items()
        if not key.endswith(".name")
    }
    for node_id, node in NODES.items():
        for key, _, options, definition in inputs(node["input"]):
            explained = [
                o for o in options if re.search(rf"\b{re.escape(o)}\b", definition.get("tooltip", ""), re.I)
            ]
            kept.setdefault(f"{node_id}.inputs.{key}.tooltip", []).extend((o,) for o in explained)
    assert ("argmax",) in kept["ConceptMask.inputs.method.tooltip"]
    for key, groups in kept.items():
        for word in filter(None, (word for group in groups for word in group)):
            assert word.casefold() in translated.get(key, "").casefold(), (
                f'{key} in {language} lacks "{word}"'
            )


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_a_translation_calls_nodes_by_their_translated_names(language):
    originals, translated = read("en", "nodeDefs"), read(language, "nodeDefs")
    names = {
        originals[n]["display_name"]: translated[n]["display_name"] for n in originals if n in translated
    }
    longest_first = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    found = flat(translated)
    for key, text in flat(originals).items():
        for name in re.findall(rf"\b(?:{longest_first})(?!\w)", text):
            assert names[name] in found.get(key, ""), f"{key} in {language} should name {names[name]}"


def headings_and_pictures(text: str) -> list[str]:
    return re.findall(r"^#+(?= )|^\|[-|]+\|$|!\[[^]]*\]\(.+?\)", re.sub(r"!\[[^]]*\]", "![]", text), re.M)


def pictures(text: str) -> list[str]:
    return re.findall(r"!\[[^]]*\]\((.+?)\)", text)


def address(node: str, language: str) -> str:
    """A page in ``docs/``. The front end shows the English one in languages that have none."""
    return f"{node}.md" if language == "en" else f"{node}/{language}.md"


def page(node: str, language: str) -> str:
    path = DOCS / address(node, language)
    assert path.exists(), f"{node} has no help page {path.relative_to(comfyui.ROOT)}"
    return path.read_text("utf-8")


@pytest.mark.parametrize("node, language", PAGES)
def test_a_help_page_has_small_pictures_that_exist(node, language):
    """The front end takes addresses in a page from ``docs/``, not from the page's folder."""
    shown = pictures(page(node, language))
    assert shown
    for name in shown:
        assert name.startswith(f"{node}/")
        assert (DOCS / name).exists(), f"{address(node, language)} shows {name}, which is missing"
        assert (DOCS / name).stat().st_size <= LARGEST_PICTURE, name
        with Image.open(DOCS / name) as image:
            image.verify()


def test_there_is_nothing_in_the_help_that_no_page_shows():
    expected = {address(node, language) for node, language in PAGES}
    expected |= {name for node, language in PAGES for name in pictures(page(node, language))}
    assert {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*") if path.is_file()} == expected


@pytest.mark.parametrize("language", TRANSLATIONS)
@pytest.mark.parametrize("node", NODES)
def test_a_translated_page_has_the_parts_of_the_english_one(node, language):
    original, translated = page(node, "en"), page(node, language)
    assert headings_and_pictures(translated) == headings_and_pictures(original)
    assert re.findall("`(.+?)`", "\n".join(rows(translated))) == re.findall(
        "`(.+?)`", "\n".join(rows(original))
    )
    for a, b in zip(sections(original), sections(translated), strict=True):
        assert a.count("\n- ") == b.count("\n- "), a
        assert a.count("\n| ") == b.count("\n| "), a


@pytest.mark.parametrize("language", TRANSLATIONS)
@pytest.mark.parametrize("node", NODES)
def test_a_translated_page_keeps_numbers_and_what_comfyui_says_in_english(node, language):
    """Messages that users look up, and the choices of the widgets; those of the viewer are translated."""
    own_words = read("en", "main")["conceptViewer"].values()
    settings = flat(read("en", "settings")).values()
    translated = page(node, language)
    for quoted, number in re.findall(
        r'"([^"\n]+)"|(?<![\w.-])(\d+(?:\.\d+)?(?:e-\d+)?)(?![\w.])', page(node, "en")
    ):
        if quoted and (any(quoted in text for text in own_words) or quoted in settings):
            continue
        assert (quoted or number) in translated, f"{address(node, language)} lacks {quoted or number}"


@pytest.mark.parametrize("node, language", PAGES)
def test_emphasis_in_a_help_page_begins_and_ends_where_markdown_sees_it(node, language):
    """A ``**`` ends none between a sign and a letter, and begins none between a letter and a sign."""
    for line in page(node, language).splitlines():
        marks = [match.start() for match in re.finditer(r"\*\*", line)]
        assert len(marks) % 2 == 0, line
        for opening, closing in zip(marks[::2], marks[1::2], strict=True):
            assert line[opening + 2].isalnum() or not line[max(opening - 1, 0)].isalnum(), line
            assert line[closing - 1].isalnum() or not line[closing + 2 : closing + 3].isalnum(), line


def sections(text: str) -> list[str]:
    return re.split(r"^## ", text, flags=re.M)


def rows(text: str) -> list[str]:
    """The first cells of the tables."""
    return re.findall(r"^\| (.+?) \|", text, re.M)


@pytest.mark.parametrize("node, language", PAGES)
def test_a_help_page_names_inputs_and_outputs_as_the_nodes_do(node, language):
    def names(info: dict) -> set[str]:
        return {name for _, name, _, _ in inputs(info["input"])} | {*info["output_name"], *info["output"]}

    text = page(node, language)
    every = set().union(*map(names, NODES.values()))
    assert not set(re.findall("`(.+?)`", text)) - every
    in_tables = set(re.findall("`(.+?)`", "\n".join(rows(text))))
    assert not in_tables - names(NODES[node])
    assert not {name for _, name, _, _ in inputs(NODES[node]["input"])} - in_tables


@pytest.mark.parametrize("language", TRANSLATIONS)
@pytest.mark.parametrize("node", NODES)
def test_a_translated_page_names_inputs_and_outputs_as_the_translated_node_does(node, language):
    texts = read(language, "nodeDefs")[node]
    shown = {}
    for key, name, _, _ in inputs(NODES[node]["input"]):
        shown.setdefault(name, set()).add(texts["inputs"][key]["name"])
    for index, name in enumerate(NODES[node]["output_name"]):
        if translated := texts.get("outputs", {}).get(str(index), {}).get("name"):
            shown.setdefault(name, set()).add(translated)
    labelled = re.findall(r"(?:^\| |, )([^|,]+?) \(`(\w+)`\)", page(node, language), re.M)
    assert labelled
    for label, name in labelled:
        if name in shown:
            assert label in shown[name], f"{name} is {shown[name]}, not {label}"


@pytest.mark.parametrize("language", TRANSLATIONS)
@pytest.mark.parametrize("node", NODES)
def test_a_translated_page_calls_nodes_by_their_translated_names(node, language):
    originals, translated = read("en", "nodeDefs"), read(language, "nodeDefs")
    named = {n for n in NODES if f"**{originals[n]['display_name']}**" in page(node, "en")}
    for other in named:
        assert translated[other]["display_name"] in page(node, language), other


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with comfyui.Server(comfyui.find(), tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.mark.parametrize("language", LANGUAGES)
def test_comfyui_hands_the_texts_to_the_front_end(server, language):
    served = flat(server.get("/i18n")[language])
    for file in FILES:
        texts = read(language, file)
        assert texts
        expected = flat(texts if file == "main" else {file: texts})
        assert expected.items() <= served.items()


@pytest.mark.parametrize("node, language", PAGES)
def test_comfyui_serves_the_help_pages_and_their_pictures(server, node, language):
    text = page(node, language)
    folder = f"{server.url}/extensions/concept-attention/docs/"
    with urllib.request.urlopen(folder + address(node, language)) as response:
        assert response.headers.get_content_type() != "text/html"
        assert response.read().decode("utf-8") == text
    for name in pictures(text):
        with urllib.request.urlopen(folder + quote(name)) as response:
            assert response.headers.get_content_maintype() == "image"
