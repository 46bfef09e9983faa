"""From a source to batches of uint8 images, with Grain.

A batch is a dict: `image` uint8 [b, s, s, 3] RGB, `label` int32 [b] (a multi-label
source's int8 [b, classes]), `mask` bool [b], `index` int32 [b]. Shapes never change:
what can't be decoded, and what pads the last batch of a test, is a row of zeros with
mask False. `index` is the record's number in the source, -1 for padding, so a broken
record can be named (`describe_broken`).

`batch_size` is always that of all processes together. Each of them yields its share,
and together they yield the same batches whatever their number.

Iterators of batches are context managers, which end their worker processes, and their
`get_state()` is the number of the next batch. Whole images have sizes of their own, so
they come one by one (`whole_images`), to be put into buckets by their sizes, which are
known beforehand (`whole_sizes`).
"""

import atexit
import collections
import contextlib
import functools
import gc
import math
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import connection, resource_tracker
from typing import Any

import grain
import numpy as np
from absl import flags

from sppnet_jax.data import images
from sppnet_jax.data.datasets import ImageData
from sppnet_jax.data.sources import Source, check_label

USUAL = ImageData()  # where the defaults of loading are spelled
# Epochs. The length of Grain's own endless repeat overflows in batches of one.
_FOREVER = 2**31

Example = dict[str, Any]


def train_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    resize_side: int,
    crop: str = USUAL.crop,
    min_area: float = USUAL.min_area,
    flip: bool = USUAL.flip,
    seed: int = 0,
    epochs: int | None = None,
    workers: int = USUAL.workers,
    threads: int = USUAL.threads,
    strict: bool = USUAL.strict,
    process_index: int = 0,
    process_count: int = 1,
) -> "Batches":
    """Yields shuffled, augmented batches; an epoch's last, incomplete one is dropped.

    Order and augmentation follow from `seed` and the epoch alone. `set_state()` goes on
    exactly where `get_state()` was, with any number of workers and threads.

    `image_size`: side of the square images of a batch, in pixels.
    `resize_side`: an image's shorter side before it is cropped; at least `image_size`.
    `crop`: "paper" (the centre or a corner of the entire image, section 3), "center",
    "random", or "random_resized" (of random size and aspect, from the image as it is:
    `resize_side` has no effect).
    `min_area`: the smallest area of a "random_resized" crop, relative to the image.
    `flip`: mirrors half of the images.
    `seed`: 0 ≤ seed < 2³².
    `epochs`: None goes on forever.
    `workers`: processes that load; 0 loads in threads of this one.
    `threads`: threads that load, in each process; each loads a batch at a time.
    `strict`: raises an error for an image that can't be decoded.
    `process_index`: which of the `process_count` processes that run together this is.

    Raises: ValueError for arguments that don't fit together; while iterating, for a
    label out of range, and if strict for a broken image.
    """
    _check_shares(batch_size, process_index, process_count)
    _check_crop(image_size, resize_side)
    if crop not in images.CROPS:
        raise ValueError(f"unknown crop {crop!r}; there are {images.CROPS}")
    if not 0 < min_area <= 1:
        raise ValueError(f"min_area must be above 0 and at most 1, not {min_area}")

    def augment(encoded: bytes, rng: np.random.Generator) -> np.ndarray:
        if crop == "random_resized":
            choose = functools.partial(
                images.random_rectangle, rng=rng, area=(min_area, 1.0)
            )
            part = images.decode_part(encoded, image_size, choose).pixels
            image = images.warp(part, image_size)
        else:
            image = images.decode_resized(encoded, resize_side)
            if crop == "random":
                image = images.random_crop(image, image_size, rng)
            else:
                places = images.CENTER_AND_CORNERS if crop == "paper" else ("center",)
                place = places[rng.integers(len(places))]
                image = images.crop(image, image_size, place)
        if flip and rng.random() < 0.5:
            image = images.mirror(image)
        return np.ascontiguousarray(image)

    def load(index: int, rng: np.random.Generator) -> Example:
        cut = functools.partial(augment, rng=rng)
        shape = (image_size, image_size, 3)
        return _load(index, source, "image", cut, lambda _: _black(shape), strict)

    whole = steps_per_epoch(source, batch_size) * batch_size
    # All that knows of the epoch comes before repeat(), which reseeds it.
    dataset = (
        grain.MapDataset.range(len(source.records))
        .seed(seed)
        .shuffle()
        .random_map(load)[:whole][process_index::process_count]
        .repeat(_FOREVER if epochs is None else epochs)
        .batch(batch_size // process_count)
    )
    return Batches(dataset, workers, threads)


def steps_per_epoch(source: Source, batch_size: int) -> int:
    """The number of whole batches `train_batches` draws from a source each epoch.

    Raises: ValueError if the source is smaller than one batch.
    """
    steps = len(source.records) // batch_size
    if not steps:
        raise ValueError(
            f"split {source.split!r} of {source.name!r} has {len(source.records)} "
            f"records, less than one batch of {batch_size}; lower batch_size"
        )
    return steps


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    resize_side: int,
    positions: Sequence[str] = ("center",),
    **loading: Any,
) -> "Batches":
    """Yields crops of every record once, in order: the centre, unless told otherwise.

    Over all processes together each record comes exactly once. Every process yields the
    same number of batches; the last ones are padded. Arguments, with `workers`,
    `threads`, `strict`, `process_index` and `process_count`, and errors are those of
    `train_batches`.

    `positions`: where to crop, of `images.POSITIONS`. With more than one, a batch's
    `image` is uint8 [b, positions, s, s, 3], in their order.
    """
    _check_crop(image_size, resize_side)
    if not positions or set(positions) - set(images.POSITIONS):
        raise ValueError(
            f"positions must name one or more of {images.POSITIONS}, not {positions!r}"
        )
    several = (len(positions),) if len(positions) > 1 else ()
    shape = (*several, image_size, image_size, 3)

    def cut(encoded: bytes) -> np.ndarray:
        image = images.decode_resized(encoded, resize_side)
        crops = [images.crop(image, image_size, place) for place in positions]
        return np.reshape(crops, shape)

    return _in_order(source, cut, shape, batch_size, **loading)


