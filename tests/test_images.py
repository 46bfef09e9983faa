"""Whatever an image file holds, the pipeline gets 8-bit RGB or a clear error."""

import ctypes
import functools
import io
import itertools
import math
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from data_helpers import encode, picture
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image

from sppnet_jax.data import encoded_images, images
from sppnet_jax.data.library_lines import caught

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF")
IMAGE = picture(60, 80)


def saved(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def as_pillow_sees(encoded):
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))
    return np.asarray(image.convert("RGB")).astype(int)


def mean_difference(encoded):
    decoded, expected = images.decode_image(encoded), as_pillow_sees(encoded)
    assert decoded.dtype == np.uint8
    assert decoded.shape == expected.shape
    return float(np.abs(decoded - expected).mean())


@pytest.mark.parametrize(
    ("file_format", "mode"),
    [("JPEG", "RGB"), ("JPEG", "L")]
    + [(name, mode) for name in FORMATS[1:] for mode in ("RGB", "L", "P", "1", "RGBA")],
)
def test_every_format_and_mode_becomes_rgb(file_format, mode):
    encoded = saved(Image.fromarray(IMAGE).convert(mode), file_format)
    assert mean_difference(encoded) < 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(file_format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = saved(Image.fromarray(IMAGE), file_format, exif=exif)
    assert mean_difference(encoded) < 1


@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 mean nothing
@pytest.mark.parametrize("file_format", FORMATS)
def test_the_size_in_the_header_is_that_of_the_decoded_image(file_format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = saved(Image.fromarray(IMAGE), file_format, exif=exif)
    size = images.image_size(encoded)
    assert size == images.decode_image(encoded).shape[:2]
    turned = file_format not in ("BMP", "GIF") and 5 <= orientation <= 8
    assert size == ((80, 60) if turned else (60, 80))


def test_an_orientation_that_opencv_ignores_does_not_turn_the_size():
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    encoded = saved(Image.fromarray(IMAGE), "JPEG", xmp=xmp)
    assert Image.open(io.BytesIO(encoded)).getexif()[0x0112] == 6
    assert images.image_size(encoded) == images.decode_image(encoded).shape[:2]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")
def test_the_size_is_right_whatever_is_wrong_with_the_exif():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    encoded = saved(Image.fromarray(IMAGE), "JPEG", exif=exif)
    start, length = encoded.index(b"Exif"), len(exif.tobytes())
    rng = np.random.default_rng(0)
    sizes = set()
    for _ in range(200):
        damaged = bytearray(encoded)
        for place in start + rng.integers(length, size=2):
            damaged[place] = rng.integers(256)
        size = images.image_size(bytes(damaged))
        assert size == images.decode_image(bytes(damaged)).shape[:2]
        sizes.add(size)
    assert sizes == {(60, 80), (80, 60)}


def test_the_size_is_read_without_decoding(monkeypatch):
    files = complete_files()
    exif = Image.Exif()
    exif[0x0112] = 3
    files["JPEG upside down"] = saved(Image.fromarray(IMAGE), "JPEG", exif=exif)
    monkeypatch.setattr(encoded_images, "decode", None)
    for name in ("JPEG", "progressive JPEG", "JPEG upside down", "PNG", "BMP", "WEBP"):
        assert images.image_size(files[name]) == (60, 80), name


def test_cmyk_jpeg_becomes_rgb():
    encoded = saved(Image.fromarray(IMAGE).convert("CMYK"), "JPEG", quality=95)
    assert mean_difference(encoded) < 3


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_become_eight(suffix):
    wide = IMAGE.astype(np.uint16) * 257
    np.testing.assert_array_equal(images.decode_image(encode(wide, suffix)), IMAGE)
    gray = encode(wide[..., :1], suffix)
    expected = np.repeat(IMAGE[..., :1], 3, axis=2)
    np.testing.assert_array_equal(images.decode_image(gray), expected)


def complete_files():
    image = Image.fromarray(IMAGE)
    files = {name: saved(image, name) for name in FORMATS}
    files["progressive JPEG"] = saved(image, "JPEG", progressive=True)
    files["JPEG with restarts"] = cv2.imencode(
        ".jpg", IMAGE, [cv2.IMWRITE_JPEG_RST_INTERVAL, 2]
    )[1].tobytes()
    files["animated GIF"] = saved(
        image, "GIF", save_all=True, append_images=[image.rotate(90)]
    )
    # The thumbnail ends in a marker that a truncated file still has.
    thumbnail = saved(image.resize((16, 12)), "JPEG")
    segment = b"Exif\0\0" + thumbnail
    header = b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment
    files["JPEG with a thumbnail"] = files["JPEG"][:2] + header + files["JPEG"][2:]
    return files


@pytest.mark.parametrize("name", complete_files())
def test_a_truncated_file_is_an_error_wherever_it_ends(name):
    encoded = complete_files()[name]
    images.decode_image(encoded)
    # An animation is whole as soon as its first frame is.
    end = len(encoded) // 2 if name == "animated GIF" else len(encoded) - 1
    # A JPEG's last two bytes are its end marker, which isn't missed.
    end -= 2 * ("JPEG" in name)
    for length in {1, 2, 11, 30, 100, *np.linspace(1, end - 1, 25, dtype=int), end}:
        for read in (images.decode_image, images.image_size):
            with pytest.raises(ValueError, match=r"truncated|not an image"):
                read(encoded[:length])


@pytest.fixture
def none_told(monkeypatch):
    monkeypatch.setattr(encoded_images, "_odd", {})


def test_many_odd_images_are_counted_and_some_are_named(caplog, none_told):
    encoded = saved(Image.fromarray(IMAGE[:8, :8]), "JPEG")[:-2]
    for number in range(201):
        images.decode_image(encoded_images.EncodedImage(encoded, f"{number}.jpg"))
    named = [line.partition("): ")[2] for line in caplog.messages if "): " in line]
    names = [name.partition(":")[0] for name in named]
    assert names == [f"{number}.jpg" for number in (*range(20), 99, 199)]
    assert "odd, but read (no. 200): 199.jpg" in caplog.text


@pytest.mark.parametrize("name", [n for n in complete_files() if "JPEG" in n])
def test_a_jpeg_that_lacks_its_end_marker_only_is_read_and_named(
    name, caplog, none_told
):
    encoded = complete_files()[name]
    for cut in (1, 2):
        file = encoded_images.EncodedImage(encoded[:-cut], f"{name} {cut}.jpg")
        for _ in range(3):
            assert images.image_size(file) == (60, 80)
            np.testing.assert_array_equal(
                images.decode_image(file), images.decode_image(encoded)
            )
    assert [line for line in caplog.messages if "no end marker" in line] == [
        line for line in caplog.messages if line.startswith("odd, but read (no. ")
    ]
    assert [name in line for line in caplog.messages].count(True) == 2


@pytest.mark.parametrize("name", [n for n in complete_files() if "JPEG" in n])
def test_zeros_that_fill_the_end_of_a_jpeg_are_no_data(name):
    """As of a file that was downloaded in part: all of it, or half of it."""
    encoded = complete_files()[name]
    found = images.decode_image(encoded[:-2] + bytes(999))
    np.testing.assert_array_equal(found, images.decode_image(encoded))
    for length in np.linspace(len(encoded) // 2, len(encoded) - 8, 20, dtype=int):
        with pytest.raises(ValueError, match="truncated"):
            images.decode_image(encoded[:length] + bytes(9999))


@pytest.mark.parametrize("seed", range(4))
def test_a_jpeg_that_lacks_data_is_never_completed(seed):
    """Wherever it ends: in a run of one colour, at a restart, between two scans."""
    flat = np.full((40, 40, 3), (0, 77, 128, 255)[seed], np.uint8)
    image = Image.fromarray(flat)
    restarts = [cv2.IMWRITE_JPEG_RST_INTERVAL, 1]
    for encoded in (
        saved(image, "JPEG", optimize=True),
        saved(image, "JPEG", progressive=True),
        cv2.imencode(".jpg", flat, restarts)[1].tobytes(),
        cv2.imencode(".jpg", picture(33, 47, seed), restarts)[1].tobytes(),
    ):
        whole = images.decode_image(encoded)
        for length in range(len(encoded) - 3, len(encoded) - 40, -1):
            for filled in (0, 9999):  # as of a file that was downloaded in part
                try:
                    found = images.decode_image(encoded[:length] + bytes(filled))
                except ValueError:
                    continue
                np.testing.assert_array_equal(found, whole)  # all was there, after all


def transparent():
    """Every alpha beside every other one, over a picture."""
    alpha = np.arange(60 * 80).reshape(60, 80) % 256
    return Image.fromarray(np.dstack([IMAGE, alpha.astype(np.uint8)]), "RGBA")


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True, "exact": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_adobe_deflate", "big_tiff": True}),
    ],
)
def test_what_is_transparent_keeps_its_colours(file_format, options, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = saved(transparent(), file_format, exif=exif, **options)
    expected = np.rot90(IMAGE, {1: 0, 3: 2, 6: 3}[orientation])
    np.testing.assert_array_equal(images.decode_image(encoded), expected)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_tiff_of_numbers_that_are_no_colours_is_named_as_what_it_is(dtype, channels):
    array = IMAGE[..., :channels].astype(dtype)
    encoded = cv2.imencode(".tif", array)[1].tobytes()
    bits = np.dtype(dtype).itemsize * 8
    kind = "floats" if dtype.startswith("float") else "signed integers"
    for read in (images.decode_image, images.image_size):
        with pytest.raises(ValueError, match=f"a TIFF of {bits}-bit {kind}.* convert"):
            read(encoded)


@pytest.fixture
def limit(monkeypatch):
    def set_limit(text):
        monkeypatch.setenv(encoded_images.MAX_PIXELS, text)
        encoded_images.max_pixels.cache_clear()

    yield set_limit
    encoded_images.max_pixels.cache_clear()


@pytest.mark.parametrize("name", complete_files())
def test_an_image_of_more_pixels_than_the_limit_is_broken(name, limit):
    encoded = complete_files()[name]
    limit(str(60 * 80))
    assert images.decode_image(encoded).shape == (60, 80, 3)
    limit(str(60 * 80 - 1))
    for read in (images.decode_image, images.image_size):
        with pytest.raises(ValueError, match=r"60×80 pixels .* more than the 4,799"):
            read(encoded)


def test_a_small_file_of_very_many_pixels_is_not_decoded(monkeypatch):
    monkeypatch.setattr(cv2, "imdecode", None)
    row = zlib.compress(bytes(4096 * 1024), 1)
    header = struct.pack(">IIBBBBB", 32_768, 32_768, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", row), (b"IEND", b""))
    encoded = b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*one) for one in chunks)
    with pytest.raises(ValueError, match=r"32,768×32,768 .* 200,000,000"):
        images.decode_image(encoded)


@pytest.mark.parametrize("text", ["0", "-5", "many", "1e9", "nan"])
def test_a_limit_that_is_no_number_of_pixels_is_said_to_be_none(text, limit):
    limit(text)
    with pytest.raises(
        RuntimeError, match=f"{encoded_images.MAX_PIXELS} must be a whole"
    ):
        images.decode_image(encode(IMAGE))


def png_chunk(kind, data):
    checked = kind + data
    length, check = (struct.pack(">I", n) for n in (len(data), zlib.crc32(checked)))
    return length + checked + check


def test_what_libraries_print_is_told_once_with_the_files_name(
    capfd, caplog, none_told
):
    """By several threads at once; what others print is not held back."""
    jpeg, png = saved(Image.fromarray(IMAGE), "JPEG"), encode(IMAGE)
    bad = png_chunk(b"iCCP", b"icc\0\0" + zlib.compress(b"junk"))
    printing = {
        "junk.jpg": jpeg[:-2] + b"junkjunk" + jpeg[-2:],
        "old.jpg": jpeg.replace(b"JFIF\0\x01", b"JFIF\0\x07", 1),
        "profile.png": png[:33] + bad + png[33:],
        "whole.png": png,
    }
    files = [encoded_images.EncodedImage(data, name) for name, data in printing.items()]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(images.decode_image, files * 20))
    with caught() as pieces:
        ctypes.CDLL(None).perror(b"mine")
        with ThreadPoolExecutor(1) as pool:
            pool.submit(ctypes.CDLL(None).perror, b"another's").result()
    assert b"".join(pieces).startswith(b"mine")
    ctypes.CDLL(None).perror(b"later")
    told = capfd.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in told] == ["another's", "later"]
    lines = sorted(line.partition("): ")[2] for line in caplog.messages)
    assert [line.partition(": ")[0] for line in lines] == sorted(printing)[:3]
    for line, words in zip(lines, ("extraneous", "JFIF revision", "iCCP"), strict=True):
        assert words in line


