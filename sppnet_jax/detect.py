r"""Trains a detector, tests it, or finds objects in images.

python -m sppnet_jax.detect train --config=configs/detect_digits.py \
    --workdir=runs/detect
python -m sppnet_jax.detect test --workdir=runs/detect
python -m sppnet_jax.detect image --workdir=runs/detect photo.jpg …

Training goes in stages, each done once: the same command goes on where it was
interrupted, and redoes only what a changed setting makes different.
`--workdir=runs/a,runs/b` tests several detectors together.
"""

import json
import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from sppnet_jax import cli, saved_config
from sppnet_jax.data.sources import Source
from sppnet_jax.detection_config import check_detection_config, detection_base_config

log = logging.getLogger(__name__)

COMMANDS = ("train", "test", "image")
# Settings that may be others in a test than they were in training.
TEST_ONLY = ("scorer", "fc_rank", "regression", "test", "proposals")

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
    config = cli.given_config(check_detection_config)
    if command == "image":
        if not files:
            raise ValueError(
                "give images: python -m sppnet_jax.detect image --workdir=… photo.jpg"
            )
        pictures = Path(_PICTURES.value).expanduser() if _PICTURES.value else None
        failed = detect_in_files(
            config, cli.given_workdirs(), files, score=_SCORE.value, pictures=pictures
        )
        if failed:
            raise ValueError(f"{failed} of {len(files)} files could not be read")
        return
    if files:
        raise ValueError(f"unexpected arguments: {' '.join(files)}")
    if command == "train":
        train_from_config(config, cli.given_workdir())
    else:
        evaluate_from_config(config, cli.given_workdirs(), score=_SCORE.value)


def train_from_config(config: ConfigDict, workdir: Path) -> None:
    """Trains the detector that a config describes, stage by stage."""
    from sppnet_jax import from_detection_config

    for group, name in (  # found again from any folder
        *((config, name) for name in ("network", "cache")),
        *((config.proposals, name) for name in ("file", "test_file", "model")),
        (config.data, "root"),
    ):
        if group[name]:
            group[name] = str(Path(group[name]).expanduser().absolute())
    from_detection_config.train_detector(config, workdir)
    log.info("the detector is in %s", workdir)


def evaluate_from_config(
    config: ConfigDict, workdirs: Sequence[Path], *, score: float | None = None
) -> dict[str, Any]:
    """Tests one detector, or several together, on the test split of the first's data.

    Writes precisions, detections and pictures into WORKDIR/test; prints a table.
    """
    from sppnet_jax import from_detection_config
    from sppnet_jax.detection import results as detection_results

    configs = _configs_of(config, workdirs)
    detectors = _load_all(configs, workdirs)
    class_names = detectors[0].class_names
    split = from_detection_config.open_split(config, "test", workdirs[0])
    source = split.source
    if source.class_names != class_names:
        raise ValueError(
            f"{source.name!r} has the classes {', '.join(source.class_names)}; the "
            f"detector in {workdirs[0]} was trained on {', '.join(class_names)}"
        )
    if not any((~found.difficult).any() for found in split.objects):
        raise ValueError(
            f"split {source.split!r} of {source.name!r} has no objects to find, or "
            "difficult ones only: test on another --config.data.test_split"
        )
    detection_results.image_ids(source)  # before hours of work
    seen = [sum(i in d.images for i in split.images) for d in detectors]
    if any(seen):
        log.warning(
            "%d of the %d images to test on were trained on: the result says little. "
            "Give another --config.data.test_split",
            max(seen),
            len(split.images),
        )
    custom = _differs_from_training(config, workdirs[0])
    started = time.perf_counter()
    found = from_detection_config.detect_split(configs, workdirs, detectors, split)
    seconds = time.perf_counter() - started
    combined = f"_of_{len(workdirs)}" if len(workdirs) > 1 else ""
    name = f"test{combined}{'_custom' if custom else ''}"
    return detection_results.write_results(
        workdirs[0] / name,
        source,
        split.objects,
        split.sizes,
        split.proposals,
        found,
        least_score=_least_score(score, config),
        about={
            "workdirs": [str(workdir) for workdir in workdirs],
            "seconds": round(seconds, 2),
            "trained_on": max(seen),
            "settings": _test_settings(config),
        },
    )


