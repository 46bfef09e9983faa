"""The test of a trained detector, or of several together, on a split with objects."""

import contextlib
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sppnet_jax.data.sources import Source
from sppnet_jax.detection.box_split import open_split_of
from sppnet_jax.detection.detector_settings import DetectorSettings, detector_settings
from sppnet_jax.detection.trained_detector import (
    check_is_detector,
    detect_split,
    load_detectors,
)
from sppnet_jax.run.files import absolute, check_can_write
from sppnet_jax.run.run_folder import DATA_FILE, load_training_data, locked
from sppnet_jax.run.settings import plain
from sppnet_jax.run.shares import ALONE, Share

# Settings that may be others in a test than they were in training.
TEST_ONLY = ("scorer", "fc_rank", "regression", "test", "proposals")

log = logging.getLogger(__name__)


def evaluate_detectors(
    workdirs: Sequence[Path],
    *,
    settings: DetectorSettings | None = None,
    score: float | None = None,
    share: Share = ALONE,
) -> dict[str, Any]:
    """Tests one detector, or several together, on the test split of the first's data.

    Writes precisions, detections and pictures into WORKDIR/test of the first.

    `settings`: of the first, if others than it was trained with. `score`: the least of
    boxes in pictures; see `least_score`. `share`: of several processes that test.

    Returns: what results.json holds; nothing in a process that is not the first, which
    writes none.
    Raises: ValueError or FileNotFoundError for detectors that can't be tested so;
    OSError for files that can't be written, before the test or when all are tried.
    """
    # Here, not above: a start has no need of it, and it takes a while.
    from sppnet_jax.detection.results import FILES, image_ids, write_results

    all_settings = settings_together(workdirs, settings)
    first, workdir = all_settings[0], workdirs[0]
    detectors = load_detectors(workdirs, all_settings)
    class_names = detectors[0].class_names
    trained, given = (
        {name: plain(settings)[name] for name in TEST_ONLY}
        for settings in (detector_settings(workdir), first)
    )
    combined = f"_of_{len(workdirs)}" if len(workdirs) > 1 else ""
    folder = workdir / f"test{combined}{'_custom' if given != trained else ''}"
    for name in FILES:
        check_can_write(folder / name)
    split = open_split_of(first, "test", workdir, share)
    source = split.source
    if source.class_names != class_names:
        raise ValueError(
            f"{source.name!r} has the classes {', '.join(source.class_names)}; the "
            f"detector in {workdir} was trained on {', '.join(class_names)}"
        )
    if not any((~found.difficult).any() for found in split.objects):
        raise ValueError(
            f"split {source.split!r} of {source.name!r} has no objects to find, or "
            "difficult ones only: test on another --config.data.test_split"
        )
    image_ids(source)  # before hours of work
    _warn_of_changes(first, workdir, source)
    seen = [sum(i in d.images for i in split.images) for d in detectors]
    if any(seen):
        log.warning(
            "%d of the %d images to test on were trained on: the result says little. "
            "Give another --config.data.test_split",
            max(seen),
            len(split.images),
        )
    kept = folder / "found"
    with locked(kept) if share.count == 1 else contextlib.nullcontext():
        started = time.perf_counter()
        found = detect_split(detectors, split, kept=kept, share=share)
        seconds = time.perf_counter() - started
        if not share.is_first:
            return {}
        report = write_results(
            folder,
            source,
            split.objects,
            split.sizes,
            split.proposals,
            found,
            least_score=least_score(first, score),
            about={
                "workdirs": [str(workdir) for workdir in workdirs],
                "seconds": round(seconds, 2),
                "trained_on": max(seen),
                "settings": given,
            },
        )
        if share.count == 1:  # another process may still look for what is missing
            shutil.rmtree(kept, ignore_errors=True)
    return report


def _warn_of_changes(settings: DetectorSettings, workdir: Path, source: Source) -> None:
    """Says so if a folder's images to test on are others than at the training."""
    if not (workdir / DATA_FILE).exists():
        return
    known = load_training_data(workdir)
    if Path(known.root).resolve() == Path(absolute(settings.data.root)).resolve():
        known.warn_of_tests(known._replace(held_out={source.split: source.digest}))


def settings_together(
    workdirs: Sequence[Path], settings: DetectorSettings | None = None
) -> list[DetectorSettings]:
    """The settings of each detector; what is said of tests is said to all of them.

    `settings`: of the first, if others than it was trained with.
    """
    for workdir in workdirs:
        check_is_detector(workdir)
    trained, *others = (detector_settings(workdir) for workdir in workdirs)
    given = settings or trained
    said = {
        name: getattr(given, name)
        for name in TEST_ONLY
        if getattr(given, name) != getattr(trained, name)
    }
    return [given, *(other._replace(**said) for other in others)]


def least_score(settings: DetectorSettings, score: float | None = None) -> float:
    """The least score of a box that is shown: 0 of an SVM, 0.5 of a softmax."""
    if score is not None:
        return score
    return 0.5 if settings.scorer == "softmax" else 0.0