def warped_batches(
    source: Source, *, batch_size: int, image_size: int, **loading: Any
) -> "Batches":
    """Yields every record's whole image once, in order, warped to a square.

    As `eval_batches` but for what is seen of an image: all of it, at another aspect.
    """

    def cut(encoded: bytes) -> np.ndarray:
        return images.warp(images.decode_part(encoded, image_size).pixels, image_size)

    return _in_order(source, cut, (image_size, image_size, 3), batch_size, **loading)


def whole_images(
    source: Source,
    *,
    sides: Sequence[int],
    max_aspect: float,
    threads: int = USUAL.threads,
    strict: bool = False,
    process_index: int = 0,
    process_count: int = 1,
    indices: Iterable[int] | None = None,
) -> Generator[Example, None, None]:
    """Yields every record's whole image at each of several sizes, in order.

    An example is a dict: `index` int32; `label` int32, or a multi-label source's int8
    [classes]; `mask` False for a broken image; `images`, a list of one uint8 [h, w, 3]
    per side, each resized from the original. A broken image's are zeros of the size
    `whole_sizes` gives. Threads load ahead, a few records each, and end with the
    generator, at the latest when it is closed (`contextlib.closing`).

    `sides`: shorter sides in pixels, at least 1 each.
    `max_aspect`: longer over shorter side; longer images are squeezed to it.
    `threads`, `strict`: as for `train_batches`. Of several processes this one has every
    `process_count`-th record: shares may differ in length by one.
    `indices`: the records to take in place of these, asked for one by one.

    Raises: ValueError for arguments that don't fit together; while iterating, for a
    label out of range, and if strict for a broken image.
    """
    _check_process(process_index, process_count)
    _check_whole(sides, max_aspect, threads)

    def resize(encoded: bytes) -> list[np.ndarray]:
        pixels, size = images.decode_part(encoded, max(sides))
        return [images.resize_whole(pixels, side, max_aspect, size) for side in sides]

    def blank(encoded: bytes) -> list[np.ndarray]:
        sizes = [_whole_size(encoded, side, max_aspect) for side in sides]
        return [_black((*size, 3)) for size in sizes]

    def load(index: int) -> Example:
        return _load(index, source, "images", resize, blank, strict)

    if indices is None:
        indices = range(process_index, len(source.records), process_count)
    return _map_ahead(load, indices, threads)


