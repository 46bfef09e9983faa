"""Folders and patterns of photographs, and the files that results are written to."""

import csv
import errno
import json
import os
import re
from pathlib import Path

import pytest

from sppnet_jax import cli
from sppnet_jax.buckets.table import smallest_bucket
from sppnet_jax.buckets.whole_images import photo_buckets
from sppnet_jax.data.images import whole_size
from sppnet_jax.data.photographs import read_image, read_images
from sppnet_jax.run.photo_results import photo_results
from tests.conftest import REPOSITORY

COLUMNS = ("label", "score")
FOUND = {"path": "a.jpg", "width": 9, "height": 7, "found": []}


@pytest.fixture
def photos(tmp_path, monkeypatch):
    names = ["b.JPG", "a.png", ".hidden.jpg", "notes.txt", "sub/c.jpg", "sub/d[1].jpg"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda p: p.symlink_to(p)])
def test_what_is_no_file_is_said_to_be_none_and_holds_nobody_up(make, tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.jpg")
    make(path)
    with pytest.raises(ValueError, match=r"a pipe or a device|a folder|symbolic links"):
        read_image(path)
    ((given, error),) = read_images([str(path)])
    assert given == str(path)
    assert isinstance(error, ValueError)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (["."], ["./a.png", "./b.JPG"]),
        (["sub/"], ["sub/c.jpg", "sub/d[1].jpg"]),
        (["*.*g"], ["a.png"]),
        (["**/*.jpg"], ["sub/c.jpg", "sub/d[1].jpg"]),
        (["sub/d[1].jpg"], ["sub/d[1].jpg"]),
        (["b.JPG", "*.JPG", "a.png", "b.JPG"], ["b.JPG", "a.png"]),
        (["absent.jpg", "notes.txt"], ["absent.jpg", "notes.txt"]),
    ],
)
def test_folders_and_patterns_are_the_photographs_in_them(given, found, photos):
    assert cli.given_photos(given) == found


def test_a_folder_and_a_pattern_may_be_in_the_home_folder(photos, monkeypatch):
    monkeypatch.setenv("HOME", str(photos))
    assert cli.given_photos(["~/sub"])[0] == str(photos / "sub/c.jpg")
    assert cli.given_photos(["~/*.png"]) == [str(photos / "a.png")]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("*.webp", r"'\*\.webp' matches no file: give photographs, a folder"),
        ("empty", "'empty' holds no image files .*jpeg"),
    ],
)
def test_where_there_are_no_photographs_it_is_said_so(given, message, photos):
    (photos / "empty/folder").mkdir(parents=True)
    with pytest.raises(ValueError, match=message):
        cli.given_photos(["a.png", given])


def test_the_json_file_is_whole_after_each_photograph(tmp_path):
    path = tmp_path / "new" / "found.json"
    told = [
        {**FOUND, "found": [{"label": 'a "big" cat, Čeština', "score": 0.5}] * 2},
        {"path": "b\udcff.jpg", "error": "not an image"},
        FOUND,
    ]
    with photo_results(path, COLUMNS) as write:
        assert json.loads(path.read_text()) == []
        for count, photo in enumerate(told, start=1):
            write(photo)
            assert json.loads(path.read_text()) == told[:count]


def test_the_csv_file_has_a_line_for_each_thing_that_is_found(tmp_path):
    path = tmp_path / "found.CSV"
    with photo_results(path, COLUMNS) as write:
        write({**FOUND, "found": [{"label": "a, b", "score": 0.5}, {"label": "c"}]})
        write({"path": "b\udcff.jpg", "error": "line\nbreak"})
        write(FOUND)
        with path.open(newline="") as file:  # before it is closed
            lines = list(csv.reader(file))
    assert lines == [
        ["path", "width", "height", "label", "score", "error"],
        ["a.jpg", "9", "7", "a, b", "0.5", ""],
        ["a.jpg", "9", "7", "c", "", ""],
        ["b\\udcff.jpg", "", "", "", "", "line\nbreak"],
        ["a.jpg", "9", "7", "", "", ""],
    ]


