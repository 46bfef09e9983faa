"""A folder of class folders becomes a data set, or a clear error before training."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from data_helpers import picture, write_class_folders, write_images

from sppnet_jax.data.image_folder import scan_folder
from sppnet_jax.data.images import decode_image
from sppnet_jax.data.sources import available_splits, open_source


def split_sizes(root: Path) -> dict[str, int]:
    return {split: len(found) for split, found in scan_folder(root).splits.items()}


def test_split_folders_have_canonical_names(tmp_path: Path) -> None:
    for folder, count in {"Training": 3, "valid": 2, "TEST": 1}.items():
        write_class_folders(tmp_path / folder, count)
    assert split_sizes(tmp_path) == {"train": 6, "validation": 4, "test": 2}


@pytest.mark.parametrize("below", ["", "train"])
def test_without_a_test_folder_every_fifth_image_of_each_class_is_held_out(
    tmp_path: Path, below: str
) -> None:
    write_class_folders(tmp_path / below, 11)
    scan = scan_folder(tmp_path)
    assert split_sizes(tmp_path) == {"train": 18, "test": 4}
    assert [name for name, _ in scan.splits["test"]] == ["cat", "cat", "dog", "dog"]
    assert not set(scan.splits["train"]) & set(scan.splits["test"])
    assert any("held out" in note and "4 of 22" in note for note in scan.notes)


def test_images_keep_their_bytes_label_and_name(tmp_path: Path) -> None:
    root, data_dir = tmp_path / "my pets ü", tmp_path / "tfds"
    write_images(root, "train/cat/a.PNG", "train/dog/ö/deep/b.jpg", "test/dog/c.webp")
    source = open_source(
        "image_folder", "train", root=str(root), data_dir=str(data_dir)
    )
    assert source.class_names == ("cat", "dog")
    records = {record["name"]: record for record in source.records}
    assert set(records) == {"train/cat/a.PNG", "train/dog/ö/deep/b.jpg"}
    for name, record in records.items():
        assert record["image"] == (root / name).read_bytes()
        assert record["label"] == ("dog" in name)
    assert decode_image(records["train/cat/a.PNG"]["image"]).shape == picture().shape
    assert available_splits("image_folder", root=str(root), data_dir=str(data_dir)) == (
        "train",
        "test",
    )


def test_a_changed_folder_is_prepared_anew_and_an_unchanged_one_is_not(
    tmp_path: Path,
) -> None:
    root, data_dir = tmp_path / "pets", tmp_path / "tfds"
    write_class_folders(root, 5)

    def prepared() -> set[str]:
        open_source("image_folder", "train", root=str(root), data_dir=str(data_dir))
        return {path.name for path in (data_dir / "image_folder").glob("pets-*")}

    first = prepared()
    assert prepared() == first
    write_images(root, "cat/new.png")
    second = prepared()
    assert len(second) == 2
    os.utime(root / "cat/new.png", ns=(1, 1))
    assert len(prepared()) == 3


def test_hidden_and_other_files_are_left_out(tmp_path: Path) -> None:
    write_class_folders(tmp_path, 5)
    for path in (
        ".git/x/a.png",
        "cat/.hidden.png",
        "cat/._01.png",
        "__MACOSX/cat/a.png",
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


def test_linked_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "elsewhere", 5)
    root = tmp_path / "root"
    root.mkdir()
    (root / "cat").symlink_to(tmp_path / "elsewhere/cat")
    (root / "dog").symlink_to(tmp_path / "elsewhere/dog")
    (tmp_path / "elsewhere/dog/self").symlink_to(tmp_path / "elsewhere/dog")
    assert split_sizes(root) == {"train": 8, "test": 2}


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    write_class_folders(tmp_path, 5, "bus car train")
    assert scan_folder(tmp_path).class_names == ("bus", "car", "train")


def test_a_missing_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no image folder .*nowhere.*ROOT/cat"):
        scan_folder(tmp_path / "nowhere")


def test_a_root_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "pets.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pets\.zip' is a file.*unpack"):
        scan_folder(tmp_path / "pets.zip")


@pytest.mark.parametrize(
    ("paths", "empty", "message"),
    [
        ([], [], "no class folders in .*but nothing"),
        (["a.png", "b.png"], [], "2 images that are in no class folder.*Expected"),
        (["cat/a.png"], ["dog"], "class folder '.*/dog' holds no images"),
        (["cat/a.png", "cat/b.png"], [], "only one class, 'cat'"),
        (
            ["pets/cat/a.png", "pets/dog/a.png"],
            [],
            "only one class.*Did you mean .*/pets",
        ),
        (
            ["train/cat/a.png", "train/dog/a.png"],
            ["val"],
            "split folder '.*val' is empty",
        ),
        (
            ["train/cat/a.png", "train/dog/a.png"],
            ["test/cat"],
            "test/cat' holds no images",
        ),
        (
            ["train/cat/a.png", "train/dog/a.png", "test/cow/a.png"],
            [],
            r"test split .* classes that train lacks: \['cow'\]",
        ),
        (["test/cat/a.png", "test/dog/a.png"], [], "none named 'train'"),
        (["train/a.png", "val/b.png"], [], "train' holds images, but no class folders"),
        (
            ["train/cat/a.png", "train/dog/a.png", "test/a.png"],
            [],
            "beside them 'test' holds images that are in no class folder",
        ),
        (
            ["train/cat/a.png", "train/dog/a.png", "val/cat/a.png", "valid/cat/a.png"],
            [],
            "two folders for the validation split, 'val' and 'valid'",
        ),
        (["cat/a.png", "dog/a.png"], [], "test split would be empty"),
    ],
)
def test_a_layout_that_cannot_be_meant_is_an_error(
    tmp_path: Path, paths: list[str], empty: list[str], message: str
) -> None:
    write_images(tmp_path, *paths)
    for folder in empty:
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(ValueError, match=message):
        scan_folder(tmp_path)


def test_folders_without_images_may_lie_beside_the_splits(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "train", 2)
    write_class_folders(tmp_path / "test", 1)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/all.csv").write_text("")
    assert split_sizes(tmp_path) == {"train": 4, "test": 2}


OPEN = """
import os, sys
from sppnet_jax.data import image_folder, sources
if sys.argv[3] == "killed":
    read = image_folder.ImageFolder._generate_examples
    def generate(self, split):
        yield next(read(self, split))
        os.kill(os.getpid(), 9)
    image_folder.ImageFolder._generate_examples = generate
root, data_dir = sys.argv[1:3]
source = sources.open_source("image_folder", "train", root=root, data_dir=data_dir)
print("records:", len(source.records))
"""


def start(root: Path, data_dir: Path, mode: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", OPEN, str(root), str(data_dir), mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )


def test_preparing_survives_a_kill_and_two_processes_at_once(tmp_path: Path) -> None:
    root, data_dir = tmp_path / "pets", tmp_path / "tfds"
    write_class_folders(root, 5)
    killed = start(root, data_dir, "killed")
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert list(data_dir.glob("image_folder/pets-*/incomplete.*"))
    both = [start(root, data_dir) for _ in range(2)]
    for process in both:
        output, errors = process.communicate(timeout=60)
        assert "records: 8" in output, errors
    assert not list(data_dir.glob("image_folder/pets-*/incomplete.*"))
