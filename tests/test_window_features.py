"""Pooled features from files are those of a plain loop over images and windows."""

import functools
import math

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_helpers import encode, picture
from network_helpers import SHALLOW, drawn_params
from test_geometry import search_span
from test_spp import loop_pool

from sppnet_jax.data.sources import Source
from sppnet_jax.detection import window_features
from sppnet_jax.detection.maps import (
    convolve_split,
    decodable,
    image_sizes,
    load_maps,
    map_file,
    scaled_sizes,
)
from sppnet_jax.detection.rcnn import (
    convolve_windows,
    fill_color,
    kept_as,
    load_windows,
    stores_pooled,
    windows_function,
)
from sppnet_jax.detection.warp import warp_windows
from sppnet_jax.detection.window_features import (
    CHUNK,
    from_maps,
    from_warped,
    in_chunks,
    make_program,
    pooled_rows,
    rows_of,
)
from sppnet_jax.network.model import create_model
from sppnet_jax.network.preprocess import Preprocessing
from sppnet_jax.network.stack import table_geometry
from sppnet_jax.network.trained import as_network

SIDE = 64
LEVELS = (3, 2, 1)
PLAIN = Preprocessing(np.float32(100), 50.0, np.zeros((3, 3), np.float32))
SIZES = ((60, 80), (90, 50), (40, 230), (75, 75), (200, 40))  # two longer than 4:1
BROKEN = 3
SCALES = (64, 110)


def network(levels=LEVELS):
    model = create_model("zf5", levels, 4, width=1 / 32, image_size=SIDE)
    model = model.clone(backbone=SHALLOW)
    return model, drawn_params(model)


MODEL, PARAMS = network()
GEOMETRY = table_geometry(MODEL.backbone.layers)


