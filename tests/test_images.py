"""Whatever an image file holds, the pipeline gets 8-bit RGB or a clear error."""

import io

import cv2
import numpy as np
import pytest
from data_helpers import encode, picture
from PIL import Image, ImageOps

from sppnet_jax.data import images

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
    monkeypatch.setattr(images, "decode_image", None)
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
    for length in {1, 2, 11, 30, 100, *np.linspace(1, end - 1, 25, dtype=int), end}:
        for read in (images.decode_image, images.image_size):
            with pytest.raises(ValueError, match=r"truncated|not an image"):
                read(encoded[:length])


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
