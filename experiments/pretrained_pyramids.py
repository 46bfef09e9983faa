r"""The paper's questions on photographs: linear classifiers on a pretrained trunk.

python -m experiments.pretrained_pyramids --root=FOLDER --results=runs/pyramids

Does a pyramid help beyond one bin? Maximum or mean? The full image, its centre or the
image made a square? How large? Every image of the folder of class folders goes through
the trunk once for each view and size; then each pyramid's vectors are L2-normalised and
classified by regularised least squares (scikit-learn's `KernelRidge`), whose one
setting is chosen on the validation images. All images are split anew for each split,
class by class, as large as the folder's own splits.

Writes results.json and table.md. Interrupted, it goes on with the next view and size.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from sppnet_jax import cli
from sppnet_jax.benchmarks.report import machine
from sppnet_jax.buckets import BucketTable, choose_buckets
from sppnet_jax.buckets.whole_images import MAX_ASPECT, fitting_batch
from sppnet_jax.data.images import (
    crop,
    decode_image,
    resize_shorter_side,
    resize_whole,
    warp,
)
from sppnet_jax.data.sources import Source, open_source
from sppnet_jax.network.preprocess import normalize
from sppnet_jax.network.pretrained import pretrained_network, published_architecture
from sppnet_jax.network.trained import Network
from sppnet_jax.pyramid.pooling import spatial_pyramid_pool
from sppnet_jax.run import caches, files

LEVELS = (6, 3, 2, 1)
PYRAMIDS = ((1,), (2, 1), (3, 2, 1), (6, 3, 2, 1))
REDUCERS = ("max", "mean")
SPLITS = ("train", "validation", "test")
ALPHAS = (0.01, 0.03, 0.1, 0.3, 1.0)
BEFORE_CROP = 256 / 224  # the shorter side, for one of the crop's

ROOT = flags.DEFINE_string("root", "", "The folder: SPLIT/CLASS/*.jpg.")
BACKBONE = flags.DEFINE_string("backbone", "efficientnet_lite0", "The trunk.")
OUT = flags.DEFINE_string(
    "results", "runs/experiments/pretrained_pyramids", "The folder of the results."
)
VIEWS = flags.DEFINE_list(
    "views",
    ["full:160", "full:224", "full:320", "crop:224", "warp:224"],
    "Views and sides in pixels: of the shorter side (full) or of the square.",
)
RESPLITS = flags.DEFINE_integer("splits", 3, "How often all images are split anew.")


def main(argv: Sequence[str]) -> None:
    cli.refuse_arguments(argv[1:])
    cli.show_own_log()
    caches.use_compilation_cache()
    sources = [open_source("image_folder", name, root=ROOT.value) for name in SPLITS]
    labels = np.concatenate(
        [[s.records[i]["label"] for i in range(len(s.records))] for s in sources]
    )
    counts = [len(source.records) for source in sources]
    network = pretrained_network(published_architecture(BACKBONE.value))
    out = Path(OUT.value).expanduser()
    rows: list[dict[str, Any]] = []
    for view in VIEWS.value:
        part = out / f"{view.replace(':', '_')}.json"
        if not part.exists():
            grams = gram_matrices(network, sources, view)
            found = [
                {"view": view, "levels": list(pyramid), "reducer": reducer}
                | accuracies(grams, pyramid, reducer, labels, counts, RESPLITS.value)
                for reducer in REDUCERS
                for pyramid in PYRAMIDS
            ]
            files.write_json(part, found)
        rows += json.loads(part.read_text())
    about = {
        "data": Path(ROOT.value).name,
        "trunk": BACKBONE.value,
        "images": counts,
        "splits": RESPLITS.value,
        "machine": machine(),
    }
    files.write_json(out / "results.json", {"about": about, "rows": rows})
    table = make_table(rows) + "\n" + make_answers(rows)
    files.write_text(out / "table.md", table)
    print(table)


def gram_matrices(
    network: Network, sources: Sequence[Source], view: str
) -> dict[tuple[str, int], np.ndarray]:
    """For each reducer and level the products of all images' bins, float64 [N, N]."""
    vectors = pooled_levels(network, sources, view)
    grams = {}
    for key, values in tqdm(vectors.items(), desc="products", disable=None):
        rows = values.astype(np.float32)
        grams[key] = np.asarray(rows @ rows.T, np.float64)
    return grams


def pooled_levels(
    network: Network, sources: Sequence[Source], view: str
) -> dict[tuple[str, int], np.ndarray]:
    """For each reducer and level the bins of all images, float16 [N, D]."""
    kind, side = view.split(":")
    seen = _see(kind, int(side))
    records = [source.records for source in sources]
    count = sum(map(len, records))

    def images() -> Iterator[np.ndarray]:
        for own in records:
            for index in range(len(own)):
                yield seen(decode_image(own[index]["image"]))

    sizes = [image.shape[:2] for image in images()]
    buckets = choose_buckets(sizes, 4)

    def pool(params: Any, batch: jax.Array, valid: jax.Array) -> dict[str, jax.Array]:
        inputs = normalize(batch, network.preprocessing, valid)
        model = network.model
        maps, _ = model.apply({"params": params}, inputs, valid, method="features")
        for layer in network.geometry.layers:
            valid = layer.output_size(valid)
        return {
            reducer: spatial_pyramid_pool(
                maps, LEVELS, valid_size=valid, reducer=reducer
            ).astype(jnp.float16)
            for reducer in REDUCERS
        }

    area = max(height * width for height, width in buckets)
    rows = fitting_batch(16, network.model.image_size, area)
    table = BucketTable(pool, network.params, buckets, rows)
    found: dict[int, Any] = {}
    with tqdm(total=count, desc=view, disable=None) as bar:
        for index, result in table.map(enumerate(images())):
            found[index] = result
            bar.update()
    ends = np.cumsum([level * level for level in LEVELS])
    levels: dict[tuple[str, int], np.ndarray] = {}
    for reducer in REDUCERS:
        bins = np.stack([found[index][reducer] for index in range(count)])
        for level, part in zip(LEVELS, np.split(bins, ends[:-1], axis=1), strict=True):
            levels[reducer, level] = part.reshape(count, -1)
    return levels


