"""Any folder in YOLO's layout becomes a data set, and nothing is lost silently."""

import io
import unicodedata

import numpy as np
import PIL.Image
import pytest
from data_helpers import write_images

from sppnet_jax.data.images import decode_image
from sppnet_jax.data.sources import available_splits, open_detection_source
from sppnet_jax.data.yolo_folder import EVENTS, read_annotations, scan_folder

# Of pictures of 24 rows and 32 columns: rows 6 to 18, columns 8 to 24.
GOOD = "0 0.5 0.5 0.5 0.5\n"
BOX = (6.0, 8.0, 18.0, 24.0)
NAMES = "names: [cat, dog]\n"


def write(root, **labels):
    """images/KEY.png and labels/KEY.txt, None for none, under data.yaml."""
    write_images(root, *(f"images/{key}.png" for key in labels))
    write_texts(root, {f"labels/{key}.txt": text for key, text in labels.items()})
    if not (root / "data.yaml").exists():
        write_texts(root, {"data.yaml": NAMES})
    return root


def write_texts(root, texts):
    for path, text in texts.items():
        if text is not None:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            data = text if isinstance(text, bytes) else text.encode()
            (root / path).write_bytes(data)


def read_folder(root):
    scan = scan_folder(root)
    found = read_annotations(scan)
    return found._replace(notes=scan.notes + found.notes)


def read_one(root, text):
    """An image beside a good one, and the notes on all but splits."""
    found = read_folder(write(root, odd=text, good=GOOD + GOOD.replace("0 ", "1 ", 1)))
    notes = [note for note in found.notes if "is held out as split" not in note]
    return found.images["images/odd.png"], "\n".join(notes)


def test_a_box_is_a_centre_and_sides_as_shares(tmp_path):
    image, notes = read_one(
        tmp_path, "0 0.5 0.5 0.5 0.5\n\n 1\t0.25 .125 5e-1 0.25 \r\n"
    )
    assert [(one.name, one.box) for one in image.objects] == [
        ("cat", BOX),
        ("dog", (0.0, 0.0, 6.0, 16.0)),
    ]
    assert not any(one.is_difficult for one in image.objects)
    assert not notes


@pytest.mark.parametrize("digits", [5, 6, 8, 17])
def test_pixels_that_were_whole_are_so_again(tmp_path, digits):
    rng = np.random.default_rng(digits)
    height, width = 24, 32
    starts = rng.integers(0, (20, 28), (50, 2))
    boxes = np.concatenate([starts, starts + rng.integers(1, 5, (50, 2))], axis=1)
    lines = [
        f"0 {(x1 + x2) / 2 / width:.{digits}f} {(y1 + y2) / 2 / height:.{digits}f} "
        f"{(x2 - x1) / width:.{digits}f} {(y2 - y1) / height:.{digits}f}"
        for y1, x1, y2, x2 in boxes.tolist()
    ]
    image, notes = read_one(tmp_path, "\n".join(lines))
    assert [one.box for one in image.objects] == [tuple(map(float, b)) for b in boxes]
    assert not notes


def test_other_pixels_stay_as_they_are(tmp_path):
    image, _ = read_one(tmp_path, "0 0.51 0.52 0.33 0.34")
    box = 24 * (0.52 - 0.17), 32 * (0.51 - 0.165), 24 * (0.52 + 0.17), 32 * 0.675
    np.testing.assert_allclose(image.objects[0].box, box, rtol=1e-12)


