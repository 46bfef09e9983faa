"""Selective search and EdgeBoxes: the windows of one image that may hold an object.

OpenCV does the work; here it gets the settings of the R-CNN release, which the paper
used, and a ranking that depends on nothing but the image: OpenCV's own draws from the
C library's `rand()`, so it changes from call to call and with other threads.

Images are uint8 [height, width, 3], RGB. Boxes are float32 [N, 4], half-open (ymin,
xmin, ymax, xmax) in pixels of the image as it was given, the most promising first.
"""

import functools
import itertools
import logging
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from sppnet_jax.data.images import check_image

log = logging.getLogger(__name__)

# The release's fast mode: graph segmentations with these k, merged no smaller than k,
# in these colour spaces.
_KS = (50, 100)
_COLOURS = (cv2.COLOR_RGB2HSV_FULL, cv2.COLOR_RGB2Lab)
_SIGMA = 0.8
# The time can grow with the square of the pixels, and OpenCV turns images by 45°.
MAX_PIXELS = 500_000
_MAX_SIDE = 2000
# What the structured-edge model looks at around a pixel; OpenCV reads it unchecked.
_EDGE_PATCH = 32


def selective_search(
    image: np.ndarray,
    *,
    width: int = 500,
    max_pixels: int = MAX_PIXELS,
    min_side: int = 20,
    max_windows: int = 2000,
    seed: int = 0,
    threads: int = 0,
    colour: bool = True,
) -> np.ndarray:
    """Windows around the regions that grow when similar neighbours are merged.

    The settings are those of the R-CNN release's fast mode: HSV and Lab, k = 50 and
    100, σ = 0.8, regions merged by colour, texture, size and fill and by the last three
    (OpenCV's own "fast" has k = 150, 300 and 450 and finds 38 % as many windows). As in
    the paper on selective search, windows are ranked by their position in the
    hierarchy, the whole image first, times a random number.

    `image`: uint8 [height, width, 3], RGB.
    `width`: of the image that is searched, in pixels; 0 takes it as it is.
    `max_pixels`: one that would have more, or a side above 2,000, is shrunk to these.
    At most half a million.
    `min_side`: windows with a shorter side are dropped, in pixels of the image that is
    searched.
    `max_windows`: how many windows to keep, the first of the ranking.
    `seed`: of the ranking.
    `threads`: that search this image, of which each takes a colour space and a k; 0 is
    one for each core. The windows don't depend on them.
    `colour`: False merges regions by texture, size and fill, by the last two and by
    size: OpenCV looks at the whole image for the colours of each region, which takes
    half of the time of photographs.

    Returns: float32 [N, 4] with 1 ≤ N ≤ max_windows, no two alike; the whole image
    where there is no window (section 4.1 of the paper).
    Raises: ValueError for arguments that do not fit.
    """
    check_image(image)
    if width < 0 or min_side < 1 or max_windows < 1:
        raise ValueError(
            f"width {width} must be at least 0, min_side {min_side} and max_windows "
            f"{max_windows} at least 1"
        )
    if not 1 <= max_pixels <= MAX_PIXELS:
        raise ValueError(f"max_pixels must be 1 to {MAX_PIXELS:,}, got {max_pixels}")
    rows, columns = _searched_size(image, width, max_pixels)
    if min(rows, columns) < min_side:
        return _whole_image(image)
    rectangles = _merged_regions(_resize(image, rows, columns), threads, colour)
    rectangles = rectangles[(rectangles[:, 2:] >= min_side).all(axis=1)]
    if not len(rectangles):
        return _whole_image(image)
    first = _rank(rectangles, seed)[:max_windows]
    return _to_boxes(rectangles[first], (rows, columns), image)


def edge_boxes(
    image: np.ndarray, model_path: str | Path, *, max_windows: int = 2000
) -> np.ndarray:
    """Windows that hold whole contours and cut few (EdgeBoxes).

    `image`: uint8 [height, width, 3], RGB.
    `model_path`: of the structured-edge model, see `load_edge_model`.
    `max_windows`: how many windows to keep at most, those with the best scores.

    Returns: as `selective_search`.
    Raises: FileNotFoundError if there is no model, ValueError for a file that is none
    and for an array that is no image.
    """
    check_image(image)
    detector = load_edge_model(model_path)
    if min(image.shape[:2]) < _EDGE_PATCH:
        return _whole_image(image)
    edges = detector.detectEdges(image.astype(np.float32) / 255)
    orientations = detector.computeOrientation(edges)
    thin = detector.edgesNms(edges, orientations)
    rectangles = boxes_around_edges(thin, orientations, max_windows)
    if not len(rectangles):
        return _whole_image(image)
    return _to_boxes(rectangles, image.shape[:2], image)


def boxes_around_edges(
    edges: np.ndarray, orientations: np.ndarray, max_windows: int
) -> np.ndarray:
    """The EdgeBoxes of an edge map, the best score first.

    `edges`: float32 [height, width], the strength of each thin edge, 0–1.
    `orientations`: float32 [height, width], of the edges' normals, in radians.

    Returns: int [N, 4], (x, y, width, height) in pixels, N ≤ max_windows, distinct.
    """
    finder = cv2.ximgproc.createEdgeBoxes(maxBoxes=max_windows)
    found, scores = finder.getBoundingBoxes(edges, orientations)
    if not len(found):
        return np.zeros((0, 4), np.int64)
    best_first = np.argsort(-np.asarray(scores).reshape(-1), kind="stable")
    rectangles = np.asarray(found, np.int64).reshape(-1, 4)[best_first]
    _, first = np.unique(rectangles, axis=0, return_index=True)
    return rectangles[np.sort(first)][:max_windows]


