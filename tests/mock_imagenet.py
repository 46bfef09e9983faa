"""A tiny stand-in for the real ImageNet 2012, prepared without TensorFlow."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds

LABELS_FILE = "datasets/imagenet2012/labels.txt"


def prepare_mock_imagenet(
    data_dir: str, num_train: int = 32, num_validation: int = 12
) -> Path:
    """Writes an ArrayRecord data set that opens as TFDS's own `imagenet2012` does.

    Record i is a JPEG of random size in a colour that follows from its label, with
    label i * 37 % 1000 and one of the 1,000 real class names.

    Returns:
        The prepared folder, data_dir/imagenet2012/5.1.0.
    """
    builder = _MockImagenet(data_dir=data_dir)
    builder.sizes = {"train": num_train, "validation": num_validation}
    builder.download_and_prepare(file_format="array_record")
    return Path(builder.data_path)


class _MockImagenet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    name = "imagenet2012"
    VERSION = tfds.core.Version("5.1.0")
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        labels = tfds.features.ClassLabel(names_file=tfds.core.tfds_path(LABELS_FILE))
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "label": labels,
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        return {split: self._generate_examples(split) for split in self.sizes}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for number in range(self.sizes[split]):
            label = number * 37 % 1000
            rng = np.random.default_rng((number, len(split)))
            height, width = rng.integers(60, 120, size=2)
            colour = np.random.default_rng(label).integers(40, 216, size=3)
            noise = rng.normal(0, 20, size=(height, width, 3))
            image = np.clip(colour + noise, 0, 255).astype(np.uint8)
            encoded = io.BytesIO(cv2.imencode(".jpg", image)[1].tobytes())
            name = f"{self.info.features['label'].int2str(label)}_{number}.JPEG"
            yield number, {"image": encoded, "label": label, "file_name": name}
