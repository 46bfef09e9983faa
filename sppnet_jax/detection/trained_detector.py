"""A trained detector as one value, and what it finds."""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from sppnet_jax.classification.svm import LinearSVMs
from sppnet_jax.detection.box_layer import BOX
from sppnet_jax.detection.box_regression import BoxRegressors
from sppnet_jax.detection.box_split import BoxSplit
from sppnet_jax.detection.detector import (
    Detections,
    Scored,
    score_boxes,
    scoring_head,
    suppress,
)
from sppnet_jax.detection.detector_settings import DetectorSettings, detector_settings
from sppnet_jax.detection.end_to_end import begin_params, load_end_to_end
from sppnet_jax.detection.finetune import drawn_fc, load_finetuned
from sppnet_jax.detection.hard_negatives import NEVER
from sppnet_jax.detection.learn import REGRESSION_FILE, SVM_FILE
from sppnet_jax.detection.low_rank import FC_LAYERS, truncate_fc
from sppnet_jax.detection.proposals import find_boxes
from sppnet_jax.detection.split_features import image_features, split_features
from sppnet_jax.detection.window_features import (
    WindowFeatures,
    make_program,
    padded_count,
)
from sppnet_jax.network.model import SPPNet, pooled_length
from sppnet_jax.network.trained import Network, digest_arrays, load_network
from sppnet_jax.run import files, run_folder, stages
from sppnet_jax.run.caches import LEAST_ARRAYS
from sppnet_jax.run.progress import progress_bar
from sppnet_jax.run.settings import plain
from sppnet_jax.run.shares import ALONE, Share

DETECTOR_FILE = "detector.json"
TOLD = ("classes", "stages", "images")  # by it
NETWORK = "network"
Piece = TypeVar("Piece")

log = logging.getLogger(__name__)


class Detector(NamedTuple):
    """A trained detector: what scores boxes, and of which classes.

    `settings`: those to detect with. `workdir`: its folder. `decided_by`: what pooling
    and head depend on beside the weights, as text; "" where tracing them anew is soon
    done. `images`: the digests of those that it was trained on.
    """

    settings: DetectorSettings
    workdir: Path
    network: Network
    head: Any
    decided_by: str
    weights: Any
    class_names: tuple[str, ...]
    images: frozenset[str]


def load_detector(workdir: Path, settings: DetectorSettings | None = None) -> Detector:
    """The detector that `train_detector` left in a folder.

    `settings`: to detect with, where they are others than it was trained with; what
    only detecting uses may differ: `scorer`, `fc_rank`, `test`, splits and the like.

    Raises: FileNotFoundError where there is none, or a stage that the settings need was
    not run; ValueError for settings that the detector was not trained with.
    """
    check_is_detector(workdir)
    if not stages.is_done(workdir, NETWORK):
        raise FileNotFoundError(
            f"{workdir} holds no detector: train one with python -m sppnet_jax.detect "
            "train, or check --workdir"
        )
    settings = settings or detector_settings(workdir)
    _check_trained_as(settings, workdir)
    if not (workdir / DETECTOR_FILE).exists():
        raise FileNotFoundError(
            f"the training of the detector in {workdir} has not come to its end: run "
            "python -m sppnet_jax.detect train, it goes on where it stopped"
        )
    made = run_folder.read_json(workdir / DETECTOR_FILE, *TOLD)
    class_names = tuple(made["classes"])
    needed = {
        "finetune": bool(settings.finetune.steps),
        "svm": settings.scorer == "svm",
        "regression": settings.regression.enabled and settings.system != "end_to_end",
    }
    for name in (name for name, used in needed.items() if used):
        digest = stages.done_digest(workdir, name)
        if digest is None or made["stages"].get(name) != digest:
            raise FileNotFoundError(
                f"the last training of the detector in {workdir} left out the stage "
                f"{name!r}: run python -m sppnet_jax.detect train with the settings "
                "that you test with"
            )
    # The folder's own settings are those of its network.
    own = load_network(workdir / NETWORK, check_shapes=False)
    network = detecting_network(settings, own)
    classifier = finetuned_model(settings, network, len(class_names))
    if settings.system == "end_to_end":
        network = end_to_end_network(settings, network, workdir, len(class_names))
    fc = detector_fc(settings, network, workdir, len(class_names))
    if any(settings.fc_rank):
        fc = truncate_fc(fc, dict(zip(("fc6", "fc7"), settings.fc_rank, strict=True)))
    svms = regressors = None
    if needed["svm"]:
        svms = files.read_arrays(workdir / "svm" / SVM_FILE, LinearSVMs)
    if needed["regression"]:
        file = workdir / "regression" / REGRESSION_FILE
        regressors = files.read_arrays(file, BoxRegressors)
    move_boxes = BOX in fc and settings.regression.enabled
    head, weights = scoring_head(
        classifier,
        fc,
        layer=settings.layer,
        svms=svms,
        regressors=regressors,
        move_boxes=move_boxes,
    )
    decided_by = ""
    if len(jax.tree.leaves(network.params)) >= LEAST_ARRAYS:
        decided_by = f"{settings.system} {settings.layer} {move_boxes} "
        decided_by += f"{network.model!r} {classifier!r}"
    return Detector(
        settings,
        workdir,
        network,
        head,
        decided_by,
        jax.device_put(weights),
        class_names,
        frozenset(made["images"]),
    )


