"""Images with true labels: ImageNet-Segmentation, Pascal VOC 2012, folders, and the demo's scenes.

A data set is read lazily, one example at a time, and is the same in every process. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from ...core.concepts import split_names
from .metrics import IGNORED, resized

IMAGENET_URL = "http://calvin-vision.net/bigstuff/proj-imagenet/data/gtsegs_ijcv.mat"
VOC_URL = "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar"
CLASS_MAP_URL = (
    "https://github.com/helblazer811/ConceptAttention/blob/db30c4dcee01184c4d3f9fc9e46477eeb4e3eef3/"
    "experiments/imagenet_segmentation/data/imagenet_class_map.json"
)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

# The background concepts of the reference's run_experiment.py and run_single_class_split_experiment.py.
IMAGENET_BACKGROUND = ("background", "floor", "tree", "person", "grass", "face")
VOC_BACKGROUND = ("background", "floor", "grass", "tree", "sky")

# One T5 token each, as in the reference's data/VOC.py. 0 is the background, 255 is ignored.
VOC_NAMES = (
    "background", "plane", "bike", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "table", "dog", "horse", "motorcycle", "person", "pot", "sheep", "sofa", "train", "monitor",
)  # fmt: skip


class DataError(RuntimeError):
    """A data set is missing or damaged; the message says what is expected and where to get it."""


@dataclass(frozen=True)
class Example:
    """An image and its true labels.

    Attributes:
        id: its name in the data set.
        picture: (H, W, 3) uint8.
        labels: (H, W) int; 0 is the background, ``IGNORED`` is not scored.
        names: the concept of each class that the image shows, without the background.
    """

    id: str
    picture: np.ndarray
    labels: np.ndarray
    names: dict[int, str]


@dataclass(frozen=True)
class Dataset:
    """Examples by index.

    Attributes:
        name: for people and folders.
        ids: of all the examples.
        load: the example of an index.
        background: concepts that compete for class 0.
        several: whether images may show several classes, which then compete (argmax); else one.
    """

    name: str
    ids: Sequence[str]
    load: Callable[[int], Example]
    background: tuple[str, ...]
    several: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    def with_background(self, text: str) -> Dataset:
        """The same with other background concepts, named in text."""
        return replace(self, background=split_names(text))

    @property
    def settings(self) -> dict:
        """What identifies the data set in a run's settings."""
        digest = hashlib.sha256("\n".join(self.ids).encode()).hexdigest()[:10]
        return {"name": self.name, "ids": digest, "background": list(self.background)}


def imagenet(path: Path, names: Path, words: Path | None = None) -> Dataset:
    """ImageNet-Segmentation (Guillaumin et al. 2014): one object per image, 4276 images.

    Args:
        path: gtsegs_ijcv.mat, an HDF5 file. ``/value/img[i, 0]``, ``/value/gt[i, 0]`` and
            ``/value/id[i, 0]`` are references: to the picture (3, W, H), to a reference to the mask (W, H),
            and to the id as UTF-16 text such as "n02084071_1234".
        names: JSON from synsets ("n02084071") or from their first WordNet names ("dog") to simple
            concepts, as it is or under "categories".
        words: with first WordNet names: lines of a synset, a tab and its names, separated by commas.

    Raises:
        DataError: a file is missing or not of that form.
    """
    try:
        import h5py
    except ImportError:
        raise DataError(
            "ImageNet-Segmentation is an HDF5 file, and h5py is not installed: pip install h5py"
        ) from None
    expected = (
        f"Expected gtsegs_ijcv.mat of ImageNet-Segmentation, an HDF5 file with /value/img, /value/gt and "
        f"/value/id. Get it from {IMAGENET_URL}"
    )
    if not path.is_file():
        raise DataError(f'There is no file "{path}". {expected}')
    concepts = _concepts_of_synsets(names, words)
    try:
        file = h5py.File(path, "r")
        value = file["value"]
        pictures, masks, references = value["img"], value["gt"], value["id"]
        ids = tuple(_text(file[references[i, 0]]) for i in range(len(references)))
        if not len(pictures) == len(masks) == len(ids):
            raise ValueError(f"{len(pictures)} pictures, {len(masks)} masks, {len(ids)} ids")
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(f'"{path}" is damaged or something else ({error}). {expected}') from None
    unknown = sorted({i.split("_")[0] for i in ids} - concepts.keys())
    if unknown:
        raise DataError(
            f'"{names}" has no concept for {len(unknown)} of the synsets, such as {", ".join(unknown[:3])}. '
            f"{NAMES_EXPECTED}"
        )

    def load(index: int) -> Example:
        try:
            picture = np.asarray(file[pictures[index, 0]]).transpose(2, 1, 0)
            mask = np.asarray(file[file[masks[index, 0]][0, 0]]).T
            if picture.shape != (*mask.shape, 3):
                raise ValueError(f"a picture of {picture.shape} with a mask of {mask.shape}")
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise DataError(f'Image {index} of "{path}" is damaged ({error}). {expected}') from None
        concept = concepts[ids[index].split("_")[0]]
        return Example(ids[index], picture.astype(np.uint8), (mask > 0).astype(np.int64), {1: concept})

    return Dataset("imagenet", ids, load, IMAGENET_BACKGROUND)