def test_an_error_of_a_library_is_part_of_what_is_raised(capfd):
    encoded = encode(IMAGE)
    chunk = png_chunk(b"IDAT", zlib.compress(b"\0" * 99)[:-9])
    start = encoded.index(b"IDAT") - 4
    with pytest.raises(ValueError, match=r"not an image .*: libpng error: "):
        images.decode_image(encoded[:start] + chunk + encoded[-12:])
    assert not capfd.readouterr().err


@pytest.mark.parametrize("name", complete_files())
def test_a_damaged_file_is_an_image_or_a_value_error_and_prints_nothing(name, capfd):
    encoded = complete_files()[name]
    rng = np.random.default_rng(len(name))
    errors = 0
    for number in range(60):
        damaged = bytearray(encoded)
        places = rng.integers(len(encoded) if number % 2 else 100, size=3)
        for place in places:
            damaged[place] = rng.integers(256)
        for read in (images.decode_image, images.image_size):
            try:
                read(bytes(damaged))
            except ValueError:
                errors += 1
    assert errors
    assert not capfd.readouterr().err


@pytest.mark.parametrize("name", complete_files())
def test_bytes_after_the_end_are_ignored(name):
    encoded = complete_files()[name]
    np.testing.assert_array_equal(
        images.decode_image(encoded + b"\0trailing" * 9), images.decode_image(encoded)
    )