def load_detectors(
    workdirs: Sequence[Path], settings: Sequence[DetectorSettings]
) -> list[Detector]:
    """Several detectors that detect together.

    Raises: ValueError for detectors that can't be combined, and as `load_detector`.
    """
    if len({own.scorer for own in settings}) > 1:
        raise ValueError(
            "these detectors can't be combined: some score by SVMs, others by softmax. "
            "Give all the same --config.scorer"
        )
    detectors = []
    for own, workdir in zip(settings, workdirs, strict=True):
        detectors.append(load_detector(workdir, own))
        if detectors[-1].class_names != detectors[0].class_names:
            raise ValueError(
                f"the detectors in {workdirs[0]} and {workdir} know other classes"
            )
    return detectors


def detect_split(
    detectors: Sequence[Detector],
    split: BoxSplit,
    *,
    kept: Path | None = None,
    share: Share = ALONE,
) -> list[Detections]:
    """What one detector, or several together, find in each image of a split.

    `kept`: a folder where each image's detections are found again, by a run that goes
    on and by the other processes of a `share`; it holds those of one test alone.
    """
    features, decided_by = [], []
    for own in detectors:
        given = own.settings, own.network, split, split.proposals, own.workdir
        found, inputs = split_features(*given, share)
        features.append(found)
        weights = digest_arrays(jax.tree.leaves(own.weights))
        how = own.settings.scorer, own.settings.layer
        decided_by.append({**inputs, "weights": weights, "scored by": how})
    programs, count = _programs(detectors, features), len(split.sizes)

    def detect(image: int) -> Detections:
        height, width = split.sizes[image].tolist()
        scored = _score(detectors, features, programs, image, (height, width))
        return suppress(scored, detectors[0].settings.test)

    if kept is None:
        return list(_with_bar(map(detect, range(count)), count))
    decided = {
        "detectors": decided_by,
        "boxes": digest_arrays(split.proposals),
        "test": plain(detectors[0].settings.test),
        "code": files.own_code(),
    }
    folder = kept / stages.digest_of(decided)
    if share.is_first:
        files.remove_all_but(folder)
    paths = [folder / f"{image:06d}.npz" for image in range(count)]
    done = sum(path.exists() for path in paths)
    missing = share.missing(paths, "detections")
    for image in _with_bar(missing, count, done):
        files.write_arrays(paths[image], **detect(image)._asdict())
    return [files.read_arrays(path, Detections) for path in paths]


def detect_images(
    detectors: Sequence[Detector], images: Sequence[np.ndarray]
) -> list[Detections]:
    """What one detector, or several together, find in images that are at hand.

    `images`: uint8 [height, width, 3] each, RGB. Boxes are those of the first
    detector's proposals.

    Raises: ValueError for a detector whose proposals are from a file.
    """
    detect, proposals = image_detector(detectors), detectors[0].settings.proposals
    return [detect(image, find_boxes(image, proposals)) for image in images]


def image_detector(
    detectors: Sequence[Detector],
) -> Callable[[np.ndarray, np.ndarray], Detections]:
    """One detector, or several together, as a function of one image after the other.

    Images, maps and boxes are padded to few shapes: the first image of a shape compiles
    its programs, or loads them, and all others find them there.

    Returns: a function of an image, uint8 [height, width, 3], RGB, and of its
    proposals, float [N, 4], see `find_boxes`.
    """
    detectors = [
        own._replace(
            network=dataclasses.replace(
                own.network, params=jax.device_put(own.network.params)
            )
        )
        for own in detectors
    ]
    programs: list[Callable[..., Any]] = []

    def detect(image: np.ndarray, boxes: np.ndarray) -> Detections:
        features = [
            image_features(own.settings, own.network, [image], [boxes])
            for own in detectors
        ]
        if not programs:
            programs.extend(_programs(detectors, features))
        size = image.shape[0], image.shape[1]
        scored = _score(detectors, features, programs, 0, size)
        most = detectors[0].settings.proposals.max_windows
        count = padded_count(max(len(boxes), most))
        padded = [_padded(own, count) for own in scored]
        return suppress(padded, detectors[0].settings.test)

    return detect


def _with_bar(pieces: Iterable[Piece], count: int, done: int = 0) -> Iterator[Piece]:
    """The same pieces; each is done when the next is asked for."""
    with progress_bar("detecting", count, done=done) as bar:
        for piece in pieces:
            yield piece
            bar.update()