NAMES_EXPECTED = (
    'Expected JSON such as {"n02084071": "dog"}, or the paper\'s imagenet_class_map.json, from '
    f"{CLASS_MAP_URL}, together with --words: ImageNet's words.txt, lines such as "
    '"n02084071<tab>dog, domestic dog", which comes with every ImageNet list of synsets.'
)


def _text(codes: np.ndarray) -> str:
    return np.asarray(codes).astype("<u2").tobytes().decode("utf-16-le").strip()


def _concepts_of_synsets(names: Path, words: Path | None) -> dict[str, str]:
    try:
        given = json.loads(names.read_text("utf-8"))
        given = given.get("categories", given)
        given = {str(key): str(value) for key, value in given.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f'"{names}" cannot be read as class names ({error}). {NAMES_EXPECTED}') from None
    if words is None:
        return given
    try:
        lines = words.read_text("utf-8").splitlines()
        first = dict(line.split("\t", 1) for line in lines if line.strip())
    except (OSError, ValueError) as error:
        raise DataError(f'"{words}" cannot be read as synset names ({error}). {NAMES_EXPECTED}') from None
    first = {synset: text.split(",")[0].strip() for synset, text in first.items()}
    return {synset: given[name] for synset, name in first.items() if name in given}


def pascal_voc(path: Path, *, several: bool, split: str = "val", size: int = 224) -> Dataset:
    """Pascal VOC 2012 segmentation, 1449 validation images.

    Args:
        path: the folder that holds ImageSets, JPEGImages and SegmentationClass, or one above it.
        several: all images, with all the classes that each shows; else those that show one class only,
            which class is then 1.
        size: the images of one class are told at this size, nearest neighbour, as in the reference.

    Raises:
        DataError: a file is missing or damaged.
    """
    expected = (
        "Expected the folder VOC2012 of Pascal VOC 2012 with ImageSets/Segmentation/"
        f"{split}.txt, JPEGImages and SegmentationClass. Get VOCtrainval_11-May-2012.tar from {VOC_URL}"
    )
    root = next(
        (p for p in (path, path / "VOC2012", path / "VOCdevkit/VOC2012") if (p / "ImageSets").is_dir()), path
    )
    listed = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    if not listed.is_file():
        raise DataError(f'There is no file "{listed}". {expected}')
    ids = listed.read_text("utf-8").split()

    def labels_of(name: str) -> np.ndarray:
        labels = _indexed(root / "SegmentationClass" / f"{name}.png", expected)
        labels[labels == 255] = IGNORED
        if labels.max() >= len(VOC_NAMES):
            raise DataError(f'"{name}.png" has the label {labels.max()}; Pascal VOC has 0 to 20. {expected}')
        return labels

    def shown(labels: np.ndarray) -> list[int]:
        return [int(c) for c in np.unique(labels) if c > 0]

    if not several:
        ids = [name for name in ids if len(shown(resized(labels_of(name), size))) == 1]

    def load(index: int) -> Example:
        labels = labels_of(ids[index])
        picture = _picture(root / "JPEGImages" / f"{ids[index]}.jpg", expected)
        _same_size(picture, labels, ids[index], expected)
        if several:
            return Example(ids[index], picture, labels, {c: VOC_NAMES[c] for c in shown(labels)})
        (only,) = shown(resized(labels, size))
        return Example(ids[index], picture, np.minimum(labels, 1), {1: VOC_NAMES[only]})

    return Dataset("voc-multi" if several else "voc", tuple(ids), load, VOC_BACKGROUND, several)