@functools.lru_cache(maxsize=1)
def load_edge_model(path: str | Path) -> "cv2.ximgproc.StructuredEdgeDetection":
    """Loads the model of structured edges that EdgeBoxes needs; keeps the last one.

    Raises: FileNotFoundError if there is no file, ValueError if it is no such model.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"there is no structured-edge model {str(path)!r}, and EdgeBoxes needs "
            "one: get model.yml.gz from testdata/cv/ximgproc of "
            "https://github.com/opencv/opencv_extra, or use selective search"
        )
    try:
        # OpenCV divides by the number of trees: a file without it ends the process.
        storage = cv2.FileStorage(str(path), cv2.FILE_STORAGE_READ)
        options = storage.getNode("options")
        trees = 0 if options.empty() else options.getNode("numberOfTrees").real()
        if trees >= 1:
            return cv2.ximgproc.createStructuredEdgeDetection(str(path))
    except (cv2.error, SystemError) as error:
        log.debug("OpenCV on %s: %r", path, error.__cause__ or error)
    raise ValueError(
        f"{str(path)!r} is not a structured-edge model that OpenCV can read; "
        "get model.yml.gz from testdata/cv/ximgproc of "
        "https://github.com/opencv/opencv_extra"
    )


def _searched_size(image: np.ndarray, wanted: int, max_pixels: int) -> tuple[int, int]:
    """(rows, columns) at the wanted width, or the largest with the pixels allowed."""
    height, width = image.shape[:2]
    factor = wanted / width if wanted else 1.0
    factor = min(
        factor,
        math.sqrt(max_pixels / (height * width)),
        _MAX_SIDE / max(height, width),
    )
    return max(1, round(height * factor)), max(1, round(width * factor))


def _resize(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    if image.shape[:2] == (rows, columns):
        return np.ascontiguousarray(image)
    shrinks = rows * columns < image.shape[0] * image.shape[1]
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(image, (columns, rows), interpolation=interpolation)


def _merged_regions(image: np.ndarray, threads: int, colour: bool) -> np.ndarray:
    """Rectangles (x, y, width, height) of all regions, int [N, 4], in a fixed order."""
    # The smaller k takes longer: it goes first.
    parts = list(itertools.product(_KS, _COLOURS, (colour,)))
    # Segmentations know nothing of each other, and OpenCV releases Python's lock.
    with ThreadPoolExecutor(min(threads or os.cpu_count() or 1, len(parts))) as pool:
        found = pool.map(lambda part: _grown_regions(image, *part), parts)
        # The set of rectangles is always the same, their order is not.
        return np.unique(np.concatenate(list(found)), axis=0)


def _grown_regions(image: np.ndarray, k: int, space: int, colour: bool) -> np.ndarray:
    """Rectangles of all that grows from one segmentation in one colour space."""
    lib = cv2.ximgproc.segmentation
    # New objects for every image: strategies remember the last one's histograms.
    search = lib.createSelectiveSearchSegmentation()
    search.addImage(cv2.cvtColor(image, space))
    search.addGraphSegmentation(lib.createGraphSegmentation(_SIGMA, k, k))
    fill = lib.createSelectiveSearchSegmentationStrategyFill()
    texture = lib.createSelectiveSearchSegmentationStrategyTexture()
    size = lib.createSelectiveSearchSegmentationStrategySize()
    combine = lib.createSelectiveSearchSegmentationStrategyMultiple
    if colour:
        by_colour = lib.createSelectiveSearchSegmentationStrategyColor()
        search.addStrategy(combine(by_colour, fill, texture, size))
    search.addStrategy(combine(fill, texture, size))
    if not colour:
        search.addStrategy(combine(fill, size))
        search.addStrategy(size)
    return np.asarray(search.process(), np.int64).reshape(-1, 4)


def _rank(rectangles: np.ndarray, seed: int) -> np.ndarray:
    """The order of rectangles: position from the largest on, times a random number."""
    areas = rectangles[:, 2] * rectangles[:, 3]
    position = np.empty(len(areas))
    position[np.argsort(-areas, kind="stable")] = np.arange(1, len(areas) + 1)
    priority = position * np.random.default_rng(seed).random(len(areas))
    return np.argsort(priority, kind="stable")


def _to_boxes(
    rectangles: np.ndarray, searched: tuple[int, ...], image: np.ndarray
) -> np.ndarray:
    """Boxes of the image, from rectangles of the image that was searched."""
    x, y, width, height = rectangles.T
    edges = np.stack([y, x, y + height, x + width], axis=1).astype(np.float64)
    size = np.array(image.shape[:2] * 2)
    boxes = edges * size / np.array(searched * 2)
    return np.clip(boxes, 0, size).astype(np.float32)


def _whole_image(image: np.ndarray) -> np.ndarray:
    return np.array([[0, 0, *image.shape[:2]]], np.float32)
