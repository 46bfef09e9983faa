"""What the pictures of buckets show."""

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from notebooks.pictures import buckets as bucket_plots
from sppnet_jax.buckets import choose_buckets, padding_waste
from sppnet_jax.buckets.table import BucketRow
from tests.data_helpers import picture

SIZES = [(40, 50), (40, 60), (50, 40), (70, 40), (40, 60)]
BUCKETS = [(40, 60), (70, 40)]


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def a_row(batch, compile_seconds=2.0, seconds=0.5, calls=4, images=8):
    return BucketRow(
        (40, 60), batch, compile_seconds, 1e9, 1e6, calls, images, seconds, 0.1
    )


def test_images_are_drawn_in_their_own_buckets_with_what_they_pad():
    images = [picture(40, 50), picture(70, 40)]
    figure = bucket_plots.plot_padded(images, BUCKETS)
    assert titles(figure) == [
        "40×50\nin 40×60\n17% padding",
        "70×40\nin 70×40\n0% padding",
    ]
    drawn = figure.axes[0].images[0].get_array()
    np.testing.assert_array_equal(drawn[:, :50], images[0])
    assert not drawn[:, 50:].any()
    hatched = [p for p in figure.axes[0].patches if p.get_hatch()]
    assert [(p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in hatched] == [
        (50, 0, 10, 40),
        (0, 40, 50, 0),
    ]


def test_choices_show_their_buckets_and_the_padding_of_each():
    choices = [choose_buckets(SIZES, count) for count in (3, 1, 2, 4)]
    figure = bucket_plots.plot_choices(SIZES, choices)
    *panels, last = figure.axes
    assert len(panels) == 3
    for axes, choice in zip(panels, (choices[1], choices[0], choices[3]), strict=True):
        boxes = [p for p in axes.patches if isinstance(p, Rectangle)]
        drawn = {(p.get_height(), p.get_width()) for p in boxes}
        assert drawn == set(choice)
        points = np.vstack([c.get_offsets() for c in axes.collections])
        assert {(h, w) for w, h in points.tolist()} == set(SIZES)
        share = padding_waste(SIZES, choice)
        assert axes.get_title().endswith(f"{share:.0%} padding")
    counts, shares = last.lines[0].get_data()
    assert counts.tolist() == [1, 2, 3, 4]
    expected = [padding_waste(SIZES, sorted(choices, key=len)[n]) for n in range(4)]
    np.testing.assert_array_equal(shares, expected)


def test_a_program_for_each_image_is_paid_for_each_image():
    tables = {"buckets": [a_row(2)] * 3, "alone": [a_row(1, calls=8)] * 5}
    figure = bucket_plots.plot_costs(tables, images=10)
    compiled, run, total = figure.axes
    assert [len(axes.patches) for axes in (compiled, run)] == [8, 8]
    assert {p.get_height() for p in run.patches} == {250.0, 500.0}
    buckets, alone = (line.get_ydata() for line in total.lines)
    count = np.arange(1, 11)
    np.testing.assert_allclose(buckets, 3 * 2.0 + count * 0.25)
    np.testing.assert_allclose(alone, count * (2.0 + 0.5))


def test_equal_features_differ_by_rounding_and_by_nothing_beyond():
    rng = np.random.default_rng(0)
    alone = rng.random((3, 4, 5)).astype(np.float32)
    padded = np.zeros((5, 6, 5), np.float32)
    padded[:3, :4] = alone
    padded[1, 2, 3] += 1e-3
    *_, last = titles(bucket_plots.plot_features(alone, padded))[:3]
    share = f"{1e-3 / alone.max():.1g}"
    assert last == f"difference, at most {share} of the largest;\nbeyond: 0"
    padded[4, 5, 0] = -0.25
    *_, last = titles(bucket_plots.plot_features(alone, padded))[:3]
    assert last.endswith("beyond: 0.25")


def test_differences_are_relative_to_the_largest_logit():
    reference = np.array([[4.0, -8.0], [1.0, 0.0], [2.0, 1.0]])
    changed = np.array([[4.0, -8.0], [1.0, 2.0], [2.0, 1.4]])
    figure = bucket_plots.plot_differences(
        reference, {"same": reference, "changed": changed}
    )
    (axes,) = figure.axes
    same, other = (line.get_xdata() for line in axes.lines[:2])
    np.testing.assert_array_equal(same, [bucket_plots.LEAST] * 3)
    np.testing.assert_allclose(other, [bucket_plots.LEAST, 0.25, 0.05])
    assert [text.get_text() for text in axes.texts] == [
        "same class: 100%",
        "same class: 67%",
    ]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: bucket_plots.plot_padded([], BUCKETS), "no images"),
        (
            lambda: bucket_plots.plot_padded([picture(80, 9)], BUCKETS),
            "no bucket holds an image of 80×9",
        ),
        (lambda: bucket_plots.plot_choices(SIZES, []), "no choices"),
        (
            lambda: bucket_plots.plot_costs({"a": [a_row(2, None)]}),
            "'a' has buckets that no image went through",
        ),
        (
            lambda: bucket_plots.plot_features(np.ones((3, 4, 5)), np.ones((3, 3, 5))),
            r"no smaller .* got \[3, 4, 5\] and \[3, 3, 5\]",
        ),
        (
            lambda: bucket_plots.plot_differences(np.ones((3, 2)), {"a": np.ones(3)}),
            r"'a' is \[3\], the reference \[3, 2\]",
        ),
    ],
)
def test_what_can_not_be_drawn_is_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
