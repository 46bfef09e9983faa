"""Buckets: which shapes, which image goes where, and that padding changes nothing."""

import itertools

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sppnet_jax as sn
from sppnet_jax.buckets import choice as bucket_choice
from sppnet_jax.buckets import table as buckets_module
from sppnet_jax.buckets.choice import choose_buckets
from sppnet_jax.buckets.table import (
    BucketTable,
    pad_to_bucket,
    padding_waste,
    smallest_bucket,
)
from sppnet_jax.network.stack import LRN, Conv
from sppnet_jax.network.trunks import BACKBONES, PAPER
from tests.data_helpers import picture
from tests.network_helpers import drawn_params

MIXED = [(64, 64), (64, 96), (96, 64), (128, 128)]


def test_an_image_goes_to_the_smallest_bucket_that_holds_it():
    buckets = [(64, 128), (64, 64), (128, 64), (96, 96)]
    assert smallest_bucket((64, 64), buckets) == (64, 64)
    assert smallest_bucket((64, 65), buckets) == (64, 128)
    assert smallest_bucket((65, 64), buckets) == (128, 64)
    assert smallest_bucket((65, 65), buckets) == (96, 96)


def test_an_image_larger_than_every_bucket_is_refused_with_their_sizes():
    with pytest.raises(
        ValueError, match=r"no bucket holds an image of 129×64; .* 64×128"
    ):
        smallest_bucket((129, 64), [(64, 128), (128, 64)])


def test_padding_keeps_the_image_at_the_top_left():
    image = np.random.default_rng(0).integers(1, 256, (3, 5, 3)).astype(np.uint8)
    padded = pad_to_bucket(image, (4, 8))
    np.testing.assert_array_equal(padded[:3, :5], image)
    assert (padded.shape, padded.sum()) == ((4, 8, 3), image.sum())
    with pytest.raises(ValueError, match=r"an image of 3×5 does not fit into .* 9×4"):
        pad_to_bucket(image, (9, 4))


# Which buckets are best.


def fixed_side(rng, side, lengths, count):
    """Landscape and portrait sizes with one side fixed, lengths from a range."""
    other = rng.integers(*lengths, count)
    sizes = np.stack([np.full(count, side), other], axis=1)
    return np.where(rng.random((count, 1)) < 0.5, sizes, sizes[:, ::-1])


def wild(rng, count):
    """Sizes of photographs of every kind: sides 56 to 2,400, aspects up to 3.4."""
    height = rng.integers(56, 2401, count)
    aspect = np.exp(rng.uniform(-np.log(3.4), np.log(3.4), count))
    return np.stack([height, np.clip(height * aspect, 56, 2400).astype(int)], axis=1)


KINDS = {
    "one shorter side": lambda rng: fixed_side(rng, 20, (20, 70), rng.integers(1, 9)),
    "one longer side": lambda rng: fixed_side(rng, 70, (20, 71), rng.integers(1, 9)),
    "one height": lambda rng: np.stack([[40] * 8, rng.integers(20, 90, 8)], axis=1),
    "any sizes": lambda rng: rng.integers(5, 60, (rng.integers(1, 8), 2)),
    "repeated sizes": lambda rng: rng.integers(1, 5, (12, 2)),
}


def padded_area(sizes, buckets):
    return sum(np.prod(smallest_bucket(tuple(size), buckets)) for size in sizes)


