"""The test of a trained network, or of several together, by one of the protocols."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sppnet_jax.buckets.whole_images import MAX_ASPECT
from sppnet_jax.classification import views
from sppnet_jax.classification.accuracy import mean_scores, summarize
from sppnet_jax.classification.pictures import Prediction, plot_predictions
from sppnet_jax.classification.scores import Scores, split_scorer
from sppnet_jax.data.broken import BrokenImages
from sppnet_jax.data.datasets import open_split
from sppnet_jax.data.images import crop, decode_resized
from sppnet_jax.data.sources import Source, subset
from sppnet_jax.network.trained import load_network
from sppnet_jax.run import files, run_folder
from sppnet_jax.run.settings import plain
from sppnet_jax.run.shares import ALONE, Share, in_parts
from sppnet_jax.run.stages import digest_of
from sppnet_jax.training.network_settings import NetworkSettings, network_settings
from sppnet_jax.training.networks import check_data_is_unchanged

EXAMPLES = 24  # images in the picture

log = logging.getLogger(__name__)


def evaluate_networks(
    workdirs: Sequence[Path],
    protocol_name: str,
    *,
    settings: NetworkSettings | None = None,
    scales: Sequence[int] = (),
    positions: Sequence[str] = (),
    flip: bool | None = None,
    max_buckets: int = 4,
    share: Share = ALONE,
    tell: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Tests the newest checkpoints on a split; writes the result as JSON and a picture.

    Several networks average their softmax scores.

    `workdirs`: of the networks; results go into the first. `settings`: of the first, if
    others than it was trained with; its data is what all are tested on.
    `scales`, `positions`, `flip`: see `views.named_protocol`; None mirrors in protocols
    of several views, where training mirrored.
    `max_buckets`: programs for whole images at each scale.
    `share`: of several processes that test. `tell`: is called with the report before
    files are written.

    Returns: the report, what the JSON file holds; nothing in a process that is not the
    first, which writes none.
    Raises: ValueError or FileNotFoundError for networks that can't be tested so;
    OSError for files that can't be written, before the test or when all are tried.
    """
    first = settings or network_settings(workdirs[0])
    own_settings = [first, *(network_settings(workdir) for workdir in workdirs[1:])]
    source = open_split(first.data, "test")
    # All are checked before anything is computed.
    protocols = [
        _protocol(own, workdir, source, protocol_name, scales, positions, flip)
        for own, workdir in zip(own_settings, workdirs, strict=True)
    ]
    trained_on = run_folder.load_training_data(workdirs[0])
    for workdir in workdirs:
        check_data_is_unchanged(first.data, run_folder.load_training_data(workdir))
    changed = bool(scales or positions or flip is not None)
    name = result_name(protocol_name, len(workdirs), changed=changed)
    for suffix in ("json", "png"):
        files.check_can_write(workdirs[0] / f"{name}.{suffix}")
    scores, steps, folders = [], [], []
    for own, workdir, protocol in zip(own_settings, workdirs, protocols, strict=True):
        network = load_network(workdir, plain(own))
        score, tables = split_scorer(
            network,
            source,
            protocol,
            batch_size=own.batch_size,
            max_buckets=max_buckets,
            **first.data.loading,
        )
        if share.count == 1:
            scores.append(score(source))
        else:
            decided = {
                "network": network.digest,
                "buckets": max_buckets,
                "data": [source.name, source.split, source.digest],
                "code": files.own_code(),
                **protocol._asdict(),
            }
            folders.append(workdirs[0] / f"{name}.parts" / digest_of(decided))
            found = in_parts(
                _of_parts(score, source),
                len(source.records),
                folders[-1],
                share,
                "scores",
            )
            scores += [Scores(*found)] if found else []
        steps.append(network.step)
        for scale, table in zip(protocol.scales, tables, strict=False):
            log.info("shorter side %d\n%s", scale, table)
    if not share.is_first:
        return {}
    broken, combined = BrokenImages(source), mean_scores(scores)
    for index in np.flatnonzero(~combined.valid):
        broken.add(int(index))
    broken.summarize()
    counts = summarize(combined)  # raises where every image is broken
    report = {
        "data": source.name,
        "split": source.split,
        "protocol": protocol_name,
        "workdirs": [str(workdir) for workdir in workdirs],
        "checkpoint_steps": steps,
        "scales": [protocol.scales for protocol in protocols],
        "positions": [protocol.positions for protocol in protocols],
        "flip": [protocol.flip for protocol in protocols],
        "views": float(combined.views[combined.valid].mean()),
        **counts,
    }
    tell(report)
    best, view = combined.scores.argmax(axis=1), first.data.image_size
    predictions = [
        Prediction(
            image,
            trained_on.class_names[best[index]],
            float(combined.scores[index, best[index]]),
            trained_on.class_names[combined.labels[index]],
        )
        for index, image in _sample(source, combined.valid, protocols[0], view)
    ]
    with files.all_tried() as attempt:
        attempt(files.write_json, workdirs[0] / f"{name}.json", report)
        attempt(plot_predictions, predictions, workdirs[0] / f"{name}.png")
    files.remove_all_but(*folders)
    return report


