"""Digit scenes: real handwritten digits on crops of real photographs, embedded.

The 1,797 digits and the two photographs ship with scikit-learn, so this TFDS data set
is made in seconds with no network and no TensorFlow. Image sizes and aspect ratios
vary, as SPP-net expects: shorter side 48–112 pixels, aspect ratio 1:2–2:1.
"""

import io
from collections.abc import Iterator
from typing import Any, ClassVar

import cv2
import numpy as np
import tensorflow_datasets as tfds

from sppnet_jax.data.voc_annotations import POSES

CLASS_NAMES = tuple("0123456789")
SHORTER_SIDE = (48, 112)
# The side of the paper's centre view, 224 of 256 pixels, relative to the shorter side.
CENTRE_VIEW = 7 / 8

_SEED = 20140618
_TEST_FRACTION = 0.2
_SCENES_PER_DIGIT = {"train": 8, "test": 3}
_DETECTION_SCENES = {"train": 1500, "test": 400}
_LEAST_CONTRAST = 80.0
_JPEG_QUALITY = 95


class DigitScenes(tfds.core.GeneratorBasedBuilder):
    """TFDS builder `digit_scenes`, with configs `classification` and `detection`.

    `classification`: one digit an image, 0.5–0.85 of the shorter side long, wholly
    inside the paper's centre view, of 7/8 of the shorter side.
    `detection`: one to six digits anywhere wholly inside the image, with the feature
    names of TFDS's `voc`; a box is the tight box of visible ink.
    Train and test share no digit image. Every scene is a function of the version, the
    config, the split and its number.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First version."}
    BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = [
        tfds.core.BuilderConfig(name="classification", description="One digit."),
        tfds.core.BuilderConfig(name="detection", description="One to six digits."),
    ]
    # Nothing is downloaded: without a path, TFDS doesn't look for checksums beside it.
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        label = tfds.features.ClassLabel(names=CLASS_NAMES)
        image = tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
        features: dict[str, Any] = {
            "image": image,
            "label": label,
            "digit_index": tfds.features.Scalar(np.int32),
        }
        detection = self.builder_config.name == "detection"
        if detection:  # as in TFDS's voc
            one = {
                "label": label,
                "bbox": tfds.features.BBoxFeature(),
                "pose": tfds.features.ClassLabel(names=POSES),
                "is_truncated": np.bool_,
                "is_difficult": np.bool_,
            }
            features = {
                "image": image,
                "image/filename": tfds.features.Text(),
                "objects": tfds.features.Sequence(one),
                "labels": tfds.features.Sequence(label),
                "labels_no_difficult": tfds.features.Sequence(label),
            }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits on crops of photographs.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=None if detection else ("image", "label"),
            homepage="https://scikit-learn.org/stable/datasets/toy_dataset.html",
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        if self.builder_config.name == "detection":
            return _detection_examples(split)
        return _classification_examples(split)


def digit_split(split: str) -> np.ndarray:
    """Which of scikit-learn's digits make up a split: int [N], ascending.

    One fifth of each class is in "test", the rest in "train".
    """
    from sklearn.datasets import load_digits  # takes a while, and only to prepare

    labels = load_digits().target
    rng = np.random.default_rng(_SEED)
    chosen = []
    for label in range(len(CLASS_NAMES)):
        members = rng.permutation(np.flatnonzero(labels == label))
        num_test = round(len(members) * _TEST_FRACTION)
        chosen.append(members[:num_test] if split == "test" else members[num_test:])
    return np.sort(np.concatenate(chosen))


def _load_materials() -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Digits, float [N, 8, 8] in [0, 1], their labels, and photographs, uint8 RGB."""
    from sklearn.datasets import load_digits, load_sample_images

    digits = load_digits()
    return digits.images / 16.0, digits.target, load_sample_images().images