def least_area_by_brute_force(sizes, count, multiple):
    """Tries every set of buckets whose sides are sides of (rounded) images."""
    sizes = -(-sizes // multiple) * multiple
    grid = itertools.product(np.unique(sizes[:, 0]), np.unique(sizes[:, 1]))
    candidates = np.array(list(grid))
    holds = (candidates[:, None] >= sizes).all(axis=2)
    areas = np.where(holds, candidates.prod(axis=1)[:, None], 10**9)
    sets = itertools.combinations(range(len(areas)), min(count, len(areas)))
    return min(areas[list(chosen)].min(axis=0).sum() for chosen in sets)


@pytest.mark.parametrize("kind", KINDS)
def test_no_set_of_buckets_pads_less_than_the_chosen_one(kind):
    rng = np.random.default_rng(len(kind))
    for trial in range(40):
        sizes, count = KINDS[kind](rng), 1 + trial % 3
        multiple = (1, 4, 16)[trial // 3 % 3]
        chosen = choose_buckets(sizes, count, multiple=multiple)
        assert len(chosen) <= count
        assert all(side % multiple == 0 for bucket in chosen for side in bucket)
        least = least_area_by_brute_force(sizes, count, multiple)
        assert padded_area(sizes, chosen) == least, (sizes.tolist(), count, multiple)


@pytest.mark.parametrize("lengths", [(50, 53), (50, 70)])
def test_both_exact_methods_agree_on_the_sizes_of_one_shorter_side(lengths):
    rng = np.random.default_rng(0)
    sizes = np.vstack([fixed_side(rng, 50, lengths, 60), [[50, 80], [80, 50]]])
    distinct, weights = np.unique(sizes, axis=0, return_counts=True)
    for count in (2, 4, 7):
        if count < len(distinct):
            other = bucket_choice._cover_any(distinct, weights, count)
            chosen = choose_buckets(sizes, count)
            assert padded_area(sizes, chosen) == padded_area(sizes, other.tolist())


def test_as_many_buckets_as_sizes_leave_no_padding():
    sizes = [(10, 40), (30, 20), (10, 40), (31, 20)]
    buckets = choose_buckets(sizes, 3)
    assert buckets == ((10, 40), (30, 20), (31, 20)) == choose_buckets(sizes, 9)
    assert padding_waste(sizes, buckets) == 0


@pytest.mark.parametrize("kind", ["one shorter side", "any sizes"])
def test_more_buckets_never_pad_more(kind):
    rng = np.random.default_rng(3)
    few = fixed_side(rng, 50, (50, 170), 300) if "side" in kind else wild(rng, 30)
    waste = [padding_waste(few, choose_buckets(few, count)) for count in range(1, 9)]
    assert waste == sorted(waste, reverse=True)
    assert waste[0] > 0.3 > 0.2 > waste[-1]


def test_padding_waste_is_the_share_of_padding_among_padded_pixels():
    assert padding_waste([(10, 10)], [(10, 20)]) == 0.5
    assert padding_waste([(10, 10)] * 3 + [(10, 20)], [(10, 20)]) == 0.375


def test_thousands_of_wild_sizes_are_searched_and_the_log_says_so(caplog):
    sizes = wild(np.random.default_rng(1), 5000)
    buckets = choose_buckets(sizes, 8)
    assert len(buckets) == 8
    # A regular choice to beat: the eight smallest squares and oblongs of a grid.
    plain = [(h, w) for h in (800, 1600, 2400) for w in (800, 1600, 2400)]
    assert padding_waste(sizes, buckets) < padding_waste(sizes, plain)
    assert "found by a search that may miss the best ones" in caplog.text


def test_hundreds_of_lengths_in_both_orientations_come_close_to_the_best(
    monkeypatch, caplog
):
    sizes = fixed_side(np.random.default_rng(2), 50, (50, 171), 2000)
    best = padding_waste(sizes, choose_buckets(sizes, 6))
    assert not caplog.text
    monkeypatch.setattr(bucket_choice, "_MOST_STATES", 2000)
    assert best <= padding_waste(sizes, choose_buckets(sizes, 6)) < best + 0.005
    assert "may miss the best ones" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 2), r"sizes must be \(height, width\) pairs, .* got shape \[0\]"),
        (([(5, 0)], 2), "at least 1, got int64 from 0"),
        (([(5, 1.5)], 2), "whole numbers of at least 1, got float64"),
        (([(5, 5)], 0), "count and multiple must be at least 1, got count=0"),
    ],
)
def test_sizes_and_counts_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose_buckets(*arguments)


# The table of compiled programs.


def masked_sums(params, images, sizes):
    """Each image's sum over its valid pixels, a dict with its valid size."""
    rows = jnp.arange(images.shape[1])[:, None] < sizes[:, 0, None, None]
    columns = jnp.arange(images.shape[2]) < sizes[:, 1, None, None]
    inside = (rows & columns)[..., None]
    sums = jnp.where(inside, images, 0).astype(jnp.int32).sum((1, 2))
    return {"sum": params["scale"] * sums, "size": sizes}


def make_table(buckets=MIXED, batch_size=4, **arguments):
    return BucketTable(
        masked_sums, {"scale": jnp.int32(2)}, buckets, batch_size, **arguments
    )


def noise(*size, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (*size, 3), dtype=np.uint8)


def random_pairs(count, low=30, high=128, seed=0):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(low, high + 1, (count, 2))
    return [(f"image {k}", noise(*size, seed=k)) for k, size in enumerate(sizes)]


