"""The evaluation's data sets, read from small files of the same form."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from concept_attention.benchmarks.segmentation import datasets
from concept_attention.benchmarks.segmentation.datasets import DataError
from concept_attention.benchmarks.segmentation.metrics import IGNORED


def write_imagenet(path: Path, count: int = 2, height: int = 6, width: int = 8) -> None:
    """gtsegs_ijcv.mat: references to arrays whose axes MATLAB has turned around."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        references = {name: [] for name in ("img", "gt", "id")}
        for i in range(count):
            picture = rng.integers(0, 256, (height, width, 3), np.uint8)
            mask = np.zeros((height, width), np.uint8)
            mask[: i + 1] = 1
            file[f"#refs#/img{i}"] = picture.transpose(2, 1, 0)
            file[f"#refs#/mask{i}"] = mask.T
            cell = file.create_dataset(f"#refs#/gt{i}", (1, 1), h5py.ref_dtype)
            cell[0, 0] = file[f"#refs#/mask{i}"].ref
            code = np.frombuffer(f"n0208407{i}_12".encode("utf-16-le"), np.uint16)
            file[f"#refs#/id{i}"] = code[:, None]
            for name in references:
                references[name].append(file[f"#refs#/{name}{i}"].ref)
        for name, found in references.items():
            column = file.create_dataset(f"value/{name}", (count, 1), h5py.ref_dtype)
            column[:, 0] = found


def write_voc(root: Path) -> Path:
    """Two images that show one class, one that shows two, as palette PNGs with a border of 255."""
    voc = root / "VOCdevkit" / "VOC2012"
    for name in ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass"):
        (voc / name).mkdir(parents=True)
    for name, classes in (("a", (8,)), ("b", (8, 15)), ("c", (20,))):
        labels = np.zeros((40, 60), np.uint8)
        for place, number in enumerate(classes):
            labels[10:20, 20 * place + 4 : 20 * place + 16] = number
        labels[0] = 255
        image = Image.fromarray(labels)
        image.putpalette([0] * 768)
        image.save(voc / "SegmentationClass" / f"{name}.png")
        Image.new("RGB", (60, 40), (9, 8, 7)).save(voc / "JPEGImages" / f"{name}.jpg")
    (voc / "ImageSets/Segmentation/val.txt").write_text("a\nb\nc\n")
    return voc


@pytest.fixture
def names(tmp_path) -> Path:
    path = tmp_path / "names.json"
    path.write_text(json.dumps({"n02084070": "dog", "n02084071": "cat"}))
    return path


def test_imagenet_gives_upright_pictures_masks_and_simple_names(tmp_path, names):
    write_imagenet(tmp_path / "gtsegs_ijcv.mat")
    data = datasets.imagenet(tmp_path / "gtsegs_ijcv.mat", names)
    second = data.load(1)
    assert data.ids == ("n02084070_12", "n02084071_12")
    assert second.picture.shape == (6, 8, 3)
    assert np.array_equal(second.labels, np.repeat([[1], [1], [0], [0], [0], [0]], 8, axis=1))
    assert second.names == {1: "cat"}
    expected = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    assert np.array_equal(data.load(0).picture, expected)


def test_imagenet_takes_the_papers_class_map_by_way_of_the_synsets_first_names(tmp_path, names):
    write_imagenet(tmp_path / "gtsegs_ijcv.mat")
    names.write_text(json.dumps({"categories": {"Maltese dog": "dog", "tabby": "cat"}}))
    words = tmp_path / "words.txt"
    words.write_text("n02084070\tMaltese dog, Maltese terrier\nn02084071\ttabby, tabby cat\nn9\tother\n")
    data = datasets.imagenet(tmp_path / "gtsegs_ijcv.mat", names, words)
    assert [data.load(i).names[1] for i in range(2)] == ["dog", "cat"]


def test_imagenet_without_its_file_says_where_to_get_it(tmp_path, names):
    with pytest.raises(DataError, match="gtsegs_ijcv.mat.*http"):
        datasets.imagenet(tmp_path / "gtsegs_ijcv.mat", names)


def test_imagenet_says_that_its_file_is_damaged(tmp_path, names):
    path = tmp_path / "gtsegs_ijcv.mat"
    write_imagenet(path)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(DataError, match="damaged.*calvin-vision"):
        datasets.imagenet(path, names)


def test_imagenet_names_the_image_whose_mask_does_not_fit(tmp_path, names):
    path = tmp_path / "gtsegs_ijcv.mat"
    write_imagenet(path)
    with h5py.File(path, "r+") as file:
        del file["#refs#/mask1"]
        file["#refs#/mask1"] = np.zeros((3, 3), np.uint8)
        file["#refs#/gt1"][0, 0] = file["#refs#/mask1"].ref
    with pytest.raises(DataError, match=r"Image 1 .*\(6, 8, 3\) with a mask of \(3, 3\)"):
        datasets.imagenet(path, names).load(1)


def test_imagenet_says_which_synsets_have_no_concept(tmp_path, names):
    write_imagenet(tmp_path / "gtsegs_ijcv.mat", count=4)
    with pytest.raises(DataError, match="no concept for 2 of the synsets, such as n02084072, n02084073"):
        datasets.imagenet(tmp_path / "gtsegs_ijcv.mat", names)


