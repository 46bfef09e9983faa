"""Which parts of an image are scored at test time, and where they lie on its map.

A view is a square of the image that is as large as the network's training images, at
the centre, a corner or the middle of a side; or the whole image. It is cut out of the
image before the network ("crops"), or pooled from the map of the whole image ("map"),
which is convolved once for all views of a scale (section 3.1, "multi-view testing on
feature maps").
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sppnet_jax.data.images import (
    CENTER_AND_CORNERS,
    POSITIONS,
    check_side,
    crop_corner,
)
from sppnet_jax.pyramid.geometry import Geometry, boxes_to_windows

NAMES = (
    "single",
    "ten_view",
    "ten_view_map",
    "full_image",
    "multi_view",
    "multi_view_full",
)
ON_CROPS = ("single", "ten_view")
_PAPER_VIEW = 224
_PAPER_SCALES = (224, 256, 300, 360, 448, 560)


class Protocol(NamedTuple):
    """The views that an image's scores are averaged over.

    `on_map`: whether views are pooled from maps, or cut out of the image.
    `scales`: the image's shorter sides, in pixels.
    `positions`: the views at each scale, of `data.images.POSITIONS`.
    `flip`: whether every view is scored mirrored too.
    `whole_at`: the scales, among `scales`, at which the whole image is a view as well.
    """

    on_map: bool
    scales: tuple[int, ...]
    positions: tuple[str, ...]
    flip: bool
    whole_at: tuple[int, ...] = ()


def named_protocol(
    name: str,
    *,
    view: int,
    resize_side: int,
    flip: bool,
    scales: Sequence[int] = (),
    positions: Sequence[str] = (),
) -> Protocol:
    """One of the paper's protocols, for a network trained on crops of side `view`.

    `name`: "single", the centre crop; "ten_view", the centre and the corners, each
    mirrored; "ten_view_map", the same views on the map; "full_image"; "multi_view", the
    centre, corners and middles of the sides at six scales, mirrored: 96 views;
    "multi_view_full", the whole image, mirrored, on top: 98.
    `resize_side`: the image's shorter side where there is one scale. Six are the
    paper's {224, 256, 300, 360, 448, 560}, in proportion to `view`.
    `flip`: False leaves the mirrored views out, for images that mean something else
    when mirrored. `scales`, `positions`: in place of the protocol's own.

    Raises: ValueError for an unknown name or position, or a scale smaller than a view.
    """
    multiple = name.startswith("multi_view")
    if name not in NAMES:
        raise ValueError(f"unknown protocol {name!r}: choose from {', '.join(NAMES)}")
    if not scales:
        scales = (resize_side,)
        if multiple:
            scales = tuple(round(view * side / _PAPER_VIEW) for side in _PAPER_SCALES)
    scales = tuple(sorted(set(scales)))
    for scale in scales:
        check_side(scale)
    own_positions = tuple(positions)
    if not positions:
        ten = CENTER_AND_CORNERS if name.startswith("ten_view") else ("center",)
        positions = POSITIONS if multiple else ten
    unknown = [position for position in positions if position not in POSITIONS]
    if unknown:
        raise ValueError(
            f"unknown view {unknown[0]!r}: choose from {', '.join(POSITIONS)}"
        )
    on_map = name not in ON_CROPS
    if not on_map and len(scales) > 1:
        raise ValueError(
            f"{name} cuts its views out at one scale, got {scales}: for several use "
            "multi_view, which pools them from maps"
        )
    if name == "full_image":
        if own_positions:
            raise ValueError(
                "full_image has one view, the whole image, and takes no others: got "
                f"{', '.join(own_positions)}"
            )
        return Protocol(on_map, scales, (), flip, whole_at=scales)
    if min(scales) < view:
        raise ValueError(
            f"a view of {view}×{view} pixels does not fit into an image whose shorter "
            f"side is {min(scales)}: scales must be at least {view}"
        )
    whole_at: tuple[int, ...] = ()
    if name == "multi_view_full":
        # The paper's 256, for a network trained at 224.
        whole_at = (min(scales, key=lambda side: abs(side - resize_side)),)
    return Protocol(on_map, scales, tuple(positions), flip, whole_at)


def view_windows(
    sizes: Int[Array, "batch 2"],
    positions: Sequence[str],
    view: int,
    geometry: Geometry,
    *,
    whole: bool = False,
) -> tuple[Int[Array, "batch views 4"], Int[Array, "batch views"]]:
    """The windows of an image's views on its map, and how often each view counts.

    A view's window is that of its box, by the rule of the paper's appendix (see
    `boxes_to_windows`).

    `sizes`: (height, width) of the images in pixels. `view`: a view's side in pixels.
    `whole`: adds the whole map as the last window.

    Returns: windows (top, left, bottom, right) in cells; and 1 for each view, but 0
    for one whose corner an earlier view has.
    """
    rows, columns = sizes[:, 0] - view, sizes[:, 1] - view
    corners = [
        jnp.stack(crop_corner(rows, columns, position), axis=-1)
        for position in positions
    ]
    map_sizes = _map_sizes(geometry, sizes)
    windows, counts = [], []
    for number, corner in enumerate(corners):
        box = jnp.concatenate([corner, corner + view], axis=-1).astype(jnp.float32)
        windows.append(_windows(box, geometry, map_sizes))
        repeats = [(corner == earlier).all(axis=-1) for earlier in corners[:number]]
        counts.append(1 - sum(repeats, start=jnp.zeros(len(sizes), bool)))
    if whole:
        windows.append(jnp.concatenate([jnp.zeros_like(map_sizes), map_sizes], axis=-1))
        counts.append(jnp.ones(len(sizes), int))
    return jnp.stack(windows, axis=1), jnp.stack(counts, axis=-1)


def _windows(boxes: jax.Array, geometry: Geometry, map_sizes: jax.Array) -> jax.Array:
    """The window of one box on each of several maps."""

    def window(box: jax.Array, map_size: jax.Array) -> jax.Array:
        (found,) = jnp.asarray(boxes_to_windows(box[None], geometry, tuple(map_size)))
        return found

    return jax.vmap(window)(boxes, map_sizes)


def _map_sizes(geometry: Geometry, sizes: jax.Array) -> jax.Array:
    for layer in geometry.layers:
        sizes = layer.output_size(sizes)
    return sizes
