"""Turns a detector's config into its stages: what each is made from, and what it makes.

    network      the trained classifier, copied: a detector needs nothing but its folder
    maps         of every image (R-CNN: what the convolutions give each window)
    finetune     fc6, fc7 and a new fc8
    svm          an SVM for each class, with hard-negative mining
    regression   of boxes
    detections   of the test split, and their average precision

Each is run once, and again if what goes into it changes; see detection/stages.py.
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from sppnet_jax import from_config, run_folder, saved_config
from sppnet_jax.backbones import layers_geometry
from sppnet_jax.checkpoints import Checkpoints
from sppnet_jax.classification.preprocess import Preprocessing
from sppnet_jax.classification.progress import progress_bar
from sppnet_jax.classification.svm import LinearSVMs
from sppnet_jax.data.detection_sources import (
    Objects,
    open_detection_source,
    read_objects,
)
from sppnet_jax.data.sources import Source, available_splits
from sppnet_jax.detection import rcnn, stages
from sppnet_jax.detection.box_regression import BoxRegressors
from sppnet_jax.detection.detector import (
    Detections,
    Scored,
    layer_head,
    score_boxes,
    scoring_head,
    suppress,
)
from sppnet_jax.detection.examples import (
    finetuning_examples,
    with_objects,
)
from sppnet_jax.detection.finetune import Finetuning, finetune, load_finetuned
from sppnet_jax.detection.hard_negatives import Mining
from sppnet_jax.detection.learn import (
    REGRESSION_FILE,
    SVM_FILE,
    learn_regression,
    learn_svms,
)
from sppnet_jax.detection.low_rank import truncate_fc
from sppnet_jax.detection.maps import convolve_split, decodable, image_sizes, subset
from sppnet_jax.detection.proposals import ProposalSettings, load_proposals, propose
from sppnet_jax.detection.window_features import (
    WindowFeatures,
    from_maps,
    from_warped,
    make_program,
)
from sppnet_jax.geometry import Geometry
from sppnet_jax.model import SPPNet

log = logging.getLogger(__name__)

FC_LAYERS = ("fc6", "fc7", "fc8")
CLASSES_FILE = "classes.json"  # the last that training writes


class Network(NamedTuple):
    """A trained classifier, as a detector uses it."""

    config: ConfigDict
    model: SPPNet
    params: Any
    preprocessing: Preprocessing
    geometry: Geometry
    digest: str


class Split(NamedTuple):
    """A split's images, what is in them, and where to look for it.

    `sizes`: (height, width) of each image, int [N, 2]. `digest`: of images and objects.
    """

    source: Source
    objects: list[Objects]
    sizes: np.ndarray
    proposals: list[np.ndarray]
    digest: str


def cache_folder(config: ConfigDict, workdir: Path) -> Path:
    """Where proposals and maps are kept."""
    return Path(config.cache).expanduser() if config.cache else workdir / "cache"


def import_network(config: ConfigDict, workdir: Path) -> Network:
    """Copies the trained classifier into the detector's folder, unless it is there."""
    origin = Path(config.network).expanduser().absolute()
    copied = stages.is_done(workdir, "network")
    if copied and origin.resolve() == (workdir / "network").resolve():
        return load_network(workdir)
    if not run_folder.has_checkpoint(origin) and copied:
        log.info("%s is gone; going on with the copy of it", origin)
        return load_network(workdir)
    trained = saved_config.get_config(str(origin))
    classes = run_folder.load_training_data(origin).class_names
    _, params = from_config.load_model(trained, origin, len(classes))
    step = from_config.checkpoint_step(origin)

    def copy(folder: Path) -> dict[str, Any]:
        run_folder.save_config(folder, trained.to_dict())
        data = run_folder.load_training_data(origin)
        run_folder.save_training_data(folder, data)
        statistics = run_folder.load_statistics(origin)
        if statistics is not None:
            run_folder.save_statistics(folder, statistics)
        with Checkpoints(folder / run_folder.CHECKPOINTS) as checkpoints:
            if checkpoints.latest_step() is None:
                none = {"step": np.int32(step or 0)}
                checkpoints.save(step or 0, params=params, training=none, host={})
        return {"trained on": str(data)}

    weights = _digest_arrays(jax.tree.leaves(params))
    inputs = {"workdir": str(origin), "step": step, "weights": weights}
    stages.run_stage(workdir, "network", inputs, copy)
    return load_network(workdir)


