"""Runs a network that was exported as StableHLO; needs JAX and NumPy only.

    from sppnet_jax import exported

    network = exported.load("programs")
    scores = network.score(image)  # uint8 [height, width, 3], RGB, of any size
    print(network.classes[scores.argmax()])

`python -m sppnet_jax.export --format=stablehlo` writes the folder: a program for each
bucket, the weights in one safetensors file, and `model.json`. This module imports
nothing else of the project, so the file can be taken along by itself.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

FORMAT = 1  # of model.json
DESCRIPTION = "model.json"
WEIGHTS = "weights.safetensors"
_TYPES = {"F32": np.float32, "F16": np.float16, "I32": np.int32}


class Exported(NamedTuple):
    """A network that was exported.

    `classes`: their names in the order of the scores. `resize_side`: images are resized
    to this shorter side, in pixels, and squeezed to `max_aspect`. `crop_side`: of the
    centre crop of a network without a pyramid; 0 for those that see images whole.
    `programs`: by bucket, (height, width), from (weights, images uint8 [1, height,
    width, 3], sizes int32 [1, 2]) to scores float32 [1, classes]. `weights`: by name.
    `described`: all of model.json.
    """

    classes: tuple[str, ...]
    resize_side: int
    max_aspect: float
    crop_side: int
    programs: dict[tuple[int, int], Any]
    weights: dict[str, jax.Array]
    described: dict[str, Any]

    def score(self, image: np.ndarray) -> np.ndarray:
        """Softmax scores of an image, seen whole at its own aspect: float32 [classes].

        `image`: uint8 [height, width, 3], RGB. Images of other sizes are resized, each
        value to within one of 255 of what OpenCV gives the training code.

        Raises: ValueError for an array that is no such image, and for one that no
        bucket holds.
        """
        image = np.asarray(image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"image must be uint8 [height, width, 3], RGB, got {image.dtype} "
                f"{list(image.shape)}"
            )
        if 0 in image.shape:
            raise ValueError(f"the image has no pixels: shape {list(image.shape)}")
        image = _resize(image, *self._size_of(*image.shape[:2]))
        if self.crop_side:
            top, left = ((n - self.crop_side) // 2 for n in image.shape[:2])
            image = image[top : top + self.crop_side, left : left + self.crop_side]
        height, width = image.shape[:2]
        fitting = [b for b in self.programs if b[0] >= height and b[1] >= width]
        if not fitting:
            known = ", ".join(f"{b[0]}×{b[1]}" for b in self.programs)
            raise ValueError(
                f"the image, resized to {height}×{width} pixels, fits none of the "
                f"exported sizes {known}: export with larger --buckets"
            )
        bucket = min(fitting, key=lambda b: (b[0] * b[1], b))
        padded = np.zeros((1, *bucket, 3), np.uint8)
        padded[0, :height, :width] = image
        size = np.array([[height, width]], np.int32)
        return np.asarray(self.programs[bucket](self.weights, padded, size))[0]

    def _size_of(self, height: int, width: int) -> tuple[int, int]:
        side, shorter = self.resize_side, min(height, width)
        if max(height, width) > self.max_aspect * shorter:
            longer = round(side * self.max_aspect)
            return (longer, side) if height > width else (side, longer)
        rows, columns = (
            (2 * length * side + shorter) // (2 * shorter) for length in (height, width)
        )
        return rows, columns


def load(folder: str | Path) -> Exported:
    """An exported network, from its folder.

    Raises: FileNotFoundError for a folder that lacks one of its files; ValueError,
    naming the file, for one that is damaged, or that this JAX can't run.
    """
    folder = Path(folder).expanduser()
    described = _read_json(folder / DESCRIPTION)
    try:
        if described["format"] != FORMAT:
            raise ValueError(f"its format is {described['format']}, not {FORMAT}")
        buckets = [(int(height), int(width)) for height, width in described["buckets"]]
        made = Exported(
            classes=tuple(map(str, described["classes"])),
            resize_side=int(described["resize_side"]),
            max_aspect=float(described["max_aspect"]),
            crop_side=int(described["crop_side"]),
            programs={},
            weights=_read_weights(folder / WEIGHTS),
            described=described,
        )
    except (KeyError, TypeError, ValueError) as error:
        if str(folder) in str(error):
            raise
        raise ValueError(
            f"{folder / DESCRIPTION} describes no exported network ({error!r})"
        ) from error
    if not (buckets and made.classes and made.resize_side > 0):
        raise ValueError(
            f"{folder / DESCRIPTION} has no buckets, no classes or no resize_side"
        )
    for bucket in buckets:
        made.programs[bucket] = _read_program(folder / program_file(bucket), made)
    return made


def program_file(bucket: tuple[int, int]) -> str:
    """What the file of a bucket's program is called."""
    return f"{bucket[0]}x{bucket[1]}.stablehlo"


