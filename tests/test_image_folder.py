"""A folder of class folders is a data set, or a clear error before training."""

import errno
import logging
import os
import pickle
import subprocess
import sys
import tracemalloc
import unicodedata
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds
from data_helpers import encode, exchange, picture, write_class_folders, write_images

from sppnet_jax.data.batches import describe_broken, train_batches
from sppnet_jax.data.folders import printable
from sppnet_jax.data.image_folder import scan_folder
from sppnet_jax.data.images import decode_image
from sppnet_jax.data.sources import available_splits, open_source


def split_sizes(root):
    return {split: len(found) for split, found in scan_folder(root).splits.items()}


def test_split_folders_have_canonical_names(tmp_path):
    for folder, count in {"Training": 3, "valid": 2, "TEST": 1}.items():
        write_class_folders(tmp_path / folder, count)
    assert split_sizes(tmp_path) == {"train": 6, "validation": 4, "test": 2}


@pytest.mark.parametrize("below", ["", "train"])
def test_without_a_test_folder_every_fifth_image_of_each_class_is_held_out(
    tmp_path, below
):
    write_class_folders(tmp_path / below, 11)
    scan = scan_folder(tmp_path)
    assert split_sizes(tmp_path) == {"train": 18, "test": 4}
    assert [name for name, _ in scan.splits["test"]] == ["cat", "cat", "dog", "dog"]
    assert not set(scan.splits["train"]) & set(scan.splits["test"])
    assert any("held out" in note and "4 of 22" in note for note in scan.notes)


def test_images_keep_their_bytes_label_and_name(tmp_path):
    root = tmp_path / "my pets ü"
    write_images(root, "train/cat/a.PNG", "train/dog/ö/deep/b.jpg", "test/dog/c.webp")
    source = open_source("image_folder", "train", root=str(root))
    assert source.class_names == ("cat", "dog")
    records = {record["name"]: record for record in source.records}
    assert set(records) == {"train/cat/a.PNG", "train/dog/ö/deep/b.jpg"}
    for name, record in records.items():
        assert record["image"] == (root / name).read_bytes()
        assert record["label"] == ("dog" in name)
    assert decode_image(records["train/cat/a.PNG"]["image"]).shape == picture().shape
    assert available_splits("image_folder", root=str(root)) == ("train", "test")


