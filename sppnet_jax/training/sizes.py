"""The side of the training images, epoch by epoch (section 2.3, multi-size training).

`sizes` is a tuple: (224, 180) trains an epoch at each size in turn; ("uniform", 180,
224) draws a size for each epoch. All sizes share all weights.
"""

from collections.abc import Sequence

import numpy as np

UNIFORM = "uniform"


def possible_sizes(sizes: Sequence[int | str], multiple: int) -> tuple[int, ...]:
    """Every side, in pixels, that an epoch may have; each compiles one program.

    `sizes`: as above. `multiple`: what the sides of a uniform draw are multiples of.

    Raises: ValueError for sizes that mean nothing.
    """
    if not sizes or sizes[0] != UNIFORM:
        if not sizes or not all(_is_side(size) for size in sizes):
            raise ValueError(
                "sizes must be sides in pixels such as (224, 180), or ('uniform', "
                f"180, 224), got {tuple(sizes)!r}"
            )
        return tuple(sorted({int(size) for size in sizes}))
    if len(sizes) != 3 or not all(_is_side(size) for size in sizes[1:]):
        raise ValueError(
            f"a uniform draw is written ('uniform', 180, 224), got {tuple(sizes)!r}"
        )
    low, high = int(sizes[1]), int(sizes[2])
    if multiple < 1:
        raise ValueError(f"a multiple must be at least 1, got {multiple}")
    inside = tuple(range(-(-low // multiple) * multiple, high + 1, multiple))
    if not inside:
        raise ValueError(
            f"there is no multiple of {multiple} from {low} to {high} to draw: widen "
            f"{tuple(sizes)!r}, or lower the multiple"
        )
    return inside


def epoch_size(
    sizes: Sequence[int | str], epoch: int, *, seed: int, multiple: int
) -> int:
    """The side of an epoch's images, in pixels; a function of its arguments alone.

    A run that resumes therefore continues the same sequence.

    `epoch`: counted from 0. `seed`, `multiple`: of a uniform draw, which takes each of
    `possible_sizes` with the same probability.
    """
    possible = possible_sizes(sizes, multiple)
    if sizes[0] == UNIFORM:
        return int(np.random.default_rng((seed, epoch)).choice(possible))
    return int(sizes[epoch % len(sizes)])


def _is_side(size: object) -> bool:
    return isinstance(size, int | np.integer) and bool(size >= 1)
