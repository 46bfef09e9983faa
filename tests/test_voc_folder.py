"""Any folder in VOC layout becomes a data set, and nothing in it is lost silently."""

import io
import logging
import os
import re
import unicodedata
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from data_helpers import (
    encode,
    exchange,
    picture,
    voc_object,
    voc_xml,
    write_voc_folder,
)

from sppnet_jax.data import voc_folder
from sppnet_jax.data.images import decode_image
from sppnet_jax.data.sources import available_splits, open_detection_source, open_source
from sppnet_jax.data.voc_annotations import read_image
from sppnet_jax.data.voc_folder import (
    read_annotations,
    scan_folder,
)

# VOC's (5, 3, 14, 9) as a half-open box.
BOX = (2.0, 4.0, 9.0, 14.0)
GOOD = voc_xml(voc_object())


def read_folder(root):
    scan = scan_folder(root)
    annotations = read_annotations(scan)
    return annotations._replace(notes=scan.notes + annotations.notes)


def read_one(root, xml, **options):
    """The image of an annotation, None if it is left out, and all notes on it."""
    ids = "".join(f"{key}\n" for key in ("odd", "good", "fine"))
    annotations = {"odd": xml, "good": GOOD, "fine": GOOD}
    write_voc_folder(root, annotations, {"train.txt": ids}, **options)
    found = read_folder(root)
    return found.images.get("JPEGImages/odd.png"), "\n".join(found.notes)


def test_a_box_becomes_half_open(tmp_path):
    """VOC's pixels count from 1 and include both ends: 1 to 32 are all 32 columns."""
    whole = voc_object((1, 1, 32, 24), "dog")
    image, notes = read_one(tmp_path, voc_xml(voc_object(), whole))
    assert image.size == (24, 32)
    assert [(one.name, one.box) for one in image.objects] == [
        ("cat", BOX),
        ("dog", (0.0, 0.0, 24.0, 32.0)),
    ]
    assert not notes


@pytest.mark.parametrize(
    ("box", "expected", "note"),
    [
        ((5.5, 3.25, "14.0", " 9.75 "), (2.25, 4.5, 9.75, 14.0), ""),
        ((0, 0, 14, 9), (0, 0, 9, 14), "1 boxes reached past .* by at most a pixel"),
        ((5, 3, 33, 25), (2, 4, 24, 32), "1 boxes reached past .* by at most a pixel"),
        ((5, 3, 34, 9), (2, 4, 9, 32), "1 boxes reached past the image's border: cla"),
        ((-9, -9, 99, 99), (0, 0, 24, 32), "1 boxes reached past .* border: clamped"),
        ((14, 9, 5, 3), BOX, "1 boxes had xmin > xmax or ymin > ymax: put right"),
        ((14, 3, 5, 9), BOX, "1 boxes had xmin > xmax or ymin > ymax: put right"),
        ((33, 3, 40, 9), None, "1 boxes lay wholly outside the image: dropped"),
        ((5, -9, 14, 0), None, "1 boxes lay wholly outside the image: dropped"),
        ((5, 3, 5, 9), None, "1 boxes had xmin = xmax or ymin = ymax.*: dropped"),
        ((5, 9, 14, 9), None, "1 boxes had xmin = xmax or ymin = ymax.*: dropped"),
        ((0, 0, 0, 0), None, "1 boxes had xmin = xmax or ymin = ymax.*: dropped"),
        ((5, None, 14, 9), None, "1 boxes lacked a coordinate.*: dropped"),
        ((5, "nan", 14, 9), None, "1 boxes lacked a coordinate.*: dropped"),
        ((5, 3, "inf", 9), None, "1 boxes lacked a coordinate.*: dropped"),
        ((5, 3, "wide", 9), None, "1 boxes lacked a coordinate.*: dropped"),
        ((5, "", 14, 9), None, "1 boxes lacked a coordinate.*: dropped"),
        ((5, 3, "1e300", 9), (2, 4, 9, 32), "1 boxes reached past .* border: clamped"),
    ],
)
def test_an_odd_box_is_put_right_or_dropped_and_counted(tmp_path, box, expected, note):
    image, notes = read_one(tmp_path, voc_xml(voc_object(box)))
    assert [one.box for one in image.objects] == ([expected] if expected else [])
    # An image that is left without objects is kept, and counted once more.
    assert len(notes.splitlines()) == bool(note) + (expected is None)
    if note:
        assert re.search(rf"{note}.*\(such as Annotations/odd.xml\)", notes)


