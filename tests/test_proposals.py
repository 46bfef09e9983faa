"""Proposals: found in an image, kept in a file, read from others' files, recalled."""

import itertools
import logging
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import scipy.io
from data_helpers import encode, make_source, overlap, picture

from sppnet_jax.data.sources import Objects, Source
from sppnet_jax.detection import proposals
from sppnet_jax.detection.proposals import (
    ProposalSettings,
    find_boxes,
    load_proposals,
    proposal_recall,
    propose,
    save_proposals,
    searched_side,
    settings_key,
)
from sppnet_jax.detection.proposers import (
    boxes_around_edges,
    edge_boxes,
    selective_search,
)
from tests.processes import Started, interruptible

SMALL = ProposalSettings(width=60, min_side=8)


def blocks(height=75, width=100):
    """Coloured rectangles with some noise: dozens of regions to merge."""
    rng = np.random.default_rng(5)
    coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_NEAREST)
    noise = rng.integers(-9, 10, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def named_source(*names, size=(24, 32)):
    records = [
        {"image": encode(picture(*size, seed=seed)), "label": 0, "name": name}
        for seed, name in enumerate(names)
    ]
    return Source(records, ("thing",), "memory", "train")


@pytest.mark.parametrize(("height", "width"), [(120, 200), (200, 90)])
def test_selective_search_finds_an_object_in_the_pixels_of_the_image(height, width):
    image = np.full((height, width, 3), 40, np.uint8)
    image[30:80, 20:60] = (200, 60, 30)
    image[90:110, 65:85] = (20, 200, 90)
    boxes = selective_search(image, width=250)
    for truth in ([30, 20, 80, 60], [90, 65, 110, 85]):
        assert max(overlap(box, np.array(truth)) for box in boxes) > 0.85


def test_windows_are_distinct_inside_the_image_and_not_small():
    image = blocks()
    boxes = selective_search(image, width=150, min_side=20)
    assert boxes.dtype == np.float32
    assert len(boxes) > 50
    assert len(np.unique(boxes, axis=0)) == len(boxes)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= [75, 100]).all()
    # 20 pixels at a width of 150 are 13.3 of 100; the height was rounded.
    assert (boxes[:, 2:] - boxes[:, :2] >= 20 / 1.5 * 0.98).all()
    assert len(selective_search(image, width=150, min_side=8)) > len(boxes)


def test_fewer_windows_are_the_first_of_more():
    boxes = selective_search(blocks(), width=0, min_side=5)
    few = selective_search(blocks(), width=0, min_side=5, max_windows=17)
    np.testing.assert_array_equal(few, boxes[:17])


def test_large_windows_tend_to_come_first_and_the_seed_shuffles_them():
    boxes = selective_search(blocks(), width=0, min_side=5)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    third = len(boxes) // 3
    assert areas[:third].mean() > 2 * areas[-third:].mean()
    other = selective_search(blocks(), width=0, min_side=5, seed=1)
    assert (other != boxes).any()
    np.testing.assert_array_equal(np.unique(other, axis=0), np.unique(boxes, axis=0))


def test_windows_are_the_same_again_and_in_several_threads():
    image = blocks()
    expected = selective_search(image, width=0)
    with ThreadPoolExecutor(3) as pool:
        for boxes in pool.map(lambda _: selective_search(image, width=0), range(6)):
            np.testing.assert_array_equal(boxes, expected)


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_an_image_is_searched_in_parts_with_the_windows_of_the_whole(threads):
    """The oracle gives OpenCV all colour spaces and all k at once."""
    image = cv2.resize(blocks(), (250, 190), interpolation=cv2.INTER_CUBIC)
    lib = cv2.ximgproc.segmentation
    search = lib.createSelectiveSearchSegmentation()
    for colours in (cv2.COLOR_RGB2HSV_FULL, cv2.COLOR_RGB2Lab):
        search.addImage(cv2.cvtColor(image, colours))
    for k in (50, 100):
        search.addGraphSegmentation(lib.createGraphSegmentation(0.8, k, k))
    colour = lib.createSelectiveSearchSegmentationStrategyColor()
    others = [
        lib.createSelectiveSearchSegmentationStrategyFill(),
        lib.createSelectiveSearchSegmentationStrategyTexture(),
        lib.createSelectiveSearchSegmentationStrategySize(),
    ]
    combine = lib.createSelectiveSearchSegmentationStrategyMultiple
    search.addStrategy(combine(colour, *others))
    search.addStrategy(combine(*others))
    found = {(y, x, y + h, x + w) for x, y, w, h in search.process() if min(w, h) >= 9}
    boxes = selective_search(
        image, width=0, min_side=9, max_windows=10**6, threads=threads
    )
    assert len(boxes) == len(found) > 200
    assert set(map(tuple, boxes.tolist())) == found
    alone = selective_search(image, width=0, min_side=9, max_windows=10**6, threads=1)
    np.testing.assert_array_equal(boxes, alone)