def load_network(workdir: Path) -> Network:
    """The classifier in a detector's folder."""
    folder = workdir / "network"
    if not stages.is_done(workdir, "network"):
        raise FileNotFoundError(
            f"{workdir} holds no detector: train one with python -m sppnet_jax.detect "
            "train, or check --workdir"
        )
    config = saved_config.get_config(str(folder))
    classes = run_folder.load_training_data(folder).class_names
    model, params = from_config.load_model(config, folder, len(classes))
    return Network(
        config,
        model,
        params,
        from_config.make_preprocessing(config, folder),
        layers_geometry(model.backbone.layers),
        _digest_arrays(jax.tree.leaves(params)),
    )


def open_split(config: ConfigDict, purpose: str, workdir: Path) -> Split:
    """The images of the "train" or "test" split, and their proposals."""
    where = {"root": config.data.root, "data_dir": config.data.data_dir}
    split = config.data[f"{purpose}_split"] or _default_split(config, purpose)
    source = open_detection_source(config.data.name, split, **where)
    return split_of(config, source, purpose, workdir)


def split_of(config: ConfigDict, source: Source, purpose: str, workdir: Path) -> Split:
    """The images of a source, their objects if it knows them, and their proposals.

    An image that can't be decoded has no proposals, and no objects to train on; a test
    counts its objects as missed, as VOC's own program would.
    """
    known = "objects" in source.records[0]
    count = len(source.records)
    objects = (
        read_objects(source, config.data.threads) if known else [_no_objects()] * count
    )
    proposals = find_proposals(config, source, purpose, workdir)
    digest = _digest_split(source, objects)
    if purpose == "train":
        # Only what has no proposals may be broken, and takes decoding to know.
        without = [index for index, boxes in enumerate(proposals) if not len(boxes)]
        whole = decodable(subset(source, without), config.data.threads)
        for index in np.array(without, int)[~whole]:
            objects[index] = _no_objects()
    return Split(
        source,
        objects,
        image_sizes(source, config.data.threads),
        proposals,
        digest,
    )


def find_proposals(
    config: ConfigDict, source: Source, purpose: str, workdir: Path
) -> list[np.ndarray]:
    """Where objects may be in each image of a source, from the cache if it is there."""
    given = config.proposals
    if given.method == "file":
        path = given.file if purpose == "train" else given.test_file or given.file
        found = load_proposals(Path(path).expanduser(), source)
        # Searching finds nothing in a broken image; a file doesn't know of it.
        whole = decodable(source, config.data.threads)
        none = np.zeros((0, 4), np.float32)
        return [p if ok else none for p, ok in zip(found, whole, strict=True)]
    return propose(
        source,
        ProposalSettings(
            method=given.method,
            max_windows=given.max_windows,
            width=given.width,
            min_side=given.min_side,
            edge_model=given.model,
        ),
        cache_folder(config, workdir) / "proposals.sqlite",
        workers=given.workers or None,
    )