def test_an_object_may_say_little_of_itself(tmp_path):
    bare = voc_object(pose=None, truncated=None, difficult=None)
    unnamed = voc_object(name="")
    blank = voc_object(name="  ")
    no_box = "<object><name>cat</name></object>"
    image, notes = read_one(
        tmp_path, voc_xml(bare, unnamed, blank, no_box, voc_object(pose="Upside"))
    )
    assert [one._replace(box=()) for one in image.objects] == [
        ("cat", (), "unspecified", False, False),
        ("cat", (), "unspecified", True, False),
    ]
    assert "1 objects did not say, or not clearly, whether they are difficult" in notes
    assert "2 objects had no name: dropped" in notes
    assert "1 boxes lacked a coordinate" in notes


@pytest.mark.parametrize(
    ("text", "difficult", "told"),
    [
        ("0", False, True),
        ("1", True, True),
        (" 1\n", True, True),
        ("true", True, True),
        ("True", True, True),
        ("False", False, True),
        ("yes", True, True),
        ("no", False, True),
        ("", False, False),
        ("Unspecified", False, False),
    ],
)
def test_difficult_is_told_in_many_words(tmp_path, text, difficult, told):
    image, notes = read_one(tmp_path, voc_xml(voc_object(difficult=text)))
    assert image.objects[0].is_difficult is difficult
    assert ("difficult" in notes) is not told


def test_parts_of_an_object_are_no_objects(tmp_path):
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    backwards = (
        f"<object>{part}<bndbox><ymax>9</ymax><xmax>14</xmax><ymin>3</ymin>"
        "<xmin>5</xmin></bndbox><difficult>0</difficult><name>cat</name></object>"
    )
    image, notes = read_one(tmp_path, voc_xml(backwards))
    assert [(one.name, one.box) for one in image.objects] == [("cat", BOX)]
    assert not notes


def test_an_image_without_objects_is_kept_as_background(tmp_path):
    image, notes = read_one(tmp_path, voc_xml())
    assert image.objects == ()
    assert "1 images have no object left: kept, all of it background" in notes


NAME = "Bär熊"
NAMED = voc_xml(voc_object(name=NAME))


@pytest.mark.parametrize(
    "xml",
    [
        b"\xef\xbb\xbf" + NAMED.encode(),
        b"\n \n<?xml version='1.0'?>" + NAMED.encode(),
        b"\xef\xbb\xbf\r\n\r\n<?xml version='1.0'?>\r\n" + NAMED.encode() + bytes(99),
        b"\r\n\xef\xbb\xbf<?xml version='1.1'?>" + NAMED.encode() + b"\0\0\n",
        NAMED.encode("utf-16-le") + bytes(9),
        ('<?xml version="1.0" encoding="utf-16"?>\n' + NAMED).encode("utf-16")
        + bytes(10),
        b"<?xml version='1.0' encoding='latin-1'?>"
        + voc_xml(voc_object(name="B\xe4r")).encode("latin-1"),
        ('<?xml version="1.0" encoding="utf-16"?>' + NAMED).encode("utf-16"),
        ('<?xml version="1.0" encoding="GB18030"?>' + NAMED).encode("gb18030"),
        NAMED.replace("<annotation>", '<annotation xmlns="http://x.org/a">').encode(),
        NAMED.replace("<object>", "<!-- an object --><object>").encode(),
        NAMED.replace("object>", "Object>").encode(),
        NAMED.replace("<object>", "<objects><object>")
        .replace("</object>", "</object></objects>")
        .encode(),
    ],
)
def test_xml_may_be_written_in_many_ways(tmp_path, xml):
    image, notes = read_one(tmp_path, xml)
    ((name, box),) = [(one.name, one.box) for one in image.objects]
    assert (name in (NAME, "B\xe4r"), box) == (True, BOX)
    assert not notes


