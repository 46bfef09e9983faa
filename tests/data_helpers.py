"""Small images, folders and sources for the tests of the data package."""

from pathlib import Path

import cv2
import numpy as np

from sppnet_jax.data.sources import Source


def picture(height: int = 24, width: int = 32, seed: int = 0) -> np.ndarray:
    """A smooth random image, uint8 [height, width, 3], RGB."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


def encode(image: np.ndarray, suffix: str = ".png") -> bytes:
    """Encodes an RGB image with OpenCV."""
    return cv2.imencode(suffix, image[..., ::-1])[1].tobytes()


def write_images(root: Path, *paths: str) -> None:
    """Writes a different small picture to each path below the root."""
    for seed, path in enumerate(paths):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(encode(picture(seed=seed), Path(path).suffix))


def write_class_folders(root: Path, count: int, classes: str = "cat dog") -> None:
    """Writes `count` pictures into each class folder."""
    write_images(
        root, *(f"{name}/{i:02d}.png" for name in classes.split() for i in range(count))
    )


def make_source(
    count: int, broken: tuple[int, ...] = (), labels: tuple[int, ...] | None = None
) -> Source:
    """A source in memory; record i is of class i % 3, image size varies."""
    records = []
    for i in range(count):
        image = encode(picture(20 + i % 5, 24 + i % 7, seed=i))
        if i in broken:
            image = image[: len(image) // 2]
        label = labels[i] if labels else i % 3
        records.append({"image": image, "label": label, "name": f"picture_{i}.png"})
    return Source(records, ("red", "green", "blue"), "memory", "train")