def window_features(
    config: ConfigDict,
    network: Network,
    split: Split,
    boxes: list[np.ndarray],
    workdir: Path,
) -> tuple[WindowFeatures, str]:
    """The pooled features of boxes in a split's images, and the digest of their making.

    Convolves what is not in the cache yet.
    """
    settings = feature_settings(config, network)
    inputs = {"images": split.digest, **settings}
    stored = ["network", "images", "dtype"]
    if config.system == "rcnn":
        inputs["boxes"] = _digest_arrays(boxes)
        stored += ["boxes", "context", "side"]
    # The maps of a scale serve every list of scales, and both rules.
    name = stages.digest_of({name: inputs[name] for name in stored})
    cache = cache_folder(config, workdir)
    model, params = network.model, network.params
    if config.system == "rcnn":
        folder = cache / f"windows-{name}"
        rcnn.convolve_windows(
            model,
            params,
            network.preprocessing,
            split.source,
            boxes,
            folder,
            context=settings["context"],
            batch_size=max(config.batch_size, 64),
            threads=config.data.threads,
            dtype=config.maps_dtype,
        )
        levels = None if rcnn.stores_pooled(model) else model.levels
        features = from_warped(folder, boxes, levels)
    else:
        folder = cache / f"maps-{name}"
        convolve_split(
            model,
            params,
            network.preprocessing,
            split.source,
            folder,
            sides=config.scales,
            batch_size=config.batch_size,
            max_buckets=config.buckets,
            threads=config.data.threads,
            dtype=config.maps_dtype,
        )
        features = from_maps(
            folder,
            boxes,
            split.sizes,
            sides=tuple(config.scales),
            geometry=network.geometry,
            levels=model.levels or (),
            area=settings["area"],
            rule=config.rule,
            max_buckets=config.buckets,
        )
    return features, stages.digest_of(inputs)


def feature_settings(config: ConfigDict, network: Network) -> dict[str, Any]:
    """What decides the pooled features of a box."""
    side = network.model.image_size
    shared = {
        "network": network.digest,
        "system": config.system,
        "dtype": config.maps_dtype,
    }
    if config.system == "rcnn":
        context = config.context
        if context < 0:
            context = round(side * rcnn.PAPER_CONTEXT)
        return {**shared, "side": side, "context": context}
    window_side = config.window_side or side
    return {
        **shared,
        "scales": list(config.scales),
        "area": window_side**2,
        "rule": config.rule,
    }


def train_detector(config: ConfigDict, workdir: Path) -> None:
    """Runs the stages of training that are not done yet.

    Raises: ValueError for a folder that holds something else; and as stages do.
    """
    _check_is_detectors(workdir)
    # Until all stages are done, some may be of other settings than the config's.
    (workdir / CLASSES_FILE).unlink(missing_ok=True)
    run_folder.save_config(workdir, config.to_dict())
    network = import_network(config, workdir)
    split = open_split(config, "train", workdir)
    boxes = with_objects(split.objects, split.proposals)
    features, made_of = window_features(config, network, split, boxes, workdir)
    objects = {"boxes": _digest_arrays(boxes), "features": made_of}
    classes = split.source.class_names
    before: dict[str, Any] = {**objects, "seed": config.seed}
    if config.finetune.steps:
        settings = make_finetuning(config)
        before["finetune"] = stages.run_stage(
            workdir,
            "finetune",
            finetune_inputs(config, before),
            lambda folder: finetune(
                folder,
                finetuned_model(config, network, len(classes)),
                network.params,
                features,
                [
                    finetuning_examples(
                        own,
                        found,
                        positive=config.finetune.positive_overlap,
                        negative=config.finetune.negative_overlap,
                    )
                    for own, found in zip(boxes, split.objects, strict=True)
                ],
                settings,
            ),
        )
    if config.scorer == "svm":
        fc = detector_fc(config, network, workdir, len(classes))
        stages.run_stage(
            workdir,
            "svm",
            svm_inputs(config, before),
            lambda folder: learn_svms(
                folder,
                features,
                split.objects,
                len(classes),
                head=layer_head(config.layer, network.model.dtype),
                fc=fc,
                mining=make_mining(config),
                feature_norm=config.svm.feature_norm,
            ),
        )
    if config.regression.enabled:
        stages.run_stage(
            workdir,
            "regression",
            regression_inputs(config, objects),
            lambda folder: learn_regression(
                folder,
                features,
                split.objects,
                len(classes),
                overlap=config.regression.overlap,
                ridge=config.regression.ridge,
                max_examples=config.regression.max_examples,
                feature_norm=config.svm.feature_norm,
                seed=config.seed,
            ),
        )
    run_folder.write_json(workdir / CLASSES_FILE, list(classes))