@pytest.mark.parametrize(
    "encoding", ["utf-16", "GB2312", "latin-1", "ascii", "klingon"]
)
def test_what_the_bytes_are_counts_before_what_is_declared(tmp_path, encoding):
    """As tools on Windows write: utf-16 over the bytes of UTF-8."""
    declared = f"\ufeff<?xml version='1.0' encoding='{encoding}'?>\n{NAMED}"
    image, notes = read_one(tmp_path, declared.encode())
    assert [(one.name, one.box) for one in image.objects] == [(NAME, BOX)]
    told = "1 annotations declared an encoding that isn't theirs: read by their bytes"
    assert told in notes


@pytest.mark.parametrize(
    "number", ["NaN", "inf", "-inf", "1e999", "-1e999", "1_0", "", "x"]
)
def test_what_is_no_finite_number_is_no_size_and_costs_its_box_only(tmp_path, number):
    sizes = voc_xml(voc_object(), size=(number, number))
    image, notes = read_one(tmp_path / "size", sizes)
    assert [one.box for one in image.objects] == [BOX]
    assert not notes
    odd = [
        voc_object([number if k == side else 9 for k in range(4)]) for side in range(4)
    ]
    image, notes = read_one(tmp_path / "box", voc_xml(voc_object(), *odd))
    assert [one.box for one in image.objects] == [BOX]
    assert "4 boxes lacked a coordinate, or it was no finite number" in notes


@pytest.mark.parametrize(
    ("box", "dropped"),
    [
        ((0.1, 0.2, 0.8, 0.9), True),
        ((0, 0, 1, 1), True),
        ((-0.01, 0, 1.01, 0.5), True),
        ((0.1, 0.2, 2, 2), False),
    ],
)
def test_shares_of_the_sides_are_not_taken_for_pixels(tmp_path, box, dropped):
    image, notes = read_one(tmp_path, voc_xml(voc_object(), voc_object(box)))
    assert len(image.objects) == 2 - dropped
    told = (
        "1 boxes lay between 0 and 1, as shares of the image's sides do and no pixels"
    )
    assert (told in notes) == dropped


def test_accents_in_both_forms_are_one_name(tmp_path):
    """Of files, of ids in lists, and of classes."""
    one, other = (unicodedata.normalize(form, "B\xe4r") for form in ("NFC", "NFD"))
    xml = voc_xml(voc_object(name=one), voc_object((1, 1, 5, 5), name=other))
    write_voc_folder(
        tmp_path, {one: xml, "good": GOOD}, {"train.txt": f"{other}\ngood"}
    )
    (tmp_path / f"Annotations/{one}.xml").rename(tmp_path / f"Annotations/{other}.xml")
    found = read_folder(tmp_path)
    assert found.class_names == (one, "cat")
    assert len(found.images) == 2
    assert not found.notes


@pytest.mark.parametrize("what", ["pipe", "folder"])
def test_what_is_no_file_is_left_out(tmp_path, what):
    """A pipe would be waited for without an end."""
    write_voc_folder(tmp_path, dict.fromkeys("abcdef", GOOD))
    scan = scan_folder(tmp_path)
    for path in ("JPEGImages/a.png", "Annotations/b.xml", "ImageSets/Main/train.txt"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).unlink(missing_ok=True)
        (os.mkfifo if what == "pipe" else os.mkdir)(tmp_path / path)
    found = read_annotations(scan)  # which changed after it was scanned
    assert len(found.images) == 4
    notes = "\n".join(found.notes)
    assert "1 images could not be opened: left out (such as JPEGImages/a.png)" in notes
    assert "1 annotations could not be parsed" in notes
    if what == "folder":
        assert len(read_folder(tmp_path).images) == 4