@pytest.mark.parametrize(
    "encoded",
    [b"", b"x", b"<html>not found</html>", b"\xff\xd8\xff\xd9", b"BM", b"GIF89a"],
)
def test_what_is_no_image_is_a_value_error(encoded):
    for read in (images.decode_image, images.image_size):
        with pytest.raises(ValueError, match=r"empty|not an image|truncated"):
            read(encoded)


def test_a_damaged_png_is_an_error():
    encoded = bytearray(encode(IMAGE))
    middle = len(encoded) // 2
    encoded[middle : middle + 40] = bytes(40)
    with pytest.raises(ValueError, match="not an image"):
        images.decode_image(bytes(encoded))


def jpegs(height, width):
    """A picture as JPEGs of all colours, codings, samplings and orientations."""
    image, files = Image.fromarray(picture(height, width)), {}
    for mode, progressive, orientation in itertools.product(
        ("RGB", "L", "CMYK"), (False, True), range(1, 9)
    ):
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"progressive": progressive, "exif": exif, "quality": 95}
        files[mode, progressive, orientation] = saved(
            image.convert(mode), "JPEG", subsampling=2 * progressive, **options
        )
    return files


@pytest.mark.parametrize(
    ("least_side", "size"),
    [
        (math.inf, (60, 80)),
        (16, (60, 80)),
        (15, (30, 40)),  # just twice as many
        (8, (30, 40)),
        (7, (15, 20)),
        (3, (8, 10)),  # 7.5 rounds up
        (1, (8, 10)),
    ],
)
def test_a_jpeg_is_decoded_to_twice_what_is_needed_or_more(least_side, size):
    pixels, own_size = images.decode_part(
        saved(Image.fromarray(IMAGE), "JPEG"), least_side
    )
    assert (pixels.shape, own_size) == ((*size, 3), (60, 80))