@pytest.mark.parametrize(
    ("line", "box", "event"),
    [
        ("0 0.5 0.5 1.01 0.5", (6, 0, 18, 32), "touching"),
        ("0 0.5 0.5 1.5 1.5", (0, 0, 24, 32), "crossing"),
        ("0 0.5 0.5 -0.5 0.5", BOX, "swapped"),
        ("0 1.5 0.5 0.25 0.5", None, "outside"),
        ("0 0.5 0.5 0 0.5", None, "empty"),
        ("0 320 240 100 100", None, "no share"),
        ("0 0.5 0.5 1e300 0.5", None, "no share"),
        ("0 0.5 0.5 0.5 0.5 0.93", BOX, "score"),
        ("0.0 0.5 0.5 0.5 0.5", BOX, None),
        ("2 0.5 0.5 0.5 0.5", None, "no name"),
        ("-1 0.5 0.5 0.5 0.5", None, "no name"),
        ("1e300 0.5 0.5 0.5 0.5", None, "no name"),
        ("0.5 0.5 0.5 0.5 0.5", None, "broken line"),
        ("cat 0.5 0.5 0.5 0.5", None, "broken line"),
        ("nan 0.5 0.5 0.5 0.5", None, "broken line"),
        ("0 0.5 0.5 0.5", None, "broken line"),
        ("0", None, "broken line"),
        ("0,0.5,0.5,0.5,0.5", None, "broken line"),
        ("0 0.5 0.5 0.5 nan", None, "broken line"),
        ("0 0.5 0.5 0.5 -inf", None, "broken line"),
        ("0 0.5 0.5 0.5 0_5", None, "broken line"),
        ("0 0.5 0.5 1e309 0.5", None, "broken line"),
        ("0 0.5 0.5 0.5 wide", None, "broken line"),
        ("0 0.25 0.25 0.75 0.25 0.5 0.75", BOX, "extent"),
        ("1 0.25 0.75 0.75 0.25 0.5 0.3 0.6 0.7", BOX, "extent"),
        ("0 0.25 0.25 0.75 0.25 0.5 0.75 0.9", None, "broken line"),
        ("<html>", None, "broken line"),
    ],
)
def test_an_odd_line_is_put_right_or_dropped_and_counted(tmp_path, line, box, event):
    image, notes = read_one(tmp_path, line)
    np.testing.assert_allclose([one.box for one in image.objects], [box] if box else [])
    told = [event] * bool(event) + ["no object"] * (box is None)
    assert len(notes.splitlines()) == len(told)
    for one in told:
        assert f"1 {EVENTS[one]} (such as labels/odd.txt)" in notes


def test_keypoints_behind_a_box_are_no_polygon(tmp_path):
    write_texts(tmp_path, {"data.yaml": NAMES + "kpt_shape: [2, 3]\n"})
    image, _ = read_one(tmp_path, GOOD.strip() + " 0.1 0.1 2 0.9 0.9 1")
    assert [one.box for one in image.objects] == [BOX]


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbf" + GOOD.encode(),
        GOOD.encode("utf-16"),
        GOOD.encode("utf-16-be"),
        GOOD.encode() + b"\n\n",
        GOOD.encode() + bytes(99),
    ],
)
def test_text_may_be_written_in_many_ways(tmp_path, text):
    image, notes = read_one(tmp_path, text)
    assert [one.box for one in image.objects] == [BOX]
    assert not notes


def test_accents_in_both_forms_are_one_name(tmp_path):
    """Of images, label files, lists, folders and classes."""
    one, other = (unicodedata.normalize(form, "B\xe4r") for form in ("NFC", "NFD"))
    write_images(tmp_path, f"images/{one}/{one}.png", "images/good.png")
    label, good = f"labels/{other}/{other}.txt", "labels/good.txt"
    write_texts(tmp_path, {label: GOOD, good: GOOD.replace("0", "1", 1)})
    for names, lists in (
        (f"names: [{one}, {other}]\ntrain: images/{other}\nval: images", {}),
        (
            f"names: [{one}, {other}]\ntrain: a.txt\nval: b.txt",
            {"a.txt": f"./images/{other}/{other}.png", "b.txt": "good.png"},
        ),
    ):
        write_texts(tmp_path, {"data.yaml": names, **lists})
        scan = scan_folder(tmp_path)
        assert [len(files) for files in scan.splits.values()] == [
            1,
            2 - len(lists) // 2,
        ]
        found = read_annotations(scan)
        assert found.class_names == (one,)
        assert [len(image.objects) for image in found.images.values()] == [1, 1]
    write_images(tmp_path, f"images/{one}/{other}.png")  # of the same name: left out
    assert len(read_folder(tmp_path).images) == len(found.images)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_shares_are_of_the_image_as_it_is_shown(tmp_path, orientation):
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[8:24, 8:24] = 255
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "jpeg", exif=exif, quality=100)
    shown = decode_image(buffer.getvalue())
    rows, columns = np.nonzero(shown.mean(axis=2) > 127)
    box = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
    y, x = (np.array(box[:2]) + box[2:]) / 2 / shown.shape[:2]
    high, wide = np.subtract(box[2:], box[:2]) / shown.shape[:2]
    write(tmp_path, odd=f"0 {x:.6f} {y:.6f} {wide:.6f} {high:.6f}", good=GOOD)
    (tmp_path / "images/odd.png").write_bytes(buffer.getvalue())
    assert read_folder(tmp_path).images["images/odd.png"].objects[0].box == box