def test_vocs_single_class_split_is_the_images_that_show_one_class(tmp_path):
    write_voc(tmp_path)
    data = datasets.pascal_voc(tmp_path, several=False)
    assert data.ids == ("a", "c")
    example = data.load(1)
    assert example.names == {1: "monitor"}
    assert set(np.unique(example.labels)) == {IGNORED, 0, 1}
    assert not data.several


def test_vocs_multi_class_split_names_every_class_that_an_image_shows(tmp_path):
    data = datasets.pascal_voc(write_voc(tmp_path), several=True)
    assert data.ids == ("a", "b", "c")
    example = data.load(1)
    assert example.names == {8: "cat", 15: "person"}
    assert set(np.unique(example.labels)) == {IGNORED, 0, 8, 15}
    assert "background" in data.background


def test_voc_without_its_files_says_which_is_missing_and_where_to_get_them(tmp_path):
    with pytest.raises(DataError, match=r"val\.txt.*VOCtrainval_11-May-2012\.tar from http"):
        datasets.pascal_voc(tmp_path, several=True)
    (write_voc(tmp_path) / "SegmentationClass" / "b.png").unlink()
    with pytest.raises(DataError, match=r"b\.png.*http"):
        datasets.pascal_voc(tmp_path, several=True).load(1)


def test_a_damaged_mask_is_said_to_be_damaged(tmp_path):
    mask = write_voc(tmp_path) / "SegmentationClass" / "b.png"
    mask.write_bytes(mask.read_bytes()[:60])
    with pytest.raises(DataError, match=r"b\.png.*damaged"):
        datasets.pascal_voc(tmp_path, several=True).load(1)


def write_pair(root: Path, name: str, labels: np.ndarray) -> None:
    for kind, image in (("images", Image.new("RGB", labels.shape[::-1])), ("masks", Image.fromarray(labels))):
        path = root / kind / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def test_a_folders_images_are_named_by_their_folders(tmp_path):
    write_pair(tmp_path, "hot air balloon/1", np.array([[0, 255], [0, 3]], np.uint8))
    data = datasets.folder(tmp_path)
    assert data.ids == ("hot air balloon/1",)
    assert data.load(0).names == {1: "hot air balloon"}
    assert data.load(0).labels.tolist() == [[0, 1], [0, 1]]


def test_a_folder_with_named_classes_has_images_of_several(tmp_path):
    write_pair(tmp_path, "1", np.array([[0, 255], [2, 1]], np.uint8))
    (tmp_path / "classes.json").write_text('{"1": "dog", "2": "cat", "3": "cow"}')
    data = datasets.folder(tmp_path)
    assert data.several
    assert data.load(0).names == {1: "dog", 2: "cat"}
    assert data.load(0).labels.tolist() == [[0, IGNORED], [2, 1]]


@pytest.mark.parametrize(
    "name, size, classes, message",
    [
        ("1", (2, 2), None, "in no folder that names its concept"),
        ("1", (2, 2), '{"1": "dog"}', "classes .7. without a name"),
        ("1", (2, 2), '{"7": "dog", "8": "dog"}', "two classes have the same name"),
        ("1", (2, 2), "[]", "classes.json. is damaged"),
    ],
)
def test_a_folder_that_does_not_fit_says_what_is_expected(tmp_path, name, size, classes, message):
    write_pair(tmp_path, name, np.full(size, 7, np.uint8))
    if classes is not None:
        (tmp_path / "classes.json").write_text(classes)
    with pytest.raises(DataError, match=f"{message}.*Expected a folder"):
        datasets.folder(tmp_path).load(0)


def test_a_mask_of_another_size_is_refused(tmp_path):
    write_pair(tmp_path, "dog/1", np.ones((4, 6), np.uint8))
    Image.new("L", (5, 4)).save(tmp_path / "masks/dog/1.png")
    with pytest.raises(DataError, match="image has 6 x 4 pixels, its mask 5 x 4"):
        datasets.folder(tmp_path).load(0)


def test_single_scenes_show_one_object():
    data = datasets.scenes()
    assert len(data) >= 200
    for index in range(5):
        example = data.load(index)
        assert set(np.unique(example.labels)) == {0, 1}
        assert list(example.names) == [1]


def test_scenes_of_several_classes_are_labelled_everywhere():
    example = datasets.scenes(several=True).load(0)
    assert set(np.unique(example.labels)) == set(example.names)


def test_look_alike_objects_are_two_classes_named_by_colour():
    example = datasets.scenes(several=True, kind="look-alike").load(0)
    first, second = (name.split() for name in list(example.names.values())[:2])
    assert first[1] == second[1]
    assert first[0] != second[0]


def test_objects_of_a_crowd_are_a_class_each_named_by_colour():
    data = datasets.scenes(several=True, kind="crowd")
    assert data.name == "scenes-crowd-multi"
    example = data.load(0)
    assert set(np.unique(example.labels)) == set(example.names)
    objects = [name.split() for name in example.names.values() if " " in name]
    assert len(objects) >= 3
    assert len({noun for _, noun in objects}) == 1
    assert len({colour for colour, _ in objects}) == len(objects)


def test_scenes_of_look_alikes_have_several_classes():
    with pytest.raises(ValueError, match="crowd"):
        datasets.scenes(kind="crowd")


def test_other_background_concepts_make_another_run():
    data = datasets.scenes(several=True)
    other = data.with_background("wall, floor")
    assert other.background == ("wall", "floor")
    assert other.settings != data.settings
