"""Buckets: a few static input shapes that serve images of every size.

XLA compiles a program for each input shape. An image is padded, at its bottom and
right, into the smallest bucket that holds it, and its true height and width go along as
its valid size; the model masks the rest, so the result is that of the image alone.

`choose_buckets` finds the buckets that pad a data set the least; `BucketTable` compiles
a function for each of them and runs images of every size through the programs.
"""

import logging
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import cv2
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp

Bucket = tuple[int, int]
Sizes = Sequence[Bucket] | np.ndarray  # (height, width) of each image, int [N, 2]
Key = TypeVar("Key", bound=Hashable)

# What takes a few seconds at most; see `choose_buckets`.
_MOST_STATES = 100_000
_MOST_IN_A_CHAIN = 3_000
_MOST_SIZES_ANY = 200
_MOST_PAIRS = 60_000
_MOST_SECONDS = 20
_MOST_SIZES_SEARCHED = 500
_IN_FLIGHT = 2

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
    sizes = _check_sizes(sizes)
    if count < 1 or multiple < 1:
        raise ValueError(
            f"count and multiple must be at least 1, got {count=}, {multiple=}"
        )
    distinct, weights = _rounded_up(sizes, np.ones(len(sizes)), multiple)
    if len(distinct) <= count:
        return _sorted_buckets(distinct)
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
    return _sorted_buckets(_refit(found, distinct))


def padding_waste(sizes: Sizes, buckets: Sequence[Bucket]) -> float:
    """The share of the padded pixels that are padding, each image in its own bucket.

    Returns: 0 (no padding) to 1.
    Raises: ValueError for no sizes, or a size that no bucket holds.
    """
    distinct, weights = np.unique(_check_sizes(sizes), axis=0, return_counts=True)
    areas = [np.prod(smallest_bucket(tuple(size), buckets)) for size in distinct]
    return 1 - float(weights @ distinct.prod(axis=1)) / float(weights @ areas)


def smallest_bucket(size: tuple[int, int], buckets: Sequence[Bucket]) -> Bucket:
    """The bucket of least area that holds an image of (height, width).

    Raises: ValueError if none does.
    """
    fitting = [b for b in buckets if b[0] >= size[0] and b[1] >= size[1]]
    if not fitting:
        raise ValueError(
            f"no bucket holds an image of {size[0]}×{size[1]}; there are "
            + _names(buckets)
        )
    return min(fitting, key=lambda bucket: bucket[0] * bucket[1])


def pad_to_bucket(image: np.ndarray, bucket: Bucket) -> np.ndarray:
    """The image [h, w, 3] at the top left of zeros of the bucket's size."""
    height, width = image.shape[:2]
    padding = ((0, bucket[0] - height), (0, bucket[1] - width), (0, 0))
    return np.pad(image, padding)


class BucketRow(NamedTuple):
    """What a `BucketTable` knows of one bucket; None where it can't tell (yet).

    `flops`, `bytes`: of one call on all devices, from XLA's cost analysis, which counts
    a multiplication and an addition as two and bytes before any caching.
    `compile_seconds`: of tracing and compiling; less for a program that comes from
    JAX's persistent compilation cache.
    `images`: those that came; `calls` × `batch_size` less the blank rows.
    `seconds_per_call`: the mean; from handing a batch to the devices, or from the end
    of the call before if that is later, until the result is ready. Copying the images
    to the devices is in it, loading and padding them is not.
    `padded_share`: of the pixels computed, those that belong to no image.
    """

    bucket: Bucket
    batch_size: int
    compile_seconds: float | None
    flops: float | None
    bytes: float | None
    calls: int
    images: int
    seconds_per_call: float | None
    padded_share: float | None