@pytest.mark.parametrize("shape", [(120, 160), (121, 163), (117, 207)])
def test_a_jpeg_that_was_decoded_small_is_the_whole_image_averaged(shape):
    """Of any kind, turned or not, its sides multiples of the reduction or not."""
    for kind, encoded in jpegs(*shape).items():
        whole = images.decode_image(encoded)
        assert images.image_size(encoded) == whole.shape[:2]
        for side in (5, 7, 14, 23, 29):
            pixels, size = images.decode_part(encoded, side)
            assert size == whole.shape[:2], kind
            assert pixels.size <= whole.size / 3, kind
            found = images.decode_resized(encoded, side).astype(int)
            expected = images.resize_shorter_side(whole, side)
            assert found.shape == expected.shape
            assert np.abs(found - expected).mean() < 4, (kind, side)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_part_is_within_half_a_pixel_that_was_decoded(orientation):
    """A ramp over rows and one over columns say where each pixel comes from."""
    ramp = np.zeros((203, 251, 3), np.uint8)
    ramp[..., 0] = np.arange(203)[:, None]
    ramp[..., 1] = ramp[..., 2] = np.arange(251)
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = saved(Image.fromarray(ramp), "JPEG", exif=exif, quality=98, subsampling=0)
    whole = images.decode_image(encoded)
    rng = np.random.default_rng(orientation)
    for side, by in ((20, 4), (10, 8), (40, 2)):
        least = 2 * by * side
        top, left = rng.integers(0, np.subtract(whole.shape[:2], least - 1)).tolist()
        rectangle = (top, left, least, least)
        part = images.decode_part(encoded, side, lambda *_, r=rectangle: r)
        assert part.size == whole.shape[:2]
        assert abs(part.pixels.shape[0] - least / by) <= 1
        found = images.warp(part.pixels, side).astype(float)
        expected = images.warp(whole[top : top + least, left : left + least], side)
        assert np.abs(found - expected).max() < by / 2 + 3


