"""A trained network as one value: `load_network` reads it from the folder of its run.

Commands, detectors, experiments and notebooks all start from it.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sppnet_jax.network.model import Architecture, SPPNet, make_model, param_shapes
from sppnet_jax.network.preprocess import Inputs, Preprocessing, make_preprocessing
from sppnet_jax.pyramid.geometry import Geometry
from sppnet_jax.run import run_folder
from sppnet_jax.run.settings import read


@dataclasses.dataclass(frozen=True)
class Network:
    """A trained network, and all that it takes to use it.

    `model`, `params`: `model.apply({"params": params}, inputs)`. `preprocessing`: makes
    the inputs of uint8 RGB images, see `preprocess.normalize`. `class_names`: in the
    order of the logits. `geometry`: of the map below the pyramid.
    `resize_side`: images' shorter side in pixels, before crops of `model.image_size`.
    `step`: of the checkpoint. `trained_on`: the data. `settings`: all others, by name,
    as in the run's config.json.
    """

    model: SPPNet
    params: Any
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    geometry: Geometry
    resize_side: int
    step: int
    trained_on: run_folder.TrainingData
    settings: Mapping[str, Any]

    @functools.cached_property
    def digest(self) -> str:
        """A name for all that its activations depend on, 16 hexadecimal digits."""
        inputs = [self.preprocessing.mean, np.asarray(self.preprocessing.scale)]
        model = {
            "model": self.settings["model"],
            "image_size": self.model.image_size,
            "weights": digest_arrays(jax.tree.leaves(self.params)),
            "inputs": digest_arrays(inputs),
        }
        text = json.dumps(model, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @functools.cached_property
    def trunk_digest(self) -> str:
        """A name for all that its map depends on, whatever is made of the map."""
        convs = {k: v for k, v in self.params.items() if k.startswith("conv")}
        inputs = [self.preprocessing.mean, np.asarray(self.preprocessing.scale)]
        trunk = {
            "table": str(self.model.table),
            "cuts": self.model.cuts,
            "dtype": str(np.dtype(self.model.dtype)),
            "weights": digest_arrays(jax.tree.leaves(convs)),
            "inputs": digest_arrays(inputs),
        }
        text = json.dumps(trunk, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_network(
    workdir: str | Path,
    settings: Mapping[str, Any] | None = None,
    *,
    check_shapes: bool = True,
) -> Network:
    """The network of a run's newest checkpoint.

    `workdir`: the folder that `python -m sppnet_jax.train` wrote.
    `settings`: of the run, some of them changed; by default those it was trained with.
    `check_shapes`: whether the parameters are those of the settings; it takes tracing.

    Raises: FileNotFoundError for a folder without a trained network; ValueError where
    the settings describe another network than the checkpoint holds.
    """
    # Here, not above: settings name networks, and have no need of checkpoints.
    from sppnet_jax.run.checkpoints import Checkpoints

    workdir = Path(workdir).expanduser()
    settings = settings or run_folder.load_config(workdir)
    if "proposals" in settings:
        raise ValueError(
            f"{workdir} holds a detector: its network is in {workdir / 'network'}"
        )
    if not run_folder.has_checkpoint(workdir):
        raise FileNotFoundError(f"{workdir} has no checkpoint yet: train first")
    trained_on = run_folder.load_training_data(workdir)
    data = settings["data"]
    architecture = read(Architecture, settings["model"], "config.model")
    classes = max(1, len(trained_on.class_names))  # a trunk may have no head
    model = make_model(architecture, classes, data["image_size"])
    with Checkpoints(workdir / run_folder.CHECKPOINTS) as checkpoints:
        shapes = param_shapes(model) if check_shapes else None
        params = checkpoints.restore_params(shapes)
        step = checkpoints.step
    assert step is not None
    inputs = read(Inputs, settings["inputs"], "config.inputs")
    return Network(
        model=model,
        params=params,
        preprocessing=make_preprocessing(
            inputs, run_folder.load_statistics(workdir), architecture.published
        ),
        class_names=trained_on.class_names,
        geometry=model.geometry,
        resize_side=data["resize_side"],
        step=step,
        trained_on=trained_on,
        settings=settings,
    )


def as_network(
    model: SPPNet,
    params: Any,
    preprocessing: Preprocessing,
    class_names: Sequence[str] = (),
) -> Network:
    """A network that is at hand, however it was made, as one value.

    `class_names`: by default the numbers of the classes.
    """
    names = tuple(class_names) or tuple(map(str, range(model.num_classes)))
    described = {
        name: str(getattr(model, name)) for name in ("backbone", "levels", "dtype")
    }
    return Network(
        model=model,
        params=params,
        preprocessing=preprocessing,
        class_names=names,
        geometry=model.geometry,
        resize_side=model.image_size,
        step=0,
        trained_on=run_folder.TrainingData("", "", "", 0, names),
        settings={"model": described},
    )


def digest_arrays(arrays: Iterable[Any]) -> str:
    """A name for arrays of numbers, the same for the same shapes, types and values."""
    digest = hashlib.sha256()
    for array in arrays:
        values = np.ascontiguousarray(array)
        digest.update(f"{values.shape}{values.dtype}".encode() + values.tobytes())
    return digest.hexdigest()[:16]