def _programs(
    detectors: Sequence[Detector], features: Sequence[WindowFeatures]
) -> list[Callable[..., Any]]:
    return [
        make_program(own, detector.head, detector.decided_by)
        for own, detector in zip(features, detectors, strict=True)
    ]


def _score(
    detectors: Sequence[Detector],
    features: Sequence[WindowFeatures],
    programs: Sequence[Callable[..., Any]],
    image: int,
    size: tuple[int, int],
) -> list[Scored]:
    """What each detector says of an image's boxes."""
    return [
        score_boxes(
            own, program, detector.weights, image, size, len(detector.class_names)
        )
        for own, program, detector in zip(features, programs, detectors, strict=True)
    ]


def _padded(scored: Scored, count: int) -> Scored:
    """So many boxes, those that are added of no class."""
    more = (0, count - len(scored.scores))
    boxes = np.pad(scored.boxes, (more, (0, 0), (0, 0)))
    scores = np.pad(scored.scores, (more, (0, 0)), constant_values=NEVER)
    return Scored(boxes, scores)


def finetuned_model(
    settings: DetectorSettings, network: Network, classes: int
) -> SPPNet:
    """The network with an fc8 for so many classes and background, the last.

    A network without fc layers gets fc6 and fc7 too, where they are fine-tuned.
    """
    model = network.model.clone(
        num_classes=classes + 1, dropout=settings.finetune.dropout
    )
    if has_fitting_fc(network) or not settings.finetune.steps:
        return model
    return model.clone(head="fc", width=settings.finetune.units / 4096)


def finetuning_params(settings: DetectorSettings, network: Network) -> Any:
    """The fc6 and fc7 that fine-tuning begins with: the network's, or fresh ones."""
    if has_fitting_fc(network):
        return network.params
    return drawn_fc(
        pooled_length(network.model), settings.finetune.units, settings.seed
    )


def detecting_network(settings: DetectorSettings, network: Network) -> Network:
    """A network that pools windows as the settings say, where they say how."""
    model = network.model
    changed = model.clone(
        cuts=settings.cuts or model.cuts,
        levels=settings.levels or model.levels,
        reducer=settings.reducer or model.reducer,
        frozen_rows=0,
    )
    if settings.system == "rcnn" and settings.window_side:
        changed = changed.clone(image_size=settings.window_side)
    changed.geometry.map_size(changed.image_size)
    return dataclasses.replace(network, model=changed, geometry=changed.geometry)


def has_fitting_fc(network: Network) -> bool:
    """Whether the network's fc layers take the vectors that its windows give."""
    fc6 = network.params.get("fc6")
    return fc6 is not None and fc6["kernel"].shape[0] == pooled_length(network.model)


def detector_fc(
    settings: DetectorSettings, network: Network, workdir: Path, classes: int
) -> Any:
    """The fc layers, fine-tuned if they were."""
    params = network.params
    if settings.finetune.steps and settings.system != "end_to_end":
        model = finetuned_model(settings, network, classes)
        begun = finetuning_params(settings, network)
        params = load_finetuned(workdir / "finetune", model, begun)
    return {name: params[name] for name in (*FC_LAYERS, BOX) if name in params}


def end_to_end_begin(settings: DetectorSettings, network: Network, classes: int) -> Any:
    """The parameters that end-to-end training begins with."""
    head = finetuned_model(settings, network, classes)
    fc = finetuning_params(settings, network)
    convs = {k: v for k, v in network.params.items() if k.startswith("conv")}
    return begin_params(head, {**convs, **fc}, settings.seed)


def end_to_end_network(
    settings: DetectorSettings, network: Network, workdir: Path, classes: int
) -> Network:
    """The network that end-to-end training has made, the box layer among its params."""
    shapes = jax.eval_shape(lambda: end_to_end_begin(settings, network, classes))
    return dataclasses.replace(
        network, params=load_end_to_end(workdir / "finetune", shapes)
    )


def check_is_detector(workdir: Path) -> None:
    """Raises ValueError if a folder holds a trained classifier and no detector."""
    if (workdir / run_folder.CONFIG_FILE).exists():
        detector_settings(workdir)


def _check_trained_as(settings: DetectorSettings, workdir: Path) -> None:
    """Raises ValueError if a detector was trained with other settings than these."""
    known, given = plain(detector_settings(workdir)), plain(settings)
    shared = ["system", "scales", "rule", "window_side", "context", "maps_dtype"]
    shared += ["cuts", "levels", "reducer"]
    shared += ["finetune"]
    shared += ["layer", "svm"] if settings.scorer == "svm" else []
    shared += ["regression"] if settings.regression.enabled else []
    for name in shared:
        if known[name] != given[name]:
            raise ValueError(
                f"the detector in {workdir} was trained with {name} = {known[name]}, "
                f"not {given[name]}: run python -m sppnet_jax.detect train first"
            )