def test_other_formats_and_smaller_jpegs_are_what_they_are_in_every_bit():
    for name, encoded in complete_files().items():
        whole = images.decode_image(encoded)
        side = 16 if "JPEG" in name else 3
        np.testing.assert_array_equal(
            images.decode_resized(encoded, side),
            images.resize_shorter_side(whole, side),
        )
        rngs = [np.random.default_rng(4) for _ in range(2)]
        choose = functools.partial(images.random_rectangle, rng=rngs[0])
        part = images.decode_part(encoded, side, choose)
        np.testing.assert_array_equal(
            images.warp(part.pixels, side),
            images.random_resized_crop(whole, side, rngs[1]),
        )
        assert rngs[0].random() == rngs[1].random(), "other draws"


@pytest.mark.parametrize("name", [n for n in complete_files() if "JPEG" in n])
def test_a_damaged_jpeg_decoded_small_is_refused_and_told_as_whole(name, monkeypatch):
    encoded, rng = complete_files()[name], np.random.default_rng(len(name))

    def outcome(data, least_side):
        monkeypatch.setattr(encoded_images, "_odd", {})
        try:
            return images.decode_part(
                data, least_side
            ).size, encoded_images.odd_images()
        except ValueError as error:
            return str(error)

    outcomes = set()
    for number in range(80):
        damaged = bytearray(encoded)
        for place in rng.integers(len(encoded) if number % 2 else 300, size=3):
            damaged[place] = rng.integers(256)
        if number % 4 == 0:
            damaged = damaged[: rng.integers(len(encoded))]
        expected = outcome(bytes(damaged), math.inf)
        for least_side in (3, 15):
            assert outcome(bytes(damaged), least_side) == expected
        outcomes.add(type(expected))
    for cut in (1, 2):
        assert outcome(encoded[:-cut], 3) == outcome(encoded[:-cut], math.inf)
    assert outcomes == {tuple, str}