def _see(kind: str, side: int) -> Callable[[np.ndarray], np.ndarray]:
    if kind == "full":
        return lambda image: resize_whole(image, side, MAX_ASPECT)
    if kind == "warp":
        return lambda image: warp(image, side)
    if kind == "crop":
        before = round(BEFORE_CROP * side)
        return lambda image: crop(resize_shorter_side(image, before), side, "center")
    raise ValueError(f"unknown view {kind!r}: use full, crop or warp")


def accuracies(
    grams: dict[tuple[str, int], np.ndarray],
    pyramid: Sequence[int],
    reducer: str,
    labels: np.ndarray,
    counts: Sequence[int],
    splits: int,
) -> dict[str, Any]:
    """The test accuracy of each split, 0 to 1, and what was chosen on validation."""
    gram = sum(grams[reducer, level] for level in pyramid)
    lengths = np.sqrt(np.diag(gram))
    gram = gram / lengths[:, None] / lengths
    targets = np.eye(labels.max() + 1)[labels]
    top1, chosen = [], []
    for seed in range(splits):
        everything = np.arange(len(labels))
        rest, test = train_test_split(
            everything, test_size=counts[2], stratify=labels, random_state=seed
        )
        train, held_out = train_test_split(
            rest, test_size=counts[1], stratify=labels[rest], random_state=seed
        )

        def right(alpha: float, rows: np.ndarray, train: np.ndarray = train) -> float:
            model = KernelRidge(alpha=alpha, kernel="precomputed")
            model.fit(gram[np.ix_(train, train)], targets[train])
            scores = model.predict(gram[np.ix_(rows, train)])
            return float((scores.argmax(1) == labels[rows]).mean())

        best = max(ALPHAS, key=lambda alpha: right(alpha, held_out))
        chosen.append(best)
        top1.append(right(best, test))
    return {"top1": top1, "alpha": chosen}


def make_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each view and reducer, a column for each pyramid; mean ± sd in %."""
    names = ["{" + ",".join(map(str, pyramid)) + "}" for pyramid in PYRAMIDS]
    lines = ["| view | bins | " + " | ".join(names) + " |", "|---|---|" + "--:|" * 4]
    cells: dict[tuple[str, str], dict[tuple[int, ...], str]] = {}
    for row in rows:
        shares = 100 * np.array(row["top1"])
        spread = f" ± {shares.std(ddof=1):.1f}" if len(shares) > 1 else ""
        own = cells.setdefault((row["view"], row["reducer"]), {})
        own[tuple(row["levels"])] = f"{shares.mean():.1f}{spread}"
    for (view, reducer), own in cells.items():
        kind, side = view.split(":")
        values = " | ".join(own[pyramid] for pyramid in PYRAMIDS)
        lines.append(f"| {kind} {side} | {reducer} | {values} |")
    return "\n".join(lines) + "\n"


def make_answers(rows: Sequence[dict[str, Any]]) -> str:
    """The paper's questions, answered by pairs that differ in one thing, in points."""
    shares = {
        (row["view"], row["reducer"], tuple(row["levels"])): 100 * np.array(row["top1"])
        for row in rows
    }

    def pairs(change: Callable[[Any], Any]) -> str:
        """Mean ± sd over splits of what `change` makes of each row's key."""
        changed = [(key, change(key)) for key in shares]
        found = [
            shares[other] - shares[key] for key, other in changed if other in shares
        ]
        if not found:
            return "not run"
        every = np.concatenate(found)
        return f"{every.mean():+.1f} ± {every.std(ddof=1):.1f} | {len(every)}"

    def pyramid(levels: tuple[int, ...], reducer: str) -> str:
        return pairs(
            lambda k: (k[0], k[1], levels) if k[1:] == (reducer, (1,)) else None
        )

    def view(before: str, after: str) -> str:
        return pairs(lambda k: (after, *k[1:]) if k[0] == before else None)

    lines = ["| question | points | pairs |", "|---|--:|--:|"]
    for levels in PYRAMIDS[1:]:
        for reducer in REDUCERS:
            name = "{" + ",".join(map(str, levels)) + "}"
            found = pyramid(levels, reducer)
            lines.append(f"| {name} in place of {{1}}, {reducer} | {found} |")
    mean = pairs(lambda k: (k[0], "mean", k[2]) if k[1] == "max" else None)
    lines.append(f"| mean in place of max | {mean} |")
    for before, after in (
        ("crop:224", "full:224"),
        ("warp:224", "full:224"),
        ("full:160", "full:224"),
        ("full:224", "full:320"),
    ):
        names = [one.replace(":", " ") for one in (after, before)]
        found = view(before, after)
        lines.append(f"| {names[0]} in place of {names[1]} | {found} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    logging.captureWarnings(capture=True)
    app.run(main)