def check(results, pairs):
    results = list(results)
    assert sorted(key for key, _ in results) == sorted(key for key, _ in pairs)
    images = dict(pairs)
    for key, result in results:
        np.testing.assert_array_equal(result["sum"], 2 * images[key].sum((0, 1)))
        np.testing.assert_array_equal(result["size"], images[key].shape[:2])


def test_every_image_comes_back_once_with_its_own_result():
    table, pairs = make_table(), random_pairs(61)
    check(table.map(iter(pairs)), pairs)
    assert sum(row.images for row in table.rows()) == 61
    for row in table.rows():
        assert row.calls == -(-row.images // 4)
        assert row.seconds_per_call > 0


def test_hundreds_of_sizes_compile_no_more_programs_than_there_are_buckets():
    pairs = random_pairs(300, low=10)
    assert len({image.shape for _, image in pairs}) > 290
    buckets = choose_buckets([image.shape[:2] for _, image in pairs], 3)
    table = make_table(buckets, batch_size=8)
    check(table.map(pairs), pairs)
    assert table.programs == 3
    check(table.map(pairs), pairs)
    assert table.programs == 3


def test_a_bucket_is_compiled_when_first_needed_or_ahead_of_time():
    table = make_table()
    assert (table.programs, table.rows()[0].compile_seconds) == (0, None)
    list(table.map([("a", noise(60, 60)), ("b", noise(60, 64))]))
    assert table.programs == 1
    table.compile()
    assert table.programs == 4
    assert all(row.compile_seconds > 0 for row in table.rows())


def test_the_batch_size_is_rounded_up_to_the_devices():
    assert make_table(batch_size=5).batch_size == 4 * 2
    one = make_table(batch_size=5, devices=jax.devices()[:1])
    assert one.batch_size == 5
    pairs = random_pairs(12)
    check(one.map(pairs), pairs)


def test_padded_share_counts_blank_rows_too():
    table = make_table([(10, 20)])
    list(table.map([("a", noise(10, 20)), ("b", noise(10, 10))]))
    (row,) = table.rows()
    assert (row.calls, row.images, row.padded_share) == (1, 2, 1 - 300 / 800)


def test_what_is_left_of_a_bucket_joins_a_larger_one_that_has_room():
    table = make_table([(64, 64), (64, 96), (96, 64), (96, 96)])
    small = [(("small", n), noise(50, 60, seed=n)) for n in range(6)]  # 4 and 2 left
    wide = [(("wide", n), noise(64, 90, seed=n)) for n in range(3)]  # room for one
    large = [(("large", n), noise(96, 96, seed=n)) for n in range(2)]  # room for two
    pairs = [*small, *wide, *large]
    check(table.map(pairs), pairs)
    calls = {row.bucket: (row.calls, row.images) for row in table.rows()}
    assert calls == {
        (64, 64): (1, 4),
        (64, 96): (1, 3),
        (96, 64): (0, 0),
        (96, 96): (1, 4),
    }
    assert table.programs == 3


def test_every_image_stays_in_its_own_bucket_where_that_is_asked_for():
    table = make_table([(64, 64), (64, 96)])
    pairs = [("small", noise(50, 60)), ("wide", noise(64, 90))]
    check(table.map(pairs, join=False), pairs)
    calls = {row.bucket: (row.calls, row.images) for row in table.rows()}
    assert calls == {(64, 64): (1, 1), (64, 96): (1, 1)}


def test_joining_never_computes_more_pixels_and_loses_no_image():
    rng = np.random.default_rng(0)
    saved = 0
    for _ in range(200):
        buckets = [tuple(b) for b in rng.integers(1, 9, (5, 2)).tolist()]
        waiting = {b: [(b, n) for n in range(rng.integers(1, 5))] for b in buckets}
        before = sum(h * w for h, w in waiting)
        images = sorted(pair for own in waiting.values() for pair in own)
        joined = buckets_module._joined(waiting, 4)
        assert sorted(pair for _, own in joined for pair in own) == images
        assert all(0 < len(own) <= 4 for _, own in joined)
        for (height, width), own in joined:
            assert all(height >= b[0] and width >= b[1] for b, _ in own)
        saved += before - sum(h * w for (h, w), _ in joined)
        assert before >= sum(h * w for (h, w), _ in joined)
    assert saved > 0


def test_a_buckets_program_can_be_called_by_itself():
    table = make_table()
    images, sizes = np.stack([noise(64, 96)] * 4), np.full((4, 2), (30, 96), np.int32)
    result = table.program((64, 96))(images, sizes)
    np.testing.assert_array_equal(result["sum"][0], 2 * images[0, :30].sum((0, 1)))
    assert table.programs == 1
    with pytest.raises(ValueError, match=r"no bucket 64×65; there are 64×64, 64×96"):
        table.program((64, 65))


def test_flops_and_bytes_are_those_of_the_whole_call():
    def matmul(weights, images, sizes):
        flat = images.reshape(len(images), -1).astype(jnp.float32)
        return flat @ weights

    weights = np.ones((30 * 30 * 3, 50), np.float32)
    for devices in (1, 4):
        table = BucketTable(
            matmul, weights, [(30, 30)], 8, devices=jax.devices()[:devices]
        )
        table.compile()
        (row,) = table.rows()
        assert row.flops == pytest.approx(2 * 8 * 2700 * 50, rel=0.1)
        assert row.bytes > weights.nbytes * devices


def test_a_backend_without_cost_analysis_leaves_blanks():
    class Silent:
        def __init__(self, costs):
            self.costs = costs

        def cost_analysis(self):
            return self.costs

    for costs in (None, [], {}, [{"flops": 3.0}]):
        flops, read = (
            buckets_module._cost(Silent(costs), name)
            for name in ("flops", "bytes accessed")
        )
        assert (flops, read) == (3.0 if costs and costs[0] else None, None)


def test_the_table_prints_one_aligned_line_for_each_bucket():
    table = make_table()
    list(table.map([("a", noise(60, 60))]))
    head, *lines, total = str(table).splitlines()
    assert head.split()[:2] == ["bucket", "batch"]
    assert [line.split()[0] for line in lines] == [
        "64×64",
        "64×96",
        "96×64",
        "128×128",
    ]
    assert len({len(line) for line in (head, *lines)}) == 1
    assert lines[0].endswith("78.0%")
    assert lines[1].split()[2:] == ["–", "–", "–", "0", "0", "–", "–"]
    assert total == "compiled: 1 of 4 buckets"


def test_a_run_that_is_given_up_leaves_the_table_usable():
    table, pairs = make_table(), random_pairs(60)
    run = table.map(pairs)
    for _ in range(3):
        next(run)
    run.close()
    assert sum(row.images for row in table.rows()) == 4
    check(table.map(pairs), pairs)
    assert sum(row.images for row in table.rows()) == 64


def test_results_arrive_while_images_are_still_being_read():
    read = []

    def reading():
        for key, image in random_pairs(40, low=100):
            read.append(key)
            yield key, image

    run = make_table().map(reading())
    next(run)
    assert len(read) == 8


def test_the_results_before_a_refused_image_are_not_lost():
    table = make_table()
    pairs = [(key, noise(40, 50)) for key in range(7)]
    run, keys = table.map([*pairs, ("large", noise(500, 500)), *pairs]), []
    with pytest.raises(ValueError, match="'large' of 500×500 fits into no bucket"):
        keys.extend(key for key, _ in run)
    assert keys == list(range(7))


@pytest.mark.parametrize("size", [(129, 20), (20, 129)])
def test_an_image_that_fits_no_bucket_is_refused_before_it_is_computed(size):
    table = make_table()
    message = (
        rf"image 'x\.jpg' of {size[0]}×{size[1]} fits into no bucket; .* 128×128\. "
        "Add a larger bucket, resize the image, or allow too_large='shrink'"
    )
    with pytest.raises(ValueError, match=message):
        list(table.map([("x.jpg", noise(*size))]))
    assert table.programs == 0


def test_an_image_that_fits_no_bucket_shrinks_when_asked_and_is_counted(caplog):
    table = make_table([(64, 96), (96, 64)], too_large="shrink")
    wide, tall = picture(100, 300), picture(250, 100)
    results = dict(table.map([("wide", wide), ("tall", tall), ("ok", noise(9, 9))]))
    for key, image, size in [("wide", wide, (32, 96)), ("tall", tall, (96, 38))]:
        assert tuple(results[key]["size"]) == size
        small = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
        np.testing.assert_array_equal(results[key]["sum"], 2 * small.sum((0, 1)))
    assert table.shrunk == 2
    assert str(table).endswith("; images shrunk to fit: 2")
    assert caplog.text.count("fits into no bucket and was shrunk to 32×96") == 1
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((9, 9, 3), np.float32), r"uint8 \[height, width, 3\], got float32"),
        (np.zeros((9, 9), np.uint8), r"got uint8 \[9, 9\]"),
        (np.zeros((0, 99, 3), np.uint8), r"got uint8 \[0, 99, 3\]"),
        (noise(60, 4), "'x' of 60×4 has a side of less than 5 pixels"),
        (noise(60, 999), "60×999 shrunk to 3×64 has a side of less than 5"),
    ],
)
def test_images_that_cannot_be_scored_are_refused_by_name(image, message):
    table = make_table([(64, 64)], too_large="shrink", min_side=5)
    with pytest.raises(ValueError, match=message):
        list(table.map([("x", image)]))
    assert table.programs == table.shrunk == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"buckets": []}, r"got shape \[0\]"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"too_large": "crop"}, "unknown too_large 'crop': use 'refuse' or 'shrink'"),
    ],
)
def test_a_table_that_cannot_be_built_is_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_table(**arguments)


