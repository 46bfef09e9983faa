"""Files are whole or not there, whoever writes them at the same time."""

import json
import os
import threading

import numpy as np
import pytest

from sppnet_jax.run.files import (
    fitting,
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
