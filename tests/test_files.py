"""Files are whole or not there, whoever writes them at the same time."""

import json
import os
import shutil
import threading

import numpy as np
import pytest

from sppnet_jax.run.files import (
    all_tried,
    check_can_write,
    check_space,
    fitting,
    read_array,
    read_arrays,
    table_cell,
    whole_file,
    write_array,
    write_arrays,
    write_json,
    write_text,
)

ROUNDS = 60


def write_whole_arrays(path, number):
    write_arrays(path, numbers=np.full(20_000, number))


def read_whole_arrays(path):
    numbers = read_arrays(path)["numbers"]
    assert len(numbers) == 20_000
    return set(numbers.tolist())


def write_whole_json(path, number):
    write_json(path, [number] * 20_000)


def read_whole_json(path):
    numbers = json.loads(path.read_text())
    assert len(numbers) == 20_000
    return set(numbers)


@pytest.mark.parametrize(
    ("write", "read"),
    [(write_whole_arrays, read_whole_arrays), (write_whole_json, read_whole_json)],
)
def test_two_that_write_one_file_never_leave_a_mixture(write, read, tmp_path):
    path = tmp_path / "file"
    write(path, 0)
    errors = []
    start = threading.Barrier(3)

    def work(number):
        try:
            start.wait()
            for _ in range(ROUNDS):
                write(path, number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    start.wait()
    reads = 0
    while any(thread.is_alive() for thread in threads):
        assert len(read(path)) == 1
        reads += 1
    for thread in threads:
        thread.join()
    assert not errors
    assert reads > 5
    assert read(path) in ({1}, {2})
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [None, b"whole"])
def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(
    before, failure, tmp_path
):
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)

    def fail():
        with whole_file(path) as file:
            file.write(b"half")
            file.flush()
            raise failure

    with pytest.raises(failure):
        fail()
    found = {one.name: one.read_bytes() for one in tmp_path.iterdir()}
    assert found == ({} if before is None else {"file": before})


def test_what_was_written_is_read(tmp_path):
    folder = tmp_path / "new" / "folder"
    write_json(folder / "value.json", {"a": [1, None]})
    assert json.loads((folder / "value.json").read_text()) == {"a": [1, None]}
    write_text(folder / "value.txt", "α\n")
    assert (folder / "value.txt").read_text() == "α\n"
    write_array(folder / "array.npy", np.arange(3))
    np.testing.assert_array_equal(np.load(folder / "array.npy"), np.arange(3))
    write_arrays(folder / "arrays.npz", a=np.arange(3), b=np.zeros((0, 2)))
    found = read_arrays(folder / "arrays.npz")
    assert {name: array.shape for name, array in found.items()} == {
        "a": (3,),
        "b": (0, 2),
    }


@pytest.mark.parametrize("name", ["a" * 251 + ".txt", "é" * 125 + ".txt", "b.c"])
def test_a_name_that_a_file_can_have_stays_as_it_is(name, tmp_path):
    assert fitting(tmp_path / name) == tmp_path / name


@pytest.mark.parametrize("letter", ["a", "é", "熊", "𝄞", os.fsdecode(b"\xe9")])
def test_a_name_that_is_too_long_for_a_file_is_cut_and_stays_different(
    letter, tmp_path
):
    paths = [tmp_path / f"{letter * 300}{number}.txt" for number in range(3)]
    cut = [fitting(path) for path in paths]
    assert len(set(cut)) == 3
    for path in cut:
        path.write_text("x")  # the file system takes it
        assert path.suffix == ".txt"


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("traffic_light", "traffic_light"),
        ("_x_", r"\_x\_"),
        ("a|b\\c", r"a\|b\\c"),
        ("5$ *b* `c` <d> ~e~", r"5\$ \*b\* \`c\` \<d> \~e\~"),
        ("two\nlines", "two lines"),
        ("ワニ", "ワニ"),
    ],
)
def test_no_name_is_taken_for_markup_in_a_table(text, cell):
    assert table_cell(text) == cell


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file/x.npz", "File exists|Not a directory"),
        ("folder", "Is a directory|it is a folder"),
        ("n" * 256, "name too long"),
        ("deep/" + "n" * 256 + "/x", "name too long"),
        ("loop/x", "File exists|symbolic links"),
    ],
)
def test_what_can_t_be_written_is_told_before_and_when_it_is_written(
    name, message, tmp_path
):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    path = tmp_path / name
    for write in (check_can_write, lambda path: write_text(path, "text")):
        with pytest.raises(OSError, match=f"(?i){path.parent}.* can't .*: .*{message}"):
            write(path)


def test_what_can_be_written_is_left_as_it_was_by_the_check(tmp_path):
    for name in ("n" * 255, "日" * 85, "new/folder/file"):
        path = tmp_path / name
        check_can_write(path)
        assert not path.exists()
        write_text(path, "before")
        check_can_write(path)
        assert [path.read_text(), *path.parent.glob(".*")] == ["before"]


def test_a_full_disk_is_told_with_the_space_that_is_needed(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path).free
    array = np.zeros(1000)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 7999)
    )
    with pytest.raises(OSError, match=r"array\.npy can't be written: it takes 0\.0 MB"):
        write_array(tmp_path / "array.npy", array)
    with pytest.raises(OSError, match="can't be written"):
        write_arrays(tmp_path / "arrays.npz", array=array)
    assert not os.listdir(tmp_path)
    write_arrays(tmp_path / "arrays.npz", array=array[:900])
    monkeypatch.undo()
    check_space(tmp_path / "file", free // 2)
    with pytest.raises(OSError, match=f"takes {2 * free / 1e6:,.1f} MB, and the disk"):
        check_space(tmp_path / "file", 2 * free)


def test_one_file_that_fails_loses_no_other(tmp_path):
    def write_all():
        with all_tried() as attempt:
            for name in ("a", "b/c", "d"):
                attempt(write_text, tmp_path / name, name)

    (tmp_path / "b").touch()
    with pytest.raises(OSError, match="b/c can't be written"):
        write_all()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "d"}


@pytest.mark.parametrize("content", [b"", b"PK", b"\x93NUMPY", b"\x80\x04K\x01."])
def test_a_damaged_file_of_arrays_is_named(content, tmp_path):
    path = tmp_path / "arrays.npz"
    write_arrays(path, a=np.arange(300))
    write_array(tmp_path / "array.npy", np.arange(300))
    (tmp_path / "array.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"array\.npy is damaged"):
        read_array(tmp_path / "array.npy")
    whole = path.read_bytes()
    for damaged in (
        content,
        whole[:40],
        whole[:-9],
        whole.replace(b"descr", b"d\0scr"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"arrays\.npz is damaged"):
            read_arrays(path)
