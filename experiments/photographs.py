"""Photographs of the usual size, made from the two that scikit-learn has.

They stand in for a folder of ImageNet's where speed is measured: crops of real
photographs at 500×375 pixels, as most of ImageNet's are, with the noise of a sensor.
The files have some 70 kB.
"""

import functools
from pathlib import Path

import cv2
import numpy as np
import sklearn.datasets
from tqdm import tqdm

SIZE = (375, 500)  # height, width
NOISE = 5.0  # standard deviation in grey levels
QUALITY = (90, 95)  # of the JPEGs, from the first to the second


def photograph_folder(folder: Path, *, images: int, classes: int = 4) -> Path:
    """Writes photographs into class folders, the same ones every time.

    `images`: of all classes together. A folder that is there already is kept.

    Returns: the folder, for an image_folder's root; it has no split folders.
    """
    if folder.exists():
        return folder
    for index in tqdm(range(images), desc="making photographs", disable=None):
        kind = folder / f"class{index % classes}"
        kind.mkdir(parents=True, exist_ok=True)
        (kind / f"{index:06d}.jpg").write_bytes(photograph(index))
    return folder


def photograph(seed: int) -> bytes:
    """One photograph as the bytes of a JPEG."""
    originals = _originals()
    random = np.random.default_rng(seed)
    original = originals[random.integers(len(originals))]
    height, width = SIZE
    # Never enlarged: that would blur, and blurred images are decoded sooner.
    scale = random.uniform(1, min(np.array(original.shape[:2]) / SIZE))
    rows, columns = round(height * scale), round(width * scale)
    top = random.integers(original.shape[0] - rows + 1)
    left = random.integers(original.shape[1] - columns + 1)
    part = original[top : top + rows, left : left + columns]
    if random.random() < 0.5:
        part = part[:, ::-1]
    image = cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA)
    noisy = image + random.normal(0, NOISE, image.shape)
    pixels = np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
    quality = int(random.integers(QUALITY[0], QUALITY[1] + 1))
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    return bytes(cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1])


@functools.cache
def _originals() -> list[np.ndarray]:
    """uint8 [427, 640, 3] each."""
    return sklearn.datasets.load_sample_images().images
