"""Files of features, to train SVMs on, with all that says where they are from."""

import datetime
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from sppnet_jax.data.datasets import ImageData
from sppnet_jax.data.sources import FOLDERS, open_source, subset
from sppnet_jax.network.described import PRETRAINED
from sppnet_jax.network.model import Architecture
from sppnet_jax.network.trained import Network
from sppnet_jax.run.files import (
    absolute,
    check_can_write,
    check_space,
    own_code,
    own_version,
    remove_all_but,
    write_arrays,
)
from sppnet_jax.run.settings import plain
from sppnet_jax.run.shares import ALONE, Share, in_parts
from sppnet_jax.run.stages import digest_of
from sppnet_jax.training.layer_features import (
    Features,
    check_request,
    default_layer,
    default_side,
    extract_features,
    label_rows,
    row_extractor,
    row_length,
)
from sppnet_jax.training.network_settings import NetworkSettings
from sppnet_jax.training.networks import check_data_is_unchanged


def write_features(
    settings: NetworkSettings,
    network: Network,
    *,
    workdir: Path | None = None,
    layer: str = "",
    split: str = "test",
    mode: str = "crop",
    side: int | None = None,
    multi_label: bool = False,
    output: Path | None = None,
    max_buckets: int = 4,
    share: Share = ALONE,
) -> tuple[Path, dict[str, Any]]:
    """Extracts features of a data set's images with a network, into a file.

    `settings`: of the network, whose `data.name`, `data.root` and `data.data_dir` may
    name any data set. `workdir`: of the run that trained it; None for a published one.
    `layer`: "" is fc7, or the pyramid of a network without one. `mode`, `side`: see
    `layer_features.extract_features`. `output`: by default in the run's folder or the
    current one, named after all these. `share`: of several processes that extract.

    Returns: the file, and what it says of where its features are from; nothing in a
    process that is not the first, which does not write it.
    Raises: ValueError for a request that can't be met, a file that can't be written and
    data that was changed since the training, before any work.
    """
    settings = settings.with_absolute_paths()
    data = settings.data
    if side is None:
        side = default_side(
            mode, image_size=data.image_size, resize_side=data.resize_side
        )
    layer = layer or default_layer(network.model)
    if output is None:
        name = file_name(data, split, layer, mode, side)
        if workdir is None:
            name = name.replace("features_", f"features_{_trunk_name(settings.model)}_")
        output = (workdir or Path()) / name
    check_request(network.model, layer=layer, side=side, mode=mode)
    try:
        check_can_write(output, (".npz",))
    except OSError as error:
        raise ValueError(
            f"{error}: give --output=FILE.npz in a folder that you can write to"
        ) from error
    source = open_source(data.name, split, **data.place, multi_label=multi_label)
    if workdir is not None:
        check_data_is_unchanged(data, network.trained_on)
    numbers = row_length(network, layer=layer, side=side, mode=mode)
    check_space(output, 4 * numbers * len(source.records))
    request: dict[str, Any] = {
        "layer": layer,
        "side": side,
        "mode": mode,
        "batch_size": settings.batch_size,
        "max_buckets": max_buckets,
    }
    if share.count == 1:
        features = extract_features(network, source, **request, **data.loading)
    else:
        decided = {
            "network": network.digest,
            "data": [source.name, source.split, source.digest],
            "code": own_code(),
            **request,
        }
        rows_of = row_extractor(network, source, **request, **data.loading)
        folder = output.with_suffix(".parts") / digest_of(decided)
        found = in_parts(
            lambda part: rows_of(subset(source, part)),
            len(source.records),
            folder,
            share,
            "features",
        )
        if found is None:
            return output, {}
        features = label_rows(found[0], found[1], source)
        remove_all_but(folder)
    if not len(features.values):
        raise ValueError(
            f"split {split!r} of {source.name!r} has no image to extract features of: "
            "every image is broken"
        )
    provenance = {
        "workdir": str(workdir.absolute()) if workdir else "",
        "trunk": settings.model.backbone,
        "weights": settings.model.weights,
        "checkpoint_step": network.step,
        "trained_on": str(network.trained_on) if workdir else network.trained_on.name,
        "layer": layer,
        "mode": mode,
        "side": side,
        "data": data.name,
        "root": data.root,
        "split": split,
        "multi_label": multi_label,
        "records": len(source.records),
        "images": len(features.values),
        "broken": features.broken,
        "numbers": features.values.shape[1],
        "version": own_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": plain(settings),
    }
    save_features(output, features, provenance)
    return output, provenance


def file_name(data: ImageData, split: str, layer: str, mode: str, side: int) -> str:
    """What a file of features is called, unless the user says otherwise.

    Folders of one name in different places have files of their own.
    """
    name = data.name
    if name in FOLDERS:
        root = absolute(data.root)
        name += f"-{Path(root).name[:64]}-{digest_of({'root': root})[:8]}"
    return f"features_{name}_{split}_{layer}_{mode}_{side}.npz".replace("/", "-")


def save_features(path: Path, features: Features, provenance: dict[str, Any]) -> None:
    """Writes features and where they are from into one .npz file.

    `provenance`: plain values, for JSON. The file is there only when it is whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_arrays(
        path,
        features=features.values,
        labels=features.labels,
        indices=features.indices,
        names=np.array(features.names, str),
        class_names=np.array(features.class_names, str),
        broken=np.array(features.broken),
        provenance=np.array(json.dumps(provenance)),
    )


def load_features(path: str | Path) -> tuple[Features, dict[str, Any]]:
    """The features of a file that `save_features` wrote, and their provenance.

    Raises: ValueError for another kind of file.
    """
    try:
        with np.load(path) as arrays:
            provenance = json.loads(str(arrays["provenance"]))
            features = Features(
                values=arrays["features"],
                labels=arrays["labels"],
                indices=arrays["indices"],
                names=tuple(arrays["names"].tolist()),
                class_names=tuple(arrays["class_names"].tolist()),
                broken=int(arrays["broken"]),
            )
    except (
        AttributeError,
        EOFError,
        KeyError,
        TypeError,
        ValueError,
        zipfile.BadZipFile,
    ) as error:
        raise ValueError(
            f"{path} holds no features: give a file that python -m sppnet_jax.features "
            f"wrote ({error})"
        ) from error
    return features, provenance


def _trunk_name(model: Architecture) -> str:
    """What differs between the pyramids on a trunk: "vgg16-stride16-3.2.1-max"."""
    levels = ".".join(map(str, model.levels))
    told = (model.backbone, *model.cuts, levels, model.reducer)
    if model.weights == PRETRAINED:
        return "-".join(told)
    return "-".join((*told, digest_of({"weights": model.weights})[:8]))
