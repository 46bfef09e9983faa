"""Turns a detector's config into its stages: what each is made from, and what it makes.

    network      the trained classifier, copied: a detector needs nothing but its folder
    finetune     fc6, fc7 and a new fc8
    svm          an SVM for each class, with hard-negative mining
    regression   of boxes

Each is run once, and again if what goes into it changes; see detection/stages.py.
Proposals and maps are no stages but a cache that detectors may share: each image has
its own entry. detector.json, the last that training writes, says which stages belong
together.
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from sppnet_jax import from_config, saved_config
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
    ROUNDS_FILE,
    SVM_FILE,
    learn_regression,
    learn_svms,
)
from sppnet_jax.detection.low_rank import FC_LAYERS, truncate_fc
from sppnet_jax.detection.maps import (
    convolve_split,
    decodable,
    image_sizes,
    mean_cells,
    subset,
)
from sppnet_jax.detection.proposals import (
    ProposalSettings,
    load_proposals,
    proposal_recall,
    propose,
)
from sppnet_jax.detection.window_features import (
    WindowFeatures,
    from_maps,
    from_warped,
    make_program,
)
from sppnet_jax.network.model import SPPNet
from sppnet_jax.network.preprocess import Preprocessing
from sppnet_jax.network.trunks import layers_geometry
from sppnet_jax.pyramid.geometry import Geometry
from sppnet_jax.pyramid.pooling import num_bins
from sppnet_jax.run import files, parallel, run_folder
from sppnet_jax.run.checkpoints import Checkpoints
from sppnet_jax.run.progress import progress_bar

log = logging.getLogger(__name__)

DETECTOR_FILE = "detector.json"


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

    `sizes`: (height, width) of each image, int [N, 2]. `images`: a digest of each.
    """

    source: Source
    objects: list[Objects]
    sizes: np.ndarray
    proposals: list[np.ndarray]
    images: list[str]


def cache_folder(config: ConfigDict, workdir: Path) -> Path:
    """Where proposals and maps are kept."""
    return Path(config.cache).expanduser() if config.cache else workdir / "cache"


def import_network(config: ConfigDict, workdir: Path) -> Network:
    """Copies the trained classifier into the detector's folder, unless it is there."""
    origin = _origin(config)
    if _copied_from(workdir) == str(origin) and not run_folder.has_checkpoint(origin):
        log.info("%s is gone; going on with the copy of it", origin)
        return load_network(workdir)
    if origin.resolve() == (workdir / "network").resolve():
        return load_network(workdir)
    network, step = _load_classifier(origin), from_config.checkpoint_step(origin)

    def copy(folder: Path) -> dict[str, Any]:
        run_folder.save_config(folder, network.config.to_dict())
        data = run_folder.load_training_data(origin)
        run_folder.save_training_data(folder, data)
        statistics = run_folder.load_statistics(origin)
        if statistics is not None:
            run_folder.save_statistics(folder, statistics)
        with Checkpoints(folder / run_folder.CHECKPOINTS) as checkpoints:
            if checkpoints.latest_step() is None:
                none = {"step": np.int32(step or 0)}
                checkpoints.save(
                    step or 0, params=network.params, training=none, host={}
                )
        return {"trained on": str(data)}

    inputs = {"workdir": str(origin), "step": step, "network": network.digest}
    stages.run_stage(workdir, "network", inputs, copy)
    return load_network(workdir)


def load_network(workdir: Path) -> Network:
    """The classifier in a detector's folder."""
    if not stages.is_done(workdir, "network"):
        raise FileNotFoundError(
            f"{workdir} holds no detector: train one with python -m sppnet_jax.detect "
            "train, or check --workdir"
        )
    return _load_classifier(workdir / "network")