class BucketTable:
    """The compiled programs of a function, one for each bucket, and what each costs.

    `function`: (params, images uint8 [batch, h, w, 3], sizes int32 [batch, 2]) to a
    pytree whose every leaf has the batch as its first axis. `sizes` are valid sizes.
    `params`: placed on the devices once.
    `buckets`: (height, width) each, see `choose_buckets`.
    `batch_size`: rounded up to a multiple of the number of devices.
    `too_large`: what happens to an image that no bucket holds: "refuse" raises,
    "shrink" scales it down, keeping its aspect, into the bucket that keeps most of it.
    `min_side`: images with a shorter side are refused, also after shrinking; a
    network's is `backbone_geometry(name).min_image_size`.
    `devices`: those that share each batch; all local ones by default.

    A bucket is compiled when its first batch is full, or by `compile` ahead of time.
    Printed, it is a table of `rows`.

    Raises: ValueError for arguments that do not fit.
    """

    def __init__(
        self,
        function: Callable[[Any, jax.Array, jax.Array], Any],
        params: Any,
        buckets: Sequence[Bucket],
        batch_size: int,
        *,
        too_large: str = "refuse",
        min_side: int = 1,
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if too_large not in ("refuse", "shrink"):
            raise ValueError(
                f"unknown too_large {too_large!r}: use 'refuse' or 'shrink'"
            )
        devices = jax.local_devices() if devices is None else list(devices)
        mesh = Mesh(np.array(devices), ("devices",))
        replicated = NamedSharding(mesh, PartitionSpec())
        self._by_row = NamedSharding(mesh, PartitionSpec("devices"))
        self._function = jax.jit(
            function,
            in_shardings=(replicated, self._by_row, self._by_row),
            out_shardings=self._by_row,
        )
        self._params = jax.device_put(params, replicated)
        self._device_count = len(devices)
        self._programs: dict[Bucket, _Program] = {}
        self._counts = {
            bucket: _Counts() for bucket in _sorted_buckets(_check_sizes(buckets))
        }
        self._ready = 0.0
        self.batch_size = -(-batch_size // len(devices)) * len(devices)
        self.too_large = too_large
        self.min_side = min_side
        self.shrunk = 0

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The buckets, smallest area first."""
        return tuple(self._counts)

    @property
    def programs(self) -> int:
        """The number of programs compiled so far."""
        return len(self._programs)

    def compile(self) -> None:
        """Compiles the program of every bucket that has none yet."""
        for bucket in self.buckets:
            self._program(bucket)

    def map(self, pairs: Iterable[tuple[Key, np.ndarray]]) -> Iterator[tuple[Key, Any]]:
        """Runs every image through the program of its bucket.

        A batch mixes images of all sizes that share a bucket; it runs when it is full,
        or at the end, filled up with blank rows. The devices work on one batch while
        the images of the next are read.

        `pairs`: (key, image uint8 [h, w, 3]); the key comes back with the result.

        Returns: (key, the image's own rows of the function's result, as NumPy), in the
        order in which batches finish.
        Raises: ValueError naming the key of an image that doesn't fit, when the results
        of all images before it are out.
        """
        running: deque[_Batch] = deque()
        # The watcher notes when a result is ready, whatever this thread is busy with.
        with ThreadPoolExecutor(1) as watcher:
            refused = None
            try:
                for bucket, batch in self._batches(pairs):
                    running.append(self._start(watcher, bucket, batch))
                    if len(running) == _IN_FLIGHT:
                        yield from self._finish(running.popleft())
            except ValueError as error:
                refused = error
            while running:
                yield from self._finish(running.popleft())
            if refused is not None:
                raise refused

    def rows(self) -> list[BucketRow]:
        """One row for each bucket, smallest area first."""
        rows = []
        for bucket, counts in self._counts.items():
            program, calls = self._programs.get(bucket), counts.calls
            computed = calls * self.batch_size * bucket[0] * bucket[1]
            rows.append(
                BucketRow(
                    bucket,
                    self.batch_size,
                    program.compile_seconds if program else None,
                    program.flops if program else None,
                    program.bytes if program else None,
                    calls,
                    counts.images,
                    counts.seconds / calls if calls else None,
                    1 - counts.pixels / computed if calls else None,
                )
            )
        return rows

    def __str__(self) -> str:
        heads = "bucket,batch,compile s,GFLOP,GB,calls,images,ms/call,padding"
        lines = [heads.split(","), *(_cells(row) for row in self.rows())]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = [
            "  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True))
            for line in lines
        ]
        total = f"compiled: {self.programs} of {len(self.buckets)} buckets"
        shrunk = f"; images shrunk to fit: {self.shrunk:,}" if self.shrunk else ""
        return "\n".join([*table, total + shrunk])

    def _batches(
        self, pairs: Iterable[tuple[Key, np.ndarray]]
    ) -> Iterator[tuple[Bucket, list[tuple[Key, np.ndarray]]]]:
        """Full batches of one bucket each, then what is left."""
        waiting: dict[Bucket, list[tuple[Key, np.ndarray]]] = defaultdict(list)
        refused = None
        try:
            for key, image in pairs:
                image, bucket = self._fit(key, image)
                waiting[bucket].append((key, image))
                if len(waiting[bucket]) == self.batch_size:
                    yield bucket, waiting.pop(bucket)
        except ValueError as error:
            refused = error
        yield from waiting.items()
        if refused is not None:
            raise refused

    def _fit(self, key: Hashable, image: np.ndarray) -> tuple[np.ndarray, Bucket]:
        """The image, shrunk where that is needed and allowed, and its bucket."""
        is_image = image.ndim == 3 and image.shape[2] == 3 and image.size > 0
        if not is_image or image.dtype != np.uint8:
            raise ValueError(
                f"image {key!r} must be uint8 [height, width, 3], got {image.dtype} "
                f"{list(image.shape)}"
            )
        seen = f"{image.shape[0]}×{image.shape[1]}"
        shrinks = not any(_holds(bucket, image.shape) for bucket in self.buckets)
        if shrinks and self.too_large == "refuse":
            raise ValueError(
                f"image {key!r} of {seen} fits into no bucket; the largest are "
                f"{_names(self.buckets[-3:])}. Add a larger bucket, resize the image, "
                "or allow too_large='shrink'."
            )
        if shrinks:
            image = _shrink(image, self.buckets)
        height, width = image.shape[:2]
        if min(height, width) < self.min_side:
            now = f" shrunk to {height}×{width}" if shrinks else ""
            raise ValueError(
                f"image {key!r} of {seen}{now} has a side of less than {self.min_side} "
                "pixels, the least that gives a result; enlarge it, or leave it out"
            )
        if shrinks:
            if not self.shrunk:
                log.warning(
                    "image %r of %s fits into no bucket and was shrunk to %d×%d; so "
                    "will others, and the table counts them",
                    key,
                    seen,
                    height,
                    width,
                )
            self.shrunk += 1
        return image, smallest_bucket((height, width), self.buckets)

    def _start(
        self,
        watcher: ThreadPoolExecutor,
        bucket: Bucket,
        pairs: list[tuple[Any, np.ndarray]],
    ) -> "_Batch":
        """Hands a batch to the devices and returns at once."""
        program = self._program(bucket)
        images = np.zeros((self.batch_size, *bucket, 3), np.uint8)
        # A blank row counts as a whole image of zeros, so that no layer sees an empty
        # map.
        sizes = np.full((self.batch_size, 2), bucket, np.int32)
        for row, (_, image) in enumerate(pairs):
            height, width = image.shape[:2]
            images[row, :height, :width] = image
            sizes[row] = height, width
        started = time.perf_counter()
        inputs = jax.device_put((images, sizes), self._by_row)
        result = program.run(self._params, *inputs)
        keys = [key for key, _ in pairs]
        pixels = int(sizes[: len(pairs)].astype(np.int64).prod(axis=1).sum())
        return _Batch(bucket, keys, pixels, started, watcher.submit(_wait_for, result))

    def _finish(self, batch: "_Batch") -> list[tuple[Any, Any]]:
        """Waits for a batch, and counts it."""
        result, ready = batch.result.result()
        counts = self._counts[batch.bucket]
        counts.calls += 1
        counts.images += len(batch.keys)
        counts.pixels += batch.pixels
        counts.seconds += ready - max(batch.started, self._ready)
        self._ready = ready
        arrays = jax.device_get(result)
        return [
            (key, jax.tree.map(lambda leaf, row=row: leaf[row], arrays))
            for row, key in enumerate(batch.keys)
        ]

    def _program(self, bucket: Bucket) -> "_Program":
        if bucket not in self._programs:
            images = jax.ShapeDtypeStruct((self.batch_size, *bucket, 3), np.uint8)
            sizes = jax.ShapeDtypeStruct((self.batch_size, 2), np.int32)
            started = time.perf_counter()
            run = self._function.lower(self._params, images, sizes).compile()
            seconds = time.perf_counter() - started
            # XLA analyses the program of one device; they all run the same.
            flops, read = (
                cost and cost * self._device_count
                for cost in _costs(run, "flops", "bytes accessed")
            )
            self._programs[bucket] = _Program(run, seconds, flops, read)
        return self._programs[bucket]


class _Program(NamedTuple):
    run: Callable[..., Any]
    compile_seconds: float
    flops: float | None
    bytes: float | None


@dataclass
class _Counts:
    calls: int = 0
    images: int = 0
    pixels: int = 0
    seconds: float = 0.0


class _Batch(NamedTuple):
    bucket: Bucket
    keys: list[Any]
    pixels: int
    started: float
    result: Future[tuple[Any, float]]


def _wait_for(result: Any) -> tuple[Any, float]:
    return jax.block_until_ready(result), time.perf_counter()


def _costs(program: Any, *names: str) -> list[float | None]:
    """Numbers of XLA's cost analysis; None for those that a backend doesn't give."""
    try:
        costs = program.cost_analysis()
    except NotImplementedError:
        costs = None
    if isinstance(costs, list | tuple):
        costs = costs[0] if costs else None
    return [(costs or {}).get(name) for name in names]


def _shrink(image: np.ndarray, buckets: Sequence[Bucket]) -> np.ndarray:
    """Scales an image down to the largest size, of its aspect, that a bucket holds."""
    height, width = image.shape[:2]
    scale = max(min(b[0] / height, b[1] / width) for b in buckets)
    # A floor, but for what floating point takes from a whole number.
    size = [max(1, int(side * scale + 1e-6)) for side in (width, height)]
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _cells(row: BucketRow) -> list[str]:
    def number(value: float | None, unit: float = 1.0) -> str:
        if value is None:
            return "–"
        value /= unit
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    share = row.padded_share
    return [
        _names([row.bucket]),
        str(row.batch_size),
        number(row.compile_seconds),
        number(row.flops, 1e9),
        number(row.bytes, 1e9),
        f"{row.calls:,}",
        f"{row.images:,}",
        number(row.seconds_per_call, 1e-3),
        "–" if share is None else f"{share:.1%}",
    ]


def _names(buckets: Iterable[Bucket]) -> str:
    return ", ".join(f"{height}×{width}" for height, width in buckets)


def _holds(bucket: Bucket, shape: Sequence[int]) -> bool:
    return bucket[0] >= shape[0] and bucket[1] >= shape[1]


def _check_sizes(sizes: Sizes) -> np.ndarray:
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


def _sorted_buckets(buckets: Iterable[Sequence[int]]) -> tuple[Bucket, ...]:
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
    grid, grid_weights, multiple = sizes, weights, 1
    while chains is not None and not _are_few(chains):
        multiple *= 2
        grid, grid_weights = _rounded_up(sizes, weights, multiple)
        chains = _two_chains(grid)
    assert chains is not None
    coarse = _search(grid, grid_weights, count)
    coarse = _refit(_cover_chains(grid, grid_weights, chains, count, coarse), sizes)
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


def _are_few(chains: list[np.ndarray]) -> bool:
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
    grid, grid_weights, multiple = sizes, weights, 1
    while len(grid) > _MOST_SIZES_SEARCHED:
        multiple *= 2
        grid, grid_weights = _rounded_up(sizes, weights, multiple)
    if multiple > 1:
        return _refit(_search(grid, grid_weights, count), sizes)
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


def _refit(buckets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Each bucket cut to the sizes that go to it."""
    goes_to = _costs_of(buckets, sizes).argmin(axis=0)
    return np.array([sizes[goes_to == k].max(axis=0) for k in np.unique(goes_to)])


def _total(buckets: np.ndarray, sizes: np.ndarray, weights: np.ndarray) -> float:
    return float(_costs_of(buckets, sizes).min(axis=0) @ weights)


def _grid(heights: Any, widths: Any) -> np.ndarray:
    return np.stack(np.meshgrid(heights, widths), axis=-1).reshape(-1, 2)