def test_bytes_that_are_no_text_do_not_cost_an_image(tmp_path):
    image, notes = read_one(tmp_path, GOOD.encode().replace(b"x.jpg", b"\xc4\xff.jpg"))
    assert [one.box for one in image.objects] == [BOX]
    assert "1 annotations held bytes that are no text" in notes


LAUGHS = "".join(
    f'<!ENTITY l{i} "{f"&l{i - 1};" * 10 if i else "ha"}">' for i in range(20)
)


@pytest.mark.parametrize(
    "xml",
    [
        "",
        "   \n",
        GOOD[:-20],
        GOOD.replace("<name>", "<name><"),
        "cat 0.5 0.5 0.2 0.2",
        "<annotations><image/></annotations>",
        '<!DOCTYPE a [<!ENTITY one "cat">]>' + GOOD.replace(">cat<", ">&one;<"),
        f"<!DOCTYPE a [{LAUGHS}]>" + GOOD.replace(">cat<", ">&l19;<"),
    ],
)
def test_an_annotation_that_cannot_be_parsed_leaves_its_image_out(tmp_path, xml):
    image, notes = read_one(tmp_path, xml)  # without expanding laughs, which would hang
    assert image is None
    assert "1 annotations could not be parsed: their images were left out" in notes
    assert "(such as Annotations/odd.xml)" in notes


@pytest.mark.parametrize("end", [0, 20, -30])
def test_an_image_that_cannot_be_opened_is_left_out(tmp_path, end):
    read_one(tmp_path, GOOD)
    path = tmp_path / "JPEGImages/odd.png"
    path.write_bytes(path.read_bytes()[:end])
    found = read_folder(tmp_path)
    assert len(found.images) == 2
    (note,) = found.notes
    assert "1 images could not be opened: left out (such as JPEGImages/odd.png)" in note


@pytest.mark.parametrize(
    ("told", "box", "note"),
    [
        (None, BOX, ""),
        ((0, 0), BOX, ""),
        (("", "wide"), BOX, ""),
        ((23, 33), BOX, "gave a size that isn't the image's"),
        ((100, 90), BOX, "gave a size that isn't the image's"),
        ((32, 24), BOX, "gave the image's width as its height"),
        ((48, 64), (1, 2, 4.5, 7), "their boxes were scaled"),
        ((12, 16), (4, 8, 18, 28), "their boxes were scaled"),
        ((12.0, 16.0), (4, 8, 18, 28), "their boxes were scaled"),
    ],
)
def test_a_size_that_is_not_the_images_scales_boxes_only_at_its_aspect(
    tmp_path, told, box, note
):
    image, notes = read_one(tmp_path, voc_xml(voc_object(), size=told))
    assert image.size == (24, 32)
    np.testing.assert_allclose(image.objects[0].box, box, rtol=1e-12)
    assert len(notes.splitlines()) == bool(note)
    assert note in notes


def test_a_size_rounded_otherwise_is_no_other_scale(tmp_path):
    xml = voc_xml(voc_object(), size=(239, 318))
    image, notes = read_one(tmp_path, xml, size=(240, 320))
    assert image.objects[0].box == BOX
    assert "gave a size that isn't the image's: their boxes were kept" in notes


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_on_an_image_before_its_rotation_turn_with_it(tmp_path, orientation):
    """A bright rectangle is where the decoder shows it, and so must its box be."""
    read_one(tmp_path, voc_xml(voc_object((9, 17, 24, 24), "light"), size=(48, 64)))
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[16:24, 8:24] = 255
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "jpeg", exif=exif, quality=100)
    (tmp_path / "JPEGImages/odd.png").write_bytes(buffer.getvalue())
    found = read_folder(tmp_path)
    image = found.images["JPEGImages/odd.png"]
    shown = decode_image(buffer.getvalue())
    assert image.size == shown.shape[:2] == (64, 48)
    rows, columns = np.nonzero(shown.mean(axis=2) > 127)
    bright = (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1)
    assert image.objects[0].box == bright
    assert any("1 annotations gave the image's size before" in n for n in found.notes)


