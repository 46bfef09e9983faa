"""Images as they are in their files: if they are whole, how large, and what is odd.

What the libraries print of a file is told with its name, and so is what is read though
it isn't as it should be.
"""

import functools
import io
import itertools
import logging
import os
import re
import struct
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import PIL.Image
import PIL.ImageOps
import PIL.TiffImagePlugin

from sppnet_jax.data.library_lines import caught

log = logging.getLogger(__name__)

ORIENTATION = 0x0112  # the tag of EXIF
# The environment variable of `max_pixels`, and its default, more than cameras make.
MAX_PIXELS, _MAX_PIXELS = "SPPNET_JAX_MAX_PIXELS", 200_000_000
_MAX_NAMED = 20  # odd images in the log
_HEADER_FORMATS = ("BMP", "JPEG", "PNG", "WEBP")
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_JPEG_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_JPEG_END = b"\xff\xd9"
# Of TIFF: tags, what a channel beside the colours is, and how numbers are kept.
_BITS, _EXTRA, _KIND = 258, 338, 339
_UNASSOCIATED = 2
_KINDS = {2: "signed integers", 3: "floats", 5: "complex integers", 6: "complex floats"}

# The pipeline decodes in its own threads and processes; more would only compete.
cv2.setNumThreads(0)
# Broken files raise an error that names them; OpenCV's own lines name nothing.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
# Nor do Pillow's, about EXIF blocks with a fault that changes nothing, and the like.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
PIL.Image.MAX_IMAGE_PIXELS = None  # `max_pixels` limits all

# The colours come from IMREAD_COLOR_RGB: with it, IMREAD_REDUCED_COLOR_* are refused.
_REDUCED = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
_BLOCKS = np.array([[0, 255], [255, 255], [255, 255]], np.uint8)
_CORNER = cv2.imencode(".jpg", _BLOCKS.repeat(8, axis=0).repeat(8, axis=1))[1].tobytes()


class EncodedImage(bytes):
    """An image as it is in its file, with the file's name.

    `fault`: why the file can't be read, "" if it can.
    """

    name: str
    fault: str

    def __new__(cls, encoded: bytes, name: str, fault: str = "") -> "EncodedImage":
        made = super().__new__(cls, encoded)
        made.name, made.fault = name, fault
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (bytes(self), self.name, self.fault)


def check(encoded: bytes) -> bytes:
    """The bytes of a whole image, not too large, with the end that a JPEG may lack.

    Raises: ValueError for others, and for files that can't be read.
    """
    if fault := getattr(encoded, "fault", ""):
        raise ValueError(fault)
    if not encoded:
        raise ValueError("the file is empty (0 bytes)")
    height, width = stated_size(encoded)
    if height * width > max_pixels():
        raise ValueError(
            f"{height:,}×{width:,} pixels (height×width) are more than the "
            f"{max_pixels():,} of the environment variable {MAX_PIXELS}"
        )
    missing = _missing_end(encoded)
    if not missing:
        return encoded
    completed = _completed(encoded) if is_jpeg(encoded) else b""
    if not completed:
        raise ValueError(f"truncated after {len(encoded):,} bytes: {missing}")
    _tell_odd(encoded, "a JPEG with all its data but no end marker")
    return EncodedImage(completed, _name_of(encoded))


def decode(encoded: bytes, reduction: int = 1) -> np.ndarray:
    """A whole image as it is shown: uint8 [H, W, 3].

    `reduction`: 2, 4 or 8 decodes a JPEG so many times smaller, sides rounded up: each
    block of 8×8 pixels gives 4×4, 2×2 or 1 from its lowest frequencies.

    Raises: ValueError as `images.decode_image` does.
    """
    with caught() as pieces:
        image = _decode(encoded, reduction)
    lines = b"".join(pieces).decode("utf-8", "replace").splitlines()
    said = "; ".join(filter(None, lines))
    if image is None:
        raise ValueError(
            f"not an image that OpenCV can decode ({len(encoded):,} bytes, "
            f"beginning with {encoded[:8]!r}){said and f': {said}'}"
        )
    if said:
        _tell_odd(encoded, said)
    return image


def size_in_header(encoded: bytes) -> tuple[int, int] | None:
    """The (height, width) that a header tells; None where only decoding can tell.

    TIFF and GIF are left to the decoder, because nothing else finds the broken ones. So
    are files that may be turned by 90°, but for JPEGs: OpenCV and Pillow don't read all
    EXIF alike.
    """
    try:
        with PIL.Image.open(io.BytesIO(encoded), formats=_HEADER_FORMATS) as image:
            default = 0 if "exif" in image.info else 1
            unturned = image.getexif().get(ORIENTATION, default) in (1, 2, 3, 4)
            height, width = image.height, image.width
        if unturned:
            return height, width
        if is_jpeg(encoded):
            rows, columns = _with_exif_of(encoded).shape[:2]
            return (width, height) if rows < columns else (height, width)
    except Exception:
        # Pillow raises errors of many types for odd files; OpenCV decides.
        pass
    return None


