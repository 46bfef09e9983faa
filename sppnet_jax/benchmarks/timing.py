"""Alternatives timed in turn, so that their ratio holds on a machine that is not quiet.

In every round each alternative runs once. What slows the machine for a while slows all
of a round, so a ratio is taken round by round, and its median is reported.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from tqdm import tqdm

from sppnet_jax.benchmarks.peers import finish

Alternative = Callable[[], Any]
T = TypeVar("T")
# An alternative faster than this is repeated within a round: clocks have a grain.
SHORTEST = 2e-3
SHORTEST_QUEUED = 1e-2  # starting a queue and waiting for its end take a while, too


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

    `alternatives`: functions of nothing, each waited for, until JAX has its results and
    PyTorch's GPU has nothing left to do. An accelerator works through a queue of an
    alternative's calls, and only the last is waited for.
    `warmup`: calls of each before the clock starts; the first compiles.
    `label`: of the progress bar; none is shown without.
    """
    queued = jax.default_backend() != "cpu"
    shortest = SHORTEST_QUEUED if queued else SHORTEST
    repeats = {
        name: _repeats(call, warmup, shortest) for name, call in alternatives.items()
    }

    def timed(name: str) -> float:
        call, count = alternatives[name], repeats[name]
        started = time.perf_counter()
        for _ in range(count):
            result = call()
            if not queued:
                finish(result)
        finish(result)
        return (time.perf_counter() - started) / count

    work = {name: functools.partial(timed, name) for name in alternatives}
    seconds = in_turn(work, rounds=rounds, label=label)
    return {name: np.array(times) for name, times in seconds.items()}


def in_turn(
    work: Mapping[str, Callable[[], T]], *, rounds: int, label: str = ""
) -> dict[str, list[T]]:
    """What each piece of work returned in every round, by name.

    `label`: of the progress bar; none is shown without.
    """
    names = list(work)
    found: dict[str, list[T]] = {name: [] for name in names}
    off = None if label else True
    for number in tqdm(range(rounds), desc=label, leave=False, disable=off):
        # Whoever comes first finds caches that the last one left: take turns at that.
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            found[name].append(work[name]())
    return found


@contextlib.contextmanager
def no_persistent_cache() -> Iterator[None]:
    """Within this context nothing compiled comes from, or goes to, a folder."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks the setting once, at its first program
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def spread(values: np.ndarray) -> Spread:
    """Median and quartiles of measurements."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return Spread(float(median), float(low), float(high))


def milliseconds(seconds: np.ndarray) -> dict[str, float]:
    """The columns "ms", "low" and "high" of a table: the spread of some seconds."""
    middle = spread(seconds * 1e3)
    return {"ms": middle.median, "low": middle.low, "high": middle.high}


def times_as_fast(ours: np.ndarray, theirs: np.ndarray) -> Spread:
    """How many times as fast ours is: the spread of theirs / ours, round by round."""
    return spread(theirs / ours)


def _repeats(call: Alternative, warmup: int, shortest: float) -> int:
    """How many calls make up one measurement, after warming up."""
    for _ in range(max(1, warmup)):
        finish(call())
    started = time.perf_counter()
    finish(call())
    once = time.perf_counter() - started
    return max(1, min(1000, round(shortest / max(once, 1e-9))))