def ids_of(root):
    return {
        split: [Path(files.image).stem for files in listed]
        for split, listed in scan_folder(root).splits.items()
    }


@pytest.mark.parametrize(
    "text",
    [
        "a\nb\n",
        "a\r\nb\r\n",
        "a  \n\n\t\nb",
        "\ufeffa\nb\n",
        "a.png\nb.xml\n",
        "JPEGImages/a.png\n/data/voc/JPEGImages/b.jpg\n",
        "C:\\data\\a.PNG\nb\n",
        "a\nb\n".encode("utf-16"),
    ],
)
def test_a_list_may_be_written_in_many_ways(tmp_path, text):
    write_voc_folder(tmp_path, {"a": GOOD, "b": GOOD}, {"train.txt": text})
    assert ids_of(tmp_path) == {"train": ["a", "b"]}
    assert not scan_folder(tmp_path).notes


def test_every_list_of_images_is_a_split_of_its_name(tmp_path):
    lists = {"trainval.txt": "a\nb", "Test.TXT": "c", "fold-1.txt": "a\nc"}
    lists |= {"all.txt": "b", "v1.0 new.txt": "c", "notes.md": "a"}
    write_voc_folder(tmp_path, dict.fromkeys("abc", GOOD), lists)
    expected = {"trainval": ["a", "b"], "Test": ["c"], "fold-1": ["a", "c"]}
    assert ids_of(tmp_path) == expected | {"all_": ["b"], "v1_0_new": ["c"]}
    notes = scan_folder(tmp_path).notes
    assert any("the list all.txt is split 'all_'" in note for note in notes)
    where = {"root": str(tmp_path)}
    assert available_splits("voc_folder", **where) == tuple(ids_of(tmp_path))
    for split, ids in ids_of(tmp_path).items():
        source = open_detection_source("voc_folder", split, **where)
        assert sorted(r["name"] for r in source.records) == [f"{i}.png" for i in ids]


def test_lists_of_one_class_are_no_splits(tmp_path):
    lists = {"train.txt": "a\nb 1\n", "cat_train.txt": "a\nb 1\n", "empty.txt": "\n"}
    # VOC's own have flags, of -1, 0 and 1; "b 1" is an image.
    lists |= {"dog_train.txt": "a  1\nb 1 -1\n", "x.txt": "a 0\na -1\n"}
    lists |= {"my_train.txt": "a\n", "one.txt": "b 1\n"}
    write_voc_folder(tmp_path, {"a": GOOD, "b 1": GOOD}, lists)
    assert ids_of(tmp_path) == {
        "my_train": ["a"],
        "one": ["b 1"],
        "train": ["a", "b 1"],
    }
    notes = " ".join(scan_folder(tmp_path).notes)
    assert "3 lists in ImageSets are of one class each: no splits" in notes
    assert "1 lists in ImageSets are empty" in notes


def test_an_id_listed_twice_counts_once(tmp_path):
    text = "a\nb\na\nb.png\n"
    write_voc_folder(tmp_path, {"a": GOOD, "b": GOOD}, {"train.txt": text})
    assert ids_of(tmp_path) == {"train": ["a", "b"]}
    (note,) = scan_folder(tmp_path).notes
    assert "2 images are in train.txt more than once: taken once" in note


