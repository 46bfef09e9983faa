"""End-to-end training: what a step sees, its losses, and that it can go on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from network_helpers import drawn_params

from sppnet_jax.data.sources import Objects
from sppnet_jax.detection.box_layer import BOX, SPREAD, predict_boxes
from sppnet_jax.detection.boxes import decode_boxes, iou
from sppnet_jax.detection.end_to_end import (
    begin_params,
    draw_images,
    draw_windows,
    losses_of,
    mirrored_boxes,
    training_windows,
)
from sppnet_jax.detection.finetune import Finetuning
from sppnet_jax.network.model import create_model
from sppnet_jax.network.preprocess import Inputs, make_preprocessing
from sppnet_jax.pyramid.pooling import spatial_pyramid_pool

SETTINGS = Finetuning(images=2, batch_size=16, positives=0.25)
OBJECTS = Objects(
    np.array([[0.0, 0, 20, 20], [40, 40, 60, 60]]),
    np.array([1, 0], np.int32),
    np.zeros(2, bool),
)


def boxes_at(*corners):
    return np.array([[y, x, y + 20, x + 20] for y, x in corners], np.float64)


BOXES = boxes_at((0, 0), (0, 4), (0, 12), (40, 44), (100, 100))


def test_windows_show_objects_or_overlap_them_a_little():
    found = training_windows(BOXES, OBJECTS, SETTINGS)
    assert found.positives.tolist() == [0, 1, 3]
    assert found.labels.tolist() == [1, 1, 0]
    np.testing.assert_array_equal(found.targets, OBJECTS.boxes[[0, 0, 1]])
    assert found.negatives.tolist() == [2]


def test_where_none_overlaps_a_little_all_others_are_negatives():
    far = BOXES[[0, 4]]
    assert training_windows(far, OBJECTS, SETTINGS).negatives.tolist() == [1]
    nothing = Objects(np.zeros((0, 4)), np.zeros(0, np.int32), np.zeros(0, bool))
    found = training_windows(BOXES, nothing, SETTINGS)
    assert found.negatives.tolist() == [0, 1, 2, 3, 4]
    assert not len(found.positives)


def draw(step=3, place=0, settings=SETTINGS, windows=None, sides=(60, 80)):
    windows = windows or [training_windows(BOXES, OBJECTS, settings)]
    return draw_windows(windows, 0, settings, sides, 2, (7, 1, step, place))


def test_a_step_is_a_function_of_seed_and_number():
    for step in (0, 3):
        for place in (0, 1):
            one, other = draw(step, place), draw(step, place)
            assert one[:3] == other[:3]
            for part, same in zip(one[3:], other[3:], strict=True):
                np.testing.assert_array_equal(part, same)
    assert len({draw(step).mirrored for step in range(12)}) == 2
    assert {draw(step).side for step in range(12)} == {60, 80}


def test_a_turn_sees_each_image_once_tall_with_tall_and_wide_with_wide():
    sizes = np.array([[30, 40], [40, 30]] * 5)
    usable = [0, 1, 2, 3, 4, 5, 6, 7]
    turns = [
        [draw_images(4 * turn + step, usable, sizes, 2, 7) for step in range(4)]
        for turn in range(3)
    ]
    for turn in turns:
        assert sorted(np.ravel(turn)) == usable
        assert all((one - other) % 2 == 0 for one, other in turn)
    assert turns[0] != turns[1] != turns[2]


def test_a_step_of_more_images_than_there_are_sees_them_again():
    assert draw_images(5, [3], np.ones((4, 2)), 2, 7) == [3, 3]


def test_a_quarter_of_an_image_s_windows_shows_objects_the_rest_is_background():
    found = draw()
    assert found.labels.tolist()[2:] == [2] * 6
    assert np.isfinite(found.targets).all(axis=1).tolist() == [True] * 2 + [False] * 6
    for row, label, target in zip(*found[3:], strict=True):
        overlap = iou(BOXES[[row]], OBJECTS.boxes)[0]
        if label == 2:
            assert 0.1 <= overlap.max() < 0.5
        else:
            assert OBJECTS.labels[overlap.argmax()] == label
            np.testing.assert_array_equal(target, OBJECTS.boxes[overlap.argmax()])


def test_an_image_s_classes_and_their_objects_have_the_same_share_of_positives():
    """Two objects of class 0, one of them with nine windows; one of class 1."""
    objects = Objects(
        np.array([[0.0, 0, 20, 20], [40, 40, 60, 60], [80, 80, 90, 90]]),
        np.array([0, 0, 1], np.int32),
        np.zeros(3, bool),
    )
    boxes = boxes_at((40, 40), *((0, x) for x in range(5)), (5, 0), (4, 0), (3, 0))
    boxes = np.concatenate([objects.boxes, boxes])
    windows = [training_windows(boxes, objects, SETTINGS)]
    for balanced, expected in ((True, (1 / 4, 1 / 4, 1 / 2)), (False, None)):
        settings = SETTINGS._replace(batch_size=40_000, positives=1.0)
        found = draw(settings=settings._replace(balanced=balanced), windows=windows)
        counts = np.array([len(windows[0].positives)])
        shares = np.array(
            [(found.targets == one).all(axis=1).mean() for one in objects.boxes]
        )
        if expected is None:
            of_each = (iou(boxes, objects.boxes) >= 0.5).sum(axis=0)
            expected = of_each / counts
        np.testing.assert_allclose(shares, expected, atol=0.02)


def test_an_image_without_objects_is_all_background():
    nothing = Objects(np.zeros((0, 4)), np.zeros(0, np.int32), np.zeros(0, bool))
    windows = [training_windows(BOXES, nothing, SETTINGS)] * 2
    found = draw(windows=windows)
    assert found.labels.tolist() == [2] * 8
    assert np.isnan(found.targets).all()


def test_boxes_of_a_mirrored_image_show_the_same_pixels():
    image = np.random.default_rng(0).integers(0, 99, (20, 30))
    boxes = np.array([[2, 3, 9, 14], [0, 0, 20, 30]])
    for box, there in zip(boxes, mirrored_boxes(boxes, 30), strict=True):
        cut, other = (
            at[own[0] : own[2], own[1] : own[3]]
            for at, own in ((image, box), (image[:, ::-1], there))
        )
        np.testing.assert_array_equal(cut, other[:, ::-1])


def test_the_box_layer_predicts_encoded_boxes():
    params = {BOX: {"kernel": np.zeros((3, 8)), "bias": np.arange(8.0)}}
    deltas = np.asarray(predict_boxes(params, np.ones((1, 3))))
    assert deltas.shape == (1, 2, 4)
    np.testing.assert_allclose(deltas[0, 1], np.arange(4, 8) * SPREAD)
    moved = np.asarray(decode_boxes(BOXES[:1], deltas[0, :1]))
    np.testing.assert_allclose((moved[0, 1] + moved[0, 3]) / 2, 10 + 20 * 0.1)


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="negative_overlap"):
        SETTINGS._replace(negative_overlap=(0.5, 0.1)).check()


@pytest.fixture(scope="module")
def batch():
    """Two images in a bucket, of different sizes, with three windows each."""
    rng = np.random.default_rng(0)
    sizes = np.array([[96, 128], [128, 80]])
    images = np.zeros((2, 128, 128, 3), np.uint8)
    for image, (rows, columns) in zip(images, sizes, strict=True):
        image[:rows, :columns] = rng.integers(0, 256, (rows, columns, 3))
    arrays = {
        "image": images,
        "size": sizes.astype(np.int32),
        "windows": np.array([[[0, 0, 1, 2], [0, 1, 1, 3], [0, 0, 1, 3]]] * 2, np.int32),
        "label": np.array([0, 1, 2, 1, 2, 2], np.int32),
        "target": rng.normal(0, 0.2, (6, 4)).astype(np.float32),
    }
    return {name: jnp.asarray(array) for name, array in arrays.items()}


MODEL = create_model("zf5", (2, 1), 7, width=1 / 64, image_size=48, dropout=0.0)
HEAD = MODEL.clone(num_classes=3)  # two classes and background
PLAIN = make_preprocessing(Inputs(scale=60.0), None, None)


@pytest.fixture(scope="module")
def params():
    return begin_params(HEAD, drawn_params(MODEL), seed=0)


def plain_losses(params, batch, box_weight):
    """From the definition, window by window, of maps of images at their own size."""
    convs = {"params": {k: v for k, v in params.items() if k != BOX}}
    batch = {name: np.asarray(array) for name, array in batch.items()}
    found = []
    for image, size, windows in zip(
        batch["image"], batch["size"], batch["windows"], strict=True
    ):
        own = image[None, : size[0], : size[1]].astype(np.float32)
        own = jnp.asarray((own - PLAIN.mean) / PLAIN.scale)
        maps, _ = MODEL.apply(convs, own, method="features")
        for top, left, bottom, right in windows:
            crop = maps[:, top:bottom, left:right]
            pooled = spatial_pyramid_pool(crop, (2, 1)).reshape(-1)
            fc6 = jnp.maximum(
                pooled @ params["fc6"]["kernel"] + params["fc6"]["bias"], 0
            )
            fc7 = jnp.maximum(fc6 @ params["fc7"]["kernel"] + params["fc7"]["bias"], 0)
            logits = fc7 @ params["fc8"]["kernel"] + params["fc8"]["bias"]
            moves = (fc7 @ params[BOX]["kernel"] + params[BOX]["bias"]).reshape(2, 4)
            label, target = batch["label"][len(found)], batch["target"][len(found)]
            loss = -jnp.log(jnp.exp(logits[label]) / jnp.exp(logits).sum())
            if label < 2:
                off = jnp.abs(moves[label] - target / SPREAD)
                loss += box_weight * jnp.where(off < 1, off**2 / 2, off - 0.5).sum()
            found.append(loss)
    return jnp.stack(found)


@pytest.mark.slow
@pytest.mark.parametrize("box_weight", [0.0, 2.0])
def test_losses_and_gradients_are_those_of_cropping_each_window(
    batch, params, box_weight
):
    losses = losses_of(MODEL, HEAD, PLAIN, box_weight)
    key = jax.random.PRNGKey(0)
    ours, logits = jax.jit(losses)(params, batch, key)
    assert logits.shape == (6, 3)
    expected = jax.jit(lambda p: plain_losses(p, batch, box_weight))(params)
    np.testing.assert_allclose(ours, expected, rtol=1e-4)
    gradient, plain = (
        jax.jit(jax.grad(sums))(params)
        for sums in (
            lambda p: losses(p, batch, key)[0].sum(),
            lambda p: plain_losses(p, batch, box_weight).sum(),
        )
    )
    for name in params:
        scale = max(np.abs(leaf).max() for leaf in plain[name].values())
        assert scale > 0 or (name == BOX and not box_weight)
        for kind, leaf in plain[name].items():
            np.testing.assert_allclose(
                gradient[name][kind], leaf, atol=1e-4 * max(scale, 1e-9)
            )


def test_gradients_into_the_trunk_are_those_of_finite_differences(batch, params):
    losses = losses_of(MODEL, HEAD, PLAIN, 1.0)

    @jax.jit
    def total(kernel):
        changed = {**params, "conv5": {**params["conv5"], "kernel": kernel}}
        return losses(changed, batch, jax.random.PRNGKey(0))[0].sum()

    kernel = params["conv5"]["kernel"]
    direction = np.random.default_rng(1).normal(size=kernel.shape).astype(np.float32)
    slope = float((jax.grad(total)(kernel) * direction).sum())
    step = 1e-3
    there, back = total(kernel + step * direction), total(kernel - step * direction)
    assert slope == pytest.approx(float(there - back) / (2 * step), rel=0.02)