def _read_program(path: Path, network: Exported) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: the export is not whole")
    try:
        program = jax.export.deserialize(bytearray(path.read_bytes()))
        wanted = jax.tree.leaves(program.in_avals)[: len(network.weights)]
        given = jax.tree.leaves(network.weights)
    except Exception as error:  # whatever a damaged file leads to
        raise ValueError(
            f"can't read the program {path} (JAX {jax.__version__}): {error!r:.300}"
        ) from error
    if [one.shape for one in wanted] != [one.shape for one in given]:
        raise ValueError(f"the program {path} is not of the weights beside it")
    platform = jax.default_backend().replace("gpu", "cuda")
    if platform not in program.platforms:
        raise ValueError(
            f"{path} was exported for {', '.join(program.platforms)}, and JAX runs on "
            f"{platform} here: export with --platforms"
        )
    return jax.jit(program.call)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}: give a folder that python -m sppnet_jax.export "
            "--format=stablehlo has written"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds no description")
    return value


def _read_weights(path: Path) -> dict[str, jax.Array]:
    """The tensors of a safetensors file."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: the export is not whole")
    data = path.read_bytes()
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        found = {}
        for name, one in header.items():
            start, stop = (8 + length + offset for offset in one["data_offsets"])
            values = np.frombuffer(data[start:stop], _TYPES[one["dtype"]])
            found[name] = values.reshape(one["shape"])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is damaged: {error!r:.200}") from error
    return jax.device_put(found)


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Shrinks by means of areas and enlarges bilinearly, in OpenCV's arithmetic."""
    rows, columns = image.shape[:2]
    if (rows, columns) == (height, width):
        return image
    shrinks = height * width < rows * columns
    if not (shrinks and height <= rows and width <= columns):
        across = _between(image.astype(np.int64), 1, width, shrinks)
        return (_between(across, 0, height, shrinks) + 2 >> 2).astype(np.uint8)
    means = np.einsum(
        "hwc,uh,vw->uvc",
        image.astype(np.float32),
        _shares(rows, height),
        _shares(columns, width),
        optimize=True,
    )
    if (rows, columns) == (2 * height, 2 * width):  # rounds halves up
        means = np.floor(means + 0.5)
    return np.clip(np.rint(means), 0, 255).astype(np.uint8)


def _shares(size: int, new: int) -> np.ndarray:
    """What each of `size` cells is of each of `new` ones: float32 [new, size]."""
    edges, cells = np.arange(new + 1) * (size / new), np.arange(size)
    stops = np.minimum(edges[1:, None], cells + 1)
    shares = np.maximum(stops - np.maximum(edges[:-1, None], cells), 0)
    return (shares / (size / new)).astype(np.float32)


def _between(values: np.ndarray, axis: int, new: int, areas: bool) -> np.ndarray:
    """Values along an axis from their two neighbours, in whole 2048ths.

    `areas`: by how much of a new cell each covers, where the other side shrinks. Rows
    come last, and drop the bits that OpenCV drops.
    """
    size, cells = values.shape[axis], np.arange(new)
    ratio = size / new
    if areas:
        first = np.floor(cells * ratio).astype(int)
        share = (cells + 1) - (first + 1) / ratio
        share = np.where(share <= 0, 0, share - np.floor(share))
    else:
        place = ((cells + 0.5) * ratio - 0.5).astype(np.float32)
        first = np.floor(place).astype(int)
        share = place - first
    share = np.where((first < 0) | (first >= size - 1), 0, share)
    first = np.clip(first, 0, size - 1)
    parts = []
    for place, weight in ((first, 1 - share), (np.minimum(first + 1, size - 1), share)):
        whole = np.rint(weight * 2048).astype(np.int64)
        whole = whole.reshape([-1 if n == axis else 1 for n in range(3)])
        taken = values.take(place, axis)
        parts.append(taken * whole if axis else (taken >> 4) * whole >> 16)
    return parts[0] + parts[1]
