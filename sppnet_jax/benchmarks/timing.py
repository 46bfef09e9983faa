"""Alternatives timed in turn, so that their ratio holds on a machine that is not quiet.

In every round each alternative runs once. What slows the machine for a while slows all
of a round, so a ratio is taken round by round, and its median is reported.
"""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

Alternative = Callable[[], Any]
# An alternative faster than this is repeated within a round: clocks have a grain.
SHORTEST = 2e-3


class Spread(NamedTuple):
    """The median of measurements, and their quartiles."""

    median: float
    low: float
    high: float


def time_in_turn(
    alternatives: Mapping[str, Alternative],
    *,
    rounds: int,
    warmup: int = 1,
    label: str = "",
) -> dict[str, np.ndarray]:
    """Seconds of every call, by name, float [rounds]; the rounds are aligned.

    `alternatives`: functions of nothing. JAX arrays that one returns are waited for;
    what else works in the background, it must wait for itself.
    `warmup`: calls of each before the clock starts; the first compiles.
    `label`: of the progress bar; none is shown without.
    """
    repeats = {name: _repeats(call, warmup) for name, call in alternatives.items()}
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    names = list(alternatives)
    shown = tqdm(
        range(rounds),
        desc=label,
        leave=False,
        disable=not label or not sys.stderr.isatty(),
    )
    for number in shown:
        # Whoever comes first finds caches that the last one left: take turns at that.
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            call, count = alternatives[name], repeats[name]
            started = time.perf_counter()
            for _ in range(count):
                jax.block_until_ready(call())
            seconds[name].append((time.perf_counter() - started) / count)
    return {name: np.array(times) for name, times in seconds.items()}


def spread(values: np.ndarray) -> Spread:
    """Median and quartiles of measurements."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return Spread(float(median), float(low), float(high))


def times_as_fast(ours: np.ndarray, theirs: np.ndarray) -> Spread:
    """How many times as fast ours is: the spread of theirs / ours, round by round."""
    return spread(theirs / ours)


def _repeats(call: Alternative, warmup: int) -> int:
    """How many calls make up one measurement, after warming up."""
    for _ in range(max(1, warmup)):
        jax.block_until_ready(call())
    started = time.perf_counter()
    jax.block_until_ready(call())
    once = time.perf_counter() - started
    return max(1, min(1000, round(SHORTEST / max(once, 1e-9))))
