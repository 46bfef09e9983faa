"""What holds of every input, tried on many that nobody has thought of."""

import json

import jax
import numpy as np
import pytest
from data_helpers import voc_object, voc_xml, write_images, write_voc_folder
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import sppnet_jax as sn
from sppnet_jax.buckets.choice import choose_buckets
from sppnet_jax.buckets.table import padding_waste, smallest_bucket
from sppnet_jax.data import coco_folder, voc_folder, yolo_folder
from sppnet_jax.detection.boxes import clip_boxes, decode_boxes, encode_boxes, iou, nms
from sppnet_jax.detection.detector_settings import DetectorSettings
from sppnet_jax.run.settings import fields_of, plain, read
from sppnet_jax.training.network_settings import NetworkSettings

# The same examples in every run: a test that fails fails again.
EVERY = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
SIDE = 500.0
numbers = st.floats(0, SIDE, width=32)


@st.composite
def boxes(draw, least=0, most=12):
    """Boxes with an area, float64 [N, 4], in an image of 500 by 500 pixels."""
    edge = st.tuples(st.floats(0, SIDE - 1), st.floats(0.5, SIDE))
    pairs = draw(st.lists(st.tuples(edge, edge), min_size=least, max_size=most))
    rows = [(y, x, min(y + h, SIDE), min(x + w, SIDE)) for (y, h), (x, w) in pairs]
    return np.array(rows, np.float64).reshape(-1, 4)


def tried(function, *arguments):
    """What a function returns, and "" or what it says is wrong, a sentence."""
    try:
        return function(*arguments), ""
    except (ValueError, OSError) as error:
        said = str(error).strip()
    assert 10 < len(said) < 800  # with the test's long paths in it
    assert "\n" not in said
    return None, said


def overlap(box, other):
    """The share of two boxes' union that both hold, from the definition."""
    sides = [
        max(0.0, min(box[n + 2], other[n + 2]) - max(box[n], other[n])) for n in (0, 1)
    ]
    areas = [(own[2] - own[0]) * (own[3] - own[1]) for own in (box, other)]
    shared = sides[0] * sides[1]
    return shared / (sum(areas) - shared)


@EVERY
@given(boxes(), boxes())
def test_overlaps_are_shares_and_those_of_the_definition(first, second):
    found = np.asarray(iou(first, second))
    assert found.shape == (len(first), len(second))
    assert ((found >= 0) & (found <= 1)).all()
    wanted = [[overlap(own, other) for other in second] for own in first]
    np.testing.assert_allclose(
        found, np.reshape(wanted, found.shape), rtol=1e-5, atol=1e-6
    )


@EVERY
@given(boxes(1), st.data())
def test_boxes_come_back_from_their_targets(targets, data):
    start = data.draw(boxes(len(targets), len(targets)))
    back = np.asarray(decode_boxes(start, encode_boxes(start, targets)))
    np.testing.assert_allclose(back, targets, rtol=1e-6, atol=1e-6 * SIDE)


@EVERY
@given(
    st.lists(st.tuples(*[st.floats(-1e6, 1e6)] * 4), max_size=8),
    st.integers(1, 500),
    st.integers(1, 500),
)
def test_clipped_boxes_are_in_the_image_and_stay_there(rows, height, width):
    given_boxes = np.array(rows, np.float64).reshape(-1, 4)
    inside = np.asarray(clip_boxes(given_boxes, height, width))
    assert (inside >= 0).all()
    assert (inside <= [height, width] * 2).all()
    np.testing.assert_array_equal(clip_boxes(inside, height, width), inside)


@EVERY
@given(boxes(1, 10), st.floats(0, 1), st.randoms(use_true_random=False))
def test_what_is_suppressed_overlaps_a_better_box_and_what_stays_none(
    found, most, random
):
    # Sixteen of each: one program.
    padded = np.zeros((16, 4), np.float32)
    padded[: len(found)] = found
    scores = np.array(random.sample(range(16), 16), np.float32)
    valid = np.arange(16) < len(found)
    kept = np.asarray(nms(padded, scores, most, valid))
    assert not kept[len(found) :].any()
    overlaps = np.asarray(iou(padded, padded))
    better = (scores[:, None] > scores[None]) & kept[:, None]
    struck = (better & (overlaps > np.float32(most))).any(axis=0)
    near = np.abs(overlaps - most).min() < 1e-6
    assume(not near)
    np.testing.assert_array_equal(kept, valid & ~struck)


@EVERY
@given(
    st.integers(1, 400), st.integers(1, 12), st.sampled_from(["adaptive", "sliding"])
)
def test_bins_lie_on_the_map_and_hold_a_cell(size, level, rule):
    bins, refused = tried(sn.pyramid_bins, size, level, rule)
    if refused:
        assert rule == "sliding", refused  # a map may be too small for its bins
        return
    start, stop = bins.T
    assert ((start >= 0) & (start < stop) & (stop <= size)).all()
    if rule == "adaptive":
        covered = np.zeros(size, bool)
        for start, stop in bins:
            covered[start:stop] = True
        assert covered.all()
        assert len(bins) == level


@EVERY
@given(
    boxes(1),
    st.tuples(st.integers(1, 40), st.integers(1, 60)),
    st.floats(0.1, 4),
    st.sampled_from(["zf5", "convnet5", "resnet18"]),
)
def test_windows_of_boxes_lie_on_the_map_and_hold_a_cell(found, map_size, scale, trunk):
    geometry = sn.backbone_geometry(trunk)
    windows = np.asarray(sn.boxes_to_windows(found, geometry, map_size, scale))
    start, stop = windows[:, :2], windows[:, 2:]
    assert ((start >= 0) & (start < stop) & (stop <= map_size)).all()