def _classification_examples(split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    digits, digit_labels, photographs = _load_materials()
    scenes = np.repeat(digit_split(split), _SCENES_PER_DIGIT[split])
    for number, index in enumerate(scenes):
        rng = _scene_rng("classification", split, number)
        canvas = _background(photographs, rng)
        height, width = canvas.shape[:2]
        shorter = min(height, width)
        ink = _digit_mask(digits[index], rng.uniform(0.5, 0.85) * shorter)
        view = int(CENTRE_VIEW * shorter)
        top = (height - view) // 2 + rng.integers(view - ink.shape[0] + 1)
        left = (width - view) // 2 + rng.integers(view - ink.shape[1] + 1)
        _paint(canvas, ink, int(top), int(left), rng)
        example = {
            "image": _encode(canvas),
            "label": int(digit_labels[index]),
            "digit_index": int(index),
        }
        yield number, example


def _detection_examples(split: str) -> Iterator[tuple[int, dict[str, Any]]]:
    digits, digit_labels, photographs = _load_materials()
    candidates = digit_split(split)
    for number in range(_DETECTION_SCENES[split]):
        rng = _scene_rng("detection", split, number)
        canvas = _background(photographs, rng)
        height, width = canvas.shape[:2]
        indices, boxes = [], np.zeros((0, 4))
        for index in rng.choice(candidates, size=rng.integers(1, 7), replace=False):
            if found := _free_place(digits[index], boxes, canvas.shape, rng):
                ink, place = found
                _paint(canvas, ink, int(place[0]), int(place[1]), rng)
                boxes = np.concatenate([boxes, place[None]])
                indices.append(int(index))
        labels = [int(digit_labels[index]) for index in indices]
        # The name says which digits are in the scene, so it can be traced to them.
        traced = "-".join(str(index) for index in indices)
        fractions = boxes / [height, width, height, width]
        objects = [
            {
                "label": label,
                "bbox": tfds.features.BBox(*box),
                "pose": "unspecified",
                "is_truncated": False,
                "is_difficult": False,
            }
            for label, box in zip(labels, fractions, strict=True)
        ]
        example = {
            "image": _encode(canvas),
            "image/filename": f"{split}_{number:05d}_digits_{traced}.jpg",
            "objects": objects,
            "labels": sorted(set(labels)),
            "labels_no_difficult": sorted(set(labels)),
        }
        yield number, example


def _scene_rng(config: str, split: str, number: int) -> np.random.Generator:
    configs, splits = ("classification", "detection"), ("train", "test")
    return np.random.default_rng(
        (_SEED, configs.index(config), splits.index(split), number)
    )


def _background(photographs: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """A randomly zoomed crop of a photograph, uint8 [H, W, 3]."""
    shorter = int(rng.integers(*SHORTER_SIDE, endpoint=True))
    aspect = np.exp(rng.uniform(-np.log(2), np.log(2)))
    longer = min(round(shorter * max(aspect, 1 / aspect)), 2 * shorter)
    height, width = (shorter, longer) if aspect > 1 else (longer, shorter)
    photograph = photographs[rng.integers(len(photographs))]
    # A zoom of 1 takes photograph pixels as they are; less shows more of the scene.
    smallest = max(height / photograph.shape[0], width / photograph.shape[1])
    zoom = np.exp(rng.uniform(np.log(max(smallest, 0.4)), np.log(2)))
    rows = min(round(height / zoom), photograph.shape[0])
    columns = min(round(width / zoom), photograph.shape[1])
    top = rng.integers(photograph.shape[0] - rows + 1)
    left = rng.integers(photograph.shape[1] - columns + 1)
    patch = photograph[top : top + rows, left : left + columns]
    interpolation = cv2.INTER_AREA if zoom < 1 else cv2.INTER_LINEAR
    return cv2.resize(patch, (width, height), interpolation=interpolation)


def _digit_mask(digit: np.ndarray, length: float) -> np.ndarray:
    """The alpha mask of a digit, cut to its ink: float32 [h, w], max(h, w) = length."""
    padded = np.pad(digit, 1).astype(np.float32)
    enlarged = cv2.resize(padded, (160, 160), interpolation=cv2.INTER_CUBIC)
    # A steep ramp makes pen strokes of the 8×8 blur.
    alpha = np.clip((enlarged - 0.3) / 0.3, 0.0, 1.0)
    rows = np.flatnonzero((alpha > 0.5).any(axis=1))
    columns = np.flatnonzero((alpha > 0.5).any(axis=0))
    alpha = alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = int(length) / max(alpha.shape)
    size = [max(1, round(side * scale)) for side in alpha.shape]
    return cv2.resize(alpha, (size[1], size[0]), interpolation=cv2.INTER_AREA)


def _paint(
    canvas: np.ndarray, ink: np.ndarray, top: int, left: int, rng: np.random.Generator
) -> None:
    """Paints a mask onto the canvas in a colour that stands out from what is there."""
    place = canvas[top : top + ink.shape[0], left : left + ink.shape[1]]
    under = np.average(place.reshape(-1, 3), axis=0, weights=ink.ravel())
    colour = _standing_out(under, rng)
    alpha = ink[:, :, None]
    place[:] = np.rint(alpha * colour + (1 - alpha) * place).astype(np.uint8)


def _standing_out(under: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    luma = np.array([0.299, 0.587, 0.114])
    for _ in range(20):
        colour = rng.uniform(0, 255, size=3)
        if abs(luma @ (colour - under)) >= _LEAST_CONTRAST:
            return colour
    return np.full(3, 0.0 if luma @ under > 127.5 else 255.0)


def _free_place(
    digit: np.ndarray,
    boxes: np.ndarray,
    canvas_shape: tuple[int, ...],
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Finds a mask and a box for a digit that hardly overlaps the boxes so far."""
    height, width = canvas_shape[:2]
    for _ in range(20):
        ink = _digit_mask(digit, rng.uniform(0.25, 0.6) * min(height, width))
        top = rng.integers(height - ink.shape[0] + 1)
        left = rng.integers(width - ink.shape[1] + 1)
        place = np.array([top, left, top + ink.shape[0], left + ink.shape[1]])
        if _covered(place, boxes) <= 0.1:
            return ink, place.astype(np.float64)
    return None


def _covered(place: np.ndarray, boxes: np.ndarray) -> float:
    """The largest intersection with a box, relative to the smaller of both."""
    if not len(boxes):
        return 0.0
    overlap = np.minimum(place[2:], boxes[:, 2:]) - np.maximum(place[:2], boxes[:, :2])
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    smaller = np.minimum(areas, np.prod(place[2:] - place[:2]))
    return float((np.prod(np.maximum(overlap, 0), axis=1) / smaller).max())


def _encode(image: np.ndarray) -> io.BytesIO:
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    return io.BytesIO(encoded.tobytes())