@pytest.mark.parametrize("colour", [True, False])
def test_all_regions_of_the_segmentations_are_windows(colour):
    """They are where the merging begins, whatever it goes by."""
    image = cv2.resize(blocks(), (250, 190), interpolation=cv2.INTER_CUBIC)
    lib = cv2.ximgproc.segmentation
    expected = {(0.0, 0.0, 190.0, 250.0)}
    for space in (cv2.COLOR_RGB2HSV_FULL, cv2.COLOR_RGB2Lab):
        for k in (50, 100):
            segmentation = lib.createGraphSegmentation(0.8, k, k)
            regions = segmentation.processImage(cv2.cvtColor(image, space))
            for region in range(regions.max() + 1):
                rows, columns = np.nonzero(regions == region)
                box = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
                expected.add(tuple(map(float, box)))
    boxes = selective_search(
        image, width=0, min_side=1, max_windows=10**6, colour=colour
    )
    assert expected <= set(map(tuple, boxes.tolist()))


def test_regions_are_merged_by_colour_or_without_it():
    settings = SMALL._replace(method="selective_search_no_colour")
    plain = find_boxes(blocks(), settings)
    np.testing.assert_array_equal(
        plain, selective_search(blocks(), width=60, min_side=8, colour=False)
    )
    coloured = find_boxes(blocks(), SMALL)
    assert set(map(tuple, plain.tolist())) != set(map(tuple, coloured.tolist()))


@pytest.mark.parametrize("width", [0, 50])
@pytest.mark.parametrize("size", [(1, 1), (2, 90), (90, 2), (40, 40), (1, 3000)])
def test_an_image_without_windows_is_one(size, width):
    boxes = selective_search(np.full((*size, 3), 99, np.uint8), width=width)
    assert boxes.tolist() == [[0, 0, *size]]


def test_a_long_image_is_shrunk_until_it_can_be_searched():
    image = np.full((6000, 120, 3), 40, np.uint8)
    image[1000:2500, 30:90] = (200, 60, 30)
    boxes = selective_search(image)  # 500 pixels wide it would have 12 million
    assert max(overlap(box, np.array([1000, 30, 2500, 90])) for box in boxes) > 0.85


def test_an_upright_image_is_searched_in_as_few_pixels_as_one_that_lies():
    upright = blocks(height=100, width=75)  # at a width of 60 it would be 80 high
    few = 60 * 45
    expected = selective_search(upright, width=45, min_side=8)
    settings = SMALL._replace(max_pixels=few)
    np.testing.assert_array_equal(find_boxes(upright, settings), expected)
    lying = blocks()
    np.testing.assert_array_equal(find_boxes(lying, settings), find_boxes(lying, SMALL))
    assert searched_side(settings) == few**0.5


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (np.zeros((9, 9), np.uint8), {}, r"uint8 \[height, width, 3\], RGB, got uint8"),
        (np.zeros((9, 9, 3)), {}, "got float64"),
        (np.zeros((0, 9, 3), np.uint8), {}, r"no pixels: shape \[0, 9, 3\]"),
        (np.zeros((9, 9, 3), np.uint8), {"width": -1}, "width -1 must"),
        (np.zeros((9, 9, 3), np.uint8), {"max_windows": 0}, "max_windows 0"),
        (np.zeros((9, 9, 3), np.uint8), {"max_pixels": 0}, "max_pixels .*, got 0"),
        (np.zeros((9, 9, 3), np.uint8), {"max_pixels": 10**6}, "to 500,000, got 10"),
    ],
)
def test_what_can_not_be_searched_is_refused(image, options, message):
    with pytest.raises(ValueError, match=message):
        selective_search(image, **options)


