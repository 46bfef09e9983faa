"""Softmax scores of a whole split, averaged over each image's views.

`score_split` scores by a protocol: views are cut out of the image, or whole images are
convolved in buckets and the views pooled from their maps. `split_scorer` is the same as
a function of parts of the split.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from sppnet_jax.buckets import BucketTable
from sppnet_jax.buckets.whole_images import fit_table, map_whole_images
from sppnet_jax.classification.views import Protocol, view_windows
from sppnet_jax.data.batches import Batches, Example, eval_batches
from sppnet_jax.data.sources import Source
from sppnet_jax.network.preprocess import mirror, normalize
from sppnet_jax.network.trained import Network
from sppnet_jax.run import parallel
from sppnet_jax.run.progress import progress_bar
from sppnet_jax.training.steps import shard_batch


class Scores(NamedTuple):
    """What a network says of every record of a split.

    `scores`: float32 [records, classes], softmax, the mean over the views. `labels`:
    int32 [records]. `valid`: bool [records], False for a broken image, whose scores are
    zeros. `views`: int32 [records], how many views were averaged.
    """

    scores: np.ndarray
    labels: np.ndarray
    valid: np.ndarray
    views: np.ndarray


def score_split(
    network: Network, source: Source, protocol: Protocol, **options: Any
) -> tuple[Scores, list[BucketTable]]:
    """The scores of a source's records by a protocol, and the programs of whole images.

    `options`: of `split_scorer`.
    """
    score, tables = split_scorer(network, source, protocol, **options)
    return score(source), tables


def split_scorer(
    network: Network,
    source: Source,
    protocol: Protocol,
    *,
    batch_size: int,
    max_buckets: int = 4,
    workers: int = 0,
    threads: int = 8,
    strict: bool = False,
) -> tuple[Callable[[Source], Scores], list[BucketTable]]:
    """A function that scores a source, or a part of it, by a protocol.

    `batch_size`: of images of the training size; more pixels come in smaller batches.
    `max_buckets`: programs for each scale of whole images, which fit all of the source.
    `workers`, `threads`, `strict`: see `data.batches.eval_batches`.

    Returns: the function, and the programs of whole images at each scale.
    Raises: ValueError for views on maps of a network without a pyramid.
    """
    batch_size = parallel.round_up_to_devices(batch_size)
    loading = {"threads": threads, "strict": strict}
    if protocol.on_map:
        tables = _view_tables(
            network,
            protocol,
            source,
            batch_size=batch_size,
            max_buckets=max_buckets,
            threads=threads,
        )
        return functools.partial(
            _score_maps, network, protocol, tables, loading
        ), tables
    program = _crop_program(network, protocol)
    rows = parallel.round_up_to_devices(max(1, batch_size // len(protocol.positions)))

    def score_crops(part: Source) -> Scores:
        batches = eval_batches(
            part,
            batch_size=rows,
            image_size=network.model.image_size,
            resize_side=protocol.scales[0],
            positions=protocol.positions,
            workers=workers,
            **loading,
        )
        return _score_crops(network, protocol, program, batches, len(part.records))

    return score_crops, []


def _crop_program(network: Network, protocol: Protocol) -> Callable[..., np.ndarray]:
    """From a batch of views cut out of images to the sums of each image's scores."""
    model, preprocessing = network.model, network.preprocessing

    def step(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        images = batch["image"]
        views = images.reshape(-1, *images.shape[-3:])
        mirrored = [views[:, :, ::-1]] if protocol.flip else []
        total = sum(
            jax.nn.softmax(
                model.apply({"params": params}, normalize(shown, preprocessing))[0]
            )
            for shown in [views, *mirrored]
        )
        by_view = total.reshape(len(images), -1, model.num_classes)  # type: ignore
        return by_view.sum(axis=1)

    program = parallel.data_parallel(step)
    replicated = parallel.replicate(network.params)

    def run(batch: Example) -> np.ndarray:
        sums = np.asarray(program(replicated, shard_batch(batch)))
        return sums.reshape(-1, model.num_classes)

    return run


def _score_crops(
    network: Network,
    protocol: Protocol,
    program: Callable[..., np.ndarray],
    batches: Batches,
    records: int,
) -> Scores:
    """Scores views that were cut out of the images.

    `batches`: of `eval_batches` over `records` records, with the protocol's positions;
    closed at the end.
    """
    found = _Collector(records, network.model.num_classes)
    views = len(protocol.positions) * (2 if protocol.flip else 1)
    with batches, progress_bar("testing", records) as bar:
        for batch in batches:
            for row, total in enumerate(program(batch)):
                index, mask = int(batch["index"][row]), bool(batch["mask"][row])
                if index < 0:
                    continue
                found.record(index, int(batch["label"][row]), mask)
                if mask:
                    found.add(index, total, views)
                bar.update()
    return found.scores()


def _view_tables(
    network: Network, protocol: Protocol, source: Source, **options: Any
) -> list[BucketTable]:
    """The programs that pool views from whole images, one table for each scale."""
    if network.model.levels is None:
        raise ValueError(
            "this network has no spatial pyramid (levels=None), so it can't pool views "
            "from maps of any size: use the protocol single or ten_view"
        )
    return [
        fit_table(
            _view_scores(network, protocol, scale), network, source, scale, **options
        )
        for scale in protocol.scales
    ]


def _score_maps(
    network: Network,
    protocol: Protocol,
    tables: Sequence[BucketTable],
    loading: dict[str, Any],
    source: Source,
) -> Scores:
    """Scores views that are pooled from the maps of whole images, in fitted buckets.

    Each scale is convolved once, and once mirrored; all its views are pooled in one
    call. Images longer than 4:1 are squeezed to 4:1.
    """
    records = len(source.records)
    found = _Collector(records, network.model.num_classes)
    with progress_bar("testing", records * len(protocol.scales)) as bar:

        def seen(example: Example) -> None:
            index, mask = int(example["index"]), bool(example["mask"])
            found.record(index, int(example["label"]), mask)
            bar.update()

        for scale, table in zip(protocol.scales, tables, strict=True):
            for index, result in map_whole_images(
                table, source, scale, on_example=seen, **loading
            ):
                found.add(index, result["sum"], int(result["views"]))
    return found.scores()


class _Collector:
    """Sums up the scores of each record's views, in whatever order they come."""

    def __init__(self, records: int, classes: int) -> None:
        self._sums = np.zeros((records, classes), np.float32)
        self._views = np.zeros(records, np.int32)
        self._labels = np.zeros(records, np.int32)
        self._valid = np.zeros(records, bool)

    def record(self, index: int, label: int, valid: bool) -> None:
        self._labels[index], self._valid[index] = label, valid

    def add(self, index: int, total: np.ndarray, views: int) -> None:
        self._sums[index] += total
        self._views[index] += views

    def scores(self) -> Scores:
        """The means."""
        mean = self._sums / np.maximum(self._views, 1)[:, None]
        return Scores(mean, self._labels, self._valid, self._views)


def _view_scores(
    network: Network, protocol: Protocol, scale: int
) -> Callable[..., dict[str, jax.Array]]:
    """From whole images at a scale to the sums of their views' scores."""
    model, preprocessing = network.model, network.preprocessing
    view, geometry = model.image_size, network.geometry

    pool_windows = functools.partial(model.apply, {}, method="pool_windows")

    def score(params: Any, images: jax.Array, sizes: jax.Array) -> dict[str, jax.Array]:
        windows, counts = view_windows(
            sizes,
            protocol.positions,
            view,
            geometry,
            whole=scale in protocol.whole_at,
        )

        def score_images(images: jax.Array) -> jax.Array:
            inputs = normalize(images, preprocessing, sizes)
            maps, _ = model.apply({"params": params}, inputs, sizes, method="features")
            pooled: Any = jax.vmap(pool_windows)(maps, windows)
            flat = pooled.reshape(len(images) * windows.shape[1], -1)
            logits, _ = model.apply({"params": params}, flat, method="classify")
            scores = jax.nn.softmax(logits).reshape(*windows.shape[:2], -1)
            return (scores * counts[..., None]).sum(axis=1)

        total, views = score_images(images), counts.sum(axis=1)
        if protocol.flip:
            total, views = total + score_images(mirror(images, sizes)), 2 * views
        return {"sum": total, "views": views}

    return score
