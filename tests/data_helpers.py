"""Small images, folders and sources for the tests of the data package."""

from collections.abc import Mapping, Sequence
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


def write_two_colors(root: Path, height: int, width: int) -> None:
    """Pictures of classes a and b, which differ in colour; 16 to train, 8 to test."""
    for split, count in (("train", 8), ("test", 4)):
        for label in range(2):
            for number in range(count):
                path = root / split / "ab"[label] / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                image = picture(height, width, seed=97 * number + label) // 2
                image[..., label] += 100
                path.write_bytes(encode(image))


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two half-open boxes, from its definition."""
    a, b = [float(side) for side in one], [float(side) for side in other]
    height, width = (min(a[k + 2], b[k + 2]) - max(a[k], b[k]) for k in (0, 1))
    shared = max(height, 0.0) * max(width, 0.0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return shared / (sum(areas) - shared)


def exchange(one: Path, other: Path) -> None:
    """Exchanges the contents of two files, or two folders."""
    between = one.with_name("between")
    one.rename(between)
    other.rename(one)
    between.rename(other)


def make_source(
    sizes: int | Sequence[tuple[int, int]],
    broken: tuple[int, ...] = (),
    labels: tuple[int, ...] | None = None,
) -> Source:
    """A source in memory; record i is of class i % 3. `sizes`: or how many of any."""
    records = []
    if isinstance(sizes, int):
        sizes = [(20 + i % 5, 24 + i % 7) for i in range(sizes)]
    for i, size in enumerate(sizes):
        image = encode(picture(*size, seed=i))
        if i in broken:
            image = image[: len(image) // 2]
        label = labels[i] if labels else i % 3
        records.append({"image": image, "label": label, "name": f"picture_{i}.png"})
    return Source(records, ("red", "green", "blue"), "memory", "train")


def voc_object(
    box: Sequence[object] = (5, 3, 14, 9), name: str = "cat", **tags: str | None
) -> str:
    """The XML of an object; `box` is VOC's xmin, ymin, xmax, ymax, None to leave out.

    `tags`: the text of pose, truncated, difficult or any other tag; None leaves it out.
    """
    texts = {"pose": "Left", "truncated": "1", "difficult": "0"} | tags
    sides = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    coordinates = "".join(f"<{k}>{v}</{k}>" for k, v in sides if v is not None)
    named = f"<name>{name}</name>" if name else ""
    rest = "".join(f"<{k}>{v}</{k}>" for k, v in texts.items() if v is not None)
    return f"<object>{named}{rest}<bndbox>{coordinates}</bndbox></object>"


def voc_xml(*objects: str, size: tuple[object, object] | None = (24, 32)) -> str:
    """The XML of an image, with its (height, width) unless it is None."""
    told = ""
    if size:
        told = f"<size><width>{size[1]}</width><height>{size[0]}</height></size>"
    return (
        f"<annotation><filename>x.jpg</filename>{told}{''.join(objects)}</annotation>"
    )


def write_voc_folder(
    root: Path,
    annotations: Mapping[str, str | bytes | None],
    lists: Mapping[str, str | bytes] | None = None,
    *,
    size: tuple[int, int] = (24, 32),
    suffix: str = ".png",
) -> Path:
    """Writes a folder in Pascal VOC layout with a different picture for each id.

    `annotations`: for each id the text of its XML, or None for an image without.
    `lists`: the texts of the lists in ImageSets/Main, by their file names.

    Returns: the root.
    """
    for folder in ("JPEGImages", "Annotations"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for seed, (key, xml) in enumerate(annotations.items()):
        image = encode(picture(*size, seed=seed), suffix)
        (root / f"JPEGImages/{key}{suffix}").write_bytes(image)
        if xml is not None:
            data = xml if isinstance(xml, bytes) else xml.encode()
            (root / f"Annotations/{key}.xml").write_bytes(data)
    for name, text in (lists or {}).items():
        path = root / "ImageSets/Main" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return root
