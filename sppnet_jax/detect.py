r"""Trains a detector, tests it, or finds objects in images.

python -m sppnet_jax.detect train --config=configs/detect_digits.py \
    --workdir=runs/detect
python -m sppnet_jax.detect test --workdir=runs/detect
python -m sppnet_jax.detect image --workdir=runs/detect photo.jpg FOLDER …

Training goes in stages, each done once: the same command goes on where it was
interrupted, and redoes only what a changed setting makes different.
`--workdir=runs/a,runs/b` tests several detectors together. Several machines that share
the folder share the images: --process_index=I --process_count=N on each. With
--coordinator=HOST:PORT they also train end to end together.
"""

import functools
import logging
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from sppnet_jax import cli
from sppnet_jax.detection.detector_settings import DetectorSettings, detector_settings

if TYPE_CHECKING:
    import numpy as np

    from sppnet_jax.data.images import Decoded
    from sppnet_jax.detection.detector import Detections
    from sppnet_jax.detection.proposals import ProposalSettings

log = logging.getLogger(__name__)

COMMANDS = ("train", "test", "image")
# Of what is written of a box.
COLUMNS = ("label", "score", "ymin", "xmin", "ymax", "xmax")
# Half of the least shorter side of a picture of a photograph that is larger, in pixels.
_DRAWN_SIDE = 500

_SCORE = flags.DEFINE_float(
    "score",
    None,
    "The least score of a box that is drawn, printed and written; by default 0 of an "
    "SVM, 0.5 of a softmax.",
)
_PICTURES = flags.DEFINE_string(
    "pictures", "", "The folder for annotated images; by default WORKDIR/images."
)
flags.declare_key_flag(cli.OUT.name)


def main(argv: Sequence[str]) -> None:
    if not argv or argv[0] not in COMMANDS:
        given = f", not {argv[0]!r}" if argv else ""
        raise cli.UsageError(
            f"say what to do: python -m sppnet_jax.detect {'|'.join(COMMANDS)} "
            f"--workdir=…{given}"
        )
    command, *files = argv
    if _SCORE.value is not None and not math.isfinite(_SCORE.value):
        raise cli.UsageError(f"--score must be a finite number, got {_SCORE.value}")
    settings = cli.given_settings(DetectorSettings)
    if command == "image":
        cli.check_single_process()
        if not files:
            raise cli.UsageError(
                "give images: python -m sppnet_jax.detect image --workdir=… photo.jpg"
            )
        photos = cli.given_photos(files)
        failed = detect_in_files(
            settings,
            cli.given_workdirs(),
            photos,
            score=_SCORE.value,
            pictures=Path(_PICTURES.value).expanduser() if _PICTURES.value else None,
            out=cli.given_out(),
        )
        if failed:
            raise ValueError(f"{failed} of {len(photos)} files could not be read")
        return
    cli.refuse_arguments(files)
    share = cli.given_share()
    if command == "train":
        if settings.system == "end_to_end" and cli.has_coordinator():
            cli.join_processes(settings)
        from sppnet_jax.detection.detector_training import train_detector

        train_detector(settings, cli.given_workdir(), share)
        if share.is_first:
            log.info("the detector is in %s", cli.given_workdir())
    else:
        from sppnet_jax.detection.detector_evaluation import evaluate_detectors

        evaluate_detectors(
            cli.given_workdirs(), settings=settings, score=_SCORE.value, share=share
        )
    share.tell_end()


