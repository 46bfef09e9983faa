"""Any folder with COCO's JSON becomes a data set, and nothing is lost silently."""

import io
import json
import re
import unicodedata

import numpy as np
import PIL.Image
import pytest
from data_helpers import encode, picture, write_images

from sppnet_jax.data.coco_folder import EVENTS, read_annotations, scan_folder
from sppnet_jax.data.folders import printable
from sppnet_jax.data.images import decode_image
from sppnet_jax.data.sources import available_splits, open_detection_source, open_source

SIZE = (24, 32)
FILES = ((1, "odd.png"), (2, "good.png"))
CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 90, "name": "dog"}]


def coco(images, annotations, categories=CATEGORIES, **more):
    """COCO's JSON of file names, or of entries, and of annotations."""
    entries = [
        {"id": number, "file_name": one, "height": SIZE[0], "width": SIZE[1]}
        if isinstance(one, str)
        else one
        for number, one in enumerate(images, start=1)
    ]
    lists = {"images": entries, "annotations": annotations, "categories": categories}
    return lists | more


def thing(image=1, bbox=(4, 2, 10, 7), category=7, **more):
    given = {"image_id": image, "category_id": category, "bbox": bbox, "iscrowd": 0}
    return {k: v for k, v in (given | more).items() if v is not ...}


def write(root, value, path="annotations.json"):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    text = value if isinstance(value, str) else json.dumps(value)
    (root / path).write_text(text)
    return root


def read_folder(root):
    scan = scan_folder(root)
    found = read_annotations(scan)
    return found._replace(notes=scan.notes + found.notes)


def read_one(root, *things, sides=SIZE, images=("odd.png", "good.png")):
    """The first image beside a good one, and the notes on all but splits."""
    write_images(root, *(name for name in images if isinstance(name, str)))
    first = {"id": 1, "file_name": "odd.png", "height": sides[0], "width": sides[1]}
    listed = [first, *images[1:]]
    write(root, coco(listed, [*things, thing(2), thing(2, category=90)]))
    found = read_folder(root)
    notes = [n for n in found.notes if "is held out as split" not in n]
    return found.images["odd.png"], "\n".join(notes)


def test_a_box_begins_at_x_and_y_and_has_a_width_and_a_height(tmp_path):
    image, notes = read_one(tmp_path, thing(), thing(bbox=[0, 0, 32, 24], category=90))
    assert image.size == SIZE
    assert [(one.name, one.box) for one in image.objects] == [
        ("cat", (2.0, 4.0, 9.0, 14.0)),
        ("dog", (0.0, 0.0, 24.0, 32.0)),
    ]
    assert not notes


BIG = "1" + "0" * 5000  # more digits than Python reads at once


@pytest.mark.parametrize(
    ("box", "expected", "event"),
    [
        ([4.25, 2.5, 9.5, 6.25], (2.5, 4.25, 8.75, 13.75), None),
        (["4", "2", " 10 ", "7.0"], (2, 4, 9, 14), None),
        ([4, 2, 28.5, 7], (2, 4, 9, 32), "touching"),
        ([-5, -5, 99, 99], (0, 0, 24, 32), "crossing"),
        ([4, 2, 1e300, 7], (2, 4, 9, 32), "crossing"),
        ([14, 9, -10, -7], (2, 4, 9, 14), "swapped"),
        ([40, 2, 10, 7], None, "outside"),
        ([4, 2, 0, 7], None, "empty"),
        ([0.1, 0.2, 0.5, 0.5], None, "shares"),
        ([0, 0, 1, 1], None, "shares"),
        ([4, 2, "1_0", 7], None, "no number"),
        ([0, 0, 0, 0], None, "empty"),
        ([4, 2, 10], None, "no number"),
        ([4, 2, 10, 7, 1], None, "no number"),
        ([4, None, 10, 7], None, "no number"),
        ([4, 2, True, 7], None, "no number"),
        ([4, 2, [10], 7], None, "no number"),
        ([4, 2, "wide", 7], None, "no number"),
        ([4, 2, float("nan"), 7], None, "no number"),
        ([4, 2, float("inf"), 7], None, "no number"),
        ({"x": 4, "y": 2}, None, "no number"),
        ("4 2 10 7", None, "no number"),
        (None, None, "no number"),
        (..., None, "no number"),
    ],
)
def test_an_odd_box_is_put_right_or_dropped_and_counted(tmp_path, box, expected, event):
    image, notes = read_one(tmp_path, thing(bbox=box))
    assert [one.box for one in image.objects] == ([expected] if expected else [])
    told = [event] * bool(event) + ["no object"] * (expected is None)
    assert len(notes.splitlines()) == len(told)
    for one in told:
        assert f"1 {EVENTS[one]} (such as odd.png)" in notes