def test_absent_files_are_left_out_and_counted(tmp_path):
    annotations = {"a": GOOD, "b": GOOD, "c": None, "unlisted": GOOD}
    write_voc_folder(tmp_path, annotations, {"train.txt": "a\nb\nc\ngone\n"})
    assert ids_of(tmp_path) == {"train": ["a", "b"]}
    notes = " ".join(scan_folder(tmp_path).notes)
    assert "1 images that train.txt lists are not in JPEGImages: left out" in notes
    assert "(such as gone)" in notes
    assert "1 images that train.txt lists have no XML in Annotations" in notes
    assert "(such as JPEGImages/c.png)" in notes
    assert "2 of 4 images in JPEGImages are in no split" in notes


def test_a_list_of_which_most_is_absent_is_an_error(tmp_path):
    lists = {"train.txt": "a\nx\ny\n"}
    write_voc_folder(tmp_path, {"a": GOOD}, lists)
    with pytest.raises(
        ValueError, match=r"only 1 of the 3 images of train.txt .*such as x, y"
    ):
        scan_folder(tmp_path)


def test_a_list_of_which_all_is_absent_is_no_split(tmp_path):
    """So are the test lists of those who downloaded VOC's training images only."""
    lists = {"train.txt": "a\n", "test.txt": "x\ny\n"}
    write_voc_folder(tmp_path, {"a": GOOD}, lists)
    assert ids_of(tmp_path) == {"train": ["a"]}
    assert any(
        "test.txt can be used: no split" in n for n in scan_folder(tmp_path).notes
    )
    (tmp_path / "JPEGImages/a.png").unlink()
    with pytest.raises(ValueError, match="no image with an annotation"):
        scan_folder(tmp_path)


def test_most_annotations_broken_is_an_error(tmp_path):
    annotations = {"a": GOOD, "b": "", "c": "<"}
    write_voc_folder(tmp_path, annotations, {"train.txt": "a\nb\nc\n"})
    with pytest.raises(ValueError, match=r"only 1 of the 3 .*2 annotations could not"):
        read_folder(tmp_path)


def test_a_folder_without_objects_is_an_error(tmp_path):
    write_voc_folder(tmp_path, {"a": voc_xml()}, {"train.txt": "a"})
    with pytest.raises(ValueError, match=r"1 annotations .* hold no object"):
        read_folder(tmp_path)


def test_an_image_to_train_and_to_test_on_is_told(tmp_path):
    lists = {"trainval.txt": "a\nb\n", "test.txt": "b\nc\n"}
    write_voc_folder(tmp_path, dict.fromkeys("abc", GOOD), lists)
    (note,) = scan_folder(tmp_path).notes
    assert "1 images are both in 'trainval' and 'test' (such as JPEGImages/b" in note


@pytest.mark.parametrize("lists", [None, {"cat_train.txt": "00 1\n01 -1\n"}])
def test_without_lists_every_fifth_image_is_held_out(tmp_path, lists):
    annotations = {f"{number:02d}": GOOD for number in range(11)} | {"alone": None}
    write_voc_folder(tmp_path, annotations, lists)
    (tmp_path / "Annotations/ghost.xml").write_text(GOOD)
    first = ids_of(tmp_path)
    assert {split: len(ids) for split, ids in first.items()} == {
        "trainval": 9,
        "test": 2,
    }
    assert sorted(first["trainval"] + first["test"]) == sorted(annotations)[:11]
    assert ids_of(tmp_path) == first
    notes = " ".join(scan_folder(tmp_path).notes)
    assert "every 5th image, 2 of 11, is held out as split 'test'" in notes
    assert "1 images have no XML in Annotations: left out" in notes
    assert "1 annotations have no image in JPEGImages" in notes


