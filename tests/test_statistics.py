"""The statistics of a training set: by their definition, and found again."""

from pathlib import Path

import numpy as np
import pytest
from data_helpers import encode, picture, write_class_folders

from sppnet_jax.data import statistics
from sppnet_jax.data.images import crop, decode_image, resize_shorter_side
from sppnet_jax.data.sources import open_source
from sppnet_jax.data.statistics import image_statistics, kept_statistics

SIZES = {"image_size": 16, "resize_side": 18}


@pytest.fixture
def folder(tmp_path):
    write_class_folders(tmp_path / "images", 10, "a b")
    return tmp_path / "images"


def opened(folder):
    return open_source("image_folder", "train", root=str(folder))


def test_they_are_the_mean_image_and_the_covariance_of_all_pixels(folder):
    source = opened(folder)
    crops = []
    for index in range(len(source.records)):
        image = decode_image(source.records[index]["image"])
        crops.append(crop(resize_shorter_side(image, 18), 16, "center"))
    pixels = np.stack(crops).astype(np.float64)
    found = image_statistics(source, **SIZES)
    np.testing.assert_allclose(found.mean_image, pixels.mean(axis=0), rtol=1e-6)
    expected = np.cov(pixels.reshape(-1, 3).T, bias=True)
    np.testing.assert_allclose(found.covariance, expected, rtol=1e-4, atol=1e-2)


@pytest.fixture
def computed(monkeypatch):
    """The settings of each computation from here on."""
    computed = []

    def counted(source, **settings):
        computed.append(settings)
        return image_statistics(source, **settings)

    monkeypatch.setattr(statistics, "image_statistics", counted)
    return computed


def test_they_are_computed_once_for_the_same_images_and_sizes(
    folder, tmp_path, computed
):
    source = opened(folder)
    kept = tmp_path / "kept"
    first = kept_statistics(source, kept, **SIZES)
    again = kept_statistics(opened(folder), kept, **SIZES)
    assert len(computed) == 1
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    kept_statistics(source, kept, image_size=17, resize_side=18)
    kept_statistics(source, kept, **SIZES, max_images=5)
    assert len(computed) == 3


def test_images_that_were_changed_are_read_anew(folder, tmp_path, computed):
    kept = tmp_path / "kept"
    before = kept_statistics(opened(folder), kept, **SIZES)
    for path in folder.rglob("*.png"):
        path.write_bytes(encode(picture(30, 24, seed=99)))
    after = kept_statistics(opened(folder), kept, **SIZES)
    assert len(computed) == 2
    assert np.abs(before.mean_image - after.mean_image).max() > 1


def test_a_damaged_file_is_made_again_and_an_unwritable_folder_is_a_warning(
    folder, tmp_path, computed, caplog
):
    source = opened(folder)
    kept = tmp_path / "kept"
    kept_statistics(source, kept, **SIZES)
    (path,) = kept.iterdir()
    path.write_bytes(b"not an archive")
    kept_statistics(source, kept, **SIZES)
    kept_statistics(source, kept, **SIZES)
    assert len(computed) == 2
    kept_statistics(source, path / "below a file", **SIZES)
    assert "are not kept" in caplog.text
    assert len(computed) == 3


class ClosedPath(type(Path())):
    """A path below a folder that may not be entered."""

    def exists(self, **_):
        raise PermissionError(f"no entry to {self}")


def test_of_images_that_nothing_identifies_none_are_kept(folder, tmp_path):
    kept_statistics(opened(folder)._replace(digest=""), tmp_path / "kept", **SIZES)
    assert not (tmp_path / "kept").exists()


def test_without_a_folder_or_in_a_closed_one_they_are_computed(folder, tmp_path):
    expected = image_statistics(opened(folder), **SIZES).mean_image
    for kept in (None, ClosedPath(tmp_path / "closed")):
        found = kept_statistics(opened(folder), kept, **SIZES)
        np.testing.assert_array_equal(found.mean_image, expected)
