"""Scores of views, pooled from maps or cut out, against loops over single images."""

import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sppnet_jax.buckets.whole_images import MAX_ASPECT
from sppnet_jax.classification.accuracy import mean_scores, summarize
from sppnet_jax.classification.scores import Scores, score_split
from sppnet_jax.classification.views import Protocol, named_protocol
from sppnet_jax.data.images import (
    CENTER_AND_CORNERS,
    crop,
    crop_corner,
    decode_image,
    resize_shorter_side,
    resize_whole,
)
from sppnet_jax.network.model import create_model, init_params
from sppnet_jax.network.preprocess import Preprocessing, normalize
from sppnet_jax.network.trained import as_network
from sppnet_jax.network.trunks import backbone_geometry
from sppnet_jax.pyramid.geometry import boxes_to_windows
from tests.data_helpers import make_source
from tests.network_helpers import SHALLOW
from tests.test_spp import loop_pool

SIDE, LEVELS = 61, (3, 2, 1)
MEAN_IMAGE = Preprocessing(
    np.random.default_rng(0).uniform(90, 160, (32, 32, 3)).astype(np.float32),
    64.0,
    np.zeros((3, 3), np.float32),
)
SIZES = [(70, 80), (64, 64), (160, 70), (61, 200), (1, 3000)]


@functools.cache
def network(levels=LEVELS):
    model = create_model(
        "zf5", levels, 3, width=0.03, image_size=SIDE, weight_init="he"
    ).clone(backbone=SHALLOW)
    params = init_params(model, jax.random.key(1))
    # Biases that are not zero: what lies beyond the valid size would show.
    rng = np.random.default_rng(2)
    return model, jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape), params)


def softmax_of(logits):
    return np.asarray(jax.nn.softmax(logits))


def scored_on_maps(protocol, source=None):
    return score_split(
        as_network(*network(), MEAN_IMAGE),
        source or make_source(SIZES),
        protocol,
        batch_size=8,
        max_buckets=2,
        threads=2,
    )


@functools.cache
def compiled(method):
    """The network's map of images, or its logits of pyramids."""
    model, params = network()
    return jax.jit(lambda x: model.apply({"params": params}, x, method=method)[0])


def views_one_by_one(image, protocol):
    """Softmax of each distinct view of an image, convolved unpadded, cut by hand."""
    features, classify = compiled("features"), compiled("classify")
    geometry = backbone_geometry("zf5")
    rows = []
    for scale in protocol.scales:
        resized = resize_whole(image, scale, MAX_ASPECT)
        height, width = resized.shape[:2]
        corners = {
            crop_corner(height - SIDE, width - SIDE, position)
            for position in protocol.positions
        }
        boxes = np.array([(y, x, y + SIDE, x + SIDE) for y, x in corners], float)
        for shown in [resized, resized[:, ::-1]][: 2 if protocol.flip else 1]:
            inputs = normalize(jnp.asarray(shown[None].copy()), MEAN_IMAGE)
            maps = np.asarray(features(inputs))
            windows = boxes_to_windows(
                boxes.reshape(-1, 4), geometry, maps.shape[1:3]
            ).tolist()
            if scale in protocol.whole_at:
                windows.append([0, 0, *maps.shape[1:3]])
            for top, left, bottom, right in windows:
                pyramid = loop_pool(maps[0, top:bottom, left:right], LEVELS)
                rows.append(softmax_of(classify(pyramid.reshape(1, -1)))[0])
    return np.array(rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    "protocol",
    [
        named_protocol("full_image", view=SIDE, resize_side=64, flip=False),
        named_protocol(
            "multi_view_full", view=SIDE, resize_side=64, flip=True, scales=(61, 72)
        ),
    ],
)
def test_views_on_maps_equal_a_loop_over_images_scales_and_windows(protocol):
    found, tables = scored_on_maps(protocol)
    for index, record in enumerate(make_source(SIZES).records):
        alone = views_one_by_one(decode_image(record["image"]), protocol)
        assert found.views[index] == len(alone)
        np.testing.assert_allclose(
            found.scores[index], alone.mean(axis=0), rtol=1e-4, atol=1e-6
        )
    assert found.labels.tolist() == [0, 1, 2, 0, 1]
    assert all(table.programs <= 2 for table in tables)


