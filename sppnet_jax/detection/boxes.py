"""Arithmetic on boxes: overlaps, non-maximum suppression, and regression targets.

A box is (ymin, xmin, ymax, xmax) in pixels, 0-based and half-open: its height is
ymax − ymin. PASCAL VOC's are 1-based and hold their last pixels, so that VOC's (xmin,
ymin, xmax, ymax) is (ymin − 1, xmin − 1, ymax, xmax) here, and an overlap of two boxes
is exactly the one that VOC's programs compute with their "+ 1".

All but the suppression compute in float64 for NumPy arrays, and in float32 on the
device as soon as one argument is a jax.Array.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float

# Boxes that `nms` settles at a time.
BLOCK = 64


def iou(
    boxes: Float[ArrayLike, "boxes 4"], others: Float[ArrayLike, "others 4"]
) -> Float[Any, "boxes others"]:
    """Intersection over union of each box with each of the others.

    `boxes`, `others`: float [N, 4] and [M, 4]; an empty or inverted one overlaps none.

    Returns: float [N, M], 0 to 1.
    Raises: ValueError for other shapes, and for concrete numbers that aren't finite.
    """
    xp, (first, second) = _convert(boxes=boxes, others=others)
    return _pairwise_iou(first.T, second.T, xp)


def nms(
    boxes: Float[ArrayLike, "boxes 4"],
    scores: Float[ArrayLike, " boxes"],
    threshold: Float[ArrayLike, ""] | float,
    valid: Bool[ArrayLike, " boxes"] | None = None,
) -> Bool[Array, " boxes"]:
    """Which boxes are left when each drops those it overlaps that score less.

    Greedy: the box of the highest score stays, all others whose IoU with it is above
    `threshold` go; then the next of those left, and so on (section 4.1: 0.3). Of equal
    scores the earlier box comes first.

    It runs on the device in float32, under `jax.jit` and `jax.vmap` too. Boxes are
    settled 64 at a time, in the order of their scores: among themselves by striking out
    what a kept box overlaps until nothing changes, and then against all others at once.
    So a program takes N/64 steps in sequence rather than N.

    `boxes`: float [N, 4]. `scores`: float [N]; −inf is the lowest.
    `threshold`: the IoU, 0 to 1, above which the lower-scored of two boxes goes.
    `valid`: bool [N]; a box that isn't neither stays nor drops others. Nor does one
    with a traced score of NaN.

    Returns: bool [N], True for boxes that stay.
    Raises: ValueError for other shapes, for concrete boxes that aren't finite and for
    concrete scores of NaN; TypeError for a `valid` that isn't bool.
    """
    shape = np.shape(scores)
    if len(shape) != 1 or np.shape(boxes) != (*shape, 4):
        raise ValueError(
            f"boxes must be [N, 4] and scores [N], got {np.shape(boxes)} and {shape}"
        )
    valid = _check_suppression(boxes, scores, threshold, valid)
    batch = jnp.asarray(boxes)[None], jnp.asarray(scores)[None]
    return _suppress(*batch, threshold, valid[None])[0]


def nms_per_class(
    boxes: Float[ArrayLike, "boxes ... 4"],
    scores: Float[ArrayLike, "boxes classes"],
    threshold: Float[ArrayLike, ""] | float,
    valid: Bool[ArrayLike, "boxes ..."] | None = None,
) -> Bool[Array, "boxes classes"]:
    """`nms` in each of several classes at once; it computes N² overlaps of each.

    `boxes`: float [N, 4], or [N, C, 4] where each class has boxes of its own.
    `scores`: float [N, C]. `threshold`: see `nms`.
    `valid`: bool [N, C], or [N] for all classes.

    Returns: bool [N, C], True for boxes that stay in the class.
    Raises: ValueError and TypeError as `nms` does.
    """
    shape = np.shape(scores)
    if len(shape) != 2 or np.shape(boxes) not in ((*shape, 4), (*shape[:1], 4)):
        raise ValueError(
            "boxes must be [N, 4] or [N, classes, 4] and scores [N, classes], got "
            f"{np.shape(boxes)} and {shape}"
        )
    valid = _check_suppression(boxes, scores, threshold, valid)
    own = jnp.asarray(boxes)
    if own.ndim == 2:
        own = jnp.broadcast_to(own[:, None], (*shape, 4))
    scores = jnp.asarray(scores)
    return _suppress(own.swapaxes(0, 1), scores.T, threshold, valid.T).T


def clip_boxes(
    boxes: Float[ArrayLike, "boxes 4"],
    height: Float[ArrayLike, ""] | float,
    width: Float[ArrayLike, ""] | float,
) -> Float[Any, "boxes 4"]:
    """The part of each box that lies in the image.

    `boxes`: float [N, 4]. One wholly outside becomes empty, on the border.
    `height`, `width`: of the image, in pixels.

    Returns: float [N, 4].
    Raises: ValueError for other shapes, and for concrete numbers that aren't finite.
    """
    xp, (inside,) = _convert(boxes=boxes)
    if any(isinstance(size, jax.Array) for size in (height, width)):
        xp, inside = jnp, jnp.asarray(inside, jnp.float32)
    stops = xp.stack([xp.asarray(size, inside.dtype) for size in (height, width)] * 2)
    return xp.clip(inside, 0, stops)


def encode_boxes(
    boxes: Float[ArrayLike, "boxes 4"], targets: Float[ArrayLike, "boxes 4"]
) -> Float[Any, "boxes 4"]:
    """What turns each box into its target, as R-CNN's box regression learns it.

    The way from the box's centre to the target's, down and to the right, in heights and
    widths of the box; and the logarithms of the ratios of the heights and of the widths
    (Girshick et al. 2014, appendix C). `decode_boxes` is the inverse.

    `boxes`, `targets`: float [N, 4], none of them empty.

    Returns: float [N, 4], (dy, dx, log height ratio, log width ratio).
    Raises: ValueError for other shapes, and for concrete boxes that are empty or not
    finite.
    """
    xp, (start, end) = _convert(boxes=boxes, targets=targets)
    _check_pairs(boxes=start, targets=end)
    _check_not_empty(boxes=start, targets=end)
    sizes, centres = _sizes_and_centres(start)
    target_sizes, target_centres = _sizes_and_centres(end)
    shifts = (target_centres - centres) / sizes
    return xp.concatenate([shifts, xp.log(target_sizes / sizes)], axis=1)


def decode_boxes(
    boxes: Float[ArrayLike, "boxes 4"], deltas: Float[ArrayLike, "boxes 4"]
) -> Float[Any, "boxes 4"]:
    """The boxes that `deltas` turn `boxes` into; the inverse of `encode_boxes`.

    `boxes`: float [N, 4], none of them empty.
    `deltas`: float [N, 4], (dy, dx, log height ratio, log width ratio). A ratio beyond
    the largest number gives an infinite box: bound what a regressor predicts.

    Returns: float [N, 4], not clipped to any image.
    Raises: ValueError for other shapes, for concrete numbers that aren't finite and for
    concrete boxes that are empty.
    """
    xp, (start, steps) = _convert(boxes=boxes, deltas=deltas)
    _check_pairs(boxes=start, deltas=steps)
    _check_not_empty(boxes=start)
    sizes, centres = _sizes_and_centres(start)
    new_centres = centres + steps[:, :2] * sizes
    halves = xp.exp(steps[:, 2:]) * sizes / 2
    return xp.concatenate([new_centres - halves, new_centres + halves], axis=1)


def _pairwise_iou(boxes: Sequence[Any], others: Sequence[Any], xp: ModuleType) -> Any:
    """The overlaps [..., N, M] of boxes [..., N] with others [..., M].

    Each is four arrays, one for each side: XLA computes with those many times faster
    than with rows of four.
    """
    top, left, bottom, right = (side[..., :, None] for side in boxes)
    tops, lefts, bottoms, rights = (side[..., None, :] for side in others)
    height = xp.maximum(xp.minimum(bottom, bottoms) - xp.maximum(top, tops), 0)
    width = xp.maximum(xp.minimum(right, rights) - xp.maximum(left, lefts), 0)
    common = height * width
    areas = (bottom - top) * (right - left), (bottoms - tops) * (rights - lefts)
    # Where nothing is shared the union may be 0 as well.
    union = xp.where(common > 0, areas[0] + areas[1] - common, 1)
    return common / union


@jax.jit
def _suppress(
    boxes: jax.Array, scores: jax.Array, threshold: jax.Array, valid: jax.Array
) -> jax.Array:
    """What stays [C, N] of boxes [C, N, 4] with scores [C, N], in each class alone."""
    classes, count = scores.shape
    if not classes or not count:
        return jnp.zeros((classes, count), bool)
    scores = scores.astype(jnp.float32)
    valid = valid & ~jnp.isnan(scores)
    order = jnp.lexsort((-scores, ~valid))
    rows = jnp.arange(classes)[:, None]
    blank = (-count) % BLOCK
    ranked = jnp.pad(
        boxes.astype(jnp.float32)[rows, order], ((0, 0), (0, blank), (0, 0))
    )
    sides = list(jnp.moveaxis(ranked, -1, 0))
    left = jnp.pad(valid[rows, order], ((0, 0), (0, blank)))
    threshold = jnp.asarray(threshold, jnp.float32)
    earlier = jnp.triu(jnp.ones((BLOCK, BLOCK), bool), 1)

    def settle(block: jax.Array, left: jax.Array) -> jax.Array:
        start = block * BLOCK

        def cut(array: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(array, start, BLOCK, axis=1)

        some = [cut(side) for side in sides]
        doubles = (_pairwise_iou(some, some, jnp) > threshold) & earlier
        kept = _fixpoint(cut(left), doubles)
        struck = (_pairwise_iou(some, sides, jnp) > threshold) & kept[:, :, None]
        later = jnp.arange(count + blank) >= start + BLOCK
        left = left & ~(struck.any(axis=1) & later)
        return jax.lax.dynamic_update_slice_in_dim(left, kept, start, axis=1)

    # Valid boxes come first: blocks without any have nothing to settle.
    blocks = -(-valid.sum(axis=1).max() // BLOCK)
    left = jax.lax.fori_loop(0, blocks, settle, left)
    return jnp.zeros((classes, count), bool).at[rows, order].set(left[:, :count])


def _fixpoint(candidates: jax.Array, doubles: jax.Array) -> jax.Array:
    """Those of `candidates` [C, B] that no kept one precedes as their double [C, B, B].

    Each round settles at least one box more from the front, so that the loop ends.
    """

    def strike(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        kept, _ = state
        again = candidates & ~(doubles & kept[:, :, None]).any(axis=1)
        return again, (again != kept).any()

    return jax.lax.while_loop(lambda s: s[1], strike, (candidates, jnp.array(True)))[0]


def _sizes_and_centres(boxes: Any) -> tuple[Any, Any]:
    return boxes[:, 2:] - boxes[:, :2], (boxes[:, :2] + boxes[:, 2:]) / 2


def _convert(**arrays: Any) -> tuple[ModuleType, list[Any]]:
    """The arrays in one precision, and the module that computes with them."""
    leaves = jax.tree.leaves(arrays)
    in_jax = any(isinstance(part, jax.Array) for part in leaves)
    xp: Any = jnp if in_jax else np
    dtype = xp.float32 if in_jax else xp.float64
    converted = [xp.asarray(array, dtype) for array in arrays.values()]
    for name, array in zip(arrays, converted, strict=True):
        if array.ndim != 2 or array.shape[1] != 4:
            meaning = "differences" if name == "deltas" else "ymin, xmin, ymax, xmax"
            raise ValueError(
                f"{name} must be float [N, 4] ({meaning}), got shape {array.shape}"
            )
        _check_finite(name, array)
    return xp, converted


def _check_suppression(
    boxes: Any, scores: Any, threshold: Any, valid: Any
) -> jax.Array:
    """Raises for values that make no sense; `valid` in the shape of the scores."""
    if not isinstance(threshold, jax.core.Tracer) and not 0 <= threshold <= 1:
        raise ValueError(f"threshold is an IoU from 0 to 1, got {threshold}")
    if not isinstance(boxes, jax.core.Tracer):
        _check_finite("boxes", np.asarray(boxes).reshape(-1, 4))
    if not isinstance(scores, jax.core.Tracer):
        bad = np.isnan(np.asarray(scores))
        if bad.any():
            first = tuple(int(i) for i in np.argwhere(bad)[0])
            raise ValueError(f"scores hold NaN, first at {first}")
    if valid is None:
        return jnp.ones(np.shape(scores), bool)
    if np.shape(valid) not in (np.shape(scores), np.shape(scores)[:1]):
        raise ValueError(
            f"valid must be bool of the scores' shape {np.shape(scores)}, or one for "
            f"each box, got {np.shape(valid)}"
        )
    mask = jnp.asarray(valid)
    if mask.dtype != bool:
        raise TypeError(f"valid must be bool, got {mask.dtype}")
    mask = mask.reshape(mask.shape + (1,) * (np.ndim(scores) - mask.ndim))
    return jnp.broadcast_to(mask, np.shape(scores))


def _check_pairs(**arrays: Any) -> None:
    (one, first), (other, second) = arrays.items()
    if len(first) != len(second):
        raise ValueError(
            f"there are {len(first)} {one} but {len(second)} {other}: one each"
        )


def _check_not_empty(**arrays: Any) -> None:
    for name, array in arrays.items():
        if not isinstance(array, jax.core.Tracer):
            bad = ~(array[:, 2:] > array[:, :2]).all(axis=1)
            advice = "; its maxima must be above its minima. Leave such boxes out"
            _raise_for_first(name, "empty", array, bad, advice)


def _check_finite(name: str, array: Any) -> None:
    if not isinstance(array, jax.core.Tracer):
        _raise_for_first(name, "not finite", array, ~np.isfinite(array).all(axis=1))


def _raise_for_first(
    name: str, fault: str, array: Any, bad: Any, advice: str = ""
) -> None:
    if bad.any():
        first = int(bad.argmax())
        raise ValueError(f"{name}[{first}] is {fault}: {array[first].tolist()}{advice}")