@pytest.mark.parametrize("hostile", ["1e309", "-1e309", "NaN", BIG, f"-{BIG}"])
def test_numbers_that_no_float_holds_cost_their_box_only(tmp_path, hostile):
    write_images(tmp_path, "odd.png", "good.png")
    value = coco(["odd.png", "good.png"], [thing(1), thing(1, [4, 2, 123, 7])])
    write(tmp_path, json.dumps(value).replace("123", hostile))
    found = read_folder(tmp_path)
    assert [one.box for one in found.images["odd.png"].objects] == [(2, 4, 9, 14)]
    assert any(EVENTS["no number"] in note for note in found.notes)


@pytest.mark.parametrize(
    "number", ["NaN", "Infinity", "-Infinity", "1e999", '"x"', "null"]
)
def test_a_size_that_is_no_finite_number_is_none(tmp_path, number):
    write_images(tmp_path, "odd.png", "good.png")
    images = [{"id": n, "file_name": f, "width": 777, "height": 777} for n, f in FILES]
    value = coco(images, [thing(1), thing(2)])
    write(tmp_path, json.dumps(value).replace("777", number))
    found = read_folder(tmp_path)
    assert [one.box for one in found.images["odd.png"].objects] == [(2, 4, 9, 14)]
    assert not [note for note in found.notes if "gave a size" in note]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda text: "\ufeff\n\n" + text,
        lambda text: "\n\ufeff" + text + "\0" * 99 + "\n",
        lambda text: ("\ufeff" + text).encode("utf-16-le"),
    ],
)
def test_json_may_be_written_in_many_ways(tmp_path, wrap):
    """And both forms of an accent are one name, of files and of classes."""
    one, other = (unicodedata.normalize(form, "B\xe4r") for form in ("NFC", "NFD"))
    write_images(tmp_path, f"{one}.png", "good.png")
    categories = [{"id": 7, "name": one}, {"id": 90, "name": other}]
    things = [thing(1), thing(2, category=90)]
    text = json.dumps(coco([f"{other}.png", "good.png"], things, categories))
    wrapped = wrap(text)
    data = wrapped if isinstance(wrapped, bytes) else wrapped.encode()
    (tmp_path / "annotations.json").write_bytes(data)
    found = read_folder(tmp_path)
    assert found.class_names == (one,)
    assert len(found.images) == 2


@pytest.mark.parametrize(
    ("more", "difficult", "clear"),
    [
        ({"iscrowd": 1}, True, True),
        ({"iscrowd": "1"}, True, True),
        ({"iscrowd": True}, True, True),
        ({"iscrowd": 1.0}, True, True),
        ({"iscrowd": 0, "ignore": 1}, True, True),
        ({"iscrowd": 0, "ignore": 0}, False, True),
        ({"iscrowd": False}, False, True),
        ({"iscrowd": ...}, False, False),
        ({"iscrowd": "maybe"}, False, False),
        ({"iscrowd": [1]}, False, False),
    ],
)
def test_a_crowd_is_difficult(tmp_path, more, difficult, clear):
    image, notes = read_one(tmp_path, thing(**more))
    assert [one.is_difficult for one in image.objects] == [difficult]
    assert (EVENTS["no difficult"] in notes) is not clear


def compressed(counts):
    """COCO's text of runs, from its definition: differences to the run before last."""
    text = ""
    for number, count in enumerate(counts):
        value, more = count - (counts[number - 2] if number > 2 else 0), True
        while more:
            bits, value = value & 31, value >> 5
            more = value != -1 if bits & 16 else value != 0
            text += chr(48 + (bits | 32 * more))
    return text