def test_an_image_of_too_many_pixels_is_refused_however_small_it_is_needed(monkeypatch):
    encoded = saved(Image.fromarray(IMAGE), "JPEG")
    monkeypatch.setattr(encoded_images, "max_pixels", lambda: 60 * 80 - 1)
    with pytest.raises(ValueError, match="60×80 pixels"):
        images.decode_part(encoded, 1)


@pytest.fixture(scope="module")
def large():
    """A photograph of 12 megapixels, as a telephone held upright takes it."""
    image = cv2.resize(load_sample_image("china.jpg"), (4000, 3000))
    noise = np.random.default_rng(0).integers(-6, 7, (300, 400, 3), np.int16)
    noisy = np.clip(image + np.tile(noise, (10, 10, 1)), 0, 255).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.fromarray(noisy), "JPEG", exif=exif, quality=90)


def test_twelve_megapixels_are_read_small_with_the_pixels_of_reading_them_whole(large):
    whole = images.decode_image(large)
    assert whole.shape == (4000, 3000, 3)
    pixels, size = images.decode_part(large, 256)
    assert (pixels.shape, size) == ((1000, 750, 3), (4000, 3000))
    found = images.decode_resized(large, 256).astype(int)
    difference = np.abs(found - images.resize_shorter_side(whole, 256))
    assert difference.mean() < 1
    assert np.percentile(difference, 99.9) <= 8
    rngs = [np.random.default_rng(1) for _ in range(2)]
    for _ in range(4):
        choose = functools.partial(images.random_rectangle, rng=rngs[0])
        part = images.warp(images.decode_part(large, 224, choose).pixels, 224)
        expected = images.random_resized_crop(whole, 224, rngs[1])
        # The crop's edges are rounded: what differs is where there are edges.
        assert np.abs(part.astype(int) - expected).mean() < 3


@pytest.mark.parametrize(
    ("shape", "side", "expected"),
    [
        ((60, 80), 30, (30, 40)),
        ((80, 60), 30, (40, 30)),
        ((60, 80), 120, (120, 160)),
        ((60, 80), 60, (60, 80)),
        ((2, 5), 1, (1, 3)),  # 2.5 rounds up
        ((4, 6), 1, (1, 2)),  # 1.5 rounds up
        ((1, 1), 7, (7, 7)),
        ((427, 640), 256, (256, 384)),
    ],
)
def test_the_shorter_side_is_exact_and_the_aspect_kept(shape, side, expected):
    resized = images.resize_shorter_side(picture(*shape), side)
    assert resized.shape == (*expected, 3)
    assert resized.dtype == np.uint8


def test_a_needle_of_an_image_does_not_fill_the_memory():
    with pytest.raises(ValueError, match=r"1×1000 .* too narrow"):
        images.resize_shorter_side(np.zeros((1, 1000, 3), np.uint8), 224)
    with pytest.raises(ValueError, match="too narrow"):
        images.whole_size(1, 1000, 224, float("inf"))


@pytest.mark.parametrize(
    ("shape", "max_aspect", "expected"),
    [
        ((60, 80), 3.0, (30, 40)),
        ((20, 60), 3.0, (30, 90)),  # just as long as it may be
        ((20, 61), 3.0, (30, 90)),
        ((300, 1), 3.0, (90, 30)),
        ((30, 50), 1.0, (30, 30)),
        ((30, 30), 1.0, (30, 30)),
        ((100, 300), 2.45, (30, 74)),  # 73.5 rounds to an even number
    ],
)
def test_a_whole_image_is_squeezed_to_the_longest_aspect(shape, max_aspect, expected):
    resized = images.resize_whole(picture(*shape), 30, max_aspect)
    assert resized.shape == (*expected, 3)
    assert images.whole_size(*shape, 30, max_aspect) == expected