def evaluate_once(
    workdirs: Sequence[Path], protocol_name: str, path: Path
) -> dict[str, Any]:
    """The test of networks by a protocol's own views, kept in a file of its own.

    A result that is there is not measured again, unless a network was trained further.
    """
    steps = [run_folder.newest_step(workdir) for workdir in workdirs]
    if path.exists():
        report: dict[str, Any] = run_folder.read_json(path)
        names = [str(workdir) for workdir in workdirs]
        if (report["workdirs"], report["checkpoint_steps"]) == (names, steps):
            return report
    report = evaluate_networks(workdirs, protocol_name)
    files.write_json(path, report)
    return report


def result_name(protocol_name: str, networks: int, *, changed: bool = False) -> str:
    """What the files of a result are called, without .json and .png.

    `networks`: how many were combined. `changed`: whether scales, views or flips were
    others than the protocol's own.
    """
    combined = f"_of_{networks}" if networks > 1 else ""
    return f"evaluate_{protocol_name}{combined}{'_custom' if changed else ''}"


def _of_parts(
    score: Callable[[Source], Scores], source: Source
) -> Callable[[np.ndarray], Scores]:
    return lambda part: score(subset(source, part))


def _sample(
    source: Source, valid: np.ndarray, protocol: views.Protocol, view: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Some evenly spaced images, as the protocol sees them first, and their numbers."""
    spaced = np.linspace(0, len(valid) - 1, min(EXAMPLES, len(valid))).astype(int)
    for index in spaced[valid[spaced]].tolist():
        encoded, side = source.records[index]["image"], protocol.scales[0]
        if protocol.on_map:
            yield index, decode_resized(encoded, side, MAX_ASPECT)
        else:
            image = decode_resized(encoded, side)
            yield index, crop(image, view, protocol.positions[0])


def _protocol(
    settings: NetworkSettings,
    workdir: Path,
    source: Source,
    name: str,
    scales: Sequence[int],
    positions: Sequence[str],
    flip: bool | None,
) -> views.Protocol:
    """How a network is tested; ValueError or FileNotFoundError if it can't be."""
    trained_on = run_folder.load_training_data(workdir)
    if source.class_names != trained_on.class_names:
        raise ValueError(
            f"{source.name!r} has the {len(source.class_names)} classes "
            f"{', '.join(source.class_names[:5])} …; the run in {workdir} was trained "
            f"on {trained_on}"
        )
    if not run_folder.has_checkpoint(workdir):
        raise FileNotFoundError(f"{workdir} has no checkpoint yet: train first")
    if not settings.model.levels and name not in views.ON_CROPS:
        raise ValueError(
            f"the network in {workdir} has no spatial pyramid (levels=None), so it "
            f"can't be tested with {name}, which pools from maps of any size: use "
            f"--protocol={' or '.join(views.ON_CROPS)}"
        )
    several_views = name not in ("single", "full_image")
    return views.named_protocol(
        name,
        view=settings.data.image_size,
        resize_side=settings.data.resize_side,
        flip=settings.data.flip and several_views if flip is None else flip,
        scales=scales,
        positions=positions,
    )