def beyond(encoded: bytes, size: tuple[int, int], reduction: int) -> tuple[int, int]:
    """How far above and left of a JPEG its first pixels begin when it is decoded small.

    The last rows and columns of a file may fill a part of a pixel only. Where the EXIF
    orientation mirrors an image, they are its first.

    `size`: (height, width), as shown, in pixels, as are the distances.
    """
    above, left = -size[0] % reduction, -size[1] % reduction
    if not (above or left):
        return 0, 0
    shown = _with_exif_of(encoded)
    mirrored = shown[:8].min() > 127, shown[:, :8].min() > 127
    return above * int(mirrored[0]), left * int(mirrored[1])


def is_jpeg(encoded: bytes) -> bool:
    return encoded.startswith(b"\xff\xd8")


@functools.cache
def max_pixels() -> int:
    """The most pixels of an image: one of more is broken, and not decoded.

    200 million, or the environment variable SPPNET_JAX_MAX_PIXELS. An image takes 3
    bytes a pixel, and more while it is decoded.

    Raises: RuntimeError if the variable is no whole number above 0.
    """
    text = os.environ.get(MAX_PIXELS) or str(_MAX_PIXELS)
    if not text.strip().isdecimal() or not int(text):
        raise RuntimeError(
            f"the environment variable {MAX_PIXELS} must be a whole number of pixels "
            f"above 0, such as {_MAX_PIXELS}, not {text!r}"
        )
    return int(text)


_odd: dict[tuple[str, str], None] = {}
_odd_lock = threading.Lock()


def odd_images() -> list[tuple[str, str]]:
    """The images that this process has read though they are odd, and what is odd."""
    return list(_odd)


def _name_of(encoded: bytes) -> str:
    return getattr(encoded, "name", f"an image of {len(encoded):,} bytes")


def _tell_odd(encoded: bytes, what: str) -> None:
    """Logs an image that is read though it is odd, once; many are counted only."""
    name = _name_of(encoded)
    with _odd_lock:
        if (name, what) in _odd:
            return
        _odd[name, what] = None
        count = len(_odd)
    if count <= _MAX_NAMED or count % 100 == 0:
        log.warning("odd, but read (no. %d): %s: %s", count, name, what)
    if count == _MAX_NAMED:
        log.warning("more odd images are counted, and each hundredth is named")


def stated_size(encoded: bytes) -> tuple[int, int]:
    """The (height, width) that a header states, in any orientation; zeros for none."""
    if encoded.startswith(b"\x89PNG\r\n\x1a\n"):
        return _whole_number(encoded[20:24]), _whole_number(encoded[16:20])
    if is_jpeg(encoded):
        for kind, start, _ in _jpeg_segments(encoded):
            if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
                sides = encoded[start + 3 : start + 5], encoded[start + 5 : start + 7]
                return _whole_number(sides[0]), _whole_number(sides[1])
        return 0, 0
    try:
        with PIL.Image.open(io.BytesIO(encoded)) as image:
            return image.height, image.width
    except Exception:  # of many types for odd files; OpenCV decides
        return 0, 0


def _whole_number(digits: bytes) -> int:
    return int.from_bytes(digits, "big")


def _with_exif_of(encoded: bytes) -> np.ndarray:
    """A tiny image, tall, with a black corner top left, as the EXIF of a JPEG turns it.

    That shows what OpenCV makes of any EXIF.
    """
    segments = itertools.takewhile(
        lambda segment: segment[0] != 0xDA, _jpeg_segments(encoded)
    )
    exif = b"".join(encoded[s - 2 : end] for kind, s, end in segments if kind == 0xE1)
    with caught():
        shown = _decode(_CORNER[:2] + exif + _CORNER[2:], 1)
    if shown is None:
        raise ValueError("its EXIF block can't be read")
    return shown


def _decode(encoded: bytes, reduction: int) -> np.ndarray | None:
    """A whole image as it is shown; None if it can't be decoded."""
    if encoded.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        tags = _tiff_tags(encoded)
        _check_numbers(tags)
        if _UNASSOCIATED in tags.get(_EXTRA, ()) and len(tags.get(_BITS, ())) > 2:
            # OpenCV multiplies its colours by alpha, as those of no other format.
            try:
                with PIL.Image.open(io.BytesIO(encoded), formats=("TIFF",)) as opened:
                    turned = PIL.ImageOps.exif_transpose(opened)
                    return np.array(turned.convert("RGB"))
            except Exception as error:  # of many types for odd files
                raise ValueError(f"Pillow can't decode this TIFF: {error}") from error
    buffer = np.frombuffer(encoded, np.uint8)
    try:
        return cv2.imdecode(buffer, cv2.IMREAD_COLOR_RGB | _REDUCED[reduction])
    except cv2.error as error:
        raise ValueError(f"OpenCV can't decode it: {error}") from error


