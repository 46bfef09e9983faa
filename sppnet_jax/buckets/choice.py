"""Which few buckets pad a data set's images the least.

Sort the buckets of a best set by area: what the first t of them hold is closed
downwards, since all that fits into something held is held. So a walk over such sets,
one bucket a step, finds the best one.
"""

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

Bucket = tuple[int, int]
Sizes = Sequence[Bucket] | np.ndarray  # (height, width) of each image, int [N, 2]

# What takes a few seconds at most; see `choose_buckets`.
_MOST_STATES = 100_000
_MOST_IN_A_CHAIN = 3_000
_MOST_SIZES_ANY = 200
_MOST_PAIRS = 60_000
_MOST_SECONDS = 20
_MOST_SIZES_SEARCHED = 500

log = logging.getLogger(__name__)


def choose_buckets(
    sizes: Sizes, count: int, *, multiple: int = 1
) -> tuple[Bucket, ...]:
    """The set of at most `count` buckets that pads images of these sizes the least.

    Least is the sum, over the images, of the area of the smallest bucket that holds
    each. It is exact for the sizes that one shorter side, or one longer side, gives, up
    to about 300 lengths in landscape and 300 in portrait, or 3,000 in one of the two;
    and for any others, up to about 80 distinct sizes. Beyond, a search stands in, and
    the log says so.

    `sizes`: (height, width) of every image, int [N, 2]; repeated sizes weigh more.
    `multiple`: the sides of the buckets are multiples of this.

    Returns: the buckets, smallest area first.
    Raises: ValueError for no sizes, sizes below 1, or a count or multiple below 1.
    """
    sizes = check_sizes(sizes)
    if count < 1 or multiple < 1:
        raise ValueError(
            f"count and multiple must be at least 1, got {count=}, {multiple=}"
        )
    distinct, weights = _rounded_up(sizes, np.ones(len(sizes)), multiple)
    if len(distinct) <= count:
        return sorted_buckets(distinct)
    found, best = _best_buckets(distinct, weights, count)
    if not best:
        log.warning(
            "%d buckets for %d distinct sizes were found by a search that may miss the "
            "best ones; for fewer sizes (a multiple above %d, or equal shorter sides) "
            "it would not",
            count,
            len(distinct),
            multiple,
        )
    return sorted_buckets(_refit(found, distinct))


def check_sizes(sizes: Sizes) -> np.ndarray:
    array = np.asarray(sizes)
    if array.ndim != 2 or array.shape[1] != 2 or not len(array):
        raise ValueError(
            "sizes must be (height, width) pairs, int [N, 2] with N at least 1, got "
            f"shape {list(array.shape)}"
        )
    if not np.issubdtype(array.dtype, np.integer) or array.min() < 1:
        raise ValueError(
            f"sizes must be whole numbers of at least 1, got {array.dtype} from "
            f"{array.min()}"
        )
    return array.astype(np.int64)


def sorted_buckets(buckets: Iterable[Sequence[int]]) -> tuple[Bucket, ...]:
    distinct = {(int(height), int(width)) for height, width in buckets}
    return tuple(sorted(distinct, key=lambda bucket: (bucket[0] * bucket[1], bucket)))