def check_network(config: ConfigDict, workdir: Path) -> None:
    """Raises an error if there is no classifier, or it can't do what a config asks."""
    origin = _origin(config)
    if not run_folder.has_checkpoint(origin):
        if _copied_from(workdir) != str(origin):
            raise FileNotFoundError(
                f"config.network, {origin}, holds no trained classifier: train one "
                "with python -m sppnet_jax.train, or correct --config.network"
            )
        origin = workdir / "network"
    trained = saved_config.get_config(str(origin))
    model = from_config.make_model(trained, 1)
    if config.system == "spp":
        if model.levels is None:
            raise ValueError(
                f"the network in {origin} has no spatial pyramid (levels=None), so it "
                "can't pool windows from the map of a whole image: train one with "
                "levels such as (6, 3, 2, 1), or use --config.system=rcnn"
            )
        least = layers_geometry(model.backbone.layers).min_image_size
        if min(config.scales) < least:
            raise ValueError(
                f"config.scales has {min(config.scales)} pixels, and the network in "
                f"{origin} needs at least {least}"
            )
    elif 2 * config.context >= model.image_size:
        raise ValueError(
            f"config.context of {config.context} pixels on each side leaves nothing of "
            f"the {model.image_size} that the network in {origin} takes"
        )
    if config.finetune.steps:
        parallel.check_batch_size(config.finetune.batch_size)
    _load_classifier(origin)  # whether it can be read


def _origin(config: ConfigDict) -> Path:
    return Path(config.network).expanduser().absolute()


def _copied_from(workdir: Path) -> str | None:
    """Where the network in a detector's folder was copied from, if it is whole."""
    if not stages.is_done(workdir, "network"):
        return None
    return run_folder.read_json(workdir / "network" / stages.STAGE_FILE)["inputs"][
        "workdir"
    ]


def _load_classifier(workdir: Path) -> Network:
    config = saved_config.get_config(str(workdir))
    classes = run_folder.load_training_data(workdir).class_names
    model, params = from_config.load_model(config, workdir, len(classes))
    preprocessing = from_config.make_preprocessing(config, workdir)
    # All that its activations depend on.
    digest = stages.digest_of(
        {
            "model": _plain(config.model.to_dict()),
            "image_size": config.data.image_size,
            "weights": _digest_arrays(jax.tree.leaves(params)),
            "inputs": _digest_arrays([preprocessing.mean, preprocessing.scale]),
        }
    )
    geometry = layers_geometry(model.backbone.layers)
    return Network(config, model, params, preprocessing, geometry, digest)


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
    if known:
        recall = proposal_recall(proposals, objects, len(source.class_names))
        log.info(
            "%.0f proposals an image; they find %s of %d objects (IoU 0.5)",
            recall["mean_proposals"],
            "–" if recall["recall"] is None else f"{recall['recall']:.1%}",
            recall["objects"],
        )
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
        [
            hashlib.sha256(source.records[index]["image"]).hexdigest()[:16]
            for index in range(count)
        ],
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
        cache_folder(config, workdir) / "proposals",
        workers=given.workers or None,
    )


def window_features(
    config: ConfigDict,
    network: Network,
    split: Split,
    boxes: list[np.ndarray],
    workdir: Path,
) -> tuple[WindowFeatures, dict[str, Any]]:
    """The pooled features of boxes in a split's images, and what decides them.

    Convolves what is not in the cache yet.
    """
    settings = feature_settings(config, network)
    inputs = {"images": stages.digest_of({"images": split.images}), **settings}
    stored = ["network", "images", "dtype"]
    if config.system == "rcnn":
        inputs["boxes"] = _digest_arrays(boxes)
        stored += ["boxes", "context", "side"]
    # The maps of a scale serve every list of scales, and both rules.
    name = stages.digest_of({name: inputs[name] for name in stored})
    cache = cache_folder(config, workdir)
    model, params, geometry = network.model, network.params, network.geometry
    windows = np.mean([len(own) for own in boxes])
    if config.system == "rcnn":
        pooled = rcnn.stores_pooled(model)
        kept = "pooled vectors" if pooled else "maps of windows"
        log.info("on disk: %s, the smaller; %.0f windows an image", kept, windows)
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
        features = from_warped(folder, boxes, None if pooled else model.levels)
    else:
        log.info(
            "on disk: maps, %.0f cells an image; the %.0f windows' pooled vectors "
            "would be %.0f bins",
            mean_cells(split.sizes[split.sizes.all(axis=1)], config.scales, geometry),
            windows,
            windows * num_bins(model.levels or ()),
        )
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
            geometry=geometry,
            levels=model.levels or (),
            area=settings["area"],
            rule=config.rule,
            max_buckets=config.buckets,
        )
    return features, inputs


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
    check_is_detector(workdir)
    check_network(config, workdir)
    with stages.locked(workdir):
        split = open_split(config, "train", workdir)
        # From here on stages may be of other settings than the config's.
        (workdir / DETECTOR_FILE).unlink(missing_ok=True)
        run_folder.save_config(workdir, config.to_dict())
        digests = _run_stages(config, workdir, split)
        made = {
            "classes": list(split.source.class_names),
            "stages": digests,
            "images": split.images,
        }
        files.write_json(workdir / DETECTOR_FILE, made)