def test_images_of_any_suffix_are_found_by_their_id(tmp_path):
    for key, suffix in {"a": ".JPG", "b.v2": ".png", "sub/c": ".webp"}.items():
        (tmp_path / f"JPEGImages/{key}").parent.mkdir(parents=True, exist_ok=True)
        write_voc_folder(tmp_path, {key.replace("/", "_"): GOOD}, suffix=suffix.lower())
        source = tmp_path / f"JPEGImages/{key.replace('/', '_')}{suffix.lower()}"
        source.rename(tmp_path / f"JPEGImages/{key}{suffix}")
    (tmp_path / "Annotations/sub_c.xml").rename(tmp_path / "Annotations/c.xml")
    (tmp_path / "JPEGImages/a.png").write_bytes(encode(picture()))
    (tmp_path / "JPEGImages/notes.txt").write_bytes(b"x")
    lists = {"train.txt": "a\nb.v2\nsub/c\n"}
    write_voc_folder(tmp_path, {}, lists)
    (files,) = scan_folder(tmp_path).splits.values()
    assert [image for image, _ in files] == [
        f"JPEGImages/{name}" for name in ("a.JPG", "b.v2.png", "sub/c.webp")
    ]
    notes = " ".join(scan_folder(tmp_path).notes)
    assert "1 files in JPEGImages are not images: ignored" in notes
    assert "1 files in JPEGImages have the id of another: ignored" in notes


def test_classes_are_sorted_and_keep_their_case(tmp_path):
    names = ["tvmonitor", "aeroplane", "person", "Cat", "cat"]
    annotations = {
        str(number): voc_xml(voc_object(name=f" {name}\n"))
        for number, name in enumerate(names)
    }
    lists = {"train.txt": "0\n1\n", "test.txt": "2\n3\n4\n"}
    found = read_folder(write_voc_folder(tmp_path, annotations, lists))
    assert found.class_names == ("Cat", "aeroplane", "cat", "person", "tvmonitor")
    assert any("['Cat', 'cat'] differ only by case" in note for note in found.notes)


def test_the_one_folder_in_voc_layout_below_the_root_is_found(tmp_path):
    devkit = tmp_path / "x/VOCdevkit"
    write_voc_folder(devkit / "VOC2007", {"a": GOOD}, {"train.txt": "a"})
    (devkit / "results").mkdir()
    for root in (devkit / "VOC2007", devkit, tmp_path / "x"):
        scan = scan_folder(root)
        assert scan.root == devkit / "VOC2007"
    write_voc_folder(devkit / "VOC2012", {"a": GOOD}, {"train.txt": "a"})
    with pytest.raises(ValueError, match=r"2 folders .*VOC2007', '.*VOC2012'"):
        scan_folder(devkit)