def test_edge_boxes_hold_the_contour_best_first():
    edges = np.zeros((100, 120), np.float32)
    orientations = np.zeros_like(edges)
    edges[[20, 70], 30:80] = 1
    edges[20:71, [30, 79]] = 1
    orientations[[20, 70], 30:80] = np.pi / 2
    rectangles = boxes_around_edges(edges, orientations, 40)
    assert 5 < len(rectangles) <= 40
    assert len(np.unique(rectangles, axis=0)) == len(rectangles)
    x, y, width, height = rectangles[0]
    best = np.array([y, x, y + height, x + width])
    assert overlap(best, np.array([20, 30, 71, 80])) > 0.8
    np.testing.assert_array_equal(
        boxes_around_edges(edges, orientations, 3), rectangles[:3]
    )


@pytest.fixture
def edge_model(tmp_path):
    """A forest of one tree that sees an edge where the gradient is strong."""
    path = tmp_path / "model.yml.gz"
    file = cv2.FileStorage(str(path), cv2.FILE_STORAGE_WRITE)
    file.startWriteStruct("options", cv2.FileNode_MAP)
    for name, value in {
        "stride": 2,
        "shrinkNumber": 2,
        "patchSize": 32,
        "patchInnerSize": 16,
        "numberOfGradientOrientations": 4,
        "gradientSmoothingRadius": 0,
        "regFeatureSmoothingRadius": 2,
        "ssFeatureSmoothingRadius": 8,
        "gradientNormalizationRadius": 4,
        "selfsimilarityGridSize": 5,
        "numberOfTrees": 1,
        "numberOfTreesToEvaluate": 1,
    }.items():
        file.write(name, value)
    file.endWriteStruct()
    trees = {
        "childs": [[2, 0, 0]],
        "featureIds": [[3 * 256 + 8 * 16 + 8, 0, 0]],  # the gradient in the middle
        "edgeBoundaries": [[0, 0, 0, 64]],
        "edgeBins": [[119, 120, 135, 136] * 16],  # the four cells there, strongly
    }
    for name, lists in {**trees, "thresholds": [[0.1, 0.0, 0.0]]}.items():
        file.startWriteStruct(name, cv2.FileNode_SEQ)
        for numbers in lists:
            file.startWriteStruct("", cv2.FileNode_SEQ | cv2.FileNode_FLOW)
            for number in numbers:
                file.write("", number)
            file.endWriteStruct()
        file.endWriteStruct()
    file.release()
    return path


def test_edge_boxes_are_boxes_of_the_image(edge_model):
    image = np.full((120, 160, 3), 30, np.uint8)
    image[40:90, 50:120] = 220
    boxes = edge_boxes(image, edge_model, max_windows=30)
    assert boxes.dtype == np.float32
    assert 1 < len(boxes) <= 30
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= [120, 160]).all()
    assert overlap(boxes[0], np.array([40, 50, 90, 120])) > 0.7
    assert edge_boxes(image[:20], edge_model).tolist() == [[0, 0, 20, 160]]
    assert edge_boxes(image[:35, :40], edge_model).tolist() == [[0, 0, 35, 40]]


def test_edge_boxes_say_what_is_missing(tmp_path):
    image = picture(50, 50)
    with pytest.raises(FileNotFoundError, match=r"model\.yml\.gz from .*opencv_extra"):
        edge_boxes(image, tmp_path / "absent.yml.gz")
    for content in (b"no model", b"%YAML:1.0\n---\nanswer: 42\n"):
        path = tmp_path / "model.yml"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.yml' is not a structured-edge"):
            edge_boxes(image, path)