def test_an_image_with_an_empty_label_file_or_none_is_background(tmp_path):
    found = read_folder(write(tmp_path, a=GOOD, empty="\n", none=None))
    assert found.images["images/empty.png"].objects == ()
    assert found.images["images/none.png"].objects == ()
    notes = " ".join(found.notes)
    assert f"1 {EVENTS['no object']} (such as labels/empty.txt)" in notes
    assert f"1 {EVENTS['no label file']} (such as images/none.png)" in notes


def test_an_image_that_cannot_be_opened_is_left_out(tmp_path):
    write(tmp_path, a=GOOD, b=GOOD, c=GOOD)
    (tmp_path / "images/b.png").write_bytes(b"\x89PNG")
    found = read_folder(tmp_path)
    assert set(found.images) == {"images/a.png", "images/c.png"}
    assert any(f"1 {EVENTS['broken image']}" in note for note in found.notes)


def test_labels_of_no_image_are_told(tmp_path):
    write(tmp_path, a=GOOD)
    write_texts(tmp_path, {"labels/ghost.txt": GOOD, "README.txt": "x"})
    notes = [note for note in scan_folder(tmp_path).notes if "label files" in note]
    assert len(notes) == 1
    assert "1 label files have no image in a split: left out" in notes[0]


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        ({"data.yaml": "names: [cat, 'no', 3]"}, ("3", "cat", "no")),
        ({"data.yaml": "names:\n- cat\n- no\n- 3\nnc: 3"}, ("3", "cat", "no")),
        ({"data.yaml": "names: {2: 3, 1: no, 0: cat}"}, ("3", "cat", "no")),
        ({"my.yml": "names: {'0': cat, '1': no, '2': '3'}"}, ("3", "cat", "no")),
        ({"data.yaml": "nc: 3", "classes.txt": "cat\n no \n3\n\n"}, ("3", "cat", "no")),
        ({"labels/classes.txt": "cat\nno\n3"}, ("3", "cat", "no")),
        ({"hyp.yaml": "lr: 1", "obj.names": "cat\r\nno\r\n3\r\n"}, ("3", "cat", "no")),
        (
            {"hyp.yaml": "lr: 1", "x/data.yaml": "names: [cat, no, 3]"},
            ("3", "cat", "no"),
        ),
        ({}, ("0", "1", "2")),
    ],
)
def test_classes_are_named_in_many_places(tmp_path, texts, names):
    lines = "".join(GOOD.replace("0 ", f"{n} ", 1) for n in range(3))
    write_images(tmp_path, "images/a.png", "images/b.png")
    write_texts(tmp_path, {"labels/a.txt": lines} | texts)
    found = read_folder(tmp_path)
    assert found.class_names == names
    told = any("has no names of classes, in data.yaml" in note for note in found.notes)
    assert told is not bool(texts)


def test_names_in_bytes_that_are_no_text_can_be_shown(tmp_path):
    write_texts(tmp_path, {"classes.txt": "B\xe4r\n".encode("latin-1")})
    write_images(tmp_path, "images/a.png", "images/b.png")
    write_texts(tmp_path, {"labels/a.txt": GOOD})
    assert read_folder(tmp_path).class_names == ("B\\xe4r",)


def test_classes_without_objects_are_left_out_and_told(tmp_path):
    found = read_folder(write(tmp_path, a=GOOD))
    assert found.class_names == ("cat",)
    assert any("have no object: left out (such as dog)" in note for note in found.notes)