def finetune_inputs(config: ConfigDict, before: dict[str, Any]) -> dict[str, Any]:
    """What decides the fine-tuned layers, how often they are saved left out."""
    settings = config.finetune.to_dict()
    del settings["checkpoint_steps"]
    return {**before, **settings}


def svm_inputs(config: ConfigDict, before: dict[str, Any]) -> dict[str, Any]:
    """What decides the SVMs."""
    return {**before, "layer": config.layer, **config.svm.to_dict()}


def regression_inputs(config: ConfigDict, objects: dict[str, Any]) -> dict[str, Any]:
    """What decides the box regression."""
    settings = {"seed": config.seed, "feature_norm": config.svm.feature_norm}
    return {**objects, **settings, **config.regression.to_dict()}


def make_finetuning(config: ConfigDict) -> Finetuning:
    """The settings of fine-tuning."""
    given = config.finetune
    return Finetuning(
        steps=given.steps,
        batch_size=given.batch_size,
        positives=given.positives,
        images_per_batch=given.images,
        learning_rate=given.learning_rate,
        drop_steps=tuple(given.drop_steps),
        drop_factor=given.drop_factor,
        momentum=given.momentum,
        weight_decay=given.weight_decay,
        seed=config.seed,
        checkpoint_steps=given.checkpoint_steps,
    )


def finetuned_model(config: ConfigDict, network: Network, classes: int) -> SPPNet:
    """The network with an fc8 for so many classes and background, the last."""
    trained = network.config.copy_and_resolve_references()
    trained.model.dropout = config.finetune.dropout
    return from_config.make_model(trained, classes + 1)


def detector_fc(
    config: ConfigDict, network: Network, workdir: Path, classes: int
) -> Any:
    """The fc layers, fine-tuned if they were, truncated if `fc_rank` says so."""
    params = network.params
    if config.finetune.steps:
        model = finetuned_model(config, network, classes)
        params = load_finetuned(workdir / "finetune", model, params)
    return {name: params[name] for name in FC_LAYERS}


def make_mining(config: ConfigDict) -> Mining:
    """The settings of hard-negative mining."""
    given = config.svm
    return Mining(
        overlap=given.negative_overlap,
        thinning=given.thinning,
        initial_per_image=given.initial_per_image,
        hard_per_image=given.hard_per_image,
        max_rounds=given.max_rounds,
        C=given.C,
        positive_weight=given.positive_weight,
        bias_multiplier=given.bias_multiplier,
        seed=config.seed,
    )


class Detector(NamedTuple):
    """A trained detector: what scores boxes, and of which classes."""

    network: Network
    head: Any
    weights: Any
    class_names: tuple[str, ...]


def load_detector(config: ConfigDict, workdir: Path) -> Detector:
    """The detector that `train_detector` left in a folder.

    Raises: FileNotFoundError where a stage that the config needs was not run.
    """
    network = load_network(workdir)
    if not (workdir / CLASSES_FILE).exists():
        raise FileNotFoundError(
            f"the training of the detector in {workdir} has not come to its end: run "
            "python -m sppnet_jax.detect train, it goes on where it stopped"
        )
    class_names = tuple(run_folder.read_json(workdir / CLASSES_FILE))
    fc = detector_fc(config, network, workdir, len(class_names))
    ranks = dict(zip(("fc6", "fc7"), config.fc_rank, strict=True))
    if any(ranks.values()):
        fc = truncate_fc(fc, ranks)
    svms = regressors = None
    if config.scorer == "svm":
        svms = LinearSVMs(**_load_arrays(workdir, "svm", SVM_FILE))
    if config.regression.enabled:
        regressors = BoxRegressors(
            **_load_arrays(workdir, "regression", REGRESSION_FILE)
        )
    head, weights = scoring_head(
        network.model, fc, layer=config.layer, svms=svms, regressors=regressors
    )
    return Detector(network, head, jax.device_put(weights), class_names)