@pytest.mark.parametrize("levels", [LEVELS, None])
@pytest.mark.parametrize("flip", [False, True])
def test_ten_views_of_crops_equal_a_loop_over_crops(levels, flip):
    model, params = network(levels)
    protocol = Protocol(False, (64,), CENTER_AND_CORNERS, flip)
    source = make_source(SIZES, broken=(2,))
    seen = as_network(model, params, MEAN_IMAGE)
    found, _ = score_split(seen, source, protocol, batch_size=20)
    # Crops come from the whole length, and the needle would be 192,000 pixels long.
    assert found.valid.tolist() == [True, True, False, True, False]
    for index in np.flatnonzero(found.valid):
        image = decode_image(source.records[index]["image"])
        resized = resize_shorter_side(image, 64)
        views = [crop(resized, SIDE, position) for position in CENTER_AND_CORNERS]
        views += [view[:, ::-1] for view in views] if flip else []
        logits, _ = model.apply(
            {"params": params}, normalize(jnp.asarray(np.stack(views)), MEAN_IMAGE)
        )
        np.testing.assert_allclose(
            found.scores[index],
            softmax_of(logits).mean(axis=0),
            rtol=1e-4,
            atol=1e-6,
        )
        assert found.views[index] == len(views)


def test_a_broken_image_is_left_out_and_its_neighbours_keep_their_scores():
    protocol = named_protocol("full_image", view=SIDE, resize_side=64, flip=False)
    whole, _ = scored_on_maps(protocol)
    found, _ = scored_on_maps(protocol, make_source(SIZES, broken=(0, 3)))
    assert found.valid.tolist() == [False, True, True, False, True]
    assert summarize(found)["count"] == 3
    assert summarize(found)["broken"] == 2
    np.testing.assert_allclose(
        found.scores[found.valid], whole.scores[found.valid], rtol=1e-4, atol=1e-6
    )
    assert (found.scores[~found.valid] == 0).all()


def test_a_network_without_spp_is_refused_and_told_what_it_can_do():
    model, params = network(None)
    protocol = named_protocol("full_image", view=SIDE, resize_side=64, flip=False)
    with pytest.raises(ValueError, match="use the protocol single or ten_view"):
        score_split(
            as_network(model, params, MEAN_IMAGE),
            make_source(SIZES),
            protocol,
            batch_size=8,
            max_buckets=2,
            threads=1,
        )


def random_scores(seed, records=200, classes=8):
    rng = np.random.default_rng(seed)
    scores = rng.dirichlet(np.ones(classes), records).astype(np.float32)
    labels = rng.integers(0, classes, records).astype(np.int32)
    return Scores(scores, labels, rng.random(records) < 0.9, np.full(records, 3))


def test_the_summary_equals_a_count_by_hand():
    found = random_scores(0)
    top1 = top5 = 0
    for scores, label, valid, _ in zip(*found, strict=True):
        order = sorted(range(8), key=lambda c, s=scores: -s[c])
        top1 += bool(valid and order[0] == label)
        top5 += bool(valid and label in order[:5])
    report = summarize(found)
    assert (report["top1_correct"], report["top5_correct"]) == (top1, top5)
    assert report["count"] == found.valid.sum()
    assert report["top1"] == top1 / found.valid.sum()
    with pytest.raises(ValueError, match="every image is broken"):
        summarize(found._replace(valid=np.zeros(200, bool)))


@pytest.mark.parametrize(("correct", "count"), [(0, 7), (7, 7), (284, 372), (1, 2)])
def test_the_interval_ends_at_shares_that_the_count_only_just_allows(correct, count):
    """Wilson's: there the count is 1.96 standard deviations from what is expected."""
    scores = np.tile(np.float32([1, 0]), (count, 1))
    labels = (np.arange(count) >= correct).astype(np.int32)
    whole = np.ones(count, bool)
    report = summarize(Scores(scores, labels, whole, np.ones(count, int)))
    assert report["top1_correct"] == correct
    deviations = statistics.NormalDist().inv_cdf(0.975)
    low, high = report["top1_interval"]
    assert 0 <= low <= correct / count <= high <= 1
    for share in {low, high} - {correct / count}:
        spread = np.sqrt(share * (1 - share) * count)
        assert abs(correct - share * count) == pytest.approx(deviations * spread)


def test_networks_are_combined_by_the_mean_of_their_scores():
    first, second = random_scores(0), random_scores(1)
    second = second._replace(labels=first.labels, valid=first.valid)
    combined = mean_scores([first, second])
    expected = (first.scores.astype(np.float64) + second.scores) / 2
    np.testing.assert_allclose(combined.scores, expected, rtol=1e-6)
    assert (combined.views == 6).all()
    with pytest.raises(ValueError, match="other records"):
        mean_scores([first, random_scores(2)])