def test_proposals_of_a_source_are_those_of_its_images(tmp_path, caplog):
    source = make_source(7, broken=(2,))
    found = propose(source, SMALL, tmp_path / "new" / "cache")
    for index, boxes in enumerate(found):
        if index == 2:
            assert boxes.shape == (0, 4)
            continue
        image = picture(20 + index % 5, 24 + index % 7, seed=index)
        expected = selective_search(image, width=60, min_side=8)
        np.testing.assert_array_equal(boxes, expected)
    assert "skipping a broken image: picture_2.png: truncated" in caplog.text
    assert "skipped 1 broken images of the 7" in caplog.text
    # The broken one has no file, so the next run tries it again.
    assert count_kept(tmp_path / "new" / "cache") == 6


@pytest.mark.parametrize("method", ["selective_search", "selective_search_no_colour"])
def test_windows_of_a_jpeg_that_is_decoded_small_are_in_its_own_pixels(
    method, tmp_path, searches
):
    image = np.full((240, 320, 3), 90, np.uint8)
    image[120:200, 160:280] = (230, 40, 30)
    source = make_source(1)
    jpeg = {**source.records[0], "image": encode(image, ".jpg")}
    settings = SMALL._replace(method=method)
    (boxes,) = propose(source._replace(records=[jpeg]), settings, tmp_path)
    assert searches == [(120, 160, 3)]
    assert max(overlap(box, (120, 160, 200, 280)) for box in boxes) > 0.8
    assert (boxes.max(axis=0) <= [240, 320, 240, 320]).all()


@pytest.fixture
def searches(monkeypatch):
    """The shapes of the images that are searched from here on."""
    shapes = []

    def search(image, **options):
        shapes.append(image.shape)
        return selective_search(image, **options)

    monkeypatch.setattr(proposals, "selective_search", search)
    return shapes


def test_what_is_in_the_cache_is_not_searched_again(tmp_path, searches):
    cache = tmp_path / "cache"
    first = propose(make_source(4), SMALL, cache)
    assert len(searches) == 4
    more = propose(make_source(6), SMALL, cache)
    assert len(searches) == 6
    for boxes, known in zip(first, more, strict=False):
        np.testing.assert_array_equal(boxes, known)


def test_the_same_image_is_searched_once(tmp_path, searches):
    source = make_source(3)
    twice = source._replace(records=[*source.records, *source.records])
    found = propose(twice, SMALL, tmp_path / "cache")
    assert len(searches) == 3
    for index in range(3):
        np.testing.assert_array_equal(found[index], found[index + 3])


def test_every_setting_that_matters_is_part_of_the_key(edge_model):
    changed = [
        SMALL,
        SMALL._replace(max_windows=9),
        SMALL._replace(width=61),
        SMALL._replace(min_side=9),
        SMALL._replace(seed=1),
        SMALL._replace(method="selective_search_no_colour"),
        SMALL._replace(method="edge_boxes", model=str(edge_model)),
    ]
    assert len({settings_key(settings) for settings in changed}) == len(changed)
    assert settings_key(SMALL) == settings_key(SMALL._replace(model="unused"))


def test_other_settings_are_searched_anew(tmp_path, searches):
    source, cache = make_source(1), tmp_path / "cache"
    found = propose(source, SMALL, cache)
    fewer = propose(source, SMALL._replace(max_windows=1), cache)
    assert len(searches) == 2
    np.testing.assert_array_equal(fewer[0], found[0][:1])
    again = propose(source, SMALL, cache)
    np.testing.assert_array_equal(again[0], found[0])
    assert len(searches) == 2


def test_a_failure_names_the_image_and_keeps_the_others(tmp_path, monkeypatch):
    def search(image, **options):
        if image.shape[:2] == (23, 27):
            raise MemoryError("too large")
        return selective_search(image, **options)

    cache = tmp_path / "cache"
    monkeypatch.setattr(proposals, "selective_search", search)
    with pytest.raises(RuntimeError, match=r"'picture_3\.png', record 3 .*too large"):
        propose(make_source(9), SMALL, cache)
    assert count_kept(cache) >= 3