def whole_sizes(
    source: Source, side: int, max_aspect: float, threads: int = USUAL.threads
) -> np.ndarray:
    """The sizes of all that `whole_images` yields for one side, from files' headers.

    Images with no readable header count as squares.

    Returns: int32 [N, 2], (height, width) in pixels of each of the source's records.
    """
    _check_whole((side,), max_aspect, threads)

    def measure(index: int) -> tuple[int, int]:
        return _whole_size(source.records[index]["image"], side, max_aspect)

    with ThreadPoolExecutor(threads) as pool:
        sizes = list(pool.map(measure, range(len(source.records))))
    return np.array(sizes, np.int32).reshape(-1, 2)


def describe_broken(source: Source, index: int) -> str:
    """The name of a record and why it can't be decoded, by trying again."""
    record = source.records[index]
    try:
        images.decode_image(record["image"])
    except ValueError as error:
        return f"{record['name']}: {error}"
    return f"{record['name']}: can be decoded, but not resized and cropped"


def _in_order(
    source: Source,
    cut: Callable[[bytes], np.ndarray],
    shape: tuple[int, ...],
    batch_size: int,
    *,
    workers: int = USUAL.workers,
    threads: int = USUAL.threads,
    strict: bool = USUAL.strict,
    process_index: int = 0,
    process_count: int = 1,
) -> "Batches":
    """Batches of every record once; each process has as many, the last are padded."""
    _check_shares(batch_size, process_index, process_count)
    total = len(source.records)

    def load(index: int) -> Example:
        if index < total:
            return _load(index, source, "image", cut, lambda _: _black(shape), strict)
        classes = len(source.class_names)
        label = np.zeros(classes, np.int8) if source.multi_label else np.int32(0)
        return _example("image", _black(shape), label, False, -1)

    dataset = (
        grain.MapDataset.range(math.ceil(total / batch_size) * batch_size)
        .map(load)[process_index::process_count]
        .batch(batch_size // process_count)
    )
    return Batches(dataset, workers, threads)


def _load(
    index: int,
    source: Source,
    key: str,
    cut: Callable[[bytes], Any],
    blank: Callable[[bytes], Any],
    strict: bool,
) -> Example:
    """A record, and under `key` what `cut` makes of its image, or `blank` if broken."""
    record = source.records[index]
    check_label(source, record)
    label = record["labels"] if "labels" in record else np.int32(record["label"])
    try:
        seen = cut(record["image"])
    except ValueError as error:
        if strict:
            raise ValueError(
                f"broken image {record['name']!r}, record {index} of split "
                f"{source.split!r} of {source.name!r}: {error}"
            ) from error
        return _example(key, blank(record["image"]), label, False, index)
    return _example(key, seen, label, True, index)


def _black(shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape, np.uint8)


def _example(key: str, seen: Any, label: Any, valid: bool, index: int) -> Example:
    marks = {"mask": np.bool_(valid), "index": np.int32(index)}
    return {key: seen, "label": label, **marks}


def _whole_size(encoded: bytes, side: int, max_aspect: float) -> tuple[int, int]:
    try:
        return images.whole_size(*images.image_size(encoded), side, max_aspect)
    except ValueError:
        return side, side


def _map_ahead(
    load: Callable[[int], Example], indices: Iterable[int], threads: int
) -> Generator[Example, None, None]:
    pending: collections.deque[Future[Example]] = collections.deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for index in indices:
            pending.append(pool.submit(load, index))
            # Whole images are large: only a few may wait for the consumer.
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _check_crop(image_size: int, resize_side: int) -> None:
    if image_size < 1 or resize_side < image_size:
        raise ValueError(
            f"resize_side {resize_side} is smaller than image_size {image_size}: the "
            "crop would not fit into the resized image"
        )


def _check_shares(batch_size: int, process_index: int, process_count: int) -> None:
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size} can't be shared evenly by {process_count} "
            "processes"
        )
    _check_process(process_index, process_count)