# An image in a bucket scores as it does alone.

LEVELS = (4, 3, 2, 1)
BUCKETS = [(84, 190), (190, 84)]


def forward_by_hand(name, params, image):
    """The logits of one image at its own size, in float64, layer by layer."""
    maps, number = image.astype(np.float64) / 128 - 1, 0
    for layer in BACKBONES[name].layers:
        if isinstance(layer, LRN):
            near = np.pad(maps**2, ((0, 0), (0, 0), (layer.size // 2,) * 2))
            near = np.lib.stride_tricks.sliding_window_view(near, layer.size, 2)
            maps = maps / (layer.k + layer.alpha * near.sum(-1)) ** layer.beta
            continue
        conv = isinstance(layer, Conv)
        beyond = 0 if conv else -np.inf
        pad = ((layer.padding,) * 2, (layer.padding,) * 2, (0, 0))
        maps = np.pad(maps, pad, constant_values=beyond)
        views = np.lib.stride_tricks.sliding_window_view(
            maps, (layer.kernel, layer.kernel), (0, 1)
        )[:: layer.stride, :: layer.stride]
        if conv:
            number += 1
            kernel, bias = (params[f"conv{number}"][k] for k in ("kernel", "bias"))
            maps = np.tensordot(views, kernel, ((2, 3, 4), (2, 0, 1))) + bias
            maps = np.maximum(maps, 0)
        else:
            maps = views.max((3, 4))
    vector = np.concatenate(
        [
            maps[top:bottom, left:right].max((0, 1))
            for level in LEVELS
            for top, bottom in sn.pyramid_bins(maps.shape[0], level)
            for left, right in sn.pyramid_bins(maps.shape[1], level)
        ]
    )
    for layer in ("fc6", "fc7", "fc8"):
        vector = vector @ params[layer]["kernel"] + params[layer]["bias"]
        vector = np.maximum(vector, 0) if layer != "fc8" else vector
    return vector, maps.shape[:2]


@pytest.fixture(scope="module", params=PAPER)
def network(request):
    """A narrow network whose biases are not zero: its name, params, table."""
    model = sn.create_model(request.param, LEVELS, 7, width=1 / 16, image_size=64)
    params = drawn_params(model)

    def score(params, images, sizes):
        inputs = images.astype(jnp.float32) / 128 - 1
        return model.apply({"params": params}, inputs, sizes)[0]

    table = BucketTable(score, params, BUCKETS, 4, devices=jax.devices()[:2])
    return request.param, params, table


def test_random_sizes_score_as_worked_out_by_hand(network):
    name, params, table = network
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    rng = np.random.default_rng(0)
    sizes = np.vstack(
        [rng.integers(56, (85, 191), (16, 2)), rng.integers(56, (191, 85), (16, 2))]
    )
    images = {tuple(map(int, size)): noise(*size) for size in sizes}
    scores, parities = dict(table.map(images.items())), set()
    for size, image in images.items():
        alone, (rows, columns) = forward_by_hand(name, params, image)
        assert np.abs(scores[size] - alone).max() <= 1e-5 * np.abs(alone).max()
        assert scores[size].argmax() == alone.argmax()
        parities.add((rows % 2, columns % 2))
    assert len(parities) == 4
    assert table.programs == 2