def runs_of(mask):
    """Lengths of the runs of 0 and 1, by turns, down the columns of a mask."""
    counts, current = [0], 0
    for value in mask.T.ravel().tolist():
        if value != current:
            counts.append(0)
            current = value
        counts[-1] += 1
    return counts


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("packed", [False, True])
def test_a_mask_in_runs_has_the_extent_of_its_pixels(tmp_path, seed, packed):
    rng = np.random.default_rng(seed)
    mask = np.zeros(SIZE, int)
    top, left = rng.integers(0, 12, 2)
    part = mask[top : top + rng.integers(1, 12), left : left + rng.integers(1, 20)]
    part[:] = rng.random(part.shape) < 0.4
    part.flat[rng.integers(part.size)] = 1
    counts = runs_of(mask)
    mask_told = {"size": list(SIZE), "counts": compressed(counts) if packed else counts}
    image, notes = read_one(tmp_path, thing(bbox=..., segmentation=mask_told))
    rows, columns = np.nonzero(mask)
    box = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
    assert [one.box for one in image.objects] == [box]
    assert EVENTS["extent"] in notes


@pytest.mark.parametrize(
    ("segmentation", "box"),
    [
        ([[4, 2, 14, 2, 14, 9]], (2, 4, 9, 14)),
        ([[4.5, 3, 6, 3, 6, 9], [12, 2.25, 14, 5, 13, 5]], (2.25, 4.5, 9, 14)),
        ([4, 2, 14, 2, 14, 9], (2, 4, 9, 14)),
        ([], None),
        ([[]], None),
        ([[4, 2, 14]], None),
        ([[4, 2, "x", 2, 14, 9]], None),
        ([[4, 2, float("nan"), 2, 14, 9]], None),
        ({"size": [24, 32], "counts": [5, 3]}, None),
        ({"size": [24, 32], "counts": [-768, 1536]}, None),
        ({"size": [0, 0], "counts": []}, None),
        ({"size": [2**40, 2**40], "counts": [0, 2**80]}, None),
        ({"size": [24, 32], "counts": "o" * 100_000}, None),
        ({"size": [24, 32], "counts": [768]}, None),
        ({"counts": "0"}, None),
        ("polygon", None),
    ],
)
def test_an_object_without_a_box_has_the_extent_of_its_segmentation(
    tmp_path, segmentation, box
):
    for given in (..., [], [0, 0, 0, 0]):
        image, notes = read_one(tmp_path, thing(bbox=given, segmentation=segmentation))
        assert [one.box for one in image.objects] == ([box] if box else [])
        assert (EVENTS["extent"] in notes) is bool(box)
        assert bool(re.search("dropped", notes)) is not bool(box)


def test_ids_may_have_gaps_and_be_text(tmp_path):
    write_images(tmp_path, "a.png", "b.png")
    entries = [{"id": "x9", "file_name": "a.png"}, {"id": 3.0, "file_name": "b.png"}]
    things = [thing("x9", category="7"), thing("3", category=90.0), thing(3)]
    categories = [*CATEGORIES, {"id": "11", "name": "never seen"}]
    write(tmp_path, coco(entries, things, categories))
    found = read_folder(tmp_path)
    names = {k: [one.name for one in v.objects] for k, v in found.images.items()}
    assert names == {"a.png": ["cat"], "b.png": ["dog", "cat"]}
    assert found.class_names == ("cat", "dog")
    assert any("1 classes that are listed have no object" in n for n in found.notes)


def test_what_belongs_to_nothing_is_left_out_and_counted(tmp_path):
    things = [
        thing(99),
        thing(None),
        thing(1, category=8),
        thing(1, category=None),
        thing(1, category={}),
        "no object of JSON",
    ]
    image, notes = read_one(tmp_path, *things, thing())
    assert len(image.objects) == 1
    assert "2 annotations are of images that are not listed: left out" in notes
    assert f"3 {EVENTS['no name']}" in notes
    assert "1 entries are no objects of JSON: ignored" in notes


def test_categories_of_one_name_are_one_class(tmp_path):
    write_images(tmp_path, "a.png", "b.png")
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": " cat "}, {"id": 3}]
    categories += [{"name": "x"}, {"id": 1, "name": "again"}, {"id": 4, "name": " "}]
    things = [thing(1, category=1), thing(2, category=2)]
    found = read_folder(write(tmp_path, coco(["a.png", "b.png"], things, categories)))
    assert found.class_names == ("cat",)
    assert any("4 categories have no id, no name, or the id" in n for n in found.notes)