def detect_split(
    configs: Sequence[ConfigDict],
    workdirs: Sequence[Path],
    detectors: Sequence[Detector],
    split: Split,
) -> list[Detections]:
    """What one detector, or several together, find in each image of a split."""
    found: list[list[Scored]] = [[] for _ in split.proposals]
    for config, workdir, detector in zip(configs, workdirs, detectors, strict=True):
        features, _ = window_features(
            config, detector.network, split, split.proposals, workdir
        )
        program = make_program(features, detector.head)
        with progress_bar("detecting", len(found)) as bar:
            for image, size in enumerate(split.sizes):
                scored = score_boxes(
                    features,
                    program,
                    detector.weights,
                    image,
                    (int(size[0]), int(size[1])),
                    len(detector.class_names),
                )
                found[image].append(scored)
                bar.update()
    return [
        suppress(
            scored,
            threshold=configs[0].test.nms,
            max_per_class=configs[0].test.max_per_class,
        )
        for scored in found
    ]


def check_trained_as(config: ConfigDict, workdir: Path) -> None:
    """Raises ValueError if a detector was trained with other settings than a config's.

    What only tests use may differ: `scorer`, `fc_rank`, `test`, splits and the like.
    """
    _check_is_detectors(workdir)
    known = run_folder.load_config(workdir)
    given = config.to_dict()
    shared = ["system", "scales", "rule", "window_side", "context", "maps_dtype"]
    shared += ["finetune"]
    shared += ["layer", "svm"] if config.scorer == "svm" else []
    shared += ["regression"] if config.regression.enabled else []
    for name in shared:
        if _plain(known[name]) != _plain(given[name]):
            raise ValueError(
                f"the detector in {workdir} was trained with {name} = {known[name]}, "
                f"not {given[name]}: run python -m sppnet_jax.detect train first"
            )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return list(value) if isinstance(value, tuple | list) else value


def _check_is_detectors(workdir: Path) -> None:
    known = (workdir / run_folder.CONFIG_FILE).exists()
    if known and "proposals" not in run_folder.load_config(workdir):
        raise ValueError(
            f"{workdir} holds a trained classifier, no detector: give the detector's "
            "own --workdir"
        )


def _default_split(config: ConfigDict, purpose: str) -> str:
    splits = available_splits(
        config.data.name, root=config.data.root, data_dir=config.data.data_dir
    )
    choices = {
        "train": ("trainval", "train+validation", "train+val", "train"),
        "test": ("test", "validation", "val"),
    }
    for choice in choices[purpose]:
        if all(part in splits for part in choice.split("+")):
            log.info("%s uses the split %r", purpose, choice)
            return choice
    raise ValueError(
        f"{config.data.name} has no split to {purpose} on, only {', '.join(splits)}: "
        f"give --config.data.{purpose}_split"
    )


def _digest_split(source: Source, objects: list[Objects]) -> str:
    digest = hashlib.sha256(repr(source.class_names).encode())
    for index, found in enumerate(objects):
        record = source.records[index]
        digest.update(
            record["name"].encode() + hashlib.sha256(record["image"]).digest()
        )
        for array in found:
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _digest_arrays(arrays: Any) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        values = np.ascontiguousarray(array)
        digest.update(f"{values.shape}{values.dtype}".encode() + values.tobytes())
    return digest.hexdigest()[:16]


def _no_objects() -> Objects:
    return Objects(np.zeros((0, 4)), np.zeros(0, np.int32), np.zeros(0, bool))


def _load_arrays(workdir: Path, stage: str, file: str) -> dict[str, np.ndarray]:
    if not stages.is_done(workdir, stage):
        raise FileNotFoundError(
            f"the stage {stage!r} of the detector in {workdir} was not run: run "
            "python -m sppnet_jax.detect train"
        )
    return run_folder.read_arrays(workdir / stage / file)