@jax.jit
def pooled(features, windows):
    return sn.window_pyramid_pool(features, windows, (3, 2, 1))


@EVERY
@given(st.lists(st.tuples(*[st.integers(0, 8)] * 4), min_size=4, max_size=4))
def test_a_window_of_one_map_holds_no_value_from_elsewhere(edges):
    """Every cell has a number of its own, so each bin tells where it comes from."""
    features = np.arange(81, dtype=np.float32).reshape(9, 9, 1)
    windows = np.array(
        [
            (min(a, c), min(b, d), max(a, c) + 1, max(b, d) + 1)
            for a, b, c, d in np.array(edges)
        ]
    )
    found = np.asarray(pooled(features, windows))[..., 0].astype(int)
    rows, columns = found // 9, found % 9
    top, left, bottom, right = windows.T[..., None]
    assert ((rows >= top) & (rows < bottom)).all()
    assert ((columns >= left) & (columns < right)).all()
    np.testing.assert_array_equal(found[:, -1], (bottom * 9 + right - 10)[:, 0])


sizes = st.lists(
    st.tuples(st.integers(1, 700), st.integers(1, 700)), min_size=1, max_size=15
)


@EVERY
@given(sizes, st.integers(1, 4))
def test_every_image_fits_a_bucket_and_more_buckets_waste_less(found, count):
    buckets = choose_buckets(found, count)
    assert 1 <= len(buckets) <= count
    for size in found:
        assert (np.array(size) <= smallest_bucket(size, buckets)).all()
    waste = padding_waste(found, buckets)
    assert 0 <= waste < 1
    assert padding_waste(found, choose_buckets(found, count + 1)) <= waste + 1e-9


# Values of every kind; a config's file may hold any.
anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.one_of(st.integers(), st.floats(), st.text(max_size=3)), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@pytest.mark.parametrize("kind", [NetworkSettings, DetectorSettings])
@settings(EVERY, max_examples=400)
@given(st.data())
def test_a_setting_is_read_or_refused_by_a_sentence_with_its_name(kind, data):
    name = data.draw(st.sampled_from([name for name, _ in fields_of(kind)]))
    value = data.draw(anything)
    values = plain(kind())
    if kind is DetectorSettings:
        values["network"] = "efficientnet_lite0"
    *groups, field = name.split(".")
    group = values
    for own in groups:
        group = group[own]
    group[field] = value
    _, refused = tried(read, kind, values)
    assert not refused or field in refused or any(own in refused for own in groups)


GOOD_FILES = {
    "voc": voc_xml(voc_object((2, 3, 20, 18), "cat"), voc_object((1, 1, 9, 9), "dog")),
    "coco": json.dumps(
        {
            "images": [{"id": 3, "file_name": "one.png", "height": 24, "width": 32}],
            "categories": [{"id": 7, "name": "cat"}],
            "annotations": [
                {"id": 1, "image_id": 3, "category_id": 7, "bbox": [1.5, 2, 10, 12]}
            ],
        }
    ),
    "yolo": "0 0.5 0.5 0.25 0.5\n1 0.25 0.25 0.2 0.1\n",
}


@st.composite
def damaged(draw, text):
    """A file's bytes with a few changed, taken away, doubled or put in."""
    data = bytearray(text.encode())
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 12))
        new = draw(
            st.one_of(
                st.binary(max_size=4),
                st.sampled_from(
                    [b"", b"NaN", b"1e999", b"-1", b"\0", b"\xff", b'"', b"</", b"0"]
                ),
                st.just(bytes(data[place : place + length]) * 2),
            )
        )
        data[place : place + length] = new
    return bytes(data)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder in each format, and the file of each that is damaged."""
    root = tmp_path_factory.mktemp("folders")
    ids = {"train.txt": "one\ntwo\n"}
    good = voc_xml(voc_object())
    write_voc_folder(root / "voc", {"one": GOOD_FILES["voc"], "two": good}, ids)
    for name in ("coco", "yolo"):
        (root / name / "images").mkdir(parents=True)
        for stem in ("one", "two"):
            write_images(root / name / "images", f"{stem}.png")
    (root / "yolo" / "labels").mkdir()
    (root / "yolo" / "labels" / "two.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (root / "yolo" / "classes.txt").write_text("cat\ndog\n")
    return {
        "voc": (voc_folder, root / "voc", "Annotations/one.xml"),
        "coco": (coco_folder, root / "coco", "annotations.json"),
        "yolo": (yolo_folder, root / "yolo", "labels/one.txt"),
    }


@pytest.mark.parametrize("name", GOOD_FILES)
@settings(EVERY, max_examples=150)
@given(st.data())
def test_damaged_annotations_give_boxes_in_the_image_or_a_sentence(name, folders, data):
    module, root, file = folders[name]
    (root / file).write_bytes(data.draw(damaged(GOOD_FILES[name])))
    found, refused = tried(lambda: module.read_annotations(module.scan_folder(root)))
    if refused:
        assert str(root) in refused
        return
    for image in found.images.values():
        for one in image.objects:
            top, left, bottom, right = one.box
            assert 0 <= top < bottom <= image.size[0]
            assert 0 <= left < right <= image.size[1]