def count_kept(cache):
    return len(list(cache.glob("*/*.npy")))


def propose_slowly(cache):
    """In a process of its own."""
    search = proposals.selective_search

    def slow(image, **options):
        time.sleep(0.2)
        return search(image, **options)

    proposals.selective_search = slow
    propose(make_source(40), SMALL, cache)


def test_a_killed_run_goes_on_where_it_was_stopped(tmp_path, searches):
    cache = tmp_path / "cache"
    process = Started(propose_slowly, cache)
    process.wait_until(lambda: count_kept(cache) >= 3)
    process.send(signal.SIGKILL)
    process.end()
    kept = count_kept(cache)
    assert 3 <= kept < 40
    found = propose(make_source(40), SMALL, cache)
    assert len(searches) == 40 - kept
    for index in (0, 39):
        image = picture(20 + index % 5, 24 + index % 7, seed=index)
        direct = selective_search(image, width=60, min_side=8)
        np.testing.assert_array_equal(found[index], direct)


def test_ctrl_c_ends_a_run_soon_and_keeps_what_was_found(tmp_path, monkeypatch):
    calls = []
    numbers = itertools.count(1)  # each call has one of its own, also among threads

    def search(image, **options):
        calls.append(1)
        if next(numbers) == 10:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        return selective_search(image, **options)

    cache = tmp_path / "cache"
    monkeypatch.setattr(proposals, "selective_search", search)
    with interruptible(), pytest.raises(KeyboardInterrupt):
        propose(make_source(60), SMALL, cache)
    assert len(calls) < 20
    kept = count_kept(cache)
    assert kept >= 5
    calls.clear()
    propose(make_source(60), SMALL, cache)
    assert len(calls) == 60 - kept


def propose_more_and_more(cache):
    """In a process of its own."""
    for count in range(2, 20):
        propose(make_source(count), SMALL, cache)


def test_two_processes_can_use_one_cache_and_find_the_same(tmp_path):
    cache, alone = tmp_path / "cache", tmp_path / "alone"
    processes = [Started(propose_more_and_more, cache) for _ in range(2)]
    expected = propose(make_source(19), SMALL, alone)
    for process in processes:
        ended = process.end()
        assert ended.returncode == 0, ended.stderr
    assert count_kept(cache) == 19
    found = propose(make_source(19), SMALL, cache)
    for boxes, those in zip(found, expected, strict=True):
        np.testing.assert_array_equal(boxes, those)


