"""What one annotation in Pascal VOC's XML says of its image, however it is written.

VOC's boxes are 1-based pixels that include both ends; they become half-open and
0-based, (ymin - 1, xmin - 1, ymax, xmax), and lie in the image as `decode_image` shows
it.

`EVENTS` says what annotations from the wild may hold and what becomes of it, and is
counted in the notes that are logged. What changes nothing isn't: no or another
`filename`, no `size` or one that is no numbers, no or an odd `truncated` or `pose`.
XML that declares entities counts as not to be parsed, so that none can expand.
"""

import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image

from sppnet_jax.data.images import ORIENTATION, image_size

POSES = ("frontal", "rear", "left", "right", "unspecified")

# What may happen to a box or a file, as the notes say it.
EVENTS = {
    "crossing": "boxes reached past the image's border: clamped",
    "touching": (
        "boxes reached past the image's border by at most a pixel, as those of tools "
        "that count from 0 do: clamped"
    ),
    "outside": "boxes lay wholly outside the image: dropped",
    "empty": "boxes had xmin = xmax or ymin = ymax, a line or a point: dropped",
    "swapped": "boxes had xmin > xmax or ymin > ymax: put right",
    "no number": "boxes lacked a coordinate, or it was no finite number: dropped",
    "no name": "objects had no name: dropped",
    "no difficult": (
        "objects did not say, or not clearly, whether they are difficult: taken as not "
        "difficult"
    ),
    "scaled": (
        "annotations gave a size of the image's aspect but of another scale: their "
        "boxes were scaled to the image"
    ),
    "turned": (
        "annotations gave the image's size before its EXIF rotation: their boxes were "
        "turned with it"
    ),
    "transposed": (
        "annotations gave the image's width as its height and the reverse: their boxes "
        "were kept as they are"
    ),
    "other size": (
        "annotations gave a size that isn't the image's: their boxes were kept as they "
        "are"
    ),
    "no object": "images have no object left: kept, all of it background",
    "not text": "annotations held bytes that are no text: shown as \\xNN",
    "broken xml": "annotations could not be parsed: their images were left out",
    "broken image": "images could not be opened: left out",
}

# Sizes so close are roundings of one another, and no other scale.
_SAME_SIZE_PIXELS = 2
_SAME_ASPECT = 0.01


class AnnotatedObject(NamedTuple):
    """One object of an image."""

    name: str  # of its class
    box: tuple[float, float, float, float]  # half-open, 0-based pixels, in the image
    pose: str  # one of `POSES`
    is_truncated: bool
    is_difficult: bool


class AnnotatedImage(NamedTuple):
    """What is known of an image."""

    size: tuple[int, int]  # (height, width) in pixels
    objects: tuple[AnnotatedObject, ...]


def read_image(
    image: Path, annotation: Path
) -> tuple[AnnotatedImage | None, list[str]]:
    """Reads an image file's size, and from its annotation file the objects in it.

    Returns: the image, or None if it is left out; and what happened on the way, as keys
    of `EVENTS`, one for each box, object or file.
    """
    encoded = image.read_bytes()
    try:
        size = image_size(encoded)
    except ValueError:
        return None, ["broken image"]
    try:
        root, events = _parse(annotation.read_bytes())
    except (ElementTree.ParseError, ValueError, LookupError):
        return None, ["broken xml"]
    change, size_event = _change_of_size(root.find("size"), size, encoded)
    found: list[str] = []
    read = (_read_object(one, change, size, found) for one in root.iter("object"))
    objects = tuple(one for one in read if one)
    # Without a box, a size that differs changes nothing.
    events += [size_event] if size_event and objects else []
    events += found + ([] if objects else ["no object"])
    return AnnotatedImage(size, objects), events