@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_what_was_found_before_an_interruption_is_kept(suffix, tmp_path):
    path = tmp_path / f"found{suffix}"
    path.write_text("x" * 10_000)  # of another run

    def interrupted():
        with photo_results(path, COLUMNS) as write:
            write(FOUND)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=f"done: 1, kept in .*found{suffix}"):
        interrupted()
    kept = path.read_text()
    if suffix == ".json":
        assert json.loads(kept) == [FOUND]
    else:
        assert kept.splitlines()[1:] == ["a.jpg,9,7,,,"]


@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_results_on_a_full_disk_name_their_file(suffix, tmp_path):
    path = tmp_path / f"full{suffix}"
    path.symlink_to("/dev/full")

    def write_one():
        with photo_results(path, COLUMNS) as write:
            write(FOUND)

    with pytest.raises(OSError, match=f"full{suffix} can't be written: No space"):
        write_one()


@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_what_fits_on_a_disk_that_fills_up_is_whole(suffix, tmp_path, monkeypatch):
    path, room = tmp_path / f"found{suffix}", 300
    pwrite = os.pwrite

    def write(file, data, place):
        if place + len(data) > room:
            data = data[: max(0, room - place)]  # as much as fits, then an error
        if not data:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(file, data, place)

    def write_many():
        nonlocal done
        with photo_results(path, COLUMNS) as write_one:
            for _ in range(40):
                write_one(FOUND)
                done += 1

    monkeypatch.setattr(os, "pwrite", write)
    done = 0
    with pytest.raises(OSError, match="can't be written: No space"):
        write_many()
    assert done > 2
    if suffix == ".json":
        assert json.loads(path.read_text()) == [FOUND] * done
    else:
        assert path.read_text().splitlines()[1:] == ["a.jpg,9,7,,,"] * done


def test_two_processes_do_not_write_one_file(tmp_path):
    path = tmp_path / "found.json"
    with photo_results(path, COLUMNS) as write:
        write(FOUND)
        with (
            pytest.raises(OSError, match="is being written by another process"),
            photo_results(path, COLUMNS),
        ):
            pass
        assert json.loads(path.read_text()) == [FOUND]


def test_results_are_written_to_known_formats_or_nowhere():
    with photo_results(None, COLUMNS) as write:
        write(FOUND)
    with (
        pytest.raises(ValueError, match=r"\.json or \.csv, not to 'found\.txt'"),
        photo_results(Path("found.txt"), COLUMNS),
    ):
        pass


@pytest.mark.parametrize("side", [224, 480])
def test_photographs_of_any_size_fit_one_of_a_few_buckets(side):
    buckets = photo_buckets(side)
    assert len(set(buckets)) <= 8
    padding = []
    for long in range(30, 200):
        for size in ((30, long), (long, 30)):
            height, width = whole_size(*size, side, 4.0)
            bucket = smallest_bucket((height, width), buckets)
            padding.append(bucket[0] * bucket[1] / (height * width))
    assert max(padding) < 1.6
    # Cameras' sizes, and those that others shrink them to.
    for height, width in [(3024, 4032), (374, 500), (375, 500), (720, 1280)]:
        bucket = smallest_bucket(whole_size(height, width, side, 4.0), buckets)
        assert bucket[0] * bucket[1] < 1.03 * side**2 * width / height


def test_no_experiment_has_a_flag_of_the_commands():
    """absl refuses to define one twice, and only as a command is it defined."""
    found = {}
    for file in [
        REPOSITORY / "sppnet_jax/cli.py",
        *REPOSITORY.glob("experiments/*.py"),
    ]:
        calls = re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", file.read_text())
        found[file.name] = set(calls)
    of_commands = found.pop("cli.py")
    assert "out" in of_commands
    assert {name: own & of_commands for name, own in found.items() if own} == {
        name: set() for name, own in found.items() if own
    }


def test_a_file_of_results_is_of_commands_on_photographs_only(command_line):
    told = command_line(
        "train", "--config=configs/digits.py", "--out=found.json", check=False
    ).stderr
    assert "--out writes what is found in photographs" in told
