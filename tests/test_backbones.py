"""Sizes, strides and receptive fields: the paper's Table 1, and published trunks."""

import numpy as np
import pytest

import sppnet_jax as sn
from sppnet_jax.network.stack import (
    LRN,
    Branches,
    Conv,
    MaxPool,
    cut_names,
    cut_table,
    output_size,
    table_geometry,
)
from sppnet_jax.network.trunks import BACKBONES, get_backbone

# Every side that the paper states on the way, by backbone and image side.
PAPER_SIZES = {
    ("zf5", 224): [110, 55, 27, 13, 13, 13, 13],
    ("zf5", 180): [88, 44, 21, 10, 10, 10, 10],
    ("convnet5", 224): [55, 55, 27, 27, 13, 13, 13],
    ("convnet5", 180): [44, 44, 21, 21, 10, 10, 10],
    ("overfeat5", 224): [109, 36, 36, 18, 18, 18, 18],
    ("overfeat5", 180): [87, 29, 29, 14, 14, 14, 14],
    ("overfeat7", 224): [109, 36, 36, 18, 18, 18, 18, 18, 18],
    ("overfeat7", 180): [87, 29, 29, 14, 14, 14, 14, 14, 14],
}


@pytest.mark.parametrize(("name", "image_size"), PAPER_SIZES)
def test_every_layer_has_the_paper_s_size(name, image_size):
    size, sizes = image_size, []
    for layer in get_backbone(name).layers:
        if not isinstance(layer, LRN):
            size = output_size(layer, size)
            sizes.append(size)
    assert sizes == PAPER_SIZES[name, image_size]
    assert sn.backbone_geometry(name).map_size(image_size) == sizes[-1]


@pytest.mark.parametrize(
    ("name", "stride", "center"),
    [("zf5", 16, 14), ("convnet5", 16, 15), ("overfeat5", 12, 8), ("overfeat7", 12, 8)],
)
def test_stride_and_centre_of_unit_0(name, stride, center):
    geometry = sn.backbone_geometry(name)
    assert (geometry.stride, geometry.center) == (stride, center)


def seen_through(table, sees):
    """Which pixels change each unit, bool [units, pixels], by brute force."""
    for layer in table:
        if isinstance(layer, Branches):
            sees = sum(seen_through(branch, sees) for branch in layer.tables) > 0
        elif isinstance(layer, Conv | MaxPool):
            pads = layer.padding
            sees = np.pad(
                sees, (pads if isinstance(pads, tuple) else (pads, pads), (0, 0))
            )
            views = np.lib.stride_tricks.sliding_window_view(sees, layer.kernel, 0)
            sees = views[:: layer.stride].any(axis=2)
    return sees


STACKS = [(name, "") for name in BACKBONES] + [
    (name, cut) for name in BACKBONES for cut in cut_names(BACKBONES[name].layers)
]


@pytest.mark.parametrize(("name", "cut"), STACKS)
def test_the_receptive_field_is_where_pixels_change_a_unit(name, cut):
    """Brute force through the table, branches and all, at every cut."""
    table = cut_table(get_backbone(name).layers, cut)
    geometry = table_geometry(table)
    side = geometry.receptive_field + 3 * geometry.stride
    places = [np.flatnonzero(row) for row in seen_through(table, np.eye(side) > 0)]
    assert len(places) == geometry.map_size(side)
    whole = [(i, p) for i, p in enumerate(places) if len(p) == geometry.receptive_field]
    assert whole
    for index, pixels in whole:
        middle = (pixels[0] + pixels[-1]) / 2
        assert middle == geometry.center + geometry.stride * index


@pytest.mark.parametrize("name", BACKBONES)
def test_the_smallest_image_gives_one_unit_and_a_smaller_one_is_refused(name):
    geometry = sn.backbone_geometry(name)
    assert geometry.map_size(geometry.min_image_size) == 1
    with pytest.raises(ValueError, match=f"at least {geometry.min_image_size}"):
        geometry.map_size(geometry.min_image_size - 1)


@pytest.mark.parametrize(
    ("name", "sides"),
    [  # of 224 pixels, as the authors' papers and releases state them
        ("alexnet", [55, 27, 27, 13, 13, 13, 13, 13, 6]),
        ("squeezenet", [111, 55, 55, 55, 55, 55, 27, 27, 27, 27, 27, 27, 13]),
        ("resnet50", [112, 56, 56, 56, 56, 56, 28]),
    ],
)
def test_a_published_trunk_has_the_published_sizes(name, sides):
    size, found = 224, []
    for layer in get_backbone(name).layers:
        size = output_size(layer, size)
        found.append(size)
    assert found[: len(sides)] == sides


@pytest.mark.parametrize("kernel", [3, 5])
def test_lite_s_padding_is_tensorflow_s_same_where_sizes_are_even(kernel):
    """At odd sizes TensorFlow pads before as well: one unit more, half a step off."""
    (layer,) = [
        layer
        for layer in get_backbone("efficientnet_lite0").layers
        if isinstance(layer, Conv) and (layer.kernel, layer.stride) == (kernel, 2)
    ][:1]
    for size in range(kernel, 60):
        total = max((-(-size // 2) - 1) * 2 + kernel - size, 0)
        same = total // 2, total - total // 2
        if size % 2 == 0:
            assert layer.padding == same
            assert output_size(layer, size) == -(-size // 2)
        else:
            assert same == (kernel // 2, kernel // 2)
            assert output_size(layer, size) == -(-size // 2) - 1


def test_branches_whose_units_lie_elsewhere_are_refused():
    uneven = Branches(((Conv(4, kernel=3, padding=1),), (Conv(4, kernel=3),)), "add")
    with pytest.raises(ValueError, match="can't be joined"):
        table_geometry((uneven,))


def test_an_unknown_cut_is_refused_with_the_valid_ones():
    with pytest.raises(ValueError, match="choose from stride8, stride16; did you mean"):
        cut_table(get_backbone("vgg16").layers, "stride_16")


def test_an_unknown_backbone_is_refused_with_the_valid_names():
    with pytest.raises(ValueError, match=r"'zf-5'.*zf5, convnet5.*did you mean 'zf5'"):
        sn.backbone_geometry("zf-5")