def clamp_boxes(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Boxes [N, 4] cut off at the border of an image (height, width): empty outside."""
    return np.clip(boxes, 0, [*size, *size])


def _parse(data: bytes) -> tuple[ElementTree.Element, list[str]]:
    """The root of an annotation, tags in lower case without namespaces; events.

    Raises: ParseError, ValueError or LookupError for one that can't be parsed.
    """
    data = data.lstrip()
    events = []
    # Entities could expand without end; expat of 2.4 or later bounds it on its own.
    if b"<!ENTITY" in data:
        raise ValueError("it declares entities")
    try:
        root = ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError):
        # expat knows few encodings, and some tools write text in others undeclared.
        declared = re.match(rb"<\?xml[^>]*encoding=[\"']([\w.-]+)", data)
        encoding = declared[1].decode() if declared else "utf-8"
        text = data.decode(encoding, "backslashreplace")
        if text.encode(encoding, "replace") != data:
            events.append("not text")
        root = ElementTree.fromstring(text)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2].lower()
    if root.tag != "annotation":
        raise ValueError(f"its root is <{root.tag}>, not <annotation>")
    return root, events


# How a box as annotated becomes one in the image as it is shown.
_Change = Callable[[np.ndarray], np.ndarray]


def _change_of_size(
    element: ElementTree.Element | None, size: tuple[int, int], encoded: bytes
) -> tuple[_Change, str]:
    """What an annotation's `size` says on its boxes, and the event that it is."""
    height, width = size
    sides = [_number(element, side) for side in ("height", "width")]
    if sides[0] is None or sides[1] is None or min(sides[0], sides[1]) <= 0:
        return _unchanged, ""
    given = (sides[0], sides[1])
    if given == size:
        return _unchanged, ""
    if given == (width, height):
        orientation = _orientation(encoded)
        if orientation in (5, 6, 7, 8):
            return lambda box: _turn(box, orientation, given), "turned"
        return _unchanged, "transposed"
    scale = (height / given[0], width / given[1])
    close = max(abs(height - given[0]), abs(width - given[1])) <= _SAME_SIZE_PIXELS
    if not close and abs(scale[0] / scale[1] - 1) <= _SAME_ASPECT:
        return lambda box: box * [*scale, *scale], "scaled"
    return _unchanged, "other size"


def _unchanged(box: np.ndarray) -> np.ndarray:
    return box


def _turn(box: np.ndarray, orientation: int, frame: tuple[float, float]) -> np.ndarray:
    """A box in a frame (height, width) that EXIF's orientation 5 to 8 turns."""
    height, width = frame
    ymin, xmin, ymax, xmax = box
    # All exchange the axes, and mirror none, one or both of them.
    if orientation in (6, 7):
        ymin, ymax = height - ymax, height - ymin
    if orientation in (7, 8):
        xmin, xmax = width - xmax, width - xmin
    return np.array([xmin, ymin, xmax, ymax])


def _orientation(encoded: bytes) -> int:
    try:
        with PIL.Image.open(io.BytesIO(encoded)) as image:
            return int(image.getexif().get(ORIENTATION, 1))
    except Exception:
        # Pillow raises errors of many types for odd files; it is no reason to fail.
        return 1


def _read_object(
    element: ElementTree.Element,
    change: _Change,
    size: tuple[int, int],
    events: list[str],
) -> AnnotatedObject | None:
    name = " ".join((element.findtext("name") or "").split())
    if not name:
        events.append("no name")
        return None
    box = _read_box(element.find("bndbox"), change, size, events)
    if box is None:
        return None
    difficult = _truth(element.findtext("difficult"))
    if difficult is None:
        events.append("no difficult")
    pose = (element.findtext("pose") or "").strip().lower()
    return AnnotatedObject(
        name,
        box,
        pose if pose in POSES else "unspecified",
        bool(_truth(element.findtext("truncated"))),
        bool(difficult),
    )


def _read_box(
    element: ElementTree.Element | None,
    change: _Change,
    size: tuple[int, int],
    events: list[str],
) -> tuple[float, float, float, float] | None:
    sides = [_number(element, side) for side in ("ymin", "xmin", "ymax", "xmax")]
    given = np.array(sides, float)
    first, last = np.minimum(given[:2], given[2:]), np.maximum(given[:2], given[2:])
    box = change(np.concatenate([first - 1, last]))
    clamped = clamp_boxes(box, size)
    dropped = (
        (not np.isfinite(given).all(), "no number"),
        ((first == last).any(), "empty"),
        (not (clamped[:2] < clamped[2:]).all(), "outside"),
    )
    for happened, event in dropped:
        if happened:
            events.append(event)
            return None
    if (first != given[:2]).any():
        events.append("swapped")
    over = np.abs(box - clamped).max()
    if over > 0:
        # Turning and scaling may leave rounding errors.
        events.append("touching" if over <= 1 + 1e-6 else "crossing")
    ymin, xmin, ymax, xmax = clamped.tolist()
    return ymin, xmin, ymax, xmax


def _number(element: ElementTree.Element | None, tag: str) -> float | None:
    try:
        return float((element.findtext(tag) or "") if element is not None else "")
    except ValueError:
        return None


def _truth(text: str | None) -> bool | None:
    word = (text or "").strip().lower()
    true, false = word in ("1", "true", "yes"), word in ("0", "false", "no")
    return true if true or false else None
