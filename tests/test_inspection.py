"""What people look at before they train says what is in a folder, and shows it."""

import os
import re

import cv2
import numpy as np
import pytest
from data_helpers import (
    encode,
    picture,
    voc_object,
    voc_xml,
    write_class_folders,
    write_images,
    write_voc_folder,
)

from sppnet_jax.data import inspection
from sppnet_jax.data.inspection import draw_contact_sheet, inspect_folder, report


def table_of(text):
    """The rows of a report's tables, by their first cell."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if "|" in line]
    return {row[0]: row[1:] for row in rows}


def write_boxes(root):
    """Six images of cats, the third of which has a dog too, and a broken one."""
    cat, dog = voc_object((1, 1, 8, 4)), voc_object((5, 3, 14, 9), "dog", difficult="1")
    texts = dict.fromkeys("abdef", voc_xml(cat))
    texts |= {"c": voc_xml(cat, dog, voc_object((5, 5, 5, 9))), "g": voc_xml()}
    lists = {"trainval.txt": "a\nb\nc\ng\n", "test.txt": "d\ne\nf\n"}
    write_voc_folder(root, texts, lists)
    path = root / "JPEGImages/f.png"
    path.write_bytes(path.read_bytes()[:-20])
    return root


def test_a_report_counts_objects_by_class_and_split(tmp_path):
    found = inspect_folder(write_boxes(tmp_path))
    assert found.kind == "voc_folder"
    text = report(found)
    rows = table_of(text)
    assert rows["objects of each class"] == ["trainval", "test"]
    assert rows["cat"] == ["3", "2"]
    assert rows["dog"] == ["1", "0"]
    assert rows["all objects"] == ["4", "2"]
    assert rows["difficult"] == ["1", "0"]
    assert rows["images"] == ["4", "2"]
    assert rows["images without objects"] == ["1", "0"]
    assert rows["images' height"] == ["24"] * 5
    assert rows["images' width"] == ["32"] * 5
    # Boxes of 4 rows, and one of 7.
    assert rows["boxes' height"][0::4] == ["4", "7"]
    assert "100.0% small" in text
    for note in (
        "- 1 boxes had xmin = xmax",
        "- 1 images could not be opened: left out (such as JPEGImages/f.png)",
        "- 1 images have no object left: kept",
    ):
        assert note in text


def test_a_report_on_class_folders_counts_images(tmp_path):
    write_class_folders(tmp_path, 10)
    (tmp_path / "cat/03.png").write_bytes(b"no image")
    (tmp_path / "cat/notes.txt").write_text("x")
    found = inspect_folder(tmp_path)
    text = report(found)
    rows = table_of(text)
    assert rows["images of each class"] == ["train", "test"]
    assert (rows["cat"], rows["dog"]) == (["8", "2"], ["8", "2"])
    assert rows["all images"] == ["16", "4"]
    assert sum(map(int, rows["images that can't be opened"])) == 1
    assert "ignored 1 files that are not images" in text
    assert "every 5th image of each class, 4 of 20, is held out" in text


def test_a_folder_of_two_formats_is_inspected_as_it_is_told(tmp_path):
    write_boxes(tmp_path)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    with pytest.raises(ValueError, match="boxes in 2 formats"):
        inspect_folder(tmp_path)
    assert inspect_folder(tmp_path, "voc_folder").kind == "voc_folder"


def test_a_folder_of_nothing_known_says_what_was_expected(tmp_path):
    write_images(tmp_path, "a.png", "b.png")
    with pytest.raises(ValueError, match=r"2 images that are in no class folder.*Nor "):
        inspect_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        inspect_folder(tmp_path / "nowhere")


def test_a_contact_sheet_shows_every_class(tmp_path, monkeypatch):
    """Boxes are there where they are drawn: a sheet without them differs."""
    names = [f"{number:03d}" for number in range(60)]
    texts = {name: voc_xml(voc_object((3, 3, 30, 22))) for name in names}
    texts["059"] = voc_xml(voc_object((3, 3, 30, 22), "dog", difficult="1"))
    write_voc_folder(tmp_path / "voc", texts)
    found = inspect_folder(tmp_path / "voc")
    drawn = []
    draw = inspection._draw_objects
    monkeypatch.setattr(
        inspection, "_draw_objects", lambda *given: drawn.append(given) or draw(*given)
    )
    path = draw_contact_sheet(found, tmp_path / "new/sheet.png")
    assert len(drawn) == inspection.SHOWN
    labels = {int(label) for _, objects, _ in drawn for label in objects.labels}
    assert labels == {0, 1}
    sheet = cv2.imread(str(path))
    monkeypatch.setattr(inspection, "_draw_objects", lambda *given: None)
    bare = cv2.imread(str(draw_contact_sheet(found, tmp_path / "bare.png")))
    assert sheet.shape == bare.shape
    assert np.abs(sheet.astype(int) - bare).max() > 50


def test_the_command_prints_and_draws(tmp_path, command_line):
    root = write_boxes(tmp_path / "animals")
    result = command_line("inspect", root, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr
    assert "voc_folder, 2 classes" in result.stdout
    assert "picture: animals_contact_sheet.png" in result.stdout
    assert cv2.imread(str(tmp_path / "animals_contact_sheet.png")).std() > 10
    write_images(tmp_path / "flat", "a.png")
    result = command_line("inspect", tmp_path / "flat", check=False)
    assert result.returncode == 1
    assert "error: no class folders" in result.stderr


def test_a_folder_that_is_read_as_boxes_has_odd_images_in_the_sheet(tmp_path):
    """One row, one column, a needle: all have a place."""
    texts = {key: voc_xml(voc_object((1, 1, 1.5, 1.5)), size=None) for key in "abc"}
    write_voc_folder(tmp_path, texts)
    for key, size in {"a": (1, 1), "b": (1, 300), "c": (300, 2)}.items():
        (tmp_path / f"JPEGImages/{key}.png").write_bytes(encode(picture(*size)))
    found = inspect_folder(tmp_path)
    assert cv2.imread(str(draw_contact_sheet(found, tmp_path / "x.png"))) is not None


ODD_NAMES = ("a|b", "$x_$", "_y_", "traffic_light", "w*", "images", "ワニ", "é" * 115)


def test_any_class_name_is_right_in_the_tables(tmp_path):
    """GitHub's tables: an unescaped bar ends a cell, a backslash takes markup away."""
    write_class_folders(tmp_path, 5, " ".join(ODD_NAMES))
    lines = report(inspect_folder(tmp_path)).splitlines()
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if "|" in line]
    cells = [row[0].strip() for row in rows if row[1:] == [" 4 ", " 1 "]]
    assert sorted(re.sub(r"\\(.)", r"\1", cell) for cell in cells) == sorted(ODD_NAMES)
    assert {r"a\|b", r"\$x\_\$", r"\_y\_", "traffic_light", r"w\*"} <= set(cells)


def test_images_that_are_odd_but_read_are_noted_once(tmp_path):
    write_boxes(tmp_path)
    image = encode(picture(), ".jpg")
    (tmp_path / "JPEGImages/a.png").write_bytes(image[:-2])
    notes = [note for note in inspect_folder(tmp_path).notes if "but odd" in note]
    assert len(notes) == 1
    assert "JPEGImages/a.png: read, but odd: a JPEG with all its data" in notes[0]


def test_a_terminal_that_lacks_letters_ends_no_command(tmp_path, command_line):
    name = os.fsdecode(b"caf\xe9")  # no text in UTF-8
    write_class_folders(tmp_path / "ワニ×", 5, f"{name} ワニ")
    result = command_line(
        "inspect",
        tmp_path / "ワニ×",
        f"--picture={tmp_path}/ワニ×.png",
        environment={"PYTHONIOENCODING": "ascii"},
        imported=False,  # Python reads it when it starts
    )
    assert r"| caf\\xe9 | 4 | 1 |" in result.stdout
    assert (tmp_path / "ワニ×.png").exists()