def _check_process(process_index: int, process_count: int) -> None:
    if not 0 <= process_index < process_count:
        raise ValueError(f"no process {process_index} among {process_count}")


def _check_whole(sides: Sequence[int], max_aspect: float, threads: int) -> None:
    if not sides or min(sides) < 1:
        raise ValueError(f"sides must be one or more of at least 1 pixel, not {sides}")
    if max_aspect < 1:
        raise ValueError(
            f"max_aspect is the longer side over the shorter: at least 1, not "
            f"{max_aspect}"
        )
    if threads < 1:
        raise ValueError(f"it takes at least one thread to load, not {threads}")


class Batches(grain.DatasetIterator):
    """Iterates over a data set of batches; its state is the number of the next one.

    That holds for any number of workers, where Grain's own state would tie a
    checkpoint to the number it was saved with.
    """

    def __init__(self, dataset: grain.MapDataset, workers: int, threads: int) -> None:
        super().__init__()
        self._dataset = dataset
        self._workers = workers
        self._threads = threads
        self._next_index = 0
        self._running: grain.DatasetIterator | None = None
        self._is_new = True
        if workers:
            # Workers that outlive the interpreter print pages of errors.
            atexit.register(_close, weakref.ref(self))

    def __next__(self) -> Example:
        self._assert_not_closed()
        running = self._start()
        with self._as_workers_begin():
            batch = next(running)
        self._is_new = False
        self._next_index += 1
        if self._workers:  # what is in shared memory is given back before the end
            batch = {name: np.array(value) for name, value in batch.items()}
        return batch

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def get_state(self) -> dict[str, Any]:
        return {"next_index": self._next_index}

    def set_state(self, state: dict[str, Any]) -> None:
        self._stop()
        self._next_index = int(state["next_index"])

    def start_prefetch(self) -> None:
        running = self._start()
        with self._as_workers_begin():
            running.start_prefetch()

    def close(self) -> None:
        self._stop()
        super().close()

    def _as_workers_begin(self) -> contextlib.AbstractContextManager[None]:
        """For all up to the first batch, which starts the workers."""
        begin = self._workers and self._is_new
        return _interrupts_blocked() if begin else contextlib.nullcontext()

    def _start(self) -> grain.DatasetIterator:
        if self._running is None:
            self._running = iter(self._read_ahead(self._dataset[self._next_index :]))
            self._is_new = True
        return self._running

    def _stop(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None
            if not self._workers:
                return
            # Grain gives shared memory back with the last arrays in it, in a thread:
            # the end of the process must not come first. To wait has no public way.
            gc.collect()
            shared = sys.modules.get("grain._src.python.ipc.shared_memory_array")
            array = getattr(shared, "SharedMemoryArray", None)
            if pool := getattr(array, "_del_thread_pool", None):
                pool.apply(int)

    def _read_ahead(self, dataset: grain.MapDataset) -> grain.IterDataset:
        # The buffer counts whole batches, so it must be small.
        options = grain.ReadOptions(
            num_threads=self._threads, prefetch_buffer_size=2 * self._threads
        )
        batches = dataset.to_iter_dataset(options)
        if not self._workers:
            return batches
        # Grain's workers read absl flags, which only `absl.app.run` parses.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        return batches.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=self._workers, per_worker_buffer_size=2
            ),
            worker_init_fn=_end_with_parent,
        )


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Ctrl-C waits, and never ends the processes that begin here: they inherit this.

    It reaches workers too, which would end before the run can be saved.
    """
    resource_tracker.ensure_running()  # which workers share; it unblocks Ctrl-C itself
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent(index: int, count: int) -> None:
    """Lets a worker process end with the main process, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _close(reference: weakref.ref) -> None:
    iterator = reference()
    if iterator is not None:
        iterator.close()