def test_half_a_character_can_be_shown(tmp_path):
    write_images(tmp_path, "a.png", "b.png")
    categories = [{"id": 7, "name": "b\ud800r"}]
    value = coco(["a.png", "b.png", "\ud800.png"], [thing(1), thing(2)], categories)
    found = read_folder(write(tmp_path, value))
    assert found.class_names == ("b\\ud800r",)
    assert any("(such as \\ud800.png)" in note for note in map(printable, found.notes))


def test_an_image_without_objects_is_kept_as_background(tmp_path):
    image, notes = read_one(tmp_path)
    assert image.objects == ()
    assert "1 images have no object left: kept, all of it background" in notes


def test_images_that_are_absent_or_have_no_name_are_left_out(tmp_path):
    write_images(tmp_path, "a.png", "b.png", "unlisted.png")
    entries = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}]
    entries += [{"id": 3, "file_name": "gone.png"}, {"id": 4}, {"file_name": "a.png"}]
    entries += [{"id": 1, "file_name": "other.png"}, {"id": 5, "file_name": 5}]
    write(tmp_path, coco(entries, [thing(1), thing(2), thing(3)]))
    found = read_folder(tmp_path)
    notes = " ".join(found.notes)
    assert set(found.images) == {"a.png", "b.png"}
    assert "1 images that annotations.json lists are not there" in notes
    assert "(such as gone.png)" in notes
    assert "4 entries of images have no id, no file_name, or the id of another" in notes
    assert "1 of 3 images are in no split" in notes


def test_most_images_absent_is_an_error(tmp_path):
    write_images(tmp_path, "a.png")
    write(tmp_path, coco(["a.png", "x.png", "y.png"], [thing()]))
    with pytest.raises(ValueError, match=r"only 1 of the 3 images of annotations.json"):
        scan_folder(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match=r"none of the images that its JSON lists"):
        scan_folder(tmp_path)


def test_an_image_that_is_listed_twice_has_the_objects_of_both_entries(tmp_path):
    write_images(tmp_path, "a.png", "b.png")
    things = [thing(1), thing(2), thing(2, [1, 1, 5, 5], 90), thing(3), thing(3)]
    found = read_folder(write(tmp_path, coco(["a.png", "./a.png", "b.png"], things)))
    assert [o.name for o in found.images["a.png"].objects] == ["cat", "dog"]
    assert len(found.images["b.png"].objects) == 2
    assert any(f"1 {EVENTS['listed again']}" in note for note in found.notes)


def test_an_image_that_cannot_be_opened_is_left_out(tmp_path):
    write_images(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "c.png").write_bytes((tmp_path / "c.png").read_bytes()[:-30])
    write(tmp_path, coco(["a.png", "b.png", "c.png"], [thing(1), thing(2), thing(3)]))
    found = read_folder(tmp_path)
    assert set(found.images) == {"a.png", "b.png"}
    assert any(f"1 {EVENTS['broken image']} (such as c.png)" in n for n in found.notes)


@pytest.mark.parametrize(
    ("sides", "box", "event"),
    [
        ((None, "wide"), (2, 4, 9, 14), None),
        ((0, -1), (2, 4, 9, 14), None),
        ((float("nan"), 1e999), (2, 4, 9, 14), None),
        ((32, 24), (2, 4, 9, 14), "transposed"),
        ((100, 90), (2, 4, 9, 14), "other size"),
        ((48, 64), (1, 2, 4.5, 7), "scaled"),
        (("12", "16"), (4, 8, 18, 28), "scaled"),
    ],
)
def test_a_size_that_is_not_the_images_scales_boxes_only_at_its_aspect(
    tmp_path, sides, box, event
):
    image, notes = read_one(tmp_path, thing(), sides=sides)
    np.testing.assert_allclose(image.objects[0].box, box, rtol=1e-12)
    assert len(notes.splitlines()) == bool(event)
    assert not event or EVENTS[event] in notes


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_on_an_image_before_its_rotation_turn_with_it(tmp_path, orientation):
    write_images(tmp_path, "odd.png", "good.png")
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[16:24, 8:24] = 255
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "jpeg", exif=exif, quality=100)
    (tmp_path / "odd.png").write_bytes(buffer.getvalue())
    entries = [{"id": 1, "file_name": "odd.png", "height": 48, "width": 64}]
    entries += [{"id": 2, "file_name": "good.png"}]
    write(tmp_path, coco(entries, [thing(1, [8, 16, 16, 8]), thing(2)]))
    found = read_folder(tmp_path)
    rows, columns = np.nonzero(decode_image(buffer.getvalue()).mean(axis=2) > 127)
    bright = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
    assert found.images["odd.png"].objects[0].box == bright
    assert any(EVENTS["turned"] in note for note in found.notes)


