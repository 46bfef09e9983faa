"""What one annotation in Pascal VOC's XML says of its image, however it is written.

VOC's boxes are 1-based pixels that include both ends; they become half-open and
0-based, (ymin - 1, xmin - 1, ymax, xmax).

`EVENTS` says what annotations from the wild may hold and what becomes of it, and is
counted in the notes that are logged. What changes nothing isn't: no or another
`filename`, no `size` or one that is no numbers, no or an odd `truncated` or `pose`.
XML that declares entities counts as not to be parsed, so that none can expand.
"""

import contextlib
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from sppnet_jax.data import annotations
from sppnet_jax.data.annotations import (
    AnnotatedImage,
    AnnotatedObject,
    Change,
    change_of_size,
    fit_box,
    number,
    truth,
)
from sppnet_jax.data.folders import (
    BLANK,
    printable,
    read_file,
    read_image_file,
    text_of,
)
from sppnet_jax.data.images import image_size

POSES = ("frontal", "rear", "left", "right", "unspecified")

EVENTS = annotations.EVENTS | {
    "touching": (
        "boxes reached past the image's border by at most a pixel, as those of tools "
        "that count from 0 do: clamped"
    ),
    "other encoding": (
        "annotations declared an encoding that isn't theirs: read by their bytes"
    ),
    "not text": "annotations held bytes that are no text: shown as \\xNN",
    "broken xml": "annotations could not be parsed: their images were left out",
}


def read_image(
    image: Path, annotation: Path
) -> tuple[AnnotatedImage | None, list[str]]:
    """Reads an image file's size, and from its annotation file the objects in it.

    Returns: the image, or None if it is left out; and what happened on the way, as keys
    of `EVENTS`, one for each box, object or file.
    """
    encoded = read_image_file(image)
    try:
        size = image_size(encoded)
    except ValueError:
        return None, ["broken image"]
    try:
        root, events = _parse(read_file(annotation))
    except (ElementTree.ParseError, ValueError, OSError):
        return None, ["broken xml"]
    told = _number(root.find("size"), "height"), _number(root.find("size"), "width")
    change, size_event = change_of_size(told, size, encoded)
    found: list[str] = []
    read = (_read_object(one, change, size, found) for one in root.iter("object"))
    objects = tuple(one for one in read if one)
    # Without a box, a size that differs changes nothing.
    events += [size_event] if size_event and objects else []
    events += found + ([] if objects else ["no object"])
    return AnnotatedImage(size, objects), events


def _parse(data: bytes) -> tuple[ElementTree.Element, list[str]]:
    """The root of an annotation, tags in lower case without namespaces; events.

    Raises: ParseError or ValueError for one that can't be parsed.
    """
    text, events = _decode(data)
    # Entities could expand without end; expat of 2.4 or later bounds it on its own.
    if "<!ENTITY" in text:
        raise ValueError("it declares entities")
    root = ElementTree.fromstring(text)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2].lower()
    if root.tag != "annotation":
        raise ValueError(f"its root is <{root.tag}>, not <annotation>")
    return root, events


def _decode(data: bytes) -> tuple[str, list[str]]:
    """An annotation's text without its declaration, which may be wrong; events.

    What its bytes are by themselves, UTF-8 or UTF-16, counts before what is declared.
    """
    text, declared, events = text_of(data).strip(BLANK), "", []
    encoding = re.match(r"<\?xml\b[^>]*\bencoding\s*=\s*[\"']([^\"']*)", text)
    if encoding:
        with contextlib.suppress(LookupError, ValueError):
            declared = data.decode(encoding[1]).strip(BLANK)
    if not re.search("[\ud800-\udfff]", text):
        events += ["other encoding"] * (encoding is not None and declared != text)
    elif declared:
        text = declared
    else:
        events.append("not text")
        text = printable(text)
    return re.sub(r"^<\?xml\b[^>]*>", "", text), events


def _read_object(
    element: ElementTree.Element,
    change: Change | None,
    size: tuple[int, int],
    events: list[str],
) -> AnnotatedObject | None:
    name = printable(" ".join((element.findtext("name") or "").split()))
    if not name:
        events.append("no name")
        return None
    corners = element.find("bndbox")
    sides = [_number(corners, side) for side in ("ymin", "xmin", "ymax", "xmax")]
    box = fit_box(sides, size, events, change, origin=1)
    if box is None:
        return None
    difficult = truth(element.findtext("difficult"))
    if difficult is None:
        events.append("no difficult")
    pose = (element.findtext("pose") or "").strip().lower()
    return AnnotatedObject(
        name,
        box,
        pose if pose in POSES else "unspecified",
        bool(truth(element.findtext("truncated"))),
        bool(difficult),
    )


def _number(element: ElementTree.Element | None, tag: str) -> float | None:
    return number(element.findtext(tag)) if element is not None else None