BOMB = "a: &a [x, x]\n" + "".join(
    f"{c}: &{c} [*{p}, *{p}, *{p}, *{p}, *{p}, *{p}, *{p}, *{p}]\n"
    for p, c in zip("abcdefghijklm", "bcdefghijklmn", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [cat", "can't read .*data.yaml"),
        ("names: cat", "must have names of classes as a list or by numbers"),
        ("names: {a: cat}", "must have names of classes as a list or by numbers"),
        ("names: [[cat]]", "list in place of text"),
        (BOMB + "names: *n", "list in place of text"),
        ("names: [cat]\ntrain: {a: b}", "dict in place of text"),
        ("names: " + "[" * 5000, "can't read .*data.yaml"),
        ("names: !!python/object/apply:os.system [ls]\ntrain: [[]]", "must have names"),
    ],
)
def test_a_data_yaml_that_says_nothing_clear_is_an_error(tmp_path, text, message):
    write_texts(tmp_path, {"data.yaml": text})
    with pytest.raises(ValueError, match=message):
        scan_folder(write(tmp_path, a=GOOD))


def splits_of(root):
    scan = scan_folder(root)
    return {k: sorted(map(scan.name_of, v)) for k, v in scan.splits.items()}


@pytest.mark.parametrize("pattern", ["images/{}/{}", "{}/images/{}", "{}/{}"])
@pytest.mark.parametrize("names", [NAMES, ""])
def test_folders_of_splits(tmp_path, pattern, names):
    for split in ("train", "valid", "test"):
        for key in ("a", split):
            image = pattern.format(split, f"{key}.png")
            write_images(tmp_path, image)
            label = image.replace("images", "labels").replace(".png", ".txt")
            write_texts(tmp_path, {label: GOOD})
    write_texts(tmp_path, {"data.yaml": names or None})
    expected = {
        name: [pattern.format(folder, f"{k}.png") for k in ("a", folder)]
        for name, folder in (("train", "train"), ("validation", "valid"))
    } | {"test": [pattern.format("test", f"{k}.png") for k in ("a", "test")]}
    expected = {k: [p.removeprefix("images/") for p in v] for k, v in expected.items()}
    assert splits_of(tmp_path) == expected
    assert len(read_folder(tmp_path).images) == 6


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("images/train", "images/val"),
        ("../images/train", "../images/val"),
        ("/home/me/data/images/train/", "/home/me/data/images/val/"),
        ("C:\\data\\images\\train", "C:\\data\\images\\val"),
        ("[images/train]", "[./images/val]"),
        ("train.txt", "lists/val.txt"),
        ("/home/me/train.txt", "/home/me/lists/val.txt"),
    ],
)
def test_data_yaml_names_folders_and_lists(tmp_path, train, val):
    write_images(tmp_path, "images/train/a.png", "images/val/b.png", "images/val/c.png")
    texts = {f"labels/{name}.txt": GOOD for name in ("train/a", "val/b", "val/c")}
    texts["train.txt"] = "./images/train/a.png\n"
    texts["lists/val.txt"] = "/home/me/images/val/b.png\n/home/me/images/val/c.png\n\n"
    told = f"path: /home/me\ntrain: {train}\nval: {val}\ntest: test/images\n"
    write_texts(tmp_path, texts | {"data.yaml": told + NAMES})
    assert splits_of(tmp_path) == {
        "train": ["train/a.png"],
        "validation": ["val/b.png", "val/c.png"],
    }
    notes = scan_folder(tmp_path).notes
    assert any("test is to be 'test/images', which is not there" in n for n in notes)


def test_lists_may_be_there_without_a_data_yaml(tmp_path):
    """As darknet has them: labels beside the images."""
    write_images(tmp_path, "obj/a.png", "obj/b.png", "obj/c.png")
    texts = {f"obj/{key}.txt": GOOD for key in "abc"}
    texts |= {
        "train.txt": "data/obj/a.png\ndata/obj/b.png\ndata/obj/a.png\nobj/gone.png"
    }
    texts |= {"test.txt": "data/obj/c.png", "obj.names": "cat"}
    write_texts(tmp_path, texts)
    assert splits_of(tmp_path) == {"train": ["a.png", "b.png"], "test": ["c.png"]}
    notes = " ".join(scan_folder(tmp_path).notes)
    assert "1 images that train.txt lists are not there" in notes
    assert "1 images are in train.txt more than once: taken once" in notes
    write_texts(tmp_path, {"test.txt": "c.png\nx.png\ny.png"})
    with pytest.raises(ValueError, match=r"only 1 of the 3 images of test.txt"):
        scan_folder(tmp_path)