def _run_stages(config: ConfigDict, workdir: Path, split: Split) -> dict[str, str]:
    """Runs what is not done; returns the digest of each stage."""
    network = import_network(config, workdir)
    boxes = with_objects(split.objects, split.proposals)
    features, made_of = window_features(config, network, split, boxes, workdir)
    num_classes = len(split.source.class_names)
    labels = np.concatenate([f.labels[~f.difficult] for f in split.objects])
    absent = np.setdiff1d(np.arange(num_classes), labels)
    if len(absent):
        log.warning(
            "no object to train on, or difficult ones only: %s; they will never be "
            "detected",
            ", ".join(split.source.class_names[label] for label in absent),
        )
    shared: dict[str, Any] = {
        **made_of,
        "boxes": _digest_arrays(boxes),
        "objects": _digest_arrays(part for found in split.objects for part in found),
        "classes": list(split.source.class_names),
        "seed": config.seed,
    }
    digests: dict[str, str] = {}
    if config.finetune.steps:
        digests["finetune"] = stages.run_stage(
            workdir,
            "finetune",
            {**shared, "finetune": _deciding(config.finetune)},
            lambda folder: finetune(
                folder,
                finetuned_model(config, network, num_classes),
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
                make_finetuning(config),
            ),
        )
    if config.scorer == "svm":
        fc = detector_fc(config, network, workdir, num_classes)
        learnt_on = {"finetuned": digests.get("finetune", ""), "layer": config.layer}
        digests["svm"] = stages.run_stage(
            workdir,
            "svm",
            {**shared, **learnt_on, "svm": config.svm.to_dict()},
            lambda folder: learn_svms(
                folder,
                features,
                split.objects,
                num_classes,
                head=layer_head(network.model, config.layer),
                fc=fc,
                mining=make_mining(config),
                feature_norm=config.svm.feature_norm,
            ),
        )
        # Large, and of use to a run that is cut off only.
        (workdir / "svm" / ROUNDS_FILE).unlink(missing_ok=True)
    if config.regression.enabled:
        scaled = {"feature_norm": config.svm.feature_norm}
        digests["regression"] = stages.run_stage(
            workdir,
            "regression",
            {**shared, **scaled, "regression": config.regression.to_dict()},
            lambda folder: learn_regression(
                folder,
                features,
                split.objects,
                num_classes,
                overlap=config.regression.overlap,
                ridge=config.regression.ridge,
                max_examples=config.regression.max_examples,
                feature_norm=config.svm.feature_norm,
                seed=config.seed,
            ),
        )
    return digests


def _deciding(finetune: ConfigDict) -> dict[str, Any]:
    """The settings of fine-tuning that decide its result."""
    settings = finetune.to_dict()
    for name in ("checkpoint_steps", "memory_gb"):
        del settings[name]
    return settings


def make_finetuning(config: ConfigDict) -> Finetuning:
    """The settings of fine-tuning."""
    given = config.finetune
    return Finetuning(
        steps=given.steps,
        batch_size=given.batch_size,
        positives=given.positives,
        images_per_batch=given.images,
        memory=given.memory_gb * 1e9,
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
        max_rows=given.max_rows,
        C=given.C,
        positive_weight=given.positive_weight,
        bias_multiplier=given.bias_multiplier,
        seed=config.seed,
    )


class Detector(NamedTuple):
    """A trained detector: what scores boxes, and of which classes.

    `images`: the digests of those that it was trained on.
    """

    network: Network
    head: Any
    weights: Any
    class_names: tuple[str, ...]
    images: frozenset[str]