def test_crops_lie_at_the_centre_the_corners_and_the_middles_of_the_sides():
    image = np.stack(np.mgrid[:10, :15], axis=-1)
    places = {
        position: tuple(images.crop(image, 4, position)[0, 0])
        for position in images.POSITIONS
    }
    assert places == {
        "center": (3, 5),
        "top_left": (0, 0),
        "top_right": (0, 11),
        "bottom_left": (6, 0),
        "bottom_right": (6, 11),
        "top": (0, 5),
        "bottom": (6, 5),
        "left": (3, 0),
        "right": (3, 11),
    }
    assert images.crop(image, 10, "bottom_left").shape == (10, 10, 2)


def test_crops_that_do_not_fit_or_exist_are_errors():
    with pytest.raises(ValueError, match=r"11×11 does not fit .*\(10, 15, 3\)"):
        images.crop(np.zeros((10, 15, 3)), 11, "center")
    with pytest.raises(ValueError, match=r"unknown position 'middle'"):
        images.crop(np.zeros((10, 15, 3)), 4, "middle")


def test_random_crops_reach_every_place():
    image = np.stack(np.mgrid[:5, :6], axis=-1)
    rng = np.random.default_rng(0)
    places = {tuple(images.random_crop(image, 4, rng)[0, 0]) for _ in range(200)}
    assert places == {(row, column) for row in range(2) for column in range(3)}


@pytest.mark.parametrize("shape", [(60, 80), (1, 300), (300, 2), (8, 8)])
def test_random_resized_crops_have_one_size_for_every_shape(shape):
    rng = np.random.default_rng(0)
    for _ in range(20):
        cut = images.random_resized_crop(picture(*shape), 16, rng)
        assert cut.shape == (16, 16, 3)
        assert cut.dtype == np.uint8


def test_random_resized_crops_keep_to_their_least_area():
    ramp = np.zeros((100, 100, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.mgrid[:100, :100]
    rng = np.random.default_rng(0)
    areas = []
    for _ in range(100):
        cut = images.random_resized_crop(ramp, 50, rng, area=(0.5, 1.0))
        spans = [np.ptp(cut[..., channel].astype(int)) + 2 for channel in (0, 1)]
        areas.append(spans[0] * spans[1] / 100**2)
    assert min(areas) > 0.45
    assert max(areas) > 0.8


def test_areas_are_averaged_to_the_bit_as_opencv_averages_bytes():
    """Random sizes: shrunk by any factor, whole factors, one side grown."""
    random = np.random.default_rng(3)
    in_float = 0
    for number in range(200):
        height, width = random.integers(2, 150, 2).tolist()
        # Few values make many means that lie between two numbers.
        image = random.integers(0, 2 + number % 5, (height, width, 3)) * 51
        image = image.astype(np.uint8)
        if number % 4 == 0:
            new_height, new_width = max(1, height // 2), max(1, width // 3)
        else:
            new_height = int(random.integers(1, height + 20))
            new_width = int(random.integers(1, width))
        if new_height * new_width >= height * width:
            continue
        found = images._resize(image, new_height, new_width)
        expected = cv2.resize(
            image, (new_width, new_height), interpolation=cv2.INTER_AREA
        )
        np.testing.assert_array_equal(found, expected)
        in_float += images._averages_in_float(height, width, new_height, new_width)
    assert in_float > 50


def test_a_mirrored_image_is_reversed_in_its_columns():
    image = picture(12, 9)
    part = image[2:9, 1:8]  # a view, as crops are
    np.testing.assert_array_equal(images.mirror(part), part[:, ::-1])