def _costs_of(buckets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Float [buckets, sizes]: the bucket's area if it holds the size, else infinity."""
    holds = (buckets[:, None] >= sizes).all(axis=2)
    return np.where(holds, buckets.prod(axis=1)[:, None].astype(float), np.inf)


def _best_buckets(
    sizes: np.ndarray, weights: np.ndarray, count: int
) -> tuple[np.ndarray, bool]:
    """The best buckets for distinct sizes, or good ones; and whether they are best."""
    near = _search(sizes, weights, count)
    chains = _two_chains(sizes)
    if chains is None:
        best = _cover_any(sizes, weights, count)
        return (near, False) if best is None else (best, True)
    if _are_few(chains):
        return _cover_chains(sizes, weights, chains, count, near), True
    # The best ones of a coarser grid, whose sizes are still two chains, come close.
    grid = _coarser(sizes, weights, lambda grid: _are_few(_two_chains(grid)))
    coarse = _refit(_best_buckets(*grid, count)[0], sizes)
    return min(near, coarse, key=lambda b: _total(b, sizes, weights)), False


def _two_chains(sizes: np.ndarray) -> list[np.ndarray] | None:
    """Splits sorted sizes into two chains, in each of which every size holds the last.

    Sizes of one shorter side are two chains, landscape and portrait. Returns the
    indices of each, or None: going on with the chain that ends in the wider size finds
    two if there are two.
    """
    chains: list[list[int]] = [[], []]
    for index, (_, width) in enumerate(sizes):
        ends = [sizes[chain[-1]][1] if chain else 0 for chain in chains]
        fitting = [number for number in (0, 1) if ends[number] <= width]
        if not fitting:
            return None
        chains[max(fitting, key=lambda number: ends[number])].append(index)
    return [np.array(chain, int) for chain in chains]


def _are_few(chains: list[np.ndarray] | None) -> bool:
    if chains is None:
        return False
    lengths = [len(chain) for chain in chains]
    return math.prod(lengths) <= _MOST_STATES and max(lengths) <= _MOST_IN_A_CHAIN


def _cover_chains(
    sizes: np.ndarray,
    weights: np.ndarray,
    chains: list[np.ndarray],
    count: int,
    near: np.ndarray,
) -> np.ndarray:
    """The best buckets for two chains of sizes, by dynamic programming.

    Take the buckets of a best set by area. What the first t of them hold is closed
    downwards: a beginning of either chain, (i, j) sizes long. Bucket t + 1 extends it
    to (i', j'), and is the least that holds the last sizes of what it adds: one of the
    first chain, one of the second, or the join of both. `least[t][i, j]` is thus the
    least cost of (i, j) with t buckets; every path through it is a set of buckets, and
    the best set is one of the paths.

    Joins are many, (i, j) → (i', j'), and most are bad. A lower bound for a path that
    takes one gives each chain as many buckets as both have; where that exceeds the
    cost of `near`, buckets found by search, the join is left out.
    """
    # Number 0 of a chain is nothing, so that joins include the chains themselves.
    first, second = (np.vstack([np.zeros((1, 2), int), sizes[c]]) for c in chains)
    held = [np.append(0.0, np.cumsum(weights[c])) for c in chains]
    both_held = held[0][:, None] + held[1]
    joins = np.maximum(first[:, None], second)
    area = joins.prod(axis=2).astype(float)
    bound = _total(near, sizes, weights) * (1 + 1e-9)
    before_1, after_1 = _chain_costs(area[:, 0], held[0], count)
    before_2, after_2 = _chain_costs(area[0], held[1], count)

    least = [np.full(area.shape, np.inf)]
    least[0][0, 0] = 0
    for t in range(1, count + 1):
        last, costs = least[-1], least[-1].copy()
        for i in range(1, len(first)):
            added = (held[0][i] - held[0][:i, None]) * area[i, 0]
            costs[i] = np.minimum(costs[i], (last[:i] + added).min(axis=0))
        for j in range(1, len(second)):
            added = (held[1][j] - held[1][:j]) * area[0, j]
            costs[:, j] = np.minimum(costs[:, j], (last[:, :j] + added).min(axis=1))
        floor = _join_floor(before_1[t - 1], held[0], area)
        floor += _join_floor(before_2[t - 1], held[1], area.T).T
        rest = after_1[count - t][:, None] + after_2[count - t]
        for i, j in np.argwhere((floor + rest <= bound) & (floor < costs)):
            added = (both_held[i, j] - both_held[:i, :j]) * area[i, j]
            costs[i, j] = min(costs[i, j], (last[:i, :j] + added).min())
        least.append(costs)
    return _walk_back(least, both_held, area, joins)


def _chain_costs(
    area: np.ndarray, held: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Least costs of one chain alone, float [count + 1, length + 1] each.

    Of its first i sizes with at most t buckets, and of all but its first i.
    """
    added = np.tril((held[:, None] - held) * area[:, None])
    added[np.triu_indices(len(area), 1)] = np.inf
    before = np.full((count + 1, len(area)), np.inf)
    after = before.copy()
    before[0, 0] = after[0, -1] = 0
    for t in range(1, count + 1):
        before[t] = (before[t - 1] + added).min(axis=1)
        after[t] = (after[t - 1][:, None] + added).min(axis=0)
    return before, after


def _join_floor(before: np.ndarray, held: np.ndarray, area: np.ndarray) -> np.ndarray:
    """The least that a chain costs up to (i, j) if a join there ends it, [i, j]."""
    floor = np.full(area.shape, np.inf)
    for i in range(1, len(area)):
        added = (held[i] - held[:i, None]) * area[i]
        floor[i] = (before[:i, None] + added).min(axis=0)
    return floor


def _walk_back(
    least: list[np.ndarray], held: np.ndarray, area: np.ndarray, joins: np.ndarray
) -> np.ndarray:
    """The buckets on the best path, from its end."""
    i, j = held.shape[0] - 1, held.shape[1] - 1
    buckets = []
    for costs in least[-2::-1]:
        step = np.full((i + 1, j + 1), area[i, j])
        step[i] = area[0, j]
        step[:, j] = area[i, 0]
        total = costs[: i + 1, : j + 1] + (held[i, j] - held[: i + 1, : j + 1]) * step
        start = np.unravel_index(total.argmin(), total.shape)
        end = i * (start[0] < i), j * (start[1] < j)
        if any(end):
            buckets.append(joins[end])
        i, j = start
    return np.array(buckets)


def _cover_any(sizes: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray | None:
    """The best buckets for any sizes, as an integer program (a p-median).

    A bucket of a best set has the height of a size that it holds, and the width of one.
    Which are open is whole; which size goes where then comes out whole by itself.

    Returns: None where it would take more than a few seconds.
    """
    if len(sizes) > _MOST_SIZES_ANY:
        return None
    joins = np.maximum(sizes[:, None], sizes).reshape(-1, 2)
    buckets = np.unique(joins, axis=0)
    costs = _costs_of(buckets, sizes)
    bucket, size = np.nonzero(np.isfinite(costs))
    pairs, total = len(bucket), len(bucket) + len(buckets)
    if pairs > _MOST_PAIRS:
        return None
    cost = np.zeros(total)
    cost[:pairs] = weights[size] * costs[bucket, size]
    pair = np.arange(pairs)
    # Here, not above: a start of a training has no need of it, and it takes a while.
    from scipy import sparse
    from scipy.optimize import Bounds, LinearConstraint, milp

    each_goes_once = sparse.csr_array(
        (np.ones(pairs), (size, pair)), shape=(len(sizes), total)
    )
    to_open_ones = sparse.csr_array(
        (
            np.repeat([1.0, -1.0], pairs),
            (np.tile(pair, 2), np.append(pair, pairs + bucket)),
        ),
        shape=(pairs, total),
    )
    is_bucket = (np.arange(total) >= pairs).astype(float)
    solved = milp(
        cost / cost.max() * 1e4,
        integrality=is_bucket,
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(each_goes_once, 1, 1),
            LinearConstraint(to_open_ones, -np.inf, 0),
            LinearConstraint(sparse.csr_array(is_bucket[None]), 0, count),
        ],
        options={"mip_rel_gap": 0, "time_limit": _MOST_SECONDS},
    )
    return buckets[solved.x[pairs:] > 0.5] if solved.status == 0 else None


def _search(sizes: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
    """Good buckets for any sizes: the best one is added, then swaps while they help."""
    if len(sizes) > _MOST_SIZES_SEARCHED:
        grid = _coarser(sizes, weights, lambda g: len(g) <= _MOST_SIZES_SEARCHED)
        return _refit(_search(*grid, count), sizes)
    levels = np.linspace(0, 1, 32)
    everywhere = _grid(*(np.quantile(s, levels, method="higher") for s in sizes.T))
    everywhere_costs = _costs_of(everywhere, sizes)
    chosen = sizes.max(axis=0, keepdims=True)
    best, improves = _total(chosen, sizes, weights), True
    while improves:
        improves = False
        for k in range(count):  # the bucket that is swapped; with room, one is added
            others = np.delete(chosen, k, axis=0) if k < len(chosen) else chosen
            height, width = chosen[min(k, len(chosen) - 1)]
            beside = np.unique(
                np.vstack([_grid(sizes[:, 0], [width]), _grid([height], sizes[:, 1])]),
                axis=0,
            )
            offers = np.vstack([everywhere_costs, _costs_of(beside, sizes)])
            now = _costs_of(others, sizes).min(axis=0, initial=np.inf)
            totals = np.minimum(offers, now) @ weights
            if totals.min() < best:
                best, improves = totals.min(), True
                new = np.vstack([everywhere, beside])[totals.argmin()]
                chosen = np.vstack([others[:k], new, others[k:]])
    return chosen


def _rounded_up(
    sizes: np.ndarray, weights: np.ndarray, multiple: int
) -> tuple[np.ndarray, np.ndarray]:
    """The distinct sizes, rounded up to multiples, and their weights."""
    rounded = -(-sizes // multiple) * multiple
    distinct, index = np.unique(rounded, axis=0, return_inverse=True)
    return distinct, np.bincount(index.ravel(), weights)


def _coarser(
    sizes: np.ndarray, weights: np.ndarray, are_few: Callable[[np.ndarray], bool]
) -> tuple[np.ndarray, np.ndarray]:
    """The sizes and weights on the finest grid of 2, 4, 8, … that leaves few."""
    grids = (_rounded_up(sizes, weights, 2**n) for n in itertools.count(1))
    return next(grid for grid in grids if are_few(grid[0]))


def _refit(buckets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Each bucket cut to the sizes that go to it."""
    goes_to = _costs_of(buckets, sizes).argmin(axis=0)
    return np.array([sizes[goes_to == k].max(axis=0) for k in np.unique(goes_to)])


def _total(buckets: np.ndarray, sizes: np.ndarray, weights: np.ndarray) -> float:
    return float(_costs_of(buckets, sizes).min(axis=0) @ weights)


def _grid(heights: Any, widths: Any) -> np.ndarray:
    return np.stack(np.meshgrid(heights, widths), axis=-1).reshape(-1, 2)