def make_source():
    records = []
    for number, size in enumerate(SIZES):
        noise = np.random.default_rng(number).integers(0, 60, (*size, 3), np.uint8)
        data = encode(picture(*size, seed=number) // 2 + noise)
        if number == BROKEN:
            data = data[: len(data) // 2]
        records.append({"image": data, "label": 0, "name": f"{number}.png"})
    return Source(records, ("a", "b"), "memory", "train")


SOURCE = make_source()


def pixels(number):
    """The image, decoded by OpenCV."""
    encoded = np.frombuffer(SOURCE.records[number]["image"], np.uint8)
    return cv2.imdecode(encoded, cv2.IMREAD_COLOR)[..., ::-1]


def random_boxes(number, count=60):
    """Boxes of an image, some of them there twice; none of the broken one."""
    if number == BROKEN:
        return np.zeros((0, 4), np.float32)
    rng = np.random.default_rng(number)
    corners = np.sort(rng.random((count, 2, 2)), axis=1) * SIZES[number]
    corners[:, 1] += 1
    boxes = corners.reshape(-1, 4)
    return np.concatenate([boxes, boxes[:7]]).astype(np.float32)


BOXES = [random_boxes(number) for number in range(len(SIZES))]


def convolve(folder, source=SOURCE, **options):
    convolve_split(
        *(as_network(MODEL, PARAMS, PLAIN), source, folder),
        **{"sides": SCALES, "batch_size": 4, "max_buckets": 2, "threads": 2, **options},
    )


def features_from(folder, **options):
    sizes = image_sizes(SOURCE)
    sizes[BROKEN] = 0
    given = {"sides": SCALES, "geometry": GEOMETRY, "levels": LEVELS, **options}
    load = functools.partial(load_maps, folder, given["sides"])
    return from_maps(load, BOXES, sizes, area=SIDE**2, **given)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("maps")
    convolve(folder)
    return folder


@pytest.fixture(scope="module")
def plain_maps():
    """Each image, resized and convolved by itself at each scale: (size, map)."""
    found = {}
    apply = jax.jit(lambda x: MODEL.apply({"params": PARAMS}, x, method="features")[0])
    for number, (height, width) in enumerate(SIZES):
        for side in SCALES if number != BROKEN else ():
            shorter = min(height, width)
            size = [
                min(math.floor(length * side / shorter + 0.5), 4 * side)
                for length in (height, width)
            ]
            shrinks = size[0] * size[1] < height * width
            how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
            resized = pixels(number)
            if tuple(size) != resized.shape[:2]:
                resized = cv2.resize(resized, size[::-1], interpolation=how)
            inputs = (resized[None].astype(np.float32) - 100) / 50
            found[number, side] = tuple(size), np.asarray(apply(inputs)[0])
    return found


def plain_rows(number, maps, sides=SCALES):
    """The pooled features of an image's boxes, one box after the other."""
    height, width = SIZES[number]
    rows = []
    for box in BOXES[number].astype(float):
        shape = (box[2] - box[0]) * (box[3] - box[1])

        def distance(side, shape=shape):
            size, _ = maps[number, side]
            return abs(shape * size[0] / height * size[1] / width - SIDE**2)

        size, found = maps[number, min(sides, key=distance)]
        y, x = size[0] / height, size[1] / width
        edges = (box[0] * y, box[2] * y), (box[1] * x, box[3] * x)
        (top, bottom), (left, right) = (
            search_span(*edge, GEOMETRY, size, "paper")
            for edge, size in zip(edges, found.shape, strict=False)
        )
        part = found[top : bottom + 1, left : right + 1]
        rows.append(loop_pool(part, LEVELS).reshape(-1))
    return np.stack(rows)


@pytest.mark.parametrize("sides", [SCALES, SCALES[1:]])
def test_pooled_features_are_those_of_a_plain_loop(sides, folder, plain_maps):
    features = features_from(folder, sides=sides, max_buckets=2)
    program = make_program(features, pooled_rows)
    for number in range(len(SIZES)):
        if number == BROKEN:
            continue
        chosen = np.arange(len(BOXES[number]))
        found = rows_of(features, program, None, number, chosen)
        expected = plain_rows(number, plain_maps, sides)
        largest = np.abs(plain_maps[number, sides[0]][1]).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * largest)
        assert found.std() > 0.01 * largest


def test_chosen_rows_come_back_in_their_order_and_as_often_as_chosen(folder):
    features = features_from(folder)
    program = make_program(features, pooled_rows)
    everything = rows_of(features, program, None, 0, np.arange(len(BOXES[0])))
    chosen = np.array([5, 60, 0, 5, 33, 0])  # 60 is 0 again
    found = rows_of(features, program, None, 0, chosen)
    np.testing.assert_array_equal(found, everything[chosen])
    np.testing.assert_array_equal(found[1], found[2])
    with pytest.raises(ValueError, match="no boxes of image 2 were chosen"):
        rows_of(features, program, None, 2, np.zeros(0, int))


def test_boxes_of_the_same_cells_go_through_the_head_once(folder):
    features = features_from(folder)
    _, count, which = features.inputs(0, np.arange(len(BOXES[0])))
    assert count == len(set(which)) < len(BOXES[0])


def test_a_head_may_give_several_arrays(folder):
    features = features_from(folder)

    def head(weights, pooled):
        return {"sum": pooled.sum(axis=1), "product": pooled @ weights}

    weights = np.random.default_rng(0).normal(size=(14 * 8, 3)).astype(np.float32)
    chosen = np.arange(20)
    found = rows_of(features, make_program(features, head), weights, 1, chosen)
    pooled = rows_of(features, make_program(features, pooled_rows), None, 1, chosen)
    np.testing.assert_allclose(found["sum"], pooled.sum(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found["product"], pooled @ weights, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "count"),
    [
        *((rows, count) for rows in (16, CHUNK) for count in (0, 1, 15, 16)),
        *((2 * CHUNK, CHUNK + more) for more in (-1, 0, 1)),
        (3 * CHUNK, 3 * CHUNK),
        (3 * CHUNK, 2 * CHUNK),
    ],
)
def test_rows_in_chunks_are_those_of_one_call(rows, count):
    rng = np.random.default_rng(0)
    pooled = jnp.asarray(rng.normal(size=(rows, 5)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(5, 2)), jnp.float32)

    def head(weights, pooled):
        return jnp.tanh(pooled @ weights), pooled.argmax(axis=1)

    found = jax.jit(lambda n: in_chunks(head, weights, pooled, n))(count)
    for part, expected in zip(found, head(weights, pooled), strict=True):
        assert part.dtype == expected.dtype
        np.testing.assert_allclose(part[:count], expected[:count], rtol=1e-5)
        chunk = min(rows, CHUNK)
        assert not np.asarray(part)[-(-count // chunk) * chunk :].any()


@pytest.mark.parametrize("count", [1, 16, 17, 255, 256, 257, 513])
def test_windows_are_padded_to_few_different_numbers(count):
    padded = window_features.padded_count(count)
    assert count <= padded <= max(64, 2 * count - 1)
    whole = padded % CHUNK == 0
    assert whole if count > CHUNK else padded in (64, 128, 256)


def test_a_broken_image_is_named_has_no_map_and_stops_nothing(folder, tmp_path, caplog):
    for loaded in load_maps(folder, SCALES, BROKEN):
        assert loaded.size == 0
    assert decodable(SOURCE).tolist() == [True, True, True, False, True]
    assert image_sizes(SOURCE).tolist()[BROKEN] == [0, 0]
    part = SOURCE._replace(records=SOURCE.records[BROKEN : BROKEN + 1])
    convolve(tmp_path, part, sides=(64,))
    assert "skipping a broken image" in caplog.text
    assert "3.png" in caplog.text


def test_an_interrupted_run_computes_what_is_missing_only(folder, tmp_path):
    convolve(tmp_path)
    gone = {(0, 64), (2, 64), (BROKEN, 64), (4, 110)}
    before = {}
    for side in SCALES:
        for number in range(len(SIZES)):
            path = map_file(tmp_path, side, number)
            before[number, side] = path.stat().st_ino
            if (number, side) in gone:
                path.rename(path.with_suffix(".was"))
    # A file that was being written when the run was killed.
    map_file(tmp_path, 64, 0).with_suffix(".partial").write_bytes(b"\x93NUMPY")
    convolve(tmp_path)
    for (number, side), inode in before.items():
        path = map_file(tmp_path, side, number)
        assert (path.stat().st_ino != inode) == ((number, side) in gone)
        expected = np.load(map_file(folder, side, number))
        np.testing.assert_array_equal(np.load(path), expected)


def test_float16_files_are_half_as_large_and_nearly_the_same(folder, tmp_path):
    convolve(tmp_path, dtype="float16", sides=SCALES[:1])
    for number in set(range(len(SIZES))) - {BROKEN}:
        exact = np.load(map_file(folder, SCALES[0], number))
        half = np.load(map_file(tmp_path, SCALES[0], number))
        assert (exact.dtype, half.dtype) == (np.float32, np.float16)
        assert half.shape == exact.shape
        np.testing.assert_allclose(half, exact, atol=1e-3 * exact.max())
        assert np.abs(half - exact).max() > 0
    features = features_from(tmp_path, sides=SCALES[:1])
    found = rows_of(features, make_program(features, pooled_rows), None, 0, [0, 1])
    assert found.dtype == np.float32


def test_sizes_at_a_scale_are_bounded_to_4_to_1():
    sizes = np.array([(60, 80), (40, 230), (200, 40), (0, 0)])
    expected = [[64, 85], [64, 256], [256, 64], [64, 64]]
    assert scaled_sizes(sizes, 64).tolist() == expected


def test_a_network_without_a_pyramid_and_a_scale_too_small_are_refused(tmp_path):
    given = (as_network(*network(None), PLAIN), SOURCE, tmp_path)
    with pytest.raises(ValueError, match="no spatial pyramid"):
        convolve_split(*given, sides=(64,), batch_size=4)
    with pytest.raises(ValueError, match="side of 20 pixels are too small"):
        convolve(tmp_path, sides=(20,))


@pytest.mark.parametrize(
    ("levels", "pooled"), [(LEVELS, False), ((1,), True), (None, True)]
)
def test_warped_windows_give_what_each_gives_alone(levels, pooled, tmp_path):
    model, params = network(levels)
    assert stores_pooled(model) == pooled
    boxes = [own[:11] for own in BOXES]
    seen = as_network(model, params, PLAIN)
    convolve_windows(seen, SOURCE, boxes, tmp_path, context=4, batch_size=8)
    assert kept_as(model).startswith("pooled" if pooled else "maps")
    assert len(list(tmp_path.iterdir())) == len(BOXES)
    load = functools.partial(load_windows, tmp_path)
    features = from_warped(load, boxes, None if pooled else levels)
    program = make_program(features, pooled_rows)
    apply = jax.jit(
        lambda x: model.apply({"params": params}, x)[1]["pyramid"],
    )
    for number in (0, 2):
        expected = []
        for box in boxes[number]:
            warped = warp_windows(
                pixels(number), box[None], SIDE, context=4, fill=100, threads=1
            )
            expected.append(apply((warped.astype(np.float32) - 100) / 50)[0])
        chosen = np.array([3, 0, 10, 3, 7])
        found = rows_of(features, program, None, number, chosen)
        largest = np.abs(expected).max()
        np.testing.assert_allclose(
            found, np.stack(expected)[chosen], rtol=0, atol=1e-5 * largest
        )


def test_an_interrupted_run_warps_what_is_missing_only(tmp_path):
    boxes = [own[:3] for own in BOXES]
    given = (as_network(MODEL, PARAMS, PLAIN), SOURCE, boxes, tmp_path)
    convolve_windows(*given, context=4, batch_size=4, dtype="float16")
    files = sorted(tmp_path.iterdir())
    assert len(files) == 5
    before = np.load(files[1])
    assert before.dtype == np.float16
    assert np.load(files[BROKEN]).size == 0
    files[1].unlink()
    stamps = {path: path.stat().st_ino for path in files if path != files[1]}
    convolve_windows(*given, context=4, batch_size=4, dtype="float16")
    np.testing.assert_array_equal(np.load(files[1]), before)
    assert stamps == {path: path.stat().st_ino for path in stamps}


def test_an_image_without_windows_takes_part(tmp_path):
    run = windows_function(as_network(MODEL, PARAMS, PLAIN), batch_size=4)
    assert run(np.zeros((0, SIDE, SIDE, 3), np.uint8)).shape[0] == 0


def test_what_lies_outside_an_image_is_zero_after_the_mean():
    assert fill_color(PLAIN).tolist() == [100, 100, 100]
    mean = np.random.default_rng(0).random((8, 8, 3)).astype(np.float32)
    image = PLAIN._replace(mean=mean)
    expected = [mean[..., channel].mean() for channel in range(3)]
    np.testing.assert_allclose(fill_color(image), expected, rtol=1e-5)
