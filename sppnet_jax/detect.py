r"""Trains a detector, tests it, or finds objects in images.

python -m sppnet_jax.detect train --config=configs/detect_digits.py \
    --workdir=runs/detect
python -m sppnet_jax.detect test --workdir=runs/detect
python -m sppnet_jax.detect image --workdir=runs/detect photo.jpg …

Training goes in stages, each done once: the same command goes on where it was
interrupted, and redoes only what a changed setting makes different.
`--workdir=runs/a,runs/b` tests several detectors together.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from sppnet_jax import cli
from sppnet_jax.detection.detector_settings import DetectorSettings, detector_settings

log = logging.getLogger(__name__)

COMMANDS = ("train", "test", "image")
GROUP = 32  # photographs in memory at a time

_SCORE = flags.DEFINE_float(
    "score",
    None,
    "The least score of a box that is drawn and printed; by default 0 of an SVM, 0.5 "
    "of a softmax.",
)
_PICTURES = flags.DEFINE_string(
    "pictures", "", "The folder for annotated images; by default WORKDIR/images."
)


def main(argv: Sequence[str]) -> None:
    if not argv or argv[0] not in COMMANDS:
        given = f", not {argv[0]!r}" if argv else ""
        raise ValueError(
            f"say what to do: python -m sppnet_jax.detect {'|'.join(COMMANDS)} "
            f"--workdir=…{given}"
        )
    command, *files = argv
    cli.check_single_process()
    settings = cli.given_settings(DetectorSettings)
    if command == "image":
        if not files:
            raise ValueError(
                "give images: python -m sppnet_jax.detect image --workdir=… photo.jpg"
            )
        pictures = Path(_PICTURES.value).expanduser() if _PICTURES.value else None
        failed = detect_in_files(
            settings, cli.given_workdirs(), files, score=_SCORE.value, pictures=pictures
        )
        if failed:
            raise ValueError(f"{failed} of {len(files)} files could not be read")
        return
    cli.refuse_arguments(files)
    if command == "train":
        from sppnet_jax.detection.detector_training import train_detector

        train_detector(settings, cli.given_workdir())
        log.info("the detector is in %s", cli.given_workdir())
        return
    from sppnet_jax.detection.detector_evaluation import evaluate_detectors

    evaluate_detectors(cli.given_workdirs(), settings=settings, score=_SCORE.value)


def detect_in_files(
    settings: DetectorSettings,
    workdirs: Sequence[Path],
    paths: Sequence[str],
    *,
    score: float | None = None,
    pictures: Path | None = None,
) -> int:
    """Prints and draws what is found in each image; returns how many are unreadable."""
    import numpy as np

    from sppnet_jax.data.photographs import read_images
    from sppnet_jax.detection.detector import Detections
    from sppnet_jax.detection.detector_evaluation import least_score, settings_together
    from sppnet_jax.detection.pictures import draw_detections, save_image
    from sppnet_jax.detection.trained_detector import detect_images, load_detectors

    detectors = load_detectors(workdirs, settings_together(workdirs, settings))
    class_names, least = detectors[0].class_names, least_score(settings, score)
    folder, failed = pictures or workdirs[0] / "images", 0

    def show(path: str, name: str, image: np.ndarray, found: Detections) -> None:
        kept = found.above(least)
        print(f"{path} ({image.shape[1]}×{image.shape[0]} pixels)")
        for box, label, value in zip(*kept, strict=True):
            ymin, xmin, ymax, xmax = box
            print(
                f"  {value:7.3f}  {class_names[label]}  x {xmin:.0f} to {xmax:.0f}, "
                f"y {ymin:.0f} to {ymax:.0f}"
            )
        if not len(kept.scores):
            best = f"{found.scores[0]:.3f}" if len(found.scores) else "none"
            print(f"  nothing of a score of {least:g} or more; the best: {best}")
        drawn = draw_detections(image, *kept, class_names)
        print(f"  picture: {save_image(drawn, folder / name)}")

    names = _picture_names(paths)
    for start in range(0, len(paths), GROUP):
        read, images = [], []
        some = paths[start : start + GROUP]
        for (path, image), name in zip(
            read_images(some, settings.data.threads),
            names[start : start + GROUP],
            strict=True,
        ):
            if isinstance(image, Exception):
                print(f"{path}: can't be read: {image}")
                failed += 1
            else:
                read.append((path, name))
                images.append(image)
        if not images:
            continue
        found = detect_images(detectors, images)
        for (path, name), image, own in zip(read, images, found, strict=True):
            show(path, name, image, own)
    return failed


def _picture_names(paths: Sequence[str]) -> list[str]:
    """A file's name for each image, also where two folders have one of the same."""
    names: list[str] = []
    for path in paths:
        stem, number = f"{Path(path).stem}_detections", 1
        name = f"{stem}.jpg"
        while name in names:
            number += 1
            name = f"{stem}_{number}.jpg"
        names.append(name)
    return names


if __name__ == "__main__":
    cli.run(main, DetectorSettings, detector_settings)
