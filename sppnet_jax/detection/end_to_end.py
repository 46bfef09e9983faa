"""One training of everything: the trunk, through pooled windows, and the head.

The sequel that the paper leaves open (Fast R-CNN, Girshick 2015), with any pyramid in
place of its one 7×7 level. A step convolves a few images, pools windows of each map,
classifies them, background included, and moves the boxes of those that show an object;
the gradients of both losses go through the pyramid into the trunk. A batch is a
function of the seed and the step's number: a resumed run sees what it would have seen.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sppnet_jax.buckets import choose_buckets
from sppnet_jax.buckets.table import smallest_bucket
from sppnet_jax.buckets.whole_images import MAX_ASPECT
from sppnet_jax.data.images import decode_resized, mirror, whole_size
from sppnet_jax.data.sources import Objects
from sppnet_jax.detection.box_layer import BOX, SPREAD, predict_boxes
from sppnet_jax.detection.box_split import BoxSplit
from sppnet_jax.detection.boxes import encode_boxes
from sppnet_jax.detection.examples import finetuning_examples, regression_examples
from sppnet_jax.detection.finetune import Finetuning, train_on_windows
from sppnet_jax.detection.hard_negatives import feature_scale
from sppnet_jax.detection.scales import map_size_of, scale_factors
from sppnet_jax.network.model import SPPNet, frozen_convs, with_trainable
from sppnet_jax.network.preprocess import Preprocessing, normalize
from sppnet_jax.network.trained import Network
from sppnet_jax.pyramid.geometry import boxes_to_windows
from sppnet_jax.run import parallel, run_folder
from sppnet_jax.run.checkpoints import Checkpoints
from sppnet_jax.run.files import write_json
from sppnet_jax.run.run_folder import CHECKPOINTS

SCALE_FILE = "scale.json"


class TrainingWindows(NamedTuple):
    """Rows of an image's boxes to train on.

    `positives`: int [n], `labels`: int [n], `targets`: float [n, 4], the objects'
    boxes. `negatives`: int [m].
    """

    positives: np.ndarray
    labels: np.ndarray
    targets: np.ndarray
    negatives: np.ndarray


def training_windows(
    boxes: np.ndarray, objects: Objects, settings: Finetuning
) -> TrainingWindows:
    """Which boxes show what, see `Finetuning`.

    Where no box overlaps the objects as much as a negative should, all that overlap
    them less are negatives; of an image without objects, all boxes.
    """
    overlap, (low, high) = settings.positive_overlap, settings.negative_overlap
    rows, targets, labels = regression_examples(boxes, objects, overlap=overlap)
    found = finetuning_examples(boxes, objects, positive=overlap, negative=(low, high))
    if not len(found.negatives):
        found = finetuning_examples(
            boxes, objects, positive=overlap, negative=(-1.0, high)
        )
    return TrainingWindows(rows, labels, targets, found.negatives)


def check_end_to_end(settings: Finetuning, model: SPPNet) -> None:
    """Raises ValueError for settings of which no step can be made."""
    devices = jax.device_count()
    if settings.images % devices or settings.batch_size % settings.images:
        raise ValueError(
            f"config.finetune.images, {settings.images}, must be a multiple of the "
            f"{devices} devices, and config.finetune.batch_size, "
            f"{settings.batch_size} windows, of the images"
        )
    frozen_convs(model, settings.trainable)


class _Drawn(NamedTuple):
    """What a step sees of one image."""

    image: int
    mirrored: bool
    side: int
    rows: np.ndarray
    labels: np.ndarray
    targets: np.ndarray  # NaN for background


def draw_images(
    step: int, usable: Sequence[int], sizes: np.ndarray, count: int, seed: int
) -> list[int]:
    """The images of a step: in a turn each once, tall with tall and wide with wide.

    A bucket that holds them all then has little padding. A turn leaves out what its
    steps have no place for; images come again in one step where there are too few.

    `sizes`: (height, width) of all images. `count`: of the step.
    """
    steps = max(len(usable) // count, 1)
    turn, place = divmod(step, steps)
    rng = np.random.default_rng((seed, 0, turn))
    order = rng.permutation(np.asarray(usable))[: steps * count]
    heights, widths = sizes[order].T
    order = order[np.argsort(widths > heights, kind="stable")]
    groups = np.resize(order, (steps, count))
    return [int(image) for image in groups[rng.permutation(steps)[place]]]


def draw_windows(
    windows: Sequence[TrainingWindows],
    image: int,
    settings: Finetuning,
    sides: Sequence[int],
    background: int,
    key: tuple[int, ...],
) -> _Drawn:
    """What a step sees of an image, the positives first.

    Positives are drawn with replacement, negatives too if there are too few. Of an
    image without positives all are negatives, and the reverse.

    `key`: decides what is drawn.
    """
    own = windows[image]
    rng = np.random.default_rng(key)
    count = settings.batch_size // settings.images
    wanted = min(round(count * settings.positives), len(own.positives))
    if not len(own.negatives):
        wanted = count
    first = np.zeros(0, np.int64)
    if wanted:
        first = rng.choice(len(own.positives), wanted, p=_shares(own, settings))
    rest = count - wanted
    others = np.zeros(0, np.int64)
    if rest:
        others = rng.choice(own.negatives, rest, replace=rest > len(own.negatives))
    return _Drawn(
        image,
        bool(settings.flip and rng.random() < 0.5),
        sides[int(rng.integers(len(sides)))],
        np.concatenate([own.positives[first], others]).astype(np.int64),
        np.concatenate([own.labels[first], np.full(rest, background)]),
        np.concatenate([own.targets[first], np.full((rest, 4), np.nan)]),
    )


def _shares(own: TrainingWindows, settings: Finetuning) -> np.ndarray | None:
    """How likely each positive is drawn; None for all alike."""
    if not settings.balanced:
        return None
    _, objects, windows = np.unique(
        own.targets, axis=0, return_inverse=True, return_counts=True
    )
    objects = objects.reshape(-1)
    each = 1 / windows[objects]  # of an object they add up to 1
    return each / np.bincount(own.labels, each)[own.labels] / len(np.unique(own.labels))


def train_end_to_end(
    folder: Path,
    network: Network,
    head: SPPNet,
    params: Any,
    split: BoxSplit,
    boxes: Sequence[np.ndarray],
    settings: Finetuning,
    sides: Sequence[int],
    *,
    rule: str,
    max_buckets: int,
    scaled: bool,
    seed: int,
) -> dict[str, Any]:
    """Trains trunk and head, from the newest checkpoint in `folder` if there is one.

    `network`: has the trunk and its pyramid. `head`: classifies pooled vectors; its
    last class is background. `params`: those that training begins with, see
    `begin_params`. `boxes`: of each image, its objects' first.
    `sides`: images' shorter sides, one drawn for each image. `rule`: see
    `boxes_to_windows`. `max_buckets`: compiled programs. `scaled`: pooled vectors are
    scaled to a length that suits freshly drawn fc layers.

    Returns: a report of plain values; `load_end_to_end` has the result.
    Raises: ValueError if no image has a window on an object; and as `loop.train` does.
    """
    windows = [
        training_windows(own, objects, settings)
        for own, objects in zip(boxes, split.objects, strict=True)
    ]
    usable = [
        image
        for image, own in enumerate(windows)
        if len(own.positives) + len(own.negatives) and len(split.proposals[image])
    ]
    if not any(len(windows[image].positives) for image in usable):
        raise ValueError(
            f"none of the {len(windows)} training images has a window on an object: "
            "check the annotations, or lower finetune.positive_overlap"
        )
    dtype = jnp.bfloat16 if settings.bfloat16 else jnp.float32
    model = with_trainable(network.model, settings.trainable).clone(dtype=dtype)
    head = head.clone(dtype=dtype)
    frozen = frozen_convs(model, settings.trainable)
    background = head.num_classes - 1

    def draw(step: int) -> list[_Drawn]:
        images = draw_images(step, usable, split.sizes, settings.images, seed)
        given = settings, sides, background
        return [
            draw_windows(windows, image, *given, (seed, 1, step, place))
            for place, image in enumerate(images)
        ]

    load = _batch_loader(network, split, boxes, draw, settings.steps, rule, max_buckets)

    if parallel.is_first_process() and not (folder / SCALE_FILE).exists():
        factor = _input_scale(network, load(0)) if scaled else 1.0
        write_json(folder / SCALE_FILE, {"scale": factor})
    parallel.wait_for_all_processes("the scale is measured")
    scale = run_folder.read_json(folder / SCALE_FILE, "scale")["scale"]

    memory = train_on_windows(
        folder,
        "end-to-end training",
        settings,
        load,
        lambda: params,
        losses_of(model, head, network.preprocessing, settings.box_weight, scale),
        frozen=frozen,
        trunk_rate=settings.trunk_rate,
        seed=seed,
    )
    return {
        "steps": settings.steps,
        "images": len(usable),
        "positives": sum(len(windows[i].positives) for i in usable),
        "negatives": sum(len(windows[i].negatives) for i in usable),
        "frozen": len(frozen),
        **memory["last"],
    }


def losses_of(
    model: SPPNet,
    head: SPPNet,
    preprocessing: Preprocessing,
    box_weight: float,
    scale: float = 1.0,
) -> Any:
    """From params, a device's batch and a key to losses and logits, for `make_step`.

    A window's loss is the cross entropy of its class, and, if it shows an object,
    `box_weight` times the smooth-L1 loss of its class's box. `scale`: of the pooled
    vectors, before the head sees them.
    """
    import optax

    def losses(
        params: Any, batch: dict[str, jax.Array], rng: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        inputs = normalize(batch["image"], preprocessing, batch["size"])
        trained = {"params": {k: v for k, v in params.items() if k != BOX}}
        maps, _ = model.apply(trained, inputs, batch["size"], method="features")

        def pool(one: jax.Array, own: jax.Array) -> Any:
            return model.apply(trained, one, own, method="pool_windows")

        pooled = jax.vmap(pool)(maps.astype(jnp.float32), batch["windows"])
        pooled = scale * pooled.reshape(-1, pooled.shape[2])
        logits, found = head.apply(
            trained, pooled, train=True, rngs={"dropout": rng}, method="classify"
        )
        logits = logits.astype(jnp.float32)
        entropy = optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["label"]
        )
        deltas = predict_boxes(params, found["fc7"])
        shown = batch["label"] < deltas.shape[1]
        own = jnp.minimum(batch["label"], deltas.shape[1] - 1)
        own_deltas = jnp.take_along_axis(deltas, own[:, None, None], axis=1)[:, 0]
        error = optax.huber_loss(own_deltas / SPREAD, batch["target"] / SPREAD)
        box_loss = jnp.where(shown, error.sum(axis=1), 0)
        return entropy + box_weight * box_loss, logits

    return losses


def begin_params(head: SPPNet, params: Any, seed: int) -> Any:
    """What training begins with: a new fc8 and box layer on what is there.

    `head`: has a class for background. `params`: of the trunk, and of fc6 and fc7.
    """
    source = params["fc7"]["kernel"].shape[1]
    keys = jax.random.split(jax.random.PRNGKey(seed))
    classes = head.num_classes
    boxes = 4 * (classes - 1)
    return {
        **{name: own for name, own in params.items() if name != "fc8"},
        "fc8": {
            "kernel": 0.01 * jax.random.normal(keys[0], (source, classes)),
            "bias": jnp.zeros(classes),
        },
        BOX: {
            "kernel": 0.001 * jax.random.normal(keys[1], (source, boxes)),
            "bias": jnp.zeros(boxes),
        },
    }


def load_end_to_end(folder: Path, shapes: Any) -> Any:
    """The trained parameters, of vectors as they come; `shapes`: of `begin_params`."""
    with Checkpoints(folder / CHECKPOINTS) as checkpoints:
        params = dict(checkpoints.restore_params(shapes))
    scale = run_folder.read_json(folder / SCALE_FILE, "scale")["scale"]
    fc6 = params["fc6"]
    return {**params, "fc6": {**fc6, "kernel": np.float32(scale) * fc6["kernel"]}}


def _input_scale(network: Network, batch: Any) -> float:
    """The factor that gives pooled vectors a mean length of 20, as `feature_scale`.

    Measured on the windows of an image: one learning rate then suits the vectors of
    every trunk and pyramid.
    """
    model = network.model

    @jax.jit
    def lengths(params: Any, image: Any, size: Any, windows: Any) -> jax.Array:
        inputs = normalize(image, network.preprocessing, size)
        given = {"params": params}
        maps, _ = model.apply(given, inputs, size, method="features")
        pooled = model.apply(given, maps[0], windows[0], method="pool_windows")
        return jnp.linalg.norm(jnp.asarray(pooled, jnp.float32), axis=1)

    convs = {k: v for k, v in network.params.items() if k.startswith("conv")}
    first = (batch[name][0][:1] for name in ("image", "size", "windows"))
    return float(feature_scale(np.asarray(lengths(convs, *first))[:, None]))


def _batch_loader(
    network: Network,
    split: BoxSplit,
    boxes: Sequence[np.ndarray],
    draw: Callable[[int], list[_Drawn]],
    steps: int,
    rule: str,
    max_buckets: int,
) -> Any:
    def size_of(image: int, side: int) -> tuple[int, int]:
        height, width = split.sizes[image].tolist()
        return whole_size(height, width, side, MAX_ASPECT)

    def room(drawn: Sequence[_Drawn]) -> tuple[int, int]:
        sizes = [size_of(one.image, one.side) for one in drawn]
        return max(rows for rows, _ in sizes), max(columns for _, columns in sizes)

    some = range(min(steps, 2000))
    buckets = choose_buckets([room(draw(step)) for step in some], max_buckets)
    largest = tuple(np.array(buckets).max(axis=0).tolist())

    def load(step: int) -> dict[str, np.ndarray]:
        drawn = draw(step)
        fits = room(drawn)
        over = max(fits[0], largest[0]), max(fits[1], largest[1])
        height, width = smallest_bucket(fits, (*buckets, over))
        local = len(drawn) // jax.process_count()
        mine = drawn[jax.process_index() * local :][:local]
        batch: dict[str, Any] = {
            "image": np.zeros((local, height, width, 3), np.uint8),
            "size": np.zeros((local, 2), np.int32),
            "windows": [],
            "label": np.concatenate([one.labels for one in mine]).astype(np.int32),
            "target": [],
        }
        for place, one in enumerate(mine):
            encoded = split.source.records[one.image]["image"]
            image = decode_resized(encoded, one.side, MAX_ASPECT)
            chosen, targets = boxes[one.image][one.rows], one.targets
            if one.mirrored:
                image = mirror(image)
                width_there = split.sizes[one.image][1]
                chosen, targets = (
                    mirrored_boxes(own, width_there) for own in (chosen, targets)
                )
            rows, columns = image.shape[:2]
            batch["image"][place, :rows, :columns] = image
            batch["size"][place] = rows, columns
            factors = scale_factors(tuple(split.sizes[one.image]), [(rows, columns)])[0]
            batch["windows"].append(
                boxes_to_windows(
                    chosen * np.tile(factors, 2),
                    network.geometry,
                    map_size_of((rows, columns), network.geometry),
                    rule=rule,
                )
            )
            shown = np.isfinite(targets).all(axis=1)
            deltas = np.zeros((len(chosen), 4), np.float32)
            deltas[shown] = encode_boxes(chosen[shown], targets[shown])
            batch["target"].append(deltas)
        batch["windows"] = np.stack(batch["windows"]).astype(np.int32)
        batch["target"] = np.concatenate(batch["target"])
        batch["mask"] = np.ones(len(batch["label"]), bool)
        return parallel.shard(batch)

    return load


def mirrored_boxes(boxes: np.ndarray, width: float) -> np.ndarray:
    """Boxes (ymin, xmin, ymax, xmax) in the mirrored image of a width."""
    return np.stack(
        [boxes[:, 0], width - boxes[:, 3], boxes[:, 2], width - boxes[:, 1]], axis=1
    )