def splits_of(root):
    scan = scan_folder(root)
    return {k: sorted(map(scan.name_of, v)) for k, v in scan.splits.items()}


def test_cocos_own_layout(tmp_path):
    """Images of one name in two splits are told apart by their folders."""
    for split, names in {
        "train2017": ("1.png", "2.png"),
        "val2017": ("1.png",),
    }.items():
        write_images(tmp_path, *(f"{split}/{name}" for name in names))
        for kind in ("instances", "captions"):
            value = coco(names, [thing()]) if kind == "instances" else {"images": []}
            write(tmp_path, value, f"annotations/{kind}_{split}.json")
    assert splits_of(tmp_path) == {
        "train": ["train2017/1.png", "train2017/2.png"],
        "validation": ["val2017/1.png"],
    }
    notes = " ".join(scan_folder(tmp_path).notes)
    assert "2 files of JSON are not named instances_…: ignored" in notes
    (tmp_path / "val2017/1.png").unlink()
    assert set(splits_of(tmp_path)) == {"trainval"}
    assert "images that annotations/instances_val2017.json lists are not" in " ".join(
        scan_folder(tmp_path).notes
    )


@pytest.mark.parametrize("below", ["", "images/"])
def test_roboflows_layout(tmp_path, below):
    for split in ("train", "valid", "test"):
        write_images(tmp_path, f"{split}/{below}a.png", f"{split}/{below}{split}.png")
        value = coco(["a.png", f"{split}.png"], [thing(2)])
        write(tmp_path, value, f"{split}/_annotations.coco.json")
    assert splits_of(tmp_path) == {
        name: [f"{folder}/{below}a.png", f"{folder}/{below}{folder}.png"]
        for name, folder in {
            "train": "train",
            "validation": "valid",
            "test": "test",
        }.items()
    }
    where = {"root": str(tmp_path)}
    source = open_detection_source("coco_folder", "validation", **where)
    assert len(source.records) == 2


@pytest.mark.parametrize(
    "listed",
    ["a.png", "images/a.png", "/home/me/data/images/a.png", "C:\\me\\images\\a.png"],
)
def test_a_file_name_may_have_folders_and_begin_elsewhere(tmp_path, listed):
    write_images(tmp_path, "images/a.png", "images/b.png")
    write(tmp_path, coco([listed, "b.png"], [thing(1), thing(2)]), "sub/my.json")
    found = read_folder(tmp_path)
    assert set(found.images) == {"images/a.png", "images/b.png"}


def test_no_file_name_leads_out_of_the_folder(tmp_path):
    write_images(tmp_path, "secret.png", "in/a.png", "in/b.png")
    value = coco(["../secret.png", "a.png", "b.png"], [thing(1), thing(2)])
    found = read_folder(write(tmp_path / "in", value))
    assert set(found.images) == {"a.png", "b.png"}


def test_of_several_images_of_a_name_none_is_guessed(tmp_path):
    write_images(tmp_path, "x/a.png", "y/a.png", "x/b.png", "c.png", "z/c.png")
    value = coco(["a.png", "b.png", "y/a.png", "c.png"], [thing(2)])
    scan = scan_folder(write(tmp_path, value))
    found = {files.image for split in scan.splits.values() for files in split}
    assert found == {"x/b.png", "y/a.png", "c.png"}


def test_without_splits_every_fifth_image_is_held_out(tmp_path):
    names = [f"{number:02d}.png" for number in range(11)]
    write_images(tmp_path, *(f"images/{name}" for name in names))
    write(tmp_path, coco(names, [thing(n) for n in range(1, 12)]), "train.json")
    splits = splits_of(tmp_path)
    assert {k: len(v) for k, v in splits.items()} == {"trainval": 9, "test": 2}
    assert sorted(splits["trainval"] + splits["test"]) == names
    assert "every 5th image, 2 of 11, is held out" in scan_folder(tmp_path).notes[-1]
    where = {"root": str(tmp_path)}
    assert available_splits("coco_folder", **where) == ("trainval", "test")
    part = open_detection_source("coco_folder", "trainval[:70%]", **where)
    assert len(part.records) == 6