def test_folders_may_have_years(tmp_path):
    write_images(tmp_path, "images/train2017/a.png", "images/val2017/b.png")
    write_texts(tmp_path, {"labels/train2017/a.txt": GOOD, "data.yaml": NAMES})
    expected = {"train": ["train2017/a.png"], "validation": ["val2017/b.png"]}
    assert splits_of(tmp_path) == expected


def test_one_folder_to_train_and_to_validate_on_is_no_split(tmp_path):
    write_texts(tmp_path, {"data.yaml": NAMES + "train: images\nval: images\n"})
    write(tmp_path, **{f"k{number:02d}": GOOD for number in range(11)})
    splits = splits_of(tmp_path)
    assert {k: len(v) for k, v in splits.items()} == {"trainval": 9, "test": 2}
    notes = " ".join(scan_folder(tmp_path).notes)
    assert "'validation' has the images of 'train': one split" in notes
    assert "every 5th image, 2 of 11, is held out as split 'test'" in notes
    where = {"root": str(tmp_path)}
    assert available_splits("yolo_folder", **where) == ("trainval", "test")
    part = open_detection_source("yolo_folder", "trainval[:70%]", **where)
    assert len(part.records) == 6


def test_a_folder_in_a_folder_is_found(tmp_path):
    """As an archive is unpacked; paths in data.yaml are as in the inner folder."""
    inner = tmp_path / "animals/animals"
    write_images(inner, "train/images/a.png", "valid/images/a.png")
    told = "train: ../train/images\nval: ../valid/images\n"
    write_texts(inner, {"train/labels/a.txt": GOOD, "data.yaml": NAMES + told})
    assert scan_folder(tmp_path) == scan_folder(inner)
    assert set(splits_of(tmp_path)) == {"train", "validation"}
    assert not any("not there" in note for note in scan_folder(tmp_path).notes)


def test_images_in_no_split_are_told(tmp_path):
    names = ("train/images/a", "test/images/b", "rest/c")
    write_images(tmp_path, *(f"{name}.png" for name in names))
    write_texts(tmp_path, {"train/labels/a.txt": GOOD, "data.yaml": NAMES})
    assert set(splits_of(tmp_path)) == {"train", "test"}
    notes = scan_folder(tmp_path).notes
    assert any("1 of 3 images are in no split" in note for note in notes)


def test_a_folder_that_is_not_in_yolos_layout_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no YOLO folder .*nowhere.*Expected"):
        scan_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no images. Expected"):
        scan_folder(tmp_path)
    write(tmp_path, a=None)
    with pytest.raises(ValueError, match=r"has 1 images, and a label file .* of none"):
        scan_folder(tmp_path)
    write(tmp_path, a="")
    with pytest.raises(ValueError, match="hold no object with a name and a box"):
        read_folder(tmp_path)


def test_records_hold_the_files_own_bytes_and_the_digest_what_is_said(tmp_path):
    write(tmp_path, a=GOOD, b=GOOD, c=None)
    where = {"root": str(tmp_path)}

    def digest():
        return open_detection_source("yolo_folder", "trainval", **where).digest

    records = open_detection_source("yolo_folder", "trainval", **where).records
    found = {record["name"]: record for record in records}
    assert set(found) == {"a.png", "b.png", "c.png"}
    for name, record in found.items():
        assert record["image"] == (tmp_path / "images" / name).read_bytes()
    assert found["a.png"]["objects"].boxes.tolist() == [list(BOX)]
    assert found["c.png"]["objects"].boxes.shape == (0, 4)
    digests = [digest()]
    for path, text in (
        ("labels/a.txt", GOOD.replace("0.5 0.5\n", "0.5 0.6\n")),
        ("labels/a.txt", GOOD + "\n"),
        ("labels/c.txt", ""),
        ("data.yaml", "names: [dog, cat]\n"),
    ):
        write_texts(tmp_path, {path: text})
        digests.append(digest())
    assert len(set(digests)) == len(digests)