def detect_in_files(
    settings: DetectorSettings,
    workdirs: Sequence[Path],
    paths: Sequence[str],
    *,
    score: float | None = None,
    pictures: Path | None = None,
    out: Path | None = None,
) -> int:
    """Prints and draws what is found in each image; returns how many are unreadable.

    `out`: a file that it is written to besides, see `photo_results`.
    Raises: OSError for files that can't be written, before the first image or when all
    images are done.
    """
    from sppnet_jax.run.files import all_tried, check_folder
    from sppnet_jax.run.photo_results import photo_results
    from sppnet_jax.training.ahead import StepsAhead

    folder = pictures or workdirs[0] / "images"
    check_folder(folder)
    side = functools.cache(lambda: _needed_side(settings, workdirs))

    def look(number: int) -> "tuple[Decoded, np.ndarray] | Exception":
        return _look(paths[number], settings.proposals, side())

    with StepsAhead(look, len(paths)) as ahead:
        # The first image is searched while the detector is loaded.
        ahead.start_prefetch()
        from sppnet_jax.detection.detector_evaluation import (
            least_score,
            settings_together,
        )
        from sppnet_jax.detection.trained_detector import image_detector, load_detectors

        detectors = load_detectors(workdirs, settings_together(workdirs, settings))
        class_names, least = detectors[0].class_names, least_score(settings, score)
        detect = image_detector(detectors)
        failed, stems = 0, Counter[str]()
        with all_tried() as attempt, photo_results(out, COLUMNS) as write:
            for path in paths:
                looked = next(ahead)
                if isinstance(looked, Exception):
                    print(f"{path}: can't be read: {looked}", flush=True)
                    attempt(write, {"path": path, "error": str(looked)})
                    failed += 1
                    continue
                read, boxes = looked
                image, found = read.pixels, detect(read.pixels, boxes)
                whole = found._replace(boxes=read.in_whole(found.boxes))
                attempt(write, _tell(path, read.size, whole, least, class_names))
                from sppnet_jax.detection.pictures import draw_detections, save_image

                drawn = draw_detections(image, *found.above(least), class_names)
                stem = f"{Path(path).stem}_detections"
                stems[stem] += 1
                name = f"{stem}_{stems[stem]}" if stems[stem] > 1 else stem
                saved = attempt(save_image, drawn, folder / f"{name}.jpg")
                print(f"  picture: {saved or 'not written'}")
    return failed


def _needed_side(settings: DetectorSettings, workdirs: Sequence[Path]) -> float:
    """What photographs are shrunk to at most, their shorter side in pixels."""
    from sppnet_jax.detection.proposals import searched_side

    every = [settings, *map(detector_settings, workdirs[1:])]
    if any(own.system == "rcnn" for own in every):  # which looks at every pixel
        return math.inf
    sides = [max(own.scales) for own in every]
    return max(*sides, searched_side(settings.proposals), _DRAWN_SIDE)


def _look(
    path: str, settings: "ProposalSettings", side: float
) -> "tuple[Decoded, np.ndarray] | Exception":
    """An image and its proposals, in its pixels, or why it can't be read.

    `side`: that its shorter side will be shrunk to; it is decoded no larger than that
    takes.
    """
    from sppnet_jax.data.photographs import read_part
    from sppnet_jax.detection.proposals import find_boxes

    try:
        read = read_part(path, side)
    except (OSError, ValueError) as error:
        return error
    return read, find_boxes(read.pixels, settings)


def _tell(
    path: str,
    size: tuple[int, int],
    found: "Detections",
    least: float,
    class_names: Sequence[str],
) -> dict[str, Any]:
    """Prints what was found in an image, and gives it as `photo_results` writes it."""
    height, width = size
    print(f"{path} ({width}×{height} pixels)")
    rows = []
    for box, label, value in zip(*found.above(least), strict=True):
        ymin, xmin, ymax, xmax = (round(float(edge), 2) for edge in box)
        print(
            f"  {value:7.3f}  {class_names[label]}  x {xmin:.0f} to {xmax:.0f}, "
            f"y {ymin:.0f} to {ymax:.0f}"
        )
        row = class_names[label], round(float(value), 6), ymin, xmin, ymax, xmax
        rows.append(dict(zip(COLUMNS, row, strict=True)))
    if not rows:
        best = f"{found.scores[0]:.3f}" if len(found.scores) else "none"
        print(f"  nothing of a score of {least:g} or more; the best: {best}")
    sys.stdout.flush()
    return {"path": path, "width": width, "height": height, "found": rows}


if __name__ == "__main__":
    cli.run(main, DetectorSettings, detector_settings)
