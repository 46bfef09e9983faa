"""Views at test time: how many, where they lie on the map, what they score."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sppnet_jax.classification.views import NAMES, named_protocol, view_windows
from sppnet_jax.data.images import CENTER_AND_CORNERS, POSITIONS, crop_corner
from sppnet_jax.network.trunks import BACKBONES, backbone_geometry
from sppnet_jax.pyramid.geometry import boxes_to_windows

PAPER = {"view": 224, "resize_side": 256, "flip": True}


def views_of(protocol, height_over_width, scale):
    """How often each view of an image counts at a scale, by name of the protocol."""
    size = np.array([[scale, round(scale / height_over_width)]])
    _, counts = view_windows(
        jnp.asarray(size),
        protocol.positions,
        224,
        backbone_geometry("zf5"),
        whole=scale in protocol.whole_at,
    )
    return int(counts.sum()) * (2 if protocol.flip else 1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("ten_view_map", 10), ("multi_view", 96), ("multi_view_full", 98)],
)
def test_the_paper_s_number_of_views(name, expected):
    protocol = named_protocol(name, **PAPER)
    assert sum(views_of(protocol, 0.75, scale) for scale in protocol.scales) == expected


def test_the_paper_s_scales_and_their_proportions_for_other_networks():
    assert named_protocol("multi_view", **PAPER).scales == (
        224,
        256,
        300,
        360,
        448,
        560,
    )
    small = named_protocol("multi_view_full", view=64, resize_side=72, flip=False)
    assert small.scales == (64, 73, 86, 103, 128, 160)
    assert small.whole_at == (73,)


def test_a_view_that_repeats_another_counts_once():
    protocol = named_protocol("multi_view", **PAPER)
    assert views_of(protocol, 0.75, 224) == 6  # left, middle and right; mirrored
    assert views_of(protocol, 1.0, 224) == 2  # the image itself; mirrored
    assert views_of(protocol, 1.0, 256) == 18


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_view_s_window_is_that_of_its_box(backbone):
    geometry = backbone_geometry(backbone)
    sizes = np.random.default_rng(0).integers(224, 700, (30, 2))
    windows, _ = jax.jit(
        lambda sizes: view_windows(sizes, POSITIONS, 224, geometry, whole=True)
    )(sizes)
    for (height, width), found in zip(sizes, np.asarray(windows), strict=True):
        maps = geometry.map_size(int(height)), geometry.map_size(int(width))
        corners = [crop_corner(height - 224, width - 224, name) for name in POSITIONS]
        boxes = np.array([(y, x, y + 224, x + 224) for y, x in corners], float)
        expected = [*boxes_to_windows(boxes, geometry, maps).tolist(), [0, 0, *maps]]
        assert found.tolist() == expected


def test_each_protocol_can_be_given_its_own_scales_views_and_flips():
    protocol = named_protocol(
        "multi_view", **PAPER | {"flip": False}, scales=(300, 256), positions=("left",)
    )
    assert protocol.scales == (256, 300)
    assert protocol.positions == ("left",)
    assert not protocol.flip
    assert named_protocol("ten_view", **PAPER).positions == CENTER_AND_CORNERS
    assert {named_protocol(name, **PAPER).on_map for name in NAMES} == {True, False}


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("ninety_view", {}, "choose from single, ten_view, ten_view_map"),
        ("multi_view", {"positions": ("middle",)}, "unknown view 'middle'"),
        ("multi_view", {"scales": (200, 256)}, "scales must be at least 224"),
        ("ten_view", {"scales": (256, 300)}, "for several use multi_view"),
    ],
)
def test_a_protocol_that_cannot_be_is_refused(name, changed, message):
    with pytest.raises(ValueError, match=message):
        named_protocol(name, **PAPER, **changed)
