"""Buckets: a few static input shapes that serve images of every size.

XLA compiles a program for each input shape. An image is padded, at its bottom and
right, into the smallest bucket that holds it, and its true height and width go along as
its valid size; the model masks the rest, so the result is that of the image alone.
"""

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sppnet_jax.buckets.choice import Bucket, Sizes, check_sizes, sorted_buckets

Key = TypeVar("Key", bound=Hashable)

_Pair = tuple[Any, np.ndarray]  # key and image

_IN_FLIGHT = 2

log = logging.getLogger(__name__)


def padding_waste(sizes: Sizes, buckets: Sequence[Bucket]) -> float:
    """The share of the padded pixels that are padding, each image in its own bucket.

    Returns: 0 (no padding) to 1.
    Raises: ValueError for no sizes, or a size that no bucket holds.
    """
    distinct, weights = np.unique(check_sizes(sizes), axis=0, return_counts=True)
    areas = [np.prod(smallest_bucket(tuple(size), buckets)) for size in distinct]
    return 1 - float(weights @ distinct.prod(axis=1)) / float(weights @ areas)


def smallest_bucket(size: tuple[int, int], buckets: Sequence[Bucket]) -> Bucket:
    """The bucket of least area that holds an image of (height, width).

    Raises: ValueError if none does.
    """
    fitting = [bucket for bucket in buckets if _holds(bucket, size)]
    if not fitting:
        raise ValueError(
            f"no bucket holds an image of {_names([size])}; there are {_names(buckets)}"
        )
    return min(fitting, key=lambda bucket: bucket[0] * bucket[1])


def pad_to_bucket(image: np.ndarray, bucket: Bucket) -> np.ndarray:
    """The image [h, w, 3] at the top left of zeros of the bucket's size.

    Raises: ValueError for a bucket that does not hold the image.
    """
    height, width = image.shape[:2]
    if not _holds(bucket, image.shape):
        raise ValueError(
            f"an image of {height}×{width} does not fit into a bucket of "
            f"{_names([bucket])}"
        )
    return np.pad(image, ((0, bucket[0] - height), (0, bucket[1] - width), (0, 0)))


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
        ordered = sorted_buckets(check_sizes(buckets))
        self._counts = {bucket: _Counts() for bucket in ordered}
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

    def program(self, bucket: Bucket) -> Callable[[Any, Any], Any]:
        """The compiled program of a bucket, to time or to profile by itself.

        Returns: a function of images uint8 [batch_size, height, width, 3], as large as
        the bucket, and sizes int32 [batch_size, 2], that gives what `function` does, on
        the devices. Arrays that lie there already are not copied.
        Raises: ValueError for a bucket that the table does not have.
        """
        if bucket not in self._counts:
            there = _names(self.buckets)
            raise ValueError(
                f"there is no bucket {_names([bucket])}; there are {there}"
            )
        run = self._program(bucket).run
        return lambda images, sizes: run(
            self._params, *jax.device_put((images, sizes), self._by_row)
        )

    def map(
        self, pairs: Iterable[tuple[Key, np.ndarray]], *, join: bool = True
    ) -> Iterator[tuple[Key, Any]]:
        """Runs every image through the program of its bucket.

        A batch mixes images of all sizes that share a bucket; it runs when it is full.
        At the end, what is left of a bucket joins what is left of a larger one where
        there is room, and blank rows fill up the rest. The devices work on one batch
        while the images of the next are read.

        `pairs`: (key, image uint8 [h, w, 3]); the key comes back with the result.
        `join`: False leaves every image in its own bucket to the end. That may take
        more calls, and makes results the same to the last bit whatever else is run.

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
                for bucket, batch in self._batches(pairs, join):
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
            program, calls = self._programs.get(bucket, _NO_PROGRAM), counts.calls
            computed = calls * self.batch_size * bucket[0] * bucket[1]
            rows.append(
                BucketRow(
                    bucket,
                    self.batch_size,
                    *program[1:],
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
        table = ["  ".join(map(str.rjust, line, widths)) for line in lines]
        total = f"compiled: {self.programs} of {len(self.buckets)} buckets"
        shrunk = f"; images shrunk to fit: {self.shrunk:,}" if self.shrunk else ""
        return "\n".join([*table, total + shrunk])

    def _batches(
        self, pairs: Iterable[_Pair], join: bool
    ) -> Iterator[tuple[Bucket, list[_Pair]]]:
        """Full batches of one bucket each, then what is left."""
        waiting: dict[Bucket, list[_Pair]] = defaultdict(list)
        refused = None
        try:
            for key, image in pairs:
                image, bucket = self._fit(key, image)
                waiting[bucket].append((key, image))
                if len(waiting[bucket]) == self.batch_size:
                    yield bucket, waiting.pop(bucket)
        except ValueError as error:
            refused = error
        yield from _joined(waiting, self.batch_size) if join else waiting.items()
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
        self, watcher: ThreadPoolExecutor, bucket: Bucket, pairs: list[_Pair]
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
            lowered = self._function.lower(self._params, images, sizes)
            run = lowered.compile()
            seconds = time.perf_counter() - started
            # Compiled, a convolution may be a library's, whose FLOPs XLA can't tell.
            flops, read = _cost(lowered, "flops"), _cost(run, "bytes accessed")
            # What is compiled is the program of one device; they all run the same.
            read = read and read * self._device_count
            self._programs[bucket] = _Program(run, seconds, flops, read)
        return self._programs[bucket]


class _Program(NamedTuple):
    run: Any
    compile_seconds: float | None
    flops: float | None
    bytes: float | None


_NO_PROGRAM = _Program(None, None, None, None)


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


def _joined(
    waiting: dict[Bucket, list[_Pair]], batch_size: int
) -> list[tuple[Bucket, list[_Pair]]]:
    """Batches that are not full, each in the smallest other bucket that has room."""
    left = {bucket: waiting[bucket] for bucket in sorted_buckets(waiting)}
    for bucket in list(left):
        room = batch_size - len(left[bucket])
        for larger, others in left.items():
            if larger != bucket and _holds(larger, bucket) and len(others) <= room:
                others.extend(left.pop(bucket))
                break
    return list(left.items())


def _wait_for(result: Any) -> tuple[Any, float]:
    return jax.block_until_ready(result), time.perf_counter()


def _cost(program: Any, name: str) -> float | None:
    """A number of XLA's cost analysis; None where a backend doesn't give it."""
    try:
        costs = program.cost_analysis()
    except NotImplementedError:  # JAX's word for a backend without the analysis
        costs = None
    if isinstance(costs, list | tuple):
        costs = costs[0] if costs else None
    return (costs or {}).get(name)


def _shrink(image: np.ndarray, buckets: Sequence[Bucket]) -> np.ndarray:
    """Scales an image down to the largest size, of its aspect, that a bucket holds."""
    height, width = image.shape[:2]
    scale = max(min(b[0] / height, b[1] / width) for b in buckets)
    import cv2  # here, so that machines without OpenCV can use buckets that fit

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