def _tiff_tags(encoded: bytes) -> dict[int, tuple[int, ...]]:
    """The first picture's tags that tell of its numbers, as far as they can be read."""
    try:
        start = 16 if encoded[2:3] + encoded[3:4] in (b"+\0", b"\0+") else 8
        found = PIL.TiffImagePlugin.ImageFileDirectory_v2(encoded[:start])
        file = io.BytesIO(encoded)
        file.seek(found.next)
        found.load(file)
        return {tag: tuple(found.get(tag) or ()) for tag in (_BITS, _EXTRA, _KIND)}
    except Exception:  # of many types for odd files; OpenCV decides
        return {}


def _check_numbers(tags: dict[int, tuple[int, ...]]) -> None:
    """Raises ValueError for a TIFF of numbers that are no colours of 1 to 16 bits."""
    bits = max(tags.get(_BITS, ()), default=1)
    kind = max(tags.get(_KIND, ()), default=1)
    if kind in _KINDS or bits > 16:
        raise ValueError(
            f"a TIFF of {bits}-bit {_KINDS.get(kind, 'integers')}, and not of colours: "
            "convert it to 8 or 16 bits, with the values that are to be black and white"
        )


def _missing_end(encoded: bytes) -> str:
    """Says what is missing at the end of a truncated file; "" for a whole one.

    OpenCV fills what a truncated file lacks with gray, without an error.
    """
    if is_jpeg(encoded):
        ends = any(kind == 0xD9 for kind, *_ in _jpeg_segments(encoded))
        return "" if ends else "no end-of-image marker"
    if encoded.startswith(b"\x89PNG\r\n\x1a\n"):
        return "" if _png_ends(encoded) else "no IEND chunk"
    if encoded.startswith(b"RIFF") and encoded[8:12] == b"WEBP":
        length = 8 + int.from_bytes(encoded[4:8], "little")
        return f"its header promises {length:,}" if len(encoded) < length else ""
    if encoded.startswith((b"GIF87a", b"GIF89a", b"BM")):
        try:
            with PIL.Image.open(io.BytesIO(encoded), formats=("GIF", "BMP")) as image:
                image.load()
        except Exception as error:  # of many types for odd files
            return f"Pillow can't read its (first) picture: {error}"
    return ""


def _jpeg_segments(encoded: bytes) -> Iterator[tuple[int, int, int]]:
    """The marker of each segment, where it starts and ends, up to the end's marker.

    An embedded thumbnail, with an end of its own, is within a segment.
    """
    position = 2
    while marker := _JPEG_MARKER.search(encoded, position):
        kind, start = encoded[marker.start() + 1], marker.end()
        position = start
        if kind not in (0x01, 0xD8, 0xD9):
            position += _whole_number(encoded[position : position + 2])
        yield kind, start, position
        if kind == 0xD9:
            return


def _completed(encoded: bytes) -> bytes:
    """A JPEG without its end marker, with it; b"" if any of its data is missing."""
    body = encoded.rstrip(b"\xff")
    # Zeros fill what was never written of a file, unless about as many are data.
    if body.endswith(bytes(4)) and _has_all_data(body[:-4]):
        body = body.rstrip(b"\0")
        body += b"\0" if body.endswith(b"\xff") else b""
    return body + _JPEG_END if _has_all_data(body) else b""


def _has_all_data(body: bytes) -> bool:
    """Whether a JPEG lacks no more than its end marker."""
    end = 0
    sent: dict[int, set[int]] = {}  # which coefficients of which components are whole
    for kind, start, end in _jpeg_segments(body):
        if kind == 0xDA:
            components = body[start + 3 : end - 3 : 2]
            first, last, bits = (*body[end - 3 : end], 0, 0, 0)[:3]
            for one in components:
                whole = range(first, last + 1) if bits & 15 == 0 else ()
                sent.setdefault(one, set()).update(whole)
    if not sent or any(len(coefficients) < 64 for coefficients in sent.values()):
        return False
    # Where data is missing, what is appended becomes part of the picture.
    count = len(_JPEG_RESTART.findall(body, end))
    more = [bytes([byte]) * 64 for byte in (0, 0x55, 0xAA, 0xFE)]
    more += [bytes([0xFF, 0xD0 + count % 8]) + one for one in more]
    pictures = set()
    for appended in (b"", *more):
        try:
            with PIL.Image.open(io.BytesIO(body + appended + _JPEG_END)) as image:
                pictures.add(image.tobytes())
        except Exception:  # of many types for odd files
            return False
    return len(pictures) == 1


def _png_ends(encoded: bytes) -> bool:
    position = 8
    while position + 12 <= len(encoded):
        length, kind = struct.unpack(">I4s", encoded[position : position + 8])
        position += 12 + length
        if kind == b"IEND":
            return position <= len(encoded)
    return False