def load_detector(config: ConfigDict, workdir: Path) -> Detector:
    """The detector that `train_detector` left in a folder.

    Raises: FileNotFoundError where a stage that the config needs was not run.
    """
    network = load_network(workdir)
    if not (workdir / DETECTOR_FILE).exists():
        raise FileNotFoundError(
            f"the training of the detector in {workdir} has not come to its end: run "
            "python -m sppnet_jax.detect train, it goes on where it stopped"
        )
    made = run_folder.read_json(workdir / DETECTOR_FILE)
    class_names = tuple(made["classes"])
    needed = {
        "finetune": bool(config.finetune.steps),
        "svm": config.scorer == "svm",
        "regression": config.regression.enabled,
    }
    for name, used in needed.items():
        digest = stages.done_digest(workdir, name)
        if used and (digest is None or made["stages"].get(name) != digest):
            raise FileNotFoundError(
                f"the last training of the detector in {workdir} left out the stage "
                f"{name!r}: run python -m sppnet_jax.detect train with the settings "
                "that you test with"
            )
    fc = detector_fc(config, network, workdir, len(class_names))
    ranks = dict(zip(("fc6", "fc7"), config.fc_rank, strict=True))
    if any(ranks.values()):
        fc = truncate_fc(fc, ranks)
    svms = regressors = None
    if config.scorer == "svm":
        svms = LinearSVMs(**files.read_arrays(workdir / "svm" / SVM_FILE))
    if config.regression.enabled:
        file = workdir / "regression" / REGRESSION_FILE
        regressors = BoxRegressors(**files.read_arrays(file))
    head, weights = scoring_head(
        network.model, fc, layer=config.layer, svms=svms, regressors=regressors
    )
    images = frozenset(made["images"])
    return Detector(network, head, jax.device_put(weights), class_names, images)


def detect_split(
    configs: Sequence[ConfigDict],
    workdirs: Sequence[Path],
    detectors: Sequence[Detector],
    split: Split,
) -> list[Detections]:
    """What one detector, or several together, find in each image of a split."""
    parts = []
    for config, workdir, detector in zip(configs, workdirs, detectors, strict=True):
        features, _ = window_features(
            config, detector.network, split, split.proposals, workdir
        )
        parts.append((features, make_program(features, detector.head), detector))
    found = []
    with progress_bar("detecting", len(split.sizes)) as bar:
        for image, (height, width) in enumerate(split.sizes.tolist()):
            scored = [
                score_boxes(
                    features,
                    program,
                    detector.weights,
                    image,
                    (height, width),
                    len(detector.class_names),
                )
                for features, program, detector in parts
            ]
            kept = suppress(
                scored,
                threshold=configs[0].test.nms,
                max_per_class=configs[0].test.max_per_class,
            )
            found.append(kept)
            bar.update()
    return found


def check_trained_as(config: ConfigDict, workdir: Path) -> None:
    """Raises ValueError if a detector was trained with other settings than a config's.

    What only tests use may differ: `scorer`, `fc_rank`, `test`, splits and the like.
    """
    check_is_detector(workdir)
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


def check_is_detector(workdir: Path) -> None:
    """Raises ValueError if a folder holds a trained classifier and no detector."""
    known = (workdir / run_folder.CONFIG_FILE).exists()
    if known and "proposals" not in run_folder.load_config(workdir):
        raise ValueError(
            f"{workdir} holds a trained classifier, no detector: give the detector's "
            "own --workdir"
        )


def _default_split(config: ConfigDict, purpose: str) -> str:
    """A split to test on, and one to train on that has none of its images."""
    splits = available_splits(
        config.data.name, root=config.data.root, data_dir=config.data.data_dir
    )
    joined = ("trainval", "train+validation", "train+val")
    choices = {
        "test": ("test", "validation", "val"),
        "train": (*(joined if "test" in splits else ()), "train"),
    }
    for choice in choices[purpose]:
        if all(part in splits for part in choice.split("+")):
            log.info("%s uses the split %r", purpose, choice)
            return choice
    raise ValueError(
        f"{config.data.name} has no split to {purpose} on, only {', '.join(splits)}: "
        f"give --config.data.{purpose}_split"
    )


def _digest_arrays(arrays: Any) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        values = np.ascontiguousarray(array)
        digest.update(f"{values.shape}{values.dtype}".encode() + values.tobytes())
    return digest.hexdigest()[:16]


def _no_objects() -> Objects:
    return Objects(np.zeros((0, 4)), np.zeros(0, np.int32), np.zeros(0, bool))