def test_a_cache_or_settings_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "cache"
    path.write_bytes(b"a file")
    source = make_source(1)
    with pytest.raises(OSError, match="cache"):
        propose(source, SMALL, path)
    settings = SMALL._replace(method="edge_boxes")
    with pytest.raises(FileNotFoundError, match="EdgeBoxes needs one"):
        propose(source, settings, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_edge_boxes_of_a_source(tmp_path, edge_model):
    source = named_source("a.png", "b.png", size=(48, 64))
    settings = ProposalSettings("edge_boxes", 50, model=str(edge_model))
    found = propose(source, settings, tmp_path / "cache")
    for seed, boxes in enumerate(found):
        expected = edge_boxes(picture(48, 64, seed=seed), edge_model, max_windows=50)
        np.testing.assert_array_equal(boxes, expected)


BOXES = [
    np.array([[0, 0, 24, 32], [3.5, 2, 10, 20.25]], np.float32),
    np.array([[1, 2, 3, 4]], np.float32),
    np.zeros((0, 4), np.float32),
]


@pytest.mark.parametrize("suffix", ["", ".png", ".jpg"])
def test_written_proposals_are_read_back_in_the_order_of_the_source(tmp_path, suffix):
    path = tmp_path / "boxes.npz"
    save_proposals(path, [name + suffix for name in "abc"], BOXES)
    found = load_proposals(path, named_source("c.png", "a.png"))
    for boxes, expected in zip(found, [BOXES[2], BOXES[0]], strict=True):
        np.testing.assert_array_equal(boxes, expected)
        assert boxes.dtype == np.float32
    assert os.listdir(tmp_path) == ["boxes.npz"]


def write_mat(path, names, boxes):
    """Cells as in the R-CNN releases: names down, boxes across."""
    images = np.empty((len(names), 1), object)
    cells = np.empty((1, len(names)), object)
    for i in range(len(names)):
        images[i, 0], cells[0, i] = names[i], boxes[i]
    scipy.io.savemat(path, {"images": images, "boxes": cells})


def test_matlab_boxes_are_1_based_and_include_both_ends(tmp_path):
    path = tmp_path / "voc_2007_trainval.mat"
    whole = np.array([[1.0, 1, 24, 32], [5, 7, 5, 7]])
    write_mat(path, ["000005", "2008_000012"], [np.ones((1, 4)), whole])
    found = load_proposals(path, named_source("2008_000012.jpg", "000005.jpg"))
    assert found[0].tolist() == [[0, 0, 24, 32], [4, 6, 5, 7]]
    assert found[1].tolist() == [[0, 0, 1, 1]]
    assert found[0].dtype == np.float32


def test_boxes_are_clipped_and_those_outside_left_out(tmp_path, caplog):
    path = tmp_path / "boxes.npz"
    boxes = np.array([[-3, 4, 30, 50], [24, 0, 30, 9], [2, 3, 4, 5]])
    save_proposals(path, ["a"], [boxes])
    found = load_proposals(path, named_source("a.png"))
    assert found[0].tolist() == [[0, 4, 24, 32], [2, 3, 4, 5]]
    assert "left out 1 boxes outside of their image" in caplog.text
    save_proposals(path, ["a"], [boxes[1:2]])
    with pytest.raises(ValueError, match=r"'a\.png' are all outside of its 24×32"):
        load_proposals(path, named_source("a.png"))


def test_a_broken_image_has_no_boxes_and_is_named(tmp_path, caplog):
    source = make_source(2, broken=(1,))
    path = tmp_path / "boxes.npz"
    save_proposals(path, ["picture_0", "picture_1"], [BOXES[1], BOXES[1]])
    with caplog.at_level(logging.WARNING):
        assert [len(boxes) for boxes in load_proposals(path, source)] == [1, 0]
    assert "skipping a broken image: picture_1.png" in caplog.text


def test_images_without_proposals_are_counted_and_named(tmp_path):
    path = tmp_path / "boxes.npz"
    save_proposals(path, ["a", "b"], BOXES[:2])
    source = named_source("b.png", *(f"{i}.png" for i in range(9)))
    with pytest.raises(ValueError, match=r"no proposals for 9 of the 10 .*'0\.png'"):
        load_proposals(path, source)
    save_proposals(path, ["a.png", "a.jpg"], BOXES[:2])
    assert load_proposals(path, named_source("a.jpg"))[0].tolist() == [[1, 2, 3, 4]]
    with pytest.raises(ValueError, match=r"'a\.gif' may be any of \['a\.png', 'a\.jp"):
        load_proposals(path, named_source("a.gif"))


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (np.ones((2, 5)), r"'a' must be \[N, 4\], got \[2, 5\]"),
        (np.array([[0, 0, 5, np.nan]]), "not finite, first in row 0"),
        (np.array([[0, 0, 5, 5], [4, 0, 4, 5]]), "end before they begin, first in row"),
    ],
)
def test_boxes_that_are_none_are_neither_written_nor_read(tmp_path, boxes, message):
    with pytest.raises(ValueError, match=message):
        save_proposals(tmp_path / "boxes.npz", ["a"], [boxes])
    inclusive = boxes.copy()
    inclusive[:, :2] += 1
    write_mat(tmp_path / "boxes.mat", ["a"], [inclusive])
    with pytest.raises(ValueError, match=message):
        load_proposals(tmp_path / "boxes.mat", named_source("a"))


