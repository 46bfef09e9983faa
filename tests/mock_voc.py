"""A tiny stand-in for TFDS's own `voc`, prepared without TensorFlow."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from data_helpers import encode, picture

CLASSES = ("aeroplane", "bicycle", "bird")
SIZES = ((24, 32), (33, 47), (21, 30), (25, 19), (24, 32), (24, 32), (24, 32))
# Each image's objects, as in VOC's XML: class, (xmin, ymin, xmax, ymax), difficult.
OBJECTS: tuple[tuple[tuple[int, tuple[float, ...], bool], ...], ...] = (
    ((0, (1, 1, 32, 24), False),),
    ((2, (7, 11, 41, 13), True), (0, (47, 1, 47, 33), False), (2, (3, 3, 5, 5), False)),
    ((1, (2.3, 4.7, 29.5, 20.25), True),),
    ((1, (19, 25, 19, 25), False),),
    ((0, (1, 1, 9, 9), False), (2, (3, 4, 5, 6), True)),
    ((1, (1, 1, 9, 9), True), (1, (3, 4, 5, 6), False), (0, (1, 1, 9, 9), True)),
    (),
)


class MockVoc(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Its features and values, VOC's pixels over the size; of `test` none is public."""

    name = "voc"
    VERSION = tfds.core.Version("5.0.0")
    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name="2007", version=VERSION)]
    code_path = None
    left_out: tuple[str, ...] = ()

    def _info(self) -> tfds.core.DatasetInfo:
        label = tfds.features.ClassLabel(names=CLASSES)
        poses = ("frontal", "rear", "left", "right", "unspecified")
        one = {
            "label": label,
            "bbox": tfds.features.BBoxFeature(),
            "pose": tfds.features.ClassLabel(names=poses),
            "is_truncated": np.bool_,
            "is_difficult": np.bool_,
        }
        features = {
            "image": tfds.features.Image(),
            "image/filename": tfds.features.Text(),
            "objects": tfds.features.Sequence(self._kept(one)),
            "labels": tfds.features.Sequence(label),
            "labels_no_difficult": tfds.features.Sequence(label),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(self._kept(features))
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, ((height, width), objects) in enumerate(
            zip(SIZES, OBJECTS, strict=True)
        ):
            objects = () if split == "test" else objects
            one = [
                {
                    "label": label,
                    "bbox": tfds.features.BBox(
                        ymin / height, xmin / width, ymax / height, xmax / width
                    ),
                    "pose": "unspecified",
                    "is_truncated": False,
                    "is_difficult": difficult,
                }
                for label, (xmin, ymin, xmax, ymax), difficult in objects
            ]
            certain = {label for label, _, difficult in objects if not difficult}
            image = encode(picture(height, width, seed=number), ".jpg")
            example = {
                "image": io.BytesIO(image),
                "image/filename": f"00000{number}.jpg",
                "objects": [self._kept(values) for values in one],
                "labels": sorted({label for label, _, _ in objects}),
                "labels_no_difficult": sorted(certain),
            }
            yield number, self._kept(example)

    def _kept(self, items: dict[str, Any]) -> dict[str, Any]:
        return {key: item for key, item in items.items() if key not in self.left_out}


class OtherBoxes(MockVoc, skip_registration=True):
    """The same features under another name, whose boxes are half-open."""

    name = "other_boxes"
    BUILDER_CONFIGS: ClassVar = []


def prepare_mock_voc(
    data_dir: Path, *left_out: str, builder_class: type[MockVoc] = MockVoc
) -> Path:
    """Writes it as ArrayRecord, without some features; returns its folder."""
    MockVoc.left_out = left_out
    builder = builder_class(data_dir=str(data_dir))
    builder.download_and_prepare(file_format="array_record")
    return Path(builder.data_path)