class Prepared(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """The names of a folder's files, as TFDS orders them by their keys."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None
    splits: ClassVar[dict[str, list[str]]] = {}

    def _info(self):
        features = tfds.features.FeaturesDict({"name": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.splits}

    def _generate_examples(self, split):
        for name in self.splits[split]:
            yield name, {"name": name}


def test_splits_slices_and_sums_are_those_of_tfds(tmp_path):
    root = tmp_path / "pets"
    write_class_folders(root / "train", 40)
    write_class_folders(root / "test", 7)
    os.rename(root / "train/cat/00.png", os.fsencode(root / "train/cat") + b"/\xff.png")
    Prepared.splits = {
        split: [printable(path) for _, path in files]
        for split, files in scan_folder(root).splits.items()
    }
    builder = Prepared(data_dir=str(tmp_path / "tfds"))
    builder.download_and_prepare(file_format="array_record")
    for split in (
        *("train", "test", "train[:80%]", "train[10:20]", "train[-7:]"),
        *("train+test", "test[33%:] + train[:3]", "train[5:8]+train[6:7]"),
    ):
        expected = [one["name"].decode() for one in builder.as_data_source(split)]
        source = open_source("image_folder", split, root=str(root))
        assert [record["name"] for record in source.records] == expected
        assert source.split == split


def test_records_travel_as_paths_and_are_read_when_asked_for(tmp_path):
    write_class_folders(tmp_path, 50)
    source = open_source("image_folder", "train", root=str(tmp_path))
    packed = pickle.dumps(source)
    assert len(packed) < 1000 + 30 * len(source.records)
    copy = pickle.loads(packed)
    assert copy.records[7] == source.records[7]
    path = tmp_path / source.records[7]["name"]
    path.write_bytes(b"other bytes")
    assert copy.records[7]["image"] == b"other bytes"
    path.unlink()
    with pytest.raises(FileNotFoundError, match=path.name):
        copy.records[7]


def test_a_process_tells_once_what_is_odd_in_a_folder(tmp_path, caplog):
    write_class_folders(tmp_path, 5)
    with caplog.at_level(logging.WARNING):
        for split in ("train", "test", "train"):
            open_source("image_folder", split, root=str(tmp_path))
    assert caplog.text.count("held out as split 'test'") == 1


def digest_of(root, split="train"):
    return open_source("image_folder", split, root=str(root)).digest


def relabel(root):
    (root / "train/cat/00.png").rename(root / "train/dog/09.png")


@pytest.mark.parametrize(
    "change",
    [
        lambda root: exchange(root / "train/cat", root / "train/dog"),
        lambda root: exchange(root / "train/cat/00.png", root / "train/dog/01.png"),
        lambda root: (root / "train/cat/00.png").rename(root / "train/cat/x.png"),
        relabel,
        lambda root: (root / "train/cat/00.png").unlink(),
        lambda root: write_images(root, "train/dog/new.png"),
        lambda root: (root / "train/cat/00.png").write_bytes(encode(picture(99, 99))),
    ],
    ids=["swapped", "exchanged", "renamed", "relabelled", "gone", "new", "other size"],
)
def test_other_files_or_labels_are_other_data(tmp_path, change):
    write_class_folders(tmp_path / "train", 3)
    write_class_folders(tmp_path / "test", 3)
    train, test = digest_of(tmp_path), digest_of(tmp_path, "test")
    change(tmp_path)
    assert digest_of(tmp_path) != train
    assert digest_of(tmp_path, "test") == test


@pytest.mark.parametrize("names", [("cat", "dog"), ("cat/1.bmp", "cat/2.bmp")])
def test_files_of_one_size_are_told_apart(tmp_path, names):
    """Uncompressed images of one shape have as many bytes."""
    for number, place in enumerate(("cat/1", "cat/2", "dog/1", "dog/2")):
        path = tmp_path / "train" / f"{place}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(24, 32, number), ".bmp"))
    write_class_folders(tmp_path / "test", 1)
    before = digest_of(tmp_path, "train")
    exchange(*(tmp_path / "train" / name for name in names))
    assert digest_of(tmp_path, "train") != before


def test_other_images_held_out_are_other_data(tmp_path):
    """A new image is trained on, and moves another into the test split or out of it."""
    write_class_folders(tmp_path, 9)
    before = digest_of(tmp_path), digest_of(tmp_path, "test")
    write_images(tmp_path, "cat/new.png")
    assert digest_of(tmp_path) != before[0]
    assert digest_of(tmp_path, "test") != before[1]


def test_the_same_files_elsewhere_and_touched_are_the_same_data(tmp_path):
    write_class_folders(tmp_path / "pets", 5)
    before = digest_of(tmp_path / "pets")
    assert digest_of(tmp_path / "pets", "train[:4]") != before
    (tmp_path / "pets").rename(tmp_path / "moved")
    for path in (tmp_path / "moved").rglob("*"):
        os.utime(path, ns=(1, 1))
    assert digest_of(tmp_path / "moved") == before


def test_a_folder_larger_than_a_gigabyte_takes_little_memory(tmp_path):
    """Hard links to a few photographs of noise."""
    for seed, name in enumerate(("cat", "dog")):
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        noise = np.random.default_rng(seed).integers(0, 256, (900, 900, 3), np.uint8)
        (folder / "0.jpg").write_bytes(encode(noise, ".jpg"))
        for number in range(1, 700):
            os.link(folder / "0.jpg", folder / f"{number}.jpg")
    write_class_folders(tmp_path / "test", 1)
    sizes = [path.stat().st_size for path in (tmp_path / "train").glob("*/*")]
    assert sum(sizes) > 1_000 * 2**20
    tracemalloc.start()
    try:
        source = open_source("image_folder", "train", root=str(tmp_path))
        opened = tracemalloc.get_traced_memory()[1]
        shape = {"batch_size": 8, "image_size": 32, "resize_side": 36}
        with train_batches(source, **shape, strict=True) as batches:
            drawn = [next(batches)["image"].shape for _ in range(4)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(source.records) == len(sizes)
    assert drawn == [(8, 32, 32, 3)] * 4
    assert opened < 20 * 2**20
    assert peak < 100 * 2**20


def test_hidden_and_other_files_are_left_out(tmp_path):
    write_class_folders(tmp_path, 5)
    for path in (
        ".git/x/a.png",
        "cat/.hidden.png",
        "cat/._01.png",
        "__MACOSX/cat/a.png",
        "@eaDir/a.png",
        "cat/@eaDir/a.png/thumbnail.jpg",
        "dog/Thumbs.db",
        "dog/.DS_Store",
        "dog/.ipynb_checkpoints/a.png",
        "lost+found/a.png",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"x")
    (tmp_path / "README.txt").write_text("pets")
    (tmp_path / "dog/notes.txt").write_text("good")
    (tmp_path / "dog/gone.png").symlink_to(tmp_path / "nowhere.png")
    scan = scan_folder(tmp_path)
    assert scan.class_names == ("cat", "dog")
    assert split_sizes(tmp_path) == {"train": 8, "test": 2}
    assert any("ignored 3 files" in note for note in scan.notes)


def test_linked_folders_are_followed_but_not_in_circles(tmp_path):
    write_class_folders(tmp_path / "elsewhere", 5)
    root = tmp_path / "root"
    root.mkdir()
    (root / "cat").symlink_to(tmp_path / "elsewhere/cat")
    (root / "dog").symlink_to(tmp_path / "elsewhere/dog")
    (tmp_path / "elsewhere/dog/self").symlink_to(tmp_path / "elsewhere/dog")
    assert split_sizes(root) == {"train": 8, "test": 2}


@pytest.mark.parametrize("suffix", [".jfif", ".JFIF", ".JPeG", ".tiff"])
def test_images_have_suffixes_in_any_case(tmp_path, suffix):
    write_class_folders(tmp_path, 5)
    for path in list(tmp_path.rglob("*.png")):
        path.rename(path.with_suffix(suffix))
    assert split_sizes(tmp_path) == {"train": 8, "test": 2}


def test_links_back_to_the_root_and_to_nowhere_are_not_followed(tmp_path):
    """Below the root, in a class of its own, and in a linked class."""
    write_class_folders(tmp_path / "pets", 5)
    write_class_folders(tmp_path / "far", 5, "bird")
    root = tmp_path / "pets"
    for link, target in (
        ("again", root),
        ("cat/root", root),
        ("cat/above", tmp_path),
        ("bird", tmp_path / "far/bird"),
        ("bird/back", root),
        ("bird/up", tmp_path / "far"),
        ("dog/round", root / "dog/round"),
        ("dog/round.png", root / "dog/round.png"),
    ):
        (root / link).symlink_to(target)
    scan = scan_folder(root)
    assert scan.class_names == ("bird", "cat", "dog")
    assert split_sizes(root) == {"train": 12, "test": 3}
    (root / "loop").symlink_to(root / "loop")
    assert scan_folder(root).class_names == scan.class_names


def test_accents_in_both_forms_are_one_name(tmp_path):
    """As from a Mac and from elsewhere: splits and classes are the same."""
    roots = [tmp_path / form for form in ("NFC", "NFD")]
    for root in roots:
        for split in ("train", "test"):
            form = root.name if split == "train" else "NFC"
            name = unicodedata.normalize(form, "caf\u00e9")
            write_images(root / split, f"{name}/{name}.png", f"tea/{name}.png")
    scans = [scan_folder(root) for root in roots]
    assert scans[0].class_names == scans[1].class_names == ("caf\u00e9", "tea")
    sources = [open_source("image_folder", "train", root=str(root)) for root in roots]
    assert sources[0].digest == sources[1].digest
    both = tmp_path / "both"
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "caf\u00e9")
        write_images(both, *(f"{name}/{form}{number}.png" for number in range(3)))
    write_images(both, *(f"tea/{number}.png" for number in range(5)))
    assert split_sizes(both) == {"train": 9, "test": 2}


def test_what_cannot_be_read_is_a_broken_image_that_says_why(tmp_path, monkeypatch):
    write_class_folders(tmp_path, 10)
    source = open_source("image_folder", "train", root=str(tmp_path))
    paths = [tmp_path / record["name"] for record in source.records]
    paths[0].unlink()
    os.mkfifo(paths[0])
    paths[1].unlink()
    paths[1].mkdir()
    real = Path.read_bytes

    def refuse(path):
        if path == paths[2]:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    reasons = ("a pipe or a device", "but a folder", "Permission denied")
    for number, reason in enumerate(reasons):
        record = pickle.loads(pickle.dumps(source.records[number]))
        with pytest.raises(ValueError, match=reason):
            decode_image(record["image"])
        told = describe_broken(source, number)
        assert reason in told
        assert record["name"] in told
    # From the next start on the first two are no images.
    assert "ignored 2 files that are not images" in scan_folder(tmp_path).notes[0]
    assert sum(split_sizes(tmp_path).values()) == 18


def test_a_class_may_be_called_train(tmp_path):
    write_class_folders(tmp_path, 5, "bus car train")
    assert scan_folder(tmp_path).class_names == ("bus", "car", "train")


def test_a_root_that_is_missing_or_a_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no image folder .*nowhere.*ROOT/cat"):
        scan_folder(tmp_path / "nowhere")
    (tmp_path / "pets.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pets\.zip' is a file.*unpack"):
        scan_folder(tmp_path / "pets.zip")


TRAIN = ["train/cat/a.png", "train/dog/a.png"]


@pytest.mark.parametrize(
    ("paths", "empty", "message"),
    [
        ([], [], "no class folders in .*but nothing"),
        (["a.png", "b.png"], [], "2 images that are in no class folder.*Expected"),
        (["cat/a.png"], ["dog"], "class folder '.*/dog' holds no images"),
        (["cat/a.png", "cat/b.png"], [], "only one class, 'cat'"),
        (["pets/cat/a.png", "pets/dog/a.png"], [], "only one class.*mean .*/pets"),
        (TRAIN, ["val"], "split folder '.*val' is empty"),
        (TRAIN, ["test/cat"], "test/cat' holds no images"),
        ([*TRAIN, "test/cow/a.png"], [], r"classes that train lacks: \['cow'\]"),
        (["test/cat/a.png", "test/dog/a.png"], [], "none named 'train'"),
        (["train/a.png", "val/b.png"], [], "train' holds images, but no class folders"),
        ([*TRAIN, "test/a.png"], [], "'test' holds images that are in no class folder"),
        (
            [*TRAIN, "val/cat/a.png", "valid/cat/a.png"],
            [],
            "two folders for the validation split, 'val' and 'valid'",
        ),
        (["cat/a.png", "dog/a.png"], [], "test split would be empty"),
    ],
)
def test_a_layout_that_cannot_be_meant_is_an_error(tmp_path, paths, empty, message):
    write_images(tmp_path, *paths)
    for folder in empty:
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(ValueError, match=message):
        scan_folder(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("cat", "cat "), "'cat' and 'cat ' .* differ in white space only"),
        (("a dog", "a\u00a0 dog"), "differ in white space only"),
        (("cat", "dog\n"), r"'dog\\n': lists of classes have a line for each"),
        (("one\ntwo", "three"), "a line for each"),
        (("one\rtwo", "three"), "a line for each"),
        (("one", " "), "a line for each"),
    ],
)
def test_class_names_that_no_list_could_tell_apart_are_refused(
    names, message, tmp_path
):
    paths = [f"{name}/{number}.png" for name in names for number in range(5)]
    write_images(tmp_path, *paths)
    with pytest.raises(ValueError, match=message):
        open_source("image_folder", "train", root=str(tmp_path))


def test_folders_without_images_may_lie_beside_the_splits(tmp_path):
    write_class_folders(tmp_path / "train", 2)
    write_class_folders(tmp_path / "test", 1)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/all.csv").write_text("")
    assert split_sizes(tmp_path) == {"train": 4, "test": 2}


def test_folders_open_without_tfds(tmp_path):
    """Importing it would take half a second of every start."""
    write_class_folders(tmp_path, 5)
    script = (
        "import sys; from sppnet_jax.data.sources import available_splits, open_source;"
        "[open_source('image_folder', s, root=sys.argv[1]) for s in"
        " available_splits('image_folder', root=sys.argv[1])];"
        "assert 'tensorflow_datasets' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=Path(__file__).parents[1],
        check=True,
    )