def detect_in_files(
    config: ConfigDict,
    workdirs: Sequence[Path],
    paths: Sequence[str],
    *,
    score: float | None = None,
    pictures: Path | None = None,
) -> int:
    """Prints and draws what is found in each image; returns how many are unreadable."""
    from sppnet_jax import from_detection_config
    from sppnet_jax.data.image_files import Files
    from sppnet_jax.data.images import decode_image
    from sppnet_jax.detection import pictures as detection_plots

    if config.proposals.method == "file":
        raise ValueError(
            "this detector was trained on proposals from a file, which has none for "
            "new images: give --config.proposals.method=selective_search"
        )
    configs = _configs_of(config, workdirs)
    detectors = _load_all(configs, workdirs)
    class_names = detectors[0].class_names
    readable, failed = [], 0
    for path in paths:
        try:
            decode_image(Path(path).expanduser().read_bytes())
            readable.append(path)
        except (OSError, ValueError) as error:
            print(f"{path}: can't be read: {error}")
            failed += 1
    if not readable:
        return failed
    source = Source(Files(readable), class_names, "files", "given")
    with tempfile.TemporaryDirectory() as cache:
        for own in configs:
            own.cache = cache
        split = from_detection_config.split_of(config, source, "test", workdirs[0])
        found = from_detection_config.detect_split(configs, workdirs, detectors, split)
    least = _least_score(score, config)
    folder = pictures or workdirs[0] / "images"
    names = _picture_names(readable)
    for path, name, image_found in zip(readable, names, found, strict=True):
        image = decode_image(Path(path).expanduser().read_bytes())
        kept = image_found.above(least)
        print(f"{path} ({image.shape[1]}×{image.shape[0]} pixels)")
        for box, label, value in zip(*kept, strict=True):
            ymin, xmin, ymax, xmax = box
            print(
                f"  {value:7.3f}  {class_names[label]}  x {xmin:.0f} to {xmax:.0f}, "
                f"y {ymin:.0f} to {ymax:.0f}"
            )
        if not len(kept.scores):
            best = f"{image_found.scores[0]:.3f}" if len(image_found.scores) else "none"
            print(f"  nothing of a score of {least:g} or more; the best: {best}")
        drawn = detection_plots.draw_detections(image, *kept, class_names)
        print(f"  picture: {detection_plots.save_image(drawn, folder / name)}")
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


def _least_score(score: float | None, config: ConfigDict) -> float:
    if score is not None:
        return score
    return 0.5 if config.scorer == "softmax" else 0.0


def _configs_of(config: ConfigDict, workdirs: Sequence[Path]) -> list[ConfigDict]:
    """The config of each detector; what is said of tests is said to all of them."""
    from sppnet_jax import from_detection_config

    for workdir in workdirs:
        from_detection_config.check_is_detector(workdir)
    first, *others = (saved_config.get_config(str(workdir)) for workdir in workdirs)
    trained, given = _test_settings(first), _test_settings(config)
    for name in TEST_ONLY:
        if given[name] != trained[name]:
            for other in others:
                other[name] = config[name]
    return [config, *others]


def _differs_from_training(config: ConfigDict, workdir: Path) -> bool:
    trained = saved_config.get_config(str(workdir))
    return _test_settings(trained) != _test_settings(config)


def _test_settings(config: ConfigDict) -> dict[str, Any]:
    """What decides a test besides the trained stages, as JSON gives it back."""
    return {name: json.loads(config.to_json())[name] for name in TEST_ONLY}


def _load_all(configs: Sequence[ConfigDict], workdirs: Sequence[Path]) -> list[Any]:
    from sppnet_jax import from_detection_config

    if len({config.scorer for config in configs}) > 1:
        raise ValueError(
            "these detectors can't be combined: some score by SVMs, others by softmax. "
            "Give all the same --config.scorer"
        )
    detectors = []
    for config, workdir in zip(configs, workdirs, strict=True):
        from_detection_config.check_trained_as(config, workdir)
        detectors.append(from_detection_config.load_detector(config, workdir))
        if detectors[-1].class_names != detectors[0].class_names:
            raise ValueError(
                f"the detectors in {workdirs[0]} and {workdir} know other classes"
            )
    return detectors


if __name__ == "__main__":
    cli.run(main, saved_config=True, base=detection_base_config)