def folder(path: Path) -> Dataset:
    """Any images and masks: ``path/images/<name>.jpg`` with ``path/masks/<name>.png``.

    With ``path/classes.json`` ({"1": "dog", "2": "cat"}), masks hold class numbers, 255 is ignored, and the
    classes of an image compete. Without, a mask is not black where the concept is, which is the image's
    folder ("images/dog/1.jpg" with "masks/dog/1.png").

    Raises:
        DataError: a file is missing or damaged.
    """
    expected = (
        'Expected a folder with "images" and "masks": for every image, a PNG of the same name and size in '
        '"masks". Either classes.json names the numbers in the masks, or the images of each concept are in a '
        "folder of its name, such as images/dog/1.jpg and masks/dog/1.png."
    )
    root = path / "images"
    files = sorted(f for f in root.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES) if root.is_dir() else []
    if not files:
        raise DataError(f'There are no images in "{root}". {expected}')
    ids = tuple(f.relative_to(root).with_suffix("").as_posix() for f in files)
    classes = _classes(path / "classes.json", expected)
    if classes is None and (loose := [i for i in ids if "/" not in i]):
        raise DataError(f'"{loose[0]}" is in no folder that names its concept. {expected}')

    def load(index: int) -> Example:
        picture = _picture(files[index], expected)
        labels = _indexed(path / "masks" / f"{ids[index]}.png", expected)
        _same_size(picture, labels, ids[index], expected)
        if classes is None:
            return Example(ids[index], picture, np.minimum(labels, 1), {1: ids[index].split("/")[-2]})
        labels[labels == 255] = IGNORED
        shown = [int(c) for c in np.unique(labels) if c > 0]
        if unnamed := [c for c in shown if c not in classes]:
            raise DataError(f'The mask of "{ids[index]}" has classes {unnamed} without a name. {expected}')
        return Example(ids[index], picture, labels, {c: classes[c] for c in shown})

    return Dataset("folder", ids, load, IMAGENET_BACKGROUND, classes is not None)


def scenes(*, several: bool = False, kind: str = "") -> Dataset:
    """The demo's held-out scenes (demo/scenes.py), with exact labels: of a thousand, those that show one
    object only, which is class 1.

    Args:
        several: all of the thousand, each with all that it shows, grounds and sky too.
        kind: "look-alike": scenes with two objects of one noun, which are named by colour ("red ball") and so
            have several tokens; "crowd": with three or four, which touch. Their classes are the first object,
            the second and so on.
    """
    from scenes import GROUNDS, HELD_OUT, NOUNS, make_scene

    if kind and not several:
        raise ValueError(f"Scenes of the kind {kind} show several objects: they need several classes.")
    nouns = (*NOUNS, *GROUNDS, "sky")
    seeds = range(HELD_OUT, HELD_OUT + 1000)
    if not several:
        seeds = [seed for seed in seeds if sum(r.colour is not None for r in make_scene(seed).regions) == 1]

    def load(index: int) -> Example:
        scene = make_scene(seeds[index], kind == "look-alike", crowd=kind == "crowd")
        if several:
            classes = [
                len(nouns) + 1 + i if kind and r.colour else nouns.index(r.noun) + 1
                for i, r in enumerate(scene.regions)
            ]
        else:
            classes = [int(r.colour is not None) for r in scene.regions]
        said = [r.phrase if kind else r.noun for r in scene.regions]
        names = {c: name for c, name in zip(classes, said, strict=True) if c}
        return Example(f"scene {seeds[index]}", scene.image, np.asarray(classes)[scene.labels], names)

    name = "-".join(["scenes", *[kind] * bool(kind), *["multi"] * several])
    background = () if several else ("background", *GROUNDS, "sky")
    return Dataset(name, tuple(map(str, seeds)), load, background, several)


def _picture(path: Path, expected: str) -> np.ndarray:
    return np.asarray(_opened(path, expected).convert("RGB"))


def _indexed(path: Path, expected: str) -> np.ndarray:
    """The numbers in a picture of labels, which may have a palette."""
    image = _opened(path, expected)
    if image.mode not in ("1", "L", "P", "I", "I;16"):
        image = image.convert("L")
    return np.array(image).astype(np.int64)


def _opened(path: Path, expected: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise DataError(f'There is no file "{path}". {expected}') from None
    except OSError as error:
        raise DataError(f'"{path}" is damaged ({error}). {expected}') from None


def _same_size(picture: np.ndarray, labels: np.ndarray, name: str, expected: str) -> None:
    if picture.shape[:2] != labels.shape:
        raise DataError(
            f'"{name}": the image has {picture.shape[1]} x {picture.shape[0]} pixels, '
            f"its mask {labels.shape[1]} x {labels.shape[0]}. {expected}"
        )


def _classes(path: Path, expected: str) -> Mapping[int, str] | None:
    if not path.exists():
        return None
    try:
        classes = {int(key): str(value) for key, value in json.loads(path.read_text("utf-8")).items()}
        if len(set(classes.values())) < len(classes):
            raise ValueError("two classes have the same name")
        return classes
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f'"{path}" is damaged ({error}). {expected}') from None
