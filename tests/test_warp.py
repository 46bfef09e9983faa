"""R-CNN's windows: where a square's pixels lie in the image, and what they show."""

import numpy as np
import pytest

from sppnet_jax.detection.warp import warp_windows


def noise(height, width, step=1, seed=0):
    """A random image whose values are multiples of `step`."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 256 // step, (height, width, 3)) * step
    return values.astype(np.uint8)


def weighted(image, box, side, context, fill):
    """The warped window, float64, from the formula, pixel by pixel.

    Pixel i covers p pixels of the image from `start + i · p`; the weights fall off
    linearly from their middle, to zero p pixels away, or one pixel where p is less.
    """
    warped = np.zeros((side, side, 3))
    spans = [(box[k + 2] - box[k]) / (side - 2 * context) for k in (0, 1)]
    for index in np.ndindex(side, side):
        weights = [{}, {}]
        for k in (0, 1):
            middle = box[k] + (index[k] - context + 0.5) * spans[k]
            reach = max(spans[k], 1)
            for pixel in range(int(middle - reach) - 2, int(middle + reach) + 3):
                weight = 1 - abs(pixel + 0.5 - middle) / reach
                if weight > 0:
                    weights[k][pixel] = weight
        for y, down in weights[0].items():
            for x, across in weights[1].items():
                inside = 0 <= y < image.shape[0] and 0 <= x < image.shape[1]
                color = image[y, x] if inside else fill
                warped[index] += down * across * np.asarray(color, float)
        warped[index] /= sum(weights[0].values()) * sum(weights[1].values())
    return warped


BOXES = [
    (5, 6, 15, 26),  # enlarged
    (3.3, 2.1, 28.7, 39.9),  # fractions
    (0, 0, 30, 40),  # the image: its surroundings are all outside
    (-7, 20, 22, 55),  # over the border
    (10, 0, 12, 40),  # enlarged along one side, shrunk along the other
    (29, 39, 30, 40),
    (12.4, 7.2, 12.6, 7.3),  # less than a pixel
]


@pytest.mark.parametrize(("side", "context"), [(12, 2), (9, 0), (24, 7)])
def test_windows_are_what_the_weights_say(side, context):
    image = noise(30, 40)
    warped = warp_windows(image, np.array(BOXES), side, context=context, fill=90)
    for window, box in zip(warped, BOXES, strict=True):
        # Pillow rounds after each direction, once to a half and once more.
        expected = weighted(image, box, side, context, 90)
        np.testing.assert_allclose(window, expected, atol=1.01)


@pytest.mark.parametrize("span", [0.5, 1, 2])
def test_windows_at_whole_scales_are_exact(span):
    # All weights are multiples of 1/8: nothing is rounded.
    image = noise(40, 50, step=64)
    side, context = 12, 3
    box = (10, 20, 10 + span * 6, 20 + span * 6)
    warped = warp_windows(image, np.array([box]), side, context=context)[0]
    np.testing.assert_array_equal(warped, weighted(image, box, side, context, 0))
    if span == 1:
        np.testing.assert_array_equal(warped, image[7:19, 17:29])


@pytest.mark.parametrize("side", [8, 40])
def test_a_ramp_tells_where_each_pixel_looks(side):
    across = np.tile(np.arange(25, dtype=np.uint8) * 10, (25, 1))
    ramp = np.stack([across, across.T, across], axis=-1)
    box, context = (6.4, 7.7, 17.2, 15.3), side // 8
    warped = warp_windows(ramp, np.array([box]), side, context=context)[0]
    steps = np.arange(side) - context + 0.5
    for k, seen in ((0, warped[:, 0, 1]), (1, warped[0, :, 0])):
        span = (box[k + 2] - box[k]) / (side - 2 * context)
        # A pixel's value is that of its middle, half a pixel from its edge.
        position = box[k] + steps * span - 0.5
        np.testing.assert_allclose(seen / 10, position, atol=0.1)


def test_what_lies_outside_the_image_is_filled():
    image = np.full((20, 30, 3), 200, np.uint8)
    color = (123.68, 116.78, 103.94)
    boxes = np.array([[0, 0, 20, 30], [-20, 0, 0, 30]])
    both = warp_windows(image, boxes, 32, context=4, fill=color)
    framed, outside = both
    for frame in (framed[:3], framed[-3:], framed[:, :3], framed[:, -3:]):
        assert (frame == [124, 117, 104]).all()
    assert (framed[5:-5, 5:-5] == 200).all()
    assert (outside[:27] == [124, 117, 104]).all()
    assert (outside[29:, 5:-5] == 200).all()


def test_a_constant_image_stays_constant_whatever_the_boxes():
    rng = np.random.default_rng(0)
    starts = rng.uniform(-10, 40, (60, 2))
    sizes = np.exp(rng.uniform(np.log(1e-9), np.log(30), (60, 2)))
    boxes = np.concatenate([starts, starts + sizes], axis=1)
    image = np.full((50, 60, 3), 77, np.uint8)
    assert (warp_windows(image, boxes, 10, context=1, fill=77) == 77).all()


def test_windows_do_not_depend_on_their_company_or_on_threads():
    image, boxes = noise(30, 40), np.array(BOXES)
    together = warp_windows(image, boxes, 16, context=2, threads=3)
    alone = [warp_windows(image, box[None], 16, context=2, threads=1) for box in boxes]
    np.testing.assert_array_equal(together, np.concatenate(alone))
    assert warp_windows(image, boxes[:0], 16, context=2).shape == (0, 16, 16, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": np.zeros((9, 9, 3))}, r"uint8 .* got float64 \[9, 9, 3\]"),
        ({"image": np.zeros((0, 9, 3), np.uint8)}, r"no pixels: shape \[0, 9, 3\]"),
        ({"boxes": np.zeros(4)}, r"got shape \(4,\)"),
        ({"boxes": [[0, 0, 5, 5], [0, 0, np.nan, 5]]}, "box 1 is not finite"),
        ({"boxes": [[5, 0, 5, 5]]}, "box 0 is empty"),
        ({"boxes": [[5, 5, 9, 2]]}, "box 0 is empty"),
        ({"boxes": [[0, 0, 5, 99]]}, "box 0 is far outside the image of 30×40 pixels"),
        ({"context": 8}, "context of 8 pixels on each side leaves nothing of 16"),
        ({"context": -1}, "context of -1"),
        ({"fill": 300}, "fill must be one number from 0 to 255, or three, got 300"),
        ({"fill": [1, 2]}, "fill must be"),
    ],
)
def test_arguments_that_do_not_fit_are_errors(changes, message):
    arguments = {
        "image": noise(30, 40),
        "boxes": BOXES[:1],
        "side": 16,
        "context": 2,
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        warp_windows(**arguments)