def test_files_of_the_same_images_are_joined(tmp_path):
    """A file of the cats and a file of the dogs are one data set, without splits."""
    write_images(tmp_path, "a.png", "b.png")
    write(tmp_path, coco(["a.png", "b.png"], [thing(1), thing(2)]), "cats.json")
    dogs = [{"id": 1, "name": "dog"}]
    value = coco(["b.png", "a.png"], [thing(2, category=1)], dogs)
    write(tmp_path, value, "dogs.json")
    found = read_folder(tmp_path)
    assert [one.name for one in found.images["a.png"].objects] == ["cat", "dog"]
    assert [one.name for one in found.images["b.png"].objects] == ["cat"]
    assert set(splits_of(tmp_path)) == {"trainval"}
    assert any("'dogs' has the images of 'cats': one split" in n for n in found.notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [], "annotations": [', r"can't read .*no JSON.*Repair the file"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "is no JSON of COCO's, but a list"),
        ('{"images": [], "a": 1}', "it has no list annotations, categories"),
        ('{"images": 1, "annotations": [], "categories": []}', "has no list images"),
        ("", "is no JSON"),
        ("\x00\xff", "is no JSON"),
    ],
)
def test_json_that_is_not_cocos_says_why(tmp_path, text, message):
    write_images(tmp_path, "a.png")
    write(tmp_path, text, "my.json")
    with pytest.raises(ValueError, match=message):
        scan_folder(tmp_path)


def test_other_json_beside_cocos_is_ignored_and_named(tmp_path):
    write_images(tmp_path, "a.png", "b.png")
    write(tmp_path, coco(["a.png", "b.png"], [thing(1)]))
    write(tmp_path, "{}", "notes.json")
    assert any(
        "1 files of JSON are not COCO's: ignored (such as notes.json" in note
        for note in scan_folder(tmp_path).notes
    )


def test_a_folder_that_holds_nothing_of_cocos_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no COCO folder .*nowhere.*Expected"):
        scan_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="it has no JSON"):
        scan_folder(tmp_path)
    write_images(tmp_path, "a.png")
    write(tmp_path, coco(["a.png"], []))
    with pytest.raises(ValueError, match="hold no object with a name and a box"):
        read_folder(tmp_path)


def test_records_hold_the_files_own_bytes_and_the_digest_what_is_said(tmp_path):
    names = ["a.png", "b.png", "c.png"]
    write_images(tmp_path, *(f"images/{name}" for name in names))
    value = coco(names, [thing(1), thing(1, [0, 0, 3, 4], 90, iscrowd=1), thing(3)])
    write(tmp_path, value)
    where = {"root": str(tmp_path)}
    source = open_detection_source("coco_folder", "trainval", **where)
    records = {record["name"]: record for record in source.records}
    assert set(records) == set(names)
    for name in names:
        assert records[name]["image"] == (tmp_path / "images" / name).read_bytes()
    boxes, labels, difficult = records["a.png"]["objects"]
    assert boxes.tolist() == [[2, 4, 9, 14], [0, 0, 4, 3]]
    assert (boxes.dtype, labels.dtype, difficult.dtype) == (float, np.int32, bool)
    assert (labels.tolist(), difficult.tolist()) == ([0, 1], [False, True])
    assert records["a.png"]["labels"].tolist() == [1, 0]
    assert records["b.png"]["objects"].boxes.shape == (0, 4)
    same = open_source("coco_folder", "trainval", multi_label=True, **where)
    assert same.digest == source.digest
    value["annotations"][0]["bbox"] = [4, 2, 10, 8]
    write(tmp_path, value)
    changed = open_detection_source("coco_folder", "trainval", **where)
    assert changed.digest != source.digest
    write(tmp_path, json.dumps(value) + " ")
    assert open_detection_source("coco_folder", "trainval", **where).digest not in (
        changed.digest,
        source.digest,
    )
    (tmp_path / "images/b.png").write_bytes(encode(picture(24, 40)))
    with pytest.raises(ValueError, match="one class each"):
        open_source("coco_folder", "trainval", **where)