def test_a_folder_that_is_not_in_voc_layout_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no VOC folder .*nowhere.*Expected"):
        scan_folder(tmp_path / "nowhere")
    (tmp_path / "voc.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"voc\.tar' is a file.*unpack"):
        scan_folder(tmp_path / "voc.tar")
    with pytest.raises(ValueError, match=r"has no folder JPEGImages. Expected"):
        scan_folder(tmp_path)
    write_voc_folder(tmp_path / "voc", {"a": GOOD})
    with pytest.raises(ValueError, match=r"Did you mean '.*/voc'\?"):
        scan_folder(tmp_path / "voc/JPEGImages")
    (tmp_path / "bare/JPEGImages").mkdir(parents=True)
    with pytest.raises(ValueError, match="has JPEGImages but no folder Annotations"):
        scan_folder(tmp_path / "bare")


def test_records_hold_the_files_own_bytes(tmp_path, caplog):
    certain = voc_object((5.5, 3.25, 14.75, 9), "dog")
    hidden = voc_object((1, 1, 32, 24), "cat", difficult="1")
    empty = voc_object((5, 5, 5, 5))
    annotations = {"a": voc_xml(certain, hidden, empty), "ü": voc_xml()}
    root = write_voc_folder(tmp_path / "voc", annotations, {"train.txt": "a\nü"})
    where = {"root": str(root)}
    with caplog.at_level(logging.WARNING):
        source = open_detection_source("voc_folder", "train", **where)
    assert "1 boxes had xmin = xmax" in caplog.text
    assert "1 images have no object left" in caplog.text
    assert source.class_names == ("cat", "dog")
    records = {record["name"]: record for record in source.records}
    assert records.keys() == {"a.png", "ü.png"}
    for name, record in records.items():
        assert record["image"] == (root / "JPEGImages" / name).read_bytes()
    boxes, labels, difficult = records["a.png"]["objects"]
    assert boxes.tolist() == [[2.25, 4.5, 9, 14.75], [0, 0, 24, 32]]
    assert (boxes.dtype, labels.dtype, difficult.dtype) == (float, np.int32, bool)
    assert labels.tolist() == [1, 0]
    assert difficult.tolist() == [False, True]
    assert records["a.png"]["labels"].tolist() == [0, 1]
    assert records["ü.png"]["objects"].boxes.shape == (0, 4)
    assert records["ü.png"]["labels"].tolist() == [-1, -1]
    labels = {
        record["name"]: record["labels"].tolist()
        for record in open_source("voc_folder", "train", multi_label=True, **where)[0]
    }
    assert labels == {"a.png": [0, 1], "ü.png": [-1, -1]}


def test_annotations_are_read_once_in_a_process(tmp_path, monkeypatch, caplog):
    reads = []
    monkeypatch.setattr(
        voc_folder,
        "read_image",
        lambda *files: reads.append(files) or read_image(*files),
    )
    lists = {"train.txt": "a\nb\n", "test.txt": "b\nc\n"}
    write_voc_folder(tmp_path, dict.fromkeys("abc", GOOD), lists)
    root = str(tmp_path)
    with caplog.at_level(logging.WARNING):
        for split in available_splits("voc_folder", root=root):
            open_detection_source("voc_folder", split, root=root)
            open_source("voc_folder", split, root=root, multi_label=True)
    assert len(reads) == 3
    assert caplog.text.count("images are both in 'train' and 'test'") == 1
    (tmp_path / "Annotations/b.xml").write_text(DOG)
    source = open_detection_source("voc_folder", "test", root=root)
    assert source.class_names == ("cat", "dog")


DOG = GOOD.replace("cat", "dog")


def digest_of(root, split="train"):
    digest = open_detection_source("voc_folder", split, root=str(root)).digest
    same = open_source("voc_folder", split, root=str(root), multi_label=True)
    assert same.digest == digest
    return digest


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "JPEGImages/a.png").write_bytes(encode(picture(24, 33))),
        lambda root: (root / "Annotations/a.xml").write_text(GOOD + "\n"),
        lambda root: (root / "Annotations/a.xml").write_text(DOG),
        lambda root: exchange(root / "JPEGImages/a.png", root / "JPEGImages/b.png"),
        lambda root: exchange(root / "Annotations/a.xml", root / "Annotations/b.xml"),
        lambda root: (root / "ImageSets/Main/train.txt").write_text("a\nc"),
    ],
    ids=["image", "size of XML", "class", "exchanged images", "exchanged XML", "list"],
)
def test_other_images_or_annotations_are_other_data(tmp_path, change):
    other = voc_xml(voc_object((1, 1, 9, 9)))
    annotations = {"a": GOOD, "b": other, "c": GOOD}
    write_voc_folder(tmp_path, annotations, {"train.txt": "a\nb"})
    first = digest_of(tmp_path)
    change(tmp_path)
    assert digest_of(tmp_path) != first


def test_the_same_files_elsewhere_and_touched_are_the_same_data(tmp_path):
    write_voc_folder(tmp_path / "a/VOC2007", {"a": GOOD}, {"train.txt": "a"})
    first = digest_of(tmp_path / "a")
    assert digest_of(tmp_path / "a/VOC2007") == first
    (tmp_path / "a").rename(tmp_path / "b")
    for path in (tmp_path / "b").rglob("*.*"):
        os.utime(path, ns=(1, 1))
    assert digest_of(tmp_path / "b") == first