def test_files_of_other_kinds_are_refused(tmp_path):
    source = named_source("a.png")
    with pytest.raises(FileNotFoundError, match=r"no file of proposals .*absent\.npz"):
        load_proposals(tmp_path / "absent.npz", source)
    for suffix in (".npz", ".mat", ".txt"):
        path = tmp_path / f"text{suffix}"
        path.write_bytes(b"these are not the boxes you are looking for" * 9)
        with pytest.raises(ValueError, match=rf"text\{suffix}"):
            load_proposals(path, source)
    np.savez(tmp_path / "other.npz", boxes=BOXES[0])
    with pytest.raises(ValueError, match=r"lacks \['counts', 'names'\]"):
        load_proposals(tmp_path / "other.npz", source)
    np.savez(tmp_path / "odd.npz", boxes=BOXES[0], names=["a"], counts=[3])
    with pytest.raises(ValueError, match=r"with sum 3, boxes \(2, 4\)"):
        load_proposals(tmp_path / "odd.npz", source)
    with pytest.raises(ValueError, match=r"more than once, such as \['a'\]"):
        save_proposals(tmp_path / "twice.npz", ["a", "a"], BOXES[:2])
    with pytest.raises(ValueError, match="1 names, but proposals of 2 images"):
        save_proposals(tmp_path / "few.npz", ["a"], BOXES[:2])


def random_boxes(rng, count):
    corners = rng.integers(0, 20, (count, 2))
    return np.hstack([corners, corners + rng.integers(1, 20, (count, 2))]).astype(float)


@pytest.mark.parametrize("threshold", [0.5, 0.25])
def test_recall_is_the_share_of_objects_that_a_proposal_overlaps(threshold):
    rng = np.random.default_rng(1)
    found = [random_boxes(rng, int(rng.integers(0, 9))) for _ in range(30)]
    objects = []
    for _ in found:
        count = int(rng.integers(0, 5))
        labels, difficult = rng.integers(0, 3, count), rng.random(count) < 0.3
        objects.append(Objects(random_boxes(rng, count), labels, difficult))
    result = proposal_recall(found, objects, 4, threshold=threshold)
    counts, hits = [0] * 4, [0] * 4
    for boxes, those in zip(found, objects, strict=True):
        for box, label, difficult in zip(*those, strict=True):
            if not difficult:
                counts[label] += 1
                hits[label] += any(overlap(box, other) >= threshold for other in boxes)
    assert 0 < sum(hits) < sum(counts)
    assert result["class_objects"] == counts
    assert (result["found"], result["objects"]) == (sum(hits), sum(counts))
    assert result["recall"] == sum(hits) / sum(counts)
    assert result["class_recall"] == [hits[i] / counts[i] for i in range(3)] + [None]
    assert result["mean_proposals"] == sum(map(len, found)) / 30


def test_an_overlap_of_exactly_the_threshold_counts():
    objects = [Objects(np.array([[0.0, 0, 2, 2]]), np.zeros(1), np.zeros(1, bool))]
    half, less = np.array([[0.0, 0, 2, 1]]), np.array([[0.0, 0, 2, 0.99]])
    assert proposal_recall([half], objects, 1)["recall"] == 1
    assert proposal_recall([less], objects, 1)["recall"] == 0


def test_recall_of_nothing_is_none_and_bad_labels_are_refused():
    nothing = Objects(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0, bool))
    assert proposal_recall([BOXES[0]], [nothing], 2)["recall"] is None
    with pytest.raises(ValueError, match="proposals of 1 images, but objects of 2"):
        proposal_recall([BOXES[0]], [nothing] * 2, 2)
    wrong = Objects(np.ones((1, 4)), np.array([2]), np.zeros(1, bool))
    with pytest.raises(ValueError, match=r"image 0 has labels \[2\], outside of 0…1"):
        proposal_recall([BOXES[0]], [wrong], 2)


def test_a_matlab_7_3_file_is_refused_with_what_to_do(tmp_path):
    path = tmp_path / "boxes.mat"
    # The header of that format: its version is 2.0.
    path.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + bytes(64))
    with pytest.raises(ValueError, match=r"7\.3 file.*'-v7'"):
        load_proposals(path, make_source(1))
