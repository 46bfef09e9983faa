"""The paper's Table 1: sizes, strides and receptive fields of the four stacks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sppnet_jax as sn
from sppnet_jax.network.trunks import BACKBONES, LRN, get_backbone, output_size

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


@pytest.mark.parametrize("name", BACKBONES)
def test_the_receptive_field_is_where_pixels_change_a_unit(name):
    """Brute force: ones for weights, so a unit counts the pixels that it sees."""
    geometry = sn.backbone_geometry(name)
    side = geometry.receptive_field + 3 * geometry.stride

    def unit_total(row):
        maps = row[None, :, None]
        for kernel, stride, padding in geometry.layers:
            maps = jax.lax.conv_general_dilated(
                maps,
                jnp.ones((kernel, 1, 1)),
                (stride,),
                [(padding, padding)],
                dimension_numbers=("NWC", "WIO", "NWC"),
            )
        return maps[0, :, 0]

    sees = np.asarray(jax.jit(jax.jacobian(unit_total))(jnp.zeros(side))) > 0
    units = [np.flatnonzero(row) for row in sees]
    whole = [(i, u) for i, u in enumerate(units) if len(u) == geometry.receptive_field]
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


def test_an_unknown_backbone_is_refused_with_the_valid_names():
    with pytest.raises(ValueError, match=r"'zf-5'.*zf5, convnet5.*did you mean 'zf5'"):
        sn.backbone_geometry("zf-5")
